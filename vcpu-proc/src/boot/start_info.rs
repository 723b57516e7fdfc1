//! The start info of the PVH boot protocol (Xen's public/arch-x86/hvm/start_info.h), which flat images get as well.

use super::error::BootError;
use super::memory_map::{COMMAND_LINE, Initrd, START_INFO, memory_map};
use ipc::memory::GuestRam;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress};

/// "xEn3" with the high bit of the first byte set.
const MAGIC: u32 = 0x336e_c578;
/// With a memory map.
const VERSION: u32 = 1;

const MODULES: u64 = START_INFO + 0x40;
const MEMORY_MAP: u64 = START_INFO + 0x80;

/// Writes it and returns its address.
///
/// # Errors
/// When there is no RAM for it.
pub fn write(ram: &GuestRam, ram_bytes: u64, rsdp: u64, initrd: Initrd) -> Result<u64, BootError> {
    let map = memory_map(ram_bytes);
    for (range, address) in map
        .iter()
        .zip((MEMORY_MAP..).step_by(size_of::<hvm_memmap_table_entry>()))
    {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.bytes,
            type_: range.kind.number(),
            reserved: 0,
        };
        ram.write_obj(entry, GuestAddress(address))?;
    }
    if initrd.bytes > 0 {
        let module = hvm_modlist_entry {
            paddr: initrd.address,
            size: initrd.bytes,
            ..Default::default()
        };
        ram.write_obj(module, GuestAddress(MODULES))?;
    }
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: u32::from(initrd.bytes > 0),
        modlist_paddr: if initrd.bytes > 0 { MODULES } else { 0 },
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    ram.write_obj(info, GuestAddress(START_INFO))?;
    Ok(START_INFO)
}
