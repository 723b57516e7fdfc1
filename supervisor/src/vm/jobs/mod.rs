//! Jobs at work: what clients ask of them, what block-proc tells of them, and how they end.
//!
//! [`crate::jobs`] has their states; here is what is done. [`begin`] puts a job's filter in its place and has block-proc
//! begin; [`commit`], [`stream`], [`mirror`] and [`backup`] say what each kind of job is; [`end`] makes the changes of a job
//! that has succeeded and undoes what a failed one has done. New images are made by a job of another kind
//! ([`super::create`]), which has no part in block-proc.
//!
//! **Order.** Whoever ends jobs holds [`JobWork::turn`] first and the graph's turn second. Commands that begin jobs hold the
//! graph's turn only.

pub mod backup;
pub mod begin;
pub mod commit;
mod end;
pub mod mirror;
pub mod stream;
mod sync;
mod target;

use super::{Vm, graph, io_errors};
use crate::executor::Turnstile;
use crate::graph::error::GraphError;
use crate::helper::{Block, Helper};
use crate::jobs::state::Verb;
use crate::jobs::{JobError, Steps, Wish};
use crate::logging;
use ipc::block::IoKind;
use ipc::block_info::IoStatus;
use ipc::block_job::{JobControl, JobErrorAction, JobEvent, JobNumber, JobProgress};
use ipc::graph::{GraphReply, GraphRequest, NodeId};
use ipc::job::{BlockJobInfo, CopyMode, JobStatus, JobType};
use ipc::qmp::{BlockErrorAction, Event, IoOperation, QmpError};
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

pub use end::{fail_all, give_up_all, undo_beginning};

/// What may be told of jobs before it is known that they have begun: each tells of its end, and little before.
const MAX_EARLY: usize = 1024;

/// The jobs that block-proc works on.
#[derive(Default)]
pub struct JobWork {
    jobs: RefCell<BTreeMap<JobNumber, Rc<BlockJob>>>,
    /// What block-proc has told before the command that began the job was done.
    early: RefCell<Vec<(JobNumber, JobProgress, JobEvent)>>,
    next: Cell<u32>,
    /// One job ends at a time.
    turn: Turnstile,
}

/// A job that block-proc works on.
pub struct BlockJob {
    /// Its number.
    number: JobNumber,
    /// Its id.
    id: String,
    /// Its filter.
    filter: NodeId,
    /// What the filter filters: what users get back when the job fails.
    source: NodeId,
    /// What success changes.
    end: End,
    /// Nodes that it has made writable.
    made_writable: Vec<NodeId>,
    /// Its changes are made.
    is_done: Cell<bool>,
}

/// What a job's success changes.
pub enum End {
    /// Nothing: the target is complete.
    Backup,
    /// The images between are left out: what uses the filter uses `base`, and the images above name it.
    Commit {
        /// The lower image.
        base: NodeId,
        /// What the images above call it; its own name if nothing is said.
        backing_file: Option<String>,
    },
    /// The image goes over `base`, or over nothing, and names it.
    Stream {
        /// The image.
        top: NodeId,
        /// What stays below it.
        base: Option<NodeId>,
        /// What it calls it.
        backing_file: Option<String>,
    },
    /// What uses `from` uses `to`.
    Mirror {
        /// The filter, or the node that is replaced.
        from: NodeId,
        /// The target.
        to: NodeId,
        /// What goes below the target before.
        backing: Option<NodeId>,
    },
}

impl End {
    /// Whether block-proc has to bring the copy up to date before.
    fn settles(&self) -> bool {
        matches!(self, Self::Mirror { .. })
    }
}

/// The id of a job that block-proc works on, if there is one.
pub fn any(vm: &Vm) -> Option<String> {
    let jobs = vm.job_work.jobs.borrow();
    jobs.values().next().map(|job| job.id.clone())
}

impl JobWork {
    fn of_id(&self, id: &str) -> Option<Rc<BlockJob>> {
        self.jobs.borrow().values().find(|job| job.id == id).cloned()
    }
}

/// Tells clients of a job's steps.
pub fn announce(vm: &Vm, Steps(events): Steps) {
    events.into_iter().for_each(|event| vm.emit(event));
}

/// block-proc has told something of a job.
pub fn told(vm: &Rc<Vm>, block: &Helper<Block>, number: JobNumber, progress: JobProgress, mut what: JobEvent) {
    if let JobEvent::Ended(Err(failure)) = &mut what {
        failure.message = logging::brief(&failure.message);
    }
    let Some(job) = vm.job_work.jobs.borrow().get(&number).cloned() else {
        let mut early = vm.job_work.early.borrow_mut();
        if early.len() < MAX_EARLY {
            early.push((number, progress, what));
        } else {
            block.kill("it tells of jobs that there are none");
        }
        return;
    };
    let task_vm = Rc::clone(vm);
    vm.follow(block, async move { happened(&task_vm, &job, progress, what).await });
}

async fn happened(vm: &Rc<Vm>, job: &BlockJob, progress: JobProgress, what: JobEvent) {
    let _turn = vm.job_work.turn.enter().await;
    let id = &job.id;
    // It may have been cancelled while this waited; another job may have its id by now.
    let is_at_work = vm.job_work.jobs.borrow().contains_key(&job.number);
    if !is_at_work || job.is_done.get() {
        return;
    }
    vm.jobs.borrow_mut().set_progress(id, progress.done, progress.total);
    let is_cancelled = vm.jobs.borrow().get(id).is_some_and(|job| job.wish == Wish::Cancel);
    match what {
        JobEvent::Ended(Ok(())) if is_cancelled => end::abort(vm, id, None).await,
        JobEvent::Ready => {
            let steps = vm.jobs.borrow_mut().ready(id);
            announce(vm, steps);
        }
        JobEvent::Error { kind, action, errno } => failed_request(vm, id, kind, action, Errno::from_raw(errno)),
        JobEvent::Ended(Ok(())) => end::worked(vm, id).await,
        JobEvent::Ended(Err(failure)) => {
            let error = match failure.errno {
                Some(errno) => io_errors::reason(Errno::from_raw(errno)).to_owned(),
                None => logging::printable(failure.message.as_bytes()).to_string(),
            };
            end::abort(vm, id, Some(error)).await;
        }
    }
}

/// The host has failed one of a job's requests.
fn failed_request(vm: &Vm, id: &str, kind: IoKind, action: JobErrorAction, errno: Errno) {
    vm.emit(Event::BlockJobError {
        device: id.to_owned(),
        operation: match kind {
            IoKind::Read => IoOperation::Read,
            IoKind::Write | IoKind::Flush | IoKind::Unmap => IoOperation::Write,
        },
        action: match action {
            JobErrorAction::Report => BlockErrorAction::Report,
            JobErrorAction::Ignore => BlockErrorAction::Ignore,
            JobErrorAction::Stop => BlockErrorAction::Stop,
        },
    });
    logging::line(format_args!("job {id}: a request failed: {}", errno.desc()));
    if action == JobErrorAction::Stop {
        let mut jobs = vm.jobs.borrow_mut();
        if let Some(job) = jobs.get_mut(id) {
            // For its client it is paused, and goes on with job-resume.
            job.is_user_paused = true;
            job.io_status = match errno {
                Errno::ENOSPC => IoStatus::Nospace,
                _ => IoStatus::Failed,
            };
        }
        let steps = jobs.rest(id);
        drop(jobs);
        announce(vm, steps);
    }
}

/// Work outside block-proc is over.
pub async fn done_outside(vm: &Rc<Vm>, id: &str, result: Result<(), String>) {
    let _turn = vm.job_work.turn.enter().await;
    let wish = vm.jobs.borrow().get(id).map(|job| job.wish);
    match result {
        Ok(()) if wish == Some(Wish::Cancel) => end::abort(vm, id, None).await,
        Ok(()) => end::worked(vm, id).await,
        Err(error) => end::abort(vm, id, Some(error)).await,
    }
}

/// Asks block-proc about a job; it may be gone by then.
async fn control(vm: &Vm, id: &str, control: JobControl) -> Result<(), GraphError> {
    let Some(job) = vm.job_work.of_id(id) else {
        return Ok(());
    };
    let job = job.number;
    graph::ask(vm, GraphRequest::ControlJob { job, control })
        .await
        .map(drop)
}

/// job-pause: returns when it has been asked for; the job's state says when none of its requests is in flight.
///
/// # Errors
/// The error reply.
pub fn pause(vm: &Rc<Vm>, id: &str) -> Result<(), QmpError> {
    {
        let mut jobs = vm.jobs.borrow_mut();
        let job = jobs.ask(id, Verb::Pause)?;
        if job.is_user_paused {
            return Err(JobError::IsPaused.into());
        }
        job.is_user_paused = true;
    }
    let (task_vm, id) = (Rc::clone(vm), id.to_owned());
    vm.executor.spawn(async move {
        if let Err(error) = control(&task_vm, &id, JobControl::Pause).await {
            logging::line(format_args!("job {id}: {error}"));
        }
        let steps = {
            let mut jobs = task_vm.jobs.borrow_mut();
            match jobs.get(&id).is_some_and(|job| job.is_user_paused) {
                true => jobs.rest(&id),
                false => Steps::default(),
            }
        };
        announce(&task_vm, steps);
    });
    Ok(())
}

/// job-resume.
///
/// # Errors
/// The error reply.
pub async fn resume(vm: &Rc<Vm>, id: &str) -> Result<(), QmpError> {
    {
        let mut jobs = vm.jobs.borrow_mut();
        // QEMU's order: one that is not paused is told so whatever its state.
        if jobs.get(id).is_some_and(|job| !job.is_user_paused) {
            return Err(JobError::NotPaused.into());
        }
        jobs.ask(id, Verb::Resume)?.is_user_paused = false;
    }
    let steps = vm.jobs.borrow_mut().wake(id);
    announce(vm, steps);
    control(vm, id, JobControl::Resume).await?;
    go_on_with_wish(vm, id);
    Ok(())
}

/// block-job-set-speed.
///
/// # Errors
/// The error reply.
pub async fn set_speed(vm: &Vm, id: &str, speed: i64) -> Result<(), QmpError> {
    let speed = vm.jobs.borrow_mut().set_speed(id, speed)?;
    Ok(control(vm, id, JobControl::SetSpeed(speed)).await?)
}

/// job-complete: returns when the end has been asked for.
///
/// # Errors
/// The error reply.
pub fn complete(vm: &Rc<Vm>, id: &str) -> Result<(), QmpError> {
    {
        let mut jobs = vm.jobs.borrow_mut();
        let job = jobs.ask(id, Verb::Complete)?;
        if job.wish != Wish::None {
            return Err(JobError::NotCompletable(id.to_owned()).into());
        }
        job.wish = Wish::Complete;
    }
    go_on_with_wish(vm, id);
    Ok(())
}

/// A mirror that is ready and is to end does so; one that is paused waits until it goes on.
fn go_on_with_wish(vm: &Rc<Vm>, id: &str) {
    let wished = {
        let jobs = vm.jobs.borrow();
        let job = jobs.get(id);
        job.is_some_and(|job| {
            matches!(job.wish, Wish::Complete | Wish::Leave) && job.status() == JobStatus::Ready && !job.is_user_paused
        })
    };
    if wished {
        let (task_vm, id) = (Rc::clone(vm), id.to_owned());
        vm.executor.spawn(async move {
            let _turn = task_vm.job_work.turn.enter().await;
            let is_ready = task_vm.jobs.borrow().get(&id).map(crate::jobs::Job::status) == Some(JobStatus::Ready);
            if is_ready {
                end::worked(&task_vm, &id).await;
            }
        });
    }
}

/// job-cancel, and with `force` the older command: returns when the end has been asked for. Without force, a mirror that is
/// ready ends as a copy of this moment.
///
/// # Errors
/// The error reply.
pub fn cancel(vm: &Rc<Vm>, id: &str, force: bool) -> Result<(), QmpError> {
    {
        let mut jobs = vm.jobs.borrow_mut();
        let job = jobs.ask(id, Verb::Cancel)?;
        if !force && job.is_user_paused {
            return Err(JobError::PausedByUser(id.to_owned()).into());
        }
        if !force && job.status() == JobStatus::Ready {
            if job.wish == Wish::None {
                job.wish = Wish::Leave;
            }
        } else {
            job.wish = Wish::Cancel;
        }
    }
    go_on_with_wish(vm, id);
    let is_at_work_alone = {
        let jobs = vm.jobs.borrow();
        jobs.get(id).is_none_or(|job| {
            job.wish != Wish::Cancel || (job.kind() == JobType::Create && job.status() == JobStatus::Running)
        })
    };
    // Work that is under way outside block-proc ends by itself; its result does not count any more.
    if !is_at_work_alone {
        let (task_vm, id) = (Rc::clone(vm), id.to_owned());
        let transaction = |vm: &Vm, id: &str| vm.jobs.borrow().get(id).map(crate::jobs::Job::transaction);
        let meant = transaction(vm, &id);
        vm.executor.spawn(async move {
            let _turn = task_vm.job_work.turn.enter().await;
            // It may have ended while this waited, and another one have its id.
            if transaction(&task_vm, &id) == meant {
                end::abort(&task_vm, &id, None).await;
            }
        });
    }
    Ok(())
}

/// job-finalize: returns when the changes are made.
///
/// # Errors
/// The error reply.
pub async fn finalize(vm: &Rc<Vm>, id: &str) -> Result<(), QmpError> {
    let check = || -> Result<_, JobError> { Ok(vm.jobs.borrow_mut().ask(id, Verb::Finalize)?.transaction()) };
    check()?;
    let _turn = vm.job_work.turn.enter().await;
    let transaction = check()?;
    end::finalize(vm, transaction).await;
    Ok(())
}

/// job-dismiss.
///
/// # Errors
/// The error reply.
pub fn dismiss(vm: &Vm, id: &str) -> Result<(), QmpError> {
    let steps = vm.jobs.borrow_mut().dismiss(id)?;
    announce(vm, steps);
    Ok(())
}

/// block-job-change.
///
/// # Errors
/// The error reply.
pub async fn change(vm: &Vm, id: &str, kind: JobType, copy_mode: Option<CopyMode>) -> Result<(), QmpError> {
    {
        let mut jobs = vm.jobs.borrow_mut();
        let job = jobs.ask(id, Verb::Change)?;
        if job.kind() != kind {
            return Err(JobError::OtherKind(id.to_owned(), job.kind().name(), kind.name()).into());
        }
        match (kind, copy_mode) {
            (JobType::Mirror, Some(CopyMode::WriteBlocking)) => {}
            (JobType::Mirror, _) => return Err(JobError::OneWay.into()),
            _ => return Err(JobError::NoWork(id.to_owned()).into()),
        }
    }
    Ok(control(vm, id, JobControl::WriteBlocking).await?)
}

/// query-block-jobs, query-jobs: as far as block-proc is at this moment.
pub async fn refresh(vm: &Vm) {
    if vm.job_work.jobs.borrow().is_empty() {
        return;
    }
    // What it said last stays where it says nothing.
    let Ok(GraphReply::Jobs(reports)) = graph::ask(vm, GraphRequest::ReportJobs).await else {
        return;
    };
    for (number, progress) in reports {
        if let Some(job) = vm.job_work.jobs.borrow().get(&number) {
            let mut jobs = vm.jobs.borrow_mut();
            jobs.set_progress(&job.id, progress.done, progress.total);
            if let Some(job) = jobs.get_mut(&job.id) {
                job.progress.actively_synced = progress.actively_synced;
            }
        }
    }
}

/// query-block-jobs.
pub async fn list(vm: &Vm) -> Vec<BlockJobInfo> {
    refresh(vm).await;
    vm.jobs.borrow().list_block_jobs()
}
