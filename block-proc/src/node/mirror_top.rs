//! `mirror_top`: the filter over a mirror's source. What is written is marked as left to do, or goes to the target as well.
//!
//! Without a mirror, before it begins and after it has ended, it passes on.

use super::{Node, NodeFuture};
use crate::buffer::Segments;
use crate::job::copier::{CHUNK_BYTES, Copier, CopyError};
use ipc::block::IoKind;
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

/// See the module.
pub struct MirrorTopNode {
    child: Rc<dyn Node>,
    mirror: RefCell<Option<Rc<Copier>>>,
    write_blocking: Cell<bool>,
    only_whole: Cell<bool>,
}

impl MirrorTopNode {
    /// A filter over the source.
    pub fn new(child: Rc<dyn Node>) -> Self {
        Self {
            child,
            mirror: RefCell::default(),
            write_blocking: Cell::new(false),
            only_whole: Cell::new(false),
        }
    }

    /// The source.
    pub fn child(&self) -> &Rc<dyn Node> {
        &self.child
    }

    /// Whether a mirror is at work.
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

    /// The target will have something below it that it does not have yet: it takes only whole bits. The rest of a cluster
    /// would become zeroes there, and hide what is below.
    pub fn set_only_whole(&self, only_whole: bool) {
        self.only_whole.set(only_whole);
    }

    /// The mirror whose target gets this change at once. What it does not get so is left to be copied.
    fn both(&self, range: &Range<u64>) -> Option<Rc<Copier>> {
        let mirror = self.mirror.borrow().clone().filter(|_| self.write_blocking.get())?;
        let fits = !self.only_whole.get() || mirror.whole(range.clone()) == *range;
        fits.then_some(mirror)
    }

    /// Changes the source only, and marks what changes.
    async fn change(&self, range: Range<u64>, here: NodeFuture<'_>) -> Result<(), Errno> {
        let changed = here.await;
        // Afterwards: a copy that has read what was there before must not be the last. Also if it has failed: it may have got
        // half-way.
        if let Some(mirror) = &*self.mirror.borrow() {
            mirror.left.borrow_mut().set(range);
        }
        changed
    }

    /// After the source: changes the target. What cannot be changed there is left to do.
    async fn follow(&self, mirror: &Copier, range: Range<u64>, there: NodeFuture<'_>) {
        if let Err(errno) = there.await {
            mirror.left.borrow_mut().set(range);
            let kind = IoKind::Write;
            mirror.broken.set(Some(CopyError { kind, errno }));
        }
    }

    async fn write_both(&self, mirror: &Copier, offset: u64, from: Segments, durable: bool) -> Result<(), Errno> {
        let range = offset..offset + from.bytes();
        // First the lock, then the buffer, as a copy does it: who has a buffer waits for nobody.
        let _both = mirror.locks.lock(mirror.whole(range.clone()), true).await;
        // The guest may change its memory meanwhile: both must get the same.
        let buffer = mirror.buffer().await;
        let piece = || Segments::of_buffer(buffer.buffer(), from.bytes() as usize);
        from.copy_to(&piece());
        self.change_first(mirror, &range, self.child.write(offset, piece(), durable))
            .await?;
        // Durable it must be where the guest's data are. The target is flushed before it becomes that.
        mirror.touch(range.clone());
        self.follow(mirror, range, mirror.target().write(offset, piece(), false))
            .await;
        Ok(())
    }

    async fn zero_both(&self, mirror: &Copier, range: Range<u64>, may_unmap: bool) -> Result<(), Errno> {
        let _both = mirror.locks.lock(mirror.whole(range.clone()), true).await;
        let bytes = range.end - range.start;
        self.change_first(mirror, &range, self.child.write_zeroes(range.start, bytes, may_unmap))
            .await?;
        let may_unmap = may_unmap && mirror.options.borrow().unmap;
        let there = mirror.target().write_zeroes(range.start, bytes, may_unmap);
        self.follow(mirror, range.clone(), there).await;
        Ok(())
    }

    async fn change_first(&self, mirror: &Copier, range: &Range<u64>, here: NodeFuture<'_>) -> Result<(), Errno> {
        // Before, as a copy does it: what else changes the source meanwhile, like a discard, is left.
        mirror.left.borrow_mut().clear(range.clone());
        here.await.inspect_err(|_| mirror.left.borrow_mut().set(range.clone()))
    }
}

impl Node for MirrorTopNode {
    passes!(child: read, flush, bytes, status, below, resize, limits, event);

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        let range = offset..offset + from.bytes();
        let Some(mirror) = self.both(&range) else {
            return Box::pin(self.change(range, self.child.write(offset, from, durable)));
        };
        Box::pin(async move {
            let (mut left, mut at) = (from, offset);
            while left.bytes() > CHUNK_BYTES {
                let first = left.split_to(CHUNK_BYTES);
                self.write_both(&mirror, at, first, durable).await?;
                at += CHUNK_BYTES;
            }
            self.write_both(&mirror, at, left, durable).await
        })
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        let range = offset..offset + bytes;
        match self.both(&range) {
            Some(mirror) => Box::pin(async move { self.zero_both(&mirror, range, may_unmap).await }),
            None => Box::pin(self.change(range, self.child.write_zeroes(offset, bytes, may_unmap))),
        }
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        // What source and target have afterwards need not be the same: it is copied.
        Box::pin(self.change(offset..offset + bytes, self.child.discard(offset, bytes)))
    }
}
