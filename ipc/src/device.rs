//! device_add: a device's driver and properties.

use serde::{Deserialize, Serialize};

/// Every property that some device takes; which device takes which is the supervisor's to say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NewDevice {
    /// The type.
    pub driver: String,
    /// The name of the bus that it goes on.
    pub bus: Option<String>,
    /// Its name.
    pub id: Option<String>,
    /// The slot on a PCI bus.
    pub addr: Option<String>,
    /// Its place among what the machine boots from.
    pub bootindex: Option<i64>,
    /// The channel on a SCSI bus.
    pub channel: Option<i64>,
    /// The id of a drive, or the name of a node.
    pub drive: Option<String>,
    /// The id of the iothread that serves it.
    pub iothread: Option<String>,
    /// The logical unit on a SCSI bus.
    pub lun: Option<i64>,
    /// How many queues.
    pub num_queues: Option<i64>,
    /// Descriptors of a queue.
    pub queue_size: Option<i64>,
    /// What becomes of a failed read.
    pub rerror: Option<String>,
    /// The target on a SCSI bus.
    pub scsi_id: Option<i64>,
    /// Its serial number.
    pub serial: Option<String>,
    /// Others may write to the disk as well.
    pub share_rw: Option<bool>,
    /// The unit on an IDE or floppy bus.
    pub unit: Option<i64>,
    /// What becomes of a failed write.
    pub werror: Option<String>,
    /// Whether the guest sees a volatile write cache.
    pub write_cache: Option<String>,
}

impl NewDevice {
    /// The names of the properties that are there, beside the type, the bus and the id.
    pub fn given(&self) -> impl Iterator<Item = &'static str> {
        [
            ("addr", self.addr.is_some()),
            ("bootindex", self.bootindex.is_some()),
            ("channel", self.channel.is_some()),
            ("drive", self.drive.is_some()),
            ("iothread", self.iothread.is_some()),
            ("lun", self.lun.is_some()),
            ("num-queues", self.num_queues.is_some()),
            ("queue-size", self.queue_size.is_some()),
            ("rerror", self.rerror.is_some()),
            ("scsi-id", self.scsi_id.is_some()),
            ("serial", self.serial.is_some()),
            ("share-rw", self.share_rw.is_some()),
            ("unit", self.unit.is_some()),
            ("werror", self.werror.is_some()),
            ("write-cache", self.write_cache.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, is_given)| is_given.then_some(name))
    }
}
