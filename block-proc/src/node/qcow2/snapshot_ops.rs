//! Making, deleting and going back to internal snapshots.

use super::bitmaps::Outdated;
use super::header::{MAX_SNAPSHOTS, u64_at};
use super::snapshots::Snapshot;
use super::switch::Plan;
use super::{Fault, Qcow2Node, io};
use crate::node::Node;
use ipc::Failure;
use ipc::graph::SnapshotInfo;
use nix::errno::Errno;
use std::ops::Range;

impl Qcow2Node {
    /// The internal snapshots, in the table's order.
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        let bytes = self.bytes();
        self.snapshots.borrow().iter().map(|one| one.info(bytes)).collect()
    }

    /// Makes an internal snapshot of the disk as it is now. Its id must be free; `disk_bytes` is filled in.
    ///
    /// # Errors
    /// EINVAL when counts cannot go so high or names are too long, EFBIG when there are too many, ENOTSUP with an external
    /// data file, the child's.
    pub async fn create_snapshot(&self, info: &SnapshotInfo) -> Result<(), Failure> {
        let result = self.create_snapshot_now(info).await;
        self.told("create the snapshot", result).await
    }

    /// Deletes the internal snapshot of this id.
    ///
    /// # Errors
    /// ENOENT, the child's.
    pub async fn delete_snapshot(&self, id: &str) -> Result<(), Failure> {
        let result = self.delete_snapshot_now(id).await;
        self.told("delete the snapshot", result).await
    }

    /// Makes the disk what it was when the snapshot of this id was made.
    ///
    /// # Errors
    /// ENOENT, the child's.
    pub async fn revert_to_snapshot(&self, id: &str) -> Result<(), Failure> {
        let result = self.revert_now(id).await;
        self.told("go back to the snapshot", result).await
    }

    /// A failure in words.
    pub(super) async fn told<T>(&self, what: &str, result: Result<T, Fault>) -> Result<T, Failure> {
        self.answer(result).await.map_err(|errno| Failure {
            message: format!("Could not {what}: {}", errno.desc()),
            errno: Some(errno as i32),
        })
    }

    async fn create_snapshot_now(&self, info: &SnapshotInfo) -> Result<(), Fault> {
        if self.form.is_external() {
            return Err(Errno::ENOTSUP.into());
        }
        if info.id.len().max(info.name.len()) > usize::from(u16::MAX) {
            return Err(Errno::EINVAL.into());
        }
        let _all = self.locks.lock(0..u64::MAX, true).await;
        self.commit().await?;
        let _commit = self.commit_lock.lock().await;
        let l1 = self.l1.borrow().clone();
        let mut snapshots = self.snapshots.borrow().clone();
        if snapshots.len() >= MAX_SNAPSHOTS as usize {
            return Err(Errno::EFBIG.into());
        }
        snapshots.push(Snapshot::new(info, 0, l1.len() as u32, self.bytes()));
        self.switch(Plan {
            references: vec![(l1.clone(), 1)],
            l1,
            bytes: self.bytes(),
            snapshots,
            last_is_new: true,
            given_up: Vec::new(),
        })
        .await
    }

    async fn delete_snapshot_now(&self, id: &str) -> Result<(), Fault> {
        let _all = self.locks.lock(0..u64::MAX, true).await;
        self.commit().await?;
        let _commit = self.commit_lock.lock().await;
        let (index, snapshot) = self.find_snapshot(id)?;
        let table = self.snapshot_l1(&snapshot).await?;
        let mut snapshots = self.snapshots.borrow().clone();
        snapshots.remove(index);
        let l1 = self.l1.borrow().clone();
        self.switch(Plan {
            l1,
            bytes: self.bytes(),
            snapshots,
            last_is_new: false,
            references: vec![(table.clone(), -1)],
            given_up: vec![snapshot.l1_range()],
        })
        .await?;
        if self.options.unmap {
            self.give_back(&table).await?;
        }
        Ok(())
    }

    async fn revert_now(&self, id: &str) -> Result<(), Fault> {
        let _all = self.locks.lock(0..u64::MAX, true).await;
        self.check_writable()?;
        self.outdate_bitmaps(Outdated::All).await?;
        self.commit().await?;
        let _commit = self.commit_lock.lock().await;
        let (_, snapshot) = self.find_snapshot(id)?;
        let bytes = snapshot.disk_bytes().unwrap_or(self.bytes());
        let table = self.snapshot_l1(&snapshot).await?;
        let mut l1 = table.clone();
        let needed = bytes.div_ceil(self.form.bytes_per_l2()) as usize;
        if needed * 8 > super::header::MAX_L1_BYTES as usize || bytes > i64::MAX as u64 {
            return Err(Errno::EFBIG.into());
        }
        l1.resize(l1.len().max(needed), 0);
        let active = self.l1.borrow().clone();
        let snapshots = self.snapshots.borrow().clone();
        self.switch(Plan {
            l1,
            bytes,
            snapshots,
            last_is_new: false,
            references: vec![(active, -1), (table, 1)],
            given_up: Vec::new(),
        })
        .await?;
        self.dirty_all_bitmaps();
        Ok(())
    }

    fn find_snapshot(&self, id: &str) -> Result<(usize, Snapshot), Fault> {
        let snapshots = self.snapshots.borrow();
        let index = snapshots.iter().position(|one| one.id() == id.as_bytes());
        let index = index.ok_or(Errno::ENOENT)?;
        Ok((index, snapshots[index].clone()))
    }

    pub(super) async fn snapshot_l1(&self, snapshot: &Snapshot) -> Result<Vec<u64>, Fault> {
        let (offset, bytes) = snapshot.l1_range();
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let whole = bytes.next_multiple_of(self.shared.l2.slice_bytes());
        let table = io::read(&*self.shared.child, offset, whole as usize).await?;
        let entries = table.chunks_exact(8).take(snapshot.l1_entries as usize);
        Ok(entries.map(|entry| u64_at(entry, 0)).collect())
    }

    /// Gives the host what a deleted snapshot had alone.
    async fn give_back(&self, l1: &[u64]) -> Result<(), Fault> {
        let refcounts = self.check_writable()?;
        let cluster = self.cluster_bytes();
        for table in l1.iter().map(|entry| entry & super::entry::OFFSET_MASK) {
            if table == 0 || refcounts.count(table).await? > 0 {
                continue;
            }
            let own = table / cluster;
            let mut ranges: Vec<Range<u64>> = std::iter::once(own..own + 1).collect();
            self.each_reference(table, |range| {
                match ranges.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    _ => ranges.push(range),
                }
                Ok(())
            })
            .await?;
            for number in ranges.into_iter().flatten() {
                if refcounts.count(number * cluster).await? == 0 {
                    // A host that cannot is as good.
                    let _ = self.shared.child.discard(number * cluster, cluster).await;
                }
            }
        }
        Ok(())
    }
}
