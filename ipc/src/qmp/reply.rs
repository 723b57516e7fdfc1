//! What commands return.

use super::DumpFormat;
use crate::bitmap;
use crate::block_info;
use crate::chardev;
use crate::cpu::CpuModelExpansionInfo;
use crate::human::HumanReply;
use crate::info;
use crate::job;
use crate::nbd;
use crate::objects::{ObjectPropertyInfo, ObjectTypeInfo, PropertyValue};
use serde::{Deserialize, Serialize};

/// What a command returns. The JSON value is the variant's content; for `Empty` it is `{}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Return {
    /// No data.
    Empty,
    /// query-status.
    Status(StatusInfo),
    /// query-name.
    Name(NameInfo),
    /// query-kvm.
    Kvm(KvmInfo),
    /// query-cpus-fast.
    Cpus(Vec<CpuInfoFast>),
    /// query-uuid.
    Uuid(info::UuidInfo),
    /// query-target.
    Target(info::TargetInfo),
    /// query-machines.
    Machines(Vec<info::MachineInfo>),
    /// query-current-machine.
    CurrentMachine(info::CurrentMachineParams),
    /// query-iothreads.
    IoThreads(Vec<info::IoThreadInfo>),
    /// query-hotpluggable-cpus.
    HotpluggableCpus(Vec<info::HotpluggableCpu>),
    /// query-cpu-definitions.
    CpuDefinitions(Vec<info::CpuDefinitionInfo>),
    /// query-memory-size-summary.
    MemorySize(info::MemoryInfo),
    /// query-memdev.
    Memdevs(Vec<info::Memdev>),
    /// query-command-line-options.
    CommandLineOptions(Vec<info::CommandLineOptionInfo>),
    /// query-dump.
    Dump(DumpQueryResult),
    /// query-dump-guest-memory-capability.
    DumpCapability(DumpCapability),
    /// add-fd.
    AddedFd(AddFdInfo),
    /// query-fdsets.
    Fdsets(Vec<FdsetInfo>),
    /// qom-get.
    Property(PropertyValue),
    /// qom-list, qom-list-properties, device-list-properties.
    Properties(Vec<ObjectPropertyInfo>),
    /// qom-list-types.
    ObjectTypes(Vec<ObjectTypeInfo>),
    /// query-cpu-model-expansion.
    CpuModelExpansion(CpuModelExpansionInfo),
    /// human-monitor-command, before it is text.
    Human(HumanReply),
    /// query-chardev.
    Chardevs(Vec<chardev::ChardevInfo>),
    /// query-chardev-backends.
    ChardevBackends(Vec<chardev::ChardevBackendInfo>),
    /// chardev-add, chardev-change.
    AddedChardev(chardev::ChardevReturn),
    /// ringbuf-read.
    Text(String),
    /// blockdev-snapshot-delete-internal-sync.
    Snapshot(block_info::SnapshotInfo),
    /// query-jobs.
    Jobs(Vec<job::JobInfo>),
    /// query-block-exports.
    BlockExports(Vec<nbd::ExportInfo>),
    /// query-block-jobs.
    BlockJobs(Vec<job::BlockJobInfo>),
    /// query-block.
    Blocks(Vec<block_info::BlockInfo>),
    /// query-named-block-nodes.
    BlockNodes(Vec<block_info::BlockDeviceInfo>),
    /// x-debug-block-dirty-bitmap-sha256.
    BitmapSha256(bitmap::BitmapSha256),
    /// bulkhead-restart-helper.
    HelperRestarted(info::HelperRestart),
    /// query-blockstats.
    BlockStats(Vec<block_info::StatsTree>),
}

/// query-status's `StatusInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusInfo {
    /// Whether the vCPUs run.
    pub running: bool,
    /// The run state.
    pub status: RunState,
    /// How often a helper was started again, if ever.
    #[serde(rename = "helper-restarts")]
    pub helper_restarts: Option<u64>,
    /// How many system calls helpers have made that their policies lack, if any.
    #[serde(rename = "policy-violations")]
    pub policy_violations: Option<u64>,
}

/// QMP's RunState: all of its values, in its words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum RunState {
    Debug,
    Inmigrate,
    InternalError,
    IoError,
    Paused,
    Postmigrate,
    Prelaunch,
    FinishMigrate,
    RestoreVm,
    Running,
    SaveVm,
    Shutdown,
    Suspended,
    Watchdog,
    GuestPanicked,
    Colo,
}

/// query-name's `NameInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameInfo {
    /// `-name`.
    pub name: Option<String>,
}

/// query-kvm's `KvmInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmInfo {
    /// Whether KVM runs the guest.
    pub enabled: bool,
    /// Whether the host has it.
    pub present: bool,
}

/// query-cpus-fast's `CpuInfoFast`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuInfoFast {
    /// Index of the vCPU.
    pub cpu_index: i64,
    /// Its object path.
    pub qom_path: String,
    /// The host's thread id.
    pub thread_id: i64,
    /// Topology.
    pub props: CpuInstanceProperties,
    /// Always `x86_64`.
    pub target: String,
}

/// Where a vCPU is in the topology.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuInstanceProperties {
    /// Socket number.
    pub socket_id: i64,
    /// Core number in the socket.
    pub core_id: i64,
    /// Thread number in the core.
    pub thread_id: i64,
}

/// QMP's DumpQueryResult.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpQueryResult {
    /// How it went.
    pub status: DumpStatus,
    /// Bytes of memory written.
    pub completed: i64,
    /// Bytes of memory in all.
    pub total: i64,
}

/// QMP's DumpStatus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum DumpStatus {
    None,
    Active,
    Completed,
    Failed,
}

/// QMP's DumpGuestMemoryCapability.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpCapability {
    /// What dump-guest-memory can write.
    pub formats: Vec<DumpFormat>,
}

/// add-fd's `AddfdInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct AddFdInfo {
    /// The set that the file descriptor is in now.
    pub fdset_id: i64,
    /// Its number, by which remove-fd names it.
    pub fd: i64,
}

/// query-fdsets's `FdsetInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FdsetInfo {
    /// The set.
    pub fdset_id: i64,
    /// Its members.
    pub fds: Vec<FdsetFdInfo>,
}

/// QMP's FdsetFdInfo.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdsetFdInfo {
    /// The number of the file descriptor.
    pub fd: i64,
    /// The client's note about it.
    pub opaque: Option<String>,
}
