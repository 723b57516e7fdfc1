//! What drivers do with a virtio device wherever its registers are: behind PCI or memory-mapped.

use crate::clock::Deadline;
use crate::failure::{Failure, ensure};
use crate::queue::{Features, Queue};
use crate::region::Region;

/// Device status bits.
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// It knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// It is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on.
    pub const NEEDS_RESET: u8 = 0x40;
    /// The guest has given it up; or the device cannot be reset, where a monitor says so in this way (Firecracker's disk).
    pub const FAILED: u8 = 0x80;
}

/// How a device's registers are reached.
pub trait Transport: Copy {
    /// Device status.
    fn status(&self) -> u8;
    /// Sets device status.
    fn set_status(&self, status: u8);
    /// The features that the device offers.
    fn offered(&self) -> u64;
    /// Writes the features that the driver wants.
    fn want(&self, features: u64);
    /// The device's own configuration.
    fn config(&self) -> Region;
    /// The counter that changes with the configuration.
    fn generation(&self) -> u32;
    /// How many queues it has.
    fn queues(&self) -> u16;
    /// Sets up a queue of at most `largest` descriptors and enables it.
    fn queue(&self, index: u16, largest: u16, features: Features) -> Result<Queue, Failure>;
    /// Gives each queue an interrupt vector, where there is a choice.
    fn route_interrupts(&self) -> Result<(), Failure>;

    /// Adds bits to device status.
    fn add_status(&self, bits: u8) {
        self.set_status(self.status() | bits);
    }

    /// Resets and waits for it. A device that cannot be reset is left as it is.
    fn reset(&self) -> Result<(), Failure> {
        self.set_status(0);
        let deadline = Deadline::after_ms(20_000);
        while !matches!(self.status(), 0 | status::FAILED..) {
            ensure(!deadline.passed(), "device reset does not end")?;
        }
        Ok(())
    }

    /// Resets and agrees on features.
    fn negotiate(&self, features: u64) -> Result<(), Failure> {
        self.reset()?;
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        self.want(features);
        self.add_status(status::FEATURES_OK);
        ensure(self.status() & status::FEATURES_OK != 0, "features refused")
    }

    /// The device may work from now on.
    fn start(&self) -> Result<(), Failure> {
        self.add_status(status::DRIVER_OK);
        ensure(
            self.status() & status::NEEDS_RESET == 0,
            "device needs reset after DRIVER_OK",
        )
    }

    /// Reads a 64-bit field of the device's configuration.
    fn config64(&self, offset: u64) -> u64 {
        loop {
            let before = self.generation();
            let low: u32 = self.config().read(offset);
            let high: u32 = self.config().read(offset + 4);
            if self.generation() == before {
                return u64::from(high) << 32 | u64::from(low);
            }
        }
    }
}
