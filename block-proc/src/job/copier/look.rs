//! What is in the parts of a job's source and target, by what the nodes say of them.

use super::{Copier, CopyError, reading, writing};
use crate::node::{Extent, ExtentKind, Node};
use nix::errno::Errno;
use std::ops::Range;
use std::rc::Rc;

/// Most that one look at an extent asks for, bytes: the guest's writes to it wait for the answer.
const LOOK_BYTES: u64 = 1 << 30;
/// Most extents in one step of a scan: what it has found is copied when the step has ended.
const SCAN_EXTENTS: usize = 64;

/// What is in a part of the source, for a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Bytes.
    Data,
    /// Zeroes.
    Zero,
    /// Nothing of the layers that count.
    Nothing,
}

/// The images whose contents count.
#[derive(Default)]
pub struct Layers {
    /// From above.
    pub nodes: Vec<Rc<dyn Node>>,
    /// What none of them has is zeroes; otherwise it is not copied.
    pub is_all: bool,
}

impl Layers {
    /// What the first part of a range is.
    async fn content(&self, at: u64, bytes: u64) -> Result<(u64, Content), Errno> {
        let mut bytes = bytes;
        for layer in &self.nodes {
            let end = layer.bytes();
            if at >= end {
                // Beyond an image that is smaller than the one above there are zeroes.
                return Ok((bytes, Content::Zero));
            }
            let Extent { bytes: found, kind } = layer.status(at, bytes.min(end - at)).await?;
            match kind {
                ExtentKind::Data => return Ok((found, Content::Data)),
                ExtentKind::Zero => return Ok((found, Content::Zero)),
                ExtentKind::Unallocated => bytes = found,
            }
        }
        let content = if self.is_all { Content::Zero } else { Content::Nothing };
        Ok((bytes, content))
    }
}

/// What a scan has found.
#[derive(Debug, PartialEq, Eq)]
pub struct Scanned {
    /// It has looked up to here.
    pub until: u64,
    /// What is to be copied, rising.
    pub copied: Vec<Range<u64>>,
}

impl Copier {
    /// What the first part of a range is, by the scan if it was data then.
    pub(super) async fn known(&self, at: u64, bytes: u64) -> Result<(u64, Content), Errno> {
        let until = self.data.borrow().next_clean_before(at, at + bytes);
        if until > at {
            return Ok((until - at, Content::Data));
        }
        self.content(at, bytes).await
    }

    async fn content(&self, at: u64, bytes: u64) -> Result<(u64, Content), Errno> {
        let mut bytes = bytes;
        if self.pull.is_some() {
            let extent = self.target.status(at, bytes).await?;
            if extent.kind != ExtentKind::Unallocated {
                return Ok((extent.bytes, Content::Nothing));
            }
            bytes = extent.bytes;
        }
        let layers = self.layers.borrow().clone();
        layers.content(at, bytes).await
    }

    /// Looks which parts of the target read as zeroes, as long as nothing has been written to it. Looking again for each hole
    /// of the source would wait for the writes to the target: they have its file's lock.
    async fn find_untouched(&self) -> Result<(), Errno> {
        let (end, unit) = (self.bytes().min(self.target.bytes()), self.left.borrow().granularity());
        let (mut at, mut found) = (0, Vec::new());
        while at < end && found.len() < SCAN_EXTENTS {
            let (bytes, is_zero) = self.is_zero_there(at, end - at).await?;
            found.push((at..at + bytes, is_zero));
            at += bytes;
        }
        if !self.is_touched.get() {
            let zeroes = found.into_iter().filter(|(_, is_zero)| *is_zero);
            let whole = zeroes.map(|(range, _)| self.whole_in(range, unit));
            whole.for_each(|range| self.untouched.borrow_mut().set(range));
        }
        Ok(())
    }

    /// Whether the first part of a range of the target reads as zeroes without doing anything.
    pub(super) async fn is_zero_there(&self, at: u64, bytes: u64) -> Result<(u64, bool), Errno> {
        let until = self.untouched.borrow().next_clean_before(at, at + bytes);
        if until > at {
            return Ok((until - at, true));
        }
        let extent = self.target.status(at, bytes).await?;
        let is_zero = match extent.kind {
            ExtentKind::Zero => true,
            ExtentKind::Unallocated => self.options.borrow().target_reads_zeroes,
            ExtentKind::Data => false,
        };
        Ok((extent.bytes, is_zero))
    }

    /// Looks at the source from an offset on: which parts are to be copied, and how far it has looked.
    ///
    /// # Errors
    /// What cannot be looked at.
    pub async fn scan(&self, from: u64) -> Result<Scanned, CopyError> {
        let end = self.bytes();
        if from == 0 && self.pull.is_none() && !self.is_touched.get() {
            self.find_untouched().await.map_err(writing)?;
        }
        let mut scanned = Scanned {
            until: from,
            copied: Vec::new(),
        };
        let mut extents = 0;
        while scanned.until < end && extents < SCAN_EXTENTS {
            extents += 1;
            let at = scanned.until;
            let (bytes, content) = self.content(at, LOOK_BYTES.min(end - at)).await.map_err(reading)?;
            let (bytes, counts) = match content {
                Content::Data => (bytes, true),
                Content::Nothing => (bytes, false),
                Content::Zero if self.pull.is_some() => (bytes, true),
                Content::Zero => {
                    let (bytes, is_zero) = self.is_zero_there(at, bytes).await.map_err(writing)?;
                    (bytes, !is_zero)
                }
            };
            scanned.until = at + bytes;
            if content == Content::Data {
                self.is_data(at..at + bytes);
            }
            if counts {
                match scanned.copied.last_mut() {
                    Some(last) if last.end == at => last.end = at + bytes,
                    _ => scanned.copied.push(at..at + bytes),
                }
            }
        }
        Ok(scanned)
    }

    /// Remembers what is data, as far as it is so in whole bits.
    fn is_data(&self, range: Range<u64>) {
        let mut data = self.data.borrow_mut();
        let range = self.whole_in(range, data.granularity());
        data.set(range);
    }

    /// The whole units in a range. The last ends with the disk.
    fn whole_in(&self, range: Range<u64>, unit: u64) -> Range<u64> {
        let end = if range.end < self.bytes {
            range.end - range.end % unit
        } else {
            range.end
        };
        range.start.next_multiple_of(unit)..end
    }
}
