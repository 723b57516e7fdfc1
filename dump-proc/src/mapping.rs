//! All that the vCPUs' page tables map: what a dump with `paging` describes.
//!
//! The guest writes the tables, and can have them lead in circles: 512 entries that name one table, at each of five levels,
//! are 2^45 pages. So only so many tables are looked at, and a guest with more has no such dump.

use crate::memory::GuestMemory;
use crate::paging::{Entry, Format};
use ipc::dump::DumpRange;
use ipc::memory::{PAGE_BYTES, RamRegion};
use ipc::paging::Paging;
use std::io;

/// The most tables that are looked at, over all vCPUs: those of 256 GiB in pages of 4 KiB, or about a second's work.
const MAX_TABLES: usize = 1 << 17;
/// The most segments of a dump: 56 MiB of headers.
const MAX_MAPPINGS: usize = 1 << 20;

/// A range of virtual addresses and the physical ones behind it. Whole pages; there need not be RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mapping {
    /// First physical address. It comes first, because mappings are sorted by it.
    pub guest_address: u64,
    /// First virtual address.
    pub virtual_address: u64,
    /// How much.
    pub bytes: u64,
}

/// Why there is no list.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// The tables go on and on.
    #[error("dump: the guest's page tables map too much in too small pieces: dump it without 'paging'")]
    TooLarge,
    /// Guest RAM could not be read.
    #[error(transparent)]
    Read(#[from] io::Error),
}

/// What the page tables of these vCPUs map, in ascending order of physical address. Without a vCPU that translates,
/// addresses are physical, and all RAM is there.
///
/// # Errors
/// See [`MappingError`].
pub fn mappings(memory: &GuestMemory, vcpus: &[Paging]) -> Result<Vec<Mapping>, MappingError> {
    let mut walk = Walk {
        memory,
        tables: 0,
        found: Vec::new(),
    };
    let mut roots: Vec<(u64, u64)> = Vec::new();
    for paging in vcpus {
        let Some(format) = Format::of(paging) else { continue };
        let root = format.root(paging.cr3);
        // Those that run the same process have the same.
        let key = (root, paging.cr4);
        if !roots.contains(&key) {
            roots.push(key);
            walk.table(&format, format.levels, root, 0)?;
        }
    }
    if roots.is_empty() {
        let identity = |region: RamRegion| Mapping {
            guest_address: region.guest_address,
            virtual_address: region.guest_address,
            bytes: region.bytes,
        };
        return Ok(memory.pieces(None).into_iter().map(identity).collect());
    }
    let mut found = walk.found;
    found.sort_unstable();
    // The kernel is in the tables of every process.
    found.dedup();
    Ok(found)
}

/// What of the mappings lies in a range of physical addresses.
pub fn clip(mappings: &mut Vec<Mapping>, range: DumpRange) {
    let end = range.begin.saturating_add(range.length);
    mappings.retain_mut(|mapping| {
        let first = mapping.guest_address.max(range.begin);
        let last = mapping.guest_address.saturating_add(mapping.bytes).min(end);
        if first >= last {
            return false;
        }
        mapping.virtual_address += first - mapping.guest_address;
        mapping.guest_address = first;
        mapping.bytes = last - first;
        true
    });
}

struct Walk<'a> {
    memory: &'a GuestMemory,
    tables: usize,
    found: Vec<Mapping>,
}

impl Walk<'_> {
    /// Takes in a table and what is below it. `bits` are those of the virtual address that led here. Never deeper than a
    /// format has levels.
    fn table(&mut self, format: &Format, level: u32, address: u64, bits: u64) -> Result<(), MappingError> {
        self.tables += 1;
        if self.tables > MAX_TABLES {
            return Err(MappingError::TooLarge);
        }
        let mut table = [0; PAGE_BYTES as usize];
        let entries = format.entries(level);
        let width = format.entry_bytes as usize;
        let table = &mut table[..entries as usize * width];
        match self.memory.locate(address) {
            Some(found) if found.bytes >= table.len() as u64 => self.memory.read(found.offset, table)?,
            _ => return Ok(()),
        }
        let shift = format.shift(level);
        for (index, raw) in (0..entries).zip(table.chunks_exact(width)) {
            let mut entry = [0; 8];
            entry[..width].copy_from_slice(raw);
            let bits = bits | index << shift;
            match format.entry(level, u64::from_le_bytes(entry)) {
                Entry::Absent => {}
                Entry::Table(next) => self.table(format, level - 1, next, bits)?,
                Entry::Page(base) => self.page(base, format.address(bits), 1 << shift)?,
            }
        }
        Ok(())
    }

    fn page(&mut self, guest_address: u64, virtual_address: u64, bytes: u64) -> Result<(), MappingError> {
        if let Some(last) = self.found.last_mut()
            && last.guest_address + last.bytes == guest_address
            && last.virtual_address.checked_add(last.bytes) == Some(virtual_address)
        {
            last.bytes += bytes;
            return Ok(());
        }
        if self.found.len() == MAX_MAPPINGS {
            return Err(MappingError::TooLarge);
        }
        self.found.push(Mapping {
            guest_address,
            virtual_address,
            bytes,
        });
        Ok(())
    }
}

#[cfg(test)]
#[path = "mapping_test.rs"]
mod tests;
