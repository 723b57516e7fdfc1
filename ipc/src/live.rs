//! Live dumps: how a process that can write guest RAM lets dump-proc hold its writes back.
//!
//! Write protection by userfaultfd belongs to one address space, so each process that maps guest RAM makes a userfaultfd
//! of its own when it is asked to ([`watch`]), hands it over and keeps no copy. dump-proc registers the mappings, protects
//! them, and is told of every first write to a page, which waits meanwhile. When the last copy of the fd is closed, by
//! dump-proc's end at the latest, the kernel takes the protection away and lets all writes go on.

use crate::caps::FaultFd;
use serde::{Deserialize, Serialize};

/// Part of guest RAM in a process's address space. All values are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamMapping {
    /// Where it is mapped there.
    pub address: u64,
    /// Its offset in the memory fd.
    pub offset: u64,
    /// Length.
    pub bytes: u64,
}

/// One process's mappings of guest RAM, and the way to hold back its writes to them.
#[derive(Debug, Serialize, Deserialize)]
pub struct MemoryWatch {
    /// Bound to that process.
    pub faults: FaultFd,
    /// All of its mappings of guest RAM.
    pub mappings: Vec<RamMapping>,
}

#[cfg(feature = "guest-memory")]
pub use making::watch;

#[cfg(feature = "guest-memory")]
mod making {
    use super::{MemoryWatch, RamMapping};
    use crate::caps::{FaultDeviceFd, FaultFd};
    use crate::memory::{GuestRam, ram_regions};
    use std::io;
    use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

    /// `USERFAULTFD_IOC_NEW`.
    const NEW: libc::c_ulong = 0xaa00;

    /// Makes this process's userfaultfd. It also catches what the kernel writes for this process, such as KVM or a disk
    /// read into guest RAM: that takes the device, which is handed over for it and closed again.
    ///
    /// # Errors
    /// The system's.
    pub fn watch(device: FaultDeviceFd, ram: &GuestRam) -> io::Result<MemoryWatch> {
        // SAFETY: the request takes flags and no pointer.
        let made = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), NEW, libc::O_CLOEXEC) };
        if made < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has made it, and nobody else knows it.
        let faults = FaultFd::new(unsafe { OwnedFd::from_raw_fd(made) });
        let bytes = ram.iter().map(GuestMemoryRegion::len).sum();
        let offsets = ram_regions(bytes).into_iter().map(|region| region.offset);
        let mappings = ram.iter().zip(offsets).map(|(region, offset)| RamMapping {
            address: region.as_ptr() as u64,
            offset,
            bytes: region.len(),
        });
        Ok(MemoryWatch {
            faults,
            mappings: mappings.collect(),
        })
    }
}
