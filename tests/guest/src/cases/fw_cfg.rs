//! fw_cfg: by its ports and by descriptors, and the VMCOREINFO note that a kernel announces there.

use crate::clock::Deadline;
use crate::cpu::{in8, in32, out16, out32};
use crate::failure::{Failure, Outcome, ensure, equal, failure};
use crate::region::Region;
use crate::script::Arguments;
use crate::{alloc, println};

const SELECTOR: u16 = 0x510;
const DATA: u16 = 0x511;
const DMA_HIGH: u16 = 0x514;
const DMA_LOW: u16 = 0x518;

const SIGNATURE: u16 = 0;
const FEATURES: u16 = 1;
const DIRECTORY: u16 = 0x19;

const ERROR: u32 = 1;
const READ: u32 = 1 << 1;
const SELECT: u32 = 1 << 3;
const WRITE: u32 = 1 << 4;

const FILE: &[u8] = b"etc/vmcoreinfo\0";
const ENTRY_BYTES: usize = 64;
const TEXT: &[u8] = b"OSRELEASE=0.0.0-guest\nPAGESIZE=4096\n";

fn select(key: u16) {
    out16(SELECTOR, key);
}

fn read<const COUNT: usize>() -> [u8; COUNT] {
    core::array::from_fn(|_| in8(DATA))
}

/// The file's key and size, from the directory.
fn find() -> Result<(u16, u32), Failure> {
    select(DIRECTORY);
    let count = u32::from_be_bytes(read());
    ensure(count < 1000, "number of files")?;
    for _ in 0..count {
        let entry: [u8; ENTRY_BYTES] = read();
        if entry[8..].starts_with(FILE) {
            let [s0, s1, s2, s3, k0, k1, ..] = entry;
            return Ok((u16::from_be_bytes([k0, k1]), u32::from_be_bytes([s0, s1, s2, s3])));
        }
    }
    Err(failure("no etc/vmcoreinfo"))
}

/// Has a descriptor carried out; returns what is in its first word then.
fn transfer(descriptor: Region, control: u32, length: u32, address: u64) -> Result<u32, Failure> {
    descriptor.write(0, control.to_be());
    descriptor.write(4, length.to_be());
    descriptor.write(8, address.to_be());
    out32(DMA_HIGH, ((descriptor.address() >> 32) as u32).to_be());
    out32(DMA_LOW, (descriptor.address() as u32).to_be());
    let deadline = Deadline::after_ms(1000);
    loop {
        let now = u32::from_be(descriptor.read(0));
        if now & !ERROR == 0 {
            return Ok(now);
        }
        ensure(!deadline.passed(), "the descriptor is not carried out")?;
    }
}

/// Writes a note `at=` so many bytes into a page of its own, and says so (unless `tell=0`).
pub fn run(arguments: Arguments<'_>) -> Outcome {
    let (at, tell) = (arguments.number("at", 0)?, arguments.number("tell", 1)?);
    let note = alloc::permanent(4096).part(at, 24 + TEXT.len() as u64);
    // "VMCOREINFO" and its NUL, then the lengths and the type.
    for (offset, word) in [(0, 11), (4, TEXT.len() as u32), (8, 0)] {
        note.write::<u32>(offset, word);
    }
    note.part(12, 12).copy_from(b"VMCOREINFO\0\0");
    note.part(24, TEXT.len() as u64).copy_from(TEXT);
    println!("fwcfg note={:#x} bytes={}", note.address(), note.bytes());
    if tell == 0 {
        return Ok(());
    }

    select(SIGNATURE);
    equal("signature", u32::from_le_bytes(read()), u32::from_le_bytes(*b"QEMU"))?;
    select(FEATURES);
    equal("features", u32::from_le_bytes(read()), 3_u32)?;
    equal("address port", in32(DMA_HIGH), u32::from_le_bytes(*b"QEMU"))?;
    let (key, bytes) = find()?;
    equal("file size", bytes, 16_u32)?;
    let mark = alloc::mark();
    let memory = alloc::pages(64);
    let (descriptor, content) = (memory.part(0, 16), memory.part(16, 16));
    // Host format, guest format, size, address.
    content.write(0, 0_u16);
    content.write(2, 1_u16);
    content.write(4, note.bytes() as u32);
    content.write(8, note.address());
    let file = u32::from(key) << 16 | SELECT;
    equal(
        "write",
        transfer(descriptor, file | WRITE, bytes, content.address())?,
        0_u32,
    )?;
    let back = memory.part(32, 16);
    equal("read", transfer(descriptor, file | READ, bytes, back.address())?, 0_u32)?;
    select(key);
    for offset in 0..16 {
        let expected = content.read::<u8>(offset);
        equal("by a descriptor", back.read::<u8>(offset), expected)?;
        equal("by the ports", in8(DATA), expected)?;
    }
    // More than the file holds.
    let refused = transfer(descriptor, file | WRITE, 17, content.address())?;
    equal("a write that is too long", refused, ERROR)?;
    alloc::release(&mark);
    Ok(())
}
