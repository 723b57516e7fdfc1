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
struct Format {
    /// Bits of a virtual address that are used.
    address_bits: u32,
    levels: u32,
    /// Bits of the address that index a table, and bytes of an entry.
    index_bits: u32,
    entry_bytes: u32,
    /// The highest level, counted from 1, at which an entry may map a page itself.
    highest_large: u32,
    /// Whether the unused high bits repeat the highest used one; otherwise there are none.
    canonical: bool,
}

impl Format {
    fn of(paging: &Paging) -> Option<Self> {
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
            let shift = 64 - self.address_bits;
            ((address << shift).cast_signed() >> shift).cast_unsigned() == address
        } else {
            address >> self.address_bits == 0
        }
    }

    /// Where the top table is.
    fn root(&self, cr3: u64) -> u64 {
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
        let shift = 12 + (level - 1) * format.index_bits;
        let index = address >> shift & ((1 << format.index_bits) - 1);
        // PAE's top table has four entries: the 32 bits of an address cannot name more.
        let Some(entry) = entry(
            memory,
            table + index * u64::from(format.entry_bytes),
            format.entry_bytes,
        )?
        else {
            return Ok(None);
        };
        if entry & PRESENT == 0 {
            return Ok(None);
        }
        let is_page = level == 1 || entry & LARGE != 0 && level <= format.highest_large;
        if is_page {
            let page_bytes = 1_u64 << shift;
            let mut base = entry & ADDRESS & !(page_bytes - 1);
            if format.entry_bytes == 4 && level == 2 {
                // 4 MiB pages keep bits 32 to 39 of their address in bits 13 to 20.
                base = entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32;
            }
            let into = address & (page_bytes - 1);
            return Ok(Some(Mapped {
                address: base | into,
                bytes: page_bytes - into,
            }));
        }
        table = entry & ADDRESS;
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
