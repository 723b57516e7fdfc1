//! What the supervisor asks of the graph of this thread.
//!
//! Requests begin in order. Those that need time are tasks beside the guest's, so that the next can begin. Those that change
//! edges, files or sizes have the thread for themselves: nothing else begins, the guest's requests stay in their rings, and
//! when all that was under way has ended they do their work; then everything goes on.

use super::{Finished, IoThread, encrypt};
use crate::buffer::BouncePool;
use crate::device::Disk;
use crate::executor::io::Io;
use crate::graph::bitmaps::InImage;
use crate::graph::driver::{Driver, Opened, Parts, children_of};
use crate::graph::manual::{self, failure};
use crate::graph::{Children, Graph, User, wrong_driver};
use crate::job::copier::Copier;
use crate::ledger::Ledger;
use crate::nbd::client as nbd;
use crate::nbd::context::{Context, InUse};
use crate::nbd::server::Export;
use crate::node::Node;
use crate::node::edge::{Edge, Target};
use crate::node::qcow2::create::create;
use crate::throttle::Throttling;
use ipc::Failure;
use ipc::block::{BlockEvent, BlockReply, DiskInfo};
use ipc::block_job::Switch;
use ipc::caps::{DiskFd, NbdSocketFd};
use ipc::graph::{
    Breakpoint, CreateSpec, DeviceOptions, EdgeChange, GraphReply, GraphRequest, NodeId, NodeReport, NodeSpec,
    Preallocation,
};
use ipc::helper;
use ipc::message::RequestId;
use ipc::nbd::{ExportNumber, ExportSpec};
use ipc::virtio::DeviceIndex;
use nix::errno::Errno;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long mirrors have to come near to their sources.
const APPROACH: Duration = Duration::from_secs(1);

/// The graph, and what is being done about it.
pub(super) struct GraphWork {
    pub(super) graph: Graph,
    /// A thread without disks has no engine that could read files.
    has_nodes: bool,
    parts: Parts,
    /// For the operator's requests, apart from the drivers' own: a task must not hold two of one pool.
    pool: Rc<BouncePool>,
    queue: VecDeque<(RequestId, GraphRequest)>,
    exclusive: Option<Exclusive>,
}

impl GraphWork {
    pub(super) fn new(io: &Rc<Io>, has_nodes: bool, throttling: Rc<Throttling>, ledger: Arc<Ledger>) -> Self {
        Self {
            graph: Graph::default(),
            has_nodes,
            parts: Parts {
                io: io.clone(),
                bounce: Rc::default(),
                throttling,
                ledger,
                events: Rc::default(),
                drain: Rc::default(),
            },
            pool: Rc::default(),
            queue: VecDeque::new(),
            exclusive: None,
        }
    }

    /// See [`Graph::written_without_device`].
    pub(super) fn written_without_device(&self) -> Vec<Rc<Target>> {
        self.graph.written_without_device()
    }

    /// Whether the guest's requests must wait.
    pub(super) fn is_changing(&self) -> bool {
        let exclusive = self.exclusive.as_ref();
        exclusive.is_some_and(|exclusive| !matches!(exclusive.stage, Stage::Approaching(_)))
    }

    /// The answer to the request that has the thread for itself is on its way.
    pub(super) fn told(&mut self) {
        if let Some(Exclusive { stage, .. }) = &mut self.exclusive
            && matches!(stage, Stage::Telling)
        {
            *stage = Stage::Told;
        }
    }

    /// Until when mirrors have the time to come near to their sources before the guest's requests must wait for the rest.
    pub(super) fn approaching(&self) -> Option<Instant> {
        match self.exclusive.as_ref()?.stage {
            Stage::Approaching(until) => Some(until),
            _ => None,
        }
    }
}

/// How a task of the graph ends.
pub(super) struct Ended {
    id: RequestId,
    then: Then,
}

/// What is to be done when it has.
enum Then {
    Settle(NodeId, Children, Result<(Opened, Option<NodeReport>), Failure>),
    Removed(NodeId, Result<(), Errno>),
    Reply(Vec<NodeId>, Result<GraphReply, Failure>),
    /// The part of an exclusive request that takes time.
    Exclusive(Result<(), Failure>),
}

/// A request that has the thread for itself.
struct Exclusive {
    id: RequestId,
    what: Change,
    stage: Stage,
}

/// What became of it with its next step.
enum Alone {
    Still(Exclusive),
    Over,
}

enum Change {
    Edges(Vec<EdgeChange>),
    File(NodeId, Option<(DiskFd, DiskInfo)>),
    Size(NodeId, u64, Preallocation),
    Switch(Switch),
}

/// Whether a request has its thread for itself: its answer is [`super::Action::Told`] of.
pub fn is_exclusive(request: &GraphRequest) -> bool {
    matches!(
        request,
        GraphRequest::Change(_)
            | GraphRequest::Switch(_)
            | GraphRequest::ReplaceFile { .. }
            | GraphRequest::Resize { .. }
    )
}

enum Stage {
    /// Until mirrors are near to their sources, or that has taken long enough; everything goes on meanwhile.
    Approaching(Instant),
    /// Until nothing is under way.
    Draining,
    /// Until its own task has ended.
    Working,
    Worked(Result<(), Failure>),
    /// Until the answer is on its way: what the guest writes after a change must never be lost with a block-proc whose
    /// supervisor does not know of the change.
    Telling,
    Told,
}

impl IoThread {
    /// Takes a request; it begins with the next [`Self::advance_graph`].
    pub(super) fn ask_graph(&mut self, id: RequestId, request: GraphRequest) {
        match request {
            // Requests that a change waits for may be waiting for this.
            GraphRequest::Reconnect { node, socket } => {
                if let Err(failure) = self.reconnect(id, node, socket) {
                    self.reply_graph(id, Err(failure));
                }
            }
            request => self.graph.queue.push_back((id, request)),
        }
    }

    fn reconnect(&mut self, id: RequestId, node: NodeId, socket: NbdSocketFd) -> Result<(), Failure> {
        let Driver::Nbd(nbd) = self.graph.graph.member(node)?.driver.clone() else {
            return Err(wrong_driver(node, "an NBD server's export"));
        };
        let transport = nbd::socket(&self.graph.parts.io, socket)?;
        self.start(id, vec![node], async move {
            nbd.reconnect(transport).await.map(|()| GraphReply::Done)
        });
        Ok(())
    }

    /// Begins and ends what can. Returns whether anything happened.
    pub(super) fn advance_graph(&mut self) -> bool {
        let mut any = false;
        loop {
            let was_changing = self.graph.is_changing();
            if let Some(exclusive) = self.graph.exclusive.take() {
                match self.go_on_alone(exclusive) {
                    Alone::Still(still) => {
                        self.graph.exclusive = Some(still);
                        // Who is held up for other reasons must hear that somebody drains.
                        return any || self.graph.is_changing() != was_changing;
                    }
                    Alone::Over => {
                        any = true;
                        self.scan_every_device();
                    }
                }
            }
            let Some((id, request)) = self.graph.queue.pop_front() else {
                return any;
            };
            any = true;
            match self.begin_graph(id, request) {
                Ok(Some(reply)) => self.reply_graph(id, Ok(reply)),
                Ok(None) => {}
                Err(failure) => self.reply_graph(id, Err(failure)),
            }
        }
    }

    /// Does a request, or begins to. The answer, if there is one already.
    fn begin_graph(&mut self, id: RequestId, request: GraphRequest) -> Result<Option<GraphReply>, Failure> {
        let what = match request {
            GraphRequest::Add { node, spec, .. } => return self.add(id, node, spec).map(|()| None),
            GraphRequest::Remove(node) => return self.remove(id, node).map(|()| None),
            GraphRequest::Attach { device, node, options } => return self.attach(device, node, &options).map(Some),
            GraphRequest::Reconnect { node, socket } => return self.reconnect(id, node, socket).map(|()| None),
            GraphRequest::AddExport(spec) => return self.add_export(spec).map(Some),
            GraphRequest::RemoveExport { export, hard } => {
                let gone = self.exports.remove(export, hard)?;
                // Not counted: its clients may have to wait for a change, and that waits for nobody who is not counted.
                self.executor.spawn(async move {
                    gone.await;
                    Finished::ExportGone(id, export)
                });
                return Ok(None);
            }
            GraphRequest::Report(nodes) => {
                self.report_nodes(id, &nodes);
                return Ok(None);
            }
            GraphRequest::DetectZeroes { node, may_unmap } => {
                self.graph.graph.set_detect_zeroes(node, may_unmap)?;
                return Ok(Some(GraphReply::Done));
            }
            GraphRequest::SetWriteThreshold { node, bytes } => {
                self.graph.graph.watch(node)?.set_threshold(bytes);
                return Ok(Some(GraphReply::Done));
            }
            GraphRequest::SetHistogram {
                device,
                kind,
                boundaries_ns,
            } => {
                self.device(device)?.set_histogram(kind, boundaries_ns)?;
                return Ok(Some(GraphReply::Done));
            }
            GraphRequest::Io { node, io } => {
                let graph = &self.graph.graph;
                let (target, read_only) = (graph.target(node)?, graph.member(node)?.read_only);
                let work = manual::run(target, read_only, io, self.graph.pool.clone());
                self.start(id, vec![node], work);
                return Ok(None);
            }
            GraphRequest::Breakpoint { node, action } => return self.breakpoint(id, node, action),
            GraphRequest::Create { file, spec, data_file } => {
                return self.create(id, file, data_file, spec).map(|()| None);
            }
            GraphRequest::SetBackingName { node, backing } => {
                let qcow2 = self.graph.graph.qcow2(node)?;
                self.start(id, vec![node], async move {
                    qcow2.set_backing_name(backing).await.map(|()| GraphReply::Done)
                });
                return Ok(None);
            }
            GraphRequest::CreateSnapshot { node, snapshot } => {
                let qcow2 = self.graph.graph.qcow2(node)?;
                self.start(id, vec![node], async move {
                    qcow2.create_snapshot(&snapshot).await.map(|()| GraphReply::Done)
                });
                return Ok(None);
            }
            GraphRequest::DeleteSnapshot { node, id: snapshot } => {
                let qcow2 = self.graph.graph.qcow2(node)?;
                self.start(id, vec![node], async move {
                    qcow2.delete_snapshot(&snapshot).await.map(|()| GraphReply::Done)
                });
                return Ok(None);
            }
            // Every thread is told, and each says the same to all.
            GraphRequest::SetGroup { group, limits } => {
                self.throttling.set_group(group, &limits);
                return Ok(Some(GraphReply::Done));
            }
            GraphRequest::RemoveGroup(group) => {
                self.throttling.remove_group(group);
                return Ok(Some(GraphReply::Done));
            }
            GraphRequest::ThrottleDevice { device, group } => {
                let member = group.map(|group| self.throttling.join(group)).transpose()?;
                self.device(device)?.set_throttle(member);
                return Ok(Some(GraphReply::Done));
            }
            GraphRequest::ReportBitmaps => {
                return Ok(Some(GraphReply::Bitmaps(self.graph.graph.report_bitmaps())));
            }
            GraphRequest::HashBitmap(number) => {
                let bitmap = self.graph.graph.bitmap(number);
                let bitmap = bitmap.ok_or_else(|| Failure::new("there is no such bitmap"))?;
                return Ok(Some(GraphReply::BitmapHash(bitmap.borrow().bits().sha256())));
            }
            GraphRequest::StoreBitmaps => {
                let images = self.graph.graph.images();
                let held = images.iter().map(|(node, _)| *node).collect();
                self.start(id, held, async move {
                    for (_, image) in images {
                        image.store_bitmaps().await.map_err(failure)?;
                    }
                    Ok(GraphReply::Done)
                });
                return Ok(None);
            }
            GraphRequest::ControlJob { job, control } => return self.control_job(id, job, control),
            GraphRequest::ReportJobs => return Ok(Some(GraphReply::Jobs(self.report_jobs()))),
            GraphRequest::Switch(switch) => Change::Switch(switch),
            GraphRequest::Change(changes) => Change::Edges(changes),
            GraphRequest::ReplaceFile { node, disk, info } => Change::File(node, Some((disk, info))),
            GraphRequest::Resize {
                node,
                bytes,
                preallocation,
            } => Change::Size(node, bytes, preallocation),
        };
        let stage = match &what {
            Change::Switch(switch) if !switch.settle.is_empty() => Stage::Approaching(Instant::now() + APPROACH),
            _ => Stage::Draining,
        };
        self.graph.exclusive = Some(Exclusive { id, what, stage });
        Ok(None)
    }

    fn add_export(&mut self, spec: ExportSpec) -> Result<GraphReply, Failure> {
        let user = User::Export(spec.export.0);
        let mut contexts = vec![Context::Allocation];
        if spec.allocation_depth {
            contexts.push(Context::Depth);
        }
        for (name, number) in &spec.bitmaps {
            let bitmap = self.graph.graph.bitmap(*number);
            let bitmap = bitmap.ok_or_else(|| Failure::new(format!("there is no bitmap {}", number.0)))?;
            contexts.push(Context::Dirty(name.clone(), Rc::new(InUse::new(bitmap)?)));
        }
        let edge = self.graph.graph.attach(user, spec.node, spec.writable)?;
        let added = self.exports.add(Export::new(spec, edge, contexts));
        if added.is_err() {
            self.graph.graph.detach(user);
        }
        added.map(|()| GraphReply::Done)
    }

    /// Nothing of an export is left.
    pub(super) fn export_gone(&mut self, id: RequestId, export: ExportNumber) {
        self.exports.forget(export);
        self.graph.graph.detach(User::Export(export.0));
        self.reply_graph(id, Ok(GraphReply::Done));
    }

    fn add(&mut self, id: RequestId, node: NodeId, spec: NodeSpec) -> Result<(), Failure> {
        if !self.graph.has_nodes {
            return Err(Failure::new("a thread without disks has no nodes"));
        }
        let found = self.graph.graph.find(&spec)?;
        let children = self.graph.graph.reserve(node, &children_of(&spec))?;
        let parts = self.graph.parts.clone();
        self.start_task(id, async move {
            let opened = parts.open(node, spec, children.clone(), found).await;
            let opened = match opened {
                Ok(Opened::Driver(driver, read_only)) => {
                    let top = driver.node().or_else(|| file_below(&children));
                    let report = match top {
                        Some(top) => report(&*top, (0, 0)).await.map_err(failure),
                        None => Err(Failure::new("a node of nothing")),
                    };
                    report.map(|report| (Opened::Driver(driver, read_only), Some(report)))
                }
                Ok(missing) => Ok((missing, None)),
                Err(failure) => Err(failure),
            };
            Then::Settle(node, children, opened)
        });
        Ok(())
    }

    fn remove(&mut self, id: RequestId, node: NodeId) -> Result<(), Failure> {
        let image = self.graph.graph.qcow2(node).ok();
        let flush = self.graph.graph.begin_removal(node)?;
        self.start_task(id, async move {
            let flushed = match flush {
                Some(target) => target.node().flush().await,
                None => Ok(()),
            };
            let stored = match image {
                Some(image) => image.store_bitmaps().await,
                None => Ok(()),
            };
            Then::Removed(node, flushed.and(stored))
        });
        Ok(())
    }

    fn attach(&mut self, index: DeviceIndex, node: NodeId, options: &DeviceOptions) -> Result<GraphReply, Failure> {
        if self.device(index)?.disk().is_some() {
            return Err(Failure::new(format!("device {} has a disk already", index.0)));
        }
        Disk::check(options)?;
        let edge = self.graph.graph.attach(User::Device(index), node, !options.read_only)?;
        let disk = Disk::new(edge, options)?;
        Ok(GraphReply::Attached(self.device(index)?.attach(disk)))
    }

    fn create(
        &mut self,
        id: RequestId,
        file: NodeId,
        data_file: Option<NodeId>,
        spec: CreateSpec,
    ) -> Result<(), Failure> {
        let graph = &self.graph.graph;
        let child = Edge::to(graph.unused_file(file)?) as Rc<dyn Node>;
        let data_file = data_file.map(|node| Ok::<_, Failure>((node, graph.unused_file(node)?)));
        let data_file = data_file.transpose()?;
        let mut held = vec![file];
        held.extend(data_file.as_ref().map(|(node, _)| *node));
        let data_file = data_file.map(|(_, target)| Edge::to(target) as Rc<dyn Node>);
        self.start(id, held, async move {
            match spec {
                CreateSpec::Raw { bytes, preallocation } => child.resize(bytes, preallocation).await?,
                CreateSpec::Qcow2(spec) => create(&child, &spec, data_file.as_ref()).await?,
                CreateSpec::Encrypt { luks, key, seed } => encrypt::qcow2(child, luks, &key, &seed).await?,
                CreateSpec::Luks {
                    bytes,
                    luks,
                    key,
                    seed,
                    preallocation,
                } => encrypt::luks(&*child, bytes, &luks, &key, &seed, preallocation).await?,
            }
            Ok(GraphReply::Done)
        });
        Ok(())
    }

    fn report_nodes(&mut self, id: RequestId, nodes: &[NodeId]) {
        let graph = &self.graph.graph;
        let found = |node: &NodeId| {
            let target = graph.target(*node).ok()?;
            let watch = graph.watch(*node).ok()?;
            Some((*node, target, (watch.threshold(), watch.highest())))
        };
        let found: Vec<(NodeId, Rc<Target>, (u64, u64))> = nodes.iter().filter_map(found).collect();
        let held = found.iter().map(|(node, ..)| *node).collect();
        self.start(id, held, async move {
            let mut reports = BTreeMap::new();
            for (node, target, watched) in found {
                reports.insert(node, report(target.node(), watched).await.map_err(failure)?);
            }
            Ok(GraphReply::Reports(reports))
        });
    }

    /// Starts a task that ends with the answer; as long as it runs, the nodes stay.
    fn start(
        &mut self,
        id: RequestId,
        held: Vec<NodeId>,
        work: impl Future<Output = Result<GraphReply, Failure>> + 'static,
    ) {
        held.iter().for_each(|node| self.graph.graph.hold(*node));
        self.start_task(id, async move { Then::Reply(held, work.await) });
    }

    fn start_task(&mut self, id: RequestId, work: impl Future<Output = Then> + 'static) {
        self.node_tasks += 1;
        self.executor
            .spawn(async move { Finished::Graph(Box::new(Ended { id, then: work.await })) });
    }

    fn breakpoint(&mut self, id: RequestId, node: NodeId, action: Breakpoint) -> Result<Option<GraphReply>, Failure> {
        let blkdebug = self.graph.graph.blkdebug(node)?;
        let breakpoints = blkdebug.breakpoints().clone();
        let done = match action {
            Breakpoint::Set { event, tag } => breakpoints.set(&event, tag),
            Breakpoint::Resume { tag } => breakpoints.resume(&tag),
            Breakpoint::Remove { tag } => breakpoints.remove(&tag),
            Breakpoint::Wait { tag } => {
                self.executor
                    .spawn(async move { Finished::Held(id, breakpoints.wait(&tag).await) });
                return Ok(None);
            }
        };
        done.map(|()| Some(GraphReply::Done)).map_err(failure)
    }

    /// Whoever waited for a request to be held is told.
    pub(super) fn held(&self, id: RequestId, result: Result<(), Errno>) {
        self.reply_graph(id, result.map(|()| GraphReply::Done).map_err(failure));
    }

    /// Whether somebody waits until nothing is under way.
    pub(super) fn set_draining(&self, is_draining: bool) {
        self.graph.parts.drain.set(is_draining);
    }

    /// A task of the graph has ended.
    pub(super) fn graph_ended(&mut self, Ended { id, then }: Ended) {
        let graph = &mut self.graph.graph;
        let result = match then {
            Then::Settle(node, children, opened) => {
                let (driver, result) = match opened {
                    Ok((Opened::Driver(driver, read_only), Some(report))) => {
                        (Some((driver, read_only)), Ok(GraphReply::Added(report)))
                    }
                    Ok((Opened::Driver(..), None)) => (None, Err(Failure::new("a node of unknown size"))),
                    Ok((Opened::Missing(reply), _)) => (None, Ok(reply)),
                    Err(failure) => (None, Err(failure)),
                };
                graph.settle(node, children, driver);
                result
            }
            Then::Removed(node, flushed) => {
                graph.finish_removal(node);
                // It is gone all the same: nobody could do anything with it any more.
                if let Err(errno) = flushed {
                    helper::log(&format!("node {} was closed and could not be flushed: {errno}", node.0));
                }
                Ok(GraphReply::Done)
            }
            Then::Reply(held, result) => {
                held.into_iter().for_each(|node| graph.release(node));
                result
            }
            Then::Exclusive(result) => {
                if let Some(exclusive) = &mut self.graph.exclusive {
                    exclusive.stage = Stage::Worked(result);
                }
                return;
            }
        };
        self.reply_graph(id, result);
    }

    /// The next step of a request that has the thread for itself, or its answer.
    fn go_on_alone(&mut self, exclusive: Exclusive) -> Alone {
        let Exclusive { id, mut what, stage } = exclusive;
        let stage = match (stage, &what) {
            (Stage::Approaching(until), Change::Switch(switch))
                if Instant::now() < until && !self.are_near(&switch.settle) =>
            {
                Stage::Approaching(until)
            }
            (Stage::Approaching(_), _) => Stage::Draining,
            (stage, _) => stage,
        };
        let stage = match stage {
            Stage::Draining if self.node_tasks == 0 && self.gate.inside() == 0 => match self.work_alone(id, &what) {
                Ok(()) => Stage::Working,
                Err(failure) => self.tell(id, Err(failure)),
            },
            Stage::Worked(result) => {
                let result = result.and_then(|()| self.conclude(&mut what));
                self.tell(id, result)
            }
            Stage::Told => return Alone::Over,
            stage => stage,
        };
        Alone::Still(Exclusive { id, what, stage })
    }

    /// Nothing is under way: checks the request and starts what takes time.
    fn work_alone(&mut self, id: RequestId, what: &Change) -> Result<(), Failure> {
        let graph = &self.graph.graph;
        let writes = |device: DeviceIndex| {
            let disk = self.devices.get(&device).and_then(|device| device.disk());
            disk.is_some_and(|disk| !disk.geometry.read_only)
        };
        let flush = match what {
            Change::Edges(changes) => {
                graph.check_change(changes, writes)?;
                graph.to_flush(changes)
            }
            Change::Switch(switch) => {
                graph.check_change(&switch.changes, writes)?;
                graph.check_bitmaps(&switch.bitmaps)?;
                self.check_jobs(switch)?;
                let settling = self.settling(&switch.settle)?;
                let (flush, images) = (
                    graph.to_flush(&switch.changes),
                    graph.images_of_bitmaps(&switch.bitmaps),
                );
                self.start_task(id, async move {
                    Then::Exclusive(before_switch(settling, flush, images).await)
                });
                return Ok(());
            }
            Change::File(node, _) => match graph.member(*node)?.driver {
                Driver::File(_) => graph.targets_to_flush([*node]),
                _ => return Err(wrong_driver(*node, "a file")),
            },
            Change::Size(node, bytes, preallocation) => {
                let (target, bytes, preallocation) = (graph.target(*node)?, *bytes, *preallocation);
                if graph.member(*node)?.read_only {
                    return Err(failure(Errno::EACCES));
                }
                graph.check_bitmaps_size(*node, bytes)?;
                self.start_task(id, async move {
                    Then::Exclusive(target.node().resize(bytes, preallocation).await)
                });
                return Ok(());
            }
        };
        self.start_task(id, async move { Then::Exclusive(flush_all(flush).await) });
        Ok(())
    }

    /// Makes the change.
    fn conclude(&mut self, what: &mut Change) -> Result<GraphReply, Failure> {
        let graph = &mut self.graph.graph;
        match what {
            Change::Edges(changes) => graph.apply(changes)?,
            Change::File(node, file) => {
                if let Some((disk, info)) = file.take() {
                    let file = self.graph.parts.file(disk, &info)?;
                    graph.replace_file(*node, file, info.read_only)?;
                }
                return Ok(GraphReply::Done);
            }
            Change::Size(..) => graph.resize_bitmaps(),
            Change::Switch(switch) => {
                graph.apply(&switch.changes)?;
                graph.apply_bitmaps(&switch.bitmaps)?;
                let (settle, start) = (std::mem::take(&mut switch.settle), std::mem::take(&mut switch.start));
                self.settled(&settle);
                self.begin_jobs(&start)?;
            }
        }
        self.exports.refresh();
        let devices = self.devices.iter_mut();
        let resized = devices.filter_map(|(index, device)| Some((*index, device.resize()?)));
        Ok(GraphReply::Resized(resized.collect()))
    }

    /// Answers a request that has the thread for itself.
    fn tell(&self, id: RequestId, result: Result<GraphReply, Failure>) -> Stage {
        self.reply_graph(id, result);
        Stage::Telling
    }

    fn reply_graph(&self, id: RequestId, result: Result<GraphReply, Failure>) {
        self.reply(id, result.map(BlockReply::Graph));
    }

    /// Tells of lost servers, and of the thresholds that writes have passed.
    pub(super) fn report_passed(&self) {
        for event in self.graph.parts.events.take() {
            self.report(Err(event));
        }
        for passed in self.graph.graph.take_passed() {
            self.report(Err(BlockEvent::WriteThreshold {
                node: passed.node,
                excess_bytes: passed.excess,
                threshold_bytes: passed.threshold,
            }));
        }
    }
}

fn file_below(children: &Children) -> Option<Rc<dyn Node>> {
    let child = children.get(&ipc::graph::ChildRole::File)?;
    Some(child.edge.clone())
}

async fn report(node: &dyn Node, (write_threshold, highest_write): (u64, u64)) -> Result<NodeReport, Errno> {
    Ok(NodeReport {
        bytes: node.bytes(),
        details: node.details().await?,
        write_threshold,
        highest_write,
    })
}

async fn before_switch(settling: Vec<Rc<Copier>>, flush: Vec<Rc<Target>>, images: Vec<InImage>) -> Result<(), Failure> {
    for copier in settling {
        copier.settle().await.map_err(|error| failure(error.errno))?;
    }
    flush_all(flush).await?;
    for image in images {
        image.tell().await?;
    }
    Ok(())
}

async fn flush_all(targets: Vec<Rc<Target>>) -> Result<(), Failure> {
    for target in targets {
        target.node().flush().await.map_err(|errno| Failure {
            message: format!("nothing is changed, because a node could not be flushed: {errno}"),
            errno: Some(errno as i32),
        })?;
    }
    Ok(())
}
