//! Guest RAM and what acts on it.

use super::probe::read;
use super::{Check, Weight};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// What a ring of block-proc's size takes, generously, bytes.
const RING_BYTES: u64 = 1 << 20;

pub(super) fn checks() -> Vec<Check> {
    vec![
        memfd(),
        memlock(getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |limits| limits.0)),
        huge_pages(&read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        userfaultfd(),
    ]
}

fn memfd() -> Check {
    const NAME: &str = "memfd";
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let sealed = |flags| {
        let fd = memfd_create(c"bulkhead-doctor", flags)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map(drop)
    };
    match sealed(flags | MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL)) {
        Ok(()) => Check::ok(NAME, "sealing, never executable"),
        Err(Errno::EINVAL) if sealed(flags).is_ok() => Check::limited(
            NAME,
            "sealing, but no MFD_NOEXEC_SEAL",
            Weight::Comfort,
            "one of several locks against executing guest memory is missing; Linux 6.3 has it",
        ),
        Err(errno) => Check::missing(NAME, errno.desc(), Weight::Fatal, "no guest memory, so no VM can run"),
    }
}

/// Judges the soft limit, bytes.
fn memlock(limit: u64) -> Check {
    const NAME: &str = "memlock";
    if limit == nix::sys::resource::RLIM_INFINITY {
        return Check::ok(NAME, "unlimited");
    }
    let found = format!("{} KiB", limit >> 10);
    if limit >= RING_BYTES {
        return Check::ok(NAME, found);
    }
    Check::limited(
        NAME,
        found,
        Weight::Comfort,
        "before Linux 5.12 an io_uring does not fit, and block I/O uses threads; raise it with ulimit -l",
    )
}

/// Judges the text of shmem_enabled, whose chosen word stands in brackets.
fn huge_pages(text: &str) -> Check {
    const NAME: &str = "huge pages";
    const COST: &str = "guest memory is mapped in pages of 4 KiB, which slows memory-hungry guests by some per cent";
    let chosen = text
        .split_whitespace()
        .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    match chosen {
        Some(word @ ("always" | "within_size" | "force" | "advise")) => {
            Check::ok(NAME, format!("transparent for shared memory: {word}"))
        }
        Some(word) => Check::limited(
            NAME,
            format!("transparent for shared memory: {word}"),
            Weight::Comfort,
            format!("{COST}; write advise to /sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        ),
        None => Check::missing(NAME, "none for shared memory", Weight::Comfort, COST),
    }
}

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Default)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFD_USER_MODE_ONLY: i32 = 1;
/// Of the device: makes a userfaultfd.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const FEATURE_WP_SHMEM: u64 = 1 << 12;

fn userfaultfd() -> Check {
    const NAME: &str = "userfaultfd";
    const COST: &str = "memory cannot be snapshot while the guest runs";
    let with_flags = |flags: i32| {
        // SAFETY: takes flags only; returns a new fd.
        let result = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | flags) });
        result.map(owned)
    };
    let (fd, is_full) = match with_flags(0).or_else(|_| from_device()) {
        Ok(fd) => (fd, true),
        Err(_) => match with_flags(UFFD_USER_MODE_ONLY) {
            Ok(fd) => (fd, false),
            Err(errno) => return Check::missing(NAME, errno.desc(), Weight::Comfort, COST),
        },
    };
    let mut api = UffdApi {
        api: UFFD_API,
        ..UffdApi::default()
    };
    // SAFETY: the request reads and writes one `uffdio_api`.
    let result = Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) });
    let can_protect = result.is_ok() && api.features & FEATURE_WP_SHMEM != 0;
    match (is_full, can_protect) {
        (true, true) => Check::ok(NAME, "write protection of shared memory"),
        (_, false) => Check::limited(
            NAME,
            "no write protection of shared memory",
            Weight::Comfort,
            format!("{COST}; Linux 5.19 can"),
        ),
        (false, true) => Check::limited(
            NAME,
            "not for the kernel's own accesses",
            Weight::Comfort,
            format!("{COST}; allow /dev/userfaultfd to this user, or set vm.unprivileged_userfaultfd"),
        ),
    }
}

/// Since Linux 6.1 those who may open the device get a userfaultfd without restrictions.
fn from_device() -> nix::Result<OwnedFd> {
    use nix::fcntl::{OFlag, open};
    let device = open(
        "/dev/userfaultfd",
        OFlag::O_RDWR | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )?;
    // SAFETY: takes flags only; returns a new fd.
    let fd = Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC) })?;
    Ok(owned(fd.into()))
}

fn owned(fd: i64) -> OwnedFd {
    // SAFETY: the kernel has just returned this new fd to us; fds fit into an i32.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn the_word_in_brackets_counts() {
        assert_eq!(
            huge_pages("always within_size [advise] never deny force\n").state,
            State::Ok
        );
        assert_eq!(
            huge_pages("always within_size advise [never] deny force\n").state,
            State::Limited
        );
        assert_eq!(huge_pages("").state, State::Missing);
    }

    #[test]
    fn memlock_is_judged_by_what_a_ring_takes() {
        assert_eq!(memlock(u64::MAX).found, "unlimited");
        assert_eq!(memlock(8 << 20).state, State::Ok);
        assert_eq!(memlock(64 << 10).state, State::Limited);
    }

    #[test]
    fn this_kernel_has_sealed_memfds() {
        assert_ne!(memfd().state, State::Missing);
    }
}
