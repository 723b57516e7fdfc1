//! A fixed pool of threads that run operations as blocking system calls. All of them exist before the process is sealed
//! and none ever ends.

use super::syscalls::execute;
use super::{Completion, Operation};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Barrier, Condvar, Mutex, MutexGuard, PoisonError};

/// The workers' stacks, bytes: they call the kernel and nothing else.
const STACK_BYTES: usize = 64 << 10;

/// An operation and the file that it is about.
pub(super) struct Job {
    pub(super) token: u32,
    pub(super) file: Arc<OwnedFd>,
    pub(super) operation: Operation,
}

struct Shared {
    jobs: Mutex<VecDeque<Job>>,
    available: Condvar,
    done: Mutex<Vec<Completion>>,
    /// Written when `done` stops being empty.
    wake: EventFd,
}

/// The pool, seen by the thread that feeds it.
pub(super) struct Pool {
    shared: Arc<Shared>,
}

impl Pool {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                jobs: Mutex::default(),
                available: Condvar::new(),
                done: Mutex::default(),
                wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            }),
        })
    }

    /// A copy of the eventfd that tells of completions.
    pub(super) fn wake_fd(&self) -> std::io::Result<OwnedFd> {
        self.shared.wake.as_fd().try_clone_to_owned()
    }

    /// Starts the threads and waits until each is up: a thread that is still being set up makes system calls that the
    /// sealed filter does not know.
    pub(super) fn start(&self, threads: usize) -> std::io::Result<()> {
        let ready = Arc::new(Barrier::new(threads + 1));
        for number in 0..threads {
            let (shared, ready) = (self.shared.clone(), ready.clone());
            std::thread::Builder::new()
                .name(format!("block-io-{number}"))
                .stack_size(STACK_BYTES)
                .spawn(move || {
                    ready.wait();
                    work(&shared);
                })?;
        }
        ready.wait();
        Ok(())
    }

    /// Hands over jobs; leaves `jobs` empty.
    pub(super) fn submit(&self, jobs: &mut Vec<Job>) {
        let count = jobs.len();
        lock(&self.shared.jobs).extend(jobs.drain(..));
        for _ in 0..count {
            self.shared.available.notify_one();
        }
    }

    /// What is done by now.
    pub(super) fn completions(&self) -> Vec<Completion> {
        std::mem::take(&mut lock(&self.shared.done))
    }
}

fn work(shared: &Shared) -> ! {
    loop {
        let mut jobs = lock(&shared.jobs);
        let job = loop {
            match jobs.pop_front() {
                Some(job) => break job,
                None => jobs = shared.available.wait(jobs).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(jobs);
        let Job { token, file, operation } = job;
        let result = execute(file.as_fd(), &operation);
        // Before it is told: whoever hears of it may want the file for itself.
        drop(file);
        let mut done = lock(&shared.done);
        let first = done.is_empty();
        done.push(Completion {
            token,
            result,
            operation,
        });
        drop(done);
        if first {
            // Cannot fail but by a counter that nobody reads running over: after 2^64 writes.
            let _ = shared.wake.write(1);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic anywhere ends the process, so a poisoned lock is never seen.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
