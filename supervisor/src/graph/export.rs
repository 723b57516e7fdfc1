//! Exports' part of the graph: users of nodes beside devices and jobs.

use super::Graph;
use super::permissions::{Needs, Permissions};
use ipc::graph::{EdgeChange, NodeId};
use ipc::nbd::{ExportNumber, ExportSpec};

/// An export of a node.
#[derive(Debug, Clone)]
pub struct ExportUse {
    /// Its id.
    pub id: String,
    /// Its number in block-proc.
    pub number: ExportNumber,
    /// The node.
    pub node: NodeId,
    /// What block-proc was told of it; its node may be another one by now.
    pub spec: ExportSpec,
    /// It goes.
    pub shutting_down: bool,
}

impl ExportUse {
    /// What it needs of its node: that it keeps its size.
    pub fn needs(&self) -> Needs {
        let write = if self.spec.writable {
            Permissions::WRITE
        } else {
            Permissions::NONE
        };
        Needs {
            uses: Permissions::READ.and(write),
            unshared: Permissions::RESIZE,
        }
    }
}

impl Graph {
    /// The exports of a node.
    pub fn exports_on(&self, id: NodeId) -> impl Iterator<Item = &ExportUse> {
        self.exports.iter().filter(move |export| export.node == id)
    }

    /// What makes a node's exports show another one.
    pub fn exports_to(&self, from: NodeId, to: NodeId) -> impl Iterator<Item = EdgeChange> {
        self.exports_on(from).map(move |export| EdgeChange::Export {
            export: export.number,
            node: to,
        })
    }

    /// An export by its id.
    pub fn export(&self, id: &str) -> Option<&ExportUse> {
        self.exports.iter().find(|export| export.id == id)
    }
}
