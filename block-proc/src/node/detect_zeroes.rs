//! `detect-zeroes`: a write of nothing but zeroes becomes a write-zeroes, which may need no space.

use super::{Node, NodeFuture};
use crate::buffer::Segments;
use std::rc::Rc;

/// How much is looked at at a time, bytes.
const PIECE_BYTES: usize = 16 << 10;

/// What stands before a node with the option.
pub struct DetectZeroes {
    node: Rc<dyn Node>,
    may_unmap: bool,
}

impl DetectZeroes {
    /// Before a node; with `may_unmap` what becomes zeroes may give up its space.
    pub fn new(node: Rc<dyn Node>, may_unmap: bool) -> Rc<Self> {
        Rc::new(Self { node, may_unmap })
    }
}

/// Whether all of it is zero at this moment. A guest that changes it meanwhile gets either what was or what is.
fn is_zero(segments: &Segments) -> bool {
    let mut rest = segments.clone();
    let mut piece = [0; PIECE_BYTES];
    while rest.bytes() > 0 {
        let count = rest.read_into(&mut piece);
        if piece[..count].iter().any(|byte| *byte != 0) {
            return false;
        }
        rest.advance(count as u64);
    }
    true
}

impl Node for DetectZeroes {
    passes!(node: read, write_zeroes, discard, flush, bytes, status, below, resize, limits, details, event);

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        let bytes = from.bytes();
        let align = self.node.limits().align.max(1);
        if !offset.is_multiple_of(align) || !bytes.is_multiple_of(align) || !is_zero(&from) {
            return self.node.write(offset, from, durable);
        }
        Box::pin(async move {
            self.node.write_zeroes(offset, bytes, self.may_unmap).await?;
            if durable { self.node.flush().await } else { Ok(()) }
        })
    }
}
