//! DEFLATE of one page as a zlib stream (RFC 1950 and 1951), made for pages: much faster than a library that is made for
//! streams, and readable by every inflate.
//!
//! Two passes over what is in the first-level cache. [`finder`] turns the page into runs of literals and copies, and counts
//! symbols; then the cheapest of some codes is taken, and everything is written. What a page costs under a code is a sum of
//! products, so codes are compared without writing anything. There are a few that are made from pages before this one; each
//! learns from the pages that took it, so that one comes to fit text, another one code, and so on. There are two efforts:
//!
//! - *fast*: places are passed over where there is little to find.
//! - *small*: a copy is put off when the next place has a longer one, and a page that would be clearly smaller with a code of
//!   its own has one. Making a code takes longest of all, so [`estimate`] tells beforehand.

mod bits;
mod code;
mod estimate;
pub mod finder;

use super::{Codec, PAGE};
use bits::BitWriter;
use code::{Code, Histogram};
use estimate::Estimate;
use finder::{Finder, Found};

/// 32 KiB window, no dictionary, the fastest of compressors.
const ZLIB_HEADER: [u8; 2] = [0x78, 0x01];
const CHECKSUM_BYTES: usize = 4;
/// Codes that learn.
const LEARNERS: usize = 4;
/// After so many pages a code is made anew.
const LESSON: u32 = 32;

/// What matters more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    /// Time.
    Fast,
    /// Size.
    Small,
}

/// A code and what it has seen.
struct Learner {
    code: Code,
    seen: Histogram<u32>,
    pages: u32,
}

impl Learner {
    fn new(seed: usize, writer: &mut BitWriter) -> Self {
        let seen = code::seed(seed);
        Self {
            code: Code::new(&seen, writer),
            seen,
            pages: 0,
        }
    }

    fn learn(&mut self, page: &Histogram<i16>, writer: &mut BitWriter) {
        for (all, new) in self.seen.iter_mut().zip(page) {
            *all += 16 * u32::from(new.unsigned_abs());
        }
        self.pages += 1;
        if self.pages == LESSON {
            self.pages = 0;
            self.code.fit(&self.seen, writer);
            // What was long ago counts less, but never nothing: any page must be expressible.
            self.seen.iter_mut().for_each(|count| *count = (*count / 2).max(1));
        }
    }
}

/// The state, used again from page to page.
pub struct Deflate {
    effort: Effort,
    finder: Finder,
    found: Found,
    learners: Vec<Learner>,
    fixed: Code,
    /// The page's own.
    own: Code,
    estimate: Estimate,
    writer: BitWriter,
}

impl Deflate {
    /// Nothing is learnt yet.
    pub fn new(effort: Effort) -> Self {
        let mut writer = BitWriter::default();
        let learners = (0..LEARNERS).map(|seed| Learner::new(seed, &mut writer)).collect();
        Self {
            effort,
            finder: Finder::default(),
            found: Found::default(),
            learners,
            fixed: Code::fixed(),
            own: Code::fixed(),
            writer,
            estimate: Estimate::default(),
        }
    }
}

impl Codec for Deflate {
    fn compress(&mut self, page: &[u8; PAGE], out: &mut Vec<u8>) -> bool {
        match self.effort {
            Effort::Fast => self.finder.find_fast(page, &mut self.found),
            Effort::Small => self.finder.find_small(page, &mut self.found),
        }
        let counts = &self.found.counts;
        let mut bits = self.fixed.cost(counts);
        let mut learner = None;
        for (number, other) in self.learners.iter().enumerate() {
            let cost = other.code.cost(counts);
            if cost < bits {
                (bits, learner) = (cost, Some(number));
            }
        }
        let mut code = &self.fixed;
        // Worth the time only where it can be expected to be better.
        if self.effort == Effort::Small && self.estimate.bits(counts) < bits {
            let counts = counts.map(|count| u32::from(count.unsigned_abs()));
            self.own.fit(&counts, &mut self.writer);
            let cost = self.own.cost(&self.found.counts);
            if cost < bits {
                (bits, code, learner) = (cost, &self.own, None);
            }
        }
        if bits / 8 + ZLIB_HEADER.len() + CHECKSUM_BYTES + 1 >= PAGE {
            return false;
        }
        let learner = learner.and_then(|number| self.learners.get_mut(number));
        if let Some(learner) = &learner {
            code = &learner.code;
        }
        code.write(page, &self.found, &mut self.writer);
        out.extend_from_slice(&ZLIB_HEADER);
        out.extend_from_slice(self.writer.finish());
        out.extend_from_slice(&adler32(page).to_be_bytes());
        if let Some(learner) = learner {
            learner.learn(counts, &mut self.writer);
        }
        true
    }
}

/// The checksum of RFC 1950 of one page: the sum of all bytes, and the sum of all those sums on the way.
fn adler32(page: &[u8; PAGE]) -> u32 {
    const LINE: usize = 64;
    /// So many lines' sums of sums fit into 16 bits: 255 · (1 + 2 + … + 15).
    const LINES: usize = 16;
    let (mut sum, mut sums) = (1_u64, 0_u64);
    for block in page.as_chunks::<{ LINES * LINE }>().0 {
        // Columns are summed one beside the other, in vectors.
        let (mut columns, mut before) = ([0_u16; LINE], [0_u16; LINE]);
        for line in block.as_chunks::<LINE>().0 {
            for ((column, before), byte) in columns.iter_mut().zip(&mut before).zip(line) {
                *before += *column;
                *column += u16::from(*byte);
            }
        }
        // A byte counts once for itself and for each that follows.
        let (mut plain, mut weighted) = (0_u32, 0_u32);
        for (behind, (column, before)) in (0_u32..).zip(columns.iter().zip(&before).rev()) {
            plain += u32::from(*column);
            weighted += u32::from(*column) * (behind + 1) + u32::from(*before) * LINE as u32;
        }
        sums += (LINES * LINE) as u64 * sum + u64::from(weighted);
        sum += u64::from(plain);
    }
    (((sums % 65521) << 16) | (sum % 65521)) as u32
}

#[cfg(test)]
#[path = "deflate_test.rs"]
mod tests;
