//! What the monitor says at entry: PVH's hvm_start_info.

use crate::region::Region;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

const MAGIC: u32 = 0x336e_c578;
const E820_RAM: u32 = 1;
const MAX_REGIONS: usize = 16;
const MAX_COMMAND_LINE: usize = 4096;

/// Facts from the start info, copied into the image.
struct Facts {
    rsdp: AtomicU64,
    ram: [(AtomicU64, AtomicU64); MAX_REGIONS],
    ram_regions: AtomicUsize,
    modules: (AtomicU64, AtomicU64),
    command_line: [AtomicU64; MAX_COMMAND_LINE / 8],
    command_line_bytes: AtomicUsize,
}

static FACTS: Facts = Facts {
    rsdp: AtomicU64::new(0),
    ram: [const { (AtomicU64::new(0), AtomicU64::new(0)) }; MAX_REGIONS],
    ram_regions: AtomicUsize::new(0),
    modules: (AtomicU64::new(u64::MAX), AtomicU64::new(0)),
    command_line: [const { AtomicU64::new(0) }; MAX_COMMAND_LINE / 8],
    command_line_bytes: AtomicUsize::new(0),
};

/// Reads the start info at `address`. Panics when it is none.
pub fn init(address: u64) {
    let info = Region::new(address, 56);
    assert_eq!(info.read::<u32>(0), MAGIC, "no hvm_start_info at {address:#x}");
    let (version, modules) = (info.read::<u32>(4), info.read::<u32>(12));
    FACTS.rsdp.store(info.read(32), Ordering::Relaxed);
    if modules > 0 {
        let list = Region::new(info.read(16), 32 * u64::from(modules));
        for index in 0..u64::from(modules) {
            let (start, bytes) = (list.read::<u64>(32 * index), list.read::<u64>(32 * index + 8));
            FACTS.modules.0.fetch_min(start, Ordering::Relaxed);
            FACTS.modules.1.fetch_max(start + bytes, Ordering::Relaxed);
        }
    }
    if version >= 1 {
        let entries = u64::from(info.read::<u32>(48));
        let map = Region::new(info.read(40), 24 * entries);
        for index in 0..entries {
            let (start, bytes, kind) = (
                map.read(24 * index),
                map.read(24 * index + 8),
                map.read::<u32>(24 * index + 16),
            );
            let known = FACTS.ram_regions.load(Ordering::Relaxed);
            if kind == E820_RAM && known < MAX_REGIONS {
                FACTS.ram[known].0.store(start, Ordering::Relaxed);
                FACTS.ram[known].1.store(bytes, Ordering::Relaxed);
                FACTS.ram_regions.store(known + 1, Ordering::Relaxed);
            }
        }
    }
    let text = info.read::<u64>(24);
    if text != 0 {
        let text = Region::new(text, MAX_COMMAND_LINE as u64);
        let mut length = 0;
        while length < MAX_COMMAND_LINE {
            let byte = text.read::<u8>(length as u64);
            if byte == 0 {
                break;
            }
            let word = &FACTS.command_line[length / 8];
            word.fetch_or(u64::from(byte) << (8 * (length % 8)), Ordering::Relaxed);
            length += 1;
        }
        FACTS.command_line_bytes.store(length, Ordering::Relaxed);
    }
}

/// Physical address of ACPI's root pointer, 0 when the monitor gives none.
pub fn rsdp() -> u64 {
    FACTS.rsdp.load(Ordering::Relaxed)
}

/// Start and length of each piece of RAM.
pub fn ram() -> impl Iterator<Item = (u64, u64)> {
    FACTS.ram[..FACTS.ram_regions.load(Ordering::Relaxed)]
        .iter()
        .map(|(start, bytes)| (start.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed)))
}

/// From where to where the initial RAM disk and other modules lie; without any the end comes before the start.
pub fn modules() -> (u64, u64) {
    (
        FACTS.modules.0.load(Ordering::Relaxed),
        FACTS.modules.1.load(Ordering::Relaxed),
    )
}

/// Copies the command line out; returns its length.
pub fn command_line(into: &mut [u8; MAX_COMMAND_LINE]) -> usize {
    for (piece, word) in into.chunks_exact_mut(8).zip(&FACTS.command_line) {
        piece.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
    }
    FACTS.command_line_bytes.load(Ordering::Relaxed)
}
