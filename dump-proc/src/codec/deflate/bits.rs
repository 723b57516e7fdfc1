//! Bits, the first one lowest, as DEFLATE packs them.

use crate::codec::PAGE;

/// Room for a page that does not get smaller, and for one word more.
const ROOM: usize = 2 * PAGE;

/// What is being written.
pub struct BitWriter {
    bytes: Box<[u8; ROOM]>,
    /// Whole bytes so far.
    at: usize,
    /// Bits that are not whole bytes yet: less than 8 after a [`Self::flush`].
    word: u64,
    count: u32,
}

impl Default for BitWriter {
    fn default() -> Self {
        Self {
            bytes: Box::new([0; ROOM]),
            at: 0,
            word: 0,
            count: 0,
        }
    }
}

impl BitWriter {
    /// Starts anew with these bits.
    pub fn begin(&mut self, head: &[u8], bits: usize) {
        self.at = bits / 8;
        self.bytes[..self.at].copy_from_slice(&head[..self.at]);
        self.count = (bits % 8) as u32;
        let rest = head.get(self.at).copied().unwrap_or_default();
        self.word = u64::from(rest) & ((1 << self.count) - 1);
    }

    /// Adds bits, of which 56 at most may be added between two flushes.
    #[inline(always)]
    pub fn add(&mut self, bits: u64, count: u32) {
        self.word |= bits << self.count;
        self.count += count;
    }

    /// Makes room for 56 bits.
    #[inline(always)]
    pub fn flush(&mut self) {
        if let Some(room) = self.bytes[self.at..].first_chunk_mut::<8>() {
            *room = self.word.to_le_bytes();
        }
        self.at += (self.count / 8) as usize;
        self.word >>= self.count & !7;
        self.count &= 7;
    }

    /// How many bits there are.
    pub fn bits(&self) -> usize {
        self.at * 8 + self.count as usize
    }

    /// All of it, the last byte filled up.
    pub fn finish(&mut self) -> &[u8] {
        self.flush();
        let last = usize::from(self.count > 0);
        if last > 0 {
            self.bytes[self.at] = self.word as u8;
        }
        &self.bytes[..self.at + last]
    }
}
