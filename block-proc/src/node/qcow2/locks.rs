//! Locks on ranges of numbers (guest bytes, L1 entries), granted in the order in which they were asked for.
//!
//! Tasks of one thread share them, so a lock is a place in a list. Requests in flight are bounded by the virtqueues, and
//! so is the list.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::ops::Range;
use std::task::{Poll, Waker};

struct Place {
    number: u64,
    range: Range<u64>,
    exclusive: bool,
    waker: Option<Waker>,
}

impl Place {
    fn overlaps(&self, range: &Range<u64>) -> bool {
        self.range.start < range.end && range.start < self.range.end
    }

    /// Whether who comes later has to wait for this one.
    fn blocks(&self, range: &Range<u64>, exclusive: bool) -> bool {
        (exclusive || self.exclusive) && self.overlaps(range)
    }
}

/// See the module.
#[derive(Default)]
pub struct RangeLocks {
    next: Cell<u64>,
    places: RefCell<Vec<Place>>,
}

/// A lock that is held, or waited for, until this is dropped.
pub struct Guard<'a> {
    locks: &'a RangeLocks,
    number: u64,
}

impl RangeLocks {
    /// Whether nobody has one, or waits for one.
    pub fn is_idle(&self) -> bool {
        self.places.borrow().is_empty()
    }

    /// Whether a shared lock would be given at once.
    pub fn may_share(&self, range: &Range<u64>) -> bool {
        !self.places.borrow().iter().any(|place| place.blocks(range, false))
    }

    /// Waits until no one with an earlier place has an overlapping range, unless both only share it.
    pub async fn lock(&self, range: Range<u64>, exclusive: bool) -> Guard<'_> {
        let number = self.next.get();
        self.next.set(number + 1);
        self.places.borrow_mut().push(Place {
            number,
            range: range.clone(),
            exclusive,
            waker: None,
        });
        let guard = Guard { locks: self, number };
        poll_fn(|context| {
            let mut places = self.places.borrow_mut();
            // Places leave the list from anywhere, and join it at its end only.
            let at = places.partition_point(|place| place.number < number);
            if places[..at].iter().any(|place| place.blocks(&range, exclusive)) {
                places[at].waker = Some(context.waker().clone());
                Poll::Pending
            } else {
                places[at].waker = None;
                Poll::Ready(())
            }
        })
        .await;
        guard
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        let mut places = self.locks.places.borrow_mut();
        let at = places.partition_point(|place| place.number < self.number);
        let left = places.remove(at);
        for place in places.iter_mut().skip(at) {
            if place.overlaps(&left.range) {
                place.waker.take().into_iter().for_each(Waker::wake);
            }
        }
    }
}

/// One lock for one thing.
#[derive(Default)]
pub struct Mutex(RangeLocks);

impl Mutex {
    /// Waits for it.
    pub async fn lock(&self) -> Guard<'_> {
        self.0.lock(0..1, true).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Executor;
    use std::rc::Rc;

    #[test]
    fn overlapping_ranges_wait_in_order_and_shared_ones_do_not() {
        let locks = Rc::new(RangeLocks::default());
        let order = Rc::new(RefCell::new(Vec::new()));
        let turns = Rc::new(Cell::new(0));
        let mut executor = Executor::default();
        for (name, range, exclusive, turns_held) in [
            ("shared a", 0..10, false, 2),
            ("shared b", 5..15, false, 1),
            ("exclusive c", 8..9, true, 1),
            ("shared behind c", 0..10, false, 1),
            ("elsewhere", 20..30, true, 0),
        ] {
            let (locks, order, turns) = (locks.clone(), order.clone(), turns.clone());
            executor.spawn(async move {
                let _guard = locks.lock(range, exclusive).await;
                order.borrow_mut().push(name);
                let until = turns.get() + turns_held;
                poll_fn(|context| {
                    turns.set(turns.get() + 1);
                    if turns.get() > until {
                        return Poll::Ready(());
                    }
                    context.waker().wake_by_ref();
                    Poll::Pending
                })
                .await;
            });
        }
        executor.run(&mut Vec::new());
        assert_eq!(
            *order.borrow(),
            ["shared a", "shared b", "elsewhere", "exclusive c", "shared behind c"]
        );
        assert!(locks.places.borrow().is_empty());
    }
}
