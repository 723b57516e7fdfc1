//! From open images to a disk: the nodes of their formats, over the files.
//!
//! Images come one by one, from the top: only its header says whether there is one below, and only the supervisor decides
//! whether that is opened.

use crate::buffer::BouncePool;
use crate::device::Disk;
use crate::engine::FileId;
use crate::executor::io::Io;
use crate::node::Node;
use crate::node::qcow2::{Backing, L2_CACHE_BYTES, OpenError, Options, Qcow2Node, REFCOUNT_CACHE_BYTES, read_header};
use crate::node::raw::{RawNode, RawOptions};
use ipc::Failure;
use ipc::block::{DiskInfo, ImageFormat};
use std::rc::Rc;

/// Longest chain of images; the supervisor's limit is the same.
const MAX_DEPTH: usize = 200;

/// The images of a disk that are there, from the top.
#[derive(Default)]
pub struct Chain(Vec<(Rc<RawNode>, DiskInfo)>);

/// What came of one more image.
pub enum Opened {
    /// The chain is complete.
    Disk(Disk),
    /// There is one below.
    Needs {
        /// What is there.
        chain: Chain,
        /// Its name in the image: untrusted.
        name: String,
        /// Its format.
        format: ImageFormat,
    },
}

/// Puts an image below a chain.
///
/// # Errors
/// One line that says what is wrong with an image or with its description.
pub async fn extend(
    mut chain: Chain,
    io: Rc<Io>,
    file: FileId,
    info: DiskInfo,
    bounce: Rc<BouncePool>,
) -> Result<Opened, Failure> {
    let options = RawOptions {
        bytes: info.bytes,
        is_block_device: info.is_block_device,
        direct_align: info.direct.then_some(info.logical_block_bytes as usize),
        unmap: info.discard,
        zero_past_end: info.format != ImageFormat::Raw,
        no_flush: info.no_flush,
    };
    let child = Rc::new(RawNode::new(io, file, options, bounce));
    chain.0.push((child.clone(), info.clone()));
    if chain.0.len() > MAX_DEPTH {
        return Err(Failure::new(format!("the chain of images is longer than {MAX_DEPTH}")));
    }
    if info.format == ImageFormat::Qcow2 {
        let header = read_header(&*child, &qcow2_options(&info)).await.map_err(failure)?;
        if let Some(name) = header.backing_name {
            let format = backing_format(&name, header.backing_format.as_deref())?;
            return Ok(Opened::Needs { chain, name, format });
        }
    }
    build(chain).await.map(Opened::Disk)
}

fn backing_format(name: &str, format: Option<&str>) -> Result<ImageFormat, Failure> {
    match format {
        Some("raw" | "file") => Ok(ImageFormat::Raw),
        Some("qcow2") => Ok(ImageFormat::Qcow2),
        Some(other) => Err(Failure::new(format!(
            "the backing file {name:?} has the format {other:?}, which Bulkhead does not support"
        ))),
        // To guess it from what is in there would be to believe a guest's bytes.
        None => Err(Failure::new(format!(
            "the image does not say which format its backing file {name:?} has: \
             say it once with qemu-img rebase -u -b FILE -F FORMAT"
        ))),
    }
}

fn qcow2_options(info: &DiskInfo) -> Options {
    Options {
        writable: !info.read_only,
        unmap: info.discard,
        file_bytes: info.bytes,
        is_block_device: info.is_block_device,
        align: if info.direct {
            u64::from(info.logical_block_bytes)
        } else {
            1
        },
        l2_cache_bytes: L2_CACHE_BYTES,
        refcount_cache_bytes: REFCOUNT_CACHE_BYTES,
        key: None,
    }
}

fn failure(error: OpenError) -> Failure {
    Failure::new(error.to_string())
}

/// From the bottom up.
async fn build(chain: Chain) -> Result<Disk, Failure> {
    let mut below: Option<Backing> = None;
    let mut images = chain.0;
    let Some(top) = images.first().map(|(_, info)| info.clone()) else {
        return Err(Failure::new("a disk without an image"));
    };
    while let Some((child, info)) = images.pop() {
        let (node, bytes): (Rc<dyn Node>, u64) = match info.format {
            ImageFormat::Raw => (child, info.bytes),
            ImageFormat::Qcow2 => {
                let node = Qcow2Node::open(child, qcow2_options(&info), below.take())
                    .await
                    .map_err(failure)?;
                let bytes = node.bytes();
                (node, bytes)
            }
        };
        below = Some(Backing { node, bytes });
    }
    let Some(Backing { node, bytes }) = below else {
        return Err(Failure::new("a disk without an image"));
    };
    Disk::new(node, &DiskInfo { bytes, ..top })
}
