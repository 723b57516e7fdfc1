//! From one set of tables to another, at once.
//!
//! What a snapshot changes is everywhere: counts of all its clusters, and with them the flags in the active tables that say
//! which clusters may be written in place. So that a cut never shows half of it, all that changes is written anew, to
//! clusters that are free on the disk: refcount blocks and their table, the L1 table, L2 tables whose flags change, the
//! snapshot table. The header, whose fields are in one sector, then points at all of it. Before that write the image is the
//! old one, after it the new one, in which what only the old one had is free.

use super::entry::{COPIED, OFFSET_MASK};
use super::header::{field, incompatible, put_u32, put_u64, u64_at};
use super::recount::{NewCounts, Sums};
use super::refcounts::Refcounts;
use super::snapshots::{self, Snapshot};
use super::{Fault, Qcow2Node, io, map};
use nix::errno::Errno;

/// What the image is to be.
pub(super) struct Plan {
    /// The active L1 table: places of L2 tables; flags do not matter.
    pub l1: Vec<u64>,
    /// Size of the disk, bytes.
    pub bytes: u64,
    /// The snapshots, whose tables are there already, except...
    pub snapshots: Vec<Snapshot>,
    /// ...that the last one is new and gets a copy of the active L1 table.
    pub last_is_new: bool,
    /// L1 tables whose references come (1) or go (-1).
    pub references: Vec<(Vec<u64>, i64)>,
    /// Ranges of the image that are not used any more.
    pub given_up: Vec<(u64, u64)>,
}

/// Where the new tables are; 0: there is none.
pub(super) struct Places {
    /// The active L1 table.
    pub l1: u64,
    /// The last snapshot's L1 table, where it is new.
    pub last_l1: u64,
    /// The snapshot table.
    pub snapshots: u64,
    /// The refcount table.
    pub counts: u64,
    /// For copies of L2 tables.
    pub copies: Vec<u64>,
}

/// Clusters taken for a switch: offsets and lengths.
type Taken = Vec<(u64, u64)>;

impl Qcow2Node {
    /// Makes the image what the plan says. The caller has all guest ranges and the commit lock, and has committed.
    pub(super) async fn switch(&self, plan: Plan) -> Result<(), Fault> {
        let refcounts = self.check_writable()?;
        let mut taken = Taken::new();
        let switched = match self.build(refcounts, &plan, &mut taken).await {
            Ok((places, l1, counts)) => self
                .point_header(&places, &counts, &l1, plan.bytes, plan.snapshots.len())
                .await
                .map(|()| (places, l1, counts))
                .map_err(Fault::from),
            Err(fault) => Err(fault),
        };
        let (places, l1, counts) = match switched {
            Ok(switched) => switched,
            Err(fault) => {
                // The old image is still the one, and nothing refers to them; if that is not sure, they are lost.
                if !self.shared.is_header_unsettled() {
                    refcounts.release(&taken, false).await?;
                }
                return Err(fault);
            }
        };
        let mut snapshots = plan.snapshots;
        set_last(&mut snapshots, plan.last_is_new, &places, l1.len());
        self.snapshots.replace(snapshots);
        self.l1.replace(l1);
        let header = self.shared.header.borrow().clone();
        self.header.borrow_mut().reread(&header);
        self.shared.l2.forget(0..u64::MAX);
        self.unpacked.borrow_mut().take();
        refcounts.replace(counts.table, places.counts);
        self.claim_tables().await
    }

    /// Points the header at new tables: the image is the new one from here on. It is not dirty then.
    pub(super) async fn point_header(
        &self,
        places: &Places,
        counts: &NewCounts,
        l1: &[u64],
        bytes: u64,
        snapshots: usize,
    ) -> Result<(), Errno> {
        let version = self.header().version;
        let counts_clusters = (counts.table.len() as u64 * 8).div_ceil(self.cluster_bytes());
        self.shared
            .change_header(|header| {
                put_u64(header, field::BYTES, bytes);
                put_u32(header, field::L1, l1.len() as u32);
                put_u64(header, field::L1 + 4, places.l1);
                put_u64(header, field::REFCOUNT_TABLE, places.counts);
                put_u32(header, field::REFCOUNT_TABLE + 8, counts_clusters as u32);
                put_u32(header, field::SNAPSHOTS, snapshots as u32);
                put_u64(header, field::SNAPSHOTS + 4, places.snapshots);
                if version >= 3 {
                    let features = u64_at(header, field::INCOMPATIBLE) & !incompatible::DIRTY;
                    put_u64(header, field::INCOMPATIBLE, features);
                }
            })
            .await
    }

    /// Writes everything but the header. What it takes is listed in `taken`.
    async fn build(
        &self,
        refcounts: &Refcounts,
        plan: &Plan,
        taken: &mut Taken,
    ) -> Result<(Places, Vec<u64>, NewCounts), Fault> {
        let cluster = self.cluster_bytes();
        let mut snapshots = plan.snapshots.clone();
        let snapshots_bytes = snapshots::table_bytes(&snapshots);
        if snapshots_bytes > snapshots::MAX_TABLE_BYTES {
            return Err(Errno::EFBIG.into());
        }
        let l1_bytes = plan.l1.len() as u64 * 8;
        let tables = plan.l1.iter().filter(|entry| **entry & OFFSET_MASK != 0).count();
        let mut places = Places {
            l1: self.take_row(l1_bytes, taken).await?,
            last_l1: self
                .take_row(if plan.last_is_new { l1_bytes } else { 0 }, taken)
                .await?,
            snapshots: self.take_row(snapshots_bytes, taken).await?,
            counts: 0,
            copies: self.take(tables, taken).await?,
        };
        // Taking clusters can take more blocks, and a larger table, for which more must be taken.
        let mut outgrown = Taken::new();
        let (mut counts_bytes, mut blocks) = (0, Vec::new());
        loop {
            let needed = refcounts.block_offsets().len();
            if counts_bytes != refcounts.table_range().1 {
                if counts_bytes > 0 {
                    outgrown.push((places.counts, counts_bytes));
                }
                counts_bytes = refcounts.table_range().1;
                places.counts = self.take_row(counts_bytes, taken).await?;
            } else if blocks.len() < needed {
                blocks.extend(self.take(needed - blocks.len(), taken).await?);
            } else {
                break;
            }
        }
        let mut blocks = blocks.into_iter();
        let mut table = refcounts.table_entries();
        for entry in table.iter_mut().filter(|entry| **entry != 0) {
            *entry = blocks.next().ok_or(Errno::EIO)?;
        }
        let counts = NewCounts::new(self, table);
        let mut sums = self.sums(refcounts, plan)?;
        for range in outgrown {
            sums.add_range(range, cluster, -1)?;
        }
        self.write_counts(sums, Some(refcounts), &counts).await?;
        let l1 = self
            .write_copies(&plan.l1, &places.copies, &counts, plan.last_is_new, true)
            .await?;
        if set_last(&mut snapshots, plan.last_is_new, &places, l1.len()) {
            let plain: Vec<u64> = l1.iter().map(|entry| entry & OFFSET_MASK).collect();
            self.write_table(places.last_l1, &plain).await?;
        }
        if snapshots_bytes > 0 {
            let mut bytes = snapshots::table(&snapshots);
            bytes.resize(bytes.len().next_multiple_of(cluster as usize), 0);
            io::write(&*self.shared.child, places.snapshots, &bytes).await?;
        }
        self.write_table(places.l1, &l1).await?;
        self.write_table(places.counts, &counts.table).await?;
        counts.flush().await?;
        self.shared.child.flush().await?;
        Ok((places, l1, counts))
    }

    /// What is to be added to the counts, without copies of L2 tables.
    fn sums(&self, refcounts: &Refcounts, plan: &Plan) -> Result<Sums, Fault> {
        let cluster = self.cluster_bytes();
        let mut sums = Sums::default();
        for (l1, sum) in &plan.references {
            sums.add_tables(l1, *sum)?;
        }
        let header = self.header();
        let snapshots = (
            header.snapshots_offset,
            snapshots::table_bytes(&self.snapshots.borrow()),
        );
        let l1 = (header.l1_offset, u64::from(header.l1_entries) * 8);
        let blocks = refcounts.block_offsets().into_iter().map(|block| (block, cluster));
        let gone = [snapshots, l1, refcounts.table_range()].into_iter().chain(blocks);
        for range in gone.chain(plan.given_up.iter().copied()) {
            if range.1 > 0 {
                sums.add_range(range, cluster, -1)?;
            }
        }
        Ok(sums)
    }

    /// Clusters in a row for so many bytes; 0 for none.
    async fn take_row(&self, bytes: u64, taken: &mut Taken) -> Result<u64, Fault> {
        let clusters = bytes.div_ceil(self.cluster_bytes());
        if clusters == 0 {
            return Ok(0);
        }
        let offset = self.allocate_row(clusters).await?;
        taken.push((offset, clusters * self.cluster_bytes()));
        Ok(offset)
    }

    /// Single clusters.
    async fn take(&self, count: usize, taken: &mut Taken) -> Result<Vec<u64>, Fault> {
        let mut offsets = Vec::new();
        while offsets.len() < count {
            let run = self.allocate_committing((count - offsets.len()) as u64).await?;
            taken.push((run.offset, run.clusters * self.cluster_bytes()));
            offsets.extend((0..run.clusters).map(|index| run.offset + index * self.cluster_bytes()));
        }
        Ok(offsets)
    }

    /// Writes a table of eight-byte entries, with zeroes to the end of its last cluster.
    pub(super) async fn write_table(&self, offset: u64, entries: &[u64]) -> Result<(), Errno> {
        if entries.is_empty() {
            return Ok(());
        }
        let mut bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(self.cluster_bytes() as usize), 0);
        io::write(&*self.shared.child, offset, &bytes).await
    }

    /// Writes copies of the L2 tables of `tables` (an L1 table) in which flags contradict the counts; returns the L1 table,
    /// with its flags. `shared`: a new snapshot uses the same tables. `counted`: places have the count 1 as long as they
    /// are not used; otherwise they have 0.
    pub(super) async fn write_copies(
        &self,
        tables: &[u64],
        places: &[u64],
        counts: &NewCounts,
        shared: bool,
        counted: bool,
    ) -> Result<Vec<u64>, Fault> {
        let users = if shared { 2 } else { 1 };
        let (if_used, if_unused) = if counted { (users - 1, -1) } else { (users, 0) };
        let mut places = places.iter().copied();
        let mut l1 = Vec::with_capacity(tables.len());
        for old in tables.iter().map(|entry| entry & OFFSET_MASK) {
            if old == 0 {
                l1.push(0);
                continue;
            }
            let place = places.next().ok_or(Errno::EIO)?;
            let table = match self.flagged(old, counts, shared).await? {
                Some(bytes) => {
                    io::write(&*self.shared.child, place, &bytes).await?;
                    counts.add(old, -users).await?;
                    counts.add(place, if_used).await?;
                    place
                }
                None => {
                    counts.add(place, if_unused).await?;
                    old
                }
            };
            let alone = counts.count(table).await? == 1;
            l1.push(if alone { table | COPIED } else { table });
        }
        Ok(l1)
    }

    /// An L2 table with the flags that the counts ask for, if it does not have them.
    async fn flagged(&self, table: u64, counts: &NewCounts, shared: bool) -> Result<Option<Vec<u8>>, Fault> {
        let mut bytes = io::read(&*self.shared.child, table, self.cluster_bytes() as usize).await?;
        let mut differs = false;
        for at in (0..bytes.len()).step_by(self.form.entry_bytes()) {
            let entry = map::get(&bytes[at..at + self.form.entry_bytes()]);
            let Some(place) = self.form.place(entry) else { continue };
            // What a snapshot gets as well nobody has alone.
            let alone = !shared && counts.count(place).await? == 1;
            let flagged = entry.descriptor & !COPIED | if alone { COPIED } else { 0 };
            if flagged != entry.descriptor {
                put_u64(&mut bytes, at, flagged);
                differs = true;
            }
        }
        Ok(differs.then_some(bytes))
    }
}

/// Tells the last snapshot where its table is, if it is new.
fn set_last(snapshots: &mut [Snapshot], is_new: bool, places: &Places, l1_entries: usize) -> bool {
    match snapshots.last_mut() {
        Some(last) if is_new => {
            last.l1_offset = places.last_l1;
            last.l1_entries = l1_entries as u32;
            true
        }
        _ => false,
    }
}
