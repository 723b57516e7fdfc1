//! Sequences that wait for a moment: the event loop wakes up in time for them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::task::Poll;
use std::time::{Duration, Instant};

/// See the module.
#[derive(Default)]
pub struct Alarms(RefCell<BTreeMap<(Instant, u64), ()>>);

/// One that is set; gone when it is dropped.
struct Alarm<'a>(&'a Alarms, (Instant, u64));

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        self.0.0.borrow_mut().remove(&self.1);
    }
}

impl Alarms {
    /// Waits.
    pub async fn sleep(&self, time: Duration) {
        let due = Instant::now() + time;
        let alarm = {
            let mut alarms = self.0.borrow_mut();
            let last = alarms.range(..=(due, u64::MAX)).next_back();
            let number = last.map_or(0, |((_, number), ())| number + 1);
            alarms.insert((due, number), ());
            Alarm(self, (due, number))
        };
        poll_fn(|_| {
            if Instant::now() >= due {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
        drop(alarm);
    }

    /// When the next of them is due.
    pub fn due(&self) -> Option<Instant> {
        self.0.borrow().first_key_value().map(|((due, _), ())| *due)
    }
}
