//! ELF cores.

use super::notes::{self, Note};
use super::ram::{GuestRam, is_hole};
use super::{PAGE, Pages, bytes, demand, number};
use std::fs::File;
use std::os::unix::fs::FileExt;

const FILE_HEADER_BYTES: u64 = 64;
const PROGRAM_HEADER_BYTES: u64 = 56;
const PN_XNUM: u64 = 0xffff;
/// How much is compared at once, bytes.
const STEP: u64 = 1 << 20;

/// A PT_LOAD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// p_offset.
    pub offset: u64,
    /// p_vaddr.
    pub virtual_address: u64,
    /// p_paddr.
    pub guest_address: u64,
    /// p_filesz.
    pub file_bytes: u64,
    /// p_memsz.
    pub memory_bytes: u64,
}

/// An ELF core.
pub struct ElfDump {
    file: File,
    /// All of them.
    pub loads: Vec<Load>,
    /// All of them.
    pub notes: Vec<Note>,
}

impl ElfDump {
    pub(super) fn open(file: File) -> Result<Self, String> {
        let short = |at| number(&file, at, 2);
        demand(short(16)? == 4, || "not a core".into())?;
        demand(short(18)? == 62, || "not for x86-64".into())?;
        demand(number(&file, 20, 4)? == 1, || "e_version".into())?;
        // makedumpfile takes these for granted.
        demand(number(&file, 32, 8)? == FILE_HEADER_BYTES, || "e_phoff".into())?;
        demand(short(52)? == FILE_HEADER_BYTES, || "e_ehsize".into())?;
        demand(short(54)? == PROGRAM_HEADER_BYTES, || "e_phentsize".into())?;
        let mut count = short(56)?;
        let mut headers_end = FILE_HEADER_BYTES + count * PROGRAM_HEADER_BYTES;
        if count == PN_XNUM {
            let section = number(&file, 40, 8)?;
            demand(short(58)? == 64 && short(60)? == 1, || "e_shentsize, e_shnum".into())?;
            count = number(&file, section + 44, 4)?;
            demand(count >= PN_XNUM, || format!("sh_info {count} would fit into e_phnum"))?;
            demand(section == FILE_HEADER_BYTES + count * PROGRAM_HEADER_BYTES, || {
                "e_shoff".into()
            })?;
            headers_end = section + 64;
        } else {
            demand(number(&file, 40, 8)? == 0 && short(60)? == 0, || {
                "sections without need".into()
            })?;
        }
        let table = bytes(&file, FILE_HEADER_BYTES, (count * PROGRAM_HEADER_BYTES) as usize)?;
        let mut headers = table.chunks_exact(PROGRAM_HEADER_BYTES as usize);
        let field = |header: &[u8], at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
        let kind = |header: &[u8]| u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
        let first = headers.next().filter(|header| kind(header) == 4);
        let first = first.ok_or("the first program header is not that of the notes")?;
        let (notes_offset, notes_bytes) = (field(first, 8), field(first, 32));
        demand(notes_offset == headers_end, || format!("notes at {notes_offset:#x}"))?;
        demand(field(first, 40) == notes_bytes, || "p_memsz of the notes".into())?;
        let mut loads = Vec::new();
        for header in headers {
            demand(kind(header) == 1, || "neither notes nor memory".into())?;
            let load = Load {
                offset: field(header, 8),
                virtual_address: field(header, 16),
                guest_address: field(header, 24),
                file_bytes: field(header, 32),
                memory_bytes: field(header, 40),
            };
            // Also that of a page: the file's pages are the guest's.
            let in_page = |at: u64| at % PAGE as u64;
            let has_bytes = load.offset >= notes_offset + notes_bytes
                && in_page(load.offset) == in_page(load.guest_address)
                && (1..=load.memory_bytes).contains(&load.file_bytes);
            let has_none = (load.offset, load.file_bytes) == (u64::MAX, 0);
            demand(has_bytes || has_none, || format!("{load:x?}"))?;
            loads.push(load);
        }
        let notes = notes::parse(&bytes(&file, notes_offset, notes_bytes as usize)?)?;
        Ok(Self { file, loads, notes })
    }

    pub(super) fn compare(&self, ram: &GuestRam) -> Result<Pages, String> {
        self.compare_pieces(ram, &ram.pieces())
    }

    /// Compares what lies in these pieces of RAM, which are all that there may be.
    ///
    /// # Errors
    /// Where they differ, and what is missing or too much.
    pub fn compare_pieces(&self, ram: &GuestRam, pieces: &[(u64, u64)]) -> Result<Pages, String> {
        let mut covered: Vec<(u64, u64)> = Vec::new();
        let mut pages = Pages::default();
        let mut parts: Vec<Load> = self.loads.iter().filter(|load| load.file_bytes > 0).copied().collect();
        parts.sort_by_key(|load| (load.guest_address, load.offset));
        for load in parts {
            let end = load.guest_address + load.file_bytes;
            match covered.last_mut() {
                Some((begin, bytes)) if *begin + *bytes >= load.guest_address => {
                    // Aliases name the same bytes of the file.
                    let before = *begin + *bytes;
                    *bytes = (*bytes).max(end - *begin);
                    self.compare_bytes(ram, &load, load.guest_address.max(before).min(end), &mut pages)?;
                    let alias = before.min(end) - load.guest_address;
                    let same = |other: &&Load| {
                        other.guest_address <= load.guest_address
                            && other.guest_address + other.file_bytes >= load.guest_address + alias
                            && load.offset.wrapping_sub(other.offset) == load.guest_address - other.guest_address
                    };
                    demand(alias == 0 || self.loads.iter().filter(same).count() > 1, || {
                        format!("{load:x?} has bytes of its own that are there already")
                    })?;
                }
                _ => {
                    covered.push((load.guest_address, load.file_bytes));
                    self.compare_bytes(ram, &load, load.guest_address, &mut pages)?;
                }
            }
        }
        demand(covered == pieces, || {
            format!("covered {covered:x?}, expected {pieces:x?}")
        })?;
        Ok(pages)
    }

    pub(super) fn each_page(&self, each: &mut dyn FnMut(u64, &[u8; PAGE])) -> Result<(), String> {
        let mut buffer = vec![0; STEP as usize];
        let mut next = 0;
        for load in &self.loads {
            // Aliases have nothing of their own.
            if load.guest_address < next || load.file_bytes == 0 {
                continue;
            }
            next = load.guest_address + load.file_bytes;
            for at in (0..load.file_bytes).step_by(STEP as usize) {
                let step = STEP.min(load.file_bytes - at);
                if is_hole(&self.file, load.offset + at, step) {
                    continue;
                }
                let bytes = &mut buffer[..step as usize];
                let read = self.file.read_exact_at(bytes, load.offset + at);
                read.map_err(|error| format!("reading the dump at {:#x}: {error}", load.offset + at))?;
                for (address, page) in (load.guest_address + at..)
                    .step_by(PAGE)
                    .zip(bytes.as_chunks::<PAGE>().0)
                {
                    if page.iter().any(|byte| *byte != 0) {
                        each(address, page);
                    }
                }
            }
        }
        Ok(())
    }

    /// Compares a segment from an address on.
    fn compare_bytes(&self, ram: &GuestRam, load: &Load, from: u64, pages: &mut Pages) -> Result<(), String> {
        let (mut got, mut wanted) = (vec![0; STEP as usize], vec![0; STEP as usize]);
        let (mut at, end) = (from, load.guest_address + load.file_bytes);
        while at < end {
            let step = STEP.min(end - at);
            let offset = load.offset + (at - load.guest_address);
            if is_hole(&self.file, offset, step) && ram.is_hole(at, step) {
                pages.zero += step.div_ceil(PAGE as u64);
                at += step;
                continue;
            }
            let (got, wanted) = (&mut got[..step as usize], &mut wanted[..step as usize]);
            let read = self.file.read_exact_at(got, offset);
            read.map_err(|error| format!("reading the dump at {offset:#x}: {error}"))?;
            ram.read(at, wanted);
            if got != wanted {
                let byte = got.iter().zip(&*wanted).position(|(got, wanted)| got != wanted);
                return Err(format!("differs at {:#x}", at + byte.unwrap_or_default() as u64));
            }
            for page in got.chunks(PAGE) {
                if page.iter().all(|byte| *byte == 0) {
                    pages.zero += 1;
                } else {
                    pages.raw += 1;
                }
            }
            at += step;
        }
        Ok(())
    }
}
