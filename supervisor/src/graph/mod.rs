//! The block graph's description: what nodes there are, how they hang together, who uses them, and which files are open.
//!
//! block-proc has the nodes themselves; here is what a client may see and what decides about its requests. Nothing in this
//! module waits or talks to anybody but the host's file system; [`crate::vm`] carries changes out: first here on a copy,
//! which is checked ([`Graph::check_permissions`]), then in block-proc, and when that has happened the copy becomes the
//! description.
//!
//! - [`options`]: options of nodes, typed; [`settings`]: what they come to, with what is inherited.
//! - [`node`]: nodes, open files, devices' backends; [`names`]: names and finding; [`permissions`]: who may do what.
//! - [`open`]: opening files by the operator's authority; [`locks`]: what keeps other programs off.
//! - [`bitmaps`]: dirty bitmaps, which belong to nodes.
//! - [`overlay`]: what a snapshot changes; [`job`]: what jobs use and put in.
//! - [`filename`]: what a node is called where a file name is wanted; [`error`]: the texts of refusals.

pub mod bitmaps;
pub mod error;
pub mod export;
pub mod filename;
pub mod job;
pub mod locks;
pub mod names;
pub mod node;
pub mod open;
pub mod options;
pub mod overlay;
pub mod permissions;
pub mod settings;

use error::GraphError;
use export::ExportUse;
use ipc::block_job::BitmapNumber;
use ipc::graph::{ChildRole, EdgeChange, NodeId};
use ipc::virtio::DeviceIndex;
use job::JobUse;
use node::{Backend, Node};
use std::collections::BTreeMap;

/// Most nodes: a compromised qmp-proc can ask as often as it likes.
pub const MAX_NODES: usize = 1024;

/// The description.
#[derive(Debug, Clone, Default)]
pub struct Graph {
    /// The nodes; the newest has the highest number.
    pub nodes: BTreeMap<NodeId, Node>,
    /// Drives and devices, in the order in which they came.
    pub backends: Vec<Backend>,
    /// Dirty bitmaps; the newest has the highest number.
    pub bitmaps: BTreeMap<BitmapNumber, bitmaps::Bitmap>,
    /// The nodes that jobs use.
    pub jobs: Vec<JobUse>,
    /// The nodes that can be reached from elsewhere.
    pub exports: Vec<ExportUse>,
    next: u32,
    next_bitmap: u32,
}

impl Graph {
    /// A number for a new node.
    ///
    /// # Errors
    /// [`GraphError::TooMany`].
    pub fn new_id(&mut self) -> Result<NodeId, GraphError> {
        if self.nodes.len() >= MAX_NODES {
            return Err(GraphError::TooMany(MAX_NODES));
        }
        self.next += 1;
        Ok(NodeId(self.next))
    }

    /// Adds a node.
    pub fn insert(&mut self, node: Node) {
        self.next = self.next.max(node.id.0);
        self.nodes.insert(node.id, node);
    }

    /// A node stays when nobody uses it: it is the monitor's.
    pub fn own(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.is_monitor_owned = true;
        }
    }

    /// A node that exists.
    ///
    /// # Panics
    /// When it does not: numbers come from the graph itself.
    pub fn node_or_missing(&self, id: NodeId) -> &Node {
        self.nodes.get(&id).expect("a node of the graph")
    }

    /// The nodes above a node.
    pub fn parents(&self, id: NodeId) -> impl Iterator<Item = (&Node, ChildRole)> {
        self.nodes.values().flat_map(move |node| {
            let edges = node.children.iter().filter(move |(_, child)| **child == id);
            edges.map(move |(role, _)| (node, *role))
        })
    }

    /// The drives and devices on a node.
    pub fn backends_on(&self, id: NodeId) -> impl Iterator<Item = &Backend> {
        self.backends.iter().filter(move |backend| backend.root == Some(id))
    }

    /// What a device has of the graph.
    #[allow(dead_code, reason = "for the commands about devices")]
    pub fn backend_of(&self, device: DeviceIndex) -> Option<&Backend> {
        self.backends.iter().find(|backend| backend.device == Some(device))
    }

    /// The nodes above a node, directly or through others, and itself.
    pub fn above(&self, id: NodeId) -> Vec<NodeId> {
        let mut above = vec![id];
        let mut next = 0;
        while let Some(id) = above.get(next).copied() {
            for (parent, _) in self.parents(id) {
                if !above.contains(&parent.id) {
                    above.push(parent.id);
                }
            }
            next += 1;
        }
        above
    }

    /// The devices that see a node, directly or through others.
    #[allow(dead_code, reason = "for the commands about devices")]
    pub fn devices_above(&self, id: NodeId) -> Vec<DeviceIndex> {
        let above = self.above(id);
        let sees = |backend: &&Backend| backend.root.is_some_and(|root| above.contains(&root));
        self.backends
            .iter()
            .filter(sees)
            .filter_map(|backend| backend.device)
            .collect()
    }

    /// Whether a drive, a device, a job or a node above uses it.
    pub fn is_used(&self, id: NodeId) -> bool {
        self.backends_on(id).next().is_some()
            || self.parents(id).next().is_some()
            || self.jobs_on(id).next().is_some()
            || self.exports_on(id).next().is_some()
    }

    /// A node and all below it: children before parents, each once.
    pub fn tree(&self, id: NodeId) -> Vec<NodeId> {
        let mut nodes = Vec::new();
        self.collect(id, &mut nodes);
        nodes
    }

    fn collect(&self, id: NodeId, into: &mut Vec<NodeId>) {
        for child in self.node_or_missing(id).children.values() {
            if !into.contains(child) {
                self.collect(*child, into);
            }
        }
        into.push(id);
    }

    /// A node and those that it shows the contents of, from the top: its backing chain.
    pub fn chain(&self, id: NodeId) -> Vec<&Node> {
        let mut chain = vec![self.node_or_missing(id)];
        while let Some(below) = chain.last().and_then(|node| node.below()) {
            chain.push(self.node_or_missing(below));
        }
        chain
    }

    /// The nodes that nothing keeps, in an order in which they can go: parents before children.
    pub fn unused(&self) -> Vec<NodeId> {
        let mut left = self.clone();
        let mut unused = Vec::new();
        loop {
            let next = left
                .nodes
                .values()
                .find(|node| !node.is_monitor_owned && !left.is_used(node.id))
                .map(|node| node.id);
            let Some(id) = next else { return unused };
            left.nodes.remove(&id);
            unused.push(id);
        }
    }

    /// Gives a node another child, or none.
    ///
    /// # Errors
    /// [`GraphError::Cycle`], [`GraphError::OtherThread`].
    pub fn set_child(&mut self, parent: NodeId, role: ChildRole, child: Option<NodeId>) -> Result<(), GraphError> {
        if let Some(child) = child {
            let (above, below) = (self.node_or_missing(parent), self.node_or_missing(child));
            if self.tree(child).contains(&parent) {
                return Err(GraphError::Cycle {
                    role: permissions::role_name(role),
                    parent: above.name.clone(),
                    child: below.name.clone(),
                });
            }
            if above.thread != below.thread {
                return Err(GraphError::OtherThread(below.name.clone()));
            }
        }
        let Some(node) = self.nodes.get_mut(&parent) else {
            return Ok(());
        };
        match child {
            Some(child) => node.children.insert(role, child),
            None => node.children.remove(&role),
        };
        Ok(())
    }

    /// Moves edges.
    ///
    /// # Errors
    /// See [`Self::set_child`].
    pub fn move_edges(&mut self, changes: &[EdgeChange]) -> Result<(), GraphError> {
        // All edges that go are gone before new ones are judged.
        for change in changes {
            if let EdgeChange::Child { parent, role, .. } = change {
                self.set_child(*parent, *role, None)?;
            }
        }
        for change in changes {
            match *change {
                EdgeChange::Child { parent, role, child } => self.set_child(parent, role, child)?,
                EdgeChange::Export { export, node } => {
                    let exports = self.exports.iter_mut();
                    for export in exports.filter(|known| known.number == export) {
                        export.node = node;
                    }
                }
                EdgeChange::Device { device, node } => {
                    let backends = self.backends.iter_mut();
                    for backend in backends.filter(|backend| backend.device == Some(device)) {
                        backend.root = Some(node);
                    }
                }
            }
        }
        Ok(())
    }

    /// The drives' ids and devices for an error's text.
    pub(crate) fn backend_name(&self, backend: &Backend) -> String {
        if let Some(frontend) = &backend.frontend {
            return frontend.name();
        }
        match (backend.id.as_str(), backend.device) {
            ("", Some(device)) => format!("device {}", device.0),
            (id, _) => id.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests;
