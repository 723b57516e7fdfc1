//! The raw driver: the image is the host file or block device, byte for byte.

use super::{Extent, ExtentKind, Limits, Node, NodeFuture};
use crate::buffer::{BOUNCE_BYTES, BouncePool, Buffer, Segments};
use crate::engine::{FileId, Operation, RangeMode};
use crate::executor::io::Io;
use ipc::Failure;
use ipc::graph::Preallocation;
use nix::errno::Errno;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Size of the buffer of zeroes, bytes.
const ZERO_BYTES: usize = 64 << 10;
/// How much one call writes where zeroes must be written out, bytes.
const ZERO_STEP_BYTES: u64 = 1 << 20;

/// Smallest unit of O_DIRECT, bytes.
const SECTOR_BYTES: u64 = 512;

/// Largest unit of O_DIRECT, bytes.
const LARGEST_BLOCK_BYTES: u64 = 4096;

/// How the file is used.
#[derive(Debug, Clone, Copy)]
pub struct RawOptions {
    /// Its length when it was opened, bytes.
    pub bytes: u64,
    /// A block device instead of a regular file.
    pub is_block_device: bool,
    /// Opened with O_DIRECT: memory must be aligned to this many bytes (a power of two).
    pub direct_align: Option<usize>,
    /// Discard reaches the host; otherwise it does nothing, and nothing ever gives up its space.
    pub unmap: bool,
    /// Flush does nothing (the host's page cache is trusted to survive), and no write is durable.
    pub no_flush: bool,
}

/// See the module.
pub struct RawNode {
    io: Rc<Io>,
    file: FileId,
    options: RawOptions,
    /// Its length by now, bytes: formats write past the end.
    bytes: Cell<u64>,
    bounce: Rc<BouncePool>,
    zeroes: Arc<Buffer>,
    /// Learned from the first refusal: the file system cannot do it, so do not ask again.
    no_zero_range: Cell<bool>,
    no_punch_hole: Cell<bool>,
    no_discard: Cell<bool>,
    no_seek: Cell<bool>,
}

impl RawNode {
    /// A node over an open file.
    pub fn new(io: Rc<Io>, file: FileId, options: RawOptions, bounce: Rc<BouncePool>) -> Self {
        Self {
            io,
            file,
            bytes: Cell::new(options.bytes),
            options,
            bounce,
            zeroes: Buffer::new(ZERO_BYTES),
            no_zero_range: Cell::new(false),
            no_punch_hole: Cell::new(false),
            no_discard: Cell::new(false),
            no_seek: Cell::new(false),
        }
    }

    fn needs_bounce(&self, segments: &Segments) -> bool {
        self.options
            .direct_align
            .is_some_and(|align| !segments.is_aligned(align))
    }

    /// What lies past the end reads as zeroes: formats ask for it. But what was there must be there.
    async fn read_all(&self, mut offset: u64, mut segments: Segments) -> Result<(), Errno> {
        while segments.bytes() > 0 {
            let file = self.file;
            // A write that is over before this read's answer is looked at may have made the file longer meanwhile.
            let end = self.bytes.get();
            let (result, operation) = self.io.submit(Operation::Read { file, offset, segments }).await;
            let Operation::Read { segments: back, .. } = operation else {
                unreachable!("the engine hands back what it was given")
            };
            segments = back;
            match result {
                Ok(0) if offset >= end => {
                    segments.fill_zeroes();
                    return Ok(());
                }
                // The file is shorter than it was when it was opened.
                Ok(0) => return Err(Errno::EIO),
                Ok(count) => {
                    offset += count as u64;
                    segments.advance(count as u64);
                    // O_DIRECT cannot ask for the rest of a sector: only the file's end cuts one.
                    if offset >= end && !(count as u64).is_multiple_of(SECTOR_BYTES) {
                        segments.fill_zeroes();
                        return Ok(());
                    }
                }
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    async fn write_all(&self, mut offset: u64, mut segments: Segments, durable: bool) -> Result<(), Errno> {
        let durable = durable && !self.options.no_flush;
        while segments.bytes() > 0 {
            let (result, operation) = self
                .io
                .submit(Operation::Write {
                    file: self.file,
                    offset,
                    segments,
                    durable,
                })
                .await;
            let Operation::Write { segments: back, .. } = operation else {
                unreachable!("the engine hands back what it was given")
            };
            segments = back;
            match result {
                // A full disk may first give a short count; the next try has its error.
                Ok(0) => return Err(Errno::ENOSPC),
                Ok(count) => {
                    offset += count as u64;
                    self.bytes.set(self.bytes.get().max(offset));
                    segments.advance(count as u64);
                }
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    async fn read_bounced(&self, mut offset: u64, mut into: Segments) -> Result<(), Errno> {
        let bounce = self.bounce.take().await;
        while into.bytes() > 0 {
            let step = into.bytes().min(BOUNCE_BYTES as u64);
            self.read_all(offset, Segments::of_buffer(bounce.buffer(), step as usize))
                .await?;
            Segments::of_buffer(bounce.buffer(), step as usize).copy_to(&into);
            offset += step;
            into.advance(step);
        }
        Ok(())
    }

    async fn write_bounced(&self, mut offset: u64, mut from: Segments, durable: bool) -> Result<(), Errno> {
        let bounce = self.bounce.take().await;
        while from.bytes() > 0 {
            let step = from.bytes().min(BOUNCE_BYTES as u64);
            from.copy_to(&Segments::of_buffer(bounce.buffer(), step as usize));
            self.write_all(offset, Segments::of_buffer(bounce.buffer(), step as usize), durable)
                .await?;
            offset += step;
            from.advance(step);
        }
        Ok(())
    }

    async fn range(&self, offset: u64, bytes: u64, mode: RangeMode) -> Result<(), Errno> {
        let file = self.file;
        loop {
            let (result, _) = self
                .io
                .submit(Operation::Range {
                    file,
                    offset,
                    bytes,
                    mode,
                })
                .await;
            match result {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    async fn write_zeroes_anyhow(&self, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), Errno> {
        if may_unmap && self.options.unmap && !self.no_punch_hole.get() {
            match self.range(offset, bytes, RangeMode::PunchHole).await {
                Err(errno) if is_unsupported(errno) => self.no_punch_hole.set(true),
                result => return result,
            }
        }
        if !self.no_zero_range.get() {
            match self.range(offset, bytes, RangeMode::Zero).await {
                Err(errno) if is_unsupported(errno) => self.no_zero_range.set(true),
                result => return result,
            }
        }
        self.write_zeroes_out(offset, bytes).await
    }

    async fn write_zeroes_out(&self, mut offset: u64, bytes: u64) -> Result<(), Errno> {
        let mut left = bytes;
        while left > 0 {
            let step = left.min(ZERO_STEP_BYTES);
            self.write_all(offset, Segments::repeating(&self.zeroes, step as usize), false)
                .await?;
            offset += step;
            left -= step;
        }
        Ok(())
    }

    async fn resize_to(&self, bytes: u64, preallocation: Preallocation) -> Result<(), Failure> {
        let old = self.bytes.get();
        if bytes == old {
            return Ok(());
        }
        if self.options.is_block_device {
            return Err(Failure::new("Cannot resize device files"));
        }
        let (offset, more) = (old, bytes.saturating_sub(old));
        let result = match preallocation {
            Preallocation::Metadata => return Err(Failure::new("Unsupported preallocation mode 'metadata'")),
            Preallocation::Falloc | Preallocation::Full if more == 0 => {
                return Err(Failure::new("Preallocation can't be used for shrinking files"));
            }
            // An empty file gets its first block, so that the alignment that O_DIRECT needs can be found out later.
            Preallocation::Off => match self.truncate(bytes).await {
                Ok(()) if old == 0 => self.write_zeroes_out(0, first_block(bytes)).await,
                result => result,
            },
            Preallocation::Falloc => match self.range(offset, more, RangeMode::Allocate).await {
                Ok(()) => self.truncate(bytes).await,
                failed => failed,
            },
            Preallocation::Full => self.write_zeroes_out(offset, more).await,
        };
        if let Err(errno) = result {
            if more > 0 {
                // Gives back what there was room for.
                let _ = self.truncate(old).await;
                self.bytes.set(old);
            }
            return Err(Failure {
                message: format!("Failed to resize the file: {}", errno.desc()),
                errno: Some(errno as i32),
            });
        }
        self.bytes.set(bytes);
        Ok(())
    }

    async fn truncate(&self, bytes: u64) -> Result<(), Errno> {
        let file = self.file;
        self.io.submit(Operation::Truncate { file, bytes }).await.0.map(drop)
    }

    async fn discard_if_possible(&self, offset: u64, bytes: u64) -> Result<(), Errno> {
        if !self.options.unmap || self.no_discard.get() {
            return Ok(());
        }
        let result = if self.options.is_block_device {
            let file = self.file;
            self.io
                .submit(Operation::Discard { file, offset, bytes })
                .await
                .0
                .map(drop)
        } else {
            self.range(offset, bytes, RangeMode::PunchHole).await
        };
        match result {
            // A hint that the host cannot use.
            Err(errno) if is_unsupported(errno) => {
                self.no_discard.set(true);
                Ok(())
            }
            result => result,
        }
    }

    /// Holes read as zeroes; where the file system says nothing of them, all is data.
    async fn hole_or_data(&self, offset: u64, bytes: u64) -> Result<Extent, Errno> {
        let until = |end: u64, kind| Extent {
            bytes: end.saturating_sub(offset).clamp(1, bytes),
            kind,
        };
        let all = |kind| Extent { bytes, kind };
        if self.options.is_block_device || self.no_seek.get() {
            return Ok(all(ExtentKind::Data));
        }
        let (file, is_data) = (self.file, AtomicBool::new(false));
        let looked = Operation::Extent { file, offset, is_data };
        let (result, operation) = self.io.submit(looked).await;
        let Operation::Extent { is_data, .. } = operation else {
            unreachable!("the engine hands back what it was given")
        };
        let end = match result {
            Ok(end) => end as u64,
            // A hole up to the file's end, and nothing behind that.
            Err(Errno::ENXIO) => return Ok(all(ExtentKind::Zero)),
            Err(_) => {
                self.no_seek.set(true);
                return Ok(all(ExtentKind::Data));
            }
        };
        Ok(match is_data.into_inner() {
            // Somebody changes the file: data is always true.
            _ if end <= offset => all(ExtentKind::Data),
            true => until(end, ExtentKind::Data),
            false => until(end, ExtentKind::Zero),
        })
    }

    async fn sync(&self) -> Result<(), Errno> {
        if self.options.no_flush {
            return Ok(());
        }
        loop {
            match self.io.submit(Operation::Sync { file: self.file }).await.0 {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

/// How much of a file is its first block, bytes.
fn first_block(bytes: u64) -> u64 {
    match bytes {
        ..SECTOR_BYTES => 0,
        SECTOR_BYTES..LARGEST_BLOCK_BYTES => SECTOR_BYTES,
        _ => LARGEST_BLOCK_BYTES,
    }
}

/// What file systems and devices answer to a range operation that they do not have.
fn is_unsupported(errno: Errno) -> bool {
    matches!(errno, Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENODEV | Errno::ENOTTY)
}

impl Drop for RawNode {
    /// Requests hold the node, so none is under way.
    fn drop(&mut self) {
        self.io.remove_file(self.file);
    }
}

impl Node for RawNode {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        if self.needs_bounce(&into) {
            Box::pin(self.read_bounced(offset, into))
        } else {
            Box::pin(self.read_all(offset, into))
        }
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        if self.needs_bounce(&from) {
            Box::pin(self.write_bounced(offset, from, durable))
        } else {
            Box::pin(self.write_all(offset, from, durable))
        }
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        Box::pin(self.write_zeroes_anyhow(offset, bytes, may_unmap))
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        Box::pin(self.discard_if_possible(offset, bytes))
    }

    fn flush(&self) -> NodeFuture<'_> {
        Box::pin(self.sync())
    }

    fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    fn status(&self, offset: u64, bytes: u64) -> NodeFuture<'_, Extent> {
        Box::pin(self.hole_or_data(offset, bytes))
    }

    fn resize(&self, bytes: u64, preallocation: Preallocation) -> NodeFuture<'_, (), Failure> {
        Box::pin(self.resize_to(bytes, preallocation))
    }

    fn limits(&self) -> Limits {
        Limits {
            align: self.options.direct_align.map_or(1, |align| align as u64),
            grows: !self.options.is_block_device,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Completion, Engine, Event};
    use crate::executor::Executor;
    use ipc::block::EngineChoice;
    use std::os::fd::{BorrowedFd, OwnedFd};
    use std::time::Duration;

    /// Reads are at the end of the file, and are reported after the writes that make it longer.
    #[derive(Default)]
    struct LateReads {
        reads: Vec<Event>,
        writes: Vec<Event>,
    }

    impl Engine for LateReads {
        fn choice(&self) -> EngineChoice {
            EngineChoice::Threads
        }

        fn watch(&mut self, _: OwnedFd, _: u32) -> std::io::Result<()> {
            Ok(())
        }

        fn hold(&mut self, _: BorrowedFd<'_>) -> std::io::Result<()> {
            Ok(())
        }

        fn start(&mut self, _: bool, _: usize) -> std::io::Result<()> {
            Ok(())
        }

        fn add_file(&mut self, _: OwnedFd) -> std::io::Result<FileId> {
            Err(Errno::ENFILE.into())
        }

        fn remove_file(&mut self, _: FileId) {}

        fn take_file(&mut self, _: FileId) -> Option<OwnedFd> {
            None
        }

        fn submit(&mut self, token: u32, operation: Operation) {
            let is_write = matches!(operation, Operation::Write { .. });
            let (events, moved) = if is_write {
                (&mut self.writes, operation.bytes() as usize)
            } else {
                (&mut self.reads, 0)
            };
            events.push(Event::Completed(Completion {
                token,
                result: Ok(moved),
                operation,
            }));
        }

        fn cancel_wait(&mut self, _: u32) {}

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }

        fn begin(&mut self) -> std::io::Result<bool> {
            Ok(true)
        }

        fn wait(&mut self, events: &mut Vec<Event>, _: Option<Duration>) -> std::io::Result<()> {
            events.append(&mut self.writes);
            events.append(&mut self.reads);
            Ok(())
        }
    }

    #[test]
    fn a_read_past_the_end_is_zeroes_although_a_write_has_moved_the_end_meanwhile() {
        let io = Io::new(Box::<LateReads>::default());
        let options = RawOptions {
            bytes: 4096,
            is_block_device: false,
            direct_align: None,
            unmap: true,
            no_flush: false,
        };
        let node = Rc::new(RawNode::new(
            io.clone(),
            FileId(0),
            options,
            Rc::new(BouncePool::of(4096, 1)),
        ));
        let into = Buffer::new(512);
        Segments::of_buffer(&into, 512).fill_from(&[1; 512]);
        let mut executor = Executor::default();
        for offset in [4096, 0] {
            let (node, into) = (node.clone(), into.clone());
            executor.spawn(async move { node.read_all(offset, Segments::of_buffer(&into, 512)).await });
        }
        let writer = node.clone();
        executor.spawn(async move {
            let from = Segments::of_buffer(&Buffer::new(4096), 4096);
            writer.write_all(8192, from, false).await
        });
        let mut finished = Vec::new();
        executor.run(&mut finished);
        io.wait(&mut Vec::new(), None).unwrap();
        executor.run(&mut finished);
        assert_eq!(node.bytes(), 12288);
        // What was there when it was opened must be there.
        assert_eq!(finished, [Ok(()), Ok(()), Err(Errno::EIO)]);
        let mut bytes = [1; 512];
        Segments::of_buffer(&into, 512).read_into(&mut bytes);
        assert_eq!(bytes, [0; 512]);
    }
}
