//! Which parts of a disk are dirty: one bit for so many bytes.
//!
//! A second level has one bit for each word of the first, so that looking for the next dirty part of a large, clean disk is
//! quick. Ranges are bytes; they are widened to whole bits where bits are set, and narrowed where they are cleared.

use sha2::{Digest, Sha256};
use std::ops::Range;

const WORD_BITS: u64 = u64::BITS as u64;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    bytes: u64,
    shift: u32,
    words: Vec<u64>,
    /// A bit for each word that is not 0.
    summary: Vec<u64>,
    set: u64,
}

impl Bitmap {
    /// Of a disk of `bytes`, with nothing dirty.
    ///
    /// # Panics
    /// When the granularity (bytes) is no power of two.
    pub fn new(bytes: u64, granularity: u64) -> Self {
        assert!(granularity.is_power_of_two(), "a granularity of {granularity} bytes");
        let mut bitmap = Self {
            bytes: 0,
            shift: granularity.trailing_zeros(),
            words: Vec::new(),
            summary: Vec::new(),
            set: 0,
        };
        bitmap.resize(bytes);
        bitmap
    }

    /// Size of the disk, bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes for each bit.
    pub fn granularity(&self) -> u64 {
        1 << self.shift
    }

    /// How many bytes are dirty. The last bit counts only as far as the disk goes.
    pub fn dirty_bytes(&self) -> u64 {
        let whole = self.set << self.shift;
        let over = (self.bits() << self.shift) - self.bytes;
        if over > 0 && self.is_bit_set(self.bits() - 1) {
            whole - over
        } else {
            whole
        }
    }

    /// Whether nothing is dirty.
    pub fn is_clean(&self) -> bool {
        self.set == 0
    }

    /// Whether the bit of a byte is set.
    pub fn is_dirty(&self, offset: u64) -> bool {
        offset < self.bytes && self.is_bit_set(offset >> self.shift)
    }

    /// Sets every bit that a range touches.
    pub fn set(&mut self, range: Range<u64>) {
        let end = range.end.min(self.bytes);
        if range.start < end {
            self.change(range.start >> self.shift..((end - 1) >> self.shift) + 1, true);
        }
    }

    /// Clears every bit that a range covers as a whole.
    pub fn clear(&mut self, range: Range<u64>) {
        let first = range.start.div_ceil(self.granularity());
        let last = if range.end >= self.bytes {
            self.bits()
        } else {
            range.end >> self.shift
        };
        if first < last {
            self.change(first..last, false);
        }
    }

    /// The first dirty run that ends after `from`, as far as it goes, but at most `longest` bytes (at least one bit).
    pub fn next(&self, from: u64, longest: u64) -> Option<Range<u64>> {
        if from >= self.bytes {
            return None;
        }
        let first = self.next_bit(from >> self.shift)?;
        let most = (longest >> self.shift).max(1);
        let mut last = first + 1;
        while last < self.bits() && last - first < most && self.is_bit_set(last) {
            last += 1;
        }
        let start = (first << self.shift).max(from);
        Some(start..(last << self.shift).min(self.bytes))
    }

    /// The first byte at or after `from` whose bit is clear; the disk's end where there is none.
    pub fn next_clean(&self, from: u64) -> u64 {
        let mut bit = from >> self.shift;
        while bit < self.bits() && self.is_bit_set(bit) {
            let word = (bit / WORD_BITS) as usize;
            // A word of ones has no bits beyond the last.
            bit = if bit.is_multiple_of(WORD_BITS) && self.words[word] == u64::MAX {
                bit + WORD_BITS
            } else {
                bit + 1
            };
        }
        (bit << self.shift).clamp(from, self.bytes.max(from))
    }

    /// As [`Self::next_clean`], but looks no further than `end`.
    pub fn next_clean_before(&self, from: u64, end: u64) -> u64 {
        let mut bit = from >> self.shift;
        let last = end.min(self.bytes).div_ceil(self.granularity());
        while bit < last && self.is_bit_set(bit) {
            bit += 1;
        }
        (bit << self.shift).clamp(from, end.max(from))
    }

    /// SHA-256 of the bits as QEMU has them in memory: words of 64, at least one.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        for word in &self.words {
            hash.update(word.to_le_bytes());
        }
        if self.words.is_empty() {
            hash.update([0; 8]);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What is dirty in the other is so here as well. The two may have other granularities.
    pub fn merge(&mut self, other: &Self) {
        let mut at = 0;
        while let Some(run) = other.next(at, u64::MAX) {
            at = run.end;
            self.set(run);
        }
    }

    /// The disk has another size. What is new is clean.
    pub fn resize(&mut self, bytes: u64) {
        let bits = bytes.div_ceil(self.granularity());
        if bytes < self.bytes {
            let before = self.bits();
            if bits < before {
                self.change(bits..before, false);
            }
        }
        self.bytes = bytes;
        let words = bits.div_ceil(WORD_BITS);
        self.words.resize(words as usize, 0);
        self.summary.resize(words.div_ceil(WORD_BITS) as usize, 0);
    }

    /// The bits from that byte of them on, the first in the lowest bit of a byte.
    pub fn store(&self, from: u64, bytes: usize) -> Vec<u8> {
        let first = (from / 8) as usize;
        let words = self.words.iter().skip(first).flat_map(|word| word.to_le_bytes());
        let mut out: Vec<u8> = words.skip((from % 8) as usize).take(bytes).collect();
        out.resize(bytes, 0);
        out
    }

    /// Sets the bits that are set in what [`Self::store`] has made.
    pub fn load(&mut self, from: u64, data: &[u8]) {
        let mut run: Option<Range<u64>> = None;
        for (number, byte) in data.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            for bit in (0..8).filter(|bit| byte & (1 << bit) != 0) {
                let bit = (from + number as u64) * 8 + bit;
                match &mut run {
                    Some(run) if run.end == bit => run.end += 1,
                    _ => {
                        let before = run.replace(bit..bit + 1);
                        self.change_inside(before);
                    }
                }
            }
        }
        self.change_inside(run);
    }

    fn change_inside(&mut self, bits: Option<Range<u64>>) {
        if let Some(bits) = bits {
            self.change(bits.start..bits.end.min(self.bits()), true);
        }
    }

    fn bits(&self) -> u64 {
        self.bytes.div_ceil(self.granularity())
    }

    fn is_bit_set(&self, bit: u64) -> bool {
        self.words[(bit / WORD_BITS) as usize] & (1 << (bit % WORD_BITS)) != 0
    }

    fn change(&mut self, bits: Range<u64>, to: bool) {
        let mut at = bits.start;
        while at < bits.end {
            let word = (at / WORD_BITS) as usize;
            let (low, high) = (at % WORD_BITS, (bits.end - at + at % WORD_BITS).min(WORD_BITS));
            let mask = (u64::MAX << low) & (u64::MAX >> (WORD_BITS - high));
            let before = self.words[word];
            let after = if to { before | mask } else { before & !mask };
            self.set = self.set + u64::from(after.count_ones()) - u64::from(before.count_ones());
            self.words[word] = after;
            let above = &mut self.summary[word / WORD_BITS as usize];
            let bit = 1 << (word as u64 % WORD_BITS);
            *above = if after == 0 { *above & !bit } else { *above | bit };
            at += high - low;
        }
    }

    fn next_bit(&self, from: u64) -> Option<u64> {
        let word = from / WORD_BITS;
        let first = self.words.get(word as usize)? & (u64::MAX << (from % WORD_BITS));
        if first != 0 {
            return Some(word * WORD_BITS + u64::from(first.trailing_zeros()));
        }
        let word = word + 1;
        let mut above = (word / WORD_BITS) as usize;
        let mut words = self.summary.get(above)? & (u64::MAX << (word % WORD_BITS));
        while words == 0 {
            above += 1;
            words = *self.summary.get(above)?;
        }
        let word = above as u64 * WORD_BITS + u64::from(words.trailing_zeros());
        Some(word * WORD_BITS + u64::from(self.words[word as usize].trailing_zeros()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const DISK: u64 = 300 * 512 + 100;

    #[derive(Debug, Clone)]
    enum Step {
        Set(u64, u64),
        Clear(u64, u64),
        Resize(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = (0..DISK * 2, 0..DISK);
        prop_oneof![
            4 => range.clone().prop_map(|(start, bytes)| Step::Set(start, start + bytes / 8)),
            3 => range.prop_map(|(start, bytes)| Step::Clear(start, start + bytes / 4)),
            1 => (1..DISK * 2).prop_map(Step::Resize),
        ]
    }

    proptest! {
        #[test]
        fn it_is_a_set_of_bits(steps in prop::collection::vec(step(), 1..60)) {
            let (mut bitmap, mut model, mut bytes) = (Bitmap::new(DISK, 512), BTreeSet::new(), DISK);
            for step in steps {
                match step {
                    Step::Set(start, end) => {
                        let end = end.min(bytes);
                        bitmap.set(start..end);
                        if start < end {
                            model.extend(start / 512..end.div_ceil(512));
                        }
                    }
                    Step::Clear(start, end) => {
                        bitmap.clear(start..end);
                        model.retain(|bit| bit * 512 < start || ((bit + 1) * 512).min(bytes) > end);
                    }
                    Step::Resize(to) => {
                        bytes = to;
                        bitmap.resize(to);
                        model.retain(|bit| bit * 512 < bytes);
                    }
                }
                let dirty: u64 = model.iter().map(|bit| ((bit + 1) * 512).min(bytes) - bit * 512).sum();
                prop_assert_eq!(bitmap.dirty_bytes(), dirty);
                prop_assert_eq!(bitmap.is_clean(), model.is_empty());
                let (mut at, mut seen) = (0, BTreeSet::new());
                while let Some(run) = bitmap.next(at, u64::MAX) {
                    prop_assert!(run.start >= at && run.start < run.end && run.end <= bytes);
                    prop_assert_eq!(bitmap.next_clean(run.start), run.end);
                    seen.extend(run.start / 512..run.end.div_ceil(512));
                    at = run.end;
                }
                prop_assert_eq!(&seen, &model);
                let mut again = Bitmap::new(bytes, 512);
                for at in (0..bytes.div_ceil(512).div_ceil(8)).step_by(7) {
                    again.load(at, &bitmap.store(at, 7));
                }
                prop_assert_eq!(&again, &bitmap);
            }
        }
    }

    #[test]
    fn runs_are_cut_and_granularities_differ() {
        let mut fine = Bitmap::new(1 << 30, 512);
        fine.set(1_000_000..1_000_001);
        fine.set(1 << 29..(1 << 29) + (1 << 20));
        assert_eq!(fine.next(0, u64::MAX), Some(999_936..1_000_448));
        assert_eq!(fine.next(1_000_448, 4096), Some(1 << 29..(1 << 29) + 4096));
        let mut coarse = Bitmap::new(1 << 30, 1 << 16);
        coarse.merge(&fine);
        assert_eq!(coarse.dirty_bytes(), (1 << 20) + (1 << 16));
    }
}
