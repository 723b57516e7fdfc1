//! What vcpu-proc (the transport) and block-proc (the device) must agree on about a virtio device.
//!
//! vcpu-proc owns the registers that the guest programs; when the driver is ready it reports what was programmed
//! ([`Activation`]), and the supervisor passes that on to block-proc, which works on the virtqueues directly.

use crate::caps::{CallFd, KickFd};
use serde::{Deserialize, Serialize};

/// Number of a virtio device of this machine: dense from 0, assigned by the supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeviceIndex(pub u8);

/// Most virtio devices in one machine.
pub const MAX_DEVICES: u8 = 24;
/// Most virtqueues of one device.
pub const MAX_QUEUES: u16 = 32;
/// Largest virtqueue, descriptors.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Smallest virtqueue: a request has a header, data and a status.
pub const MIN_QUEUE_SIZE: u16 = 4;
/// The size of a virtqueue without `queue-size=`: QEMU's, which performance advice assumes.
pub const DEFAULT_QUEUE_SIZE: u16 = 256;
/// Most threads that serve virtqueues: the main one and those of iothread objects.
pub const MAX_IO_THREADS: u8 = 16;
/// Queue pairs of eventfds that fit into one message.
pub const QUEUE_FDS_PER_MESSAGE: usize = 8;

/// A thread of block-proc that serves virtqueues: 0 is the main one, the others are for iothread objects.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct IoThreadIndex(pub u8);

impl IoThreadIndex {
    /// The thread that every block-proc has.
    pub const MAIN: Self = Self(0);
}

/// Number of an activation: given by the supervisor, from 1 on, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ActivationNumber(pub u64);

/// What kind of virtio device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    /// virtio-blk: virtio device ID 2.
    Block,
    /// virtio-rng: virtio device ID 4.
    Rng,
}

/// The eventfds of one virtqueue.
#[derive(Debug, Serialize, Deserialize)]
pub struct QueueFds {
    /// Guest to device.
    pub kick: KickFd,
    /// Device to guest.
    pub call: CallFd,
}

/// The device half of a virtio device, as its driver sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceIdentity {
    /// Feature bits offered by the device type (VIRTIO_BLK_F_*, VIRTIO_RING_F_*, VIRTIO_F_VERSION_1…).
    pub features: u64,
    /// Device configuration space, as the virtio specification lays it out for this type.
    pub config: Vec<u8>,
}

/// One virtqueue as the driver programmed it. Addresses are guest physical and untrusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSetup {
    /// Queue number.
    pub index: u16,
    /// Number of descriptors.
    pub size: u16,
    /// Descriptor table.
    pub descriptor_table: u64,
    /// Available (driver) ring.
    pub avail_ring: u64,
    /// Used (device) ring.
    pub used_ring: u64,
}

/// What the driver programmed when it set DRIVER_OK.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activation {
    /// Feature bits that the driver accepted (a subset of those offered, checked by the transport).
    pub features: u64,
    /// The enabled queues.
    pub queues: Vec<QueueSetup>,
}
