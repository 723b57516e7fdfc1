//! A single-threaded executor for the supervisor's sequences ("pause the vCPUs, then the disks, then tell the clients").
//!
//! There are a handful of tasks and one event loop, so there are no wakers: after every round of the loop all tasks are
//! polled. What a task waits for is a [`Slot`] that the loop fills, or its turn at a [`Turnstile`].

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// The tasks under way.
#[derive(Default)]
pub struct Executor {
    running: RefCell<Vec<Task>>,
    added: RefCell<Vec<Task>>,
}

impl Executor {
    /// Adds a task. It is first polled in the next round.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.added.borrow_mut().push(Box::pin(task));
    }

    /// Drops all tasks where they are.
    pub fn clear(&self) {
        drop((self.running.take(), self.added.take()));
    }

    /// Polls all tasks, and again as long as one of them ends or starts another.
    pub fn run(&self) {
        let mut context = Context::from_waker(Waker::noop());
        loop {
            let mut tasks = self.running.take();
            let before = tasks.len();
            tasks.retain_mut(|task| task.as_mut().poll(&mut context).is_pending());
            let ended = tasks.len() < before;
            let added = self.added.take();
            let grew = !added.is_empty();
            tasks.extend(added);
            self.running.replace(tasks);
            if !ended && !grew {
                return;
            }
        }
    }
}

/// A value that one side fills in and the other waits for.
pub struct Slot<T>(Rc<RefCell<Option<T>>>);

impl<T> Clone for Slot<T> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self(Rc::default())
    }
}

impl<T> Slot<T> {
    /// Fills the slot; the first value stays.
    pub fn fill(&self, value: T) {
        self.0.borrow_mut().get_or_insert(value);
    }

    /// Waits until it is filled.
    pub async fn wait(&self) -> T {
        poll_fn(|_| self.0.borrow_mut().take().map_or(Poll::Pending, Poll::Ready)).await
    }
}

/// Lets one task at a time through, in the order of arrival: a change of the machine's run state is one sequence.
#[derive(Default)]
pub struct Turnstile {
    next_ticket: Cell<u64>,
    serving: Cell<u64>,
}

/// Its holder's turn; it ends when dropped.
pub struct Turn<'a>(&'a Turnstile);

impl Turnstile {
    /// Waits for this task's turn.
    pub async fn enter(&self) -> Turn<'_> {
        let ticket = self.next_ticket.get();
        self.next_ticket.set(ticket + 1);
        poll_fn(|_| {
            if self.serving.get() == ticket {
                Poll::Ready(Turn(self))
            } else {
                Poll::Pending
            }
        })
        .await
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.serving.set(self.0.serving.get() + 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_waits_for_its_slot() {
        let executor = Executor::default();
        let slot = Slot::default();
        let seen = Rc::new(Cell::new(0));
        let (waiting, result) = (slot.clone(), Rc::clone(&seen));
        executor.spawn(async move { result.set(waiting.wait().await) });
        executor.run();
        assert_eq!(seen.get(), 0);
        slot.fill(7);
        executor.run();
        assert_eq!(seen.get(), 7);
    }

    #[test]
    fn the_turnstile_keeps_the_order_of_arrival() {
        let executor = Executor::default();
        let turnstile = Rc::new(Turnstile::default());
        let order = Rc::new(RefCell::new(Vec::new()));
        let first_may_leave = Slot::default();
        for number in 0..3 {
            let (turnstile, order, gate) = (Rc::clone(&turnstile), Rc::clone(&order), first_may_leave.clone());
            executor.spawn(async move {
                let _turn = turnstile.enter().await;
                if number == 0 {
                    gate.wait().await;
                }
                order.borrow_mut().push(number);
            });
        }
        executor.run();
        assert!(order.borrow().is_empty());
        first_may_leave.fill(());
        executor.run();
        assert_eq!(*order.borrow(), [0, 1, 2]);
    }
}
