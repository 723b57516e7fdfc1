//! Requests that do not keep to the server's blocks: the blocks around them are read, changed and written.

use super::NbdNode;
use crate::buffer::{BOUNCE_BYTES, Segments};
use nix::errno::Errno;

/// A part of a request and the blocks around it.
struct Window {
    /// Where the blocks begin, and how long they are, bytes.
    offset: u64,
    bytes: u64,
    /// Bytes of them before the part, and the part's.
    skip: u64,
    part: u64,
}

impl NbdNode {
    pub(super) fn is_aligned(&self, offset: u64, bytes: u64) -> bool {
        (offset | bytes) & (u64::from(self.info.min_block) - 1) == 0
    }

    /// The blocks around the beginning of a range, as many as a bounce buffer holds.
    fn window(&self, offset: u64, bytes: u64) -> Window {
        let block = u64::from(self.info.min_block);
        let start = offset / block * block;
        let end = (offset + bytes)
            .next_multiple_of(block)
            .min(start + BOUNCE_BYTES as u64);
        let skip = offset - start;
        Window {
            offset: start,
            bytes: end - start,
            skip,
            part: bytes.min(end - offset),
        }
    }

    pub(super) async fn read_unaligned(&self, mut offset: u64, mut into: Segments) -> Result<(), Errno> {
        let bounce = self.around.bounce.take().await;
        while into.bytes() > 0 {
            let window = self.window(offset, into.bytes());
            let mut blocks = Segments::of_buffer(bounce.buffer(), window.bytes as usize);
            self.read_blocks(window.offset, blocks.clone()).await?;
            blocks.advance(window.skip);
            blocks.copy_to(&into.split_to(window.part));
            offset += window.part;
        }
        Ok(())
    }

    pub(super) async fn write_unaligned(&self, offset: u64, from: Segments, durable: bool) -> Result<(), Errno> {
        self.patch(offset, from.bytes(), durable, |blocks, done, part| {
            let mut from = from.clone();
            from.advance(done);
            from.split_to(part).copy_to(blocks);
        })
        .await
    }

    pub(super) async fn write_zeroes_unaligned(&self, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), Errno> {
        let block = u64::from(self.info.min_block);
        let end = offset + bytes;
        let (first, last) = (offset.next_multiple_of(block), end / block * block);
        if first >= last {
            return self.patch_zeroes(offset, bytes).await;
        }
        self.patch_zeroes(offset, first - offset).await?;
        self.write_zeroes_blocks(first, last - first, may_unmap).await?;
        self.patch_zeroes(last, end - last).await
    }

    async fn patch_zeroes(&self, offset: u64, bytes: u64) -> Result<(), Errno> {
        self.patch(offset, bytes, false, |blocks, _, part| {
            blocks.clone().split_to(part).fill_zeroes();
        })
        .await
    }

    /// Reads blocks, has a part changed, and writes them: `change` gets where that part is, how much was done before it, and
    /// how long it is.
    async fn patch(
        &self,
        mut offset: u64,
        bytes: u64,
        durable: bool,
        change: impl Fn(&Segments, u64, u64),
    ) -> Result<(), Errno> {
        if bytes == 0 {
            return Ok(());
        }
        let _turn = self.unaligned.lock().await;
        let bounce = self.around.bounce.take().await;
        let mut done = 0;
        while done < bytes {
            let window = self.window(offset, bytes - done);
            let blocks = Segments::of_buffer(bounce.buffer(), window.bytes as usize);
            self.read_blocks(window.offset, blocks.clone()).await?;
            let mut part = blocks.clone();
            part.advance(window.skip);
            change(&part, done, window.part);
            self.write_blocks(window.offset, blocks, durable).await?;
            offset += window.part;
            done += window.part;
        }
        Ok(())
    }
}
