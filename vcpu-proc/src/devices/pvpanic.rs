//! The guest's panic notification: a port that says which events it takes, and takes them.

use crate::bus::BusDevice;
use crate::outbox::Outbox;
use ipc::vcpu::VcpuEvent;

/// The guest's kernel panicked.
const PANICKED: u8 = 1;
/// The guest's kernel panicked and a crash kernel takes over.
const CRASH_LOADED: u8 = 2;

/// See the module.
pub struct PvPanic {
    outbox: Outbox,
    /// Events of this boot that were reported: a guest that keeps writing says nothing new.
    reported: u8,
}

impl PvPanic {
    /// Reports through the outbox.
    pub fn new(outbox: Outbox) -> Self {
        Self { outbox, reported: 0 }
    }

    fn report(&mut self, event: u8, crash_loaded: bool) {
        if self.reported & event == 0 {
            self.reported |= event;
            self.outbox.send(VcpuEvent::GuestPanicked { crash_loaded });
        }
    }
}

impl BusDevice for PvPanic {
    fn read(&mut self, _base: u64, _offset: u64, data: &mut [u8]) {
        data[0] = PANICKED | CRASH_LOADED;
    }

    fn write(&mut self, _base: u64, _offset: u64, data: &[u8]) {
        if data[0] & PANICKED != 0 {
            self.report(PANICKED, false);
        } else if data[0] & CRASH_LOADED != 0 {
            self.report(CRASH_LOADED, true);
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
    fn each_event_is_reported_once_a_boot() {
        let outbox = Outbox::new().unwrap();
        let mut device = PvPanic::new(outbox.clone());
        let mut supported = [0];
        device.read(0, 0, &mut supported);
        assert_eq!(supported, [3]);
        for value in [2, 1, 1, 2, 3, 0x80] {
            device.write(0, 0, &[value]);
        }
        let events: Vec<bool> = outbox
            .take()
            .iter()
            .map(|event| matches!(event, VcpuEvent::GuestPanicked { crash_loaded: true }))
            .collect();
        assert_eq!(events, [true, false]);
        device.reset();
        device.write(0, 0, &[1]);
        assert_eq!(outbox.take().len(), 1);
    }
}
