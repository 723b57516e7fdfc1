//! The devices of a PC that are not on PCI.

pub mod acpi_registers;
pub mod fw_cfg;
pub mod i8042;
pub mod pvpanic;
pub mod rtc;
pub mod serial;
