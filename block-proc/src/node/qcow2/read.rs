//! Reading.

use super::compressed::{Extent, unpack};
use super::entry::Content;
use super::{Fault, Qcow2Node, io};
use crate::buffer::Segments;
use crate::node::event::Event;
use crate::node::{Pass, pass_down};
use std::rc::Rc;

impl Qcow2Node {
    pub(super) async fn read_shared(&self, offset: u64, into: Segments) -> Result<(), Fault> {
        let _guard = self.locks.lock(offset..offset + into.bytes(), false).await;
        self.read_mapped(offset, into).await
    }

    /// As the tables are now; the caller has a lock.
    pub(super) async fn read_mapped(&self, mut offset: u64, mut into: Segments) -> Result<(), Fault> {
        while into.bytes() > 0 {
            let (content, bytes) = self.content(offset, into.bytes()).await?;
            let part = into.split_to(bytes);
            match content {
                Content::Data(host) => {
                    self.shared.say(Event::ReadAio).await;
                    self.read_data(offset, host, part).await?;
                }
                Content::Zero => part.fill_zeroes(),
                Content::Backing => self.read_backing(offset, part).await?,
                Content::Compressed(extent) => {
                    let cluster = self.unpacked_cluster(extent).await?;
                    part.fill_from(&cluster[(offset % self.cluster_bytes()) as usize..]);
                }
            }
            offset += bytes;
        }
        Ok(())
    }

    async fn read_backing(&self, mut offset: u64, mut into: Segments) -> Result<(), Fault> {
        if let Some(backing) = self.backing() {
            let mut there = into.split_to(backing.bytes().saturating_sub(offset));
            while there.bytes() > 0 {
                self.shared.say(Event::ReadBackingAio).await;
                let (node, bytes) = pass_down(backing.clone(), offset, there.bytes()).await;
                node.read(offset, there.split_to(bytes)).await?;
                offset += bytes;
            }
        }
        into.fill_zeroes();
        Ok(())
    }

    /// Where nobody changes the range, the tables are in memory and say that all of it is below.
    pub(super) fn pass(&self, offset: u64, bytes: u64) -> Option<Pass> {
        let below = self.backing()?;
        let most = bytes.min(below.bytes().saturating_sub(offset));
        let bytes = self.unallocated_at_once(offset, most)?;
        if !self.locks.may_share(&(offset..offset + bytes)) {
            return None;
        }
        Some(Pass {
            below,
            bytes,
            held: self.shared.child.event(Event::ReadBackingAio),
        })
    }

    /// A compressed cluster's content. The last one is kept: small sequential reads want it again.
    async fn unpacked_cluster(&self, extent: Extent) -> Result<Rc<Vec<u8>>, Fault> {
        if self.crypt.is_some() {
            return Err(Fault::CompressedEncrypted);
        }
        if let Some((last, cluster)) = &*self.unpacked.borrow()
            && *last == extent
        {
            return Ok(cluster.clone());
        }
        let start = extent.offset / self.options.align * self.options.align;
        let bytes = (extent.offset - start + extent.bytes).next_multiple_of(self.options.align);
        self.shared.say(Event::ReadCompressed).await;
        let packed = io::read(&*self.shared.child, start, bytes as usize).await?;
        let packed = &packed[(extent.offset - start) as usize..];
        let cluster = unpack(self.compression, packed, self.cluster_bytes() as usize)?;
        let cluster = Rc::new(cluster);
        *self.unpacked.borrow_mut() = Some((extent, cluster.clone()));
        Ok(cluster)
    }
}
