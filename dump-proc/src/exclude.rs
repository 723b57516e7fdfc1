//! Pages that a dump leaves out because of what the guest's kernel uses them for: as `makedumpfile -d` chooses. Of pages of
//! zeroes there is one copy anyway, which all of them share: that is what makedumpfile calls to leave them out as well.
//!
//! Linux has a `struct page` for each page of RAM, in sections; VMCOREINFO says where they are and how they look. All of that
//! is the guest's word, so nothing is believed: only what lies in RAM is read, each page is looked at once, and the work grows
//! with RAM and with nothing else. A guest that lies leaves out pages of its own.

use crate::memory::GuestMemory;
use crate::paging::translate_as_kernel;
use crate::vmcoreinfo::Note;
use ipc::dump::Exclude;
use ipc::memory::PAGE_BYTES;
use ipc::paging::Paging;
use std::io;
use std::ops::Range;

/// In the pointer of a section are flags; its own alignment is that of a `struct page` at least.
const SECTION_FLAGS: u64 = 0x3f;
/// The flag that says that a section has its `struct page`s.
const SECTION_HAS_PAGES: u64 = 1 << 1;
/// In `mapping`: anonymous memory.
const MAPPING_ANONYMOUS: u64 = 1;
/// In `compound_head`: a tail of what the rest of the word points to.
const IS_TAIL: u64 = 1;
/// Orders above are not believed: Linux has none.
const MAX_ORDER: u32 = 20;

/// Why nothing can be left out.
#[derive(Debug, thiserror::Error)]
pub enum ExcludeError {
    /// There is no note.
    #[error("dump: 'exclude' needs a Linux guest: this one has no VMCOREINFO")]
    NoNote,
    /// The note does not say enough.
    #[error("dump: 'exclude': the guest's VMCOREINFO does not say {0}")]
    Lacks(String),
    /// Its addresses lead nowhere.
    #[error("dump: 'exclude': the guest's memory map is not where its VMCOREINFO says")]
    NotThere,
    /// Guest RAM could not be read.
    #[error(transparent)]
    Read(#[from] io::Error),
}

/// Which pages of RAM a dump has, counted from the first of the memory fd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// A bit for each page; the lowest comes first.
    words: Vec<u64>,
    /// How many bits are set before each word.
    ranks: Vec<u64>,
}

impl Kept {
    /// All of so many pages.
    fn all(pages: u64) -> Self {
        let mut words = vec![u64::MAX; pages.div_ceil(64) as usize];
        if let (Some(last), rest @ 1..) = (words.last_mut(), pages % 64) {
            *last = (1 << rest) - 1;
        }
        Self {
            words,
            ranks: Vec::new(),
        }
    }

    fn remove(&mut self, page: u64) {
        if let Some(word) = self.words.get_mut((page / 64) as usize) {
            *word &= !(1 << (page % 64));
        }
    }

    /// Counts, when nothing changes any more.
    fn count(mut self) -> Self {
        let mut sum = 0;
        self.ranks = self
            .words
            .iter()
            .map(|word| {
                let before = sum;
                sum += u64::from(word.count_ones());
                before
            })
            .collect();
        self
    }

    /// Whether a page is in the dump.
    pub fn has(&self, page: u64) -> bool {
        let word = self.words.get((page / 64) as usize);
        word.is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// How many pages in the dump come before a page.
    pub fn rank(&self, page: u64) -> u64 {
        let at = (page / 64) as usize;
        match (self.words.get(at), self.ranks.get(at)) {
            (Some(word), Some(rank)) => rank + u64::from((word & ((1 << (page % 64)) - 1)).count_ones()),
            _ => self.pages(),
        }
    }

    /// How many there are.
    pub fn pages(&self) -> u64 {
        match (self.words.last(), self.ranks.last()) {
            (Some(word), Some(rank)) => rank + u64::from(word.count_ones()),
            _ => 0,
        }
    }
}

/// What VMCOREINFO says about `struct page` and where all of them are.
struct Shape {
    page_bytes: usize,
    flags: usize,
    refcount: usize,
    mapping: usize,
    mapcount: usize,
    private: usize,
    compound_head: usize,
    /// In the first tail; since 6.6 in the low byte of its flags.
    compound_order: usize,
    compound_dtor: Option<usize>,
    head_mask: u64,
    lru: u64,
    swap_cache: u64,
    swap_backed: u64,
    slab: u64,
    buddy: i64,
    offline: Option<i64>,
    hugetlb_dtor: Option<i64>,
    hugetlb: Option<i64>,
    roots: u64,
    root_count: u64,
    section_bytes: u64,
    section_map: u64,
    section_bits: u64,
}

impl Shape {
    fn of(note: &Note) -> Result<Self, ExcludeError> {
        let lacks = |key: &str| ExcludeError::Lacks(key.to_owned());
        let number = |key: &str| note.number(key).ok_or_else(|| lacks(key));
        let page_bytes = number("SIZE(page)")?;
        if !(32..=512).contains(&page_bytes) {
            return Err(lacks("a plausible SIZE(page)"));
        }
        // All that is read of a page is eight bytes at most.
        let offset = |name: &str| -> Result<usize, ExcludeError> {
            let key = format!("OFFSET(page.{name})");
            let offset = number(&key)?;
            if offset > page_bytes - 8 {
                return Err(lacks(&key));
            }
            Ok(offset as usize)
        };
        let flag = |name: &str| -> Option<u64> {
            let bit = note.number(&format!("NUMBER(PG_{name})"))?;
            (bit < 64).then(|| 1 << bit)
        };
        let value = |key: &str| note.number(key).map(u64::cast_signed);
        let lru = flag("lru").ok_or_else(|| lacks("NUMBER(PG_lru)"))?;
        let section_bits = number("NUMBER(SECTION_SIZE_BITS)")?;
        let section_bytes = number("SIZE(mem_section)")?;
        if !(21..=36).contains(&section_bits) || !(8..=256).contains(&section_bytes) {
            return Err(lacks("plausible sections"));
        }
        let flags = offset("flags")?;
        Ok(Self {
            page_bytes: page_bytes as usize,
            flags,
            refcount: offset("_refcount").or_else(|_| offset("_count"))?,
            mapping: offset("mapping")?,
            mapcount: offset("_mapcount")?,
            private: offset("private")?,
            compound_head: offset("compound_head")?,
            compound_order: offset("compound_order").unwrap_or(flags),
            compound_dtor: offset("compound_dtor").ok(),
            head_mask: note.number("NUMBER(PG_head_mask)").unwrap_or_default(),
            lru,
            swap_cache: flag("swapcache").unwrap_or_default(),
            swap_backed: flag("swapbacked").unwrap_or_default(),
            slab: flag("slab").unwrap_or_default(),
            buddy: value("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)").ok_or_else(|| lacks("PAGE_BUDDY_MAPCOUNT_VALUE"))?,
            offline: value("NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)"),
            hugetlb_dtor: value("NUMBER(HUGETLB_PAGE_DTOR)"),
            hugetlb: value("NUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)"),
            roots: note.symbol("mem_section").ok_or_else(|| lacks("SYMBOL(mem_section)"))?,
            root_count: number("LENGTH(mem_section)")?,
            section_bytes,
            section_map: number("OFFSET(mem_section.section_mem_map)")?.min(section_bytes - 8),
            section_bits,
        })
    }
}

/// A `struct page`, and the next one, in which the head of a compound page says more.
struct Frame<'a> {
    shape: &'a Shape,
    page: &'a [u8],
    next: Option<&'a [u8]>,
}

impl Frame<'_> {
    fn long(bytes: &[u8], at: usize) -> u64 {
        bytes[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word))
    }

    fn int(&self, at: usize) -> i64 {
        self.page[at..]
            .first_chunk()
            .map_or(0, |word| i32::from_le_bytes(*word).into())
    }

    /// How many pages it speaks for, if it is to be left out.
    fn excluded(&self, exclude: &Exclude) -> Option<u64> {
        let shape = self.shape;
        let flags = Self::long(self.page, shape.flags);
        let (mapping, mapcount) = (Self::long(self.page, shape.mapping), self.int(shape.mapcount));
        if Self::long(self.page, shape.compound_head) & IS_TAIL != 0 {
            return None;
        }
        let is_head = shape.head_mask != 0 && flags & shape.head_mask == shape.head_mask;
        let tail = self.next.filter(|_| is_head);
        let tail_byte = |at: usize| tail.and_then(|tail| tail.get(at)).copied().unwrap_or_default();
        let order = u32::from(tail_byte(shape.compound_order));
        let pages = if order < MAX_ORDER { 1 << order } else { 1 };
        let is_slab = flags & shape.slab != 0;
        if exclude.free && !is_slab && mapcount == shape.buddy && self.int(shape.refcount) == 0 {
            let order = Self::long(self.page, shape.private);
            return Some(if order < MAX_ORDER.into() { 1 << order } else { 1 });
        }
        if exclude.free && !is_slab && shape.offline == Some(mapcount) {
            return Some(1);
        }
        let is_anonymous = mapping & MAPPING_ANONYMOUS != 0 && !is_slab;
        let in_swap_cache = flags & shape.swap_cache != 0 && flags & shape.swap_backed != 0;
        let is_cache = flags & shape.lru != 0 || in_swap_cache;
        if exclude.cache && is_cache && !is_anonymous {
            return Some(pages);
        }
        let is_huge = match (shape.compound_dtor, shape.hugetlb_dtor) {
            (Some(at), Some(wanted)) => is_head && i64::from(tail_byte(at)) == wanted,
            // Since 6.6 it is a type of page.
            _ => shape.hugetlb == Some(mapcount),
        };
        (exclude.user && (is_anonymous || is_huge)).then_some(pages)
    }
}

/// Which pages stay. `note` is the kernel's, `vcpus` lead to its page tables.
///
/// # Errors
/// See [`ExcludeError`].
pub fn kept(
    memory: &GuestMemory,
    note: Option<&Note>,
    vcpus: &[Paging],
    exclude: &Exclude,
) -> Result<Kept, ExcludeError> {
    let pieces = memory.pieces(None);
    let mut kept = Kept::all(pieces.iter().map(|piece| piece.bytes / PAGE_BYTES).sum());
    let shape = Shape::of(note.ok_or(ExcludeError::NoNote)?)?;
    let walk = Walk {
        memory,
        vcpus,
        shape,
        exclude,
    };
    let mut found = false;
    for piece in &pieces {
        let frames = piece.guest_address / PAGE_BYTES..(piece.guest_address + piece.bytes) / PAGE_BYTES;
        found |= walk.frames(frames.clone(), |frame| {
            kept.remove(piece.offset / PAGE_BYTES + (frame - frames.start));
        })?;
    }
    if !found {
        return Err(ExcludeError::NotThere);
    }
    Ok(kept.count())
}

struct Walk<'a> {
    memory: &'a GuestMemory,
    vcpus: &'a [Paging],
    shape: Shape,
    exclude: &'a Exclude,
}

impl Walk<'_> {
    /// Calls back for each page frame of a range that is to be left out; whether there was a memory map at all.
    fn frames(&self, range: Range<u64>, mut each: impl FnMut(u64)) -> io::Result<bool> {
        let section_frames = 1_u64 << (self.shape.section_bits - 12);
        let mut found = false;
        // What an earlier page has spoken for.
        let mut until = range.start;
        let mut frame = range.start;
        while frame < range.end {
            let section = frame / section_frames;
            let end = range.end.min((section + 1) * section_frames);
            if let Some(map) = self.section(section)? {
                found |= self.section_frames(map, frame..end, range.end, &mut until, &mut each)?;
            }
            frame = end;
        }
        Ok(found)
    }

    /// Where the `struct page` of frame 0 would be, by what a section says.
    fn section(&self, section: u64) -> io::Result<Option<u64>> {
        let shape = &self.shape;
        let per_root = PAGE_BYTES / shape.section_bytes;
        let root = section / per_root;
        if root >= shape.root_count {
            return Ok(None);
        }
        let Some(root) = self.long(shape.roots.wrapping_add(root * 8))?.filter(|root| *root != 0) else {
            return Ok(None);
        };
        let at = root.wrapping_add(section % per_root * shape.section_bytes + shape.section_map);
        let map = self.long(at)?.filter(|map| map & SECTION_HAS_PAGES != 0);
        Ok(map.map(|map| map & !SECTION_FLAGS))
    }

    fn section_frames(
        &self,
        map: u64,
        frames: Range<u64>,
        last: u64,
        until: &mut u64,
        each: &mut impl FnMut(u64),
    ) -> io::Result<bool> {
        let size = self.shape.page_bytes as u64;
        let address = |frame: u64| map.wrapping_add(frame.wrapping_mul(size));
        let mut buffer = Vec::new();
        let mut found = false;
        let mut frame = frames.start;
        while frame < frames.end {
            // A page's worth of them; one more, for the last to look at its next.
            let count = (PAGE_BYTES / size).max(1).min(frames.end - frame);
            let more = u64::from(frame + count < frames.end);
            buffer.resize(((count + more) * size) as usize, 0);
            if self.read(address(frame), &mut buffer)? {
                found = true;
                let mut pages = buffer.chunks_exact(self.shape.page_bytes).peekable();
                for number in frame..frame + count {
                    let Some(page) = pages.next() else { break };
                    if number >= *until {
                        let next = pages.peek().copied();
                        let about = Frame {
                            shape: &self.shape,
                            page,
                            next,
                        };
                        if let Some(pages) = about.excluded(self.exclude) {
                            *until = number.saturating_add(pages).min(last);
                        }
                    }
                    if number < *until {
                        each(number);
                    }
                }
            }
            frame += count;
        }
        Ok(found)
    }

    fn long(&self, address: u64) -> io::Result<Option<u64>> {
        let mut word = [0; 8];
        Ok(self.read(address, &mut word)?.then(|| u64::from_le_bytes(word)))
    }

    /// Reads the kernel's memory; `false`: not all of it is there.
    fn read(&self, mut address: u64, mut buffer: &mut [u8]) -> io::Result<bool> {
        while !buffer.is_empty() {
            let mut mapped = None;
            for paging in self.vcpus {
                mapped = translate_as_kernel(self.memory, paging, address)?;
                if mapped.is_some() {
                    break;
                }
            }
            let Some((mapped, ram)) = mapped.and_then(|mapped| Some((mapped, self.memory.locate(mapped.address)?)))
            else {
                return Ok(false);
            };
            let bytes = (buffer.len() as u64).min(mapped.bytes).min(ram.bytes) as usize;
            let (now, rest) = buffer.split_at_mut(bytes);
            self.memory.read(ram.offset, now)?;
            buffer = rest;
            address = address.wrapping_add(bytes as u64);
        }
        Ok(true)
    }
}

#[cfg(test)]
#[path = "exclude_test.rs"]
mod tests;
