//! What is in a dump: every byte of guest RAM at its address, nothing else, and holes where the guest has them.

mod common;

use common::{Dumper, GIB, Load, MIB, Ram, assert_equal_to_ram, dump, loads, pattern, registers};
use ipc::dump::{DumpEvent, DumpRange};
use std::os::unix::fs::{FileExt, MetadataExt};

/// 64 MiB with data at both ends, in single pages, across chunks, and pages that were written with zeros.
fn patchy_ram() -> Ram {
    let ram = Ram::new(64 * MIB);
    ram.fill(0, 4096);
    ram.fill(5 * 4096, 1);
    ram.fill(3 * MIB - 8192, 2 * MIB);
    ram.write(10 * MIB, &[0; 3 << 20]);
    ram.fill(12 * MIB, 1);
    ram.fill(64 * MIB - 1, 1);
    ram
}

#[test]
fn every_byte_is_at_its_address() {
    let ram = patchy_ram();
    let file = tempfile::tempfile().unwrap();
    assert_eq!(dump(&ram, file.try_clone().unwrap()).unwrap(), 64 * MIB);
    let found = loads(&file, 0);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].guest_address, found[0].bytes), (0, 64 * MIB));
    assert_eq!(file.metadata().unwrap().len(), found[0].offset + 64 * MIB);
    assert_equal_to_ram(&file, 0, &ram);
}

#[test]
fn holes_of_guest_memory_stay_holes_and_are_holes_in_the_file() {
    let ram = patchy_ram();
    let before = ram.blocks();
    let file = tempfile::tempfile().unwrap();
    dump(&ram, file.try_clone().unwrap()).unwrap();
    assert_eq!(ram.blocks(), before, "the dump has allocated guest memory");
    // 2 MiB and some pages of data; the pages written with zeros are left out as well.
    let written = file.metadata().unwrap().blocks() * 512;
    assert!((2 * MIB..3 * MIB).contains(&written), "{written} bytes");
}

#[test]
fn ram_on_both_sides_of_the_pci_hole_is_two_segments() {
    let ram = Ram::new(5 * GIB);
    ram.fill(0, MIB);
    ram.fill(3 * GIB - 4096, 4096);
    ram.fill(4 * GIB, 5000);
    ram.fill(6 * GIB - 1, 1);
    let file = tempfile::tempfile().unwrap();
    assert_eq!(dump(&ram, file.try_clone().unwrap()).unwrap(), 5 * GIB);
    let found: Vec<_> = loads(&file, 0)
        .iter()
        .map(|load| (load.guest_address, load.bytes))
        .collect();
    assert_eq!(found, [(0, 3 * GIB), (4 * GIB, 2 * GIB)]);
    // The written parts are compared; reading 5 GiB of zeros would take the time of all other tests.
    for (load, at, length) in [
        (0, 0, MIB),
        (0, 3 * GIB - 4096, 4096),
        (1, 0, 5000),
        (1, 2 * GIB - 1, 1),
    ] {
        let Load {
            offset, guest_address, ..
        } = loads(&file, 0)[load];
        let mut got = vec![0; length as usize];
        file.read_exact_at(&mut got, offset + at).unwrap();
        assert!(got == pattern(guest_address + at, length), "segment {load} at {at:#x}");
    }
    assert!(file.metadata().unwrap().blocks() * 512 < 4 * MIB);
}

#[test]
fn an_untouched_guest_makes_an_all_but_empty_file_of_full_size() {
    let ram = Ram::new(256 * MIB);
    let file = tempfile::tempfile().unwrap();
    dump(&ram, file.try_clone().unwrap()).unwrap();
    assert_eq!(ram.blocks(), 0);
    assert!(file.metadata().unwrap().blocks() * 512 <= 64 << 10);
    assert_equal_to_ram(&file, 0, &ram);
}

#[test]
fn a_range_is_exact_to_the_byte() {
    /// Guest physical address and length.
    type Piece = (u64, u64);
    const TOP: u64 = 4 * GIB + MIB;
    // The range, and the pieces that a guest of 3 GiB + 1 MiB has there.
    let cases: [(Piece, &[Piece]); 8] = [
        ((0, 1), &[(0, 1)]),
        ((0x10_0001, 4097), &[(0x10_0001, 4097)]),
        ((4095, 2), &[(4095, 2)]),
        ((0x1234, 3 * MIB), &[(0x1234, 3 * MIB)]),
        ((3 * GIB - 3, GIB), &[(3 * GIB - 3, 3)]),
        ((3 * GIB - 3, GIB + 5), &[(3 * GIB - 3, 3), (4 * GIB, 2)]),
        ((TOP - 5000, u64::MAX), &[(TOP - 5000, 5000)]),
        ((3 * GIB + 1, GIB), &[(4 * GIB, 1)]),
    ];
    let ram = Ram::new(3 * GIB + MIB);
    ram.fill(0, 4 * MIB);
    ram.fill(3 * GIB - 5000, 5000);
    ram.fill(4 * GIB, MIB);
    for ((begin, length), wanted) in cases {
        let file = tempfile::tempfile().unwrap();
        let range = Some(DumpRange { begin, length });
        let bytes = Dumper::sealed(&ram).write(file.try_clone().unwrap(), vec![registers(0)], range);
        assert_eq!(bytes.unwrap(), wanted.iter().map(|piece| piece.1).sum::<u64>());
        let found: Vec<_> = loads(&file, 0)
            .iter()
            .map(|load| (load.guest_address, load.bytes))
            .collect();
        assert_eq!(found, wanted, "begin {begin:#x} length {length:#x}");
        assert_equal_to_ram(&file, 0, &ram);
    }
}

#[test]
fn a_range_without_ram_is_refused() {
    let ram = Ram::new(MIB);
    for (begin, length) in [(MIB, 1), (3 * GIB, GIB), (u64::MAX, u64::MAX), (0, 0)] {
        let file = tempfile::tempfile().unwrap();
        let range = Some(DumpRange { begin, length });
        let failure = Dumper::sealed(&ram).write(file.try_clone().unwrap(), vec![], range);
        assert_eq!(failure.unwrap_err().message, "dump: no guest memory to dump");
        assert_eq!(file.metadata().unwrap().len(), 0);
    }
}

#[test]
fn progress_ends_with_all_of_it() {
    let ram = patchy_ram();
    let mut dumper = Dumper::sealed(&ram);
    dumper.write(tempfile::tempfile().unwrap(), vec![], None).unwrap();
    let DumpEvent::Progress { completed, total } = dumper.bare.event();
    assert_eq!((completed, total), (0, 64 * MIB));
    loop {
        let DumpEvent::Progress { completed, total } = dumper.bare.event();
        assert_eq!(total, 64 * MIB);
        if completed == total {
            break;
        }
    }
}

#[test]
fn the_registers_of_255_cpus_are_no_problem() {
    let ram = Ram::new(MIB);
    let file = tempfile::tempfile().unwrap();
    Dumper::sealed(&ram)
        .write(file.try_clone().unwrap(), (0..255).map(registers).collect(), None)
        .unwrap();
    let notes_bytes = 255 * (356 + 460);
    let mut last_rip = [0; 8];
    // rip is at 8 + 16 * 8 of the last QEMU note's content, the file's last 440 bytes before the padding.
    let at = 64 + 2 * 56 + notes_bytes - 440 + 136;
    file.read_exact_at(&mut last_rip, at).unwrap();
    assert_eq!(u64::from_le_bytes(last_rip), registers(254).rip);
}
