//! PCI functions on bus 0: both ways to their configuration space, capabilities, base address registers.

use crate::cpu::{in8, in16, in32, out8, out16, out32};
use crate::failure::{Failure, ensure};
use crate::region::Region;
use crate::{acpi, tables};
use core::sync::atomic::{AtomicU64, Ordering};

/// Configuration address port of mechanism #1; the data follows at +4.
const ADDRESS_PORT: u16 = 0xcf8;
const DATA_PORT: u16 = 0xcfc;
/// Window for functions that come without addresses.
const WINDOW_START: u64 = 0xc000_0000;
const WINDOW_END: u64 = 0xe000_0000;

const COMMAND: u16 = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_NO_LINE: u16 = 1 << 10;
const BAR0: u16 = 0x10;
const CAPABILITIES: u16 = 0x34;

static NEXT_ADDRESS: AtomicU64 = AtomicU64::new(WINDOW_START);

/// How configuration space is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Ports 0xcf8 and 0xcfc.
    Ports,
    /// Memory-mapped, this window.
    Memory(Region),
}

impl Access {
    /// The memory window that the MCFG table gives, when there is one.
    pub fn memory() -> Result<Option<Self>, Failure> {
        let ecam = acpi::root()?.ecam()?;
        Ok(ecam.map(|(base, last_bus)| {
            let bytes = (u64::from(last_bus) + 1) << 20;
            tables::map(base, bytes);
            Self::Memory(Region::new(base, bytes))
        }))
    }
}

/// A function of bus 0.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    /// Its device number.
    pub slot: u8,
    /// Its function number.
    pub number: u8,
    access: Access,
}

/// A memory base address register.
#[derive(Clone, Copy, Debug)]
pub struct Bar {
    /// Its number, 0 to 5.
    pub index: u8,
    /// Where it is; 0 when nobody has placed it.
    pub address: u64,
    /// Its size.
    pub bytes: u64,
    /// Whether it takes two registers.
    pub wide: bool,
}

/// All functions of bus 0.
pub fn functions(access: Access) -> impl Iterator<Item = Function> {
    (0..32)
        .flat_map(move |slot| (0..8).map(move |number| Function { slot, number, access }))
        .filter(|function| {
            let many = Function { number: 0, ..*function }.read::<u8>(0x0e) & 0x80 != 0;
            (function.number == 0 || many) && function.vendor() != 0xffff
        })
}

/// Values that configuration space can be read and written in.
pub trait Width: Copy {
    /// Reads from a data port.
    fn input(port: u16) -> Self;
    /// Writes to a data port.
    fn output(port: u16, value: Self);
}

impl Width for u8 {
    fn input(port: u16) -> Self {
        in8(port)
    }
    fn output(port: u16, value: Self) {
        out8(port, value);
    }
}

impl Width for u16 {
    fn input(port: u16) -> Self {
        in16(port)
    }
    fn output(port: u16, value: Self) {
        out16(port, value);
    }
}

impl Width for u32 {
    fn input(port: u16) -> Self {
        in32(port)
    }
    fn output(port: u16, value: Self) {
        out32(port, value);
    }
}

impl Function {
    /// Reads a register.
    pub fn read<T: Width + crate::region::Plain>(self, register: u16) -> T {
        match self.access {
            Access::Memory(window) => window.read(self.place(register)),
            Access::Ports => {
                self.select(register);
                T::input(DATA_PORT + (register & 3))
            }
        }
    }

    /// Writes a register.
    pub fn write<T: Width + crate::region::Plain>(self, register: u16, value: T) {
        match self.access {
            Access::Memory(window) => window.write(self.place(register), value),
            Access::Ports => {
                self.select(register);
                T::output(DATA_PORT + (register & 3), value);
            }
        }
    }

    fn place(self, register: u16) -> u64 {
        u64::from(self.slot) << 15 | u64::from(self.number) << 12 | u64::from(register)
    }

    fn select(self, register: u16) {
        let address = u32::from(self.slot) << 11 | u32::from(self.number) << 8 | u32::from(register & 0xfc);
        out32(ADDRESS_PORT, 1 << 31 | address);
    }

    /// Vendor ID.
    pub fn vendor(self) -> u16 {
        self.read(0)
    }

    /// Device ID.
    pub fn device(self) -> u16 {
        self.read(2)
    }

    /// Subsystem ID.
    pub fn subsystem(self) -> u16 {
        self.read(0x2e)
    }

    /// Class, subclass, programming interface and revision.
    pub fn class(self) -> u32 {
        self.read(8)
    }

    /// Places of the capabilities with this ID.
    pub fn capabilities(self, id: u8) -> impl Iterator<Item = u16> {
        let present = self.read::<u16>(6) & 0x10 != 0;
        let first = if present {
            self.read::<u8>(CAPABILITIES) & 0xfc
        } else {
            0
        };
        core::iter::successors(Some(first), move |place| {
            Some(self.read::<u8>(u16::from(*place) + 1) & 0xfc)
        })
        .take_while(|place| *place != 0)
        .take(48)
        .map(u16::from)
        .filter(move |place| self.read::<u8>(*place) == id)
    }

    /// Switches access to memory registers on or off. Bus mastering goes with it, pin interrupts stay off.
    pub fn decode(self, on: bool) {
        let bits = COMMAND_MEMORY | COMMAND_MASTER;
        let rest = self.read::<u16>(COMMAND) & !bits | COMMAND_NO_LINE;
        self.write(COMMAND, if on { rest | bits } else { rest });
    }

    /// Sizes a memory base address register; `None` when it is not there or is one for ports.
    pub fn bar(self, index: u8) -> Option<Bar> {
        let register = BAR0 + 4 * u16::from(index);
        let low: u32 = self.read(register);
        if low & 1 != 0 {
            return None;
        }
        let wide = low & 6 == 4;
        let high: u32 = if wide { self.read(register + 4) } else { 0 };
        let decoding = self.read::<u16>(COMMAND) & COMMAND_MEMORY != 0;
        self.decode(false);
        self.write(register, u32::MAX);
        let mut mask = u64::from(self.read::<u32>(register) & !15) | 0xffff_ffff_0000_0000;
        if wide {
            self.write(register + 4, u32::MAX);
            mask = mask & 0xffff_ffff | u64::from(self.read::<u32>(register + 4)) << 32;
            self.write(register + 4, high);
        }
        self.write(register, low);
        if decoding {
            self.decode(true);
        }
        (mask & 0xffff_ffff != 0).then(|| Bar {
            index,
            address: u64::from(low & !15) | u64::from(high) << 32,
            bytes: mask.wrapping_neg(),
            wide,
        })
    }

    /// Places a memory base address register.
    pub fn place_bar(self, bar: &mut Bar, address: u64) {
        let register = BAR0 + 4 * u16::from(bar.index);
        self.decode(false);
        self.write(register, address as u32);
        if bar.wide {
            self.write(register + 4, (address >> 32) as u32);
        }
        bar.address = address;
    }

    /// The range that a memory base address register decodes. It is placed when nobody has done so, mapped, and access
    /// is switched on.
    pub fn window(self, index: u8) -> Result<Region, Failure> {
        let mut bar = self.bar(index).ok_or(crate::failure::failure("memory BAR missing"))?;
        ensure(bar.bytes.is_power_of_two(), "BAR size")?;
        if bar.address == 0 {
            let address = reserve(bar.bytes)?;
            self.place_bar(&mut bar, address);
        }
        tables::map(bar.address, bar.bytes);
        self.decode(true);
        Ok(Region::new(bar.address, bar.bytes))
    }
}

/// Free addresses in the window below the memory-mapped configuration space.
pub fn reserve(bytes: u64) -> Result<u64, Failure> {
    let address = NEXT_ADDRESS.load(Ordering::Relaxed).next_multiple_of(bytes);
    ensure(address + bytes <= WINDOW_END, "PCI window is full")?;
    NEXT_ADDRESS.store(address + bytes, Ordering::Relaxed);
    Ok(address)
}

/// Moves the start of the window that [`reserve`] takes from, for tests that want addresses nobody else uses.
pub fn reserve_from(address: u64) {
    NEXT_ADDRESS.fetch_max(address, Ordering::Relaxed);
}
