//! The 256 bytes of a type 0 configuration space (PCI 3.0 §6.1): values, and which bits a guest may change.
//!
//! The registers that do something (BARs, the command register, MSI-X control) are plain bits here too. Their owner
//! reads them after each write: a guest can write registers in any order and in pieces of any size, so what counts is
//! the state that results, never the single write.

/// Bytes of a configuration space without PCIe's extension.
pub const CONFIG_BYTES: usize = 256;

/// Offset of the command register.
const COMMAND: usize = 0x04;
/// Offset of the low byte of the status register.
const STATUS: usize = 0x06;
/// Status: there is a capability list.
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// Offset of the pointer to the first capability.
const CAPABILITIES_POINTER: usize = 0x34;
/// Offset of the interrupt line: scratch for firmware and operating system.
const INTERRUPT_LINE: usize = 0x3c;
/// Offset of the cache line size: scratch, as for any PCIe function.
const CACHE_LINE_SIZE: usize = 0x0c;
/// First byte after the header.
const HEADER_END: usize = 0x40;

/// Command: memory BARs answer.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: the function may access memory. Kept, but nothing depends on it: a device that must stop is reset.
const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command: INTx is off. Operating systems set it when they use MSI-X.
const COMMAND_INTX_DISABLE: u16 = 1 << 10;

/// Capability ID of MSI-X.
pub const CAPABILITY_MSIX: u8 = 0x11;
/// Capability ID of vendor-specific capabilities, virtio's among them.
pub const CAPABILITY_VENDOR: u8 = 0x09;

/// Who the function is.
#[derive(Debug, Clone, Copy)]
pub struct FunctionIdentity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, subclass and programming interface, from the high byte down.
    pub class: [u8; 3],
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// Registers, write masks and the values after power-on.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    power_on: [u8; CONFIG_BYTES],
    last_capability: Option<usize>,
    next_free: usize,
}

impl ConfigSpace {
    /// A function without BARs and capabilities. Memory decoding is on after power-on, as firmware would leave it.
    pub fn new(identity: FunctionIdentity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            power_on: [0; CONFIG_BYTES],
            last_capability: None,
            next_free: HEADER_END,
        };
        let [base_class, subclass, interface] = identity.class;
        space.define(0x00, &identity.vendor.to_le_bytes(), &[0; 2]);
        space.define(0x02, &identity.device.to_le_bytes(), &[0; 2]);
        let writable_command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        space.define(COMMAND, &COMMAND_MEMORY.to_le_bytes(), &writable_command.to_le_bytes());
        space.define(0x08, &[identity.revision, interface, subclass, base_class], &[0; 4]);
        space.define(CACHE_LINE_SIZE, &[0], &[0xff]);
        space.define(0x2c, &identity.subsystem_vendor.to_le_bytes(), &[0; 2]);
        space.define(0x2e, &identity.subsystem.to_le_bytes(), &[0; 2]);
        space.define(INTERRUPT_LINE, &[0], &[0xff]);
        space
    }

    /// Sets registers' value, now and after each reset, and the bits that the guest may change. For set-up only.
    pub fn define(&mut self, offset: usize, value: &[u8], writable: &[u8]) {
        assert_eq!(value.len(), writable.len(), "one mask byte per register byte");
        self.bytes[offset..][..value.len()].copy_from_slice(value);
        self.power_on[offset..][..value.len()].copy_from_slice(value);
        self.writable[offset..][..value.len()].copy_from_slice(writable);
    }

    /// Appends a capability: `body` is what follows ID and next pointer, `writable` its mask. Returns its offset. For
    /// set-up only.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let offset = self.next_free;
        assert!(offset + 2 + body.len() <= CONFIG_BYTES, "the capabilities fit");
        let pointer = [u8::try_from(offset).expect("less than 256")];
        match self.last_capability {
            Some(last) => self.define(last + 1, &pointer, &[0]),
            None => {
                self.define(CAPABILITIES_POINTER, &pointer, &[0]);
                self.define(STATUS, &[STATUS_CAPABILITIES], &[0]);
            }
        }
        self.define(offset, &[id, 0], &[0; 2]);
        self.define(offset + 2, body, writable);
        self.last_capability = Some(offset);
        self.next_free = (offset + 2 + body.len()).next_multiple_of(4);
        offset
    }

    /// Reads; bytes past the end are ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset + index).copied().unwrap_or(0xff);
        }
    }

    /// Writes the bits that are writable; the others keep their value.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (index, new) in data.iter().enumerate() {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(offset + index), self.writable.get(offset + index)) {
                *byte = (*byte & !mask) | (new & mask);
            }
        }
    }

    /// A 16-bit register.
    pub fn u16_at(&self, offset: usize) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// A 32-bit register.
    pub fn u32_at(&self, offset: usize) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Whether memory BARs answer.
    pub fn memory_enabled(&self) -> bool {
        self.u16_at(COMMAND) & COMMAND_MEMORY != 0
    }

    /// All registers as after power-on.
    pub fn reset(&mut self) {
        self.bytes = self.power_on;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(FunctionIdentity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: [1, 0, 0],
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        })
    }

    #[test]
    fn the_header_identifies_the_function_and_keeps_its_identity() {
        let mut space = space();
        space.write(0, &[0xff; CONFIG_BYTES]);
        assert_eq!(space.u32_at(0x00), 0x1042_1af4);
        assert_eq!(space.u32_at(0x08), 0x0100_0001);
        assert_eq!(space.u32_at(0x2c), 0x1100_1af4);
        assert_eq!(space.u16_at(COMMAND), 0x0406);
        assert_eq!(space.u32_at(0x3c), 0xff, "interrupt pin 0: no INTx");
        space.reset();
        assert_eq!(space.u16_at(COMMAND), COMMAND_MEMORY);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        assert_eq!(
            space.u32_at(0x34) | u32::from(space.u16_at(STATUS)),
            0,
            "no list without capabilities"
        );
        let first = space.add_capability(CAPABILITY_VENDOR, &[1; 15], &[0; 15]);
        let second = space.add_capability(CAPABILITY_MSIX, &[2; 10], &[0xff; 10]);
        assert_eq!((first, second), (0x40, 0x54));
        space.write(0x30, &[0; 0x30]);
        assert_eq!(space.u16_at(STATUS), 0x10);
        assert_eq!(space.u32_at(0x34), 0x40);
        assert_eq!(space.u16_at(0x40), 0x5409);
        assert_eq!(space.u16_at(0x54), 0x0011);
    }

    #[test]
    fn accesses_past_the_end_are_harmless() {
        let mut space = space();
        let mut data = [0; 4];
        space.read(254, &mut data);
        assert_eq!(data, [0, 0, 0xff, 0xff]);
        space.write(254, &[1; 4]);
        space.read(usize::MAX - 8, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
