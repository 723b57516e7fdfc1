//! The object tree: qom-list, qom-get, qom-set and the lists of types and properties.

pub mod tree;
pub mod types;

use super::{Vm, devices, throttling};
use crate::device_types;
use crate::objects::spec::{check_kind, polling_number};
use crate::objects::throttle::Limits;
use crate::objects::{Backend, ObjectError};
use ipc::block::Polling;
use ipc::objects::types::find as find_object;
use ipc::objects::{ObjectPropertyInfo, ObjectTypeInfo, PropertyValue, Scalar};
use ipc::qmp::{Command, ErrorClass, QmpError, Return};
use ipc::virtio::IoThreadIndex;
use tree::{Found, Kind, Node};
use types::TypeInfo;

/// The answer to a query of this module.
pub fn answer(vm: &Vm, command: &Command) -> Option<Result<Return, QmpError>> {
    Some(match command {
        Command::QomList { path } => list(vm, path).map(Return::Properties),
        Command::QomGet { path, property } => get(vm, path, property).map(Return::Property),
        Command::QomListTypes {
            implements,
            with_abstract,
        } => Ok(Return::ObjectTypes(list_types(
            implements.as_deref(),
            with_abstract.unwrap_or(false),
        ))),
        Command::QomListProperties { typename } => type_properties(typename).map(Return::Properties),
        Command::DeviceListProperties { typename } => device_properties(typename).map(Return::Properties),
        _ => return None,
    })
}

fn not_found(desc: String) -> QmpError {
    QmpError {
        class: ErrorClass::DeviceNotFound,
        desc,
    }
}

fn no_object(path: &str) -> QmpError {
    not_found(format!("Device '{path}' not found"))
}

fn info(name: &str, ty: &str) -> ObjectPropertyInfo {
    ObjectPropertyInfo {
        name: name.to_owned(),
        ty: ty.to_owned(),
        description: None,
        default_value: None,
    }
}

fn list(vm: &Vm, path: &str) -> Result<Vec<ObjectPropertyInfo>, QmpError> {
    let root = tree::build(vm);
    let node = match root.resolve(path) {
        Found::One(node, _) => node,
        Found::Nothing => return Err(no_object(path)),
        Found::Many => return Err(QmpError::generic(format!("Path '{path}' is ambiguous"))),
    };
    let mut entries = vec![info("type", "string")];
    entries.extend(
        node.properties
            .iter()
            .map(|property| info(&property.name, &property.ty)),
    );
    let children = node.children.iter();
    entries.extend(children.map(|(name, child)| info(name, &format!("child<{}>", child.ty))));
    Ok(entries)
}

/// The object for qom-get and qom-set, which do not tell an ambiguous path from one that leads nowhere.
fn resolve<'a>(root: &'a Node, path: &str) -> Result<(&'a Node, String), QmpError> {
    match root.resolve(path) {
        Found::One(node, canonical) => Ok((node, canonical)),
        Found::Nothing | Found::Many => Err(no_object(path)),
    }
}

fn get(vm: &Vm, path: &str, name: &str) -> Result<PropertyValue, QmpError> {
    let root = tree::build(vm);
    let (node, canonical) = resolve(&root, path)?;
    if name == "type" {
        return Ok(node.ty.as_str().into());
    }
    if node.children.iter().any(|(child, _)| child == name) {
        let parent = canonical.trim_end_matches('/');
        return Ok(format!("{parent}/{name}").into());
    }
    match node.property(name) {
        Some(property) => property
            .value
            .clone()
            .ok_or_else(|| QmpError::generic(format!("Property '{}.{name}' is not readable", node.ty))),
        None => Err(no_property(node, name)),
    }
}

fn no_property(node: &Node, name: &str) -> QmpError {
    QmpError::generic(format!("Property '{}.{name}' not found", node.ty))
}

/// qom-set.
pub async fn set(vm: &Vm, path: &str, name: &str, value: &PropertyValue) -> Result<(), QmpError> {
    let _turn = vm.object_change.enter().await;
    let (kind, ty) = {
        let root = tree::build(vm);
        let (node, _) = resolve(&root, path)?;
        let is_fixed = name == "type"
            || node.children.iter().any(|(child, _)| child == name)
            || (node.property(name).is_some() && node.kind == Kind::Fixed);
        if is_fixed {
            return Err(not_writable(&node.ty, name));
        }
        if node.property(name).is_none() {
            return Err(no_property(node, name));
        }
        (node.kind.clone(), node.ty.clone())
    };
    match kind {
        Kind::Fixed => Err(not_writable(&ty, name)),
        Kind::Device(_) if matches!(name, "hotplugged" | "hotpluggable" | "realized") => Err(not_writable(&ty, name)),
        Kind::Device(id) => {
            let which = id.map_or_else(|| "anonymous device".to_owned(), |id| format!("device '{id}'"));
            Err(QmpError::generic(format!(
                "Attempt to set property '{name}' on {which} (type '{ty}') after it was realized"
            )))
        }
        Kind::Object(id) => set_object(vm, &id, &ty, name, value).await,
    }
}

fn not_writable(ty: &str, name: &str) -> QmpError {
    QmpError::generic(format!("Property '{ty}.{name}' is not writable"))
}

/// What has to be told to block-proc.
enum Change {
    Polling(IoThreadIndex, Polling),
    Limits(Limits),
}

/// Sets what can change while the machine runs: how an iothread polls, and the limits of a throttle group.
async fn set_object(vm: &Vm, id: &str, ty: &str, name: &str, value: &PropertyValue) -> Result<(), QmpError> {
    // What is not declared for object-add only tells.
    let Some(declared) = find_object(ty).and_then(|ty| ty.property(name)) else {
        return Err(not_writable(ty, name));
    };
    check_kind(name, declared.kind, value)?;
    let change = match vm.objects.borrow_mut().get_mut(id) {
        Some(Backend::IoThread { thread, polling }) => {
            let PropertyValue::Scalar(Scalar::Int(number)) = value else {
                return Err(ObjectError::Type(name.to_owned(), "integer").into());
            };
            let number = polling_number(name, *number)?;
            match name {
                "poll-max-ns" => polling.max_ns = number,
                "poll-grow" => polling.grow = number,
                "poll-shrink" => polling.shrink = number,
                _ => polling.max_batch = number,
            }
            Change::Polling(*thread, *polling)
        }
        Some(Backend::ThrottleGroup(limits)) => {
            if name != "limits" {
                return Err(QmpError::generic("Property cannot be set after initialization"));
            }
            let mut changed = limits.clone();
            changed.set_all(value)?;
            changed.check()?;
            Change::Limits(changed)
        }
        Some(Backend::Secret(_)) => return Err(not_writable(ty, name)),
        Some(_) => return Err(QmpError::generic(format!("Property '{name}' can no longer be set"))),
        None => return Err(no_object(id)),
    };
    match change {
        Change::Polling(thread, polling) => {
            let set = devices::set_polling(vm, thread, polling).await;
            set.map_err(|error| QmpError::generic(error.to_string()))
        }
        Change::Limits(limits) => Ok(throttling::change(vm, id, limits).await?),
    }
}

fn list_types(implements: Option<&str>, with_abstract: bool) -> Vec<ObjectTypeInfo> {
    let all = types::all();
    let wanted = |ty: &&TypeInfo| {
        (with_abstract || !ty.is_abstract) && implements.is_none_or(|ancestor| types::is_a(&all, &ty.name, ancestor))
    };
    let entry = |ty: &TypeInfo| ObjectTypeInfo {
        name: ty.name.clone(),
        is_abstract: ty.is_abstract.then_some(true),
        parent: ty.parent.map(str::to_owned),
    };
    all.iter().filter(wanted).map(entry).collect()
}

/// qom-list-properties: what every object of a type has.
fn type_properties(name: &str) -> Result<Vec<ObjectPropertyInfo>, QmpError> {
    let ty = types::find(name).ok_or_else(|| not_found(format!("Class '{name}' not found")))?;
    let mut entries = vec![info("type", "string")];
    if let Some(object) = find_object(name) {
        let properties = object.properties.iter();
        entries.extend(properties.map(|property| info(property.name, property.kind.type_name())));
    }
    let all = types::all();
    if types::is_a(&all, name, "device") {
        let common = ["hotpluggable", "hotplugged", "realized"];
        entries.extend(common.iter().map(|name| info(name, "bool")));
    }
    if types::is_a(&all, name, "cpu") && !ty.is_abstract {
        let place = [
            ("apic-id", "uint32"),
            ("core-id", "int32"),
            ("socket-id", "int32"),
            ("thread-id", "int32"),
        ];
        entries.extend(place.iter().map(|(name, ty)| info(name, ty)));
    }
    if name == types::MACHINE {
        let own = [
            ("append", "string"),
            ("dump-guest-core", "bool"),
            ("initrd", "string"),
            ("kernel", "string"),
            ("mem-merge", "bool"),
            ("memory-backend", "link<memory-backend>"),
            ("usb", "bool"),
        ];
        entries.extend(own.iter().map(|(name, ty)| info(name, ty)));
    }
    entries.extend(declared_properties(name));
    Ok(entries)
}

/// What a device's type declares, whether it is the PCI device or the virtio device inside.
fn declared_properties(name: &str) -> Vec<ObjectPropertyInfo> {
    let of = |ty: &device_types::DeviceType, only_inner: bool| {
        let properties = ty.properties.iter().filter(|property| property.inner || !only_inner);
        properties.map(device_types::DeviceProperty::info).collect()
    };
    device_types::DEVICE_TYPES
        .iter()
        .find_map(|ty| {
            (ty.name == name)
                .then(|| of(ty, false))
                .or_else(|| (ty.backend == name).then(|| of(ty, true)))
        })
        .unwrap_or_default()
}

fn device_properties(name: &str) -> Result<Vec<ObjectPropertyInfo>, QmpError> {
    let ty = types::find(name).ok_or_else(|| no_object(name))?;
    if ty.is_abstract || !types::is_a(&types::all(), name, "device") {
        return Err(QmpError::generic(
            "Parameter 'typename' expects a non-abstract device type",
        ));
    }
    Ok(declared_properties(name))
}
