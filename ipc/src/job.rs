//! Jobs, as QMP describes them.

use crate::block_info::IoStatus;
use crate::snapshot::NewImageMode;
use serde::{Deserialize, Serialize};

/// QMP's `JobStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // QMP's names.
pub enum JobStatus {
    Undefined,
    Created,
    Running,
    Paused,
    Ready,
    Standby,
    Waiting,
    Pending,
    Aborting,
    Concluded,
    Null,
}

impl JobStatus {
    /// All of them, in the order of QMP's list.
    pub const ALL: [Self; 11] = [
        Self::Undefined,
        Self::Created,
        Self::Running,
        Self::Paused,
        Self::Ready,
        Self::Standby,
        Self::Waiting,
        Self::Pending,
        Self::Aborting,
        Self::Concluded,
        Self::Null,
    ];

    /// QMP's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Undefined => "undefined",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }
}

/// QMP's `JobType`: those that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum JobType {
    Commit,
    Stream,
    Mirror,
    Backup,
    Create,
}

impl JobType {
    /// QMP's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::Stream => "stream",
            Self::Mirror => "mirror",
            Self::Backup => "backup",
            Self::Create => "create",
        }
    }
}

/// query-jobs's `JobInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    /// Its id.
    pub id: String,
    /// What it does.
    #[serde(rename = "type")]
    pub kind: JobType,
    /// Where it is.
    pub status: JobStatus,
    /// How much is done, in a unit of its own.
    pub current_progress: i64,
    /// How much there is to do, as far as is known.
    pub total_progress: i64,
    /// Why it has failed.
    pub error: Option<String>,
}

/// query-block-jobs's `BlockJobInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::struct_excessive_bools, reason = "they are QMP's")]
pub struct BlockJobInfo {
    /// What it does.
    #[serde(rename = "type")]
    pub kind: JobType,
    /// Its id.
    pub device: String,
    /// Bytes that there are to do.
    pub len: i64,
    /// Bytes that are done.
    pub offset: i64,
    /// It is at work on something that cannot be interrupted.
    pub busy: bool,
    /// It is paused.
    pub paused: bool,
    /// Bytes a second; 0: no limit.
    pub speed: i64,
    /// Whether it has stopped because of an error.
    pub io_status: IoStatus,
    /// It can be completed.
    pub ready: bool,
    /// Where it is.
    pub status: JobStatus,
    /// Its changes take effect by themselves.
    pub auto_finalize: bool,
    /// It is forgotten by itself.
    pub auto_dismiss: bool,
    /// Why it has failed.
    pub error: Option<String>,
    /// Of a mirror: all that the guest writes goes to the target as well.
    pub actively_synced: Option<bool>,
}

/// QMP's `BlockdevOnError`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum OnError {
    Report,
    Ignore,
    Enospc,
    Stop,
    Auto,
}

/// QMP's `MirrorSyncMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum SyncMode {
    Top,
    Full,
    None,
    Incremental,
    Bitmap,
}

impl SyncMode {
    /// QMP's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Top => "top",
            Self::Full => "full",
            Self::None => "none",
            Self::Incremental => "incremental",
            Self::Bitmap => "bitmap",
        }
    }
}

/// QMP's `MirrorCopyMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum CopyMode {
    Background,
    WriteBlocking,
}

/// QMP's `BitmapSyncMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum BitmapSyncMode {
    OnSuccess,
    Never,
    Always,
}

/// block-commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub struct BlockCommit {
    pub job_id: Option<String>,
    pub device: String,
    pub base_node: Option<String>,
    pub base: Option<String>,
    pub top_node: Option<String>,
    pub top: Option<String>,
    pub backing_file: Option<String>,
    pub backing_mask_protocol: Option<bool>,
    pub speed: Option<i64>,
    pub on_error: Option<OnError>,
    pub filter_node_name: Option<String>,
    pub auto_finalize: Option<bool>,
    pub auto_dismiss: Option<bool>,
}

/// block-stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub struct BlockStream {
    pub job_id: Option<String>,
    pub device: String,
    pub base: Option<String>,
    pub base_node: Option<String>,
    pub backing_file: Option<String>,
    pub backing_mask_protocol: Option<bool>,
    pub bottom: Option<String>,
    pub speed: Option<i64>,
    pub on_error: Option<OnError>,
    pub filter_node_name: Option<String>,
    pub auto_finalize: Option<bool>,
    pub auto_dismiss: Option<bool>,
}

/// drive-mirror.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub struct DriveMirror {
    pub job_id: Option<String>,
    pub device: String,
    pub target: String,
    pub format: Option<String>,
    pub node_name: Option<String>,
    pub replaces: Option<String>,
    pub sync: SyncMode,
    pub mode: Option<NewImageMode>,
    pub speed: Option<i64>,
    pub granularity: Option<u32>,
    pub buf_size: Option<i64>,
    pub on_source_error: Option<OnError>,
    pub on_target_error: Option<OnError>,
    pub unmap: Option<bool>,
    pub copy_mode: Option<CopyMode>,
    pub auto_finalize: Option<bool>,
    pub auto_dismiss: Option<bool>,
}

/// blockdev-mirror.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub struct BlockdevMirror {
    pub job_id: Option<String>,
    pub device: String,
    pub target: String,
    pub replaces: Option<String>,
    pub sync: SyncMode,
    pub speed: Option<i64>,
    pub granularity: Option<u32>,
    pub buf_size: Option<i64>,
    pub on_source_error: Option<OnError>,
    pub on_target_error: Option<OnError>,
    pub filter_node_name: Option<String>,
    pub copy_mode: Option<CopyMode>,
    pub auto_finalize: Option<bool>,
    pub auto_dismiss: Option<bool>,
}

/// What drive-backup and blockdev-backup have in common (QMP's `BackupCommon`), and the target: a file for the one, a node
/// for the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub struct BlockdevBackup {
    pub job_id: Option<String>,
    pub device: String,
    pub sync: SyncMode,
    pub speed: Option<i64>,
    pub bitmap: Option<String>,
    pub bitmap_mode: Option<BitmapSyncMode>,
    pub compress: Option<bool>,
    pub on_source_error: Option<OnError>,
    pub on_target_error: Option<OnError>,
    pub auto_finalize: Option<bool>,
    pub auto_dismiss: Option<bool>,
    pub filter_node_name: Option<String>,
    pub x_perf: Option<BackupPerf>,
    pub target: String,
}

/// drive-backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub struct DriveBackup {
    pub job_id: Option<String>,
    pub device: String,
    pub sync: SyncMode,
    pub speed: Option<i64>,
    pub bitmap: Option<String>,
    pub bitmap_mode: Option<BitmapSyncMode>,
    pub compress: Option<bool>,
    pub on_source_error: Option<OnError>,
    pub on_target_error: Option<OnError>,
    pub auto_finalize: Option<bool>,
    pub auto_dismiss: Option<bool>,
    pub filter_node_name: Option<String>,
    pub x_perf: Option<BackupPerf>,
    pub target: String,
    pub format: Option<String>,
    pub mode: Option<NewImageMode>,
}

/// QMP's `BackupPerf`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub struct BackupPerf {
    pub use_copy_range: Option<bool>,
    pub max_workers: Option<i64>,
    pub max_chunk: Option<i64>,
    pub min_cluster_size: Option<u64>,
}
