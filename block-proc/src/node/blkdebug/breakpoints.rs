//! Breakpoints: the next request that comes to an event is held there, under a tag, until it is told to go on.
//!
//! **Drains win.** Whoever waits until no request is under way (a change of the graph, a pause of the machine, a reset of a
//! device) would wait for ever for one that is held, and with it everybody behind. So as long as such a drain lasts, what is
//! held goes on by itself and nothing new is held; breakpoints that were not reached stay.

use crate::node::event::{Event, Held};
use ipc::helper;
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// What one request waits for.
#[derive(Default)]
struct Gate {
    is_open: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Gate {
    fn open(&self) {
        self.is_open.set(true);
        self.waker.take().into_iter().for_each(Waker::wake);
    }

    async fn pass(&self) {
        poll_fn(|context| {
            if self.is_open.get() {
                return Poll::Ready(());
            }
            self.waker.replace(Some(context.waker().clone()));
            Poll::Pending
        })
        .await;
    }
}

/// Whether the thread waits until there are no requests, and what it lets go then.
#[derive(Default)]
pub struct Drain {
    is_draining: Cell<bool>,
    gates: RefCell<Vec<Rc<Gate>>>,
}

impl Drain {
    /// Begins or ends it. What is held goes on.
    pub fn set(&self, is_draining: bool) {
        self.is_draining.set(is_draining);
        if is_draining {
            self.gates.take().iter().for_each(|gate| gate.open());
        }
    }
}

/// The breakpoints of one node.
pub struct Breakpoints {
    drain: Rc<Drain>,
    set: RefCell<Vec<(Event, String)>>,
    /// The last one last.
    held: RefCell<Vec<(String, Rc<Gate>)>>,
    waiting: RefCell<Vec<Waker>>,
    /// The node is gone.
    is_closed: Cell<bool>,
}

impl Breakpoints {
    /// None yet.
    pub fn new(drain: Rc<Drain>) -> Rc<Self> {
        Rc::new(Self {
            drain,
            set: RefCell::default(),
            held: RefCell::default(),
            waiting: RefCell::default(),
            is_closed: Cell::new(false),
        })
    }

    /// A request has come to an event. What it has to wait for, if there is a breakpoint; that is used up by it.
    pub fn reach(self: &Rc<Self>, event: Event) -> Option<Held> {
        if self.set.borrow().is_empty() || self.drain.is_draining.get() {
            return None;
        }
        let reached: Vec<String> = {
            let mut set = self.set.borrow_mut();
            let reached = set.extract_if(.., |(at, _)| *at == event);
            reached.map(|(_, tag)| tag).collect()
        };
        if reached.is_empty() {
            return None;
        }
        let gates: Vec<Rc<Gate>> = reached.into_iter().map(|tag| self.hold(tag)).collect();
        Some(Box::pin(async move {
            for gate in gates {
                gate.pass().await;
            }
        }))
    }

    fn hold(&self, tag: String) -> Rc<Gate> {
        helper::log(&format!("blkdebug: Suspended request '{tag}'"));
        let gate = Rc::<Gate>::default();
        self.drain.gates.borrow_mut().push(gate.clone());
        self.held.borrow_mut().push((tag, gate.clone()));
        self.waiting.borrow_mut().drain(..).for_each(Waker::wake);
        gate
    }

    /// Holds the next request that comes to the event of this name.
    ///
    /// # Errors
    /// ENOENT when there is no such event.
    pub fn set(&self, event: &str, tag: String) -> Result<(), Errno> {
        let event = Event::named(event).ok_or(Errno::ENOENT)?;
        self.set.borrow_mut().push((event, tag));
        Ok(())
    }

    /// The request that was held last under a tag goes on.
    ///
    /// # Errors
    /// ENOENT when there is none.
    pub fn resume(&self, tag: &str) -> Result<(), Errno> {
        self.forget_open();
        let mut held = self.held.borrow_mut();
        let at = held.iter().rposition(|(of, _)| of == tag).ok_or(Errno::ENOENT)?;
        let_go(&held.remove(at));
        Ok(())
    }

    /// Breakpoints with a tag are gone, and what is held under it goes on.
    ///
    /// # Errors
    /// ENOENT when there is neither.
    pub fn remove(&self, tag: &str) -> Result<(), Errno> {
        self.forget_open();
        let set = self.set.borrow_mut().extract_if(.., |(_, of)| of == tag).count();
        let held = self
            .held
            .borrow_mut()
            .extract_if(.., |(of, _)| of == tag)
            .map(|held| let_go(&held))
            .count();
        if set + held == 0 { Err(Errno::ENOENT) } else { Ok(()) }
    }

    /// No request will come any more.
    pub fn close(&self) {
        self.is_closed.set(true);
        self.waiting.borrow_mut().drain(..).for_each(Waker::wake);
    }

    /// Waits until a request is held under a tag.
    ///
    /// # Errors
    /// ENOENT when the node is gone before.
    pub async fn wait(&self, tag: &str) -> Result<(), Errno> {
        poll_fn(|context| {
            self.forget_open();
            if self.held.borrow().iter().any(|(of, _)| of == tag) {
                return Poll::Ready(Ok(()));
            }
            if self.is_closed.get() {
                return Poll::Ready(Err(Errno::ENOENT));
            }
            self.waiting.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// What a drain has let go.
    fn forget_open(&self) {
        self.held.borrow_mut().retain(|(_, gate)| !gate.is_open.get());
        self.drain.gates.borrow_mut().retain(|gate| !gate.is_open.get());
    }
}

fn let_go((tag, gate): &(String, Rc<Gate>)) {
    helper::log(&format!("blkdebug: Resuming request '{tag}'"));
    gate.open();
}
