//! A queue between the threads of a helper, with the sleeping calls (futex) that every policy has. Those of the standard library
//! spin with `sched_yield` now and then, where both ends meet in the same moment: no policy allows that, and a helper died of it.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Makes a queue. It holds as much as is put into it.
pub fn queue<T>() -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            items: VecDeque::new(),
            senders: 1,
        }),
        changed: Condvar::new(),
    });
    (Sender(Arc::clone(&shared)), Receiver(shared))
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    items: VecDeque<T>,
    senders: usize,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // A thread that panics takes the process with it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where items go in.
pub struct Sender<T>(Arc<Shared<T>>);

impl<T> Sender<T> {
    /// Appends an item. Nobody may be there to take it.
    pub fn send(&self, item: T) {
        self.0.lock().items.push_back(item);
        self.0.changed.notify_one();
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.lock().senders += 1;
        Self(Arc::clone(&self.0))
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.lock().senders -= 1;
        self.0.changed.notify_one();
    }
}

/// Where items come out.
pub struct Receiver<T>(Arc<Shared<T>>);

impl<T> Receiver<T> {
    /// Waits for the oldest item; `None` when there is none and all senders are gone.
    pub fn recv(&self) -> Option<T> {
        let mut state = self.0.lock();
        loop {
            if let Some(item) = state.items.pop_front() {
                return Some(item);
            }
            if state.senders == 0 {
                return None;
            }
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_come_out_in_order_until_all_senders_are_gone() {
        let (sender, receiver) = queue();
        let other = sender.clone();
        let thread = std::thread::spawn(move || {
            for number in 0..10_000 {
                sender.send(number);
            }
        });
        let all: Vec<i32> = std::iter::from_fn(|| receiver.recv()).take(10_000).collect();
        assert!(all.into_iter().eq(0..10_000));
        thread.join().unwrap();
        other.send(7);
        drop(other);
        assert_eq!((receiver.recv(), receiver.recv()), (Some(7), None));
    }
}
