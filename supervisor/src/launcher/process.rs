//! The launcher process: it starts helpers, reaps them and reports. It parses nothing, allocates nothing and maps nothing.
//!
//! It holds the right to start helpers: all capabilities over its own user namespace, in which every helper's namespace
//! nests. It ends when the supervisor's end of the channel closes, and takes all helpers with it.

use super::child::{self, INNER_ID, Plan};
use super::ids::IDS_PER_VM;
use super::sys::{self, Cloned};
use ipc::Role;
use ipc::launch::{PACKET_BYTES, Report, Step, decode_request};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Pid, Uid};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Flags of every helper's clone. The network namespace is the launcher's own, empty one.
const NAMESPACES: libc::c_int =
    libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;

/// What the launcher inherits from the supervisor that forked it.
pub struct Inheritance {
    /// Its end of the channel.
    pub channel: OwnedFd,
    /// Directory of the helper executables.
    pub executables: OwnedFd,
    /// Deny-all Landlock ruleset.
    pub landlock: Option<OwnedFd>,
    /// Whether the launcher's map has [`IDS_PER_VM`] ids; otherwise only id 0.
    pub many_ids: bool,
    /// Whether policies are enforced.
    pub mode: policies::Mode,
    /// Where helpers are entered into their control groups.
    pub groups: Vec<(Role, OwnedFd)>,
}

/// The answer of [`enter_namespaces`]'s other side: one byte each way.
pub const READY: u8 = b'U';
/// See [`READY`].
pub const MAPPED: u8 = b'M';

struct Launcher {
    from: Inheritance,
    signals: SignalFd,
    /// Live helpers by id slot; slot 0 is the launcher's own id.
    helpers: [Option<(Role, i32)>; IDS_PER_VM as usize],
}

/// Runs in the forked process and never returns.
pub fn main(from: Inheritance) -> ! {
    let status = match start(from) {
        Ok(mut launcher) => {
            launcher.serve();
            launcher.end_all();
            0
        }
        Err((what, errno)) => {
            // The supervisor sees the channel close; this line says why. Standard error is still the user's here.
            let mut line = [0u8; 200];
            let mut rest = &mut line[..];
            let _ = writeln!(rest, "bulkhead: the launcher cannot start: {what}: {}", errno.desc());
            let length = 200 - rest.len();
            let _ = nix::unistd::write(std::io::stderr(), &line[..length]);
            1
        }
    };
    // SAFETY: ends the process without running the supervisor's exit handlers.
    unsafe { libc::_exit(status) }
}

fn start(from: Inheritance) -> Result<Launcher, (&'static str, Errno)> {
    let at = |what: &'static str| move |errno: Errno| (what, errno);
    // Away from the terminal's process group: ^C is the supervisor's business.
    nix::unistd::setsid().map_err(at("setsid"))?;
    enter_namespaces(from.channel.as_fd(), from.many_ids)?;
    sys::die_with_parent().map_err(at("PR_SET_PDEATHSIG"))?;
    // Writing a child's id map takes an owner's access to its /proc files, which the id change has taken away.
    nix::sys::prctl::set_dumpable(true).map_err(at("PR_SET_DUMPABLE"))?;
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None).map_err(at("sigprocmask"))?;
    let signals =
        SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(at("signalfd"))?;
    sys::set_no_new_privs().map_err(at("PR_SET_NO_NEW_PRIVS"))?;
    sys::detach_standard_files().map_err(at("/dev/null"))?;
    close_others(&from, &signals).map_err(at("close_range"))?;
    policies::seal_self(policies::Process::Launcher, from.mode)
        .map_err(|_| ("loading its seccomp filter", Errno::EINVAL))?;
    sys::send(from.channel.as_fd(), &[READY], None).map_err(at("channel"))?;
    Ok(Launcher {
        from,
        signals,
        helpers: [None; IDS_PER_VM as usize],
    })
}

/// Enters a user and an empty network namespace once for all helpers (a new network namespace each would cost up to
/// 3.6 ms), has the supervisor write the id maps, and becomes id 0 of the map.
fn enter_namespaces(channel: BorrowedFd<'_>, many_ids: bool) -> Result<(), (&'static str, Errno)> {
    let at = |what: &'static str| move |errno: Errno| (what, errno);
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER | nix::sched::CloneFlags::CLONE_NEWNET)
        .map_err(at("unshare(user, net): are user namespaces allowed on this host?"))?;
    sys::send(channel, &[READY], None).map_err(at("channel"))?;
    let mut answer = [0];
    let length = sys::receive(channel, &mut answer, &mut [None, None]).map_err(at("channel"))?;
    if length != 1 || answer[0] != MAPPED {
        return Err(("the supervisor could not write the id maps", Errno::EPERM));
    }
    if many_ids {
        nix::unistd::setgroups(&[]).map_err(at("setgroups"))?;
    }
    let zero = Uid::from_raw(0);
    nix::unistd::setresgid(0.into(), 0.into(), 0.into()).map_err(at("setresgid"))?;
    nix::unistd::setresuid(zero, zero, zero).map_err(at("setresuid"))
}

/// Closes what the supervisor had open or had inherited: the launcher keeps what it uses.
fn close_others(from: &Inheritance, signals: &SignalFd) -> Result<(), Errno> {
    let landlock = from
        .landlock
        .as_ref()
        .map_or(from.channel.as_raw_fd(), AsRawFd::as_raw_fd);
    let mut kept = vec![
        from.channel.as_raw_fd(),
        from.executables.as_raw_fd(),
        landlock,
        signals.as_fd().as_raw_fd(),
    ];
    kept.extend(from.groups.iter().map(|(_, fd)| fd.as_raw_fd()));
    kept.sort_unstable();
    let mut next = 3;
    for fd in kept {
        let fd = fd as u32;
        if fd > next {
            sys::close_range(next, fd - 1)?;
        }
        next = next.max(fd + 1);
    }
    sys::close_range(next, u32::MAX)
}

impl Launcher {
    fn serve(&mut self) {
        loop {
            let mut fds = [
                PollFd::new(self.from.channel.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
            let requested = fds[0].revents().is_some_and(|events| !events.is_empty());
            let signalled = fds[1].revents().is_some_and(|events| !events.is_empty());
            if signalled {
                while matches!(self.signals.read_signal(), Ok(Some(_))) {}
                self.reap();
            }
            if requested && !self.handle_request() {
                return;
            }
        }
    }

    /// Reads and carries out one request; `false` when the supervisor is gone or breaks the protocol.
    fn handle_request(&mut self) -> bool {
        let mut packet = [0; PACKET_BYTES];
        let mut fds = [None, None];
        let length = match sys::receive(self.from.channel.as_fd(), &mut packet, &mut fds) {
            Ok(0) => return false,
            Ok(length) => length,
            Err(Errno::EINTR | Errno::EAGAIN) => return true,
            Err(_) => return false,
        };
        let (Some(role), [Some(channel), Some(log)]) = (decode_request(&packet[..length]), fds) else {
            return false;
        };
        let outcome = self.start_helper(role, &channel, &log);
        // Close our copies before answering: the supervisor counts on the helper holding the only ones.
        drop((channel, log));
        match outcome {
            Ok((pid, id, pidfd)) => self.say(
                Report::Started {
                    role,
                    pid,
                    id: id as i32,
                },
                Some(pidfd.as_fd()),
            ),
            Err((step, errno)) => self.say(
                Report::Failed {
                    role,
                    step,
                    errno: errno as i32,
                },
                None,
            ),
        }
        true
    }

    fn start_helper(
        &mut self,
        role: Role,
        channel: &OwnedFd,
        log: &OwnedFd,
    ) -> Result<(i32, u32, OwnedFd), (Step, Errno)> {
        let free = (1..self.helpers.len())
            .find(|slot| self.helpers[*slot].is_none())
            .ok_or((Step::Clone, Errno::EAGAIN))?;
        let at = |step: Step| move |errno: Errno| (step, errno);
        let (ours, theirs) = nix::sys::socket::socketpair(
            nix::sys::socket::AddressFamily::Unix,
            nix::sys::socket::SockType::SeqPacket,
            None,
            nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        )
        .map_err(at(Step::Files))?;
        // SAFETY: this process has one thread, and child::run makes only async-signal-safe calls.
        match unsafe { sys::clone_with_namespaces(NAMESPACES) }.map_err(at(Step::Clone))? {
            Cloned::Child => {
                // Without this copy the wait below ends when the launcher is killed; with it the child would wait for
                // ever, and its copies of the launcher's other descriptors would hide the death from the supervisor.
                drop(ours);
                let plan = Plan {
                    role,
                    channel: channel.as_raw_fd(),
                    log: log.as_raw_fd(),
                    executables: self.from.executables.as_raw_fd(),
                    landlock: self.from.landlock.as_ref().map_or(-1, AsRawFd::as_raw_fd),
                    report: theirs.as_raw_fd(),
                    may_set_groups: self.from.many_ids,
                    mode: self.from.mode,
                };
                let mut go = [0];
                if sys::receive(theirs.as_fd(), &mut go, &mut [None, None]) == Ok(1) {
                    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
                    let (step, errno) = child::run(&plan);
                    child::report(step, errno);
                }
                // SAFETY: ends the child without running the supervisor's exit handlers.
                unsafe { libc::_exit(1) }
            }
            Cloned::Parent { pid, pidfd } => {
                drop(theirs);
                self.helpers[free] = Some((role, pid));
                let outer = if self.from.many_ids { free as u32 } else { 0 };
                let entered = enter_groups(pid, role, &self.from.groups).map_err(at(Step::Groups));
                let mapped =
                    entered.and_then(|()| write_id_maps(pid, outer, self.from.many_ids).map_err(at(Step::IdMaps)));
                mapped.and_then(|()| wait_for_exec(&ours)).map(|()| (pid, outer, pidfd))
            }
        }
    }

    /// Reaps all helpers that have ended and reports each.
    fn reap(&mut self) {
        loop {
            let mut status = 0;
            // SAFETY: a valid pointer.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            if pid <= 0 {
                return;
            }
            let Some(slot) = self
                .helpers
                .iter()
                .position(|helper| helper.is_some_and(|(_, helper)| helper == pid))
            else {
                continue;
            };
            let Some((role, pid)) = self.helpers[slot].take() else {
                continue;
            };
            let (code, status) = if libc::WIFSIGNALED(status) {
                (libc::CLD_KILLED, libc::WTERMSIG(status))
            } else {
                (libc::CLD_EXITED, libc::WEXITSTATUS(status))
            };
            self.say(
                Report::Ended {
                    role,
                    pid,
                    code,
                    status,
                },
                None,
            );
        }
    }

    fn say(&self, report: Report, fd: Option<BorrowedFd<'_>>) {
        // A supervisor that does not read is gone or going: the channel's end tells us next.
        let _ = sys::send(self.from.channel.as_fd(), &report.encode(), fd);
    }

    /// Kills what is left and waits until it is gone, so that nothing outlives the launcher.
    fn end_all(&mut self) {
        for (_, pid) in self.helpers.iter().flatten() {
            let _ = nix::sys::signal::kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        for helper in &mut self.helpers {
            if let Some((_, pid)) = helper.take() {
                let _ = nix::sys::wait::waitpid(Pid::from_raw(pid), None);
            }
        }
    }
}

/// Enters a helper into its role's control groups, before it does anything.
fn enter_groups(pid: i32, role: Role, groups: &[(Role, OwnedFd)]) -> Result<(), Errno> {
    let mut text = [0u8; 16];
    let length = format_into(&mut text, format_args!("{pid}"));
    for (_, fd) in groups.iter().filter(|(of, _)| *of == role) {
        nix::unistd::write(fd, &text[..length])?;
    }
    Ok(())
}

/// Maps the helper's inner id to one id of the launcher's namespace.
fn write_id_maps(pid: i32, outer: u32, may_set_groups: bool) -> Result<(), Errno> {
    let mut map = [0u8; 40];
    let length = format_into(&mut map, format_args!("{INNER_ID} {outer} 1\n"));
    if !may_set_groups {
        write_proc_file(pid, "setgroups", b"deny")?;
    }
    write_proc_file(pid, "gid_map", &map[..length])?;
    write_proc_file(pid, "uid_map", &map[..length])
}

fn write_proc_file(pid: i32, file: &str, content: &[u8]) -> Result<(), Errno> {
    let mut path = [0u8; 64];
    let length = format_into(&mut path, format_args!("/proc/{pid}/{file}\0"));
    let path = std::ffi::CStr::from_bytes_with_nul(&path[..length]).map_err(|_| Errno::EINVAL)?;
    let flags = nix::fcntl::OFlag::O_WRONLY | nix::fcntl::OFlag::O_CLOEXEC;
    let fd = nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty())?;
    nix::unistd::write(&fd, content).map(drop)
}

/// Formats into a fixed buffer; returns the length.
fn format_into(buffer: &mut [u8], text: std::fmt::Arguments<'_>) -> usize {
    let room = buffer.len();
    let mut rest = buffer;
    let _ = rest.write_fmt(text);
    room - rest.len()
}

/// Lets the child go on, and waits until it has executed its program or failed.
fn wait_for_exec(report: &OwnedFd) -> Result<(), (Step, Errno)> {
    sys::send(report.as_fd(), &[MAPPED], None).map_err(|errno| (Step::IdMaps, errno))?;
    let mut packet = [0; 2];
    match sys::receive(report.as_fd(), &mut packet, &mut [None, None]) {
        Ok(2) => Err((Step::from_u8(packet[0]), Errno::from_raw(packet[1].into()))),
        Ok(_) => Ok(()),
        Err(errno) => Err((Step::Exec, errno)),
    }
}
