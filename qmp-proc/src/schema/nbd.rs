//! Exports and the NBD server: commands' arguments and results.

use super::types::{
    CommandType, EMPTY, EnumType, IntType, NOTHING, StructType, Type, Variants, enumeration, optional, required,
    structure, supervised,
};
use super::{bitmaps, chardev};

pub(super) const START_COMMAND: CommandType = supervised("nbd-server-start", &START, NOTHING);
pub(super) const STOP_COMMAND: CommandType = supervised("nbd-server-stop", &EMPTY, NOTHING);
pub(super) const ADD_COMMAND: CommandType = supervised("nbd-server-add", &ADD, NOTHING);
pub(super) const REMOVE_COMMAND: CommandType = supervised("nbd-server-remove", &REMOVE, NOTHING);
pub(super) const EXPORT_ADD_COMMAND: CommandType = supervised("block-export-add", &EXPORT, NOTHING);
pub(super) const EXPORT_DEL_COMMAND: CommandType = supervised("block-export-del", &EXPORT_DEL, NOTHING);
pub(super) const QUERY_COMMAND: CommandType = supervised("query-block-exports", &EMPTY, Type::Array(&INFO_ITEM));

const UINT32: Type = Type::Int(IntType::Narrow {
    name: "uint32_t",
    min: 0,
    max: u32::MAX as i64,
});

static START: StructType = structure(
    "q_obj_nbd-server-start-arg",
    &[
        required("addr", Type::Struct(&chardev::ADDRESS)),
        optional("handshake-max-seconds", UINT32),
        optional("max-connections", UINT32),
    ],
);
static ADD: StructType = structure(
    "NbdServerAddOptions",
    &[
        optional("name", Type::Str),
        optional("description", Type::Str),
        required("device", Type::Str),
        optional("writable", Type::Bool),
        optional("bitmap", Type::Str),
    ],
);
static MODE: EnumType = enumeration("BlockExportRemoveMode", &["safe", "hard"]);
static REMOVE: StructType = structure(
    "q_obj_nbd-server-remove-arg",
    &[required("name", Type::Str), optional("mode", Type::Enum(&MODE))],
);
static EXPORT_DEL: StructType = structure(
    "q_obj_block-export-del-arg",
    &[required("id", Type::Str), optional("mode", Type::Enum(&MODE))],
);
static EXPORT_TYPE: EnumType = enumeration("BlockExportType", &["nbd"]);
static EXPORT: StructType = StructType {
    name: "BlockExportOptions",
    members: &[
        required("type", Type::Enum(&EXPORT_TYPE)),
        required("id", Type::Str),
        required("node-name", Type::Str),
        optional("writable", Type::Bool),
        optional("writethrough", Type::Bool),
    ],
    variants: Some(&Variants {
        tag: "type",
        of: &[("nbd", &NBD)],
    }),
};
static NBD: StructType = structure(
    "BlockExportOptionsNbd",
    &[
        optional("name", Type::Str),
        optional("description", Type::Str),
        optional("bitmaps", Type::Array(&Type::Alternate(&bitmaps::SOURCE))),
        optional("allocation-depth", Type::Bool),
    ],
);
static INFO_ITEM: Type = Type::Struct(&INFO);
static INFO: StructType = structure(
    "BlockExportInfo",
    &[
        required("id", Type::Str),
        required("type", Type::Enum(&EXPORT_TYPE)),
        required("node-name", Type::Str),
        required("shutting-down", Type::Bool),
    ],
);

/// BLOCK_EXPORT_DELETED.
pub(super) static DELETED: StructType = structure("q_obj_BLOCK_EXPORT_DELETED-arg", &[required("id", Type::Str)]);
