//! Queues whose drivers need not kick, because their rings are looked at anyway. A kick costs the guest an exit, which may
//! take longer than a request: while there is work a queue is *awake* and its kicks are off. Before the thread sleeps they are
//! asked for again, and the ring is looked at once more.

use super::IoThread;
use ipc::virtio::DeviceIndex;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// The longest look for what a driver does with its answers, nanoseconds.
const LONGEST_LOOK_NS: u64 = 16_000;
/// The first one.
const FIRST_LOOK_NS: u64 = 2000;
/// A kick that comes so soon after a look in vain might have been spared by a longer one: most of the time is the kick's own.
const SOON: Duration = Duration::from_micros(60);
/// When the longest look was in vain as well, so many answers go by before the next one.
const REST: u32 = 256;

/// The queues that are awake, and how long it pays to look at them.
#[derive(Debug, Default)]
pub struct Rings {
    awake: BTreeSet<(DeviceIndex, usize)>,
    look: Look,
}

/// How long to look for a driver's reaction. It adapts.
#[derive(Debug, Default)]
struct Look {
    time_ns: u64,
    /// When the last one was in vain, until it is known what came next.
    in_vain: Option<Instant>,
    /// Looks to be left out.
    rest: u32,
}

impl Look {
    /// How long to look now, if at all.
    fn begin(&mut self) -> Option<Duration> {
        if self.in_vain.take().is_some() {
            // No kick came before the next answer.
            self.time_ns /= 2;
        }
        if self.rest > 0 {
            self.rest -= 1;
            return None;
        }
        Some(Duration::from_nanos(self.time_ns))
    }

    fn failed(&mut self, now: Instant) {
        self.in_vain = Some(now);
    }

    /// A kick came.
    fn kicked(&mut self, now: Instant) {
        let Some(since) = self.in_vain.take() else { return };
        if now.duration_since(since) >= SOON {
            self.time_ns /= 2;
        } else if self.time_ns >= LONGEST_LOOK_NS {
            (self.time_ns, self.rest) = (0, REST);
        } else {
            self.time_ns = (self.time_ns * 2).clamp(FIRST_LOOK_NS, LONGEST_LOOK_NS);
        }
    }
}

impl Rings {
    /// Whether all are asleep.
    pub fn is_empty(&self) -> bool {
        self.awake.is_empty()
    }

    /// A driver has kicked.
    pub fn kicked(&mut self) {
        self.look.kicked(Instant::now());
    }

    /// A queue's kicks are off.
    pub fn woken(&mut self, index: DeviceIndex, queue: usize) {
        self.awake.insert((index, queue));
    }
}

impl IoThread {
    fn may_scan(&self) -> bool {
        !self.paused && !self.graph.is_changing()
    }

    /// Looks at the rings that are awake, and takes what there is. With `wait`, for drivers that look for their answers, it gives
    /// them a moment to react to what they have just got. Returns whether there was anything.
    pub(super) fn look(&mut self, wait: bool) -> bool {
        if self.rings.is_empty() || !self.may_scan() {
            return false;
        }
        let time = if wait { self.rings.look.begin() } else { None };
        let until = time.map(|time| Instant::now() + time);
        loop {
            let has_more = |(index, queue): &&(DeviceIndex, usize)| {
                let device = self.devices.get(index);
                device.is_some_and(|device| device.has_more(*queue))
            };
            let found: Vec<_> = self.rings.awake.iter().filter(has_more).copied().collect();
            if !found.is_empty() {
                found.into_iter().for_each(|(index, queue)| self.scan(index, queue));
                return true;
            }
            let Some(until) = until else { return false };
            let now = Instant::now();
            if now >= until {
                self.rings.look.failed(now);
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// Asks for kicks again, before the thread sleeps. Returns whether something came meanwhile, which is taken: then it must not
    /// sleep.
    pub(super) fn ask_for_kicks(&mut self) -> bool {
        if !self.may_scan() {
            // When it goes on, every ring is looked at.
            return false;
        }
        let mut any = false;
        for (index, queue) in std::mem::take(&mut self.rings.awake) {
            let Some(device) = self.devices.get_mut(&index) else {
                continue;
            };
            match device.ask_for_kicks(queue) {
                Ok(false) => {}
                Ok(true) => {
                    any = true;
                    self.scan(index, queue);
                }
                Err(event) => self.report(Err(event)),
            }
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_look_grows_while_kicks_come_soon_and_rests_when_it_was_long_enough() {
        let mut look = Look::default();
        let mut now = Instant::now();
        let mut times = Vec::new();
        for _ in 0..6 {
            times.push(look.begin().map_or(0, |time| time.as_nanos()));
            look.failed(now);
            now += SOON / 2;
            look.kicked(now);
        }
        assert_eq!(times, [0, 2000, 4000, 8000, 16_000, 0]);
        // It was in vain at the longest: the sixth look was not one.
        let mut look = Look {
            time_ns: LONGEST_LOOK_NS,
            ..Look::default()
        };
        look.failed(now);
        look.kicked(now + SOON / 2);
        assert!((0..REST).all(|_| look.begin().is_none()));
        assert_eq!(look.begin(), Some(Duration::ZERO));
        // Nobody was in a hurry, or there was no kick at all.
        let mut look = Look {
            time_ns: 8000,
            ..Look::default()
        };
        look.failed(now);
        look.kicked(now + SOON);
        assert_eq!(look.begin(), Some(Duration::from_nanos(4000)));
        look.failed(now);
        assert_eq!(look.begin(), Some(Duration::from_nanos(2000)));
    }
}
