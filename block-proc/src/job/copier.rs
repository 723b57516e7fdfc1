//! Copying from one node to another what is marked as left to do.
//!
//! A job and its filter share a copier. Copies of a range exclude each other, and whatever else takes its lock; what a bit in
//! `left` means is the same for all: this part of the target is not yet as it is to be.

mod look;

pub use look::{Layers, Scanned};

use crate::bitmap::Bitmap;
use crate::buffer::{BouncePool, Segments};
use crate::node::Node;
use crate::node::copy_on_read::CopyOnReadNode;
use crate::node::qcow2::locks::RangeLocks;
use ipc::block::IoKind;
use look::Content;
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

/// Size of a copy's buffer, bytes.
pub const CHUNK_BYTES: u64 = 1 << 20;
/// How many buffers there are for all copies of a copier.
const BUFFERS: usize = 16;
/// How many parts are copied at a time for one who waits for all of them.
const AT_ONCE: usize = 8;

/// A request that the host has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyError {
    /// Read (of the source) or write (of the target).
    pub kind: IoKind,
    /// The system's error number.
    pub errno: Errno,
}

fn reading(errno: Errno) -> CopyError {
    let kind = IoKind::Read;
    CopyError { kind, errno }
}

fn writing(errno: Errno) -> CopyError {
    let kind = IoKind::Write;
    CopyError { kind, errno }
}

/// What becomes of what no layer has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Nothing {
    /// It is read through the source: it may have changed since the scan.
    #[default]
    Copied,
    /// It is left out.
    LeftOut,
    /// It is left out where a whole bit has nothing: the target may lack what is around in the same cluster.
    LeftOutWhole,
}

/// How a copier writes.
#[derive(Default)]
pub struct Options {
    /// What the target has not been written to reads as zeroes.
    pub target_reads_zeroes: bool,
    /// Zeroes may give up the target's space.
    pub unmap: bool,
    /// Clusters of this many bytes are written compressed.
    pub compress: Option<u64>,
    /// What no layer has.
    pub nothing: Nothing,
}

/// See the module.
pub struct Copier {
    source: Rc<dyn Node>,
    target: Rc<dyn Node>,
    /// Instead of writing to the target: the filter pulls what is below it up.
    pull: Option<Rc<CopyOnReadNode>>,
    bytes: u64,
    layers: RefCell<Rc<Layers>>,
    /// How it writes.
    pub options: RefCell<Options>,
    /// What is left to do.
    pub left: RefCell<Bitmap>,
    /// What was data when it was scanned, until it is copied. Looking again for each copy would be slow where a file system
    /// has to look at all that follows; and it is never wrong to copy zeroes as data.
    data: RefCell<Bitmap>,
    /// What of the target read as zeroes before anything was written to it, and has not been written to.
    untouched: RefCell<Bitmap>,
    /// Something has been written to the target.
    is_touched: Cell<bool>,
    /// Ranges that are being copied, or written to by somebody else.
    pub locks: RangeLocks,
    /// A copy that a guest's write had waited for has failed.
    pub broken: Cell<Option<CopyError>>,
    pool: Rc<BouncePool>,
}

impl Copier {
    /// From one node to another.
    pub fn new(source: Rc<dyn Node>, target: Rc<dyn Node>, left: Bitmap) -> Rc<Self> {
        Rc::new(Self::with(source, target, None, left))
    }

    /// Of what is below a filter's child, into it.
    pub fn pulling(filter: Rc<CopyOnReadNode>, left: Bitmap) -> Rc<Self> {
        let node: Rc<dyn Node> = filter.clone();
        Rc::new(Self::with(node.clone(), node, Some(filter), left))
    }

    fn with(source: Rc<dyn Node>, target: Rc<dyn Node>, pull: Option<Rc<CopyOnReadNode>>, left: Bitmap) -> Self {
        Self {
            source,
            target,
            pull,
            bytes: left.bytes(),
            data: RefCell::new(Bitmap::new(left.bytes(), left.granularity())),
            untouched: RefCell::new(Bitmap::new(left.bytes(), left.granularity())),
            is_touched: Cell::new(false),
            layers: RefCell::default(),
            options: RefCell::default(),
            left: RefCell::new(left),
            locks: RangeLocks::default(),
            broken: Cell::new(None),
            pool: Rc::new(BouncePool::of(CHUNK_BYTES as usize, BUFFERS)),
        }
    }

    /// How much there was of the source when it began, bytes: what it has got since is nobody's concern here.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What counts of the source. No copy may be under way.
    pub fn set_layers(&self, layers: Layers) {
        self.layers.replace(Rc::new(layers));
    }

    /// Whether it copies for others than the guest: into the image that it reads through.
    pub fn is_pulling(&self) -> bool {
        self.pull.is_some()
    }

    /// Whether nobody copies, or waits for a copy.
    pub fn is_idle(&self) -> bool {
        self.locks.is_idle()
    }

    /// The target.
    pub fn target(&self) -> &Rc<dyn Node> {
        &self.target
    }

    /// A buffer of [`CHUNK_BYTES`]. A task must not hold two.
    pub async fn buffer(&self) -> crate::buffer::Bounce {
        self.pool.take().await
    }

    /// A range of the target is about to be written to.
    pub fn touch(&self, range: Range<u64>) {
        self.is_touched.set(true);
        self.untouched.borrow_mut().clear(self.whole(range));
    }

    /// A range widened to whole bits.
    pub fn whole(&self, range: Range<u64>) -> Range<u64> {
        let granularity = self.left.borrow().granularity();
        let end = range.end.next_multiple_of(granularity);
        range.start - range.start % granularity..end.min(self.bytes.max(range.end))
    }

    /// Copies what is left in a range; a bit is cleared when its part is copied.
    ///
    /// # Errors
    /// The first that fails; what comes after it is still left.
    pub async fn copy_left(&self, range: Range<u64>) -> Result<(), CopyError> {
        if self.next_in(&range).is_none() {
            return Ok(());
        }
        let _copying = self.locks.lock(range.clone(), true).await;
        while let Some(run) = self.next_in(&range) {
            self.copy(run.clone()).await?;
            self.left.borrow_mut().clear(run);
        }
        Ok(())
    }

    /// Copies a range as it is now; its bits are cleared before, so that what is written meanwhile is left again.
    ///
    /// # Errors
    /// The first that fails; then all of the range is left.
    pub async fn copy_now(&self, range: Range<u64>) -> Result<(), CopyError> {
        let _copying = self.locks.lock(range.clone(), true).await;
        self.left.borrow_mut().clear(range.clone());
        let copied = self.copy(range.clone()).await;
        if copied.is_err() {
            self.left.borrow_mut().set(range);
        }
        copied
    }

    /// Whether anything of a range is left.
    pub fn has_left(&self, range: &Range<u64>) -> bool {
        self.next_in(range).is_some()
    }

    fn next_in(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let run = self
            .left
            .borrow()
            .next(range.start, range.end.saturating_sub(range.start).max(1))?;
        (run.start < range.end).then(|| run.start..run.end.min(range.end))
    }

    async fn copy(&self, range: Range<u64>) -> Result<(), CopyError> {
        let (cluster, nothing) = (self.options.borrow().compress, self.options.borrow().nothing);
        let unit = self.left.borrow().granularity();
        let mut at = range.start;
        while at < range.end {
            let (mut bytes, content) = self.known(at, range.end - at).await.map_err(reading)?;
            if content == Content::Nothing && nothing != Nothing::Copied {
                let out = left_out(at..at + bytes, range.end, unit, nothing);
                if out > 0 {
                    at += out;
                    continue;
                }
                bytes = bytes.min(unit - at % unit);
            }
            match (content, cluster) {
                (Content::Zero, None) => {
                    self.zero(at, bytes).await?;
                    at += bytes;
                }
                (_, None) => {
                    let bytes = bytes.min(CHUNK_BYTES);
                    self.move_data(at, bytes).await?;
                    at += bytes;
                }
                (content, Some(cluster)) => {
                    let step = cluster.min(range.end - at);
                    if content == Content::Zero && bytes >= step {
                        self.zero(at, step).await?;
                    } else {
                        self.compress(at, step).await?;
                    }
                    at += step;
                }
            }
        }
        self.data.borrow_mut().clear(range);
        Ok(())
    }

    async fn move_data(&self, at: u64, bytes: u64) -> Result<(), CopyError> {
        if let Some(filter) = &self.pull {
            return filter.pull(at, bytes, false).await;
        }
        let buffer = self.pool.take().await;
        let piece = || Segments::of_buffer(buffer.buffer(), bytes as usize);
        self.source.read(at, piece()).await.map_err(reading)?;
        self.touch(at..at + bytes);
        self.target.write(at, piece(), false).await.map_err(writing)
    }

    async fn compress(&self, at: u64, bytes: u64) -> Result<(), CopyError> {
        let buffer = self.pool.take().await;
        let piece = || Segments::of_buffer(buffer.buffer(), bytes as usize);
        self.source.read(at, piece()).await.map_err(reading)?;
        self.touch(at..at + bytes);
        self.target.write_compressed(at, piece()).await.map_err(writing)
    }

    /// Makes a part of the target read as zeroes, where it does not already.
    async fn zero(&self, at: u64, bytes: u64) -> Result<(), CopyError> {
        if let Some(filter) = &self.pull {
            return filter.pull(at, bytes, true).await;
        }
        let mut left = (at, bytes);
        while left.1 > 0 {
            let (bytes, is_zero) = self.is_zero_there(left.0, left.1).await.map_err(writing)?;
            if !is_zero {
                let unmap = self.options.borrow().unmap;
                self.target.write_zeroes(left.0, bytes, unmap).await.map_err(writing)?;
            }
            left = (left.0 + bytes, left.1 - bytes);
        }
        Ok(())
    }

    /// Copies what is left in a range, however long it is, several parts at a time. See [`Self::copy_left`].
    ///
    /// # Errors
    /// The first that fails.
    pub async fn copy_all_left(&self, range: Range<u64>) -> Result<(), CopyError> {
        if range.end.saturating_sub(range.start) <= CHUNK_BYTES {
            return self.copy_left(range).await;
        }
        let (cursor, failed) = (Cell::new(range.start), Cell::new(false));
        let part = || async {
            while let Some(run) = self.next_in(&(cursor.get()..range.end)).filter(|_| !failed.get()) {
                // Whole bits: larger than the longest part, if need be.
                let step = CHUNK_BYTES.max(self.left.borrow().granularity());
                let end = run.end.min(run.start + step);
                cursor.set(end);
                self.copy_left(run.start..end).await.inspect_err(|_| failed.set(true))?;
            }
            Ok(())
        };
        all((0..AT_ONCE).map(|_| part())).await?;
        // Finds nothing, unless somebody else's copy of a part has failed.
        self.copy_left(range).await
    }

    /// Copies everything that is left, and flushes the target. Nobody may write meanwhile.
    ///
    /// # Errors
    /// The first that fails; what was not copied is still left.
    pub async fn settle(&self) -> Result<(), CopyError> {
        let failed = Cell::new(false);
        let part = || async {
            loop {
                let next = self.left.borrow().next(0, CHUNK_BYTES);
                match next.filter(|_| !failed.get()) {
                    Some(run) => self.copy_now(run).await.inspect_err(|_| failed.set(true))?,
                    None => return Ok(()),
                }
            }
        };
        all((0..AT_ONCE).map(|_| part())).await?;
        self.target.flush().await.map_err(writing)
    }
}

/// How much of the beginning of a range that no layer has is left out. Bits are `unit` bytes, the last ends with the disk.
fn left_out(range: Range<u64>, end: u64, unit: u64, nothing: Nothing) -> u64 {
    let Range { start, end: until } = range;
    match nothing {
        Nothing::Copied => 0,
        Nothing::LeftOut => until - start,
        Nothing::LeftOutWhole if !start.is_multiple_of(unit) => 0,
        Nothing::LeftOutWhole if until == end => until - start,
        Nothing::LeftOutWhole => (until - until % unit).saturating_sub(start),
    }
}

/// Runs futures beside each other. The first failure, when all have ended.
async fn all<F: Future<Output = Result<(), CopyError>>>(futures: impl Iterator<Item = F>) -> Result<(), CopyError> {
    let mut running: Vec<Pin<Box<F>>> = futures.map(Box::pin).collect();
    let mut result = Ok(());
    poll_fn(|context| {
        running.retain_mut(|future| match future.as_mut().poll(context) {
            Poll::Ready(ended) => {
                result = result.and(ended);
                false
            }
            Poll::Pending => true,
        });
        if running.is_empty() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
    result
}
