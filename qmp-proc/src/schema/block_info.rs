//! Types of the queries about block devices and nodes.

use super::blockdev::DETECT_ZEROES;
use super::types::{
    CommandType, EMPTY, EnumType, INT, StructType, Type, Variants, enumeration, optional, required, structure,
    supervised,
};

pub(super) const QUERY_BLOCK: CommandType = supervised("query-block", &EMPTY, Type::Array(&BLOCK));
pub(super) const QUERY_NAMED_BLOCK_NODES: CommandType =
    supervised("query-named-block-nodes", &NODES_ARGUMENTS, Type::Array(&NODE));
pub(super) const QUERY_BLOCKSTATS: CommandType = supervised("query-blockstats", &STATS_ARGUMENTS, Type::Array(&STATS));

const BLOCK: Type = Type::Struct(&BLOCK_INFO);
const NODE: Type = Type::Struct(&BLOCK_DEVICE_INFO);
const STATS: Type = Type::Struct(&BLOCK_STATS);

static NODES_ARGUMENTS: StructType = structure("q_obj_query-named-block-nodes-arg", &[optional("flat", Type::Bool)]);
static STATS_ARGUMENTS: StructType = structure("q_obj_query-blockstats-arg", &[optional("query-nodes", Type::Bool)]);

static BLOCK_INFO: StructType = structure(
    "BlockInfo",
    &[
        required("device", Type::Str),
        optional("qdev", Type::Str),
        required("type", Type::Str),
        required("removable", Type::Bool),
        required("locked", Type::Bool),
        optional("inserted", Type::Struct(&BLOCK_DEVICE_INFO)),
        optional("tray_open", Type::Bool),
        optional("io-status", Type::Enum(&IO_STATUS)),
    ],
);
pub(super) static IO_STATUS: EnumType = enumeration("BlockDeviceIoStatus", &["ok", "failed", "nospace"]);
static BLOCK_DEVICE_INFO: StructType = structure(
    "BlockDeviceInfo",
    &[
        required("file", Type::Str),
        optional("node-name", Type::Str),
        required("ro", Type::Bool),
        required("drv", Type::Str),
        optional("backing_file", Type::Str),
        required("backing_file_depth", INT),
        required("active", Type::Bool),
        required("encrypted", Type::Bool),
        // As servers of the time of block_passwd have it; here with encrypted images alone.
        optional("encryption_key_missing", Type::Bool),
        required("detect_zeroes", Type::Enum(&DETECT_ZEROES)),
        required("bps", INT),
        required("bps_rd", INT),
        required("bps_wr", INT),
        required("iops", INT),
        required("iops_rd", INT),
        required("iops_wr", INT),
        required("image", Type::Struct(&IMAGE_INFO)),
        optional("bps_max", INT),
        optional("bps_rd_max", INT),
        optional("bps_wr_max", INT),
        optional("iops_max", INT),
        optional("iops_rd_max", INT),
        optional("iops_wr_max", INT),
        optional("bps_max_length", INT),
        optional("bps_rd_max_length", INT),
        optional("bps_wr_max_length", INT),
        optional("iops_max_length", INT),
        optional("iops_rd_max_length", INT),
        optional("iops_wr_max_length", INT),
        optional("iops_size", INT),
        optional("group", Type::Str),
        required("cache", Type::Struct(&CACHE_INFO)),
        required("write_threshold", INT),
        optional("dirty-bitmaps", Type::Array(&Type::Struct(&DIRTY_INFO))),
    ],
);
static DIRTY_INFO: StructType = structure(
    "BlockDirtyInfo",
    &[
        optional("name", Type::Str),
        required("count", INT),
        required("granularity", INT),
        required("recording", Type::Bool),
        required("busy", Type::Bool),
        required("persistent", Type::Bool),
        optional("inconsistent", Type::Bool),
    ],
);
static CACHE_INFO: StructType = structure(
    "BlockdevCacheInfo",
    &[
        required("writeback", Type::Bool),
        required("direct", Type::Bool),
        required("no-flush", Type::Bool),
    ],
);
static IMAGE_INFO: StructType = structure(
    "ImageInfo",
    &[
        required("filename", Type::Str),
        required("format", Type::Str),
        optional("dirty-flag", Type::Bool),
        optional("actual-size", INT),
        required("virtual-size", INT),
        optional("cluster-size", INT),
        optional("encrypted", Type::Bool),
        optional("backing-filename", Type::Str),
        optional("full-backing-filename", Type::Str),
        optional("backing-filename-format", Type::Str),
        optional("snapshots", Type::Array(&Type::Struct(&SNAPSHOT_INFO))),
        optional("format-specific", Type::Struct(&FORMAT_SPECIFIC)),
        optional("backing-image", Type::Struct(&IMAGE_INFO)),
    ],
);
/// Also what blockdev-snapshot-delete-internal-sync returns.
pub(super) static SNAPSHOT_INFO: StructType = structure(
    "SnapshotInfo",
    &[
        required("id", Type::Str),
        required("name", Type::Str),
        required("vm-state-size", INT),
        required("date-sec", INT),
        required("date-nsec", INT),
        required("vm-clock-sec", INT),
        required("vm-clock-nsec", INT),
        optional("icount", INT),
    ],
);
static FORMAT_SPECIFIC: StructType = StructType {
    name: "ImageInfoSpecific",
    members: &[required("type", Type::Enum(&FORMAT_KIND))],
    variants: Some(&Variants {
        tag: "type",
        of: &[("qcow2", &QCOW2_WRAPPER), ("file", &FILE_WRAPPER)],
    }),
};
static FORMAT_KIND: EnumType = enumeration("ImageInfoSpecificKind", &["qcow2", "file"]);
static QCOW2_WRAPPER: StructType = structure(
    "ImageInfoSpecificQCow2Wrapper",
    &[required("data", Type::Struct(&QCOW2))],
);
static FILE_WRAPPER: StructType = structure(
    "ImageInfoSpecificFileWrapper",
    &[required("data", Type::Struct(&EMPTY))],
);
static QCOW2: StructType = structure(
    "ImageInfoSpecificQCow2",
    &[
        required("compat", Type::Str),
        optional("data-file", Type::Str),
        optional("data-file-raw", Type::Bool),
        optional("extended-l2", Type::Bool),
        optional("lazy-refcounts", Type::Bool),
        optional("corrupt", Type::Bool),
        required("refcount-bits", INT),
        optional("bitmaps", Type::Array(&Type::Struct(&QCOW2_BITMAP))),
        optional("encrypt", Type::Struct(&ENCRYPTION)),
        required("compression-type", Type::Enum(&COMPRESSION)),
    ],
);
static QCOW2_BITMAP: StructType = structure(
    "Qcow2BitmapInfo",
    &[
        required("name", Type::Str),
        required("granularity", INT),
        required("flags", Type::Array(&Type::Enum(&QCOW2_BITMAP_FLAGS))),
    ],
);
static QCOW2_BITMAP_FLAGS: EnumType = enumeration("Qcow2BitmapInfoFlags", &["in-use", "auto"]);
static ENCRYPTION: StructType = structure(
    "ImageInfoSpecificQCow2Encryption",
    &[required("format", Type::Enum(&ENCRYPTION_FORMAT))],
);
pub(super) static ENCRYPTION_FORMAT: EnumType = enumeration("BlockdevQcow2EncryptionFormat", &["aes", "luks"]);
static COMPRESSION: EnumType = enumeration("Qcow2CompressionType", &["zlib", "zstd"]);

static BLOCK_STATS: StructType = structure(
    "BlockStats",
    &[
        optional("device", Type::Str),
        optional("qdev", Type::Str),
        optional("node-name", Type::Str),
        required("stats", Type::Struct(&BLOCK_DEVICE_STATS)),
        optional("parent", Type::Struct(&BLOCK_STATS)),
        optional("backing", Type::Struct(&BLOCK_STATS)),
    ],
);
static BLOCK_DEVICE_STATS: StructType = structure(
    "BlockDeviceStats",
    &[
        required("rd_bytes", INT),
        required("wr_bytes", INT),
        required("zone_append_bytes", INT),
        required("unmap_bytes", INT),
        required("rd_operations", INT),
        required("wr_operations", INT),
        required("zone_append_operations", INT),
        required("flush_operations", INT),
        required("unmap_operations", INT),
        required("rd_total_time_ns", INT),
        required("wr_total_time_ns", INT),
        required("zone_append_total_time_ns", INT),
        required("flush_total_time_ns", INT),
        required("unmap_total_time_ns", INT),
        required("wr_highest_offset", INT),
        required("rd_merged", INT),
        required("wr_merged", INT),
        required("zone_append_merged", INT),
        required("unmap_merged", INT),
        optional("idle_time_ns", INT),
        required("failed_rd_operations", INT),
        required("failed_wr_operations", INT),
        required("failed_zone_append_operations", INT),
        required("failed_flush_operations", INT),
        required("failed_unmap_operations", INT),
        required("invalid_rd_operations", INT),
        required("invalid_wr_operations", INT),
        required("invalid_zone_append_operations", INT),
        required("invalid_flush_operations", INT),
        required("invalid_unmap_operations", INT),
        required("account_invalid", Type::Bool),
        required("account_failed", Type::Bool),
        required("timed_stats", Type::Array(&Type::Struct(&TIMED_STATS))),
        optional("rd_latency_histogram", Type::Struct(&HISTOGRAM)),
        optional("wr_latency_histogram", Type::Struct(&HISTOGRAM)),
        optional("zone_append_latency_histogram", Type::Struct(&HISTOGRAM)),
        optional("flush_latency_histogram", Type::Struct(&HISTOGRAM)),
    ],
);
static TIMED_STATS: StructType = structure(
    "BlockDeviceTimedStats",
    &[
        required("interval_length", INT),
        required("min_rd_latency_ns", INT),
        required("max_rd_latency_ns", INT),
        required("avg_rd_latency_ns", INT),
        required("min_wr_latency_ns", INT),
        required("max_wr_latency_ns", INT),
        required("avg_wr_latency_ns", INT),
        required("min_zone_append_latency_ns", INT),
        required("max_zone_append_latency_ns", INT),
        required("avg_zone_append_latency_ns", INT),
        required("min_flush_latency_ns", INT),
        required("max_flush_latency_ns", INT),
        required("avg_flush_latency_ns", INT),
        required("avg_rd_queue_depth", Type::Number),
        required("avg_wr_queue_depth", Type::Number),
        required("avg_zone_append_queue_depth", Type::Number),
    ],
);
static HISTOGRAM: StructType = structure(
    "BlockLatencyHistogramInfo",
    &[
        required("boundaries", Type::Array(&INT)),
        required("bins", Type::Array(&INT)),
    ],
);
