//! The NBD server: it listens, and nodes are exported on it.
//!
//! The opener makes the listening socket; here clients are accepted and counted, and handed to block-proc, which knows the
//! exports and speaks with clients. An export is a user of its node in the graph, from before block-proc is asked for it
//! until block-proc has said that nothing of it is left.

use super::{Vm, chardevs, devices, graph};
use crate::chardev::socket::Plan;
use crate::chardev::{self, Listener};
use crate::config::{Socket, SocketAddress, SocketRole};
use crate::graph::bitmaps::Use;
use crate::graph::error::GraphError;
use crate::graph::export::ExportUse;
use crate::objects::spec::is_identifier;
use crate::sys::Poller;
use ipc::bitmap::{BitmapName, BitmapSource};
use ipc::block::BlockRequest;
use ipc::caps::NbdSocketFd;
use ipc::chardev::Address;
use ipc::graph::GraphRequest;
use ipc::nbd::{
    AddExport, AddToServer, ExportInfo, ExportNumber, ExportSpec, ExportType, MAX_NBD_CLIENTS, NbdClient, RemoveMode,
    StartServer,
};
use ipc::opener::{OpenRequest, TcpOptions};
use ipc::qmp::{Event, QmpError};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::rc::Rc;

/// As QEMU's: bounds what a client finds out by trying.
const DEFAULT_CONNECTIONS: u32 = 100;
const DEFAULT_HANDSHAKE_S: u32 = 10;
/// Longest name and description.
const MAX_TEXT_BYTES: usize = 4096;
/// Most exports.
const MAX_EXPORTS: usize = 256;

/// A server that listens.
struct Server {
    listener: Listener,
    handshake_s: u32,
    max_connections: usize,
}

/// See the module.
#[derive(Default)]
pub struct Exports {
    server: RefCell<Option<Server>>,
    /// It is being started.
    starting: Cell<bool>,
    clients: RefCell<BTreeSet<NbdClient>>,
    next_client: Cell<u32>,
    next_export: Cell<u32>,
}

#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error("NBD server already running")]
    Running,
    #[error("NBD server not running")]
    NotRunning,
    #[error("{0}")]
    Socket(String),
    #[error("Invalid block export id")]
    BadId,
    #[error("Block export id '{0}' is already in use")]
    Exists(String),
    #[error("NBD server already has export named '{0}'")]
    NameExists(String),
    #[error("Cannot export read-only node as writable")]
    ReadOnly,
    #[error("export name '{0}' too long")]
    LongName(String),
    #[error("description '{0}' too long")]
    LongDescription(String),
    #[error("Bitmap '{0}' is not found")]
    NoBitmap(String),
    #[error("Enabled bitmap '{0}' incompatible with readonly export")]
    Recording(String),
    #[error("Export '{0}' is not found")]
    NotFound(String),
    #[error("Export '{0}' is already shutting down")]
    ShuttingDown(String),
    #[error("export '{0}' still in use")]
    InUse(String),
    #[error("there are {MAX_EXPORTS} exports already: remove some")]
    TooMany,
}

impl From<ExportError> for QmpError {
    fn from(error: ExportError) -> Self {
        Self::generic(error.to_string())
    }
}

impl Exports {
    /// Registers its descriptor for one wait, if there is room for a client.
    pub fn watch<T>(&self, poller: &mut Poller<T>, token: T) {
        if let Some(server) = &*self.server.borrow()
            && self.clients.borrow().len() < server.max_connections
        {
            poller.add(server.listener.as_fd(), libc::POLLIN, token);
        }
    }
}

/// nbd-server-start.
///
/// # Errors
/// The error reply.
pub async fn start(vm: &Rc<Vm>, asked: StartServer) -> Result<(), QmpError> {
    let exports = &vm.exports;
    if exports.server.borrow().is_some() || exports.starting.replace(true) {
        return Err(ExportError::Running.into());
    }
    let started = open(vm, asked).await;
    exports.starting.set(false);
    exports.server.replace(Some(started?));
    Ok(())
}

async fn open(vm: &Rc<Vm>, asked: StartServer) -> Result<Server, QmpError> {
    devices::need_block(vm).await.map_err(QmpError::generic)?;
    let failed = |text: String| QmpError::from(ExportError::Socket(text));
    let role = SocketRole::Server { wait: false };
    let (plan, request) = match asked.addr {
        Address::Fd(ipc::chardev::Fd { name }) => {
            let fd = vm.fds.borrow_mut().take(&name)?;
            (Plan::passed(&name, role), OpenRequest::Adopt { fd, listen: true })
        }
        address => {
            let mut options = TcpOptions {
                no_delay: true,
                keep_alive: false,
            };
            let address = match address {
                Address::Unix(ipc::chardev::Unix { path }) => SocketAddress::Unix(path.into()),
                address => {
                    let inet = chardevs::inet(address).map_err(|_| failed("this address is of no use".into()))?;
                    let (inet, keep_alive) = inet.map_err(failed)?;
                    options.keep_alive = keep_alive;
                    SocketAddress::Inet(inet)
                }
            };
            let plan = Plan::new(&Socket { address, role, options });
            let request = plan.request().map_err(|error| failed(error.to_string()))?;
            (plan, request)
        }
    };
    let opened = chardevs::open(vm, request).await;
    let opened = opened.map_err(|error| failed(plan.failure(error).to_string()))?;
    let opened = plan.finish(opened).map_err(|error| failed(error.to_string()))?;
    let chardev::Chardev::Listening(listener) = opened.device else {
        return Err(failed("the socket does not listen".into()));
    };
    let most = asked.max_connections.unwrap_or(DEFAULT_CONNECTIONS) as usize;
    Ok(Server {
        listener,
        handshake_s: asked.handshake_max_seconds.unwrap_or(DEFAULT_HANDSHAKE_S),
        max_connections: if most == 0 {
            MAX_NBD_CLIENTS
        } else {
            most.min(MAX_NBD_CLIENTS)
        },
    })
}

/// nbd-server-stop: all exports go, and all clients.
///
/// # Errors
/// The error reply.
pub async fn stop(vm: &Vm) -> Result<(), QmpError> {
    if vm.exports.server.take().is_none() {
        return Err(ExportError::NotRunning.into());
    }
    if let Some(block) = vm.block.serving().await {
        // Without block-proc there are none.
        let _ = block.ask(BlockRequest::DropNbdClients).await;
    }
    let all: Vec<ExportUse> = vm.graph.borrow().exports.clone();
    for export in all.into_iter().filter(|export| !export.shutting_down) {
        remove(vm, &export, true).await?;
    }
    Ok(())
}

/// nbd-server-add: the old form.
///
/// # Errors
/// The error reply.
pub async fn add_to_server(vm: &Vm, asked: AddToServer) -> Result<(), QmpError> {
    if vm.exports.server.borrow().is_none() {
        return Err(ExportError::NotRunning.into());
    }
    let (node_name, read_only) = {
        let graph = vm.graph.borrow();
        let node = graph.lookup_any(&asked.device)?;
        (node.name.clone(), node.settings.read_only)
    };
    let name = asked.name.unwrap_or(asked.device);
    let asked = AddExport {
        kind: ExportType::Nbd,
        id: name.clone(),
        node_name,
        // It never complained.
        writable: asked.writable.map(|writable| writable && !read_only),
        writethrough: None,
        name: Some(name),
        description: asked.description,
        bitmaps: asked.bitmap.map(|bitmap| vec![BitmapSource::Here(bitmap)]),
        allocation_depth: None,
    };
    add_checked(vm, asked).await
}

/// block-export-add.
///
/// # Errors
/// The error reply.
pub async fn add(vm: &Vm, asked: AddExport) -> Result<(), QmpError> {
    if !is_identifier(&asked.id) {
        return Err(ExportError::BadId.into());
    }
    add_checked(vm, asked).await
}

async fn add_checked(vm: &Vm, asked: AddExport) -> Result<(), QmpError> {
    let _turn = vm.graph_change.enter().await;
    let export = describe(vm, asked)?;
    let (number, spec) = (export.number, export.spec.clone());
    graph::change_description(vm, |graph| {
        graph.exports.push(export);
        Ok(())
    })?;
    let added = graph::ask(vm, GraphRequest::AddExport(spec)).await;
    if let Err(error) = added {
        forget(vm, number);
        return Err(error.into());
    }
    Ok(())
}

/// What is asked for, checked.
fn describe(vm: &Vm, asked: AddExport) -> Result<ExportUse, QmpError> {
    let graph = vm.graph.borrow();
    if graph.export(&asked.id).is_some() {
        return Err(ExportError::Exists(asked.id).into());
    }
    let node = graph.lookup(None, Some(&asked.node_name))?;
    let writable = asked.writable.unwrap_or(false);
    if writable && node.settings.read_only {
        return Err(ExportError::ReadOnly.into());
    }
    if vm.exports.server.borrow().is_none() {
        return Err(ExportError::NotRunning.into());
    }
    let name = asked.name.unwrap_or(asked.node_name);
    if name.len() > MAX_TEXT_BYTES {
        return Err(ExportError::LongName(name).into());
    }
    if let Some(description) = asked.description.as_ref().filter(|text| text.len() > MAX_TEXT_BYTES) {
        return Err(ExportError::LongDescription(description.clone()).into());
    }
    if graph.exports.iter().any(|export| export.spec.name == name) {
        return Err(ExportError::NameExists(name).into());
    }
    if graph.exports.len() >= MAX_EXPORTS {
        return Err(ExportError::TooMany.into());
    }
    let mut bitmaps = Vec::new();
    for source in asked.bitmaps.unwrap_or_default() {
        let (of, bitmap) = match source {
            BitmapSource::Of(BitmapName { node, name }) => (graph.lookup_any(&node)?.id, name),
            // Also one of an image further below.
            BitmapSource::Here(name) => {
                let mut chain = graph.chain(node.id).into_iter();
                let of = chain.find(|node| graph.bitmap_named(node.id, &name).is_some());
                let of = of.ok_or_else(|| ExportError::NoBitmap(name.clone()))?;
                (of.id, name)
            }
        };
        let found = graph.usable_bitmap_on(of, &bitmap, Use::Look);
        let found = found.map_err(|error| QmpError::generic(error.to_string()))?;
        // Clients would not be told of what others write meanwhile.
        if !writable && !node.settings.read_only && found.enabled {
            return Err(ExportError::Recording(bitmap).into());
        }
        bitmaps.push((bitmap, found.number));
    }
    let number = ExportNumber(vm.exports.next_export.get());
    vm.exports.next_export.set(number.0 + 1);
    let spec = ExportSpec {
        export: number,
        node: node.id,
        name,
        description: asked.description,
        writable,
        writethrough: asked.writethrough.unwrap_or(false),
        bitmaps,
        allocation_depth: asked.allocation_depth.unwrap_or(false),
    };
    Ok(ExportUse {
        id: asked.id,
        number,
        node: node.id,
        spec,
        shutting_down: false,
    })
}

/// block-export-del and nbd-server-remove.
///
/// # Errors
/// The error reply.
pub async fn delete(vm: &Rc<Vm>, id: &str, mode: RemoveMode) -> Result<(), QmpError> {
    let export = vm.graph.borrow().export(id).cloned();
    let export = export.ok_or_else(|| ExportError::NotFound(id.to_owned()))?;
    if export.shutting_down {
        return Err(ExportError::ShuttingDown(id.to_owned()).into());
    }
    if mode == RemoveMode::Safe {
        return remove(vm, &export, false).await;
    }
    // Clients may have something under way: the event tells when it is gone.
    mark(vm, export.number, true);
    let vm = Rc::clone(vm);
    let executor = Rc::clone(&vm);
    executor.executor.spawn(async move {
        // What cannot be removed is gone with block-proc.
        let _ = remove(&vm, &export, true).await;
    });
    Ok(())
}

fn mark(vm: &Vm, number: ExportNumber, shutting_down: bool) {
    let mut graph = vm.graph.borrow_mut();
    let found = graph.exports.iter_mut().find(|export| export.number == number);
    if let Some(export) = found {
        export.shutting_down = shutting_down;
    }
}

async fn remove(vm: &Vm, export: &ExportUse, hard: bool) -> Result<(), QmpError> {
    mark(vm, export.number, true);
    let request = GraphRequest::RemoveExport {
        export: export.number,
        hard,
    };
    match graph::ask(vm, request).await {
        Ok(_) => {}
        Err(_) if !hard => {
            mark(vm, export.number, false);
            return Err(ExportError::InUse(export.id.clone()).into());
        }
        Err(error) => return Err(error.into()),
    }
    forget(vm, export.number);
    vm.emit(Event::BlockExportDeleted { id: export.id.clone() });
    // It may have been the last to use its node.
    let _turn = vm.graph_change.enter().await;
    graph::remove_unused(vm).await;
    Ok(())
}

/// An export is gone.
pub fn forget(vm: &Vm, number: ExportNumber) {
    // Less is needed than before.
    let _ = graph::change_description(vm, |graph| -> Result<(), GraphError> {
        graph.exports.retain(|export| export.number != number);
        Ok(())
    });
}

/// query-block-exports.
pub fn list(vm: &Vm) -> Vec<ExportInfo> {
    let graph = vm.graph.borrow();
    let info = |export: &ExportUse| ExportInfo {
        id: export.id.clone(),
        kind: ExportType::Nbd,
        node_name: graph.node_or_missing(export.node).name.clone(),
        shutting_down: export.shutting_down,
    };
    graph.exports.iter().map(info).collect()
}

/// A client connects.
pub fn accept(vm: &Rc<Vm>) {
    let accepted = {
        let server = vm.exports.server.borrow();
        let Some(server) = &*server else { return };
        server.listener.accept().map(|socket| (socket, server.handshake_s))
    };
    let Some((socket, handshake_s)) = accepted else { return };
    if fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).is_err() {
        return;
    }
    let client = NbdClient(vm.exports.next_client.get());
    vm.exports.next_client.set(client.0.wrapping_add(1));
    vm.exports.clients.borrow_mut().insert(client);
    let vm = Rc::clone(vm);
    let executor = Rc::clone(&vm);
    executor.executor.spawn(async move {
        let request = BlockRequest::ServeNbd {
            client,
            socket: NbdSocketFd::new(socket),
            handshake_s,
        };
        let served = match vm.block.serving().await {
            Some(block) => block.ask(request).await.is_ok(),
            None => false,
        };
        if !served {
            gone(&vm, client);
        }
    });
}

/// All clients are gone with block-proc.
pub fn all_gone(vm: &Vm) {
    vm.exports.clients.borrow_mut().clear();
}

/// A client is gone.
pub fn gone(vm: &Vm, client: NbdClient) {
    vm.exports.clients.borrow_mut().remove(&client);
}
