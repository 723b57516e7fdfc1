//! As many vCPUs and segments as there can be, and memory that was given back.

mod common;

use bulkhead_tests::dumpfile::{Dump, notes};
use common::{Dumper, MIB, Ram, assert_equal_to_ram, registers};
use ipc::dump::{Compressor, DumpForm, Exclude};
use ipc::vcpu::VcpuRegisters;
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::File;
use std::process::Command;

const ELF: DumpForm = DumpForm::Elf {
    range: None,
    paging: false,
};
const KDUMP: DumpForm = DumpForm::Kdump {
    compressor: Compressor::Zlib,
    flattened: false,
    exclude: Exclude {
        free: false,
        cache: false,
        user: false,
        zero: false,
    },
};

#[test]
fn the_registers_of_255_vcpus_are_in_every_form() {
    let ram = Ram::new(16 * MIB);
    ram.fill(0, MIB);
    for form in [ELF, KDUMP] {
        let file = tempfile::tempfile().unwrap();
        let vcpus = (0..255).map(registers).collect();
        let written = Dumper::sealed(&ram).write_form(file.try_clone().unwrap(), vcpus, form);
        assert_eq!(written.unwrap(), ram.bytes);
        let dump = Dump::open(file).unwrap();
        notes::check(dump.notes(), 255).unwrap();
        for (index, note) in (0_u64..).zip(&dump.notes()[..255]) {
            let rip = u64::from_le_bytes(note.content[112 + 16 * 8..][..8].try_into().unwrap());
            assert_eq!(rip, registers(index).rip);
        }
        if let Dump::Kdump(dump) = dump {
            assert_eq!(dump.vcpus, 255);
        }
    }
}

/// Page tables that map one page again and again: no two of the mappings are one piece of memory.
#[test]
fn more_segments_than_the_file_header_counts_are_read() {
    const TABLES: u64 = 140;
    const TOP: u64 = 0x10_0000;
    let ram = Ram::new(16 * MIB);
    ram.fill(0, 8192);
    let entry = |table: u64, index: u64, to: u64| ram.write(table + index * 8, &(to | 3).to_le_bytes());
    entry(TOP, 0, TOP + 0x1000);
    entry(TOP + 0x1000, 0, TOP + 0x2000);
    for number in 0..TABLES {
        let table = TOP + 0x3000 + number * 4096;
        entry(TOP + 0x2000, number, table);
        ram.write(table, &3_u64.to_le_bytes().repeat(512));
    }
    let vcpu = VcpuRegisters {
        control: [1 << 31 | 1, 0, TOP, 1 << 5],
        efer: 1 << 10 | 1 << 8,
        ..registers(0)
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("dump");
    let form = DumpForm::Elf {
        range: None,
        paging: true,
    };
    let written = Dumper::sealed(&ram).write_form(File::create(&path).unwrap(), vec![vcpu], form);
    assert_eq!(written.unwrap(), ram.bytes);
    let Dump::Elf(dump) = Dump::open(File::open(&path).unwrap()).unwrap() else {
        panic!("no ELF core")
    };
    let count = dump.loads.len() as u64;
    assert_eq!(count, TABLES * 512);
    assert!(dump.loads.iter().all(|load| load.file_bytes == load.memory_bytes));
    match Command::new("readelf").arg("-hW").arg(&path).output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            let line = text.lines().find(|line| line.contains("Number of program headers"));
            let line = line.unwrap_or_default();
            assert!(line.ends_with(&format!("({})", count + 1)), "{line}");
        }
        Err(error) => println!("SKIPPED: readelf: {error}"),
    }
}

/// As a balloon gives pages back, one by one and by the megabyte.
#[test]
fn memory_that_was_given_back_is_zeroes_and_stays_away() {
    let ram = Ram::new(64 * MIB);
    ram.fill(0, 8 * MIB);
    for (begin, bytes) in [
        (0x3000, 4096),
        (0x10_0000, 4096 * 7),
        (2 * MIB, MIB),
        (5 * MIB + 4096, 8192),
    ] {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&ram.memfd, flags, begin as i64, bytes as i64).unwrap();
    }
    let blocks = ram.blocks();
    for form in [ELF, KDUMP] {
        let is_elf = matches!(form, DumpForm::Elf { .. });
        let file = tempfile::tempfile().unwrap();
        let written = Dumper::sealed(&ram).write_form(file.try_clone().unwrap(), vec![registers(0)], form);
        assert_eq!(written.unwrap(), ram.bytes);
        if is_elf {
            assert_equal_to_ram(&file, 0, &ram);
        } else {
            let mut pages = 0;
            let read = Dump::open(file).unwrap().each_page(|address, page| {
                pages += 1;
                assert!(page[..] == common::pattern(address, 4096), "{address:#x}");
            });
            read.unwrap();
            assert_eq!(pages, 8 * 256 - 1 - 7 - 256 - 2);
        }
    }
    assert_eq!(ram.blocks(), blocks, "dumping has brought it back");
}
