//! The engine for hosts without io_uring: worker threads do the I/O, the data plane waits in epoll.
//!
//! Eventfds are watched edge-triggered, so a kick costs no read.

use super::pool::{Job, Pool};
use super::table::Table;
use super::{Engine, Event, FileId, Operation};
use ipc::block::EngineChoice;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::os::fd::OwnedFd;
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

impl Engine for ThreadEngine {
    fn choice(&self) -> EngineChoice {
        EngineChoice::Threads
    }

    fn watch(&mut self, eventfd: OwnedFd, signal: u32) -> std::io::Result<()> {
        self.add_watch(eventfd, signal.into())
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

    fn submit(&mut self, token: u32, operation: Operation) {
        let file = self.files.get(operation.file().0).clone();
        self.queued.push(Job { token, file, operation });
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if !self.queued.is_empty() {
            self.pool.submit(&mut self.queued);
        }
        Ok(())
    }

    fn wait(&mut self, events: &mut Vec<Event>, timeout: Option<Duration>) -> std::io::Result<()> {
        self.flush()?;
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
