//! Zeroes and discard: entries change, data stays.

use super::bitmaps::Outdated;
use super::entry::Entry;
use super::{Fault, Qcow2Node};
use crate::buffer::{Buffer, Segments};
use crate::node::Node;

/// Size of the buffer of zeroes that is written where an entry cannot say it, bytes.
const ZERO_BYTES: usize = 64 << 10;
/// Entries changed between two looks at how much waits for a commit.
const ENTRIES_BETWEEN: u64 = 1024;

impl Qcow2Node {
    pub(super) async fn zero_range(&self, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), Fault> {
        self.check_writable()?;
        self.outdate_bitmaps(Outdated::Recording).await?;
        self.check_whole(offset, bytes)?;
        let around = self.clusters_around(offset, bytes);
        let guard = self.locks.lock(around.clone(), true).await;
        if self.data_is_raw {
            // What reads it as a raw image must see the zeroes as well.
            self.data.write_zeroes(offset, bytes, may_unmap).await?;
        }
        let inside = self.clusters_inside(offset, bytes);
        if inside.is_empty() {
            self.zero_piece(offset, bytes).await?;
        } else {
            self.zero_piece(offset, inside.start - offset).await?;
            let mut at = inside.start;
            while at < inside.end {
                at = self
                    .zero_cluster(at, inside.end, may_unmap && self.options.unmap)
                    .await?;
                self.relieve_between(at).await?;
            }
            self.zero_piece(inside.end, (offset + bytes).saturating_sub(inside.end))
                .await?;
        }
        drop(guard);
        self.relieve().await
    }

    pub(super) async fn discard_range(&self, offset: u64, bytes: u64) -> Result<(), Fault> {
        self.check_writable()?;
        self.outdate_bitmaps(Outdated::Recording).await?;
        if !self.options.unmap {
            return Ok(());
        }
        let inside = self.clusters_inside(offset, bytes);
        if inside.is_empty() {
            return Ok(());
        }
        let guard = self.locks.lock(inside.clone(), true).await;
        if self.form.is_external() {
            let end = inside.end.min(self.bytes());
            self.data.discard(inside.start, end - inside.start).await?;
        }
        if self.data_is_raw {
            // The two must go on reading the same, so the tables keep their entries.
            return Ok(());
        }
        let mut at = inside.start;
        while at < inside.end {
            at = self.discard_cluster(at, inside.end).await?;
            self.relieve_between(at).await?;
        }
        drop(guard);
        self.relieve().await
    }

    /// The clusters of which all is in a range; the disk's last one may be cut short.
    fn clusters_inside(&self, offset: u64, bytes: u64) -> std::ops::Range<u64> {
        let cluster = self.cluster_bytes();
        let start = offset.next_multiple_of(cluster);
        let end = match offset + bytes {
            end if end == self.bytes() => end.next_multiple_of(cluster),
            end => end / cluster * cluster,
        };
        start..end.max(start)
    }

    async fn relieve_between(&self, at: u64) -> Result<(), Fault> {
        if (at / self.cluster_bytes()).is_multiple_of(ENTRIES_BETWEEN) {
            self.relieve().await?;
        }
        Ok(())
    }

    /// Zeroes less than a cluster.
    pub(super) async fn zero_piece(&self, offset: u64, bytes: u64) -> Result<(), Fault> {
        if bytes == 0 || self.is_zero(offset, bytes).await? {
            return Ok(());
        }
        self.write_exclusive(offset, Segments::repeating(&Buffer::new(ZERO_BYTES), bytes as usize))
            .await
    }

    /// Zeroes the cluster at `at`, or passes over some that are zero; returns where to go on.
    pub(super) async fn zero_cluster(&self, at: u64, end: u64, unmap: bool) -> Result<u64, Fault> {
        let next = at + self.cluster_bytes();
        if !self.may_have_backing() && self.table(at)? == 0 {
            return Ok(self.table_end(at).min(end));
        }
        let entry = self.entry(at).await?;
        let own = self.form.own_cluster(entry);
        let is_zero = self.is_zero(at, self.cluster_bytes()).await?;
        if is_zero && (own.is_none() || !unmap) {
            return Ok(next);
        }
        let new = if self.form.has_zeroes() {
            self.form.zeroes(own.filter(|_| !unmap))
        } else if !self.may_have_backing() && unmap {
            Entry::default()
        } else {
            self.zero_piece(at, self.cluster_bytes()).await?;
            return Ok(next);
        };
        let table = self.writable_table(at).await?;
        self.set_entry(table, at, new).await?;
        Ok(next)
    }

    /// Gives up the cluster at `at`, or passes over some; returns where to go on.
    async fn discard_cluster(&self, at: u64, end: u64) -> Result<u64, Fault> {
        if self.table(at)? == 0 {
            return Ok(self.table_end(at).min(end));
        }
        let next = at + self.cluster_bytes();
        let new = match (self.may_have_backing(), self.form.has_zeroes()) {
            (false, _) => Entry::default(),
            (true, true) => self.form.zeroes(None),
            // Nothing but data can hide the backing file.
            (true, false) => return Ok(next),
        };
        // An entry that refers to nothing has nothing to give up.
        let entry = self.entry(at).await?;
        let has_place = self.form.referred(entry).is_some() || self.form.own_cluster(entry).is_some();
        if has_place {
            let table = self.writable_table(at).await?;
            self.set_entry(table, at, new).await?;
        }
        Ok(next)
    }
}
