//! Compressed clusters: where they are, and what they unpack to.

use std::io::Read;

/// How an image's compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Deflate,
    /// Zstandard.
    Zstd,
}

/// Where a compressed cluster is: an L2 entry taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset of its first byte.
    pub offset: u64,
    /// Up to the end of its last sector, bytes. The stream ends somewhere in there.
    pub bytes: u64,
}

const SECTOR_BYTES: u64 = 512;
/// QEMU unpacks with a window of this size.
const WINDOW_BITS: u8 = 12;

impl Extent {
    /// The L2 entry for it.
    pub fn entry(self, cluster_bits: u32) -> u64 {
        let offset_bits = 62 - (cluster_bits - 8);
        let sectors = (self.offset + self.bytes - 1) / SECTOR_BYTES - self.offset / SECTOR_BYTES;
        1 << 62 | sectors << offset_bits | self.offset
    }

    /// Takes an L2 entry apart.
    pub fn of_entry(entry: u64, cluster_bits: u32) -> Self {
        let offset_bits = 62 - (cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = (entry & ((1 << 62) - 1)) >> offset_bits;
        Self {
            offset,
            bytes: (sectors + 1) * SECTOR_BYTES - offset % SECTOR_BYTES,
        }
    }
}

/// Packs into at most `room` bytes. `None`: it needs more.
pub fn pack(compression: Compression, bytes: &[u8], room: usize) -> Option<Vec<u8>> {
    match compression {
        Compression::Deflate => {
            let mut packer = flate2::Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS);
            let mut out = Vec::with_capacity(room);
            let status = packer.compress_vec(bytes, &mut out, flate2::FlushCompress::Finish);
            matches!(status, Ok(flate2::Status::StreamEnd)).then_some(out)
        }
        Compression::Zstd => {
            let mut out = Vec::new();
            ruzstd::encoding::compress(bytes, &mut out, ruzstd::encoding::CompressionLevel::Fastest);
            (out.len() <= room).then_some(out)
        }
    }
}

/// Unpacks exactly `bytes`.
///
/// # Errors
/// When the data is not a stream that unpacks to so much.
pub fn unpack(compression: Compression, packed: &[u8], bytes: usize) -> Result<Vec<u8>, Damaged> {
    let mut out = vec![0; bytes];
    match compression {
        Compression::Deflate => flate2::read::DeflateDecoder::new(packed)
            .read_exact(&mut out)
            .map_err(|_| Damaged)?,
        Compression::Zstd => ruzstd::decoding::StreamingDecoder::new(packed)
            .map_err(|_| Damaged)?
            .read_exact(&mut out)
            .map_err(|_| Damaged)?,
    }
    Ok(out)
}

/// A compressed cluster that cannot be unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the compressed data is damaged")]
pub struct Damaged;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_says_where_and_how_many_sectors() {
        // 64 KiB clusters: 54 bits of offset, 8 of sectors.
        let entry = 1 << 62 | 3 << 54 | 0x1_2345;
        let extent = Extent::of_entry(entry, 16);
        assert_eq!((extent.offset, extent.bytes), (0x1_2345, 4 * 512 - 0x145));
        assert_eq!(extent.entry(16), entry);
    }

    #[test]
    fn damaged_streams_are_errors() {
        assert_eq!(unpack(Compression::Deflate, &[0xff; 100], 512), Err(Damaged));
        assert_eq!(unpack(Compression::Zstd, &[0xff; 100], 512), Err(Damaged));
        assert_eq!(unpack(Compression::Zstd, &[], 512), Err(Damaged));
    }
}
