//! Sleeping tasks of one thread. The thread's wait ends in time for the first of them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// See the module.
#[derive(Default)]
pub struct Timers {
    next: Cell<u64>,
    /// By deadline, and a number that makes them different.
    sleeping: RefCell<BTreeMap<(Instant, u64), Waker>>,
}

impl Timers {
    /// Ends at the deadline.
    pub fn sleep_until(self: &Rc<Self>, deadline: Instant) -> Sleep {
        let number = self.next.get();
        self.next.set(number + 1);
        Sleep {
            timers: self.clone(),
            key: (deadline, number),
        }
    }

    /// How long nobody has to be woken.
    pub fn idle_for(&self) -> Option<Duration> {
        let sleeping = self.sleeping.borrow();
        let ((deadline, _), _) = sleeping.first_key_value()?;
        Some(deadline.saturating_duration_since(Instant::now()))
    }

    /// Wakes those whose time has come. Returns whether there were any.
    pub fn wake(&self) -> bool {
        let mut sleeping = self.sleeping.borrow_mut();
        if sleeping.is_empty() {
            return false;
        }
        let later = sleeping.split_off(&(Instant::now(), u64::MAX));
        let due = std::mem::replace(&mut *sleeping, later);
        drop(sleeping);
        let any = !due.is_empty();
        due.into_values().for_each(Waker::wake);
        any
    }
}

/// A task's sleep. Dropping it ends it.
pub struct Sleep {
    timers: Rc<Timers>,
    key: (Instant, u64),
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.key.0 {
            return Poll::Ready(());
        }
        let mut sleeping = self.timers.sleeping.borrow_mut();
        sleeping.insert(self.key, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.timers.sleeping.borrow_mut().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Executor;

    #[test]
    fn sleepers_wake_in_the_order_of_their_deadlines() {
        let timers = Rc::new(Timers::default());
        let mut executor = Executor::default();
        let start = Instant::now();
        for milliseconds in [6_u64, 0, 3] {
            let sleep = timers.sleep_until(start + Duration::from_millis(milliseconds));
            executor.spawn(async move {
                sleep.await;
                milliseconds
            });
        }
        let mut woken = Vec::new();
        executor.run(&mut woken);
        assert_eq!(woken, [0]);
        while woken.len() < 3 {
            std::thread::sleep(timers.idle_for().expect("somebody sleeps"));
            assert!(timers.wake());
            executor.run(&mut woken);
        }
        assert_eq!(woken, [0, 3, 6]);
        assert!(start.elapsed() >= Duration::from_millis(6));
        assert_eq!((timers.idle_for(), timers.wake()), (None, false));
    }

    #[test]
    fn a_sleep_that_is_given_up_leaves_nothing() {
        let timers = Rc::new(Timers::default());
        let mut sleep = Box::pin(timers.sleep_until(Instant::now() + Duration::from_secs(60)));
        let mut context = Context::from_waker(Waker::noop());
        assert!(sleep.as_mut().poll(&mut context).is_pending());
        assert!(timers.idle_for().is_some());
        drop(sleep);
        assert!(timers.idle_for().is_none());
    }
}
