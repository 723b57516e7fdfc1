//! A virtio-blk request at work on its disk's node.

use super::Disk;
use super::request::{Command, IO_ERROR, Request};
use crate::node::Node;
use nix::errno::Errno;
use std::rc::Rc;
use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;
use vm_memory::GuestAddress;

/// What a request did, for the counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// That many bytes.
    Read(u64),
    /// That many bytes.
    Write(u64),
    /// A flush.
    Flush,
    /// Discard or write-zeroes.
    Unmap,
    /// Nothing on the disk.
    Other,
}

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
    /// What it was.
    pub kind: Kind,
    /// The host's error, if that is why it failed.
    pub errno: Option<Errno>,
}

/// Does what the request asks. With `durable`, what it changes is on stable storage before it is answered.
pub async fn serve(request: Request, disk: Rc<Disk>, durable: bool) -> Answer {
    let Request {
        head,
        status,
        writable_bytes,
        command,
    } = request;
    let mut filled = 0;
    let target = disk.edge.target();
    let node = target.node();
    let (kind, result) = match command {
        Command::Read { offset, into } => {
            let bytes = into.bytes();
            let result = node.read(offset, into).await;
            if result.is_ok() {
                filled = bytes;
            }
            (Kind::Read(bytes), result)
        }
        Command::Write { offset, from } => {
            let bytes = from.bytes();
            target.writes(offset + bytes);
            (Kind::Write(bytes), node.write(offset, from, durable).await)
        }
        Command::Flush => (Kind::Flush, disk.flush().await),
        Command::GetId { into } => {
            filled = into.fill_from(&disk.serial) as u64;
            (Kind::Other, Ok(()))
        }
        Command::Discard(ranges) => {
            let mut result = Ok(());
            for range in ranges.into_iter().filter(|range| range.bytes > 0) {
                result = result.and(node.discard(range.offset, range.bytes).await);
            }
            (Kind::Unmap, made_durable(node, durable, result).await)
        }
        Command::WriteZeroes(ranges) => {
            let mut result = Ok(());
            for zero in ranges.into_iter().filter(|zero| zero.range.bytes > 0) {
                let (offset, bytes) = (zero.range.offset, zero.range.bytes);
                target.writes(offset + bytes);
                result = result.and(node.write_zeroes(offset, bytes, zero.may_unmap).await);
            }
            (Kind::Unmap, made_durable(node, durable, result).await)
        }
        Command::Refuse(refusal) => {
            return Answer {
                head,
                status_address: status,
                status: refusal,
                written_bytes: written(0, writable_bytes),
                kind: Kind::Other,
                errno: None,
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
        kind,
        errno: result.err(),
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
