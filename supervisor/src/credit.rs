//! How much of something a helper may have the supervisor do: a supply that is used up, and comes back with time.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// See the module. Whoever has used it up is not listened to for [`PAUSE`].
#[derive(Debug)]
pub struct Credit {
    most: u32,
    /// So many come back in each [`PAUSE`].
    back: u32,
    left: Cell<u32>,
    counted: Cell<Instant>,
}

/// How often the supply grows.
const PAUSE: Duration = Duration::from_millis(100);

impl Credit {
    /// A full supply, of which so many come back each second.
    pub fn new(most: u32, per_second: u32) -> Self {
        Self {
            most,
            back: (per_second / 10).max(1),
            left: Cell::new(most),
            counted: Cell::new(Instant::now()),
        }
    }

    /// Takes one; false when none is left.
    pub fn take(&self) -> bool {
        let left = self.left.get();
        self.left.set(left.saturating_sub(1));
        left > 0
    }

    /// Whether there is some, after what has come back until now.
    pub fn is_there(&self, now: Instant) -> bool {
        let pauses = now.saturating_duration_since(self.counted.get()).as_millis() / PAUSE.as_millis();
        if pauses > 0 {
            let back = u32::try_from(pauses).unwrap_or(u32::MAX).saturating_mul(self.back);
            self.left.set(self.left.get().saturating_add(back).min(self.most));
            self.counted.set(now);
        }
        self.left.get() > 0
    }

    /// When there will be some again; nothing when there is.
    pub fn due(&self) -> Option<Instant> {
        (self.left.get() == 0).then(|| self.counted.get() + PAUSE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_up_comes_back_with_time_and_not_beyond_the_supply() {
        let start = Instant::now();
        let credit = Credit::new(50, 100);
        assert_eq!((0..60).filter(|_| credit.take()).count(), 50);
        assert!(!credit.is_there(start));
        let due = credit.due().unwrap();
        assert!(credit.is_there(due));
        assert_eq!((0..60).filter(|_| credit.take()).count(), 10);
        assert!(credit.is_there(due + Duration::from_secs(3600)));
        assert_eq!((0..60).filter(|_| credit.take()).count(), 50);
        assert_eq!(credit.due(), Some(due + Duration::from_secs(3600) + PAUSE));
    }
}
