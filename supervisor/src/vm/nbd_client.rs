//! Nodes whose bytes are an NBD server's: connecting them, and again when the connection is lost.
//!
//! block-proc cannot connect, and says when it has lost a server. Here a connection is asked of the opener, at once and then
//! less and less often, as long as the node exists. What waits for it, and for how long, is block-proc's business.

use super::{Vm, chardevs, graph};
use crate::chardev::socket;
use crate::config::{Socket, SocketAddress, SocketRole};
use crate::graph::error::GraphError;
use crate::graph::node::Node;
use crate::graph::options::DriverOptions;
use crate::graph::options::nbd::{NbdOptions, NbdServer};
use crate::graph::settings::Settings;
use crate::logging;
use ipc::caps::NbdSocketFd;
use ipc::graph::{GraphRequest, NbdSpec, NodeDetails, NodeId};
use ipc::opener::{OpenRequest, TcpOptions};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Shortest and longest time between two attempts. A server that hangs up at once is not asked more often either.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(16);

/// When each node was connected again last, and which are being.
#[derive(Default)]
pub struct NbdClients {
    last: RefCell<BTreeMap<NodeId, Instant>>,
    reconnecting: RefCell<BTreeSet<NodeId>>,
}

/// A connection to a server, on which nothing has been said.
async fn connect(vm: &Vm, options: &NbdOptions) -> Result<NbdSocketFd, GraphError> {
    let refused = |error: &dyn std::fmt::Display| GraphError::Connect(error.to_string());
    let role = SocketRole::Client { reconnect: None };
    let (plan, request) = match &options.server {
        NbdServer::Fd(name) => {
            let fd = vm.fds.borrow_mut().take(name)?;
            let request = OpenRequest::Adopt { fd, listen: false };
            (socket::Plan::passed(name, role), request)
        }
        NbdServer::Unix(_) | NbdServer::Inet(..) => {
            let (address, keep_alive) = match &options.server {
                NbdServer::Inet(inet, keep_alive) => (SocketAddress::Inet(inet.clone()), *keep_alive),
                NbdServer::Unix(path) => (SocketAddress::Unix(path.clone()), false),
                NbdServer::Fd(_) => return Err(GraphError::Connect("a passed socket is connected already".into())),
            };
            let options = TcpOptions {
                no_delay: true,
                keep_alive,
            };
            let plan = socket::Plan::new(&Socket { address, role, options });
            let request = plan.request().map_err(|error| refused(&error))?;
            (plan, request)
        }
    };
    let opened = chardevs::open(vm, request).await;
    let opened = opened.map_err(|error| refused(&plan.failure(error)))?;
    Ok(NbdSocketFd::new(opened.socket.into_fd()))
}

/// What block-proc makes a node of. Connects, for `open-timeout` over and over.
///
/// # Errors
/// When no server answers.
pub async fn spec(vm: &Vm, options: &NbdOptions, settings: Settings) -> Result<NbdSpec, GraphError> {
    let deadline = Instant::now() + Duration::from_secs(options.open_timeout_s.into());
    let socket = loop {
        match connect(vm, options).await {
            Ok(socket) => break socket,
            Err(error) if Instant::now() + FIRST_PAUSE > deadline => return Err(error),
            Err(_) => vm.alarms.sleep(FIRST_PAUSE).await,
        }
    };
    Ok(NbdSpec {
        socket,
        export: options.export.clone().unwrap_or_default(),
        reconnect_delay_s: options.reconnect_delay_s,
        read_only: settings.read_only,
        auto_read_only: settings.auto_read_only,
        discard: settings.discard,
    })
}

/// An export that turned out to be read-only makes its node so.
pub fn opened(node: &mut Node) {
    if let NodeDetails::Nbd(details) = &node.report.details {
        node.settings.read_only |= details.read_only;
    }
}

/// A node has lost its server.
pub fn lost(vm: &Rc<Vm>, node: NodeId) {
    let exists = vm.graph.borrow().nodes.contains_key(&node);
    if !exists || !vm.nbd_clients.reconnecting.borrow_mut().insert(node) {
        return;
    }
    let task_vm = Rc::clone(vm);
    vm.executor.spawn(async move {
        reconnect(&task_vm, node).await;
        task_vm.nbd_clients.reconnecting.borrow_mut().remove(&node);
    });
}

async fn reconnect(vm: &Vm, id: NodeId) {
    let before = vm.nbd_clients.last.borrow().get(&id).copied();
    let mut pause = match before {
        Some(before) if before.elapsed() < LONGEST_PAUSE => FIRST_PAUSE,
        _ => Duration::ZERO,
    };
    let mut has_failed = false;
    loop {
        vm.alarms.sleep(pause).await;
        let found = vm.graph.borrow().nodes.get(&id).cloned();
        let options = match found.as_ref().map(|node| &node.options.driver) {
            Some(DriverOptions::Nbd(options)) if !matches!(options.server, NbdServer::Fd(_)) => options.clone(),
            _ => {
                vm.nbd_clients.last.borrow_mut().remove(&id);
                return;
            }
        };
        let name = found.map(|node| node.name).unwrap_or_default();
        let connected = match connect(vm, &options).await {
            Ok(socket) => {
                vm.nbd_clients.last.borrow_mut().insert(id, Instant::now());
                graph::ask(vm, GraphRequest::Reconnect { node: id, socket }).await
            }
            Err(error) => Err(error),
        };
        match connected {
            Ok(_) => {
                logging::line(format_args!("node {name}: the NBD server is connected again"));
                return;
            }
            Err(error) if !has_failed => {
                logging::line(format_args!(
                    "node {name}: the NBD server is lost and cannot be reached: {error}; it is tried again"
                ));
                has_failed = true;
            }
            Err(_) => {}
        }
        if vm.outcome.get().is_some() {
            return;
        }
        pause = (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
    }
}
