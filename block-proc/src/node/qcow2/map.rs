//! From guest offsets to L2 entries, and changing them.

use super::entry::{COPIED, Content, Entry, OFFSET_MASK};
use super::header::{put_u64, u64_at};
use super::refcounts::Run;
use super::{Fault, Qcow2Node, io};
use crate::ledger::Note;
use crate::node::event::Event;

impl Qcow2Node {
    fn l1_index(&self, offset: u64) -> usize {
        (offset / self.form.bytes_per_l2()) as usize
    }

    /// First guest offset that another L2 table maps.
    pub(super) fn table_end(&self, offset: u64) -> u64 {
        let bytes = self.form.bytes_per_l2();
        (offset / bytes + 1).saturating_mul(bytes)
    }

    /// Offset of the L2 table for a guest offset; 0: none.
    pub(super) fn table(&self, offset: u64) -> Result<u64, Fault> {
        let entry = self.l1.borrow().get(self.l1_index(offset)).copied().unwrap_or(0);
        let table = entry & OFFSET_MASK;
        if table != 0 && !self.shared.is_table_place(table) {
            return Err(Fault::L2Table(table));
        }
        Ok(table)
    }

    fn entry_offset(&self, table: u64, offset: u64) -> u64 {
        let index = offset % self.form.bytes_per_l2() / self.cluster_bytes();
        table + index * self.form.entry_bytes() as u64
    }

    /// The entry of the cluster that a guest offset is in.
    pub(super) async fn entry(&self, offset: u64) -> Result<Entry, Fault> {
        let table = self.table(offset)?;
        if table == 0 {
            return Ok(Entry::default());
        }
        let (slice, at) = self.shared.l2.place(self.entry_offset(table, offset));
        let bytes = self.form.entry_bytes();
        Ok(self.shared.l2.read(slice, |slice| get(&slice[at..at + bytes])).await?)
    }

    /// What is at a guest offset, and for how many bytes (at most `most`) it goes on like that.
    pub(super) async fn content(&self, offset: u64, most: u64) -> Result<(Content, u64), Fault> {
        let (cluster, unit) = (self.cluster_bytes(), self.form.unit_bytes());
        let mut entry = self.entry(offset).await?;
        let first = self.form.content(entry, offset % cluster)?;
        if let Content::Compressed(_) = first {
            return Ok((first, most.min(cluster - offset % cluster)));
        }
        let mut bytes = unit - offset % unit;
        while bytes < most {
            let next = offset + bytes;
            if next.is_multiple_of(cluster) {
                // Large holes are passed table by table.
                if first == Content::Backing && self.table(next)? == 0 {
                    bytes = self.table_end(next) - offset;
                    continue;
                }
                entry = self.entry(next).await?;
            }
            let goes_on = match (first, self.form.content(entry, next % cluster)?) {
                (Content::Data(start), Content::Data(at)) => start + bytes == at,
                (first, then) => first == then,
            };
            if !goes_on {
                break;
            }
            bytes += unit;
        }
        Ok((first, bytes.min(most)))
    }

    /// For how many bytes, at most `most`, a guest range is unallocated, if that can be told without reading tables; never 0.
    pub(super) fn unallocated_at_once(&self, offset: u64, most: u64) -> Option<u64> {
        let (cluster, unit) = (self.cluster_bytes(), self.form.unit_bytes());
        let end = offset + most;
        let mut next = offset;
        while next < end {
            let Ok(table) = self.table(next) else { break };
            if table == 0 {
                next = self.table_end(next);
                continue;
            }
            let (slice, at) = self.shared.l2.place(self.entry_offset(table, next));
            let length = self.form.entry_bytes();
            let Some(entry) = self.shared.l2.look(slice, |slice| get(&slice[at..at + length])) else {
                break;
            };
            match self.form.content(entry, next % cluster) {
                Ok(Content::Backing) => next += unit - next % unit,
                _ => break,
            }
        }
        let bytes = next.min(end) - offset;
        (bytes > 0).then_some(bytes)
    }

    /// Whether a guest range reads as zeroes without anybody having to look at data.
    pub(super) async fn is_zero(&self, mut offset: u64, mut bytes: u64) -> Result<bool, Fault> {
        while bytes > 0 {
            let (content, length) = self.content(offset, bytes).await?;
            let zero = match content {
                Content::Zero => true,
                Content::Backing => self.backing_is_over(offset),
                Content::Data(_) | Content::Compressed(_) => false,
            };
            if !zero {
                return Ok(false);
            }
            offset += length;
            bytes -= length;
        }
        Ok(true)
    }

    /// An L2 table for a guest offset that may be changed: a new one if there is none, a copy if a snapshot has it, too.
    pub(super) async fn writable_table(&self, offset: u64) -> Result<u64, Fault> {
        let index = self.l1_index(offset);
        let own = || -> Result<Option<u64>, Fault> {
            let entry = self.l1.borrow().get(index).copied().unwrap_or(0);
            let table = self.table(offset)?;
            Ok((entry & COPIED != 0 && table != 0).then_some(table))
        };
        if let Some(table) = own()? {
            return Ok(table);
        }
        let _guard = self.l1_locks.lock(index as u64..index as u64 + 1, true).await;
        if let Some(table) = own()? {
            return Ok(table);
        }
        let old = self.table(offset)?;
        let run = self.allocate(1).await?;
        if let Err(errno) = self.fill_table(run.offset, old).await {
            self.check_writable()?
                .release(&[(run.offset, self.cluster_bytes())], false)
                .await?;
            return Err(errno);
        }
        self.check_writable()?
            .claim("L2 table", run.offset, self.cluster_bytes())?;
        // From here to the end nothing waits: a commit sees all of it or nothing.
        self.shared.l2.forget(run.offset..run.offset + self.cluster_bytes());
        if let Some(entry) = self.l1.borrow_mut().get_mut(index) {
            *entry = run.offset | COPIED;
        }
        self.l1_changed.borrow_mut().insert(index);
        if old != 0 {
            self.freed.borrow_mut().push((old, self.cluster_bytes()));
        }
        Ok(run.offset)
    }

    /// Writes a new table: an old one's entries (which nobody changes), or none.
    async fn fill_table(&self, new: u64, old: u64) -> Result<(), Fault> {
        let bytes = if old == 0 {
            vec![0; self.cluster_bytes() as usize]
        } else {
            self.shared.say(Event::L2AllocCowRead).await;
            io::read(&*self.shared.child, old, self.cluster_bytes() as usize).await?
        };
        self.shared.say(Event::L2AllocWrite).await;
        Ok(io::write(&*self.shared.child, new, &bytes).await?)
    }

    /// Takes clusters in a row, at most `most` and at least one.
    pub(super) async fn allocate(&self, most: u64) -> Result<Run, Fault> {
        self.shared.say(Event::ClusterAlloc).await;
        loop {
            let refcounts = self.check_writable()?;
            if let Some(run) = refcounts.allocate(most).await? {
                return Ok(run);
            }
            let _commit = self.commit_lock.lock().await;
            refcounts.grow(false).await?;
        }
    }

    /// As [`Self::allocate`]; the caller has the commit lock.
    pub(super) async fn allocate_committing(&self, most: u64) -> Result<Run, Fault> {
        self.shared.say(Event::ClusterAlloc).await;
        loop {
            let refcounts = self.check_writable()?;
            if let Some(run) = refcounts.allocate(most).await? {
                return Ok(run);
            }
            refcounts.grow(false).await?;
        }
    }

    /// Takes exactly so many clusters in a row; the caller has the commit lock. Returns the offset.
    pub(super) async fn allocate_row(&self, clusters: u64) -> Result<u64, Fault> {
        self.shared.say(Event::ClusterAlloc).await;
        loop {
            let refcounts = self.check_writable()?;
            if let Some(run) = refcounts.allocate_row(clusters).await? {
                return Ok(run.offset);
            }
            refcounts.grow(true).await?;
        }
    }

    /// Changes the entry of the cluster that a guest offset is in. Its table is [`Self::writable_table`]. What the old
    /// entry referred to, and the new one does not, is given up with the next commit.
    pub(super) async fn set_entry(&self, table: u64, offset: u64, new: Entry) -> Result<(), Fault> {
        self.put_entry(table, offset, new).await?;
        // Nothing waits between the two.
        if let Some(account) = &self.account {
            account.note(Note {
                offset: offset - offset % self.cluster_bytes(),
                descriptor: new.descriptor,
                bitmap: new.bitmap,
            });
        }
        Ok(())
    }

    /// As [`Self::set_entry`], of what is noted already.
    pub(super) async fn put_entry(&self, table: u64, offset: u64, new: Entry) -> Result<(), Fault> {
        let (slice, at) = self.shared.l2.place(self.entry_offset(table, offset));
        let length = self.form.entry_bytes();
        loop {
            let old = self.shared.l2.change(slice, |bytes| {
                let place = &mut bytes[at..at + length];
                let old = get(place);
                put_u64(place, 0, new.descriptor);
                if length > 8 {
                    put_u64(place, 8, new.bitmap);
                }
                old
            });
            if let Some(old) = old {
                let (referred, kept) = (self.form.referred(old), self.form.referred(new));
                if referred != kept {
                    self.freed.borrow_mut().extend(referred);
                }
                return Ok(());
            }
            self.shared.l2.load(slice).await?;
        }
    }
}

/// An entry from its bytes.
pub(super) fn get(bytes: &[u8]) -> Entry {
    Entry {
        descriptor: u64_at(bytes, 0),
        bitmap: if bytes.len() > 8 { u64_at(bytes, 8) } else { 0 },
    }
}
