//! Time, from the time stamp counter.

use crate::cpu::{self, in8, out8, tsc};
use core::sync::atomic::{AtomicU64, Ordering};

/// Counts a second; 0 until measured.
static HERTZ: AtomicU64 = AtomicU64::new(0);

/// Used when there is no timer to measure by.
const FALLBACK_HERTZ: u64 = 2_500_000_000;
const PIT_HERTZ: u64 = 1_193_182;
/// What the PIT counts for one measurement: about 20 ms.
const PIT_COUNTS: u16 = 23_864;

/// Counts of the time stamp counter a second.
pub fn hertz() -> u64 {
    let known = HERTZ.load(Ordering::Relaxed);
    if known != 0 {
        return known;
    }
    let measured = measure_by_pit().or_else(measure_by_rtc).unwrap_or(FALLBACK_HERTZ);
    HERTZ.store(measured, Ordering::Relaxed);
    measured
}

/// Measures again, several times, for tests whose result is a time. A processor that is taken away in a measurement
/// makes the result too large, so the smallest counts.
pub fn calibrate() {
    let best = (0..5).filter_map(|_| measure_by_pit()).min();
    if let Some(best) = best.map(|best| best.min(hertz())) {
        HERTZ.store(best, Ordering::Relaxed);
    }
}

/// By channel 2 of the interval timer, whose output can be read at port 0x61.
fn measure_by_pit() -> Option<u64> {
    let gate = in8(0x61) & !2 & 0x0f;
    out8(0x61, gate | 1);
    out8(0x43, 0xb0);
    out8(0x42, PIT_COUNTS as u8);
    out8(0x42, (PIT_COUNTS >> 8) as u8);
    let start = tsc();
    if in8(0x61) & 0x20 != 0 {
        return None;
    }
    while in8(0x61) & 0x20 == 0 {
        if tsc() - start > 2 * FALLBACK_HERTZ {
            return None;
        }
    }
    let counts = tsc() - start;
    Some(counts * PIT_HERTZ / u64::from(PIT_COUNTS))
}

/// By one second of the clock, where there is no interval timer.
fn measure_by_rtc() -> Option<u64> {
    let second = || {
        out8(0x70, 0);
        in8(0x71)
    };
    let next = |from: u8| {
        let begin = tsc();
        while second() == from {
            if tsc() - begin > 8 * FALLBACK_HERTZ {
                return None;
            }
        }
        Some(tsc())
    };
    let first = next(second())?;
    let last = next(second())?;
    Some(last - first)
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
    let end = cpu::tsc() + hertz() / 1_000_000 * us;
    while tsc() < end {
        core::hint::spin_loop();
    }
}
