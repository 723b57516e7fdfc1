//! Writing compressed clusters: several share a cluster of the image.

use super::bitmaps::Outdated;
use super::compressed::{self, Extent};
use super::entry::Entry;
use super::{Fault, Qcow2Node};
use crate::buffer::{Buffer, Segments};
use crate::node::Node;
use crate::node::event::Event;
use nix::errno::Errno;

/// Compressed data starts on multiples of this many bytes: an entry counts whole sectors.
const SECTOR_BYTES: u64 = 512;

/// The cluster of the image that the next compressed data goes to. It has one reference more than there are entries, so
/// that it stays ours; a commit takes that back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Open {
    cluster: u64,
    /// Nothing at or after it is used.
    next: u64,
}

impl Qcow2Node {
    /// Writes one cluster of the disk, compressed if that makes it smaller. The offset is on a cluster; the data is a
    /// cluster long, or ends with the disk.
    ///
    /// # Errors
    /// EINVAL when it is not, the child's.
    pub async fn write_compressed(&self, offset: u64, from: Segments) -> Result<(), Errno> {
        let result = self.write_packed(offset, from).await;
        self.answer(result).await
    }

    async fn write_packed(&self, offset: u64, from: Segments) -> Result<(), Fault> {
        let cluster = self.cluster_bytes();
        let ends = offset + from.bytes() == self.bytes() && from.bytes() < cluster;
        if !offset.is_multiple_of(cluster) || !(from.bytes() == cluster || ends) {
            return Err(Errno::EINVAL.into());
        }
        let mut data = vec![0; cluster as usize];
        from.read_into(&mut data);
        let packed = match self.form.is_external() || self.crypt.is_some() {
            true => None,
            false => compressed::pack(self.compression, &data, (cluster - SECTOR_BYTES) as usize),
        };
        let Some(mut packed) = packed else {
            return self.write_any(offset, from, false).await;
        };
        self.check_writable()?;
        self.outdate_bitmaps(Outdated::Recording).await?;
        let unit = SECTOR_BYTES.max(self.options.align);
        packed.resize(packed.len().next_multiple_of(unit as usize), 0);
        if packed.len() as u64 >= cluster {
            return self.write_any(offset, from, false).await;
        }
        let guard = self.locks.lock(offset..offset + cluster, true).await;
        let table = self.writable_table(offset).await?;
        let extent = Extent {
            offset: self.place_for(packed.len() as u64).await?,
            bytes: packed.len() as u64,
        };
        let buffer = Buffer::new(packed.len());
        let segments = Segments::of_buffer(&buffer, packed.len());
        segments.fill_from(&packed);
        self.shared.say(Event::WriteCompressed).await;
        if let Err(errno) = self.data.write(extent.offset, segments, false).await {
            self.check_writable()?.release(&[(extent.offset, 1)], false).await?;
            return Err(errno.into());
        }
        let entry = Entry {
            descriptor: extent.entry(cluster.trailing_zeros()),
            bitmap: 0,
        };
        self.shared.say(Event::L2UpdateCompressed).await;
        self.set_entry(table, offset, entry).await?;
        drop(guard);
        self.relieve().await
    }

    /// A place for so many bytes of compressed data, less than a cluster, with a reference of its own.
    async fn place_for(&self, bytes: u64) -> Result<u64, Fault> {
        let _guard = self.packing_lock.lock().await;
        self.shared.say(Event::ClusterAllocBytes).await;
        let refcounts = self.check_writable()?;
        let cluster = self.cluster_bytes();
        if let Some(open) = self.packing.get()
            && open.next + bytes <= open.cluster + cluster
        {
            let still_open = || self.packing.get() == Some(open);
            if refcounts.share(open.cluster, still_open).await? {
                let next = open.next + bytes;
                // A commit may have closed it meanwhile; our own reference keeps it.
                if still_open() {
                    self.packing.set(Some(Open { next, ..open }));
                }
                return Ok(open.next);
            }
        }
        let run = self.allocate(1).await?;
        let open = Open {
            cluster: run.offset,
            next: run.offset + bytes,
        };
        if refcounts.share(run.offset, || true).await? {
            self.close_packing();
            self.packing.set(Some(open));
        }
        Ok(run.offset)
    }

    /// Takes back the reference that keeps the open cluster: the next commit counts it down.
    pub(super) fn close_packing(&self) {
        if let Some(open) = self.packing.take() {
            self.freed.borrow_mut().push((open.cluster, 1));
        }
    }
}
