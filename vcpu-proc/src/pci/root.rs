//! The host bridge, and the way from an access on the machine's buses to a function.
//!
//! The buses of the machine are built once and never change; BARs do. So the root takes the whole windows and finds
//! the BAR itself, by a list of the decoded BARs that it makes anew after each write to configuration space.

use super::PciFunction;
use super::bar::{BarAllocator, DecodedBar, WindowFull, Windows};
use super::config::{CONFIG_BYTES, ConfigSpace, FunctionIdentity};
use crate::bus::{Bus, BusDevice, BusError};
use crate::layout::{ECAM_BASE, ECAM_BYTES, PCI32_BASE, PCI32_BYTES, pci64_window};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Slots of a bus; slot 0 is the host bridge's.
const SLOTS: usize = 32;
/// First port of configuration mechanism #1: CONFIG_ADDRESS, then CONFIG_DATA.
const CONFIG_PORT: u64 = 0xcf8;
/// Bytes of both.
const CONFIG_PORTS: u64 = 8;
/// CONFIG_ADDRESS: an access of CONFIG_DATA becomes a configuration cycle.
const ADDRESS_ENABLE: u32 = 1 << 31;

/// A function shared between the bus and its owner. Lock order: the root, then a function.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// A slot number that cannot be given away.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SlotError {
    /// Not 1 to 31.
    #[error("PCI slot {0} does not exist")]
    Number(u8),
    /// Another function is there.
    #[error("PCI slot {0} is taken")]
    Taken(u8),
    /// The BARs find no room.
    #[error(transparent)]
    Window(#[from] WindowFull),
}

struct Decoded {
    slot: usize,
    bar: DecodedBar,
}

/// Bus 0.
pub struct PciRoot {
    /// CONFIG_ADDRESS.
    address: u32,
    host_bridge: ConfigSpace,
    slots: [Option<SharedFunction>; SLOTS],
    allocator: BarAllocator,
    decoded: Vec<Decoded>,
}

fn lock(function: &SharedFunction) -> MutexGuard<'_, dyn PciFunction + 'static> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PciRoot {
    /// A bus with nothing but the host bridge, for a machine with that much RAM.
    pub fn new(ram_bytes: u64) -> Self {
        let (high, high_bytes) = pci64_window(ram_bytes);
        Self {
            address: 0,
            // A generic PCIe host bridge, known to operating systems by its class alone.
            host_bridge: ConfigSpace::new(FunctionIdentity {
                vendor: 0x1b36,
                device: 0x0008,
                revision: 0,
                class: [0x06, 0x00, 0x00],
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            }),
            slots: [const { None }; SLOTS],
            allocator: BarAllocator::new(Windows {
                low: PCI32_BASE..PCI32_BASE + PCI32_BYTES,
                high: high..high + high_bytes,
            }),
            decoded: Vec::new(),
        }
    }

    /// Puts the root at its ports and addresses.
    ///
    /// # Errors
    /// When they are taken.
    pub fn insert_into(root: &Arc<Mutex<Self>>, ports: &mut Bus, memory: &mut Bus) -> Result<(), BusError> {
        let high = root
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .allocator
            .windows()
            .high
            .clone();
        ports.insert(CONFIG_PORT, CONFIG_PORTS, root.clone())?;
        memory.insert(ECAM_BASE, ECAM_BYTES, root.clone())?;
        memory.insert(PCI32_BASE, PCI32_BYTES, root.clone())?;
        memory.insert(high.start, high.end - high.start, root.clone())
    }

    /// Puts a function into a slot, 1 to 31, and gives its BARs their addresses.
    ///
    /// # Errors
    /// When the slot does not exist or is taken, or the window is full.
    pub fn add(&mut self, slot: u8, function: SharedFunction) -> Result<(), SlotError> {
        let index = usize::from(slot);
        if index == 0 || index >= SLOTS {
            return Err(SlotError::Number(slot));
        }
        if self.slots[index].is_some() {
            return Err(SlotError::Taken(slot));
        }
        lock(&function).assign_bars(&mut self.allocator)?;
        self.slots[index] = Some(function);
        self.update_decoded(index);
        Ok(())
    }

    /// Reads configuration space. `register` may lie in PCIe's extended space, which is empty: zeros where there is a
    /// function, ones where there is none.
    fn config_read(&mut self, slot: usize, function: usize, register: usize, data: &mut [u8]) {
        data.fill(0xff);
        if function != 0 || slot >= SLOTS || (slot != 0 && self.slots[slot].is_none()) {
            return;
        }
        if register + data.len() > CONFIG_BYTES {
            data.fill(0);
        } else if let Some(function) = &self.slots[slot] {
            lock(function).config_read(register, data);
        } else {
            self.host_bridge.read(register, data);
        }
    }

    fn config_write(&mut self, slot: usize, function: usize, register: usize, data: &[u8]) {
        if function != 0 || slot >= SLOTS || register + data.len() > CONFIG_BYTES {
            return;
        }
        if slot == 0 {
            self.host_bridge.write(register, data);
        } else if let Some(function) = &self.slots[slot] {
            lock(function).config_write(register, data);
            self.update_decoded(slot);
        }
    }

    /// What an access at `offset` of ECAM means: slot, function and register of bus 0.
    fn ecam(offset: u64) -> (usize, usize, usize) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        (offset >> 15, offset >> 12 & 7, offset & 0xfff)
    }

    /// What an access at `offset` (4 to 7) of the ports means; `None`: no configuration cycle, or not on bus 0.
    fn port_cycle(&self, offset: u64) -> Option<(usize, usize, usize)> {
        let byte = usize::try_from(offset.checked_sub(4)?).ok()?;
        let address = usize::try_from(self.address).ok()?;
        let enabled = self.address & ADDRESS_ENABLE != 0 && self.address >> 16 & 0xff == 0;
        enabled.then_some((address >> 11 & 0x1f, address >> 8 & 7, (address & 0xfc) + byte))
    }

    /// The function whose BAR holds the whole access.
    fn find_bar(&self, address: u64, length: usize) -> Option<(&SharedFunction, u8, u64)> {
        let length = u64::try_from(length).ok()?;
        // Where a guest has laid BARs over each other, the lowest slot answers.
        self.decoded
            .iter()
            .filter_map(|Decoded { slot, bar }| {
                let offset = address.checked_sub(bar.base)?;
                (offset < bar.bytes && length <= bar.bytes - offset).then_some((*slot, bar.index, offset))
            })
            .min()
            .and_then(|(slot, bar, offset)| Some((self.slots[slot].as_ref()?, bar, offset)))
    }

    /// The BARs that answer at present, with their slots.
    pub fn decoded_bars(&self) -> Vec<(usize, DecodedBar)> {
        self.decoded.iter().map(|Decoded { slot, bar }| (*slot, *bar)).collect()
    }

    fn update_decoded(&mut self, slot: usize) {
        self.decoded.retain(|decoded| decoded.slot != slot);
        if let Some(function) = &self.slots[slot] {
            let mut bars = Vec::new();
            lock(function).decoded_bars(&mut bars);
            self.decoded.extend(bars.into_iter().map(|bar| Decoded { slot, bar }));
        }
    }
}

impl BusDevice for PciRoot {
    fn read(&mut self, base: u64, offset: u64, data: &mut [u8]) {
        match base {
            CONFIG_PORT if offset < 4 => {
                let register = self.address.to_le_bytes();
                let start = usize::try_from(offset).unwrap_or(0);
                if let Some(bytes) = register.get(start..start + data.len()) {
                    data.copy_from_slice(bytes);
                }
            }
            CONFIG_PORT => {
                if let Some((slot, function, register)) = self.port_cycle(offset) {
                    self.config_read(slot, function, register, data);
                }
            }
            ECAM_BASE => {
                let (slot, function, register) = Self::ecam(offset);
                self.config_read(slot, function, register, data);
            }
            window => {
                if let Some((function, bar, offset)) = self.find_bar(window + offset, data.len()) {
                    lock(function).bar_read(bar, offset, data);
                }
            }
        }
    }

    fn write(&mut self, base: u64, offset: u64, data: &[u8]) {
        match base {
            // The bridge takes CONFIG_ADDRESS as a whole only; narrower writes are some other chipset's registers.
            CONFIG_PORT if offset < 4 => {
                if let (0, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
                    self.address = u32::from_le_bytes(bytes) & (ADDRESS_ENABLE | 0x00ff_fffc);
                }
            }
            CONFIG_PORT => {
                if let Some((slot, function, register)) = self.port_cycle(offset) {
                    self.config_write(slot, function, register, data);
                }
            }
            ECAM_BASE => {
                let (slot, function, register) = Self::ecam(offset);
                self.config_write(slot, function, register, data);
            }
            window => {
                if let Some((function, bar, offset)) = self.find_bar(window + offset, data.len()) {
                    lock(function).bar_write(bar, offset, data);
                }
            }
        }
    }

    /// Resets the bus and every function on it.
    fn reset(&mut self) {
        self.address = 0;
        self.host_bridge.reset();
        for slot in 0..SLOTS {
            if let Some(function) = &self.slots[slot] {
                lock(function).reset();
            }
            self.update_decoded(slot);
        }
    }
}

#[cfg(test)]
mod tests;
