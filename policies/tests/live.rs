//! The compiled filters on a live process: what is allowed passes, what is not is told to the listener, and what is
//! forbidden kills.
//!
//! The process is a forked child, because a filter cannot be taken off again. Child and test share one page of memory, so
//! that the child needs no call to tell how far it is.

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use policies::{Mode, Process, seal_helper};
use std::num::NonZero;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

const HELPERS: [Process; 4] = [Process::Vcpu, Process::Block, Process::Dump, Process::Qmp];

/// `SECCOMP_IOCTL_NOTIF_RECV` and `SECCOMP_IOCTL_NOTIF_SEND`.
const NOTIFICATION_RECEIVE: libc::c_ulong = 0xc050_2100;
const NOTIFICATION_SEND: libc::c_ulong = 0xc018_2101;

/// What the child tells.
struct Shared {
    /// The listener's fd in the child, plus one.
    listener: AtomicI32,
    /// How many calls have returned.
    returned: AtomicI32,
}

fn shared() -> &'static Shared {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let length = NonZero::new(4096).unwrap();
    // SAFETY: a new zeroed page, never unmapped; zero is a valid value of both atomics.
    unsafe {
        mmap_anonymous(None, length, protection, MapFlags::MAP_SHARED)
            .unwrap()
            .cast::<Shared>()
            .as_ref()
    }
}

/// Forks a child that seals itself as `process` and then makes these calls.
fn sealed_child(process: Process, shared: &'static Shared, calls: &[[i64; 4]]) -> Pid {
    // SAFETY: the child makes system calls only and leaves by exit_group.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            // SAFETY: plain system calls; no pointer among the arguments is followed.
            unsafe {
                let Ok(listener) = seal_helper(process, Mode::Enforce) else {
                    libc::_exit(99)
                };
                shared.listener.store(listener.as_raw_fd() + 1, Ordering::Release);
                for [number, a, b, c] in calls {
                    libc::syscall(*number, *a, *b, *c, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
                    shared.returned.fetch_add(1, Ordering::Release);
                }
                libc::_exit(7)
            }
        }
    }
}

/// Takes the listener out of the child, as the supervisor gets it by message.
fn take_listener(child: Pid, shared: &Shared) -> OwnedFd {
    let number = loop {
        match shared.listener.load(Ordering::Acquire) {
            0 => std::thread::yield_now(),
            number => break number - 1,
        }
    };
    // SAFETY: plain system calls; their results are checked and are new fds of ours.
    unsafe {
        let pidfd = libc::syscall(libc::SYS_pidfd_open, child.as_raw(), 0);
        assert!(pidfd >= 0, "{}", std::io::Error::last_os_error());
        let pidfd = OwnedFd::from_raw_fd(i32::try_from(pidfd).unwrap());
        let listener = libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0);
        assert!(listener >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(i32::try_from(listener).unwrap())
    }
}

/// Waits for a report and lets the call fail with EPERM. Returns what was reported.
fn answer(listener: &OwnedFd) -> libc::seccomp_data {
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, 10_000u16).unwrap(), 1, "nothing is reported");
    // SAFETY: plain data, for which zeros are a valid value; the kernel demands zeros.
    let mut notification: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the request writes one `seccomp_notif`.
    let received = unsafe { libc::ioctl(listener.as_raw_fd(), NOTIFICATION_RECEIVE, &raw mut notification) };
    assert_eq!(received, 0, "{}", std::io::Error::last_os_error());
    let mut response = libc::seccomp_notif_resp {
        id: notification.id,
        val: 0,
        error: -libc::EPERM,
        flags: 0,
    };
    // SAFETY: the request reads one `seccomp_notif_resp`.
    let sent = unsafe { libc::ioctl(listener.as_raw_fd(), NOTIFICATION_SEND, &raw mut response) };
    assert_eq!(sent, 0, "{}", std::io::Error::last_os_error());
    notification.data
}

#[test]
fn what_is_not_allowed_is_reported_with_its_number_and_arguments() {
    let executable = i64::from(libc::PROT_READ | libc::PROT_EXEC);
    for process in HELPERS {
        let shared = shared();
        let calls = [
            // Allowed everywhere; without an interrupted call it returns EINTR.
            [libc::SYS_restart_syscall, 0, 0, 0],
            [libc::SYS_getppid, 1, 2, 3],
            [libc::SYS_mmap, 0, 4096, executable],
        ];
        let child = sealed_child(process, shared, &calls);
        let listener = take_listener(child, shared);
        let first = answer(&listener);
        assert_eq!(i64::from(first.nr), libc::SYS_getppid, "{process:?}");
        assert_eq!(first.args[..3], [1, 2, 3], "{process:?}");
        assert!(
            shared.returned.load(Ordering::Acquire) >= 1,
            "{process:?}: the allowed call"
        );
        let second = answer(&listener);
        assert_eq!(i64::from(second.nr), libc::SYS_mmap, "{process:?}");
        assert_eq!(
            waitpid(child, None).unwrap(),
            WaitStatus::Exited(child, 7),
            "{process:?}"
        );
        assert_eq!(shared.returned.load(Ordering::Acquire), 3, "{process:?}");
    }
}

#[test]
fn what_is_forbidden_kills_without_asking() {
    for process in HELPERS {
        for call in [
            libc::SYS_execve,
            libc::SYS_io_uring_setup,
            libc::SYS_openat,
            libc::SYS_ptrace,
        ] {
            let shared = shared();
            let child = sealed_child(process, shared, &[[call, 0, 0, 0]]);
            let status = waitpid(child, None).unwrap();
            assert!(
                matches!(status, WaitStatus::Signaled(_, Signal::SIGSYS, _)),
                "{process:?} call {call}: {status:?}"
            );
        }
    }
}

#[test]
fn dump_proc_seeks_only_as_it_said() {
    let shared = shared();
    let invalid_fd = 1000;
    let calls = [
        [libc::SYS_lseek, invalid_fd, 0, libc::SEEK_DATA.into()],
        [libc::SYS_lseek, invalid_fd, 0, libc::SEEK_END.into()],
        [libc::SYS_fcntl, invalid_fd, libc::F_GETFL.into(), 0],
        // The channel is fd 0 and no other.
        [libc::SYS_recvmsg, invalid_fd, 0, libc::MSG_CMSG_CLOEXEC.into()],
    ];
    let child = sealed_child(Process::Dump, shared, &calls);
    let listener = take_listener(child, shared);
    for wanted in [libc::SYS_lseek, libc::SYS_fcntl, libc::SYS_recvmsg] {
        assert_eq!(i64::from(answer(&listener).nr), wanted);
    }
    assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 7));
}
