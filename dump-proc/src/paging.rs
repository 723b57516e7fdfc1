//! Virtual addresses of a vCPU, by the page tables in guest RAM. The guest writes those as it likes, also while they are
//! read: a walk takes one table a level, never more than five, whatever the entries say, and an entry that points to where
//! no RAM is ends it.

use crate::memory::GuestMemory;
use ipc::paging::Paging;
use std::io;

const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

const PRESENT: u64 = 1;
/// In a table above the lowest: the entry maps a page itself.
const LARGE: u64 = 1 << 7;
/// Bits 12 to 51 of an entry: an address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// In CR3 of Linux with page table isolation: the table for user mode, which lacks most of the kernel.
const PTI_USER: u64 = 1 << 12;

/// Where a virtual address leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapped {
    /// Guest physical address. There need not be RAM.
    pub address: u64,
    /// How many bytes from there on belong to the same page.
    pub bytes: u64,
}

/// A format of page tables.
pub struct Format {
    /// Bits of a virtual address that are used.
    address_bits: u32,
    /// How many tables lead to a page.
    pub levels: u32,
    /// Bits of the address that index a table.
    index_bits: u32,
    /// Bytes of an entry.
    pub entry_bytes: u32,
    /// The highest level, counted from 1, at which an entry may map a page itself.
    highest_large: u32,
    /// Whether the unused high bits repeat the highest used one; otherwise there are none.
    canonical: bool,
}

/// What an entry of a table says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Nothing is mapped.
    Absent,
    /// The address of a page.
    Page(u64),
    /// The address of a table of the next lower level.
    Table(u64),
}

impl Format {
    /// The format of a vCPU; `None`: it does not translate.
    pub fn of(paging: &Paging) -> Option<Self> {
        let long = paging.efer & EFER_LMA != 0;
        if paging.cr0 & CR0_PG == 0 {
            return None;
        }
        Some(if long {
            let levels = if paging.cr4 & CR4_LA57 != 0 { 5 } else { 4 };
            Self {
                address_bits: 12 + 9 * levels,
                levels,
                index_bits: 9,
                entry_bytes: 8,
                highest_large: 3,
                canonical: true,
            }
        } else if paging.cr4 & CR4_PAE != 0 {
            Self {
                address_bits: 32,
                levels: 3,
                index_bits: 9,
                entry_bytes: 8,
                highest_large: 2,
                canonical: false,
            }
        } else {
            Self {
                address_bits: 32,
                levels: 2,
                index_bits: 10,
                entry_bytes: 4,
                highest_large: if paging.cr4 & CR4_PSE != 0 { 2 } else { 1 },
                canonical: false,
            }
        })
    }

    /// Whether the processor would take the address at all.
    fn has(&self, address: u64) -> bool {
        if self.canonical {
            self.address(address) == address
        } else {
            address >> self.address_bits == 0
        }
    }

    /// How many entries the table of a level has. PAE's top table has four: the 32 bits of an address cannot name more.
    pub fn entries(&self, level: u32) -> u64 {
        1 << self.index_bits.min(self.address_bits - self.shift(level))
    }

    /// How many bytes an entry of a level maps, as a power of two.
    pub fn shift(&self, level: u32) -> u32 {
        12 + (level - 1) * self.index_bits
    }

    /// The virtual address with these used bits.
    pub fn address(&self, bits: u64) -> u64 {
        if self.canonical {
            let shift = 64 - self.address_bits;
            ((bits << shift).cast_signed() >> shift).cast_unsigned()
        } else {
            bits
        }
    }

    /// Reads an entry of a level.
    pub fn entry(&self, level: u32, entry: u64) -> Entry {
        if entry & PRESENT == 0 {
            return Entry::Absent;
        }
        if level > 1 && (entry & LARGE == 0 || level > self.highest_large) {
            return Entry::Table(entry & ADDRESS);
        }
        if self.entry_bytes == 4 && level == 2 {
            // 4 MiB pages keep bits 32 to 39 of their address in bits 13 to 20.
            return Entry::Page(entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32);
        }
        Entry::Page(entry & ADDRESS & !((1 << self.shift(level)) - 1))
    }

    /// Where the top table is.
    pub fn root(&self, cr3: u64) -> u64 {
        match (self.levels, self.entry_bytes) {
            // Four entries, anywhere on a 32-byte border.
            (3, _) => cr3 & 0xffff_ffe0,
            (_, 4) => cr3 & 0xffff_f000,
            _ => cr3 & ADDRESS,
        }
    }
}

/// Translates an address; `None`: nothing is mapped there, or the tables lead to where no RAM is.
///
/// # Errors
/// When guest RAM cannot be read.
pub fn translate(memory: &GuestMemory, paging: &Paging, address: u64) -> io::Result<Option<Mapped>> {
    let Some(format) = Format::of(paging) else {
        // Without paging addresses have 32 bits.
        return Ok((address >> 32 == 0).then(|| Mapped {
            address,
            bytes: (1 << 32) - address,
        }));
    };
    if !format.has(address) {
        return Ok(None);
    }
    let mut table = format.root(paging.cr3);
    for level in (1..=format.levels).rev() {
        let shift = format.shift(level);
        let index = address >> shift & (format.entries(level) - 1);
        let at = table + index * u64::from(format.entry_bytes);
        let Some(entry) = entry(memory, at, format.entry_bytes)? else {
            return Ok(None);
        };
        match format.entry(level, entry) {
            Entry::Absent => return Ok(None),
            Entry::Table(next) => table = next,
            Entry::Page(base) => {
                let page_bytes = 1_u64 << shift;
                let into = address & (page_bytes - 1);
                return Ok(Some(Mapped {
                    address: base | into,
                    bytes: page_bytes - into,
                }));
            }
        }
    }
    Ok(None)
}

/// As [`translate`], also where the kernel has hidden itself from user mode (page table isolation): then its own top table is
/// the page before the vCPU's.
///
/// # Errors
/// When guest RAM cannot be read.
pub fn translate_as_kernel(memory: &GuestMemory, paging: &Paging, address: u64) -> io::Result<Option<Mapped>> {
    if let Some(mapped) = translate(memory, paging, address)? {
        return Ok(Some(mapped));
    }
    if paging.efer & EFER_LMA == 0 || paging.cr3 & PTI_USER == 0 {
        return Ok(None);
    }
    let kernel = Paging {
        cr3: paging.cr3 & !PTI_USER,
        ..*paging
    };
    translate(memory, &kernel, address)
}

/// One entry; `None`: it does not lie in RAM.
fn entry(memory: &GuestMemory, address: u64, bytes: u32) -> io::Result<Option<u64>> {
    let mut entry = [0; 8];
    let wanted = &mut entry[..bytes as usize];
    match memory.locate(address) {
        Some(found) if found.bytes >= u64::from(bytes) => memory.read(found.offset, wanted)?,
        _ => return Ok(None),
    }
    Ok(Some(u64::from_le_bytes(entry)))
}

#[cfg(test)]
#[path = "paging_test.rs"]
mod tests;
