//! A virtio device behind memory-mapped registers (virtio 1.2, section 4.2.2), as microVMs have them. Polling only: no
//! interrupt is ever asked for.

use crate::failure::{Failure, ensure};
use crate::queue::{Features, Queue};
use crate::region::Region;
use crate::script::Arguments;
use crate::virtio::Transport;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// Not the legacy interface.
const VERSION: u32 = 2;
/// Where registers end and the device's configuration begins; all of both that is used fits into [`BYTES`].
const CONFIG: u64 = 0x100;
const BYTES: u64 = 0x200;

mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESCRIPTORS: u64 = 0x080;
    pub const QUEUE_AVAIL: u64 = 0x090;
    pub const QUEUE_USED: u64 = 0x0a0;
    pub const GENERATION: u64 = 0x0fc;
}

/// A virtio device.
#[derive(Clone, Copy)]
pub struct Device {
    registers: Region,
    config: Region,
}

impl Device {
    /// The device that the monitor names in the kernel's way, `virtio_mmio.device=SIZE@ADDRESS:INTERRUPT`, when it is of
    /// this type. `None` without that word.
    pub fn named(arguments: Arguments<'_>, kind: u16) -> Option<Result<Self, Failure>> {
        let (_, place) = arguments.text("virtio_mmio.device")?.split_once('@')?;
        let (address, _) = place.split_once(':')?;
        let address = u64::from_str_radix(address.trim_start_matches("0x"), 16).ok()?;
        Some(Self::at(address, kind))
    }

    fn at(address: u64, kind: u16) -> Result<Self, Failure> {
        let registers = Region::new(address, BYTES);
        let word = |place: u64| registers.read::<u32>(place);
        ensure(word(register::MAGIC) == MAGIC, "no virtio-mmio device there")?;
        ensure(word(register::VERSION) == VERSION, "virtio-mmio device is not modern")?;
        ensure(
            word(register::DEVICE) == u32::from(kind),
            "virtio-mmio device of another type",
        )?;
        Ok(Self {
            registers,
            config: registers.part(CONFIG, BYTES - CONFIG),
        })
    }
}

impl Transport for Device {
    fn status(&self) -> u8 {
        self.registers.read::<u32>(register::STATUS) as u8
    }

    fn set_status(&self, status: u8) {
        self.registers.write(register::STATUS, u32::from(status));
    }

    fn want(&self, features: u64) {
        for (select, half) in [(0_u32, features as u32), (1, (features >> 32) as u32)] {
            self.registers.write(register::DRIVER_FEATURES_SELECT, select);
            self.registers.write(register::DRIVER_FEATURES, half);
        }
    }

    fn config(&self) -> Region {
        self.config
    }

    fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.registers.write(register::DEVICE_FEATURES_SELECT, select);
            u64::from(self.registers.read::<u32>(register::DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    fn route_interrupts(&self) -> Result<(), Failure> {
        Ok(())
    }

    fn generation(&self) -> u32 {
        self.registers.read(register::GENERATION)
    }

    fn queue(&self, index: u16, largest: u16, features: Features) -> Result<Queue, Failure> {
        let registers = self.registers;
        registers.write(register::QUEUE_SELECT, u32::from(index));
        let offered: u32 = registers.read(register::QUEUE_SIZE_MAX);
        let size = u16::try_from(offered).map_or(largest, |offered| offered.min(largest));
        ensure(size.is_power_of_two(), "queue size")?;
        registers.write(register::QUEUE_SIZE, u32::from(size));
        let doorbell = registers.part(register::QUEUE_NOTIFY, 4);
        let queue = Queue::new(index, size, features, doorbell, 0);
        for (register, address) in [
            (register::QUEUE_DESCRIPTORS, queue.descriptors.address()),
            (register::QUEUE_AVAIL, queue.avail.address()),
            (register::QUEUE_USED, queue.used.address()),
        ] {
            registers.write(register, address as u32);
            registers.write(register + 4, (address >> 32) as u32);
        }
        registers.write(register::QUEUE_READY, 1_u32);
        ensure(registers.read::<u32>(register::QUEUE_READY) == 1, "queue not enabled")?;
        Ok(queue)
    }

    fn queues(&self) -> u16 {
        let has = |index: &u16| {
            self.registers.write(register::QUEUE_SELECT, u32::from(*index));
            self.registers.read::<u32>(register::QUEUE_SIZE_MAX) != 0
        };
        (0..u16::MAX).take_while(has).count() as u16
    }
}
