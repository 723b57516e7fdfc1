//! The block graph: nodes that read and write ranges of bytes.
//!
//! A device, an export or a job uses a node; a node uses other nodes or, at the leaves, the engine. Offsets and lengths
//! are bytes. Callers have checked ranges against the node's size: a node does not check again.

#[macro_use]
mod passes;

pub mod aligned;
pub mod blkdebug;
pub mod copy_before_write;
pub mod copy_on_read;
pub mod detect_zeroes;
pub mod edge;
pub mod event;
pub mod luks;
pub mod mirror_top;
pub mod null;
pub mod qcow2;
pub mod raw;
pub mod throttle;
pub mod window;

use crate::buffer::Segments;
use event::{Event, Held};
use ipc::Failure;
use ipc::graph::{NodeDetails, Preallocation};
use nix::errno::Errno;
use std::pin::Pin;
use std::rc::Rc;

/// What a node's method returns.
pub type NodeFuture<'a, T = (), E = Errno> = Pin<Box<dyn Future<Output = Result<T, E>> + 'a>>;

/// What is known of the first part of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// How long that part is, bytes: not 0, and not more than was asked for.
    pub bytes: u64,
    /// What is there.
    pub kind: ExtentKind,
}

/// What is in an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Bytes of this node's own.
    Data,
    /// Zeroes, by this node's own word.
    Zero,
    /// Nothing of its own: it reads as what is below, or as zeroes where nothing is.
    Unallocated,
}

/// What formats must know of their child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests start and end on multiples of this many bytes.
    pub align: u64,
    /// A write past the end makes it longer, and what was never written reads as zeroes (a regular file).
    pub grows: bool,
}

/// Where a read goes past a node that has nothing of its own there.
pub struct Pass {
    /// What is below.
    pub below: Rc<dyn Node>,
    /// For how much of the range this is so, bytes: not 0.
    pub bytes: u64,
    /// To be waited for first: what a format says before it reads what is below.
    pub held: Option<Held>,
}

/// The lowest node that a read may as well be given to, and how much of it. A long chain of images is passed in one go, not
/// by a request to each.
pub async fn pass_down(mut node: Rc<dyn Node>, offset: u64, mut bytes: u64) -> (Rc<dyn Node>, u64) {
    while let Some(pass) = node.passes_read(offset, bytes) {
        if let Some(held) = pass.held {
            held.await;
        }
        node = pass.below;
        bytes = pass.bytes;
    }
    (node, bytes)
}

/// A node of the graph. All methods may be called while others run; the caller orders what must be ordered.
pub trait Node {
    /// Fills all of `into`.
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_>;

    /// Whether a read of the range's beginning may go past this node, if that can be told at once.
    fn passes_read(&self, _offset: u64, _bytes: u64) -> Option<Pass> {
        None
    }

    /// Writes all of `from`; with `durable` it is on stable storage when done.
    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_>;

    /// Writes whole clusters of an image, compressed where that makes them smaller; the last may end with the image.
    fn write_compressed(&self, _offset: u64, _from: Segments) -> NodeFuture<'_> {
        Box::pin(async { Err(Errno::ENOTSUP) })
    }

    /// Makes a range read as zeroes; with `may_unmap` it may give up its space.
    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_>;

    /// Says that a range's contents do not matter. What it reads as afterwards is undefined.
    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_>;

    /// Puts everything that was written before the call on stable storage.
    fn flush(&self) -> NodeFuture<'_>;

    /// Size of what it shows, bytes.
    fn bytes(&self) -> u64;

    /// What is known of the beginning of a range. Data, where a driver cannot tell.
    fn status(&self, _offset: u64, bytes: u64) -> NodeFuture<'_, Extent> {
        let kind = ExtentKind::Data;
        Box::pin(async move { Ok(Extent { bytes, kind }) })
    }

    /// What [`ExtentKind::Unallocated`] parts read as: zeroes, where it is nothing.
    fn below(&self) -> Option<Rc<dyn Node>> {
        None
    }

    /// Changes its size. What is new reads as zeroes.
    fn resize(&self, _bytes: u64, _preallocation: Preallocation) -> NodeFuture<'_, (), Failure> {
        Box::pin(async { Err(Failure::new("Image format driver does not support resize")) })
    }

    /// What a format that lies in it must know. Filters say what their child says.
    fn limits(&self) -> Limits {
        Limits { align: 1, grows: false }
    }

    /// A format above says what it is about to do. Filters pass it on; what it returns is to be waited for.
    fn event(&self, _event: Event) -> Option<Held> {
        None
    }

    /// What its image says of itself.
    fn details(&self) -> NodeFuture<'_, NodeDetails> {
        Box::pin(async { Ok(NodeDetails::Plain) })
    }
}
