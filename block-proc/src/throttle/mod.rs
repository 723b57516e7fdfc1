//! Throttling: groups of limits, and the members (devices, throttle nodes) that obey them.
//!
//! A group's buckets are shared by members in all threads. Its members in one thread take turns, one request each; a member's
//! own requests keep their order. The head of the line tries, sleeps, and tries again, at least every [`LONGEST_SLEEP`]: so
//! changed limits are seen soon, and nothing that another thread does can make it sleep for ever.

pub mod bucket;

use crate::executor::timer::Timers;
use crate::node::qcow2::locks::Mutex as Turn;
use bucket::{Buckets, Direction};
use ipc::Failure;
use ipc::graph::{GroupId, ThrottleLimits};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The head of a line looks again after this long at the latest.
const LONGEST_SLEEP: Duration = Duration::from_millis(20);

/// The limits of all groups, for all threads.
pub struct Groups {
    groups: Mutex<BTreeMap<GroupId, Arc<Mutex<Buckets>>>>,
    /// What the buckets' times count from.
    start: Instant,
}

impl Default for Groups {
    fn default() -> Self {
        Self {
            groups: Mutex::default(),
            start: Instant::now(),
        }
    }
}

impl Groups {
    /// Creates a group, or changes its limits.
    pub fn set(&self, group: GroupId, limits: &ThrottleLimits) {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let buckets = groups.entry(group).or_default();
        buckets.lock().unwrap_or_else(PoisonError::into_inner).set(limits);
    }

    /// Forgets a group. Members that it still has go on by its limits.
    pub fn remove(&self, group: GroupId) {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.remove(&group);
    }

    fn buckets(&self, group: GroupId) -> Option<Arc<Mutex<Buckets>>> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.get(&group).cloned()
    }
}

/// The lines of one group in one thread: one for each direction.
#[derive(Default)]
struct Lines {
    read: Turn,
    write: Turn,
}

impl Lines {
    fn of(&self, direction: Direction) -> &Turn {
        match direction {
            Direction::Read => &self.read,
            Direction::Write => &self.write,
        }
    }
}

/// What a thread has of throttling.
pub struct Throttling {
    groups: Arc<Groups>,
    timers: Rc<Timers>,
    lines: RefCell<BTreeMap<GroupId, Rc<Lines>>>,
    /// Requests under way are being waited for: nothing is held back.
    is_draining: Cell<bool>,
}

impl Throttling {
    /// For a thread.
    pub fn new(groups: Arc<Groups>, timers: Rc<Timers>) -> Rc<Self> {
        Rc::new(Self {
            groups,
            timers,
            lines: RefCell::default(),
            is_draining: Cell::new(false),
        })
    }

    /// See [`Groups::set`].
    pub fn set_group(&self, group: GroupId, limits: &ThrottleLimits) {
        self.groups.set(group, limits);
    }

    /// See [`Groups::remove`].
    pub fn remove_group(&self, group: GroupId) {
        self.groups.remove(group);
        self.lines.borrow_mut().remove(&group);
    }

    /// Whether requests are let through whatever the limits say, because somebody waits until there are none.
    pub fn set_draining(&self, is_draining: bool) {
        self.is_draining.set(is_draining);
    }

    /// A new member of a group.
    ///
    /// # Errors
    /// When there is no such group.
    pub fn join(self: &Rc<Self>, group: GroupId) -> Result<Rc<Member>, Failure> {
        let buckets = self.groups.buckets(group);
        let buckets = buckets.ok_or_else(|| Failure::new(format!("there is no throttle group {}", group.0)))?;
        let group_lines = self.lines.borrow_mut().entry(group).or_default().clone();
        Ok(Rc::new(Member {
            throttling: self.clone(),
            group,
            buckets,
            group_lines,
            own_lines: Lines::default(),
        }))
    }
}

/// A device or a node whose requests a group limits.
pub struct Member {
    throttling: Rc<Throttling>,
    group: GroupId,
    buckets: Arc<Mutex<Buckets>>,
    group_lines: Rc<Lines>,
    own_lines: Lines,
}

impl Member {
    /// The group.
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// Waits until a request may begin.
    pub async fn pass(&self, direction: Direction, bytes: u64) {
        if !self.lock().is_limited() {
            return;
        }
        // Only one request of a member stands in the group's line: so members take turns.
        let _own = self.own_lines.of(direction).lock().await;
        let _turn = self.group_lines.of(direction).lock().await;
        loop {
            let now = Instant::now();
            let since_start = now.duration_since(self.throttling.groups.start).as_nanos() as u64;
            let Err(wait) = self.lock().take(since_start, direction, bytes) else {
                return;
            };
            if self.throttling.is_draining.get() {
                return;
            }
            let sleep = Duration::from_nanos(wait).min(LONGEST_SLEEP);
            self.throttling.timers.sleep_until(now + sleep).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Executor;
    use ipc::graph::Limit;

    fn groups(iops: u64) -> Arc<Groups> {
        let groups = Arc::new(Groups::default());
        groups.set(GroupId(1), &limits(iops));
        groups
    }

    fn limits(iops: u64) -> ThrottleLimits {
        ThrottleLimits {
            iops_total: Limit {
                average: iops,
                max: 0,
                length: 1,
            },
            ..Default::default()
        }
    }

    /// Runs tasks until a time; what they ended with.
    fn run(executor: &mut Executor<usize>, timers: &Timers, until: Instant) -> Vec<usize> {
        let mut ended = Vec::new();
        while Instant::now() < until {
            executor.run(&mut ended);
            let Some(idle) = timers.idle_for() else { break };
            std::thread::sleep(idle.min(until.saturating_duration_since(Instant::now())));
            timers.wake();
        }
        ended
    }

    #[test]
    fn members_take_turns_however_many_requests_each_has() {
        let timers = Rc::new(Timers::default());
        let throttling = Throttling::new(groups(1000), timers.clone());
        let mut executor = Executor::default();
        let greedy = throttling.join(GroupId(1)).unwrap();
        let modest = throttling.join(GroupId(1)).unwrap();
        for _ in 0..400 {
            let member = greedy.clone();
            executor.spawn(async move {
                member.pass(Direction::Read, 512).await;
                0
            });
        }
        for _ in 0..100 {
            let member = modest.clone();
            executor.spawn(async move {
                member.pass(Direction::Read, 512).await;
                1
            });
        }
        let ended = run(&mut executor, &timers, Instant::now() + Duration::from_secs(20));
        assert_eq!(ended.len(), 500);
        // From its first to its last request, the modest one has every second turn.
        let first = ended.iter().position(|who| *who == 1).unwrap();
        let last = ended.iter().rposition(|who| *who == 1).unwrap();
        assert!(last - first < 250, "{first} to {last}");
    }

    #[test]
    fn changed_limits_are_seen_by_those_who_wait() {
        let timers = Rc::new(Timers::default());
        let groups = groups(1);
        let throttling = Throttling::new(groups.clone(), timers.clone());
        let member = throttling.join(GroupId(1)).unwrap();
        let mut executor = Executor::default();
        for number in 0..50 {
            let member = member.clone();
            executor.spawn(async move {
                member.pass(Direction::Write, 512).await;
                number
            });
        }
        let first = run(&mut executor, &timers, Instant::now() + Duration::from_millis(50));
        assert!(first.len() < 5, "{first:?}");
        groups.set(GroupId(1), &ThrottleLimits::default());
        let rest = run(&mut executor, &timers, Instant::now() + Duration::from_secs(20));
        assert_eq!(first.len() + rest.len(), 50);
        // In their order.
        assert!(first.iter().chain(&rest).is_sorted());
    }

    #[test]
    fn a_drain_lets_everybody_through() {
        let timers = Rc::new(Timers::default());
        let throttling = Throttling::new(groups(1), timers.clone());
        let member = throttling.join(GroupId(1)).unwrap();
        let mut executor = Executor::default();
        for number in 0..20 {
            let member = member.clone();
            executor.spawn(async move {
                member.pass(Direction::Read, 512).await;
                number
            });
        }
        throttling.set_draining(true);
        assert_eq!(
            run(&mut executor, &timers, Instant::now() + Duration::from_secs(20)).len(),
            20
        );
        assert!(throttling.join(GroupId(2)).is_err());
    }
}
