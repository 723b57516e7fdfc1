//! VMCOREINFO: the note in which a Linux kernel says where it lies and how its structures look. Readers of a dump need it.
//!
//! The guest may have said where the note is (fw_cfg). Otherwise it is searched for: since 4.13 it starts a page. Both are
//! a guest's word, so everything is bounded, and of several finds that one is taken which fits the rest of memory best: the
//! kernel that the note describes has the release there that the note names, and a vCPU's page tables lead to it. A kernel
//! that was started by another (kexec) leaves the note of its predecessor behind, which fails at that.
//!
//! All memory passes by anyway while it is dumped: a [`Search`] looks at it then, where what precedes memory in the dump can
//! be written last.

use crate::memory::GuestMemory;
use crate::paging::translate_as_kernel;
use crate::workers::{Chunks, FirstError, Task, Workers};
use ipc::memory::{PAGE_BYTES, RamRegion};
use ipc::paging::Paging;
use ipc::vcpu::VmCoreInfo;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The note's name, with its NUL.
pub const NAME: &[u8] = b"VMCOREINFO\0";
/// Three lengths.
const HEADER_BYTES: usize = 12;
/// Where the text starts: behind header and padded name.
const TEXT_OFFSET: usize = HEADER_BYTES + NAME.len().next_multiple_of(4);
/// Longest text that is taken, bytes. Linux has a page for it.
const MAX_TEXT_BYTES: usize = 64 << 10;
/// A guest full of notes is not searched for ever.
const MAX_FINDS: usize = 64;
/// Guest RAM is searched this much at a time, bytes.
const CHUNK_BYTES: u64 = 1 << 20;

/// Where x86-64 Linux maps its image (`__START_KERNEL_map`), before KASLR's phys_base.
pub const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// `struct new_utsname`: strings of 65 bytes; the third is the release.
const UTS_STRING_BYTES: usize = 65;
const UTS_RELEASE: usize = 2 * UTS_STRING_BYTES;

/// `struct new_utsname`: sysname, nodename, release, version, machine, domainname.
pub type Names = [[u8; UTS_STRING_BYTES]; 6];

/// A note as the guest has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Guest physical address of its header.
    pub address: u64,
    /// Its content: lines of `KEY=VALUE`.
    pub text: Vec<u8>,
}

/// How well a note fits the memory that it was found in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    /// It is a note.
    Plausible,
    /// The kernel's own name is where it says.
    Describes,
    /// And a vCPU runs on that kernel.
    Runs,
}

impl Note {
    /// The note at an address, of which at most `most` bytes are looked at; `None`: there is none.
    fn read(memory: &GuestMemory, address: u64, most: u64) -> io::Result<Option<Self>> {
        let Some(found) = memory.locate(address) else {
            return Ok(None);
        };
        let most = found.bytes.min(most).min((TEXT_OFFSET + MAX_TEXT_BYTES) as u64);
        let mut start = [0; TEXT_OFFSET];
        if most < start.len() as u64 {
            return Ok(None);
        }
        memory.read(found.offset, &mut start)?;
        let Some(text_bytes) = text_bytes(&start).filter(|bytes| (TEXT_OFFSET + bytes) as u64 <= most) else {
            return Ok(None);
        };
        let mut text = vec![0; text_bytes];
        memory.read(found.offset + TEXT_OFFSET as u64, &mut text)?;
        Ok(Some(Self { address, text }))
    }

    fn value(&self, key: &str) -> Option<&str> {
        let lines = self.text.split(|byte| *byte == b'\n');
        lines
            .filter_map(|line| str::from_utf8(line).ok()?.strip_prefix(key)?.strip_prefix('='))
            .next()
    }

    /// `KEY=NUMBER`, decimal and signed; as addresses are counted.
    pub fn number(&self, key: &str) -> Option<u64> {
        self.value(key)?.parse::<i64>().ok().map(i64::cast_unsigned)
    }

    /// The virtual address of a symbol.
    pub fn symbol(&self, name: &str) -> Option<u64> {
        u64::from_str_radix(self.value(&format!("SYMBOL({name})"))?, 16).ok()
    }

    /// The physical address behind a virtual one of the kernel's image.
    pub fn image_address(&self, address: u64) -> Option<u64> {
        let into = address.checked_sub(KERNEL_MAP)?;
        Some(into.wrapping_add(self.number("NUMBER(phys_base)")?))
    }

    fn fit(&self, memory: &GuestMemory, vcpus: &[Paging]) -> io::Result<Fit> {
        let Some((names, physical)) = self.names() else {
            return Ok(Fit::Plausible);
        };
        let mut bytes = [0; UTS_RELEASE + UTS_STRING_BYTES];
        match memory.locate(physical) {
            Some(found) if found.bytes >= bytes.len() as u64 => memory.read(found.offset, &mut bytes)?,
            _ => return Ok(Fit::Plausible),
        }
        let string = |at: usize| bytes[at..].split(|byte| *byte == 0).next().unwrap_or_default();
        let release = self.value("OSRELEASE").unwrap_or_default();
        if string(0) != b"Linux" || string(UTS_RELEASE) != release.as_bytes() {
            return Ok(Fit::Plausible);
        }
        for paging in vcpus {
            let mapped = translate_as_kernel(memory, paging, names)?;
            if mapped.is_some_and(|mapped| mapped.address == physical) {
                return Ok(Fit::Runs);
            }
        }
        Ok(Fit::Describes)
    }

    /// The kernel's names of itself, if they are where the note says.
    ///
    /// # Errors
    /// When guest RAM cannot be read.
    pub fn read_names(&self, memory: &GuestMemory) -> io::Result<Option<Names>> {
        let Some((_, physical)) = self.names() else {
            return Ok(None);
        };
        let mut names: Names = [[0; UTS_STRING_BYTES]; 6];
        let bytes = names.as_flattened_mut();
        match memory.locate(physical) {
            Some(found) if found.bytes >= bytes.len() as u64 => memory.read(found.offset, bytes)?,
            _ => return Ok(None),
        }
        // A guest's word: the reader of the dump takes them for strings.
        names.iter_mut().for_each(|name| name[UTS_STRING_BYTES - 1] = 0);
        Ok((names[0].starts_with(b"Linux\0")).then_some(names))
    }

    /// Virtual and physical address of the kernel's names of itself.
    fn names(&self) -> Option<(u64, u64)> {
        let names = self
            .symbol("init_uts_ns")?
            .checked_add(self.number("OFFSET(uts_namespace.name)")?)?;
        Some((names, self.image_address(names)?))
    }
}

/// How long the text is, when this is a note of that name and its first line.
fn text_bytes(start: &[u8]) -> Option<usize> {
    let word = |at: usize| Some(u32::from_le_bytes(start.get(at..at + 4)?.try_into().ok()?) as usize);
    let has_name = word(0)? == NAME.len() && start.get(HEADER_BYTES..)?.starts_with(NAME);
    let bytes = word(4)?;
    (has_name && word(8)? == 0 && (1..=MAX_TEXT_BYTES).contains(&bytes)).then_some(bytes)
}

/// The note where the guest `said` that it is.
///
/// # Errors
/// When guest RAM cannot be read.
pub fn said(memory: &GuestMemory, said: Option<VmCoreInfo>) -> io::Result<Option<Note>> {
    match said {
        Some(VmCoreInfo { address, bytes }) => Note::read(memory, address, bytes.into()),
        None => Ok(None),
    }
}

/// The note that the guest's kernel keeps, searched for in all memory.
///
/// # Errors
/// When guest RAM cannot be read.
pub fn find(memory: &Arc<GuestMemory>, vcpus: &[Paging], workers: &Workers) -> io::Result<Option<Note>> {
    let reading = Reading {
        chunks: Chunks::new(memory.pieces(None), CHUNK_BYTES),
        search: Search::new(vcpus),
        error: FirstError::default(),
    };
    let Reading { search, error, .. } = workers.run(reading, memory, &mut |_| {});
    error.check()?;
    Ok(search.finish())
}

/// All memory is read for nothing but the search. What the guest never touched is not looked at.
struct Reading {
    chunks: Chunks,
    search: Search,
    error: FirstError<io::Error>,
}

impl Task for Reading {
    fn work(&self, memory: &GuestMemory, _: &mut dyn FnMut(u64)) {
        let mut buffer = vec![0; CHUNK_BYTES as usize];
        while let Some((_, chunk)) = self.chunks.take().filter(|_| !self.search.is_over()) {
            if let Err(error) = self.read(memory, chunk, &mut buffer) {
                self.chunks.stop();
                self.error.set(error);
            }
        }
    }
}

impl Reading {
    fn read(&self, memory: &GuestMemory, chunk: RamRegion, buffer: &mut [u8]) -> io::Result<()> {
        let (mut into, end) = (0, chunk.bytes);
        while into < end {
            let extent = memory.extent(chunk.offset + into, chunk.offset + end)?;
            if extent.is_data {
                let data = &mut buffer[..extent.bytes as usize];
                memory.read(chunk.offset + into, data)?;
                self.search.look(memory, chunk.guest_address + into, data)?;
            }
            into += extent.bytes;
        }
        Ok(())
    }
}

/// A search for the page that starts like a note, in memory that somebody reads.
pub struct Search {
    vcpus: Vec<Paging>,
    /// In the order of addresses; those above the last one of many are not kept, whoever comes first.
    lowest: Mutex<Vec<(Fit, Note)>>,
    /// The note of the kernel that runs is there.
    over: AtomicBool,
}

impl Search {
    /// Nothing is found yet.
    pub fn new(vcpus: &[Paging]) -> Self {
        Self {
            vcpus: vcpus.to_vec(),
            lowest: Mutex::default(),
            over: AtomicBool::new(false),
        }
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Looks at the memory at a guest physical address, which is in the middle of no page.
    ///
    /// # Errors
    /// When guest RAM cannot be read.
    pub fn look(&self, memory: &GuestMemory, address: u64, data: &[u8]) -> io::Result<()> {
        if self.is_over() {
            return Ok(());
        }
        let pages = data
            .chunks(PAGE_BYTES as usize)
            .zip((address..).step_by(PAGE_BYTES as usize));
        for (_, address) in pages.filter(|(page, _)| text_bytes(page).is_some()) {
            self.judge(memory, address)?;
        }
        Ok(())
    }

    /// The best of what was found, when all memory has been looked at.
    pub fn finish(self) -> Option<Note> {
        let finds = self.lowest.into_inner().unwrap_or_else(PoisonError::into_inner);
        // Of equal ones that with the lowest address.
        let best = finds.into_iter().rev().max_by_key(|(fit, _)| *fit);
        best.map(|(_, note)| note)
    }

    /// Looks at a find, and ends the search when it is the one.
    fn judge(&self, memory: &GuestMemory, address: u64) -> io::Result<()> {
        let mut lowest = self.lowest.lock().unwrap_or_else(PoisonError::into_inner);
        let place = lowest.partition_point(|(_, lower)| lower.address < address);
        if place == MAX_FINDS {
            return Ok(());
        }
        let Some(note) = Note::read(memory, address, PAGE_BYTES)?.filter(|note| note.text.starts_with(b"OSRELEASE="))
        else {
            return Ok(());
        };
        let fit = note.fit(memory, &self.vcpus)?;
        lowest.insert(place, (fit, note));
        lowest.truncate(MAX_FINDS);
        if fit == Fit::Runs {
            self.over.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "vmcoreinfo_test.rs"]
mod tests;
