//! A virtio-blk request at work on its disk's node.

use super::Disk;
use super::request::{Command, IO_ERROR, Request};
use crate::node::Node;
use ipc::block::IoKind;
use nix::errno::Errno;
use std::rc::Rc;
use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;
use vm_memory::GuestAddress;

/// A request that is over.
#[derive(Debug)]
pub struct Answer {
    /// First descriptor of its chain.
    pub head: u16,
    /// Where the status goes.
    pub status_address: GuestAddress,
    /// VIRTIO_BLK_S_*.
    pub status: u8,
    /// Length for the used ring: the bytes known to be written, counted from the first writable one. The status is the
    /// last writable byte, so it counts only when all before it was written.
    pub written_bytes: u32,
    /// Device-writable bytes before the status.
    pub writable_bytes: u32,
    /// What it counts as.
    pub kind: Option<IoKind>,
    /// How many bytes of the disk it was about.
    pub bytes: u64,
    /// It was refused.
    pub refused: bool,
    /// The host's error, if that is why it failed.
    pub errno: Option<Errno>,
    /// The request, if the host failed it and it may be tried again.
    pub again: Option<Box<Request>>,
}

impl Answer {
    /// Tells the guest that it went well, although it did not.
    pub fn pretend_success(&mut self) {
        self.status = VIRTIO_BLK_S_OK as u8;
        self.written_bytes = self.writable_bytes.saturating_add(1);
    }
}

/// Does what the request asks. With `durable`, what it changes is on stable storage before it is answered.
pub async fn serve(request: Request, disk: Rc<Disk>, durable: bool) -> Answer {
    // What is given to a node does not come back.
    let kept = disk.may_stop(request.kind).then(|| Box::new(request.clone()));
    let bytes = request.bytes();
    let Request {
        head,
        status,
        writable_bytes,
        kind,
        command,
    } = request;
    let mut filled = 0;
    let target = disk.edge.target();
    let node = target.node();
    let result = match command {
        Command::Read { offset, into } => {
            let result = node.read(offset, into).await;
            if result.is_ok() {
                filled = bytes;
            }
            result
        }
        Command::Write { offset, from } => {
            target.writes(offset, bytes);
            node.write(offset, from, durable).await
        }
        Command::Flush => disk.flush().await,
        Command::GetId { into } => {
            filled = into.fill_from(&disk.serial) as u64;
            Ok(())
        }
        Command::Discard(ranges) => {
            let mut result = Ok(());
            for range in ranges.into_iter().filter(|range| range.bytes > 0) {
                target.discards(range.offset, range.bytes);
                result = result.and(node.discard(range.offset, range.bytes).await);
            }
            made_durable(node, durable, result).await
        }
        Command::WriteZeroes(ranges) => {
            let mut result = Ok(());
            for zero in ranges.into_iter().filter(|zero| zero.range.bytes > 0) {
                let (offset, bytes) = (zero.range.offset, zero.range.bytes);
                target.writes(offset, bytes);
                result = result.and(node.write_zeroes(offset, bytes, zero.may_unmap).await);
            }
            made_durable(node, durable, result).await
        }
        Command::Refuse(refusal) => {
            return Answer {
                head,
                status_address: status,
                status: refusal,
                written_bytes: written(0, writable_bytes),
                writable_bytes,
                kind,
                bytes,
                refused: true,
                errno: None,
                again: None,
            };
        }
    };
    Answer {
        head,
        status_address: status,
        status: if result.is_ok() {
            VIRTIO_BLK_S_OK as u8
        } else {
            IO_ERROR
        },
        written_bytes: written(filled, writable_bytes),
        writable_bytes,
        kind,
        bytes,
        refused: false,
        errno: result.err(),
        again: kept.filter(|_| result.is_err()),
    }
}

async fn made_durable(node: &dyn Node, durable: bool, result: Result<(), Errno>) -> Result<(), Errno> {
    if durable && result.is_ok() {
        node.flush().await
    } else {
        result
    }
}

fn written(filled: u64, writable_bytes: u32) -> u32 {
    if filled == u64::from(writable_bytes) {
        writable_bytes.saturating_add(1)
    } else {
        // Less than writable_bytes.
        filled as u32
    }
}
