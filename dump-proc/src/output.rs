//! The output fd: a stream of bytes to the caller, holes in a file where the kernel allows it.
//!
//! The fd comes from a client and can be anything that can be written. Two ways of writing cover all of it:
//! - at offsets ([`Way::Sparse`]): a file with nothing but hole after its current offset, such as a new one. Zeros are left
//!   out, so the dump of a mostly empty guest is a mostly empty file.
//! - in order ([`Way::Stream`]): pipes and sockets; files opened for appending, where the kernel ignores offsets; devices
//!   and files with old data ahead, where what is left out would not read as zero.

use crate::memory::file_offset;
use ipc::caps::DumpFd;
use ipc::dump::DumpOutput;
use ipc::memory::PAGE_BYTES;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Zeros for streams. A write's size, bytes.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

/// Without the page cache every write is one of the disk: holes smaller than this cost more than they save, bytes.
const DIRECT_HOLE_BYTES: u64 = 64 << 10;

enum Way {
    /// Written at offsets from `base`; `written` is the end of the last byte that was really written, from `base`.
    Sparse { base: u64, written: u64 },
    /// Written in order.
    Stream,
}

/// Where the dump goes. Bytes are put one after the other; nothing is ever read back.
pub struct Output {
    fd: DumpFd,
    way: Way,
    /// Bytes put so far.
    position: u64,
    direct: bool,
}

impl Output {
    /// Looks at the fd. The dump starts at its current offset.
    ///
    /// # Errors
    /// The system's error.
    pub fn new(output: DumpOutput) -> io::Result<Self> {
        let DumpOutput { fd, appends, direct } = output;
        let way = match if appends { None } else { empty_from(&fd)? } {
            Some(base) => Way::Sparse { base, written: 0 },
            None => Way::Stream,
        };
        Ok(Self {
            fd,
            way,
            position: 0,
            direct,
        })
    }

    /// The output as one that is written in any order, before anything is put.
    ///
    /// # Errors
    /// The output itself when there is but one order.
    pub fn into_places(self) -> Result<Places, Self> {
        match self.way {
            Way::Sparse { base, .. } => Ok(Places {
                fd: self.fd,
                base,
                end: AtomicU64::new(0),
                least_hole: if self.direct { DIRECT_HOLE_BYTES } else { PAGE_BYTES },
            }),
            Way::Stream => Err(self),
        }
    }

    /// Bytes put so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Puts bytes; pages of zeros among them may be left out.
    ///
    /// # Errors
    /// The system's error.
    pub fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        if matches!(self.way, Way::Stream) {
            self.write(bytes)?;
            self.position += bytes.len() as u64;
            return Ok(());
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let zeros = run(rest, self.position, true);
            self.position += zeros as u64;
            rest = &rest[zeros..];
            let data = run(rest, self.position, false);
            self.write(&rest[..data])?;
            self.position += data as u64;
            rest = &rest[data..];
        }
        Ok(())
    }

    /// Puts `count` zeros.
    ///
    /// # Errors
    /// The system's error.
    pub fn put_zeros(&mut self, count: u64) -> io::Result<()> {
        match self.way {
            Way::Sparse { .. } => self.position += count,
            Way::Stream => {
                let mut left = count;
                while left > 0 {
                    let step = left.min(ZEROS.len() as u64);
                    self.write(&ZEROS[..step as usize])?;
                    self.position += step;
                    left -= step;
                }
            }
        }
        Ok(())
    }

    /// Gives a file that ends in a hole its size, and leaves its offset at the end, as writing in order would have.
    ///
    /// # Errors
    /// The system's error.
    pub fn finish(mut self) -> io::Result<()> {
        if let Way::Sparse { base, written } = self.way {
            if written < self.position {
                // One byte rather than ftruncate, which the sealed filter need not allow for this.
                self.position -= 1;
                self.write(&[0])?;
                self.position += 1;
            }
            lseek(
                &self.fd,
                file_offset(base.saturating_add(self.position))?,
                Whence::SeekSet,
            )?;
        }
        Ok(())
    }

    /// Writes all of `bytes` at the current position, which stays.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.way {
            Way::Sparse { base, written } => {
                write_at(&self.fd, base.saturating_add(self.position), bytes)?;
                *written = self.position + bytes.len() as u64;
                Ok(())
            }
            Way::Stream => write(&self.fd, bytes),
        }
    }
}

/// A file with nothing but hole ahead, written in any order by any number of threads.
pub struct Places {
    fd: DumpFd,
    /// Where the dump begins.
    base: u64,
    /// The end of what was really written.
    end: AtomicU64,
    /// Zeros of fewer bytes are written.
    least_hole: u64,
}

impl Places {
    /// Writes bytes of the dump at their place; pages of zeros among them may be left out.
    ///
    /// # Errors
    /// The system's error.
    pub fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let (mut begin, mut at) = (0, 0);
        while at < bytes.len() {
            at += run(&bytes[at..], offset + at as u64, false);
            let zeros = run(&bytes[at..], offset + at as u64, true);
            if zeros as u64 >= self.least_hole || at + zeros == bytes.len() && zeros >= PAGE_BYTES as usize {
                self.write(offset + begin as u64, &bytes[begin..at])?;
                begin = at + zeros;
            }
            at += zeros;
        }
        self.write(offset + begin as u64, &bytes[begin..])
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if !bytes.is_empty() {
            write_at(&self.fd, self.base.saturating_add(offset), bytes)?;
            self.end.fetch_max(offset + bytes.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Gives a file that ends in a hole its size, and leaves its offset at the end, as writing in order would have. The
    /// dump has `bytes`.
    ///
    /// # Errors
    /// The system's error.
    pub fn finish(self, bytes: u64) -> io::Result<()> {
        if self.end.load(Ordering::Relaxed) < bytes {
            // A page rather than ftruncate, which the sealed filter need not allow for this; a page also suits O_DIRECT.
            static LAST: Page = Page([0; PAGE_BYTES as usize]);
            let last = (bytes - 1) % PAGE_BYTES + 1;
            self.write(bytes - last, &LAST.0[..last as usize])?;
        }
        lseek(&self.fd, file_offset(self.base.saturating_add(bytes))?, Whence::SeekSet)?;
        Ok(())
    }
}

#[repr(align(4096))]
struct Page([u8; PAGE_BYTES as usize]);

/// Writes all of `bytes` in order.
///
/// # Errors
/// The system's error.
pub fn write(fd: &DumpFd, bytes: &[u8]) -> io::Result<()> {
    write_all(bytes, |rest, _| nix::unistd::write(fd, rest))
}

/// Writes all of `bytes` at an offset.
///
/// # Errors
/// The system's error.
pub fn write_at(fd: &DumpFd, offset: u64, bytes: &[u8]) -> io::Result<()> {
    // Checked at the end, so that nothing in between is too large.
    file_offset(offset.saturating_add(bytes.len() as u64))?;
    write_all(bytes, |rest, done| {
        nix::sys::uio::pwrite(fd, rest, (offset + done as u64) as i64)
    })
}

/// Has what is left written again and again; `write` is told how much has been.
fn write_all(bytes: &[u8], write: impl Fn(&[u8], usize) -> Result<usize, Errno>) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match write(&bytes[done..], done) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => done += count,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait(),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// How long a client's non-blocking pipe or socket is given to be read from.
const FULL: Duration = Duration::from_millis(1);

/// Waits a moment, because a non-blocking pipe or socket takes no more. The supervisor makes what clients pass block;
/// this is for a client that has taken that back. The sealed filter has no room for a call that would wait for the reader.
fn wait() {
    std::thread::park_timeout(FULL);
}

/// The current offset, when everything from there on reads as zeros until it is written.
fn empty_from(fd: &DumpFd) -> io::Result<Option<u64>> {
    let Ok(base) = lseek(fd, 0, Whence::SeekCur) else {
        return Ok(None);
    };
    match lseek(fd, base, Whence::SeekData) {
        // Only regular files answer so: no data from here on.
        Err(Errno::ENXIO) => Ok(u64::try_from(base).ok()),
        // Devices do not know the question.
        Err(_) => Ok(None),
        Ok(_) => {
            lseek(fd, base, Whence::SeekSet)?;
            Ok(None)
        }
    }
}

/// How many bytes of `bytes`, which begin at `position` of the dump, belong to blocks that are all zero (or, with
/// `zero` unset, that are not). Blocks are the file's pages as far as the dump began on one.
fn run(bytes: &[u8], position: u64, zero: bool) -> usize {
    let page = PAGE_BYTES as usize;
    let mut end = 0;
    while end < bytes.len() {
        let into_page = (position as usize + end) % page;
        let block = &bytes[end..bytes.len().min(end + page - into_page)];
        if is_zero(block) != zero {
            break;
        }
        end += block.len();
    }
    end
}

/// Whether all bytes are 0. Folding whole lines lets the compiler use vectors; the early way out is per line.
pub fn is_zero(bytes: &[u8]) -> bool {
    let lines = bytes.chunks_exact(128);
    let rest = lines.remainder();
    lines
        .into_iter()
        .all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::unix::fs::MetadataExt;

    fn output(file: &std::fs::File) -> Output {
        Output::new(DumpOutput::new(file.try_clone().unwrap().into()).unwrap()).unwrap()
    }

    fn put_sample(output: &mut Output) -> Vec<u8> {
        let mut sample = vec![7; 5000];
        sample.resize(40_000, 0);
        sample.extend([9; 3]);
        output.put(&sample).unwrap();
        output.put_zeros(1 << 20).unwrap();
        sample.resize(sample.len() + (1 << 20), 0);
        sample
    }

    #[test]
    fn a_new_file_gets_holes_and_its_full_size() {
        let mut file = tempfile::tempfile().unwrap();
        let mut out = output(&file);
        let wanted = put_sample(&mut out);
        out.finish().unwrap();
        assert_eq!(file.stream_position().unwrap(), wanted.len() as u64);
        assert!(file.metadata().unwrap().blocks() * 512 < 64 << 10);
        let mut got = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut got).unwrap();
        assert!(got == wanted);
    }

    /// In any order; past the page cache as well, where the directory for temporary files allows that.
    #[test]
    fn places_are_written_in_any_order_and_holes_stay_holes() {
        use std::os::unix::fs::OpenOptionsExt;
        const PIECE: usize = 1 << 18;
        let mut wanted = vec![0; 4 * PIECE];
        for page in [0, 1, 3, 70, 71, 100, 127, 128] {
            wanted[page * 4096 + 5] = page as u8 + 1;
        }
        let directory = tempfile::tempdir().unwrap();
        for flags in [0, libc::O_DIRECT] {
            let path = directory.path().join(flags.to_string());
            let mut options = File::options();
            let Ok(mut file) = options
                .read(true)
                .write(true)
                .create(true)
                .custom_flags(flags)
                .open(&path)
            else {
                println!("SKIPPED: no O_DIRECT here");
                continue;
            };
            let places = output(&file).into_places().ok().unwrap();
            assert_eq!(places.least_hole > 4096, flags == libc::O_DIRECT);
            let mut room = vec![0; PIECE + 4096];
            let skip = room.as_ptr().align_offset(4096);
            for number in [2, 0, 3, 1] {
                let piece = &mut room[skip..skip + PIECE];
                piece.copy_from_slice(&wanted[number * PIECE..][..PIECE]);
                places.put((number * PIECE) as u64, piece).unwrap();
            }
            places.finish(wanted.len() as u64).unwrap();
            assert_eq!(file.stream_position().unwrap(), wanted.len() as u64);
            assert!(file.metadata().unwrap().blocks() * 512 <= 8 * 65536);
            assert!(std::fs::read(&path).unwrap() == wanted);
        }
    }

    #[test]
    fn old_data_ahead_is_overwritten_with_zeros() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0xaa; 4 << 20]).unwrap();
        file.seek(SeekFrom::Start(10)).unwrap();
        let mut out = output(&file);
        let wanted = put_sample(&mut out);
        out.finish().unwrap();
        let mut got = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut got).unwrap();
        assert_eq!(got.len(), 4 << 20);
        assert_eq!(got[..10], [0xaa; 10]);
        assert!(got[10..10 + wanted.len()] == wanted);
        assert!(got[10 + wanted.len()..].iter().all(|byte| *byte == 0xaa));
    }

    #[test]
    fn runs_end_at_page_borders_of_the_dump() {
        let mut bytes = vec![0; 3 * 4096];
        bytes[5000] = 1;
        assert_eq!(run(&bytes, 0, true), 4096);
        assert_eq!(run(&bytes[4096..], 4096, false), 4096);
        assert_eq!(run(&bytes[100..], 100, true), 3996);
        assert_eq!(run(&bytes[8192..], 8192, true), 4096);
        assert_eq!(run(&[], 0, true), 0);
    }

    #[test]
    fn one_byte_anywhere_makes_a_block_not_zero() {
        for size in [1, 127, 128, 4095, 4096] {
            let mut block = vec![0; size];
            assert!(is_zero(&block));
            for at in [0, size / 2, size - 1] {
                block[at] = 1;
                assert!(!is_zero(&block));
                block[at] = 0;
            }
        }
    }
}
