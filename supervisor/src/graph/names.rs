//! Names of nodes, and finding them.

use super::Graph;
use super::error::GraphError;
use super::node::{Backend, Node};
use super::options::NodeOptions;
use crate::objects::spec::is_identifier;
use ipc::graph::NodeId;

/// Longest name of a node, bytes: QEMU's.
const MAX_NAME_BYTES: usize = 31;

impl Graph {
    /// Checks the names of new nodes against the rules and against what is there.
    ///
    /// # Errors
    /// The first that is not possible.
    pub fn check_names(&self, options: &NodeOptions) -> Result<(), GraphError> {
        let mut seen: Vec<&str> = Vec::new();
        for name in options.nodes().into_iter().filter_map(|node| node.name.as_deref()) {
            self.check_name(name)?;
            if seen.contains(&name) {
                return Err(GraphError::DuplicateName(name.to_owned()));
            }
            seen.push(name);
        }
        Ok(())
    }

    /// Checks the name of a new node.
    ///
    /// # Errors
    /// Why it is not possible.
    pub fn check_name(&self, name: &str) -> Result<(), GraphError> {
        if !is_identifier(name) {
            return Err(GraphError::BadName(name.to_owned()));
        }
        if self.backend(name).is_some() {
            return Err(GraphError::NameIsDevice(name.to_owned()));
        }
        if self.node_named(name).is_some() {
            return Err(GraphError::DuplicateName(name.to_owned()));
        }
        if name.len() > MAX_NAME_BYTES {
            return Err(GraphError::Unsupported("Node name too long"));
        }
        Ok(())
    }

    /// Checks the id of a new drive.
    ///
    /// # Errors
    /// Why it is not possible.
    pub fn check_drive_id(&self, id: &str) -> Result<(), GraphError> {
        if self.backend(id).is_some() {
            return Err(GraphError::DuplicateDevice(id.to_owned()));
        }
        if self.node_named(id).is_some() {
            return Err(GraphError::DeviceIsNode(id.to_owned()));
        }
        Ok(())
    }

    /// A name for a node that has none.
    pub fn made_up_name(id: NodeId) -> String {
        format!("#block{:03}", id.0)
    }

    /// The node of this name.
    pub fn node_named(&self, name: &str) -> Option<&Node> {
        self.nodes.values().find(|node| node.name == name)
    }

    /// The drive of this id.
    pub fn backend(&self, id: &str) -> Option<&Backend> {
        self.backends.iter().find(|backend| !id.is_empty() && backend.id == id)
    }

    /// What `device` or `node-name` means: the device is looked for first.
    ///
    /// # Errors
    /// [`GraphError::NotFound`], [`GraphError::NoMedium`].
    pub fn lookup(&self, device: Option<&str>, node: Option<&str>) -> Result<&Node, GraphError> {
        if let Some(backend) = device.and_then(|device| self.backend(device)) {
            let root = backend.root.ok_or_else(|| GraphError::NoMedium(backend.id.clone()))?;
            return Ok(self.node_or_missing(root));
        }
        node.and_then(|node| self.node_named(node))
            .ok_or_else(|| GraphError::NotFound {
                device: device.unwrap_or_default().to_owned(),
                node: node.unwrap_or_default().to_owned(),
            })
    }

    /// What one name means, of a device or a node: a child's reference, a job's device.
    ///
    /// # Errors
    /// [`GraphError::NotFound`], [`GraphError::NoMedium`].
    pub fn lookup_any(&self, name: &str) -> Result<&Node, GraphError> {
        self.lookup(Some(name), Some(name))
    }

    /// The drive of this id, where its absence has a class of its own.
    ///
    /// # Errors
    /// [`GraphError::NoDevice`].
    #[allow(dead_code, reason = "for the commands about devices")]
    pub fn lookup_drive(&self, id: &str) -> Result<&Backend, GraphError> {
        self.backend(id).ok_or_else(|| GraphError::NoDevice(id.to_owned()))
    }
}
