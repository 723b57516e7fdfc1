//! Guest RAM as dump-proc sees it: pieces of guest physical address space, and data and holes of the memory fd.

use crate::live::Live;
use ipc::Failure;
use ipc::caps::GuestMemRo;
use ipc::dump::DumpRange;
use ipc::memory::{PAGE_BYTES, RamRegion, ram_regions};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::OnceLock;

/// The read-only fd of guest RAM and the RAM regions in it.
pub struct GuestMemory {
    fd: GuestMemRo,
    regions: Vec<RamRegion>,
    /// The guest runs on: what it changes is put aside.
    live: OnceLock<Live>,
}

/// Part of the memory fd that is of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length, bytes.
    pub bytes: u64,
    /// `false`: never written (or given back by a balloon), so it reads as zeros and need not be looked at.
    pub is_data: bool,
}

/// Where a guest physical address is in the memory fd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Located {
    /// Offset in the memory fd.
    pub offset: u64,
    /// How many bytes of RAM follow from there, this one included.
    pub bytes: u64,
}

impl GuestMemory {
    /// Takes over guest RAM.
    ///
    /// # Errors
    /// When the fd is shorter than the RAM it is said to hold, or the size is no size of RAM.
    pub fn new(fd: GuestMemRo, ram_bytes: u64) -> Result<Self, Failure> {
        if ram_bytes == 0 || !ram_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(Failure::new(format!(
                "dump-proc: {ram_bytes} bytes is not a size of guest RAM"
            )));
        }
        let fd_bytes = lseek(&fd, 0, Whence::SeekEnd).map_err(|errno| Failure::from(io::Error::from(errno)))?;
        if u64::try_from(fd_bytes).unwrap_or(0) < ram_bytes {
            return Err(Failure::new(format!(
                "dump-proc: the guest memory fd has {fd_bytes} bytes, RAM is {ram_bytes}"
            )));
        }
        let regions = ram_regions(ram_bytes);
        Ok(Self {
            fd,
            regions,
            live: OnceLock::new(),
        })
    }

    /// The RAM inside `range`, or all of it.
    pub fn pieces(&self, range: Option<DumpRange>) -> Vec<RamRegion> {
        clip(&self.regions, range)
    }

    /// Where a guest physical address is; `None`: it is no RAM.
    pub fn locate(&self, address: u64) -> Option<Located> {
        self.regions.iter().find_map(|region| {
            let into = address.checked_sub(region.guest_address)?;
            (into < region.bytes).then(|| Located {
                offset: region.offset + into,
                bytes: region.bytes - into,
            })
        })
    }

    /// Where RAM begins above an address.
    pub fn next_ram(&self, address: u64) -> Option<u64> {
        let starts = self.regions.iter().map(|region| region.guest_address);
        starts.filter(|start| *start > address).min()
    }

    /// What lies at `offset` of the memory fd: a hole up to the next data, or what is to be read up to `end`. Nobody asks
    /// where data ends, because the kernel would look at every page up to there, far beyond `end`: the holes that are left
    /// between data and `end` read as zeros, and reading does not bring them back. So `end` should be near.
    ///
    /// # Errors
    /// The system's error.
    pub fn extent(&self, offset: u64, end: u64) -> io::Result<Extent> {
        let data = match lseek(&self.fd, file_offset(offset)?, Whence::SeekData) {
            Ok(found) => u64::try_from(found).map_err(io::Error::other)?.min(end),
            // Nothing but hole follows.
            Err(Errno::ENXIO) => end,
            Err(errno) => return Err(errno.into()),
        };
        let is_data = data <= offset;
        Ok(Extent {
            bytes: if is_data { end } else { data } - offset,
            is_data,
        })
    }

    /// From when it is armed memory is as it is in that moment. What the guest writes later is put aside.
    ///
    /// # Errors
    /// When it is so already.
    pub fn go_live(&self, live: Live) -> Result<(), Failure> {
        self.live
            .set(live)
            .map_err(|_| Failure::new("dump-proc: the memory is watched already"))
    }

    /// Set when the guest runs on.
    pub fn live(&self) -> Option<&Live> {
        self.live.get()
    }

    /// Fills `buffer` from `offset` of the memory fd, with what was there when the dump began.
    ///
    /// # Errors
    /// The system's error; `UnexpectedEof` when the fd ends early.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_now(offset, buffer)?;
        if let Some(live) = self.live() {
            live.overlay(offset, buffer);
        }
        Ok(())
    }

    /// As [`Self::read`], but what is there now.
    ///
    /// # Errors
    /// As there.
    pub fn read_now(&self, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            match read_at(&self.fd, offset, buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => {
                    buffer = &mut buffer[got..];
                    offset += got as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// This part of the memory fd is in the dump, or nobody wants it: a guest that runs on may change it.
    ///
    /// # Errors
    /// The system's.
    pub fn release(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.live().map_or(Ok(()), |live| live.release(offset, bytes))
    }
}

/// One `preadv2`: the sealed filter knows no other call that reads, because this one reads userfaultfds as well.
fn read_at(fd: &GuestMemRo, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let vector = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: the vector is the buffer, which nobody else has.
    let got = unsafe { libc::preadv2(fd.as_fd().as_raw_fd(), &raw const vector, 1, file_offset(offset)?, 0) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// `offset` as the kernel takes it; what it cannot take is larger than any file.
pub fn file_offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| Errno::EFBIG.into())
}

/// The parts of `regions` that lie in `range`, byte by byte.
fn clip(regions: &[RamRegion], range: Option<DumpRange>) -> Vec<RamRegion> {
    let (begin, end) = match range {
        Some(range) => (range.begin, range.begin.saturating_add(range.length)),
        None => (0, u64::MAX),
    };
    regions
        .iter()
        .filter_map(|region| {
            let first = region.guest_address.max(begin);
            let last = (region.guest_address + region.bytes).min(end);
            (first < last).then(|| RamRegion {
                guest_address: first,
                bytes: last - first,
                offset: region.offset + (first - region.guest_address),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    const GIB: u64 = 1 << 30;

    fn region(guest_address: u64, bytes: u64, offset: u64) -> RamRegion {
        RamRegion {
            guest_address,
            bytes,
            offset,
        }
    }

    #[test]
    fn a_range_clips_the_regions_to_the_byte() {
        let regions = ram_regions(4 * GIB);
        let cases = [
            (None, regions.clone()),
            (Some((0, u64::MAX)), regions.clone()),
            (Some((0x10_0001, 4097)), vec![region(0x10_0001, 4097, 0x10_0001)]),
            (Some((3 * GIB - 1, 2)), vec![region(3 * GIB - 1, 1, 3 * GIB - 1)]),
            (
                Some((3 * GIB - 1, GIB + 2)),
                vec![region(3 * GIB - 1, 1, 3 * GIB - 1), region(4 * GIB, 1, 3 * GIB)],
            ),
            (Some((5 * GIB - 5, 100)), vec![region(5 * GIB - 5, 5, 4 * GIB - 5)]),
            (Some((3 * GIB, GIB)), vec![]),
            (Some((5 * GIB, 1)), vec![]),
            (Some((0, 0)), vec![]),
            (Some((u64::MAX, u64::MAX)), vec![]),
        ];
        for (range, wanted) in cases {
            let range = range.map(|(begin, length)| DumpRange { begin, length });
            assert_eq!(clip(&regions, range), wanted, "{range:?}");
        }
    }

    #[test]
    fn holes_are_passed_over_and_small_ones_read_as_zeros_and_stay() {
        const BYTES: u64 = 1 << 20;
        let fd = memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&fd, BYTES as i64).unwrap();
        nix::sys::uio::pwrite(&fd, b"x", 0x2345).unwrap();
        let kept = fd.try_clone().unwrap();
        let memory = GuestMemory::new(GuestMemRo::new(fd), BYTES).unwrap();
        let extent = |bytes, is_data| Extent { bytes, is_data };
        assert_eq!(memory.extent(0, BYTES).unwrap(), extent(0x2000, false));
        assert_eq!(memory.extent(0, 0x1000).unwrap(), extent(0x1000, false));
        assert_eq!(memory.extent(0x2001, 0x2002).unwrap(), extent(1, true));
        assert_eq!(memory.extent(0x2001, BYTES).unwrap(), extent(BYTES - 0x2001, true));
        assert_eq!(memory.extent(0x3000, BYTES).unwrap(), extent(BYTES - 0x3000, false));
        let mut all = vec![7; BYTES as usize];
        memory.read(0, &mut all).unwrap();
        assert_eq!(all.iter().filter(|byte| **byte != 0).count(), 1);
        assert_eq!(
            nix::sys::stat::fstat(&kept).unwrap().st_blocks,
            8,
            "reading allocates nothing"
        );
    }

    #[test]
    fn a_memory_fd_shorter_than_ram_is_refused() {
        let fd = || GuestMemRo::new(memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap());
        for ram_bytes in [0, 4095, 4096] {
            assert!(GuestMemory::new(fd(), ram_bytes).is_err(), "{ram_bytes}");
        }
    }
}
