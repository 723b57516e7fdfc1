//! Counts of times, in buckets that grow with the time: eight for each power of two.

use crate::{clock, println};

const SUB_BITS: u32 = 3;
const SUB: usize = 1 << SUB_BITS;
const BUCKETS: usize = 48 * SUB;

/// A histogram of counts of the time stamp counter.
#[derive(Clone)]
pub struct Histogram {
    buckets: [u32; BUCKETS],
    largest: u64,
    total: u64,
}

impl Histogram {
    /// An empty one.
    pub const fn new() -> Self {
        Self {
            buckets: [0; BUCKETS],
            largest: 0,
            total: 0,
        }
    }

    /// Counts one time.
    pub fn add(&mut self, time: u64) {
        self.buckets[bucket(time).min(BUCKETS - 1)] += 1;
        self.largest = self.largest.max(time);
        self.total += 1;
    }

    /// Takes over what another one counted.
    pub fn merge(&mut self, other: &Self) {
        for (own, more) in self.buckets.iter_mut().zip(&other.buckets) {
            *own += more;
        }
        self.largest = self.largest.max(other.largest);
        self.total += other.total;
    }

    /// The time that so many of a million do not exceed, in nanoseconds; upper end of the bucket.
    fn quantile_ns(&self, per_million: u64) -> u64 {
        let wanted = (self.total * per_million).div_ceil(1_000_000);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += u64::from(*count);
            if seen >= wanted {
                return clock::nanoseconds(lower_end(index + 1).min(self.largest));
            }
        }
        clock::nanoseconds(self.largest)
    }

    /// Prints quantiles, and the counts by power of two: `bench-histogram from_ns=… to_ns=… count=…`.
    pub fn print(&self) {
        println!(
            "bench-latency p50_ns={} p90_ns={} p99_ns={} p999_ns={} max_ns={}",
            self.quantile_ns(500_000),
            self.quantile_ns(900_000),
            self.quantile_ns(990_000),
            self.quantile_ns(999_000),
            clock::nanoseconds(self.largest)
        );
        for (index, octave) in self.buckets.chunks(SUB).enumerate() {
            let count: u32 = octave.iter().sum();
            if count > 0 {
                println!(
                    "bench-histogram from_ns={} to_ns={} count={count}",
                    clock::nanoseconds(lower_end(index * SUB)),
                    clock::nanoseconds(lower_end((index + 1) * SUB)),
                );
            }
        }
    }
}

fn bucket(time: u64) -> usize {
    let Some(power) = time.checked_ilog2().filter(|power| *power >= SUB_BITS) else {
        return time as usize;
    };
    let sub = (time >> (power - SUB_BITS)) as usize & (SUB - 1);
    (power - SUB_BITS + 1) as usize * SUB + sub
}

fn lower_end(bucket: usize) -> u64 {
    let (octave, sub) = (bucket / SUB, (bucket % SUB) as u64);
    match octave {
        0 => sub,
        _ => (SUB as u64 + sub) << (octave - 1),
    }
}
