//! Requests of the operator's own, in pieces of bounded size.

use crate::buffer::{BOUNCE_BYTES, BouncePool, Segments};
use crate::node::edge::Target;
use ipc::Failure;
use ipc::graph::{GraphReply, ManualIo};
use nix::errno::Errno;
use std::rc::Rc;

/// Largest piece of a request that needs no memory, bytes.
const RANGE_STEP_BYTES: u64 = 1 << 30;

/// Does it.
///
/// # Errors
/// The node's, or a range that is not inside of it.
pub async fn run(
    target: Rc<Target>,
    read_only: bool,
    io: ManualIo,
    pool: Rc<BouncePool>,
) -> Result<GraphReply, Failure> {
    let (offset, bytes, writes) = match io {
        ManualIo::Read { offset, bytes, .. } => (offset, bytes, false),
        ManualIo::Write { offset, bytes, .. }
        | ManualIo::Zero { offset, bytes, .. }
        | ManualIo::Discard { offset, bytes } => (offset, bytes, true),
        ManualIo::Flush => (0, 0, false),
    };
    if offset.checked_add(bytes).is_none_or(|end| end > target.node().bytes()) {
        return Err(failure(Errno::EIO));
    }
    if writes && read_only {
        return Err(failure(Errno::EPERM));
    }
    let mut left = Range { offset, bytes };
    match io {
        ManualIo::Read { pattern, .. } => {
            let buffer = pool.take().await;
            let mut seen = vec![0; BOUNCE_BYTES];
            while let Some((offset, step)) = left.take(BOUNCE_BYTES as u64) {
                let into = Segments::of_buffer(buffer.buffer(), step as usize);
                target.node().read(offset, into).await.map_err(failure)?;
                if let Some(pattern) = pattern {
                    let seen = &mut seen[..step as usize];
                    Segments::of_buffer(buffer.buffer(), step as usize).read_into(seen);
                    if let Some(at) = seen.iter().position(|byte| *byte != pattern) {
                        return Ok(GraphReply::Mismatch(offset + at as u64));
                    }
                }
            }
        }
        ManualIo::Write { pattern, durable, .. } => {
            let buffer = pool.take().await;
            Segments::of_buffer(buffer.buffer(), BOUNCE_BYTES).fill_from(&vec![pattern; BOUNCE_BYTES]);
            while let Some((offset, step)) = left.take(BOUNCE_BYTES as u64) {
                target.writes(offset, step);
                let from = Segments::of_buffer(buffer.buffer(), step as usize);
                target.node().write(offset, from, durable).await.map_err(failure)?;
            }
        }
        ManualIo::Zero { may_unmap, .. } => {
            while let Some((offset, step)) = left.take(RANGE_STEP_BYTES) {
                target.writes(offset, step);
                let zeroed = target.node().write_zeroes(offset, step, may_unmap).await;
                zeroed.map_err(failure)?;
            }
        }
        ManualIo::Discard { .. } => {
            while let Some((offset, step)) = left.take(RANGE_STEP_BYTES) {
                target.discards(offset, step);
                target.node().discard(offset, step).await.map_err(failure)?;
            }
        }
        ManualIo::Flush if read_only => {}
        ManualIo::Flush => target.node().flush().await.map_err(failure)?,
    }
    Ok(GraphReply::Done)
}

/// What is still to be done.
struct Range {
    offset: u64,
    bytes: u64,
}

impl Range {
    fn take(&mut self, most: u64) -> Option<(u64, u64)> {
        let (offset, step) = (self.offset, self.bytes.min(most));
        self.offset += step;
        self.bytes -= step;
        (step > 0).then_some((offset, step))
    }
}

/// A system's error as the supervisor gets it.
pub fn failure(errno: Errno) -> Failure {
    Failure {
        message: errno.desc().to_owned(),
        errno: Some(errno as i32),
    }
}
