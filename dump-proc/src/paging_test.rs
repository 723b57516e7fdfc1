use super::*;
use ipc::caps::GuestMemRo;
use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::prelude::*;

const RAM_BYTES: u64 = 16 << 20;
const LONG: Paging = Paging {
    cr0: CR0_PG | 1,
    cr3: 0x1000,
    cr4: CR4_PAE,
    efer: EFER_LMA | 1 << 8,
};
const HIGH: u64 = 0xffff_8880_0000_0000;

fn ram(words: &[(u64, u64)]) -> GuestMemory {
    let fd = memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&fd, RAM_BYTES as i64).unwrap();
    for (address, word) in words {
        nix::sys::uio::pwrite(&fd, &word.to_le_bytes(), *address as i64).unwrap();
    }
    GuestMemory::new(GuestMemRo::new(fd), RAM_BYTES).unwrap()
}

fn found(memory: &GuestMemory, paging: &Paging, address: u64) -> Option<(u64, u64)> {
    translate(memory, paging, address)
        .unwrap()
        .map(|mapped| (mapped.address, mapped.bytes))
}

#[test]
fn without_paging_addresses_are_physical_and_have_32_bits() {
    let memory = ram(&[]);
    let off = Paging { cr0: 1, ..LONG };
    assert_eq!(found(&memory, &off, 0x1234), Some((0x1234, (1 << 32) - 0x1234)));
    assert_eq!(found(&memory, &off, 1 << 32), None);
}

#[test]
fn four_levels_lead_to_small_large_and_huge_pages() {
    // 0x0: 4 KiB; 2 MiB: a 2 MiB page at 6 MiB; 1 GiB: a 1 GiB page at 0; and the same tables high up.
    let memory = ram(&[
        (0x1000, 0x2003),
        (0x1000 + 8 * (HIGH >> 39 & 511), 0x2003),
        (0x2000, 0x3003),
        (0x2008, 0x83),
        (0x3000, 0x4003),
        (0x3008, 0x60_0083),
        (0x4000, 0x8000_0000_0000_9003),
    ]);
    for base in [0, HIGH] {
        assert_eq!(found(&memory, &LONG, base + 0x123), Some((0x9123, 0xedd)));
        assert_eq!(found(&memory, &LONG, base + 0x1000), None);
        assert_eq!(
            found(&memory, &LONG, base + 0x21_2345),
            Some((0x61_2345, 0x20_0000 - 0x1_2345))
        );
        assert_eq!(
            found(&memory, &LONG, base + 0x4000_0042),
            Some((0x42, (1 << 30) - 0x42))
        );
        assert_eq!(found(&memory, &LONG, base + 0x8000_0000), None);
    }
    // Bits 48 to 63 repeat bit 47.
    assert_eq!(found(&memory, &LONG, 1 << 48), None);
    assert_eq!(found(&memory, &LONG, HIGH & !(1 << 63)), None);
}

#[test]
fn five_levels_take_another_table_and_57_bits() {
    let memory = ram(&[
        (0x1000 + 8 * 3, 0x2003),
        (0x2000 + 8 * 5, 0x3003),
        (0x3000, 0x4003),
        (0x4000, 0x5003),
        (0x5000 + 8 * 7, 0xa003),
    ]);
    let paging = Paging {
        cr4: CR4_PAE | CR4_LA57,
        ..LONG
    };
    let address = 3 << 48 | 5 << 39 | 7 << 12 | 0x55;
    assert_eq!(found(&memory, &paging, address), Some((0xa055, 0xfab)));
    // The large bit of a level above 1 GiB is reserved, and does not make a page of 512 GiB.
    let memory = ram(&[(0x1000, 0x83), (0x0, 0x0)]);
    assert_eq!(found(&memory, &LONG, 0), None);
}

#[test]
fn the_32_bit_formats_are_known() {
    let pae = Paging {
        efer: 0,
        cr3: 0x1020,
        ..LONG
    };
    let memory = ram(&[
        (0x1020 + 8 * 3, 0x2001),
        (0x2008, 0x40_0083),
        (0x2010, 0x3003),
        (0x3008, 0x9003),
    ]);
    assert_eq!(found(&memory, &pae, 0xc020_0010), Some((0x40_0010, 0x1f_fff0)));
    assert_eq!(found(&memory, &pae, 0xc040_1004), Some((0x9004, 0xffc)));
    assert_eq!(found(&memory, &pae, 1 << 32 | 0xc020_0010), None);

    let plain = Paging {
        efer: 0,
        cr4: CR4_PSE,
        ..LONG
    };
    // Entries 2 and 3: a table at 0x2000; a page of 4 MiB whose address has bit 32.
    let memory = ram(&[(0x1008, 0x40_2083_0000_2003), (0x2004, 0x9003)]);
    assert_eq!(found(&memory, &plain, 0x80_1008), Some((0x9008, 0xff8)));
    assert_eq!(found(&memory, &plain, 0xc0_0000), Some((0x1_0040_0000, 0x40_0000)));
}

#[test]
fn tables_that_point_to_themselves_end_after_their_levels() {
    // Every entry of the one table is the table: four steps on, it is the page.
    let words: Vec<_> = (0..512).map(|index| (0x1000 + 8 * index, 0x1003)).collect();
    let memory = ram(&words);
    assert_eq!(found(&memory, &LONG, 0x7fff_ffff_f018), Some((0x1018, 0xfe8)));
}

#[test]
fn tables_outside_of_ram_map_nothing() {
    for entry in [RAM_BYTES | 3, ADDRESS | 3, 0xfee0_0003, 0x000f_0000_0000_0003] {
        let memory = ram(&[(0x1000, entry)]);
        assert_eq!(found(&memory, &LONG, 0), None, "{entry:#x}");
    }
    let outside = Paging { cr3: RAM_BYTES, ..LONG };
    assert_eq!(found(&ram(&[]), &outside, 0), None);
    assert_eq!(found(&ram(&[]), &Paging { cr3: u64::MAX, ..LONG }, u64::MAX), None);
}

proptest! {
    /// Whatever the registers and the tables hold, a walk ends and stays within one page.
    #[test]
    fn any_tables_are_walked_to_an_end(
        words in proptest::collection::vec((0_u64..0x400, any::<u64>()), 0..200),
        low_words in proptest::collection::vec((0_u64..0x400, 0_u64..0x4000), 0..200),
        registers: [u64; 4],
        address: u64,
    ) {
        let words: Vec<_> = words.into_iter().chain(low_words).map(|(place, word)| (8 * place, word | 1)).collect();
        let memory = ram(&words);
        let [cr0, cr3, cr4, efer] = registers;
        for paging in [Paging { cr0, cr3, cr4, efer }, Paging { cr3: cr3 & 0x1fff, ..LONG }] {
            for address in [address, address & 0xffff_ffff, address & 0x7fff_ffff_ffff] {
                if let Some((found, bytes)) = found(&memory, &paging, address) {
                    prop_assert!(bytes > 0 && bytes <= 1 << 32);
                    prop_assert!(found.checked_add(bytes).is_some());
                }
            }
        }
    }
}
