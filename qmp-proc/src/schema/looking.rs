//! Types of the commands that look into the guest.

use super::types::{INT, StructType, Type, optional, required, structure};

pub(super) static MEMSAVE: StructType = structure(
    "q_obj_memsave-arg",
    &[
        required("val", INT),
        required("size", INT),
        required("filename", Type::Str),
        optional("cpu-index", INT),
    ],
);
pub(super) static PMEMSAVE: StructType = structure(
    "q_obj_pmemsave-arg",
    &[
        required("val", INT),
        required("size", INT),
        required("filename", Type::Str),
    ],
);

pub(super) static HUMAN_MONITOR_COMMAND: StructType = structure(
    "q_obj_human-monitor-command-arg",
    &[required("command-line", Type::Str), optional("cpu-index", INT)],
);
