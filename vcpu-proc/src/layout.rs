//! The address map: what lies where in guest physical memory, on the ports and on the interrupt lines.
//!
//! ```text
//! 0x0000_0000  RAM (boot structures below 640 KiB, ACPI tables at 0xE0000, kernels from 1 MiB)
//! 0xC000_0000  PCI BARs
//! 0xE000_0000  ECAM of bus 0
//! 0xFEC0_0000  IOAPIC
//! 0xFEE0_0000  LAPIC
//! 0xFFFB_C000  KVM's identity map and TSS pages (unused on hosts with unrestricted guests)
//! 4 GiB        RAM beyond 3 GiB
//! then         64-bit PCI BARs: pci64_window()
//! ```

use ipc::memory::{HIGH_RAM_START, LOW_RAM_END};

/// Start of the window for 32-bit PCI BARs.
pub const PCI32_BASE: u64 = LOW_RAM_END;
/// Bytes of the window for 32-bit PCI BARs.
pub const PCI32_BYTES: u64 = ECAM_BASE - PCI32_BASE;
/// Start of the PCI configuration space of bus 0.
pub const ECAM_BASE: u64 = 0xe000_0000;
/// Bytes of it: one bus. MCFG says so (buses 0 to 0).
pub const ECAM_BYTES: u64 = 1 << 20;
/// Registers of the IOAPIC.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Interrupt pins of the IOAPIC; global system interrupts 0 to 23.
pub const IOAPIC_PINS: u32 = 24;
/// Registers of the local APIC.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// One page that KVM needs on Intel hosts without unrestricted guests.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three more of them.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Bytes of the window for 64-bit PCI BARs.
pub const PCI64_BYTES: u64 = 4 << 30;

/// The window for 64-bit PCI BARs of a machine with that much RAM: start and length in bytes.
pub const fn pci64_window(ram_bytes: u64) -> (u64, u64) {
    let high_ram_bytes = ram_bytes.saturating_sub(LOW_RAM_END);
    (
        (HIGH_RAM_START + high_ram_bytes).next_multiple_of(PCI64_BYTES),
        PCI64_BYTES,
    )
}

/// First byte that is not RAM below 1 MiB (the extended BIOS data area of a PC would follow).
pub const BASE_RAM_END: u64 = 0x9_fc00;
/// RSDP and ACPI tables: the area that operating systems search for "RSD PTR ". Not RAM in the memory map.
pub const ACPI_TABLES_BASE: u64 = 0xe_0000;
/// Room for them.
pub const ACPI_TABLES_BYTES: u64 = 0x2_0000;
/// RAM from here on is the kernel's.
pub const KERNEL_RAM_START: u64 = 0x10_0000;

/// 16550, eight ports.
pub const SERIAL_PORT: u64 = 0x3f8;
/// Its interrupt.
pub const SERIAL_GSI: u32 = 4;
/// CMOS index and data.
pub const RTC_PORT: u64 = 0x70;
/// Keyboard controller: data at +0, command and status at +4.
pub const I8042_PORT: u64 = 0x60;
/// Its ports. Those between the two read as zero: in 0x61 a PC shows why an NMI came, and here there is never a reason.
pub const I8042_PORTS: u64 = 5;
/// Guest panic notification, one port.
pub const PVPANIC_PORT: u64 = 0x505;
/// fw_cfg, when the machine has one. Where QEMU has it, because Linux's driver counts on the order: selector.
pub const FW_CFG_PORT: u64 = 0x510;
/// Its ports.
pub const FW_CFG_PORTS: u64 = 12;
/// Data, one byte at a time.
pub const FW_CFG_DATA_PORT: u64 = 0x511;
/// Upper half of a descriptor's address, big endian.
pub const FW_CFG_DMA_HIGH_PORT: u64 = 0x514;
/// Its lower half. Writing it starts the transfer.
pub const FW_CFG_DMA_LOW_PORT: u64 = 0x518;
/// ACPI registers of a hardware-reduced machine, all one byte: see the four below.
pub const ACPI_PORT: u64 = 0x600;
/// How many.
pub const ACPI_PORTS: u64 = 5;
/// FADT SLEEP_CONTROL_REG: SLP_TYP in bits 2 to 4, SLP_EN bit 5.
pub const ACPI_SLEEP_CONTROL_PORT: u64 = 0x600;
/// FADT SLEEP_STATUS_REG: WAK_STS bit 7.
pub const ACPI_SLEEP_STATUS_PORT: u64 = 0x601;
/// FADT RESET_REG: writing [`ACPI_RESET_VALUE`] resets the machine.
pub const ACPI_RESET_PORT: u64 = 0x602;
/// FADT RESET_VALUE.
pub const ACPI_RESET_VALUE: u8 = 1;
/// Events of the generic event device: reading returns the pending ones and clears them.
pub const GED_STATUS_PORT: u64 = 0x604;
/// Bit of [`GED_STATUS_PORT`]: the power button was pressed.
pub const GED_POWER_BUTTON: u8 = 1;
/// Interrupt of the generic event device: edge-triggered, active high, raised after the status bit is set.
pub const GED_GSI: u32 = 9;
/// SLP_TYP of S5 (soft off), as \_S5 in the DSDT says.
pub const SLEEP_TYPE_S5: u8 = 5;

/// First global system interrupt for MSI routes: those below belong to the IOAPIC.
pub const FIRST_MSI_GSI: u32 = IOAPIC_PINS;

const _: () = {
    assert!(PCI32_BASE + PCI32_BYTES <= ECAM_BASE && ECAM_BASE + ECAM_BYTES <= IOAPIC_BASE);
    assert!(KVM_TSS + 0x3000 <= HIGH_RAM_START && KVM_IDENTITY_MAP + 0x1000 <= KVM_TSS);
    assert!(ACPI_TABLES_BASE + ACPI_TABLES_BYTES <= KERNEL_RAM_START);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_64_bit_window_lies_above_all_ram() {
        assert_eq!(pci64_window(512 << 20).0, 4 << 30);
        assert_eq!(pci64_window(3 << 30).0, 4 << 30);
        assert_eq!(pci64_window((3 << 30) + 4096).0, 8 << 30);
        assert_eq!(pci64_window(7 << 30).0, 8 << 30);
        assert_eq!(pci64_window(8 << 30).0, 12 << 30);
    }
}
