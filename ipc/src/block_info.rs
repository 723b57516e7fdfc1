//! What the queries about block devices and nodes return, by QMP's names. A member that is `None` is absent from the JSON
//! text.
//!
//! Two of QMP's types contain themselves: an image its backing image, statistics those of the nodes below. Messages are not
//! recursive, so these travel as lists ([`ImageChain`], [`StatsTree`]) and become trees where JSON is written.

use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};

/// query-block's `BlockInfo`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockInfo {
    /// The drive's id; empty for a device on a node.
    pub device: String,
    /// The device's object.
    pub qdev: Option<String>,
    /// Always `unknown`.
    #[serde(rename = "type")]
    pub ty: String,
    /// Whether the medium can be changed.
    pub removable: bool,
    /// Whether the guest has locked it in.
    pub locked: bool,
    /// The medium.
    pub inserted: Option<BlockDeviceInfo>,
    /// Only on devices with a tray.
    #[serde(rename = "tray_open")]
    pub tray_open: Option<bool>,
    /// How the last request went that the machine would stop for.
    pub io_status: Option<IoStatus>,
}

/// QMP's BlockDeviceIoStatus.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // QMP's names.
pub enum IoStatus {
    #[default]
    Ok,
    Failed,
    Nospace,
}

/// QMP's BlockDeviceInfo.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // QMP's names.
pub struct BlockDeviceInfo {
    pub file: String,
    #[serde(rename = "node-name")]
    pub node_name: Option<String>,
    pub ro: bool,
    pub drv: String,
    pub backing_file: Option<String>,
    pub backing_file_depth: i64,
    pub active: bool,
    pub encrypted: bool,
    pub encryption_key_missing: Option<bool>,
    pub detect_zeroes: String,
    pub bps: i64,
    pub bps_rd: i64,
    pub bps_wr: i64,
    pub iops: i64,
    pub iops_rd: i64,
    pub iops_wr: i64,
    pub image: ImageChain,
    pub bps_max: Option<i64>,
    pub bps_rd_max: Option<i64>,
    pub bps_wr_max: Option<i64>,
    pub iops_max: Option<i64>,
    pub iops_rd_max: Option<i64>,
    pub iops_wr_max: Option<i64>,
    pub bps_max_length: Option<i64>,
    pub bps_rd_max_length: Option<i64>,
    pub bps_wr_max_length: Option<i64>,
    pub iops_max_length: Option<i64>,
    pub iops_rd_max_length: Option<i64>,
    pub iops_wr_max_length: Option<i64>,
    pub iops_size: Option<i64>,
    pub group: Option<String>,
    pub cache: CacheInfo,
    pub write_threshold: i64,
    #[serde(rename = "dirty-bitmaps")]
    pub dirty_bitmaps: Option<Vec<crate::bitmap::DirtyInfo>>,
}

/// QMP's BlockdevCacheInfo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub struct CacheInfo {
    pub writeback: bool,
    pub direct: bool,
    pub no_flush: bool,
}

/// An image and its backing images, from the top: at least one.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ImageChain(pub Vec<ImageInfo>);

/// QMP's ImageInfo, but for `backing-image`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub struct ImageInfo {
    pub filename: String,
    pub format: String,
    pub dirty_flag: Option<bool>,
    pub actual_size: Option<u64>,
    pub virtual_size: u64,
    pub cluster_size: Option<u64>,
    pub encrypted: Option<bool>,
    pub backing_filename: Option<String>,
    pub full_backing_filename: Option<String>,
    pub backing_filename_format: Option<String>,
    pub snapshots: Option<Vec<SnapshotInfo>>,
    pub format_specific: Option<FormatSpecific>,
}

/// QMP's SnapshotInfo.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub struct SnapshotInfo {
    pub id: String,
    pub name: String,
    pub vm_state_size: i64,
    pub date_sec: i64,
    pub date_nsec: i64,
    pub vm_clock_sec: i64,
    pub vm_clock_nsec: i64,
    pub icount: Option<i64>,
}

impl From<&crate::graph::SnapshotInfo> for SnapshotInfo {
    fn from(snapshot: &crate::graph::SnapshotInfo) -> Self {
        let int = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        Self {
            id: snapshot.id.clone(),
            name: snapshot.name.clone(),
            vm_state_size: int(snapshot.vm_state_bytes),
            date_sec: snapshot.date_seconds.into(),
            date_nsec: snapshot.date_nanoseconds.into(),
            vm_clock_sec: int(snapshot.vm_clock_ns / 1_000_000_000),
            vm_clock_nsec: int(snapshot.vm_clock_ns % 1_000_000_000),
            icount: snapshot.icount.map(int),
        }
    }
}

/// QMP's ImageInfoSpecific.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // QMP's names.
pub struct FormatSpecific {
    #[serde(rename = "type")]
    pub kind: String,
    pub data: FormatData,
}

/// What a format says of an image: without a member, of a file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub struct FormatData {
    pub compat: Option<String>,
    pub data_file: Option<String>,
    pub data_file_raw: Option<bool>,
    pub extended_l2: Option<bool>,
    pub lazy_refcounts: Option<bool>,
    pub corrupt: Option<bool>,
    pub refcount_bits: Option<i64>,
    pub bitmaps: Option<Vec<Qcow2BitmapInfo>>,
    pub encrypt: Option<EncryptionInfo>,
    pub compression_type: Option<String>,
}

/// QMP's Qcow2BitmapInfo.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // QMP's names.
pub struct Qcow2BitmapInfo {
    pub name: String,
    pub granularity: i64,
    /// `in-use`, `auto`.
    pub flags: Vec<String>,
}

/// QMP's ImageInfoSpecificQCow2Encryption.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EncryptionInfo {
    /// `aes` or `luks`.
    pub format: String,
}

impl Serialize for ImageChain {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            Images(&self.0).serialize(serializer)
        } else {
            serializer.serialize_newtype_struct("ImageChain", &self.0)
        }
    }
}

/// The rest of a chain, as a tree.
struct Images<'a>(&'a [ImageInfo]);

impl Serialize for Images<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Some((image, below)) = self.0.split_first() else {
            return serializer.serialize_none();
        };
        #[derive(Serialize)]
        struct WithBacking<'a> {
            #[serde(flatten)]
            image: &'a ImageInfo,
            #[serde(rename = "backing-image")]
            backing: Option<Images<'a>>,
        }
        let backing = (!below.is_empty()).then_some(Self(below));
        WithBacking { image, backing }.serialize(serializer)
    }
}

/// Statistics of a device or a node, and of the nodes below: the first entry is the root, later ones are referred to by
/// their place.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct StatsTree(pub Vec<BlockStats>);

/// QMP's BlockStats.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BlockStats {
    /// The drive's id.
    pub device: Option<String>,
    /// The device's object.
    pub qdev: Option<String>,
    /// The node.
    pub node_name: Option<String>,
    /// The counters.
    pub stats: BlockDeviceStats,
    /// Place of the node that holds its data.
    pub parent: Option<u32>,
    /// Place of the backing node.
    pub backing: Option<u32>,
}

/// QMP's BlockDeviceStats.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // QMP's names.
pub struct BlockDeviceStats {
    pub rd_bytes: i64,
    pub wr_bytes: i64,
    pub zone_append_bytes: i64,
    pub unmap_bytes: i64,
    pub rd_operations: i64,
    pub wr_operations: i64,
    pub zone_append_operations: i64,
    pub flush_operations: i64,
    pub unmap_operations: i64,
    pub rd_total_time_ns: i64,
    pub wr_total_time_ns: i64,
    pub zone_append_total_time_ns: i64,
    pub flush_total_time_ns: i64,
    pub unmap_total_time_ns: i64,
    pub wr_highest_offset: i64,
    pub rd_merged: i64,
    pub wr_merged: i64,
    pub zone_append_merged: i64,
    pub unmap_merged: i64,
    pub idle_time_ns: Option<i64>,
    pub failed_rd_operations: i64,
    pub failed_wr_operations: i64,
    pub failed_zone_append_operations: i64,
    pub failed_flush_operations: i64,
    pub failed_unmap_operations: i64,
    pub invalid_rd_operations: i64,
    pub invalid_wr_operations: i64,
    pub invalid_zone_append_operations: i64,
    pub invalid_flush_operations: i64,
    pub invalid_unmap_operations: i64,
    pub account_invalid: bool,
    pub account_failed: bool,
    /// No intervals are kept.
    pub timed_stats: Vec<i64>,
    pub rd_latency_histogram: Option<LatencyHistogram>,
    pub wr_latency_histogram: Option<LatencyHistogram>,
    pub zone_append_latency_histogram: Option<LatencyHistogram>,
    pub flush_latency_histogram: Option<LatencyHistogram>,
}

/// QMP's BlockLatencyHistogramInfo.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatencyHistogram {
    /// Where one interval ends and the next begins, nanoseconds.
    pub boundaries: Vec<u64>,
    /// Requests in each interval: one more than boundaries.
    pub bins: Vec<u64>,
}

impl Serialize for StatsTree {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            StatsAt(&self.0, 0).serialize(serializer)
        } else {
            serializer.serialize_newtype_struct("StatsTree", &self.0)
        }
    }
}

/// The entry at a place, as a tree.
struct StatsAt<'a>(&'a [BlockStats], u32);

impl Serialize for StatsAt<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Some(entry) = self.0.get(self.1 as usize) else {
            return serializer.serialize_none();
        };
        let mut map = serializer.serialize_map(None)?;
        for (name, text) in [
            ("device", &entry.device),
            ("qdev", &entry.qdev),
            ("node-name", &entry.node_name),
        ] {
            if let Some(text) = text {
                map.serialize_entry(name, text)?;
            }
        }
        map.serialize_entry("stats", &entry.stats)?;
        for (name, place) in [("parent", entry.parent), ("backing", entry.backing)] {
            // Only forwards: what comes from elsewhere cannot make us go in circles.
            if let Some(place) = place.filter(|place| *place > self.1) {
                map.serialize_entry(name, &StatsAt(self.0, place))?;
            }
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(filename: &str) -> ImageInfo {
        ImageInfo {
            filename: filename.to_owned(),
            format: "raw".to_owned(),
            dirty_flag: None,
            actual_size: None,
            virtual_size: 512,
            cluster_size: None,
            encrypted: None,
            backing_filename: None,
            full_backing_filename: None,
            backing_filename_format: None,
            snapshots: None,
            format_specific: None,
        }
    }

    #[test]
    fn chains_are_trees_in_json_and_lists_between_processes() {
        let chain = ImageChain(vec![image("top"), image("middle"), image("base")]);
        let json = serde_json::to_value(&chain).unwrap();
        assert_eq!(json["filename"], "top");
        assert_eq!(json["backing-image"]["backing-image"]["filename"], "base");
        assert!(json["backing-image"]["backing-image"]["backing-image"].is_null());
        let bytes = bincode::serialize(&chain).unwrap();
        assert_eq!(bincode::deserialize::<ImageChain>(&bytes).unwrap(), chain);
    }

    #[test]
    fn statistics_are_trees_in_json_and_lists_between_processes() {
        let entry = |name: &str, parent, backing| BlockStats {
            device: None,
            qdev: None,
            node_name: Some(name.to_owned()),
            stats: BlockDeviceStats::default(),
            parent,
            backing,
        };
        let tree = StatsTree(vec![
            entry("top", Some(1), Some(2)),
            entry("file", None, None),
            entry("base", Some(0), None),
        ]);
        let json = serde_json::to_value(&tree).unwrap();
        assert_eq!(json["parent"]["node-name"], "file");
        assert_eq!(json["backing"]["node-name"], "base");
        assert_eq!(json["backing"].get("parent"), None);
        let bytes = bincode::serialize(&tree).unwrap();
        assert_eq!(bincode::deserialize::<StatsTree>(&bytes).unwrap(), tree);
    }
}
