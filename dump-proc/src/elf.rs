//! The plain ELF core: what `dump-guest-memory` writes when no other format is asked for.
//!
//! ```text
//! Ehdr | Phdr: PT_NOTE, PT_LOAD… | notes | ─ to a page border ─ | memory of the first PT_LOAD | … | of the next
//! ```
//!
//! With paging, the PT_LOADs are what the vCPUs' page tables map (see [`crate::mapping`]), in ascending order of physical
//! address; otherwise there is one per piece of RAM, in that order. p_vaddr is the kernel's address for it where a Linux guest's
//! VMCOREINFO and page tables tell it, and then there is a further PT_LOAD over the same bytes for the kernel's image; else
//! p_vaddr = p_paddr. Program headers start right after the file
//! header and e_ehsize is true, because makedumpfile relies on both. Memory starts on a page border, so that the
//! guest's pages are the file's pages and a hole of one is a hole of the other. A file is written by all workers at once, since
//! every page's place is known from the start; when the guest has not said where its note is, room is left for the head. The first byte of a file comes last: half a dump
//! that a machine leaves behind which was killed is taken for none.

mod header;
pub mod notes;
mod parallel;

use crate::exclude::ExcludeError;
use crate::kernel::{self, AddressMap};
use crate::mapping::{self, MappingError};
use crate::memory::GuestMemory;
use crate::output::Output;
use crate::vmcoreinfo::{self, Note, Search};
use crate::workers::Workers;
use header::Layout;
use ipc::Failure;
use ipc::dump::{DumpOutput, DumpRange};
use ipc::memory::PAGE_BYTES;
use ipc::paging::Paging;
use ipc::vcpu::{VcpuRegisters, VmCoreInfo};
use parallel::Copying;
use std::io;
use std::sync::Arc;

/// Guest RAM is read and written this much at a time, bytes: large enough that a system call's cost does not show, small
/// enough for the second-level cache.
const CHUNK_BYTES: u64 = 1 << 20;
/// A progress event for every so many bytes at least …
const PROGRESS_BYTES: u64 = 64 << 20;
/// … but about this many events at most.
const PROGRESS_EVENTS: u64 = 200;

/// By how much a note that is found later can lengthen the head, bytes: its text is less than a page, and the kernel's image
/// has a segment.
const LATE_ROOM: u64 = 2 * PAGE_BYTES;

/// Why there is no complete dump. The texts are those that clients of dump-guest-memory know.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The range lies outside RAM.
    #[error("dump: no guest memory to dump")]
    NoMemory,
    /// Header and notes could not be written.
    #[error("dump: failed to write elf header: {}", describe(.0))]
    Header(io::Error),
    /// Memory could not be written.
    #[error("dump: failed to save memory: {}", describe(.0))]
    Memory(io::Error),
    /// Guest RAM could not be read: not the output's fault.
    #[error("dump: failed to read guest memory: {}", describe(.0))]
    Read(io::Error),
    /// What is to be left out cannot be told.
    #[error(transparent)]
    Exclude(#[from] ExcludeError),
    /// What the page tables map is not written down.
    #[error(transparent)]
    Mapping(#[from] MappingError),
}

impl From<DumpError> for Failure {
    fn from(error: DumpError) -> Self {
        let errno = match &error {
            DumpError::NoMemory | DumpError::Mapping(_) | DumpError::Exclude(_) => None,
            DumpError::Header(error) | DumpError::Memory(error) | DumpError::Read(error) => error.raw_os_error(),
        };
        Self {
            message: error.to_string(),
            errno,
        }
    }
}

/// The system's words for the error without Rust's number behind them.
pub fn describe(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// Writes the dump and closes `output`; returns how many bytes of guest memory are in it. `progress` is told bytes of
/// guest memory done and in all.
///
/// # Errors
/// See [`DumpError`]. What was written stays.
pub fn write(
    memory: &Arc<GuestMemory>,
    registers: &[VcpuRegisters],
    vmcoreinfo: Option<VmCoreInfo>,
    (range, paging): (Option<DumpRange>, bool),
    output: DumpOutput,
    workers: &Workers,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64, DumpError> {
    let pieces = memory.pieces(range);
    if pieces.is_empty() {
        return Err(DumpError::NoMemory);
    }
    let vcpus: Vec<Paging> = registers.iter().map(Paging::from).collect();
    let mapped = match paging {
        true => {
            let mut found = mapping::mappings(memory, &vcpus)?;
            if let Some(range) = range {
                mapping::clip(&mut found, range);
            }
            Some(found)
        }
        false => None,
    };
    let said = vmcoreinfo::said(memory, vmcoreinfo).map_err(DumpError::Read)?;
    let output = Output::new(output).map_err(DumpError::Header)?.into_places();
    // In a file the head can be written last, and then all that is read may tell what is in it. What a live dump has read is
    // not the memory of one instant any more.
    let needs_search = said.is_none();
    let is_late = needs_search && range.is_none() && memory.live().is_none() && output.is_ok();
    let note = match said {
        None if !is_late => vmcoreinfo::find(memory, &vcpus, workers).map_err(DumpError::Read)?,
        note => note,
    };
    let describe = |note: Option<&Note>, least_begin: u64| -> Result<(Layout, Vec<u8>), DumpError> {
        let segments = match (&mapped, note) {
            (Some(mapped), _) => mapped.clone(),
            (None, Some(note)) => {
                let map = kernel::address_map(memory, note, registers).map_err(DumpError::Read)?;
                map.segments(&pieces)
            }
            (None, None) => AddressMap::default().segments(&pieces),
        };
        let notes = notes::encode(registers, note.map(|note| note.text.as_slice()));
        let layout = Layout::new(&pieces, notes.len() as u64, segments, least_begin);
        let mut head = layout.encode();
        head.extend_from_slice(&notes);
        Ok((layout, head))
    };
    // A dump looks the same whenever the note is found.
    let least_begin = match needs_search {
        true => describe(None, 0)?.1.len() as u64 + LATE_ROOM,
        false => 0,
    };
    let (layout, head) = describe(note.as_ref(), least_begin)?;
    let total = layout.memory_bytes();
    let mut meter = Meter::new(total, progress);
    match output {
        Ok(places) => {
            let begin = layout.memory_offset();
            let not_yet = [&[0], &head[1..]].concat();
            parallel::put_head(&places, &not_yet, begin).map_err(DumpError::Header)?;
            let search = is_late.then(|| Search::new(&vcpus));
            let copying = Copying::new(&layout.loads, places, search);
            let copied = workers.run(copying, memory, &mut |done| meter.set(done));
            let (places, found) = copied.finish()?;
            let head = match found {
                Some(note) => describe(Some(&note), begin)?.1,
                None => head,
            };
            parallel::put_head(&places, &head, begin).map_err(DumpError::Header)?;
            places.finish(layout.end()).map_err(DumpError::Memory)?;
            meter.set(total);
        }
        Err(output) => stream(memory, &layout, &head, output, &mut meter)?,
    }
    Ok(total)
}

/// Writes everything in order.
fn stream(
    memory: &GuestMemory,
    layout: &Layout,
    head: &[u8],
    mut output: Output,
    meter: &mut Meter<'_>,
) -> Result<(), DumpError> {
    output.put(head).map_err(DumpError::Header)?;
    let mut buffer = vec![0; CHUNK_BYTES as usize];
    for load in &layout.loads {
        output
            .put_zeros(load.file_offset - output.position())
            .map_err(DumpError::Header)?;
        let mut offset = load.piece.offset;
        let end = offset + load.piece.bytes;
        while offset < end {
            // To the next border of a chunk, so that all but the first and the last are whole.
            let near = end.min((offset / CHUNK_BYTES + 1) * CHUNK_BYTES);
            let extent = memory.extent(offset, near).map_err(DumpError::Read)?;
            if extent.is_data {
                let chunk = &mut buffer[..extent.bytes as usize];
                memory.read(offset, chunk).map_err(DumpError::Read)?;
                memory.release(offset, extent.bytes).map_err(DumpError::Read)?;
                output.put(chunk).map_err(DumpError::Memory)?;
            } else {
                memory.release(offset, extent.bytes).map_err(DumpError::Read)?;
                output.put_zeros(extent.bytes).map_err(DumpError::Memory)?;
            }
            meter.add(extent.bytes);
            offset += extent.bytes;
        }
    }
    output.finish().map_err(DumpError::Memory)
}

/// Turns bytes done into progress events. Counts bytes and not time: reading the clock may be a system call.
pub struct Meter<'a> {
    completed: u64,
    total: u64,
    next: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl<'a> Meter<'a> {
    /// Nothing is done yet.
    pub fn new(total: u64, progress: &'a mut dyn FnMut(u64, u64)) -> Self {
        progress(0, total);
        Self {
            completed: 0,
            total,
            next: 0,
            progress,
        }
    }

    fn add(&mut self, bytes: u64) {
        self.set(self.completed + bytes);
    }

    /// So many bytes are done.
    pub fn set(&mut self, completed: u64) {
        self.completed = self.completed.max(completed);
        if self.completed >= self.next || self.completed == self.total {
            (self.progress)(self.completed, self.total);
            self.next = self.completed + PROGRESS_BYTES.max(self.total / PROGRESS_EVENTS);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_carry_the_texts_that_clients_know() {
        let error = DumpError::Memory(io::Error::from_raw_os_error(libc::ENOSPC));
        let failure = Failure::from(error);
        assert_eq!(failure.message, "dump: failed to save memory: No space left on device");
        assert_eq!(failure.errno, Some(libc::ENOSPC));
    }

    #[test]
    fn progress_starts_at_nothing_ends_at_all_and_is_not_chatty() {
        let total = 1 << 40;
        let mut seen = Vec::new();
        let mut progress = |completed, of| {
            assert_eq!(of, total);
            seen.push(completed);
        };
        let mut meter = Meter::new(total, &mut progress);
        for _ in 0..total / CHUNK_BYTES {
            meter.add(CHUNK_BYTES);
        }
        assert_eq!((seen[0], seen[seen.len() - 1]), (0, total));
        assert!(
            seen.is_sorted() && seen.len() as u64 <= PROGRESS_EVENTS + 3,
            "{}",
            seen.len()
        );
    }
}
