//! Finds what a page repeats of itself.

use super::code::{self, DISTANCES, Histogram};
use crate::codec::PAGE;

/// Slots of the table of places; a place is found by the hash of its first bytes.
const TABLE_BITS: u32 = 12;
/// Longest copy of the format.
const MAX_LENGTH: usize = 258;
/// After 2 to the power of so many bytes without a copy, every second place is looked at, and so on.
const PATIENCE: u32 = 5;
/// A copy of this length is taken without looking further.
const LONG_ENOUGH: usize = 16;
/// Shortest copy that is looked for.
const MIN_LENGTH: usize = 4;
/// As [`PATIENCE`], when it should be small.
const PATIENCE_FOR_SIZE: u32 = 6;

/// A copy, and how many literals precede it.
#[derive(Debug, Clone, Copy)]
pub struct Copy {
    /// Literals before it.
    pub literals: u16,
    /// How long it is.
    pub length: u16,
    /// From how far back.
    pub distance: u16,
}

/// A page taken apart.
pub struct Found {
    /// Copies in order; what is left behind the last one is literals.
    pub copies: Vec<Copy>,
    /// How often there is each symbol, the end included.
    pub counts: Histogram<i16>,
}

impl Default for Found {
    fn default() -> Self {
        Self {
            // The shortest copy has three bytes.
            copies: Vec::with_capacity(PAGE / 3 + 1),
            counts: [0; code::SYMBOLS],
        }
    }
}

impl Found {
    fn clear(&mut self) {
        self.copies.clear();
        self.counts = [0; code::SYMBOLS];
        self.counts[code::END] = 1;
    }

    #[inline(always)]
    fn literals(&mut self, literals: &[u8]) {
        for byte in literals {
            self.counts[usize::from(*byte)] += 1;
        }
    }

    #[inline(always)]
    fn copy(&mut self, literals: &[u8], length: usize, distance: usize) {
        self.literals(literals);
        let mut rest = length;
        let mut literals = literals.len() as u16;
        while rest > 0 {
            // What is left must not be too short for a copy.
            let part = match rest {
                0..=MAX_LENGTH => rest,
                261.. => MAX_LENGTH,
                _ => rest - 3,
            };
            self.counts[code::length_symbol(part)] += 1;
            self.counts[DISTANCES + code::distance_symbol(distance)] += 1;
            self.copies.push(Copy {
                literals,
                length: part as u16,
                distance: distance as u16,
            });
            literals = 0;
            rest -= part;
        }
    }
}

/// The tables, used again from page to page.
pub struct Finder {
    /// The latest place of a hash; counted from 1, when it should be small.
    latest: Box<[u16; 1 << TABLE_BITS]>,
}

impl Default for Finder {
    fn default() -> Self {
        Self {
            latest: Box::new([0; 1 << TABLE_BITS]),
        }
    }
}

#[inline(always)]
fn word(page: &[u8; PAGE], at: usize) -> u32 {
    page[at..]
        .first_chunk()
        .map_or(0, |bytes: &[u8; 4]| u32::from_le_bytes(*bytes))
}

#[inline(always)]
fn slot(word: u32) -> usize {
    (word.wrapping_mul(0x9e37_79b1) >> (32 - TABLE_BITS)) as usize
}

impl Finder {
    /// Takes what the table has.
    pub fn find_fast(&mut self, page: &[u8; PAGE], found: &mut Found) {
        found.clear();
        self.latest.fill(0);
        // Place 0 is in the table from the start, by being 0: what hashes to an empty slot is compared with it.
        let (mut literals, mut at) = (0, 1);
        while at <= PAGE - 4 {
            let here = word(page, at);
            let before = usize::from(std::mem::replace(&mut self.latest[slot(here)], at as u16));
            if word(page, before) != here {
                at += 1 + ((at - literals) >> PATIENCE);
                continue;
            }
            let length = 4 + common(page, before + 4, at + 4);
            found.copy(&page[literals..at], length, at - before);
            at += length;
            literals = at;
            if at <= PAGE - 3 {
                // One place inside: what comes next often has one of its bytes before it.
                self.latest[slot(word(page, at - 1))] = (at - 1) as u16;
            }
        }
        found.literals(&page[literals..]);
    }

    /// Looks at every place, and at the next place before it takes a copy.
    pub fn find_small(&mut self, page: &[u8; PAGE], found: &mut Found) {
        found.clear();
        self.latest.fill(0);
        let last = PAGE - 4;
        let (mut literals, mut at) = (0, 0);
        while at <= last {
            let mut candidate = self.enter(page, at);
            let mut length = longer(page, at, candidate, MIN_LENGTH - 1);
            if length == 0 {
                at += 1 + ((at - literals) >> PATIENCE_FOR_SIZE);
                continue;
            }
            while length < LONG_ENOUGH && at < last {
                let next = self.enter(page, at + 1);
                let longer = longer(page, at + 1, next, length);
                if longer == 0 {
                    break;
                }
                (length, candidate) = (longer, next);
                at += 1;
            }
            found.copy(&page[literals..at], length, at + 1 - candidate);
            let end = at + length;
            // The two that have been looked at are there already. Inside of a long copy there is nothing that its source
            // has not.
            let from = (at + 2).max(end.saturating_sub(LONG_ENOUGH));
            for inside in from..end.min(PAGE - 3) {
                self.enter(page, inside);
            }
            at = end;
            literals = at;
        }
        found.literals(&page[literals..]);
    }

    /// Puts a place into the table, and returns the candidate for it, counted from 1.
    #[inline(always)]
    fn enter(&mut self, page: &[u8; PAGE], at: usize) -> usize {
        std::mem::replace(&mut self.latest[slot(word(page, at))], at as u16 + 1).into()
    }
}

/// How long the copy of a place from a candidate, counted from 1, is; 0 when it is not longer than `than`.
#[inline(always)]
fn longer(page: &[u8; PAGE], at: usize, candidate: usize, than: usize) -> usize {
    let Some(before) = candidate.checked_sub(1) else {
        return 0;
    };
    if word(page, before) != word(page, at) || page.get(before + than) != page.get(at + than) {
        return 0;
    }
    let length = MIN_LENGTH + common(page, before + MIN_LENGTH, at + MIN_LENGTH);
    if length > than { length } else { 0 }
}

/// How many bytes two places have in common; the second is the later one.
#[inline(always)]
fn common(page: &[u8; PAGE], mut from: usize, mut to: usize) -> usize {
    let begin = to;
    while let (Some(a), Some(b)) = (page[from..].first_chunk(), page[to..].first_chunk()) {
        let difference = u64::from_le_bytes(*a) ^ u64::from_le_bytes(*b);
        if difference != 0 {
            return to - begin + (difference.trailing_zeros() / 8) as usize;
        }
        (from, to) = (from + 8, to + 8);
    }
    let rest = page[from..].iter().zip(&page[to..]);
    to - begin + rest.take_while(|(a, b)| a == b).count()
}
