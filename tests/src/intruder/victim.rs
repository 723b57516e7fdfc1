//! The processes that have a channel to the supervisor.

use crate::inject::steal;
use crate::machine::{Machine, wait_until};
use crate::procfs;
use audit::live::sockets;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::fd::OwnedFd;

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// vcpu-proc.
    Vcpu,
    /// block-proc.
    Block,
    /// dump-proc.
    Dump,
    /// qmp-proc, serving a client.
    Qmp,
    /// The process that makes sockets.
    Opener,
    /// The process that starts helpers.
    Launcher,
}

impl Victim {
    /// All.
    pub const ALL: [Self; 6] = [
        Self::Vcpu,
        Self::Block,
        Self::Dump,
        Self::Qmp,
        Self::Opener,
        Self::Launcher,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vcpu => "vcpu-proc",
            Self::Block => "block-proc",
            Self::Dump => "dump-proc",
            Self::Qmp => "qmp-proc",
            Self::Opener => "opener",
            Self::Launcher => "launcher",
        }
    }

    /// By name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|victim| victim.name() == name)
    }

    /// Its process; of several the one that came last.
    pub fn pid(self, machine: &Machine) -> Option<i32> {
        match self {
            Self::Opener => machine.opener(),
            Self::Launcher => Some(machine.launcher()),
            _ => {
                let helpers = machine.helpers().into_iter();
                helpers
                    .filter(|(name, _)| name == self.name())
                    .map(|(_, pid)| pid)
                    .max()
            }
        }
    }
}

/// The two ends of a process's channel to the supervisor: its number there, and the supervisor's. The launcher holds others
/// as well while it starts a helper: this waits until it does not.
///
/// # Panics
/// When there is none.
pub fn channel(supervisor: i32, pid: i32) -> (i32, i32) {
    let mut found = Vec::new();
    wait_until("one channel to the supervisor", || {
        found = channels(supervisor, pid);
        is_one(&found)
    });
    found[0]
}

/// A helper has its channel in the place of standard input, and its log beside it.
fn is_one(found: &[(i32, i32)]) -> bool {
    found.len() == 1
        || found
            .first()
            .is_some_and(|(number, _)| *number == ipc::helper::CHANNEL_FD)
}

fn channels(supervisor: i32, pid: i32) -> Vec<(i32, i32)> {
    let all = sockets::all(supervisor);
    let held: Vec<(i32, u32)> = procfs::descriptors(supervisor)
        .into_iter()
        .filter_map(|(number, link)| Some((number, sockets::inode(&link)?)))
        .collect();
    let end = |(number, link): (i32, String)| {
        let socket = all.of(&link).filter(|socket| socket.kind == "seqpacket")?;
        let (theirs, _) = held.iter().find(|(_, inode)| Some(*inode) == socket.peer)?;
        Some((number, *theirs))
    };
    procfs::descriptors(pid).into_iter().filter_map(end).collect()
}

/// Stops a process, and returns when all of its threads stand.
pub fn freeze(pid: i32) {
    if kill(Pid::from_raw(pid), Signal::SIGSTOP).is_err() {
        return;
    }
    wait_until("it stands still", || {
        let states = procfs::statuses(pid);
        !procfs::is_alive(pid)
            || states
                .iter()
                .all(|status| procfs::field(status, "State").starts_with(['T', 'Z', 'X']))
    });
}

/// Lets it go on.
pub fn thaw(pid: i32) {
    let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
}

/// Ends it.
pub fn shoot(pid: i32) {
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

/// Stops a process of a machine and takes its end of the channel. Nothing when it ended meanwhile.
pub fn take_over(machine: &Machine, pid: i32) -> Option<OwnedFd> {
    loop {
        freeze(pid);
        if !procfs::is_alive(pid) {
            return None;
        }
        let found = channels(machine.pid(), pid);
        if is_one(&found) {
            return Some(steal(pid, found[0].0));
        }
        // In the middle of something, or the supervisor is at its end.
        if !procfs::is_alive(machine.pid()) || found.is_empty() {
            return None;
        }
        thaw(pid);
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}
