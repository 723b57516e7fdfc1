//! Which thread has which node: what the control thread must know to pass requests on.

use ipc::Failure;
use ipc::block::{BlockReply, FromBlock};
use ipc::block_job::{BitmapAction, BitmapNumber, JobControl, JobNumber, JobWork, Switch};
use ipc::graph::{EdgeChange, GraphReply, GraphRequest, NodeId};
use ipc::message::{FromHelper, RequestId};
use ipc::nbd::ExportNumber;
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
    bitmaps: BTreeMap<BitmapNumber, NodeId>,
    exports: BTreeMap<ExportNumber, IoThreadIndex>,
    jobs: BTreeMap<JobNumber, IoThreadIndex>,
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
            GraphRequest::AddExport(spec) => {
                let thread = self.of_node(spec.node)?;
                // Also if it does not come to be: nobody has this number again.
                self.exports.insert(spec.export, thread);
                thread
            }
            GraphRequest::RemoveExport { export, .. } => self.of_export(*export)?,
            GraphRequest::Change(changes) => one(self.of_changes(changes)?)?,
            GraphRequest::Switch(switch) => self.of_switch(switch)?,
            GraphRequest::ControlJob { job, control } => {
                let thread = self.of_job(*job)?;
                if matches!(control, JobControl::End { .. }) {
                    self.jobs.remove(job);
                }
                thread
            }
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
            GraphRequest::HashBitmap(bitmap) => self.of_bitmap(*bitmap)?,
            GraphRequest::ThrottleDevice { device, .. } | GraphRequest::SetHistogram { device, .. } => {
                self.of_device(*device)?
            }
            GraphRequest::ReportJobs
            | GraphRequest::ReportBitmaps
            | GraphRequest::StoreBitmaps
            | GraphRequest::Report(_)
            | GraphRequest::SetGroup { .. }
            | GraphRequest::RemoveGroup(_) => {
                return Ok(Recipient::All);
            }
        };
        Ok(Recipient::Thread(thread))
    }

    fn of_changes(&self, changes: &[EdgeChange]) -> Result<Vec<IoThreadIndex>, Failure> {
        let mut threads = Vec::new();
        for change in changes {
            match change {
                EdgeChange::Child { parent, child, .. } => {
                    threads.push(self.of_node(*parent)?);
                    threads.extend(child.map(|child| self.of_node(child)).transpose()?);
                }
                EdgeChange::Export { export, node } => {
                    threads.push(self.of_export(*export)?);
                    threads.push(self.of_node(*node)?);
                }
                EdgeChange::Device { device, node } => {
                    threads.push(self.of_device(*device)?);
                    threads.push(self.of_node(*node)?);
                }
            }
        }
        Ok(threads)
    }

    fn of_switch(&mut self, switch: &Switch) -> Result<IoThreadIndex, Failure> {
        let mut threads = self.of_changes(&switch.changes)?;
        for action in &switch.bitmaps {
            match action {
                BitmapAction::Add { bitmap, node, .. } => {
                    threads.push(self.of_node(*node)?);
                    // Also if it does not come to be: nobody has this number again.
                    self.bitmaps.insert(*bitmap, *node);
                }
                BitmapAction::Remove(bitmap)
                | BitmapAction::Clear(bitmap)
                | BitmapAction::Restore(bitmap)
                | BitmapAction::Forget(bitmap)
                | BitmapAction::SetEnabled(bitmap, _) => threads.push(self.of_bitmap(*bitmap)?),
                BitmapAction::Merge { into, from } => {
                    threads.push(self.of_bitmap(*into)?);
                    threads.push(self.of_bitmap(*from)?);
                }
            }
        }
        for job in &switch.settle {
            threads.push(self.of_job(*job)?);
        }
        for spec in &switch.start {
            let (JobWork::Commit { top: node, .. }
            | JobWork::Stream { filter: node, .. }
            | JobWork::Mirror { filter: node, .. }
            | JobWork::Backup { filter: node, .. }) = &spec.work;
            let thread = self.of_node(*node)?;
            threads.push(thread);
            // Also if it does not come to be: nobody has this number again.
            self.jobs.insert(spec.job, thread);
        }
        one(threads)
    }

    fn of_export(&self, export: ExportNumber) -> Result<IoThreadIndex, Failure> {
        let thread = self.exports.get(&export).copied();
        thread.ok_or_else(|| Failure::new(format!("there is no export {}", export.0)))
    }

    fn of_job(&self, job: JobNumber) -> Result<IoThreadIndex, Failure> {
        let thread = self.jobs.get(&job).copied();
        thread.ok_or_else(|| Failure::new(format!("there is no job {}", job.0)))
    }

    fn of_bitmap(&self, bitmap: BitmapNumber) -> Result<IoThreadIndex, Failure> {
        let node = self.bitmaps.get(&bitmap);
        self.of_node(*node.ok_or_else(|| Failure::new(format!("there is no bitmap {}", bitmap.0)))?)
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
                    self.bitmaps.retain(|_, of| *of != node);
                }
            }
            _ => self.forget(*id),
        }
    }
}

/// The one thread of all that a change is about.
fn one(threads: Vec<IoThreadIndex>) -> Result<IoThreadIndex, Failure> {
    match threads.first() {
        None => Err(Failure::new("a change of no edge")),
        Some(first) if threads.iter().any(|thread| thread != first) => {
            Err(Failure::new("a change of edges in several threads"))
        }
        Some(first) => Ok(*first),
    }
}
