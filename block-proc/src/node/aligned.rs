//! Requests on any bytes for a node that takes whole blocks only: a file with O_DIRECT, or blkdebug with `align`.
//!
//! What covers blocks goes through as it is. A block of which only a part is written is read, changed and written back, and
//! nobody else may write it in between: writes lock the blocks that they touch.

use super::event::{Event, say};
use super::qcow2::locks::RangeLocks;
use super::{Node, NodeFuture};
use crate::buffer::{BOUNCE_BYTES, BouncePool, Buffer, Segments};
use nix::errno::Errno;
use std::ops::Range;
use std::rc::Rc;

/// Largest block, bytes: one fits a bounce buffer.
pub const MAX_BLOCK_BYTES: u64 = BOUNCE_BYTES as u64;

/// See the module.
pub struct Aligned {
    node: Rc<dyn Node>,
    /// Size of a block, bytes.
    block: u64,
    /// On bytes, in whole blocks.
    locks: RangeLocks,
    /// Of its own: a task must not hold two buffers of one pool.
    bounce: Rc<BouncePool>,
}

/// A range, cut at the first and at the last border of a block in it. The parts may be empty.
struct Parts {
    head: Range<u64>,
    middle: Range<u64>,
    tail: Range<u64>,
}

impl Aligned {
    /// Before a node that takes blocks of so many bytes: at most [`MAX_BLOCK_BYTES`].
    pub fn new(node: Rc<dyn Node>, block: u64) -> Rc<Self> {
        debug_assert!((1..=MAX_BLOCK_BYTES).contains(&block));
        Rc::new(Self {
            node,
            block,
            locks: RangeLocks::default(),
            bounce: Rc::default(),
        })
    }

    fn fits(&self, offset: u64, bytes: u64) -> bool {
        offset.is_multiple_of(self.block) && bytes.is_multiple_of(self.block)
    }

    fn around(&self, offset: u64, bytes: u64) -> Range<u64> {
        offset / self.block * self.block..(offset + bytes).next_multiple_of(self.block)
    }

    fn parts(&self, offset: u64, bytes: u64) -> Parts {
        let end = offset + bytes;
        let start_of_middle = offset.next_multiple_of(self.block).min(end);
        let end_of_middle = (end / self.block * self.block).max(start_of_middle);
        Parts {
            head: offset..start_of_middle,
            middle: start_of_middle..end_of_middle,
            tail: end_of_middle..end,
        }
    }

    /// Where there is nothing more to read or to write back for a request that ends here: a node that cannot grow has no more,
    /// and a file is not made longer than its own blocks make it.
    fn end_of_node(&self, end: u64) -> u64 {
        self.node.bytes().max(end).next_multiple_of(self.node.limits().align)
    }

    async fn read_any(&self, offset: u64, mut into: Segments) -> Result<(), Errno> {
        let bounce = self.bounce.take().await;
        let around = self.around(offset, into.bytes());
        let end = around.end.min(self.end_of_node(offset + into.bytes()));
        let mut at = offset;
        while into.bytes() > 0 {
            let start = at / self.block * self.block;
            let step = (end - start).min(BOUNCE_BYTES as u64 / self.block * self.block);
            let mut piece = Segments::of_buffer(bounce.buffer(), step as usize);
            self.node.read(start, piece.clone()).await?;
            piece.advance(at - start);
            let useful = piece.bytes().min(into.bytes());
            piece.split_to(useful).copy_to(&into);
            into.advance(useful);
            at += useful;
        }
        Ok(())
    }

    /// Changes a part of a block. The caller has the block for itself.
    async fn change_block(&self, part: Range<u64>, from: Segments, durable: bool) -> Result<(), Errno> {
        if part.is_empty() {
            return Ok(());
        }
        let begins_inside = !part.start.is_multiple_of(self.block);
        let ends_inside = !part.end.is_multiple_of(self.block);
        let events = |head, tail| [begins_inside.then_some(head), ends_inside.then_some(tail)];
        let bounce = self.bounce.take().await;
        let block = part.start / self.block * self.block;
        let bytes = ((block + self.block).min(self.end_of_node(part.end)) - block) as usize;
        let whole = || Segments::of_buffer(bounce.buffer(), bytes);
        for event in events(Event::PwritevRmwHead, Event::PwritevRmwTail)
            .into_iter()
            .flatten()
        {
            say(&*self.node, event).await;
        }
        self.node.read(block, whole()).await?;
        for event in events(Event::PwritevRmwAfterHead, Event::PwritevRmwAfterTail)
            .into_iter()
            .flatten()
        {
            say(&*self.node, event).await;
        }
        let mut place = whole();
        place.advance(part.start - block);
        from.copy_to(&place);
        self.node.write(block, whole(), durable).await
    }

    async fn write_any(&self, offset: u64, mut from: Segments, durable: bool) -> Result<(), Errno> {
        let bytes = from.bytes();
        let fits = self.fits(offset, bytes);
        let _guard = self.locks.lock(self.around(offset, bytes), !fits).await;
        if fits {
            return self.node.write(offset, from, durable).await;
        }
        let parts = self.parts(offset, bytes);
        let head = from.split_to(parts.head.end - parts.head.start);
        self.change_block(parts.head, head, durable).await?;
        let middle = from.split_to(parts.middle.end - parts.middle.start);
        if middle.bytes() > 0 {
            self.node.write(parts.middle.start, middle, durable).await?;
        }
        self.change_block(parts.tail, from, durable).await
    }

    async fn zero_any(&self, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), Errno> {
        let fits = self.fits(offset, bytes);
        let _guard = self.locks.lock(self.around(offset, bytes), !fits).await;
        if fits {
            return self.node.write_zeroes(offset, bytes, may_unmap).await;
        }
        let parts = self.parts(offset, bytes);
        let zeroes = |part: &Range<u64>| {
            let bytes = (part.end - part.start) as usize;
            Segments::of_buffer(&Buffer::new(bytes), bytes)
        };
        let (head, tail) = (zeroes(&parts.head), zeroes(&parts.tail));
        self.change_block(parts.head, head, false).await?;
        if !parts.middle.is_empty() {
            let (start, end) = (parts.middle.start, parts.middle.end);
            self.node.write_zeroes(start, end - start, may_unmap).await?;
        }
        self.change_block(parts.tail, tail, false).await
    }
}

impl Node for Aligned {
    passes!(node: flush, bytes, status, below, resize, limits, details, event);

    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        if self.fits(offset, into.bytes()) {
            self.node.read(offset, into)
        } else {
            Box::pin(self.read_any(offset, into))
        }
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        Box::pin(self.write_any(offset, from, durable))
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        Box::pin(self.zero_any(offset, bytes, may_unmap))
    }

    /// Only whole blocks: a discard is a hint.
    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        Box::pin(async move {
            let middle = self.parts(offset, bytes).middle;
            if middle.is_empty() {
                return Ok(());
            }
            let _guard = self.locks.lock(middle.clone(), false).await;
            self.node.discard(middle.start, middle.end - middle.start).await
        })
    }
}
