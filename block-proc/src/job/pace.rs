//! How fast a job may copy.

use std::time::{Duration, Instant};

/// A job's speed: every copy puts off the next one.
#[derive(Debug)]
pub struct Pace {
    /// Bytes a second; 0: as fast as it goes.
    speed: u64,
    /// When the next copy may begin.
    next: Instant,
}

/// How long the copies should last at least, so that a limit is kept evenly.
const SLICES_PER_SECOND: u64 = 10;

impl Pace {
    /// From now on.
    pub fn new(speed: u64, now: Instant) -> Self {
        Self { speed, next: now }
    }

    /// Changes it. What is to be waited for becomes shorter or longer in proportion.
    pub fn set(&mut self, speed: u64, now: Instant) {
        let wait = self.next.saturating_duration_since(now);
        self.next = now
            + match speed {
                0 => Duration::ZERO,
                _ => wait.mul_f64(self.speed as f64 / speed as f64),
            };
        self.speed = speed;
    }

    /// When a copy may begin, if that is not yet.
    pub fn wait_until(&self, now: Instant) -> Option<Instant> {
        (self.speed > 0 && self.next > now).then_some(self.next)
    }

    /// Largest copy, bytes, where smaller ones are of `smallest`.
    pub fn slice(&self, largest: u64, smallest: u64) -> u64 {
        if self.speed == 0 {
            return largest;
        }
        let slice = self.speed / SLICES_PER_SECOND;
        (slice - slice % smallest).clamp(smallest.min(largest), largest)
    }

    /// A copy begins.
    pub fn charge(&mut self, bytes: u64, now: Instant) {
        if self.speed > 0 {
            let takes = Duration::from_secs_f64(bytes as f64 / self.speed as f64);
            // Far away is as good as never.
            self.next = self.next.max(now).checked_add(takes).unwrap_or(self.next);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_spread_and_a_new_speed_counts_at_once() {
        let now = Instant::now();
        let mut pace = Pace::new(64 << 10, now);
        assert_eq!(pace.slice(1 << 20, 4096), 4096);
        assert_eq!(pace.slice(1 << 20, 64 << 10), 64 << 10);
        assert_eq!(pace.wait_until(now), None);
        pace.charge(128 << 10, now);
        assert_eq!(pace.wait_until(now), Some(now + Duration::from_secs(2)));
        pace.set(128 << 10, now + Duration::from_secs(1));
        let sooner = now + Duration::from_millis(1500);
        assert_eq!(pace.wait_until(now), Some(sooner));
        assert_eq!(pace.wait_until(sooner), None);
        pace.set(0, now);
        assert_eq!(pace.wait_until(now), None);
        assert_eq!(pace.slice(1 << 20, 4096), 1 << 20);
    }
}
