//! Types of the queries about the machine, and of the commands that decide what it does by itself.

use super::commands::{CPU_INSTANCE_PROPERTIES, SYS_EMU_TARGET};
use super::types::{EnumType, INT, IntType, StructType, Type, enumeration, optional, required, structure};

/// A size in bytes.
const SIZE: Type = Type::Int(IntType::Size);

pub(super) static UUID_INFO: StructType = structure("UuidInfo", &[required("UUID", Type::Str)]);
pub(super) static TARGET_INFO: StructType = structure("TargetInfo", &[required("arch", Type::Enum(&SYS_EMU_TARGET))]);
pub(super) static MACHINE_INFO: StructType = structure(
    "MachineInfo",
    &[
        required("name", Type::Str),
        optional("is-default", Type::Bool),
        required("cpu-max", INT),
        required("hotpluggable-cpus", Type::Bool),
        required("numa-mem-supported", Type::Bool),
        required("deprecated", Type::Bool),
        optional("default-cpu-type", Type::Str),
        required("acpi", Type::Bool),
    ],
);
pub(super) static CURRENT_MACHINE_PARAMS: StructType = structure(
    "CurrentMachineParams",
    &[required("wakeup-suspend-support", Type::Bool)],
);
pub(super) static IO_THREAD_INFO: StructType = structure(
    "IOThreadInfo",
    &[
        required("id", Type::Str),
        required("thread-id", INT),
        required("poll-max-ns", INT),
        required("poll-grow", INT),
        required("poll-shrink", INT),
        required("aio-max-batch", INT),
    ],
);
pub(super) static HOTPLUGGABLE_CPU: StructType = structure(
    "HotpluggableCPU",
    &[
        required("type", Type::Str),
        required("vcpus-count", INT),
        required("props", Type::Struct(&CPU_INSTANCE_PROPERTIES)),
        optional("qom-path", Type::Str),
    ],
);
pub(super) static CPU_DEFINITION_INFO: StructType = structure(
    "CpuDefinitionInfo",
    &[
        required("name", Type::Str),
        optional("migration-safe", Type::Bool),
        required("static", Type::Bool),
        optional("unavailable-features", Type::Array(&Type::Str)),
        required("typename", Type::Str),
        required("deprecated", Type::Bool),
    ],
);
pub(super) static MEMORY_INFO: StructType = structure("MemoryInfo", &[required("base-memory", SIZE)]);
pub(super) static MEMDEV: StructType = structure(
    "Memdev",
    &[
        optional("id", Type::Str),
        required("size", SIZE),
        required("merge", Type::Bool),
        required("dump", Type::Bool),
        required("prealloc", Type::Bool),
        required("share", Type::Bool),
        optional("reserve", Type::Bool),
        required("host-nodes", Type::Array(&INT)),
        required("policy", Type::Enum(&HOST_MEM_POLICY)),
    ],
);
static HOST_MEM_POLICY: EnumType = enumeration("HostMemPolicy", &["default", "preferred", "bind", "interleave"]);

pub(super) static COMMAND_LINE_OPTIONS: StructType =
    structure("q_obj_query-command-line-options-arg", &[optional("option", Type::Str)]);
pub(super) static COMMAND_LINE_OPTION_INFO: StructType = structure(
    "CommandLineOptionInfo",
    &[
        required("option", Type::Str),
        required("parameters", Type::Array(&Type::Struct(&COMMAND_LINE_PARAMETER_INFO))),
    ],
);
static COMMAND_LINE_PARAMETER_INFO: StructType = structure(
    "CommandLineParameterInfo",
    &[
        required("name", Type::Str),
        required("type", Type::Enum(&COMMAND_LINE_PARAMETER_TYPE)),
    ],
);
static COMMAND_LINE_PARAMETER_TYPE: EnumType =
    enumeration("CommandLineParameterType", &["string", "boolean", "number", "size"]);

pub(super) static SET_ACTION: StructType = structure(
    "q_obj_set-action-arg",
    &[
        optional("reboot", Type::Enum(&REBOOT_ACTION)),
        optional("shutdown", Type::Enum(&SHUTDOWN_ACTION)),
        optional("panic", Type::Enum(&PANIC_ACTION)),
        optional("watchdog", Type::Enum(&WATCHDOG_ACTION)),
        optional("helper-loss", Type::Enum(&HELPER_LOSS_ACTION)),
    ],
);
static REBOOT_ACTION: EnumType = enumeration("RebootAction", &["reset", "shutdown"]);
static SHUTDOWN_ACTION: EnumType = enumeration("ShutdownAction", &["poweroff", "pause"]);
static PANIC_ACTION: EnumType = enumeration("PanicAction", &["pause", "shutdown", "exit-failure", "none"]);
static HELPER_LOSS_ACTION: EnumType = enumeration("BulkheadHelperLossAction", &["pause", "shutdown"]);
static WATCHDOG_ACTION: EnumType = enumeration(
    "WatchdogAction",
    &["reset", "shutdown", "poweroff", "pause", "debug", "none", "inject-nmi"],
);

#[cfg(test)]
mod tests {
    use super::super::{check, decode, find};
    use crate::json::{Object, Value, ser};
    use ipc::info::{
        CommandLineOptionInfo, CommandLineParameterInfo, CommandLineParameterType, CpuDefinitionInfo,
        CurrentMachineParams, HostMemPolicy, HotpluggableCpu, IoThreadInfo, MachineInfo, Memdev, MemoryInfo,
        TargetInfo, UuidInfo,
    };
    use ipc::qmp::{CpuInstanceProperties, Return};

    /// What the supervisor says has the form that the schema declares.
    #[test]
    fn answers_match_their_declaration() {
        let text = || "x".to_owned();
        let parameter = |ty| CommandLineParameterInfo { name: text(), ty };
        let types = [
            CommandLineParameterType::String,
            CommandLineParameterType::Boolean,
            CommandLineParameterType::Number,
            CommandLineParameterType::Size,
        ];
        let memdev = |policy| Memdev {
            id: Some(text()),
            size: u64::MAX,
            merge: false,
            dump: false,
            prealloc: false,
            share: true,
            reserve: Some(false),
            host_nodes: vec![1],
            policy,
        };
        let props = CpuInstanceProperties {
            socket_id: 0,
            core_id: 1,
            thread_id: 2,
        };
        let answers = [
            ("query-uuid", Return::Uuid(UuidInfo { uuid: text() })),
            ("query-target", Return::Target(TargetInfo { arch: "x86_64".into() })),
            (
                "query-machines",
                Return::Machines(vec![MachineInfo {
                    name: text(),
                    is_default: Some(true),
                    cpu_max: 1,
                    hotpluggable_cpus: false,
                    numa_mem_supported: false,
                    deprecated: false,
                    default_cpu_type: Some(text()),
                    acpi: true,
                }]),
            ),
            (
                "query-current-machine",
                Return::CurrentMachine(CurrentMachineParams {
                    wakeup_suspend_support: false,
                }),
            ),
            (
                "query-iothreads",
                Return::IoThreads(vec![IoThreadInfo {
                    id: text(),
                    thread_id: 1,
                    poll_max_ns: 0,
                    poll_grow: 0,
                    poll_shrink: 0,
                    aio_max_batch: 0,
                }]),
            ),
            (
                "query-hotpluggable-cpus",
                Return::HotpluggableCpus(vec![HotpluggableCpu {
                    ty: text(),
                    vcpus_count: 1,
                    props,
                    qom_path: Some(text()),
                }]),
            ),
            (
                "query-cpu-definitions",
                Return::CpuDefinitions(vec![CpuDefinitionInfo {
                    name: text(),
                    migration_safe: Some(false),
                    is_static: false,
                    unavailable_features: Some(vec![text()]),
                    typename: text(),
                    deprecated: false,
                }]),
            ),
            (
                "query-memory-size-summary",
                Return::MemorySize(MemoryInfo { base_memory: 1 }),
            ),
            (
                "query-memdev",
                Return::Memdevs(vec![
                    memdev(HostMemPolicy::Default),
                    memdev(HostMemPolicy::Preferred),
                    memdev(HostMemPolicy::Bind),
                    memdev(HostMemPolicy::Interleave),
                ]),
            ),
            (
                "query-command-line-options",
                Return::CommandLineOptions(vec![CommandLineOptionInfo {
                    option: text(),
                    parameters: types.map(parameter).into(),
                }]),
            ),
        ];
        for (name, answer) in answers {
            let Value::Object(tagged) = ser::to_value(&answer).unwrap() else {
                panic!("{name}")
            };
            let (_, content) = tagged.into_entries().pop().unwrap();
            check::value(&find(name).unwrap().returns, content).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }

    /// Every word of the schema is one of the message's.
    #[test]
    fn all_actions_are_understood() {
        let command = find("set-action").unwrap();
        for member in command.arguments.members {
            let super::Type::Enum(words) = member.ty else { panic!() };
            for word in words.values {
                decode(command, Object::new().with(member.name, Value::string(*word))).unwrap();
            }
        }
        decode(command, Object::new()).unwrap();
    }
}
