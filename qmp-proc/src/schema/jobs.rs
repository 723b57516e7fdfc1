//! Jobs, and the one that creates images.

use super::types::{
    CommandType, EMPTY, EnumType, INT, IntType, NOTHING, StructType, Type, Variants, enumeration, optional, required,
    structure, supervised,
};

pub(super) const QUERY_JOBS_COMMAND: CommandType = supervised("query-jobs", &EMPTY, Type::Array(&JOB_INFO_ITEM));
pub(super) const JOB_CANCEL_COMMAND: CommandType = supervised("job-cancel", &JOB, NOTHING);
pub(super) const JOB_FINALIZE_COMMAND: CommandType = supervised("job-finalize", &JOB, NOTHING);
pub(super) const JOB_DISMISS_COMMAND: CommandType = supervised("job-dismiss", &JOB, NOTHING);
pub(super) const BLOCKDEV_CREATE_COMMAND: CommandType = supervised("blockdev-create", &BLOCKDEV_CREATE, NOTHING);

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
static JOB_TYPE: EnumType = enumeration("JobType", &["create"]);
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
        of: &[("file", &CREATE_FILE), ("qcow2", &CREATE_QCOW2)],
    }),
};
static CREATE_DRIVER: EnumType = enumeration("BlockdevCreateDriver", &["file", "qcow2"]);
static CREATE_FILE: StructType = structure(
    "BlockdevCreateOptionsFile",
    &[
        required("filename", Type::Str),
        required("size", SIZE),
        optional("preallocation", Type::Enum(&PREALLOC_MODE)),
    ],
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
    ],
);
static PREALLOC_MODE: EnumType = enumeration("PreallocMode", &["off", "metadata", "falloc", "full"]);
static QCOW2_VERSION: EnumType = enumeration("BlockdevQcow2Version", &["v2", "v3"]);
static COMPRESSION_TYPE: EnumType = enumeration("Qcow2CompressionType", &["zlib", "zstd"]);
static BACKING_FORMAT: EnumType = enumeration("BackingFormat", &["raw", "qcow2"]);
