//! `blkdebug`: passes requests on, and fails or holds those that its rules and breakpoints name. For tests of what is above.
//!
//! It has a state, a number that begins at 1. Formats above tell it what they are about to do ([`Event`]). An event makes the
//! rules *active* that name it and the present state, in the place of those that were active before; a request fails if an
//! active rule fits its kind and its range. The rules that name no event (`none`) are active from the beginning.

pub mod breakpoints;

use super::event::{Event, Held, say};
use super::{Extent, Node, NodeFuture};
use crate::buffer::Segments;
use breakpoints::{Breakpoints, Drain};
use ipc::Failure;
use ipc::graph::{BlkdebugSpec, InjectedError, IoType, SetState};
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

/// The state in which it begins.
const FIRST_STATE: u32 = 1;

struct Injection {
    event: Event,
    rule: InjectedError,
}

impl Injection {
    fn fits(&self, kind: IoType, offset: u64, bytes: u64) -> bool {
        let kinds = &self.rule.iotypes;
        let is_there = |at: u64| (offset..offset + bytes).contains(&at);
        (kinds.is_empty() || kinds.contains(&kind)) && self.rule.offset.is_none_or(is_there)
    }
}

struct Transition {
    event: Event,
    rule: SetState,
}

/// See the module.
pub struct BlkdebugNode {
    child: Rc<dyn Node>,
    state: Cell<u32>,
    injections: RefCell<Vec<Rc<Injection>>>,
    /// The last one first.
    active: RefCell<Vec<Rc<Injection>>>,
    transitions: Vec<Transition>,
    breakpoints: Rc<Breakpoints>,
}

impl BlkdebugNode {
    /// Over a child. `drain` says when nothing may be held.
    ///
    /// # Errors
    /// When a rule names an event that there is not.
    pub fn new(child: Rc<dyn Node>, spec: BlkdebugSpec, drain: Rc<Drain>) -> Result<Rc<Self>, Failure> {
        let event =
            |name: &str| Event::named(name).ok_or_else(|| Failure::new(format!("blkdebug knows no event \"{name}\"")));
        let mut injections = Vec::new();
        for rule in spec.inject_errors {
            let event = rule.event.as_deref().map_or(Ok(Event::None), event)?;
            injections.push(Rc::new(Injection { event, rule }));
        }
        let mut transitions = Vec::new();
        for rule in spec.set_states {
            let event = event(&rule.event)?;
            transitions.push(Transition { event, rule });
        }
        let node = Rc::new(Self {
            child,
            state: Cell::new(FIRST_STATE),
            injections: RefCell::new(injections),
            active: RefCell::default(),
            transitions,
            breakpoints: Breakpoints::new(drain),
        });
        // Nobody is there yet who could wait.
        let _ = node.event(Event::None);
        Ok(node)
    }

    /// Its breakpoints.
    pub fn breakpoints(&self) -> &Rc<Breakpoints> {
        &self.breakpoints
    }

    /// Fails a request that a rule names.
    async fn check(&self, kind: IoType, offset: u64, bytes: u64) -> Result<(), Errno> {
        let found = {
            let active = self.active.borrow();
            active.iter().find(|rule| rule.fits(kind, offset, bytes)).cloned()
        };
        let Some(found) = found else {
            return Ok(());
        };
        if found.rule.once {
            let others = |rule: &Rc<Injection>| !Rc::ptr_eq(rule, &found);
            self.active.borrow_mut().retain(others);
            self.injections.borrow_mut().retain(others);
        }
        if !found.rule.immediately {
            // As late as an error of a disk is at the earliest: others run in between.
            let mut is_second = false;
            poll_fn(|context| match std::mem::replace(&mut is_second, true) {
                true => Poll::Ready(()),
                false => {
                    context.waker().wake_by_ref();
                    Poll::Pending
                }
            })
            .await;
        }
        Err(Errno::from_raw(found.rule.errno))
    }
}

impl Drop for BlkdebugNode {
    fn drop(&mut self) {
        self.breakpoints.close();
    }
}

impl Node for BlkdebugNode {
    passes!(child: bytes, resize, limits);

    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        Box::pin(async move {
            self.check(IoType::Read, offset, into.bytes()).await?;
            self.child.read(offset, into).await
        })
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        Box::pin(async move {
            say(self, Event::Pwritev).await;
            self.check(IoType::Write, offset, from.bytes()).await?;
            let written = self.child.write(offset, from, durable).await;
            say(self, Event::PwritevDone).await;
            written
        })
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        Box::pin(async move {
            say(self, Event::PwritevZero).await;
            self.check(IoType::WriteZeroes, offset, bytes).await?;
            let written = self.child.write_zeroes(offset, bytes, may_unmap).await;
            say(self, Event::PwritevDone).await;
            written
        })
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        Box::pin(async move {
            self.check(IoType::Discard, offset, bytes).await?;
            self.child.discard(offset, bytes).await
        })
    }

    /// Formats that have something to write first say `flush_to_os` before that, and it is said once more here: what changes
    /// nothing above this (`raw`) says nothing.
    fn flush(&self) -> NodeFuture<'_> {
        Box::pin(async move {
            say(self, Event::FlushToOs).await;
            say(self, Event::FlushToDisk).await;
            self.check(IoType::Flush, 0, 0).await?;
            self.child.flush().await
        })
    }

    fn status(&self, offset: u64, bytes: u64) -> NodeFuture<'_, Extent> {
        Box::pin(async move {
            self.check(IoType::BlockStatus, offset, bytes).await?;
            self.child.status(offset, bytes).await
        })
    }

    fn event(&self, event: Event) -> Option<Held> {
        let state = self.state.get();
        let is_now = |of_rule: Option<u32>| of_rule.is_none_or(|of_rule| of_rule == state);
        let injections = self.injections.borrow();
        let fitting = injections.iter().filter(|injection| injection.event == event);
        let active: Vec<_> = fitting
            .filter(|injection| is_now(injection.rule.state))
            .rev()
            .cloned()
            .collect();
        if !active.is_empty() {
            self.active.replace(active);
        }
        let fits = |transition: &&Transition| transition.event == event && is_now(transition.rule.state);
        if let Some(last) = self.transitions.iter().rfind(fits) {
            self.state.set(last.rule.new_state);
        }
        self.breakpoints.reach(event)
    }
}
