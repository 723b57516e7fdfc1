//! Puts a descriptor into a running helper from outside, as root: a leak that no code of the product makes.
//!
//! The helper is stopped by ptrace and made to call recvmsg on its channel, which every policy allows, after a message with the
//! descriptor was sent from a stolen duplicate of the supervisor's end. Then it goes on with what it was doing.

use audit::live::sockets;
use nix::sys::ptrace;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A duplicate of another process's descriptor.
///
/// # Panics
/// When there is none of this number, or we may not.
pub fn steal(pid: i32, number: i32) -> OwnedFd {
    // SAFETY: plain system calls; their results are checked and are new fds of ours.
    unsafe {
        let pidfd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        assert!(pidfd >= 0, "pidfd_open: {}", std::io::Error::last_os_error());
        let pidfd = OwnedFd::from_raw_fd(pidfd as i32);
        let fd = libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0);
        assert!(fd >= 0, "pidfd_getfd: {}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as i32)
    }
}

/// The number under which a process holds what this link says.
///
/// # Panics
/// When it does not hold it.
pub fn number_of(pid: i32, wanted: &str) -> i32 {
    let all = crate::procfs::descriptors(pid);
    let found = all.iter().find(|(_, link)| link.contains(wanted));
    found
        .unwrap_or_else(|| panic!("process {pid} holds no {wanted}: {all:?}"))
        .0
}

/// The supervisor's number of the other end of a helper's channel.
///
/// # Panics
/// When the helper has no channel.
pub fn channel_end(supervisor: i32, helper: i32) -> i32 {
    let channel = std::fs::read_link(format!("/proc/{helper}/fd/0")).expect("the helper's channel");
    let sockets = sockets::all(supervisor);
    let peer = sockets.of(&channel.to_string_lossy()).and_then(|socket| socket.peer);
    number_of(
        supervisor,
        &format!("socket:[{}]", peer.expect("the channel's other end")),
    )
}

/// Puts a descriptor into a helper; returns its number there.
///
/// # Panics
/// When it does not work.
pub fn inject(supervisor: i32, helper: i32, fd: BorrowedFd<'_>) -> i32 {
    let channel = steal(supervisor, channel_end(supervisor, helper));
    let threads: Vec<Pid> = crate::procfs::threads(helper).into_iter().map(Pid::from_raw).collect();
    for thread in &threads {
        ptrace::seize(*thread, ptrace::Options::empty()).expect("PTRACE_SEIZE");
        ptrace::interrupt(*thread).expect("PTRACE_INTERRUPT");
        waitpid(*thread, Some(WaitPidFlag::__WALL)).expect("wait");
    }
    let fds = [fd.as_raw_fd()];
    let message = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(
        channel.as_raw_fd(),
        &[IoSlice::new(b"!")],
        &message,
        MsgFlags::empty(),
        None,
    )
    .expect("sendmsg");
    let number = receive(Pid::from_raw(helper));
    for thread in &threads {
        ptrace::detach(*thread, None).expect("PTRACE_DETACH");
    }
    number
}

/// Has a helper make a system call from where its main thread waits in one, as code would that an attacker runs there.
/// Returns its result; `None` when the helper has not survived it.
///
/// # Panics
/// When it does not work.
pub fn call(helper: i32, number: i64, arguments: [u64; 6]) -> Option<i64> {
    let thread = Pid::from_raw(helper);
    ptrace::seize(thread, ptrace::Options::empty()).expect("PTRACE_SEIZE");
    ptrace::interrupt(thread).expect("PTRACE_INTERRUPT");
    waitpid(thread, Some(WaitPidFlag::__WALL)).expect("wait");
    let result = perform(thread, number, arguments);
    if result.is_some() {
        ptrace::detach(thread, None).expect("PTRACE_DETACH");
    }
    result
}

/// Has a stopped thread, which waits in a system call, make another one. It stands afterwards as before.
fn perform(thread: Pid, number: i64, arguments: [u64; 6]) -> Option<i64> {
    const SYSCALL: i64 = 0x050f;
    let before = ptrace::getregs(thread).expect("registers");
    let instruction = before.rip - 2;
    let code = ptrace::read(thread, instruction as ptrace::AddressType).expect("code");
    assert_eq!(code & 0xffff, SYSCALL, "the thread does not wait in a system call");
    let mut registers = before;
    registers.rip = instruction;
    registers.rax = number as u64;
    // No call to make again after this one.
    registers.orig_rax = u64::MAX;
    [
        registers.rdi,
        registers.rsi,
        registers.rdx,
        registers.r10,
        registers.r8,
        registers.r9,
    ] = arguments;
    ptrace::setregs(thread, registers).expect("registers");
    ptrace::step(thread, None).expect("PTRACE_SINGLESTEP");
    match waitpid(thread, Some(WaitPidFlag::__WALL)).expect("wait") {
        WaitStatus::Exited(..) | WaitStatus::Signaled(..) => return None,
        _ => {}
    }
    let result = ptrace::getregs(thread).ok()?.rax as i64;
    ptrace::setregs(thread, before).expect("registers");
    Some(result)
}

/// Has a stopped thread, which waits in a system call, receive one descriptor from its channel.
fn receive(thread: Pid) -> i32 {
    let before = ptrace::getregs(thread).expect("registers");
    // Below the red zone: a byte of data, its iovec, the control data, the header.
    let memory = (before.rsp - 2048) & !15;
    let (data, part, control, header) = (memory, memory + 16, memory + 64, memory + 128);
    let words = [
        (part, data),
        (part + 8, 1),
        (header, 0),
        (header + 8, 0),
        (header + 16, part),
        (header + 24, 1),
        (header + 32, control),
        (header + 40, 32),
        (header + 48, 0),
    ];
    for (address, word) in words {
        ptrace::write(thread, address as ptrace::AddressType, word as i64).expect("memory");
    }
    let arguments = [0, header, libc::MSG_CMSG_CLOEXEC as u64, 0, 0, 0];
    let received = perform(thread, libc::SYS_recvmsg, arguments);
    assert_eq!(received, Some(1), "recvmsg in the helper");
    ptrace::read(thread, (control + 16) as ptrace::AddressType).expect("control data") as i32
}
