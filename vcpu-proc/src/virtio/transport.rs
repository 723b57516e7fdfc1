//! The common configuration structure (virtio 1.2 §4.1.4.3) and the device status state machine (§2.1, §3.1), as pure
//! data: registers in, [`Effect`]s out. What an effect does to the world is [`super::device`]'s business.
//!
//! The device proper lives in another process, so two transitions take time, and [`Phase`] says where they are: after
//! DRIVER_OK the device may not serve its queues yet (the driver need not know: kicks wait in their eventfds), and after
//! a write of status 0 it may still be using them. Until it is certain that it does not, status reads non-zero; §4.1.4.3.2
//! has drivers wait for 0 before they reuse the queues' memory.

use ipc::virtio::{Activation, QueueSetup};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_ADMIN_VQ, VIRTIO_F_NOTIF_CONFIG_DATA,
    VIRTIO_F_NOTIFICATION_DATA, VIRTIO_F_RING_PACKED, VIRTIO_F_RING_RESET, VIRTIO_F_SR_IOV, VIRTIO_F_VERSION_1,
};

use crate::pci::msix::NO_VECTOR;

/// Bytes of the structure, up to and with queue_reset.
const STRUCTURE_BYTES: usize = 0x3c;

/// Offsets of the registers that are written.
mod register {
    pub const DEVICE_FEATURE_SELECT: usize = 0x00;
    pub const DRIVER_FEATURE_SELECT: usize = 0x08;
    pub const DRIVER_FEATURE: usize = 0x0c;
    pub const CONFIG_VECTOR: usize = 0x10;
    pub const STATUS: usize = 0x14;
    pub const QUEUE_SELECT: usize = 0x16;
    pub const QUEUE_SIZE: usize = 0x18;
    pub const QUEUE_VECTOR: usize = 0x1a;
    pub const QUEUE_ENABLE: usize = 0x1c;
    pub const QUEUE_DESC: usize = 0x20;
    pub const QUEUE_DRIVER: usize = 0x28;
    pub const QUEUE_DEVICE: usize = 0x30;
}

const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;

/// Features that ask something of the transport which it does not do; never offered, whatever the device says.
const UNSUPPORTED: u64 = 1 << VIRTIO_F_RING_PACKED
    | 1 << VIRTIO_F_SR_IOV
    | 1 << VIRTIO_F_NOTIFICATION_DATA
    | 1 << VIRTIO_F_NOTIF_CONFIG_DATA
    | 1 << VIRTIO_F_RING_RESET
    | 1 << VIRTIO_F_ADMIN_VQ;

/// Where the device proper is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// It has no queues.
    Idle,
    /// It was told of the queues.
    Activating,
    /// It serves them.
    Active,
    /// It was told to let go of them.
    Resetting,
}

/// What a register write means for others.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// The driver is ready: tell the device.
    Activate(Activation),
    /// The driver gave up the queues: tell the device, whose answer is [`Transport::reset_done`].
    RequestReset,
    /// The registers are as after power-on, at once.
    Reset,
    /// DEVICE_NEEDS_RESET was set: interrupt.
    NeedsReset,
    /// A queue has another vector.
    QueueVector(u16),
    /// The configuration interrupt has another vector.
    ConfigVector,
}

/// One queue's registers.
#[derive(Debug, Clone, Copy)]
struct Queue {
    size: u16,
    vector: u16,
    enabled: bool,
    descriptor_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl Queue {
    fn at_power_on(size: u16) -> Self {
        Self {
            size,
            vector: NO_VECTOR,
            enabled: false,
            descriptor_table: 0,
            avail_ring: 0,
            used_ring: 0,
        }
    }

    /// Alignment (§2.7) and no wrap-around. Whether there is RAM is for the device to see.
    fn is_sound(&self) -> bool {
        let size = u64::from(self.size);
        [
            (self.descriptor_table, 16, 16 * size),
            (self.avail_ring, 2, 6 + 2 * size),
            (self.used_ring, 4, 6 + 8 * size),
        ]
        .into_iter()
        .all(|(start, alignment, bytes)| start % alignment == 0 && start.checked_add(bytes).is_some())
    }
}

/// The registers of one device.
#[derive(Debug)]
pub struct Transport {
    /// How many MSI-X vectors a driver may name.
    vectors: u16,
    /// Largest queue that a driver may ask for, and the size it finds.
    queue_size: u16,
    offered: u64,
    phase: Phase,
    status: u8,
    generation: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    /// The driver accepted a feature beyond bit 63, of which none is offered.
    accepted_unknown: bool,
    config_vector: u16,
    queue_select: u16,
    queues: Vec<Queue>,
}

impl Transport {
    /// After power-on.
    pub fn new(queues: u16, queue_size: u16, vectors: u16) -> Self {
        Self {
            vectors,
            queue_size,
            offered: 0,
            phase: Phase::Idle,
            status: 0,
            generation: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            accepted_unknown: false,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queues: vec![Queue::at_power_on(queue_size); usize::from(queues)],
        }
    }

    /// Sets what is offered. A driver that has negotiated keeps what it got.
    pub fn offer(&mut self, features: u64) {
        self.offered = features & !UNSUPPORTED;
    }

    /// Marks a change of the device configuration, so that a driver that reads it in pieces reads it again.
    pub fn bump_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// Whether the driver runs the device: it has set DRIVER_OK and not begun a reset.
    pub fn is_running(&self) -> bool {
        self.status & DRIVER_OK != 0 && self.phase != Phase::Resetting
    }

    /// Whether a queue is enabled.
    pub fn is_enabled(&self, queue: usize) -> bool {
        self.queues.get(queue).is_some_and(|queue| queue.enabled)
    }

    /// The configuration interrupt's vector, or [`NO_VECTOR`].
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// A queue's vector, or [`NO_VECTOR`].
    pub fn queue_vector(&self, queue: u16) -> u16 {
        self.queues
            .get(usize::from(queue))
            .map_or(NO_VECTOR, |queue| queue.vector)
    }

    /// The device has taken the queues, or cannot. Ignored when nothing was asked.
    #[must_use]
    pub fn activated(&mut self, ok: bool) -> Option<Effect> {
        if self.phase != Phase::Activating {
            return None;
        }
        if ok {
            self.phase = Phase::Active;
            return None;
        }
        self.phase = Phase::Idle;
        self.needs_reset()
    }

    /// The device has let go of the queues. Ignored when nothing was asked.
    #[must_use]
    pub fn reset_done(&mut self) -> Option<Effect> {
        if self.phase != Phase::Resetting {
            return None;
        }
        self.reset();
        Some(Effect::Reset)
    }

    /// The device cannot go on until the driver resets it.
    #[must_use]
    pub fn broken(&mut self) -> Option<Effect> {
        if !self.is_running() {
            return None;
        }
        self.needs_reset()
    }

    fn needs_reset(&mut self) -> Option<Effect> {
        let news = self.status & NEEDS_RESET == 0;
        self.status |= NEEDS_RESET;
        news.then_some(Effect::NeedsReset)
    }

    /// Everything as after power-on, except what the device offers.
    pub fn reset(&mut self) {
        let queues = u16::try_from(self.queues.len()).unwrap_or(0);
        *self = Self {
            offered: self.offered,
            // Never goes back, or a driver could take an old configuration for unchanged.
            generation: self.generation,
            ..Self::new(queues, self.queue_size, self.vectors)
        };
    }

    /// Reads, with any size at any offset; bytes past the structure are zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = start
                .checked_add(index)
                .and_then(|at| image.get(at))
                .copied()
                .unwrap_or(0);
        }
    }

    /// The structure as it reads now.
    fn image(&self) -> [u8; STRUCTURE_BYTES] {
        let mut image = [0; STRUCTURE_BYTES];
        let mut put = |offset: usize, bytes: &[u8]| image[offset..][..bytes.len()].copy_from_slice(bytes);
        let half = |features: u64, select: u32| -> [u8; 4] {
            let [a, b, c, d, e, f, g, h] = features.to_le_bytes();
            match select {
                0 => [a, b, c, d],
                1 => [e, f, g, h],
                _ => [0; 4],
            }
        };
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &half(self.offered, self.device_feature_select));
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(0x0c, &half(self.driver_features, self.driver_feature_select));
        put(0x10, &self.config_vector.to_le_bytes());
        put(0x12, &u16::try_from(self.queues.len()).unwrap_or(0).to_le_bytes());
        put(0x14, &[self.status, self.generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        // A queue that does not exist reads as size 0.
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1a, &queue.vector.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            // queue_notify_off: each queue has its own register.
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.descriptor_table.to_le_bytes());
            put(0x28, &queue.avail_ring.to_le_bytes());
            put(0x30, &queue.used_ring.to_le_bytes());
        }
        image
    }

    /// Writes a register. §4.1.3.1 has drivers use the register's width, or two halves for 64 bits; other accesses are
    /// ignored, and so is everything while the device is being reset.
    #[must_use]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<Effect> {
        if self.phase == Phase::Resetting {
            return None;
        }
        let offset = usize::try_from(offset).ok()?;
        match *data {
            [byte] if offset == register::STATUS => self.write_status(byte),
            [a, b] => self.write_u16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => {
                self.write_u32(offset, u32::from_le_bytes([a, b, c, d]));
                None
            }
            [a, b, c, d, e, f, g, h] if offset % 8 == 0 => {
                self.write_address(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_address(offset + 4, u32::from_le_bytes([e, f, g, h]));
                None
            }
            _ => None,
        }
    }

    fn write_u16(&mut self, offset: usize, value: u16) -> Option<Effect> {
        let vector = if value < self.vectors { value } else { NO_VECTOR };
        match offset {
            register::CONFIG_VECTOR => {
                self.config_vector = vector;
                return Some(Effect::ConfigVector);
            }
            register::QUEUE_SELECT => {
                self.queue_select = value;
                return None;
            }
            _ => {}
        }
        let select = self.queue_select;
        let queue = self.queues.get_mut(usize::from(select))?;
        match offset {
            register::QUEUE_VECTOR => {
                queue.vector = vector;
                return Some(Effect::QueueVector(select));
            }
            register::QUEUE_SIZE if !queue.enabled && value.is_power_of_two() && value <= self.queue_size => {
                queue.size = value;
            }
            // Only 1 means anything: a queue is disabled by a reset of the device. A queue enabled after DRIVER_OK
            // (which §3.1.1 forbids) would be one that the device has never heard of.
            register::QUEUE_ENABLE if value == 1 && self.status & DRIVER_OK == 0 => queue.enabled = true,
            _ => {}
        }
        None
    }

    fn write_u32(&mut self, offset: usize, value: u32) {
        match offset {
            register::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            register::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            register::DRIVER_FEATURE => self.accept(value),
            _ => self.write_address(offset, value),
        }
    }

    fn accept(&mut self, value: u32) {
        if self.status & FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => self.accepted_unknown |= value != 0,
        }
    }

    /// Half of a ring's address.
    fn write_address(&mut self, offset: usize, value: u32) {
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        if queue.enabled {
            return;
        }
        let (address, high) = match offset {
            register::QUEUE_DESC => (&mut queue.descriptor_table, false),
            0x24 => (&mut queue.descriptor_table, true),
            register::QUEUE_DRIVER => (&mut queue.avail_ring, false),
            0x2c => (&mut queue.avail_ring, true),
            register::QUEUE_DEVICE => (&mut queue.used_ring, false),
            0x34 => (&mut queue.used_ring, true),
            _ => return,
        };
        let value = u64::from(value);
        *address = if high {
            *address & 0xffff_ffff | value << 32
        } else {
            *address & !0xffff_ffff | value
        };
    }

    fn write_status(&mut self, value: u8) -> Option<Effect> {
        if value == 0 {
            return Some(self.driver_reset());
        }
        // Drivers only ever add bits (§2.1.1); a bit that is missing here stays set.
        let added = value & !self.status;
        self.status |= added & (ACKNOWLEDGE | DRIVER | FAILED);
        if added & FEATURES_OK != 0 && self.features_are_acceptable() {
            self.status |= FEATURES_OK;
        }
        if added & DRIVER_OK != 0 && self.status & FEATURES_OK != 0 {
            self.status |= DRIVER_OK;
            return self.activate();
        }
        None
    }

    /// §2.2: a subset of what is offered, and the modern interface, which is the only one here (§6.1).
    fn features_are_acceptable(&self) -> bool {
        !self.accepted_unknown
            && self.driver_features & !self.offered == 0
            && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn activate(&mut self) -> Option<Effect> {
        if self.queues.iter().any(|queue| queue.enabled && !queue.is_sound()) {
            return self.needs_reset();
        }
        let queues = (0..)
            .zip(&self.queues)
            .filter(|(_, queue)| queue.enabled)
            .map(|(index, queue)| QueueSetup {
                index,
                size: queue.size,
                descriptor_table: queue.descriptor_table,
                avail_ring: queue.avail_ring,
                used_ring: queue.used_ring,
            })
            .collect();
        self.phase = Phase::Activating;
        Some(Effect::Activate(Activation {
            features: self.driver_features,
            queues,
        }))
    }

    fn driver_reset(&mut self) -> Effect {
        match self.phase {
            // The answer to an activation that is under way comes before that to the reset, and is ignored.
            Phase::Activating | Phase::Active => {
                self.phase = Phase::Resetting;
                Effect::RequestReset
            }
            Phase::Idle | Phase::Resetting => {
                self.reset();
                Effect::Reset
            }
        }
    }
}

#[cfg(test)]
mod tests;
