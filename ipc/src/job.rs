//! Jobs, as QMP describes them.

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
pub enum JobType {
    /// blockdev-create.
    Create,
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
