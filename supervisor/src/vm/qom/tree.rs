//! The object tree as it is now, and paths in it.
//!
//! The tree is made anew for every command from what the machine holds, so that nothing in it can be out of date.

use super::types::{MACHINE, RTC, VIRTIO_BUS};
use crate::config::{Device, Model};
use crate::device_types::{DeviceType, VMCOREINFO, find as find_device};
use crate::frontend::Frontend;
use crate::objects::{Backend, Object};
use crate::vm::frontends::Controller;
use crate::vm::{Vm, query, rtc};
use ipc::graph::OnError;
use ipc::objects::PropertyValue;
use ipc::objects::types::{THROTTLE_LIMITS, find as find_object};

/// An object of the tree.
#[derive(Debug, Default)]
pub struct Node {
    /// Its type.
    pub ty: String,
    /// What it is for whom wants to set a property.
    pub kind: Kind,
    /// Its properties but for `type` and the children.
    pub properties: Vec<Property>,
    /// The objects that belong to it.
    pub children: Vec<(String, Self)>,
}

/// What a node is for whom wants to set a property.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Kind {
    /// Nothing can be set.
    #[default]
    Fixed,
    /// A device, which is complete: its id.
    Device(Option<String>),
    /// An object below `/objects`: its id.
    Object(String),
}

/// A property of an object.
#[derive(Debug)]
pub struct Property {
    /// Its name.
    pub name: String,
    /// What it holds.
    pub ty: String,
    /// Its value; `None`: it cannot be read.
    pub value: Option<PropertyValue>,
}

fn property(name: &str, ty: &str, value: impl Into<PropertyValue>) -> Property {
    Property {
        name: name.to_owned(),
        ty: ty.to_owned(),
        value: Some(value.into()),
    }
}

fn container(children: Vec<(String, Node)>) -> Node {
    Node {
        ty: "container".to_owned(),
        children,
        ..Node::default()
    }
}

/// The whole tree.
pub fn build(vm: &Vm) -> Node {
    let objects = vm.objects.borrow();
    let objects = objects
        .iter()
        .map(|object| (object.id.clone(), object_node(vm, object)));
    container(vec![
        ("machine".to_owned(), machine(vm)),
        ("objects".to_owned(), container(objects.collect())),
    ])
}

fn machine(vm: &Vm) -> Node {
    let config = &vm.config;
    let path = |path: &std::path::Path| path.display().to_string();
    let guest = config.guest.as_ref();
    let backend = config.memory_backend.as_ref();
    let mut devices: Vec<_> = config
        .devices
        .iter()
        .map(|device| (device.id.clone(), device_node(device)))
        .collect();
    if let Some(device) = &config.vmcoreinfo {
        let node = Node {
            ty: VMCOREINFO.to_owned(),
            kind: Kind::Device(device.id.clone()),
            properties: device_properties(),
            children: Vec::new(),
        };
        devices.insert(device.place, (device.id.clone(), node));
    }
    let (named, anonymous): (Vec<_>, Vec<_>) = devices.into_iter().partition(|(id, _)| id.is_some());
    let named = named.into_iter().map(|(id, node)| (id.unwrap_or_default(), node));
    let anonymous = (0..)
        .zip(anonymous)
        .map(|(index, (_, node))| (format!("device[{index}]"), node));
    let (named_frontends, anonymous_frontends): (Vec<_>, Vec<_>) =
        frontends(vm).into_iter().partition(|(is_named, ..)| *is_named);
    let without_mark = |(_, name, node): (bool, String, Node)| (name, node);
    let named = named.chain(named_frontends.into_iter().map(without_mark));
    let anonymous = anonymous.chain(anonymous_frontends.into_iter().map(without_mark));
    let cpus = (0..usize::from(config.topology.vcpus)).map(|index| (format!("device[{index}]"), cpu(vm, index)));
    Node {
        ty: MACHINE.to_owned(),
        kind: Kind::Fixed,
        properties: vec![
            property(
                "append",
                "string",
                guest.map_or("", |guest| guest.command_line.as_str()),
            ),
            property("dump-guest-core", "bool", false),
            property(
                "initrd",
                "string",
                guest
                    .and_then(|guest| guest.initrd.as_deref())
                    .map_or_else(String::new, path),
            ),
            property(
                "kernel",
                "string",
                guest.map_or_else(String::new, |guest| path(&guest.kernel)),
            ),
            property("mem-merge", "bool", false),
            property(
                "memory-backend",
                "link<memory-backend>",
                backend.map_or_else(String::new, |id| object_path(id)),
            ),
            property("usb", "bool", false),
        ],
        children: vec![
            ("peripheral".to_owned(), container(named.collect())),
            ("peripheral-anon".to_owned(), container(anonymous.collect())),
            (rtc::NAME.to_owned(), real_time_clock()),
            ("unattached".to_owned(), container(cpus.collect())),
        ],
    }
}

/// At the ports where a PC has it.
fn real_time_clock() -> Node {
    let mut properties = device_properties();
    properties.push(property("iobase", "uint16", 0x70_i64));
    Node {
        ty: RTC.to_owned(),
        kind: Kind::Device(None),
        properties,
        children: Vec::new(),
    }
}

/// What every device has.
fn device_properties() -> Vec<Property> {
    vec![
        property("hotpluggable", "bool", false),
        property("hotplugged", "bool", false),
        property("realized", "bool", true),
    ]
}

fn cpu(vm: &Vm, index: usize) -> Node {
    let place = query::place(vm.config.topology, index);
    let model = crate::cli::CPUS.first().map_or("", |(model, _)| model);
    let mut properties = device_properties();
    // APIC ids are vCPU numbers without gaps.
    properties.push(property("apic-id", "uint32", index as i64));
    properties.push(property("core-id", "int32", place.core_id));
    properties.push(property("socket-id", "int32", place.socket_id));
    properties.push(property("thread-id", "int32", place.thread_id));
    Node {
        ty: query::cpu_type(model),
        kind: Kind::Device(None),
        properties,
        children: Vec::new(),
    }
}

/// The devices of `-accel qtest`: whether they have an id, what they are called in the tree, and they themselves.
fn frontends(vm: &Vm) -> Vec<(bool, String, Node)> {
    let graph = vm.graph.borrow();
    let disks = graph.backends.iter().filter_map(|backend| backend.frontend.as_ref());
    let name = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
    let mut nodes: Vec<_> = disks
        .map(|disk| (disk.id.is_some(), name(&disk.path), disk_node(disk)))
        .collect();
    let controller = |controller: Controller| {
        let node = Node {
            ty: controller.ty.name.to_owned(),
            kind: Kind::Device(controller.id.clone()),
            properties: device_properties(),
            children: Vec::new(),
        };
        (controller.id.is_some(), name(&controller.path), node)
    };
    nodes.extend(vm.frontends.controllers().into_iter().map(controller));
    nodes
}

fn disk_node(disk: &Frontend) -> Node {
    let properties = || {
        let mut properties = device_properties();
        properties.push(property("drive", "str", disk.drive.as_str()));
        properties
    };
    let inner = disk.ty.inner().map(|name| {
        let node = Node {
            ty: disk.ty.disk_type().to_owned(),
            kind: Kind::Device(None),
            properties: properties(),
            children: Vec::new(),
        };
        (name.to_owned(), node)
    });
    Node {
        ty: disk.ty.name.to_owned(),
        kind: Kind::Device(disk.id.clone()),
        properties: properties(),
        children: inner.into_iter().collect(),
    }
}

/// The PCI device; inside it the bus and the virtio device.
fn device_node(device: &Device) -> Node {
    let name = match device.model {
        Model::Block(_) => "virtio-blk-pci",
        Model::Rng(_) => "virtio-rng-pci",
    };
    let Some(ty) = find_device(name) else {
        return Node::default();
    };
    let inner = |only_inner: bool| {
        let mut properties = device_properties();
        let declared = ty.properties.iter().filter(|property| property.inner || !only_inner);
        properties.extend(declared.map(|declared| Property {
            name: declared.name.to_owned(),
            ty: declared.ty.to_owned(),
            value: Some(device_value(device, declared.name)),
        }));
        properties
    };
    Node {
        ty: ty.name.to_owned(),
        kind: Kind::Device(device.id.clone()),
        properties: inner(false),
        children: inside(ty, inner(true)),
    }
}

fn inside(ty: &DeviceType, properties: Vec<Property>) -> Vec<(String, Node)> {
    let bus = Node {
        ty: VIRTIO_BUS.to_owned(),
        kind: Kind::Fixed,
        properties: vec![property("realized", "bool", true)],
        children: Vec::new(),
    };
    let backend = Node {
        ty: ty.backend.to_owned(),
        kind: Kind::Device(None),
        properties,
        children: Vec::new(),
    };
    vec![("virtio-backend".to_owned(), backend), ("virtio-bus".to_owned(), bus)]
}

/// What a property of a device is now.
fn device_value(device: &Device, name: &str) -> PropertyValue {
    let link =
        |id: &Option<String>| -> PropertyValue { id.as_ref().map_or_else(String::new, |id| object_path(id)).into() };
    match (name, &device.model) {
        // The number of the function on the bus.
        ("addr", _) => i64::from(device.slot << 3).into(),
        ("bootindex", Model::Block(block)) => i64::from(block.boot_index.unwrap_or(-1)).into(),
        ("drive", Model::Block(block)) => block.drive.as_str().into(),
        ("iothread", Model::Block(block)) => link(&block.io_thread),
        ("num-queues", Model::Block(block)) => i64::from(block.queues).into(),
        ("queue-size", Model::Block(block)) => i64::from(block.queue_size).into(),
        ("rerror", Model::Block(block)) => on_error(block.read_error).into(),
        ("serial", Model::Block(block)) => block.serial.as_str().into(),
        ("werror", Model::Block(block)) => on_error(block.write_error).into(),
        ("write-cache", Model::Block(block)) => match block.write_cache {
            None => "auto",
            Some(true) => "on",
            Some(false) => "off",
        }
        .into(),
        ("max-bytes", Model::Rng(rng)) => rng.limit.max_bytes.into(),
        ("period", Model::Rng(rng)) => i64::from(rng.limit.period_ms).into(),
        ("rng", Model::Rng(rng)) => link(&rng.backend),
        _ => String::new().into(),
    }
}

/// As it was given.
fn on_error(action: Option<OnError>) -> &'static str {
    match action {
        None => "auto",
        Some(OnError::Report) => "report",
        Some(OnError::Ignore) => "ignore",
        Some(OnError::Enospc) => "enospc",
        Some(OnError::Stop) => "stop",
    }
}

fn object_path(id: &str) -> String {
    format!("/objects/{id}")
}

fn object_node(vm: &Vm, object: &Object) -> Node {
    let ty = object.backend.qom_type();
    let declared = find_object(ty).map_or(&[][..], |ty| ty.properties);
    let properties = declared.iter().map(|declared| Property {
        name: declared.name.to_owned(),
        ty: declared.kind.type_name().to_owned(),
        value: object_value(&object.backend, declared.name),
    });
    let mut properties: Vec<_> = properties.collect();
    if let Some((thread, _)) = object.backend.io_thread() {
        let known = vm.io_threads.borrow();
        let id = usize::from(thread.0)
            .checked_sub(1)
            .and_then(|place| *known.get(place)?);
        properties.extend(id.map(|id| property("thread-id", "int", i64::from(id))));
    }
    match &object.backend {
        Backend::RngBuiltin(_) | Backend::RngRandom { .. } => properties.push(property("opened", "bool", true)),
        Backend::Secret(secret) => properties.push(property("loaded", "bool", secret.is_loaded())),
        _ => {}
    }
    Node {
        ty: ty.to_owned(),
        kind: Kind::Object(object.id.clone()),
        properties,
        children: Vec::new(),
    }
}

/// What a property of an object is now; `None` when it cannot be read.
fn object_value(backend: &Backend, name: &str) -> Option<PropertyValue> {
    let path = |path: &std::path::Path| PropertyValue::from(path.display().to_string());
    Some(match (backend, name) {
        (Backend::IoThread { polling, .. }, "aio-max-batch") => polling.max_batch.into(),
        (Backend::IoThread { polling, .. }, "poll-max-ns") => polling.max_ns.into(),
        (Backend::IoThread { polling, .. }, "poll-grow") => polling.grow.into(),
        (Backend::IoThread { polling, .. }, "poll-shrink") => polling.shrink.into(),
        (Backend::Memory { spec, .. }, "size") => spec.bytes.into(),
        (Backend::Memory { spec, .. }, "share") => spec.share.into(),
        (Backend::Memory { spec, .. }, "prealloc") => spec.prealloc.into(),
        (Backend::Memory { .. }, "seal") => true.into(),
        (Backend::RngRandom { filename, .. }, "filename") => path(filename),
        (Backend::Secret(secret), "format") => secret.format.name().into(),
        (Backend::Secret(secret), "file") => secret.file.as_deref().map_or_else(|| "".into(), path),
        // The secret itself stays where it is.
        (Backend::Secret(_), _) => return None,
        (Backend::ThrottleGroup(limits), "limits") => limits.value(),
        (Backend::ThrottleGroup(limits), name) => {
            let name = name.strip_prefix("x-").filter(|name| THROTTLE_LIMITS.contains(name))?;
            limits.get(name).into()
        }
        _ => return None,
    })
}

/// Where a path leads.
#[derive(Debug)]
pub enum Found<'a> {
    /// To this object, which has this canonical path.
    One(&'a Node, String),
    /// Nowhere.
    Nothing,
    /// To several.
    Many,
}

impl Node {
    /// Its own property of this name.
    pub fn property(&self, name: &str) -> Option<&Property> {
        self.properties.iter().find(|property| property.name == name)
    }

    fn child(&self, name: &str) -> Option<&Self> {
        self.children
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, child)| child)
    }

    /// Follows a path from the root: an absolute one, or the end of one that is like no other. Links are followed.
    pub fn resolve(&self, path: &str) -> Found<'_> {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        if path.starts_with('/') {
            return match self.follow(self, String::new(), &parts) {
                Some((node, path)) => Found::One(node, path),
                None => Found::Nothing,
            };
        }
        let mut found = Vec::new();
        self.search(self, "", &parts, &mut found);
        match found.len() {
            0 => Found::Nothing,
            1 => found
                .pop()
                .map_or(Found::Nothing, |(node, path)| Found::One(node, path)),
            _ => Found::Many,
        }
    }

    /// Follows a path from `start`, whose own path is given.
    fn follow<'a>(&'a self, start: &'a Self, mut at: String, parts: &[&str]) -> Option<(&'a Self, String)> {
        let mut node = start;
        for part in parts {
            if let Some(child) = node.child(part) {
                node = child;
                at = format!("{at}/{part}");
                continue;
            }
            let link = node
                .property(part)
                .filter(|property| property.ty.starts_with("link<"))?;
            let Some(PropertyValue::Scalar(ipc::objects::Scalar::Text(target))) = &link.value else {
                return None;
            };
            if target.is_empty() {
                return None;
            }
            // A link holds an absolute path of children.
            let mut target_node = self;
            for part in target.split('/').filter(|part| !part.is_empty()) {
                target_node = target_node.child(part)?;
            }
            node = target_node;
            at.clone_from(target);
        }
        let path = if at.is_empty() { "/".to_owned() } else { at };
        Some((node, path))
    }

    fn search<'a>(&'a self, node: &'a Self, at: &str, parts: &[&str], found: &mut Vec<(&'a Self, String)>) {
        found.extend(self.follow(node, at.to_owned(), parts));
        for (name, child) in &node.children {
            self.search(child, &format!("{at}/{name}"), parts, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Node {
        let disk = Node {
            ty: "virtio-blk-pci".to_owned(),
            properties: vec![property("iothread", "link<iothread>", "/objects/io0")],
            ..Node::default()
        };
        let other = Node::default();
        container(vec![
            (
                "machine".to_owned(),
                container(vec![
                    ("peripheral".to_owned(), container(vec![("b0".to_owned(), disk)])),
                    (
                        "unattached".to_owned(),
                        container(vec![("device[0]".to_owned(), Node::default())]),
                    ),
                    (
                        "peripheral-anon".to_owned(),
                        container(vec![("device[0]".to_owned(), Node::default())]),
                    ),
                ]),
            ),
            ("objects".to_owned(), container(vec![("io0".to_owned(), other)])),
        ])
    }

    #[test]
    fn paths_are_absolute_or_like_no_other() {
        let tree = tree();
        let path = |path: &str| match tree.resolve(path) {
            Found::One(_, path) => path,
            Found::Nothing => "nothing".to_owned(),
            Found::Many => "many".to_owned(),
        };
        for (asked, expected) in [
            ("/", "/"),
            ("//objects/", "/objects"),
            ("/machine/peripheral/b0/iothread", "/objects/io0"),
            ("/nope", "nothing"),
            ("b0", "/machine/peripheral/b0"),
            ("peripheral/b0", "/machine/peripheral/b0"),
            ("io0", "/objects/io0"),
            ("device[0]", "many"),
            ("unattached/device[0]", "/machine/unattached/device[0]"),
            ("", "many"),
            ("nope", "nothing"),
            ("b0/nope", "nothing"),
        ] {
            assert_eq!(path(asked), expected, "{asked}");
        }
    }
}
