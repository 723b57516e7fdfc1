//! Types of the commands about devices and what is in them.

use super::types::{CommandType, INT, NOTHING, StructType, Type, optional, required, structure, supervised};

pub(super) const ADD: CommandType = supervised("device_add", &ADD_ARGUMENTS, NOTHING);
pub(super) const DEL: CommandType = supervised("device_del", &DEL_ARGUMENTS, NOTHING);
pub(super) const EJECT: CommandType = supervised("eject", &EJECT_ARGUMENTS, NOTHING);
pub(super) const OPEN_TRAY: CommandType = supervised("blockdev-open-tray", &OPEN_TRAY_ARGUMENTS, NOTHING);
pub(super) const CLOSE_TRAY: CommandType = supervised("blockdev-close-tray", &CLOSE_TRAY_ARGUMENTS, NOTHING);
pub(super) const INSERT_MEDIUM: CommandType = supervised("blockdev-insert-medium", &INSERT_ARGUMENTS, NOTHING);
pub(super) const REMOVE_MEDIUM: CommandType = supervised("blockdev-remove-medium", &REMOVE_ARGUMENTS, NOTHING);

/// Servers of the protocol leave a device's properties undeclared; here they are those that some device takes.
static ADD_ARGUMENTS: StructType = structure(
    "q_obj_device_add-arg",
    &[
        required("driver", Type::Str),
        optional("bus", Type::Str),
        optional("id", Type::Str),
        optional("addr", Type::Str),
        optional("bootindex", INT),
        optional("channel", INT),
        optional("drive", Type::Str),
        optional("iothread", Type::Str),
        optional("lun", INT),
        optional("num-queues", INT),
        optional("queue-size", INT),
        optional("rerror", Type::Str),
        optional("scsi-id", INT),
        optional("serial", Type::Str),
        optional("share-rw", Type::Bool),
        optional("unit", INT),
        optional("werror", Type::Str),
        optional("write-cache", Type::Str),
    ],
);
static DEL_ARGUMENTS: StructType = structure("q_obj_device_del-arg", &[required("id", Type::Str)]);
static EJECT_ARGUMENTS: StructType = structure(
    "q_obj_eject-arg",
    &[
        optional("device", Type::Str),
        optional("id", Type::Str),
        optional("force", Type::Bool),
    ],
);
static OPEN_TRAY_ARGUMENTS: StructType = structure(
    "q_obj_blockdev-open-tray-arg",
    &[
        optional("device", Type::Str),
        optional("id", Type::Str),
        optional("force", Type::Bool),
    ],
);
static CLOSE_TRAY_ARGUMENTS: StructType = structure(
    "q_obj_blockdev-close-tray-arg",
    &[optional("device", Type::Str), optional("id", Type::Str)],
);
static INSERT_ARGUMENTS: StructType = structure(
    "q_obj_blockdev-insert-medium-arg",
    &[required("id", Type::Str), required("node-name", Type::Str)],
);
static REMOVE_ARGUMENTS: StructType = structure("q_obj_blockdev-remove-medium-arg", &[required("id", Type::Str)]);

/// Data of DEVICE_DELETED.
pub(super) static DELETED: StructType = structure(
    "q_obj_DEVICE_DELETED-arg",
    &[optional("device", Type::Str), required("path", Type::Str)],
);
/// Data of DEVICE_TRAY_MOVED.
pub(super) static TRAY_MOVED: StructType = structure(
    "q_obj_DEVICE_TRAY_MOVED-arg",
    &[
        required("device", Type::Str),
        required("id", Type::Str),
        required("tray-open", Type::Bool),
    ],
);
