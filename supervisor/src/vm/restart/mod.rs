//! Another block-proc in the place of one that has ended: the guest sees a pause.
//!
//! 1. *Fence.* What the kernel still does for the dead one must be over before anybody writes again: each holds one end of
//!    a pair, in its process and in its rings, and when the other end hangs up nothing of it is left.
//! 2. *Spawn.* The next one is started and sealed meanwhile, as at the start.
//! 3. *Settle.* Whoever was changing the graph hears that block-proc is gone; what only changes the description succeeds
//!    ([`offline`]). Jobs fail.
//! 4. *Rebuild.* The nodes of the description are created anew, and what uses them ([`rebuild`]).
//! 5. *Replay.* Drivers' queues are taken up where the shared record says ([`ipc::inflight`]): what was taken and not
//!    answered is done again, in its order.
//!
//! A block-proc that ends again meanwhile begins this anew. After too many in a short time the machine stops, with the run
//! state `internal-error`, and can still be looked into.

pub mod offline;
mod rebuild;

use super::block_proc::Stage;
use super::loss::{self, Why};
use super::{Vm, devices, jobs, lifecycle};
use crate::config::RestartBudget;
use crate::helper::STORAGE_DEADLINE;
use crate::logging;
use ipc::Role;
use ipc::block::BlockRequest;
use ipc::info::HelperRestart;
use ipc::qmp::{Event, QmpError, RunState};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Instant;

/// The restarts so far.
#[derive(Debug, Default)]
pub struct Restarts {
    /// When the last ones were that were not asked for.
    recent: RefCell<VecDeque<Instant>>,
}

impl Restarts {
    /// Whether there may be one more now; counts it.
    fn take(&self, budget: RestartBudget, now: Instant) -> bool {
        let mut recent = self.recent.borrow_mut();
        while recent
            .front()
            .is_some_and(|then| now.duration_since(*then) >= budget.period)
        {
            recent.pop_front();
        }
        let may = recent.len() < budget.restarts;
        if may {
            recent.push_back(now);
        }
        may
    }
}

/// block-proc has ended without being told to.
pub fn lost(vm: &Rc<Vm>, why: &str) {
    vm.block.ended();
    super::exports::all_gone(vm);
    vm.give_up_live_dump("block-proc has ended, whose writes it would miss");
    match vm.block.stage() {
        Stage::Serving => {}
        // Whoever brings it up hears of it by itself.
        Stage::Lost | Stage::Rebuilding | Stage::GivenUp => return,
        Stage::Absent | Stage::Starting => {
            return vm.fail(format_args!("{why}: the disks are lost, the machine ends"));
        }
    }
    logging::line(format_args!("{why}: another one takes its place"));
    vm.block.set_stage(Stage::Lost);
    let why = why.to_owned();
    let task_vm = Rc::clone(vm);
    vm.executor.spawn(async move {
        let _ = bring_back(&task_vm, why, true).await;
    });
}

/// `bulkhead-restart-helper`: another block-proc in the place of this one, from the executable that is installed now.
///
/// # Errors
/// The error reply.
pub async fn planned(vm: &Rc<Vm>) -> Result<HelperRestart, QmpError> {
    let _turn = vm.change.enter().await;
    if vm.block.serving().await.is_none() {
        return Err(QmpError::generic("this machine has no block-proc"));
    };
    if let Some(id) = jobs::any(vm) {
        return Err(QmpError::generic(format!(
            "job '{id}' is at work in block-proc: wait for its end or cancel it"
        )));
    }
    lifecycle::hold_disks(vm)
        .await
        .map(drop)
        .map_err(|error| QmpError::generic(error.to_string()))?;
    super::bitmaps::store(vm).await;
    vm.block.set_stage(Stage::Lost);
    end_helper(vm).await;
    let why = "bulkhead-restart-helper".to_owned();
    let restart = bring_back(vm, why, false).await;
    let released = if vm.state() == RunState::Running {
        lifecycle::release_disks(vm).await
    } else {
        Ok(())
    };
    released.map_err(|error| QmpError::generic(error.to_string()))?;
    restart.ok_or_else(|| QmpError::generic("block-proc could not be started again: see the log"))
}

/// Brings another one up, however often it takes within the budget.
async fn bring_back(vm: &Rc<Vm>, mut why: String, counts: bool) -> Option<HelperRestart> {
    let begin = Instant::now();
    let mut counts = counts;
    loop {
        if vm.outcome.get().is_some() {
            return None;
        }
        if counts && !vm.restarts.take(vm.config.restart_budget, Instant::now()) {
            give_up(vm, &why).await;
            return None;
        }
        counts = true;
        let tried = bring_up_next(vm, begin).await;
        match tried {
            Ok(times) => {
                vm.counters.restarted(Role::Block);
                let restart = times.describe(vm, &why);
                logging::line(format_args!(
                    "block-proc (pid {}) serves after {} µs: fence {}, spawn {}, rebuild {}, replay {} (µs)",
                    restart.pid,
                    restart.pause_us,
                    restart.fence_us,
                    restart.spawn_us,
                    restart.rebuild_us,
                    restart.replay_us
                ));
                vm.emit(Event::BulkheadHelperRestarted(restart.clone()));
                return Some(restart);
            }
            Err(reason) => {
                logging::line(format_args!("block-proc could not take up its work: {reason}"));
                why = reason;
                vm.block.set_stage(Stage::Lost);
                end_helper(vm).await;
            }
        }
    }
}

/// The one that is there goes, if it has not gone yet.
async fn end_helper(vm: &Rc<Vm>) {
    let Some(helper) = vm.block.get() else { return };
    helper.end();
    std::future::poll_fn(|_| match helper.is_reaped() {
        true => std::task::Poll::Ready(()),
        false => std::task::Poll::Pending,
    })
    .await;
}

/// When each step was done.
struct Times {
    begin: Instant,
    fenced: Instant,
    spawned: Instant,
    settled: Instant,
    rebuilt: Instant,
    served: Instant,
}

impl Times {
    fn describe(&self, vm: &Vm, why: &str) -> HelperRestart {
        let us = |from: Instant, to: Instant| to.saturating_duration_since(from).as_micros() as u64;
        HelperRestart {
            role: Role::Block.name().to_owned(),
            pid: vm.block.get().map_or(0, |helper| i64::from(helper.pid)),
            reason: logging::printable(why.as_bytes()).to_string(),
            pause_us: us(self.begin, self.served),
            fence_us: us(self.begin, self.fenced),
            spawn_us: us(self.begin, self.spawned),
            rebuild_us: us(self.settled, self.rebuilt),
            replay_us: us(self.rebuilt, self.served),
        }
    }
}

async fn bring_up_next(vm: &Rc<Vm>, begin: Instant) -> Result<Times, String> {
    let fenced = Rc::new(Cell::new(None));
    let (task_vm, seen) = (Rc::clone(vm), Rc::clone(&fenced));
    vm.executor.spawn(async move {
        task_vm.block.fences_down().await;
        seen.set(Some(Instant::now()));
    });
    devices::start_block(vm).await?;
    let spawned = Instant::now();
    let fenced = std::future::poll_fn(|_| match fenced.get() {
        Some(then) => std::task::Poll::Ready(then),
        None => std::task::Poll::Pending,
    })
    .await;
    jobs::fail_all(vm, "block-proc has ended").await;
    let settled;
    let rebuilt = {
        let _turn = vm.graph_change.enter().await;
        settled = Instant::now();
        vm.block.set_stage(Stage::Rebuilding);
        rebuild::all(vm).await?;
        Instant::now()
    };
    // Nothing lies between: who stops the disks from now on asks the new one.
    vm.block.set_stage(Stage::Serving);
    if !lifecycle::disks_are_paused(vm)
        && let Some(block) = vm.block.get()
    {
        let resumed = block.ask_within(STORAGE_DEADLINE, BlockRequest::Resume).await;
        // If it has ended again, that begins another restart.
        resumed
            .map_err(|error| error.to_string())
            .or_else(|error| match vm.block.stage() {
                Stage::Serving => Err(error),
                _ => Ok(ipc::block::BlockReply::Done),
            })?;
    }
    Ok(Times {
        begin,
        fenced,
        spawned,
        settled,
        rebuilt,
        served: Instant::now(),
    })
}

/// It has ended too often: the machine stops, and whoever looks after it can still dump and inspect it.
async fn give_up(vm: &Rc<Vm>, why: &str) {
    let RestartBudget { restarts, period } = vm.config.restart_budget;
    logging::line(format_args!(
        "block-proc has been started again {restarts} times within {} s: the disks are lost, the machine stops ({why})",
        period.as_secs()
    ));
    end_helper(vm).await;
    vm.block.set_stage(Stage::GivenUp);
    vm.emit(Event::BulkheadHelperLost {
        role: Role::Block.name().to_owned(),
        reason: logging::printable(why.as_bytes()).to_string(),
    });
    // Who asked for a restart may have the machine's turn.
    vm.executor.spawn(loss::stop(Rc::clone(vm), Why::HelperLost));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_budget_counts_what_was_within_its_period() {
        let budget = RestartBudget {
            restarts: 2,
            period: Duration::from_secs(60),
        };
        let restarts = Restarts::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(restarts.take(budget, after(0)));
        assert!(restarts.take(budget, after(30)));
        assert!(!restarts.take(budget, after(59)));
        assert!(restarts.take(budget, after(60)));
        assert!(!restarts.take(budget, after(61)));
        assert!(restarts.take(budget, after(90)));
    }
}
