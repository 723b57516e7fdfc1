//! The jobs of this thread: each turn lets them begin what they want to do, as tasks beside the guest's.

use super::{Finished, IoThread};
use crate::job::{Done, Job};
use ipc::Failure;
use ipc::block::BlockEvent;
use ipc::block_job::{JobControl, JobEvent, JobNumber, JobProgress};
use ipc::graph::GraphReply;
use ipc::message::{FromHelper, RequestId};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long jobs give way after a request of the guest's.
const GUEST_FOR: Duration = Duration::from_millis(2);

/// See the module.
#[derive(Default)]
pub(super) struct Jobs {
    running: BTreeMap<JobNumber, Running>,
    /// When the guest had a request last.
    guest_at: Option<Instant>,
}

struct Running {
    job: Job,
    /// Requests to be answered when nothing of it is in flight.
    waiting: Vec<RequestId>,
    /// It is forgotten then.
    ends: bool,
}

impl Jobs {
    /// A job.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn job(&mut self, number: JobNumber) -> Result<&mut Job, Failure> {
        match self.running.get_mut(&number) {
            Some(Running { job, ends: false, .. }) => Ok(job),
            _ => Err(Failure::new(format!("there is no job {}", number.0))),
        }
    }

    /// A job begins.
    pub(super) fn add(&mut self, job: Job) {
        let running = Running {
            waiting: Vec::new(),
            ends: false,
            job,
        };
        self.running.insert(running.job.number, running);
    }

    /// Whether there is one with this number.
    pub(super) fn contains(&self, number: JobNumber) -> bool {
        self.running.contains_key(&number)
    }

    /// The guest has a request.
    pub(super) fn guest_has_requests(&mut self, now: Instant) {
        self.guest_at = Some(now);
    }

    /// How far all are.
    pub(super) fn report(&self) -> BTreeMap<JobNumber, JobProgress> {
        let running = self.running.values().filter(|running| !running.ends);
        running
            .map(|running| (running.job.number, running.job.progress()))
            .collect()
    }
}

impl IoThread {
    /// Lets jobs begin what they want to do. Returns whether anything was, and when there may be something again.
    pub(super) fn advance_jobs(&mut self) -> (bool, Option<Instant>) {
        if self.jobs.running.is_empty() {
            return (false, None);
        }
        self.tell_ends();
        if self.graph.is_changing() {
            return (false, None);
        }
        let now = Instant::now();
        let mut any = false;
        let mut wake_at: Option<Instant> = None;
        let mut told = Vec::new();
        let gives_way = self.devices.values().any(|device| device.in_flight() > 0)
            || self.jobs.guest_at.is_some_and(|at| now.duration_since(at) < GUEST_FOR);
        for (number, Running { job, .. }) in &mut self.jobs.running {
            let mut events = Vec::new();
            while let Some(work) = job.next(now, gives_way, &mut events) {
                any = true;
                self.node_tasks += 1;
                let number = *number;
                self.executor.spawn(async move {
                    Finished::Job {
                        number,
                        done: Box::new(work.await),
                    }
                });
            }
            wake_at = wake_at.into_iter().chain(job.wake_at(now)).min();
            told.extend(events.into_iter().map(|event| (*number, event)));
        }
        any |= !told.is_empty();
        told.into_iter().for_each(|(number, event)| self.tell(number, event));
        (any, wake_at)
    }

    /// A task of a job has ended.
    pub(super) fn job_finished(&mut self, number: JobNumber, done: Done) {
        let Some(Running { job, .. }) = self.jobs.running.get_mut(&number) else {
            return;
        };
        let mut events = Vec::new();
        job.finished(done, Instant::now(), &mut events);
        events.into_iter().for_each(|event| self.tell(number, event));
    }

    /// Does what is asked of a job, or begins to. The answer, if there is one already.
    pub(super) fn control_job(
        &mut self,
        id: RequestId,
        number: JobNumber,
        control: JobControl,
    ) -> Result<Option<GraphReply>, Failure> {
        let job = self.jobs.job(number)?;
        let ends = match control {
            JobControl::Resume => {
                job.resume();
                return Ok(Some(GraphReply::Done));
            }
            JobControl::SetSpeed(speed) => {
                job.set_speed(speed, Instant::now());
                return Ok(Some(GraphReply::Done));
            }
            JobControl::WriteBlocking => {
                job.set_write_blocking()?;
                return Ok(Some(GraphReply::Done));
            }
            JobControl::Pause => {
                job.pause();
                false
            }
            JobControl::End { success } => {
                job.unhook(success);
                true
            }
        };
        if let Some(running) = self.jobs.running.get_mut(&number) {
            running.ends |= ends;
            running.waiting.push(id);
        }
        Ok(None)
    }

    /// Answers and tells what had to wait until nothing of a job is in flight.
    fn tell_ends(&mut self) {
        let mut answers = Vec::new();
        let mut told = Vec::new();
        let mut gone = Vec::new();
        for (number, running) in &mut self.jobs.running {
            let Running { job, waiting, ends } = running;
            told.extend(job.take_end().map(|result| (*number, JobEvent::Ended(result))));
            if job.is_busy() || (*ends && !job.is_left_alone()) {
                continue;
            }
            answers.append(waiting);
            if *ends {
                gone.push(*number);
            }
        }
        for number in gone {
            self.jobs.running.remove(&number);
            self.graph.forget_job(number);
        }
        told.into_iter().for_each(|(number, event)| self.tell(number, event));
        for id in answers {
            self.reply_graph(id, Ok(GraphReply::Done));
        }
    }

    fn tell(&mut self, number: JobNumber, what: JobEvent) {
        let Some(running) = self.jobs.running.get(&number) else {
            return;
        };
        if !running.ends {
            self.outgoing.put(FromHelper::Event(BlockEvent::Job {
                job: number,
                progress: running.job.progress(),
                what,
            }));
        }
    }
}
