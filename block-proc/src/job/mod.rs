//! Block jobs of a thread: what is copied when.
//!
//! [`copier`] copies; [`begin`] makes a job of what the supervisor asks for; [`steps`] says when parts of the work begin,
//! [`outcome`] what becomes of them; here are the verbs. A job does nothing by itself: the thread's loop asks it for
//! [`Step`]s, which are tasks like the guest's requests. So when something is to have the thread for itself, no step begins,
//! and what is under way ends soon.
//!
//! A job gives way to the guest: as long as there are requests of the guest under way, few and small copies are.

pub mod begin;
pub mod copier;
mod outcome;
mod steps;

pub use steps::{Step, Stepped};

use crate::bitmap::Bitmap;
use crate::bitmaps::{EndOfUse, SharedBitmap};
use crate::graph::User;
use crate::node::copy_before_write::CopyBeforeWriteNode;
use crate::node::mirror_top::MirrorTopNode;
use copier::{Copier, CopyError};
use ipc::Failure;
use ipc::block::BlockEvent;
use ipc::block_job::{BitmapMode, JobEvent, JobNumber, JobOnError, JobProgress};
use ipc::message::RequestId;
use std::rc::Rc;
use std::time::Instant;

/// Most copies under way, where the job does not say.
const COPIES: usize = 16;
/// Size of a copy of a commit or a stream, bytes.
const CHUNK_OF_COMMIT: u64 = 512 << 10;

/// What a job is, as far as it matters when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It ends when nothing is left.
    Once,
    /// It has converged when nothing is left, and goes on.
    Mirror,
    /// It only has its filter work.
    FilterOnly,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Looking what there is to copy, from an offset on. What lies before it may be copied already.
    Scan(u64),
    Copy,
    /// The target is to be flushed.
    Flush,
    /// It does nothing more.
    Over,
}

/// What holds while a job is there.
struct Filters {
    mirror: Option<Rc<MirrorTopNode>>,
    backup: Option<Rc<CopyBeforeWriteNode>>,
}

/// A job.
pub struct Job {
    number: JobNumber,
    kind: Kind,
    copier: Rc<Copier>,
    filters: Filters,
    bitmap: Option<(SharedBitmap, BitmapMode)>,
    users: Vec<User>,
    phase: Phase,
    /// Where the next copy is looked for.
    cursor: u64,
    under_way: Vec<Step>,
    paused: bool,
    ready: bool,
    speed: u64,
    /// With a limit: when the next copy may begin.
    next_at: Instant,
    /// What was left out because it could not be read.
    left_out: Option<CopyError>,
    on_source_error: JobOnError,
    on_target_error: JobOnError,
    /// Bytes that a mirror has copied.
    copied: u64,
    most_copies: usize,
    chunk: u64,
    /// Requests to be answered when nothing is under way.
    waiting: Vec<RequestId>,
    /// To be told.
    events: Vec<JobEvent>,
    /// It is to be forgotten then; it has succeeded.
    end: Option<bool>,
}

impl Job {
    /// Its number.
    pub fn number(&self) -> JobNumber {
        self.number
    }

    /// How far it is.
    pub fn progress(&self) -> JobProgress {
        let left = self.copier.left.borrow();
        let (done, total) = match self.kind {
            Kind::Mirror => {
                let under_way: u64 = self.under_way.iter().map(Step::bytes).sum();
                (self.copied, self.copied + under_way + left.dirty_bytes())
            }
            // Copies may end in any order: what counts is that all before is done.
            Kind::Once if self.is_in_order() => (left.next(0, 1).map_or(left.bytes(), |run| run.start), left.bytes()),
            Kind::Once | Kind::FilterOnly => (left.bytes() - left.dirty_bytes(), left.bytes()),
        };
        let mirror = self.filters.mirror.as_ref();
        JobProgress {
            done,
            total,
            ready: self.ready,
            actively_synced: self.ready && left.is_clean() && mirror.is_some_and(|mirror| mirror.is_write_blocking()),
        }
    }

    fn is_in_order(&self) -> bool {
        self.filters.backup.is_none()
    }

    /// Bytes a second; 0: no limit.
    pub fn set_speed(&mut self, speed: u64, now: Instant) {
        self.speed = speed;
        self.next_at = now;
    }

    /// No step begins any more; `id` is answered when none is under way.
    pub fn pause(&mut self, id: RequestId) {
        self.paused = true;
        self.waiting.push(id);
    }

    /// It goes on.
    pub fn resume(&mut self, now: Instant) {
        self.paused = false;
        self.next_at = now;
    }

    /// A mirror's writes go to both from now on.
    ///
    /// # Errors
    /// When it is none.
    pub fn write_blocking(&self) -> Result<(), Failure> {
        let mirror = self.filters.mirror.as_ref();
        let mirror = mirror.ok_or_else(|| Failure::new(format!("job {} is no mirror", self.number.0)))?;
        mirror.set_write_blocking(true);
        Ok(())
    }

    /// It does nothing more, and is to be forgotten.
    pub fn end(&mut self, id: RequestId, success: bool) {
        self.pause(id);
        self.end = Some(success);
        if let Some(mirror) = &self.filters.mirror {
            mirror.set_mirror(None);
        }
        if let Some(backup) = &self.filters.backup {
            backup.turn(false);
        }
    }

    /// Whether it can be forgotten: neither it nor its filter, for a request of the guest that came before, uses its nodes.
    pub fn is_gone(&self) -> bool {
        self.end.is_some() && self.under_way.is_empty() && self.copier.is_idle()
    }

    /// Gives back what it has used.
    pub fn let_go(self) -> Vec<User> {
        if let Some((bitmap, mode)) = &self.bitmap {
            let left = self.copier.left.borrow();
            bitmap.borrow_mut().end_use(match (mode, self.end) {
                (BitmapMode::OnSuccess | BitmapMode::Always, Some(true)) => EndOfUse::Drop { left: None },
                (BitmapMode::Always, _) => EndOfUse::Drop { left: Some(&left) },
                (BitmapMode::Never | BitmapMode::OnSuccess, _) => EndOfUse::Keep,
            });
        }
        self.users
    }

    /// What a mirror has left, bytes, as far as it can go on by itself.
    pub fn left_bytes(&self) -> u64 {
        if self.paused {
            return 0;
        }
        self.copier.left.borrow().dirty_bytes()
    }

    /// What brings a mirror up to date.
    ///
    /// # Errors
    /// When it is none, or has not converged.
    pub fn settling(&self) -> Result<Rc<Copier>, Failure> {
        if self.kind != Kind::Mirror || !self.ready || self.phase == Phase::Over {
            return Err(Failure::new(format!("job {} is not ready", self.number.0)));
        }
        Ok(self.copier.clone())
    }

    /// It is up to date, and rests.
    pub fn settled(&mut self) {
        self.paused = true;
        self.phase = Phase::Over;
        let left = self.copier.left.borrow();
        self.copied += left.dirty_bytes();
    }

    /// The requests that can be answered, because nothing is under way.
    pub fn take_answerable(&mut self) -> Vec<RequestId> {
        // Who has asked for a pause that is over need not wait.
        let is_at_rest = self.under_way.is_empty() || !self.paused;
        if is_at_rest && (self.end.is_none() || self.is_gone()) {
            return std::mem::take(&mut self.waiting);
        }
        Vec::new()
    }

    /// What there is to tell.
    pub fn take_events(&mut self) -> Vec<BlockEvent> {
        let (job, progress) = (self.number, self.progress());
        let events = self.events.drain(..);
        events.map(|what| BlockEvent::Job { job, progress, what }).collect()
    }
}

/// Nothing is dirty yet.
fn nothing(bytes: u64, granularity: u64) -> Bitmap {
    Bitmap::new(bytes, granularity)
}

/// Everything is left to do.
fn everything(bytes: u64, granularity: u64) -> Bitmap {
    let mut bits = Bitmap::new(bytes, granularity);
    bits.set(0..bytes);
    bits
}

#[cfg(test)]
mod tests;
