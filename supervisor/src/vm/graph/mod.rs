//! Changes of the block graph: on a copy of the description first, then in block-proc.
//!
//! Whoever changes the graph holds [`Vm::graph_change`] until it is done, so that there is one change at a time; queries
//! look at the description in between and find it whole.

mod add;
mod change;
mod describe;
mod image;
mod request;
mod spec;
mod thread;

use super::{Vm, bitmaps, nbd_client};
use crate::config::Model;
use crate::graph::Graph;
use crate::graph::error::GraphError;
use crate::graph::node::Backend;
use crate::logging;
pub use add::{add, open_and_add};
pub use change::{add_filter, change, make_again, make_again_with, switch};
pub use describe::{change_description, unlock_all};
use ipc::graph::{DeviceOptions, GraphReply, GraphRequest, NodeDetails, NodeId, NodeReport};
use ipc::virtio::{DeviceIdentity, DeviceIndex};
use request::unexpected;
pub use request::{ask, ask_within};
pub use spec::{detect_zeroes_request, key, spec_again};
pub use thread::move_to_thread;

/// Removes a node that nobody uses.
pub async fn remove(vm: &Vm, id: NodeId) {
    match ask(vm, GraphRequest::Remove(id)).await {
        Ok(_) => {}
        // It is gone for clients; its file has been closed, or block-proc with it.
        Err(error) => logging::line(format_args!("{}: {error}", vm.graph.borrow().node_or_missing(id).name)),
    }
    let _ = change_description(vm, |graph| {
        graph.nodes.remove(&id);
        graph.forget_bitmaps();
        Ok(())
    });
}

/// Removes the nodes that nothing keeps any more.
pub async fn remove_unused(vm: &Vm) {
    let unused = vm.graph.borrow().unused();
    for node in unused {
        remove(vm, node).await;
    }
}

/// Puts a drive or a node behind a device, and says what its driver will see.
///
/// # Errors
/// [`GraphError`].
pub async fn attach(vm: &Vm, device: DeviceIndex, backend: Backend) -> Result<DeviceIdentity, GraphError> {
    let Some(root) = backend.root else {
        return Err(GraphError::NoMedium(backend.id));
    };
    let (read_only, logical_block_bytes) = {
        let graph = vm.graph.borrow();
        (
            graph.node_or_missing(root).settings.read_only,
            logical_block_bytes(&graph, root),
        )
    };
    let backend = Backend {
        device: Some(device),
        read_only,
        logical_block_bytes,
        ..backend
    };
    let options = device_options(vm, device, &backend);
    change_description(vm, |graph| {
        graph
            .backends
            .retain(|other| other.id.is_empty() || other.id != backend.id);
        graph.backends.push(backend);
        Ok(())
    })?;
    let request = GraphRequest::Attach {
        device,
        node: root,
        options,
    };
    match ask(vm, request).await? {
        GraphReply::Attached(identity) => Ok(identity),
        _ => Err(unexpected()),
    }
}

/// The block size that a guest is shown: the largest of the files below.
fn logical_block_bytes(graph: &Graph, root: NodeId) -> u32 {
    let files = graph.tree(root);
    let blocks = files.iter().filter_map(|id| {
        let node = graph.node_or_missing(*id);
        match (&node.file, &node.report.details) {
            (Some(file), _) => Some(file.info.logical_block_bytes),
            // Larger blocks are more than a guest may be shown: block-proc reads around them.
            (None, NodeDetails::Nbd(nbd)) => Some(nbd.min_block_bytes.clamp(512, 4096)),
            (None, _) => None,
        }
    });
    blocks.max().unwrap_or(512)
}

/// How a device uses its node.
pub fn device_options(vm: &Vm, device: DeviceIndex, backend: &Backend) -> DeviceOptions {
    let config = vm.config.devices.get(usize::from(device.0));
    let serial = config.and_then(|device| match &device.model {
        Model::Block(block) => Some(block.serial.clone()),
        Model::Rng(_) => None,
    });
    DeviceOptions {
        read_only: backend.read_only,
        write_cache: backend.write_cache,
        serial: serial.unwrap_or_default(),
        logical_block_bytes: backend.logical_block_bytes,
        read_error: backend.read_error,
        write_error: backend.write_error,
    }
}

/// Asks block-proc how all nodes are now, so that the description says so.
pub async fn refresh(vm: &Vm) -> Result<(), GraphError> {
    let nodes: Vec<NodeId> = vm.graph.borrow().nodes.keys().copied().collect();
    if nodes.is_empty() {
        return Ok(());
    }
    let GraphReply::Reports(reports) = ask(vm, GraphRequest::Report(nodes)).await? else {
        return Err(unexpected());
    };
    for (id, report) in reports {
        set_report(vm, id, report);
    }
    bitmaps::refresh(vm).await
}

pub fn set_report(vm: &Vm, id: NodeId, report: NodeReport) {
    if let Some(node) = vm.graph.borrow_mut().nodes.get_mut(&id) {
        node.report = report;
        nbd_client::opened(node);
    }
}
