//! What is above a node takes an overlay instead: the changes that make a snapshot, and those that undo it.

use super::Graph;
use super::error::GraphError;
use super::node::{Backend, Node};
use super::options::DriverOptions;
use ipc::graph::{ChildRole, EdgeChange, NodeId};

/// The edges that a snapshot changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Insertion {
    /// What makes it.
    pub forward: Vec<EdgeChange>,
    /// What undoes it.
    pub back: Vec<EdgeChange>,
}

impl Graph {
    /// What puts an overlay over a node: all that used the node use the overlay.
    pub fn insertion(&self, base: NodeId, overlay: NodeId) -> Insertion {
        let move_users = |to: NodeId| {
            let parents = self.parents(base).filter(|(parent, _)| parent.id != overlay);
            let parents = parents.map(move |(parent, role)| EdgeChange::Child {
                parent: parent.id,
                role,
                child: Some(to),
            });
            let devices = self.backends_on(base).filter_map(|backend| backend.device);
            let devices = devices.map(move |device| EdgeChange::Device { device, node: to });
            let exports = self.exports_to(base, to);
            parents.chain(devices).chain(exports).collect::<Vec<_>>()
        };
        let backing = |child| EdgeChange::Child {
            parent: overlay,
            role: ChildRole::Backing,
            child,
        };
        let mut forward = vec![backing(Some(base))];
        forward.extend(move_users(overlay));
        let mut back = move_users(base);
        back.push(backing(None));
        Insertion { forward, back }
    }

    /// Drives without a device have a node as well, which block-proc does not know of.
    pub fn move_idle_backends(&mut self, from: NodeId, to: NodeId) {
        let idle = |backend: &&mut Backend| backend.root == Some(from) && backend.device.is_none();
        self.backends
            .iter_mut()
            .filter(idle)
            .for_each(|backend| backend.root = Some(to));
    }

    /// Whether somebody already relies on what a node shows. An image that nobody uses relies on nothing below it.
    fn is_relied_on(&self, id: NodeId) -> bool {
        let by_parent = |(parent, role): (&Node, ChildRole)| role != ChildRole::Backing || self.is_relied_on(parent.id);
        self.backends_on(id).next().is_some() || self.parents(id).any(by_parent)
    }

    /// Whether a node can go over another that has no overlay yet.
    ///
    /// # Errors
    /// Why not, in QEMU's words.
    pub fn check_overlay(&self, overlay: &Node) -> Result<(), GraphError> {
        if self.is_relied_on(overlay.id) {
            return Err(GraphError::Unsupported("The overlay is already in use"));
        }
        if overlay.children.contains_key(&ChildRole::Backing) {
            return Err(GraphError::Unsupported("The overlay already has a backing image"));
        }
        if !matches!(overlay.options.driver, DriverOptions::Qcow2(_)) {
            return Err(GraphError::Unsupported("The overlay does not support backing images"));
        }
        Ok(())
    }

    /// The image that a node shows, below filters.
    pub fn image(&self, id: NodeId) -> &Node {
        let node = self.node_or_missing(id);
        match node.below() {
            Some(below) if node.is_filter() => self.image(below),
            _ => node,
        }
    }
}
