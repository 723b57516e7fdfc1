//! L2 entries: what a cluster, or a subcluster of it, is.

use super::compressed::Extent;
use super::header::Header;

/// The cluster has this reference alone, and may be written where it is.
pub const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Reads as zeroes (version 3, without subclusters).
const ZERO: u64 = 1;
/// The offset of an L1 or a normal L2 entry.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Subclusters of a cluster, where there are any.
const SUBCLUSTERS: u64 = 32;

/// An L2 entry; without subclusters, the bitmap is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Entry {
    /// Where, and flags.
    pub descriptor: u64,
    /// Subclusters that are allocated (low half) or zero (high half).
    pub bitmap: u64,
}

/// What reading some bytes means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// They are at this offset of the image.
    Data(u64),
    /// Zeroes.
    Zero,
    /// The backing file's.
    Backing,
    /// In this compressed cluster.
    Compressed(Extent),
}

/// The entries' form in one image.
#[derive(Debug, Clone, Copy)]
pub struct Form {
    cluster_bits: u32,
    extended: bool,
    zero_flag: bool,
    /// Data is in another file, each cluster where the guest has it: there, 0 is a place like any other.
    external: bool,
}

/// An entry that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("L2 entry {descriptor:#x} (bitmap {bitmap:#x}) cannot be")]
pub struct Impossible {
    descriptor: u64,
    bitmap: u64,
}

impl Form {
    /// As the header has it.
    pub fn of(header: &Header) -> Self {
        Self {
            cluster_bits: header.cluster_bits,
            extended: header.extended_l2(),
            zero_flag: header.version >= 3,
            external: header.has_data_file(),
        }
    }

    /// The unit that is allocated or not, bytes.
    pub fn unit_bytes(self) -> u64 {
        let cluster = 1 << self.cluster_bits;
        if self.extended { cluster / SUBCLUSTERS } else { cluster }
    }

    /// How much of the disk one L2 table maps, bytes.
    pub fn bytes_per_l2(self) -> u64 {
        (1 << self.cluster_bits) / self.entry_bytes() as u64 * (1 << self.cluster_bits)
    }

    /// Whether guest data is in another file.
    pub fn is_external(self) -> bool {
        self.external
    }

    /// Size of an entry, bytes.
    pub fn entry_bytes(self) -> usize {
        if self.extended { 16 } else { 8 }
    }

    /// Whether clusters can be zero without being allocated.
    pub fn has_zeroes(self) -> bool {
        self.zero_flag
    }

    /// What is `at` bytes into the cluster.
    ///
    /// # Errors
    /// When the entry cannot be.
    pub fn content(self, entry: Entry, at: u64) -> Result<Content, Impossible> {
        let impossible = Impossible {
            descriptor: entry.descriptor,
            bitmap: entry.bitmap,
        };
        if entry.descriptor & COMPRESSED != 0 {
            let extent = Extent::of_entry(entry.descriptor, self.cluster_bits);
            // QEMU has never set the flag here, and a subcluster of a compressed cluster means nothing.
            if entry.descriptor & COPIED != 0 || entry.bitmap != 0 || self.external {
                return Err(impossible);
            }
            return Ok(Content::Compressed(extent));
        }
        let host = entry.descriptor & OFFSET_MASK;
        if !host.is_multiple_of(1 << self.cluster_bits) {
            return Err(impossible);
        }
        let (allocated, zero) = if self.extended {
            if entry.bitmap as u32 & (entry.bitmap >> 32) as u32 != 0 || entry.descriptor & ZERO != 0 {
                return Err(impossible);
            }
            let bit = at / self.unit_bytes();
            (entry.bitmap >> bit & 1 != 0, entry.bitmap >> (32 + bit) & 1 != 0)
        } else {
            let zero = entry.descriptor & ZERO != 0;
            if zero && !self.zero_flag {
                return Err(impossible);
            }
            (self.has_place(entry) && !zero, zero)
        };
        match (allocated, zero) {
            (_, true) => Ok(Content::Zero),
            (true, _) if !self.has_place(entry) => Err(impossible),
            (true, _) => Ok(Content::Data(host + at)),
            (false, false) => Ok(Content::Backing),
        }
    }

    /// The cluster that the entry has for itself, whether or not all of it is in use.
    pub fn own_cluster(self, entry: Entry) -> Option<u64> {
        let host = entry.descriptor & OFFSET_MASK;
        let own = entry.descriptor & COMPRESSED == 0 && entry.descriptor & COPIED != 0;
        (own && self.has_place(entry)).then_some(host)
    }

    fn has_place(self, entry: Entry) -> bool {
        entry.descriptor & OFFSET_MASK != 0 || (self.external && entry.descriptor & COPIED != 0)
    }

    /// The cluster that the entry has a place in the image for, alone or not.
    pub fn place(self, entry: Entry) -> Option<u64> {
        (entry.descriptor & COMPRESSED == 0 && self.has_place(entry)).then_some(entry.descriptor & OFFSET_MASK)
    }

    /// The bytes of the image that the entry refers to, to be given up with it.
    pub fn referred(self, entry: Entry) -> Option<(u64, u64)> {
        if self.external {
            return None;
        }
        if entry.descriptor & COMPRESSED != 0 {
            let extent = Extent::of_entry(entry.descriptor, self.cluster_bits);
            return Some((extent.offset, extent.bytes));
        }
        let host = entry.descriptor & OFFSET_MASK;
        (host != 0).then_some((host, 1 << self.cluster_bits))
    }

    /// A cluster of which all is data.
    pub fn data(self, host: u64) -> Entry {
        Entry {
            descriptor: host | COPIED,
            bitmap: if self.extended { u64::from(u32::MAX) } else { 0 },
        }
    }

    /// A cluster that reads as zeroes, and keeps its place in the image if it has one for itself.
    pub fn zeroes(self, keep: Option<u64>) -> Entry {
        let place = keep.map_or(0, |host| host | COPIED);
        if self.extended {
            Entry {
                descriptor: place,
                bitmap: u64::from(u32::MAX) << 32,
            }
        } else {
            Entry {
                descriptor: place | ZERO,
                bitmap: 0,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(extended: bool, zero_flag: bool) -> Form {
        Form {
            cluster_bits: 16,
            extended,
            zero_flag,
            external: false,
        }
    }

    fn entry(descriptor: u64, bitmap: u64) -> Entry {
        Entry { descriptor, bitmap }
    }

    #[test]
    fn plain_entries() {
        let form = form(false, true);
        assert_eq!(form.content(entry(0, 0), 5), Ok(Content::Backing));
        assert_eq!(
            form.content(entry(0x5_0000 | COPIED, 0), 5),
            Ok(Content::Data(0x5_0005))
        );
        assert_eq!(form.content(entry(0x5_0000 | 1, 0), 5), Ok(Content::Zero));
        assert!(form.content(entry(0x5_0200, 0), 5).is_err());
        assert_eq!(form.own_cluster(entry(0x5_0000, 0)), None);
        assert_eq!(form.own_cluster(form.zeroes(Some(0x5_0000))), Some(0x5_0000));
        let old = Form {
            zero_flag: false,
            ..form
        };
        assert!(old.content(entry(0x5_0001, 0), 5).is_err());
    }

    #[test]
    fn entries_with_subclusters() {
        let form = form(true, true);
        let half = entry(0x5_0000 | COPIED, 0x0000_0002_0000_0001);
        assert_eq!(form.content(half, 7), Ok(Content::Data(0x5_0007)));
        assert_eq!(form.content(half, 2048), Ok(Content::Zero));
        assert_eq!(form.content(half, 4096), Ok(Content::Backing));
        assert!(form.content(entry(0x5_0000, 0x0000_0001_0000_0001), 0).is_err());
        assert!(form.content(entry(0, 1), 0).is_err());
        assert_eq!(form.content(form.zeroes(None), 9999), Ok(Content::Zero));
        assert_eq!(form.content(form.data(0x5_0000), 65535), Ok(Content::Data(0x5_ffff)));
    }
}
