//! What an image says of itself, and which parts of it are data.

use super::compressed::Compression;
use super::entry::Content;
use super::header::{Encryption, compatible, incompatible};
use super::{Fault, Qcow2Node};
use crate::node::{Extent, ExtentKind, Node};
use ipc::graph::Qcow2Details;

/// Most pieces that one answer puts together.
const MAX_PIECES: usize = 16_384;

impl Qcow2Node {
    /// What query-block shows.
    pub fn describe(&self) -> Qcow2Details {
        let header = self.header();
        let snapshots = self.snapshots.borrow();
        Qcow2Details {
            version: header.version,
            cluster_bytes: self.cluster_bytes(),
            refcount_bits: 1 << header.refcount_order,
            zstd: self.compression == Compression::Zstd,
            lazy_refcounts: header.compatible & compatible::LAZY_REFCOUNTS != 0,
            corrupt: self.corrupt.get() || header.incompatible & incompatible::CORRUPT != 0,
            dirty: header.incompatible & incompatible::DIRTY != 0,
            extended_l2: header.extended_l2(),
            encryption: header.encryption.map_or(0, Encryption::method),
            locked: self.is_locked(),
            backing: header
                .backing_name
                .clone()
                .map(|name| (name, header.backing_format.clone())),
            data_file: header
                .has_data_file()
                .then(|| (header.data_file.clone().unwrap_or_default(), header.is_data_file_raw())),
            bitmaps: self.describe_bitmaps(),
            snapshots: snapshots.iter().map(|snapshot| snapshot.info(header.bytes)).collect(),
        }
    }

    /// The first part of a range that is one kind of thing all through.
    pub(super) async fn first_extent(&self, offset: u64, bytes: u64) -> Result<Extent, Fault> {
        let _guard = self.locks.lock(offset..offset + bytes, false).await;
        let (content, mut known) = self.content(offset, bytes).await?;
        let kind = kind(content);
        for _ in 0..MAX_PIECES {
            if known >= bytes.min(self.bytes().saturating_sub(offset)) {
                break;
            }
            let (content, more) = self.content(offset + known, bytes - known).await?;
            if self::kind(content) != kind {
                break;
            }
            known += more;
        }
        Ok(Extent { bytes: known, kind })
    }
}

fn kind(content: Content) -> ExtentKind {
    match content {
        Content::Data(_) | Content::Compressed(_) => ExtentKind::Data,
        Content::Zero => ExtentKind::Zero,
        Content::Backing => ExtentKind::Unallocated,
    }
}
