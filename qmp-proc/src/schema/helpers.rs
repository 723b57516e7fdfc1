//! Bulkhead's own: the machine's helpers, and what becomes of them.

use super::types::{
    CommandType, EnumType, IntType, StructType, Type, enumeration, optional, required, structure, supervised,
};

pub(super) const RESTART_COMMAND: CommandType =
    supervised("bulkhead-restart-helper", &RESTART, Type::Struct(&RESTARTED));

/// A time, microseconds.
const MICROSECONDS: Type = Type::Int(IntType::Size);

static ROLE: EnumType = enumeration("BulkheadHelper", &["block-proc"]);
static RESTART: StructType = structure(
    "q_obj_bulkhead-restart-helper-arg",
    &[required("role", Type::Enum(&ROLE))],
);
/// BULKHEAD_HELPER_RESTARTED, and the command's result.
pub(super) static RESTARTED: StructType = structure(
    "BulkheadHelperRestart",
    &[
        required("role", Type::Str),
        required("pid", super::types::INT),
        required("reason", Type::Str),
        required("pause-us", MICROSECONDS),
        required("fence-us", MICROSECONDS),
        required("spawn-us", MICROSECONDS),
        required("rebuild-us", MICROSECONDS),
        required("replay-us", MICROSECONDS),
    ],
);
/// BULKHEAD_HELPER_LOST.
pub(super) static LOST: StructType = structure(
    "q_obj_BULKHEAD_HELPER_LOST-arg",
    &[required("role", Type::Str), required("reason", Type::Str)],
);
/// BULKHEAD_POLICY_VIOLATION.
pub(super) static VIOLATION: StructType = structure(
    "q_obj_BULKHEAD_POLICY_VIOLATION-arg",
    &[
        required("role", Type::Str),
        required("pid", super::types::INT),
        optional("vm", Type::Str),
        required("action", Type::Enum(&VIOLATION_ACTION)),
        optional("syscall", Type::Str),
        optional("number", super::types::INT),
        optional("arguments", Type::Array(&WORD)),
        optional("instruction-pointer", WORD),
        optional("symbol", Type::Str),
    ],
);
static WORD: Type = Type::Int(IntType::Size);
static VIOLATION_ACTION: EnumType = enumeration("BulkheadViolationAction", &["killed", "allowed"]);
