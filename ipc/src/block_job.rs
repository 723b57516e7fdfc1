//! Block jobs: long-running work on the graph, as the supervisor and block-proc speak of it.
//!
//! **Who does what.** The supervisor has the job: its id, its state, what clients may ask of it, and the graph's description.
//! block-proc copies. A job begins inside a [`Switch`]: its filter is in its place, its bitmaps are as they are to be, and no
//! request of the guest lies between. Then it works by itself and tells what happens ([`JobEvent`]). A mirror ends in a
//! `Switch` as well: what is left is copied while nothing else is under way, then the edges move.
//!
//! **Filters.** What a job must know of the guest's writes goes through a node that the supervisor has put there:
//! [`NodeSpec::MirrorTop`], [`NodeSpec::CopyBeforeWrite`], [`NodeSpec::CopyOnRead`].
//!
//! [`NodeSpec::MirrorTop`]: crate::graph::NodeSpec::MirrorTop
//! [`NodeSpec::CopyBeforeWrite`]: crate::graph::NodeSpec::CopyBeforeWrite
//! [`NodeSpec::CopyOnRead`]: crate::graph::NodeSpec::CopyOnRead

use crate::block::IoKind;
use crate::graph::{EdgeChange, NodeId};
use crate::message::Failure;
use serde::{Deserialize, Serialize};

/// Number of a job: given by the supervisor, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct JobNumber(pub u32);

/// Number of a dirty bitmap: given by the supervisor, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BitmapNumber(pub u32);

/// What becomes of a job's request that the host fails (`on-source-error`, `on-target-error`, `on-error`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobOnError {
    /// The job fails.
    #[default]
    Report,
    /// It is tried again, later (or left out, where the job says so).
    Ignore,
    /// As `Stop` when the space is used up, as `Report` otherwise.
    Enospc,
    /// The job stops, and tries again when it goes on.
    Stop,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobErrorAction {
    /// The job has failed.
    Report,
    /// It goes on.
    Ignore,
    /// It has stopped itself: [`JobControl::Resume`] lets it go on.
    Stop,
}

/// What is copied at first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CopyFrom {
    /// What these nodes hold, which are the upper part of the source's chain, from above. All of the chain: everything. What
    /// none of them holds is left out, or is zeroes where the chain ends with them (`is_all`).
    Layers {
        /// The nodes, without filters.
        nodes: Vec<NodeId>,
        /// There is nothing below them: what none of them holds reads as zeroes.
        is_all: bool,
    },
    /// Nothing: only what the guest writes from now on.
    Nothing,
    /// What is dirty in a bitmap at the moment of the switch.
    Bitmap(BitmapNumber),
}

/// What becomes of the bitmap that a backup has begun with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BitmapMode {
    /// `on-success`: cleared of what was copied if the backup succeeds, otherwise as if there had been none.
    OnSuccess,
    /// `never`: it stays as it is.
    Never,
    /// `always`: cleared of what was copied, also when the backup fails.
    Always,
}

/// What a job copies from where to where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobWork {
    /// block-commit of images that nobody writes to: what `layers` hold goes to `base`, read through `top`.
    Commit {
        /// The upper image.
        top: NodeId,
        /// It and those between, from above, without filters: not `base`.
        layers: Vec<NodeId>,
        /// The lower image.
        base: NodeId,
    },
    /// block-stream: what `layers` hold goes into the image that the filter filters.
    Stream {
        /// A `CopyOnRead` node over the image.
        filter: NodeId,
        /// The images below it down to the base, from above, without filters and without the base.
        layers: Vec<NodeId>,
    },
    /// drive-mirror, blockdev-mirror, and block-commit of an image that is written to: the target becomes what the source
    /// is, and stays so.
    Mirror {
        /// A `MirrorTop` node over the source.
        filter: NodeId,
        /// The target.
        target: NodeId,
        /// What is copied at first.
        from: CopyFrom,
        /// What the target has not been written to reads as zeroes.
        target_reads_zeroes: bool,
        /// Bytes that are dirty together: a power of two from 512 to 64 MiB.
        granularity: u32,
        /// Most bytes in flight (`buf-size`).
        buffer_bytes: u64,
        /// Zeroes may give up the target's space.
        unmap: bool,
        /// `copy-mode` write-blocking: what the guest writes is in the target when its request ends.
        write_blocking: bool,
    },
    /// drive-backup, blockdev-backup: the target becomes what the source was at the moment of the switch.
    Backup {
        /// A `CopyBeforeWrite` node over the source, whose target is the backup's.
        filter: NodeId,
        /// What is copied.
        from: CopyFrom,
        /// A bitmap that begins anew with the backup, where it is not what is copied from.
        bitmap: Option<BitmapNumber>,
        /// What becomes of the bitmap, if there is one.
        bitmap_mode: BitmapMode,
        /// What the target has not been written to reads as zeroes.
        target_reads_zeroes: bool,
        /// Clusters are written compressed.
        compress: bool,
        /// Most requests in flight.
        max_workers: u32,
        /// Largest request, bytes; 0: the job's own bound.
        max_chunk: u64,
    },
}

/// A job that begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Its number.
    pub job: JobNumber,
    /// What it does.
    pub work: JobWork,
    /// Bytes a second; 0: as fast as it goes.
    pub speed: u64,
    /// What becomes of a failed read.
    pub on_source_error: JobOnError,
    /// What becomes of a failed write.
    pub on_target_error: JobOnError,
    /// It begins paused (a job of a transaction that others have not begun yet, or that its client has paused).
    pub paused: bool,
}

/// What is asked of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobControl {
    /// Answered when none of its requests is in flight. A filter goes on with what it has to do for the guest's writes.
    Pause,
    /// It goes on; what failed and stopped it is tried again.
    Resume,
    /// Bytes a second; 0: as fast as it goes.
    SetSpeed(u64),
    /// A mirror's `copy-mode` becomes write-blocking (job-change).
    WriteBlocking,
    /// It does nothing more, and is forgotten; answered when none of its requests is in flight. Its filter passes on from now
    /// on without doing anything, and can be removed. Nothing more is said of it.
    End {
        /// It has succeeded, all of its transaction included: decides what becomes of a backup's bitmap.
        success: bool,
    },
}

/// Changes that happen together, while no request is in flight in the thread: all, or none and a failure.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switch {
    /// Mirrors that are brought to their end first: what is dirty is copied and the target flushed. One that cannot fails
    /// the whole request and stays as it is. Afterwards they are at rest, as after `Pause`.
    pub settle: Vec<JobNumber>,
    /// Edges that move then.
    pub changes: Vec<EdgeChange>,
    /// What is done to bitmaps then, in order.
    pub bitmaps: Vec<BitmapAction>,
    /// Jobs that begin then.
    pub start: Vec<JobSpec>,
}

impl Switch {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.settle.is_empty() && self.changes.is_empty() && self.bitmaps.is_empty() && self.start.is_empty()
    }
}

/// What is done to a dirty bitmap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum BitmapAction {
    /// A new one on a node.
    Add {
        /// Its number.
        bitmap: BitmapNumber,
        /// The node.
        node: NodeId,
        /// Bytes for each bit: a power of two from 512 to 2^31.
        granularity: u32,
        /// It does not take part in writes at first.
        disabled: bool,
        /// Name under which it is kept in its image, if it is. One that the image has already, by its report
        /// ([`crate::graph::Qcow2Details::bitmaps`]), is taken from there, with its granularity and its bits.
        persistent: Option<String>,
        /// What was dirty is not known any more (block-proc was killed): it is inconsistent.
        lost: bool,
    },
    /// It is gone, from its image as well.
    Remove(BitmapNumber),
    /// Nothing is dirty any more. What it was is kept until [`BitmapAction::Forget`].
    Clear(BitmapNumber),
    /// Undoes every `Clear` and `Merge` of it since `Forget`, as if nothing had been written meanwhile.
    Restore(BitmapNumber),
    /// What `Clear` and `Merge` have done stays so.
    Forget(BitmapNumber),
    /// Whether writes make it dirty.
    SetEnabled(BitmapNumber, bool),
    /// What is dirty in `from` is so in `into` as well.
    Merge {
        /// Grows.
        into: BitmapNumber,
        /// Stays.
        from: BitmapNumber,
    },
}

/// A bitmap, as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapReport {
    /// Bytes that are dirty.
    pub dirty_bytes: u64,
    /// Bytes for each bit.
    pub granularity: u32,
    /// Writes make it dirty.
    pub enabled: bool,
    /// A job works with it.
    pub busy: bool,
    /// Its image had it marked as in use: it cannot be trusted, only removed.
    pub inconsistent: bool,
    /// While a job works with it: how many bytes are dirty that are collected apart.
    pub apart_bytes: Option<u64>,
}

/// How far a job is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobProgress {
    /// Bytes that are done.
    pub done: u64,
    /// Bytes that there are to do, as far as is known: it grows when the guest writes.
    pub total: u64,
    /// A mirror has converged.
    pub ready: bool,
    /// A mirror whose writes all go to the target as well (`actively-synced`).
    pub actively_synced: bool,
}

/// What a job tells by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobEvent {
    /// A mirror has converged, for the first time.
    Ready,
    /// The host has failed one of its requests.
    Error {
        /// Read (of the source) or write (of the target).
        kind: IoKind,
        /// What became of it. After `Report`, `Ended` follows.
        action: JobErrorAction,
        /// The system's error number.
        errno: i32,
    },
    /// It does nothing more: everything is copied and flushed, or it has failed. It is there until [`JobControl::End`].
    Ended(Result<(), Failure>),
}
