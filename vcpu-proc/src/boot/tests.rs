use super::*;
use crate::layout::KERNEL_RAM_START;
use memory_map::{COMMAND_LINE, START_INFO, ZERO_PAGE};
use proptest::prelude::*;
use std::io::Write;
use std::os::fd::OwnedFd;
use vm_memory::{Bytes, GuestAddress};

const RAM_BYTES: u64 = 64 << 20;
const RSDP: u64 = 0xe_0000;

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES as usize)]).unwrap()
}

fn file(contents: &[u8]) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(contents).unwrap();
    file.into()
}

fn boot_into(
    ram: &GuestRam,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    command_line: &str,
) -> Result<(KernelFormat, Entry), BootError> {
    let target = Target {
        ram,
        ram_bytes: RAM_BYTES,
        rsdp: RSDP,
    };
    let source = Source {
        kernel: KernelFd::new(file(kernel)),
        initrd: initrd.map(|contents| InitrdFd::new(file(contents))),
        command_line: command_line.to_owned(),
    };
    load(&target, source)
}

fn refusal(kernel: &[u8]) -> String {
    boot_into(&ram(), kernel, None, "").unwrap_err().to_string()
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage with one setup sector and 0x2000 bytes of kernel, each byte its number.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 2 * 512];
    image.extend((0..0x2000u32).map(|i| i as u8));
    put(&mut image, 0x1f1, &[1]);
    put(&mut image, 0x1f4, &0x200u32.to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020fu16.to_le_bytes());
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut image, 0x234, &[1]);
    put(&mut image, 0x236, &1u16.to_le_bytes());
    put(&mut image, 0x238, &100u32.to_le_bytes());
    put(&mut image, 0x248, &0x300u32.to_le_bytes());
    put(&mut image, 0x24c, &0x1000u32.to_le_bytes());
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut image, 0x260, &0x10_0000u32.to_le_bytes());
    image
}

/// An ELF file: a segment of 0x100 bytes in file and 0x3000 in memory at 2 MiB, and a PVH note.
fn elf() -> Vec<u8> {
    let mut image = vec![0; 0x300];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &[2, 0, 62, 0]);
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 54, &[56, 0, 2, 0]);
    for (at, kind, values) in [
        (64, 1u32, [0x200u64, 0, 0x20_0000, 0x100, 0x3000]),
        (120, 4, [0x180, 0, 0, 20, 20]),
    ] {
        put(&mut image, at, &kind.to_le_bytes());
        for (value, offset) in values.iter().zip((8..).step_by(8)) {
            put(&mut image, at + offset, &value.to_le_bytes());
        }
    }
    put(
        &mut image,
        0x180,
        &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0],
    );
    put(&mut image, 0x190, &0x20_0010u32.to_le_bytes());
    image[0x200..].fill(0x90);
    image
}

fn flat() -> Vec<u8> {
    let mut image = b"BHFLAT64".to_vec();
    image.extend(0x20_0000u64.to_le_bytes());
    image.extend([0xf4; 8]);
    image
}

#[test]
fn a_bzimage_is_entered_in_64_bit_mode_with_its_zero_page() {
    let ram = ram();
    let initrd = vec![7; 5000];
    let booted = boot_into(&ram, &bzimage(), Some(&initrd), "console=ttyS0").unwrap();
    let entry = Entry::Long {
        rip: 0x100_0200,
        rsi: ZERO_PAGE,
    };
    assert_eq!(booted, (KernelFormat::BzImage, entry));
    assert_eq!(ram.read_obj::<u8>(GuestAddress(0x100_0000 + 0x1234)).unwrap(), 0x34);
    let word = |at| ram.read_obj::<u32>(GuestAddress(ZERO_PAGE + at)).unwrap();
    assert_eq!(word(0x70), RSDP as u32);
    assert_eq!(word(0x202), u32::from_le_bytes(*b"HdrS"));
    assert_eq!(word(0x210) & 0xff, 0xff, "type of loader");
    assert_eq!(word(0x228), COMMAND_LINE as u32);
    let (initrd_address, initrd_bytes) = (word(0x218), word(0x21c));
    assert_eq!(u64::from(initrd_address), (RAM_BYTES - 5000) & !0xfff);
    assert_eq!(initrd_bytes, 5000);
    assert_eq!(
        ram.read_obj::<u8>(GuestAddress(u64::from(initrd_address) + 4999))
            .unwrap(),
        7
    );
    assert_eq!(word(0x1e8) & 0xff, 5, "E820 entries");
    assert_eq!((word(0x2d0), word(0x2d8), word(0x2e0)), (0, 0x9_fc00, 1));
    let mut text = [0; 14];
    ram.read_slice(&mut text, GuestAddress(COMMAND_LINE)).unwrap();
    assert_eq!(&text, b"console=ttyS0\0");
}

#[test]
fn a_kernel_that_does_not_fit_where_it_likes_is_moved_if_it_can_be() {
    let mut image = bzimage();
    put(&mut image, 0x258, &0x3ff_0000u64.to_le_bytes());
    let (_, entry) = boot_into(&ram(), &image, None, "").unwrap();
    assert!(matches!(entry, Entry::Long { rip: 0x20_0200, .. }), "{entry:?}");
    put(&mut image, 0x234, &[0]);
    assert!(refusal(&image).starts_with("the kernel image does not fit into guest RAM"));
}

#[test]
fn an_elf_kernel_is_entered_at_its_note_with_cleared_bss() {
    let ram = ram();
    ram.write_slice(&[0xee; 0x4000], GuestAddress(0x20_0000)).unwrap();
    let booted = boot_into(&ram, &elf(), Some(b"initrd"), "quiet").unwrap();
    let entry = Entry::Protected {
        eip: 0x20_0010,
        ebx: START_INFO as u32,
    };
    assert_eq!(booted, (KernelFormat::Pvh, entry));
    for (address, byte) in [(0x20_00ff, 0x90), (0x20_0100, 0), (0x20_2fff, 0), (0x20_3000, 0xee)] {
        assert_eq!(ram.read_obj::<u8>(GuestAddress(address)).unwrap(), byte, "{address:#x}");
    }
    let word = |at| ram.read_obj::<u64>(GuestAddress(START_INFO + at)).unwrap();
    assert_eq!(word(0), 0x1_336e_c578);
    assert_eq!(word(24), COMMAND_LINE);
    assert_eq!(word(32), RSDP);
    let module = word(16);
    assert_eq!(ram.read_obj::<u64>(GuestAddress(module)).unwrap(), RAM_BYTES - 4096);
    assert_eq!(ram.read_obj::<u64>(GuestAddress(module + 8)).unwrap(), 6);
}

#[test]
fn a_flat_image_is_entered_behind_its_header() {
    let ram = ram();
    let booted = boot_into(&ram, &flat(), None, "").unwrap();
    let entry = Entry::Long {
        rip: 0x20_0010,
        rsi: START_INFO,
    };
    assert_eq!(booted, (KernelFormat::Flat, entry));
    assert_eq!(ram.read_obj::<u8>(GuestAddress(0x20_0010)).unwrap(), 0xf4);
}

#[test]
fn refusals_name_what_is_wrong() {
    let changed = |mut image: Vec<u8>, at: usize, bytes: &[u8]| {
        put(&mut image, at, bytes);
        image
    };
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "the kernel image is truncated: it has 0 bytes"),
        (vec![0; 4096], "the kernel image is of no known format"),
        (
            bzimage()[..0x210].to_vec(),
            "the kernel image is truncated: the setup header",
        ),
        (
            bzimage()[..0x1000].to_vec(),
            "the kernel image is truncated: its header announces 8192",
        ),
        (
            changed(bzimage(), 0x1fe, &[0, 0]),
            "the kernel image is damaged: its boot flag is 0x0",
        ),
        (
            changed(bzimage(), 0x206, &[0, 2]),
            "the kernel image cannot be booted: it speaks boot protocol 2.00",
        ),
        (
            changed(bzimage(), 0x236, &[0]),
            "the kernel image cannot be booted: it is not a 64-bit kernel",
        ),
        (
            changed(bzimage(), 0x1f1, &[255]),
            "the kernel image is truncated: its header announces",
        ),
        (
            changed(bzimage(), 0x24c, &[255; 4]),
            "the kernel image is truncated: its compressed kernel",
        ),
        (
            changed(bzimage(), 0x260, &[255; 4]),
            "the kernel image does not fit into guest RAM",
        ),
        (elf()[..40].to_vec(), "the kernel image is truncated"),
        (
            changed(elf(), 4, &[1]),
            "the kernel image cannot be booted: it is an ELF file, but not",
        ),
        (
            changed(elf(), 56, &[255]),
            "the kernel image is damaged: its ELF header announces 255",
        ),
        (
            changed(elf(), 32, &[255; 8]),
            "the kernel image is truncated: its 2 program headers",
        ),
        (
            elf()[..0x250].to_vec(),
            "the kernel image is truncated: segment 0 has 256 bytes",
        ),
        (
            changed(elf(), 72, &[255; 8]),
            "the kernel image is truncated: segment 0",
        ),
        (
            changed(elf(), 88, &[255; 8]),
            "the kernel image does not fit into guest RAM: segment 0",
        ),
        (
            changed(elf(), 88, &[0; 8]),
            "the kernel image does not fit into guest RAM: segment 0",
        ),
        (
            changed(elf(), 104, &[0; 8]),
            "the kernel image is damaged: segment 0 is larger",
        ),
        (
            changed(elf(), 64, &[0]),
            "the kernel image is damaged: it has nothing to load",
        ),
        (
            changed(elf(), 0x18c, b"GNU"),
            "the kernel image cannot be booted: it is an ELF file without a PVH note",
        ),
        (
            changed(elf(), 0x190, &[0; 4]),
            "the kernel image is damaged: its PVH entry point 0x0",
        ),
        (
            flat()[..12].to_vec(),
            "the kernel image is truncated: a flat image has a header of 16 bytes",
        ),
        (
            changed(flat(), 8, &[0; 8]),
            "the kernel image does not fit into guest RAM: it has 24 bytes",
        ),
    ];
    for (image, wanted) in cases {
        let refused = refusal(&image);
        assert!(refused.starts_with(wanted), "wanted {wanted:?}, got {refused:?}");
        assert!(!refused.contains('\n'));
    }
}

#[test]
fn command_line_and_initrd_are_checked() {
    let long = "x".repeat(101);
    let error = boot_into(&ram(), &bzimage(), None, &long).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the kernel command line has 101 bytes, this kernel takes 100"
    );
    boot_into(&ram(), &flat(), None, &long).unwrap();
    let error = boot_into(&ram(), &flat(), None, &"x".repeat(0x1_0000)).unwrap_err();
    assert!(matches!(error, BootError::CommandLineLength { .. }));
    let error = boot_into(&ram(), &flat(), None, "a\0b").unwrap_err();
    assert!(matches!(error, BootError::CommandLineNul));
    let initrd = vec![0; (RAM_BYTES - 0x20_0000) as usize];
    let error = boot_into(&ram(), &flat(), Some(&initrd), "").unwrap_err();
    assert!(error.to_string().starts_with("the initrd does not fit"), "{error}");
}

proptest! {
    /// Any bytes anywhere in the headers: a refusal or a kernel inside RAM, never a panic.
    #[test]
    fn hostile_headers_are_refused_or_harmless(
        kind in 0..3usize,
        changes in proptest::collection::vec((0..0x270usize, any::<u8>()), 1..12),
        cut in proptest::option::of(0..0x2400usize),
    ) {
        let mut image = [bzimage(), elf(), flat()][kind].clone();
        for (at, byte) in changes {
            // Most changes would spoil the magic in a small file's first bytes.
            if let Some(slot) = image.get_mut(at.max(8)) {
                *slot = byte;
            }
        }
        if let Some(cut) = cut {
            image.truncate(cut);
        }
        match boot_into(&ram(), &image, None, "") {
            Ok((_, Entry::Long { rip, .. })) => prop_assert!((KERNEL_RAM_START..RAM_BYTES).contains(&rip)),
            Ok((_, Entry::Protected { eip, .. })) => prop_assert!((KERNEL_RAM_START..RAM_BYTES).contains(&u64::from(eip))),
            Err(error) => prop_assert!(!error.to_string().contains('\n')),
        }
    }
}
