//! File header and program headers, and where everything lies in the file.

use crate::kernel::{AddressMap, Image};
use ipc::memory::{PAGE_BYTES, RamRegion};
use zerocopy::{Immutable, IntoBytes};

const ET_CORE: u16 = 4;
/// Also for a guest that is not in long mode yet: readers take the wide registers as they are.
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
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
    /// Virtual minus physical address of RAM.
    ram_distance: u64,
    /// The kernel's image, where it is also, and where in the dump its bytes are.
    image: Option<(Image, u64)>,
}

impl Layout {
    /// The layout for these pieces of RAM (two at most, so their number fits any field) and so many bytes of notes. `map` says
    /// at which virtual addresses the guest's kernel has them; the image gets a segment of its own over the same bytes when
    /// it lies in one piece.
    pub fn new(pieces: &[RamRegion], notes_bytes: u64, map: AddressMap) -> Self {
        let inside = |image: &Image, piece: &RamRegion| {
            let into = image.guest_address.checked_sub(piece.guest_address)?;
            (into.checked_add(image.bytes)? <= piece.bytes).then_some(into)
        };
        let image = map.image.and_then(|image| {
            let place = |(index, piece)| Some((image, index, inside(&image, piece)?));
            pieces.iter().enumerate().find_map(place)
        });
        let segments = 1 + pieces.len() + usize::from(image.is_some());
        let notes_offset = FILE_HEADER_BYTES + PROGRAM_HEADER_BYTES * segments as u64;
        let mut end = notes_offset + notes_bytes;
        let loads: Vec<Load> = pieces
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
            image: image.map(|(image, piece, into)| (image, loads[piece].file_offset + into)),
            loads,
            ram_distance: map.ram_distance,
        }
    }

    /// Bytes of guest memory in the dump.
    pub fn memory_bytes(&self) -> u64 {
        self.loads.iter().map(|load| load.piece.bytes).sum()
    }

    /// The headers' bytes: all that precedes the notes.
    pub fn encode(&self) -> Vec<u8> {
        let file = FileHeader {
            // Magic, 64-bit, little endian, version 1, no OS ABI.
            ident: *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0",
            kind: ET_CORE,
            machine: EM_X86_64,
            version: 1,
            entry: 0,
            program_headers: FILE_HEADER_BYTES,
            section_headers: 0,
            flags: 0,
            header_bytes: FILE_HEADER_BYTES as u16,
            program_header_bytes: PROGRAM_HEADER_BYTES as u16,
            program_header_count: 1 + self.loads.len() as u16 + u16::from(self.image.is_some()),
            section_header_bytes: 0,
            section_header_count: 0,
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
        let mut load = |offset: u64, virtual_address: u64, physical_address: u64, length: u64| {
            let load = ProgramHeader {
                kind: PT_LOAD,
                flags: ALL_ACCESS,
                offset,
                virtual_address,
                physical_address,
                file_bytes: length,
                memory_bytes: length,
                alignment: 0,
            };
            bytes.extend_from_slice(load.as_bytes());
        };
        for Load { piece, file_offset } in &self.loads {
            let address = piece.guest_address;
            load(
                *file_offset,
                address.wrapping_add(self.ram_distance),
                address,
                piece.bytes,
            );
        }
        if let Some((image, offset)) = &self.image {
            load(*offset, image.virtual_address, image.guest_address, image.bytes);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc::memory::ram_regions;

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn program_headers_follow_the_file_header_and_notes_follow_them() {
        let layout = Layout::new(&ram_regions(4 << 30), 100, AddressMap::default());
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
        let layout = Layout::new(&[piece(0x1fff, 1), piece(4 << 30, 9)], 8000, AddressMap::default());
        let offsets: Vec<u64> = layout.loads.iter().map(|load| load.file_offset).collect();
        assert_eq!(offsets, [0x2000 + 0x1000 + 0xfff, 0x4000]);
        assert_eq!(layout.memory_bytes(), 10);
    }

    #[test]
    fn a_kernels_addresses_are_virtual_and_its_image_is_there_twice() {
        let image = Image {
            virtual_address: 0xffff_ffff_9a00_0000,
            guest_address: 0x1a00_0000,
            bytes: 0x20_0000,
        };
        let map = |image| AddressMap {
            ram_distance: 0xffff_8880_0000_0000,
            image: Some(image),
        };
        let layout = Layout::new(&ram_regions(4 << 30), 100, map(image));
        let bytes = layout.encode();
        assert_eq!((bytes[56], bytes.len()), (4, 64 + 4 * 56));
        let field = |segment: usize, at: usize| u64_at(&bytes, 64 + segment * 56 + at);
        assert_eq!((field(1, 16), field(1, 24)), (0xffff_8880_0000_0000, 0));
        assert_eq!((field(2, 16), field(2, 24)), (0xffff_8881_0000_0000, 4 << 30));
        assert_eq!((field(3, 16), field(3, 24)), (0xffff_ffff_9a00_0000, 0x1a00_0000));
        assert_eq!(field(3, 8), field(1, 8) + 0x1a00_0000);
        assert_eq!((field(3, 32), field(3, 40)), (0x20_0000, 0x20_0000));

        // An image that is not all there has no segment.
        for (guest_address, bytes) in [((3 << 30) - 4096, 8192), (u64::MAX, 2), (0, u64::MAX), (3 << 30, 1)] {
            let outside = Image {
                guest_address,
                bytes,
                ..image
            };
            assert!(Layout::new(&ram_regions(4 << 30), 100, map(outside)).image.is_none());
        }
    }
}
