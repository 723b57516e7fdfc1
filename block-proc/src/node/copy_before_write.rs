//! `copy-before-write`: what is to be overwritten is copied to the target first, as far as it is left to do; and
//! `snapshot-access`: what the source was when that began.
//!
//! What is left is the copier's: a bit is set as long as the source still has what the snapshot has. A write waits until its
//! part is copied. Who reads the snapshot shares a range's lock, so that it is not copied and overwritten meanwhile.

use super::qcow2::locks::Guard;
use super::{Extent, ExtentKind, Node, NodeFuture};
use crate::bitmap::Bitmap;
use crate::buffer::Segments;
use crate::executor::spawner::Spawner;
use crate::executor::timer::Timers;
use crate::job::copier::{Copier, CopyError};
use ipc::block::IoKind;
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

/// How long a write waits for a copy.
pub struct Patience {
    /// So long.
    pub timeout: Duration,
    /// The thread's timers.
    pub timers: Rc<Timers>,
    /// Where a copy goes on that nobody waits for any more: what the kernel has to do with its memory is not over.
    pub spawner: Rc<Spawner>,
}

/// A copy in the background.
#[derive(Default)]
struct Copying {
    result: Cell<Option<Result<(), CopyError>>>,
    waker: Cell<Option<Waker>>,
}

impl Patience {
    async fn copy(&self, copier: &Rc<Copier>, range: Range<u64>) -> Result<(), CopyError> {
        if !copier.has_left(&range) {
            return Ok(());
        }
        let copying = Rc::new(Copying::default());
        let (copier, done) = (copier.clone(), copying.clone());
        self.spawner.spawn(async move {
            done.result.set(Some(copier.copy_all_left(range).await));
            done.waker.take().into_iter().for_each(Waker::wake);
        });
        let mut sleep = pin!(self.timers.sleep_until(Instant::now() + self.timeout));
        poll_fn(|context| {
            if let Some(result) = copying.result.take() {
                return Poll::Ready(result);
            }
            copying.waker.set(Some(context.waker().clone()));
            sleep.as_mut().poll(context).map(|()| {
                Err(CopyError {
                    kind: IoKind::Write,
                    errno: Errno::ETIMEDOUT,
                })
            })
        })
        .await
    }
}

/// The filter. See the module.
pub struct CopyBeforeWriteNode {
    child: Rc<dyn Node>,
    copier: Rc<Copier>,
    is_on: Cell<bool>,
    /// A copy that fails spoils the snapshot; otherwise the write fails.
    break_snapshot: bool,
    /// Without limits where there is none.
    patience: Option<Patience>,
    is_broken: Cell<bool>,
    /// What the snapshot has: everything, or what was dirty in a bitmap.
    covers: RefCell<Option<Bitmap>>,
}

impl CopyBeforeWriteNode {
    /// A filter over the source. It copies nothing as long as it is off, which it is if its job has yet to begin.
    pub fn new(
        child: Rc<dyn Node>,
        copier: Rc<Copier>,
        is_on: bool,
        break_snapshot: bool,
        patience: Option<Patience>,
    ) -> Self {
        Self {
            child,
            copier,
            is_on: Cell::new(is_on),
            break_snapshot,
            patience,
            is_broken: Cell::new(false),
            covers: RefCell::default(),
        }
    }

    /// What copies.
    pub fn copier(&self) -> &Rc<Copier> {
        &self.copier
    }

    /// A job begins, or ends. Nothing may be under way.
    pub fn turn(&self, on: bool) {
        self.is_on.set(on);
    }

    /// The snapshot has only what is dirty in these bits, and only that is left to do.
    pub fn cover(&self, bits: &Bitmap) {
        let mut left = self.copier.left.borrow_mut();
        let bytes = left.bytes();
        left.clear(0..bytes);
        left.merge(bits);
        self.covers.replace(Some(left.clone()));
    }

    async fn before(&self, range: Range<u64>) -> Result<(), Errno> {
        if !self.is_on.get() || self.is_broken.get() || range.is_empty() {
            return Ok(());
        }
        let end = range.end.min(self.copier.bytes());
        let range = self.copier.whole(range.start..end);
        let copied = match &self.patience {
            None => self.copier.copy_all_left(range).await,
            Some(patience) => patience.copy(&self.copier, range).await,
        };
        let Err(error) = copied else {
            return Ok(());
        };
        if !self.break_snapshot {
            return Err(error.errno);
        }
        self.spoil();
        self.copier.broken.set(Some(error));
        Ok(())
    }

    /// The snapshot is worth nothing any more: nothing is copied for it, nobody reads it.
    pub fn spoil(&self) {
        self.is_broken.set(true);
    }

    /// Whether a job, or a client, has it at work.
    pub fn is_on(&self) -> bool {
        self.is_on.get()
    }

    /// Waits until nobody changes what a part of the snapshot is.
    async fn reading(&self, range: Range<u64>) -> Result<Guard<'_>, Errno> {
        let guard = self.copier.locks.lock(self.copier.whole(range.clone()), false).await;
        let covers = self.covers.borrow();
        let is_covered = covers
            .as_ref()
            .is_none_or(|covered| covered.next_clean(range.start) >= range.end);
        match is_covered && !self.is_broken.get() && self.is_on.get() {
            true => Ok(guard),
            false => Err(Errno::EACCES),
        }
    }

    /// Who has the beginning of a range of the snapshot: its source, as long as it is left to be copied, or its target.
    fn holder(&self, range: &Range<u64>) -> (u64, &Rc<dyn Node>) {
        match self.copier.left.borrow().next(range.start, u64::MAX) {
            Some(run) if run.start <= range.start => (run.end.min(range.end) - range.start, &self.child),
            Some(run) => (run.start.min(range.end) - range.start, self.copier.target()),
            None => (range.end - range.start, self.copier.target()),
        }
    }

    /// Reads what the source was.
    async fn read_snapshot(&self, offset: u64, into: Segments) -> Result<(), Errno> {
        let (mut at, mut left) = (offset, into);
        let end = offset + left.bytes();
        while at < end {
            let _reading = self.reading(at..end).await?;
            let (bytes, holder) = self.holder(&(at..end));
            holder.read(at, left.split_to(bytes)).await?;
            at += bytes;
        }
        Ok(())
    }

    /// What is known of what the source was.
    async fn snapshot_status(&self, offset: u64, bytes: u64) -> Result<Extent, Errno> {
        let _reading = self.reading(offset..offset + bytes).await?;
        let (bytes, holder) = self.holder(&(offset..offset + bytes));
        let Extent { bytes, kind } = holder.status(offset, bytes).await?;
        // What an image does not have of its own is what is below it, of which the snapshot's reader knows nothing.
        let kind = match kind {
            ExtentKind::Zero => ExtentKind::Zero,
            ExtentKind::Data | ExtentKind::Unallocated => ExtentKind::Data,
        };
        Ok(Extent { bytes, kind })
    }
}

impl Node for CopyBeforeWriteNode {
    passes!(child: read, flush, bytes, status, below, resize, limits, event);

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        Box::pin(async move {
            self.before(offset..offset + from.bytes()).await?;
            self.child.write(offset, from, durable).await
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
}

/// What the source of a filter was. See the module.
pub struct SnapshotAccessNode {
    filter: Rc<CopyBeforeWriteNode>,
    bytes: u64,
}

impl SnapshotAccessNode {
    /// Of a filter.
    pub fn new(filter: Rc<CopyBeforeWriteNode>) -> Self {
        let bytes = filter.bytes();
        Self { filter, bytes }
    }
}

impl Node for SnapshotAccessNode {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        Box::pin(self.filter.read_snapshot(offset, into))
    }

    fn write(&self, _offset: u64, _from: Segments, _durable: bool) -> NodeFuture<'_> {
        Box::pin(async { Err(Errno::EACCES) })
    }

    fn write_zeroes(&self, _offset: u64, _bytes: u64, _may_unmap: bool) -> NodeFuture<'_> {
        Box::pin(async { Err(Errno::EACCES) })
    }

    fn discard(&self, _offset: u64, _bytes: u64) -> NodeFuture<'_> {
        Box::pin(async { Err(Errno::EACCES) })
    }

    fn flush(&self) -> NodeFuture<'_> {
        Box::pin(async { Ok(()) })
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn status(&self, offset: u64, bytes: u64) -> NodeFuture<'_, Extent> {
        Box::pin(self.filter.snapshot_status(offset, bytes))
    }
}
