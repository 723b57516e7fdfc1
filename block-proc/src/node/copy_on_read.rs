//! The `copy-on-read` filter: what is read from below an image's own layer is written to the image.
//!
//! A copy and a write to the same bytes must not cross: otherwise the copy could overwrite what is newer. Copies have their
//! range for themselves, writes share theirs with each other.

use super::event::{Event, say};
use super::qcow2::locks::RangeLocks;
use super::{ExtentKind, Node, NodeFuture};
use crate::buffer::{BOUNCE_BYTES, BouncePool, Segments};
use crate::job::copier::CopyError;
use ipc::block::IoKind;
use nix::errno::Errno;
use std::rc::Rc;

/// See the module.
pub struct CopyOnReadNode {
    child: Rc<dyn Node>,
    locks: RangeLocks,
    /// Only its job copies; what the guest reads is left where it is.
    for_job: bool,
    bounce: Rc<BouncePool>,
}

impl CopyOnReadNode {
    /// A filter over an image.
    pub fn new(child: Rc<dyn Node>, for_job: bool) -> Self {
        Self {
            child,
            locks: RangeLocks::default(),
            for_job,
            // Of its own: a task must not hold two buffers of one pool.
            bounce: Rc::default(),
        }
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

    /// Copies what the image does not have of its own in a range from below it. Where it `is_zero` below, zeroes are written.
    /// Only here it is certain that the image has nothing: the guest may have written since anybody else looked.
    ///
    /// # Errors
    /// The image's, and whether it was reading or writing.
    pub async fn pull(&self, offset: u64, bytes: u64, is_zero: bool) -> Result<(), CopyError> {
        let failed = |kind| move |errno| CopyError { kind, errno };
        let _copying = self.locks.lock(offset..offset + bytes, true).await;
        let (mut at, end) = (offset, offset + bytes);
        while is_zero && at < end {
            let extent = self.child.status(at, end - at).await.map_err(failed(IoKind::Read))?;
            if extent.kind == ExtentKind::Unallocated {
                let written = self.child.write_zeroes(at, extent.bytes, false).await;
                written.map_err(failed(IoKind::Write))?;
            }
            at += extent.bytes;
        }
        if is_zero {
            return Ok(());
        }
        let buffer = self.bounce.take().await;
        while at < end {
            let step = (end - at).min(BOUNCE_BYTES as u64);
            let extent = self.child.status(at, step).await.map_err(failed(IoKind::Read))?;
            if extent.kind == ExtentKind::Unallocated {
                let piece = || Segments::of_buffer(buffer.buffer(), extent.bytes as usize);
                self.child.read(at, piece()).await.map_err(failed(IoKind::Read))?;
                let written = self.child.write(at, piece(), false).await;
                written.map_err(failed(IoKind::Write))?;
            }
            at += extent.bytes;
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
    passes!(child: flush, bytes, status, below, resize, limits, event);

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
}
