//! What is counted of a device's requests.

use ipc::Failure;
use ipc::block::{DeviceStats, IoKind, IoStats, LatencyHistogram};
use std::time::{Duration, Instant};

/// Most boundaries of a histogram.
const MAX_BOUNDARIES: usize = 1024;

/// How a request ended, for the counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Well.
    Done,
    /// With an error.
    Failed,
    /// It was refused before anything was done.
    Invalid,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Accounts {
    stats: DeviceStats,
    last_end: Option<Instant>,
}

impl Accounts {
    /// The counters by now.
    pub fn stats(&self, now: Instant) -> DeviceStats {
        let idle = self.last_end.map(|end| now.saturating_duration_since(end));
        DeviceStats {
            idle_ns: idle.map(nanoseconds),
            ..self.stats.clone()
        }
    }

    /// A request has ended that began at `since`.
    pub fn count(&mut self, kind: IoKind, bytes: u64, ending: Ending, since: Instant, now: Instant) {
        let stats = self.of(kind);
        match ending {
            Ending::Invalid => {
                stats.invalid += 1;
                return;
            }
            Ending::Failed => stats.failed += 1,
            Ending::Done => {
                stats.operations += 1;
                stats.bytes += bytes;
            }
        }
        let took = nanoseconds(now.saturating_duration_since(since));
        stats.total_ns = stats.total_ns.saturating_add(took);
        if let Some(LatencyHistogram { boundaries_ns, bins }) = &mut stats.histogram {
            let bin = boundaries_ns.partition_point(|boundary| *boundary <= took);
            bins[bin] += 1;
        }
        self.last_end = Some(now);
    }

    /// Begins a histogram anew; without boundaries there is none.
    ///
    /// # Errors
    /// When the boundaries do not rise, or are too many.
    pub fn set_histogram(&mut self, kind: IoKind, boundaries_ns: Vec<u64>) -> Result<(), Failure> {
        let rising = boundaries_ns.windows(2).all(|pair| pair[0] < pair[1]);
        if !rising || boundaries_ns.first() == Some(&0) {
            return Err(Failure::new("the boundaries of a histogram must rise, from above 0"));
        }
        if boundaries_ns.len() > MAX_BOUNDARIES {
            return Err(Failure::new(format!(
                "a histogram has at most {MAX_BOUNDARIES} boundaries"
            )));
        }
        self.of(kind).histogram = (!boundaries_ns.is_empty()).then(|| LatencyHistogram {
            bins: vec![0; boundaries_ns.len() + 1],
            boundaries_ns,
        });
        Ok(())
    }

    fn of(&mut self, kind: IoKind) -> &mut IoStats {
        match kind {
            IoKind::Read => &mut self.stats.read,
            IoKind::Write => &mut self.stats.write,
            IoKind::Flush => &mut self.stats.flush,
            IoKind::Unmap => &mut self.stats.unmap,
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_are_open_at_their_upper_end_and_what_was_refused_takes_no_time() {
        let mut accounts = Accounts::default();
        assert!(accounts.set_histogram(IoKind::Read, vec![10, 10]).is_err());
        assert!(accounts.set_histogram(IoKind::Read, vec![0, 10]).is_err());
        accounts.set_histogram(IoKind::Read, vec![10, 50]).unwrap();
        let start = Instant::now();
        for nanos in [0, 9, 10, 49, 50, 1000] {
            let end = start + Duration::from_nanos(nanos);
            accounts.count(IoKind::Read, 512, Ending::Done, start, end);
        }
        accounts.count(IoKind::Read, 512, Ending::Invalid, start, start);
        let end = start + Duration::from_nanos(20);
        accounts.count(IoKind::Read, 512, Ending::Failed, start, end);
        let stats = accounts.stats(end + Duration::from_nanos(5));
        assert_eq!(stats.idle_ns, Some(5));
        let read = stats.read;
        assert_eq!(
            (read.operations, read.bytes, read.failed, read.invalid),
            (6, 3072, 1, 1)
        );
        assert_eq!(read.total_ns, 1138);
        assert_eq!(read.histogram.unwrap().bins, [2, 3, 2]);
        accounts.set_histogram(IoKind::Read, Vec::new()).unwrap();
        assert_eq!(accounts.stats(end).read.histogram, None);
    }
}
