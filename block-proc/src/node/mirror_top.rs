//! `mirror_top`: the filter over a mirror's source. What is written is marked as left to do, or goes to the target as well.
//!
//! Without a mirror, before it begins and after it has ended, it passes on.

use super::{Extent, Limits, Node, NodeFuture};
use crate::buffer::Segments;
use crate::job::copier::{CHUNK_BYTES, Copier, CopyError};
use ipc::Failure;
use ipc::block::IoKind;
use ipc::graph::Preallocation;
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

    /// A mirror begins, or is no more. Nothing may be under way.
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

    /// Changes the source, and marks what changes; with write-blocking, changes the target as well.
    async fn change<'a, T, U>(
        &'a self,
        range: Range<u64>,
        here: T,
        there: impl FnOnce(Rc<dyn Node>) -> U,
    ) -> Result<(), Errno>
    where
        T: Future<Output = Result<(), Errno>> + 'a,
        U: Future<Output = Result<(), Errno>>,
    {
        let Some(mirror) = self.mirror.borrow().clone() else {
            return here.await;
        };
        if !self.write_blocking.get() {
            let changed = here.await;
            // Also if it has failed: it may have got half-way.
            mirror.left.borrow_mut().set(range);
            return changed;
        }
        let whole = mirror.whole(range.clone());
        let _both = mirror.locks.lock(whole.clone(), true).await;
        let was_left = mirror
            .left
            .borrow()
            .next(whole.start, 1)
            .is_some_and(|run| run.start < whole.end);
        if let Err(errno) = here.await {
            mirror.left.borrow_mut().set(range);
            return Err(errno);
        }
        match there(mirror.target().clone()).await {
            Ok(()) if was_left => mirror.left.borrow_mut().clear(range),
            Ok(()) => {}
            Err(errno) => {
                mirror.left.borrow_mut().set(range);
                mirror.broken.set(Some(CopyError {
                    kind: IoKind::Write,
                    errno,
                }));
            }
        }
        Ok(())
    }

    async fn write_both(&self, mirror: &Copier, offset: u64, from: Segments, durable: bool) -> Result<(), Errno> {
        // The guest may change its memory meanwhile: both must get the same.
        let buffer = mirror.buffer().await;
        let piece = || Segments::of_buffer(buffer.buffer(), from.bytes() as usize);
        from.copy_to(&piece());
        let here = self.child.write(offset, piece(), durable);
        self.change(offset..offset + from.bytes(), here, |target| {
            let piece = piece();
            async move { target.write(offset, piece, durable).await }
        })
        .await
    }
}

impl Node for MirrorTopNode {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        self.child.read(offset, into)
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        Box::pin(async move {
            let mirror = self.mirror.borrow().clone().filter(|_| self.write_blocking.get());
            if let Some(mirror) = mirror {
                let mut left = from;
                let mut at = offset;
                while left.bytes() > CHUNK_BYTES {
                    let first = left.split_to(CHUNK_BYTES);
                    self.write_both(&mirror, at, first, durable).await?;
                    at += CHUNK_BYTES;
                }
                return self.write_both(&mirror, at, left, durable).await;
            }
            let range = offset..offset + from.bytes();
            let here = self.child.write(offset, from, durable);
            self.change(range, here, |_| async { Ok(()) }).await
        })
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        let here = self.child.write_zeroes(offset, bytes, may_unmap);
        Box::pin(self.change(offset..offset + bytes, here, move |target| async move {
            target.write_zeroes(offset, bytes, may_unmap).await
        }))
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        let here = self.child.discard(offset, bytes);
        Box::pin(self.change(offset..offset + bytes, here, move |target| async move {
            target.discard(offset, bytes).await
        }))
    }

    fn flush(&self) -> NodeFuture<'_> {
        Box::pin(async move {
            self.child.flush().await?;
            let mirror = self.mirror.borrow().clone().filter(|_| self.write_blocking.get());
            match mirror {
                Some(mirror) => mirror.target().flush().await,
                None => Ok(()),
            }
        })
    }

    fn bytes(&self) -> u64 {
        self.child.bytes()
    }

    fn status(&self, offset: u64, bytes: u64) -> NodeFuture<'_, Extent> {
        self.child.status(offset, bytes)
    }

    fn below(&self) -> Option<Rc<dyn Node>> {
        self.child.below()
    }

    fn resize(&self, bytes: u64, preallocation: Preallocation) -> NodeFuture<'_, (), Failure> {
        self.child.resize(bytes, preallocation)
    }

    fn limits(&self) -> Limits {
        self.child.limits()
    }
}
