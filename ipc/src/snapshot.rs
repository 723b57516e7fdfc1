//! Snapshots and transactions, as QMP describes them.

use crate::bitmap::{AddBitmap, BitmapName, MergeBitmaps};
use crate::job::{BlockdevBackup, DriveBackup};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// `blockdev-snapshot-sync`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotSync {
    /// The drive.
    pub device: Option<String>,
    /// Or the node.
    pub node_name: Option<String>,
    /// The new image.
    pub snapshot_file: String,
    /// What its node is called.
    pub snapshot_node_name: Option<String>,
    /// Its format; `qcow2` if nothing is said.
    pub format: Option<String>,
    /// Whether it is there already.
    pub mode: Option<NewImageMode>,
}

/// QMP's `NewImageMode`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NewImageMode {
    /// It is there.
    Existing,
    /// It is made, and has the path of what is below in its header.
    #[default]
    AbsolutePaths,
}

/// `blockdev-snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Drive or node that gets the overlay.
    pub node: String,
    /// The node that becomes the overlay.
    pub overlay: String,
}

/// `blockdev-snapshot-internal-sync`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InternalSnapshot {
    /// Drive or node.
    pub device: String,
    /// The snapshot's name.
    pub name: String,
}

/// An action without arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abort {}

/// `TransactionAction`. In JSON it is a tagged union; messages cannot hold one, because their encoding does not name
/// members, and have an ordinary enum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", tag = "type", content = "data", rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum Action {
    Abort(Abort),
    BlockDirtyBitmapAdd(AddBitmap),
    BlockDirtyBitmapClear(BitmapName),
    BlockDirtyBitmapDisable(BitmapName),
    BlockDirtyBitmapEnable(BitmapName),
    BlockDirtyBitmapMerge(MergeBitmaps),
    BlockDirtyBitmapRemove(BitmapName),
    BlockdevBackup(BlockdevBackup),
    BlockdevSnapshot(Snapshot),
    BlockdevSnapshotInternalSync(InternalSnapshot),
    BlockdevSnapshotSync(SnapshotSync),
    DriveBackup(DriveBackup),
}

impl Action {
    /// QMP's word for it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Abort(_) => "abort",
            Self::BlockDirtyBitmapAdd(_) => "block-dirty-bitmap-add",
            Self::BlockDirtyBitmapClear(_) => "block-dirty-bitmap-clear",
            Self::BlockDirtyBitmapDisable(_) => "block-dirty-bitmap-disable",
            Self::BlockDirtyBitmapEnable(_) => "block-dirty-bitmap-enable",
            Self::BlockDirtyBitmapMerge(_) => "block-dirty-bitmap-merge",
            Self::BlockDirtyBitmapRemove(_) => "block-dirty-bitmap-remove",
            Self::BlockdevBackup(_) => "blockdev-backup",
            Self::BlockdevSnapshot(_) => "blockdev-snapshot",
            Self::BlockdevSnapshotInternalSync(_) => "blockdev-snapshot-internal-sync",
            Self::BlockdevSnapshotSync(_) => "blockdev-snapshot-sync",
            Self::DriveBackup(_) => "drive-backup",
        }
    }

    /// Whether it begins a job.
    pub fn is_job(&self) -> bool {
        matches!(self, Self::BlockdevBackup(_) | Self::DriveBackup(_))
    }
}

/// [`Action`] in messages.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Action")]
enum InMessage {
    Abort(Abort),
    BlockDirtyBitmapAdd(AddBitmap),
    BlockDirtyBitmapClear(BitmapName),
    BlockDirtyBitmapDisable(BitmapName),
    BlockDirtyBitmapEnable(BitmapName),
    BlockDirtyBitmapMerge(MergeBitmaps),
    BlockDirtyBitmapRemove(BitmapName),
    BlockdevBackup(BlockdevBackup),
    BlockdevSnapshot(Snapshot),
    BlockdevSnapshotInternalSync(InternalSnapshot),
    BlockdevSnapshotSync(SnapshotSync),
    DriveBackup(DriveBackup),
}

impl Serialize for Action {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            Self::serialize(self, serializer)
        } else {
            InMessage::serialize(self, serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Action {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            Self::deserialize(deserializer)
        } else {
            InMessage::deserialize(deserializer)
        }
    }
}

/// `TransactionProperties`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TransactionProperties {
    /// What the end of one job means for the others.
    pub completion_mode: Option<CompletionMode>,
}

/// QMP's `ActionCompletionMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum CompletionMode {
    Individual,
    Grouped,
}
