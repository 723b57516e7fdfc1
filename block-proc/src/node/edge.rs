//! An edge of the graph: what a parent holds of its child. It passes everything on, to whichever node it points at then.
//!
//! Only a graph change moves an edge, while no request is in flight; so a request never sees two children.
//!
//! What is known of a node because of the requests that it gets is kept here ([`Watch`]), not in its driver: so a driver
//! that would only pass requests on can be left out of the way ([`Target`]).

use super::event::{Event, Held};
use super::{Extent, Limits, Node, NodeFuture, Pass};
use crate::bitmaps::SharedBitmap;
use crate::buffer::Segments;
use ipc::Failure;
use ipc::graph::{NodeDetails, NodeId, Preallocation};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

/// What is watched of the writes to one node.
#[derive(Debug)]
pub struct Watch {
    node: NodeId,
    /// End of the write that reached furthest, bytes.
    highest: Cell<u64>,
    /// See [`ipc::graph::GraphRequest::SetWriteThreshold`].
    threshold: Cell<u64>,
    /// Those that are on the node.
    bitmaps: RefCell<Vec<SharedBitmap>>,
    /// Where it is said that a threshold was passed.
    passed: Rc<RefCell<Vec<Passed>>>,
}

/// A write that reached beyond a node's threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    /// The node.
    pub node: NodeId,
    /// How far beyond, bytes.
    pub excess: u64,
    /// The threshold, which is none any more.
    pub threshold: u64,
}

impl Watch {
    /// Of a node. `passed` gets what there is to report.
    pub fn new(node: NodeId, passed: Rc<RefCell<Vec<Passed>>>) -> Self {
        Self {
            node,
            highest: Cell::new(0),
            threshold: Cell::new(0),
            bitmaps: RefCell::default(),
            passed,
        }
    }

    /// End of the write that reached furthest, bytes.
    pub fn highest(&self) -> u64 {
        self.highest.get()
    }

    /// Offset, bytes; 0: none.
    pub fn threshold(&self) -> u64 {
        self.threshold.get()
    }

    /// Changes it.
    pub fn set_threshold(&self, bytes: u64) {
        self.threshold.set(bytes);
    }

    /// The bitmaps on the node.
    pub fn bitmaps(&self) -> &RefCell<Vec<SharedBitmap>> {
        &self.bitmaps
    }

    fn changes(&self, range: Range<u64>) {
        for bitmap in &*self.bitmaps.borrow() {
            bitmap.borrow_mut().record(range.clone());
        }
    }

    fn writes(&self, end: u64) {
        self.highest.set(self.highest.get().max(end));
        let threshold = self.threshold.get();
        if threshold != 0 && end > threshold {
            self.threshold.set(0);
            self.passed.borrow_mut().push(Passed {
                node: self.node,
                excess: end - threshold,
                threshold,
            });
        }
    }
}

/// Where an edge leads.
pub struct Target {
    node: Rc<dyn Node>,
    /// Of the node that the edge points at, and of those below it that are passed over because they change nothing.
    watches: Vec<Rc<Watch>>,
}

impl Target {
    /// A node, and who watches its writes.
    pub fn new(node: Rc<dyn Node>, watches: Vec<Rc<Watch>>) -> Rc<Self> {
        Rc::new(Self { node, watches })
    }

    /// The node.
    pub fn node(&self) -> &dyn Node {
        &*self.node
    }

    /// The node of the graph that was pointed at, if it is one.
    pub fn id(&self) -> Option<NodeId> {
        self.watches.first().map(|watch| watch.node)
    }

    /// Says that a write, or a write of zeroes, begins.
    pub fn writes(&self, offset: u64, bytes: u64) {
        for watch in &self.watches {
            watch.changes(offset..offset + bytes);
            watch.writes(offset + bytes);
        }
    }

    /// Says that a discard begins.
    pub fn discards(&self, offset: u64, bytes: u64) {
        self.watches
            .iter()
            .for_each(|watch| watch.changes(offset..offset + bytes));
    }
}

/// See the module.
pub struct Edge(RefCell<Rc<Target>>);

impl Edge {
    /// An edge to a node that nobody watches.
    pub fn new(node: Rc<dyn Node>) -> Rc<Self> {
        Self::to(Target::new(node, Vec::new()))
    }

    /// An edge to a node of the graph.
    pub fn to(target: Rc<Target>) -> Rc<Self> {
        Rc::new(Self(RefCell::new(target)))
    }

    /// What is at its end.
    pub fn target(&self) -> Rc<Target> {
        self.0.borrow().clone()
    }

    /// Points it at another node.
    pub fn point_at(&self, target: Rc<Target>) {
        self.0.replace(target);
    }
}

impl Node for Edge {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        let target = self.target();
        Box::pin(async move { target.node.read(offset, into).await })
    }

    fn passes_read(&self, offset: u64, bytes: u64) -> Option<Pass> {
        self.0.borrow().node.passes_read(offset, bytes)
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        let target = self.target();
        target.writes(offset, from.bytes());
        Box::pin(async move { target.node.write(offset, from, durable).await })
    }

    fn write_compressed(&self, offset: u64, from: Segments) -> NodeFuture<'_> {
        let target = self.target();
        target.writes(offset, from.bytes());
        Box::pin(async move { target.node.write_compressed(offset, from).await })
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        let target = self.target();
        target.writes(offset, bytes);
        Box::pin(async move { target.node.write_zeroes(offset, bytes, may_unmap).await })
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        let target = self.target();
        target.discards(offset, bytes);
        Box::pin(async move { target.node.discard(offset, bytes).await })
    }

    fn flush(&self) -> NodeFuture<'_> {
        let target = self.target();
        Box::pin(async move { target.node.flush().await })
    }

    fn bytes(&self) -> u64 {
        self.0.borrow().node.bytes()
    }

    fn status(&self, offset: u64, bytes: u64) -> NodeFuture<'_, Extent> {
        let target = self.target();
        Box::pin(async move { target.node.status(offset, bytes).await })
    }

    fn below(&self) -> Option<Rc<dyn Node>> {
        self.0.borrow().node.below()
    }

    fn resize(&self, bytes: u64, preallocation: Preallocation) -> NodeFuture<'_, (), Failure> {
        let target = self.target();
        Box::pin(async move { target.node.resize(bytes, preallocation).await })
    }

    fn limits(&self) -> Limits {
        self.0.borrow().node.limits()
    }

    fn details(&self) -> NodeFuture<'_, NodeDetails> {
        let target = self.target();
        Box::pin(async move { target.node.details().await })
    }

    fn event(&self, event: Event) -> Option<Held> {
        self.0.borrow().node.event(event)
    }
}
