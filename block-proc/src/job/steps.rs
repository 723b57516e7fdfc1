//! When the parts of a job's work begin.

use super::copier::{Copier, CopyError, Scanned};
use super::{Job, Kind, Phase};
use ipc::block::IoKind;
use ipc::block_job::JobOnError;
use std::ops::Range;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Most copies under way while the guest has requests.
pub(super) const COPIES_BESIDE_GUEST: usize = 2;
/// Size of a copy while the guest has requests, bytes.
pub(super) const CHUNK_BESIDE_GUEST: u64 = 256 << 10;
/// A limited job's copies are at most what it may do in this part of a second.
pub(super) const SLICES: u64 = 10;
/// Such a part of a second.
pub(super) const SLICE: Duration = Duration::from_millis(1000 / SLICES);
/// Longest time between two copies of a limited job.
const FOREVER: Duration = Duration::from_secs(1 << 30);

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

impl Step {
    pub(super) fn range(&self) -> Option<&Range<u64>> {
        match self {
            Self::Copy(range) => Some(range),
            Self::Scan(_) | Self::Flush => None,
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.range().map_or(0, |range| range.end - range.start)
    }
}

impl Job {
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
        let is_scanning = self.under_way.iter().any(|step| matches!(step, Step::Scan(_)));
        match self.phase {
            Phase::Scan(from) => {
                if !is_scanning {
                    steps.push(Step::Scan(from));
                }
                // A limited job has time: it knows how much there is before it begins.
                if self.speed == 0 {
                    let granularity = self.copier.left.borrow().granularity();
                    self.begin_copies(now, beside_guest, from - from % granularity, &mut steps);
                }
            }
            Phase::Flush if self.under_way.is_empty() => steps.push(Step::Flush),
            Phase::Copy => {
                self.begin_copies(now, beside_guest, u64::MAX, &mut steps);
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

    /// As many copies as there may be, of what lies before `end`.
    fn begin_copies(&mut self, now: Instant, beside_guest: bool, end: u64, steps: &mut Vec<Step>) {
        let most = match beside_guest {
            true => COPIES_BESIDE_GUEST.min(self.most_copies),
            false => self.most_copies,
        };
        while self.under_way.len() + steps.len() < most && self.next_at <= now {
            let Some(run) = self.pick(beside_guest, end, steps) else {
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

    /// The next run before `end` that is not being copied.
    fn pick(&mut self, beside_guest: bool, end: u64, begun: &[Step]) -> Option<Range<u64>> {
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
            let next = left.next(at, chunk).filter(|run| run.start < end);
            match next.map(|run| run.start..run.end.min(end)) {
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
