//! The jobs of this thread: their steps are tasks beside the guest's requests.

use super::{Finished, IoThread};
use crate::job::copier::Copier;
use crate::job::{Job, Step, Stepped, begin};
use ipc::Failure;
use ipc::block::BlockReply;
use ipc::block_job::{JobControl, JobNumber, JobProgress, JobSpec, JobWork, Switch};
use ipc::graph::GraphReply;
use ipc::message::RequestId;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A guest that has had a request so short a time ago will have the next before a large copy has ended.
const GUEST_PAUSES: Duration = Duration::from_millis(5);

/// So much is copied while the guest waits.
const NEAR_BYTES: u64 = 16 << 20;

impl IoThread {
    /// Lets every job begin what it can. Returns how long there is nothing more to begin.
    pub(super) fn advance_jobs(&mut self) -> Option<Duration> {
        if self.jobs.is_empty() || self.graph.is_changing() {
            return None;
        }
        let now = Instant::now();
        // What is not copied while mirrors come near to their sources, the guest has to wait for.
        let approaching = self.graph.approaching();
        let has_guest = self.guest_tasks > 0 || self.guest_seen.is_some_and(|seen| now < seen + GUEST_PAUSES);
        let beside_guest = has_guest && approaching.is_none();
        let mut again: Option<Instant> = approaching;
        let mut begun = Vec::new();
        for job in self.jobs.values_mut() {
            let (steps, later) = job.next_steps(now, beside_guest);
            again = again.into_iter().chain(later).min();
            let (copier, is_mirror) = job.parts();
            begun.extend(
                steps
                    .into_iter()
                    .map(|step| (job.number(), copier.clone(), is_mirror, step)),
            );
        }
        let any = !begun.is_empty();
        for (number, copier, is_mirror, step) in begun {
            self.node_tasks += 1;
            self.executor.spawn(async move {
                let result = Job::run(copier, is_mirror, step.clone()).await;
                Finished::Job(number, step, result)
            });
        }
        self.tell_of_jobs();
        if any {
            // The tasks have yet to run for the first time.
            return Some(Duration::ZERO);
        }
        again.map(|again| again.saturating_duration_since(now))
    }

    /// A step has ended.
    pub(super) fn job_stepped(&mut self, number: JobNumber, step: &Step, result: Stepped, now: Instant) {
        if let Some(job) = self.jobs.get_mut(&number) {
            job.stepped(step, result, now);
        }
        self.tell_of_jobs();
    }

    /// Tells what there is to tell, and answers what can be answered.
    fn tell_of_jobs(&mut self) {
        let mut answers = Vec::new();
        let mut gone = Vec::new();
        for (number, job) in &mut self.jobs {
            let events = job.take_events();
            answers.extend(job.take_answerable());
            if job.is_gone() {
                // Nothing more is said of it.
                gone.push(*number);
            } else {
                events
                    .into_iter()
                    .for_each(|event| self.outgoing.put(ipc::message::FromHelper::Event(event)));
            }
        }
        for number in gone {
            let users = self.jobs.remove(&number).map(Job::let_go);
            for user in users.into_iter().flatten() {
                self.graph.graph.detach(user);
            }
        }
        for id in answers {
            self.reply(id, Ok(BlockReply::Graph(GraphReply::Done)));
        }
    }

    /// Does what is asked of a job. The answer, if there is one already.
    pub(super) fn control_job(
        &mut self,
        id: RequestId,
        number: JobNumber,
        control: JobControl,
    ) -> Result<Option<GraphReply>, Failure> {
        let now = Instant::now();
        let job = self.jobs.get_mut(&number);
        let job = job.ok_or_else(|| Failure::new(format!("there is no job {}", number.0)))?;
        match control {
            JobControl::Pause => job.pause(id),
            JobControl::End { success } => job.end(id, success),
            JobControl::Resume => job.resume(now),
            JobControl::SetSpeed(speed) => job.set_speed(speed, now),
            JobControl::WriteBlocking => job.write_blocking()?,
        }
        match control {
            JobControl::Pause | JobControl::End { .. } => {
                self.tell_of_jobs();
                Ok(None)
            }
            _ => Ok(Some(GraphReply::Done)),
        }
    }

    /// How far all jobs are.
    pub(super) fn report_jobs(&self) -> BTreeMap<JobNumber, JobProgress> {
        self.jobs
            .iter()
            .map(|(number, job)| (*number, job.progress()))
            .collect()
    }

    /// Whether jobs can begin.
    pub(super) fn check_jobs(&self, switch: &Switch) -> Result<(), Failure> {
        let mut filters = BTreeSet::new();
        let mut numbers = BTreeSet::new();
        for spec in &switch.start {
            if self.jobs.contains_key(&spec.job) || !numbers.insert(spec.job) {
                return Err(Failure::new(format!("job {} exists already", spec.job.0)));
            }
            if let JobWork::Mirror { filter, .. } | JobWork::Backup { filter, .. } = &spec.work
                && !filters.insert(*filter)
            {
                return Err(Failure::new("two jobs begin with one filter"));
            }
            begin::check(&self.graph.graph, spec, switch)?;
        }
        Ok(())
    }

    /// What brings mirrors up to date.
    pub(super) fn settling(&self, numbers: &[JobNumber]) -> Result<Vec<Rc<Copier>>, Failure> {
        let settling = |number: &JobNumber| {
            let job = self.jobs.get(number);
            job.ok_or_else(|| Failure::new(format!("there is no job {}", number.0)))?
                .settling()
        };
        numbers.iter().map(settling).collect()
    }

    /// Whether no more is left of mirrors than the guest can wait for.
    pub(super) fn are_near(&self, numbers: &[JobNumber]) -> bool {
        let jobs = numbers.iter().filter_map(|number| self.jobs.get(number));
        jobs.map(Job::left_bytes).sum::<u64>() <= NEAR_BYTES
    }

    /// They are up to date.
    pub(super) fn settled(&mut self, numbers: &[JobNumber]) {
        for number in numbers {
            self.jobs.get_mut(number).into_iter().for_each(Job::settled);
        }
    }

    /// Begins jobs that were checked.
    pub(super) fn begin_jobs(&mut self, start: &[JobSpec]) -> Result<(), Failure> {
        let now = Instant::now();
        for spec in start {
            let job = begin::begin(&mut self.graph.graph, spec, now)?;
            self.jobs.insert(spec.job, job);
        }
        Ok(())
    }
}
