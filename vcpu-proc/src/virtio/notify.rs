//! Kicks: the eventfds that the driver's writes to the notification registers signal.
//!
//! KVM signals them itself (KVM_IOEVENTFD, any length of write, any value) while the device runs and its BAR is
//! decoded. Only then: an operating system that sizes and moves BARs switches decoding on and off many times, and each
//! change costs KVM a grace period per queue. Whenever KVM does not do it, for that reason or because it has no room,
//! the write exits and arrives at [`Kicks::kick`], which does the same slowly.

use crate::irq::IrqManager;
use vmm_sys_util::eventfd::EventFd;

struct Kick {
    event: EventFd,
    /// Where KVM signals it at present.
    connected: Option<u64>,
}

/// The kicks of one device.
pub struct Kicks {
    irq: IrqManager,
    kicks: Vec<Kick>,
}

impl Kicks {
    /// No queue yet.
    pub fn new(irq: &IrqManager) -> Self {
        Self {
            irq: irq.clone(),
            kicks: Vec::new(),
        }
    }

    /// The next queue's eventfd.
    pub fn push(&mut self, event: EventFd) {
        self.kicks.push(Kick { event, connected: None });
    }

    /// How many queues have one.
    pub fn len(&self) -> usize {
        self.kicks.len()
    }

    /// Moves the eventfds to where `address` says a queue's register is; `None`: not served by KVM now.
    pub fn place(&mut self, address: impl Fn(usize) -> Option<u64>) {
        for (queue, kick) in self.kicks.iter_mut().enumerate() {
            let wanted = address(queue);
            if kick.connected == wanted {
                continue;
            }
            if let Some(former) = kick.connected.take() {
                // Fails only if it is not connected, which is what is wanted.
                let _ = self.irq.disconnect_ioeventfd(&kick.event, former);
            }
            if let Some(address) = wanted
                && self.irq.connect_ioeventfd(&kick.event, address).is_ok()
            {
                kick.connected = Some(address);
            }
        }
    }

    /// Signals a queue's eventfd from here.
    pub fn kick(&self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue) {
            // Fails only at 2^64 - 2 signals that nobody took: the device is kicked either way.
            let _ = kick.event.write(1);
        }
    }
}
