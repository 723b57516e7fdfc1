//! A small executor for one thread: tasks are the requests in flight, wakers push their number onto a ready list.
//!
//! It never blocks: the data plane's loop runs what is ready and then waits in the engine.

pub mod gate;
pub mod io;
pub mod spawner;
pub mod timer;

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

type Task<T> = Pin<Box<dyn Future<Output = T>>>;

#[derive(Default)]
struct ReadyList(Mutex<Vec<usize>>);

impl ReadyList {
    fn push(&self, task: usize) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(task);
    }

    fn swap(&self, with: &mut Vec<usize>) {
        std::mem::swap(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), with);
    }
}

struct TaskWaker {
    task: usize,
    ready: Arc<ReadyList>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ready.push(self.task);
    }
}

struct Slot<T> {
    task: Option<Task<T>>,
    /// Made once per slot. A late wake-up of an earlier task only polls its successor once too often.
    waker: Waker,
}

/// See the module. `T` is what every task ends with.
pub struct Executor<T> {
    slots: Vec<Slot<T>>,
    free: Vec<usize>,
    ready: Arc<ReadyList>,
    batch: Vec<usize>,
}

impl<T> Default for Executor<T> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            ready: Arc::default(),
            batch: Vec::new(),
        }
    }
}

impl<T> Executor<T> {
    /// Adds a task, ready to run.
    pub fn spawn(&mut self, future: impl Future<Output = T> + 'static) {
        let task: Task<T> = Box::pin(future);
        let index = if let Some(index) = self.free.pop() {
            self.slots[index].task = Some(task);
            index
        } else {
            let index = self.slots.len();
            let waker = Waker::from(Arc::new(TaskWaker {
                task: index,
                ready: self.ready.clone(),
            }));
            self.slots.push(Slot {
                task: Some(task),
                waker,
            });
            index
        };
        self.ready.push(index);
    }

    /// Runs every task that is ready, until none is; appends what ended.
    pub fn run(&mut self, finished: &mut Vec<T>) {
        self.run_until(finished, || false);
    }

    /// The same, or until it is time for something else. Tasks that were not reached are the first of the next run.
    pub fn run_until(&mut self, finished: &mut Vec<T>, is_enough: impl Fn() -> bool) {
        loop {
            if self.batch.is_empty() {
                self.ready.swap(&mut self.batch);
            }
            if self.batch.is_empty() {
                return;
            }
            let mut reached = 0;
            for index in &self.batch {
                if is_enough() {
                    break;
                }
                reached += 1;
                let slot = &mut self.slots[*index];
                let Some(task) = &mut slot.task else { continue };
                if let Poll::Ready(value) = task.as_mut().poll(&mut Context::from_waker(&slot.waker)) {
                    slot.task = None;
                    self.free.push(*index);
                    finished.push(value);
                }
            }
            self.batch.drain(..reached);
            if !self.batch.is_empty() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::future::poll_fn;
    use std::rc::Rc;

    #[test]
    fn tasks_that_were_not_reached_come_first_the_next_time() {
        let mut executor = Executor::default();
        let polled = Rc::new(Cell::new(0));
        for number in 0..5 {
            let polled = polled.clone();
            executor.spawn(async move {
                polled.set(polled.get() + 1);
                number
            });
        }
        let mut finished = Vec::new();
        executor.run_until(&mut finished, || polled.get() == 2);
        assert_eq!(finished, [0, 1]);
        executor.spawn(async { 5 });
        executor.run_until(&mut finished, || polled.get() == 2);
        assert_eq!(finished, [0, 1]);
        executor.run(&mut finished);
        assert_eq!(finished, [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn tasks_run_when_woken_and_slots_are_reused() {
        let mut executor = Executor::default();
        let gate = Rc::new(Cell::new(None::<Waker>));
        let opened = Rc::new(Cell::new(false));
        for number in 0..2 {
            let (gate, opened) = (gate.clone(), opened.clone());
            executor.spawn(async move {
                if number == 0 {
                    poll_fn(|context| {
                        gate.set(Some(context.waker().clone()));
                        if opened.get() { Poll::Ready(()) } else { Poll::Pending }
                    })
                    .await;
                }
                number
            });
        }
        let mut finished = Vec::new();
        executor.run(&mut finished);
        assert_eq!(finished, [1]);
        executor.spawn(async { 2 });
        opened.set(true);
        gate.take().unwrap().wake();
        executor.run(&mut finished);
        finished.sort_unstable();
        assert_eq!(finished, [0, 1, 2]);
        assert_eq!(executor.slots.len(), 2);
    }
}
