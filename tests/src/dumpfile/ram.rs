//! Guest RAM from the host's side: the supervisor's memfd, which root opens by way of /proc.

use super::PAGE;
use crate::procfs;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

/// Where RAM ends below 4 GiB.
const LOW_END: u64 = 3 << 30;
/// Where the rest of it begins.
const HIGH_START: u64 = 4 << 30;

/// Guest RAM.
pub struct GuestRam {
    memfd: File,
    /// How much.
    pub bytes: u64,
}

impl GuestRam {
    /// That of a running `bulkhead`.
    ///
    /// # Errors
    /// When it is not to be had: only root may.
    pub fn of(pid: i32, bytes: u64) -> Result<Self, String> {
        let descriptors = procfs::descriptors(pid);
        let named = |(_, target): &&(i32, String)| target.starts_with("/memfd:bulkhead-ram");
        let (number, _) = descriptors.iter().find(named).ok_or("no guest RAM among the fds")?;
        let path = format!("/proc/{pid}/fd/{number}");
        let memfd = File::options().read(true).write(true).open(&path);
        let memfd = memfd.map_err(|error| format!("{path}: {error}"))?;
        Ok(Self { memfd, bytes })
    }

    /// Pieces of guest physical address space: first address and length.
    pub fn pieces(&self) -> Vec<(u64, u64)> {
        let low = self.bytes.min(LOW_END);
        let high = (HIGH_START, self.bytes - low);
        [(0, low), high].into_iter().filter(|piece| piece.1 > 0).collect()
    }

    /// Where a guest physical address is in the memfd.
    pub fn offset(&self, address: u64) -> u64 {
        if address < HIGH_START {
            address
        } else {
            address - HIGH_START + LOW_END
        }
    }

    /// Writes to guest memory, which nobody else should be doing.
    ///
    /// # Panics
    /// When that is not possible.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memfd
            .write_all_at(bytes, self.offset(address))
            .expect("writing guest RAM");
    }

    /// Reads guest memory. Holes are read, not filled.
    ///
    /// # Panics
    /// When that is not possible.
    pub fn read(&self, address: u64, bytes: &mut [u8]) {
        self.memfd
            .read_exact_at(bytes, self.offset(address))
            .expect("reading guest RAM");
    }

    /// Host memory that it takes up, in blocks of 512 bytes.
    pub fn blocks(&self) -> u64 {
        self.memfd.metadata().map_or(0, |status| status.blocks())
    }

    /// Whether part of it was never touched.
    pub fn is_hole(&self, address: u64, bytes: u64) -> bool {
        is_hole(&self.memfd, self.offset(address), bytes)
    }

    /// For each page in turn whether it was never touched.
    pub fn holes(&self) -> Vec<bool> {
        let mut holes = vec![true; (self.bytes / PAGE as u64) as usize];
        let mut at = 0;
        while let Some(begin) = seek(&self.memfd, at, Whence::SeekData).filter(|begin| *begin < self.bytes) {
            at = seek(&self.memfd, begin, Whence::SeekHole).map_or(self.bytes, |end| end.min(self.bytes));
            holes[begin as usize / PAGE..at as usize / PAGE].fill(false);
        }
        holes
    }
}

/// Whether a file has a hole there, as far as it has holes at all.
pub fn is_hole(file: &File, offset: u64, bytes: u64) -> bool {
    seek(file, offset, Whence::SeekData).is_none_or(|data| data >= offset + bytes)
}

fn seek(file: &File, offset: u64, whence: Whence) -> Option<u64> {
    match lseek(file, offset as i64, whence) {
        Ok(found) => Some(found as u64),
        // Nothing of that kind follows.
        Err(Errno::ENXIO) => None,
        // It does not know: all of it is data.
        Err(_) => Some(offset),
    }
}
