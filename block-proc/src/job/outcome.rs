//! What becomes of the parts of a job's work that have ended, and of errors.

use super::copier::{CopyError, Scanned};
use super::steps::{Step, Stepped};
use super::{Job, Kind, Phase};
use ipc::Failure;
use ipc::block::IoKind;
use ipc::block_job::{JobErrorAction, JobEvent, JobOnError};
use nix::errno::Errno;
use std::time::{Duration, Instant};

/// What failed is tried again after this long.
pub(super) const RETRY: Duration = Duration::from_millis(100);

impl Job {
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
            // A copy may have ended it meanwhile.
            (Step::Scan(_), Ok(_)) if self.phase == Phase::Over => {}
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

    pub(super) fn policy(&self, kind: IoKind) -> JobOnError {
        match kind {
            IoKind::Read => self.on_source_error,
            IoKind::Write | IoKind::Flush | IoKind::Unmap => self.on_target_error,
        }
    }

    /// What becomes of an error, if it does not come too late to matter.
    pub(super) fn failed(&mut self, error: CopyError, policy: JobOnError, now: Instant) -> Option<JobErrorAction> {
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
}

fn host_failure(errno: Errno) -> Failure {
    Failure {
        message: errno.desc().to_owned(),
        errno: Some(errno as i32),
    }
}
