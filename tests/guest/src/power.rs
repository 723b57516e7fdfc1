//! Switching the machine off, resetting it, and reporting a crash.

use crate::acpi::{self, Register};
use crate::cpu::{self, out8, out16};
use crate::region::Region;
use crate::{clock, println, tables};

const SLEEP_ENABLE: u8 = 0x20;
const PM1_SLEEP_ENABLE: u16 = 1 << 13;
/// Bulkhead's and QEMU's pvpanic device.
const PVPANIC: u16 = 0x505;

/// Writes a byte to a register that ACPI describes.
pub fn write(register: Register, value: u8) {
    match register.space {
        0 => Region::new(register.address, 1).write(0, value),
        _ => out8(register.address as u16, value),
    }
}

/// Powers the machine off by ACPI's S5, or resets it where that is all there is.
pub fn off() -> ! {
    match acpi::root().and_then(acpi::Root::fadt) {
        // A monitor may have no way to be switched off (Firecracker).
        Ok(fadt) if fadt.hardware_reduced() && fadt.sleep_control().address == 0 => reset_by_keyboard_controller(),
        Ok(fadt) if fadt.hardware_reduced() => {
            let kind = fadt.soft_off_type().unwrap_or(5);
            write(fadt.sleep_control(), SLEEP_ENABLE | kind << 2);
        }
        Ok(fadt) => {
            let kind = u16::from(fadt.soft_off_type().unwrap_or(0));
            out16(fadt.pm1_control(), PM1_SLEEP_ENABLE | kind << 10);
        }
        Err(error) => println!("FAIL poweroff {error}"),
    }
    stop()
}

/// What is left when the machine goes on after it was told to end.
pub fn stop() -> ! {
    clock::pause_us(500_000);
    println!("FAIL the machine is still on");
    loop {
        cpu::wait_for_interrupt();
    }
}

/// Resets through the keyboard controller.
pub fn reset_by_keyboard_controller() -> ! {
    out8(0x64, 0xfe);
    stop()
}

/// Resets through ACPI's reset register, when there is one.
pub fn reset_by_acpi() -> ! {
    if let Ok(Some((register, value))) = acpi::root().and_then(acpi::Root::fadt).map(acpi::Fadt::reset) {
        write(register, value);
    }
    stop()
}

/// Resets by an exception that cannot be delivered.
pub fn reset_by_triple_fault() -> ! {
    tables::clear_idt();
    cpu::undefined_instruction()
}

/// The events that pvpanic knows, as a mask.
pub fn pvpanic_events() -> u8 {
    cpu::in8(PVPANIC)
}

/// Tells pvpanic of an event.
pub fn pvpanic(event: u8) {
    out8(PVPANIC, event);
}
