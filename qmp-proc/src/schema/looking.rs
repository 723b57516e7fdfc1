//! Types of the commands that look into the guest.

use super::types::{EnumType, INT, StructType, Type, enumeration, optional, required, structure};

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

pub(super) static QUERY_CPU_MODEL_EXPANSION: StructType = structure(
    "q_obj_query-cpu-model-expansion-arg",
    &[
        required("type", Type::Enum(&CPU_MODEL_EXPANSION_TYPE)),
        required("model", Type::Struct(&CPU_MODEL_INFO)),
    ],
);
static CPU_MODEL_EXPANSION_TYPE: EnumType = enumeration("CpuModelExpansionType", &["static", "full"]);
static CPU_MODEL_INFO: StructType = structure(
    "CpuModelInfo",
    &[required("name", Type::Str), optional("props", Type::Any)],
);
pub(super) static CPU_MODEL_EXPANSION_INFO: StructType = structure(
    "CpuModelExpansionInfo",
    &[required("model", Type::Struct(&CPU_MODEL_INFO))],
);
