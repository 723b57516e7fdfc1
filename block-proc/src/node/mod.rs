//! The block graph: nodes that read and write ranges of bytes.
//!
//! A device, an export or a job uses a node; a node uses other nodes or, at the leaves, the engine. Offsets and lengths
//! are bytes. Callers have checked ranges against the node's size: a node does not check again.

pub mod luks;
pub mod qcow2;
pub mod raw;

use crate::buffer::Segments;
use nix::errno::Errno;
use std::pin::Pin;

/// What a node's method returns.
pub type NodeFuture<'a> = Pin<Box<dyn Future<Output = Result<(), Errno>> + 'a>>;

/// A node of the graph. All methods may be called while others run; the caller orders what must be ordered.
pub trait Node {
    /// Fills all of `into`.
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_>;

    /// Writes all of `from`; with `durable` it is on stable storage when done.
    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_>;

    /// Makes a range read as zeroes; with `may_unmap` it may give up its space.
    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_>;

    /// Says that a range's contents do not matter. What it reads as afterwards is undefined.
    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_>;

    /// Puts everything that was written before the call on stable storage.
    fn flush(&self) -> NodeFuture<'_>;
}
