//! From an open image to a disk: the nodes of its format, over the file.

use crate::buffer::BouncePool;
use crate::device::Disk;
use crate::engine::FileId;
use crate::executor::io::Io;
use crate::node::qcow2::{Options, Qcow2Node};
use crate::node::raw::{RawNode, RawOptions};
use ipc::Failure;
use ipc::block::{DiskInfo, ImageFormat};
use std::rc::Rc;

/// Opens the image in `file` as its description says.
///
/// # Errors
/// One line that says what is wrong with the image or with its description.
pub async fn open(io: Rc<Io>, file: FileId, info: DiskInfo, bounce: Rc<BouncePool>) -> Result<Disk, Failure> {
    let raw = RawOptions {
        is_block_device: info.is_block_device,
        direct_align: info.direct.then_some(info.logical_block_bytes as usize),
        unmap: info.discard,
        zero_past_end: info.format != ImageFormat::Raw,
        no_flush: info.no_flush,
    };
    let child = Rc::new(RawNode::new(io, file, raw, bounce));
    match info.format {
        ImageFormat::Raw => Disk::new(child, &info),
        ImageFormat::Qcow2 => {
            let options = Options {
                writable: !info.read_only,
                unmap: info.discard,
                file_bytes: info.bytes,
                is_block_device: info.is_block_device,
                align: if info.direct {
                    u64::from(info.logical_block_bytes)
                } else {
                    1
                },
            };
            let node = Qcow2Node::open(child, options, None)
                .await
                .map_err(|error| Failure::new(error.to_string()))?;
            let bytes = node.bytes();
            Disk::new(node, &DiskInfo { bytes, ..info })
        }
    }
}
