//! Every rule of every policy on a live kernel, generated from the data: what it allows is made, what differs from it in one
//! argument is not, and what no rule names is not either.
//!
//! Each call is made in a child of its own under the stack of filters that its process has: a helper's child loads the
//! launcher's, the start-up filter and both of the seal, by the functions that the helpers use. Arguments that no condition
//! concerns are such that no call does anything: no fd has that number, nothing is mapped at that address.

use audit::policy::{Filter, Kind, Process, Rule, Source};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use std::arch::asm;
use std::num::NonZero;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicI64, Ordering};

/// No descriptor, no process, no address, no valid flags.
const NOTHING: u64 = 0x7fff_ffff;
/// What [`Shared::result`] holds before the call returns.
const NOT_YET: i64 = i64::MIN;

/// What the child tells.
struct Shared {
    /// The listener's fd in the child, plus one; -1 when there is none.
    listener: AtomicI32,
    result: AtomicI64,
}

/// What became of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// It returned this.
    Returned(i64),
    /// The process ended as the call says.
    Exited,
    /// A filter killed the process.
    Killed,
    /// The sealed filter told the listener of this call.
    Told(i64),
    /// It was made, and the process did not survive it.
    Crashed,
}

impl Outcome {
    fn was_made(self) -> bool {
        matches!(self, Self::Returned(_) | Self::Exited | Self::Crashed)
    }
}

/// A system call without a trace in this process: errno is in thread-local storage, which a call may have moved.
unsafe fn call(number: i64, arguments: [u64; 6]) -> i64 {
    let result;
    // SAFETY: the caller's: the call must not harm this process, or the process must be expendable.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            in("r8") arguments[4],
            in("r9") arguments[5],
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

fn shared() -> &'static Shared {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new zeroed page, never unmapped; zero is a valid value of both atomics.
    let shared = unsafe {
        mmap_anonymous(None, NonZero::new(4096).unwrap(), protection, MapFlags::MAP_SHARED)
            .unwrap()
            .cast::<Shared>()
            .as_ref()
    };
    shared.result.store(NOT_YET, Ordering::Release);
    shared
}

fn code_of(process: Process) -> policies::Process {
    match process {
        Process::QmpProc => policies::Process::Qmp,
        Process::DumpProc => policies::Process::Dump,
        Process::VcpuProc => policies::Process::Vcpu,
        Process::BlockProc => policies::Process::Block,
        Process::Supervisor => policies::Process::Supervisor,
        Process::Opener => policies::Process::Opener,
        Process::Warden => policies::Process::Warden,
        Process::Launcher => policies::Process::Launcher,
    }
}

/// In the child: loads the process's filters up to this kind. `Ok(-1)` when there is no listener.
fn confine(process: Process, kind: Kind) -> Result<i32, ()> {
    let of = code_of(process);
    if !process.is_helper() {
        return policies::seal_self(of, policies::Mode::Enforce)
            .map(|()| -1)
            .map_err(drop);
    }
    policies::seal_self(policies::Process::Launcher, policies::Mode::Enforce).map_err(drop)?;
    policies::load_startup(of, policies::Mode::Enforce).map_err(drop)?;
    if kind == Kind::Startup {
        return Ok(-1);
    }
    // It is the parent's to take.
    policies::seal_helper(of, policies::Mode::Enforce)
        .map(IntoRawFd::into_raw_fd)
        .map_err(drop)
}

/// Makes one call under a process's filters.
fn attempt(process: Process, kind: Kind, number: i64, arguments: [u64; 6]) -> Outcome {
    let shared = shared();
    // SAFETY: the child makes system calls only and leaves by exit_group.
    let child = match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        // SAFETY: the process is expendable.
        ForkResult::Child => unsafe {
            call(libc::SYS_close_range, [0, u64::from(u32::MAX), 0, 0, 0, 0]);
            // Rust's handler would make calls of its own when rt_sigreturn goes astray.
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            match confine(process, kind) {
                Ok(listener) => shared.listener.store(listener + 1, Ordering::Release),
                Err(()) => {
                    call(libc::SYS_exit_group, [99, 0, 0, 0, 0, 0]);
                }
            }
            let result = call(number, arguments);
            shared.result.store(result, Ordering::Release);
            call(libc::SYS_exit_group, [7, 0, 0, 0, 0, 0]);
            libc::abort()
        },
    };
    if process.is_helper()
        && kind == Kind::Sealed
        && let Some(told) = told(child, shared)
    {
        // SAFETY: plain numbers.
        unsafe { libc::kill(child.as_raw(), libc::SIGKILL) };
        waitpid(child, None).unwrap();
        return Outcome::Told(told);
    }
    let status = waitpid(child, None).unwrap();
    let result = shared.result.load(Ordering::Acquire);
    // SAFETY: nobody uses it any more.
    unsafe { libc::munmap(std::ptr::from_ref(shared).cast_mut().cast(), 4096) };
    match status {
        WaitStatus::Exited(_, 99) => panic!("{}: a filter could not be loaded", process.name()),
        WaitStatus::Exited(_, 7) if result != NOT_YET => Outcome::Returned(result),
        WaitStatus::Exited(..) => Outcome::Exited,
        WaitStatus::Signaled(_, Signal::SIGSYS, _) => Outcome::Killed,
        WaitStatus::Signaled(_, Signal::SIGSEGV, _) => Outcome::Crashed,
        other => panic!("{}: call {number}: {other:?}", process.name()),
    }
}

/// Waits until the child has ended (`None`) or its sealed filter tells of a call.
fn told(child: Pid, shared: &Shared) -> Option<i64> {
    // SAFETY: plain system calls; results are checked and are new fds of ours.
    let own = |result: i64| (result >= 0).then(|| unsafe { OwnedFd::from_raw_fd(result as i32) });
    // SAFETY: as above.
    let pidfd = own(unsafe { libc::syscall(libc::SYS_pidfd_open, child.as_raw(), 0) })?;
    let ended = || {
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, 0u8).unwrap() > 0
    };
    let number = loop {
        match shared.listener.load(Ordering::Acquire) {
            0 if ended() => return None,
            0 => std::thread::yield_now(),
            number => break number - 1,
        }
    };
    // SAFETY: as above.
    let listener = own(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) })?;
    let mut fds = [
        PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        PollFd::new(pidfd.as_fd(), PollFlags::POLLIN),
    ];
    assert!(poll(&mut fds, 20_000u16).unwrap() > 0, "neither made nor told");
    if !fds[0]
        .revents()
        .is_some_and(|events| events.contains(PollFlags::POLLIN))
    {
        return None;
    }
    /// `SECCOMP_IOCTL_NOTIF_RECV`.
    const RECEIVE: libc::c_ulong = 0xc050_2100;
    // SAFETY: plain data, for which zeros are a valid value; the kernel demands zeros.
    let mut notification: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the request writes one `seccomp_notif`.
    let received = unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut notification) };
    (received == 0).then_some(i64::from(notification.data.nr))
}

/// Arguments that meet a rule's conditions, and are nothing else.
fn arguments(rule: &Rule) -> [u64; 6] {
    let mut arguments = [NOTHING; 6];
    for condition in &rule.conditions {
        let argument = &mut arguments[usize::from(condition.index)];
        *argument = condition.example();
    }
    assert!(rule.holds(&arguments), "conditions that exclude each other: {rule:?}");
    arguments
}

/// For each condition of a rule, arguments that differ from what is allowed in that one and that no other rule allows.
fn wrong_arguments(filter: &Filter, rule: &Rule) -> Vec<[u64; 6]> {
    let right = arguments(rule);
    let of = |condition: &audit::policy::Condition| {
        let mut tries = condition.counterexamples().into_iter().map(|wrong| {
            let mut arguments = right;
            arguments[usize::from(condition.index)] = wrong;
            arguments
        });
        let refused = tries.find(|tried| !filter.rules_of(&rule.syscall).any(|other| other.holds(tried)));
        refused.unwrap_or_else(|| panic!("nothing is wrong for {condition:?} of {rule:?}"))
    };
    rule.conditions.iter().map(of).collect()
}

/// Whether the process's own filters of this kind refuse such a call by killing at once rather than by telling.
fn kills(process: Process, kind: Kind, number: i64, forbidden: Option<&Filter>) -> bool {
    let is_forbidden = forbidden.is_some_and(|filter| filter.rules.iter().any(|rule| rule.number() == number));
    !process.is_helper() || kind == Kind::Startup || is_forbidden
}

/// All rules of one process's filters of one kind.
fn every_rule(process: Process, kind: Kind) {
    let policy = Source::Embedded.read(process).unwrap();
    let filter = &policy.filters[&kind];
    let mut refused = 0;
    for rule in &filter.rules {
        let name = format!("{} {}: {}", process.name(), kind.name(), rule.syscall);
        let right = arguments(rule);
        let outcome = attempt(process, kind, rule.number(), right);
        assert!(outcome.was_made(), "{name}{right:x?} is allowed: {outcome:?}");
        for wrong in wrong_arguments(filter, rule) {
            let outcome = attempt(process, kind, rule.number(), wrong);
            // What an inherited filter refuses, it refuses by killing.
            let wanted = [Outcome::Killed, Outcome::Told(rule.number())];
            assert!(
                wanted.contains(&outcome),
                "{name}{wrong:x?} is not allowed: {outcome:?}"
            );
            refused += 1;
        }
    }
    println!(
        "{} {}: {} rules made, {refused} wrong arguments refused",
        process.name(),
        kind.name(),
        filter.rules.len()
    );
}

/// All calls that no rule of one process's filters names.
fn everything_else(process: Process, kind: Kind) {
    let policy = Source::Embedded.read(process).unwrap();
    let filter = &policy.filters[&kind];
    let listed: Vec<i64> = filter.rules.iter().map(Rule::number).collect();
    let unlisted = policies::syscalls::all()
        .map(|(number, _)| number)
        .filter(|number| !listed.contains(number));
    // A number that no call has, and an allowed one in x32's numbers.
    let strange = [1000, libc::SYS_exit_group | 0x4000_0000];
    let mut count = 0;
    for number in unlisted.chain(strange) {
        let outcome = attempt(process, kind, number, [NOTHING; 6]);
        let forbidden = policy.filters.get(&Kind::Forbidden);
        let name = policies::syscalls::name(number).unwrap_or("?");
        let stacked = outcome == Outcome::Killed && kind == Kind::Sealed;
        if kills(process, kind, number, forbidden) {
            assert_eq!(outcome, Outcome::Killed, "{} {}: {name}", process.name(), kind.name());
        } else {
            // The filters below, start-up's and the launcher's, kill what they do not have either.
            assert!(
                stacked || outcome == Outcome::Told(number),
                "{} {}: {name} ({number}): {outcome:?}",
                process.name(),
                kind.name()
            );
        }
        count += 1;
    }
    println!("{} {}: {count} unlisted calls refused", process.name(), kind.name());
}

macro_rules! of_each_process {
    ($($name:ident: $process:ident, $kind:ident;)*) => {$(
        mod $name {
            use super::*;

            #[test]
            fn every_rule_allows_what_it_says_and_no_other_argument() {
                every_rule(Process::$process, Kind::$kind);
            }

            #[test]
            fn nothing_else_is_allowed() {
                everything_else(Process::$process, Kind::$kind);
            }
        }
    )*};
}

of_each_process! {
    qmp_proc: QmpProc, Sealed;
    qmp_proc_startup: QmpProc, Startup;
    dump_proc: DumpProc, Sealed;
    dump_proc_startup: DumpProc, Startup;
    vcpu_proc: VcpuProc, Sealed;
    vcpu_proc_startup: VcpuProc, Startup;
    block_proc: BlockProc, Sealed;
    block_proc_startup: BlockProc, Startup;
    supervisor: Supervisor, Sealed;
    opener: Opener, Sealed;
    warden: Warden, Sealed;
    launcher: Launcher, Sealed;
}
