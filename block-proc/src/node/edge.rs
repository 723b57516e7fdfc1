//! An edge of the graph: what a parent holds of its child. It passes everything on, to whichever node it points at then.
//!
//! Only a graph change moves an edge, while no request is in flight; so a request never sees two children.

use super::{Extent, Node, NodeFuture};
use crate::buffer::Segments;
use ipc::Failure;
use ipc::graph::{NodeDetails, Preallocation};
use std::cell::RefCell;
use std::rc::Rc;

/// See the module.
pub struct Edge(RefCell<Rc<dyn Node>>);

impl Edge {
    /// An edge to a node.
    pub fn new(node: Rc<dyn Node>) -> Rc<Self> {
        Rc::new(Self(RefCell::new(node)))
    }

    /// The node at its end.
    pub fn target(&self) -> Rc<dyn Node> {
        self.0.borrow().clone()
    }

    /// Points it at another node.
    pub fn point_at(&self, node: Rc<dyn Node>) {
        self.0.replace(node);
    }
}

impl Node for Edge {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        let node = self.target();
        Box::pin(async move { node.read(offset, into).await })
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        let node = self.target();
        Box::pin(async move { node.write(offset, from, durable).await })
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        let node = self.target();
        Box::pin(async move { node.write_zeroes(offset, bytes, may_unmap).await })
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        let node = self.target();
        Box::pin(async move { node.discard(offset, bytes).await })
    }

    fn flush(&self) -> NodeFuture<'_> {
        let node = self.target();
        Box::pin(async move { node.flush().await })
    }

    fn bytes(&self) -> u64 {
        self.target().bytes()
    }

    fn status(&self, offset: u64, bytes: u64) -> NodeFuture<'_, Extent> {
        let node = self.target();
        Box::pin(async move { node.status(offset, bytes).await })
    }

    fn resize(&self, bytes: u64, preallocation: Preallocation) -> NodeFuture<'_, (), Failure> {
        let node = self.target();
        Box::pin(async move { node.resize(bytes, preallocation).await })
    }

    fn details(&self) -> NodeFuture<'_, NodeDetails> {
        let node = self.target();
        Box::pin(async move { node.details().await })
    }
}
