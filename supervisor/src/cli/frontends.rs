//! The devices of `-accel qtest` ([`crate::frontend`]): `-device`, and what `-drive` brings along.

use super::draft::Draft;
use super::error::{UsageError, quote};
use super::given::Given;
use super::open_pairs::Open;
use crate::frontend;
use crate::objects::spec::is_identifier;
use ipc::device::NewDevice;
use std::ffi::OsStr;

/// A device, and how many of the others ([`Draft::devices`]) come before it.
#[derive(Debug)]
pub(super) struct FrontendDraft {
    given: Given,
    device: NewDevice,
    place: usize,
}

impl FrontendDraft {
    /// `id=`.
    pub(super) fn id(&self) -> Option<&str> {
        self.device.id.as_deref()
    }
}

/// `-device` of a type that only `-accel qtest` has, or of one that is something else there.
pub(super) fn device(draft: &mut Draft, given: &Given, pairs: &[(String, Open)]) -> Result<(), UsageError> {
    let device = read(given, pairs)?;
    if let Some(id) = &device.id
        && draft.has_device(id)
    {
        return Err(given.refuse(format!("Duplicate device ID '{id}'")));
    }
    draft.frontends.push(FrontendDraft {
        given: given.clone(),
        device,
        place: draft.devices.len(),
    });
    Ok(())
}

fn read(given: &Given, pairs: &[(String, Open)]) -> Result<NewDevice, UsageError> {
    let mut device = NewDevice::default();
    for (name, value) in pairs {
        let text = || {
            let expected = || given.refuse(format!("Invalid parameter type for '{name}', expected: string"));
            value.text().ok_or_else(expected)
        };
        let number = || {
            let text = text()?;
            let number = text.parse();
            number.map_err(|_| given.refuse(format!("Parameter '{name}' expects integer")))
        };
        let switch = || match text()?.as_str() {
            "on" | "true" | "yes" => Ok(true),
            "off" | "false" | "no" => Ok(false),
            _ => Err(given.refuse(format!("Parameter '{name}' expects 'on' or 'off'"))),
        };
        match name.as_str() {
            "driver" => device.driver = text()?,
            "id" => device.id = Some(text()?),
            "bus" => device.bus = Some(text()?),
            "addr" => device.addr = Some(text()?),
            "drive" => device.drive = Some(text()?),
            "iothread" => device.iothread = Some(text()?),
            "rerror" => device.rerror = Some(text()?),
            "serial" => device.serial = Some(text()?),
            "werror" => device.werror = Some(text()?),
            "write-cache" => device.write_cache = Some(text()?),
            "share-rw" => device.share_rw = Some(switch()?),
            "bootindex" => device.bootindex = Some(number()?),
            "channel" => device.channel = Some(number()?),
            "lun" => device.lun = Some(number()?),
            "num-queues" => device.num_queues = Some(number()?),
            "queue-size" => device.queue_size = Some(number()?),
            "scsi-id" => device.scsi_id = Some(number()?),
            "unit" => device.unit = Some(number()?),
            _ => {
                let (ty, name) = (device.driver, quote(OsStr::new(name)));
                return Err(given.refuse(format!("Property '{ty}.{name}' not found")));
            }
        }
    }
    if device.id.as_ref().is_some_and(|id| !is_identifier(id)) {
        return Err(given.refuse("Parameter 'id' expects an identifier"));
    }
    if let Some(ty) = frontend::find(&device.driver)
        && let Some(unknown) = device.given().find(|name| !ty.properties.contains(name))
    {
        return Err(given.refuse(format!("Property '{}.{unknown}' not found", ty.name)));
    }
    Ok(device)
}

/// After the last option: all of them in their order; those that drives bring along come last, as in QEMU.
pub(super) fn connect(draft: &mut Draft) -> Result<Vec<NewDevice>, UsageError> {
    let drafts = std::mem::take(&mut draft.frontends);
    let needs_qtest = drafts.first().map(|first| &first.given).filter(|_| !draft.is_qtest);
    if let Some(given) = needs_qtest {
        let driver = given.value.to_string_lossy();
        let driver = driver.split(',').next().unwrap_or_default();
        return Err(given.refuse(format!(
            "'{driver}' is a device of -accel qtest, where no guest runs (-device help lists a guest's)"
        )));
    }
    if let Some((given, problem)) = draft.only_with_qtest.take().filter(|_| !draft.is_qtest) {
        return Err(given.refuse(problem));
    }
    if !draft.is_qtest {
        return Ok(Vec::new());
    }
    let mut drafts = drafts.into_iter().peekable();
    let mut devices = Vec::new();
    for (place, other) in draft.devices.iter().enumerate() {
        while let Some(own) = drafts.next_if(|own| own.place <= place) {
            devices.push(own.device);
        }
        if other.is_frontend(draft) {
            let (given, pairs) = other.given();
            devices.push(read(given, pairs)?);
        }
    }
    devices.extend(drafts.map(|own| own.device));
    let virtio = draft
        .drives
        .iter()
        .zip(&draft.drive_has_device)
        .filter(|(_, has_device)| **has_device);
    devices.extend(virtio.map(|(drive, _)| NewDevice {
        driver: "virtio-blk-pci".to_owned(),
        drive: Some(drive.backend.id.clone()),
        serial: Some(drive.serial.clone()).filter(|serial| !serial.is_empty()),
        ..NewDevice::default()
    }));
    devices.append(&mut draft.brought_along);
    Ok(devices)
}
