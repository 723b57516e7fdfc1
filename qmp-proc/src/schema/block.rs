//! Commands on block nodes and devices: size, snapshots, transactions, limits, thresholds.

use super::types::{
    CommandType, EMPTY, EnumType, INT, IntType, NOTHING, StructType, Type, Variants, enumeration, optional, required,
    structure, supervised,
};
use super::{bitmaps, block_info, jobs};

pub(super) const BLOCK_RESIZE_COMMAND: CommandType = supervised("block_resize", &BLOCK_RESIZE, NOTHING);
pub(super) const SNAPSHOT_SYNC_COMMAND: CommandType = supervised("blockdev-snapshot-sync", &SNAPSHOT_SYNC, NOTHING);
pub(super) const SNAPSHOT_COMMAND: CommandType = supervised("blockdev-snapshot", &SNAPSHOT, NOTHING);
pub(super) const INTERNAL_SNAPSHOT_COMMAND: CommandType =
    supervised("blockdev-snapshot-internal-sync", &INTERNAL_SNAPSHOT, NOTHING);
pub(super) const DELETE_SNAPSHOT_COMMAND: CommandType = supervised(
    "blockdev-snapshot-delete-internal-sync",
    &DELETE_SNAPSHOT,
    Type::Struct(&block_info::SNAPSHOT_INFO),
);
pub(super) const TRANSACTION_COMMAND: CommandType = supervised("transaction", &TRANSACTION, NOTHING);
pub(super) const IO_THROTTLE_COMMAND: CommandType = supervised("block_set_io_throttle", &IO_THROTTLE, NOTHING);
pub(super) const WRITE_THRESHOLD_COMMAND: CommandType =
    supervised("block-set-write-threshold", &WRITE_THRESHOLD, NOTHING);
pub(super) const CHANGE_BACKING_FILE_COMMAND: CommandType =
    supervised("change-backing-file", &CHANGE_BACKING_FILE, NOTHING);

pub(super) const PASSWD_COMMAND: CommandType = supervised("block_passwd", &PASSWD, NOTHING);

static PASSWD: StructType = structure(
    "q_obj_block_passwd-arg",
    &[
        optional("device", Type::Str),
        optional("node-name", Type::Str),
        required("password", Type::Str),
    ],
);
static BLOCK_RESIZE: StructType = structure(
    "q_obj_block_resize-arg",
    &[
        optional("device", Type::Str),
        optional("node-name", Type::Str),
        required("size", INT),
    ],
);
static SNAPSHOT_SYNC: StructType = structure(
    "BlockdevSnapshotSync",
    &[
        optional("device", Type::Str),
        optional("node-name", Type::Str),
        required("snapshot-file", Type::Str),
        optional("snapshot-node-name", Type::Str),
        optional("format", Type::Str),
        optional("mode", Type::Enum(&NEW_IMAGE_MODE)),
    ],
);
pub(super) static NEW_IMAGE_MODE: EnumType = enumeration("NewImageMode", &["existing", "absolute-paths"]);
static SNAPSHOT: StructType = structure(
    "BlockdevSnapshot",
    &[required("node", Type::Str), required("overlay", Type::Str)],
);
static INTERNAL_SNAPSHOT: StructType = structure(
    "BlockdevSnapshotInternal",
    &[required("device", Type::Str), required("name", Type::Str)],
);
static DELETE_SNAPSHOT: StructType = structure(
    "q_obj_blockdev-snapshot-delete-internal-sync-arg",
    &[
        required("device", Type::Str),
        optional("id", Type::Str),
        optional("name", Type::Str),
    ],
);
static TRANSACTION: StructType = structure(
    "q_obj_transaction-arg",
    &[
        required("actions", Type::Array(&Type::Struct(&TRANSACTION_ACTION))),
        optional("properties", Type::Struct(&TRANSACTION_PROPERTIES)),
    ],
);
static TRANSACTION_ACTION: StructType = StructType {
    name: "TransactionAction",
    members: &[required("type", Type::Enum(&TRANSACTION_ACTION_KIND))],
    variants: Some(&Variants {
        tag: "type",
        of: &[
            ("abort", &ABORT_WRAPPER),
            ("block-dirty-bitmap-add", &bitmaps::ADD_WRAPPER),
            ("block-dirty-bitmap-clear", &bitmaps::BITMAP_WRAPPER),
            ("block-dirty-bitmap-disable", &bitmaps::BITMAP_WRAPPER),
            ("block-dirty-bitmap-enable", &bitmaps::BITMAP_WRAPPER),
            ("block-dirty-bitmap-merge", &bitmaps::MERGE_WRAPPER),
            ("block-dirty-bitmap-remove", &bitmaps::BITMAP_WRAPPER),
            ("blockdev-backup", &BLOCKDEV_BACKUP_WRAPPER),
            ("blockdev-snapshot", &SNAPSHOT_WRAPPER),
            ("blockdev-snapshot-internal-sync", &INTERNAL_SNAPSHOT_WRAPPER),
            ("blockdev-snapshot-sync", &SNAPSHOT_SYNC_WRAPPER),
            ("drive-backup", &DRIVE_BACKUP_WRAPPER),
        ],
    }),
};
static TRANSACTION_ACTION_KIND: EnumType = enumeration(
    "TransactionActionKind",
    &[
        "abort",
        "block-dirty-bitmap-add",
        "block-dirty-bitmap-clear",
        "block-dirty-bitmap-disable",
        "block-dirty-bitmap-enable",
        "block-dirty-bitmap-merge",
        "block-dirty-bitmap-remove",
        "blockdev-backup",
        "blockdev-snapshot",
        "blockdev-snapshot-internal-sync",
        "blockdev-snapshot-sync",
        "drive-backup",
    ],
);
static ABORT_WRAPPER: StructType = structure("AbortWrapper", &[required("data", Type::Struct(&EMPTY))]);
static BLOCKDEV_BACKUP_WRAPPER: StructType = structure(
    "BlockdevBackupWrapper",
    &[required("data", Type::Struct(&jobs::BLOCKDEV_BACKUP))],
);
static DRIVE_BACKUP_WRAPPER: StructType = structure(
    "DriveBackupWrapper",
    &[required("data", Type::Struct(&jobs::DRIVE_BACKUP))],
);
static SNAPSHOT_WRAPPER: StructType =
    structure("BlockdevSnapshotWrapper", &[required("data", Type::Struct(&SNAPSHOT))]);
static INTERNAL_SNAPSHOT_WRAPPER: StructType = structure(
    "BlockdevSnapshotInternalWrapper",
    &[required("data", Type::Struct(&INTERNAL_SNAPSHOT))],
);
static SNAPSHOT_SYNC_WRAPPER: StructType = structure(
    "BlockdevSnapshotSyncWrapper",
    &[required("data", Type::Struct(&SNAPSHOT_SYNC))],
);
static TRANSACTION_PROPERTIES: StructType = structure(
    "TransactionProperties",
    &[optional("completion-mode", Type::Enum(&COMPLETION_MODE))],
);
static COMPLETION_MODE: EnumType = enumeration("ActionCompletionMode", &["individual", "grouped"]);

static IO_THROTTLE: StructType = structure(
    "BlockIOThrottle",
    &[
        optional("device", Type::Str),
        optional("id", Type::Str),
        required("bps", INT),
        required("bps_rd", INT),
        required("bps_wr", INT),
        required("iops", INT),
        required("iops_rd", INT),
        required("iops_wr", INT),
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
    ],
);
static WRITE_THRESHOLD: StructType = structure(
    "q_obj_block-set-write-threshold-arg",
    &[
        required("node-name", Type::Str),
        required("write-threshold", Type::Int(IntType::Size)),
    ],
);
static CHANGE_BACKING_FILE: StructType = structure(
    "q_obj_change-backing-file-arg",
    &[
        required("device", Type::Str),
        required("image-node-name", Type::Str),
        required("backing-file", Type::Str),
    ],
);

/// Data of BLOCK_IO_ERROR.
pub(super) static IO_ERROR: StructType = structure(
    "q_obj_BLOCK_IO_ERROR-arg",
    &[
        required("qom-path", Type::Str),
        required("device", Type::Str),
        optional("node-name", Type::Str),
        required("operation", Type::Enum(&IO_OPERATION_TYPE)),
        required("action", Type::Enum(&BLOCK_ERROR_ACTION)),
        optional("nospace", Type::Bool),
        required("reason", Type::Str),
    ],
);
pub(super) static IO_OPERATION_TYPE: EnumType = enumeration("IoOperationType", &["read", "write"]);
pub(super) static BLOCK_ERROR_ACTION: EnumType = enumeration("BlockErrorAction", &["ignore", "report", "stop"]);
/// Data of BLOCK_WRITE_THRESHOLD.
pub(super) static WRITE_THRESHOLD_EXCEEDED: StructType = structure(
    "q_obj_BLOCK_WRITE_THRESHOLD-arg",
    &[
        required("node-name", Type::Str),
        required("amount-exceeded", Type::Int(IntType::Size)),
        required("write-threshold", Type::Int(IntType::Size)),
    ],
);
