//! Descriptors of every kind that a process could pass on.

use super::rng::Rng;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket, socketpair};
use std::os::fd::OwnedFd;

/// A descriptor of any kind. None of them can do harm here: files are /dev/null and anonymous memory.
///
/// # Panics
/// When this process is out of descriptors.
pub fn any(rng: &mut Rng) -> OwnedFd {
    match rng.below(10) {
        0 => null(),
        1 => nix::unistd::pipe().expect("pipe").0,
        // Nobody reads: writing waits when it is full.
        2 => nix::unistd::pipe().expect("pipe").1,
        3 => {
            let memory = memfd_create(c"intruder", MFdFlags::MFD_CLOEXEC).expect("memfd");
            nix::unistd::ftruncate(&memory, 1 << 20).expect("ftruncate");
            memory
        }
        4 => EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)
            .expect("eventfd")
            .into(),
        5 => pair(SockType::Stream).0,
        6 => pair(SockType::SeqPacket).0,
        7 => std::fs::File::open("/").expect("/").into(),
        8 => listening(),
        _ => socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).expect("socket"),
    }
}

/// /dev/null, read-only.
///
/// # Panics
/// When this process is out of descriptors.
pub fn null() -> OwnedFd {
    std::fs::File::open("/dev/null").expect("/dev/null").into()
}

/// A channel that nobody is at.
///
/// # Panics
/// When this process is out of descriptors.
pub fn hung_up() -> OwnedFd {
    pair(SockType::SeqPacket).0
}

fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).expect("socketpair")
}

/// A socket that listens at a name that the system chooses, and blocks.
fn listening() -> OwnedFd {
    let listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("socket");
    let address = UnixAddr::new_unnamed();
    use std::os::fd::AsRawFd;
    bind(listener.as_raw_fd(), &address).expect("bind");
    listen(&listener, Backlog::new(4).expect("backlog")).expect("listen");
    listener
}
