//! Which thread has which node: what the control thread must know to pass requests on.

use ipc::Failure;
use ipc::block::{BlockReply, FromBlock};
use ipc::graph::{EdgeChange, GraphReply, GraphRequest, NodeId};
use ipc::message::{FromHelper, RequestId};
use ipc::virtio::{DeviceIndex, IoThreadIndex};
use std::collections::BTreeMap;

/// To whom a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recipient {
    /// The thread of what it is about.
    Thread(IoThreadIndex),
    /// Every thread: each answers for what it has.
    All,
}

/// See the module.
#[derive(Default)]
pub struct Places {
    nodes: BTreeMap<NodeId, IoThreadIndex>,
    devices: BTreeMap<DeviceIndex, IoThreadIndex>,
    /// Requests that were passed on and will make a node come or go.
    coming: BTreeMap<RequestId, NodeId>,
    going: BTreeMap<RequestId, NodeId>,
}

impl Places {
    /// With these devices, and no nodes.
    pub fn new(devices: BTreeMap<DeviceIndex, IoThreadIndex>) -> Self {
        Self {
            devices,
            ..Self::default()
        }
    }

    /// Who has a device.
    ///
    /// # Errors
    /// When nobody has.
    pub fn of_device(&self, device: DeviceIndex) -> Result<IoThreadIndex, Failure> {
        let thread = self.devices.get(&device).copied();
        thread.ok_or_else(|| Failure::new(format!("there is no device {}", device.0)))
    }

    fn of_node(&self, node: NodeId) -> Result<IoThreadIndex, Failure> {
        let thread = self.nodes.get(&node).copied();
        thread.ok_or_else(|| Failure::new(format!("there is no node {}", node.0)))
    }

    /// Who carries a request out.
    ///
    /// # Errors
    /// When what it is about is not there, or in several threads.
    pub fn recipient(&mut self, id: RequestId, request: &GraphRequest) -> Result<Recipient, Failure> {
        let thread = match request {
            GraphRequest::Add { node, thread, .. } => {
                if self.nodes.contains_key(node) {
                    return Err(Failure::new(format!("node {} exists already", node.0)));
                }
                self.nodes.insert(*node, *thread);
                self.coming.insert(id, *node);
                *thread
            }
            GraphRequest::Remove(node) => {
                let thread = self.of_node(*node)?;
                self.going.insert(id, *node);
                thread
            }
            GraphRequest::Attach { device, node, .. } => {
                let thread = self.of_device(*device)?;
                if self.of_node(*node)? != thread {
                    return Err(Failure::new(format!(
                        "device {} and node {} are in different threads",
                        device.0, node.0
                    )));
                }
                thread
            }
            GraphRequest::Change(changes) => self.of_changes(changes)?,
            GraphRequest::ReplaceFile { node, .. }
            | GraphRequest::Reconnect { node, .. }
            | GraphRequest::Create { file: node, .. }
            | GraphRequest::Resize { node, .. }
            | GraphRequest::CreateSnapshot { node, .. }
            | GraphRequest::DeleteSnapshot { node, .. }
            | GraphRequest::SetBackingName { node, .. }
            | GraphRequest::SetWriteThreshold { node, .. }
            | GraphRequest::DetectZeroes { node, .. }
            | GraphRequest::Io { node, .. }
            | GraphRequest::Breakpoint { node, .. } => self.of_node(*node)?,
            GraphRequest::ThrottleDevice { device, .. } | GraphRequest::SetHistogram { device, .. } => {
                self.of_device(*device)?
            }
            GraphRequest::Report(_) | GraphRequest::SetGroup { .. } | GraphRequest::RemoveGroup(_) => {
                return Ok(Recipient::All);
            }
        };
        Ok(Recipient::Thread(thread))
    }

    fn of_changes(&self, changes: &[EdgeChange]) -> Result<IoThreadIndex, Failure> {
        let mut threads = Vec::new();
        for change in changes {
            match change {
                EdgeChange::Child { parent, child, .. } => {
                    threads.push(self.of_node(*parent)?);
                    threads.extend(child.map(|child| self.of_node(child)).transpose()?);
                }
                EdgeChange::Device { device, node } => {
                    threads.push(self.of_device(*device)?);
                    threads.push(self.of_node(*node)?);
                }
            }
        }
        match threads.first() {
            None => Err(Failure::new("a change of no edge")),
            Some(first) if threads.iter().any(|thread| thread != first) => {
                Err(Failure::new("a change of edges in several threads"))
            }
            Some(first) => Ok(*first),
        }
    }

    /// A request could not be passed on.
    pub fn forget(&mut self, id: RequestId) {
        if let Some(node) = self.coming.remove(&id) {
            self.nodes.remove(&node);
        }
        self.going.remove(&id);
    }

    /// A thread has answered.
    pub fn answered(&mut self, message: &FromBlock) {
        let FromHelper::Reply { id, result } = message else {
            return;
        };
        match result {
            Ok(BlockReply::Graph(GraphReply::Added(_))) => drop(self.coming.remove(id)),
            Ok(BlockReply::Graph(GraphReply::Done)) => {
                if let Some(node) = self.going.remove(id) {
                    self.nodes.remove(&node);
                }
            }
            _ => self.forget(*id),
        }
    }
}
