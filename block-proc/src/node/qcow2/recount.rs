//! Counts written anew: all refcount blocks, on clusters that the image on the disk does not use.

use super::cache::{Cache, Events};
use super::entry::OFFSET_MASK;
use super::refcounts::{Refcounts, get, put};
use super::{Fault, Qcow2Node, io, map, slice_bytes};
use nix::errno::Errno;
use std::collections::BTreeMap;
use std::ops::Range;

/// Most clusters whose counts are worked on at a time: it bounds the memory, not the image.
const WINDOW_CLUSTERS: u64 = 2 << 20;
/// Most L2 tables and clusters of metadata whose counts change.
const MAX_SUMS: usize = 8 << 20;

/// What is to be added to counts.
#[derive(Default)]
pub(super) struct Sums {
    /// Of single clusters, by number.
    clusters: BTreeMap<u64, i64>,
    /// Of L2 tables, by place, and of all that they refer to.
    tables: BTreeMap<u64, i64>,
}

impl Sums {
    /// Adds to the clusters that a range touches.
    pub fn add_range(&mut self, (offset, bytes): (u64, u64), cluster: u64, sum: i64) -> Result<(), Fault> {
        for number in offset / cluster..offset.saturating_add(bytes).div_ceil(cluster) {
            *self.clusters.entry(number).or_default() += sum;
            self.check()?;
        }
        Ok(())
    }

    /// Adds to the tables of an L1 table, and to what they refer to.
    pub fn add_tables(&mut self, l1: &[u64], sum: i64) -> Result<(), Fault> {
        for table in l1.iter().map(|entry| entry & OFFSET_MASK).filter(|table| *table != 0) {
            *self.tables.entry(table).or_default() += sum;
            self.check()?;
        }
        Ok(())
    }

    fn check(&self) -> Result<(), Fault> {
        match self.clusters.len() + self.tables.len() {
            0..=MAX_SUMS => Ok(()),
            _ => Err(Errno::EFBIG.into()),
        }
    }
}

/// Refcount blocks that are being written.
pub(super) struct NewCounts {
    /// Where the blocks are; 0: there is none.
    pub table: Vec<u64>,
    order: u32,
    cluster_bytes: u64,
    blocks: Cache,
}

impl NewCounts {
    /// Blocks at these places.
    pub fn new(node: &Qcow2Node, table: Vec<u64>) -> Self {
        /// Slices that are looked at again and again.
        const CACHED_SLICES: usize = 1024;
        let cluster_bytes = node.cluster_bytes();
        let slice = slice_bytes(cluster_bytes);
        Self {
            table,
            order: node.header().refcount_order,
            cluster_bytes,
            blocks: Cache::new(node.shared.child.clone(), slice, CACHED_SLICES, Events::REFCOUNTS),
        }
    }

    fn per_block(&self) -> u64 {
        (self.cluster_bytes * 8) >> self.order
    }

    fn per_slice(&self) -> u64 {
        (self.blocks.slice_bytes() * 8) >> self.order
    }

    /// Slice and index of a cluster's count.
    fn place(&self, cluster: u64) -> Result<(u64, u64), Fault> {
        let block = self.table.get((cluster / self.per_block()) as usize).copied();
        let Some(block) = block.filter(|block| *block != 0) else {
            return Err(Fault::Unreferenced(cluster * self.cluster_bytes));
        };
        let index = cluster % self.per_block();
        let slice = block + index / self.per_slice() * self.blocks.slice_bytes();
        Ok((slice, index % self.per_slice()))
    }

    /// The count of the cluster at an offset.
    pub async fn count(&self, offset: u64) -> Result<u64, Fault> {
        let (slice, index) = self.place(offset / self.cluster_bytes)?;
        let order = self.order;
        Ok(self.blocks.read(slice, |bytes| get(bytes, order, index)).await?)
    }

    /// Changes the count of the cluster at an offset.
    pub async fn add(&self, offset: u64, sum: i64) -> Result<(), Fault> {
        let (slice, index) = self.place(offset / self.cluster_bytes)?;
        self.blocks.load(slice).await?;
        let order = self.order;
        let changed = self
            .blocks
            .read(slice, |bytes| with_sum(get(bytes, order, index), sum, order, offset))
            .await??;
        while self
            .blocks
            .change(slice, |bytes| put(bytes, order, index, changed))
            .is_none()
        {
            self.blocks.load(slice).await?;
        }
        if self.blocks.is_strained() {
            self.flush().await
        } else {
            Ok(())
        }
    }

    /// Writes what [`Self::add`] has changed.
    pub async fn flush(&self) -> Result<(), Fault> {
        let dirty = self.blocks.take_dirty();
        let written = self.blocks.write(&dirty).await;
        self.blocks.written(&dirty, written.is_ok());
        Ok(written?)
    }
}

fn with_sum(count: u64, sum: i64, order: u32, offset: u64) -> Result<u64, Fault> {
    let max = match order {
        6 => u64::MAX,
        order => (1 << (1 << order)) - 1,
    };
    match count.checked_add_signed(sum) {
        Some(count) if count <= max => Ok(count),
        _ if sum < 0 => Err(Fault::Unreferenced(offset)),
        // A snapshot more than the image can count.
        _ => Err(Errno::EINVAL.into()),
    }
}

impl Qcow2Node {
    /// Writes all counts: the old ones (none: 0) with the sums added.
    pub(super) async fn write_counts(
        &self,
        mut sums: Sums,
        old: Option<&Refcounts>,
        new: &NewCounts,
    ) -> Result<(), Fault> {
        let (cluster, per_block, per_slice) = (self.cluster_bytes(), new.per_block(), new.per_slice());
        sums.tables.retain(|_, sum| *sum != 0);
        for (table, sum) in &sums.tables {
            if !self.shared.is_table_place(*table) {
                return Err(Fault::L2Table(*table));
            }
            *sums.clusters.entry(table / cluster).or_default() += sum;
        }
        let used = new.table.iter().rposition(|block| *block != 0);
        let end = used.map_or(0, |last| (last as u64 + 1) * per_block);
        if let Some((number, _)) = sums.clusters.range(end..).find(|(_, sum)| **sum != 0) {
            return Err(Fault::Unreferenced(number * cluster));
        }
        let mut start = 0;
        while start < end {
            let window = start..(start + WINDOW_CLUSTERS.max(per_slice)).min(end);
            let deltas = self.deltas(&sums, window.clone(), end).await?;
            for (index, deltas) in deltas.chunks(per_slice as usize).enumerate() {
                let first = start + index as u64 * per_slice;
                if new.table[(first / per_block) as usize] == 0 {
                    if let Some(at) = deltas.iter().position(|delta| *delta != 0) {
                        return Err(Fault::Unreferenced((first + at as u64) * cluster));
                    }
                    continue;
                }
                let mut bytes = match old {
                    Some(old) => old.counts_from(first).await?,
                    None => vec![0; new.blocks.slice_bytes() as usize],
                };
                for (at, delta) in deltas.iter().enumerate().filter(|(_, delta)| **delta != 0) {
                    let at = at as u64;
                    let count = with_sum(get(&bytes, new.order, at), *delta, new.order, (first + at) * cluster)?;
                    put(&mut bytes, new.order, at, count);
                }
                io::write(&*self.shared.child, new.place(first)?.0, &bytes).await?;
            }
            start = window.end;
        }
        Ok(())
    }

    /// The sums for a window of clusters; nothing may refer to anything from `end` on.
    async fn deltas(&self, sums: &Sums, window: Range<u64>, end: u64) -> Result<Vec<i64>, Fault> {
        let mut deltas = vec![0_i64; (window.end - window.start) as usize];
        for (number, sum) in sums.clusters.range(window.clone()) {
            deltas[(number - window.start) as usize] += sum;
        }
        for (table, sum) in &sums.tables {
            self.each_reference(*table, |range| {
                for number in range {
                    if number >= end {
                        return Err(Fault::Unreferenced(number * self.cluster_bytes()));
                    }
                    if window.contains(&number) {
                        deltas[(number - window.start) as usize] += sum;
                    }
                }
                Ok(())
            })
            .await?;
        }
        Ok(deltas)
    }

    /// Calls with the clusters that each entry of an L2 table refers to.
    pub(super) async fn each_reference(
        &self,
        table: u64,
        mut call: impl FnMut(Range<u64>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let cluster = self.cluster_bytes();
        let bytes = io::read(&*self.shared.child, table, cluster as usize).await?;
        for entry in bytes.chunks_exact(self.form.entry_bytes()) {
            if let Some((offset, length)) = self.form.referred(map::get(entry)) {
                call(offset / cluster..(offset + length).div_ceil(cluster))?;
            }
        }
        Ok(())
    }

    /// The first cluster after all that the sums are about.
    pub(super) async fn end_of(&self, sums: &Sums) -> Result<u64, Fault> {
        let cluster = self.cluster_bytes();
        let mut end = sums.clusters.last_key_value().map_or(0, |(number, _)| number + 1);
        for table in sums.tables.keys() {
            if !self.shared.is_table_place(*table) {
                return Err(Fault::L2Table(*table));
            }
            end = end.max(table / cluster + 1);
            self.each_reference(*table, |range| {
                end = end.max(range.end);
                Ok(())
            })
            .await?;
        }
        Ok(end)
    }
}
