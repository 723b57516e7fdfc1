use super::*;
use ipc::caps::GuestMemRo;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

const RAM_BYTES: u64 = 16 << 20;
const RELEASE: &str = "6.1.0-test";
/// Where the kernel's names of itself are, in its image.
const NAMES: u64 = 0x1040;

struct Ram(File);

impl Ram {
    fn new() -> Self {
        let file = File::from(memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(RAM_BYTES).unwrap();
        Self(file)
    }

    fn with(self, address: u64, bytes: &[u8]) -> Self {
        self.0.write_all_at(bytes, address).unwrap();
        self
    }

    /// A kernel whose image is at `phys_base`, and its note at `note`.
    fn with_kernel(self, phys_base: u64, note: u64) -> Self {
        let mut names = [0; UTS_RELEASE + UTS_STRING_BYTES];
        names[..5].copy_from_slice(b"Linux");
        names[UTS_RELEASE..][..RELEASE.len()].copy_from_slice(RELEASE.as_bytes());
        self.with(phys_base.wrapping_add(NAMES), &names)
            .with(note, &encoded(&text(phys_base)))
    }

    fn find(&self, said: Option<VmCoreInfo>, vcpus: &[Paging]) -> Option<u64> {
        let memory = GuestMemory::new(GuestMemRo::new(self.0.try_clone().unwrap().into()), RAM_BYTES).unwrap();
        let workers = Workers::start().unwrap();
        let note = super::said(&memory, said).unwrap();
        let note = note.or_else(|| find(&Arc::new(memory), vcpus, &workers).unwrap());
        note.map(|note| note.address)
    }
}

fn text(phys_base: u64) -> String {
    format!(
        "OSRELEASE={RELEASE}\nPAGESIZE=4096\nSYMBOL(init_uts_ns)={:x}\nOFFSET(uts_namespace.name)={}\nNUMBER(phys_base)={}\n",
        KERNEL_MAP + NAMES - 4,
        4,
        phys_base.cast_signed()
    )
}

fn note(name: &[u8], kind: u32, length: u32, text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [name.len() as u32, length, kind] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(name);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(text.as_bytes());
    bytes
}

fn encoded(text: &str) -> Vec<u8> {
    note(NAME, 0, text.len() as u32, text)
}

/// Tables at `top` that map the kernel's image to `physical`, which 2 MiB divide.
fn paging(ram: Ram, top: u64, physical: u64) -> (Ram, Paging) {
    let ram = ram
        .with(top + 511 * 8, &(top + 0x1000 + 3).to_le_bytes())
        .with(top + 0x1000 + 510 * 8, &(top + 0x2000 + 3).to_le_bytes())
        .with(top + 0x2000, &(physical + 0x83).to_le_bytes());
    let paging = Paging {
        cr0: 1 << 31 | 1,
        cr3: top,
        cr4: 1 << 5,
        efer: 1 << 10 | 1 << 8,
    };
    (ram, paging)
}

#[test]
fn a_note_is_found_by_its_page_and_nothing_else_is_touched() {
    let ram = Ram::new().with_kernel(0x20_0000, 0x7f_f000);
    let before = ram.0.metadata().unwrap().blocks();
    assert_eq!(ram.find(None, &[]), Some(0x7f_f000));
    assert_eq!(ram.0.metadata().unwrap().blocks(), before, "holes stay holes");
    assert_eq!(Ram::new().find(None, &[]), None);
    // Not where a page begins.
    assert_eq!(Ram::new().with(0x3004, &encoded(&text(0))).find(None, &[]), None);
}

#[test]
fn the_guests_word_comes_first_unless_there_is_nothing() {
    let ram = Ram::new()
        .with_kernel(0x20_0000, 0x5000)
        .with(0x60_0123, &encoded("ANY=thing\n"));
    let said = |address, bytes| Some(VmCoreInfo { address, bytes });
    assert_eq!(ram.find(said(0x60_0123, 4096), &[]), Some(0x60_0123));
    for (address, bytes) in [
        (0x60_0123, 10),
        (0x60_0123, 33),
        (0x60_0124, 4096),
        (RAM_BYTES - 8, 4096),
        (RAM_BYTES, 4096),
        (u64::MAX, u32::MAX),
        (1 << 40, 1),
    ] {
        assert_eq!(
            ram.find(said(address, bytes), &[]),
            Some(0x5000),
            "{address:#x} {bytes}"
        );
    }
}

#[test]
fn what_is_no_note_is_not_taken_for_one() {
    let good = text(0);
    let length = good.len() as u32;
    for bytes in [
        note(b"VMCOREINF0\0", 0, length, &good),
        note(b"VMCOREINFO", 0, length, &good),
        note(NAME, 1, length, &good),
        note(NAME, 0, 0, &good),
        // Beyond its page, and beyond any.
        note(NAME, 0, 4096 - TEXT_OFFSET as u32 + 1, &good),
        note(NAME, 0, u32::MAX, &good),
        note(NAME, 0, 20, "PAGESIZE=4096\nOSRELEASE=1\n"),
    ] {
        assert_eq!(Ram::new().with(0x3000, &bytes).find(None, &[]), None, "{bytes:x?}");
    }
    let longest = 4096 - TEXT_OFFSET as u32;
    let bytes = note(NAME, 0, longest, &good);
    assert_eq!(Ram::new().with(0x3000, &bytes).find(None, &[]), Some(0x3000));
}

#[test]
fn of_several_notes_that_of_the_kernel_that_is_there_is_taken() {
    // A note whose kernel is gone, one whose kernel is there, and one more like the first.
    let ram = Ram::new()
        .with(0x3000, &encoded(&text(0x40_0000)))
        .with_kernel(0x20_0000, 0x6000)
        .with(0x9000, &encoded(&text(0x60_0000)));
    assert_eq!(ram.find(None, &[]), Some(0x6000));
    // With phys_base below zero, as KASLR may have it, and where no RAM is.
    for hostile in [u64::MAX - 4095, 1 << 62, RAM_BYTES - 0x1050] {
        let ram = Ram::new()
            .with(0x3000, &encoded(&text(hostile)))
            .with_kernel(0x20_0000, 0x6000);
        assert_eq!(ram.find(None, &[]), Some(0x6000), "{hostile:#x}");
    }
}

#[test]
fn of_two_kernels_that_which_runs_is_taken() {
    let ram = Ram::new().with_kernel(0x20_0000, 0x6000).with_kernel(0x60_0000, 0xa000);
    assert_eq!(ram.find(None, &[]), Some(0x6000), "nothing says which");
    for (physical, expected) in [(0x20_0000, 0x6000), (0x60_0000, 0xa000)] {
        let ram = Ram::new().with_kernel(0x20_0000, 0x6000).with_kernel(0x60_0000, 0xa000);
        let (ram, paging) = paging(ram, 0x80_0000, physical);
        let asleep = Paging::default();
        assert_eq!(ram.find(None, &[asleep, paging]), Some(expected), "{physical:#x}");
        // In user mode with page table isolation the kernel is not mapped but by its own table.
        let user = Paging {
            cr3: 0x80_1007,
            ..paging
        };
        let ram = ram.with(0x80_1000 + 511 * 8, &[0; 8]);
        assert_eq!(ram.find(None, &[user]), Some(expected), "{physical:#x}");
    }
}

#[test]
fn a_guest_full_of_notes_costs_no_more_than_a_few_are_looked_at() {
    let ram = (0..200).fold(Ram::new(), |ram, page| {
        ram.with(0x10_0000 + page * PAGE_BYTES, &encoded(&text(0x40_0000)))
    });
    assert_eq!(ram.find(None, &[]), Some(0x10_0000));
    // What lies behind the last one looked at is not seen any more, however good it is.
    let ram = ram.with_kernel(0x20_0000, 0x80_0000);
    assert_eq!(ram.find(None, &[]), Some(0x10_0000));
}
