//! What a job copies of a chain of images: what its upper part holds.

use crate::buffer::Segments;
use crate::node::{Extent, ExtentKind, Node, NodeFuture};
use nix::errno::Errno;
use std::rc::Rc;

/// What is in a part of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Bytes.
    Data,
    /// Zeroes, by the word of one of the images.
    Zero,
    /// None of the images has it and nothing is below them, so it reads as zeroes.
    Empty,
    /// None of the images has it: it is not copied.
    Nothing,
}

/// The images whose contents count.
#[derive(Default)]
pub struct Layers {
    /// The image that gets what the others hold, where that is one above them: what it has is not copied.
    pub own: Option<Rc<dyn Node>>,
    /// From above.
    pub nodes: Vec<Rc<dyn Node>>,
    /// There is nothing below them.
    pub is_all: bool,
}

impl Layers {
    /// What the first part of a range is, and how long that is.
    ///
    /// # Errors
    /// Those of the images.
    pub async fn content(&self, at: u64, bytes: u64) -> Result<(u64, Content), Errno> {
        let mut bytes = bytes;
        if let Some(own) = &self.own {
            let Extent { bytes: found, kind } = own.status(at, bytes).await?;
            if kind != ExtentKind::Unallocated {
                return Ok((found, Content::Nothing));
            }
            bytes = found;
        }
        for (depth, layer) in self.nodes.iter().enumerate() {
            let end = layer.bytes();
            if at >= end {
                // Beyond an image that is smaller than the one above it there are zeroes.
                let is_top = depth == 0 && self.own.is_none();
                return Ok((bytes, if is_top { Content::Empty } else { Content::Zero }));
            }
            let Extent { bytes: found, kind } = layer.status(at, bytes.min(end - at)).await?;
            match kind {
                ExtentKind::Data => return Ok((found, Content::Data)),
                ExtentKind::Zero => return Ok((found, Content::Zero)),
                ExtentKind::Unallocated => bytes = found,
            }
        }
        let content = if self.is_all { Content::Empty } else { Content::Nothing };
        Ok((bytes, content))
    }
}

/// All that a node reads as counts, whoever holds it.
pub fn whole_chain(node: Rc<dyn Node>) -> Layers {
    Layers {
        own: None,
        nodes: vec![Rc::new(WholeChain(node))],
        is_all: true,
    }
}

/// All that a chain reads as: what one of its images holds is not told apart from what is below.
struct WholeChain(Rc<dyn Node>);

impl Node for WholeChain {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        self.0.read(offset, into)
    }

    fn write(&self, _offset: u64, _from: Segments, _durable: bool) -> NodeFuture<'_> {
        Box::pin(async { Err(Errno::EROFS) })
    }

    fn write_zeroes(&self, _offset: u64, _bytes: u64, _may_unmap: bool) -> NodeFuture<'_> {
        Box::pin(async { Err(Errno::EROFS) })
    }

    fn discard(&self, _offset: u64, _bytes: u64) -> NodeFuture<'_> {
        Box::pin(async { Err(Errno::EROFS) })
    }

    fn flush(&self) -> NodeFuture<'_> {
        Box::pin(async { Ok(()) })
    }

    fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    fn status(&self, offset: u64, bytes: u64) -> NodeFuture<'_, Extent> {
        Box::pin(async move {
            let mut extent = self.0.status(offset, bytes).await?;
            if extent.kind == ExtentKind::Unallocated {
                extent.kind = ExtentKind::Data;
            }
            Ok(extent)
        })
    }
}
