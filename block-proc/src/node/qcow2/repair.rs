//! Counts from scratch, for an image whose writer postponed them (lazy refcounts) and was cut off.
//!
//! Everything that the image refers to is counted, and tables with wrong flags are copied; the header then points at the new
//! tables and is not dirty any more, all at once. Until then the image is what it was.

use super::bitmap_load::parse;
use super::entry::OFFSET_MASK;
use super::header::{MAX_REFCOUNT_TABLE_BYTES, OFFSET_BITS, extension, u64_at};
use super::recount::{NewCounts, Sums};
use super::switch::Places;
use super::{Children, Fault, OpenError, Options, Qcow2Node, bitmaps, io, names, snapshots};
use crate::node::Node;
use nix::errno::Errno;
use std::rc::Rc;

impl Qcow2Node {
    /// Repairs the counts of an image that nobody has open; returns where it ends.
    pub(super) async fn repair_image(
        child: Rc<dyn Node>,
        options: &Options,
        children: &Children,
    ) -> Result<u64, OpenError> {
        let reader = Options {
            writable: false,
            ..options.clone()
        };
        let below = Children {
            backing: None,
            without_backing: true,
            data_file: children.data_file.clone(),
            account: None,
        };
        let image = Box::pin(Self::open(child, reader, below)).await?;
        ipc::helper::log("a qcow2 image was not closed: its refcounts are counted anew");
        Ok(image.repair().await?)
    }

    async fn repair(&self) -> Result<u64, Fault> {
        let cluster = self.cluster_bytes();
        let header = self.header().clone();
        let mut sums = self.used().await?;
        let l1 = self.l1.borrow().clone();
        // Behind everything that is used, also by the old counts: they are not touched before the new ones are valid.
        let mut end = self.end_of(&sums).await?;
        if end > self.shared.end.get() / cluster {
            return Err(Fault::Unreferenced((end - 1) * cluster));
        }
        let l1_bytes = u64::from(header.l1_entries) * 8;
        let old_table = (u64::from(header.refcount_table_clusters)) * cluster;
        for (offset, bytes) in [(header.l1_offset, l1_bytes), (header.refcount_table_offset, old_table)] {
            end = end.max((offset + bytes).div_ceil(cluster));
        }
        let table = io::read(&*self.shared.child, header.refcount_table_offset, old_table as usize).await?;
        for block in table.chunks_exact(8).map(|entry| u64_at(entry, 0)) {
            if self.shared.is_table_place(block) {
                end = end.max(block / cluster + 1);
            }
        }
        // The new tables, one after the other; counts need room that needs counts.
        let copies = l1.iter().filter(|entry| *entry & OFFSET_MASK != 0).count() as u64;
        let l1_clusters = l1_bytes.div_ceil(cluster);
        let per_block = (cluster * 8) >> header.refcount_order;
        let (mut blocks, mut table) = (1, 1);
        loop {
            let needed = (end + l1_clusters + table + blocks + copies).div_ceil(per_block);
            let needed_table = (needed.max(blocks) * 8).div_ceil(cluster);
            if (needed, needed_table) <= (blocks, table) {
                break;
            }
            (blocks, table) = (blocks.max(needed), table.max(needed_table));
        }
        let table_at = end + l1_clusters;
        let (blocks_at, copies_at) = (table_at + table, table_at + table + blocks);
        let new_end = (copies_at + copies) * cluster;
        let device_full = self.shared.is_block_device && new_end > self.shared.file_bytes;
        let too_large = table * cluster > MAX_REFCOUNT_TABLE_BYTES.max(cluster) || new_end > 1 << OFFSET_BITS;
        if device_full || too_large {
            return Err(Errno::ENOSPC.into());
        }
        sums.add_range((end * cluster, (copies_at - end) * cluster), cluster, 1)?;
        let mut entries: Vec<u64> = (0..blocks).map(|block| (blocks_at + block) * cluster).collect();
        entries.resize((table * cluster / 8) as usize, 0);
        let places = Places {
            l1: if l1.is_empty() { 0 } else { end * cluster },
            last_l1: 0,
            snapshots: header.snapshots_offset,
            counts: table_at * cluster,
            copies: (copies_at..copies_at + copies).map(|number| number * cluster).collect(),
        };
        let counts = NewCounts::new(self, entries);
        self.write_counts(sums, None, &counts).await?;
        let l1 = self.write_copies(&l1, &places.copies, &counts, false, false).await?;
        self.write_table(places.l1, &l1).await?;
        self.write_table(places.counts, &counts.table).await?;
        counts.flush().await?;
        self.shared.child.flush().await?;
        let snapshots = header.snapshots as usize;
        self.point_header(&places, &counts, &l1, header.bytes, snapshots)
            .await?;
        Ok(new_end)
    }

    /// One reference for everything that stays where it is.
    async fn used(&self) -> Result<Sums, Fault> {
        let cluster = self.cluster_bytes();
        let header = self.header().clone();
        let mut sums = Sums::default();
        sums.add_range((0, cluster), cluster, 1)?;
        sums.add_tables(&self.l1.borrow().clone(), 1)?;
        let list = self.snapshots.borrow().clone();
        let bytes = snapshots::table_bytes(&list);
        if bytes > 0 {
            sums.add_range((header.snapshots_offset, bytes), cluster, 1)?;
        }
        for snapshot in &list {
            if snapshot.l1_entries > 0 {
                sums.add_range(snapshot.l1_range(), cluster, 1)?;
                sums.add_tables(&self.snapshot_l1(snapshot).await?, 1)?;
            }
        }
        let first = io::read(&*self.shared.child, 0, cluster as usize).await?;
        for (kind, data) in names::extensions(&first) {
            if kind == extension::LUKS && data.len() >= 16 {
                sums.add_range((u64_at(&data, 0), u64_at(&data, 8).max(1)), cluster, 1)?;
            }
        }
        if self.header().autoclear & super::header::autoclear::BITMAPS != 0 {
            self.count_bitmaps(&mut sums).await?;
        }
        Ok(sums)
    }

    async fn count_bitmaps(&self, sums: &mut Sums) -> Result<(), Fault> {
        /// Largest bitmap table, bytes.
        const MAX_TABLE_BYTES: u64 = 32 << 20;
        let Some(bitmaps) = self.header().bitmaps else {
            return Ok(());
        };
        let cluster = self.cluster_bytes();
        let (offset, bytes) = (bitmaps.directory_offset, bitmaps.directory_bytes);
        if bytes == 0 || bytes > bitmaps::MAX_DIRECTORY_BYTES || !self.is_inside(offset, bytes) {
            return Err(Fault::Unreferenced(offset));
        }
        sums.add_range((offset, bytes), cluster, 1)?;
        let slice = self.shared.l2.slice_bytes();
        let directory = io::read(&*self.shared.child, offset, bytes.next_multiple_of(slice) as usize).await?;
        let entries = parse(&directory[..bytes as usize], bitmaps.count).map_err(|_| Fault::Unreferenced(offset))?;
        for entry in entries {
            let (table, length) = (entry.table.0, u64::from(entry.table.1) * 8);
            if length == 0 {
                continue;
            }
            if length > MAX_TABLE_BYTES || !self.is_inside(table, length) {
                return Err(Fault::Unreferenced(table));
            }
            sums.add_range((table, length), cluster, 1)?;
            let bytes = io::read(&*self.shared.child, table, length.next_multiple_of(slice) as usize).await?;
            for entry in bytes[..length as usize].chunks_exact(8) {
                let data = u64_at(entry, 0) & OFFSET_MASK;
                if data != 0 {
                    sums.add_range((data, cluster), cluster, 1)?;
                }
            }
        }
        Ok(())
    }

    fn is_inside(&self, offset: u64, bytes: u64) -> bool {
        self.shared.is_table_place(offset) && offset.saturating_add(bytes) <= self.shared.end.get()
    }
}
