//! Jobs: what takes longer than its command. Who does a job's work tells here how far it is; clients ask for its end.
//!
//! [`state`] says which way a job can go and what clients may ask of it where. Every step is returned to whoever makes it,
//! so that clients are told of each in order. Nothing here waits or works.

pub mod state;

use crate::objects::spec::is_identifier;
use ipc::job::{JobInfo, JobStatus, JobType};
use ipc::qmp::QmpError;
use nix::errno::Errno;
use state::Verb;

/// How many jobs there may be, those that are concluded included: a compromised qmp-proc can ask as often as it likes.
pub const MAX_JOBS: usize = 256;

/// Why a client's request is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// A new job's id is no identifier.
    #[error("Invalid job ID '{0}'")]
    BadId(String),
    /// A new job's id is taken.
    #[error("Job ID '{0}' already in use")]
    Duplicate(String),
    /// There is none of this id.
    #[error("Job not found")]
    NotFound,
    /// Not in this state.
    #[error("Job '{id}' in state '{}' cannot accept command verb '{}'", status.name(), verb.name())]
    Verb {
        /// The job.
        id: String,
        /// Where it is.
        status: JobStatus,
        /// What was asked.
        verb: Verb,
    },
    /// The bound.
    #[error("there are {MAX_JOBS} jobs already: dismiss some")]
    TooMany,
}

impl From<JobError> for QmpError {
    fn from(error: JobError) -> Self {
        Self::generic(error.to_string())
    }
}

/// What ends a job that has done its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endings {
    /// Its changes take effect by themselves; otherwise job-finalize says when.
    pub auto_finalize: bool,
    /// It is forgotten by itself; otherwise job-dismiss says when.
    pub auto_dismiss: bool,
}

/// The steps that a job has made, in order: clients are told of each.
#[derive(Debug, Default, PartialEq, Eq)]
#[must_use = "clients are told of every step"]
pub struct Steps(pub Vec<JobStatus>);

/// A job.
#[derive(Debug)]
struct Job {
    id: String,
    kind: JobType,
    endings: Endings,
    status: JobStatus,
    current: u64,
    total: u64,
    is_cancelled: bool,
    error: Option<String>,
}

impl Job {
    /// Goes on to another state.
    ///
    /// # Panics
    /// When there is no such way: whoever does the work is mistaken.
    fn go(&mut self, to: JobStatus, steps: &mut Steps) {
        assert!(
            state::leads_to(self.status, to),
            "job {}: from {:?} to {to:?}",
            self.id,
            self.status
        );
        self.status = to;
        steps.0.push(to);
    }

    fn check(&self, verb: Verb) -> Result<(), JobError> {
        if state::takes(self.status, verb) {
            return Ok(());
        }
        Err(JobError::Verb {
            id: self.id.clone(),
            status: self.status,
            verb,
        })
    }

    fn conclude(&mut self, steps: &mut Steps) {
        self.go(JobStatus::Concluded, steps);
        if self.endings.auto_dismiss {
            self.go(JobStatus::Null, steps);
        }
    }

    fn abort(&mut self, error: String, steps: &mut Steps) {
        self.error = Some(error);
        self.go(JobStatus::Aborting, steps);
        self.conclude(steps);
    }
}

/// All jobs, the newest first.
#[derive(Debug, Default)]
pub struct Jobs(Vec<Job>);

impl Jobs {
    /// A new job.
    ///
    /// # Errors
    /// [`JobError::BadId`], [`JobError::Duplicate`], [`JobError::TooMany`].
    pub fn create(&mut self, id: &str, kind: JobType, endings: Endings) -> Result<Steps, JobError> {
        if !is_identifier(id) {
            return Err(JobError::BadId(id.to_owned()));
        }
        if self.0.iter().any(|job| job.id == id) {
            return Err(JobError::Duplicate(id.to_owned()));
        }
        if self.0.len() >= MAX_JOBS {
            return Err(JobError::TooMany);
        }
        let mut job = Job {
            id: id.to_owned(),
            kind,
            endings,
            status: JobStatus::Undefined,
            current: 0,
            total: 0,
            is_cancelled: false,
            error: None,
        };
        let mut steps = Steps::default();
        job.go(JobStatus::Created, &mut steps);
        self.0.insert(0, job);
        Ok(steps)
    }

    /// Its work begins.
    pub fn start(&mut self, id: &str) -> Steps {
        self.step(id, |job, steps| job.go(JobStatus::Running, steps))
    }

    /// How much is done, and how much there is to do.
    pub fn set_progress(&mut self, id: &str, current: u64, total: u64) {
        if let Ok(job) = self.job(id) {
            (job.current, job.total) = (current, total);
        }
    }

    /// Its work is done, or has failed.
    pub fn finish(&mut self, id: &str, result: Result<(), String>) -> Steps {
        self.step(id, |job, steps| {
            let result = match result {
                Ok(()) if job.is_cancelled => Err(Errno::ECANCELED.desc().to_owned()),
                result => result,
            };
            if let Err(error) = result {
                return job.abort(error, steps);
            }
            // Jobs of one transaction wait for one another: as yet each is alone.
            job.go(JobStatus::Waiting, steps);
            job.go(JobStatus::Pending, steps);
            if job.endings.auto_finalize {
                job.conclude(steps);
            }
        })
    }

    /// job-cancel. Work that is under way ends by itself; its result does not count any more.
    ///
    /// # Errors
    /// [`JobError::NotFound`], [`JobError::Verb`].
    pub fn cancel(&mut self, id: &str) -> Result<Steps, JobError> {
        let job = self.job(id)?;
        job.check(Verb::Cancel)?;
        let mut steps = Steps::default();
        job.is_cancelled = true;
        if job.status == JobStatus::Pending {
            job.abort(Errno::ECANCELED.desc().to_owned(), &mut steps);
            self.forget();
        }
        Ok(steps)
    }

    /// job-finalize.
    ///
    /// # Errors
    /// [`JobError::NotFound`], [`JobError::Verb`].
    pub fn finalize(&mut self, id: &str) -> Result<Steps, JobError> {
        self.ask(id, Verb::Finalize, Job::conclude)
    }

    /// job-dismiss.
    ///
    /// # Errors
    /// [`JobError::NotFound`], [`JobError::Verb`].
    pub fn dismiss(&mut self, id: &str) -> Result<Steps, JobError> {
        self.ask(id, Verb::Dismiss, |job, steps| job.go(JobStatus::Null, steps))
    }

    /// query-jobs.
    pub fn list(&self) -> Vec<JobInfo> {
        let int = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let info = |job: &Job| JobInfo {
            id: job.id.clone(),
            kind: job.kind,
            status: job.status,
            current_progress: int(job.current),
            total_progress: int(job.total),
            error: job.error.clone(),
        };
        self.0.iter().map(info).collect()
    }

    fn job(&mut self, id: &str) -> Result<&mut Job, JobError> {
        self.0.iter_mut().find(|job| job.id == id).ok_or(JobError::NotFound)
    }

    fn ask(&mut self, id: &str, verb: Verb, act: impl FnOnce(&mut Job, &mut Steps)) -> Result<Steps, JobError> {
        self.job(id)?.check(verb)?;
        Ok(self.step(id, act))
    }

    fn step(&mut self, id: &str, act: impl FnOnce(&mut Job, &mut Steps)) -> Steps {
        let mut steps = Steps::default();
        if let Ok(job) = self.job(id) {
            act(job, &mut steps);
        }
        self.forget();
        steps
    }

    fn forget(&mut self) {
        self.0.retain(|job| job.status != JobStatus::Null);
    }
}

#[cfg(test)]
mod tests;
