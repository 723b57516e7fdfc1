//! The tracing run: follows a command and all that it starts, and writes down the calls of machines' processes.
//!
//! A process is known by what the kernel says of it: its program, whether it is in a user namespace of its own (the launcher), its name
//! (the opener, the warden). It is under a filter from the call that loads it on. Others are followed, and not stopped at their calls.

use super::{Recording, Seen};
use crate::policy::{Kind, Process};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::io::Error;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// SECCOMP_FILTER_FLAG_NEW_LISTENER: the filter that completes a helper's seal has it.
const NEW_LISTENER: u64 = 8;

/// How the stop at a call looks with PTRACE_O_TRACESYSGOOD.
const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;

/// What is known of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Role {
    /// None of a machine's.
    #[default]
    Stranger,
    /// `bulkhead`, or what it has forked, before it is under a filter.
    Unsealed,
    /// Under its one filter.
    Sealed(Process),
    /// The launcher's child, before its program; whether it has loaded its own filter.
    Starting,
    /// A helper, and whether it is sealed.
    Helper(Process, bool),
}

impl Role {
    /// The filters that a call passes.
    fn filters(self) -> Vec<(Process, Kind)> {
        match self {
            Self::Stranger | Self::Unsealed => Vec::new(),
            Self::Sealed(process) => vec![(process, Kind::Sealed)],
            Self::Starting => vec![(Process::Launcher, Kind::Sealed)],
            Self::Helper(process, sealed) => {
                let mut filters = vec![(Process::Launcher, Kind::Sealed), (process, Kind::Startup)];
                filters.extend(sealed.then_some((process, Kind::Sealed)));
                filters
            }
        }
    }
}

struct Recorder {
    recording: Recording,
    /// By process.
    roles: BTreeMap<Pid, Role>,
    /// Threads: the process of each. One that was not announced yet stops first.
    threads: BTreeMap<Pid, Pid>,
    user_namespace: Option<std::path::PathBuf>,
}

/// Runs a command to its end, and that of all that it has started. Returns its exit status and the recording.
///
/// # Errors
/// When it cannot be started, or not be traced.
pub fn run(program: &str, arguments: &[String]) -> std::io::Result<(i32, Recording)> {
    let mut command = Command::new(program);
    command.args(arguments);
    // SAFETY: one system call.
    unsafe { command.pre_exec(|| ptrace::traceme().map_err(Error::from)) };
    let child = command.spawn()?;
    let first = Pid::from_raw(child.id() as i32);
    let mut recorder = Recorder {
        recording: Recording::new(),
        roles: BTreeMap::new(),
        threads: BTreeMap::new(),
        user_namespace: std::fs::read_link("/proc/self/ns/user").ok(),
    };
    let status = recorder.follow(first)?;
    Ok((status, recorder.recording))
}

impl Recorder {
    fn follow(&mut self, first: Pid) -> std::io::Result<i32> {
        wait(first.as_raw())?;
        let options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACEEXEC;
        ptrace::setoptions(first, options)?;
        self.threads.insert(first, first);
        self.executed(first);
        self.resume(first, 0);
        let mut result = 1;
        loop {
            let (thread, status) = match wait(-1) {
                Ok(stopped) => stopped,
                Err(Errno::EINTR) => continue,
                Err(Errno::ECHILD) => return Ok(result),
                Err(errno) => return Err(errno.into()),
            };
            if libc::WIFEXITED(status) && thread == first {
                result = libc::WEXITSTATUS(status);
            }
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                self.ended(thread);
                continue;
            }
            let signal = match (libc::WSTOPSIG(status), status >> 16) {
                (SYSCALL_STOP, _) => {
                    self.call(thread);
                    0
                }
                // The first stop of what was just started is the tracer's.
                (libc::SIGSTOP, 0) if self.announce(thread) => 0,
                (signal, 0) => signal,
                (_, libc::PTRACE_EVENT_EXEC) => {
                    // Whatever thread it was, it is its process's only one now.
                    self.threads.insert(thread, thread);
                    self.executed(thread);
                    0
                }
                (_, _) => 0,
            };
            self.resume(thread, signal);
        }
    }

    fn ended(&mut self, thread: Pid) {
        if self.threads.remove(&thread) == Some(thread) {
            self.roles.remove(&thread);
        }
    }

    fn role(&self, thread: Pid) -> Role {
        let process = self.threads.get(&thread);
        process
            .and_then(|process| self.roles.get(process))
            .copied()
            .unwrap_or_default()
    }

    /// Learns of a thread when it stops for the first time, whether or not its maker has told of it; `false` when it is known.
    fn announce(&mut self, thread: Pid) -> bool {
        if self.threads.contains_key(&thread) {
            return false;
        }
        let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
        let number = |name: &str| {
            let found = crate::live::process::field(&status, name).and_then(|text| text.parse().ok());
            found.map(Pid::from_raw)
        };
        let process = number("Tgid").unwrap_or(thread);
        self.threads.insert(thread, process);
        if process == thread {
            let parent = number("PPid").map(|parent| self.role(parent)).unwrap_or_default();
            let role = match parent {
                Role::Stranger => Role::Stranger,
                Role::Sealed(Process::Launcher) | Role::Starting | Role::Helper(..) => Role::Starting,
                Role::Unsealed | Role::Sealed(_) => Role::Unsealed,
            };
            self.roles.insert(process, role);
        }
        true
    }

    fn executed(&mut self, process: Pid) {
        let program = std::fs::read_link(format!("/proc/{process}/exe")).unwrap_or_default();
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let role = match (name.as_str(), Process::of_name(&name)) {
            ("bulkhead", _) => Role::Unsealed,
            (_, Some(helper)) if helper.is_helper() && self.role(process) == Role::Starting => {
                Role::Helper(helper, false)
            }
            _ => Role::Stranger,
        };
        self.roles.insert(process, role);
        if let Role::Helper(helper, _) = role {
            // Its filter was there already, but not yet whose it was.
            self.saw(helper, Kind::Startup, libc::SYS_execveat, [0; 6]);
        }
    }

    fn saw(&mut self, process: Process, filter: Kind, number: i64, arguments: [u64; 6]) {
        let seen = Seen {
            process: process.name().to_owned(),
            filter,
            number,
            arguments,
        };
        *self.recording.entry(seen).or_default() += 1;
    }

    /// A thread is about to make a call, or has made it.
    fn call(&mut self, thread: Pid) {
        let Ok(registers) = ptrace::getregs(thread) else { return };
        // As the kernel leaves it until the call is made.
        if registers.rax as i64 != -i64::from(libc::ENOSYS) {
            return;
        }
        let number = registers.orig_rax as i64;
        let arguments = [
            registers.rdi,
            registers.rsi,
            registers.rdx,
            registers.r10,
            registers.r8,
            registers.r9,
        ];
        let role = self.role(thread);
        let bits = policies::syscalls::name(number).map_or(0, policies::filtered_arguments);
        let mut told = arguments;
        for (place, argument) in told.iter_mut().enumerate() {
            if bits & (1 << place) == 0 {
                *argument = 0;
            }
        }
        for (process, filter) in role.filters() {
            self.saw(process, filter, number, told);
        }
        if number == libc::SYS_seccomp && arguments[0] == u64::from(libc::SECCOMP_SET_MODE_FILTER) {
            let process = self.threads.get(&thread).copied().unwrap_or(thread);
            let next = match role {
                Role::Unsealed => Role::Sealed(self.forked(process)),
                Role::Helper(helper, false) => Role::Helper(helper, arguments[1] & NEW_LISTENER != 0),
                other => other,
            };
            self.roles.insert(process, next);
        }
    }

    /// Which of the processes that are `bulkhead` this is.
    fn forked(&self, process: Pid) -> Process {
        let namespace = std::fs::read_link(format!("/proc/{process}/ns/user")).ok();
        if namespace != self.user_namespace {
            return Process::Launcher;
        }
        let name = std::fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
        match name.trim_end() {
            "opener" => Process::Opener,
            "warden" => Process::Warden,
            _ => Process::Supervisor,
        }
    }

    /// Lets a thread go on, with a signal (0: none) that is its.
    fn resume(&self, thread: Pid, signal: i32) {
        let request = match self.role(thread) {
            Role::Stranger => libc::PTRACE_CONT,
            _ => libc::PTRACE_SYSCALL,
        };
        // SAFETY: nothing of ours is written; the kernel refuses what is no tracee. One that was killed meanwhile is waited for next.
        unsafe { libc::ptrace(request, thread.as_raw(), 0, signal) };
    }
}

/// Waits for a thread (-1: any) that is traced, and returns what the kernel says of it. (Signals of all numbers occur here; nix knows
/// those below 32.)
fn wait(which: i32) -> Result<(Pid, i32), Errno> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let thread = Errno::result(unsafe { libc::waitpid(which, &raw mut status, libc::__WALL) })?;
    Ok((Pid::from_raw(thread), status))
}
