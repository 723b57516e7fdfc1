//! BLOCK_IO_ERROR, and what a failed request means for the machine.
//!
//! Clients get at most one a second for each device, with what happened last (reference: QEMU's rate limit of this event).

use super::{Vm, block_info, lifecycle};
use crate::helper::{Block, Helper};
use ipc::block::{ErrorAction, IoKind};
use ipc::block_info::IoStatus;
use ipc::graph::NodeId;
use ipc::qmp::{BlockErrorAction, Event, IoOperation, RunState};
use ipc::virtio::DeviceIndex;
use nix::errno::Errno;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// At least this long between two events of a device.
const INTERVAL: Duration = Duration::from_secs(1);

/// A failed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoError {
    /// The device.
    pub device: DeviceIndex,
    /// Its node.
    pub node: Option<NodeId>,
    /// What it was.
    pub kind: IoKind,
    /// What became of it.
    pub action: ErrorAction,
    /// Why it failed.
    pub errno: Errno,
}

/// What clients were told of each device.
#[derive(Default)]
pub struct IoErrors(RefCell<BTreeMap<DeviceIndex, Told>>);

#[derive(Default)]
struct Told {
    last: Option<Instant>,
    waiting: Option<(Instant, Event)>,
    status: Option<IoStatus>,
}

impl IoErrors {
    /// Takes an event; returns it if it may go at once.
    fn take(&self, device: DeviceIndex, event: Event, now: Instant) -> Option<Event> {
        let mut told = self.0.borrow_mut();
        let told = told.entry(device).or_default();
        let due = told.last.map_or(now, |last| last + INTERVAL);
        if due <= now && told.waiting.is_none() {
            told.last = Some(now);
            return Some(event);
        }
        told.waiting = Some((due, event));
        None
    }

    /// When the next event may go.
    pub fn due(&self) -> Option<Instant> {
        let told = self.0.borrow();
        told.values().filter_map(|told| Some(told.waiting.as_ref()?.0)).min()
    }

    /// The events that may go now; they count as sent.
    pub fn take_due(&self, now: Instant) -> Vec<Event> {
        let mut events = Vec::new();
        for told in self.0.borrow_mut().values_mut() {
            if let Some((_, event)) = told.waiting.take_if(|(due, _)| *due <= now) {
                told.last = Some(now);
                events.push(event);
            }
        }
        events
    }

    /// How a device's I/O is, as query-block shows it.
    pub fn status(&self, device: DeviceIndex) -> IoStatus {
        let told = self.0.borrow();
        told.get(&device).and_then(|told| told.status).unwrap_or(IoStatus::Ok)
    }

    fn set_status(&self, device: DeviceIndex, status: IoStatus) {
        self.0.borrow_mut().entry(device).or_default().status = Some(status);
    }

    /// The machine goes on: what failed is tried again.
    pub fn reset_status(&self) {
        self.0.borrow_mut().values_mut().for_each(|told| told.status = None);
    }
}

/// A request has failed.
pub fn failed(vm: &Rc<Vm>, block: &Helper<Block>, error: &IoError) {
    let IoError {
        device,
        node,
        kind,
        action,
        errno,
    } = *error;
    let (what, operation) = match kind {
        IoKind::Read => ("read", IoOperation::Read),
        IoKind::Write => ("write", IoOperation::Write),
        IoKind::Flush => ("flush", IoOperation::Write),
        IoKind::Unmap => ("discard", IoOperation::Write),
    };
    let action = match action {
        ErrorAction::Report => BlockErrorAction::Report,
        ErrorAction::Ignore => BlockErrorAction::Ignore,
        ErrorAction::Stop => BlockErrorAction::Stop,
    };
    block.remark(format_args!(
        "{}: a {what} failed: {}",
        vm.device_name(device),
        errno.desc()
    ));
    let (drive, node) = {
        let graph = vm.graph.borrow();
        let drive = graph.backend_of(device).map(|backend| backend.id.clone());
        let node = node.and_then(|node| graph.nodes.get(&node));
        (drive.unwrap_or_default(), node.map(|node| node.name.clone()))
    };
    let event = Event::BlockIoError {
        qom_path: block_info::qdev(vm, device).unwrap_or_default(),
        device: drive,
        node_name: node,
        operation,
        action,
        nospace: Some(errno == Errno::ENOSPC),
        reason: reason(errno).to_owned(),
    };
    if let Some(event) = vm.io_errors.take(device, event, Instant::now()) {
        vm.emit(event);
    }
    if action == BlockErrorAction::Stop {
        vm.io_errors.set_status(
            device,
            match errno {
                Errno::ENOSPC => IoStatus::Nospace,
                _ => IoStatus::Failed,
            },
        );
        vm.follow(block, stop(Rc::clone(vm)));
    }
}

/// As the C library says it, which clients look for.
pub fn reason(errno: Errno) -> &'static str {
    match errno {
        Errno::EIO => "Input/output error",
        errno => errno.desc(),
    }
}

/// The machine stops: an operator can make room, and has it tried again with cont.
async fn stop(vm: Rc<Vm>) {
    let _turn = vm.change.enter().await;
    if vm.state() == RunState::Running
        && let Err(error) = lifecycle::halt(&vm, RunState::IoError).await
    {
        vm.fail_unless_lost(error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_errors_in_a_second_the_first_and_the_last_are_told() {
        let errors = IoErrors::default();
        let now = Instant::now();
        let after = |ms: u64| now + Duration::from_millis(ms);
        let [one, other] = [DeviceIndex(1), DeviceIndex(2)];
        assert!(errors.take(one, Event::Stop, now).is_some());
        assert!(errors.take(one, Event::Stop, after(10)).is_none());
        assert!(errors.take(one, Event::Resume, after(20)).is_none());
        assert!(errors.take(other, Event::Stop, after(20)).is_some());
        assert_eq!(errors.due(), Some(after(1000)));
        assert_eq!(errors.take_due(after(999)), []);
        assert_eq!(errors.take_due(after(1000)), [Event::Resume]);
        assert_eq!(errors.due(), None);
        assert!(errors.take(one, Event::Stop, after(1500)).is_none());
        assert_eq!(errors.due(), Some(after(2000)));
    }
}
