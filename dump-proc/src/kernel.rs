//! Where a Linux guest has its memory in virtual address space, so that the dump's segments say it and debuggers that know
//! nothing of page tables read by the kernel's addresses.
//!
//! All of RAM is mapped at one distance (`page_offset_base`), which KASLR chooses. No note tells it, but a vCPU's GS base
//! points to per-CPU data, which lies there: its page tables say where. The image has a mapping of its own.

use crate::mapping::Mapping;
use crate::memory::GuestMemory;
use crate::paging::translate_as_kernel;
use crate::vmcoreinfo::{KERNEL_MAP, Note};
use ipc::memory::RamRegion;
use ipc::paging::Paging;
use ipc::vcpu::VcpuRegisters;
use std::io;

/// KASLR moves the mapping of RAM by so much, bytes.
const MAP_ALIGNMENT: u64 = 1 << 30;
/// Half of the addresses are the kernel's.
const KERNEL_HALF: u64 = 1 << 63;
/// The image's mapping is followed for so many pages of any size: hostile tables have no end.
const MAX_IMAGE_PAGES: usize = 1 << 14;
/// The image's share of the address space (`KERNEL_IMAGE_SIZE`, with KASLR).
const MAX_IMAGE_BYTES: u64 = 1 << 30;

/// Where a kernel has its memory, as far as that could be found out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AddressMap {
    /// Virtual minus physical address of all RAM; 0 when it is not known.
    pub ram_distance: u64,
    /// The kernel's own text and data.
    pub image: Option<Mapping>,
}

impl AddressMap {
    /// A segment for each piece of RAM, and one more over the same bytes for the image, when it lies in one piece.
    pub fn segments(&self, pieces: &[RamRegion]) -> Vec<Mapping> {
        let segment = |piece: &RamRegion| Mapping {
            guest_address: piece.guest_address,
            virtual_address: piece.guest_address.wrapping_add(self.ram_distance),
            bytes: piece.bytes,
        };
        let is_whole = |image: &Mapping| {
            let inside = |piece: &RamRegion| {
                let into = image.guest_address.checked_sub(piece.guest_address);
                let end = into.and_then(|into| into.checked_add(image.bytes));
                end.is_some_and(|end| end <= piece.bytes)
            };
            pieces.iter().any(inside)
        };
        pieces.iter().map(segment).chain(self.image.filter(is_whole)).collect()
    }
}

/// Finds out. The note names the kernel; the vCPUs' page tables must agree with it.
///
/// # Errors
/// When guest RAM cannot be read.
pub fn address_map(memory: &GuestMemory, note: &Note, vcpus: &[VcpuRegisters]) -> io::Result<AddressMap> {
    let mut map = AddressMap::default();
    for registers in vcpus {
        let paging = Paging::from(registers);
        if map.ram_distance == 0 {
            map.ram_distance = ram_distance(memory, note, &paging, registers)?.unwrap_or_default();
        }
        if map.image.is_none() {
            map.image = image(memory, note, &paging)?;
        }
    }
    Ok(map)
}

/// Physical minus link address of the kernel, by the registers alone: where a vCPU's interrupt table leads. The last resort, of a
/// guest without a note; a vCPU that is not in Linux yet has none.
///
/// # Errors
/// When guest RAM cannot be read.
pub fn phys_base(memory: &GuestMemory, vcpus: &[VcpuRegisters]) -> io::Result<Option<u64>> {
    for registers in vcpus {
        let paging = Paging::from(registers);
        let Some(gate) = translate_as_kernel(memory, &paging, registers.idt.base)? else {
            continue;
        };
        let mut bytes = [0; 16];
        match memory.locate(gate.address) {
            Some(ram) if ram.bytes.min(gate.bytes) >= bytes.len() as u64 => memory.read(ram.offset, &mut bytes)?,
            _ => continue,
        }
        // The address of vector 0's handler, in three pieces.
        let [low, high] = [0, 6].map(|at| u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]])));
        let top = u64::from(u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]));
        let handler = top << 32 | high << 16 | low;
        if !(KERNEL_MAP..KERNEL_MAP + MAX_IMAGE_BYTES).contains(&handler) {
            continue;
        }
        if let Some(mapped) = translate_as_kernel(memory, &paging, handler)? {
            return Ok(Some(mapped.address.wrapping_sub(handler - KERNEL_MAP)));
        }
    }
    Ok(None)
}

fn ram_distance(
    memory: &GuestMemory,
    note: &Note,
    paging: &Paging,
    registers: &VcpuRegisters,
) -> io::Result<Option<u64>> {
    const GS: usize = 4;
    // In user mode the kernel's is the other one.
    for base in [registers.segments[GS].base, registers.kernel_gs_base] {
        // Before there is per-CPU data it is in the image.
        if !(KERNEL_HALF..KERNEL_MAP).contains(&base) {
            continue;
        }
        let Some(mapped) = translate_as_kernel(memory, paging, base)? else {
            continue;
        };
        let distance = base.wrapping_sub(mapped.address);
        if !distance.is_multiple_of(MAP_ALIGNMENT) {
            continue;
        }
        // The same distance elsewhere in RAM.
        let again = translate_as_kernel(memory, paging, distance.wrapping_add(note.address))?;
        if again.is_some_and(|mapped| mapped.address == note.address) {
            return Ok(Some(distance));
        }
    }
    Ok(None)
}

/// The image's mapping from `_stext` as far as it goes on in one piece.
fn image(memory: &GuestMemory, note: &Note, paging: &Paging) -> io::Result<Option<Mapping>> {
    let Some(start) = note.symbol("_stext").filter(|start| *start >= KERNEL_MAP) else {
        return Ok(None);
    };
    let Some(guest_address) = note.image_address(start) else {
        return Ok(None);
    };
    let mut bytes = 0;
    for _ in 0..MAX_IMAGE_PAGES {
        let Some(next) = start.checked_add(bytes).filter(|_| bytes < MAX_IMAGE_BYTES) else {
            break;
        };
        match translate_as_kernel(memory, paging, next)? {
            Some(mapped) if Some(mapped.address) == guest_address.checked_add(bytes) => bytes += mapped.bytes,
            _ => break,
        }
    }
    let bytes = memory.locate(guest_address).map_or(0, |ram| ram.bytes.min(bytes));
    Ok((bytes > 0).then_some(Mapping {
        virtual_address: start,
        guest_address,
        bytes,
    }))
}

#[cfg(test)]
#[path = "kernel_test.rs"]
mod tests;
