//! What the process wants to tell the supervisor by itself: vCPU and device threads put events in, the control thread
//! sends them. No thread but the control thread touches the channel.

use ipc::vcpu::VcpuEvent;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Every source has at most a few events open at a time (a device waits for the answer before it reports again), so
/// this is never reached by devices that keep to that.
const MAX_EVENTS: usize = 256;

/// A bounded queue with a wake-up. Clones share it.
#[derive(Clone)]
pub struct Outbox {
    shared: Arc<Shared>,
}

struct Shared {
    events: Mutex<VecDeque<VcpuEvent>>,
    wake: EventFd,
    /// Whether a loss was logged: the log is bounded as well.
    lost: AtomicBool,
}

impl Outbox {
    /// An empty outbox.
    ///
    /// # Errors
    /// When the process has no free fd.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                events: Mutex::new(VecDeque::new()),
                wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
                lost: AtomicBool::new(false),
            }),
        })
    }

    /// Queues an event and wakes the control thread. Never blocks.
    pub fn send(&self, event: VcpuEvent) {
        let mut events = self.shared.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() >= MAX_EVENTS {
            drop(events);
            if !self.shared.lost.swap(true, Ordering::Relaxed) {
                ipc::helper::log(&format!("the event queue is full, lost: {event:?}"));
            }
            return;
        }
        events.push_back(event);
        drop(events);
        // Fails only when the counter is at its limit, and then the control thread is awake anyway.
        let _ = self.shared.wake.write(1);
    }

    /// Takes all events, oldest first, and clears the wake-up.
    pub fn take(&self) -> VecDeque<VcpuEvent> {
        // Clear first: an event that arrives in between wakes once more, with nothing left to take.
        let _ = self.shared.wake.read();
        std::mem::take(&mut *self.shared.events.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl AsFd for Outbox {
    /// Readable when there are events.
    fn as_fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsRawFd;
        // SAFETY: the eventfd lives as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.shared.wake.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    fn readable(outbox: &Outbox) -> bool {
        let mut fds = [PollFd::new(outbox.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn events_wake_and_come_out_in_order() {
        let outbox = Outbox::new().unwrap();
        assert!(!readable(&outbox));
        outbox.clone().send(VcpuEvent::GuestReset);
        outbox.send(VcpuEvent::SerialClosed);
        assert!(readable(&outbox));
        let events: Vec<String> = outbox.take().iter().map(|event| format!("{event:?}")).collect();
        assert_eq!(events, ["GuestReset", "SerialClosed"]);
        assert!(!readable(&outbox));
        assert!(outbox.take().is_empty());
    }

    #[test]
    fn a_full_outbox_drops_instead_of_blocking() {
        let outbox = Outbox::new().unwrap();
        for _ in 0..2 * MAX_EVENTS {
            outbox.send(VcpuEvent::SerialClosed);
        }
        assert_eq!(outbox.take().len(), MAX_EVENTS);
    }
}
