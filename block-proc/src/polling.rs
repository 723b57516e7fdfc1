//! How long a thread looks for work before it sleeps. The time adapts: it grows while a little more of it would have been
//! enough, and shrinks when the wait was long in any case.

use ipc::block::Polling;
use std::time::Duration;

/// The first time that is tried, nanoseconds.
const FIRST_NS: u64 = 4000;

/// See the module.
#[derive(Debug, Default)]
pub struct Poller {
    limits: Polling,
    /// How long to look now.
    time_ns: u64,
}

impl Poller {
    /// Sets the limits.
    pub fn configure(&mut self, limits: Polling) {
        self.limits = limits;
        self.time_ns = self.time_ns.min(limits.max_ns);
    }

    /// Whether there is anything to adapt.
    pub fn is_on(&self) -> bool {
        self.limits.max_ns > 0
    }

    /// How long to look.
    pub fn time(&self) -> Duration {
        Duration::from_nanos(self.time_ns)
    }

    /// Learns how long the thread waited, looking and sleeping together.
    pub fn adapt(&mut self, waited: Duration) {
        let waited_ns = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
        let Polling {
            max_ns, grow, shrink, ..
        } = self.limits;
        if waited_ns <= self.time_ns {
            return;
        }
        self.time_ns = if waited_ns > max_ns {
            self.time_ns.checked_div(shrink).unwrap_or(0)
        } else if self.time_ns == 0 {
            FIRST_NS.min(max_ns)
        } else {
            let factor = if grow == 0 { 2 } else { grow };
            self.time_ns.saturating_mul(factor).min(max_ns)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_grows_to_its_limit_and_is_given_up_when_waits_are_long() {
        let mut poller = Poller::default();
        assert!(!poller.is_on());
        poller.configure(Polling {
            max_ns: 30_000,
            grow: 0,
            shrink: 0,
            max_batch: 0,
        });
        let mut times = Vec::new();
        for waited_ns in [20_000, 20_000, 20_000, 20_000, 20_000, 29_000, 40_000] {
            poller.adapt(Duration::from_nanos(waited_ns));
            times.push(poller.time().as_nanos());
        }
        assert_eq!(times, [4000, 8000, 16_000, 30_000, 30_000, 30_000, 0]);
        poller.configure(Polling {
            max_ns: 100_000,
            grow: 5,
            shrink: 2,
            max_batch: 0,
        });
        for (waited_ns, expected) in [(50_000, 4000), (50_000, 20_000), (200_000, 10_000)] {
            poller.adapt(Duration::from_nanos(waited_ns));
            assert_eq!(poller.time(), Duration::from_nanos(expected));
        }
        poller.configure(Polling::default());
        assert_eq!(poller.time(), Duration::ZERO);
    }
}
