//! Flat 64-bit images, for small test guests: the magic, the load address, then code. The whole file is loaded and entered
//! behind its header, in long mode, with the PVH start info in rsi.

use super::entry::MAPPED_BYTES;
use super::error::BootError;
use super::image::Image;
use super::memory_map::low_ram_end;
use crate::layout::KERNEL_RAM_START;
use ipc::memory::GuestRam;

/// First eight bytes.
pub const MAGIC: &[u8; 8] = b"BHFLAT64";
/// Magic and load address.
const HEADER_BYTES: u64 = 16;

const _: () = assert!(MAPPED_BYTES >= ipc::memory::LOW_RAM_END);

/// Loads the image. Returns where it is entered and where it ends.
///
/// # Errors
/// When it is truncated or does not fit.
pub fn load(ram: &GuestRam, ram_bytes: u64, image: &Image) -> Result<(u64, u64), BootError> {
    let mut header = [0; HEADER_BYTES as usize];
    image.read_at(&mut header, 0, "a flat image has a header of 16 bytes")?;
    let mut address = [0; 8];
    address.copy_from_slice(&header[8..]);
    let address = u64::from_le_bytes(address);
    let room = KERNEL_RAM_START..low_ram_end(ram_bytes);
    let end = address
        .checked_add(image.size_bytes())
        .filter(|end| room.contains(&address) && *end <= room.end)
        .ok_or_else(|| BootError::TooLarge {
            what: "kernel image",
            detail: format!(
                "it has {} bytes for address {address:#x}, RAM for kernels is {:#x} to {:#x}",
                image.size_bytes(),
                room.start,
                room.end
            ),
        })?;
    if image.size_bytes() <= HEADER_BYTES {
        return Err(BootError::Truncated {
            what: "kernel image",
            detail: "a flat image has code behind its header".to_owned(),
        });
    }
    image.copy_to(ram, address, 0, image.size_bytes())?;
    Ok((address + HEADER_BYTES, end))
}
