//! A virtio device behind PCI, by the modern interface.

use crate::failure::{Failure, ensure, failure};
use crate::lapic;
use crate::pci::{Access, Function, functions};
use crate::queue::{Features, Queue};
use crate::region::Region;
use crate::virtio::Transport;

const VENDOR: u16 = 0x1af4;
/// Modern device IDs are this plus the virtio device type.
const MODERN_BASE: u16 = 0x1040;
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
/// Virtio capability: window onto BARs in configuration space.
const STRUCTURE_WINDOW: u8 = 5;

/// Common configuration registers.
mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_VECTOR: u64 = 16;
    pub const NUM_QUEUES: u64 = 18;
    pub const STATUS: u64 = 20;
    pub const GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFFSET: u64 = 30;
    pub const QUEUE_DESCRIPTORS: u64 = 32;
    pub const QUEUE_AVAIL: u64 = 40;
    pub const QUEUE_USED: u64 = 48;
}

/// The interrupt vectors of the machine that a device uses start here.
pub const FIRST_VECTOR: u8 = 0x50;
/// Most vectors that one device gets.
const MAX_VECTORS: u16 = 34;
/// What the device answers when it has no vector to give.
const NO_VECTOR: u16 = 0xffff;

/// A virtio device.
#[derive(Clone, Copy)]
pub struct Device {
    /// Its PCI function.
    pub function: Function,
    common: Region,
    notify: Region,
    notify_multiplier: u32,
    config: Region,
    msix: u16,
    /// Entries of the MSI-X table.
    pub vectors: u16,
    table: Region,
    pending: Region,
}

/// The devices of a type, in slot order.
pub fn find(access: Access, kind: u16) -> impl Iterator<Item = Function> {
    functions(access).filter(move |function| {
        let transitional = (0x1000..0x1040).contains(&function.device()) && function.subsystem() == kind;
        function.vendor() == VENDOR && (function.device() == MODERN_BASE + kind || transitional)
    })
}

impl Device {
    /// Finds the registers.
    pub fn new(function: Function) -> Result<Self, Failure> {
        let structure = |kind: u8| {
            let place = function
                .capabilities(CAPABILITY_VENDOR)
                .find(|place| function.read::<u8>(place + 3) == kind)
                .ok_or(failure("virtio capability missing"))?;
            let bar = function.window(function.read(place + 4))?;
            let (offset, bytes) = (function.read::<u32>(place + 8), function.read::<u32>(place + 12));
            ensure(
                u64::from(offset) + u64::from(bytes) <= bar.bytes(),
                "virtio structure outside of its BAR",
            )?;
            Ok((place, bar.part(offset.into(), bytes.into())))
        };
        let (_, common) = structure(1)?;
        let (notify_place, notify) = structure(2)?;
        structure(3)?;
        let (_, config) = structure(4)?;
        let msix = function
            .capabilities(CAPABILITY_MSIX)
            .next()
            .ok_or(failure("MSI-X capability missing"))?;
        let vectors = (function.read::<u16>(msix + 2) & 0x7ff) + 1;
        let place: u32 = function.read(msix + 4);
        let table = function
            .window((place & 7) as u8)?
            .part(u64::from(place & !7), 16 * u64::from(vectors));
        let place: u32 = function.read(msix + 8);
        let pending = function
            .window((place & 7) as u8)?
            .part(u64::from(place & !7), 8 * u64::from(vectors.div_ceil(64)));
        Ok(Self {
            function,
            common,
            notify,
            notify_multiplier: function.read(notify_place + 16),
            config,
            msix,
            vectors,
            table,
            pending,
        })
    }

    /// Points an MSI-X entry at another vector of this processor.
    pub fn route(&self, entry: u16, vector: u8) {
        self.table.write::<u32>(16 * u64::from(entry) + 8, u32::from(vector));
    }

    /// Masks or unmasks all MSI-X entries.
    pub fn mask_all(&self, masked: bool) {
        let control = self.function.read::<u16>(self.msix + 2) & !0x4000;
        self.function
            .write(self.msix + 2, if masked { control | 0x4000 } else { control });
    }

    /// Whether an interrupt of an entry waits for its mask to go.
    pub fn pending(&self, entry: u16) -> bool {
        self.pending.read::<u64>(u64::from(entry) / 64 * 8) >> (entry % 64) & 1 != 0
    }

    /// Masks or unmasks one MSI-X entry.
    pub fn mask(&self, entry: u16, masked: bool) {
        self.table.write::<u32>(16 * u64::from(entry) + 12, u32::from(masked));
    }

    /// The MSI-X entry that a queue uses: one each, as far as they go.
    pub fn queue_entry(&self, queue: u16) -> u16 {
        if self.vectors > 1 {
            1 + queue % (self.vectors.min(MAX_VECTORS) - 1)
        } else {
            0
        }
    }

    /// Largest size that the device allows for a queue; 0 when there is no such queue.
    pub fn queue_size(&self, queue: u16) -> u16 {
        self.common.write(common::QUEUE_SELECT, queue);
        self.common.read(common::QUEUE_SIZE)
    }

    /// Enables a queue with all its rings at an address that may be any.
    pub fn queue_at(&self, index: u16, address: u64) -> Result<(), Failure> {
        ensure(self.queue_size(index) > 0, "queue size")?;
        for register in [common::QUEUE_DESCRIPTORS, common::QUEUE_AVAIL, common::QUEUE_USED] {
            self.common.write(register, address as u32);
            self.common.write(register + 4, (address >> 32) as u32);
        }
        self.common.write(common::QUEUE_ENABLE, 1_u16);
        Ok(())
    }

    /// Reads four bytes of a BAR through the window in configuration space, when the device has one.
    pub fn read_through_window(&self, structure_bar: u8, offset: u32) -> Option<u32> {
        let function = self.function;
        let place = function
            .capabilities(CAPABILITY_VENDOR)
            .find(|place| function.read::<u8>(place + 3) == STRUCTURE_WINDOW)?;
        function.write(place + 4, structure_bar);
        function.write(place + 8, offset);
        function.write(place + 12, 4_u32);
        Some(function.read(place + 16))
    }

    /// BAR and offset of the common configuration, for [`Self::read_through_window`].
    pub fn common_place(&self) -> Option<(u8, u32)> {
        let function = self.function;
        let place = function
            .capabilities(CAPABILITY_VENDOR)
            .find(|place| function.read::<u8>(place + 3) == 1)?;
        Some((function.read(place + 4), function.read(place + 8)))
    }
}

impl Transport for Device {
    fn status(&self) -> u8 {
        self.common.read(common::STATUS)
    }

    fn set_status(&self, status: u8) {
        self.common.write(common::STATUS, status);
    }

    fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.common.write(common::DEVICE_FEATURE_SELECT, select);
            u64::from(self.common.read::<u32>(common::DEVICE_FEATURE))
        };
        half(0) | half(1) << 32
    }

    fn want(&self, features: u64) {
        for (select, half) in [(0_u32, features as u32), (1, (features >> 32) as u32)] {
            self.common.write(common::DRIVER_FEATURE_SELECT, select);
            self.common.write(common::DRIVER_FEATURE, half);
        }
    }

    fn config(&self) -> Region {
        self.config
    }

    fn generation(&self) -> u32 {
        self.common.read::<u8>(common::GENERATION).into()
    }

    fn queues(&self) -> u16 {
        self.common.read(common::NUM_QUEUES)
    }

    fn queue(&self, index: u16, largest: u16, features: Features) -> Result<Queue, Failure> {
        let size = self.queue_size(index).min(largest);
        ensure(size.is_power_of_two(), "queue size")?;
        let entry = self.queue_entry(index);
        self.common.write(common::QUEUE_SIZE, size);
        self.common.write(common::QUEUE_VECTOR, entry);
        ensure(
            self.common.read::<u16>(common::QUEUE_VECTOR) == entry,
            "no vector for a queue",
        )?;
        let offset: u16 = self.common.read(common::QUEUE_NOTIFY_OFFSET);
        let doorbell = self
            .notify
            .part(u64::from(offset) * u64::from(self.notify_multiplier), 2);
        let queue = Queue::new(index, size, features, doorbell, FIRST_VECTOR + entry as u8);
        for (register, address) in [
            (common::QUEUE_DESCRIPTORS, queue.descriptors.address()),
            (common::QUEUE_AVAIL, queue.avail.address()),
            (common::QUEUE_USED, queue.used.address()),
        ] {
            self.common.write(register, address as u32);
            self.common.write(register + 4, (address >> 32) as u32);
        }
        self.common.write(common::QUEUE_ENABLE, 1_u16);
        ensure(self.common.read::<u16>(common::QUEUE_ENABLE) == 1, "queue not enabled")?;
        Ok(queue)
    }

    /// Routes the MSI-X entries to consecutive vectors of this processor, starting at [`FIRST_VECTOR`], and switches
    /// MSI-X on. Entry 0 becomes the configuration's.
    fn route_interrupts(&self) -> Result<(), Failure> {
        let control: u16 = self.function.read(self.msix + 2);
        self.function.write(self.msix + 2, control | 0xc000);
        for entry in 0..self.vectors.min(MAX_VECTORS) {
            let place = 16 * u64::from(entry);
            self.table.write::<u32>(place, 0xfee0_0000 | lapic::id() << 12);
            self.table.write::<u32>(place + 4, 0);
            self.table
                .write::<u32>(place + 8, u32::from(FIRST_VECTOR) + u32::from(entry));
            self.table.write::<u32>(place + 12, 0);
            ensure(
                self.table.read::<u32>(place + 8) == u32::from(FIRST_VECTOR) + u32::from(entry),
                "MSI-X table does not keep what was written",
            )?;
        }
        self.function.write(self.msix + 2, control & !0x4000 | 0x8000);
        self.common.write(common::CONFIG_VECTOR, 0_u16);
        ensure(
            self.common.read::<u16>(common::CONFIG_VECTOR) != NO_VECTOR,
            "no vector for the configuration",
        )
    }
}
