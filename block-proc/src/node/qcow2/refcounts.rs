//! Reference counts of the image's clusters, and with them the allocation of clusters.
//!
//! Counts change in the cache; [`super::commit`] writes them. A count goes up before anything refers to the cluster and
//! comes down after the last reference is gone from the disk, so that on the disk a count is never too small.

use super::cache::{Cache, Events};
use super::header::{Header, MAX_REFCOUNT_TABLE_BYTES, OFFSET_BITS, field, put_u64, u64_at};
use super::io;
use super::locks::Mutex;
use super::{Fault, Shared};
use crate::node::event::{Event, say};
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

/// See the module.
pub struct Refcounts {
    pub(super) shared: Rc<Shared>,
    pub(super) order: u32,
    pub(super) cluster_bits: u32,
    pub(super) table: RefCell<Vec<u64>>,
    table_offset: Cell<u64>,
    table_clusters: Cell<u64>,
    /// Entries of the table that are to be written.
    pub(super) changed: RefCell<BTreeSet<usize>>,
    /// The blocks.
    pub blocks: Cache,
    /// Held while counts are looked at in order to change them.
    pub(super) lock: Mutex,
    /// No cluster before it is free.
    pub(super) hint: Cell<u64>,
    /// Clusters of the header and of tables, which are never data.
    metadata: RefCell<BTreeSet<u64>>,
}

/// Clusters in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Offset of the first.
    pub offset: u64,
    /// How many.
    pub clusters: u64,
    /// They read as zeroes.
    pub fresh: bool,
}

impl Refcounts {
    /// Reads the table.
    ///
    /// # Errors
    /// The child's.
    pub async fn open(shared: Rc<Shared>, header: &Header, cache_bytes: u64) -> Result<Self, Errno> {
        let bytes = (header.refcount_table_clusters as usize) << header.cluster_bits;
        say(&*shared.child, Event::ReftableLoad).await;
        let table = io::read(&*shared.child, header.refcount_table_offset, bytes).await?;
        let cluster = 1_u64 << header.cluster_bits;
        let slice = super::slice_bytes(cluster);
        Ok(Self {
            order: header.refcount_order,
            cluster_bits: header.cluster_bits,
            table: RefCell::new(table.chunks_exact(8).map(|entry| u64_at(entry, 0)).collect()),
            table_offset: Cell::new(header.refcount_table_offset),
            table_clusters: Cell::new(u64::from(header.refcount_table_clusters)),
            changed: RefCell::default(),
            blocks: Cache::new(
                shared.child.clone(),
                slice,
                (cache_bytes / slice) as usize,
                Events::REFCOUNTS,
            ),
            lock: Mutex::default(),
            hint: Cell::new(0),
            metadata: RefCell::default(),
            shared,
        })
    }

    pub(super) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Counts in a block.
    pub(super) fn per_block(&self) -> u64 {
        (self.cluster_bytes() * 8) >> self.order
    }

    /// Offsets of the blocks that the table has.
    pub fn block_offsets(&self) -> Vec<u64> {
        self.table
            .borrow()
            .iter()
            .copied()
            .filter(|offset| *offset != 0)
            .collect()
    }

    /// Says that a range is metadata.
    ///
    /// # Errors
    /// When some of it is already.
    pub fn claim(&self, what: &'static str, offset: u64, bytes: u64) -> Result<(), Fault> {
        let mut metadata = self.metadata.borrow_mut();
        for cluster in offset >> self.cluster_bits..(offset + bytes).div_ceil(self.cluster_bytes()) {
            if !metadata.insert(cluster) {
                return Err(Fault::Overlap {
                    what,
                    offset: cluster << self.cluster_bits,
                });
            }
        }
        Ok(())
    }

    fn unclaim(&self, offset: u64, clusters: u64) {
        let first = offset >> self.cluster_bits;
        let mut metadata = self.metadata.borrow_mut();
        (first..first + clusters).for_each(|cluster| {
            metadata.remove(&cluster);
        });
    }

    /// Checks that a cluster that is to be written as data is not metadata.
    ///
    /// # Errors
    /// When it is.
    pub fn check_data(&self, offset: u64) -> Result<(), Fault> {
        if self.metadata.borrow().contains(&(offset >> self.cluster_bits)) {
            return Err(Fault::Overlap { what: "data", offset });
        }
        Ok(())
    }

    /// Where a cluster's count is: slice, and index in it. `None`: there is no block.
    pub(super) fn place(&self, cluster: u64) -> Result<Option<(u64, u64)>, Fault> {
        let block = cluster / self.per_block();
        let Some(&offset) = self.table.borrow().get(block as usize) else {
            return Ok(None);
        };
        if offset == 0 {
            return Ok(None);
        }
        if !self.shared.is_table_place(offset) {
            return Err(Fault::RefcountBlock(offset));
        }
        let index = cluster % self.per_block();
        let per_slice = self.per_slice();
        let slice = offset + index / per_slice * self.blocks.slice_bytes();
        Ok(Some((slice, index % per_slice)))
    }

    fn per_slice(&self) -> u64 {
        (self.blocks.slice_bytes() * 8) >> self.order
    }

    /// Takes up to `most` free clusters in a row. `Ok(None)`: the table is full, [`Self::grow`] it.
    ///
    /// # Errors
    /// The child's, ENOSPC when an image cannot be larger, or damage.
    pub async fn allocate(&self, most: u64) -> Result<Option<Run>, Fault> {
        let _guard = self.lock.lock().await;
        let mut cluster = self.hint.get();
        loop {
            if cluster / self.per_block() >= self.table.borrow().len() as u64 {
                self.hint.set(cluster);
                return Ok(None);
            }
            let Some((slice, index)) = self.place(cluster)? else {
                self.add_block(cluster).await?;
                continue;
            };
            let (order, per_slice) = (self.order, self.per_slice());
            let found = self
                .blocks
                .read(slice, |bytes| {
                    let first = (index..per_slice).find(|index| get(bytes, order, *index) == 0)?;
                    let clusters = (first..per_slice)
                        .take(most as usize)
                        .take_while(|index| get(bytes, order, *index) == 0)
                        .count();
                    Some((first, clusters as u64))
                })
                .await?;
            let Some((first, clusters)) = found else {
                cluster += per_slice - index;
                continue;
            };
            let start = cluster - index + first;
            self.check_space(start + clusters)?;
            for cluster in start..start + clusters {
                // A table with a count of 0: a hostile or a damaged image.
                self.check_data(cluster << self.cluster_bits)?;
            }
            let taken = self.blocks.change(slice, |bytes| {
                for index in first..first + clusters {
                    put(bytes, order, index, 1);
                }
            });
            if taken.is_some() {
                self.hint.set(start + clusters);
                return Ok(Some(self.run(start, clusters)));
            }
        }
    }

    /// Takes exactly so many free clusters in a row. `Ok(None)`: the table has no room for them, [`Self::grow`] it.
    ///
    /// # Errors
    /// As [`Self::allocate`].
    pub async fn allocate_row(&self, clusters: u64) -> Result<Option<Run>, Fault> {
        let _guard = self.lock.lock().await;
        let (order, per_slice) = (self.order, self.per_slice());
        let mut start = self.hint.get();
        let mut end = start;
        while end - start < clusters {
            if end / self.per_block() >= self.table.borrow().len() as u64 {
                return Ok(None);
            }
            let Some((slice, index)) = self.place(end)? else {
                self.add_block(end).await?;
                (start, end) = (end + 1, end + 1);
                continue;
            };
            let free = self
                .blocks
                .read(slice, |bytes| {
                    let used = (index..per_slice).find(|index| get(bytes, order, *index) != 0);
                    used.map(|used| used - index)
                })
                .await?;
            match free {
                Some(free) if end + free - start < clusters => {
                    start = end + free + 1;
                    end = start;
                }
                Some(free) => end += free,
                None => end += per_slice - index,
            }
        }
        self.check_space(start + clusters)?;
        for cluster in start..start + clusters {
            self.check_data(cluster << self.cluster_bits)?;
        }
        for cluster in start..start + clusters {
            let Some((slice, index)) = self.place(cluster)? else {
                return Err(Fault::Unreferenced(cluster << self.cluster_bits));
            };
            while self.blocks.change(slice, |bytes| put(bytes, order, index, 1)).is_none() {
                self.blocks.load(slice).await?;
            }
        }
        if start == self.hint.get() {
            self.hint.set(start + clusters);
        }
        Ok(Some(self.run(start, clusters)))
    }

    /// One reference more to a cluster in use, if it is `still` so when nobody else changes counts. `false`: it is not, or
    /// the count cannot go higher.
    ///
    /// # Errors
    /// The child's, or damage.
    pub async fn share(&self, offset: u64, still: impl Fn() -> bool) -> Result<bool, Fault> {
        let _guard = self.lock.lock().await;
        let Some((slice, index)) = self.place(offset >> self.cluster_bits)? else {
            return Err(Fault::Unreferenced(offset));
        };
        let order = self.order;
        let max = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
        loop {
            let shared = self.blocks.look(slice, |bytes| get(bytes, order, index));
            match shared {
                None => self.blocks.load(slice).await?,
                Some(count) if count == 0 || count >= max || !still() => return Ok(false),
                Some(count) => {
                    self.blocks.change(slice, |bytes| put(bytes, order, index, count + 1));
                    return Ok(true);
                }
            }
        }
    }

    /// Counts the clusters at these offsets, as far as they are not: an earlier process has allocated them. Nothing else may
    /// have been allocated so far.
    ///
    /// # Errors
    /// The child's, or damage.
    pub async fn restore(&self, places: &BTreeSet<u64>) -> Result<(), Fault> {
        let _guard = self.lock.lock().await;
        let clusters: BTreeSet<u64> = places.iter().map(|offset| offset >> self.cluster_bits).collect();
        for &cluster in &clusters {
            let offset = cluster << self.cluster_bits;
            self.check_space(cluster + 1)?;
            self.check_data(offset)?;
            self.run(cluster, 1);
            let (slice, index) = loop {
                if let Some(place) = self.place(cluster)? {
                    break place;
                }
                let block = cluster / self.per_block();
                let first = block * self.per_block();
                let block_place = (first..first + self.per_block()).find(|place| !clusters.contains(place));
                // The table was as long as it had to be before anything was allocated.
                let is_in_table = block < self.table.borrow().len() as u64;
                let block_place = block_place.filter(|_| is_in_table);
                self.add_block(block_place.ok_or(Fault::Unreferenced(offset))?).await?;
            };
            let order = self.order;
            let counted = |bytes: &mut [u8]| {
                if get(bytes, order, index) == 0 {
                    put(bytes, order, index, 1);
                }
            };
            while self.blocks.change(slice, counted).is_none() {
                self.blocks.load(slice).await?;
            }
        }
        Ok(())
    }

    /// The table: offset and length, bytes.
    pub fn table_range(&self) -> (u64, u64) {
        (self.table_offset.get(), self.table_clusters.get() << self.cluster_bits)
    }

    /// The table's entries.
    pub fn table_entries(&self) -> Vec<u64> {
        self.table.borrow().clone()
    }

    /// The counts of a slice, of which the first is that of cluster number `first`; 0 where there is no block.
    ///
    /// # Errors
    /// The child's, or damage.
    pub async fn counts_from(&self, first: u64) -> Result<Vec<u8>, Fault> {
        match self.place(first)? {
            Some((slice, _)) => Ok(self.blocks.read(slice, <[u8]>::to_vec).await?),
            None => Ok(vec![0; self.blocks.slice_bytes() as usize]),
        }
    }

    /// The count of the cluster at an offset.
    ///
    /// # Errors
    /// The child's, or damage.
    pub async fn count(&self, offset: u64) -> Result<u64, Fault> {
        let Some((slice, index)) = self.place(offset >> self.cluster_bits)? else {
            return Ok(0);
        };
        let order = self.order;
        Ok(self.blocks.read(slice, |bytes| get(bytes, order, index)).await?)
    }

    /// Takes another table, which is on the disk and in the header. What is metadata must be claimed again.
    pub fn replace(&self, table: Vec<u64>, offset: u64) {
        let clusters = (table.len() as u64 * 8).div_ceil(self.cluster_bytes());
        *self.table.borrow_mut() = table;
        self.table_offset.set(offset);
        self.table_clusters.set(clusters);
        self.changed.borrow_mut().clear();
        self.blocks.forget(0..u64::MAX);
        self.metadata.borrow_mut().clear();
        self.hint.set(0);
    }

    pub(super) fn run(&self, start: u64, clusters: u64) -> Run {
        let offset = start << self.cluster_bits;
        let fresh = self.shared.use_up_to(offset, clusters << self.cluster_bits);
        Run {
            offset,
            clusters,
            fresh,
        }
    }

    pub(super) fn check_space(&self, end_cluster: u64) -> Result<(), Fault> {
        let end = end_cluster << self.cluster_bits;
        let device_full = self.shared.is_block_device && end > self.shared.file_bytes;
        if end > 1 << OFFSET_BITS || device_full {
            return Err(Fault::Errno(Errno::ENOSPC));
        }
        Ok(())
    }

    /// A block for the counts around `cluster`, of which none is used: it takes that cluster for itself.
    async fn add_block(&self, cluster: u64) -> Result<(), Fault> {
        self.check_space(cluster + 1)?;
        let offset = cluster << self.cluster_bits;
        self.shared.say(Event::RefblockAlloc).await;
        self.claim("refcount block", offset, self.cluster_bytes())?;
        let zeroes = vec![0; self.cluster_bytes() as usize];
        self.shared.say(Event::RefblockAllocWrite).await;
        if let Err(errno) = io::write(&*self.shared.child, offset, &zeroes).await {
            self.unclaim(offset, 1);
            return Err(errno.into());
        }
        self.run(cluster, 1);
        let block = cluster / self.per_block();
        let index = cluster % self.per_block();
        // The block's own count must reach the disk before the table's entry: both change here, without waiting.
        self.blocks.forget(offset..offset + self.cluster_bytes());
        let mut bytes = vec![0; self.blocks.slice_bytes() as usize];
        put(&mut bytes, self.order, index % self.per_slice(), 1);
        let slice = offset + index / self.per_slice() * self.blocks.slice_bytes();
        self.blocks.insert(slice, bytes, true);
        self.table.borrow_mut()[block as usize] = offset;
        self.changed.borrow_mut().insert(block as usize);
        Ok(())
    }

    /// The entries of the table that changed, and the pieces of the image that they are in.
    pub fn take_changed(&self) -> (BTreeSet<usize>, Vec<(u64, Vec<u8>)>) {
        let changed = std::mem::take(&mut *self.changed.borrow_mut());
        let piece = super::slice_bytes(self.cluster_bytes());
        let pieces = super::table_pieces(&self.table.borrow(), self.table_offset.get(), &changed, piece);
        (changed, pieces)
    }

    /// Puts back what could not be written.
    pub fn put_back_changed(&self, changed: BTreeSet<usize>) {
        self.changed.borrow_mut().extend(changed);
    }

    /// Whether the table or a block is to be written.
    pub fn is_dirty(&self) -> bool {
        !self.changed.borrow().is_empty() || self.blocks.is_dirty()
    }

    /// Gives up references to ranges of the image that nothing on the disk has any more.
    ///
    /// # Errors
    /// The child's, or damage. Clusters not reached stay in use.
    pub async fn release(&self, ranges: &[(u64, u64)], unmap: bool) -> Result<(), Fault> {
        let _guard = self.lock.lock().await;
        for &(offset, bytes) in ranges {
            self.shared.say(Event::ClusterFree).await;
            let last = offset.saturating_add(bytes.max(1) - 1) >> self.cluster_bits;
            for cluster in offset >> self.cluster_bits..=last {
                self.release_one(cluster, unmap).await?;
            }
        }
        Ok(())
    }

    async fn release_one(&self, cluster: u64, unmap: bool) -> Result<(), Fault> {
        let offset = cluster << self.cluster_bits;
        let Some((slice, index)) = self.place(cluster)? else {
            return Err(Fault::Unreferenced(offset));
        };
        let order = self.order;
        let mut count = self.blocks.read(slice, |bytes| get(bytes, order, index)).await?;
        if count == 1 && unmap {
            // Before it can be allocated again. A host that cannot is as good.
            let _ = self.shared.child.discard(offset, self.cluster_bytes()).await;
        }
        loop {
            if count == 0 {
                return Err(Fault::Unreferenced(offset));
            }
            if self
                .blocks
                .change(slice, |bytes| put(bytes, order, index, count - 1))
                .is_some()
            {
                break;
            }
            count = self.blocks.read(slice, |bytes| get(bytes, order, index)).await?;
        }
        if count == 1 {
            self.hint.set(self.hint.get().min(cluster));
            if self.metadata.borrow_mut().remove(&cluster) {
                self.shared.forget_table(offset..offset + self.cluster_bytes());
            }
        }
        Ok(())
    }

    /// A larger table, behind everything that the old one covers. The caller holds the commit lock. Unless `anyway`, only if
    /// there is no room in the old one.
    ///
    /// # Errors
    /// The child's, or ENOSPC when the table has its largest size.
    pub async fn grow(&self, anyway: bool) -> Result<(), Fault> {
        let guard = self.lock.lock().await;
        self.shared.say(Event::ReftableGrow).await;
        let old_entries = self.table.borrow().len() as u64;
        if !anyway && self.hint.get() / self.per_block() < old_entries {
            // Somebody else has grown it, or clusters became free.
            return Ok(());
        }
        let start = old_entries * self.per_block();
        let entries_per_cluster = self.cluster_bytes() / 8;
        let mut clusters = (self.table_clusters.get() * 3)
            .div_ceil(2)
            .max(self.table_clusters.get() + 1);
        let blocks = loop {
            let mut blocks = 1;
            while blocks * self.per_block() < blocks + clusters {
                blocks += 1;
            }
            if clusters * entries_per_cluster >= old_entries + blocks {
                break blocks;
            }
            clusters += 1;
        };
        if clusters << self.cluster_bits > MAX_REFCOUNT_TABLE_BYTES.max(self.cluster_bytes()) {
            return Err(Fault::Errno(Errno::ENOSPC));
        }
        let used = blocks + clusters;
        self.check_space(start + used)?;
        // A table that was given up would be in the same place.
        self.shared.settle_header().await?;
        let (first, table_offset) = (start << self.cluster_bits, (start + blocks) << self.cluster_bits);
        let mut block_bytes = vec![0; (blocks << self.cluster_bits) as usize];
        // Blocks lie one after the other, and so do their counts.
        (0..used).for_each(|index| put(&mut block_bytes, self.order, index, 1));
        let mut table = self.table.borrow().clone();
        table.resize((clusters * entries_per_cluster) as usize, 0);
        for block in 0..blocks {
            table[(old_entries + block) as usize] = first + (block << self.cluster_bits);
        }
        // The new table has all of the old one, so the counts behind its entries must be there first.
        let dirty = self.blocks.take_dirty();
        let (changed, _) = self.take_changed();
        let written = self
            .write_grown(&dirty, first, &block_bytes, table_offset, &table, clusters)
            .await;
        self.blocks.written(&dirty, written.is_ok());
        if let Err(errno) = written {
            self.put_back_changed(changed);
            return Err(errno.into());
        }
        let (old_offset, old_clusters) = (self.table_offset.get(), self.table_clusters.get());
        *self.table.borrow_mut() = table;
        self.table_offset.set(table_offset);
        self.table_clusters.set(clusters);
        self.run(start, used);
        self.hint.set(self.hint.get().max(start + used));
        self.claim("refcount table", first, used << self.cluster_bits)?;
        drop(guard);
        self.release(&[(old_offset, old_clusters << self.cluster_bits)], false)
            .await
    }

    async fn write_grown(
        &self,
        dirty: &[(u64, Vec<u8>)],
        first: u64,
        blocks: &[u8],
        table_offset: u64,
        table: &[u64],
        clusters: u64,
    ) -> Result<(), Errno> {
        let child = &*self.shared.child;
        self.blocks.write(dirty).await?;
        self.shared.say(Event::RefblockAllocWriteBlocks).await;
        io::write(child, first, blocks).await?;
        self.shared.say(Event::RefblockAllocWriteTable).await;
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        io::write(child, table_offset, &bytes).await?;
        child.flush().await?;
        self.shared.say(Event::RefblockAllocSwitchTable).await;
        self.shared
            .change_header(|header| {
                put_u64(header, field::REFCOUNT_TABLE, table_offset);
                let clusters = clusters as u32;
                header[field::REFCOUNT_TABLE + 8..][..4].copy_from_slice(&clusters.to_be_bytes());
            })
            .await
    }
}

/// A count: fields narrower than a byte start at its low end, wider ones are big-endian.
pub fn get(bytes: &[u8], order: u32, index: u64) -> u64 {
    let index = index as usize;
    match order {
        0..=2 => {
            let width = 1 << order;
            let bit = index * width;
            u64::from(bytes[bit / 8] >> (bit % 8)) & ((1 << width) - 1)
        }
        _ => {
            let width = 1 << (order - 3);
            bytes[index * width..][..width]
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        }
    }
}

/// See [`get`]. The value fits.
pub fn put(bytes: &mut [u8], order: u32, index: u64, value: u64) {
    let index = index as usize;
    match order {
        0..=2 => {
            let width = 1 << order;
            let bit = index * width;
            let mask = ((1_u16 << width) - 1) as u8;
            let byte = &mut bytes[bit / 8];
            *byte = *byte & !(mask << (bit % 8)) | (value as u8 & mask) << (bit % 8);
        }
        _ => {
            let width = 1 << (order - 3);
            bytes[index * width..][..width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_do_not_touch_their_neighbours() {
        for order in 0..=6 {
            let mut bytes = [0; 64];
            let largest = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
            put(&mut bytes, order, 3, largest);
            put(&mut bytes, order, 4, 1);
            let counts: Vec<u64> = (0..7).map(|index| get(&bytes, order, index)).collect();
            assert_eq!(counts, [0, 0, 0, largest, 1, 0, 0], "order {order}");
            put(&mut bytes, order, 3, 0);
            assert_eq!((get(&bytes, order, 3), get(&bytes, order, 4)), (0, 1), "order {order}");
        }
        let mut bytes = [0; 2];
        put(&mut bytes, 0, 1, 1);
        put(&mut bytes, 2, 2, 0xa);
        assert_eq!(bytes, [0b10, 0x0a]);
    }
}
