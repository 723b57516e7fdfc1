//! What an earlier process has answered and not committed ([`crate::ledger`]): its changes are made again, in memory.
//!
//! What they refer to has its data. It may not be counted on the disk, so that is made up for before anything is allocated;
//! what the dead process had allocated for tables is allocated anew. A cluster that is freed is not used again before the
//! notes that made it free are gone, so the last note of each entry holds. Clusters that the dead process had counted on the
//! disk, and that no entry has any more, stay counted.

use super::entry::{Content, Entry};
use super::{Fault, Qcow2Node};
use crate::node::Node;
use std::collections::{BTreeMap, BTreeSet};

impl Qcow2Node {
    /// Makes the changes that are noted, which stay noted until they are committed.
    pub(super) async fn take_over(&self) -> Result<(), Fault> {
        let notes = self.account.as_ref().map(|account| account.left()).unwrap_or_default();
        if notes.is_empty() {
            return Ok(());
        }
        let refcounts = self.check_writable()?;
        let mut last = BTreeMap::new();
        for note in notes {
            let entry = Entry {
                descriptor: note.descriptor,
                bitmap: note.bitmap,
            };
            if note.offset < self.bytes() && note.offset.is_multiple_of(self.cluster_bytes()) {
                last.insert(note.offset, self.sound(entry));
            }
        }
        let places: BTreeSet<u64> = match self.form.is_external() {
            true => BTreeSet::new(),
            false => last
                .values()
                .filter_map(|entry| self.form.own_cluster(*entry))
                .collect(),
        };
        refcounts.restore(&places).await?;
        for (offset, entry) in last {
            let table = self.writable_table(offset).await?;
            self.put_entry(table, offset, entry).await?;
        }
        Ok(())
    }

    /// An entry that has its cluster for itself, or none. Others are a job's that has failed with its process (a compressed
    /// cluster shares its place), or a lie.
    fn sound(&self, entry: Entry) -> Entry {
        let is_alone = self.form.own_cluster(entry).is_some() || self.form.place(entry).is_none();
        let content = self.form.content(entry, 0);
        let is_possible = content.is_ok_and(|content| !matches!(content, Content::Compressed(_)));
        if is_alone && is_possible {
            entry
        } else {
            Entry::default()
        }
    }
}
