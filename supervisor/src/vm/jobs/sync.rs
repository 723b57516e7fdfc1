//! What a sync mode means for a disk and a target: what is copied, and what lies below the target.

use crate::graph::Graph;
use ipc::block_job::CopyFrom;
use ipc::graph::{ChildRole, NodeDetails, NodeId};
use ipc::job::SyncMode;

/// The mode for a target that is made for the job, and what lies below such a target. With nothing below the disk's image, `top`
/// is all there is.
pub fn of_new_target(graph: &Graph, source: NodeId, asked: SyncMode) -> (SyncMode, Option<NodeId>) {
    match (asked, graph.image_below(source)) {
        (SyncMode::Top, None) => (SyncMode::Full, None),
        (SyncMode::Top, below) => (SyncMode::Top, below),
        (SyncMode::None, _) => (SyncMode::None, Some(source)),
        (other, _) => (other, None),
    }
}

/// What is copied of a disk in a mode that needs no bitmap.
pub fn copied(graph: &Graph, source: NodeId, sync: SyncMode) -> CopyFrom {
    let base = match sync {
        SyncMode::None => return CopyFrom::Nothing,
        SyncMode::Top => graph.image_below(graph.image(source).id),
        SyncMode::Full | SyncMode::Incremental | SyncMode::Bitmap => None,
    };
    CopyFrom::Layers {
        nodes: graph.layers(source, base),
        is_all: base.is_none(),
    }
}

/// Whether what nobody has written to a target reads as zeroes: nothing lies below it.
pub fn is_alone(graph: &Graph, target: NodeId) -> bool {
    !graph.node_or_missing(target).children.contains_key(&ChildRole::Backing)
}

/// The target's clusters, bytes, if it has some.
pub fn cluster_bytes(graph: &Graph, target: NodeId) -> Option<u32> {
    match &graph.image(target).report.details {
        NodeDetails::Qcow2(details) => u32::try_from(details.cluster_bytes).ok(),
        NodeDetails::Plain | NodeDetails::Nbd(_) => None,
    }
}
