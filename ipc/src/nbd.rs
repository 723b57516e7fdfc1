//! Exports of nodes over NBD, as the supervisor and block-proc speak of them.
//!
//! The supervisor accepts clients and hands over their sockets ([`crate::block::BlockRequest::ServeNbd`]); block-proc speaks
//! with them, and knows the exports ([`crate::graph::GraphRequest::AddExport`]). An export is a user of its node.

use crate::bitmap::BitmapSource;
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

/// Arguments of nbd-server-start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StartServer {
    /// Where it listens.
    pub addr: crate::chardev::Address,
    /// Seconds in which a client must have chosen an export; 0: any time.
    pub handshake_max_seconds: Option<u32>,
    /// Most clients; 0: no bound of the operator's.
    pub max_connections: Option<u32>,
}

/// Arguments of nbd-server-add.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddToServer {
    /// The export's name; absent: as `device`.
    pub name: Option<String>,
    /// For people.
    pub description: Option<String>,
    /// Drive or node.
    pub device: String,
    /// Clients may write, if the node can be written.
    pub writable: Option<bool>,
    /// A bitmap whose dirty parts clients may ask for.
    pub bitmap: Option<String>,
}

/// Arguments of block-export-add.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct AddExport {
    /// How it is exported.
    #[serde(rename = "type")]
    pub kind: ExportType,
    /// Its id.
    pub id: String,
    /// What it shows.
    pub node_name: String,
    /// Clients may write.
    pub writable: Option<bool>,
    /// Every write is on stable storage before it is answered.
    pub writethrough: Option<bool>,
    /// The name by which clients ask for it; absent: as the node.
    pub name: Option<String>,
    /// For people.
    pub description: Option<String>,
    /// Bitmaps whose dirty parts clients may ask for.
    pub bitmaps: Option<Vec<BitmapSource>>,
    /// Clients may ask in which image of the chain something is.
    pub allocation_depth: Option<bool>,
}

/// `BlockExportType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExportType {
    /// Over NBD.
    Nbd,
}

/// `BlockExportRemoveMode`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RemoveMode {
    /// Not when it has clients.
    #[default]
    Safe,
    /// Clients are hung up on.
    Hard,
}

/// `BlockExportInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ExportInfo {
    /// Its id.
    pub id: String,
    /// How it is exported.
    #[serde(rename = "type")]
    pub kind: ExportType,
    /// What it shows.
    pub node_name: String,
    /// It takes no more clients, and goes when the last has gone.
    pub shutting_down: bool,
}
