//! The launcher, from the supervisor's side: the process that starts helpers.
//!
//! Seccomp filters are inherited, so a sealed supervisor could not start a helper that needs more than itself. The
//! launcher is therefore forked first; [`process`] is what runs in it, [`child`] what runs in each new helper before its
//! program does.

mod child;
pub mod ids;
mod process;
pub mod sys;

use crate::child::Child;
use ids::IdPlan;
use ipc::Role;
use ipc::launch::{PACKET_BYTES, Report, encode_request};
use landlock::{
    Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr, Scope,
};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::ForkResult;
use process::{Inheritance, MAPPED, READY};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

/// The launcher could not be started or has broken its protocol.
#[derive(Debug, thiserror::Error)]
pub enum LauncherError {
    /// The helper executables are not where they should be.
    #[error("{path}: {errno}: the helper programs must stand beside the bulkhead program")]
    Executables {
        /// What could not be opened.
        path: PathBuf,
        /// The system's error.
        errno: Errno,
    },
    /// A system call failed.
    #[error("starting the launcher: {call}: {errno}")]
    System {
        /// Its name.
        call: &'static str,
        /// The system's error.
        errno: Errno,
    },
    /// The id maps could not be written.
    #[error("mapping user ids: {0}")]
    IdMaps(String),
    /// It ended.
    #[error("the launcher has ended")]
    Gone,
    /// It sent something that is not a report.
    #[error("the launcher sent a malformed report")]
    Protocol,
}

fn system(call: &'static str) -> impl Fn(Errno) -> LauncherError {
    move |errno| LauncherError::System { call, errno }
}

/// The running launcher.
pub struct Launcher {
    channel: OwnedFd,
    process: Child,
    /// Whether the kernel confines the helpers by Landlock too.
    pub landlock: bool,
    /// Which ids the helpers have.
    pub ids: IdPlan,
}

impl AsFd for Launcher {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Launcher {
    /// Forks the launcher and waits until it has sealed itself.
    ///
    /// # Errors
    /// [`LauncherError`]; the launcher itself prints a line when it is the one that fails.
    pub fn start(mode: policies::Mode, ids: IdPlan, groups: Vec<(Role, OwnedFd)>) -> Result<Self, LauncherError> {
        let executables = open_executables()?;
        let landlock = deny_all_ruleset(executables.as_fd());
        let has_landlock = landlock.is_some();
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(system("socketpair"))?;
        // SAFETY: the supervisor has one thread, and the child goes on with a process of its own.
        match unsafe { nix::unistd::fork() }.map_err(system("fork"))? {
            ForkResult::Child => {
                drop(ours);
                process::main(Inheritance {
                    channel: theirs,
                    executables,
                    landlock,
                    many_ids: ids.is_distinct(),
                    mode,
                    groups,
                })
            }
            ForkResult::Parent { child } => {
                drop((theirs, groups));
                let launcher = Self {
                    channel: ours,
                    process: Child::new(child).map_err(system("pidfd_open"))?,
                    landlock: has_landlock,
                    ids,
                };
                launcher.expect_ready()?;
                ids.write_maps(child).map_err(LauncherError::IdMaps)?;
                sys::send(launcher.channel.as_fd(), &[MAPPED], None).map_err(system("sendmsg"))?;
                launcher.expect_ready()?;
                Ok(launcher)
            }
        }
    }

    fn expect_ready(&self) -> Result<(), LauncherError> {
        let mut byte = [0];
        match sys::receive(self.channel.as_fd(), &mut byte, &mut [None, None]) {
            Ok(1) if byte[0] == READY => Ok(()),
            Ok(0) => Err(LauncherError::Gone),
            Ok(_) => Err(LauncherError::Protocol),
            Err(errno) => Err(system("recvmsg")(errno)),
        }
    }

    /// Asks for a helper with this end of a channel and this log socket. The answer comes as a [`Report`].
    ///
    /// # Errors
    /// When the launcher is gone.
    pub fn request(&self, role: Role, channel: OwnedFd, log: OwnedFd) -> Result<(), LauncherError> {
        use sendfd::SendWithFd;
        use std::os::fd::AsRawFd;
        let socket: std::os::unix::net::UnixDatagram =
            self.channel.try_clone().map_err(|_| LauncherError::Gone)?.into();
        let fds = [channel.as_raw_fd(), log.as_raw_fd()];
        socket
            .send_with_fd(&encode_request(role), &fds)
            .map(drop)
            .map_err(|_| LauncherError::Gone)
    }

    /// Reads one report; `None` when there is none now.
    ///
    /// # Errors
    /// When the launcher is gone or breaks the protocol.
    pub fn receive(&self) -> Result<Option<(Report, Option<OwnedFd>)>, LauncherError> {
        let mut packet = [0; PACKET_BYTES];
        let mut fds = [None, None];
        match sys::receive(self.channel.as_fd(), &mut packet, &mut fds) {
            Ok(0) => Err(LauncherError::Gone),
            Ok(length) => {
                let report = Report::decode(&packet[..length]).ok_or(LauncherError::Protocol)?;
                Ok(Some((report, fds[0].take())))
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(errno) => Err(system("recvmsg")(errno)),
        }
    }

    /// From now on [`Self::receive`] does not wait.
    ///
    /// # Errors
    /// A system error.
    pub fn set_nonblocking(&self) -> Result<(), LauncherError> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        fcntl(&self.channel, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map(drop)
            .map_err(system("fcntl"))
    }

    /// Ends all helpers and the launcher, and returns when they are gone.
    pub fn end(self) {
        drop(self.channel);
        self.process.end();
    }
}

/// Opens the directory of the running program and checks that all helpers are there.
fn open_executables() -> Result<OwnedFd, LauncherError> {
    use nix::fcntl::{AtFlags, OFlag, open};
    let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/proc/self/exe"));
    let directory = program.parent().map_or_else(|| PathBuf::from("/"), PathBuf::from);
    let failed = |path: PathBuf| move |errno| LauncherError::Executables { path, errno };
    let fd = open(
        &directory,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .map_err(failed(directory.clone()))?;
    for role in Role::ALL {
        nix::unistd::faccessat(&fd, role.name(), nix::unistd::AccessFlags::X_OK, AtFlags::empty())
            .map_err(failed(directory.join(role.name())))?;
    }
    Ok(fd)
}

/// A ruleset that denies everything Landlock knows, except executing a helper. `None` where the kernel has no Landlock.
fn deny_all_ruleset(executables: BorrowedFd<'_>) -> Option<OwnedFd> {
    let abi = landlock::ABI::V6;
    let created = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(abi)))
        .and_then(|rules| rules.scope(Scope::from_all(abi)))
        .and_then(Ruleset::create)
        .and_then(|rules| rules.add_rule(PathBeneath::new(executables, AccessFs::Execute | AccessFs::ReadFile)))
        .ok()?;
    created.into()
}
