//! `snapshot-access`: what the source of a `copy-before-write` filter was when that began. Nothing is written to it.

use super::copy_before_write::CopyBeforeWriteNode;
use super::{Extent, Node, NodeFuture};
use crate::buffer::Segments;
use nix::errno::Errno;
use std::rc::Rc;

/// See the module.
pub struct SnapshotAccessNode {
    filter: Rc<CopyBeforeWriteNode>,
}

impl SnapshotAccessNode {
    /// Of a filter.
    pub fn new(filter: Rc<CopyBeforeWriteNode>) -> Self {
        Self { filter }
    }
}

fn refused<'a>() -> NodeFuture<'a> {
    Box::pin(async { Err(Errno::EACCES) })
}

impl Node for SnapshotAccessNode {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        Box::pin(self.filter.read_snapshot(offset, into))
    }

    fn write(&self, _offset: u64, _from: Segments, _durable: bool) -> NodeFuture<'_> {
        refused()
    }

    fn write_zeroes(&self, _offset: u64, _bytes: u64, _may_unmap: bool) -> NodeFuture<'_> {
        refused()
    }

    fn discard(&self, _offset: u64, _bytes: u64) -> NodeFuture<'_> {
        refused()
    }

    fn flush(&self) -> NodeFuture<'_> {
        Box::pin(async { Ok(()) })
    }

    fn bytes(&self) -> u64 {
        self.filter.snapshot_bytes()
    }

    fn status(&self, offset: u64, bytes: u64) -> NodeFuture<'_, Extent> {
        Box::pin(self.filter.snapshot_status(offset, bytes))
    }
}
