//! Block jobs of a thread: what is copied when.
//!
//! [`copier`] copies; [`begin`] makes a job of what the supervisor asks for; here is when copies begin and what becomes of
//! them. A job does nothing by itself: the thread's loop asks it for [`Step`]s, which are tasks like the guest's requests. So
//! when something is to have the thread for itself, no step begins, and what is under way ends soon.
//!
//! A job gives way to the guest: as long as there are requests of the guest under way, few and small copies are.

pub mod begin;
pub mod copier;

use crate::bitmap::Bitmap;
use crate::bitmaps::{EndOfUse, SharedBitmap};
use crate::graph::User;
use crate::node::copy_before_write::CopyBeforeWriteNode;
use crate::node::mirror_top::MirrorTopNode;
use copier::{Copier, CopyError, Scanned};
use ipc::Failure;
use ipc::block::{BlockEvent, IoKind};
use ipc::block_job::{BitmapMode, JobErrorAction, JobEvent, JobNumber, JobOnError, JobProgress};
use ipc::message::RequestId;
use nix::errno::Errno;
use std::ops::Range;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Most copies under way, where the job does not say.
const COPIES: usize = 16;
/// Most copies under way while the guest has requests.
const COPIES_BESIDE_GUEST: usize = 2;
/// Size of a copy while the guest has requests, bytes.
const CHUNK_BESIDE_GUEST: u64 = 256 << 10;
/// Size of a copy of a commit or a stream, bytes.
const CHUNK_OF_COMMIT: u64 = 512 << 10;
/// What failed is tried again after this long.
const RETRY: Duration = Duration::from_millis(100);
/// A limited job's copies are at most what it may do in this part of a second.
const SLICES: u64 = 10;
/// Such a part of a second.
const SLICE: Duration = Duration::from_millis(1000 / SLICES);
/// Longest time between two copies of a limited job.
const FOREVER: Duration = Duration::from_secs(1 << 30);

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
    /// Looking what there is to copy, from an offset on.
    Scan(u64),
    Copy,
    /// The target is to be flushed.
    Flush,
    /// It does nothing more.
    Over,
}

/// A part of a job's work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Looking, from an offset on.
    Scan(u64),
    /// Copying a range.
    Copy(Range<u64>),
    /// Flushing the target.
    Flush,
}

/// What came of it.
pub type Stepped = Result<Option<Scanned>, CopyError>;

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

    /// The steps that can begin now, and if there are none when to ask again.
    pub fn next_steps(&mut self, now: Instant, beside_guest: bool) -> (Vec<Step>, Option<Instant>) {
        if let Some(error) = self.copier.broken.take() {
            // What a backup has lost to a guest's write cannot be tried again.
            let policy = match self.filters.backup {
                Some(_) => JobOnError::Report,
                None => self.policy(error.kind),
            };
            self.failed(error, policy, now);
        }
        let mut steps = Vec::new();
        if self.paused || self.phase == Phase::Over {
            return (steps, None);
        }
        if now < self.next_at {
            return (steps, Some(self.next_at));
        }
        match self.phase {
            Phase::Scan(from) if self.under_way.is_empty() => steps.push(Step::Scan(from)),
            Phase::Flush if self.under_way.is_empty() => steps.push(Step::Flush),
            Phase::Copy => {
                let most = match beside_guest {
                    true => COPIES_BESIDE_GUEST.min(self.most_copies),
                    false => self.most_copies,
                };
                while self.under_way.len() + steps.len() < most && self.next_at <= now {
                    let Some(run) = self.pick(beside_guest, &steps) else {
                        break;
                    };
                    if self.speed > 0 {
                        let time = (run.end - run.start) as f64 / self.speed as f64;
                        let time = Duration::try_from_secs_f64(time).map_or(FOREVER, |time| time.min(FOREVER));
                        // Who comes late is not slower for it, as long as it is not much.
                        let late = now.saturating_duration_since(self.next_at).min(SLICE);
                        self.next_at = now - late + time;
                    }
                    steps.push(Step::Copy(run));
                }
                if steps.is_empty() && self.under_way.is_empty() {
                    steps.extend(self.nothing_left());
                }
            }
            _ => {}
        }
        self.under_way.extend(steps.iter().cloned());
        let again = (self.next_at > now && self.phase == Phase::Copy).then_some(self.next_at);
        (steps, again)
    }

    fn nothing_left(&mut self) -> Option<Step> {
        if !self.copier.left.borrow().is_clean() {
            // From the beginning, next time.
            return None;
        }
        match self.kind {
            Kind::Once => {
                self.phase = Phase::Flush;
                return Some(Step::Flush);
            }
            // A target that cannot be flushed has not converged.
            Kind::Mirror if !self.ready => return Some(Step::Flush),
            Kind::Mirror | Kind::FilterOnly => {}
        }
        None
    }

    /// The next run that is not being copied.
    fn pick(&mut self, beside_guest: bool, begun: &[Step]) -> Option<Range<u64>> {
        if self.kind == Kind::FilterOnly {
            return None;
        }
        let left = self.copier.left.borrow();
        let mut chunk = self.chunk;
        if beside_guest {
            chunk = chunk.min(CHUNK_BESIDE_GUEST);
        }
        if self.speed > 0 && (self.kind == Kind::Mirror || !self.is_in_order()) {
            chunk = chunk.min(self.speed / SLICES).max(left.granularity());
        }
        let mut at = self.cursor;
        // Once around.
        let mut wrapped = false;
        loop {
            match left.next(at, chunk) {
                None if wrapped || self.cursor == 0 => return None,
                None => (at, wrapped) = (0, true),
                Some(run) if wrapped && run.start >= self.cursor => return None,
                Some(run) => {
                    let busy = self.under_way.iter().chain(begun).filter_map(Step::range);
                    let before = busy.filter(|busy| busy.start < run.end && run.start < busy.end);
                    match before.cloned().min_by_key(|busy| busy.start) {
                        None => {
                            self.cursor = run.end;
                            return Some(run);
                        }
                        Some(busy) if busy.start > run.start => {
                            self.cursor = busy.start;
                            return Some(run.start..busy.start);
                        }
                        Some(busy) => at = busy.end,
                    }
                }
            }
        }
    }

    /// A step has ended.
    pub fn stepped(&mut self, step: &Step, result: Stepped, now: Instant) {
        if let Some(place) = self.under_way.iter().position(|other| other == step) {
            self.under_way.swap_remove(place);
        }
        match (step, result) {
            (_, Err(error)) => {
                let action = self.failed(error, self.policy(error.kind), now);
                if let Step::Copy(range) = step {
                    // It is still left.
                    self.cursor = self.cursor.min(range.start);
                    // Only what a stream cannot read need not be tried again: it stays where it is.
                    if action == Some(JobErrorAction::Ignore) && self.copier.is_pulling() {
                        self.left_out.get_or_insert(error);
                        self.copier.left.borrow_mut().clear(range.clone());
                        self.next_at = now;
                    }
                }
            }
            (Step::Scan(from), Ok(Some(scanned))) => self.scanned(*from, &scanned),
            (Step::Copy(range), Ok(_)) => self.copied += range.end - range.start,
            (Step::Flush, Ok(_)) if self.kind == Kind::Mirror => {
                // Otherwise it is flushed again when that is copied.
                if self.phase == Phase::Copy && self.copier.left.borrow().is_clean() {
                    self.ready = true;
                    self.events.push(JobEvent::Ready);
                }
            }
            (Step::Flush, Ok(_)) => {
                self.phase = Phase::Over;
                let ended = self.left_out.map_or(Ok(()), |error| Err(host_failure(error.errno)));
                self.events.push(JobEvent::Ended(ended));
            }
            (Step::Scan(_), Ok(None)) => {}
        }
    }

    fn scanned(&mut self, from: u64, scanned: &Scanned) {
        let mut left = self.copier.left.borrow_mut();
        match self.kind {
            // It has begun with nothing.
            Kind::Mirror => scanned.copied.iter().for_each(|run| left.set(run.clone())),
            // It has begun with everything.
            Kind::Once | Kind::FilterOnly => {
                let mut at = from;
                for run in &scanned.copied {
                    left.clear(at..run.start);
                    at = run.end;
                }
                left.clear(at..scanned.until);
            }
        }
        self.phase = if scanned.until >= self.copier.bytes() {
            Phase::Copy
        } else {
            Phase::Scan(scanned.until)
        };
    }

    fn policy(&self, kind: IoKind) -> JobOnError {
        match kind {
            IoKind::Read => self.on_source_error,
            IoKind::Write | IoKind::Flush | IoKind::Unmap => self.on_target_error,
        }
    }

    /// What becomes of an error, if it does not come too late to matter.
    fn failed(&mut self, error: CopyError, policy: JobOnError, now: Instant) -> Option<JobErrorAction> {
        if self.phase == Phase::Over || self.end.is_some() {
            return None;
        }
        let action = match policy {
            JobOnError::Report => JobErrorAction::Report,
            JobOnError::Ignore => JobErrorAction::Ignore,
            JobOnError::Enospc if error.errno == Errno::ENOSPC => JobErrorAction::Stop,
            JobOnError::Enospc => JobErrorAction::Report,
            JobOnError::Stop => JobErrorAction::Stop,
        };
        if action == JobErrorAction::Stop && self.paused {
            return None;
        }
        let errno = error.errno as i32;
        self.events.push(JobEvent::Error {
            kind: error.kind,
            action,
            errno,
        });
        match action {
            JobErrorAction::Report => {
                self.phase = Phase::Over;
                self.events.push(JobEvent::Ended(Err(host_failure(error.errno))));
                // The guest need not work for it any more.
                if let Some(mirror) = &self.filters.mirror {
                    mirror.set_mirror(None);
                }
                if let Some(backup) = &self.filters.backup {
                    backup.spoil();
                }
            }
            JobErrorAction::Ignore => self.next_at = now + RETRY,
            JobErrorAction::Stop => self.paused = true,
        }
        Some(action)
    }

    /// Does a step.
    pub async fn run(copier: Rc<Copier>, kind_is_mirror: bool, step: Step) -> Stepped {
        match step {
            Step::Scan(from) => copier.scan(from).await.map(Some),
            Step::Copy(range) if kind_is_mirror => copier.copy_now(range).await.map(|()| None),
            Step::Copy(range) => copier.copy_left(range).await.map(|()| None),
            Step::Flush => match copier.target().flush().await {
                Ok(()) => Ok(None),
                Err(errno) => Err(CopyError {
                    kind: IoKind::Write,
                    errno,
                }),
            },
        }
    }

    /// What [`Self::run`] takes.
    pub fn parts(&self) -> (Rc<Copier>, bool) {
        (self.copier.clone(), self.kind == Kind::Mirror)
    }
}

fn host_failure(errno: Errno) -> Failure {
    Failure {
        message: errno.desc().to_owned(),
        errno: Some(errno as i32),
    }
}

impl Step {
    fn range(&self) -> Option<&Range<u64>> {
        match self {
            Self::Copy(range) => Some(range),
            Self::Scan(_) | Self::Flush => None,
        }
    }

    fn bytes(&self) -> u64 {
        self.range().map_or(0, |range| range.end - range.start)
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
