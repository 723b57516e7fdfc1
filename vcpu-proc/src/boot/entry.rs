//! The state in which a boot protocol enters the kernel: descriptors, page tables, registers.

use super::memory_map::{GDT, PAGE_TABLES};
use crate::vcpu::registers::os_error;
use crate::vcpu::state::PowerOnState;
use ipc::memory::{GuestRam, PAGE_BYTES};
use kvm_bindings::{kvm_dtable, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// How vCPU 0 starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode, paging on, the first [`MAPPED_BYTES`] mapped to themselves.
    Long {
        /// Instruction pointer.
        rip: u64,
        /// The protocol's information block.
        rsi: u64,
    },
    /// 32-bit protected mode without paging.
    Protected {
        /// Instruction pointer.
        eip: u32,
        /// The protocol's information block.
        ebx: u32,
    },
}

/// Guest physical memory that is mapped at a 64-bit entry: one page of page directory a GiB.
pub const MAPPED_BYTES: u64 = 8 << 30;

const LARGE_PAGE_BYTES: u64 = 2 << 20;
const ENTRIES_PER_TABLE: u64 = 512;
const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 is always set.
const RFLAGS: u64 = 1 << 1;

/// Selectors as Linux' boot protocol wants them (__BOOT_CS, __BOOT_DS); the others do not care.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
const GDT_ENTRIES: usize = 5;

/// Descriptor types with the accessed bit.
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_BUSY_TASK: u8 = 0xb;

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

fn task_segment() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        s: 0,
        g: 0,
        db: 0,
        ..segment(TASK_SELECTOR, TYPE_BUSY_TASK, false)
    }
}

/// The descriptor in memory that the hidden part of a segment register came from.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags =
        u64::from(segment.avl) | u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    limit & 0xffff
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (segment.base >> 24 & 0xff) << 56
}

/// Writes descriptors and page tables to RAM and sets the registers of vCPU 0, which has its power-on state.
///
/// # Errors
/// When RAM or KVM refuses.
pub fn enter(vcpu: &VcpuFd, power_on: &PowerOnState, ram: &GuestRam, entry: Entry) -> std::io::Result<()> {
    let (mut regs, mut sregs) = power_on.registers();
    let long = matches!(entry, Entry::Long { .. });
    let code = segment(CODE_SELECTOR, TYPE_CODE, long);
    let data = segment(DATA_SELECTOR, TYPE_DATA, false);
    let task = task_segment();
    write_gdt(ram, [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)]).map_err(std::io::Error::other)?;
    sregs.gdt = kvm_dtable {
        base: GDT,
        limit: (GDT_ENTRIES * 8 - 1) as u16,
        ..Default::default()
    };
    // No interrupt can come before the kernel has its own table.
    sregs.idt = kvm_dtable::default();
    sregs.cs = code;
    for register in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *register = data;
    }
    sregs.tr = task;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE;
    regs.rflags = RFLAGS;
    match entry {
        Entry::Long { rip, rsi } => {
            write_page_tables(ram).map_err(std::io::Error::other)?;
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 |= CR0_PG;
            sregs.efer = EFER_LME | EFER_LMA;
            regs.rip = rip;
            regs.rsi = rsi;
        }
        Entry::Protected { eip, ebx } => {
            sregs.cr4 = 0;
            regs.rip = u64::from(eip);
            regs.rbx = u64::from(ebx);
        }
    }
    vcpu.set_sregs(&sregs).map_err(os_error)?;
    vcpu.set_regs(&regs).map_err(os_error)
}

fn write_gdt(ram: &GuestRam, table: [u64; GDT_ENTRIES]) -> Result<(), GuestMemoryError> {
    table
        .iter()
        .zip((GDT..).step_by(8))
        .try_for_each(|(entry, address)| ram.write_obj(*entry, GuestAddress(address)))
}

/// Maps the first [`MAPPED_BYTES`] to themselves with 2 MiB pages, for the supervisor level only.
fn write_page_tables(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    let directories = MAPPED_BYTES / (LARGE_PAGE_BYTES * ENTRIES_PER_TABLE);
    let pointers = PAGE_TABLES + PAGE_BYTES;
    let first_directory = pointers + PAGE_BYTES;
    let page = |entries: &mut dyn Iterator<Item = u64>| -> Vec<u8> {
        let mut page: Vec<u8> = entries.flat_map(u64::to_le_bytes).collect();
        page.resize(PAGE_BYTES as usize, 0);
        page
    };
    let root = page(&mut std::iter::once(pointers | PAGE_PRESENT_WRITABLE));
    ram.write_slice(&root, GuestAddress(PAGE_TABLES))?;
    let table = page(&mut (0..directories).map(|i| (first_directory + i * PAGE_BYTES) | PAGE_PRESENT_WRITABLE));
    ram.write_slice(&table, GuestAddress(pointers))?;
    for directory in 0..directories {
        let entries =
            page(&mut (0..ENTRIES_PER_TABLE).map(|i| {
                ((directory * ENTRIES_PER_TABLE + i) * LARGE_PAGE_BYTES) | PAGE_PRESENT_WRITABLE | PAGE_LARGE
            }));
        ram.write_slice(&entries, GuestAddress(first_directory + directory * PAGE_BYTES))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::memory_map::COMMAND_LINE;

    #[test]
    fn descriptors_are_those_of_the_boot_protocol() {
        assert_eq!(
            descriptor(&segment(CODE_SELECTOR, TYPE_CODE, true)),
            0x00af_9b00_0000_ffff
        );
        assert_eq!(
            descriptor(&segment(CODE_SELECTOR, TYPE_CODE, false)),
            0x00cf_9b00_0000_ffff
        );
        assert_eq!(
            descriptor(&segment(DATA_SELECTOR, TYPE_DATA, false)),
            0x00cf_9300_0000_ffff
        );
        assert_eq!(descriptor(&task_segment()), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn the_page_tables_map_memory_to_itself_and_end_before_the_command_line() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_page_tables(&ram).unwrap();
        let entry = |table: u64, index: u64| ram.read_obj::<u64>(GuestAddress((table & !0xfff) + 8 * index)).unwrap();
        for address in [0, 2 << 20, (4 << 30) + (6 << 20), MAPPED_BYTES - LARGE_PAGE_BYTES] {
            let pointer = entry(entry(PAGE_TABLES, 0), address >> 30);
            let page = entry(pointer, address >> 21 & 511);
            assert_eq!(page, address | 0x83);
        }
        assert_eq!(entry(entry(PAGE_TABLES, 0), MAPPED_BYTES >> 30), 0);
        const { assert!(PAGE_TABLES + (2 + MAPPED_BYTES / (1 << 30)) * PAGE_BYTES <= COMMAND_LINE) };
    }
}
