//! `raw` with an offset or a size: a part of its child.

use super::event::{Event, Held};
use super::{Extent, ExtentKind, Limits, Node, NodeFuture};
use crate::buffer::Segments;
use ipc::Failure;
use ipc::graph::Preallocation;
use std::rc::Rc;

/// Sizes are whole sectors, bytes.
const SECTOR_BYTES: u64 = 512;

/// See the module.
pub struct WindowNode {
    child: Rc<dyn Node>,
    offset: u64,
    /// To the child's end without.
    bytes: Option<u64>,
}

impl WindowNode {
    /// The part of a child from `offset` on, of `bytes` or to the child's end.
    ///
    /// # Errors
    /// When that is not inside of the child.
    pub fn new(child: Rc<dyn Node>, offset: u64, bytes: Option<u64>) -> Result<Self, Failure> {
        let whole = child.bytes();
        if offset > whole {
            return Err(Failure::new(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({whole})"
            )));
        }
        if let Some(bytes) = bytes {
            if !bytes.is_multiple_of(SECTOR_BYTES) {
                return Err(Failure::new(format!(
                    "Specified size is not multiple of {SECTOR_BYTES}"
                )));
            }
            if bytes > whole - offset {
                return Err(Failure::new(format!(
                    "The sum of offset ({offset}) and size ({bytes}) has to be smaller or equal to the actual size of \
                     the containing file ({whole})"
                )));
            }
        }
        Ok(Self { child, offset, bytes })
    }
}

/// A request that waits where a breakpoint holds it.
fn after<'a>(held: Option<Held>, request: NodeFuture<'a>) -> NodeFuture<'a> {
    match held {
        None => request,
        Some(held) => Box::pin(async move {
            held.await;
            request.await
        }),
    }
}

impl Node for WindowNode {
    passes!(child: flush, event);

    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        let held = self.child.event(Event::ReadAio);
        let read = self.child.read(self.offset + offset, into);
        after(held, read)
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        let held = self.child.event(Event::WriteAio);
        let write = self.child.write(self.offset + offset, from, durable);
        after(held, write)
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        self.child.write_zeroes(self.offset + offset, bytes, may_unmap)
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        self.child.discard(self.offset + offset, bytes)
    }

    fn bytes(&self) -> u64 {
        let rest = self.child.bytes().saturating_sub(self.offset);
        self.bytes.map_or(rest, |bytes| bytes.min(rest))
    }

    fn status(&self, offset: u64, bytes: u64) -> NodeFuture<'_, Extent> {
        Box::pin(async move {
            let mut extent = self.child.status(self.offset + offset, bytes).await?;
            // What is below is elsewhere for whoever asks here.
            if extent.kind == ExtentKind::Unallocated && self.child.below().is_some() {
                extent.kind = ExtentKind::Data;
            }
            Ok(extent)
        })
    }

    fn resize(&self, bytes: u64, preallocation: Preallocation) -> NodeFuture<'_, (), Failure> {
        if self.bytes.is_some() {
            return Box::pin(async { Err(Failure::new("Cannot resize fixed-size raw disks")) });
        }
        match self.offset.checked_add(bytes) {
            Some(whole) => self.child.resize(whole, preallocation),
            None => Box::pin(async { Err(Failure::new("Disk size too large for the chosen offset")) }),
        }
    }

    fn limits(&self) -> Limits {
        let limits = self.child.limits();
        Limits {
            grows: limits.grows && self.bytes.is_none(),
            ..limits
        }
    }
}
