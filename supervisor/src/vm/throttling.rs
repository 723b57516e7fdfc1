//! Limits of disks' I/O: block_set_io_throttle, and groups of limits.
//!
//! A group has a name. It is a throttle-group object, which stays, or came with the first drive in it and goes with the last.
//! Drives (their devices) and throttle nodes of one group share its limits.

use super::{Vm, graph};
use crate::config::{DriveLimits, Model};
use crate::graph::error::GraphError;
use crate::graph::node::Backend;
use crate::objects::throttle::Limits;
use crate::objects::{self, ObjectError};
use ipc::block_info::BlockDeviceInfo;
use ipc::graph::{GraphRequest, GroupId, ThrottleLimits};
use ipc::qmp::{ErrorClass, QmpError};
use ipc::throttling::BlockIoThrottle;
use ipc::virtio::DeviceIndex;
use std::cell::RefCell;
use std::collections::BTreeMap;

/// The groups that are used.
#[derive(Default)]
pub struct Groups {
    /// Their numbers in block-proc.
    numbers: RefCell<BTreeMap<String, GroupId>>,
    /// The limits of those that are no objects.
    limits: RefCell<BTreeMap<String, Limits>>,
    last: std::cell::Cell<u32>,
}

impl Groups {
    /// Whether block-proc has a group of this name.
    pub fn is_used(&self, name: &str) -> bool {
        self.numbers.borrow().contains_key(name)
    }
}

/// Why limits are not set.
#[derive(Debug, thiserror::Error)]
pub enum ThrottleError {
    #[error("Need exactly one of 'device' and 'id'")]
    Which,
    #[error("Device does not have a block device backend")]
    NoBackend,
    #[error("Device has no medium")]
    NoMedium,
    #[error(transparent)]
    Limits(#[from] ObjectError),
    #[error(transparent)]
    Graph(#[from] GraphError),
}

impl From<ThrottleError> for QmpError {
    fn from(error: ThrottleError) -> Self {
        let class = match error {
            ThrottleError::Graph(GraphError::NoDevice(_)) => ErrorClass::DeviceNotFound,
            _ => ErrorClass::GenericError,
        };
        Self {
            class,
            desc: error.to_string(),
        }
    }
}

/// block_set_io_throttle.
///
/// # Errors
/// The error reply.
pub async fn set(vm: &Vm, asked: &BlockIoThrottle) -> Result<(), QmpError> {
    let _turn = vm.graph_change.enter().await;
    Ok(set_limits(vm, asked).await?)
}

async fn set_limits(vm: &Vm, asked: &BlockIoThrottle) -> Result<(), ThrottleError> {
    let place = backend(vm, asked)?;
    let limits = Limits::of_device(asked);
    limits.check()?;
    let (device, current, own_name) = {
        let graph = vm.graph.borrow();
        let backend = &graph.backends[place];
        let own_name = match (&asked.device, &asked.id) {
            (Some(name), _) | (None, Some(name)) => name.clone(),
            (None, None) => return Err(ThrottleError::Which),
        };
        (backend.device, backend.throttle_group.clone(), own_name)
    };
    if !limits.is_enabled() {
        return Ok(leave(vm, place, device, current).await?);
    }
    let group = match (&asked.group, &current) {
        (Some(group), _) => group.clone(),
        (None, Some(current)) => current.clone(),
        (None, None) => own_name,
    };
    change(vm, &group, limits).await?;
    if current.as_ref() != Some(&group) {
        join(vm, place, device, &group).await?;
        if let Some(former) = current {
            forget(vm, &former).await?;
        }
    }
    Ok(())
}

/// The limits that the command line sets.
///
/// # Errors
/// What block-proc says.
pub async fn begin(vm: &Vm) -> Result<(), GraphError> {
    let _turn = vm.graph_change.enter().await;
    for drive in &vm.config.drives {
        let Some(DriveLimits { group, limits }) = &drive.throttle else {
            continue;
        };
        let id = &drive.backend.id;
        let found = {
            let graph = vm.graph.borrow();
            let place = graph.backends.iter().position(|backend| backend.id == *id);
            place.map(|place| (place, graph.backends[place].device))
        };
        if let Some((place, device)) = found {
            let group = group.as_ref().unwrap_or(id);
            if limits.is_enabled() {
                change(vm, group, limits.clone()).await?;
            }
            // A group that has its limits from another drive, or from an object.
            if self::limits(vm, group).is_some() {
                join(vm, place, device, group).await?;
            }
        }
    }
    Ok(())
}

/// The drive or device that is meant, by its place among the backends.
fn backend(vm: &Vm, asked: &BlockIoThrottle) -> Result<usize, ThrottleError> {
    let place = place(vm, asked.device.as_deref(), asked.id.as_deref())?;
    if vm.graph.borrow().backends[place].root.is_none() {
        return Err(ThrottleError::NoMedium);
    }
    Ok(place)
}

/// The drive of an id, or what a device of an id or a path has: its place among the backends.
///
/// # Errors
/// [`ThrottleError`].
pub fn place(vm: &Vm, device: Option<&str>, id: Option<&str>) -> Result<usize, ThrottleError> {
    let graph = vm.graph.borrow();
    let place = |found: &dyn Fn(&Backend) -> bool| graph.backends.iter().position(found);
    match (device, id) {
        (Some(drive), None) => place(&|backend| !drive.is_empty() && backend.id == *drive)
            .ok_or_else(|| GraphError::NoDevice(drive.to_owned()).into()),
        (None, Some(id)) => {
            let is_called = |backend: &Backend| backend.frontend.as_ref().is_some_and(|device| device.is_called(id));
            if let Some(found) = place(&is_called) {
                return Ok(found);
            }
            let device = self::device(vm, id)?;
            place(&|backend| backend.device == Some(device)).ok_or(ThrottleError::NoBackend)
        }
        _ => Err(ThrottleError::Which),
    }
}

/// The virtio device that an id or an object's path means: the one inside has the disk, the PCI device around it none.
fn device(vm: &Vm, id: &str) -> Result<DeviceIndex, ThrottleError> {
    let mut anonymous = 0;
    for (index, config) in vm.devices().zip(&vm.config.devices) {
        let path = match &config.id {
            Some(id) => format!("/machine/peripheral/{id}"),
            None => {
                anonymous += 1;
                format!("/machine/peripheral-anon/device[{}]", anonymous - 1)
            }
        };
        let is_disk = matches!(config.model, Model::Block(_));
        if id == format!("{path}/virtio-backend") && is_disk {
            return Ok(index);
        }
        if config.id.as_deref() == Some(id) || id == path || id == format!("{path}/virtio-backend") {
            return Err(ThrottleError::NoBackend);
        }
    }
    Err(GraphError::NoDevice(id.to_owned()).into())
}

/// A group's limits; nothing when there is no such group.
pub fn limits(vm: &Vm, name: &str) -> Option<Limits> {
    if let Some(objects::Backend::ThrottleGroup(limits)) = vm.objects.borrow().get(name) {
        return Some(limits.clone());
    }
    vm.throttle_groups.limits.borrow().get(name).cloned()
}

/// What query-block shows of a drive's limits: nothing of bursts without any limit.
pub fn describe(vm: &Vm, backend: Option<&Backend>, info: &mut BlockDeviceInfo) {
    let group = backend.and_then(|backend| backend.throttle_group.as_deref());
    let Some((group, limits)) = group.and_then(|group| Some((group, limits(vm, group)?))) else {
        return;
    };
    let rate = |name: &str| limits.get(name);
    let burst = |name: &str| Some(limits.get(&format!("{name}-max"))).filter(|burst| *burst != 0);
    let length = |name: &str| burst(name).map(|_| limits.get(&format!("{name}-max-length")));
    (info.bps, info.bps_max, info.bps_max_length) = (rate("bps-total"), burst("bps-total"), length("bps-total"));
    (info.bps_rd, info.bps_rd_max, info.bps_rd_max_length) = (rate("bps-read"), burst("bps-read"), length("bps-read"));
    (info.bps_wr, info.bps_wr_max, info.bps_wr_max_length) =
        (rate("bps-write"), burst("bps-write"), length("bps-write"));
    (info.iops, info.iops_max, info.iops_max_length) = (rate("iops-total"), burst("iops-total"), length("iops-total"));
    (info.iops_rd, info.iops_rd_max, info.iops_rd_max_length) =
        (rate("iops-read"), burst("iops-read"), length("iops-read"));
    (info.iops_wr, info.iops_wr_max, info.iops_wr_max_length) =
        (rate("iops-write"), burst("iops-write"), length("iops-write"));
    info.iops_size = Some(rate("iops-size")).filter(|size| *size != 0);
    info.group = Some(group.to_owned());
}

/// The number of a group for block-proc, which learns its limits with the first use.
///
/// # Errors
/// [`GraphError::NoGroup`], or what block-proc says.
pub async fn number(vm: &Vm, name: &str) -> Result<GroupId, GraphError> {
    let known = vm.throttle_groups.numbers.borrow().get(name).copied();
    if let Some(group) = known {
        return Ok(group);
    }
    let limits = limits(vm, name).ok_or_else(|| GraphError::NoGroup(name.to_owned()))?;
    let groups = &vm.throttle_groups;
    groups.last.set(groups.last.get() + 1);
    let group = GroupId(groups.last.get());
    let limits = limits.to_wire();
    graph::ask(vm, GraphRequest::SetGroup { group, limits }).await?;
    groups.numbers.borrow_mut().insert(name.to_owned(), group);
    Ok(group)
}

/// A group has other limits from now on, or begins to be with them.
///
/// # Errors
/// What block-proc says; then the limits are as before.
pub async fn change(vm: &Vm, name: &str, limits: Limits) -> Result<(), GraphError> {
    let known = vm.throttle_groups.numbers.borrow().get(name).copied();
    if let Some(group) = known {
        let limits = limits.to_wire();
        graph::ask(vm, GraphRequest::SetGroup { group, limits }).await?;
    }
    if let Some(objects::Backend::ThrottleGroup(own)) = vm.objects.borrow_mut().get_mut(name) {
        *own = limits;
    } else {
        vm.throttle_groups.limits.borrow_mut().insert(name.to_owned(), limits);
    }
    Ok(())
}

/// The groups that block-proc knows, with their limits.
pub fn known(vm: &Vm) -> Vec<(GroupId, ThrottleLimits)> {
    let numbers = vm.throttle_groups.numbers.borrow();
    let known = numbers.iter();
    known
        .filter_map(|(name, group)| Some((*group, limits(vm, name)?.to_wire())))
        .collect()
}

/// The number of a group that block-proc knows.
pub fn known_number(vm: &Vm, name: &str) -> Option<GroupId> {
    vm.throttle_groups.numbers.borrow().get(name).copied()
}

async fn join(vm: &Vm, place: usize, device: Option<DeviceIndex>, name: &str) -> Result<(), GraphError> {
    let group = Some(number(vm, name).await?);
    if let Some(device) = device {
        graph::ask(vm, GraphRequest::ThrottleDevice { device, group }).await?;
    }
    vm.graph.borrow_mut().backends[place].throttle_group = Some(name.to_owned());
    Ok(())
}

async fn leave(vm: &Vm, place: usize, device: Option<DeviceIndex>, current: Option<String>) -> Result<(), GraphError> {
    let Some(current) = current else { return Ok(()) };
    if let Some(device) = device {
        graph::ask(vm, GraphRequest::ThrottleDevice { device, group: None }).await?;
    }
    vm.graph.borrow_mut().backends[place].throttle_group = None;
    forget(vm, &current).await
}

/// A group without drives that is no object goes.
///
/// # Errors
/// What block-proc says.
pub async fn forget(vm: &Vm, name: &str) -> Result<(), GraphError> {
    let has_drives = {
        let graph = vm.graph.borrow();
        graph
            .backends
            .iter()
            .any(|backend| backend.throttle_group.as_deref() == Some(name))
    };
    if has_drives || vm.throttle_groups.limits.borrow_mut().remove(name).is_none() {
        return Ok(());
    }
    let group = vm.throttle_groups.numbers.borrow_mut().remove(name);
    if let Some(group) = group {
        graph::ask(vm, GraphRequest::RemoveGroup(group)).await?;
    }
    Ok(())
}
