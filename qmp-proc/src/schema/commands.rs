//! The commands and the types of their arguments and results.

use super::bitmaps;
use super::block;
use super::block_info;
use super::blockdev;
use super::chardev;
use super::devices;
use super::events::DUMP_QUERY_RESULT;
use super::helpers;
use super::info;
use super::jobs;
use super::looking;
use super::nbd;
use super::objects;
use super::types::{
    CommandType, EMPTY, EnumType, INT, Local, Member, NOTHING, Run, StructType, Type, enumeration, local, optional,
    required, structure, supervised,
};

/// Every command, in the order of `query-commands`.
pub static COMMANDS: &[CommandType] = &[
    local("qmp_capabilities", &CAPABILITIES, NOTHING, Local::Capabilities),
    local("query-version", &EMPTY, Type::Struct(&VERSION_INFO), Local::Version),
    local(
        "query-commands",
        &EMPTY,
        Type::Array(&Type::Struct(&COMMAND_INFO)),
        Local::Commands,
    ),
    local(
        "query-qmp-schema",
        &EMPTY,
        Type::Array(&Type::Struct(&SCHEMA_INFO)),
        Local::Schema,
    ),
    supervised("query-status", &EMPTY, Type::Struct(&STATUS_INFO)),
    supervised("stop", &EMPTY, NOTHING),
    supervised("cont", &EMPTY, NOTHING),
    supervised("system_reset", &EMPTY, NOTHING),
    supervised("system_powerdown", &EMPTY, NOTHING),
    supervised("quit", &EMPTY, NOTHING),
    helpers::RESTART_COMMAND,
    supervised("query-name", &EMPTY, Type::Struct(&NAME_INFO)),
    supervised("query-kvm", &EMPTY, Type::Struct(&KVM_INFO)),
    supervised("query-cpus-fast", &EMPTY, Type::Array(&Type::Struct(&CPU_INFO_FAST))),
    supervised("dump-guest-memory", &DUMP_GUEST_MEMORY, NOTHING),
    supervised("query-uuid", &EMPTY, Type::Struct(&info::UUID_INFO)),
    supervised("query-target", &EMPTY, Type::Struct(&info::TARGET_INFO)),
    supervised(
        "query-machines",
        &EMPTY,
        Type::Array(&Type::Struct(&info::MACHINE_INFO)),
    ),
    supervised(
        "query-current-machine",
        &EMPTY,
        Type::Struct(&info::CURRENT_MACHINE_PARAMS),
    ),
    supervised(
        "query-iothreads",
        &EMPTY,
        Type::Array(&Type::Struct(&info::IO_THREAD_INFO)),
    ),
    supervised(
        "query-hotpluggable-cpus",
        &EMPTY,
        Type::Array(&Type::Struct(&info::HOTPLUGGABLE_CPU)),
    ),
    supervised(
        "query-cpu-definitions",
        &EMPTY,
        Type::Array(&Type::Struct(&info::CPU_DEFINITION_INFO)),
    ),
    supervised("query-memory-size-summary", &EMPTY, Type::Struct(&info::MEMORY_INFO)),
    supervised("query-memdev", &EMPTY, Type::Array(&Type::Struct(&info::MEMDEV))),
    supervised(
        "query-command-line-options",
        &info::COMMAND_LINE_OPTIONS,
        Type::Array(&Type::Struct(&info::COMMAND_LINE_OPTION_INFO)),
    ),
    supervised("inject-nmi", &EMPTY, NOTHING),
    supervised("set-action", &info::SET_ACTION, NOTHING),
    supervised("query-dump", &EMPTY, Type::Struct(&DUMP_QUERY_RESULT)),
    supervised(
        "query-dump-guest-memory-capability",
        &EMPTY,
        Type::Struct(&DUMP_CAPABILITY),
    ),
    supervised("getfd", &GETFD, NOTHING),
    supervised("closefd", &CLOSEFD, NOTHING),
    supervised("add-fd", &ADD_FD, Type::Struct(&ADD_FD_INFO)),
    supervised("remove-fd", &REMOVE_FD, NOTHING),
    supervised("query-fdsets", &EMPTY, Type::Array(&Type::Struct(&FDSET_INFO))),
    objects::OBJECT_ADD_COMMAND,
    objects::OBJECT_DEL_COMMAND,
    objects::QOM_LIST_COMMAND,
    objects::QOM_GET_COMMAND,
    objects::QOM_SET_COMMAND,
    objects::QOM_LIST_TYPES_COMMAND,
    objects::QOM_LIST_PROPERTIES_COMMAND,
    objects::DEVICE_LIST_PROPERTIES_COMMAND,
    supervised("memsave", &looking::MEMSAVE, NOTHING),
    supervised("pmemsave", &looking::PMEMSAVE, NOTHING),
    supervised(
        "query-cpu-model-expansion",
        &looking::QUERY_CPU_MODEL_EXPANSION,
        Type::Struct(&looking::CPU_MODEL_EXPANSION_INFO),
    ),
    CommandType {
        run: Run::Human,
        ..supervised("human-monitor-command", &looking::HUMAN_MONITOR_COMMAND, Type::Str)
    },
    supervised("query-chardev", &EMPTY, Type::Array(&Type::Struct(&chardev::INFO))),
    supervised(
        "query-chardev-backends",
        &EMPTY,
        Type::Array(&Type::Struct(&chardev::BACKEND_INFO)),
    ),
    supervised("chardev-add", &chardev::ADD, Type::Struct(&chardev::ADDED)),
    supervised("chardev-change", &chardev::CHANGE, Type::Struct(&chardev::ADDED)),
    supervised("chardev-remove", &chardev::REMOVE, NOTHING),
    supervised("ringbuf-write", &chardev::RINGBUF_WRITE, NOTHING),
    supervised("ringbuf-read", &chardev::RINGBUF_READ, Type::Str),
    block::BLOCK_RESIZE_COMMAND,
    block::SNAPSHOT_SYNC_COMMAND,
    bitmaps::ADD_COMMAND,
    bitmaps::REMOVE_COMMAND,
    bitmaps::CLEAR_COMMAND,
    bitmaps::ENABLE_COMMAND,
    bitmaps::DISABLE_COMMAND,
    bitmaps::MERGE_COMMAND,
    bitmaps::SHA256_COMMAND,
    block::SNAPSHOT_COMMAND,
    block::INTERNAL_SNAPSHOT_COMMAND,
    block::DELETE_SNAPSHOT_COMMAND,
    block::TRANSACTION_COMMAND,
    block::IO_THROTTLE_COMMAND,
    block::WRITE_THRESHOLD_COMMAND,
    block::CHANGE_BACKING_FILE_COMMAND,
    nbd::START_COMMAND,
    nbd::STOP_COMMAND,
    nbd::ADD_COMMAND,
    nbd::REMOVE_COMMAND,
    nbd::EXPORT_ADD_COMMAND,
    nbd::EXPORT_DEL_COMMAND,
    nbd::QUERY_COMMAND,
    jobs::QUERY_JOBS_COMMAND,
    jobs::JOB_CANCEL_COMMAND,
    jobs::JOB_FINALIZE_COMMAND,
    jobs::JOB_DISMISS_COMMAND,
    jobs::JOB_PAUSE_COMMAND,
    jobs::JOB_RESUME_COMMAND,
    jobs::JOB_COMPLETE_COMMAND,
    jobs::QUERY_BLOCK_JOBS_COMMAND,
    jobs::BLOCK_JOB_CANCEL_COMMAND,
    jobs::BLOCK_JOB_COMPLETE_COMMAND,
    jobs::BLOCK_JOB_SET_SPEED_COMMAND,
    jobs::BLOCK_JOB_PAUSE_COMMAND,
    jobs::BLOCK_JOB_RESUME_COMMAND,
    jobs::BLOCK_JOB_FINALIZE_COMMAND,
    jobs::BLOCK_JOB_DISMISS_COMMAND,
    jobs::BLOCK_JOB_CHANGE_COMMAND,
    jobs::BLOCK_COMMIT_COMMAND,
    jobs::BLOCK_STREAM_COMMAND,
    jobs::DRIVE_MIRROR_COMMAND,
    jobs::BLOCKDEV_MIRROR_COMMAND,
    jobs::DRIVE_BACKUP_COMMAND,
    jobs::BLOCKDEV_BACKUP_COMMAND,
    jobs::BLOCKDEV_CREATE_COMMAND,
    blockdev::ADD,
    blockdev::DEL,
    blockdev::REOPEN,
    block::PASSWD_COMMAND,
    devices::ADD,
    devices::DEL,
    devices::EJECT,
    devices::OPEN_TRAY,
    devices::CLOSE_TRAY,
    devices::INSERT_MEDIUM,
    devices::REMOVE_MEDIUM,
    block_info::QUERY_BLOCK,
    block_info::QUERY_NAMED_BLOCK_NODES,
    block_info::QUERY_BLOCKSTATS,
];

static CAPABILITIES: StructType = structure(
    "q_obj_qmp_capabilities-arg",
    &[optional("enable", Type::Array(&Type::Enum(&QMP_CAPABILITY)))],
);
static QMP_CAPABILITY: EnumType = enumeration("QMPCapability", &["oob"]);

static VERSION_INFO: StructType = structure(
    "VersionInfo",
    &[
        required("qemu", Type::Struct(&VERSION_TRIPLE)),
        required("package", Type::Str),
    ],
);
static VERSION_TRIPLE: StructType = structure(
    "VersionTriple",
    &[required("major", INT), required("minor", INT), required("micro", INT)],
);
static COMMAND_INFO: StructType = structure("CommandInfo", &[required("name", Type::Str)]);

static STATUS_INFO: StructType = structure(
    "StatusInfo",
    &[
        required("running", Type::Bool),
        required("status", Type::Enum(&RUN_STATE)),
        optional("helper-restarts", INT),
        optional("policy-violations", INT),
    ],
);
static RUN_STATE: EnumType = enumeration(
    "RunState",
    &[
        "debug",
        "inmigrate",
        "internal-error",
        "io-error",
        "paused",
        "postmigrate",
        "prelaunch",
        "finish-migrate",
        "restore-vm",
        "running",
        "save-vm",
        "shutdown",
        "suspended",
        "watchdog",
        "guest-panicked",
        "colo",
    ],
);
static NAME_INFO: StructType = structure("NameInfo", &[optional("name", Type::Str)]);
static KVM_INFO: StructType = structure(
    "KvmInfo",
    &[required("enabled", Type::Bool), required("present", Type::Bool)],
);
static CPU_INFO_FAST: StructType = structure(
    "CpuInfoFast",
    &[
        required("cpu-index", INT),
        required("qom-path", Type::Str),
        required("thread-id", INT),
        required("props", Type::Struct(&CPU_INSTANCE_PROPERTIES)),
        required("target", Type::Enum(&SYS_EMU_TARGET)),
    ],
);
pub(super) static CPU_INSTANCE_PROPERTIES: StructType = structure(
    "CpuInstanceProperties",
    &[
        required("socket-id", INT),
        required("core-id", INT),
        required("thread-id", INT),
    ],
);
pub(super) static SYS_EMU_TARGET: EnumType = enumeration("SysEmuTarget", &["x86_64"]);

static DUMP_GUEST_MEMORY: StructType = structure(
    "q_obj_dump-guest-memory-arg",
    &[
        required("paging", Type::Bool),
        required("protocol", Type::Str),
        optional("detach", Type::Bool),
        optional("begin", INT),
        optional("length", INT),
        optional("format", Type::Enum(&DUMP_FORMAT)),
        optional("compression", Type::Enum(&DUMP_COMPRESSION)),
        // Ours: QEMU has no such member.
        optional("exclude", Type::Array(&Type::Enum(&DUMP_EXCLUDE))),
        optional("live", Type::Bool),
    ],
);
static DUMP_EXCLUDE: EnumType = enumeration("DumpGuestMemoryExclude", &["free", "cache", "user", "zero"]);
/// Of kdump-zlib and kdump-raw-zlib, what matters more: time (the default) or size. Our extension.
static DUMP_COMPRESSION: EnumType = enumeration("DumpGuestMemoryCompression", &["fast", "small"]);
/// The words of the protocol; query-dump-guest-memory-capability tells which of them this build writes.
static DUMP_FORMAT: EnumType = enumeration(
    "DumpGuestMemoryFormat",
    &[
        "elf",
        "kdump-zlib",
        "kdump-lzo",
        "kdump-snappy",
        "kdump-raw-zlib",
        "kdump-raw-lzo",
        "kdump-raw-snappy",
        // Our extension: what crash and libkdumpfile read besides.
        "kdump-zstd",
        "kdump-raw-zstd",
        "win-dmp",
    ],
);
static DUMP_CAPABILITY: StructType = structure(
    "DumpGuestMemoryCapability",
    &[required("formats", Type::Array(&Type::Enum(&DUMP_FORMAT)))],
);

static GETFD: StructType = structure("q_obj_getfd-arg", &[required("fdname", Type::Str)]);
static CLOSEFD: StructType = structure("q_obj_closefd-arg", &[required("fdname", Type::Str)]);
static ADD_FD: StructType = structure(
    "q_obj_add-fd-arg",
    &[optional("fdset-id", INT), optional("opaque", Type::Str)],
);
static ADD_FD_INFO: StructType = structure("AddfdInfo", &[required("fdset-id", INT), required("fd", INT)]);
static REMOVE_FD: StructType = structure("q_obj_remove-fd-arg", &[required("fdset-id", INT), optional("fd", INT)]);
static FDSET_INFO: StructType = structure(
    "FdsetInfo",
    &[
        required("fdset-id", INT),
        required("fds", Type::Array(&Type::Struct(&FDSET_FD_INFO))),
    ],
);
static FDSET_FD_INFO: StructType = structure("FdsetFdInfo", &[required("fd", INT), optional("opaque", Type::Str)]);

static SCHEMA_INFO: StructType = StructType {
    name: "SchemaInfo",
    members: &[
        required("name", Type::Str),
        required("meta-type", Type::Enum(&SCHEMA_META_TYPE)),
    ],
    variants: Some(&super::types::Variants {
        tag: "meta-type",
        of: &[
            ("builtin", &SCHEMA_BUILTIN),
            ("enum", &SCHEMA_ENUM),
            ("array", &SCHEMA_ARRAY),
            ("object", &SCHEMA_OBJECT),
            ("alternate", &SCHEMA_ALTERNATE),
            ("command", &SCHEMA_COMMAND),
            ("event", &SCHEMA_EVENT),
        ],
    }),
};
static SCHEMA_META_TYPE: EnumType = enumeration(
    "SchemaMetaType",
    &["builtin", "enum", "array", "object", "alternate", "command", "event"],
);
static SCHEMA_BUILTIN: StructType = structure("SchemaInfoBuiltin", &[required("json-type", Type::Enum(&JSON_TYPE))]);
static JSON_TYPE: EnumType = enumeration(
    "JSONType",
    &["string", "number", "int", "boolean", "null", "object", "array", "value"],
);
static SCHEMA_ENUM: StructType = structure(
    "SchemaInfoEnum",
    &[
        required("members", Type::Array(&Type::Struct(&SCHEMA_ENUM_MEMBER))),
        required("values", Type::Array(&Type::Str)),
    ],
);
static SCHEMA_ENUM_MEMBER: StructType = structure("SchemaInfoEnumMember", &[required("name", Type::Str)]);
static SCHEMA_ARRAY: StructType = structure("SchemaInfoArray", &[required("element-type", Type::Str)]);
static SCHEMA_OBJECT: StructType = structure(
    "SchemaInfoObject",
    &[
        required("members", Type::Array(&Type::Struct(&SCHEMA_OBJECT_MEMBER))),
        optional("tag", Type::Str),
        optional("variants", Type::Array(&Type::Struct(&SCHEMA_OBJECT_VARIANT))),
    ],
);
static SCHEMA_OBJECT_MEMBER: StructType = structure(
    "SchemaInfoObjectMember",
    &[required("name", Type::Str), required("type", Type::Str), DEFAULT],
);
/// Present, and always null, for a member that may be absent.
const DEFAULT: Member = optional("default", Type::Any);
static SCHEMA_OBJECT_VARIANT: StructType = structure(
    "SchemaInfoObjectVariant",
    &[required("case", Type::Str), required("type", Type::Str)],
);
static SCHEMA_ALTERNATE: StructType = structure(
    "SchemaInfoAlternate",
    &[required(
        "members",
        Type::Array(&Type::Struct(&SCHEMA_ALTERNATE_MEMBER)),
    )],
);
static SCHEMA_ALTERNATE_MEMBER: StructType = structure("SchemaInfoAlternateMember", &[required("type", Type::Str)]);
static SCHEMA_COMMAND: StructType = structure(
    "SchemaInfoCommand",
    &[
        required("arg-type", Type::Str),
        required("ret-type", Type::Str),
        optional("allow-oob", Type::Bool),
    ],
);
static SCHEMA_EVENT: StructType = structure("SchemaInfoEvent", &[required("arg-type", Type::Str)]);
