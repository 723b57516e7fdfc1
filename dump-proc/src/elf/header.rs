//! File header and program headers, and where everything lies in the file.

use crate::mapping::Mapping;
use ipc::memory::{PAGE_BYTES, RamRegion};
use zerocopy::{Immutable, IntoBytes};

const ET_CORE: u16 = 4;
/// Also for a guest that is not in long mode yet: readers take the wide registers as they are.
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// e_phnum when the number does not fit.
const PN_XNUM: u16 = 0xffff;
const SECTION_HEADER_BYTES: u64 = 64;
/// sh_info.
const SECTION_INFO: usize = 44;
/// Readable, writable, executable, as the kernel marks memory in /proc/vmcore.
const ALL_ACCESS: u32 = 7;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct FileHeader {
    ident: [u8; 16],
    kind: u16,
    machine: u16,
    version: u32,
    entry: u64,
    program_headers: u64,
    section_headers: u64,
    flags: u32,
    header_bytes: u16,
    program_header_bytes: u16,
    program_header_count: u16,
    section_header_bytes: u16,
    section_header_count: u16,
    section_names: u16,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ProgramHeader {
    kind: u32,
    flags: u32,
    offset: u64,
    virtual_address: u64,
    physical_address: u64,
    file_bytes: u64,
    memory_bytes: u64,
    alignment: u64,
}

const FILE_HEADER_BYTES: u64 = size_of::<FileHeader>() as u64;
const PROGRAM_HEADER_BYTES: u64 = size_of::<ProgramHeader>() as u64;
const _: () = assert!(FILE_HEADER_BYTES == 64 && PROGRAM_HEADER_BYTES == 56);

/// A piece of RAM and where its bytes lie in the dump.
#[derive(Debug, PartialEq, Eq)]
pub struct Load {
    /// The RAM.
    pub piece: RamRegion,
    /// Offset in the dump; in its page it is where the guest physical address is in its own.
    pub file_offset: u64,
}

/// Where everything lies in the dump.
pub struct Layout {
    notes_offset: u64,
    notes_bytes: u64,
    /// In ascending order of address and of offset.
    pub loads: Vec<Load>,
    segments: Vec<Mapping>,
}

impl Layout {
    /// The layout for these pieces of RAM and so many bytes of notes. The segments need not be one
    /// for a piece: each says at which virtual address a part of memory is, and several may say it of the same. Memory does
    /// not begin before `least_begin`.
    pub fn new(pieces: &[RamRegion], notes_bytes: u64, segments: Vec<Mapping>, least_begin: u64) -> Self {
        let headers = FILE_HEADER_BYTES + PROGRAM_HEADER_BYTES * (1 + segments.len() as u64);
        let notes_offset = match extended_count(&segments) {
            Some(_) => headers + SECTION_HEADER_BYTES,
            None => headers,
        };
        let mut end = (notes_offset + notes_bytes).max(least_begin);
        let loads = pieces
            .iter()
            .map(|piece| {
                let file_offset = end.next_multiple_of(PAGE_BYTES) + piece.guest_address % PAGE_BYTES;
                end = file_offset + piece.bytes;
                Load {
                    piece: *piece,
                    file_offset,
                }
            })
            .collect();
        Self {
            notes_offset,
            notes_bytes,
            loads,
            segments,
        }
    }

    /// Bytes of guest memory in the dump.
    pub fn memory_bytes(&self) -> u64 {
        self.loads.iter().map(|load| load.piece.bytes).sum()
    }

    /// Where memory begins, and headers and notes have ended. There is a piece, and so there are loads.
    pub fn memory_offset(&self) -> u64 {
        self.loads.first().map_or(0, |load| load.file_offset)
    }

    /// Where the dump ends.
    pub fn end(&self) -> u64 {
        self.loads.last().map_or(0, |load| load.file_offset + load.piece.bytes)
    }

    /// The headers' bytes: all that precedes the notes.
    pub fn encode(&self) -> Vec<u8> {
        let extended = extended_count(&self.segments);
        let count = 1 + self.segments.len() as u64;
        let file = FileHeader {
            // Magic, 64-bit, little endian, version 1, no OS ABI.
            ident: *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0",
            kind: ET_CORE,
            machine: EM_X86_64,
            version: 1,
            entry: 0,
            program_headers: FILE_HEADER_BYTES,
            section_headers: extended.map_or(0, |_| FILE_HEADER_BYTES + PROGRAM_HEADER_BYTES * count),
            flags: 0,
            header_bytes: FILE_HEADER_BYTES as u16,
            program_header_bytes: PROGRAM_HEADER_BYTES as u16,
            program_header_count: extended.map_or(count as u16, |_| PN_XNUM),
            section_header_bytes: extended.map_or(0, |_| SECTION_HEADER_BYTES as u16),
            section_header_count: extended.map_or(0, |_| 1),
            section_names: 0,
        };
        let note = ProgramHeader {
            kind: PT_NOTE,
            flags: 0,
            offset: self.notes_offset,
            virtual_address: 0,
            physical_address: 0,
            file_bytes: self.notes_bytes,
            memory_bytes: self.notes_bytes,
            alignment: 0,
        };
        let mut bytes = Vec::with_capacity(self.notes_offset as usize);
        bytes.extend_from_slice(file.as_bytes());
        bytes.extend_from_slice(note.as_bytes());
        for segment in &self.segments {
            let (offset, file_bytes) = self.place(segment);
            let load = ProgramHeader {
                kind: PT_LOAD,
                flags: ALL_ACCESS,
                offset,
                virtual_address: segment.virtual_address,
                physical_address: segment.guest_address,
                file_bytes,
                memory_bytes: segment.bytes,
                alignment: 0,
            };
            bytes.extend_from_slice(load.as_bytes());
        }
        if let Some(count) = extended {
            let mut section = [0; SECTION_HEADER_BYTES as usize];
            section[SECTION_INFO..SECTION_INFO + 4].copy_from_slice(&count.to_le_bytes());
            bytes.extend_from_slice(&section);
        }
        bytes
    }

    /// Where a segment's bytes are in the dump, and how many of them: none, at no offset, where it is no RAM.
    fn place(&self, segment: &Mapping) -> (u64, u64) {
        let inside = |load: &Load| {
            let into = segment.guest_address.checked_sub(load.piece.guest_address)?;
            let left = load.piece.bytes.checked_sub(into).filter(|left| *left > 0)?;
            Some((load.file_offset + into, left.min(segment.bytes)))
        };
        self.loads.iter().find_map(inside).unwrap_or((u64::MAX, 0))
    }
}

/// How many program headers there are, when that is more than the file header has room for: the first section header says
/// it then.
fn extended_count(segments: &[Mapping]) -> Option<u32> {
    let count = 1 + segments.len() as u32;
    (count >= u32::from(PN_XNUM)).then_some(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc::memory::ram_regions;

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn identity(pieces: &[RamRegion]) -> Vec<Mapping> {
        let same = |piece: &RamRegion| segment(piece.guest_address, piece.guest_address, piece.bytes);
        pieces.iter().map(same).collect()
    }

    fn segment(virtual_address: u64, guest_address: u64, bytes: u64) -> Mapping {
        Mapping {
            guest_address,
            virtual_address,
            bytes,
        }
    }

    #[test]
    fn program_headers_follow_the_file_header_and_notes_follow_them() {
        let pieces = ram_regions(4 << 30);
        let layout = Layout::new(&pieces, 100, identity(&pieces), 0);
        let bytes = layout.encode();
        assert_eq!(bytes.len(), 64 + 3 * 56);
        assert_eq!(u64_at(&bytes, 32), 64);
        assert_eq!(bytes[52..62], [64, 0, 56, 0, 3, 0, 0, 0, 0, 0]);
        assert_eq!(u64_at(&bytes, 64 + 8), 64 + 3 * 56);
        assert_eq!(u64_at(&bytes, 64 + 32), 100);
        assert_eq!(u64_at(&bytes, 64 + 2 * 56 + 24), 4 << 30);
    }

    #[test]
    fn memory_keeps_its_place_in_the_page() {
        let piece = |guest_address, bytes| RamRegion {
            guest_address,
            bytes,
            offset: 0,
        };
        let pieces = [piece(0x1fff, 1), piece(4 << 30, 9)];
        let layout = Layout::new(&pieces, 8000, identity(&pieces), 0);
        let offsets: Vec<u64> = layout.loads.iter().map(|load| load.file_offset).collect();
        assert_eq!(offsets, [0x2000 + 0x1000 + 0xfff, 0x4000]);
        assert_eq!(layout.memory_bytes(), 10);
    }

    #[test]
    fn segments_share_bytes_and_have_none_where_there_is_no_ram() {
        let pieces = ram_regions(4 << 30);
        let image = 0xffff_ffff_9a00_0000;
        let segments = vec![
            segment(0xffff_8880_0000_0000, 0, 3 << 30),
            segment(image, 0x1a00_0000, 0x20_0000),
            // Across the end of RAM; a device; behind everything.
            segment(0x1000, (3 << 30) - 4096, 8192),
            segment(0x8000, 0xfee0_0000, 4096),
            segment(0x9000, 1 << 50, 4096),
            segment(0xffff_8881_0000_0000, 4 << 30, 1 << 30),
        ];
        let layout = Layout::new(&pieces, 100, segments.clone(), 0);
        let bytes = layout.encode();
        assert_eq!((bytes[56], bytes.len()), (7, 64 + 7 * 56));
        let field = |number: usize, at: usize| u64_at(&bytes, 64 + (1 + number) * 56 + at);
        let ram = field(0, 8);
        for (number, (offset, file_bytes)) in [
            (ram, 3 << 30),
            (ram + 0x1a00_0000, 0x20_0000),
            (ram + (3 << 30) - 4096, 4096),
            (u64::MAX, 0),
            (u64::MAX, 0),
            (ram + (3 << 30), 1 << 30),
        ]
        .into_iter()
        .enumerate()
        {
            assert_eq!((field(number, 8), field(number, 32)), (offset, file_bytes), "{number}");
            let expected = &segments[number];
            assert_eq!(
                (field(number, 16), field(number, 24), field(number, 40)),
                (expected.virtual_address, expected.guest_address, expected.bytes)
            );
        }
    }

    #[test]
    fn a_section_header_counts_what_the_file_header_cannot() {
        let pieces = ram_regions(1 << 30);
        for (count, extended) in [(0xfffd, false), (0xfffe, true), (70_000, true)] {
            let layout = Layout::new(&pieces, 100, vec![segment(0, 0, 4096); count], 0);
            let bytes = layout.encode();
            let sections = 64 + 56 * (1 + count);
            assert_eq!(u64_at(&bytes, 64 + 8), bytes.len() as u64, "notes follow");
            if extended {
                assert_eq!(bytes[52..62], [64, 0, 56, 0, 0xff, 0xff, 64, 0, 1, 0]);
                assert_eq!(u64_at(&bytes, 40), sections as u64);
                let info = u32::from_le_bytes(bytes[sections + 44..][..4].try_into().unwrap());
                assert_eq!((info as usize, bytes.len()), (1 + count, sections + 64));
            } else {
                assert_eq!((u64_at(&bytes, 40), bytes.len()), (0, sections));
                assert_eq!(bytes[56..58], [0xfe, 0xff]);
            }
        }
    }
}
