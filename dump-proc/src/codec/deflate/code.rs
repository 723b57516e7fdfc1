//! Huffman codes of DEFLATE: what a page costs under one, and writing it.

use super::bits::BitWriter;
use super::finder::Found;
use crate::codec::PAGE;

/// Literals, the end and lengths; distances follow from [`DISTANCES`].
const LENGTH_SYMBOLS: usize = 286;
/// Where distances' symbols begin among all.
pub const DISTANCES: usize = 288;
/// Distances up to a page.
const DISTANCE_SYMBOLS: usize = 24;
/// All symbols, with gaps, so that the sum over them is one of whole vectors.
pub const SYMBOLS: usize = 320;
/// The end of the block.
pub const END: usize = 256;
/// Longest code: four of them and what is left of a byte fit into a word.
const MAX_BITS: u8 = 14;
/// Longest code of the code of codes' lengths.
const MAX_META_BITS: u8 = 7;
/// In which order the lengths of that code are given.
const META_ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

/// Longest description of a code: 310 sizes of 7 bits with 7 following, and what precedes them.
const HEAD_BYTES: usize = 640;

/// One number for each symbol.
pub type Histogram<T> = [T; SYMBOLS];

/// What is written for a symbol.
#[derive(Debug, Clone, Copy, Default)]
struct Word {
    bits: u32,
    count: u32,
}

/// A code, ready to be used.
pub struct Code {
    /// What precedes the page's symbols: the kind of the block and the code.
    head: [u8; HEAD_BYTES],
    /// How much of that, bits.
    head_bits: usize,
    /// What each symbol costs, with the bits that follow it.
    costs: Histogram<i16>,
    words: Histogram<Word>,
    /// For each length of a copy from 3 on, with the bits that follow.
    lengths: [Word; 256],
}

/// Symbol and following bits' count of each length from 3 on.
const LENGTHS: [(u16, u8); 256] = {
    let mut table = [(0, 0); 256];
    let mut length = 0;
    while length < 255 {
        table[length] = if length < 8 {
            (257 + length as u16, 0)
        } else {
            // Groups of four symbols with one bit more each.
            let extra = length.ilog2() - 2;
            (257 + (4 * extra + (length >> extra) as u32) as u16, extra as u8)
        };
        length += 1;
    }
    // The longest one has a symbol of its own.
    table[255] = (285, 0);
    table
};

/// The symbol of a copy's length.
#[inline(always)]
pub fn length_symbol(length: usize) -> usize {
    usize::from(LENGTHS[(length - 3) & 255].0)
}

/// The symbol of a distance.
#[inline(always)]
pub fn distance_symbol(distance: usize) -> usize {
    let back = distance as u32 - 1;
    if back < 2 {
        return back as usize;
    }
    let top = back.ilog2();
    (2 * top + (back >> (top - 1) & 1)) as usize
}

/// How many bits follow a distance's symbol.
#[inline(always)]
fn distance_extra(symbol: usize) -> u32 {
    (symbol as u32 / 2).saturating_sub(1)
}

/// How many bits follow a symbol.
pub fn extra(symbol: usize) -> u32 {
    match symbol {
        DISTANCES.. => distance_extra(symbol - DISTANCES),
        265..285 => (symbol as u32 - 261) / 4,
        _ => 0,
    }
}

/// What codes are made from before there are pages: guesses at text, structures, programs, and nothing in particular.
pub fn seed(number: usize) -> Histogram<u32> {
    let mut counts = [0; SYMBOLS];
    for (symbol, count) in counts.iter_mut().enumerate() {
        *count = match (number, symbol) {
            (_, 257..262) => 2000,
            (_, 262..286) => 300,
            (_, 288..312) => 100 * (symbol as u32 - 280),
            (0, 0x61..0x7b | 0x20) => 900,
            (0, 0x20..0x7f) => 400,
            (1, 0 | 0xff | 0x80..0x89) => 1500,
            (2, 0 | 0xff | 0x48 | 0x0f | 0x89 | 0x8b | 0xe8) => 700,
            (2 | 3, 0..256) => 100,
            (1, 0..256) => 60,
            (_, END) => 10,
            (_, 286 | 287 | 312..) => 0,
            _ => 10,
        };
    }
    counts
}

impl Code {
    /// The format's own, which need not be told.
    pub fn fixed() -> Self {
        let mut sizes = [0; SYMBOLS];
        for (symbol, size) in sizes.iter_mut().enumerate() {
            *size = match symbol {
                0..144 => 8,
                144..256 => 9,
                256..280 => 7,
                280..288 => 8,
                _ => 5,
            };
        }
        let mut code = Self::empty();
        // The last block, kind 1.
        code.head[0] = 0b011;
        code.head_bits = 3;
        code.use_sizes(&sizes);
        code
    }

    /// The best one for symbols that are so frequent.
    pub fn new(counts: &Histogram<u32>, writer: &mut BitWriter) -> Self {
        let mut code = Self::empty();
        code.fit(counts, writer);
        code
    }

    fn empty() -> Self {
        Self {
            head: [0; HEAD_BYTES],
            head_bits: 0,
            costs: [0; SYMBOLS],
            words: [Word::default(); SYMBOLS],
            lengths: [Word::default(); 256],
        }
    }

    /// Becomes the best one for symbols that are so frequent, with its description, for which `writer` is used.
    pub fn fit(&mut self, counts: &Histogram<u32>, writer: &mut BitWriter) {
        let mut sizes = [0; SYMBOLS];
        let (lengths, distances) = sizes.split_at_mut(DISTANCES);
        huffman(&counts[..LENGTH_SYMBOLS], MAX_BITS, &mut lengths[..LENGTH_SYMBOLS]);
        let counts = &counts[DISTANCES..][..DISTANCE_SYMBOLS];
        huffman(counts, MAX_BITS, &mut distances[..DISTANCE_SYMBOLS]);
        writer.begin(&[], 0);
        describe(&sizes, writer);
        self.head_bits = writer.bits();
        let head = writer.finish();
        self.head[..head.len()].copy_from_slice(head);
        self.use_sizes(&sizes);
    }

    fn use_sizes(&mut self, sizes: &Histogram<u8>) {
        self.words = [Word::default(); SYMBOLS];
        let (lengths, distances) = self.words.split_at_mut(DISTANCES);
        assign(&sizes[..DISTANCES], lengths);
        assign(&sizes[DISTANCES..], distances);
        for (symbol, cost) in self.costs.iter_mut().enumerate() {
            *cost = (u32::from(sizes[symbol]) + extra(symbol)) as i16;
        }
        for (length, word) in self.lengths.iter_mut().enumerate() {
            let (symbol, extra) = LENGTHS[length];
            let Word { bits, count } = self.words[usize::from(symbol)];
            let following = length as u32 & ((1 << extra) - 1);
            *word = Word {
                bits: bits | following << count,
                count: count + u32::from(extra),
            };
        }
    }

    /// What a page would take, bits.
    pub fn cost(&self, counts: &Histogram<i16>) -> usize {
        let products = counts.iter().zip(&self.costs);
        let sum: i32 = products.map(|(count, cost)| i32::from(*count) * i32::from(*cost)).sum();
        self.head_bits + sum.unsigned_abs() as usize
    }

    /// Writes a page.
    pub fn write(&self, page: &[u8; PAGE], found: &Found, writer: &mut BitWriter) {
        writer.begin(&self.head, self.head_bits);
        let mut at = 0;
        for copy in &found.copies {
            let literals = usize::from(copy.literals);
            self.literals(&page[at..at + literals], writer);
            let length = self.lengths[(usize::from(copy.length) - 3) & 255];
            writer.add(length.bits.into(), length.count);
            let distance = usize::from(copy.distance);
            let symbol = distance_symbol(distance);
            let Word { bits, count } = self.words[DISTANCES + symbol];
            let extra = distance_extra(symbol);
            let following = (distance as u64 - 1) & ((1 << extra) - 1);
            writer.add(u64::from(bits) | following << count, count + extra);
            writer.flush();
            at += literals + usize::from(copy.length);
        }
        self.literals(&page[at..], writer);
        let Word { bits, count } = self.words[END];
        writer.add(bits.into(), count);
    }

    #[inline(always)]
    fn literals(&self, literals: &[u8], writer: &mut BitWriter) {
        let (groups, rest) = literals.as_chunks::<4>();
        for group in groups {
            for byte in group {
                let Word { bits, count } = self.words[usize::from(*byte)];
                writer.add(bits.into(), count);
            }
            writer.flush();
        }
        for byte in rest {
            let Word { bits, count } = self.words[usize::from(*byte)];
            writer.add(bits.into(), count);
        }
        writer.flush();
    }
}

/// Codes of these sizes in the format's order, the first bit lowest.
fn assign(sizes: &[u8], words: &mut [Word]) {
    let mut of_size = [0_u32; 17];
    for size in sizes.iter().filter(|size| **size > 0) {
        of_size[usize::from(*size)] += 1;
    }
    let mut next = [0_u32; 17];
    for size in 1..16 {
        next[size + 1] = (next[size] + of_size[size]) << 1;
    }
    for (word, size) in words.iter_mut().zip(sizes) {
        let count = u32::from(*size);
        if count > 0 {
            let next = &mut next[usize::from(*size)];
            word.bits = next.reverse_bits() >> (32 - count);
            word.count = count;
            *next += 1;
        }
    }
}

/// The sizes of a complete code for symbols that are so frequent. There are always two symbols at least: readers do not
/// agree about codes of one.
fn huffman(counts: &[u32], most: u8, sizes: &mut [u8]) {
    const ROOM: usize = LENGTH_SYMBOLS;
    // Weight and symbol in one number: that is what sorting takes least time for.
    const SYMBOL_BITS: u32 = 9;
    let mut order = [0_u64; ROOM];
    let mut used = 0;
    for (symbol, count) in counts.iter().enumerate() {
        order[used] = u64::from(*count) << SYMBOL_BITS | symbol as u64;
        used += usize::from(*count > 0);
    }
    for symbol in 0..2 {
        if used < 2 && counts[symbol as usize] == 0 {
            order[used] = 1 << SYMBOL_BITS | symbol;
            used += 1;
        }
    }
    let order = &mut order[..used];
    order.sort_unstable();
    let weight = |key: u64| (key >> SYMBOL_BITS) as u32;
    let symbol_of = |key: u64| (key & ((1 << SYMBOL_BITS) - 1)) as usize;
    // Two queues, of symbols and of nodes; both are in order of weight.
    let (mut weights, mut parents) = ([0_u32; ROOM], [0_u16; 2 * ROOM]);
    let (mut symbol, mut node) = (0, 0);
    for made in 0..used - 1 {
        for _ in 0..2 {
            let take_symbol = symbol < used && (node >= made || weight(order[symbol]) <= weights[node]);
            if take_symbol {
                weights[made] += weight(order[symbol]);
                parents[symbol] = made as u16;
                symbol += 1;
            } else {
                weights[made] += weights[node];
                parents[ROOM + node] = made as u16;
                node += 1;
            }
        }
    }
    // The last node is the root.
    let mut depths = [0_u8; ROOM];
    for node in (0..used.saturating_sub(2)).rev() {
        depths[node] = depths[usize::from(parents[ROOM + node])] + 1;
    }
    let most_shift = u32::from(most);
    let mut room = 1_i64 << most;
    for (index, key) in order.iter().enumerate() {
        let size = (depths[usize::from(parents[index])] + 1).min(most);
        sizes[symbol_of(*key)] = size;
        room -= 1 << (most_shift - u32::from(size));
    }
    // Cutting long codes short has taken room that rare symbols give back, and then is given out again.
    while room < 0 {
        for key in order.iter() {
            let size = &mut sizes[symbol_of(*key)];
            if *size < most && room < 0 {
                *size += 1;
                room += 1 << (most - *size);
            }
        }
    }
    while room > 0 {
        for key in order.iter().rev() {
            let size = &mut sizes[symbol_of(*key)];
            if *size > 1 && 1 << (most - *size) <= room {
                room -= 1 << (most - *size);
                *size -= 1;
            }
        }
    }
}

/// The head of a block with a code of its own: 286 and 24 sizes, as runs.
fn describe(sizes: &Histogram<u8>, writer: &mut BitWriter) {
    // Lengths' symbols behind the last one that is used need not be told, and distances' either.
    let last = |sizes: &[u8], least: usize| {
        sizes
            .iter()
            .rposition(|size| *size > 0)
            .map_or(least, |at| (at + 1).max(least))
    };
    let lengths = &sizes[..last(&sizes[..LENGTH_SYMBOLS], 257)];
    let distances = &sizes[DISTANCES..][..last(&sizes[DISTANCES..][..DISTANCE_SYMBOLS], 1)];
    let mut all = [0; LENGTH_SYMBOLS + DISTANCE_SYMBOLS];
    let count = lengths.len() + distances.len();
    all[..lengths.len()].copy_from_slice(lengths);
    all[lengths.len()..count].copy_from_slice(distances);
    // Symbol, and the bits that follow it.
    let mut runs = [(0_u8, 0_u8, 0_u32); LENGTH_SYMBOLS + DISTANCE_SYMBOLS];
    let (mut used, mut at) = (0, 0);
    let mut counts = [0_u32; 19];
    while at < count {
        let size = all[at];
        let same = all[at..count].iter().take_while(|other| **other == size).count();
        let repeats = at > 0 && all[at - 1] == size;
        let (run, length) = match (size, same) {
            (0, 11..) => ((18, same.min(138) as u8 - 11, 7), same.min(138)),
            (0, 3..) => ((17, same as u8 - 3, 3), same),
            (_, 3..) if repeats && size > 0 => ((16, same.min(6) as u8 - 3, 2), same.min(6)),
            _ => ((size, 0, 0), 1),
        };
        runs[used] = run;
        counts[usize::from(run.0)] += 1;
        used += 1;
        at += length;
    }
    let mut meta_sizes = [0; 19];
    huffman(&counts, MAX_META_BITS, &mut meta_sizes);
    let mut meta = [Word::default(); 19];
    assign(&meta_sizes, &mut meta);
    let told = META_ORDER
        .iter()
        .rposition(|symbol| meta_sizes[*symbol] > 0)
        .map_or(4, |at| (at + 1).max(4));
    // The last block, kind 2.
    writer.add(0b101, 3);
    writer.add(lengths.len() as u64 - 257, 5);
    writer.add(distances.len() as u64 - 1, 5);
    writer.add(told as u64 - 4, 4);
    for symbol in &META_ORDER[..told] {
        writer.flush();
        writer.add(meta_sizes[*symbol].into(), 3);
    }
    for (symbol, following, bits) in &runs[..used] {
        writer.flush();
        let word = meta[usize::from(*symbol)];
        writer.add(word.bits.into(), word.count);
        writer.add((*following).into(), *bits);
    }
}
