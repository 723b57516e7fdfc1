//! The `throttle` filter: passes requests on when its group's limits allow.

use super::{Node, NodeFuture};
use crate::buffer::Segments;
use crate::throttle::Member;
use crate::throttle::bucket::Direction;
use std::rc::Rc;

/// See the module.
pub struct ThrottleNode {
    child: Rc<dyn Node>,
    member: Rc<Member>,
}

impl ThrottleNode {
    /// A filter over a child, as a member of a group.
    pub fn new(child: Rc<dyn Node>, member: Rc<Member>) -> Self {
        Self { child, member }
    }
}

impl Node for ThrottleNode {
    passes!(child: flush, bytes, status, below, resize, limits, event);

    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        Box::pin(async move {
            self.member.pass(Direction::Read, into.bytes()).await;
            self.child.read(offset, into).await
        })
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        Box::pin(async move {
            self.member.pass(Direction::Write, from.bytes()).await;
            self.child.write(offset, from, durable).await
        })
    }

    fn write_compressed(&self, offset: u64, from: Segments) -> NodeFuture<'_> {
        Box::pin(async move {
            self.member.pass(Direction::Write, from.bytes()).await;
            self.child.write_compressed(offset, from).await
        })
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        Box::pin(async move {
            self.member.pass(Direction::Write, bytes).await;
            self.child.write_zeroes(offset, bytes, may_unmap).await
        })
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        Box::pin(async move {
            self.member.pass(Direction::Write, bytes).await;
            self.child.discard(offset, bytes).await
        })
    }
}
