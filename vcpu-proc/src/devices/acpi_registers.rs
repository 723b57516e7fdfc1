//! The registers of a hardware-reduced ACPI machine: sleep, reset and the generic event device with the power button.
//!
//! The tables tell the guest where they are; see `layout` for the map and `acpi` for the tables.

use crate::bus::BusDevice;
use crate::layout::{
    ACPI_PORT, ACPI_RESET_PORT, ACPI_RESET_VALUE, ACPI_SLEEP_CONTROL_PORT, GED_POWER_BUTTON, GED_STATUS_PORT,
    SLEEP_TYPE_S5,
};
use crate::vcpu::gate::Gate;
use ipc::vcpu::VcpuEvent;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// SLP_EN of SLEEP_CONTROL_REG (ACPI 6.5, 4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;

/// See the module.
pub struct AcpiRegisters {
    gate: Arc<Gate>,
    /// Raises the generic event device's interrupt.
    interrupt: EventFd,
    /// Events that the guest has not read yet.
    events: u8,
}

impl AcpiRegisters {
    /// `interrupt` is an irqfd of the generic event device's interrupt.
    pub fn new(gate: Arc<Gate>, interrupt: EventFd) -> Self {
        Self {
            gate,
            interrupt,
            events: 0,
        }
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn press_power_button(&mut self) -> std::io::Result<()> {
        self.events |= GED_POWER_BUTTON;
        self.interrupt.write(1)
    }
}

impl BusDevice for AcpiRegisters {
    fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if ACPI_PORT + offset == GED_STATUS_PORT {
            data[0] = std::mem::take(&mut self.events);
        }
    }

    fn write(&mut self, _base: u64, offset: u64, data: &[u8]) {
        let value = data[0];
        match ACPI_PORT + offset {
            ACPI_SLEEP_CONTROL_PORT if value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == SLEEP_TYPE_S5 => {
                self.gate.stop_and_report(VcpuEvent::GuestShutdown);
            }
            ACPI_RESET_PORT if value == ACPI_RESET_VALUE => self.gate.stop_and_report(VcpuEvent::GuestReset),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.events = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::Outbox;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn registers() -> (AcpiRegisters, Arc<Gate>, EventFd) {
        let gate = Arc::new(Gate::new(1, Outbox::new().unwrap()));
        gate.open();
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let ours = interrupt.try_clone().unwrap();
        (AcpiRegisters::new(Arc::clone(&gate), interrupt), gate, ours)
    }

    fn read(registers: &mut AcpiRegisters, port: u64) -> u8 {
        let mut data = [0xff];
        registers.read(ACPI_PORT, port - ACPI_PORT, &mut data);
        data[0]
    }

    #[test]
    fn the_power_button_raises_the_interrupt_and_is_seen_once() {
        let (mut registers, _gate, interrupt) = registers();
        registers.press_power_button().unwrap();
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(read(&mut registers, GED_STATUS_PORT), GED_POWER_BUTTON);
        assert_eq!(read(&mut registers, GED_STATUS_PORT), 0);
        registers.press_power_button().unwrap();
        registers.reset();
        assert_eq!(read(&mut registers, GED_STATUS_PORT), 0);
    }

    #[test]
    fn only_the_documented_values_stop_the_machine() {
        for (port, value, stops) in [
            (ACPI_SLEEP_CONTROL_PORT, SLEEP_ENABLE | SLEEP_TYPE_S5 << 2, true),
            (ACPI_SLEEP_CONTROL_PORT, SLEEP_TYPE_S5 << 2, false),
            (ACPI_SLEEP_CONTROL_PORT, SLEEP_ENABLE | 1 << 2, false),
            (ACPI_RESET_PORT, ACPI_RESET_VALUE, true),
            (ACPI_RESET_PORT, 0, false),
            (GED_STATUS_PORT, 0xff, false),
        ] {
            let (mut registers, gate, _interrupt) = registers();
            registers.write(ACPI_PORT, port - ACPI_PORT, &[value]);
            assert_eq!(gate.is_open(), !stops, "{port:#x} {value:#x}");
        }
    }
}
