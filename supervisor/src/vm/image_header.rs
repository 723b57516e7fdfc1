//! What commands write to images' headers, or watch in them: change-backing-file, block-set-write-threshold.

use super::{Vm, graph};
use crate::graph::error::GraphError;
use crate::graph::options::DriverOptions;
use ipc::graph::{ChildRole, GraphRequest, NodeId};
use ipc::qmp::{Event, QmpError};

/// Why a header is left as it is.
#[derive(Debug, thiserror::Error)]
enum HeaderError {
    #[error("not allowing backing file change on an image without a backing file")]
    NoBacking,
    #[error("'{0}' and image file are not in the same chain")]
    OtherChain(String),
    #[error("Could not change backing file to '{0}': image '{1}' is open read-only")]
    ReadOnly(String, String),
}

impl From<HeaderError> for QmpError {
    fn from(error: HeaderError) -> Self {
        Self::generic(error.to_string())
    }
}

/// change-backing-file: the name in the header only; what the node is over stays.
///
/// # Errors
/// The error reply.
pub async fn change_backing_file(vm: &Vm, device: &str, image: &str, name: String) -> Result<(), QmpError> {
    let _turn = vm.graph_change.enter().await;
    let (node, format) = {
        let graph = vm.graph.borrow();
        let root = graph.lookup_any(device)?;
        let image = graph.lookup(None, Some(image))?;
        let Some(backing) = image.children.get(&ChildRole::Backing) else {
            return Err(HeaderError::NoBacking.into());
        };
        if !graph.chain(root.id).iter().any(|node| node.id == image.id) {
            return Err(HeaderError::OtherChain(device.to_owned()).into());
        }
        if image.settings.read_only || !matches!(image.options.driver, DriverOptions::Qcow2(_)) {
            return Err(HeaderError::ReadOnly(name, image.name.clone()).into());
        }
        (image.id, graph.image(*backing).driver_name().to_owned())
    };
    let backing = Some((name, Some(format)));
    graph::ask(vm, GraphRequest::SetBackingName { node, backing }).await?;
    graph::refresh(vm).await?;
    Ok(())
}

/// block-set-write-threshold.
///
/// # Errors
/// The error reply.
pub async fn set_write_threshold(vm: &Vm, name: &str, bytes: u64) -> Result<(), QmpError> {
    let _turn = vm.graph_change.enter().await;
    let found = vm.graph.borrow().node_named(name).map(|node| node.id);
    let node = found.ok_or_else(|| QmpError::generic(GraphError::NoDevice(name.to_owned()).to_string()))?;
    graph::ask(vm, GraphRequest::SetWriteThreshold { node, bytes }).await?;
    graph::refresh(vm).await?;
    Ok(())
}

/// A write went beyond a node's threshold, which is none any more.
pub fn threshold_exceeded(vm: &Vm, node: NodeId, excess: u64, threshold: u64) {
    let name = {
        let mut graph = vm.graph.borrow_mut();
        // It may have been removed meanwhile.
        let Some(node) = graph.nodes.get_mut(&node) else { return };
        node.report.write_threshold = 0;
        node.name.clone()
    };
    vm.emit(Event::BlockWriteThreshold {
        node_name: name,
        amount_exceeded: excess,
        write_threshold: threshold,
    });
}
