//! The blocks before the pages of a kdump-compressed dump (version 6 of the header, as makedumpfile defines it).
//!
//! ```text
//! header | sub-header, notes, VMCOREINFO's text inside them | bitmap of pages that exist | the same again |
//! descriptors, one for each page | the page of zeroes | pages, in any order
//! ```

use crate::codec::PAGE;
use crate::exclude::Kept;
use crate::vmcoreinfo::Names;
use ipc::memory::RamRegion;
use std::sync::Arc;
use zerocopy::{Immutable, IntoBytes};

const BLOCK: u64 = PAGE as u64;
const VERSION: u32 = 6;
/// Where the notes begin in the sub-header's block.
const NOTES_IN_SUB_HEADER: u64 = size_of::<SubHeader>() as u64;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    signature: [u8; 8],
    version: u32,
    /// sysname nodename release version machine domainname.
    names: [[u8; 65]; 6],
    padding: [u8; 6],
    time: [u64; 2],
    status: u32,
    block_bytes: u32,
    sub_header_blocks: u32,
    bitmap_blocks: u32,
    /// As far as 32 bits reach; the whole number is in the sub-header.
    page_frames: u32,
    total_ram_blocks: u32,
    device_blocks: u32,
    written_blocks: u32,
    current_cpu: u32,
    cpus: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct SubHeader {
    phys_base: u64,
    /// What is left out, in makedumpfile's bits; 0: nothing. What QEMU writes, 1, makes crash say that the dump is partial.
    dump_level: u32,
    is_split: u32,
    first_frame_32: u64,
    end_frame_32: u64,
    vmcoreinfo_offset: u64,
    vmcoreinfo_bytes: u64,
    notes_offset: u64,
    notes_bytes: u64,
    erase_info_offset: u64,
    erase_info_bytes: u64,
    first_frame: u64,
    end_frame: u64,
    page_frames: u64,
}

/// What describes a page.
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
pub struct Descriptor {
    /// Where its bytes are.
    pub offset: u64,
    /// How many.
    pub bytes: u32,
    /// The codec's bit; 0: as it is.
    pub flags: u32,
    /// Nothing yet.
    pub page_flags: u64,
}

/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: u64 = size_of::<Descriptor>() as u64;

const _: () = assert!(size_of::<Header>() == 464 && NOTES_IN_SUB_HEADER == 104 && DESCRIPTOR_BYTES == 24);

/// What a guest says about itself, as far as it goes into the headers.
#[derive(Default)]
pub struct About {
    /// Its names of itself.
    pub names: Option<Names>,
    /// Physical minus link address of its kernel.
    pub phys_base: u64,
    /// What is left out, in makedumpfile's bits.
    pub level: u32,
    /// Where the text of VMCOREINFO lies in the notes, and its length.
    pub vmcoreinfo: Option<(u64, u64)>,
}

/// Where everything lies.
#[derive(Debug, Clone)]
pub struct Layout {
    regions: Vec<RamRegion>,
    sub_header_blocks: u64,
    /// One more than the highest page frame.
    page_frames: u64,
    /// Bytes of one bitmap.
    bitmap_bytes: u64,
    /// Pages that are in the dump.
    pages: u64,
    /// Which of those that exist these are; `None`: all.
    kept: Option<Arc<Kept>>,
}

impl Layout {
    /// For RAM in ascending order, in whole pages, and so many bytes of notes.
    pub fn new(regions: Vec<RamRegion>, notes_bytes: u64, kept: Option<Arc<Kept>>) -> Self {
        let exist = regions.iter().map(|region| region.bytes / BLOCK).sum();
        let end = regions.last().map_or(0, |last| last.guest_address + last.bytes);
        let page_frames = end / BLOCK;
        Self {
            sub_header_blocks: (NOTES_IN_SUB_HEADER + notes_bytes).div_ceil(BLOCK),
            page_frames,
            bitmap_bytes: page_frames.div_ceil(8).next_multiple_of(BLOCK),
            pages: kept.as_ref().map_or(exist, |kept| kept.pages()),
            regions,
            kept,
        }
    }

    /// The pieces of RAM.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    fn bitmaps_offset(&self) -> u64 {
        (1 + self.sub_header_blocks) * BLOCK
    }

    /// Whether a page is in the dump, by its number among those that exist.
    pub fn has(&self, page: u64) -> bool {
        self.kept.as_ref().is_none_or(|kept| kept.has(page))
    }

    /// How many pages in the dump come before the page of this number among those that exist.
    pub fn rank(&self, page: u64) -> u64 {
        self.kept.as_ref().map_or(page, |kept| kept.rank(page))
    }

    /// Where the descriptor of the page of this number is, counted among those in the dump.
    pub fn descriptor_offset(&self, page: u64) -> u64 {
        self.bitmaps_offset() + 2 * self.bitmap_bytes + page * DESCRIPTOR_BYTES
    }

    /// Where the page is that stands for all pages of zeroes.
    pub fn zero_page_offset(&self) -> u64 {
        self.descriptor_offset(self.pages)
    }

    /// The header and the sub-header with the notes: all that precedes the bitmaps.
    pub fn encode(&self, status: u32, vcpus: u32, about: &About, notes: &[u8]) -> Vec<u8> {
        let header = Header {
            signature: *b"KDUMP   ",
            version: VERSION,
            names: about.names.unwrap_or([[0; 65]; 6]),
            padding: [0; 6],
            time: [0; 2],
            status,
            block_bytes: PAGE as u32,
            sub_header_blocks: self.sub_header_blocks as u32,
            bitmap_blocks: u32::try_from(2 * self.bitmap_bytes / BLOCK).unwrap_or(u32::MAX),
            page_frames: u32::try_from(self.page_frames).unwrap_or(u32::MAX),
            total_ram_blocks: 0,
            device_blocks: 0,
            written_blocks: 0,
            current_cpu: 0,
            cpus: vcpus,
        };
        let notes_offset = BLOCK + NOTES_IN_SUB_HEADER;
        let (text_offset, text_bytes) = match about.vmcoreinfo {
            Some((offset, bytes)) => (notes_offset + offset, bytes),
            None => (0, 0),
        };
        let sub_header = SubHeader {
            phys_base: about.phys_base,
            dump_level: about.level,
            is_split: 0,
            first_frame_32: 0,
            end_frame_32: 0,
            vmcoreinfo_offset: text_offset,
            vmcoreinfo_bytes: text_bytes,
            notes_offset,
            notes_bytes: notes.len() as u64,
            erase_info_offset: 0,
            erase_info_bytes: 0,
            first_frame: 0,
            end_frame: 0,
            page_frames: self.page_frames,
        };
        let mut bytes = header.as_bytes().to_vec();
        bytes.resize(PAGE, 0);
        bytes.extend_from_slice(sub_header.as_bytes());
        bytes.extend_from_slice(notes);
        bytes.resize(self.bitmaps_offset() as usize, 0);
        bytes
    }

    /// Calls back with the bitmaps piece by piece: offset and bytes. The first says which pages exist, the other which of them
    /// are in the dump.
    ///
    /// # Errors
    /// The caller's.
    pub fn bitmaps<E>(&self, mut put: impl FnMut(u64, &[u8]) -> Result<(), E>) -> Result<(), E> {
        const PIECE_BYTES: u64 = 1 << 20;
        let mut at = 0;
        while at < self.bitmap_bytes {
            let bytes = PIECE_BYTES.min(self.bitmap_bytes - at);
            let mut piece = vec![0; bytes as usize];
            for region in &self.regions {
                let first = region.guest_address / BLOCK;
                let end = first + region.bytes / BLOCK;
                let (piece_first, piece_end) = (at * 8, (at + bytes) * 8);
                set_bits(
                    &mut piece,
                    first.clamp(piece_first, piece_end) - piece_first,
                    end.clamp(piece_first, piece_end) - piece_first,
                );
            }
            put(self.bitmaps_offset() + at, &piece)?;
            if let Some(kept) = &self.kept {
                self.clear(at * 8, &mut piece, kept);
            }
            put(self.bitmaps_offset() + self.bitmap_bytes + at, &piece)?;
            at += bytes;
        }
        Ok(())
    }
}

impl Layout {
    /// Clears the bits of pages that are left out in a piece of the bitmap that begins with a frame.
    fn clear(&self, piece_first: u64, piece: &mut [u8], kept: &Kept) {
        let piece_end = piece_first + piece.len() as u64 * 8;
        for region in &self.regions {
            let first = region.guest_address / BLOCK;
            let end = first + region.bytes / BLOCK;
            for frame in first.max(piece_first)..end.min(piece_end) {
                if !kept.has(region.offset / BLOCK + (frame - first)) {
                    let bit = frame - piece_first;
                    piece[(bit / 8) as usize] &= !(1 << (bit % 8));
                }
            }
        }
    }
}

/// Sets the bits from `first` to before `end`; the lowest bit of a byte comes first.
fn set_bits(bytes: &mut [u8], first: u64, end: u64) {
    for bit in first..end.min(first.next_multiple_of(8)) {
        bytes[(bit / 8) as usize] |= 1 << (bit % 8);
    }
    let whole = first.next_multiple_of(8)..end / 8 * 8;
    if whole.start < whole.end {
        bytes[(whole.start / 8) as usize..(whole.end / 8) as usize].fill(0xff);
    }
    for bit in (end / 8 * 8).max(first)..end {
        bytes[(bit / 8) as usize] |= 1 << (bit % 8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc::memory::ram_regions;

    #[test]
    fn bits_are_set_from_the_lowest() {
        for (first, end) in [(0, 0), (0, 1), (3, 5), (3, 8), (8, 16), (7, 25), (1, 32), (30, 32)] {
            let mut bytes = [0; 4];
            set_bits(&mut bytes, first, end);
            let word = u32::from_le_bytes(bytes);
            let expected: u32 = (0..32)
                .filter(|bit| (first..end).contains(bit))
                .map(|bit| 1_u32 << bit)
                .sum();
            assert_eq!(word, expected, "{first}..{end}");
        }
    }

    #[test]
    fn the_bitmaps_have_a_bit_for_each_page_and_none_for_the_hole() {
        // The largest below the hole, and one page above it.
        let regions = ram_regions((3 << 30) + 4096);
        let layout = Layout::new(regions, 1000, None);
        let mut bitmaps = vec![0; 2 * layout.bitmap_bytes as usize];
        layout
            .bitmaps(|offset, bytes| {
                let at = (offset - layout.bitmaps_offset()) as usize;
                bitmaps[at..at + bytes.len()].copy_from_slice(bytes);
                Ok::<_, ()>(())
            })
            .unwrap();
        let (first, second) = bitmaps.split_at(layout.bitmap_bytes as usize);
        assert_eq!(first, second);
        let set: u64 = first.iter().map(|byte| u64::from(byte.count_ones())).sum();
        assert_eq!((set, layout.pages), (786_433, 786_433));
        assert_eq!(first[(3 << 30) / 4096 / 8], 0);
        assert_eq!(first[(4_usize << 30) / 4096 / 8], 1);
        assert_eq!(layout.page_frames, (4 << 30) / 4096 + 1);
    }

    #[test]
    fn everything_is_where_the_headers_say() {
        let layout = Layout::new(ram_regions(64 << 20), 5000, None);
        let about = About {
            names: None,
            phys_base: 0xffff_ffff_ff80_0000,
            level: 0,
            vmcoreinfo: Some((4000, 700)),
        };
        let bytes = layout.encode(2, 3, &about, &[7; 5000]);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert!(bytes.starts_with(b"KDUMP   \x06\0\0\0"));
        assert_eq!((word(424), word(428), word(432), word(436)), (2, 4096, 2, 2));
        assert_eq!((word(440), word(460)), (16384, 3));
        assert_eq!(long(4096), 0xffff_ffff_ff80_0000);
        assert_eq!((long(4096 + 32), long(4096 + 40)), (4200 + 4000, 700));
        assert_eq!((long(4096 + 48), long(4096 + 56)), (4200, 5000));
        assert_eq!(bytes[4200..9200], [7; 5000]);
        assert_eq!(bytes.len(), 3 * 4096);
        assert_eq!(layout.descriptor_offset(0), 5 * 4096);
        assert_eq!(layout.zero_page_offset(), 5 * 4096 + 16384 * 24);
    }
}
