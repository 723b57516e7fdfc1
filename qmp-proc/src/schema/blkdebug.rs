//! Options of the blkdebug driver. block-proc knows the same events (`block-proc/src/node/event.rs`).

use super::blockdev::BLOCKDEV_REF;
use super::types::{EnumType, INT, StructType, Type, enumeration, optional, required, structure};

pub(super) static BLKDEBUG: StructType = structure(
    "BlockdevOptionsBlkdebug",
    &[
        required("image", Type::Alternate(&BLOCKDEV_REF)),
        optional("align", INT),
        optional("inject-error", Type::Array(&Type::Struct(&INJECT_ERROR))),
        optional("set-state", Type::Array(&Type::Struct(&SET_STATE))),
    ],
);
static INJECT_ERROR: StructType = structure(
    "BlkdebugInjectErrorOptions",
    &[
        required("event", Type::Enum(&EVENT)),
        optional("state", INT),
        optional("iotype", Type::Enum(&IO_TYPE)),
        optional("errno", INT),
        optional("sector", INT),
        optional("once", Type::Bool),
        optional("immediately", Type::Bool),
    ],
);
static SET_STATE: StructType = structure(
    "BlkdebugSetStateOptions",
    &[
        required("event", Type::Enum(&EVENT)),
        optional("state", INT),
        required("new_state", INT),
    ],
);
static IO_TYPE: EnumType = enumeration(
    "BlkdebugIOType",
    &["read", "write", "write-zeroes", "discard", "flush", "block-status"],
);
static EVENT: EnumType = enumeration(
    "BlkdebugEvent",
    &[
        "l1_update",
        "l1_grow_alloc_table",
        "l1_grow_write_table",
        "l1_grow_activate_table",
        "l2_load",
        "l2_update",
        "l2_update_compressed",
        "l2_alloc_cow_read",
        "l2_alloc_write",
        "read_aio",
        "read_backing_aio",
        "read_compressed",
        "write_aio",
        "write_compressed",
        "vmstate_load",
        "vmstate_save",
        "cow_read",
        "cow_write",
        "reftable_load",
        "reftable_grow",
        "reftable_update",
        "refblock_load",
        "refblock_update",
        "refblock_update_part",
        "refblock_alloc",
        "refblock_alloc_hookup",
        "refblock_alloc_write",
        "refblock_alloc_write_blocks",
        "refblock_alloc_write_table",
        "refblock_alloc_switch_table",
        "cluster_alloc",
        "cluster_alloc_bytes",
        "cluster_free",
        "flush_to_os",
        "flush_to_disk",
        "pwritev_rmw_head",
        "pwritev_rmw_after_head",
        "pwritev_rmw_tail",
        "pwritev_rmw_after_tail",
        "pwritev",
        "pwritev_zero",
        "pwritev_done",
        "empty_image_prepare",
        "l1_shrink_write_table",
        "l1_shrink_free_l2_clusters",
        "cor_write",
        "cluster_alloc_space",
        "none",
    ],
);
