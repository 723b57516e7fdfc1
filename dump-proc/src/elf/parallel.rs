//! Writing memory to a file by all workers: where each chunk goes is known from the start.

use super::{DumpError, header::Load};
use crate::memory::GuestMemory;
use crate::output::Places;
use crate::vmcoreinfo::{Note, Search};
use crate::workers::{Chunks, FirstError, Task};
use ipc::memory::{PAGE_BYTES, RamRegion};
use std::io;

/// One read and one write, bytes: as much as the second-level cache has room for.
const CHUNK_BYTES: u64 = 1 << 20;

/// Memory on its way to a file.
pub struct Copying {
    chunks: Chunks,
    /// For each piece, what is to be added to its offset in the memory fd to get its offset in the dump.
    shifts: Vec<u64>,
    places: Places,
    /// Who looks for the guest's note meanwhile.
    search: Option<Search>,
    error: FirstError<DumpError>,
}

impl Copying {
    /// Nothing is written yet. Pieces of RAM and where they go.
    pub fn new(loads: &[Load], places: Places, search: Option<Search>) -> Self {
        let pieces = loads.iter().map(|load| load.piece).collect();
        let shift = |load: &Load| load.file_offset.wrapping_sub(load.piece.offset);
        Self {
            chunks: Chunks::new(pieces, CHUNK_BYTES),
            shifts: loads.iter().map(shift).collect(),
            places,
            search,
            error: FirstError::default(),
        }
    }

    /// When all workers have stopped: the file, and the guest's note.
    ///
    /// # Errors
    /// The first worker's.
    pub fn finish(self) -> Result<(Places, Option<Note>), DumpError> {
        self.error.check()?;
        Ok((self.places, self.search.and_then(Search::finish)))
    }

    fn copy(&self, memory: &GuestMemory, chunk: RamRegion, shift: u64, buffer: &mut [u8]) -> Result<(), DumpError> {
        let (mut offset, end) = (chunk.offset, chunk.offset + chunk.bytes);
        while offset < end {
            let extent = memory.extent(offset, end).map_err(DumpError::Read)?;
            if extent.is_data {
                let data = &mut buffer[..extent.bytes as usize];
                memory.read(offset, data).map_err(DumpError::Read)?;
                if let Some(search) = &self.search {
                    let address = chunk.guest_address + (offset - chunk.offset);
                    search.look(memory, address, data).map_err(DumpError::Read)?;
                }
                let place = offset.wrapping_add(shift);
                self.places.put(place, data).map_err(DumpError::Memory)?;
            }
            offset += extent.bytes;
        }
        memory.release(chunk.offset, chunk.bytes).map_err(DumpError::Read)
    }
}

impl Task for Copying {
    fn work(&self, memory: &GuestMemory, each: &mut dyn FnMut(u64)) {
        let mut room = vec![0; (CHUNK_BYTES + PAGE_BYTES) as usize];
        let buffer = aligned(&mut room);
        while let Some((piece, chunk)) = self.chunks.take() {
            if let Err(error) = self.copy(memory, chunk, self.shifts[piece], buffer) {
                self.chunks.stop();
                self.error.set(error);
                return;
            }
            each(self.chunks.add_done(chunk.bytes));
        }
    }
}

/// The part of a buffer that begins at a page border, as O_DIRECT wants it.
fn aligned(room: &mut [u8]) -> &mut [u8] {
    let skip = room.as_ptr().align_offset(PAGE_BYTES as usize).min(room.len());
    &mut room[skip..]
}

/// Writes what precedes memory, filled up to where that begins.
///
/// # Errors
/// The system's.
pub fn put_head(places: &Places, head: &[u8], end: u64) -> io::Result<()> {
    let mut room = vec![0; end as usize + PAGE_BYTES as usize];
    let whole = &mut aligned(&mut room)[..end as usize];
    whole[..head.len()].copy_from_slice(head);
    places.put(0, whole)
}
