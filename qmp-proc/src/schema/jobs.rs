//! Jobs: what they are asked, what begins them, what they tell.

use super::block::{self, NEW_IMAGE_MODE};
use super::block_info;
use super::types::{
    CommandType, EMPTY, EnumType, INT, IntType, NOTHING, StructType, Type, Variants, enumeration, optional, required,
    structure, supervised,
};

pub(super) const QUERY_JOBS_COMMAND: CommandType = supervised("query-jobs", &EMPTY, Type::Array(&JOB_INFO_ITEM));
pub(super) const JOB_CANCEL_COMMAND: CommandType = supervised("job-cancel", &JOB, NOTHING);
pub(super) const JOB_FINALIZE_COMMAND: CommandType = supervised("job-finalize", &JOB, NOTHING);
pub(super) const JOB_DISMISS_COMMAND: CommandType = supervised("job-dismiss", &JOB, NOTHING);
pub(super) const JOB_PAUSE_COMMAND: CommandType = supervised("job-pause", &JOB, NOTHING);
pub(super) const JOB_RESUME_COMMAND: CommandType = supervised("job-resume", &JOB, NOTHING);
pub(super) const JOB_COMPLETE_COMMAND: CommandType = supervised("job-complete", &JOB, NOTHING);
pub(super) const QUERY_BLOCK_JOBS_COMMAND: CommandType =
    supervised("query-block-jobs", &EMPTY, Type::Array(&BLOCK_JOB_INFO_ITEM));
pub(super) const BLOCK_JOB_CANCEL_COMMAND: CommandType = supervised("block-job-cancel", &BLOCK_JOB_CANCEL, NOTHING);
pub(super) const BLOCK_JOB_COMPLETE_COMMAND: CommandType = supervised("block-job-complete", &BLOCK_JOB, NOTHING);
pub(super) const BLOCK_JOB_SET_SPEED_COMMAND: CommandType =
    supervised("block-job-set-speed", &BLOCK_JOB_SET_SPEED, NOTHING);
pub(super) const BLOCK_JOB_PAUSE_COMMAND: CommandType = supervised("block-job-pause", &BLOCK_JOB, NOTHING);
pub(super) const BLOCK_JOB_RESUME_COMMAND: CommandType = supervised("block-job-resume", &BLOCK_JOB, NOTHING);
pub(super) const BLOCK_JOB_FINALIZE_COMMAND: CommandType = supervised("block-job-finalize", &JOB, NOTHING);
pub(super) const BLOCK_JOB_DISMISS_COMMAND: CommandType = supervised("block-job-dismiss", &JOB, NOTHING);
pub(super) const BLOCK_JOB_CHANGE_COMMAND: CommandType = supervised("block-job-change", &BLOCK_JOB_CHANGE, NOTHING);
pub(super) const BLOCK_COMMIT_COMMAND: CommandType = supervised("block-commit", &BLOCK_COMMIT, NOTHING);
pub(super) const BLOCK_STREAM_COMMAND: CommandType = supervised("block-stream", &BLOCK_STREAM, NOTHING);
pub(super) const DRIVE_MIRROR_COMMAND: CommandType = supervised("drive-mirror", &DRIVE_MIRROR, NOTHING);
pub(super) const BLOCKDEV_MIRROR_COMMAND: CommandType = supervised("blockdev-mirror", &BLOCKDEV_MIRROR, NOTHING);
pub(super) const DRIVE_BACKUP_COMMAND: CommandType = supervised("drive-backup", &DRIVE_BACKUP, NOTHING);
pub(super) const BLOCKDEV_BACKUP_COMMAND: CommandType = supervised("blockdev-backup", &BLOCKDEV_BACKUP, NOTHING);
pub(super) const BLOCKDEV_CREATE_COMMAND: CommandType = supervised("blockdev-create", &BLOCKDEV_CREATE, NOTHING);

const UINT32: Type = Type::Int(IntType::Narrow {
    name: "uint32_t",
    min: 0,
    max: u32::MAX as i64,
});
/// A size in bytes.
const SIZE: Type = Type::Int(IntType::Size);

static JOB: StructType = structure("q_obj_job-arg", &[required("id", Type::Str)]);
static JOB_INFO_ITEM: Type = Type::Struct(&JOB_INFO);
static JOB_INFO: StructType = structure(
    "JobInfo",
    &[
        required("id", Type::Str),
        required("type", Type::Enum(&JOB_TYPE)),
        required("status", Type::Enum(&JOB_STATUS)),
        required("current-progress", INT),
        required("total-progress", INT),
        optional("error", Type::Str),
    ],
);
static JOB_TYPE: EnumType = enumeration("JobType", &["commit", "stream", "mirror", "backup", "create"]);
static JOB_STATUS: EnumType = enumeration(
    "JobStatus",
    &[
        "undefined",
        "created",
        "running",
        "paused",
        "ready",
        "standby",
        "waiting",
        "pending",
        "aborting",
        "concluded",
        "null",
    ],
);
/// Data of JOB_STATUS_CHANGE.
pub(super) static STATUS_CHANGE: StructType = structure(
    "q_obj_JOB_STATUS_CHANGE-arg",
    &[required("id", Type::Str), required("status", Type::Enum(&JOB_STATUS))],
);

static BLOCK_JOB: StructType = structure("q_obj_block-job-arg", &[required("device", Type::Str)]);
static BLOCK_JOB_CANCEL: StructType = structure(
    "q_obj_block-job-cancel-arg",
    &[required("device", Type::Str), optional("force", Type::Bool)],
);
static BLOCK_JOB_SET_SPEED: StructType = structure(
    "q_obj_block-job-set-speed-arg",
    &[required("device", Type::Str), required("speed", INT)],
);
static BLOCK_JOB_CHANGE: StructType = StructType {
    name: "BlockJobChangeOptions",
    members: &[required("id", Type::Str), required("type", Type::Enum(&JOB_TYPE))],
    variants: Some(&Variants {
        tag: "type",
        of: &[("mirror", &BLOCK_JOB_CHANGE_MIRROR)],
    }),
};
static BLOCK_JOB_CHANGE_MIRROR: StructType = structure(
    "BlockJobChangeOptionsMirror",
    &[required("copy-mode", Type::Enum(&COPY_MODE))],
);
static BLOCK_COMMIT: StructType = structure(
    "q_obj_block-commit-arg",
    &[
        optional("job-id", Type::Str),
        required("device", Type::Str),
        optional("base-node", Type::Str),
        optional("base", Type::Str),
        optional("top-node", Type::Str),
        optional("top", Type::Str),
        optional("backing-file", Type::Str),
        optional("backing-mask-protocol", Type::Bool),
        optional("speed", INT),
        optional("on-error", Type::Enum(&ON_ERROR)),
        optional("filter-node-name", Type::Str),
        optional("auto-finalize", Type::Bool),
        optional("auto-dismiss", Type::Bool),
    ],
);
static BLOCK_STREAM: StructType = structure(
    "q_obj_block-stream-arg",
    &[
        optional("job-id", Type::Str),
        required("device", Type::Str),
        optional("base", Type::Str),
        optional("base-node", Type::Str),
        optional("backing-file", Type::Str),
        optional("backing-mask-protocol", Type::Bool),
        optional("bottom", Type::Str),
        optional("speed", INT),
        optional("on-error", Type::Enum(&ON_ERROR)),
        optional("filter-node-name", Type::Str),
        optional("auto-finalize", Type::Bool),
        optional("auto-dismiss", Type::Bool),
    ],
);
static DRIVE_MIRROR: StructType = structure(
    "DriveMirror",
    &[
        optional("job-id", Type::Str),
        required("device", Type::Str),
        required("target", Type::Str),
        optional("format", Type::Str),
        optional("node-name", Type::Str),
        optional("replaces", Type::Str),
        required("sync", Type::Enum(&SYNC_MODE)),
        optional("mode", Type::Enum(&NEW_IMAGE_MODE)),
        optional("speed", INT),
        optional("granularity", UINT32),
        optional("buf-size", INT),
        optional("on-source-error", Type::Enum(&ON_ERROR)),
        optional("on-target-error", Type::Enum(&ON_ERROR)),
        optional("unmap", Type::Bool),
        optional("copy-mode", Type::Enum(&COPY_MODE)),
        optional("auto-finalize", Type::Bool),
        optional("auto-dismiss", Type::Bool),
    ],
);
static BLOCKDEV_MIRROR: StructType = structure(
    "q_obj_blockdev-mirror-arg",
    &[
        optional("job-id", Type::Str),
        required("device", Type::Str),
        required("target", Type::Str),
        optional("replaces", Type::Str),
        required("sync", Type::Enum(&SYNC_MODE)),
        optional("speed", INT),
        optional("granularity", UINT32),
        optional("buf-size", INT),
        optional("on-source-error", Type::Enum(&ON_ERROR)),
        optional("on-target-error", Type::Enum(&ON_ERROR)),
        optional("filter-node-name", Type::Str),
        optional("copy-mode", Type::Enum(&COPY_MODE)),
        optional("auto-finalize", Type::Bool),
        optional("auto-dismiss", Type::Bool),
    ],
);
pub(super) static DRIVE_BACKUP: StructType = structure(
    "DriveBackup",
    &[
        optional("job-id", Type::Str),
        required("device", Type::Str),
        required("sync", Type::Enum(&SYNC_MODE)),
        optional("speed", INT),
        optional("bitmap", Type::Str),
        optional("bitmap-mode", Type::Enum(&BITMAP_SYNC_MODE)),
        optional("compress", Type::Bool),
        optional("on-source-error", Type::Enum(&ON_ERROR)),
        optional("on-target-error", Type::Enum(&ON_ERROR)),
        optional("auto-finalize", Type::Bool),
        optional("auto-dismiss", Type::Bool),
        optional("filter-node-name", Type::Str),
        optional("x-perf", Type::Struct(&BACKUP_PERF)),
        required("target", Type::Str),
        optional("format", Type::Str),
        optional("mode", Type::Enum(&NEW_IMAGE_MODE)),
    ],
);
pub(super) static BLOCKDEV_BACKUP: StructType = structure(
    "BlockdevBackup",
    &[
        optional("job-id", Type::Str),
        required("device", Type::Str),
        required("sync", Type::Enum(&SYNC_MODE)),
        optional("speed", INT),
        optional("bitmap", Type::Str),
        optional("bitmap-mode", Type::Enum(&BITMAP_SYNC_MODE)),
        optional("compress", Type::Bool),
        optional("on-source-error", Type::Enum(&ON_ERROR)),
        optional("on-target-error", Type::Enum(&ON_ERROR)),
        optional("auto-finalize", Type::Bool),
        optional("auto-dismiss", Type::Bool),
        optional("filter-node-name", Type::Str),
        optional("x-perf", Type::Struct(&BACKUP_PERF)),
        required("target", Type::Str),
    ],
);
static BACKUP_PERF: StructType = structure(
    "BackupPerf",
    &[
        optional("use-copy-range", Type::Bool),
        optional("max-workers", INT),
        optional("max-chunk", INT),
        optional("min-cluster-size", SIZE),
    ],
);
static ON_ERROR: EnumType = enumeration("BlockdevOnError", &["report", "ignore", "enospc", "stop", "auto"]);
static SYNC_MODE: EnumType = enumeration("MirrorSyncMode", &["top", "full", "none", "incremental", "bitmap"]);
static COPY_MODE: EnumType = enumeration("MirrorCopyMode", &["background", "write-blocking"]);
static BITMAP_SYNC_MODE: EnumType = enumeration("BitmapSyncMode", &["on-success", "never", "always"]);
static BLOCK_JOB_INFO_ITEM: Type = Type::Struct(&BLOCK_JOB_INFO);
static BLOCK_JOB_INFO: StructType = StructType {
    name: "BlockJobInfo",
    members: &[
        required("type", Type::Enum(&JOB_TYPE)),
        required("device", Type::Str),
        required("len", INT),
        required("offset", INT),
        required("busy", Type::Bool),
        required("paused", Type::Bool),
        required("speed", INT),
        required("io-status", Type::Enum(&block_info::IO_STATUS)),
        required("ready", Type::Bool),
        required("status", Type::Enum(&JOB_STATUS)),
        required("auto-finalize", Type::Bool),
        required("auto-dismiss", Type::Bool),
        optional("error", Type::Str),
    ],
    variants: Some(&Variants {
        tag: "type",
        of: &[("mirror", &BLOCK_JOB_INFO_MIRROR)],
    }),
};
static BLOCK_JOB_INFO_MIRROR: StructType = structure("BlockJobInfoMirror", &[required("actively-synced", Type::Bool)]);

/// Data of BLOCK_JOB_READY and BLOCK_JOB_CANCELLED.
pub(super) static PROGRESS: StructType = structure(
    "q_obj_BLOCK_JOB_READY-arg",
    &[
        required("type", Type::Enum(&JOB_TYPE)),
        required("device", Type::Str),
        required("len", INT),
        required("offset", INT),
        required("speed", INT),
    ],
);
/// Data of BLOCK_JOB_COMPLETED.
pub(super) static COMPLETED: StructType = structure(
    "q_obj_BLOCK_JOB_COMPLETED-arg",
    &[
        required("type", Type::Enum(&JOB_TYPE)),
        required("device", Type::Str),
        required("len", INT),
        required("offset", INT),
        required("speed", INT),
        optional("error", Type::Str),
    ],
);
/// Data of BLOCK_JOB_ERROR.
pub(super) static ERROR: StructType = structure(
    "q_obj_BLOCK_JOB_ERROR-arg",
    &[
        required("device", Type::Str),
        required("operation", Type::Enum(&block::IO_OPERATION_TYPE)),
        required("action", Type::Enum(&block::BLOCK_ERROR_ACTION)),
    ],
);
/// Data of BLOCK_JOB_PENDING.
pub(super) static PENDING: StructType = structure(
    "q_obj_BLOCK_JOB_PENDING-arg",
    &[required("type", Type::Enum(&JOB_TYPE)), required("id", Type::Str)],
);

static BLOCKDEV_CREATE: StructType = structure(
    "q_obj_blockdev-create-arg",
    &[
        required("job-id", Type::Str),
        required("options", Type::Struct(&CREATE_OPTIONS)),
    ],
);
static CREATE_OPTIONS: StructType = StructType {
    name: "BlockdevCreateOptions",
    members: &[required("driver", Type::Enum(&CREATE_DRIVER))],
    variants: Some(&Variants {
        tag: "driver",
        of: &[("file", &CREATE_FILE), ("luks", &CREATE_LUKS), ("qcow2", &CREATE_QCOW2)],
    }),
};
static CREATE_DRIVER: EnumType = enumeration("BlockdevCreateDriver", &["file", "luks", "qcow2"]);
static CREATE_FILE: StructType = structure(
    "BlockdevCreateOptionsFile",
    &[
        required("filename", Type::Str),
        required("size", SIZE),
        optional("preallocation", Type::Enum(&PREALLOC_MODE)),
        optional("nocow", Type::Bool),
        optional("extent-size-hint", SIZE),
    ],
);
static CREATE_LUKS: StructType = structure(
    "BlockdevCreateOptionsLUKS",
    &[
        optional("key-secret", Type::Str),
        optional("cipher-alg", Type::Enum(&CIPHER)),
        optional("cipher-mode", Type::Enum(&CIPHER_MODE)),
        optional("ivgen-alg", Type::Enum(&IV_GENERATOR)),
        optional("ivgen-hash-alg", Type::Enum(&HASH)),
        optional("hash-alg", Type::Enum(&HASH)),
        optional("iter-time", INT),
        required("file", Type::Str),
        required("size", SIZE),
        optional("preallocation", Type::Enum(&PREALLOC_MODE)),
    ],
);
static NEW_ENCRYPTION: StructType = StructType {
    name: "QCryptoBlockCreateOptions",
    members: &[required("format", Type::Enum(&NEW_ENCRYPTION_FORMAT))],
    variants: Some(&Variants {
        tag: "format",
        of: &[("aes", &NEW_AES), ("luks", &NEW_LUKS), ("qcow", &NEW_AES)],
    }),
};
/// `qcow` is QMP's word here and `aes` the one that other options of the image have.
static NEW_ENCRYPTION_FORMAT: EnumType = enumeration("QCryptoBlockFormat", &["aes", "luks", "qcow"]);
static NEW_AES: StructType = structure("QCryptoBlockOptionsQCow", &[optional("key-secret", Type::Str)]);
static NEW_LUKS: StructType = structure(
    "QCryptoBlockCreateOptionsLUKS",
    &[
        optional("key-secret", Type::Str),
        optional("cipher-alg", Type::Enum(&CIPHER)),
        optional("cipher-mode", Type::Enum(&CIPHER_MODE)),
        optional("ivgen-alg", Type::Enum(&IV_GENERATOR)),
        optional("ivgen-hash-alg", Type::Enum(&HASH)),
        optional("hash-alg", Type::Enum(&HASH)),
        optional("iter-time", INT),
    ],
);
static CIPHER: EnumType = enumeration("QCryptoCipherAlgorithm", &["aes-128", "aes-192", "aes-256"]);
static CIPHER_MODE: EnumType = enumeration("QCryptoCipherMode", &["ecb", "cbc", "xts"]);
static IV_GENERATOR: EnumType = enumeration("QCryptoIVGenAlgorithm", &["plain", "plain64", "essiv"]);
static HASH: EnumType = enumeration(
    "QCryptoHashAlgorithm",
    &["sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160"],
);
static CREATE_QCOW2: StructType = structure(
    "BlockdevCreateOptionsQcow2",
    &[
        required("file", Type::Str),
        required("size", SIZE),
        optional("version", Type::Enum(&QCOW2_VERSION)),
        optional("backing-file", Type::Str),
        optional("backing-fmt", Type::Enum(&BACKING_FORMAT)),
        optional("extended-l2", Type::Bool),
        optional("cluster-size", SIZE),
        optional("preallocation", Type::Enum(&PREALLOC_MODE)),
        optional("lazy-refcounts", Type::Bool),
        optional("refcount-bits", INT),
        optional("compression-type", Type::Enum(&COMPRESSION_TYPE)),
        optional("data-file", Type::Str),
        optional("data-file-raw", Type::Bool),
        optional("encrypt", Type::Struct(&NEW_ENCRYPTION)),
    ],
);
static PREALLOC_MODE: EnumType = enumeration("PreallocMode", &["off", "metadata", "falloc", "full"]);
static QCOW2_VERSION: EnumType = enumeration("BlockdevQcow2Version", &["v2", "v3"]);
static COMPRESSION_TYPE: EnumType = enumeration("Qcow2CompressionType", &["zlib", "zstd"]);
static BACKING_FORMAT: EnumType = enumeration("BackingFormat", &["raw", "qcow2"]);
