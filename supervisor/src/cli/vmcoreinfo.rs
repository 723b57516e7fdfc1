//! `-device vmcoreinfo`: the one device that is not on PCI.

use super::draft::Draft;
use super::error::{UsageError, quote};
use super::given::Given;
use super::open_pairs::Open;
use crate::config::VmCoreInfoDevice;
use crate::device_types::VMCOREINFO;
use crate::objects::spec::is_identifier;
use std::ffi::OsStr;

/// Takes the device, whose only property is its id.
pub(super) fn device(draft: &mut Draft, given: &Given, pairs: &[(String, Open)]) -> Result<(), UsageError> {
    let mut id = None;
    for (name, value) in pairs {
        match name.as_str() {
            "driver" => {}
            "id" => id = value.text(),
            _ => {
                let name = quote(OsStr::new(name));
                return Err(given.refuse(format!("Property '{VMCOREINFO}.{name}' not found")));
            }
        }
    }
    if id.as_ref().is_some_and(|id| !is_identifier(id)) {
        return Err(given.refuse("Parameter 'id' expects an identifier"));
    }
    if let Some(id) = &id
        && draft.has_device(id)
    {
        return Err(given.refuse(format!("Duplicate device ID '{id}'")));
    }
    if draft.vmcoreinfo.is_some() {
        return Err(given.refuse(format!("at most one {VMCOREINFO} device is permitted")));
    }
    draft.vmcoreinfo = Some(VmCoreInfoDevice {
        id,
        place: draft.devices.len(),
    });
    Ok(())
}
