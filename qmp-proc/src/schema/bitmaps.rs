//! Commands on dirty bitmaps.

use super::types::{
    AlternateType, CommandType, IntType, NOTHING, StructType, Type, optional, required, structure, supervised,
};

pub(super) const ADD_COMMAND: CommandType = supervised("block-dirty-bitmap-add", &ADD, NOTHING);
pub(super) const REMOVE_COMMAND: CommandType = supervised("block-dirty-bitmap-remove", &BITMAP, NOTHING);
pub(super) const CLEAR_COMMAND: CommandType = supervised("block-dirty-bitmap-clear", &BITMAP, NOTHING);
pub(super) const ENABLE_COMMAND: CommandType = supervised("block-dirty-bitmap-enable", &BITMAP, NOTHING);
pub(super) const DISABLE_COMMAND: CommandType = supervised("block-dirty-bitmap-disable", &BITMAP, NOTHING);
pub(super) const MERGE_COMMAND: CommandType = supervised("block-dirty-bitmap-merge", &MERGE, NOTHING);

pub(super) const SHA256_COMMAND: CommandType =
    supervised("x-debug-block-dirty-bitmap-sha256", &BITMAP, Type::Struct(&SHA256));

const UINT32: Type = Type::Int(IntType::Narrow {
    name: "uint32_t",
    min: 0,
    max: u32::MAX as i64,
});

pub(super) static ADD: StructType = structure(
    "BlockDirtyBitmapAdd",
    &[
        required("node", Type::Str),
        required("name", Type::Str),
        optional("granularity", UINT32),
        optional("persistent", Type::Bool),
        optional("disabled", Type::Bool),
    ],
);
pub(super) static BITMAP: StructType = structure(
    "BlockDirtyBitmap",
    &[required("node", Type::Str), required("name", Type::Str)],
);
pub(super) static MERGE: StructType = structure(
    "BlockDirtyBitmapMerge",
    &[
        required("node", Type::Str),
        required("target", Type::Str),
        required("bitmaps", Type::Array(&Type::Alternate(&SOURCE))),
    ],
);
static SHA256: StructType = structure("BlockDirtyBitmapSha256", &[required("sha256", Type::Str)]);
pub(super) static SOURCE: AlternateType = AlternateType {
    name: "BlockDirtyBitmapOrStr",
    branches: &[("local", Type::Str), ("external", Type::Struct(&BITMAP))],
};

/// Of transactions.
pub(super) static ADD_WRAPPER: StructType =
    structure("BlockDirtyBitmapAddWrapper", &[required("data", Type::Struct(&ADD))]);
pub(super) static BITMAP_WRAPPER: StructType =
    structure("BlockDirtyBitmapWrapper", &[required("data", Type::Struct(&BITMAP))]);
pub(super) static MERGE_WRAPPER: StructType = structure(
    "BlockDirtyBitmapMergeWrapper",
    &[required("data", Type::Struct(&MERGE))],
);
