//! Copying from one node to another what is marked as left to do.
//!
//! A job and its filter share a copier. Copies of a range exclude each other, and whatever else takes its lock. What a bit in
//! `left` means is the same for all: this part of the target is not yet as it is to be. When it is cleared differs:
//!
//! | [`Order`] | cleared | because |
//! |---|---|---|
//! | `Following` | before the copy | the source may change meanwhile: then it is set again, and the part is copied again |
//! | `Keeping` | after the copy | until then the source still has what the target is to get, and must not be overwritten |

use super::layers::{Content, Layers};
use crate::bitmap::Bitmap;
use crate::buffer::{Bounce, BouncePool, Segments};
use crate::node::copy_on_read::CopyOnReadNode;
use crate::node::qcow2::locks::RangeLocks;
use crate::node::{ExtentKind, Node};
use ipc::block::IoKind;
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

/// Size of a copy's buffer, bytes.
pub const CHUNK_BYTES: u64 = 1 << 20;
/// How many buffers there are for all copies of a copier, and so how many copies at a time.
pub const BUFFERS: usize = 16;
/// How much is made zero at a time, bytes: it may have to be written out.
pub const ZERO_STEP_BYTES: u64 = 32 << 20;
/// How much settles at a time, copies.
const SETTLING: usize = 8;

/// A request that the host has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyError {
    /// Read (of the source) or write (of the target).
    pub kind: IoKind,
    /// The system's error number.
    pub errno: Errno,
}

impl CopyError {
    /// Of the source.
    pub fn reading(errno: Errno) -> Self {
        let kind = IoKind::Read;
        Self { kind, errno }
    }

    /// Of the target.
    pub fn writing(errno: Errno) -> Self {
        let kind = IoKind::Write;
        Self { kind, errno }
    }
}

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The target follows the source.
    Following,
    /// The target keeps what the source was.
    Keeping,
}

/// How a copier writes.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// When bits are cleared.
    pub order: Order,
    /// What none of the layers holds is never copied. Otherwise it is not when it is looked at for the first time; later it
    /// is read through the source, because somebody has changed it.
    pub leaves_out: bool,
    /// What the target has not been written to reads as zeroes.
    pub target_reads_zeroes: bool,
    /// Zeroes may give up the target's space.
    pub unmap: bool,
    /// Clusters of this many bytes are written compressed.
    pub compress: Option<u64>,
}

/// Where data goes.
pub enum Target {
    /// To a node.
    Node(Rc<dyn Node>),
    /// To the image below a filter, which pulls it up.
    Pull(Rc<CopyOnReadNode>),
}

/// A part to copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Where.
    pub range: Range<u64>,
    /// It was seen to be something else than data: it is looked at again.
    pub may_be_zero: bool,
}

/// See the module.
pub struct Copier {
    source: Rc<dyn Node>,
    target: Target,
    pub(super) layers: Layers,
    pub(super) options: Options,
    /// What is left to do.
    pub left: RefCell<Bitmap>,
    /// Ranges that are being copied, or written to by somebody else.
    pub locks: RangeLocks,
    /// A copy that a guest's write had to wait for has failed.
    pub broken: Cell<Option<CopyError>>,
    /// Bytes whose bits are cleared and which are not copied yet.
    pub(super) under_way: Cell<u64>,
    /// Bytes that were copied.
    pub(super) done: Cell<u64>,
    /// Requests of the guest that a filter has with it.
    guests: Cell<usize>,
    pool: Rc<BouncePool>,
}

impl Copier {
    /// From a source, of which some layers count, to a target. `left` is as large as the source.
    pub fn new(source: Rc<dyn Node>, target: Target, layers: Layers, options: Options, left: Bitmap) -> Self {
        Self {
            source,
            target,
            layers,
            options,
            left: RefCell::new(left),
            locks: RangeLocks::default(),
            broken: Cell::new(None),
            under_way: Cell::new(0),
            done: Cell::new(0),
            guests: Cell::new(0),
            pool: Rc::new(BouncePool::of(CHUNK_BYTES as usize, BUFFERS)),
        }
    }

    /// Size of what is copied, bytes.
    pub fn bytes(&self) -> u64 {
        self.left.borrow().bytes()
    }

    /// Where it writes to.
    pub fn target(&self) -> &dyn Node {
        match &self.target {
            Target::Node(node) => &**node,
            Target::Pull(filter) => &**filter.child(),
        }
    }

    /// A buffer of [`CHUNK_BYTES`]. Who also needs a lock takes that first.
    pub async fn buffer(&self) -> Bounce {
        self.pool.take().await
    }

    /// A filter has a request of the guest with it, until this is dropped.
    pub fn enter(self: &Rc<Self>) -> Entered {
        self.guests.set(self.guests.get() + 1);
        Entered(self.clone())
    }

    /// Whether no filter has a request with it.
    pub fn is_left_alone(&self) -> bool {
        self.guests.get() == 0
    }

    /// A range widened to whole bits.
    pub fn whole(&self, range: Range<u64>) -> Range<u64> {
        let granularity = self.left.borrow().granularity();
        let end = range.end.next_multiple_of(granularity).min(self.bytes().max(range.end));
        range.start - range.start % granularity..end
    }

    /// Copies what is left of a piece. Returns how many bytes that was.
    ///
    /// # Errors
    /// The first that fails; it and what comes after it are still left.
    pub async fn copy_piece(&self, piece: Piece) -> Result<u64, CopyError> {
        let Piece { range, may_be_zero } = piece;
        if self.next_in(&range).is_none() {
            return Ok(0);
        }
        let _copying = self.locks.lock(range.clone(), true).await;
        let mut copied = 0;
        while let Some(run) = self.next_in(&range) {
            let bytes = run.end - run.start;
            match self.options.order {
                Order::Keeping => {
                    self.copy(run.clone(), may_be_zero).await?;
                    self.left.borrow_mut().clear(run);
                }
                Order::Following => {
                    self.left.borrow_mut().clear(run.clone());
                    self.under_way.set(self.under_way.get() + bytes);
                    let result = self.copy(run.clone(), may_be_zero).await;
                    self.under_way.set(self.under_way.get() - bytes);
                    if let Err(error) = result {
                        self.left.borrow_mut().set(run);
                        return Err(error);
                    }
                }
            }
            self.done.set(self.done.get() + bytes);
            copied += bytes;
        }
        Ok(copied)
    }

    fn next_in(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let longest = range.end.saturating_sub(range.start).max(1);
        let run = self.left.borrow().next(range.start, longest)?;
        (run.start < range.end).then(|| run.start..run.end.min(range.end))
    }

    async fn copy(&self, range: Range<u64>, may_be_zero: bool) -> Result<(), CopyError> {
        let mut at = range.start;
        while at < range.end {
            let left = range.end - at;
            let (bytes, content) = if may_be_zero {
                let looked = self.layers.content(at, left).await;
                looked.map_err(CopyError::reading)?
            } else {
                (left, Content::Data)
            };
            at += match (content, self.options.compress) {
                (Content::Zero | Content::Empty, None) => {
                    self.zero(at, bytes.min(ZERO_STEP_BYTES)).await?;
                    bytes.min(ZERO_STEP_BYTES)
                }
                (Content::Nothing, _) if self.options.leaves_out => bytes,
                (_, None) => {
                    self.move_data(at, bytes.min(CHUNK_BYTES)).await?;
                    bytes.min(CHUNK_BYTES)
                }
                (content, Some(cluster)) => {
                    let step = cluster.min(left);
                    if matches!(content, Content::Zero | Content::Empty) && bytes >= step {
                        self.zero(at, step).await?;
                    } else {
                        self.compress(at, step).await?;
                    }
                    step
                }
            };
        }
        Ok(())
    }

    async fn move_data(&self, at: u64, bytes: u64) -> Result<(), CopyError> {
        let buffer = self.buffer().await;
        match &self.target {
            Target::Pull(filter) => filter.pull(at..at + bytes, &buffer).await,
            Target::Node(target) => {
                let piece = || Segments::of_buffer(buffer.buffer(), bytes as usize);
                self.source.read(at, piece()).await.map_err(CopyError::reading)?;
                target.write(at, piece(), false).await.map_err(CopyError::writing)
            }
        }
    }

    async fn compress(&self, at: u64, bytes: u64) -> Result<(), CopyError> {
        let buffer = self.buffer().await;
        let piece = || Segments::of_buffer(buffer.buffer(), bytes as usize);
        self.source.read(at, piece()).await.map_err(CopyError::reading)?;
        let written = self.target().write_compressed(at, piece()).await;
        written.map_err(CopyError::writing)
    }

    /// Makes a part of the target read as zeroes, where it does not already.
    async fn zero(&self, at: u64, bytes: u64) -> Result<(), CopyError> {
        if let Target::Pull(filter) = &self.target {
            return filter.pull_zeroes(at..at + bytes).await;
        }
        let (mut at, end) = (at, at + bytes);
        while at < end {
            let (bytes, is_zero) = self.is_zero_there(at, end - at).await?;
            if !is_zero {
                let zeroed = self.target().write_zeroes(at, bytes, self.options.unmap).await;
                zeroed.map_err(CopyError::writing)?;
            }
            at += bytes;
        }
        Ok(())
    }

    /// Whether the first part of a range of the target reads as zeroes without doing anything.
    pub(super) async fn is_zero_there(&self, at: u64, bytes: u64) -> Result<(u64, bool), CopyError> {
        if matches!(self.target, Target::Pull(_)) {
            // What is pulled up hides what is below, and zeroes must as well.
            return Ok((bytes, false));
        }
        let extent = self.target().status(at, bytes).await.map_err(CopyError::writing)?;
        let is_zero = match extent.kind {
            ExtentKind::Zero => true,
            ExtentKind::Unallocated => self.options.target_reads_zeroes,
            ExtentKind::Data => false,
        };
        Ok((extent.bytes, is_zero))
    }

    /// Copies everything that is left, and flushes the target. Nobody may write meanwhile.
    ///
    /// # Errors
    /// One that fails.
    pub async fn settle(&self) -> Result<(), CopyError> {
        let at = Cell::new(0);
        let worker = async || {
            loop {
                let run = self.left.borrow().next(at.get(), CHUNK_BYTES);
                let Some(run) = run else { return Ok(()) };
                at.set(run.end);
                let piece = Piece {
                    may_be_zero: run.end - run.start > MIN_LOOK_BYTES,
                    range: run,
                };
                self.copy_piece(piece).await?;
            }
        };
        all((0..SETTLING).map(|_| Box::pin(worker()) as Copying<'_>).collect()).await?;
        self.target().flush().await.map_err(CopyError::writing)
    }
}

/// Shorter ones are copied without looking at what they are, bytes.
pub(super) const MIN_LOOK_BYTES: u64 = 256 << 10;

type Copying<'a> = Pin<Box<dyn Future<Output = Result<(), CopyError>> + 'a>>;

/// Runs all to their ends; the first error.
async fn all(mut futures: Vec<Copying<'_>>) -> Result<(), CopyError> {
    let mut result = Ok(());
    poll_fn(|context| {
        futures.retain_mut(|future| match future.as_mut().poll(context) {
            Poll::Ready(ended) => {
                result = result.and(ended);
                false
            }
            Poll::Pending => true,
        });
        if futures.is_empty() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
    result
}

/// See [`Copier::enter`].
pub struct Entered(Rc<Copier>);

impl std::ops::Deref for Entered {
    type Target = Copier;

    fn deref(&self) -> &Copier {
        &self.0
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.guests.set(self.0.guests.get() - 1);
    }
}
