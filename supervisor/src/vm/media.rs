//! Trays and media: eject, blockdev-open-tray, -close-tray, -insert-medium, -remove-medium.

use super::frontends::is_read_only;
use super::{Vm, graph, throttling};
use crate::frontend::{Frontend, Role};
use crate::graph::error::GraphError;
use crate::graph::node::Backend;
use ipc::qmp::{Event, QmpError};

/// Why not: the texts that clients know from QEMU.
#[derive(Debug, thiserror::Error)]
enum MediaError {
    #[error("Device '{0}' is not removable")]
    Fixed(String),
    #[error("Device '{0}' does not have a tray")]
    NoTray(String),
    #[error("Tray of device '{0}' is not open")]
    Closed(String),
    #[error("There already is a medium in device '{0}'")]
    Full(String),
    #[error("Node '{0}' not found")]
    NoNode(String),
    #[error("Node '{0}' is already in use")]
    InUse(String),
    #[error(transparent)]
    Graph(#[from] GraphError),
}

impl From<MediaError> for QmpError {
    fn from(error: MediaError) -> Self {
        match error {
            MediaError::Graph(error) => error.into(),
            error => Self::generic(error.to_string()),
        }
    }
}

/// A drive or a device, as a command names it.
struct Named {
    /// Its place among the backends.
    place: usize,
    name: String,
}

fn find(vm: &Vm, device: Option<&str>, id: Option<&str>) -> Result<Named, QmpError> {
    let place = throttling::place(vm, device, id)?;
    let name = device.or(id).unwrap_or_default().to_owned();
    Ok(Named { place, name })
}

/// A drive without a device is one whose medium can be changed; of a device its type says it.
fn is_removable(backend: &Backend) -> bool {
    match &backend.frontend {
        Some(frontend) => frontend.ty.is_removable(),
        None => backend.device.is_none(),
    }
}

fn with_tray(backend: &Backend) -> Option<&Frontend> {
    backend.frontend.as_ref().filter(|frontend| frontend.ty.has_tray())
}

/// eject: opens the tray, if there is one, and takes the medium out.
///
/// # Errors
/// The error reply.
pub async fn eject(vm: &Vm, device: Option<&str>, id: Option<&str>) -> Result<(), QmpError> {
    let _turn = vm.graph_change.enter().await;
    let named = find(vm, device, id)?;
    match open(vm, &named) {
        Ok(()) | Err(MediaError::NoTray(_)) => Ok(take_out(vm, &named).await?),
        Err(error) => Err(error.into()),
    }
}

/// blockdev-open-tray. No guest is there to have locked it.
///
/// # Errors
/// The error reply.
pub async fn open_tray(vm: &Vm, device: Option<&str>, id: Option<&str>) -> Result<(), QmpError> {
    let _turn = vm.graph_change.enter().await;
    Ok(open(vm, &find(vm, device, id)?)?)
}

fn open(vm: &Vm, named: &Named) -> Result<(), MediaError> {
    {
        let graph = vm.graph.borrow();
        let backend = &graph.backends[named.place];
        if !is_removable(backend) {
            return Err(MediaError::Fixed(named.name.clone()));
        }
        if with_tray(backend).is_none() {
            return Err(MediaError::NoTray(named.name.clone()));
        }
    }
    move_tray(vm, named, true);
    Ok(())
}

/// blockdev-close-tray: what has none counts as closed.
///
/// # Errors
/// The error reply.
pub async fn close_tray(vm: &Vm, device: Option<&str>, id: Option<&str>) -> Result<(), QmpError> {
    let _turn = vm.graph_change.enter().await;
    let named = find(vm, device, id)?;
    if !is_removable(&vm.graph.borrow().backends[named.place]) {
        return Err(MediaError::Fixed(named.name).into());
    }
    move_tray(vm, &named, false);
    Ok(())
}

fn move_tray(vm: &Vm, named: &Named, is_open: bool) {
    let moved = {
        let mut graph = vm.graph.borrow_mut();
        let backend = &mut graph.backends[named.place];
        let device = backend.id.clone();
        let tray = backend.frontend.as_mut().filter(|frontend| frontend.ty.has_tray());
        tray.filter(|tray| tray.is_tray_open != is_open).map(|tray| {
            tray.is_tray_open = is_open;
            (device, tray.name())
        })
    };
    if let Some((device, id)) = moved {
        vm.emit(Event::DeviceTrayMoved {
            device,
            id,
            tray_open: is_open,
        });
    }
}

/// blockdev-remove-medium.
///
/// # Errors
/// The error reply.
pub async fn remove(vm: &Vm, id: &str) -> Result<(), QmpError> {
    let _turn = vm.graph_change.enter().await;
    Ok(take_out(vm, &find(vm, None, Some(id))?).await?)
}

async fn take_out(vm: &Vm, named: &Named) -> Result<(), MediaError> {
    {
        let graph = vm.graph.borrow();
        let backend = &graph.backends[named.place];
        if !is_removable(backend) {
            return Err(MediaError::Fixed(named.name.clone()));
        }
        if with_tray(backend).is_some_and(|tray| !tray.is_tray_open) {
            return Err(MediaError::Closed(named.name.clone()));
        }
        if let Some(root) = backend.root {
            graph.check_idle(root)?;
        }
    }
    graph::change_description(vm, |graph| {
        graph.backends[named.place].root = None;
        Ok(())
    })?;
    graph::remove_unused(vm).await;
    Ok(())
}

/// blockdev-insert-medium.
///
/// # Errors
/// The error reply.
pub async fn insert(vm: &Vm, id: &str, node: &str) -> Result<(), QmpError> {
    let _turn = vm.graph_change.enter().await;
    let named = find(vm, None, Some(id))?;
    Ok(put_in(vm, &named, node)?)
}

fn put_in(vm: &Vm, named: &Named, node: &str) -> Result<(), MediaError> {
    let root = {
        let graph = vm.graph.borrow();
        let node = graph
            .node_named(node)
            .ok_or_else(|| MediaError::NoNode(node.to_owned()))?;
        if graph.backends_on(node.id).next().is_some() {
            return Err(MediaError::InUse(node.name.clone()));
        }
        let backend = &graph.backends[named.place];
        if !is_removable(backend) {
            return Err(MediaError::Fixed(named.name.clone()));
        }
        if with_tray(backend).is_some_and(|tray| !tray.is_tray_open) {
            return Err(MediaError::Closed(named.name.clone()));
        }
        if backend.root.is_some() {
            return Err(MediaError::Full(named.name.clone()));
        }
        node.id
    };
    let node_is_read_only = is_read_only(vm, root);
    graph::change_description(vm, |graph| {
        let backend = &mut graph.backends[named.place];
        backend.root = Some(root);
        let only_reads = |frontend: &Frontend| matches!(frontend.ty.role, Role::Removable { read_only: true, .. });
        backend.read_only = node_is_read_only || backend.frontend.as_ref().is_some_and(only_reads);
        Ok(())
    })?;
    Ok(())
}
