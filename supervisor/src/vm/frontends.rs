//! device_add and device_del, and the devices of `-accel qtest` from its command line ([`crate::frontend`]).
//!
//! A guest's devices stay as they are: its PCI bus is one whose slots are not changed while it runs.

use super::{Vm, graph, jobs, throttling};
use crate::cli::error_action;
use crate::config::Device;
use crate::device_types::{self, VMCOREINFO};
use crate::frontend::{self, Bus, Frontend, FrontendType, Role};
use crate::graph::Graph;
use crate::graph::error::GraphError;
use crate::graph::node::Backend;
use crate::logging;
use ipc::device::NewDevice;
use ipc::graph::NodeId;
use ipc::qmp::{ErrorClass, Event, QmpError};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// The bus that every guest's devices are on.
const GUEST_BUS: &str = "pcie.0";

/// Why a device is not added, or not removed: the texts that clients know from QEMU.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No such type.
    #[error("'{0}' is not a valid device model name")]
    NoType(String),
    /// A type of which there is one from the start, or none.
    #[error("Device '{0}' does not support hotplugging")]
    NotHotPluggable(&'static str),
    /// A bus of this name is not there.
    #[error("Bus '{0}' not found")]
    NoBusNamed(String),
    /// None of the kind is there.
    #[error("No '{bus}' bus found for device '{device}'")]
    NoBus {
        /// The kind.
        bus: &'static str,
        /// The type of the device.
        device: &'static str,
    },
    /// A bus whose devices stay.
    #[error("Bus '{GUEST_BUS}' does not support hotplugging")]
    FixedBus,
    /// An id that is taken.
    #[error("Duplicate device ID '{0}'")]
    Duplicate(String),
    /// A property that the type does not have.
    #[error("Property '{0}.{1}' not found")]
    NoProperty(&'static str, &'static str),
    /// A disk without `drive`.
    #[error("drive property not set")]
    NoDrive,
    /// Neither a drive nor a node.
    #[error("Property '{0}.drive' can't find value '{1}'")]
    UnknownDrive(&'static str, String),
    /// A drive that has its device.
    #[error("Drive '{0}' is already in use by another device")]
    DriveInUse(String),
    /// A disk of a drive without a medium.
    #[error("Device needs media, but drive is empty")]
    Empty,
    /// A word or an id that is wrong.
    #[error("{0}")]
    Value(String),
    /// The graph.
    #[error(transparent)]
    Graph(#[from] GraphError),
}

impl From<DeviceError> for QmpError {
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::Graph(error) => error.into(),
            error => Self::generic(error.to_string()),
        }
    }
}

/// What is there beside the drives' and nodes' users, which the graph has.
#[derive(Debug, Default)]
pub struct Frontends {
    controllers: RefCell<Vec<Controller>>,
    /// Anonymous devices that there have been.
    anonymous: Cell<usize>,
}

/// Disks go on it.
#[derive(Debug, Clone)]
pub struct Controller {
    /// Its type.
    pub ty: &'static FrontendType,
    /// `id=`.
    pub id: Option<String>,
    /// Where it is in the object tree.
    pub path: String,
    /// `iothread=`.
    pub io_thread: Option<String>,
}

impl Frontends {
    /// The controllers.
    pub fn controllers(&self) -> Vec<Controller> {
        self.controllers.borrow().clone()
    }
}

/// The devices of the command line, when its nodes and drives are there.
///
/// # Errors
/// The first that is not possible, as a line.
pub async fn begin(vm: &Vm) -> Result<(), String> {
    let anonymous = vm.config.devices.iter().filter(|device| device.id.is_none()).count();
    let vmcoreinfo = vm.config.vmcoreinfo.iter().filter(|device| device.id.is_none()).count();
    vm.frontends.anonymous.set(anonymous + vmcoreinfo);
    let _turn = vm.graph_change.enter().await;
    for options in &vm.config.empty_drives {
        let described = graph::change_description(vm, |graph| {
            graph.check_drive_id(&options.id)?;
            graph.backends.push(Backend::of_empty_drive(options));
            Ok(())
        });
        described.map_err(|error| format!("-drive id={}: {error}", options.id))?;
    }
    for device in &vm.config.frontends {
        let added = create(vm, device);
        added.map_err(|error| format!("-device {}: {error}", device.driver))?;
    }
    Ok(())
}

/// device_add.
///
/// # Errors
/// [`DeviceError`].
pub async fn add(vm: &Vm, new: &NewDevice) -> Result<(), DeviceError> {
    if !vm.config.is_qtest {
        return Err(refuse_on_guest_bus(vm, new));
    }
    let _turn = vm.graph_change.enter().await;
    create(vm, new)
}

/// A machine's own devices are all there from the start.
fn refuse_on_guest_bus(vm: &Vm, new: &NewDevice) -> DeviceError {
    if new.driver == VMCOREINFO {
        return DeviceError::NotHotPluggable(VMCOREINFO);
    }
    let Some(ty) = device_types::find(&new.driver) else {
        return DeviceError::NoType(new.driver.clone());
    };
    match &new.bus {
        Some(bus) if !Bus::Pci.is_named(bus) => DeviceError::NoBusNamed(bus.clone()),
        _ if vm.config.guest.is_none() => DeviceError::NoBus {
            bus: Bus::Pci.name(),
            device: ty.name,
        },
        _ => DeviceError::FixedBus,
    }
}

fn create(vm: &Vm, new: &NewDevice) -> Result<(), DeviceError> {
    let ty = frontend::find(&new.driver).ok_or_else(|| DeviceError::NoType(new.driver.clone()))?;
    let controller = bus_of(vm, ty, new)?;
    if let Some(id) = &new.id
        && is_taken(vm, id)
    {
        return Err(DeviceError::Duplicate(id.clone()));
    }
    let unknown = new.given().find(|name| !ty.properties.contains(name));
    if let Some(unknown) = unknown {
        return Err(DeviceError::NoProperty(ty.name, unknown));
    }
    if let Some(id) = &new.iothread {
        // It stays as long as the device is there, and has nothing to do: nobody rings the device's queues.
        let id = id.strip_prefix("/objects/").unwrap_or(id);
        if vm.objects.borrow().io_thread(id).is_none() {
            return Err(GraphError::NoDevice(id.to_owned()).into());
        }
    }
    if ty.role == Role::Controller {
        vm.frontends.controllers.borrow_mut().push(Controller {
            ty,
            id: new.id.clone(),
            path: path(vm, new),
            io_thread: new.iothread.clone(),
        });
        return Ok(());
    }
    let frontend = Frontend {
        ty,
        id: new.id.clone(),
        path: String::new(),
        controller: controller.map(|controller| controller.path),
        drive: new.drive.clone().unwrap_or_default(),
        io_thread: new.iothread.clone(),
        shares_writing: new.share_rw.unwrap_or(false),
        is_tray_open: false,
    };
    connect(vm, frontend, new)
}

/// Makes a drive or a node the device's. Its path is the last thing that it gets: one that fails uses up no number.
fn connect(vm: &Vm, frontend: Frontend, new: &NewDevice) -> Result<(), DeviceError> {
    let ty = frontend.ty;
    let mut backend = match &new.drive {
        Some(drive) => find_drive(&vm.graph.borrow(), ty, drive)?.unwrap_or_else(Backend::without_medium),
        None if ty.is_removable() => Backend::without_medium(),
        None => return Err(DeviceError::NoDrive),
    };
    if backend.root.is_none() && !ty.is_removable() {
        return Err(DeviceError::Empty);
    }
    let word = |word: &Option<String>, is_write| match word {
        Some(word) => error_action(word, is_write).map_err(DeviceError::Value),
        None => Ok(None),
    };
    backend.read_error = word(&new.rerror, false)?.unwrap_or(backend.read_error);
    backend.write_error = word(&new.werror, true)?.unwrap_or(backend.write_error);
    backend.write_cache = match new.write_cache.as_deref() {
        None | Some("auto") => backend.write_cache,
        Some("on") => true,
        Some("off") => false,
        Some(other) => {
            return Err(DeviceError::Value(format!(
                "Parameter 'write-cache' does not accept value '{other}'"
            )));
        }
    };
    let node_is_read_only = backend.root.is_some_and(|root| is_read_only(vm, root));
    backend.read_only = node_is_read_only || matches!(ty.role, Role::Removable { read_only: true, .. });
    if ty.name == "ide-hd" && node_is_read_only {
        return Err(GraphError::ReadOnly.into());
    }
    let path = path_of_next(vm, new);
    backend.frontend = Some(Frontend {
        path: path.clone(),
        ..frontend
    });
    graph::change_description(vm, |graph| {
        let same = graph
            .backends
            .iter()
            .position(|other| !other.id.is_empty() && other.id == backend.id);
        match same {
            Some(place) => graph.backends[place] = backend,
            None => graph.backends.push(backend),
        }
        Ok(())
    })?;
    if new.id.is_none() {
        vm.frontends.anonymous.set(vm.frontends.anonymous.get() + 1);
    }
    Ok(())
}

pub(super) fn is_read_only(vm: &Vm, node: NodeId) -> bool {
    vm.graph.borrow().node_or_missing(node).settings.read_only
}

/// What `drive=` means: a drive that has no device yet, or a node, which gets a drive without a name.
fn find_drive(graph: &Graph, ty: &FrontendType, drive: &str) -> Result<Option<Backend>, DeviceError> {
    let found = match graph.backend(drive) {
        Some(backend) if backend.frontend.is_some() || backend.device.is_some() => {
            return Err(DeviceError::DriveInUse(drive.to_owned()));
        }
        Some(backend) => Some(backend.clone()),
        None => graph.node_named(drive).map(|node| Backend::of_node(node.id)),
    };
    found
        .map(Some)
        .ok_or_else(|| DeviceError::UnknownDrive(ty.disk_type(), drive.to_owned()))
}

/// The controller, for what goes on one's bus.
fn bus_of(vm: &Vm, ty: &'static FrontendType, new: &NewDevice) -> Result<Option<Controller>, DeviceError> {
    let controllers = vm.frontends.controllers.borrow();
    if ty.bus != Bus::Scsi {
        return match &new.bus {
            Some(bus) if !ty.bus.is_named(bus) => Err(DeviceError::NoBusNamed(bus.clone())),
            _ => Ok(None),
        };
    }
    let Some(bus) = &new.bus else {
        let first = controllers.first().cloned();
        return first.map(Some).ok_or(DeviceError::NoBus {
            bus: ty.bus.name(),
            device: ty.name,
        });
    };
    let is_named = |controller: &&Controller| {
        let id = controller.id.as_deref();
        id.is_some() && bus.strip_suffix(".0") == id
    };
    let found = controllers.iter().find(is_named).cloned();
    found.map(Some).ok_or_else(|| DeviceError::NoBusNamed(bus.clone()))
}

/// Whether a device of this id is there.
fn is_taken(vm: &Vm, id: &str) -> bool {
    let is_id = |other: &Option<String>| other.as_deref() == Some(id);
    let graph = vm.graph.borrow();
    let mut disks = graph.backends.iter().filter_map(|backend| backend.frontend.as_ref());
    disks.any(|disk| is_id(&disk.id))
        || vm.frontends.controllers.borrow().iter().any(|other| is_id(&other.id))
        || vm.config.devices.iter().any(|device| is_id(&device.id))
        || vm.config.vmcoreinfo.iter().any(|device| is_id(&device.id))
}

/// Whether a device is served by this iothread.
pub fn use_thread(vm: &Vm, id: &str) -> bool {
    let is_id = |thread: &Option<String>| {
        thread
            .as_deref()
            .is_some_and(|thread| thread.trim_start_matches("/objects/") == id)
    };
    let graph = vm.graph.borrow();
    let mut disks = graph.backends.iter().filter_map(|backend| backend.frontend.as_ref());
    disks.any(|disk| is_id(&disk.io_thread))
        || vm
            .frontends
            .controllers
            .borrow()
            .iter()
            .any(|controller| is_id(&controller.io_thread))
}

fn path_of_next(vm: &Vm, new: &NewDevice) -> String {
    match &new.id {
        Some(id) => format!("/machine/peripheral/{id}"),
        None => format!("/machine/peripheral-anon/device[{}]", vm.frontends.anonymous.get()),
    }
}

/// As [`path_of_next`], and the number is used up.
fn path(vm: &Vm, new: &NewDevice) -> String {
    let path = path_of_next(vm, new);
    if new.id.is_none() {
        vm.frontends.anonymous.set(vm.frontends.anonymous.get() + 1);
    }
    path
}

/// device_del: at once, because no guest has to let go of the device.
///
/// # Errors
/// The error reply.
pub async fn delete(vm: &Rc<Vm>, name: &str) -> Result<(), QmpError> {
    let _turn = vm.graph_change.enter().await;
    let controller = {
        let controllers = vm.frontends.controllers.borrow();
        let is_meant = |other: &Controller| other.id.as_deref() == Some(name) || other.path == name;
        controllers.iter().position(is_meant)
    };
    if let Some(place) = controller {
        let gone = vm.frontends.controllers.borrow_mut().remove(place);
        while let Some(disk) = first_disk(vm, |disk| disk.controller.as_ref() == Some(&gone.path)) {
            remove_disk(vm, disk).await?;
        }
        announce(vm, gone.id, gone.path);
        return Ok(());
    }
    if let Some(disk) = first_disk(vm, |disk| disk.is_called(name)) {
        return Ok(remove_disk(vm, disk).await?);
    }
    if vm.config.devices.iter().any(|device| is_called(device, name)) {
        return Err(DeviceError::FixedBus.into());
    }
    Err(QmpError {
        class: ErrorClass::DeviceNotFound,
        desc: format!("Device '{name}' not found"),
    })
}

fn is_called(device: &Device, name: &str) -> bool {
    let id = device.id.as_deref();
    id.is_some_and(|id| id == name || name.strip_prefix("/machine/peripheral/") == Some(id))
}

fn first_disk(vm: &Vm, is_meant: impl Fn(&Frontend) -> bool) -> Option<usize> {
    let graph = vm.graph.borrow();
    let mut disks = graph.backends.iter();
    disks.position(|backend| backend.frontend.as_ref().is_some_and(&is_meant))
}

/// The drive goes with its device; so do the nodes that nothing else keeps.
async fn remove_disk(vm: &Rc<Vm>, place: usize) -> Result<(), GraphError> {
    // So do jobs on it, which then give its nodes free.
    let at_work: Vec<String> = {
        let graph = vm.graph.borrow();
        let root = graph.backends[place].root;
        let jobs = root.into_iter().flat_map(|root| graph.jobs_on(root));
        jobs.map(|job| job.job.clone()).collect()
    };
    for job in at_work {
        if let Err(error) = jobs::cancel(vm, &job, false) {
            logging::line(format_args!("job {job}: {}", error.desc));
        }
    }
    let backend = graph::change_description(vm, |graph| Ok(graph.backends.remove(place)))?;
    if let Some(group) = &backend.throttle_group {
        throttling::forget(vm, group).await?;
    }
    graph::remove_unused(vm).await;
    if let Some(disk) = backend.frontend {
        if disk.ty.inner().is_some() {
            announce(vm, None, disk.disk_path());
        }
        announce(vm, disk.id, disk.path);
    }
    Ok(())
}

fn announce(vm: &Vm, device: Option<String>, path: String) {
    vm.emit(Event::DeviceDeleted { device, path });
}
