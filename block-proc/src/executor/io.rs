//! Engine operations as futures.

use super::spawner::Spawner;
use super::timer::Timers;
use crate::engine::{Completion, Engine, Event, FileId, Operation};
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

enum Slot {
    Free,
    InFlight(Option<Waker>),
    /// Its future is gone; the engine still owns the operation.
    Abandoned,
    Done(Completion),
}

struct Inner {
    engine: Box<dyn Engine>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    events: Vec<Event>,
}

/// The engine, shared by the tasks of one thread.
pub struct Io {
    inner: RefCell<Inner>,
    timers: Rc<Timers>,
    spawner: Rc<Spawner>,
    /// Most operations that are queued before the system is told of them; 0: the engine's own bound.
    max_batch: Cell<u64>,
    /// Operations queued since the system was told last.
    batch: Cell<u64>,
    /// Bytes of operations queued since the last wait.
    turn_bytes: Cell<u64>,
}

/// How much is begun in one turn, bytes. What is in memory the system copies at once, about a millisecond for this much, and
/// meanwhile nobody else is listened to.
const TURN_BYTES: u64 = 2 << 20;

impl Io {
    /// Wraps a started engine.
    pub fn new(engine: Box<dyn Engine>) -> Rc<Self> {
        Rc::new(Self {
            inner: RefCell::new(Inner {
                engine,
                slots: Vec::new(),
                free: Vec::new(),
                events: Vec::new(),
            }),
            timers: Rc::default(),
            spawner: Rc::default(),
            max_batch: Cell::new(0),
            batch: Cell::new(0),
            turn_bytes: Cell::new(0),
        })
    }

    /// See [`ipc::block::Polling::max_batch`].
    pub fn set_max_batch(&self, max_batch: u64) {
        self.max_batch.set(max_batch);
    }

    /// The thread's timers: a wait ends in time for them.
    pub fn timers(&self) -> &Rc<Timers> {
        &self.timers
    }

    /// Where tasks of the thread leave tasks for the background.
    pub fn spawner(&self) -> &Rc<Spawner> {
        &self.spawner
    }

    /// See [`Engine::add_file`].
    ///
    /// # Errors
    /// The engine's.
    pub fn add_file(&self, file: OwnedFd) -> std::io::Result<FileId> {
        self.inner.borrow_mut().engine.add_file(file)
    }

    /// See [`Engine::remove_file`].
    pub fn remove_file(&self, file: FileId) {
        self.inner.borrow_mut().engine.remove_file(file);
    }

    /// See [`Engine::take_file`].
    pub fn take_file(&self, file: FileId) -> Option<OwnedFd> {
        self.inner.borrow_mut().engine.take_file(file)
    }

    /// Queues an operation; the future ends with its result and hands it back.
    pub fn submit(self: &Rc<Self>, operation: Operation) -> Pending {
        let mut inner = self.inner.borrow_mut();
        let slot = inner.free.pop().unwrap_or_else(|| {
            inner.slots.push(Slot::Free);
            // Requests in flight are bounded by the virtqueues' sizes, far below 2^32.
            (inner.slots.len() - 1) as u32
        });
        inner.slots[slot as usize] = Slot::InFlight(None);
        self.turn_bytes.set(self.turn_bytes.get() + operation.bytes());
        inner.engine.submit(slot, operation);
        self.batch.set(self.batch.get() + 1);
        if self.max_batch.get() != 0 && self.batch.get() >= self.max_batch.get() {
            self.batch.set(0);
            if let Err(error) = inner.engine.flush() {
                // No request can ever be answered again.
                panic!("the block I/O engine failed: {error}");
            }
        }
        Pending { io: self.clone(), slot }
    }

    /// Whether so much was begun since the last wait that it is time for the next one.
    pub fn is_turn_over(&self) -> bool {
        self.turn_bytes.get() >= TURN_BYTES
    }

    /// See [`Engine::cancel_wait`].
    pub fn cancel_wait(&self, token: u32) {
        self.inner.borrow_mut().engine.cancel_wait(token);
    }

    /// See [`Engine::begin`].
    ///
    /// # Errors
    /// The engine's: it is unusable then.
    pub fn begin(&self) -> std::io::Result<bool> {
        self.inner.borrow_mut().engine.begin()
    }

    /// One wait of the engine, at most for `timeout`: wakes the tasks whose operations or sleeps are over, appends the
    /// signals. Returns whether there was any of them.
    ///
    /// # Errors
    /// The engine's: it is unusable then.
    pub fn wait(&self, signals: &mut Vec<u32>, timeout: Option<Duration>) -> std::io::Result<bool> {
        self.batch.set(0);
        self.turn_bytes.set(0);
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        let timeout = timeout.into_iter().chain(self.timers.idle_for()).min();
        inner.engine.wait(&mut inner.events, timeout)?;
        let any = self.timers.wake() || !inner.events.is_empty();
        for event in inner.events.drain(..) {
            match event {
                Event::Signal(signal) => signals.push(signal),
                Event::Completed(completion) => {
                    let token = completion.token;
                    let slot = &mut inner.slots[token as usize];
                    match std::mem::replace(slot, Slot::Done(completion)) {
                        Slot::InFlight(waker) => waker.into_iter().for_each(Waker::wake),
                        Slot::Abandoned => {
                            *slot = Slot::Free;
                            inner.free.push(token);
                        }
                        Slot::Free | Slot::Done(_) => unreachable!("the engine reports an operation once"),
                    }
                }
            }
        }
        Ok(any)
    }
}

/// An operation in flight. Dropping it does not cancel: the engine keeps the memory until the kernel is done.
pub struct Pending {
    io: Rc<Io>,
    slot: u32,
}

impl Pending {
    /// The engine's name for it, as long as it is under way.
    pub fn token(&self) -> u32 {
        self.slot
    }
}

impl Future for Pending {
    type Output = (Result<usize, Errno>, Operation);

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut inner = self.io.inner.borrow_mut();
        let slot = &mut inner.slots[self.slot as usize];
        match std::mem::replace(slot, Slot::InFlight(Some(context.waker().clone()))) {
            Slot::Done(completion) => {
                // Stays marked until the drop below, which frees it.
                *slot = Slot::Free;
                Poll::Ready((completion.result, completion.operation))
            }
            Slot::InFlight(_) => Poll::Pending,
            Slot::Free | Slot::Abandoned => panic!("a finished operation was polled again"),
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let mut inner = self.io.inner.borrow_mut();
        let slot = &mut inner.slots[self.slot as usize];
        if matches!(slot, Slot::InFlight(_)) {
            *slot = Slot::Abandoned;
        } else {
            *slot = Slot::Free;
            inner.free.push(self.slot);
        }
    }
}
