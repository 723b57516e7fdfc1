//! Operations as blocking system calls, for worker threads.

use super::Operation;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering;

nix::ioctl_write_ptr_bad!(
    /// Discards a range of a block device: `[offset, bytes]`.
    blk_discard,
    nix::request_code_none!(0x12, 119),
    [u64; 2]
);

/// Runs an operation to its end on the calling thread.
pub(super) fn execute(file: BorrowedFd<'_>, operation: &Operation) -> Result<usize, Errno> {
    let fd = file.as_raw_fd();
    match operation {
        Operation::Read { offset, segments, .. } => {
            let iovecs = segments.iovecs();
            // SAFETY: the segments point to memory that lives as long as the operation, which the caller holds.
            let result = unsafe { libc::preadv2(fd, iovecs.as_ptr(), count(iovecs), off(*offset)?, 0) };
            Errno::result(result).map(usize_of)
        }
        Operation::ReadStream { segments, .. } => {
            let iovecs = segments.iovecs();
            // SAFETY: as above. An offset of -1 means the file's own position.
            let result = unsafe { libc::preadv2(fd, iovecs.as_ptr(), count(iovecs), -1, 0) };
            Errno::result(result).map(usize_of)
        }
        Operation::WriteStream { segments, .. } => {
            let iovecs = segments.iovecs();
            // SAFETY: as above.
            let result = unsafe { libc::pwritev2(fd, iovecs.as_ptr(), count(iovecs), -1, 0) };
            Errno::result(result).map(usize_of)
        }
        // The engines wait by themselves.
        Operation::Ready { .. } => Err(Errno::EINVAL),
        Operation::Write {
            offset,
            segments,
            durable,
            ..
        } => {
            let iovecs = segments.iovecs();
            let flags = if *durable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as above.
            let result = unsafe { libc::pwritev2(fd, iovecs.as_ptr(), count(iovecs), off(*offset)?, flags) };
            Errno::result(result).map(usize_of)
        }
        Operation::Sync { .. } => nix::unistd::fdatasync(file).map(|()| 0),
        Operation::Range {
            offset, bytes, mode, ..
        } => {
            // SAFETY: no memory is involved.
            let result = unsafe { libc::fallocate(fd, mode.flags(), off(*offset)?, off(*bytes)?) };
            Errno::result(result).map(|_| 0)
        }
        Operation::Truncate { bytes, .. } => nix::unistd::ftruncate(file, off(*bytes)?).map(|()| 0),
        Operation::Extent { offset, is_data, .. } => {
            let from = off(*offset)?;
            let data = lseek(file, from, Whence::SeekData)?;
            is_data.store(data == from, Ordering::Relaxed);
            let end = match data == from {
                // Who changes the file between the two calls has it as he likes; the second may even fail.
                true => lseek(file, from, Whence::SeekHole).unwrap_or(from),
                false => data,
            };
            Ok(usize::try_from(end).unwrap_or(0))
        }
        // SAFETY: the kernel reads two u64, no more.
        Operation::Discard { offset, bytes, .. } => unsafe { blk_discard(fd, &[*offset, *bytes]) }.map(|_| 0),
    }
}

fn count(iovecs: &[libc::iovec]) -> i32 {
    // Segments never hold more than IOV_MAX.
    i32::try_from(iovecs.len()).unwrap_or(i32::MAX)
}

fn off(value: u64) -> Result<libc::off_t, Errno> {
    libc::off_t::try_from(value).map_err(|_| Errno::EINVAL)
}

fn usize_of(value: isize) -> usize {
    usize::try_from(value).unwrap_or(0)
}
