//! What a page would take with a code of its own, without making one.

use super::code::{self, DISTANCES, Histogram};
use crate::codec::PAGE;

/// What describing a code takes for each symbol that there is, bits.
const SYMBOL_BITS: u32 = 4;
/// What describing a code takes at least, and what it must save beyond that to be worth the time, bits.
const WORTH_BITS: u32 = 1000;
/// Parts of a bit in which is counted.
const PARTS: u32 = 16;

/// The tables.
pub struct Estimate {
    /// n·log2(n), in parts of bits, for all numbers of symbols that a page has.
    products: Box<[u32; PAGE + 2]>,
    /// Bits that follow each symbol.
    following: Histogram<i16>,
}

impl Default for Estimate {
    fn default() -> Self {
        let mut products = Box::new([0; PAGE + 2]);
        for (count, product) in (0_u16..).zip(products.iter_mut()).skip(1) {
            let count = f32::from(count);
            *product = (PARTS as f32 * count * count.log2()) as u32;
        }
        Self {
            products,
            following: std::array::from_fn(|symbol| code::extra(symbol) as i16),
        }
    }
}

impl Estimate {
    /// Bits, of which [`WORTH_BITS`] are what the time is worth.
    pub fn bits(&self, counts: &Histogram<i16>) -> usize {
        let (lengths, distances) = counts.split_at(DISTANCES);
        let following = counts.iter().zip(&self.following);
        let following: i32 = following
            .map(|(count, bits)| i32::from(*count) * i32::from(*bits))
            .sum();
        let bits = self.information(lengths) + self.information(distances) + following.unsigned_abs();
        (bits + WORTH_BITS) as usize
    }

    /// What no code can do with less, and the description of one.
    fn information(&self, counts: &[i16]) -> u32 {
        let product = |count: usize| self.products.get(count).copied().unwrap_or_default();
        let (mut all, mut sum, mut kinds) = (0, 0, 0);
        for count in counts {
            let count = usize::from(count.unsigned_abs());
            all += count;
            sum += product(count);
            kinds += u32::from(count > 0);
        }
        product(all).saturating_sub(sum) / PARTS + SYMBOL_BITS * kinds
    }
}
