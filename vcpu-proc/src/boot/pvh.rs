//! ELF kernels with a PVH note: the headers are checked here, segment by segment, before linux-loader copies anything.

use super::error::BootError;
use super::image::Image;
use super::memory_map::low_ram_end;
use crate::layout::KERNEL_RAM_START;
use ipc::memory::GuestRam;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use std::ops::Range;
use vm_memory::{Address, Bytes, GuestAddress};

/// First bytes of an ELF file.
pub const MAGIC: &[u8; 4] = b"\x7fELF";

const HEADER_BYTES: usize = 64;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const PROGRAM_HEADER_BYTES: usize = 56;
const TYPE_LOAD: u32 = 1;
const TYPE_NOTE: u32 = 4;
/// Linux has fewer than ten.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// Linux' notes are a few hundred bytes.
const MAX_NOTE_BYTES: u64 = 64 << 10;
/// What is written at once when the memory behind a segment is cleared.
const CLEAR_BYTES: usize = 64 << 10;

/// A program header's fields that matter.
#[derive(Debug, Clone, Copy)]
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

/// Loads the kernel. Returns its PVH entry point and its end.
///
/// # Errors
/// Names what is wrong with the file.
pub fn load(ram: &GuestRam, ram_bytes: u64, image: &mut Image) -> Result<(u32, u64), BootError> {
    let segments = read_segments(image)?;
    let mut loaded: Vec<Range<u64>> = Vec::new();
    let mut end = 0;
    for (index, segment) in segments.iter().enumerate() {
        if let Some(range) = check(index, segment, image.size_bytes(), low_ram_end(ram_bytes))? {
            if loaded
                .iter()
                .any(|other| other.start < range.end && range.start < other.end)
            {
                return Err(BootError::Damaged(format!("segment {index} overlaps another")));
            }
            end = end.max(range.end);
            loaded.push(range);
        }
    }
    if loaded.is_empty() {
        return Err(BootError::Damaged("it has nothing to load".to_owned()));
    }
    let result = Elf::load(ram, None, image, None).map_err(|error| BootError::Damaged(error.to_string()))?;
    let PvhBootCapability::PvhEntryPresent(entry) = result.pvh_boot_cap else {
        return Err(BootError::Unsupported(
            "it is an ELF file without a PVH note (build Linux with CONFIG_PVH, or use its bzImage)".to_owned(),
        ));
    };
    let entry = entry.raw_value();
    if !loaded.iter().any(|range| range.contains(&entry)) {
        return Err(BootError::Damaged(format!(
            "its PVH entry point {entry:#x} is in none of its segments"
        )));
    }
    // RAM keeps its contents over a reset, so what a kernel expects to be zero is made so.
    for segment in segments.iter().filter(|segment| segment.kind == TYPE_LOAD) {
        let zeros = [0; CLEAR_BYTES];
        let (mut at, end) = (
            segment.address + segment.file_bytes,
            segment.address + segment.memory_bytes,
        );
        while at < end {
            let length = usize::try_from(end - at).unwrap_or(CLEAR_BYTES).min(CLEAR_BYTES);
            ram.write_slice(&zeros[..length], GuestAddress(at))?;
            at += length as u64;
        }
    }
    let entry = u32::try_from(entry).map_err(|_| BootError::Damaged("its entry point is above 4 GiB".to_owned()))?;
    Ok((entry, end))
}

fn read_segments(image: &Image) -> Result<Vec<Segment>, BootError> {
    let mut header = [0; HEADER_BYTES];
    image.read_at(&mut header, 0, "an ELF header has 64 bytes")?;
    let (class, order) = (header[4], header[5]);
    let machine = u16::from_le_bytes([header[18], header[19]]);
    if (class, order, machine) != (CLASS_64, LITTLE_ENDIAN, MACHINE_X86_64) {
        return Err(BootError::Unsupported(
            "it is an ELF file, but not a 64-bit one for x86-64".to_owned(),
        ));
    }
    let start = u64_at(&header, 32);
    let entry_bytes = u16::from_le_bytes([header[54], header[55]]);
    let count = u16::from_le_bytes([header[56], header[57]]);
    if usize::from(entry_bytes) != PROGRAM_HEADER_BYTES || count > MAX_PROGRAM_HEADERS {
        return Err(BootError::Damaged(format!(
            "its ELF header announces {count} program headers of {entry_bytes} bytes"
        )));
    }
    let table_bytes = usize::from(count) * PROGRAM_HEADER_BYTES;
    if start < HEADER_BYTES as u64
        || start
            .checked_add(table_bytes as u64)
            .is_none_or(|end| end > image.size_bytes())
    {
        return Err(BootError::Truncated {
            what: "kernel image",
            detail: format!("its {count} program headers at {start:#x} are not all there"),
        });
    }
    let mut table = vec![0; table_bytes];
    image.read_at(&mut table, start, "a program header is missing")?;
    Ok(table
        .chunks_exact(PROGRAM_HEADER_BYTES)
        .map(|bytes| Segment {
            kind: u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            offset: u64_at(bytes, 8),
            address: u64_at(bytes, 24),
            file_bytes: u64_at(bytes, 32),
            memory_bytes: u64_at(bytes, 40),
        })
        .collect())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

/// Checks a segment; returns where it will lie when it is one to load.
fn check(index: usize, segment: &Segment, file_bytes: u64, ram_end: u64) -> Result<Option<Range<u64>>, BootError> {
    if !matches!(segment.kind, TYPE_LOAD | TYPE_NOTE) {
        return Ok(None);
    }
    if segment
        .offset
        .checked_add(segment.file_bytes)
        .is_none_or(|end| end > file_bytes)
    {
        return Err(BootError::Truncated {
            what: "kernel image",
            detail: format!(
                "segment {index} has {} bytes at {:#x}, the file has {file_bytes}",
                segment.file_bytes, segment.offset
            ),
        });
    }
    if segment.kind == TYPE_NOTE {
        if segment.file_bytes > MAX_NOTE_BYTES {
            return Err(BootError::Damaged(format!(
                "its notes have {} bytes",
                segment.file_bytes
            )));
        }
        return Ok(None);
    }
    if segment.memory_bytes < segment.file_bytes {
        return Err(BootError::Damaged(format!(
            "segment {index} is larger in the file than in memory"
        )));
    }
    if segment.memory_bytes == 0 {
        return Ok(None);
    }
    let end = segment.address.checked_add(segment.memory_bytes);
    match end {
        Some(end) if segment.address >= KERNEL_RAM_START && end <= ram_end => Ok(Some(segment.address..end)),
        _ => Err(BootError::TooLarge {
            what: "kernel image",
            detail: format!(
                "segment {index} wants {:#x} bytes at {:#x}, RAM for kernels is {KERNEL_RAM_START:#x} to {ram_end:#x}",
                segment.memory_bytes, segment.address
            ),
        }),
    }
}
