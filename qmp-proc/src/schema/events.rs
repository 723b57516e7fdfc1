//! The events and the types of their data.

use super::types::{EMPTY, EnumType, EventType, INT, StructType, Type, enumeration, optional, required, structure};
use super::{block, devices, helpers, jobs, nbd};

/// Every event.
pub static EVENTS: &[EventType] = &[
    event("SHUTDOWN", &SHUTDOWN),
    event("RESET", &RESET),
    event("POWERDOWN", &EMPTY),
    event("STOP", &EMPTY),
    event("RESUME", &EMPTY),
    event("GUEST_PANICKED", &GUEST_PANICKED),
    event("GUEST_CRASHLOADED", &GUEST_CRASHLOADED),
    event("RTC_CHANGE", &RTC_CHANGE),
    event("DUMP_COMPLETED", &DUMP_COMPLETED),
    event("BLOCK_IO_ERROR", &block::IO_ERROR),
    event("BLOCK_WRITE_THRESHOLD", &block::WRITE_THRESHOLD_EXCEEDED),
    event("BLOCK_EXPORT_DELETED", &nbd::DELETED),
    event("BULKHEAD_HELPER_RESTARTED", &helpers::RESTARTED),
    event("BULKHEAD_HELPER_LOST", &helpers::LOST),
    event("BULKHEAD_POLICY_VIOLATION", &helpers::VIOLATION),
    event("DEVICE_DELETED", &devices::DELETED),
    event("DEVICE_TRAY_MOVED", &devices::TRAY_MOVED),
    event("JOB_STATUS_CHANGE", &jobs::STATUS_CHANGE),
    event("BLOCK_JOB_READY", &jobs::PROGRESS),
    event("BLOCK_JOB_COMPLETED", &jobs::COMPLETED),
    event("BLOCK_JOB_CANCELLED", &jobs::PROGRESS),
    event("BLOCK_JOB_ERROR", &jobs::ERROR),
    event("BLOCK_JOB_PENDING", &jobs::PENDING),
];

const fn event(name: &'static str, data: &'static StructType) -> EventType {
    EventType { name, data }
}

static SHUTDOWN: StructType = structure(
    "q_obj_SHUTDOWN-arg",
    &[
        required("guest", Type::Bool),
        required("reason", Type::Enum(&SHUTDOWN_CAUSE)),
    ],
);
static RESET: StructType = structure(
    "q_obj_RESET-arg",
    &[
        required("guest", Type::Bool),
        required("reason", Type::Enum(&SHUTDOWN_CAUSE)),
    ],
);
static SHUTDOWN_CAUSE: EnumType = enumeration(
    "ShutdownCause",
    &[
        "none",
        "host-error",
        "host-qmp-quit",
        "host-qmp-system-reset",
        "host-signal",
        "host-ui",
        "guest-shutdown",
        "guest-reset",
        "guest-panic",
        "subsystem-reset",
        "snapshot-load",
    ],
);
static GUEST_PANICKED: StructType = structure(
    "q_obj_GUEST_PANICKED-arg",
    &[required("action", Type::Enum(&GUEST_PANIC_ACTION))],
);
static GUEST_CRASHLOADED: StructType = structure(
    "q_obj_GUEST_CRASHLOADED-arg",
    &[required("action", Type::Enum(&GUEST_PANIC_ACTION))],
);
static GUEST_PANIC_ACTION: EnumType = enumeration("GuestPanicAction", &["pause", "poweroff", "run"]);
static RTC_CHANGE: StructType = structure(
    "q_obj_RTC_CHANGE-arg",
    &[required("offset", INT), required("qom-path", Type::Str)],
);
static DUMP_COMPLETED: StructType = structure(
    "q_obj_DUMP_COMPLETED-arg",
    &[
        required("result", Type::Struct(&DUMP_QUERY_RESULT)),
        optional("error", Type::Str),
    ],
);
/// Also what query-dump returns.
pub(super) static DUMP_QUERY_RESULT: StructType = structure(
    "DumpQueryResult",
    &[
        required("status", Type::Enum(&DUMP_STATUS)),
        required("completed", INT),
        required("total", INT),
    ],
);
static DUMP_STATUS: EnumType = enumeration("DumpStatus", &["none", "active", "completed", "failed"]);
