//! Who may run: the vCPU threads wait here while they may not, and whoever stops them (the supervisor's `Pause`, the
//! guest's reset, a failed vCPU) does so here.
//!
//! A reason to stop that the supervisor must hear of is reported when the last vCPU has parked: the event says that no
//! guest instruction runs any more.

use crate::outbox::Outbox;
use crate::vcpu::run_page::Kick;
use ipc::vcpu::VcpuEvent;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Shared by the control thread, all vCPU threads and the devices that can stop the machine.
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    outbox: Outbox,
}

struct State {
    /// Whether the vCPUs may run.
    open: bool,
    /// One per vCPU, once its thread has arrived.
    kicks: Vec<Option<Kick>>,
    /// Threads that wait at the gate.
    parked: usize,
    /// Sent when all have parked.
    report: Option<VcpuEvent>,
    /// How often the guest has stopped the machine.
    stops: u64,
}

impl State {
    fn all_parked(&self) -> bool {
        self.parked == self.kicks.len()
    }

    fn stop_all(&mut self) {
        self.open = false;
        // A thread that has not arrived yet finds the gate closed.
        self.kicks.iter().flatten().for_each(Kick::stop);
    }
}

impl Gate {
    /// A closed gate for that many vCPUs.
    pub fn new(vcpus: usize, outbox: Outbox) -> Self {
        Self {
            state: Mutex::new(State {
                open: false,
                kicks: vec![None; vcpus],
                parked: 0,
                report: None,
                stops: 0,
            }),
            changed: Condvar::new(),
            outbox,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by the thread of vCPU `index` when it is outside the guest with nothing pending. Returns when it may enter.
    pub fn park(&self, index: usize, kick: Kick) {
        let mut state = self.lock();
        state.kicks[index] = Some(kick);
        state.parked += 1;
        if state.all_parked() {
            if let Some(event) = state.report.take() {
                self.outbox.send(event);
            }
            self.changed.notify_all();
        }
        while !state.open {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        // Under the lock: a stop that comes later sets it again.
        kick.allow();
    }

    /// Whether a thread that was interrupted may go back into the guest.
    pub fn is_open(&self) -> bool {
        self.lock().open
    }

    /// Lets all vCPUs run.
    pub fn open(&self) {
        self.lock().open = true;
        self.changed.notify_all();
    }

    /// Stops all vCPUs without waiting: for the thread of a vCPU, which is itself among them. The event is sent when the
    /// last has parked. The first report counts: a machine that is stopping anyway has nothing to add.
    pub fn stop_and_report(&self, event: VcpuEvent) {
        let mut state = self.lock();
        if state.report.is_none() {
            state.report = Some(event);
        }
        state.stops += 1;
        state.stop_all();
    }

    /// Stops all vCPUs and waits until they are parked: for the control thread.
    pub fn close_and_wait(&self) {
        let mut state = self.lock();
        state.stop_all();
        while !state.all_parked() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Does something while all vCPUs are parked, and lets them go on if they ran before and have not stopped the machine
    /// meanwhile: for the control thread.
    pub fn while_parked<T>(&self, action: impl FnOnce() -> T) -> T {
        let mut state = self.lock();
        let (was_open, stops) = (state.open, state.stops);
        state.stop_all();
        while !state.all_parked() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let result = action();
        if was_open && state.stops == stops {
            state.open = true;
            self.changed.notify_all();
        }
        result
    }

    /// Whether the gate is closed and every vCPU waits at it.
    pub fn is_parked(&self) -> bool {
        let state = self.lock();
        !state.open && state.all_parked()
    }

    /// The vCPU threads' ids, in vCPU order; those that have arrived.
    pub fn thread_ids(&self) -> Vec<i32> {
        self.lock().kicks.iter().flatten().map(Kick::thread_id).collect()
    }
}
