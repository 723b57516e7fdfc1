//! The types of devices and their properties, as data: what `-device` takes, device-list-properties lists and QOM shows.

use ipc::objects::{ObjectPropertyInfo, PropertyValue};
use ipc::virtio::DEFAULT_QUEUE_SIZE;

/// `period` without being set, milliseconds.
pub const DEFAULT_PERIOD_MS: u32 = 1 << 16;
/// `max-bytes` without being set: no limit.
pub const DEFAULT_MAX_BYTES: i64 = i64::MAX;
/// `num-queues` without being set: one per vCPU.
const AUTOMATIC_QUEUES: i64 = 65_535;

/// A type of devices.
#[derive(Debug)]
pub struct DeviceType {
    /// `driver`.
    pub name: &'static str,
    /// Another name for it.
    pub alias: &'static str,
    /// The type of the virtio device inside, `virtio-backend`.
    pub backend: &'static str,
    /// For `-device help`.
    pub description: &'static str,
    /// Where `-device help` lists it.
    pub category: &'static str,
    /// Its properties.
    pub properties: &'static [DeviceProperty],
}

/// A property of a device.
#[derive(Debug)]
pub struct DeviceProperty {
    /// Its name.
    pub name: &'static str,
    /// What it holds.
    pub ty: &'static str,
    /// For people.
    pub description: Option<&'static str>,
    /// What it is without being set.
    pub default: Option<i64>,
    /// It belongs to the virtio device inside.
    pub inner: bool,
}

const ADDR: DeviceProperty = DeviceProperty {
    name: "addr",
    ty: "int32",
    description: Some("PCI slot, with or without function 0: 06 or 06.0"),
    default: Some(-1),
    inner: false,
};

const fn inner(name: &'static str, ty: &'static str, default: Option<i64>) -> DeviceProperty {
    DeviceProperty {
        name,
        ty,
        description: None,
        default,
        inner: true,
    }
}

/// All types.
pub static DEVICE_TYPES: &[DeviceType] = &[
    DeviceType {
        name: "virtio-blk-pci",
        alias: "virtio-blk",
        backend: "virtio-blk-device",
        description: "a disk: a -drive with if=none, or a -blockdev",
        category: "Storage",
        properties: &[
            ADDR,
            inner("bootindex", "int32", None),
            DeviceProperty {
                name: "drive",
                ty: "str",
                description: Some("the id of a -drive, or the name of a node"),
                default: None,
                inner: true,
            },
            inner("iothread", "link<iothread>", None),
            inner("num-queues", "uint16", Some(AUTOMATIC_QUEUES)),
            inner("queue-size", "uint16", Some(DEFAULT_QUEUE_SIZE as i64)),
            inner("rerror", "BlockdevOnError", None),
            inner("serial", "str", None),
            inner("werror", "BlockdevOnError", None),
            inner("write-cache", "OnOffAuto", None),
        ],
    },
    DeviceType {
        name: "virtio-rng-pci",
        alias: "virtio-rng",
        backend: "virtio-rng-device",
        description: "random numbers",
        category: "Misc",
        properties: &[
            ADDR,
            inner("max-bytes", "uint64", Some(DEFAULT_MAX_BYTES)),
            inner("period", "uint32", Some(DEFAULT_PERIOD_MS as i64)),
            inner("rng", "link<rng-backend>", None),
        ],
    },
];

/// The type of this name or alias.
pub fn find(name: &str) -> Option<&'static DeviceType> {
    DEVICE_TYPES.iter().find(|ty| ty.name == name || ty.alias == name)
}

impl DeviceType {
    /// Its property of this name.
    pub fn property(&self, name: &str) -> Option<&'static DeviceProperty> {
        self.properties.iter().find(|property| property.name == name)
    }
}

impl DeviceProperty {
    /// What device-list-properties says about it.
    pub fn info(&self) -> ObjectPropertyInfo {
        ObjectPropertyInfo {
            name: self.name.to_owned(),
            ty: self.ty.to_owned(),
            description: self.description.map(str::to_owned),
            default_value: self.default.map(PropertyValue::from),
        }
    }
}
