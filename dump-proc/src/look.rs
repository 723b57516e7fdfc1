//! Looking at memory and saving ranges of it: no header, no registers, just what is at an address.

use crate::elf::describe;
use crate::memory::{GuestMemory, Located};
use crate::output::Output;
use crate::paging::translate;
use ipc::Failure;
use ipc::dump::{DumpOutput, DumpReply, MAX_READ_BYTES};
use ipc::memory::PAGE_BYTES;
use ipc::paging::{AddressSpace, Paging};
use std::io;

/// Memory is read and written this much at a time, bytes.
const CHUNK_BYTES: u64 = 1 << 20;

/// Why a range is not saved.
#[derive(Debug, thiserror::Error)]
enum SaveError {
    /// A virtual address has no RAM behind it.
    #[error("not mapped")]
    Unmapped,
    /// The output takes no more.
    #[error("{}", describe(.0))]
    Output(io::Error),
    /// Guest RAM could not be read.
    #[error("reading guest memory: {}", describe(.0))]
    Memory(io::Error),
}

/// A piece of a range: RAM, or what reads as zeros.
struct Piece {
    ram: Option<u64>,
    bytes: u64,
}

/// What is at an address; `None`: a virtual address that leads nowhere.
fn piece(memory: &GuestMemory, space: &AddressSpace, address: u64) -> io::Result<Option<Piece>> {
    let ram = |found: Located, most: u64| Piece {
        ram: Some(found.offset),
        bytes: found.bytes.min(most),
    };
    match space {
        AddressSpace::Physical => Ok(Some(match memory.locate(address) {
            Some(found) => ram(found, u64::MAX),
            None => Piece {
                ram: None,
                bytes: memory.next_ram(address).map_or(u64::MAX, |next| next - address),
            },
        })),
        AddressSpace::Virtual(paging) => {
            let Some(mapped) = translate(memory, paging, address)? else {
                return Ok(None);
            };
            Ok(memory.locate(mapped.address).map(|found| ram(found, mapped.bytes)))
        }
    }
}

/// Saves a range and closes the output.
///
/// # Errors
/// The system's, for the output or for guest RAM.
pub fn save(
    memory: &GuestMemory,
    output: DumpOutput,
    space: &AddressSpace,
    address: u64,
    length: u64,
) -> Result<DumpReply, Failure> {
    match copy(memory, output, space, address, length) {
        Ok(()) => Ok(DumpReply::Saved),
        Err(SaveError::Unmapped) => Ok(DumpReply::Unmapped),
        Err(failed) => Err(Failure::new(failed.to_string())),
    }
}

fn copy(
    memory: &GuestMemory,
    output: DumpOutput,
    space: &AddressSpace,
    mut address: u64,
    mut left: u64,
) -> Result<(), SaveError> {
    let mut output = Output::new(output).map_err(SaveError::Output)?;
    let mut buffer = vec![0; CHUNK_BYTES.min(left) as usize];
    while left > 0 {
        let piece = piece(memory, space, address).map_err(SaveError::Memory)?;
        let piece = piece.ok_or(SaveError::Unmapped)?;
        let bytes = piece.bytes.min(left);
        match piece.ram {
            None => output.put_zeros(bytes).map_err(SaveError::Output)?,
            Some(offset) => copy_ram(memory, &mut output, &mut buffer, offset, bytes)?,
        }
        left -= bytes;
        if left > 0 {
            // Behind the last address there is nothing.
            address = address.checked_add(bytes).ok_or(SaveError::Unmapped)?;
        }
    }
    output.finish().map_err(SaveError::Output)
}

fn copy_ram(
    memory: &GuestMemory,
    output: &mut Output,
    buffer: &mut [u8],
    mut offset: u64,
    bytes: u64,
) -> Result<(), SaveError> {
    let end = offset + bytes;
    while offset < end {
        let near = end.min(offset + CHUNK_BYTES);
        // Pages are read as they come: only a large piece can have a hole that is worth asking for.
        let (step, is_data) = if end - offset > PAGE_BYTES {
            let extent = memory.extent(offset, near).map_err(SaveError::Memory)?;
            (extent.bytes, extent.is_data)
        } else {
            (end - offset, true)
        };
        if is_data {
            let chunk = &mut buffer[..step as usize];
            memory.read(offset, chunk).map_err(SaveError::Memory)?;
            output.put(chunk).map_err(SaveError::Output)?;
        } else {
            output.put_zeros(step).map_err(SaveError::Output)?;
        }
        offset += step;
    }
    Ok(())
}

/// Reads up to the first byte that has no RAM behind it.
///
/// # Errors
/// When too much is asked for, or guest RAM cannot be read.
pub fn read(memory: &GuestMemory, space: &AddressSpace, address: u64, length: u32) -> Result<DumpReply, Failure> {
    let length = length as usize;
    if length > MAX_READ_BYTES {
        return Err(Failure::new(format!(
            "dump-proc: {length} bytes are too many for one read"
        )));
    }
    let mut bytes = vec![0; length];
    let mut done = 0;
    while done < length {
        let Some(address) = address.checked_add(done as u64) else {
            break;
        };
        let found = piece(memory, space, address)?;
        let Some((offset, available)) = found.and_then(|piece| Some((piece.ram?, piece.bytes))) else {
            break;
        };
        let step = usize::try_from(available).unwrap_or(usize::MAX).min(length - done);
        memory.read(offset, &mut bytes[done..done + step])?;
        done += step;
    }
    bytes.truncate(done);
    Ok(DumpReply::Bytes(bytes))
}

/// Translates a virtual address.
///
/// # Errors
/// When guest RAM cannot be read.
pub fn resolve(memory: &GuestMemory, paging: &Paging, address: u64) -> Result<DumpReply, Failure> {
    let mapped = translate(memory, paging, address)?;
    Ok(DumpReply::Translated(mapped.map(|mapped| mapped.address)))
}
