//! The block engine: an io_uring that can be created disabled and restricted, which is the only kind block-proc uses.

use super::probe::read;
use super::{Check, Weight};
use nix::errno::Errno;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Size of `struct io_uring_params` in 32-bit words, and the index of its flags.
const PARAMS_WORDS: usize = 30;
const PARAMS_FLAGS: usize = 2;
const SETUP_R_DISABLED: u32 = 1 << 6;

const REGISTER_FILES: libc::c_ulong = 2;
const REGISTER_PROBE: libc::c_ulong = 8;
const REGISTER_RESTRICTIONS: libc::c_ulong = 11;
const REGISTER_ENABLE_RINGS: libc::c_ulong = 12;

const RESTRICTION_SQE_OP: u16 = 1;
const OP_SUPPORTED: u16 = 1;
/// What block-proc uses.
const OPERATIONS: [(u8, &str); 5] = [
    (1, "readv"),
    (2, "writev"),
    (3, "fsync"),
    (6, "poll_add"),
    (17, "fallocate"),
];

/// `struct io_uring_restriction`.
#[repr(C)]
struct Restriction {
    kind: u16,
    operation: u8,
    reserved: [u8; 13],
}

/// `struct io_uring_probe` with its operations.
#[repr(C)]
struct Probe {
    last: u8,
    count: u8,
    reserved: [u16; 7],
    operations: [ProbedOperation; 256],
}

/// `struct io_uring_probe_op`.
#[repr(C)]
#[derive(Clone, Copy)]
struct ProbedOperation {
    operation: u8,
    reserved: u8,
    flags: u16,
    reserved2: u32,
}

const _: () = assert!(size_of::<Restriction>() == 16 && size_of::<Probe>() == 16 + 256 * 8);

pub(super) fn checks() -> Vec<Check> {
    vec![io_uring()]
}

fn io_uring() -> Check {
    const NAME: &str = "io_uring";
    match try_ring() {
        Ok(()) => Check::ok(NAME, "restricted rings with fixed files, all operations"),
        Err((step, errno)) => Check::missing(
            NAME,
            format!("{step}: {}", errno.desc()),
            Weight::Comfort,
            format!(
                "block I/O uses threads with preadv2 and pwritev2, at more CPU time per request; {}",
                remedy(&read("/proc/sys/kernel/io_uring_disabled"), errno)
            ),
        ),
    }
}

/// What to do, by the text of the sysctl and the error.
fn remedy(disabled: &str, errno: Errno) -> &'static str {
    match (disabled.trim(), errno) {
        ("2", _) => "sysctl kernel.io_uring_disabled=2 forbids it to all",
        ("1", _) => "sysctl kernel.io_uring_disabled=1 forbids it to all but root and kernel.io_uring_group",
        (_, Errno::ENOSYS) => "this kernel is built without it",
        (_, Errno::EPERM | Errno::EACCES) => "a filter above this process (a container's?) forbids it",
        (_, Errno::ENOMEM) => "raise the memlock limit",
        _ => "Linux 5.10 or newer has it",
    }
}

/// Makes a ring as block-proc does.
fn try_ring() -> Result<(), (&'static str, Errno)> {
    let mut params = [0u32; PARAMS_WORDS];
    params[PARAMS_FLAGS] = SETUP_R_DISABLED;
    // SAFETY: the kernel reads and writes one `struct io_uring_params`, which has this size.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_io_uring_setup, 8, params.as_mut_ptr()) })
        .map_err(|errno| ("creating a disabled ring", errno))?;
    // SAFETY: a new fd that is ours.
    let ring = unsafe { OwnedFd::from_raw_fd(fd as i32) };

    let mut probe = Probe {
        last: 0,
        count: 0,
        reserved: [0; 7],
        operations: [ProbedOperation {
            operation: 0,
            reserved: 0,
            flags: 0,
            reserved2: 0,
        }; 256],
    };
    register(&ring, REGISTER_PROBE, (&raw mut probe).cast(), 256).map_err(|errno| ("probing operations", errno))?;
    for (number, name) in OPERATIONS {
        if probe.operations[usize::from(number)].flags & OP_SUPPORTED == 0 {
            return Err((name, Errno::EOPNOTSUPP));
        }
    }
    let mut files = [-1i32; 4];
    register(&ring, REGISTER_FILES, files.as_mut_ptr().cast(), 4).map_err(|errno| ("an empty file table", errno))?;
    let mut restrictions = OPERATIONS.map(|(operation, _)| Restriction {
        kind: RESTRICTION_SQE_OP,
        operation,
        reserved: [0; 13],
    });
    let count = restrictions.len() as u32;
    register(&ring, REGISTER_RESTRICTIONS, restrictions.as_mut_ptr().cast(), count)
        .and_then(|()| register(&ring, REGISTER_ENABLE_RINGS, std::ptr::null_mut(), 0))
        .map_err(|errno| ("restricting the ring", errno))
}

fn register(ring: &OwnedFd, what: libc::c_ulong, argument: *mut libc::c_void, count: u32) -> nix::Result<()> {
    // SAFETY: every caller passes `count` items of the type that `what` takes.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), what, argument, count) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sysctl_explains_more_than_the_error() {
        assert!(remedy("2\n", Errno::EPERM).contains("io_uring_disabled=2"));
        assert!(remedy("1\n", Errno::EPERM).contains("io_uring_group"));
        assert!(remedy("0\n", Errno::EPERM).contains("container"));
        assert!(remedy("", Errno::ENOSYS).contains("without"));
    }

    #[test]
    fn a_restricted_ring_can_be_made_or_the_step_is_named() {
        if let Err((step, errno)) = try_ring() {
            eprintln!("SKIPPED: this host has no io_uring for us: {step}: {errno}");
        }
    }
}
