//! The opener, from the supervisor's side: the process that makes sockets for commands.
//!
//! `chardev-add` and connections that are made again need sockets while the machine runs. The sealed supervisor can make
//! none, and shall not: it holds the descriptors of everything, so that neither its filter has `socket`, `bind`, `listen`
//! or `connect` nor its Landlock domain TCP. What it would have taken (eight more system calls, and the network) is in a
//! process of its own, forked before the supervisor seals itself, as the launcher is, because what a sealed process
//! starts is sealed as well. The launcher cannot start it: everything below the launcher is in an empty network
//! namespace. The opener has the host's network and may make socket files, and nothing else: no guest RAM, no disks, no
//! descriptors of the supervisor's, no file that it could open or remove. It reads typed requests with numeric addresses,
//! and nothing of what goes over the sockets.
//!
//! A connection that takes its time keeps neither process waiting. When the opener dies, requests for sockets fail from
//! then on, and nothing else does.

mod process;
pub mod sockets;

use crate::child::Child;
use crate::logging;
use crate::sys::Poller;
use crate::{executor::Slot, launcher};
use ipc::opener::{FromOpener, OpenError, OpenRequest, OpenStep, OpenedSocket, ToOpener};
use ipc::{Channel, IpcError, Request, RequestId};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::ForkResult;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How long an answer may take: a connection's time and some more.
const DEADLINE: Duration = sockets::CONNECT_TIMEOUT.saturating_add(Duration::from_secs(10));

/// The opener could not be started.
#[derive(Debug, thiserror::Error)]
pub enum OpenerError {
    /// A system call failed.
    #[error("starting the opener: {0}")]
    System(#[from] Errno),
    /// No channel.
    #[error("starting the opener: {0}")]
    Channel(#[from] IpcError),
    /// It ended.
    #[error("the opener has ended")]
    Gone,
}

struct Waiting {
    answer: Slot<Result<OpenedSocket, OpenError>>,
    deadline: Instant,
}

/// The running opener.
pub struct Opener {
    process: Child,
    /// `None` when it is gone.
    channel: RefCell<Option<Channel<ToOpener, FromOpener>>>,
    next_id: Cell<u64>,
    waiting: RefCell<BTreeMap<RequestId, Waiting>>,
}

impl Opener {
    /// Forks the opener and waits until it has sealed itself. The caller is not sealed yet and has neither secrets nor
    /// guest RAM.
    ///
    /// # Errors
    /// [`OpenerError`]; the opener itself prints a line when it is the one that fails.
    pub fn start(mode: policies::Mode) -> Result<Self, OpenerError> {
        let (ours, theirs) = ipc::channel::pair()?;
        // SAFETY: the supervisor has one thread, and the child goes on with a process of its own.
        match unsafe { nix::unistd::fork() }? {
            ForkResult::Child => {
                drop(ours);
                process::main(theirs, mode)
            }
            ForkResult::Parent { child } => {
                drop(theirs);
                let mut word = [0];
                let length = launcher::sys::receive(ours.as_fd(), &mut word, &mut [None, None])?;
                if length != 1 || word[0] != process::READY {
                    return Err(OpenerError::Gone);
                }
                fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
                Ok(Self {
                    process: Child::new(child)?,
                    channel: RefCell::new(Some(Channel::new(ours))),
                    next_id: Cell::new(1),
                    waiting: RefCell::default(),
                })
            }
        }
    }

    /// Has a socket opened.
    ///
    /// # Errors
    /// What failed.
    pub async fn open(&self, body: OpenRequest) -> Result<OpenedSocket, OpenError> {
        let id = RequestId(self.next_id.get());
        self.next_id.set(id.0 + 1);
        let answer = Slot::default();
        let waiting = Waiting {
            answer: answer.clone(),
            deadline: Instant::now() + DEADLINE,
        };
        self.waiting.borrow_mut().insert(id, waiting);
        let sent = match self.channel.borrow_mut().as_mut() {
            Some(channel) => channel.send(Request { id, body }),
            None => Err(IpcError::Closed),
        };
        if let Err(error) = sent {
            self.lose(&error.to_string());
        }
        answer.wait().await
    }

    /// Registers its channel for one wait.
    pub fn watch<T>(&self, poller: &mut Poller<T>, token: T) {
        if let Some(channel) = self.channel.borrow().as_ref() {
            let writable = if channel.wants_write() { libc::POLLOUT } else { 0 };
            poller.add(channel.as_fd(), libc::POLLIN | writable, token);
        }
    }

    /// Its channel is ready: takes the answers that have arrived.
    pub fn ready(&self) {
        loop {
            let received = match self.channel.borrow_mut().as_mut() {
                Some(channel) => match channel.flush() {
                    Ok(()) | Err(IpcError::WouldBlock) => channel.recv(),
                    Err(error) => Err(error),
                },
                None => return,
            };
            match received {
                Ok(FromOpener { id, result }) => {
                    let waiting = self.waiting.borrow_mut().remove(&id);
                    match waiting {
                        Some(waiting) => waiting.answer.fill(result),
                        None => return self.lose("it answered a request that was not made"),
                    }
                }
                Err(IpcError::WouldBlock) => return,
                Err(error) => return self.lose(&error.to_string()),
            }
        }
    }

    /// Gives it up when an answer is overdue; returns the next deadline.
    pub fn check_deadlines(&self, now: Instant) -> Option<Instant> {
        let next = self.waiting.borrow().values().map(|waiting| waiting.deadline).min()?;
        if next > now {
            return Some(next);
        }
        self.lose("it did not answer in time");
        None
    }

    /// It is gone, or as good as gone: it ends when its channel closes.
    fn lose(&self, reason: &str) {
        if self.channel.borrow_mut().take().is_some() {
            let pid = self.process.pid;
            logging::line(format_args!(
                "opener (pid {pid}) is lost: {reason}; no more sockets can be opened while this machine runs"
            ));
        }
        for (_, waiting) in self.waiting.take() {
            waiting.answer.fill(Err(OpenError {
                step: OpenStep::Opener,
                errno: Errno::EPIPE as i32,
            }));
        }
    }

    /// Ends it, and returns when it is gone.
    pub fn end(self) {
        drop(self.channel.take());
        self.process.end();
    }
}
