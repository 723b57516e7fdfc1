//! What is written is read by somebody else's inflate.

use super::*;
use flate2::{Decompress, FlushDecompress, Status};
use proptest::prelude::*;

const EFFORTS: [Effort; 2] = [Effort::Fast, Effort::Small];

/// A generator that is the same everywhere.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }
}

fn inflate(bytes: &[u8]) -> Vec<u8> {
    let mut page = vec![0; PAGE + 1];
    let mut stream = Decompress::new(true);
    let status = stream.decompress(bytes, &mut page, FlushDecompress::Finish);
    assert_eq!(status.ok(), Some(Status::StreamEnd));
    assert_eq!(stream.total_in(), bytes.len() as u64, "nothing behind the end");
    page.truncate(stream.total_out() as usize);
    page
}

/// How long it is, unless it does not get smaller.
fn round_trip(deflate: &mut Deflate, page: &[u8; PAGE]) -> Option<usize> {
    let mut out = vec![9; 5];
    if !deflate.compress(page, &mut out) {
        assert_eq!(out, [9; 5]);
        return None;
    }
    assert_eq!(out[..5], [9; 5]);
    assert!(out.len() - 5 < PAGE, "{}", out.len());
    assert!(inflate(&out[5..]) == page, "{:?} {page:?}", deflate.effort);
    Some(out.len() - 5)
}

/// A page of pieces of different kinds.
fn mixture(pieces: &[(u8, usize)], noise: &mut Noise) -> [u8; PAGE] {
    let mut page: Vec<u8> = Vec::with_capacity(2 * PAGE);
    for (kind, length) in pieces {
        for at in 0..*length {
            let before = |back: usize| page.len().checked_sub(back).map_or(7, |at| page[at]);
            page.push(match kind {
                0 => 0,
                1 => at as u8,
                2 => noise.next() as u8,
                3 => noise.next() as u8 & 1,
                4 => b' ' + (noise.next() % 60) as u8,
                5 => (noise.next() % 200) as u8 & noise.next() as u8,
                _ => before(1 + (usize::from(*kind) * 613) % 4095),
            });
        }
    }
    page.resize(page.len().max(PAGE), 3);
    *page.first_chunk().unwrap()
}

#[test]
fn pages_of_all_kinds_come_back() {
    for effort in EFFORTS {
        let deflate = &mut Deflate::new(effort);
        let mut noise = Noise(1);
        assert!(round_trip(deflate, &[0; PAGE]).unwrap() < 60);
        assert!(round_trip(deflate, &std::array::from_fn(|at| at as u8)).unwrap() < 450);
        let text = b"the quick brown fox jumps over the lazy dog; ".repeat(100);
        assert!(round_trip(deflate, text.first_chunk().unwrap()).unwrap() < 150);
        assert_eq!(round_trip(deflate, &std::array::from_fn(|_| noise.next() as u8)), None);
        let digits = std::array::from_fn(|_| b'0' + (noise.next() % 10) as u8);
        // Less than half: a code is used that was made for it, at the latest after a lesson.
        let sizes: Vec<_> = (0..80).map(|_| round_trip(deflate, &digits).unwrap()).collect();
        assert!(sizes[79] < PAGE / 2, "{sizes:?}");
        // Copies from everywhere, also of one byte, and of all lengths.
        for length in 3..600 {
            let mut page = [0; PAGE];
            page.iter_mut().for_each(|byte| *byte = noise.next() as u8);
            page.copy_within(..length, PAGE - length);
            page[1000..1000 + length].fill(length as u8);
            page[2000..2600].fill_with(|| noise.next() as u8 & 3);
            round_trip(deflate, &page);
        }
    }
}

#[test]
fn a_page_at_the_border_of_what_pays_is_stored_or_smaller() {
    for effort in EFFORTS {
        let deflate = &mut Deflate::new(effort);
        let mut noise = Noise(7);
        let mut both = [0; 2];
        for zeroes in (0..1500).step_by(3) {
            let mut page: [u8; PAGE] = std::array::from_fn(|_| noise.next() as u8);
            page[..zeroes].fill(0);
            both[usize::from(round_trip(deflate, &page).is_some())] += 1;
        }
        assert!(both[0] > 0 && both[1] > 0, "{both:?}");
    }
}

#[test]
fn the_checksum_is_adlers() {
    let mut noise = Noise(3);
    for page in [[0; PAGE], [255; PAGE], std::array::from_fn(|_| noise.next() as u8)] {
        let (mut sum, mut sums) = (1_u32, 0_u32);
        for byte in page {
            sum = (sum + u32::from(byte)) % 65521;
            sums = (sums + sum) % 65521;
        }
        assert_eq!(adler32(&page), sums << 16 | sum);
    }
}

/// Codes are judged by their symbols' counts, so these are the hostile ones: as skewed as they can be, and of all sizes.
#[test]
fn codes_of_all_shapes_are_read() {
    let mut noise = Noise(11);
    for effort in EFFORTS {
        let deflate = &mut Deflate::new(effort);
        for symbols in 1..=256_usize {
            let mut page = [0_u8; PAGE];
            let (mut a, mut b, mut at) = (1_usize, 1, 0);
            // Fibonacci's numbers make the deepest trees.
            for symbol in 0..symbols {
                for _ in 0..a.min(PAGE / 4) {
                    if at < PAGE {
                        page[at] = symbol as u8;
                        at += 1;
                    }
                }
                (a, b) = (b, (a + b).min(PAGE));
            }
            // In no order, so that they are literals.
            for at in (1..PAGE).rev() {
                page.swap(at, noise.next() as usize % (at + 1));
            }
            round_trip(deflate, &page);
        }
    }
}

proptest! {
    #[test]
    fn mixtures_come_back(pieces in prop::collection::vec((0_u8..30, 1_usize..300), 1..200), seed: u64) {
        let page = mixture(&pieces, &mut Noise(seed | 1));
        for effort in EFFORTS {
            round_trip(&mut Deflate::new(effort), &page);
        }
    }
}

/// `make soak`.
#[test]
#[ignore = "takes minutes"]
fn millions_of_pages_come_back() {
    let mut noise = Noise(0x1234_5678_9abc_def1);
    let mut states = EFFORTS.map(Deflate::new);
    for _ in 0..1_500_000 {
        let count = 1 + noise.next() % 60;
        let longest = 1 + noise.next() % 1000;
        let kinds = 1 + noise.next() % 30;
        let pieces: Vec<_> = (0..count)
            .map(|_| ((noise.next() % kinds) as u8, 1 + (noise.next() % longest) as usize))
            .collect();
        let page = mixture(&pieces, &mut noise);
        for state in &mut states {
            round_trip(state, &page);
        }
    }
}
