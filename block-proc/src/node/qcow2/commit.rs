//! The order in which changes reach the disk: see the module above.

use super::refcounts::Refcounts;
use super::{Fault, Qcow2Node, io};
use crate::ledger::{Account, Mark};
use crate::node::event::Event;
use nix::errno::Errno;
use std::collections::BTreeSet;

/// Pieces of the image to write: offset and bytes.
pub type Pieces = Vec<(u64, Vec<u8>)>;
/// References taken back that may wait for a commit.
const MAX_FREED: usize = 16_384;

/// What one commit writes, as it was at one moment.
struct Changes {
    counts: Pieces,
    count_entries: BTreeSet<usize>,
    count_table: Pieces,
    tables: Pieces,
    l1_entries: BTreeSet<usize>,
    l1: Pieces,
    freed: Vec<(u64, u64)>,
    noted: Option<Mark>,
}

impl Qcow2Node {
    /// Whether changes of metadata are not on the disk yet.
    pub(super) fn is_dirty(&self) -> bool {
        self.committing.get()
            || self.shared.l2.is_dirty()
            || !self.l1_changed.borrow().is_empty()
            || self.refcounts.as_ref().is_some_and(Refcounts::is_dirty)
    }

    /// Commits when too much waits for it. The caller may hold a lock on guest ranges.
    pub(super) async fn relieve(&self) -> Result<(), Fault> {
        let strained = self.shared.l2.is_strained()
            || self
                .refcounts
                .as_ref()
                .is_some_and(|counts| counts.blocks.is_strained())
            || self.freed.borrow().len() > MAX_FREED
            || self.account.as_ref().is_some_and(Account::is_incomplete);
        if strained { self.commit().await } else { Ok(()) }
    }

    /// Puts everything that was done before the call on stable storage.
    pub(super) async fn commit(&self) -> Result<(), Fault> {
        self.commit_freeing(self.options.unmap).await
    }

    /// As [`Self::commit`]; with `unmap` the host gets back what becomes free.
    pub(super) async fn commit_freeing(&self, unmap: bool) -> Result<(), Fault> {
        let Some(refcounts) = &self.refcounts else {
            return Ok(());
        };
        let _guard = self.commit_lock.lock().await;
        if self.corrupt.get() {
            return Err(Errno::EIO.into());
        }
        let changes = self.take_changes(refcounts);
        self.committing.set(true);
        let written = self.write_changes(refcounts, &changes).await;
        self.committing.set(false);
        refcounts.blocks.written(&changes.counts, written.is_ok());
        self.shared.l2.written(&changes.tables, written.is_ok());
        // Before anything that was freed can be used again.
        if let (Some(account), Some(mark)) = (&self.account, changes.noted) {
            account.end_commit(mark, written.is_ok());
        }
        if let Err(errno) = written {
            refcounts.put_back_changed(changes.count_entries);
            self.l1_changed.borrow_mut().extend(changes.l1_entries);
            self.freed.borrow_mut().extend(changes.freed);
            return Err(errno.into());
        }
        if changes.freed.is_empty() {
            return Ok(());
        }
        // What was compressed may be something else soon.
        self.unpacked.borrow_mut().take();
        refcounts.release(&changes.freed, unmap).await?;
        // In no order with anything, but not left to the next flush: there may be none.
        let counts = refcounts.blocks.take_dirty();
        let written = refcounts.blocks.write(&counts).await;
        refcounts.blocks.written(&counts, written.is_ok());
        Ok(written?)
    }

    /// Without waiting in between, so that what tables refer to is counted in the counts taken with them.
    fn take_changes(&self, refcounts: &Refcounts) -> Changes {
        self.close_packing();
        let l1_entries = std::mem::take(&mut *self.l1_changed.borrow_mut());
        let piece = self.shared.l2.slice_bytes();
        let l1 = super::table_pieces(&self.l1.borrow(), self.header.borrow().l1_offset, &l1_entries, piece);
        let (count_entries, count_table) = refcounts.take_changed();
        Changes {
            counts: refcounts.blocks.take_dirty(),
            count_entries,
            count_table,
            tables: self.shared.l2.take_dirty(),
            l1_entries,
            l1,
            freed: std::mem::take(&mut *self.freed.borrow_mut()),
            noted: self.account.as_ref().map(Account::begin_commit),
        }
    }

    async fn write_changes(&self, refcounts: &Refcounts, changes: &Changes) -> Result<(), Errno> {
        let child = &*self.shared.child;
        self.shared.settle_header().await?;
        if self.form.is_external() {
            self.data.flush().await?;
        }
        refcounts.blocks.write(&changes.counts).await?;
        if !changes.count_table.is_empty() {
            // A block must be there before the table says so.
            child.flush().await?;
            for (offset, bytes) in &changes.count_table {
                self.shared.say(Event::RefblockAllocHookup).await;
                io::write(child, *offset, bytes).await?;
            }
        }
        // Counts, and the data and new tables that were written before.
        child.flush().await?;
        if changes.tables.is_empty() && changes.l1.is_empty() {
            return Ok(());
        }
        self.shared.l2.write(&changes.tables).await?;
        for (offset, bytes) in &changes.l1 {
            self.shared.say(Event::L1Update).await;
            io::write(child, *offset, bytes).await?;
        }
        child.flush().await
    }
}
