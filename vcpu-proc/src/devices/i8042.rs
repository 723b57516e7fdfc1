//! The keyboard controller, without a keyboard: guests reset the machine with it.

use crate::bus::BusDevice;
use crate::vcpu::gate::Gate;
use ipc::vcpu::VcpuEvent;
use std::convert::Infallible;
use std::sync::Arc;
use vm_superio::{I8042Device, Trigger};

/// Pulls the reset line.
struct ResetLine(Arc<Gate>);

impl Trigger for ResetLine {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        self.0.stop_and_report(VcpuEvent::GuestReset);
        Ok(())
    }
}

/// See the module.
pub struct I8042(I8042Device<ResetLine>);

impl I8042 {
    /// Resets by way of the gate.
    pub fn new(gate: Arc<Gate>) -> Self {
        Self(I8042Device::new(ResetLine(gate)))
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
        if let Ok(offset) = u8::try_from(offset) {
            data[0] = self.0.read(offset);
        }
    }

    fn write(&mut self, _base: u64, offset: u64, data: &[u8]) {
        if let Ok(offset) = u8::try_from(offset) {
            let Ok(()) = self.0.write(offset, data[0]);
        }
    }

    fn reset(&mut self) {}
}
