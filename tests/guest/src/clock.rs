//! Time, from the time stamp counter, whose speed is measured by the local interrupt controller's timer.

use crate::cpu::tsc;
use crate::lapic;
use core::sync::atomic::{AtomicU64, Ordering};

/// Counts of the time stamp counter a second; 0 until measured.
static HERTZ: AtomicU64 = AtomicU64::new(0);

/// How fast the timer counts, without division, under KVM and in QEMU's emulation. Not every monitor has another one.
const TIMER_HERTZ: u64 = 1_000_000_000;
/// Length of a quick measurement, timer counts: 2 ms, good enough for timeouts.
const QUICK: u64 = TIMER_HERTZ / 500;
/// Length of a good one: 50 ms.
const GOOD: u64 = TIMER_HERTZ / 20;

/// Counts of the time stamp counter a second.
pub fn hertz() -> u64 {
    match HERTZ.load(Ordering::Relaxed) {
        0 => measure(QUICK),
        known => known,
    }
}

/// Measures again, longer, for tests whose result is a time.
pub fn calibrate() {
    measure(GOOD);
}

fn measure(length: u64) -> u64 {
    lapic::count_down();
    let (start, from) = sample();
    while from - lapic::count() < length {
        core::hint::spin_loop();
    }
    let (end, to) = sample();
    lapic::tick(false);
    let hertz = (u128::from(end - start) * u128::from(TIMER_HERTZ) / u128::from(from - to)) as u64;
    HERTZ.store(hertz, Ordering::Relaxed);
    hertz
}

/// Both counters at the same time: of several readings the one that took least.
fn sample() -> (u64, u64) {
    let readings = core::array::from_fn::<_, 8, _>(|_| {
        let before = tsc();
        let count = lapic::count();
        (tsc() - before, before, count)
    });
    let (took, before, count) = readings.into_iter().min().unwrap_or_default();
    (before + took / 2, count)
}

/// Nanoseconds of a number of counts.
pub fn nanoseconds(counts: u64) -> u64 {
    (u128::from(counts) * 1_000_000_000 / u128::from(hertz())) as u64
}

/// A time in the future.
pub struct Deadline(u64);

impl Deadline {
    /// So many milliseconds from now.
    pub fn after_ms(ms: u64) -> Self {
        Self(tsc() + hertz() / 1000 * ms)
    }

    /// Whether it is past.
    pub fn passed(&self) -> bool {
        tsc() >= self.0
    }
}

/// Waits actively.
pub fn pause_us(us: u64) {
    let end = tsc() + hertz() / 1_000_000 * us;
    while tsc() < end {
        core::hint::spin_loop();
    }
}
