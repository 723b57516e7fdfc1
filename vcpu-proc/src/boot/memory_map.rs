//! What boot protocols tell the kernel about memory, and where the loader puts things into it.
//!
//! Below 640 KiB, where every boot protocol leaves RAM to the loader:
//!
//! ```text
//! 0x00500  GDT
//! 0x06000  PVH start info, module list, memory map
//! 0x07000  zero page of the Linux boot protocol
//! 0x09000  page tables: PML4, PDPT, eight page directories
//! 0x20000  command line
//! ```

use super::error::BootError;
use super::image::Image;
use crate::layout::{ACPI_TABLES_BASE, ACPI_TABLES_BYTES, BASE_RAM_END, ECAM_BASE, ECAM_BYTES, KERNEL_RAM_START};
use ipc::memory::{GuestRam, LOW_RAM_END, PAGE_BYTES, ram_regions};
use vm_memory::{Bytes, GuestAddress};

/// Global descriptor table.
pub const GDT: u64 = 0x500;
/// hvm_start_info, its modules and its memory map.
pub const START_INFO: u64 = 0x6000;
/// Linux' boot_params.
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables of kernels that are entered in long mode.
pub const PAGE_TABLES: u64 = 0x9000;
/// Command line with its final NUL.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line without its NUL, whatever the kernel says.
pub const MAX_COMMAND_LINE_BYTES: usize = 0xffff;

/// What lies in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeKind {
    /// The kernel's to use.
    Ram,
    /// Not to be touched. The numbers are those of E820 and PVH.
    Reserved,
}

impl RangeKind {
    /// The type in E820 and PVH memory maps.
    pub fn number(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
        }
    }
}

/// One entry of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length.
    pub bytes: u64,
    /// What it is.
    pub kind: RangeKind,
}

/// The memory map of a machine with that much RAM, ascending and without overlaps.
pub fn memory_map(ram_bytes: u64) -> Vec<Range> {
    let range = |start, end, kind| Range {
        start,
        bytes: end - start,
        kind,
    };
    let mut map = vec![
        range(0, BASE_RAM_END, RangeKind::Ram),
        range(BASE_RAM_END, 0xa_0000, RangeKind::Reserved),
        range(
            ACPI_TABLES_BASE,
            ACPI_TABLES_BASE + ACPI_TABLES_BYTES,
            RangeKind::Reserved,
        ),
        range(KERNEL_RAM_START, low_ram_end(ram_bytes), RangeKind::Ram),
        // Linux uses ECAM only where the firmware has reserved it.
        range(ECAM_BASE, ECAM_BASE + ECAM_BYTES, RangeKind::Reserved),
    ];
    for region in ram_regions(ram_bytes).iter().skip(1) {
        map.push(range(
            region.guest_address,
            region.guest_address + region.bytes,
            RangeKind::Ram,
        ));
    }
    map
}

/// End of the RAM below 4 GiB.
pub fn low_ram_end(ram_bytes: u64) -> u64 {
    ram_bytes.min(LOW_RAM_END)
}

/// Where the initrd lies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Initrd {
    /// Guest address; 0 with no bytes when there is none.
    pub address: u64,
    /// Length.
    pub bytes: u64,
}

/// Loads the initrd as high as it goes: it ends at `end` at most and starts behind `kernel_end`.
///
/// # Errors
/// When it does not fit or cannot be read.
pub fn load_initrd(ram: &GuestRam, image: Option<&Image>, kernel_end: u64, end: u64) -> Result<Initrd, BootError> {
    let Some(image) = image.filter(|image| image.size_bytes() > 0) else {
        return Ok(Initrd::default());
    };
    let bytes = image.size_bytes();
    let address = end
        .checked_sub(bytes)
        .map(|address| address & !(PAGE_BYTES - 1))
        .filter(|address| *address >= kernel_end)
        .ok_or_else(|| BootError::TooLarge {
            what: "initrd",
            detail: format!(
                "it has {bytes} bytes, between the kernel's end and the highest address are {}",
                end.saturating_sub(kernel_end)
            ),
        })?;
    image.copy_to(ram, address, 0, bytes)?;
    Ok(Initrd { address, bytes })
}

/// Writes the command line.
///
/// # Errors
/// When it is longer than `limit` or contains a NUL.
pub fn write_command_line(ram: &GuestRam, text: &str, limit: usize) -> Result<(), BootError> {
    let limit = limit.min(MAX_COMMAND_LINE_BYTES);
    if text.len() > limit {
        return Err(BootError::CommandLineLength {
            bytes: text.len(),
            limit,
        });
    }
    if text.contains('\0') {
        return Err(BootError::CommandLineNul);
    }
    ram.write_slice(text.as_bytes(), GuestAddress(COMMAND_LINE))?;
    ram.write_slice(&[0], GuestAddress(COMMAND_LINE + text.len() as u64))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_is_ascending_and_holds_all_ram_but_the_holes_of_a_pc() {
        for ram_bytes in [16 << 20, 3 << 30, 8u64 << 30] {
            let map = memory_map(ram_bytes);
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].bytes <= pair[1].start, "{map:x?}");
            }
            let ram: u64 = map
                .iter()
                .filter(|range| range.kind == RangeKind::Ram)
                .map(|range| range.bytes)
                .sum();
            assert_eq!(ram, ram_bytes - (KERNEL_RAM_START - BASE_RAM_END));
        }
    }
}
