//! What queries about the machine return, by QMP's names. A member that is `None` is absent from the JSON text.

use crate::qmp::CpuInstanceProperties;
use serde::{Deserialize, Serialize};

/// query-uuid's `UuidInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UuidInfo {
    /// In the form of `-uuid`; all zeros without one.
    #[serde(rename = "UUID")]
    pub uuid: String,
}

/// query-target's `TargetInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetInfo {
    /// The guest's architecture.
    pub arch: String,
}

/// query-machines' `MachineInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MachineInfo {
    /// For `-machine`.
    pub name: String,
    /// Only on the one that a machine is without `-machine`.
    pub is_default: Option<bool>,
    /// Most vCPUs.
    pub cpu_max: i64,
    /// Whether vCPUs can be added to a running machine.
    pub hotpluggable_cpus: bool,
    /// Whether memory can be shared out to NUMA nodes by size.
    pub numa_mem_supported: bool,
    /// Whether it will go.
    pub deprecated: bool,
    /// The CPU without `-cpu`.
    pub default_cpu_type: Option<String>,
    /// Whether ACPI tables describe it.
    pub acpi: bool,
}

/// query-current-machine's `CurrentMachineParams`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CurrentMachineParams {
    /// Whether the guest can suspend to RAM and be woken up.
    pub wakeup_suspend_support: bool,
}

/// query-iothreads' `IOThreadInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct IoThreadInfo {
    /// Its name.
    pub id: String,
    /// The host's thread id.
    pub thread_id: i64,
    /// How long it polls before it waits, nanoseconds; 0: it does not poll.
    pub poll_max_ns: i64,
    /// By what that grows; 0: it does not.
    pub poll_grow: i64,
    /// By what that shrinks; 0: it does not.
    pub poll_shrink: i64,
    /// Most requests in one batch; 0: the engine's own bound.
    pub aio_max_batch: i64,
}

/// query-hotpluggable-cpus' `HotpluggableCPU`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HotpluggableCpu {
    /// The CPU's type.
    #[serde(rename = "type")]
    pub ty: String,
    /// How many vCPUs the slot has.
    pub vcpus_count: i64,
    /// Where it is.
    pub props: CpuInstanceProperties,
    /// The vCPU in the slot.
    pub qom_path: Option<String>,
}

/// query-cpu-definitions' `CpuDefinitionInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuDefinitionInfo {
    /// For `-cpu`.
    pub name: String,
    /// Whether it is the same on every host.
    pub migration_safe: Option<bool>,
    /// Whether it is the same in every version.
    #[serde(rename = "static")]
    pub is_static: bool,
    /// What of it this host cannot give.
    pub unavailable_features: Option<Vec<String>>,
    /// Its type's name.
    pub typename: String,
    /// Whether it will go.
    pub deprecated: bool,
}

/// query-memory-size-summary's `MemoryInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemoryInfo {
    /// Bytes of memory that the machine started with.
    pub base_memory: u64,
}

/// query-memdev's `Memdev`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(clippy::struct_excessive_bools)] // QMP's.
pub struct Memdev {
    /// The memory backend's id; absent for memory that `-m` made.
    pub id: Option<String>,
    /// Bytes.
    pub size: u64,
    /// Whether the host merges equal pages of it.
    pub merge: bool,
    /// Whether it is in core dumps of the host.
    pub dump: bool,
    /// Whether it is filled at start.
    pub prealloc: bool,
    /// Whether several processes map it.
    pub share: bool,
    /// Whether the host sets memory or swap aside for all of it.
    pub reserve: Option<bool>,
    /// NUMA nodes that it is bound to.
    pub host_nodes: Vec<i64>,
    /// How.
    pub policy: HostMemPolicy,
}

/// QMP's HostMemPolicy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum HostMemPolicy {
    Default,
    Preferred,
    Bind,
    Interleave,
}

/// query-command-line-options' `CommandLineOptionInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandLineOptionInfo {
    /// The option, without dashes.
    pub option: String,
    /// Its keys.
    pub parameters: Vec<CommandLineParameterInfo>,
}

/// `CommandLineParameterInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandLineParameterInfo {
    /// The key.
    pub name: String,
    /// Its values.
    #[serde(rename = "type")]
    pub ty: CommandLineParameterType,
}

/// QMP's CommandLineParameterType.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum CommandLineParameterType {
    String,
    Boolean,
    Number,
    Size,
}

/// `BULKHEAD_HELPER_RESTARTED`: a helper was started again. Times are microseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HelperRestart {
    /// The helper's name.
    pub role: String,
    /// The new one's process id.
    pub pid: i64,
    /// Why the last one has ended.
    pub reason: String,
    /// From its end until the guest is served again.
    pub pause_us: u64,
    /// From its end until nothing is left that the kernel does for it.
    pub fence_us: u64,
    /// From its end until the new one is sealed.
    pub spawn_us: u64,
    /// How long the block graph took.
    pub rebuild_us: u64,
    /// How long it took until queues were served.
    pub replay_us: u64,
}
