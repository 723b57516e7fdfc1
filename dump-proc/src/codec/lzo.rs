//! LZO1X of one page: a stream that every LZO1X decoder reads.
//!
//! From the format as the Linux kernel documents it (Documentation/staging/lzo.rst). Of its instructions these are written,
//! which is all that a page needs, where no distance reaches 4096:
//!
//! | first byte | then | means |
//! |---|---|---|
//! | `0000 LLLL` | length bytes, if L is 0 | L+3 (or 18 and more) literals follow |
//! | `LLLD DDSS`, L from 2 to 7 | `H` | copy L+1 bytes (3 to 8) from H·8 + D + 1 back (at most 2048) |
//! | `001L LLLL` | length bytes, if L is 0; `D…DSS` in two bytes | copy L+2 (or 33 and more) bytes from D + 1 back |
//! | `0x11 00 00` | | the end |
//!
//! SS: so many literals follow the copy. The very first byte may also be 17 + the number of literals at the start.
//! Length bytes: one 255 is written as a zero, the last byte is the rest.

/// Bytes of a page.
const PAGE: usize = 4096;
/// Slots of the table of places; a place is found by the hash of its four bytes.
const TABLE_BITS: u32 = 11;
/// Copies nearer than this have the short form.
const SHORT_DISTANCE: usize = 2048;
/// Longest copy that has the short form.
const SHORT_LENGTH: usize = 8;
/// After 2 to the power of so many bytes without a copy, every second place is looked at, and so on.
const PATIENCE: u32 = 5;

/// The table, used again from page to page.
pub struct Lzo {
    places: Box<[u16; 1 << TABLE_BITS]>,
}

impl Default for Lzo {
    fn default() -> Self {
        Self {
            places: Box::new([0; 1 << TABLE_BITS]),
        }
    }
}

fn word(page: &[u8; PAGE], at: usize) -> u32 {
    page[at..]
        .first_chunk()
        .map_or(0, |bytes: &[u8; 4]| u32::from_le_bytes(*bytes))
}

fn slot(word: u32) -> usize {
    (word.wrapping_mul(0x9e37_79b1) >> (32 - TABLE_BITS)) as usize
}

impl Lzo {
    /// Appends the stream of a page.
    pub fn compress(&mut self, page: &[u8; PAGE], out: &mut Vec<u8>) {
        self.places.fill(0);
        let begin = out.len();
        let last = PAGE - 4;
        // Place 0 is in the table from the start, by being 0: what hashes to an empty slot is compared with it.
        let (mut literals, mut at) = (0, 1);
        while at <= last {
            let here = word(page, at);
            let place = &mut self.places[slot(here)];
            let before = usize::from(std::mem::replace(place, at as u16));
            if word(page, before) != here {
                at += 1 + ((at - literals) >> PATIENCE);
                continue;
            }
            let (from, to) = (&page[before + 4..], &page[at + 4..]);
            let more = common(from, to);
            let length = 4 + more;
            put_literals(out, begin, &page[literals..at]);
            put_copy(out, at - before, length);
            at += length;
            literals = at;
        }
        put_literals(out, begin, &page[literals..]);
        out.extend_from_slice(&[0x11, 0, 0]);
    }
}

/// How many bytes two places have in common; the second ends first.
fn common(from: &[u8], to: &[u8]) -> usize {
    let mut count = 0;
    let words = from.chunks_exact(8).zip(to.chunks_exact(8));
    for (a, b) in words {
        let (a, b) = (u64::from_le_bytes(eight(a)), u64::from_le_bytes(eight(b)));
        if a != b {
            return count + ((a ^ b).trailing_zeros() / 8) as usize;
        }
        count += 8;
    }
    let rest = from[count..].iter().zip(&to[count..]);
    count + rest.take_while(|(a, b)| a == b).count()
}

fn eight(bytes: &[u8]) -> [u8; 8] {
    bytes.first_chunk().copied().unwrap_or_default()
}

fn put_literals(out: &mut Vec<u8>, begin: usize, literals: &[u8]) {
    let count = literals.len();
    if count == 0 {
        return;
    }
    let is_first = out.len() == begin;
    if is_first && count <= 238 {
        out.push(17 + count as u8);
    } else if !is_first && count <= 3 {
        // In the copy before: in the last byte but one of both forms.
        let place = out.len() - 2;
        out[place] |= count as u8;
    } else if count <= 18 {
        out.push(count as u8 - 3);
    } else {
        out.push(0);
        put_length(out, count - 18);
    }
    out.extend_from_slice(literals);
}

fn put_copy(out: &mut Vec<u8>, distance: usize, length: usize) {
    let back = distance - 1;
    if length <= SHORT_LENGTH && distance <= SHORT_DISTANCE {
        out.push(((length - 1) << 5 | (back & 7) << 2) as u8);
        out.push((back >> 3) as u8);
        return;
    }
    if length <= 33 {
        out.push(0x20 | (length - 2) as u8);
    } else {
        out.push(0x20);
        put_length(out, length - 33);
    }
    out.extend_from_slice(&((back << 2) as u16).to_le_bytes());
}

fn put_length(out: &mut Vec<u8>, mut rest: usize) {
    while rest > 255 {
        out.push(0);
        rest -= 255;
    }
    out.push(rest as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_tests::dumpfile::lzo::decode;
    use proptest::prelude::*;

    fn round_trip(lzo: &mut Lzo, page: &[u8; PAGE]) -> usize {
        let mut out = vec![9; 5];
        lzo.compress(page, &mut out);
        assert_eq!(out[..5], [9; 5]);
        assert!(decode(&out[5..]).is_some_and(|back| back == page), "{page:?}");
        out.len() - 5
    }

    #[test]
    fn pages_of_all_kinds_come_back() {
        let lzo = &mut Lzo::default();
        assert!(round_trip(lzo, &[0; PAGE]) < 40);
        assert!(round_trip(lzo, &std::array::from_fn(|at| at as u8)) < 400);
        let text = b"the quick brown fox jumps over the lazy dog; ".repeat(100);
        assert!(round_trip(lzo, text.first_chunk().unwrap()) < 120);
        let mut state = 1_u64;
        let mut noise = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        // All literals, the longest run.
        let size = round_trip(lzo, &std::array::from_fn(|_| noise()));
        assert!((PAGE..PAGE + PAGE / 200 + 8).contains(&size), "{size}");
        // Pointers as kernels have them, and copies beyond the short form's reach.
        let pointers: [u8; PAGE] = std::array::from_fn(|at| match at % 8 {
            0..3 => ((at / 8 * 37) >> (at % 8 * 4)) as u8,
            3 => 0x81,
            _ => 0xff,
        });
        assert!(round_trip(lzo, &pointers) < PAGE * 3 / 4);
        let far: [u8; PAGE] = std::array::from_fn(|at| ((at % 3000 * 7919) >> 5) as u8);
        round_trip(lzo, &far);
    }

    proptest! {
        /// Runs of random lengths of few different pieces: copies and literals of all lengths at all distances.
        #[test]
        fn mixtures_come_back(pieces in prop::collection::vec((0_u8..6, 1_usize..300), 20..200), seed: u64) {
            let mut page = Vec::new();
            let mut state = seed | 1;
            for (kind, length) in pieces {
                for at in 0..length {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    page.push(match kind {
                        0 => 0,
                        1 => at as u8,
                        2 => state as u8,
                        3 => state as u8 & 1,
                        _ => page.get(page.len().wrapping_sub(usize::from(kind) * 613)).copied().unwrap_or(7),
                    });
                }
            }
            page.resize(page.len().max(PAGE), 3);
            round_trip(&mut Lzo::default(), page.first_chunk().unwrap());
        }
    }
}
