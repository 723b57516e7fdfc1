//! Descriptors of a process whose /proc/PID/fd belongs to root, for a caller who may trace it all the same: the owner of its user
//! namespace, as who runs a machine is of its helpers'. Each is duplicated (pidfd_getfd), looked at, and closed.

use super::process::{Descriptor, own_descriptor};
use nix::errno::Errno;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// All descriptors below a number.
///
/// # Errors
/// The system's: this caller may not.
pub fn below(pid: i32, end: i32) -> nix::Result<Vec<Descriptor>> {
    // SAFETY: plain numbers.
    let pidfd = own(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let mut found = Vec::new();
    for number in 0..end {
        // SAFETY: plain numbers.
        let fd = match own(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) }) {
            Ok(fd) => fd,
            Err(Errno::EBADF) => continue,
            Err(errno) => return Err(errno),
        };
        found.extend(own_descriptor(fd.as_raw_fd()).map(|of| Descriptor { number, ..of }));
    }
    Ok(found)
}

fn own(result: libc::c_long) -> nix::Result<OwnedFd> {
    let number = Errno::result(result)? as i32;
    // SAFETY: the kernel has just made this number for us.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
