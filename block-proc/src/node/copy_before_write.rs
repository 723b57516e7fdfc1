//! `copy-before-write`: what is to be overwritten is copied to the target first, as far as it is left to do.
//!
//! What is left is the copier's: a bit is set as long as the source still has what the snapshot has. A write waits until its
//! part is copied. Who reads the snapshot shares a range's lock, so that it is not copied and overwritten meanwhile.

use super::event::{Event, Held};
use super::{Extent, ExtentKind, Limits, Node, NodeFuture};
use crate::bitmap::Bitmap;
use crate::buffer::Segments;
use crate::job::copier::{Copier, Piece};
use ipc::Failure;
use ipc::graph::{NodeDetails, Preallocation};
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

/// See the module.
pub struct CopyBeforeWriteNode {
    child: Rc<dyn Node>,
    target: Rc<dyn Node>,
    snapshot: RefCell<Option<Rc<Snapshot>>>,
    /// A copy that fails spoils the snapshot; otherwise the write fails.
    break_snapshot: bool,
}

/// What the source was when it began.
struct Snapshot {
    copier: Rc<Copier>,
    /// What it has; everything, if there is nothing here.
    covers: Option<Bitmap>,
    is_broken: Cell<bool>,
}

impl CopyBeforeWriteNode {
    /// A filter over the source. It copies nothing before it begins.
    pub fn new(child: Rc<dyn Node>, target: Rc<dyn Node>, break_snapshot: bool) -> Self {
        Self {
            child,
            target,
            snapshot: RefCell::default(),
            break_snapshot,
        }
    }

    /// The source.
    pub fn child(&self) -> &Rc<dyn Node> {
        &self.child
    }

    /// Where it copies to.
    pub fn target(&self) -> &Rc<dyn Node> {
        &self.target
    }

    /// Whether it has begun.
    pub fn has_begun(&self) -> bool {
        self.snapshot.borrow().is_some()
    }

    /// The snapshot is what the source is now, or a part of it. Nothing may be under way.
    pub fn begin(&self, copier: Rc<Copier>, covers: Option<Bitmap>) {
        self.snapshot.replace(Some(Rc::new(Snapshot {
            copier,
            covers,
            is_broken: Cell::new(false),
        })));
    }

    /// It passes on from now on, and the snapshot is no more.
    pub fn end(&self) {
        self.snapshot.take();
    }

    async fn before(&self, range: Range<u64>) -> Result<(), Errno> {
        let Some(snapshot) = self.snapshot.borrow().clone() else {
            return Ok(());
        };
        let range = range.start..range.end.min(snapshot.copier.bytes());
        if snapshot.is_broken.get() || range.is_empty() {
            return Ok(());
        }
        let copier = snapshot.copier.enter();
        let piece = Piece {
            range: copier.whole(range),
            may_be_zero: true,
        };
        match copier.copy_piece(piece).await {
            Err(error) if !self.break_snapshot => Err(error.errno),
            Err(error) => {
                snapshot.is_broken.set(true);
                copier.broken.set(Some(error));
                Ok(())
            }
            // Somebody who was before it may have failed.
            Ok(_) => Ok(()),
        }
    }

    /// Size of the snapshot, bytes.
    pub fn snapshot_bytes(&self) -> u64 {
        let snapshot = self.snapshot.borrow();
        snapshot
            .as_ref()
            .map_or_else(|| self.child.bytes(), |snapshot| snapshot.copier.bytes())
    }

    /// Reads what the source was.
    ///
    /// # Errors
    /// Those of the source and the target; EACCES where the snapshot has nothing; EIO when it is spoiled, or there is none.
    pub async fn read_snapshot(&self, offset: u64, into: Segments) -> Result<(), Errno> {
        let snapshot = self.snapshot.borrow().clone().ok_or(Errno::EIO)?;
        let copier = snapshot.copier.enter();
        let (mut at, mut left) = (offset, into);
        while left.bytes() > 0 {
            let end = at + left.bytes();
            if snapshot
                .covers
                .as_ref()
                .is_some_and(|covers| covers.next_clean(at) < end)
            {
                return Err(Errno::EACCES);
            }
            let _reading = copier.locks.lock(copier.whole(at..end), false).await;
            let (bytes, is_here) = snapshot.first_run(at..end);
            let piece = left.split_to(bytes);
            let from = if is_here { &self.child } else { &self.target };
            from.read(at, piece).await?;
            if snapshot.is_broken.get() {
                return Err(Errno::EIO);
            }
            at += bytes;
        }
        Ok(())
    }

    /// What is known of what the source was.
    ///
    /// # Errors
    /// As with [`Self::read_snapshot`].
    pub async fn snapshot_status(&self, offset: u64, bytes: u64) -> Result<Extent, Errno> {
        let snapshot = self.snapshot.borrow().clone().ok_or(Errno::EIO)?;
        let copier = snapshot.copier.enter();
        let range = offset..offset + bytes;
        let _reading = copier.locks.lock(copier.whole(range.clone()), false).await;
        let (bytes, is_here) = snapshot.first_run(range);
        let from = if is_here { &self.child } else { &self.target };
        let mut extent = from.status(offset, bytes).await?;
        if extent.kind == ExtentKind::Unallocated {
            // There may be something below it, and a snapshot has nothing below.
            extent.kind = ExtentKind::Data;
        }
        Ok(extent)
    }
}

impl Snapshot {
    /// How long the first part of a range is that is all in one place, and whether that is the source.
    fn first_run(&self, range: Range<u64>) -> (u64, bool) {
        match self.copier.left.borrow().next(range.start, u64::MAX) {
            Some(run) if run.start <= range.start => (run.end.min(range.end) - range.start, true),
            Some(run) => (run.start.min(range.end) - range.start, false),
            None => (range.end - range.start, false),
        }
    }
}

impl Node for CopyBeforeWriteNode {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        self.child.read(offset, into)
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        Box::pin(async move {
            self.before(offset..offset + from.bytes()).await?;
            self.child.write(offset, from, durable).await
        })
    }

    fn write_compressed(&self, offset: u64, from: Segments) -> NodeFuture<'_> {
        Box::pin(async move {
            self.before(offset..offset + from.bytes()).await?;
            self.child.write_compressed(offset, from).await
        })
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        Box::pin(async move {
            self.before(offset..offset + bytes).await?;
            self.child.write_zeroes(offset, bytes, may_unmap).await
        })
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        Box::pin(async move {
            self.before(offset..offset + bytes).await?;
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

    fn details(&self) -> NodeFuture<'_, NodeDetails> {
        self.child.details()
    }

    fn event(&self, event: Event) -> Option<Held> {
        self.child.event(event)
    }
}
