//! From descriptor chains to checked virtio-blk requests.
//!
//! The guest is hostile and may change its memory while we look: every value is read once, into a type that needs no
//! further check. Two kinds of mistakes are told apart: a chain in which there is not even a status byte to answer in
//! (or that leaves RAM) is a broken ring; anything else is answered with an error status.

use super::chain::{BrokenChain, Chain};
use crate::buffer::Segments;
use ipc::block::IoKind;
use ipc::memory::GuestRam;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Address, GuestAddress};

/// The unit of virtio-blk addresses, bytes.
pub const SECTOR_BYTES: u64 = 512;
/// Most ranges in one discard or write-zeroes request.
pub const MAX_RANGES: usize = 16;
/// Largest range of a discard or write-zeroes request, sectors: what fits into a signed 32-bit number of bytes.
pub const MAX_RANGE_SECTORS: u32 = i32::MAX as u32 / SECTOR_BYTES as u32;
/// `struct virtio_blk_outhdr`: type, reserved (priority), sector.
const HEADER_BYTES: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
const RANGE_BYTES: usize = 16;

/// What of a disk decides whether a request is acceptable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size, sectors.
    pub capacity_sectors: u64,
    /// Requests start and end on multiples of it, sectors.
    pub block_sectors: u64,
    /// Nothing may change.
    pub read_only: bool,
}

/// A range of bytes inside the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRange {
    /// Its start.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
}

/// A range of a write-zeroes request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZeroRange {
    /// Where.
    pub range: ByteRange,
    /// The guest allows that its space is given up.
    pub may_unmap: bool,
}

/// An acceptable request.
#[derive(Debug, Clone)]
pub enum Command {
    /// VIRTIO_BLK_T_IN.
    Read {
        /// Byte offset on the disk.
        offset: u64,
        /// Guest memory to fill.
        into: Segments,
    },
    /// VIRTIO_BLK_T_OUT.
    Write {
        /// Byte offset on the disk.
        offset: u64,
        /// Guest memory to write.
        from: Segments,
    },
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// VIRTIO_BLK_T_GET_ID.
    GetId {
        /// Guest memory for the serial number.
        into: Segments,
    },
    /// VIRTIO_BLK_T_DISCARD.
    Discard(Vec<ByteRange>),
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    WriteZeroes(Vec<ZeroRange>),
    /// Not acceptable: answer with this status (VIRTIO_BLK_S_*).
    Refuse(u8),
}

/// A request and where its answer goes.
#[derive(Debug, Clone)]
pub struct Request {
    /// First descriptor of the chain: its name in the used ring.
    pub head: u16,
    /// Address of the status byte: in RAM.
    pub status: GuestAddress,
    /// Device-writable bytes before the status byte.
    pub writable_bytes: u32,
    /// What it counts as, if it is counted.
    pub kind: Option<IoKind>,
    /// What is asked.
    pub command: Command,
}

impl Request {
    /// How many bytes of the disk it is about.
    pub fn bytes(&self) -> u64 {
        match &self.command {
            Command::Read { into, .. } => into.bytes(),
            Command::Write { from, .. } => from.bytes(),
            Command::Discard(ranges) => ranges.iter().map(|range| range.bytes).sum(),
            Command::WriteZeroes(ranges) => ranges.iter().map(|zero| zero.range.bytes).sum(),
            Command::Flush | Command::GetId { .. } | Command::Refuse(_) => 0,
        }
    }

    /// The same on a disk that may have become smaller since it was checked.
    pub fn checked_again(mut self, geometry: &Geometry) -> Self {
        let end = match &self.command {
            Command::Read { offset, into } => offset + into.bytes(),
            Command::Write { offset, from } => offset + from.bytes(),
            Command::Discard(ranges) => ranges.iter().map(|range| range.offset + range.bytes).max().unwrap_or(0),
            Command::WriteZeroes(ranges) => {
                let ends = ranges.iter().map(|zero| zero.range.offset + zero.range.bytes);
                ends.max().unwrap_or(0)
            }
            Command::Flush | Command::GetId { .. } | Command::Refuse(_) => 0,
        };
        if end > geometry.capacity_sectors * SECTOR_BYTES {
            self.command = Command::Refuse(IO_ERROR);
        }
        self
    }
}

/// Reads a chain and checks what it asks.
///
/// # Errors
/// When the chain is broken: the device must stop.
pub fn parse(
    memory: &'static GuestRam,
    chain: DescriptorChain<&'static GuestRam>,
    geometry: &Geometry,
) -> Result<Request, BrokenChain> {
    let Chain {
        head,
        mut readable,
        mut writable,
        last,
    } = Chain::read(memory, chain)?;
    let mut header = [0; HEADER_BYTES];
    if readable.read_into(&mut header) != HEADER_BYTES {
        return Err(BrokenChain::NoHeader);
    }
    readable.advance(HEADER_BYTES as u64);
    let (start, bytes) = last.ok_or(BrokenChain::NoStatus)?;
    // The buffer is in RAM, so its last byte has an address.
    let status = start.checked_add(u64::from(bytes) - 1).ok_or(BrokenChain::OutsideRam)?;
    writable.truncate_one();
    let writable_bytes = u32::try_from(writable.bytes()).map_err(|_| BrokenChain::TooLong)?;
    let kind = u32_at(&header, 0);
    let sector = u64_at(&header, 8);
    let command = command(kind, sector, readable, writable, geometry).unwrap_or_else(Command::Refuse);
    Ok(Request {
        head,
        status,
        writable_bytes,
        kind: match kind {
            VIRTIO_BLK_T_IN => Some(IoKind::Read),
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_WRITE_ZEROES => Some(IoKind::Write),
            VIRTIO_BLK_T_FLUSH => Some(IoKind::Flush),
            VIRTIO_BLK_T_DISCARD => Some(IoKind::Unmap),
            _ => None,
        },
        command,
    })
}

/// The request's meaning, or the status to refuse it with.
fn command(kind: u32, sector: u64, readable: Segments, writable: Segments, geometry: &Geometry) -> Result<Command, u8> {
    match kind {
        VIRTIO_BLK_T_IN => Ok(Command::Read {
            offset: check_range(sector, writable.bytes(), geometry)?.offset,
            into: writable,
        }),
        VIRTIO_BLK_T_OUT => {
            check_writable(geometry)?;
            Ok(Command::Write {
                offset: check_range(sector, readable.bytes(), geometry)?.offset,
                from: readable,
            })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Command::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Command::GetId { into: writable }),
        VIRTIO_BLK_T_DISCARD => {
            check_writable(geometry)?;
            let ranges = ranges(&readable, 0, geometry)?;
            Ok(Command::Discard(ranges.into_iter().map(|zero| zero.range).collect()))
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            check_writable(geometry)?;
            ranges(&readable, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, geometry).map(Command::WriteZeroes)
        }
        _ => Err(UNSUPPORTED),
    }
}

/// The status of a request that fails.
pub const IO_ERROR: u8 = VIRTIO_BLK_S_IOERR as u8;
/// The status of a request that we do not know.
pub const UNSUPPORTED: u8 = VIRTIO_BLK_S_UNSUPP as u8;

fn check_writable(geometry: &Geometry) -> Result<(), u8> {
    if geometry.read_only { Err(IO_ERROR) } else { Ok(()) }
}

/// A range of whole blocks inside the disk, or an error status.
fn check_range(sector: u64, bytes: u64, geometry: &Geometry) -> Result<ByteRange, u8> {
    let sectors = bytes / SECTOR_BYTES;
    let inside = sector
        .checked_add(sectors)
        .is_some_and(|end| end <= geometry.capacity_sectors);
    let whole =
        bytes.is_multiple_of(SECTOR_BYTES * geometry.block_sectors) && sector.is_multiple_of(geometry.block_sectors);
    if !inside || !whole {
        return Err(IO_ERROR);
    }
    Ok(ByteRange {
        // No overflow: the capacity in bytes is a u64.
        offset: sector * SECTOR_BYTES,
        bytes,
    })
}

/// The ranges of a discard or write-zeroes request. A range with a flag outside `allowed_flags` is not supported.
fn ranges(readable: &Segments, allowed_flags: u32, geometry: &Geometry) -> Result<Vec<ZeroRange>, u8> {
    let mut bytes = [0; MAX_RANGES * RANGE_BYTES];
    let length = usize::try_from(readable.bytes()).map_err(|_| IO_ERROR)?;
    if length == 0 || length > bytes.len() || !length.is_multiple_of(RANGE_BYTES) {
        return Err(IO_ERROR);
    }
    readable.read_into(&mut bytes[..length]);
    bytes[..length]
        .chunks_exact(RANGE_BYTES)
        .map(|range| {
            let (sector, sectors, flags) = (u64_at(range, 0), u32_at(range, 8), u32_at(range, 12));
            if flags & !allowed_flags != 0 {
                return Err(UNSUPPORTED);
            }
            if sectors > MAX_RANGE_SECTORS {
                return Err(IO_ERROR);
            }
            Ok(ZeroRange {
                range: check_range(sector, u64::from(sectors) * SECTOR_BYTES, geometry)?,
                may_unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
            })
        })
        .collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}
