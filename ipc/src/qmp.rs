//! Supervisor ↔ qmp-proc. One process serves one client connection and ends with it.
//!
//! Order: [`QmpRequest::Setup`], [`QmpRequest::Seal`]; after the supervisor has verified the seal, the process waits as a
//! spare until [`QmpRequest::Serve`] gives it a client. From then on it sends [`QmpCall`]s, each answered by one
//! [`ToQmp::Return`], and receives events.
//!
//! Commands, returns and events are typed here and have QMP's names and member names by their serde attributes, so that
//! the JSON side (qmp-proc) and the acting side (supervisor) cannot drift apart. A member that is `None` is absent from
//! the JSON text.

use crate::action::{self, RebootAction, ShutdownAction, WatchdogAction};
use crate::bitmap;
use crate::block_info;
use crate::blockdev::{FlatOptions, NewBlockdev};
use crate::caps::{ClientFd, ClientGivenFd, SeccompListener};
use crate::chardev;
use crate::cpu::{CpuModelExpansionInfo, CpuModelInfo, ExpansionType};
use crate::human::{HumanCommand, HumanReply};
use crate::image_create::CreateOptions;
use crate::info;
use crate::job;
use crate::message::{FromHelper, Message, Request};
use crate::narrowing::Allow;
use crate::nbd;
use crate::objects::{NewObject, ObjectPropertyInfo, ObjectTypeInfo, PropertyValue};
use crate::snapshot;
use crate::throttling::BlockIoThrottle;
use serde::{Deserialize, Serialize};

/// To qmp-proc.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToQmp {
    /// The supervisor asks.
    Request(Request<QmpRequest>),
    /// The answer to a call. The events that the command caused were sent before.
    Return {
        /// The call's number.
        call: u64,
        /// What the client gets.
        result: Result<Return, QmpError>,
    },
    /// Something happened. The process delivers it when its client has negotiated.
    Event(TimedEvent),
}

/// From qmp-proc. Its events are the client's calls.
pub type FromQmp = FromHelper<QmpReply, QmpCall>;

impl Message for ToQmp {
    const KIND: u16 = 0x40;
    /// Large query results.
    const MAX_BYTES: usize = 16 << 20;
}
impl Message for FromQmp {
    const KIND: u16 = 0x41;
    /// Commands with long lists (transactions, opaque `json:` names).
    const MAX_BYTES: usize = 1 << 20;
}

/// What the supervisor asks of qmp-proc.
#[derive(Debug, Serialize, Deserialize)]
pub enum QmpRequest {
    /// What the greeting and the output format are. Answer: `Done`.
    Setup(MonitorSetup),
    /// Loads the sealed filter. Answer: `Sealed`.
    Seal,
    /// Serve this client. Answer: `Done`.
    Serve {
        /// The connection, or the input side of a stdio monitor.
        input: ClientFd,
        /// The output side, when it is another fd.
        output: Option<ClientFd>,
    },
}

/// Properties of the monitor that a client is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorSetup {
    /// Indent the output by 4 (`pretty=on`).
    pub pretty: bool,
    /// Bulkhead's version, for the greeting's `package`.
    pub package: String,
    /// The commands that its clients have. The supervisor checks every call against the same list.
    pub allow: Allow,
}

/// What qmp-proc answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum QmpReply {
    /// It is so now.
    Done,
    /// All threads run under the sealed filter.
    Sealed {
        /// Told of every call that the filter does not allow.
        listener: SeccompListener,
    },
}

/// A client's command, checked against the schema.
#[derive(Debug, Serialize, Deserialize)]
pub struct QmpCall {
    /// Chosen by qmp-proc, unique among its open calls.
    pub call: u64,
    /// The command.
    pub command: Command,
    /// What the client has passed over its socket, for a command that takes it ([`Command::takes_fd`]).
    pub fd: Option<ClientGivenFd>,
}

/// Every command that reaches the supervisor. (`qmp_capabilities`, `query-commands` and the schema are answered inside
/// qmp-proc.)
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // The variants and members are QMP's, documented by its specification.
pub enum Command {
    #[serde(rename = "query-status")]
    QueryStatus,
    #[serde(rename = "stop")]
    Stop,
    #[serde(rename = "cont")]
    Cont,
    #[serde(rename = "system_reset")]
    SystemReset,
    #[serde(rename = "system_powerdown")]
    SystemPowerdown,
    #[serde(rename = "quit")]
    Quit,
    #[serde(rename = "query-name")]
    QueryName,
    #[serde(rename = "query-kvm")]
    QueryKvm,
    #[serde(rename = "query-cpus-fast")]
    QueryCpusFast,
    #[serde(rename = "dump-guest-memory")]
    DumpGuestMemory {
        paging: bool,
        protocol: String,
        detach: Option<bool>,
        begin: Option<i64>,
        length: Option<i64>,
        format: Option<DumpFormat>,
    },
    #[serde(rename = "query-uuid")]
    QueryUuid,
    #[serde(rename = "query-target")]
    QueryTarget,
    #[serde(rename = "query-machines")]
    QueryMachines,
    #[serde(rename = "query-current-machine")]
    QueryCurrentMachine,
    #[serde(rename = "query-iothreads")]
    QueryIothreads,
    #[serde(rename = "query-hotpluggable-cpus")]
    QueryHotpluggableCpus,
    #[serde(rename = "query-cpu-definitions")]
    QueryCpuDefinitions,
    #[serde(rename = "query-memory-size-summary")]
    QueryMemorySizeSummary,
    #[serde(rename = "query-memdev")]
    QueryMemdev,
    #[serde(rename = "query-command-line-options")]
    QueryCommandLineOptions { option: Option<String> },
    #[serde(rename = "inject-nmi")]
    InjectNmi,
    #[serde(rename = "set-action")]
    SetAction {
        reboot: Option<RebootAction>,
        shutdown: Option<ShutdownAction>,
        panic: Option<action::PanicAction>,
        watchdog: Option<WatchdogAction>,
    },
    #[serde(rename = "query-dump")]
    QueryDump,
    #[serde(rename = "query-dump-guest-memory-capability")]
    QueryDumpGuestMemoryCapability,
    #[serde(rename = "getfd")]
    GetFd { fdname: String },
    #[serde(rename = "closefd")]
    CloseFd { fdname: String },
    #[serde(rename = "add-fd", rename_all = "kebab-case")]
    AddFd {
        fdset_id: Option<i64>,
        opaque: Option<String>,
    },
    #[serde(rename = "remove-fd", rename_all = "kebab-case")]
    RemoveFd { fdset_id: i64, fd: Option<i64> },
    #[serde(rename = "query-fdsets")]
    QueryFdsets,
    #[serde(rename = "object-add")]
    ObjectAdd(NewObject),
    #[serde(rename = "object-del")]
    ObjectDel { id: String },
    #[serde(rename = "qom-list")]
    QomList { path: String },
    #[serde(rename = "qom-get")]
    QomGet { path: String, property: String },
    #[serde(rename = "qom-set")]
    QomSet {
        path: String,
        property: String,
        value: PropertyValue,
    },
    #[serde(rename = "qom-list-types")]
    QomListTypes {
        implements: Option<String>,
        #[serde(rename = "abstract")]
        with_abstract: Option<bool>,
    },
    #[serde(rename = "qom-list-properties")]
    QomListProperties { typename: String },
    #[serde(rename = "device-list-properties")]
    DeviceListProperties { typename: String },
    #[serde(rename = "memsave", rename_all = "kebab-case")]
    MemSave {
        val: i64,
        size: i64,
        filename: String,
        cpu_index: Option<i64>,
    },
    #[serde(rename = "pmemsave")]
    PmemSave { val: i64, size: i64, filename: String },
    #[serde(rename = "query-cpu-model-expansion")]
    QueryCpuModelExpansion {
        #[serde(rename = "type")]
        kind: ExpansionType,
        model: CpuModelInfo,
    },
    /// The line has been read by qmp-proc: this is what it means.
    #[serde(rename = "human-monitor-command", rename_all = "kebab-case")]
    HumanMonitorCommand {
        command: HumanCommand,
        cpu_index: Option<i64>,
    },
    #[serde(rename = "query-chardev")]
    QueryChardev,
    #[serde(rename = "query-chardev-backends")]
    QueryChardevBackends,
    #[serde(rename = "chardev-add")]
    ChardevAdd { id: String, backend: chardev::Backend },
    #[serde(rename = "chardev-change")]
    ChardevChange { id: String, backend: chardev::Backend },
    #[serde(rename = "chardev-remove")]
    ChardevRemove { id: String },
    #[serde(rename = "ringbuf-write")]
    RingbufWrite {
        device: String,
        data: String,
        format: Option<chardev::DataFormat>,
    },
    #[serde(rename = "ringbuf-read")]
    RingbufRead {
        device: String,
        size: i64,
        format: Option<chardev::DataFormat>,
    },
    #[serde(rename = "block_resize", rename_all = "kebab-case")]
    BlockResize {
        device: Option<String>,
        node_name: Option<String>,
        size: i64,
    },
    #[serde(rename = "block-dirty-bitmap-add")]
    BlockDirtyBitmapAdd(bitmap::AddBitmap),
    #[serde(rename = "x-debug-block-dirty-bitmap-sha256")]
    DebugBitmapSha256(bitmap::BitmapName),
    #[serde(rename = "block-dirty-bitmap-remove")]
    BlockDirtyBitmapRemove(bitmap::BitmapName),
    #[serde(rename = "block-dirty-bitmap-clear")]
    BlockDirtyBitmapClear(bitmap::BitmapName),
    #[serde(rename = "block-dirty-bitmap-enable")]
    BlockDirtyBitmapEnable(bitmap::BitmapName),
    #[serde(rename = "block-dirty-bitmap-disable")]
    BlockDirtyBitmapDisable(bitmap::BitmapName),
    #[serde(rename = "block-dirty-bitmap-merge")]
    BlockDirtyBitmapMerge(bitmap::MergeBitmaps),
    #[serde(rename = "blockdev-snapshot-sync")]
    BlockdevSnapshotSync(snapshot::SnapshotSync),
    #[serde(rename = "blockdev-snapshot")]
    BlockdevSnapshot(snapshot::Snapshot),
    #[serde(rename = "blockdev-snapshot-internal-sync")]
    BlockdevSnapshotInternalSync(snapshot::InternalSnapshot),
    #[serde(rename = "blockdev-snapshot-delete-internal-sync")]
    BlockdevSnapshotDeleteInternalSync {
        device: String,
        id: Option<String>,
        name: Option<String>,
    },
    #[serde(rename = "transaction")]
    Transaction {
        actions: Vec<snapshot::Action>,
        properties: Option<snapshot::TransactionProperties>,
    },
    #[serde(rename = "block_set_io_throttle")]
    BlockSetIoThrottle(BlockIoThrottle),
    #[serde(rename = "block-set-write-threshold", rename_all = "kebab-case")]
    BlockSetWriteThreshold { node_name: String, write_threshold: u64 },
    #[serde(rename = "change-backing-file", rename_all = "kebab-case")]
    ChangeBackingFile {
        device: String,
        image_node_name: String,
        backing_file: String,
    },
    #[serde(rename = "query-jobs")]
    QueryJobs,
    #[serde(rename = "job-cancel")]
    JobCancel { id: String },
    #[serde(rename = "job-finalize")]
    JobFinalize { id: String },
    #[serde(rename = "job-dismiss")]
    JobDismiss { id: String },
    #[serde(rename = "job-pause")]
    JobPause { id: String },
    #[serde(rename = "job-resume")]
    JobResume { id: String },
    #[serde(rename = "job-complete")]
    JobComplete { id: String },
    #[serde(rename = "query-block-jobs")]
    QueryBlockJobs,
    #[serde(rename = "block-job-cancel")]
    BlockJobCancel { device: String, force: Option<bool> },
    #[serde(rename = "block-job-complete")]
    BlockJobComplete { device: String },
    #[serde(rename = "block-job-set-speed")]
    BlockJobSetSpeed { device: String, speed: i64 },
    #[serde(rename = "block-job-pause")]
    BlockJobPause { device: String },
    #[serde(rename = "block-job-resume")]
    BlockJobResume { device: String },
    #[serde(rename = "block-job-finalize")]
    BlockJobFinalize { id: String },
    #[serde(rename = "block-job-dismiss")]
    BlockJobDismiss { id: String },
    #[serde(rename = "block-job-change", rename_all = "kebab-case")]
    BlockJobChange {
        id: String,
        #[serde(rename = "type")]
        kind: job::JobType,
        copy_mode: Option<job::CopyMode>,
    },
    #[serde(rename = "block-commit")]
    BlockCommit(job::BlockCommit),
    #[serde(rename = "block-stream")]
    BlockStream(job::BlockStream),
    #[serde(rename = "drive-mirror")]
    DriveMirror(job::DriveMirror),
    #[serde(rename = "blockdev-mirror")]
    BlockdevMirror(job::BlockdevMirror),
    #[serde(rename = "drive-backup")]
    DriveBackup(job::DriveBackup),
    #[serde(rename = "blockdev-backup")]
    BlockdevBackup(job::BlockdevBackup),
    #[serde(rename = "blockdev-create", rename_all = "kebab-case")]
    BlockdevCreate { job_id: String, options: CreateOptions },
    #[serde(rename = "nbd-server-start")]
    NbdServerStart(nbd::StartServer),
    #[serde(rename = "nbd-server-stop")]
    NbdServerStop,
    #[serde(rename = "nbd-server-add")]
    NbdServerAdd(nbd::AddToServer),
    #[serde(rename = "nbd-server-remove")]
    NbdServerRemove {
        name: String,
        mode: Option<nbd::RemoveMode>,
    },
    #[serde(rename = "block-export-add")]
    BlockExportAdd(nbd::AddExport),
    #[serde(rename = "block-export-del")]
    BlockExportDel { id: String, mode: Option<nbd::RemoveMode> },
    #[serde(rename = "query-block-exports")]
    QueryBlockExports,
    #[serde(rename = "blockdev-add")]
    BlockdevAdd(NewBlockdev),
    #[serde(rename = "blockdev-del", rename_all = "kebab-case")]
    BlockdevDel { node_name: String },
    #[serde(rename = "blockdev-reopen")]
    BlockdevReopen { options: Vec<FlatOptions> },
    #[serde(rename = "query-block")]
    QueryBlock,
    #[serde(rename = "query-named-block-nodes")]
    QueryNamedBlockNodes { flat: Option<bool> },
    #[serde(rename = "query-blockstats", rename_all = "kebab-case")]
    QueryBlockstats { query_nodes: Option<bool> },
}

impl Command {
    /// Whether the client's passed file descriptor goes with it. Other commands leave it where it is.
    pub fn takes_fd(&self) -> bool {
        matches!(self, Self::GetFd { .. } | Self::AddFd { .. })
    }
}

/// `format` of dump-guest-memory: all of QMP's words, so that one that this build does not write is refused as such.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum DumpFormat {
    Elf,
    KdumpZlib,
    KdumpLzo,
    KdumpSnappy,
    KdumpRawZlib,
    KdumpRawLzo,
    KdumpRawSnappy,
    WinDmp,
}

impl DumpFormat {
    /// QMP's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Elf => "elf",
            Self::KdumpZlib => "kdump-zlib",
            Self::KdumpLzo => "kdump-lzo",
            Self::KdumpSnappy => "kdump-snappy",
            Self::KdumpRawZlib => "kdump-raw-zlib",
            Self::KdumpRawLzo => "kdump-raw-lzo",
            Self::KdumpRawSnappy => "kdump-raw-snappy",
            Self::WinDmp => "win-dmp",
        }
    }
}

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

/// An error reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QmpError {
    /// The class that old clients look at.
    pub class: ErrorClass,
    /// For people.
    pub desc: String,
}

impl QmpError {
    /// A `GenericError`.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::GenericError,
            desc: desc.into(),
        }
    }
}

/// QMP's error classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // QMP's names.
pub enum ErrorClass {
    GenericError,
    CommandNotFound,
    DeviceNotActive,
    DeviceNotFound,
    #[serde(rename = "KVMMissingCap")]
    KvmMissingCap,
    DeviceEncrypted,
}

/// An event with the time at which it was queued.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TimedEvent {
    /// Seconds since the epoch; -1 when the clock failed.
    pub seconds: i64,
    /// Microseconds; -1 when the clock failed.
    pub microseconds: i64,
    /// What happened.
    pub event: Event,
}

/// QMP events. The JSON `event` is the variant's name, `data` its content.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // QMP's names.
pub enum Event {
    #[serde(rename = "SHUTDOWN")]
    Shutdown { guest: bool, reason: ShutdownCause },
    #[serde(rename = "RESET")]
    Reset { guest: bool, reason: ShutdownCause },
    #[serde(rename = "POWERDOWN")]
    Powerdown,
    #[serde(rename = "STOP")]
    Stop,
    #[serde(rename = "RESUME")]
    Resume,
    #[serde(rename = "GUEST_PANICKED")]
    GuestPanicked { action: PanicAction },
    #[serde(rename = "GUEST_CRASHLOADED")]
    GuestCrashloaded { action: PanicAction },
    #[serde(rename = "RTC_CHANGE", rename_all = "kebab-case")]
    RtcChange { offset: i64, qom_path: String },
    #[serde(rename = "DUMP_COMPLETED")]
    DumpCompleted {
        result: DumpQueryResult,
        error: Option<String>,
    },
    #[serde(rename = "BLOCK_IO_ERROR", rename_all = "kebab-case")]
    BlockIoError {
        qom_path: String,
        device: String,
        node_name: Option<String>,
        operation: IoOperation,
        action: BlockErrorAction,
        nospace: Option<bool>,
        reason: String,
    },
    #[serde(rename = "BLOCK_WRITE_THRESHOLD", rename_all = "kebab-case")]
    BlockWriteThreshold {
        node_name: String,
        amount_exceeded: u64,
        write_threshold: u64,
    },
    #[serde(rename = "BLOCK_EXPORT_DELETED")]
    BlockExportDeleted { id: String },
    #[serde(rename = "JOB_STATUS_CHANGE")]
    JobStatusChange { id: String, status: job::JobStatus },
    #[serde(rename = "BLOCK_JOB_READY")]
    BlockJobReady(BlockJobProgress),
    #[serde(rename = "BLOCK_JOB_COMPLETED")]
    BlockJobCompleted {
        #[serde(rename = "type")]
        kind: job::JobType,
        device: String,
        len: i64,
        offset: i64,
        speed: i64,
        error: Option<String>,
    },
    #[serde(rename = "BLOCK_JOB_CANCELLED")]
    BlockJobCancelled(BlockJobProgress),
    #[serde(rename = "BLOCK_JOB_ERROR")]
    BlockJobError {
        device: String,
        operation: IoOperation,
        action: BlockErrorAction,
    },
    #[serde(rename = "BLOCK_JOB_PENDING")]
    BlockJobPending {
        #[serde(rename = "type")]
        kind: job::JobType,
        id: String,
    },
}

/// How far a job was when something happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockJobProgress {
    /// What it does.
    #[serde(rename = "type")]
    pub kind: job::JobType,
    /// Its id.
    pub device: String,
    /// Bytes that there are to do.
    pub len: i64,
    /// Bytes that are done.
    pub offset: i64,
    /// Bytes a second; 0: no limit.
    pub speed: i64,
}

/// QMP's IoOperationType.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // QMP's names.
pub enum IoOperation {
    Read,
    Write,
}

/// QMP's BlockErrorAction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // QMP's names.
pub enum BlockErrorAction {
    Ignore,
    Report,
    Stop,
}

/// QMP's ShutdownCause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum ShutdownCause {
    None,
    HostError,
    HostQmpQuit,
    HostQmpSystemReset,
    HostSignal,
    HostUi,
    GuestShutdown,
    GuestReset,
    GuestPanic,
    SubsystemReset,
    SnapshotLoad,
}

/// QMP's GuestPanicAction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum PanicAction {
    Pause,
    Poweroff,
    Run,
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
