//! The warden, from the supervisor's side: the process that answers for the machine's metrics, and that removes what a machine
//! leaves in the host when its supervisor has ended, killed or not: control groups and socket files.
//!
//! It is forked from the supervisor before the launcher, holds the directories of what it may remove and the open files of the
//! groups' counters, and no descriptor of a machine's. It takes two things from outside: packets of fixed size from the supervisor,
//! and one line from whoever scrapes. It ends when the supervisor has and all is removed; unlike all others it does not die
//! with it.

mod process;

use super::cgroup::Cgroups;
use super::metrics::{Meter, News};
use crate::child::Child;
use crate::{launcher, logging};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::stat::{FileStat, Mode, stat};
use nix::unistd::{ForkResult, Pid};
use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// The warden could not be started.
#[derive(Debug, thiserror::Error)]
pub enum WardenError {
    /// A system call failed.
    #[error("starting the warden: {0}")]
    System(#[from] Errno),
    /// It ended.
    #[error("the warden has ended")]
    Gone,
}

/// A socket file of the machine's: it is removed as long as it is the same one.
#[derive(Debug)]
pub struct SocketFile {
    directory: OwnedFd,
    name: std::ffi::OsString,
    identity: (u64, u64),
}

fn identity(found: &FileStat) -> (u64, u64) {
    (found.st_dev, found.st_ino)
}

impl SocketFile {
    /// The socket that was just made at this path.
    pub fn at(path: &Path) -> Option<Self> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Some(Self {
            directory: open(parent.unwrap_or(Path::new(".")), flags, Mode::empty()).ok()?,
            name: path.file_name()?.to_owned(),
            identity: identity(&stat(path).ok()?),
        })
    }
}

/// What the warden takes along.
pub struct Charge {
    /// The machine's name.
    pub name: String,
    /// `--metrics`.
    pub listener: Option<OwnedFd>,
    /// What is removed at the end.
    pub sockets: Vec<SocketFile>,
    /// What is removed at the end, and read for the metrics.
    pub cgroups: Cgroups,
    /// Whether policies are enforced.
    pub mode: policies::Mode,
}

/// The running warden.
pub struct Warden {
    process: Child,
    /// `None` when it is gone.
    channel: RefCell<Option<OwnedFd>>,
    told: Cell<Option<News>>,
}

impl Warden {
    /// Forks the warden and waits until it has sealed itself. Returns what of the groups is the launcher's.
    ///
    /// # Errors
    /// [`WardenError`]; the warden itself prints a line when it is the one that fails.
    pub fn start(charge: Charge) -> Result<(Self, Cgroups), WardenError> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: the supervisor has one thread, and the child goes on with a process of its own.
        match unsafe { nix::unistd::fork() }? {
            ForkResult::Child => {
                drop(ours);
                process::main(theirs, charge)
            }
            ForkResult::Parent { child } => {
                drop(theirs);
                let mut word = [0];
                let length = launcher::sys::receive(ours.as_fd(), &mut word, &mut [None, None])?;
                if length != 1 || word[0] != process::READY {
                    charge.cgroups.leave();
                    return Err(WardenError::Gone);
                }
                fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
                let Charge { mut cgroups, .. } = charge;
                // They are the warden's from now on.
                cgroups.made.clear();
                cgroups.meters = Vec::<Meter>::new();
                let warden = Self {
                    process: Child::new(child)?,
                    channel: RefCell::new(Some(ours)),
                    told: Cell::new(None),
                };
                Ok((warden, cgroups))
            }
        }
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        self.process.pid
    }

    /// Tells it what has changed. What finds no room is told the next time.
    pub fn tell(&self, news: News) {
        if self.told.get() == Some(news) {
            return;
        }
        let sent = match self.channel.borrow().as_ref() {
            Some(channel) => launcher::sys::send(channel.as_fd(), &news.encode(), None),
            None => return,
        };
        match sent {
            Ok(()) => self.told.set(Some(news)),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => {
                self.channel.take();
                let pid = self.process.pid;
                logging::line(format_args!(
                    "warden (pid {pid}) is lost: {errno}; nobody answers for metrics, and control groups stay"
                ));
            }
        }
    }
}
