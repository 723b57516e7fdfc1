//! Jobs: what takes longer than its command. Who does a job's work tells here how far it is; clients ask for its end.
//!
//! [`state`] says which way a job can go and what clients may ask of it where. Every step is returned to whoever makes it,
//! so that clients are told of each in order. Nothing here waits or works: [`crate::vm`] does, and says what came of it.
//!
//! **How a job ends.** Its work is done ([`Jobs::worked`]): it waits for the other jobs of its transaction, then all of them
//! are pending, and with their clients' leave (`auto-finalize`, job-finalize) their changes are made. When one fails, all
//! of its transaction fail. Then each is concluded, and forgotten with its client's leave (`auto-dismiss`, job-dismiss).

pub mod state;

use crate::objects::spec::is_identifier;
use ipc::block_info::IoStatus;
use ipc::block_job::JobProgress;
use ipc::job::{BlockJobInfo, JobInfo, JobStatus, JobType};
use ipc::qmp::{BlockJobProgress, ErrorClass, Event, QmpError};
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
    /// There is none of this id that works on disks.
    #[error("Block job '{0}' not found")]
    NoBlockJob(String),
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
    /// job-pause, twice.
    #[error("Job is already paused")]
    IsPaused,
    /// job-resume of a job that goes on.
    #[error("Can't resume a job that was not paused")]
    NotPaused,
    /// block-job-cancel without force of a job that its client has paused.
    #[error("The block job for device '{0}' is currently paused")]
    PausedByUser(String),
    /// job-complete of a job that has no end of this kind, or whose end has been asked for.
    #[error("The active block job '{0}' cannot be completed")]
    NotCompletable(String),
    /// Less than nothing.
    #[error("Parameter 'speed' expects a non-negative value")]
    Speed,
    /// A job of a kind that cannot be paused or limited.
    #[error("Job '{0}' does not support this")]
    NoWork(String),
    /// block-job-change: another kind.
    #[error("Job '{0}' is '{1}' job, not '{2}'")]
    OtherKind(String, &'static str, &'static str),
    /// block-job-change: there is no way back.
    #[error("Change to copy mode 'background' is not implemented")]
    OneWay,
    /// The bound.
    #[error("there are {MAX_JOBS} jobs already: dismiss some")]
    TooMany,
}

impl From<JobError> for QmpError {
    fn from(error: JobError) -> Self {
        let class = match error {
            JobError::NoBlockJob(_) => ErrorClass::DeviceNotActive,
            _ => ErrorClass::GenericError,
        };
        Self {
            class,
            desc: error.to_string(),
        }
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

impl Endings {
    /// What a command says; both by themselves where it says nothing.
    pub fn of(auto_finalize: Option<bool>, auto_dismiss: Option<bool>) -> Self {
        Self {
            auto_finalize: auto_finalize.unwrap_or(true),
            auto_dismiss: auto_dismiss.unwrap_or(true),
        }
    }
}

/// What clients are told, in order.
#[derive(Debug, Default, PartialEq)]
#[must_use = "clients are told of every step"]
pub struct Steps(pub Vec<Event>);

/// Jobs that succeed or fail together. A job alone has one of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Transaction(u64);

/// What a job wants to end as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Wish {
    /// It works.
    #[default]
    None,
    /// A mirror is to be completed.
    Complete,
    /// A mirror that is ready is to end without the switch: its target is a copy of that moment.
    Leave,
    /// It is to be given up.
    Cancel,
}

/// A job.
#[derive(Debug)]
pub struct Job {
    id: String,
    kind: JobType,
    endings: Endings,
    transaction: Transaction,
    status: JobStatus,
    /// How far it is.
    pub progress: JobProgress,
    /// Bytes a second; 0: no limit.
    pub speed: u64,
    /// Paused by its client.
    pub is_user_paused: bool,
    /// Whether an error has stopped it.
    pub io_status: IoStatus,
    /// What is to become of it.
    pub wish: Wish,
    error: Option<String>,
}

impl Job {
    /// What it does.
    pub fn kind(&self) -> JobType {
        self.kind
    }

    /// Where it is.
    pub fn status(&self) -> JobStatus {
        self.status
    }

    /// Those that end with it.
    pub fn transaction(&self) -> Transaction {
        self.transaction
    }

    /// Its work is done, or was given up.
    pub fn is_over(&self) -> bool {
        matches!(self.status, JobStatus::Concluded | JobStatus::Null)
    }

    fn is_block_job(&self) -> bool {
        self.kind != JobType::Create
    }

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
        steps.0.push(Event::JobStatusChange {
            id: self.id.clone(),
            status: to,
        });
        if to == JobStatus::Ready && !self.progress.ready {
            self.progress.ready = true;
            steps.0.push(Event::BlockJobReady(self.told()));
        }
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

    fn told(&self) -> BlockJobProgress {
        BlockJobProgress {
            kind: self.kind,
            device: self.id.clone(),
            len: int(self.progress.total),
            offset: int(self.progress.done),
            speed: int(self.speed),
        }
    }

    /// Says how it went and lets it be forgotten.
    fn conclude(&mut self, steps: &mut Steps) {
        if self.is_block_job() {
            let told = self.told();
            steps.0.push(match (&self.error, self.wish) {
                (Some(_), Wish::Cancel) => Event::BlockJobCancelled(told),
                (error, _) => Event::BlockJobCompleted {
                    kind: told.kind,
                    device: told.device,
                    len: told.len,
                    offset: told.offset,
                    speed: told.speed,
                    error: error.clone(),
                },
            });
        }
        self.go(JobStatus::Concluded, steps);
        if self.endings.auto_dismiss {
            self.go(JobStatus::Null, steps);
        }
    }

    /// Back to where it works, from where it rests.
    fn wake(&mut self, steps: &mut Steps) {
        match self.status {
            JobStatus::Paused => self.go(JobStatus::Running, steps),
            JobStatus::Standby => self.go(JobStatus::Ready, steps),
            _ => {}
        }
    }
}

fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// All jobs, the newest first.
#[derive(Debug, Default)]
pub struct Jobs {
    jobs: Vec<Job>,
    transactions: u64,
}

impl Jobs {
    /// A number for jobs that end together.
    pub fn new_transaction(&mut self) -> Transaction {
        self.transactions += 1;
        Transaction(self.transactions)
    }

    /// A new job.
    ///
    /// # Errors
    /// [`JobError::BadId`], [`JobError::Duplicate`], [`JobError::TooMany`].
    pub fn create(
        &mut self,
        id: &str,
        kind: JobType,
        endings: Endings,
        transaction: Option<Transaction>,
    ) -> Result<Steps, JobError> {
        if !is_identifier(id) {
            return Err(JobError::BadId(id.to_owned()));
        }
        if self.jobs.iter().any(|job| job.id == id) {
            return Err(JobError::Duplicate(id.to_owned()));
        }
        if self.jobs.len() >= MAX_JOBS {
            return Err(JobError::TooMany);
        }
        let transaction = transaction.unwrap_or_else(|| self.new_transaction());
        let mut job = Job {
            id: id.to_owned(),
            kind,
            endings,
            transaction,
            status: JobStatus::Undefined,
            progress: JobProgress::default(),
            speed: 0,
            is_user_paused: false,
            io_status: IoStatus::Ok,
            wish: Wish::None,
            error: None,
        };
        let mut steps = Steps::default();
        job.go(JobStatus::Created, &mut steps);
        self.jobs.insert(0, job);
        Ok(steps)
    }

    /// Limits its speed, bytes a second.
    ///
    /// # Errors
    /// [`JobError::Speed`], and what [`Self::ask`] says.
    pub fn set_speed(&mut self, id: &str, speed: i64) -> Result<u64, JobError> {
        let job = self.ask(id, Verb::SetSpeed)?;
        job.speed = u64::try_from(speed).map_err(|_| JobError::Speed)?;
        Ok(job.speed)
    }

    /// Its work begins.
    pub fn start(&mut self, id: &str) -> Steps {
        self.step(id, |job, steps| job.go(JobStatus::Running, steps))
    }

    /// It will not begin: it is as if it had never been.
    pub fn give_up(&mut self, id: &str) -> Steps {
        self.step(id, |job, steps| match job.status {
            JobStatus::Created => job.go(JobStatus::Null, steps),
            _ => {
                job.go(JobStatus::Aborting, steps);
                job.go(JobStatus::Concluded, steps);
                job.go(JobStatus::Null, steps);
            }
        })
    }

    /// How much is done, and how much there is to do.
    pub fn set_progress(&mut self, id: &str, done: u64, total: u64) {
        if let Some(job) = self.get_mut(id) {
            (job.progress.done, job.progress.total) = (done, total);
        }
    }

    /// A mirror has converged.
    pub fn ready(&mut self, id: &str) -> Steps {
        self.step(id, |job, steps| {
            // It may have converged just before it was paused: then it stands by, and goes on when its client says so.
            let rests = job.status == JobStatus::Paused;
            job.wake(steps);
            if job.status == JobStatus::Running {
                job.go(JobStatus::Ready, steps);
                if rests {
                    job.go(JobStatus::Standby, steps);
                }
            }
        })
    }

    /// It rests: paused, or standing by if it is ready.
    pub fn rest(&mut self, id: &str) -> Steps {
        self.step(id, |job, steps| match job.status {
            JobStatus::Running => job.go(JobStatus::Paused, steps),
            JobStatus::Ready => job.go(JobStatus::Standby, steps),
            _ => {}
        })
    }

    /// It goes on.
    pub fn wake(&mut self, id: &str) -> Steps {
        self.step(id, |job, steps| {
            job.io_status = IoStatus::Ok;
            job.wake(steps);
        })
    }

    /// Its work is done. If all jobs of its transaction have got so far, they are pending, and their numbers come back when
    /// their changes can be made at once.
    pub fn worked(&mut self, id: &str) -> (Steps, Option<Transaction>) {
        let mut steps = self.step(id, |job, steps| {
            job.wake(steps);
            job.go(JobStatus::Waiting, steps);
        });
        let Some(transaction) = self.get(id).map(|job| job.transaction) else {
            return (steps, None);
        };
        let mut together: Vec<&mut Job> = self.of(transaction).collect();
        if together.iter().any(|job| job.status != JobStatus::Waiting) {
            return (steps, None);
        }
        let mut at_once = true;
        for job in &mut together {
            job.go(JobStatus::Pending, &mut steps);
            at_once &= job.endings.auto_finalize;
            if !job.endings.auto_finalize && job.is_block_job() {
                steps.0.push(Event::BlockJobPending {
                    kind: job.kind,
                    id: job.id.clone(),
                });
            }
        }
        (steps, at_once.then_some(transaction))
    }

    /// Its changes are made: it has succeeded.
    pub fn succeed(&mut self, id: &str) -> Steps {
        self.step(id, Job::conclude)
    }

    /// It fails. What is still to be undone comes before [`Self::conclude`].
    pub fn abort(&mut self, id: &str, error: Option<String>) -> Steps {
        self.step(id, |job, steps| {
            let cancelled = || Errno::ECANCELED.desc().to_owned();
            if error.is_none() {
                job.wish = Wish::Cancel;
            }
            job.error = Some(error.unwrap_or_else(cancelled));
            job.wake(steps);
            if job.status != JobStatus::Aborting {
                job.go(JobStatus::Aborting, steps);
            }
        })
    }

    /// What a failed job has done is undone.
    pub fn conclude(&mut self, id: &str) -> Steps {
        self.step(id, Job::conclude)
    }

    /// job-dismiss.
    ///
    /// # Errors
    /// [`JobError::NotFound`], [`JobError::Verb`].
    pub fn dismiss(&mut self, id: &str) -> Result<Steps, JobError> {
        self.ask(id, Verb::Dismiss)?;
        Ok(self.step(id, |job, steps| job.go(JobStatus::Null, steps)))
    }

    /// A job that takes a verb where it is.
    ///
    /// # Errors
    /// [`JobError::NotFound`], [`JobError::Verb`].
    pub fn ask(&mut self, id: &str, verb: Verb) -> Result<&mut Job, JobError> {
        let job = self.get_mut(id).ok_or(JobError::NotFound)?;
        job.check(verb)?;
        Ok(job)
    }

    /// Whether there is a job of this id that works on disks: the older commands know no other.
    ///
    /// # Errors
    /// [`JobError::NoBlockJob`].
    pub fn check_block_job(&self, id: &str) -> Result<(), JobError> {
        let found = self.get(id).filter(|job| job.is_block_job());
        found.map(drop).ok_or_else(|| JobError::NoBlockJob(id.to_owned()))
    }

    /// A job.
    pub fn get(&self, id: &str) -> Option<&Job> {
        self.jobs.iter().find(|job| job.id == id)
    }

    /// A job.
    pub fn get_mut(&mut self, id: &str) -> Option<&mut Job> {
        self.jobs.iter_mut().find(|job| job.id == id)
    }

    /// The ids of the jobs that end together, the oldest first.
    pub fn together(&self, transaction: Transaction) -> Vec<String> {
        let jobs = self.jobs.iter().rev().filter(|job| job.transaction == transaction);
        jobs.filter(|job| !job.is_over()).map(|job| job.id.clone()).collect()
    }

    /// The jobs that end together and are not over, the oldest first.
    fn of(&mut self, transaction: Transaction) -> impl Iterator<Item = &mut Job> {
        let jobs = self.jobs.iter_mut().rev();
        jobs.filter(move |job| job.transaction == transaction && !job.is_over())
    }

    /// query-jobs.
    pub fn list(&self) -> Vec<JobInfo> {
        let info = |job: &Job| JobInfo {
            id: job.id.clone(),
            kind: job.kind,
            status: job.status,
            current_progress: int(job.progress.done),
            total_progress: int(job.progress.total),
            error: job.error.clone(),
        };
        self.jobs.iter().map(info).collect()
    }

    /// query-block-jobs.
    pub fn list_block_jobs(&self) -> Vec<BlockJobInfo> {
        let info = |job: &Job| BlockJobInfo {
            kind: job.kind,
            device: job.id.clone(),
            len: int(job.progress.total),
            offset: int(job.progress.done),
            busy: matches!(job.status, JobStatus::Running),
            paused: job.is_user_paused || matches!(job.status, JobStatus::Paused | JobStatus::Standby),
            speed: int(job.speed),
            io_status: job.io_status,
            ready: job.progress.ready,
            status: job.status,
            auto_finalize: job.endings.auto_finalize,
            auto_dismiss: job.endings.auto_dismiss,
            error: job.error.clone(),
            actively_synced: (job.kind == JobType::Mirror).then_some(job.progress.actively_synced),
        };
        self.jobs.iter().filter(|job| job.is_block_job()).map(info).collect()
    }

    fn step(&mut self, id: &str, act: impl FnOnce(&mut Job, &mut Steps)) -> Steps {
        let mut steps = Steps::default();
        if let Some(job) = self.get_mut(id) {
            act(job, &mut steps);
        }
        self.jobs.retain(|job| job.status != JobStatus::Null);
        steps
    }
}

#[cfg(test)]
mod tests;
