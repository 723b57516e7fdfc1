//! A reader of memory dumps that shares nothing with the writer: from the formats' descriptions, it takes a dump apart, finds
//! fault with its layout, and compares every page with the memory that was dumped.
//!
//! - [`elf`]: ELF cores. [`kdump`]: kdump-compressed dumps, of which [`flattened`] streams are made plain first; [`lzo`] is
//!   one of their codecs.
//! - [`ram`]: guest RAM as the host has it.
//! - [`notes`]: what both forms say about processors and kernel.
//! - [`readers`]: other people's, of a Linux guest's dumps.

pub mod elf;
pub mod flattened;
pub mod kdump;
pub mod lzo;
pub mod notes;
pub mod ram;
pub mod readers;

use notes::Note;
use ram::GuestRam;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// A dump of either form.
pub enum Dump {
    /// An ELF core.
    Elf(elf::ElfDump),
    /// A kdump-compressed dump.
    Kdump(Box<kdump::KdumpDump>),
}

/// How the pages of a dump are stored.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// Zeroes; in a kdump all of them share one page.
    pub zero: u64,
    /// As they are.
    pub raw: u64,
    /// Compressed.
    pub compressed: u64,
    /// Not at all, though there is RAM.
    pub excluded: u64,
}

impl Dump {
    /// Takes a dump apart. A flattened one is made plain first.
    ///
    /// # Errors
    /// What is wrong with its layout.
    pub fn open(file: File) -> Result<Self, String> {
        let mut magic = [0; 16];
        file.read_exact_at(&mut magic, 0)
            .map_err(|error| format!("no header: {error}"))?;
        match &magic[..8] {
            b"makedump" => Ok(Self::Kdump(Box::new(kdump::KdumpDump::open(flattened::plain(file)?)?))),
            b"KDUMP   " => Ok(Self::Kdump(Box::new(kdump::KdumpDump::open(file)?))),
            b"\x7fELF\x02\x01\x01\0" => Ok(Self::Elf(elf::ElfDump::open(file)?)),
            other => Err(format!("no dump: {other:x?}")),
        }
    }

    /// What it says about processors and kernel, in the dump's order.
    pub fn notes(&self) -> &[Note] {
        match self {
            Self::Elf(dump) => &dump.notes,
            Self::Kdump(dump) => &dump.notes,
        }
    }

    /// Calls back for every page that is not all zeroes: guest physical address and content. Addresses ascend.
    ///
    /// # Errors
    /// What is wrong with a page.
    pub fn each_page(&self, mut each: impl FnMut(u64, &[u8; PAGE])) -> Result<(), String> {
        match self {
            Self::Elf(dump) => dump.each_page(&mut each),
            Self::Kdump(dump) => dump.each_page(&mut each),
        }
    }

    /// Compares all pages with all of guest RAM; says how they are stored.
    ///
    /// # Errors
    /// Where they differ, and what is missing or too much.
    pub fn compare(&self, ram: &GuestRam) -> Result<Pages, String> {
        match self {
            Self::Elf(dump) => dump.compare(ram),
            Self::Kdump(dump) => dump.compare(ram),
        }
    }
}

/// A little-endian number of up to eight bytes.
fn number(file: &File, at: u64, width: usize) -> Result<u64, String> {
    let mut word = [0; 8];
    file.read_exact_at(&mut word[..width], at)
        .map_err(|error| format!("reading {width} bytes at {at:#x}: {error}"))?;
    Ok(u64::from_le_bytes(word))
}

/// So many bytes from a place of the file.
fn bytes(file: &File, at: u64, count: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; count];
    file.read_exact_at(&mut bytes, at)
        .map_err(|error| format!("reading {count} bytes at {at:#x}: {error}"))?;
    Ok(bytes)
}

/// An error unless the condition holds.
fn demand(condition: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(what()) }
}
