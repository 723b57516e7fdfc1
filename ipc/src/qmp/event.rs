//! The events.

use super::DumpQueryResult;
use crate::info::HelperRestart;
use crate::job;
use serde::{Deserialize, Serialize};

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
    #[serde(rename = "BULKHEAD_HELPER_RESTARTED")]
    BulkheadHelperRestarted(HelperRestart),
    #[serde(rename = "BULKHEAD_HELPER_LOST")]
    BulkheadHelperLost { role: String, reason: String },
    #[serde(rename = "BULKHEAD_POLICY_VIOLATION")]
    BulkheadPolicyViolation(PolicyViolation),
    #[serde(rename = "BLOCK_EXPORT_DELETED")]
    BlockExportDeleted { id: String },
    #[serde(rename = "DEVICE_DELETED")]
    DeviceDeleted { device: Option<String>, path: String },
    #[serde(rename = "DEVICE_TRAY_MOVED", rename_all = "kebab-case")]
    DeviceTrayMoved {
        device: String,
        id: String,
        tray_open: bool,
    },
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

/// `BULKHEAD_POLICY_VIOLATION`: a helper has made a system call that its policy lacks. What is absent is not known: the
/// kernel kills at once, and tells nothing, where more than one filter lacks the call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PolicyViolation {
    /// The helper's name.
    pub role: String,
    /// Its process id.
    pub pid: i64,
    /// The machine's name, if it has one.
    pub vm: Option<String>,
    /// What became of the call.
    pub action: ViolationAction,
    /// Its name, if it has one.
    pub syscall: Option<String>,
    /// Its number.
    pub number: Option<i64>,
    /// All six.
    pub arguments: Option<Vec<u64>>,
    /// Where it was made.
    pub instruction_pointer: Option<u64>,
    /// The function there, and how far into it.
    pub symbol: Option<String>,
}

/// What became of a call that a policy lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ViolationAction {
    /// Its process was killed.
    Killed,
    /// It went on (`--policy-mode log`).
    Allowed,
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
