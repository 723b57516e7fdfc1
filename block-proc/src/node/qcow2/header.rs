//! The header: versions 2 and 3, checked before anything else of the image is believed.

use super::OpenError;
use super::compressed::Compression;

/// "QFI" and 0xfb.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Smallest part of the first cluster that says how large it is, bytes.
pub const PROBE_BYTES: usize = 512;
/// Largest L1 table, bytes (QEMU's limit).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table, bytes (QEMU's limit).
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Most internal snapshots (QEMU's limit).
pub const MAX_SNAPSHOTS: u32 = 65_536;
/// Longest backing file name, bytes (the format's limit).
pub const MAX_BACKING_NAME_BYTES: u32 = 1023;
/// Offsets in the image have this many bits.
pub const OFFSET_BITS: u32 = 56;

/// Kinds of header extensions.
pub mod extension {
    /// The last one.
    pub const END: u32 = 0;
    /// Format of the backing file.
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    /// Names of feature bits.
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    /// Where bitmaps are.
    pub const BITMAPS: u32 = 0x2385_2875;
    /// Where the header of the encryption is.
    pub const ENCRYPTION: u32 = 0x0537_be77;
    /// Name of the external data file.
    pub const DATA_FILE: u32 = 0x4441_5441;
}

/// Length of a version 2 header, bytes.
pub const V2_BYTES: usize = 72;
/// Length of a version 3 header without what was added later, bytes.
pub const V3_BYTES: usize = 104;

/// Where fields that change are, bytes from the image's start.
pub mod field {
    /// Offset and length of the backing file's name: 12 bytes.
    pub const BACKING: usize = 8;
    /// Size of the virtual disk.
    pub const BYTES: usize = 24;
    /// Number of entries of the L1 table (4 bytes) and its offset (8 bytes).
    pub const L1: usize = 36;
    /// Number of snapshots (4 bytes) and the offset of their table (8 bytes).
    pub const SNAPSHOTS: usize = 60;
    /// Offset and number of clusters of the refcount table: 12 bytes.
    pub const REFCOUNT_TABLE: usize = 48;
    /// The incompatible features.
    pub const INCOMPATIBLE: usize = 72;
    /// The compatible features.
    pub const COMPATIBLE: usize = 80;
    /// The autoclear features.
    pub const AUTOCLEAR: usize = 88;
}

/// Incompatible features.
pub mod incompatible {
    /// Refcounts may be too small.
    pub const DIRTY: u64 = 1 << 0;
    /// Something was found to be wrong: no writing.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest data is in another file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// Compressed clusters are not deflate streams.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries have bitmaps of subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
}

/// Features that who does not know them may ignore.
pub mod compatible {
    /// Refcounts may be postponed.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Autoclear features.
pub mod autoclear {
    /// The bitmaps extension is up to date.
    pub const BITMAPS: u64 = 1 << 0;
    /// The external data file can be read as a raw image.
    pub const DATA_FILE_RAW: u64 = 1 << 1;
}

/// Where persistent bitmaps are: the bitmaps extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bitmaps {
    /// How many there are.
    pub count: u32,
    /// Size of their directory, bytes.
    pub directory_bytes: u64,
    /// Its offset in the image.
    pub directory_offset: u64,
}

/// What the header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size as a power of two: 9 to 21.
    pub cluster_bits: u32,
    /// Size of the virtual disk, bytes.
    pub bytes: u64,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Its offset.
    pub l1_offset: u64,
    /// Offset of the refcount table.
    pub refcount_table_offset: u64,
    /// Its clusters.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Offset of their table.
    pub snapshots_offset: u64,
    /// Feature bits without which an image cannot be read.
    pub incompatible: u64,
    /// Feature bits that may be ignored.
    pub compatible: u64,
    /// Feature bits that who writes and does not know them must clear.
    pub autoclear: u64,
    /// Width of a refcount as a power of two, bits: 0 to 6.
    pub refcount_order: u32,
    /// How guest data is encrypted: 0 is not at all.
    pub encryption: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Name of the backing file, as found: untrusted.
    pub backing_name: Option<String>,
    /// Its format, as found.
    pub backing_format: Option<String>,
    /// Name of the external data file, as found: untrusted.
    pub data_file: Option<String>,
    /// The bitmaps extension, if there is one.
    pub bitmaps: Option<Bitmaps>,
}

impl Header {
    /// Cluster size, bytes, from the first [`PROBE_BYTES`].
    ///
    /// # Errors
    /// When this is not qcow2, or of a size that cannot be.
    pub fn probe(bytes: &[u8]) -> Result<usize, OpenError> {
        if bytes.len() < V2_BYTES || bytes[..4] != MAGIC {
            return Err(OpenError::NotQcow2);
        }
        let version = u32_at(bytes, 4);
        if !matches!(version, 2 | 3) {
            return Err(OpenError::Version(version));
        }
        let cluster_bits = u32_at(bytes, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(OpenError::invalid(format!(
                "cluster_bits is {cluster_bits}, which is not in 9 to 21"
            )));
        }
        Ok(1 << cluster_bits)
    }

    /// Reads the first cluster. `file_bytes`: length of the image file, or of the device that it is on.
    ///
    /// # Errors
    /// The first thing that is wrong, by name.
    pub fn parse(cluster: &[u8], file_bytes: u64) -> Result<Self, OpenError> {
        let cluster_bytes = Self::probe(cluster)? as u64;
        let version = u32_at(cluster, 4);
        let cluster_bits = u32_at(cluster, 20);
        let (mut incompatible, mut compatible, mut autoclear) = (0, 0, 0);
        let (mut refcount_order, mut header_bytes) = (4, V2_BYTES);
        let mut compression = Compression::Deflate;
        if version == 3 {
            incompatible = u64_at(cluster, field::INCOMPATIBLE);
            compatible = u64_at(cluster, field::COMPATIBLE);
            autoclear = u64_at(cluster, field::AUTOCLEAR);
            refcount_order = u32_at(cluster, 96);
            header_bytes = u32_at(cluster, 100) as usize;
            if header_bytes < V3_BYTES || header_bytes > cluster.len() || !header_bytes.is_multiple_of(8) {
                return Err(OpenError::invalid(format!("header_length is {header_bytes}")));
            }
            let kind = if header_bytes > V3_BYTES { cluster[V3_BYTES] } else { 0 };
            compression = match (kind, incompatible & incompatible::COMPRESSION != 0) {
                (0, false) => Compression::Deflate,
                (1, true) => Compression::Zstd,
                (kind, _) => {
                    return Err(OpenError::invalid(format!(
                        "compression type {kind} is unknown or does not fit the compression feature bit"
                    )));
                }
            };
        }
        check_features(cluster, header_bytes, incompatible)?;
        let mut header = Self {
            version,
            cluster_bits,
            bytes: u64_at(cluster, 24),
            l1_entries: u32_at(cluster, 36),
            l1_offset: u64_at(cluster, 40),
            refcount_table_offset: u64_at(cluster, 48),
            refcount_table_clusters: u32_at(cluster, 56),
            snapshots: u32_at(cluster, 60),
            snapshots_offset: u64_at(cluster, 64),
            incompatible,
            compatible,
            autoclear,
            refcount_order,
            encryption: u32_at(cluster, 32),
            compression,
            backing_name: None,
            backing_format: None,
            data_file: None,
            bitmaps: None,
        };
        match u32_at(cluster, 32) {
            0 => {}
            1 => return Err(OpenError::Unsupported("AES encryption".into())),
            2 => return Err(OpenError::Unsupported("LUKS encryption".into())),
            method => return Err(OpenError::invalid(format!("encryption method {method} is unknown"))),
        }
        if refcount_order > 6 {
            return Err(OpenError::invalid(format!(
                "refcount_order is {refcount_order}, above 6"
            )));
        }
        if incompatible & incompatible::EXTENDED_L2 != 0 && cluster_bits < 14 {
            return Err(OpenError::invalid("extended L2 entries with clusters below 16 KiB"));
        }
        header.check_tables(file_bytes.next_multiple_of(cluster_bytes))?;
        header.read_extensions(cluster, header_bytes)?;
        header.read_backing_name(cluster)?;
        Ok(header)
    }

    /// Takes over the fields that change while an image is open, all of them in the first sector.
    pub fn reread(&mut self, bytes: &[u8]) {
        self.bytes = u64_at(bytes, field::BYTES);
        self.l1_entries = u32_at(bytes, field::L1);
        self.l1_offset = u64_at(bytes, field::L1 + 4);
        self.refcount_table_offset = u64_at(bytes, field::REFCOUNT_TABLE);
        self.refcount_table_clusters = u32_at(bytes, field::REFCOUNT_TABLE + 8);
        self.snapshots = u32_at(bytes, field::SNAPSHOTS);
        self.snapshots_offset = u64_at(bytes, field::SNAPSHOTS + 4);
        if self.version >= 3 {
            self.incompatible = u64_at(bytes, field::INCOMPATIBLE);
            self.autoclear = u64_at(bytes, field::AUTOCLEAR);
        }
    }

    fn check_tables(&self, file_bytes: u64) -> Result<(), OpenError> {
        let cluster = 1_u64 << self.cluster_bits;
        let inside = |what: &str, offset: u64, bytes: u64| {
            let fits = offset.checked_add(bytes).is_some_and(|end| end <= file_bytes);
            if !offset.is_multiple_of(cluster) || offset == 0 || !fits {
                return Err(OpenError::invalid(format!(
                    "the {what} ({bytes} bytes at {offset:#x}) is not on a cluster of the file"
                )));
            }
            Ok(())
        };
        if self.bytes > i64::MAX as u64 {
            return Err(OpenError::invalid(format!("the disk's size is {} bytes", self.bytes)));
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if l1_bytes > MAX_L1_BYTES {
            return Err(OpenError::invalid(format!(
                "the L1 table has {} entries",
                self.l1_entries
            )));
        }
        let needed = self.bytes.div_ceil(self.bytes_per_l2());
        if u64::from(self.l1_entries) < needed {
            return Err(OpenError::invalid(format!(
                "the L1 table has {} entries, a disk of {} bytes needs {needed}",
                self.l1_entries, self.bytes
            )));
        }
        if l1_bytes > 0 {
            inside("L1 table", self.l1_offset, l1_bytes)?;
        }
        let refcount_bytes = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if refcount_bytes == 0 || refcount_bytes > MAX_REFCOUNT_TABLE_BYTES.max(cluster) {
            return Err(OpenError::invalid(format!(
                "the refcount table has {} clusters",
                self.refcount_table_clusters
            )));
        }
        inside("refcount table", self.refcount_table_offset, refcount_bytes)?;
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(OpenError::invalid(format!(
                "there are {} internal snapshots",
                self.snapshots
            )));
        }
        if self.snapshots > 0 {
            // An entry has 40 bytes at least.
            inside("snapshot table", self.snapshots_offset, u64::from(self.snapshots) * 40)?;
        }
        Ok(())
    }

    fn read_extensions(&mut self, cluster: &[u8], start: usize) -> Result<(), OpenError> {
        let end = match u64_at(cluster, 8) {
            0 => cluster.len(),
            name => usize::try_from(name).unwrap_or(usize::MAX).min(cluster.len()),
        };
        let mut at = start;
        while at + 8 <= end {
            let (kind, length) = (u32_at(cluster, at), u32_at(cluster, at + 4) as usize);
            if kind == extension::END {
                break;
            }
            let data = cluster[at + 8..end]
                .get(..length)
                .ok_or_else(|| OpenError::invalid(format!("header extension {kind:#x} is {length} bytes long")))?;
            match kind {
                extension::BACKING_FORMAT => self.backing_format = Some(text(data)),
                extension::DATA_FILE => self.data_file = Some(text(data)),
                extension::BITMAPS if length >= 24 => {
                    self.bitmaps = Some(Bitmaps {
                        count: u32_at(data, 0),
                        directory_bytes: u64_at(data, 8),
                        directory_offset: u64_at(data, 16),
                    });
                }
                _ => {}
            }
            at += 8 + length.next_multiple_of(8);
        }
        Ok(())
    }

    fn read_backing_name(&mut self, cluster: &[u8]) -> Result<(), OpenError> {
        let (offset, length) = (u64_at(cluster, 8), u32_at(cluster, 16));
        if offset == 0 {
            return Ok(());
        }
        if length > MAX_BACKING_NAME_BYTES {
            return Err(OpenError::invalid(format!(
                "the backing file's name is {length} bytes long"
            )));
        }
        let name = usize::try_from(offset)
            .ok()
            .and_then(|offset| cluster.get(offset..)?.get(..length as usize))
            .ok_or_else(|| OpenError::invalid("the backing file's name is not in the first cluster"))?;
        self.backing_name = (!name.is_empty()).then(|| text(name));
        Ok(())
    }

    /// Whether L2 entries have bitmaps of subclusters.
    pub fn extended_l2(&self) -> bool {
        self.incompatible & incompatible::EXTENDED_L2 != 0
    }

    /// Whether guest data is in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// Whether that file can be read as a raw image.
    pub fn is_data_file_raw(&self) -> bool {
        self.has_data_file() && self.autoclear & autoclear::DATA_FILE_RAW != 0
    }

    /// Size of an L2 entry, bytes.
    pub fn l2_entry_bytes(&self) -> u64 {
        if self.extended_l2() { 16 } else { 8 }
    }

    /// How much of the disk one L2 table maps, bytes.
    pub fn bytes_per_l2(&self) -> u64 {
        let cluster = 1_u64 << self.cluster_bits;
        cluster / self.l2_entry_bytes() * cluster
    }
}

/// Refuses incompatible features by name: ours, or what the image itself calls them.
fn check_features(cluster: &[u8], header_bytes: usize, features: u64) -> Result<(), OpenError> {
    let known = incompatible::DIRTY
        | incompatible::CORRUPT
        | incompatible::DATA_FILE
        | incompatible::COMPRESSION
        | incompatible::EXTENDED_L2;
    let refused = features & !known;
    if refused == 0 {
        return Ok(());
    }
    let bit = refused.trailing_zeros();
    let name = feature_name(cluster, header_bytes, bit).unwrap_or_else(|| format!("incompatible feature bit {bit}"));
    Err(OpenError::Unsupported(name))
}

/// What the image's feature name table calls an incompatible feature.
fn feature_name(cluster: &[u8], start: usize, bit: u32) -> Option<String> {
    const ENTRY_BYTES: usize = 48;
    let mut at = start;
    while at + 8 <= cluster.len() {
        let (kind, length) = (u32_at(cluster, at), u32_at(cluster, at + 4) as usize);
        let data = cluster[at + 8..].get(..length)?;
        match kind {
            extension::END => return None,
            extension::FEATURE_NAMES => {
                return data
                    .chunks_exact(ENTRY_BYTES)
                    .find(|entry| entry[0] == 0 && u32::from(entry[1]) == bit)
                    .map(|entry| {
                        let name = text(entry[2..].split(|byte| *byte == 0).next().unwrap_or_default());
                        format!("incompatible feature bit {bit} ({name})")
                    });
            }
            _ => {}
        }
        at += 8 + length.next_multiple_of(8);
    }
    None
}

/// Text of an image for a message: whatever is not printable is escaped.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
        .collect()
}

/// A big-endian number. The caller knows that it is inside.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}

/// As [`u32_at`].
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}

/// As [`u32_at`], the other way.
pub fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// As [`u32_at`], the other way.
pub fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}
