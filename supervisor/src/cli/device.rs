//! Devices: `-device`.

use super::Invocation;
use super::draft::Draft;
use super::drive::{checked_serial, error_action};
use super::error::{UsageError, quote};
use super::given::Given;
use super::open_pairs::{self, Open};
use super::vmcoreinfo;
use crate::config::{BlockDevice, Device, Model, RngDevice};
use crate::device_types::{DEFAULT_MAX_BYTES, DEFAULT_PERIOD_MS, DeviceType, VMCOREINFO, find};
use crate::frontend;
use crate::objects::Spec;
use crate::objects::spec::is_identifier;
use ipc::block::RngLimit;
use ipc::objects::{PropertyValue, Scalar};
use ipc::virtio::{DEFAULT_QUEUE_SIZE, MAX_DEVICES, MAX_QUEUE_SIZE, MAX_QUEUES, MIN_QUEUE_SIZE};
use std::ffi::OsStr;

/// Slots of the bus; the host bridge is in slot 0.
const SLOTS: u8 = 32;
/// The names that the bus answers to.
const BUSES: &[&str] = &["pcie.0", "pci.0"];
/// `num-queues` that means one per vCPU.
const AUTOMATIC_QUEUES: i64 = 65_535;

/// A device whose drive and objects may come later on the command line.
#[derive(Debug)]
pub(super) struct DeviceDraft {
    given: Given,
    ty: &'static DeviceType,
    id: Option<String>,
    slot: Option<u8>,
    pairs: Vec<(String, Open)>,
}

/// `-device`.
pub(super) fn device(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    if given.value == "help" || given.value == "?" {
        draft.answer = Some(if draft.is_qtest {
            Invocation::ListQtestDevices
        } else {
            Invocation::ListDevices
        });
        return Ok(());
    }
    let pairs = open_pairs::parse(given, "driver")?;
    let text = |key: &str| open_pairs::last(&pairs, key).map(|value| value.text().unwrap_or_default());
    let Some(driver) = text("driver") else {
        return Err(given.refuse("Parameter 'driver' is missing"));
    };
    if driver == VMCOREINFO {
        return vmcoreinfo::device(draft, given, &pairs);
    }
    if frontend::find(&driver).is_some() && (draft.is_qtest || find(&driver).is_none()) {
        return super::frontends::device(draft, given, &pairs);
    }
    let Some(ty) = find(&driver) else {
        let driver = quote(OsStr::new(&driver));
        return Err(given.refuse(format!(
            "'{driver}' is not a valid device model name (-device help lists them)"
        )));
    };
    let id = text("id");
    if id.as_ref().is_some_and(|id| !is_identifier(id)) {
        return Err(given.refuse("Parameter 'id' expects an identifier"));
    }
    if let Some(bus) = text("bus").filter(|bus| !BUSES.contains(&bus.as_str())) {
        return Err(given.refuse(format!("Bus '{}' not found", quote(OsStr::new(&bus)))));
    }
    for (name, _) in &pairs {
        if !matches!(name.as_str(), "driver" | "id" | "bus") && ty.property(name).is_none() {
            let name = quote(OsStr::new(name));
            return Err(given.refuse(format!("Property '{}.{name}' not found", ty.name)));
        }
    }
    if let Some(id) = &id
        && draft.has_device(id)
    {
        return Err(given.refuse(format!("Duplicate device ID '{id}'")));
    }
    let slot = match open_pairs::last(&pairs, "addr") {
        Some(value) => slot(value).map_err(|problem| {
            given.refuse(match problem {
                Some(problem) => problem.to_owned(),
                None => {
                    let value = value.text().unwrap_or_default();
                    let value = quote(OsStr::new(&value));
                    format!("Property '{}.addr' doesn't take value '{value}'", ty.name)
                }
            })
        })?,
        None => None,
    };
    draft.devices.push(DeviceDraft {
        given: given.clone(),
        ty,
        id,
        slot,
        pairs,
    });
    Ok(())
}

/// `06` or `06.0`, hexadecimal; in JSON also the number of the function on the bus, or -1. `None`: the first that is free.
fn slot(value: &Open) -> Result<Option<u8>, Option<&'static str>> {
    let (slot, function) = if let Open::Json(PropertyValue::Scalar(Scalar::Int(number))) = value {
        if *number == -1 {
            return Ok(None);
        }
        let number = u8::try_from(*number).map_err(|_| None)?;
        (number >> 3, number & 7)
    } else {
        let text = value.text().ok_or(None)?;
        let (slot, function) = text.split_once('.').unwrap_or((&text, "0"));
        let hexadecimal = |digits: &str| u8::from_str_radix(digits, 16).map_err(|_| None);
        (hexadecimal(slot)?, hexadecimal(function)?)
    };
    match (slot, function) {
        (0..SLOTS, 0) => Ok(Some(slot)),
        (0..SLOTS, 1..8) => Err(Some("every device has a slot to itself: function 0 is the only one")),
        _ => Err(None),
    }
}

impl DeviceDraft {
    /// `id=`.
    pub(super) fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// Whether it is a user of a drive and nothing else: no guest is there.
    pub(super) fn is_frontend(&self, draft: &Draft) -> bool {
        draft.is_qtest && frontend::find(self.ty.name).is_some()
    }

    /// The option that it was given by, and its properties.
    pub(super) fn given(&self) -> (&Given, &[(String, Open)]) {
        (&self.given, &self.pairs)
    }

    fn refuse(&self, problem: impl Into<String>) -> UsageError {
        self.given.refuse(problem)
    }

    fn get(&self, key: &str) -> Result<Option<String>, UsageError> {
        let Some(value) = open_pairs::last(&self.pairs, key) else {
            return Ok(None);
        };
        let text = value.text();
        text.map(Some)
            .ok_or_else(|| self.refuse(format!("Invalid parameter type for '{key}', expected: string")))
    }

    fn integer(&self, key: &str) -> Result<Option<i64>, UsageError> {
        let Some(text) = self.get(key)? else { return Ok(None) };
        let number = match text.strip_prefix("0x") {
            Some(digits) => i64::from_str_radix(digits, 16),
            None => text.parse(),
        };
        number
            .map(Some)
            .map_err(|_| self.refuse(format!("Parameter '{key}' expects integer")))
    }

    /// The object that a link names, which must be of a kind.
    fn link(
        &self,
        draft: &Draft,
        key: &str,
        expected: &str,
        fits: fn(&Spec) -> bool,
    ) -> Result<Option<String>, UsageError> {
        let Some(id) = self.get(key)? else { return Ok(None) };
        let path = id.strip_prefix("/objects/").unwrap_or(&id);
        match draft.objects.iter().find(|(known, _)| known == path) {
            Some((_, spec)) if fits(spec) => Ok(Some(path.to_owned())),
            Some(_) => Err(self.refuse(format!("Invalid parameter type for '{key}', expected: {expected}"))),
            None => Err(self.refuse(format!("Device '{}' not found", quote(OsStr::new(&id))))),
        }
    }

    fn model(&self, draft: &Draft, vcpus: u16, taken: &mut Vec<String>) -> Result<Model, UsageError> {
        if self.ty.name == "virtio-rng-pci" {
            return self.rng(draft).map(Model::Rng);
        }
        let Some(drive) = self.get("drive")? else {
            return Err(self.refuse("drive property not set"));
        };
        let found = draft.drives.iter().find(|known| known.backend.id == drive);
        if found.is_none() && !has_node(draft, &drive) {
            let drive = quote(OsStr::new(&drive));
            return Err(self.refuse(format!(
                "Property '{}.drive' can't find value '{drive}'",
                self.ty.backend
            )));
        }
        if taken.contains(&drive) {
            return Err(self.refuse(format!("Drive '{drive}' is already in use by another device")));
        }
        taken.push(drive.clone());
        let queues = match self.integer("num-queues")? {
            None | Some(AUTOMATIC_QUEUES) => found
                .and_then(|drive| drive.queues)
                .unwrap_or(vcpus)
                .clamp(1, MAX_QUEUES),
            Some(0) => return Err(self.refuse("num-queues property must be larger than 0")),
            Some(count) => u16::try_from(count)
                .ok()
                .filter(|count| *count <= MAX_QUEUES)
                .ok_or_else(|| self.refuse(format!("num-queues property must be at most {MAX_QUEUES}")))?,
        };
        let queue_size = match self.integer("queue-size")? {
            None => DEFAULT_QUEUE_SIZE,
            Some(size) => u16::try_from(size)
                .ok()
                .filter(|size| size.is_power_of_two() && (MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(size))
                .ok_or_else(|| {
                    self.refuse(format!(
                        "invalid queue-size property ({size}), must be a power of 2 (max {MAX_QUEUE_SIZE})"
                    ))
                })?,
        };
        let serial = match self.get("serial")? {
            Some(serial) => checked_serial(&serial).map_err(|problem| self.refuse(problem))?,
            None => found.map(|drive| drive.serial.clone()).unwrap_or_default(),
        };
        let boot_index = match self.integer("bootindex")? {
            None | Some(-1) => None,
            Some(index) => Some(
                i32::try_from(index)
                    .ok()
                    .filter(|index| *index >= 0)
                    .ok_or_else(|| self.refuse("Parameter 'bootindex' expects int32_t"))?,
            ),
        };
        let io_thread = self.link(draft, "iothread", "iothread", |spec| matches!(spec, Spec::IoThread(_)))?;
        let write_cache = match self.get("write-cache")?.as_deref() {
            None | Some("auto") => None,
            Some("on") => Some(true),
            Some("off") => Some(false),
            Some(other) => {
                let other = quote(OsStr::new(other));
                return Err(self.refuse(format!("Parameter 'write-cache' does not accept value '{other}'")));
            }
        };
        let action = |key: &str, is_write| match self.get(key)? {
            Some(word) => error_action(&word, is_write).map_err(|problem| self.refuse(problem)),
            None => Ok(None),
        };
        Ok(Model::Block(BlockDevice {
            drive,
            io_thread,
            queues,
            queue_size,
            serial,
            boot_index,
            write_cache,
            read_error: action("rerror", false)?,
            write_error: action("werror", true)?,
        }))
    }

    fn rng(&self, draft: &Draft) -> Result<RngDevice, UsageError> {
        let backend = self.link(draft, "rng", "rng-backend", |spec| {
            matches!(spec, Spec::RngBuiltin | Spec::RngRandom(_))
        })?;
        let max_bytes = u64::try_from(self.integer("max-bytes")?.unwrap_or(DEFAULT_MAX_BYTES))
            .map_err(|_| self.refuse("'max-bytes' parameter must be non-negative, and less than 2^63"))?;
        let period = self.integer("period")?.unwrap_or(i64::from(DEFAULT_PERIOD_MS));
        let period_ms = u32::try_from(period)
            .ok()
            .filter(|period| *period > 0)
            .ok_or_else(|| self.refuse("'period' parameter expects a positive integer"))?;
        Ok(RngDevice {
            backend,
            limit: RngLimit { max_bytes, period_ms },
        })
    }
}

/// Whether a node of this name comes with the machine.
fn has_node(draft: &Draft, name: &str) -> bool {
    let drives = draft.drives.iter().map(|drive| &drive.node);
    let mut trees = draft.blockdevs.iter().map(|(_, node)| node).chain(drives);
    trees.any(|tree| tree.nodes().iter().any(|node| node.name.as_deref() == Some(name)))
}

/// After the last option: finds drives and objects, and gives every device its slot. Devices of `-drive if=virtio` come
/// last, as in QEMU.
pub(super) fn connect_devices(draft: &Draft, vcpus: u16) -> Result<Vec<Device>, UsageError> {
    let implied: Vec<usize> = (0..draft.drives.len())
        .filter(|place| !draft.is_qtest && draft.drive_has_device.get(*place) == Some(&true))
        .collect();
    let mut taken: Vec<String> = implied
        .iter()
        .map(|place| draft.drives[*place].backend.id.clone())
        .collect();
    let mut used: [Option<&DeviceDraft>; SLOTS as usize] = [None; SLOTS as usize];
    let own = || draft.devices.iter().filter(|device| !device.is_frontend(draft));
    for device in own() {
        let Some(slot) = device.slot else { continue };
        let name = device.ty.name;
        let occupied = |by: &str| {
            device.refuse(format!(
                "PCI: slot {slot} function 0 not available for {name}, in use by {by}"
            ))
        };
        match used[usize::from(slot)].replace(device) {
            _ if slot == 0 => return Err(occupied("the host bridge")),
            Some(other) => {
                let id = other.id.as_deref().unwrap_or("(null)");
                return Err(occupied(&format!("{},id={id}", other.ty.name)));
            }
            None => {}
        }
    }
    let mut free = (1..SLOTS).filter(|slot| used[usize::from(*slot)].is_none());
    let mut devices = Vec::new();
    for device in own() {
        let slot = device
            .slot
            .or_else(|| free.next())
            .ok_or_else(|| device.refuse("every slot of the bus is taken"))?;
        devices.push(Device {
            id: device.id.clone(),
            slot,
            model: device.model(draft, vcpus, &mut taken)?,
        });
    }
    for place in implied {
        let drive = &draft.drives[place];
        let slot = free
            .next()
            .ok_or_else(|| UsageError::new("-drive", "every slot of the bus is taken"))?;
        devices.push(Device {
            id: None,
            slot,
            model: Model::Block(BlockDevice {
                drive: drive.backend.id.clone(),
                io_thread: None,
                queues: drive.queues.unwrap_or(vcpus).clamp(1, MAX_QUEUES),
                queue_size: DEFAULT_QUEUE_SIZE,
                serial: drive.serial.clone(),
                boot_index: None,
                write_cache: None,
                read_error: None,
                write_error: None,
            }),
        });
    }
    if devices.len() > usize::from(MAX_DEVICES) {
        return Err(UsageError::new(
            "-device",
            format!("{} devices; a machine has at most {MAX_DEVICES}", devices.len()),
        ));
    }
    Ok(devices)
}
