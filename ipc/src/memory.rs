//! Where guest RAM lies: in guest physical address space and in the memfd.
//!
//! RAM starts at 0 and stops at the PCI hole ([`LOW_RAM_END`]); what does not fit there starts at 4 GiB. In the memfd the
//! pieces follow each other without a gap.

/// End of RAM below 4 GiB: 3 GiB. Above it lie PCI windows, ECAM, IOAPIC and LAPIC.
pub const LOW_RAM_END: u64 = 3 << 30;
/// Start of RAM above the PCI hole: 4 GiB.
pub const HIGH_RAM_START: u64 = 4 << 30;
/// Granularity of the RAM size, bytes.
pub const PAGE_BYTES: u64 = 4096;

/// One contiguous piece of RAM. All values are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest physical address of its first byte.
    pub guest_address: u64,
    /// Length.
    pub bytes: u64,
    /// Offset of its first byte in the memfd.
    pub offset: u64,
}

/// The RAM regions of a machine with `ram_bytes` of RAM, in ascending address order.
pub fn ram_regions(ram_bytes: u64) -> Vec<RamRegion> {
    let low = ram_bytes.min(LOW_RAM_END);
    let mut regions = vec![RamRegion {
        guest_address: 0,
        bytes: low,
        offset: 0,
    }];
    if ram_bytes > low {
        regions.push(RamRegion {
            guest_address: HIGH_RAM_START,
            bytes: ram_bytes - low,
            offset: low,
        });
    }
    regions
}

#[cfg(feature = "guest-memory")]
pub use mapping::{GuestRam, map_inflight, map_read_only, map_read_write};

#[cfg(feature = "guest-memory")]
mod mapping {
    use super::{RamRegion, ram_regions};
    use crate::caps::{GuestMemRo, GuestMemRw, InflightFd};
    use std::os::fd::{AsFd, BorrowedFd};
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

    /// Guest RAM mapped into this process.
    pub type GuestRam = GuestMemoryMmap<()>;

    /// Maps guest RAM readable and writable, never executable, with huge pages where the host lets those ask for them that share
    /// memory (`transparent_hugepage/shmem_enabled` is `advise`). The fd is closed: the mapping is all that stays.
    ///
    /// # Errors
    /// When the kernel refuses the mapping or the fd is shorter than `ram_bytes`.
    pub fn map_read_write(memory: GuestMemRw, ram_bytes: u64) -> std::io::Result<GuestRam> {
        let ram = map(
            memory.as_fd(),
            &ram_regions(ram_bytes),
            libc::PROT_READ | libc::PROT_WRITE,
        )?;
        for region in ram.iter() {
            // SAFETY: the mapping just made; no byte of it changes. A kernel without huge pages refuses, and nothing is lost.
            unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE) };
        }
        Ok(ram)
    }

    /// Maps the record of requests under way, from address 0 on.
    ///
    /// # Errors
    /// As [`map_read_write`].
    pub fn map_inflight(record: InflightFd, bytes: u64) -> std::io::Result<GuestRam> {
        let region = RamRegion {
            guest_address: 0,
            bytes,
            offset: 0,
        };
        map(record.as_fd(), &[region], libc::PROT_READ | libc::PROT_WRITE)
    }

    /// Maps guest RAM read-only. Reading a page that was never written would allocate it: look for data with
    /// SEEK_DATA on the fd first, which is therefore handed back.
    ///
    /// # Errors
    /// As [`map_read_write`].
    pub fn map_read_only(memory: &GuestMemRo, ram_bytes: u64) -> std::io::Result<GuestRam> {
        map(memory.as_fd(), &ram_regions(ram_bytes), libc::PROT_READ)
    }

    fn map(memory: BorrowedFd<'_>, regions: &[RamRegion], protection: i32) -> std::io::Result<GuestRam> {
        let size = nix::sys::stat::fstat(memory)?.st_size;
        let bytes: u64 = regions.iter().map(|region| region.bytes).sum();
        if u64::try_from(size).unwrap_or(0) < bytes {
            return Err(std::io::Error::other(format!(
                "the memory fd has {size} bytes, {bytes} are to be mapped"
            )));
        }
        let regions = regions
            .iter()
            .map(|region| map_region(memory, *region, protection))
            .collect::<std::io::Result<Vec<_>>>()?;
        GuestRam::from_regions(regions).map_err(std::io::Error::other)
    }

    fn map_region(memory: BorrowedFd<'_>, region: RamRegion, protection: i32) -> std::io::Result<GuestRegionMmap<()>> {
        let length = usize::try_from(region.bytes).map_err(std::io::Error::other)?;
        let offset = libc::off_t::try_from(region.offset).map_err(std::io::Error::other)?;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice; the result is checked.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                flags,
                std::os::fd::AsRawFd::as_raw_fd(&memory),
                offset,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the mapping has exactly `length` bytes, is ours alone and is never unmapped while the process lives
        // (a raw-pointer region does not unmap on drop).
        let mapping = unsafe {
            MmapRegionBuilder::new(length)
                .with_mmap_prot(protection)
                .with_mmap_flags(flags)
                .with_raw_mmap_pointer(address.cast())
                .build()
        }
        .map_err(std::io::Error::other)?;
        GuestRegionMmap::new(mapping, GuestAddress(region.guest_address))
            .ok_or_else(|| std::io::Error::other("guest RAM region wraps around the address space"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_split_around_the_pci_hole() {
        assert_eq!(
            ram_regions(512 << 20),
            [RamRegion {
                guest_address: 0,
                bytes: 512 << 20,
                offset: 0
            }]
        );
        assert_eq!(
            ram_regions(5 << 30),
            [
                RamRegion {
                    guest_address: 0,
                    bytes: 3 << 30,
                    offset: 0
                },
                RamRegion {
                    guest_address: 4 << 30,
                    bytes: 2 << 30,
                    offset: 3 << 30
                }
            ]
        );
    }
}
