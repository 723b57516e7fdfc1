//! The engine for hosts without io_uring: worker threads do the I/O, the data plane waits in epoll.
//!
//! Eventfds are watched edge-triggered, so a kick costs no read.

use super::pool::{Job, Pool};
use super::table::Table;
use super::{Completion, Engine, Event, FileId, Operation};
use ipc::block::EngineChoice;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Size of the pool. More threads than CPUs, because each is blocked by one request at a time.
const THREADS: usize = 16;
/// Signal number of the pool's own eventfd, in epoll's data.
const POOL_SIGNAL: u64 = u64::MAX;
/// Most events that one wait reports.
const EVENTS_PER_WAIT: usize = 64;

/// See the module.
pub struct ThreadEngine {
    epoll: Epoll,
    pool: Pool,
    watched: Vec<OwnedFd>,
    files: Table<Arc<OwnedFd>>,
    queued: Vec<Job>,
    /// [`Operation::Ready`]s under way, each with its socket.
    waits: Vec<Job>,
    /// Those that were given up.
    cancelled: Vec<Job>,
}

impl ThreadEngine {
    /// Without threads yet.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new() -> std::io::Result<Self> {
        let mut engine = Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            pool: Pool::new()?,
            watched: Vec::new(),
            files: Table::default(),
            queued: Vec::new(),
            waits: Vec::new(),
            cancelled: Vec::new(),
        };
        let wake = engine.pool.wake_fd()?;
        engine.add_watch(wake, POOL_SIGNAL)?;
        Ok(engine)
    }

    fn add_watch(&mut self, eventfd: OwnedFd, data: u64) -> std::io::Result<()> {
        self.epoll.add(
            &eventfd,
            EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, data),
        )?;
        self.watched.push(eventfd);
        Ok(())
    }
}

fn ended(Job { token, operation, .. }: Job, result: Result<usize, Errno>) -> Event {
    Event::Completed(Completion {
        token,
        result,
        operation,
    })
}

impl ThreadEngine {
    /// Waits for sockets, and for what epoll waits for. Sockets come and go too often for epoll, and there are few.
    fn wait_for_sockets(&mut self, events: &mut Vec<Event>, timeout: Option<Duration>) -> std::io::Result<()> {
        let mut fds = vec![PollFd::new(self.epoll.0.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.waits.iter().map(|wait| {
            let to_write = matches!(wait.operation, Operation::Ready { to_write: true, .. });
            let flags = if to_write {
                PollFlags::POLLOUT
            } else {
                PollFlags::POLLIN
            };
            PollFd::new(wait.file.as_fd(), flags)
        }));
        let timeout = timeout.map_or(PollTimeout::NONE, |timeout| {
            PollTimeout::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
        let ready: Vec<bool> = fds[1..].iter().map(|fd| fd.any().unwrap_or(true)).collect();
        let mut ready = ready.into_iter();
        let over = self.waits.extract_if(.., |_| ready.next() == Some(true));
        events.extend(over.map(|wait| ended(wait, Ok(0))));
        Ok(())
    }
}

impl Engine for ThreadEngine {
    fn choice(&self) -> EngineChoice {
        EngineChoice::Threads
    }

    fn watch(&mut self, eventfd: OwnedFd, signal: u32) -> std::io::Result<()> {
        self.add_watch(eventfd, signal.into())
    }

    // Its requests are system calls of the process's threads, which end before the process's files are closed.
    fn hold(&mut self, _file: BorrowedFd<'_>) -> std::io::Result<()> {
        Ok(())
    }

    fn start(&mut self, disks: bool, streams: usize) -> std::io::Result<()> {
        self.pool.start(if disks { THREADS } else { 0 } + streams)
    }

    fn add_file(&mut self, file: OwnedFd) -> std::io::Result<FileId> {
        Ok(FileId(self.files.insert(Arc::new(file))))
    }

    fn remove_file(&mut self, file: FileId) {
        self.files.remove(file.0);
    }

    fn take_file(&mut self, file: FileId) -> Option<OwnedFd> {
        Arc::into_inner(self.files.remove(file.0)?)
    }

    fn submit(&mut self, token: u32, operation: Operation) {
        let file = self.files.get(operation.file().0).clone();
        let job = Job { token, file, operation };
        if matches!(job.operation, Operation::Ready { .. }) {
            self.waits.push(job);
        } else {
            self.queued.push(job);
        }
    }

    fn cancel_wait(&mut self, token: u32) {
        self.cancelled
            .extend(self.waits.extract_if(.., |wait| wait.token == token));
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if !self.queued.is_empty() {
            self.pool.submit(&mut self.queued);
        }
        Ok(())
    }

    fn begin(&mut self) -> std::io::Result<bool> {
        self.flush()?;
        Ok(false)
    }

    fn wait(&mut self, events: &mut Vec<Event>, timeout: Option<Duration>) -> std::io::Result<()> {
        self.flush()?;
        for wait in self.cancelled.drain(..) {
            events.push(ended(wait, Err(Errno::ECANCELED)));
        }
        let timeout = if events.is_empty() {
            timeout
        } else {
            Some(Duration::ZERO)
        };
        let timeout = if self.waits.is_empty() {
            timeout
        } else {
            self.wait_for_sockets(events, timeout)?;
            Some(Duration::ZERO)
        };
        let timeout = timeout.map_or(EpollTimeout::NONE, |timeout| {
            // Rounded up: who waits for a moment must not come back before it over and over.
            let millis = timeout.as_nanos().div_ceil(1_000_000);
            i32::try_from(millis)
                .ok()
                .and_then(|millis| millis.try_into().ok())
                .unwrap_or(EpollTimeout::MAX)
        });
        let mut ready = [EpollEvent::empty(); EVENTS_PER_WAIT];
        let count = match self.epoll.wait(&mut ready, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        for event in &ready[..count] {
            match u32::try_from(event.data()) {
                Ok(signal) => events.push(Event::Signal(signal)),
                Err(_) => events.extend(self.pool.completions().into_iter().map(Event::Completed)),
            }
        }
        Ok(())
    }
}
