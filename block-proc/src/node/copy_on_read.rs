//! The `copy-on-read` filter: what is read from below an image's own layer is written to the image.
//!
//! With a job, only that copies ([`CopyOnReadNode::pull`]): what the guest reads is left where it is.
//!
//! A copy and a write to the same bytes must not cross: otherwise the copy could overwrite what is newer. Copies have their
//! range for themselves, writes share theirs with each other.

use super::event::{Event, Held, say};
use super::qcow2::locks::RangeLocks;
use super::{Extent, ExtentKind, Limits, Node, NodeFuture};
use crate::buffer::{BOUNCE_BYTES, Bounce, BouncePool, Segments};
use crate::job::copier::CopyError;
use ipc::Failure;
use ipc::graph::Preallocation;
use nix::errno::Errno;
use std::ops::Range;
use std::rc::Rc;

/// See the module.
pub struct CopyOnReadNode {
    child: Rc<dyn Node>,
    locks: RangeLocks,
    bounce: Rc<BouncePool>,
    for_job: bool,
}

impl CopyOnReadNode {
    /// A filter over an image; with `for_job` it copies only what a job pulls.
    pub fn new(child: Rc<dyn Node>, for_job: bool) -> Self {
        Self {
            child,
            locks: RangeLocks::default(),
            // Of its own: a task must not hold two buffers of one pool.
            bounce: Rc::default(),
            for_job,
        }
    }

    /// The image.
    pub fn child(&self) -> &Rc<dyn Node> {
        &self.child
    }

    /// Copies what the image has not of a range that fits the buffer. Nobody writes there meanwhile.
    ///
    /// # Errors
    /// The image's, and whether it was reading or writing.
    pub async fn pull(&self, range: Range<u64>, buffer: &Bounce) -> Result<(), CopyError> {
        let _copying = self.locks.lock(range.clone(), true).await;
        let mut at = range.start;
        while at < range.end {
            let extent = self
                .child
                .status(at, range.end - at)
                .await
                .map_err(CopyError::reading)?;
            if extent.kind == ExtentKind::Unallocated {
                let piece = || Segments::of_buffer(buffer.buffer(), extent.bytes as usize);
                self.child.read(at, piece()).await.map_err(CopyError::reading)?;
                say(&*self.child, Event::CorWrite).await;
                self.child.write(at, piece(), false).await.map_err(CopyError::writing)?;
            }
            at += extent.bytes;
        }
        Ok(())
    }

    /// Makes zeroes of what the image has not of a range. Nobody writes there meanwhile.
    ///
    /// # Errors
    /// As with [`Self::pull`].
    pub async fn pull_zeroes(&self, range: Range<u64>) -> Result<(), CopyError> {
        let _copying = self.locks.lock(range.clone(), true).await;
        let mut at = range.start;
        while at < range.end {
            let extent = self
                .child
                .status(at, range.end - at)
                .await
                .map_err(CopyError::reading)?;
            if extent.kind == ExtentKind::Unallocated {
                let zeroed = self.child.write_zeroes(at, extent.bytes, true).await;
                zeroed.map_err(CopyError::writing)?;
            }
            at += extent.bytes;
        }
        Ok(())
    }

    async fn read_and_copy(&self, offset: u64, into: Segments) -> Result<(), Errno> {
        let bytes = into.bytes();
        if self.is_all_there(offset, bytes).await? {
            return self.child.read(offset, into).await;
        }
        let _copying = self.locks.lock(offset..offset + bytes, true).await;
        let buffer = self.bounce.take().await;
        let (mut at, mut left) = (offset, into);
        while left.bytes() > 0 {
            let extent = self.child.status(at, left.bytes().min(BOUNCE_BYTES as u64)).await?;
            let piece = || Segments::of_buffer(buffer.buffer(), extent.bytes as usize);
            self.child.read(at, piece()).await?;
            if extent.kind == ExtentKind::Unallocated {
                say(&*self.child, Event::CorWrite).await;
                self.child.write(at, piece(), false).await?;
            }
            piece().copy_to(&left);
            at += extent.bytes;
            left.advance(extent.bytes);
        }
        Ok(())
    }

    async fn is_all_there(&self, offset: u64, bytes: u64) -> Result<bool, Errno> {
        let mut at = offset;
        while at < offset + bytes {
            let extent = self.child.status(at, offset + bytes - at).await?;
            if extent.kind == ExtentKind::Unallocated {
                return Ok(false);
            }
            at += extent.bytes;
        }
        Ok(true)
    }
}

impl Node for CopyOnReadNode {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        if self.for_job {
            return self.child.read(offset, into);
        }
        Box::pin(self.read_and_copy(offset, into))
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        Box::pin(async move {
            let _writing = self.locks.lock(offset..offset + from.bytes(), false).await;
            self.child.write(offset, from, durable).await
        })
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        Box::pin(async move {
            let _writing = self.locks.lock(offset..offset + bytes, false).await;
            self.child.write_zeroes(offset, bytes, may_unmap).await
        })
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        Box::pin(async move {
            let _writing = self.locks.lock(offset..offset + bytes, false).await;
            self.child.discard(offset, bytes).await
        })
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

    fn event(&self, event: Event) -> Option<Held> {
        self.child.event(event)
    }
}
