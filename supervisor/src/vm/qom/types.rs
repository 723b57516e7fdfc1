//! The types of the object tree, as data.

use crate::cli;
use crate::device_types::{DEVICE_TYPES, VMCOREINFO};
use crate::vm::query::cpu_type;
use ipc::objects::types::OBJECT_TYPES;

/// The type of the machine's object.
pub const MACHINE: &str = "bulkhead-machine";
/// The real-time clock's type.
pub const RTC: &str = "mc146818rtc";
/// The bus that a virtio device is on.
pub const VIRTIO_BUS: &str = "virtio-pci-bus";

/// A type: its name, what it is derived from, whether it has no objects of its own, and the interfaces that it adds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeInfo {
    /// Its name.
    pub name: String,
    /// What it is derived from.
    pub parent: Option<&'static str>,
    /// Whether it has no objects of its own.
    pub is_abstract: bool,
    /// The interface that it adds.
    pub interface: Option<&'static str>,
}

/// The types that others are derived from, and those without properties that can be set.
const FIXED: &[(&str, Option<&str>, bool, Option<&str>)] = &[
    ("object", None, true, None),
    ("interface", None, true, None),
    ("user-creatable", Some("interface"), true, None),
    ("container", Some("object"), false, None),
    ("machine", Some("object"), true, None),
    (MACHINE, Some("machine"), false, None),
    ("device", Some("object"), true, None),
    ("cpu", Some("device"), true, None),
    ("x86_64-cpu", Some("cpu"), true, None),
    (RTC, Some("device"), false, None),
    (VMCOREINFO, Some("device"), false, None),
    ("pci-device", Some("device"), true, None),
    ("virtio-pci", Some("pci-device"), true, None),
    ("virtio-device", Some("device"), true, None),
    ("bus", Some("object"), true, None),
    ("virtio-bus", Some("bus"), true, None),
    (VIRTIO_BUS, Some("virtio-bus"), false, None),
    ("event-loop-base", Some("object"), true, Some("user-creatable")),
    ("memory-backend", Some("object"), true, Some("user-creatable")),
    ("rng-backend", Some("object"), true, Some("user-creatable")),
    ("secret_common", Some("object"), true, Some("user-creatable")),
];

/// All types.
pub fn all() -> Vec<TypeInfo> {
    let ty = |name: &str, parent, is_abstract, interface| TypeInfo {
        name: name.to_owned(),
        parent,
        is_abstract,
        interface,
    };
    let mut types: Vec<TypeInfo> = FIXED
        .iter()
        .map(|(name, parent, is_abstract, interface)| ty(name, *parent, *is_abstract, *interface))
        .collect();
    types.extend(
        cli::CPUS
            .iter()
            .map(|(model, _)| ty(&cpu_type(model), Some("x86_64-cpu"), false, None)),
    );
    for device in DEVICE_TYPES {
        types.push(ty(device.name, Some("virtio-pci"), false, None));
        types.push(ty(device.backend, Some("virtio-device"), false, None));
    }
    for object in OBJECT_TYPES {
        let interface = (object.parent == "object").then_some("user-creatable");
        types.push(ty(object.name, Some(object.parent), false, interface));
    }
    types
}

/// The type of this name.
pub fn find(name: &str) -> Option<TypeInfo> {
    all().into_iter().find(|ty| ty.name == name)
}

/// Whether a type is, or is derived from, or implements another.
pub fn is_a(types: &[TypeInfo], name: &str, ancestor: &str) -> bool {
    let Some(ty) = types.iter().find(|ty| ty.name == name) else {
        return false;
    };
    ty.name == ancestor
        || ty.interface.is_some_and(|interface| is_a(types, interface, ancestor))
        || ty.parent.is_some_and(|parent| is_a(types, parent, ancestor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_a_parent_that_exists_and_a_name_of_its_own() {
        let types = all();
        for ty in &types {
            assert_eq!(
                types.iter().filter(|other| other.name == ty.name).count(),
                1,
                "{}",
                ty.name
            );
            let roots = is_a(&types, &ty.name, "object") || is_a(&types, &ty.name, "interface");
            assert!(roots, "{} hangs in the air", ty.name);
        }
        assert!(is_a(&types, "virtio-rng-pci", "device"));
        assert!(is_a(&types, "iothread", "user-creatable"));
        assert!(is_a(&types, "throttle-group", "user-creatable"));
        assert!(!is_a(&types, "iothread", "device"));
    }
}
