use super::*;
use ipc::caps::GuestMemRo;
use nix::sys::memfd::{MFdFlags, memfd_create};

const RAM_BYTES: u64 = 16 << 20;
/// The kernel's image, 2 MiB above where it was linked for.
const PHYS_BASE: u64 = 0x20_0000;
const STEXT: u64 = KERNEL_MAP + 0x20_0000;
/// Where the guest maps all of RAM.
const DISTANCE: u64 = 0xffff_8880_4000_0000;

/// Tables at 1 MiB: the image in two large pages, RAM in one huge page.
fn memory(more: &[(u64, u64)]) -> GuestMemory {
    let fd = memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&fd, RAM_BYTES as i64).unwrap();
    let index = |address: u64, level: u32| (address >> (12 + 9 * (level - 1)) & 511) * 8;
    let words = [
        (0x10_0000 + index(STEXT, 4), 0x10_1003),
        (0x10_1000 + index(STEXT, 3), 0x10_2003),
        (0x10_2000 + index(STEXT, 2), STEXT - KERNEL_MAP + PHYS_BASE + 0x83),
        (
            0x10_2000 + index(STEXT + 0x20_0000, 2),
            STEXT - KERNEL_MAP + PHYS_BASE + 0x20_0083,
        ),
        (0x10_0000 + index(DISTANCE, 4), 0x10_3003),
        (0x10_3000 + index(DISTANCE, 3), 0x83),
    ];
    for (address, word) in words.iter().chain(more) {
        nix::sys::uio::pwrite(&fd, &word.to_le_bytes(), *address as i64).unwrap();
    }
    GuestMemory::new(GuestMemRo::new(fd), RAM_BYTES).unwrap()
}

fn note(phys_base: u64) -> Note {
    let text = format!(
        "OSRELEASE=6.1\nSYMBOL(_stext)={STEXT:x}\nNUMBER(phys_base)={}\n",
        phys_base.cast_signed()
    );
    Note {
        address: 0x5000,
        text: text.into_bytes(),
    }
}

fn vcpu(gs_base: u64, kernel_gs_base: u64) -> VcpuRegisters {
    let mut registers = VcpuRegisters {
        control: [1 << 31 | 1, 0, 0x10_0000, 1 << 5],
        efer: 1 << 10 | 1 << 8,
        kernel_gs_base,
        ..VcpuRegisters::default()
    };
    registers.segments[4].base = gs_base;
    registers
}

#[test]
fn per_cpu_data_tells_where_ram_is_mapped() {
    let memory = memory(&[]);
    let distance = |vcpus: &[VcpuRegisters]| address_map(&memory, &note(PHYS_BASE), vcpus).unwrap().ram_distance;
    let inside = DISTANCE + 0x80_0000;
    assert_eq!(distance(&[vcpu(inside, 0)]), DISTANCE);
    // In user mode.
    assert_eq!(distance(&[vcpu(0x7fff_0000, inside)]), DISTANCE);
    // The first that knows.
    let off = VcpuRegisters::default();
    assert_eq!(distance(&[off.clone(), vcpu(0, 0), vcpu(inside, 0)]), DISTANCE);
    // In the image, in user space, nowhere.
    for base in [STEXT, 0x1000, 0, u64::MAX, 1 << 63, 0xffff_9999_0000_0000] {
        assert_eq!(distance(&[vcpu(base, base)]), 0, "{base:#x}");
    }
    assert_eq!(distance(&[off]), 0);
}

#[test]
fn a_mapping_that_is_not_of_all_ram_is_not_taken_for_it() {
    // Another huge page, at the wrong distance for the note.
    let other = DISTANCE + (8 << 30);
    let memory = memory(&[(0x10_3000 + (other >> 30 & 511) * 8, 0x83)]);
    let map = |base, note: &Note| address_map(&memory, note, &[vcpu(base, 0)]).unwrap().ram_distance;
    assert_eq!(
        map(other + 0x80_0000, &note(PHYS_BASE)),
        other,
        "a second one is as good"
    );
    let mut far = note(PHYS_BASE);
    far.address = 1 << 30;
    assert_eq!(map(other + 0x80_0000, &far), 0);
}

#[test]
fn the_image_is_followed_as_far_as_it_goes_on() {
    let memory = memory(&[]);
    let image = |note: &Note| address_map(&memory, note, &[vcpu(0, 0)]).unwrap().image;
    let expected = Mapping {
        virtual_address: STEXT,
        guest_address: STEXT - KERNEL_MAP + PHYS_BASE,
        bytes: 0x40_0000,
    };
    assert_eq!(image(&note(PHYS_BASE)), Some(expected));
    // Tables and note do not agree.
    for phys_base in [0, PHYS_BASE + 0x1000, PHYS_BASE.wrapping_neg(), 1 << 63] {
        assert_eq!(image(&note(phys_base)), None, "{phys_base:#x}");
    }
    let without = Note {
        address: 0x5000,
        text: b"OSRELEASE=6.1\nNUMBER(phys_base)=0\nSYMBOL(_stext)=1000\n".to_vec(),
    };
    assert_eq!(image(&without), None);
}

#[test]
fn hostile_tables_end_the_image_where_ram_ends() {
    // The whole image range in large pages that go on beyond RAM.
    let pages: Vec<(u64, u64)> = (1..512)
        .map(|index| (0x10_2000 + index * 8, index * 0x20_0000 + PHYS_BASE + 0x83))
        .collect();
    let memory = memory(&pages);
    let image = address_map(&memory, &note(PHYS_BASE), &[vcpu(0, 0)])
        .unwrap()
        .image
        .unwrap();
    assert_eq!(image.guest_address + image.bytes, RAM_BYTES);
}

#[test]
fn the_image_is_a_segment_only_where_all_of_it_is() {
    let pieces = ipc::memory::ram_regions(4 << 30);
    let segments = |guest_address, bytes| {
        let image = Mapping {
            guest_address,
            virtual_address: STEXT,
            bytes,
        };
        let map = AddressMap {
            ram_distance: DISTANCE,
            image: Some(image),
        };
        map.segments(&pieces)
    };
    let found = segments(0x1a00_0000, 0x20_0000);
    let addresses: Vec<_> = found.iter().map(|segment| segment.virtual_address).collect();
    assert_eq!(addresses, [DISTANCE, DISTANCE + (4 << 30), STEXT]);
    for (guest_address, bytes) in [((3 << 30) - 4096, 8192), (u64::MAX, 2), (0, u64::MAX), (3 << 30, 1)] {
        assert_eq!(segments(guest_address, bytes).len(), 2, "{guest_address:#x} {bytes:#x}");
    }
}

/// The address of a handler as an entry of the interrupt table has it.
fn gate(handler: u64) -> [(u64, u64); 2] {
    let low = handler & 0xffff | (handler >> 16 & 0xffff) << 48;
    [(IDT - DISTANCE, low), (IDT - DISTANCE + 8, handler >> 32)]
}

/// Where the interrupt table is mapped.
const IDT: u64 = DISTANCE + 0x5000;

fn with_table(base: u64) -> VcpuRegisters {
    let mut registers = vcpu(0, 0);
    registers.idt.base = base;
    registers
}

#[test]
fn without_a_note_the_interrupt_table_tells_where_the_kernel_is() {
    let found = |more: &[(u64, u64)], vcpus: &[VcpuRegisters]| phys_base(&memory(more), vcpus).unwrap();
    let handler = STEXT + 0x1234;
    assert_eq!(found(&gate(handler), &[with_table(IDT)]), Some(PHYS_BASE));
    // Of a vCPU that is in Linux; the others say nothing.
    let asleep = VcpuRegisters::default();
    assert_eq!(found(&gate(handler), &[asleep, with_table(IDT)]), Some(PHYS_BASE));
    // Below zero, as KASLR may have it, is a large number.
    let index = |address: u64| (address >> 21 & 511) * 8;
    let high = KERNEL_MAP + 0x1000_0000;
    let mapped = (0x10_2000 + index(high), 0x20_0083);
    let below = [&gate(high + 0x77)[..], &[mapped]].concat();
    let expected = 0x20_0000_u64.wrapping_sub(0x1000_0000);
    assert_eq!(found(&below, &[with_table(IDT)]), Some(expected));
    // A table that is nowhere, and handlers that are not the kernel's image or are mapped nowhere.
    assert_eq!(found(&gate(handler), &[with_table(0x1000)]), None);
    for handler in [0, 0xffff_ffff_c000_0000, DISTANCE, KERNEL_MAP + 0x3000_0000, u64::MAX] {
        assert_eq!(found(&gate(handler), &[with_table(IDT)]), None, "{handler:#x}");
    }
}
