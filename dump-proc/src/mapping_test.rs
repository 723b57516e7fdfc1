use super::*;
use ipc::caps::GuestMemRo;
use nix::sys::memfd::{MFdFlags, memfd_create};

const RAM_BYTES: u64 = 16 << 20;
const HIGH: u64 = 0xffff_8880_0000_0000;
const LONG: Paging = Paging {
    cr0: 1 << 31 | 1,
    cr3: 0x1000,
    cr4: 1 << 5,
    efer: 1 << 10 | 1 << 8,
};

fn ram(words: &[(u64, u64)]) -> GuestMemory {
    let fd = memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&fd, RAM_BYTES as i64).unwrap();
    for (address, word) in words {
        nix::sys::uio::pwrite(&fd, &word.to_le_bytes(), *address as i64).unwrap();
    }
    GuestMemory::new(GuestMemRo::new(fd), RAM_BYTES).unwrap()
}

fn mapping(virtual_address: u64, guest_address: u64, bytes: u64) -> Mapping {
    Mapping {
        guest_address,
        virtual_address,
        bytes,
    }
}

/// Tables at 0x1000: two pages that follow each other both ways, one that does so in virtual space alone, and a large page,
/// low and high.
fn tables() -> Vec<(u64, u64)> {
    vec![
        (0x1000, 0x2003),
        (0x1000 + 8 * (HIGH >> 39 & 511), 0x2007),
        (0x2000, 0x3003),
        (0x3000, 0x4003),
        (0x3008, 0x60_0083),
        (0x4000, 0x8000_0000_0000_9003),
        (0x4008, 0xa003),
        (0x4010, 0xc003),
        // Not present.
        (0x4018, 0xd002),
    ]
}

#[test]
fn runs_are_merged_and_in_the_order_of_physical_memory() {
    let memory = ram(&tables());
    let expected = [
        mapping(0, 0x9000, 0x2000),
        mapping(HIGH, 0x9000, 0x2000),
        mapping(0x2000, 0xc000, 0x1000),
        mapping(HIGH + 0x2000, 0xc000, 0x1000),
        mapping(0x20_0000, 0x60_0000, 0x20_0000),
        mapping(HIGH + 0x20_0000, 0x60_0000, 0x20_0000),
    ];
    assert_eq!(mappings(&memory, &[LONG]).unwrap(), expected);
    // A second vCPU with the same tables, by another name, adds nothing; one that does not translate neither.
    let same = Paging {
        cr3: 0x1000 | 5,
        ..LONG
    };
    let off = Paging { cr0: 1, ..LONG };
    assert_eq!(mappings(&memory, &[off, LONG, same]).unwrap(), expected);
}

#[test]
fn every_process_has_its_own_lower_half_and_the_kernel_is_there_once() {
    let mut words = tables();
    // Another process: its own page, the same kernel.
    words.extend([
        (0x1_1000, 0x1_2003),
        (0x1_2000, 0x1_3003),
        (0x1_3000, 0x1_4003),
        (0x1_4000, 0x5003),
        (0x1_1000 + 8 * (HIGH >> 39 & 511), 0x2007),
    ]);
    let memory = ram(&words);
    let other = Paging { cr3: 0x1_1000, ..LONG };
    let mut expected = mappings(&memory, &[LONG]).unwrap();
    expected.insert(0, mapping(0, 0x5000, 0x1000));
    assert_eq!(mappings(&memory, &[LONG, other]).unwrap(), expected);
}

#[test]
fn five_levels_and_the_32_bit_formats_are_walked_too() {
    let words = [
        (0x1000 + 8 * 257, 0x2003),
        (0x2000, 0x3003),
        (0x3000, 0x4003),
        (0x4000, 0x5003),
        (0x5000, 0x9003),
    ];
    let five = Paging {
        cr4: 1 << 5 | 1 << 12,
        ..LONG
    };
    let expected = [mapping(0xff01_0000_0000_0000, 0x9000, 0x1000)];
    assert_eq!(mappings(&ram(&words), &[five]).unwrap(), expected);

    let extended = Paging {
        cr3: 0x1020,
        efer: 0,
        ..LONG
    };
    // Behind the fourth entry of the top table there is none.
    let words = [(0x1020, 0x2001), (0x1038, 0x2001), (0x1040, 0x2001), (0x2000, 0x83)];
    let expected = [mapping(0, 0, 0x20_0000), mapping(0xc000_0000, 0, 0x20_0000)];
    assert_eq!(mappings(&ram(&words), &[extended]).unwrap(), expected);

    let old = Paging {
        cr4: 1 << 4,
        efer: 0,
        ..LONG
    };
    // Entries of four bytes: a 4 MiB page, and a table with one page.
    let words = [(0x1000, 0x2001_0040_0083), (0x2000, 0x7001)];
    let expected = [mapping(0x40_0000, 0x7000, 0x1000), mapping(0, 0x40_0000, 0x40_0000)];
    assert_eq!(mappings(&ram(&words[..1]), &[old]).unwrap(), expected[1..]);
    assert_eq!(mappings(&ram(&words), &[old]).unwrap(), expected);
}

#[test]
fn without_paging_addresses_are_physical() {
    let expected = [mapping(0, 0, RAM_BYTES)];
    assert_eq!(mappings(&ram(&[]), &[Paging::default()]).unwrap(), expected);
    assert_eq!(mappings(&ram(&[]), &[]).unwrap(), expected);
}

#[test]
fn tables_that_lead_in_circles_are_given_up() {
    // Every entry of the top table names the top table.
    let circle: Vec<_> = (0..512).map(|index| (0x1000 + 8 * index, 0x1003)).collect();
    let begun = std::time::Instant::now();
    assert!(matches!(mappings(&ram(&circle), &[LONG]), Err(MappingError::TooLarge)));
    // One entry that does so is how some kernels look at their own tables.
    let one = ram(&[(0x1000 + 8 * 511, 0x1003)]);
    assert_eq!(
        mappings(&one, &[LONG]).unwrap(),
        [mapping(0xffff_ffff_ffff_f000, 0x1000, 0x1000)]
    );
    // Pages that all differ.
    let mut words: Vec<_> = (0..512).map(|index| (0x1000 + 8 * index, 0x2003)).collect();
    words.extend((0..512).map(|index| (0x2000 + 8 * index, 0x3003)));
    words.extend((0..512).map(|index| (0x3000 + 8 * index, 0x4003)));
    words.extend((0..512).map(|index| (0x4000 + 8 * index, index << 13 | 3)));
    assert!(matches!(mappings(&ram(&words), &[LONG]), Err(MappingError::TooLarge)));
    assert!(begun.elapsed().as_secs() < 30, "{:?}", begun.elapsed());
    // Tables where no RAM is map nothing.
    for nowhere in [RAM_BYTES, 1 << 40, 0x000f_ffff_ffff_f000] {
        let paging = Paging { cr3: nowhere, ..LONG };
        assert_eq!(mappings(&ram(&[]), &[paging]).unwrap(), []);
        assert_eq!(mappings(&ram(&[(0x1000, nowhere | 3)]), &[LONG]).unwrap(), []);
    }
}

#[test]
fn a_range_clips_mappings_by_physical_address() {
    let clipped = |begin, length| {
        let mut found = vec![mapping(HIGH, 0x1000, 0x3000), mapping(0, 0x8000, 0x1000)];
        clip(&mut found, DumpRange { begin, length });
        found
    };
    assert_eq!(clipped(0x1801, 2), [mapping(HIGH + 0x801, 0x1801, 2)]);
    assert_eq!(
        clipped(0x3fff, 0x4002),
        [mapping(HIGH + 0x2fff, 0x3fff, 1), mapping(0, 0x8000, 1)]
    );
    assert_eq!(clipped(0x4000, 0x4000), []);
    assert_eq!(clipped(0, u64::MAX).len(), 2);
}
