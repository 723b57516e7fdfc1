//! Our own bytes to and from a node, where [`Segments`] are unwieldy: tables and headers.

use crate::buffer::{Buffer, Segments};
use crate::node::Node;
use nix::errno::Errno;

/// Reads `bytes` at `offset`.
///
/// # Errors
/// The node's.
pub async fn read(node: &dyn Node, offset: u64, bytes: usize) -> Result<Vec<u8>, Errno> {
    let buffer = Buffer::new(bytes);
    node.read(offset, Segments::of_buffer(&buffer, bytes)).await?;
    let mut out = vec![0; bytes];
    Segments::of_buffer(&buffer, bytes).read_into(&mut out);
    Ok(out)
}

/// Writes `bytes` at `offset`.
///
/// # Errors
/// The node's.
pub async fn write(node: &dyn Node, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
    let buffer = Buffer::new(bytes.len());
    let segments = Segments::of_buffer(&buffer, bytes.len());
    segments.fill_from(bytes);
    node.write(offset, segments, false).await
}
