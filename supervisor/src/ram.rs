//! Guest RAM: one memfd, never mapped here.
//!
//! The supervisor keeps a read-write and a read-only description of it. The mode is 0 afterwards, so that a holder of the
//! read-only one cannot open it again for writing; helpers have no /proc to try it with.

use ipc::caps::{GuestMemRo, GuestMemRw};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fchmod};
use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};

/// Both descriptions of guest RAM.
pub struct Ram {
    /// For vcpu-proc and block-proc.
    pub read_write: GuestMemRw,
    /// For dump-proc.
    pub read_only: GuestMemRo,
}

impl Ram {
    /// Has the host set all of it aside.
    ///
    /// # Errors
    /// When the host has not so much.
    pub fn fill(&self, bytes: u64) -> Result<(), String> {
        let failed = |errno: Errno| format!("guest memory of {bytes} bytes: fallocate: {errno}");
        let length = i64::try_from(bytes).map_err(|_| failed(Errno::EFBIG))?;
        nix::fcntl::fallocate(&self.read_write, nix::fcntl::FallocateFlags::empty(), 0, length).map_err(failed)
    }

    /// Creates and seals it.
    ///
    /// # Errors
    /// The failed call and its error.
    pub fn new(bytes: u64) -> Result<Self, String> {
        let failed = |call: &'static str| move |errno: Errno| format!("guest memory of {bytes} bytes: {call}: {errno}");
        let read_write = shared(c"bulkhead-ram", bytes)?;
        let path = format!("/proc/self/fd/{}", read_write.as_raw_fd());
        let read_only =
            open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map_err(failed("open read-only"))?;
        fchmod(&read_write, Mode::empty()).map_err(failed("fchmod"))?;
        Ok(Self {
            read_write: GuestMemRw::new(read_write),
            read_only: GuestMemRo::new(read_only),
        })
    }
}

/// Memory of a fixed size, to be mapped by helpers, never executable.
///
/// # Errors
/// The failed call and its error.
pub fn shared(name: &CStr, bytes: u64) -> Result<OwnedFd, String> {
    let failed = |call: &'static str| {
        let name = name.to_string_lossy().into_owned();
        move |errno: Errno| format!("{name} of {bytes} bytes: {call}: {errno}")
    };
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let memory = match memfd_create(name, flags | MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL)) {
        // Before Linux 6.3.
        Err(Errno::EINVAL) => memfd_create(name, flags),
        other => other,
    }
    .map_err(failed("memfd_create"))?;
    let length = i64::try_from(bytes).map_err(|_| failed("ftruncate")(Errno::EFBIG))?;
    nix::unistd::ftruncate(&memory, length).map_err(failed("ftruncate"))?;
    fcntl(
        &memory,
        FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW),
    )
    .map_err(failed("F_ADD_SEALS"))?;
    Ok(memory)
}
