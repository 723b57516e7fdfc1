//! The guest's panic notification: a port that says which events it takes, and takes them.

use crate::bus::BusDevice;
use crate::outbox::Outbox;
use crate::vcpu::gate::Gate;
use ipc::vcpu::VcpuEvent;
use std::sync::Arc;

/// The guest's kernel panicked.
const PANICKED: u8 = 1;
/// The guest's kernel panicked and a crash kernel takes over.
const CRASH_LOADED: u8 = 2;

/// See the module.
pub struct PvPanic {
    gate: Arc<Gate>,
    outbox: Outbox,
    /// Events of this boot that were reported: a guest that keeps writing says nothing new.
    reported: u8,
}

impl PvPanic {
    /// A panic stops the vCPUs by way of the gate; the rest is reported through the outbox.
    pub fn new(gate: Arc<Gate>, outbox: Outbox) -> Self {
        Self {
            gate,
            outbox,
            reported: 0,
        }
    }

    /// Whether this is the event's first time in this boot.
    fn is_new(&mut self, event: u8) -> bool {
        let new = self.reported & event == 0;
        self.reported |= event;
        new
    }
}

impl BusDevice for PvPanic {
    fn read(&mut self, _base: u64, _offset: u64, data: &mut [u8]) {
        data[0] = PANICKED | CRASH_LOADED;
    }

    fn write(&mut self, _base: u64, _offset: u64, data: &[u8]) {
        if data[0] & PANICKED != 0 {
            if self.is_new(PANICKED) {
                // What becomes of the machine is the operator's choice; until then the guest does nothing more.
                self.gate
                    .stop_and_report(VcpuEvent::GuestPanicked { crash_loaded: false });
            }
        } else if data[0] & CRASH_LOADED != 0 && self.is_new(CRASH_LOADED) {
            self.outbox.send(VcpuEvent::GuestPanicked { crash_loaded: true });
        }
    }

    fn reset(&mut self) {
        self.reported = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_stops_the_vcpus_and_a_loaded_crash_kernel_does_not() {
        let outbox = Outbox::new().unwrap();
        let gate = Arc::new(Gate::new(1, outbox.clone()));
        let mut device = PvPanic::new(Arc::clone(&gate), outbox.clone());
        let mut supported = [0];
        device.read(0, 0, &mut supported);
        assert_eq!(supported, [3]);
        gate.open();
        for value in [2, 2, 0x80] {
            device.write(0, 0, &[value]);
        }
        assert!(gate.is_open());
        assert_eq!(outbox.take().len(), 1, "each event is reported once a boot");
        device.write(0, 0, &[1]);
        assert!(!gate.is_open());
        gate.open();
        device.write(0, 0, &[3]);
        assert!(gate.is_open(), "a guest that keeps writing says nothing new");
        device.reset();
        device.write(0, 0, &[1]);
        assert!(!gate.is_open());
    }
}
