//! Dirty bitmaps in the description: which node has which, by name, and whether it can be used.
//!
//! A bitmap stays on its node, whatever is put above or below it. Whether a job works with it block-proc
//! knows, and says in its report.

use super::Graph;
use super::error::GraphError;
use super::node::Node;
use ipc::block_job::{BitmapNumber, BitmapReport};
use ipc::graph::NodeId;

/// Most bitmaps of a machine.
pub const MAX_BITMAPS: usize = 4096;
/// Longest name, bytes: QEMU's.
pub const MAX_NAME_BYTES: usize = 1023;

/// A bitmap.
#[derive(Debug, Clone)]
pub struct Bitmap {
    /// Its number in block-proc.
    pub number: BitmapNumber,
    /// The node that it is on.
    pub node: NodeId,
    /// Its name, one of the node's.
    pub name: String,
    /// Bytes for each bit.
    pub granularity: u32,
    /// Its image keeps it.
    pub persistent: bool,
    /// Writes make it dirty.
    pub enabled: bool,
    /// It cannot be trusted, only removed.
    pub inconsistent: bool,
    /// A transaction will remove it.
    pub leaves: bool,
    /// What block-proc said of it last.
    pub report: Option<BitmapReport>,
}

impl Bitmap {
    /// Somebody works with it, as far as was known when block-proc was asked last.
    pub fn is_busy(&self) -> bool {
        self.leaves || self.report.is_some_and(|report| report.busy)
    }
}

/// What a bitmap must allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Its bits change, or a job works with it.
    Change,
    /// It is read, or switched on and off: also in an image that is read-only.
    Look,
    /// It goes: also when it is inconsistent.
    Remove,
}

/// Why a bitmap is not there, or cannot be used: the texts that clients know from QEMU.
#[derive(Debug, thiserror::Error)]
pub enum BitmapError {
    /// A node, or what it needs.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// Neither a device nor a node.
    #[error("Node '{0}' not found")]
    NoNode(String),
    /// No bitmap of this name.
    #[error("Dirty bitmap '{0}' not found")]
    NotFound(String),
    /// A bitmap without a name.
    #[error("Bitmap name cannot be empty")]
    NoName,
    /// A name that is too long.
    #[error("Bitmap name too long: {0}")]
    LongName(String),
    /// A name that the node has.
    #[error("Bitmap already exists: {0}")]
    Exists(String),
    /// A granularity that is not possible.
    #[error("Granularity must be power of 2 and at least 512")]
    Granularity,
    /// Not an image that can keep any.
    #[error("Can't store persistent bitmaps to {0}: Operation not supported")]
    NoStore(String),
    /// An image that cannot keep this one.
    #[error("Can't make bitmap '{bitmap}' persistent in '{image}': {why}")]
    NotKept {
        /// The bitmap.
        bitmap: String,
        /// The image.
        image: String,
        /// Why.
        why: &'static str,
    },
    /// A job works with it.
    #[error("Bitmap '{0}' is currently in use by another operation and cannot be used")]
    Busy(String),
    /// Its image is read-only.
    #[error("Bitmap '{0}' is readonly and cannot be modified")]
    ReadOnly(String),
    /// Nobody knows what is dirty.
    #[error("Bitmap '{0}' is inconsistent and cannot be used")]
    Inconsistent(String),
    /// Of different disks.
    #[error("Bitmaps are of different sizes (destination size is {into}, source size is {from}) and can't be merged")]
    Sizes {
        /// Bytes.
        into: u64,
        /// Bytes.
        from: u64,
    },
    /// Too many.
    #[error("There are {MAX_BITMAPS} dirty bitmaps: no more are possible")]
    TooMany,
}

impl Graph {
    /// A number for a new bitmap.
    ///
    /// # Errors
    /// [`BitmapError::TooMany`].
    pub fn new_bitmap(&mut self) -> Result<BitmapNumber, BitmapError> {
        self.forget_bitmaps();
        if self.bitmaps.len() >= MAX_BITMAPS {
            return Err(BitmapError::TooMany);
        }
        self.next_bitmap += 1;
        Ok(BitmapNumber(self.next_bitmap))
    }

    /// Forgets those whose nodes are gone.
    pub fn forget_bitmaps(&mut self) {
        let nodes = &self.nodes;
        self.bitmaps.retain(|_, bitmap| nodes.contains_key(&bitmap.node));
    }

    /// Those on a node, the newest first.
    pub fn bitmaps_on(&self, node: NodeId) -> impl Iterator<Item = &Bitmap> {
        self.bitmaps.values().rev().filter(move |bitmap| bitmap.node == node)
    }

    /// The bitmap of a node by its name.
    pub fn bitmap_named(&self, node: NodeId, name: &str) -> Option<&Bitmap> {
        self.bitmaps_on(node).find(|bitmap| bitmap.name == name)
    }

    /// The node that a command on bitmaps names.
    ///
    /// # Errors
    /// [`BitmapError::NoNode`].
    pub fn node_of_bitmaps(&self, node: &str) -> Result<&Node, BitmapError> {
        let found = self
            .lookup_any(node)
            .map_err(|_| BitmapError::NoNode(node.to_owned()))?;
        Ok(self.explicit(found.id))
    }

    /// A bitmap by the names of its node and its own, if it allows this use.
    ///
    /// # Errors
    /// [`BitmapError`].
    pub fn usable_bitmap(&self, node: &str, name: &str, wanted: Use) -> Result<&Bitmap, BitmapError> {
        self.usable_bitmap_on(self.node_of_bitmaps(node)?.id, name, wanted)
    }

    /// A bitmap of a node by its name, if it allows this use.
    ///
    /// # Errors
    /// [`BitmapError`].
    pub fn usable_bitmap_on(&self, node: NodeId, name: &str, wanted: Use) -> Result<&Bitmap, BitmapError> {
        let node = self.node_or_missing(node);
        let bitmap = self.bitmap_named(node.id, name);
        let bitmap = bitmap.ok_or_else(|| BitmapError::NotFound(name.to_owned()))?;
        let name = || name.to_owned();
        if bitmap.is_busy() {
            return Err(BitmapError::Busy(name()));
        }
        if wanted != Use::Look && bitmap.persistent && node.settings.read_only {
            return Err(BitmapError::ReadOnly(name()));
        }
        if wanted != Use::Remove && bitmap.inconsistent {
            return Err(BitmapError::Inconsistent(name()));
        }
        Ok(bitmap)
    }
}
