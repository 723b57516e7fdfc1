//! The commands.

use crate::action::{self, HelperLossAction, RebootAction, ShutdownAction, WatchdogAction};
use crate::bitmap;
use crate::blockdev::{FlatOptions, NewBlockdev};
use crate::chardev;
use crate::cpu::{CpuModelInfo, ExpansionType};
use crate::device::NewDevice;
use crate::human::HumanCommand;
use crate::image_create::CreateOptions;
use crate::job;
use crate::nbd;
use crate::objects::{NewObject, PropertyValue};
use crate::secret::Secret;
use crate::snapshot;
use crate::throttling::BlockIoThrottle;
use serde::{Deserialize, Serialize};

/// A helper that can be started again while the machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HelperRole {
    /// block-proc.
    BlockProc,
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
    #[serde(rename = "bulkhead-restart-helper")]
    RestartHelper { role: HelperRole },
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
        compression: Option<DumpCompression>,
        exclude: Option<Vec<DumpExclude>>,
        /// The guest goes on meanwhile; absent: it stands. Not in QEMU.
        live: Option<bool>,
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
        #[serde(rename = "helper-loss")]
        helper_loss: Option<HelperLossAction>,
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
    #[serde(rename = "block_passwd", rename_all = "kebab-case")]
    BlockPasswd {
        device: Option<String>,
        node_name: Option<String>,
        #[serde(with = "crate::secret::text")]
        password: Secret,
    },
    #[serde(rename = "device_add")]
    DeviceAdd(NewDevice),
    #[serde(rename = "device_del")]
    DeviceDel { id: String },
    #[serde(rename = "eject")]
    Eject {
        device: Option<String>,
        id: Option<String>,
        force: Option<bool>,
    },
    #[serde(rename = "blockdev-open-tray")]
    BlockdevOpenTray {
        device: Option<String>,
        id: Option<String>,
        force: Option<bool>,
    },
    #[serde(rename = "blockdev-close-tray")]
    BlockdevCloseTray { device: Option<String>, id: Option<String> },
    #[serde(rename = "blockdev-insert-medium", rename_all = "kebab-case")]
    BlockdevInsertMedium { id: String, node_name: String },
    #[serde(rename = "blockdev-remove-medium")]
    BlockdevRemoveMedium { id: String },
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

/// `compression` of dump-guest-memory, which is our extension: what matters more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DumpCompression {
    /// Time.
    Fast,
    /// Size.
    Small,
}

/// `exclude` of dump-guest-memory: pages that are left out, by what the guest uses them for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DumpExclude {
    /// Those that nobody uses.
    Free,
    /// Contents of files.
    Cache,
    /// Memory of processes.
    User,
    /// All zeroes.
    Zero,
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
    /// Our extension, as is the next one.
    KdumpZstd,
    KdumpRawZstd,
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
            Self::KdumpZstd => "kdump-zstd",
            Self::KdumpRawZstd => "kdump-raw-zstd",
            Self::WinDmp => "win-dmp",
        }
    }
}
