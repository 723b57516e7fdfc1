//! A network of its own: what is made of random numbers must not reach anybody's.

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::os::fd::AsRawFd;

/// Puts the calling thread, and what it starts from now on, into an empty network namespace that has a loopback device.
///
/// # Panics
/// When the caller may not.
pub fn enter() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own");
    let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).expect("socket");
    // SAFETY: all-zero is a valid request; name and flags are set below.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: a valid request of this type.
    let done = unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    assert_eq!(done, 0, "loopback: {}", std::io::Error::last_os_error());
}
