//! Jobs: long-running copies beside the guest's requests.
//!
//! | room | what |
//! |---|---|
//! | this file | a job: what it does next, and what becomes of what it did |
//! | [`begin`] | from a description to a job |
//! | [`copier`], [`layers`], [`plan`] | copying, and what is to be copied |
//! | [`pace`] | speed |
//!
//! **How it works.** The thread asks every job in each of its turns what it wants to do ([`Job::next`]) and runs that as tasks
//! of bounded size beside the guest's. One task at a time looks at what is left ([`copier::Copier::plan`]); the others copy
//! what it has found, several at a time, and fewer while the guest has requests. When all is found and copied, the job goes
//! around again, as long as something is left: a mirror for ever. While the graph changes no task is begun, so that a change
//! waits for those in flight and no longer.
//!
//! **Filters.** What the guest writes meanwhile is the business of the job's filter ([`crate::node::mirror_top`],
//! [`crate::node::copy_before_write`], [`crate::node::copy_on_read`]), which shares the job's copier.

pub mod begin;
pub mod copier;
pub mod layers;
pub mod pace;
pub mod plan;

#[cfg(test)]
mod tests;

use crate::bitmaps::{EndOfUse, SharedBitmap};
use crate::graph::manual::failure;
use crate::node::copy_before_write::CopyBeforeWriteNode;
use crate::node::mirror_top::MirrorTopNode;
use copier::{Copier, CopyError, Piece};
use ipc::Failure;
use ipc::block::IoKind;
use ipc::block_job::{BitmapMode, JobErrorAction, JobEvent, JobNumber, JobOnError, JobProgress};
use nix::errno::Errno;
use pace::Pace;
use plan::Plan;
use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long a job waits before it tries again what has failed.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// How long a mirror that has converged waits before it goes around again.
const LAP_AFTER: Duration = Duration::from_millis(100);
/// Planned pieces below which the next are looked for.
const FEW_PIECES: usize = 32;
/// Copies at a time while the guest has requests, and the largest of them, bytes.
const GIVING_WAY: (usize, u64) = (2, 256 << 10);

/// What a job does, beyond copying what is left.
pub enum Kind {
    /// It ends when everything is copied.
    Commit,
    /// As `Commit`; what cannot be read may be left out.
    Stream,
    /// It goes on until it is ended.
    Mirror(Rc<MirrorTopNode>),
    /// It ends when everything is copied, if it copies anything.
    Backup {
        /// The filter.
        filter: Rc<CopyBeforeWriteNode>,
        /// It copies only what the guest overwrites.
        only_before_writes: bool,
        /// It copies what is dirty in the bitmap.
        only_dirty: bool,
        /// What it has begun with.
        bitmap: Option<(SharedBitmap, BitmapMode)>,
    },
}

/// A task of a job.
pub type Work = Pin<Box<dyn Future<Output = Done>>>;

/// How it has ended.
pub enum Done {
    /// Looked at what is left.
    Planned(Result<Plan, (u64, CopyError)>),
    /// Copied a piece.
    Copied(Piece, Result<u64, CopyError>),
    /// Flushed the target.
    Flushed(Result<(), CopyError>),
}

/// Where a job is in going around.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lap {
    /// Up to here it was looked at.
    At(u64),
    /// All was looked at.
    Over,
}

/// How it ends.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    /// It does not yet.
    Not,
    /// As soon as nothing is in flight.
    Soon(Result<(), Failure>),
    /// It has told so.
    Told,
}

/// See the module.
pub struct Job {
    /// Its number.
    pub number: JobNumber,
    kind: Kind,
    copier: Rc<Copier>,
    pace: Pace,
    on_source_error: JobOnError,
    on_target_error: JobOnError,
    workers: usize,
    largest: u64,
    granularity: u64,
    /// What there was to do when it began, bytes.
    at_first: u64,
    paused: bool,
    /// It has stopped itself.
    stopped: bool,
    ready: bool,
    /// The target has what was copied.
    flushed: bool,
    is_first_lap: bool,
    lap: Lap,
    pieces: VecDeque<Piece>,
    planning: bool,
    /// Tasks.
    in_flight: usize,
    not_before: Option<Instant>,
    /// What was left out.
    left_out: Option<CopyError>,
    end: End,
}

impl Job {
    /// Something of it is under way.
    pub fn is_busy(&self) -> bool {
        self.in_flight > 0
    }

    /// No request of the guest is with its filter because of it.
    pub fn is_left_alone(&self) -> bool {
        self.copier.is_left_alone()
    }

    /// Its filter does what it has to do, from now on. Nothing may be under way.
    ///
    /// # Errors
    /// When the bitmap cannot be used, which was checked.
    pub fn hook(&self) -> Result<(), Failure> {
        match &self.kind {
            Kind::Commit | Kind::Stream => {}
            Kind::Mirror(filter) => filter.set_mirror(Some(self.copier.clone())),
            Kind::Backup {
                filter,
                bitmap,
                only_dirty,
                ..
            } => {
                let mut covers = None;
                if let Some((bitmap, _)) = bitmap {
                    bitmap.borrow_mut().begin_use()?;
                }
                if let (Some((bitmap, _)), true) = (bitmap, only_dirty) {
                    let mut left = self.copier.left.borrow_mut();
                    left.merge(bitmap.borrow().bits());
                    covers = Some(left.clone());
                }
                filter.begin(self.copier.clone(), covers);
            }
        }
        Ok(())
    }

    /// It does nothing more; what is in flight goes on to its end. The filter passes on.
    pub fn unhook(&mut self, success: bool) {
        self.end = End::Told;
        match &self.kind {
            Kind::Commit | Kind::Stream => {}
            Kind::Mirror(filter) => {
                filter.set_mirror(None);
                filter.set_write_blocking(false);
            }
            Kind::Backup { filter, bitmap, .. } => {
                filter.end();
                if let Some((bitmap, mode)) = bitmap {
                    let left = self.copier.left.borrow();
                    bitmap.borrow_mut().end_use(match (mode, success) {
                        (BitmapMode::OnSuccess, true) => EndOfUse::Drop { left: None },
                        (BitmapMode::OnSuccess, false) | (BitmapMode::Never, _) => EndOfUse::Keep,
                        (BitmapMode::Always, _) => EndOfUse::Drop { left: Some(&left) },
                    });
                }
            }
        }
    }

    /// Stops beginning anything.
    pub fn pause(&mut self) {
        self.paused = true;
    }

    /// Goes on, also after an error.
    pub fn resume(&mut self) {
        self.paused = false;
        self.stopped = false;
        self.not_before = None;
    }

    /// Bytes a second; 0: as fast as it goes.
    pub fn set_speed(&mut self, speed: u64, now: Instant) {
        self.pace.set(speed, now);
    }

    /// From now on the guest's writes go to the target as well.
    ///
    /// # Errors
    /// When it is no mirror.
    pub fn set_write_blocking(&self) -> Result<(), Failure> {
        match &self.kind {
            Kind::Mirror(filter) => {
                filter.set_write_blocking(true);
                Ok(())
            }
            _ => Err(Failure::new(format!("job {} is no mirror", self.number.0))),
        }
    }

    /// What copies everything that is left while nothing else is under way.
    ///
    /// # Errors
    /// When it is no mirror, or not one that could end.
    pub fn settles(&self) -> Result<Rc<Copier>, Failure> {
        let refused = |why: &str| Err(Failure::new(format!("job {} {why}", self.number.0)));
        match (&self.kind, &self.end) {
            (Kind::Mirror(_), End::Not) if self.ready => Ok(self.copier.clone()),
            (Kind::Mirror(_), End::Not) => refused("has not converged"),
            (Kind::Mirror(_), _) => refused("has ended"),
            _ => refused("is no mirror"),
        }
    }

    /// How far it is.
    pub fn progress(&self) -> JobProgress {
        let left = self.copier.left.borrow();
        let left = left.dirty_bytes() + self.copier.under_way.get();
        let mut progress = JobProgress {
            ready: self.ready,
            ..JobProgress::default()
        };
        if let Kind::Mirror(filter) = &self.kind {
            progress.done = self.copier.done.get();
            progress.total = progress.done + left;
            progress.actively_synced = self.ready && filter.is_write_blocking() && left == 0;
        } else {
            progress.total = self.at_first;
            progress.done = self.at_first.saturating_sub(left);
        }
        progress
    }

    /// When [`Self::next`] may have something, if nothing else happens before.
    pub fn wake_at(&self, now: Instant) -> Option<Instant> {
        if self.is_at_rest() || (self.in_flight >= self.workers) {
            return None;
        }
        let waits = [self.not_before.filter(|at| *at > now), self.pace.wait_until(now)];
        waits.into_iter().flatten().max().filter(|_| self.wants_something())
    }

    fn is_at_rest(&self) -> bool {
        self.paused || self.stopped || self.end != End::Not
    }

    fn wants_something(&self) -> bool {
        !self.pieces.is_empty() || self.lap != Lap::Over || !self.copier.left.borrow().is_clean() || !self.flushed
    }

    /// What it tells when nothing more is in flight.
    pub fn take_end(&mut self) -> Option<Result<(), Failure>> {
        if self.in_flight > 0 || !matches!(self.end, End::Soon(_)) {
            return None;
        }
        match std::mem::replace(&mut self.end, End::Told) {
            End::Soon(result) => {
                if let (Err(_), Kind::Backup { filter, .. }) = (&result, &self.kind) {
                    // Nobody wants it any more.
                    filter.end();
                }
                Some(result)
            }
            _ => None,
        }
    }

    /// The next task, if one is to be begun now. `gives_way`: the guest has requests.
    pub fn next(&mut self, now: Instant, gives_way: bool, events: &mut Vec<JobEvent>) -> Option<Work> {
        if let (Some(error), End::Not) = (self.copier.broken.take(), &self.end) {
            self.broken(error, now, events);
        }
        if self.is_at_rest() || self.not_before.is_some_and(|at| at > now) {
            return None;
        }
        self.not_before = None;
        let (workers, largest) = if gives_way {
            (
                self.workers.min(GIVING_WAY.0),
                self.largest.min(GIVING_WAY.1).max(self.granularity),
            )
        } else {
            (self.workers, self.largest)
        };
        if self.in_flight < workers && self.pace.wait_until(now).is_none() {
            let largest = self.pace.slice(largest, self.granularity);
            if let Some(piece) = self.take_piece(largest) {
                if !piece.may_be_zero || matches!(self.kind, Kind::Backup { .. }) {
                    self.pace.charge(piece.range.end - piece.range.start, now);
                }
                self.flushed = false;
                let copier = self.copier.clone();
                return Some(self.begin(async move {
                    let result = copier.copy_piece(piece.clone()).await;
                    Done::Copied(piece, result)
                }));
            }
        }
        if let (Lap::At(from), false, ..FEW_PIECES) = (self.lap, self.planning, self.pieces.len()) {
            self.planning = true;
            let (copier, is_first) = (self.copier.clone(), self.is_first_lap);
            return Some(self.begin(async move { Done::Planned(copier.plan(from, is_first).await) }));
        }
        if self.in_flight == 0 && self.pieces.is_empty() && self.lap == Lap::Over {
            return self.lap_is_over(now);
        }
        None
    }

    fn begin(&mut self, work: impl Future<Output = Done> + 'static) -> Work {
        self.in_flight += 1;
        Box::pin(work)
    }

    /// The front of what is planned.
    fn take_piece(&mut self, largest: u64) -> Option<Piece> {
        let mut piece = self.pieces.pop_front()?;
        // Zeroes need no time, unless it turns out that they are none.
        let largest = largest - largest % self.granularity;
        if !piece.may_be_zero && piece.range.end - piece.range.start > largest {
            let rest = Piece {
                range: piece.range.start + largest..piece.range.end,
                may_be_zero: false,
            };
            piece.range.end = rest.range.start;
            self.pieces.push_front(rest);
        }
        Some(piece)
    }

    /// Everything was looked at, and copied or given back.
    fn lap_is_over(&mut self, now: Instant) -> Option<Work> {
        let only_before_writes = matches!(
            self.kind,
            Kind::Backup {
                only_before_writes: true,
                ..
            }
        );
        if only_before_writes {
            return None;
        }
        if !self.copier.left.borrow().is_clean() {
            self.lap = Lap::At(0);
            self.is_first_lap = false;
            if self.ready {
                self.not_before = Some(now + LAP_AFTER);
                return None;
            }
            let (copier, from) = (self.copier.clone(), 0);
            self.planning = true;
            return Some(self.begin(async move { Done::Planned(copier.plan(from, false).await) }));
        }
        if self.flushed || self.ready {
            return None;
        }
        let copier = self.copier.clone();
        Some(self.begin(async move { Done::Flushed(copier.target().flush().await.map_err(CopyError::writing)) }))
    }

    /// A task of it has ended.
    pub fn finished(&mut self, done: Done, now: Instant, events: &mut Vec<JobEvent>) {
        self.in_flight -= 1;
        match done {
            Done::Planned(Ok(plan)) => {
                self.planning = false;
                self.lap = plan.until.map_or(Lap::Over, Lap::At);
                self.pieces.extend(plan.pieces);
            }
            Done::Planned(Err((from, error))) => {
                self.planning = false;
                self.lap = Lap::At(from);
                if self.failed(error, now, events) {
                    self.leave_out(from..from + self.granularity);
                    self.lap = Lap::At(from + self.granularity);
                }
            }
            Done::Copied(_, Ok(_)) => {}
            Done::Copied(piece, Err(error)) => {
                if self.failed(error, now, events) {
                    self.leave_out(piece.range);
                }
            }
            Done::Flushed(Ok(())) => self.all_is_there(events),
            Done::Flushed(Err(error)) => {
                self.failed(error, now, events);
            }
        }
    }

    /// Everything is copied and flushed.
    fn all_is_there(&mut self, events: &mut Vec<JobEvent>) {
        self.flushed = true;
        if self.end != End::Not || !self.copier.left.borrow().is_clean() {
            return;
        }
        match &self.kind {
            Kind::Mirror(_) if self.ready => {}
            Kind::Mirror(_) => {
                self.ready = true;
                events.push(JobEvent::Ready);
            }
            _ => {
                self.end = End::Soon(match self.left_out {
                    None => Ok(()),
                    Some(error) => Err(failure(error.errno)),
                });
            }
        }
    }

    fn leave_out(&mut self, range: std::ops::Range<u64>) {
        let whole = self.copier.whole(range);
        self.copier.left.borrow_mut().clear(whole);
    }

    /// The host has failed a request: what becomes of it. Returns whether its part is to be left out.
    fn failed(&mut self, error: CopyError, now: Instant, events: &mut Vec<JobEvent>) -> bool {
        if self.end != End::Not || self.stopped {
            // It was told of one already.
            return false;
        }
        let policy = match error.kind {
            IoKind::Read => self.on_source_error,
            _ => self.on_target_error,
        };
        let action = match policy {
            JobOnError::Report => JobErrorAction::Report,
            JobOnError::Ignore => JobErrorAction::Ignore,
            JobOnError::Enospc if error.errno == Errno::ENOSPC => JobErrorAction::Stop,
            JobOnError::Enospc => JobErrorAction::Report,
            JobOnError::Stop => JobErrorAction::Stop,
        };
        let leaves_out = action == JobErrorAction::Ignore && matches!(self.kind, Kind::Stream);
        if action == JobErrorAction::Ignore && !leaves_out && self.not_before.is_some_and(|at| at > now) {
            // Several that were in flight together count as one.
            return false;
        }
        events.push(JobEvent::Error {
            kind: error.kind,
            action,
            errno: error.errno as i32,
        });
        match action {
            JobErrorAction::Report => self.end = End::Soon(Err(failure(error.errno))),
            JobErrorAction::Stop => self.stopped = true,
            JobErrorAction::Ignore if leaves_out => {
                self.left_out.get_or_insert(error);
            }
            JobErrorAction::Ignore => self.not_before = Some(now + RETRY_AFTER),
        }
        leaves_out
    }

    /// What a guest's write needed to be copied could not be.
    fn broken(&mut self, error: CopyError, now: Instant, events: &mut Vec<JobEvent>) {
        if matches!(self.kind, Kind::Mirror(_)) {
            self.failed(error, now, events);
            return;
        }
        // What was there is lost: there is nothing to be tried again.
        events.push(JobEvent::Error {
            kind: error.kind,
            action: JobErrorAction::Report,
            errno: error.errno as i32,
        });
        self.end = End::Soon(Err(failure(error.errno)));
    }
}
