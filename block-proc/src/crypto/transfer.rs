//! Encrypted reading and writing over a node: ciphertext is only ever in buffers of our own, so that no other request and
//! no guest sees a sector halfway, and the guest's pages hold what it wrote.

use super::SECTOR_BYTES;
use super::cipher::SectorCipher;
use crate::buffer::{BOUNCE_BYTES, BouncePool, Buffer, Segments};
use crate::node::Node;
use nix::errno::Errno;
use std::rc::Rc;
use std::sync::Arc;

/// How much is encrypted at a time, bytes: it stays in the processor's first cache.
const PIECE_BYTES: usize = 4096;
const SECTOR: u64 = SECTOR_BYTES as u64;

/// A cipher, and the buffers for its ciphertext.
pub struct Transfer {
    cipher: SectorCipher,
    /// Apart from the child's, because a task must not hold two of one pool.
    pool: Rc<BouncePool>,
}

impl Transfer {
    /// With a cipher.
    pub fn new(cipher: SectorCipher) -> Self {
        Self {
            cipher,
            pool: Rc::default(),
        }
    }

    /// Its cipher.
    pub fn cipher(&self) -> &SectorCipher {
        &self.cipher
    }

    /// Reads from `offset` of the node what was encrypted as the sectors from `position` (bytes) on. Both are the same
    /// number of bytes into a sector.
    ///
    /// # Errors
    /// The node's.
    pub async fn read(&self, node: &dyn Node, offset: u64, position: u64, mut into: Segments) -> Result<(), Errno> {
        let bounce = self.pool.take().await;
        // Whole sectors around what is wanted.
        let mut skip = position % SECTOR;
        let (mut offset, mut position) = (offset - skip, position - skip);
        while into.bytes() > 0 {
            let step = (skip + into.bytes()).next_multiple_of(SECTOR).min(BOUNCE_BYTES as u64);
            let segments = Segments::of_buffer(bounce.buffer(), step as usize);
            node.read(offset, segments).await?;
            self.decrypt(bounce.buffer(), step, position, skip, &mut into);
            (offset, position, skip) = (offset + step, position + step, 0);
        }
        Ok(())
    }

    fn decrypt(&self, buffer: &Arc<Buffer>, bytes: u64, position: u64, mut skip: u64, into: &mut Segments) {
        let mut from = Segments::of_buffer(buffer, bytes as usize);
        let mut sector = position / SECTOR;
        let mut piece = [0; PIECE_BYTES];
        while from.bytes() > 0 {
            let length = from.read_into(&mut piece);
            from.advance(length as u64);
            self.cipher.decrypt(sector, &mut piece[..length]);
            sector += length as u64 / SECTOR;
            let done = into.fill_from(&piece[skip as usize..length]);
            into.advance(done as u64);
            skip = 0;
        }
    }

    /// Writes to `offset` of the node as the sectors from `position` (bytes) on. Offset, position and length are whole
    /// sectors.
    ///
    /// # Errors
    /// The node's; EINVAL for pieces of sectors.
    pub async fn write(
        &self,
        node: &dyn Node,
        offset: u64,
        position: u64,
        mut from: Segments,
        durable: bool,
    ) -> Result<(), Errno> {
        check_sectors(position, from.bytes())?;
        let bounce = self.pool.take().await;
        let (mut offset, mut position) = (offset, position);
        while from.bytes() > 0 {
            let step = from.bytes().min(BOUNCE_BYTES as u64);
            self.encrypt(bounce.buffer(), step, position, &mut from);
            let segments = Segments::of_buffer(bounce.buffer(), step as usize);
            node.write(offset, segments, durable).await?;
            (offset, position) = (offset + step, position + step);
        }
        Ok(())
    }

    fn encrypt(&self, buffer: &Arc<Buffer>, bytes: u64, position: u64, from: &mut Segments) {
        let mut to = Segments::of_buffer(buffer, bytes as usize);
        let mut sector = position / SECTOR;
        let mut piece = [0; PIECE_BYTES];
        while to.bytes() > 0 {
            let wanted = PIECE_BYTES.min(to.bytes() as usize);
            // Each byte is read once: a guest that writes on meanwhile changes what is encrypted, and nothing else.
            let length = from.read_into(&mut piece[..wanted]);
            from.advance(length as u64);
            self.cipher.encrypt(sector, &mut piece[..length]);
            sector += length as u64 / SECTOR;
            to.fill_from(&piece[..length]);
            to.advance(length as u64);
        }
    }
}

/// # Errors
/// EINVAL when a range is not of whole sectors: what is around it would have to be read, and others may be writing it.
pub fn check_sectors(position: u64, bytes: u64) -> Result<(), Errno> {
    if position.is_multiple_of(SECTOR) && bytes.is_multiple_of(SECTOR) {
        Ok(())
    } else {
        Err(Errno::EINVAL)
    }
}
