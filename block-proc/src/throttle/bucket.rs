//! The leaky buckets of a throttle group, with QEMU's meaning of its limits.
//!
//! Every request pours its units (bytes, or requests) into the buckets that it concerns; they leak at the sustained rate.
//! A request may begin as long as no bucket of its kind is too full, and is poured in then, so that a large one makes the
//! next wait. How full a bucket may be:
//!
//! - without `max`, a tenth of a second's worth of the sustained rate;
//! - with `max`, what a burst at that rate for `length` seconds is worth. If a burst is longer than a second, a second level
//!   leaks at the burst's rate and may hold a tenth of a second's worth, so that a burst has that rate and no higher.

use ipc::graph::{Limit, ThrottleLimits};

/// Which way a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    limit: Limit,
    level: f64,
    burst_level: f64,
}

/// How long until `extra` units have leaked, seconds.
fn time_to_leak(extra: f64, rate: u64) -> f64 {
    (extra / rate as f64).max(0.0)
}

impl Bucket {
    fn has_long_bursts(&self) -> bool {
        self.limit.length > 1
    }

    fn leak(&mut self, seconds: f64) {
        self.level = (self.level - self.limit.average as f64 * seconds).max(0.0);
        if self.has_long_bursts() {
            self.burst_level = (self.burst_level - self.limit.max as f64 * seconds).max(0.0);
        }
    }

    fn wait(&self) -> f64 {
        let Limit { average, max, length } = self.limit;
        if average == 0 {
            return 0.0;
        }
        let (size, burst_size) = match max {
            0 => (average as f64 / 10.0, 0.0),
            max => (max as f64 * length.max(1) as f64, max as f64 / 10.0),
        };
        if self.level > size {
            return time_to_leak(self.level - size, average);
        }
        if self.has_long_bursts() && self.burst_level > burst_size {
            return time_to_leak(self.burst_level - burst_size, max);
        }
        0.0
    }

    fn pour(&mut self, units: f64) {
        self.level += units;
        if self.has_long_bursts() {
            self.burst_level += units;
        }
    }

    /// What it has been filled with stays.
    fn set(&mut self, limit: Limit) {
        self.limit = limit;
        if !self.has_long_bursts() {
            self.burst_level = 0.0;
        }
    }
}

/// The buckets of a group. Times are nanoseconds of any clock that does not go back.
#[derive(Debug, Default)]
pub struct Buckets {
    bytes: [Bucket; 3],
    requests: [Bucket; 3],
    request_bytes: u64,
    now_ns: u64,
}

/// The bucket that both directions pour into; then that of reads and that of writes.
const TOTAL: usize = 0;

impl Direction {
    fn own(self) -> usize {
        match self {
            Self::Read => 1,
            Self::Write => 2,
        }
    }
}

impl Buckets {
    /// Other limits. What has been used up so far counts on.
    pub fn set(&mut self, limits: &ThrottleLimits) {
        let bytes = [limits.bps_total, limits.bps_read, limits.bps_write];
        let requests = [limits.iops_total, limits.iops_read, limits.iops_write];
        for (bucket, limit) in self.bytes.iter_mut().zip(bytes) {
            bucket.set(limit);
        }
        for (bucket, limit) in self.requests.iter_mut().zip(requests) {
            bucket.set(limit);
        }
        self.request_bytes = limits.iops_size;
    }

    /// Whether a request may begin now: it is counted if so. Otherwise, how long it has to wait at least, nanoseconds.
    ///
    /// # Errors
    /// The time to wait.
    pub fn take(&mut self, now_ns: u64, direction: Direction, bytes: u64) -> Result<(), u64> {
        let seconds = now_ns.saturating_sub(self.now_ns) as f64 / 1e9;
        self.now_ns = self.now_ns.max(now_ns);
        let all = self.bytes.iter_mut().chain(&mut self.requests);
        all.for_each(|bucket| bucket.leak(seconds));
        let kinds = [TOTAL, direction.own()];
        let wait = kinds
            .iter()
            .flat_map(|kind| [self.bytes[*kind].wait(), self.requests[*kind].wait()])
            .fold(0.0, f64::max);
        if wait > 0.0 {
            // At least one, so that nobody waits for nothing.
            return Err((wait * 1e9).ceil().max(1.0) as u64);
        }
        let requests = match self.request_bytes {
            size @ 1.. if bytes > size => bytes as f64 / size as f64,
            _ => 1.0,
        };
        for kind in kinds {
            self.bytes[kind].pour(bytes as f64);
            self.requests[kind].pour(requests);
        }
        Ok(())
    }

    /// Whether there is any limit at all.
    pub fn is_limited(&self) -> bool {
        self.bytes
            .iter()
            .chain(&self.requests)
            .any(|bucket| bucket.limit.average > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    fn limit(average: u64) -> Limit {
        Limit {
            average,
            max: 0,
            length: 1,
        }
    }

    /// Requests of one kind, one after the other, as fast as they may; how many begin before the end.
    fn count(buckets: &mut Buckets, from_ns: u64, to_ns: u64, direction: Direction, bytes: u64) -> u64 {
        let (mut now, mut begun) = (from_ns, 0);
        while now < to_ns {
            match buckets.take(now, direction, bytes) {
                Ok(()) => begun += 1,
                Err(wait) => now += wait,
            }
        }
        begun
    }

    fn buckets(limits: ThrottleLimits) -> Buckets {
        let mut buckets = Buckets::default();
        buckets.set(&limits);
        buckets
    }

    #[test]
    fn a_rate_of_requests_is_kept_after_a_tenth_of_a_second() {
        let mut buckets = buckets(ThrottleLimits {
            iops_total: limit(1000),
            ..Default::default()
        });
        assert_eq!(count(&mut buckets, 0, 1, Direction::Read, 4096), 101);
        let begun = count(&mut buckets, 1, 10 * SECOND, Direction::Write, 4096);
        assert!((9990..=10_010).contains(&begun), "{begun}");
    }

    #[test]
    fn both_directions_share_the_total_and_have_their_own() {
        let mut shared = buckets(ThrottleLimits {
            bps_total: limit(1 << 20),
            ..Default::default()
        });
        let (mut now, mut bytes) = (0, 0_u64);
        while now < 10 * SECOND {
            for direction in [Direction::Read, Direction::Write] {
                match shared.take(now, direction, 65536) {
                    Ok(()) => bytes += 65536,
                    Err(wait) => now += wait,
                }
            }
        }
        let expected = (10 << 20) + (1 << 20) / 10;
        // The last one may begin when there is hardly room.
        assert!(bytes.abs_diff(expected) <= 2 * 65536, "{bytes}");

        let mut own = buckets(ThrottleLimits {
            iops_read: limit(10),
            ..Default::default()
        });
        assert!(count(&mut own, 0, SECOND, Direction::Read, 1) <= 12);
        assert!((0..100_000).all(|_| own.take(SECOND, Direction::Write, 1).is_ok()));
    }

    #[test]
    fn large_requests_count_as_several() {
        let mut buckets = buckets(ThrottleLimits {
            iops_total: limit(100),
            iops_size: 4096,
            ..Default::default()
        });
        let begun = count(&mut buckets, 0, 10 * SECOND, Direction::Read, 40_960);
        assert!((100..=103).contains(&begun), "{begun}");
        assert_eq!(buckets.request_bytes, 4096);
    }

    #[test]
    fn a_burst_has_its_rate_for_its_length() {
        let mut buckets = buckets(ThrottleLimits {
            iops_total: Limit {
                average: 100,
                max: 1000,
                length: 5,
            },
            ..Default::default()
        });
        let first = count(&mut buckets, 0, SECOND, Direction::Read, 1);
        assert!((1000..=1110).contains(&first), "{first}");
        // 5,000 in all above the sustained rate, at 1,000 a second: over after 5.5 seconds.
        let burst = first + count(&mut buckets, SECOND, 5 * SECOND, Direction::Read, 1);
        assert!((5000..=5110).contains(&burst), "{burst}");
        // What was not used meanwhile counts: 500 of the pause, and what was left of the burst.
        let later = count(&mut buckets, 10 * SECOND, 20 * SECOND, Direction::Read, 1);
        assert!((1500..=2000).contains(&later), "{later}");
        let last = count(&mut buckets, 20 * SECOND, 30 * SECOND, Direction::Read, 1);
        assert!((999..=1001).contains(&last), "{last}");
    }

    #[test]
    fn a_short_burst_comes_at_once() {
        let mut buckets = buckets(ThrottleLimits {
            iops_total: Limit {
                average: 10,
                max: 500,
                length: 1,
            },
            ..Default::default()
        });
        assert_eq!(count(&mut buckets, 0, 1, Direction::Read, 1), 501);
    }

    #[test]
    fn without_limits_nothing_waits_and_lifted_limits_are_gone() {
        let mut buckets = buckets(ThrottleLimits {
            iops_total: limit(1),
            ..Default::default()
        });
        assert!(buckets.is_limited());
        assert!(buckets.take(0, Direction::Read, 1).is_ok());
        assert!(buckets.take(0, Direction::Read, 1).is_err());
        buckets.set(&ThrottleLimits::default());
        assert!(!buckets.is_limited());
        assert!((0..1000).all(|_| buckets.take(0, Direction::Read, u64::MAX >> 20).is_ok()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever the limits and the requests: after the burst, a rate is kept and reached within a percent.
        #[test]
        fn rates_hold_in_the_long_run(
            bps in 100_000_u64..1 << 30,
            iops in 10_u64..50_000,
            limited in 1_u8..4,
            bytes in 4096_u64..65536,
            max_factor in 0_u64..4,
        ) {
            let with_burst = |average: u64, bit: u8| match limited & bit {
                0 => Limit::default(),
                _ => Limit { average, max: average * max_factor, length: 1 },
            };
            let limits = ThrottleLimits {
                bps_total: with_burst(bps, 1),
                iops_total: with_burst(iops, 2),
                ..Default::default()
            };
            let of = |bit: u8, rate: f64| if limited & bit == 0 { f64::MAX } else { rate };
            let rate = of(1, bps as f64 / bytes as f64).min(of(2, iops as f64));
            let mut buckets = buckets(limits);
            // A limit that is not the narrowest may have a burst left; it is of no use.
            let mut now = 0;
            for _ in 0..2 {
                while buckets.take(now, Direction::Write, bytes).is_ok() {}
                now += (rate.recip() * 1e9) as u64;
            }
            let span = (4000.0 / rate * 1e9) as u64;
            let begun = count(&mut buckets, now, now + span, Direction::Write, bytes) as f64;
            prop_assert!((begun - 4000.0).abs() <= 42.0, "{begun}");
        }
    }
}
