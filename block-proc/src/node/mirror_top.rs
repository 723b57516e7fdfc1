//! `mirror_top`: the filter over a mirror's source. What is written is marked as left to do, or goes to the target as well.
//!
//! Without a mirror, before it begins and after it has ended, it passes on.

use super::event::{Event, Held};
use super::{Extent, Limits, Node, NodeFuture};
use crate::buffer::Segments;
use crate::job::copier::{CHUNK_BYTES, Copier, CopyError};
use ipc::Failure;
use ipc::graph::{NodeDetails, Preallocation};
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

/// See the module.
pub struct MirrorTopNode {
    child: Rc<dyn Node>,
    mirror: RefCell<Option<Rc<Copier>>>,
    write_blocking: Cell<bool>,
}

/// What changes the target as it changes the source.
#[derive(Debug, Clone, Copy)]
enum Change {
    Zeroes { may_unmap: bool },
    Discard,
}

impl MirrorTopNode {
    /// A filter over the source.
    pub fn new(child: Rc<dyn Node>) -> Self {
        Self {
            child,
            mirror: RefCell::default(),
            write_blocking: Cell::new(false),
        }
    }

    /// The source.
    pub fn child(&self) -> &Rc<dyn Node> {
        &self.child
    }

    /// Whether it has a mirror.
    pub fn has_mirror(&self) -> bool {
        self.mirror.borrow().is_some()
    }

    /// A mirror begins, or is no more.
    pub fn set_mirror(&self, mirror: Option<Rc<Copier>>) {
        self.mirror.replace(mirror);
    }

    /// Whether the target has what the guest writes when its request ends.
    pub fn set_write_blocking(&self, write_blocking: bool) {
        self.write_blocking.set(write_blocking);
    }

    /// See [`Self::set_write_blocking`].
    pub fn is_write_blocking(&self) -> bool {
        self.write_blocking.get()
    }

    /// The mirror, and whether it is to have everything at once.
    fn mirror(&self) -> Option<(Rc<Copier>, bool)> {
        let mirror = self.mirror.borrow().clone()?;
        Some((mirror, self.write_blocking.get()))
    }

    async fn write_to_all(&self, offset: u64, from: Segments, durable: bool) -> Result<(), Errno> {
        let Some((mirror, write_blocking)) = self.mirror() else {
            return self.child.write(offset, from, durable).await;
        };
        if !write_blocking {
            let range = offset..offset + from.bytes();
            let written = self.child.write(offset, from, durable).await;
            // Also if it has failed: it may have got half-way.
            mirror.left.borrow_mut().set(range);
            return written;
        }
        let mirror = mirror.enter();
        let (mut at, mut left) = (offset, from);
        while left.bytes() > 0 {
            let piece = left.split_to(CHUNK_BYTES);
            let bytes = piece.bytes();
            self.write_piece(&mirror, at, &piece, durable).await?;
            at += bytes;
        }
        Ok(())
    }

    async fn write_piece(&self, mirror: &Copier, at: u64, from: &Segments, durable: bool) -> Result<(), Errno> {
        let range = at..at + from.bytes();
        let _both = mirror.locks.lock(mirror.whole(range.clone()), true).await;
        // The guest may change its memory meanwhile: both must get the same.
        let buffer = mirror.buffer().await;
        let copy = || Segments::of_buffer(buffer.buffer(), from.bytes() as usize);
        from.copy_to(&copy());
        let here = self.child.write(at, copy(), durable).await;
        let there = match here {
            Ok(()) => mirror.target().write(at, copy(), durable).await,
            failed => failed,
        };
        written_to_both(mirror, range, here, there)
    }

    async fn change_all(&self, range: Range<u64>, change: Change) -> Result<(), Errno> {
        let Some((mirror, write_blocking)) = self.mirror() else {
            return change_one(&*self.child, &range, change).await;
        };
        if !write_blocking {
            let changed = change_one(&*self.child, &range, change).await;
            mirror.left.borrow_mut().set(range);
            return changed;
        }
        let mirror = mirror.enter();
        let _both = mirror.locks.lock(mirror.whole(range.clone()), true).await;
        let here = change_one(&*self.child, &range, change).await;
        let there = match (here, change) {
            (Err(errno), _) => Err(errno),
            // What is discarded may read as anything, but as the same in both: it is left to be copied.
            (Ok(()), Change::Discard) => {
                mirror.left.borrow_mut().set(range);
                return Ok(());
            }
            (Ok(()), Change::Zeroes { .. }) => change_one(mirror.target(), &range, change).await,
        };
        written_to_both(&mirror, range, here, there)
    }
}

async fn change_one(node: &dyn Node, range: &Range<u64>, change: Change) -> Result<(), Errno> {
    let bytes = range.end - range.start;
    match change {
        Change::Zeroes { may_unmap } => node.write_zeroes(range.start, bytes, may_unmap).await,
        Change::Discard => node.discard(range.start, bytes).await,
    }
}

/// What is in both is not left to do. What the target has failed is, and the mirror is told, not the guest.
fn written_to_both(
    mirror: &Copier,
    range: Range<u64>,
    here: Result<(), Errno>,
    there: Result<(), Errno>,
) -> Result<(), Errno> {
    let mut left = mirror.left.borrow_mut();
    match (here, there) {
        (Ok(()), Ok(())) => left.clear(range),
        (Ok(()), Err(errno)) => {
            left.set(range);
            mirror.broken.set(Some(CopyError::writing(errno)));
        }
        (Err(_), _) => left.set(range),
    }
    here
}

impl Node for MirrorTopNode {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        self.child.read(offset, into)
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        Box::pin(self.write_to_all(offset, from, durable))
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        Box::pin(self.change_all(offset..offset + bytes, Change::Zeroes { may_unmap }))
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        Box::pin(self.change_all(offset..offset + bytes, Change::Discard))
    }

    fn flush(&self) -> NodeFuture<'_> {
        self.child.flush()
    }

    fn bytes(&self) -> u64 {
        self.child.bytes()
    }

    fn status(&self, offset: u64, bytes: u64) -> NodeFuture<'_, Extent> {
        self.child.status(offset, bytes)
    }

    fn resize(&self, bytes: u64, preallocation: Preallocation) -> NodeFuture<'_, (), Failure> {
        self.child.resize(bytes, preallocation)
    }

    fn limits(&self) -> Limits {
        self.child.limits()
    }

    fn details(&self) -> NodeFuture<'_, NodeDetails> {
        self.child.details()
    }

    fn event(&self, event: Event) -> Option<Held> {
        self.child.event(event)
    }
}
