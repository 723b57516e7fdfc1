//! Exports of nodes over NBD, as the supervisor and block-proc speak of them.
//!
//! The supervisor accepts clients and hands over their sockets ([`crate::block::BlockRequest::ServeNbd`]); block-proc speaks
//! with them, and knows the exports ([`crate::graph::GraphRequest::AddExport`]). An export is a user of its node.

use crate::block_job::BitmapNumber;
use crate::graph::NodeId;
use serde::{Deserialize, Serialize};

/// Number of an export: given by the supervisor, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ExportNumber(pub u32);

/// Number of a client: given by the supervisor, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NbdClient(pub u32);

/// Most clients at a time: each has a socket and some memory.
pub const MAX_NBD_CLIENTS: usize = 256;

/// An export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportSpec {
    /// Its number.
    pub export: ExportNumber,
    /// What it shows.
    pub node: NodeId,
    /// The name by which clients ask for it.
    pub name: String,
    /// For people.
    pub description: Option<String>,
    /// Clients may write.
    pub writable: bool,
    /// Every write is on stable storage before it is answered.
    pub writethrough: bool,
    /// Bitmaps whose dirty parts clients may ask for, by their names.
    pub bitmaps: Vec<(String, BitmapNumber)>,
    /// Clients may ask in which image of the chain something is.
    pub allocation_depth: bool,
}
