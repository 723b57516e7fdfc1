//! Another size of the disk.
//!
//! Nobody else uses it meanwhile. What is cut off is given up before the header says the new size, what is new has its
//! tables, and zeroes where something else would show, before that.

use super::bitmaps::Outdated;
use super::entry::{Entry, OFFSET_MASK};
use super::header::{MAX_L1_BYTES, field, put_u32, put_u64};
use super::{Fault, Qcow2Node};
use crate::buffer::{BOUNCE_BYTES, Buffer, Segments};
use crate::node::Node;
use crate::node::event::Event;
use ipc::Failure;
use ipc::graph::Preallocation;
use nix::errno::Errno;

/// Clusters worked on between two looks at how much waits for a commit.
const CLUSTERS_BETWEEN: u64 = 1024;

impl Qcow2Node {
    pub(super) async fn resize_to(&self, bytes: u64, preallocation: Preallocation) -> Result<(), Failure> {
        let refused = |message: String, errno: Errno| Failure {
            message,
            errno: Some(errno as i32),
        };
        if !bytes.is_multiple_of(512) {
            return Err(refused("The new size must be a multiple of 512".into(), Errno::EINVAL));
        }
        let version = self.header().version;
        if version < 3 && !self.snapshots.borrow().is_empty() {
            return Err(refused(
                format!("Can't resize a version {version} image which has snapshots"),
                Errno::ENOTSUP,
            ));
        }
        let old = self.bytes();
        if bytes < old && preallocation != Preallocation::Off {
            return Err(refused(
                "Preallocation can't be used for shrinking an image".into(),
                Errno::EINVAL,
            ));
        }
        let entries = bytes.div_ceil(self.form.bytes_per_l2());
        if entries * 8 > MAX_L1_BYTES {
            return Err(refused(
                "Failed to grow the L1 table: File too large".into(),
                Errno::EFBIG,
            ));
        }
        let space = match preallocation {
            Preallocation::Metadata => Preallocation::Off,
            other => other,
        };
        let _all = self.locks.lock(0..u64::MAX, true).await;
        if let (Some(data), true) = (self.data_file(), bytes > old) {
            data.resize(bytes, space).await?;
        }
        let result = match bytes.cmp(&old) {
            std::cmp::Ordering::Less => self.shrink(bytes).await,
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => self.grow(bytes, entries, preallocation).await,
        };
        self.told("resize the image", result).await?;
        match self.data_file() {
            Some(data) if bytes < old => data.resize(bytes, space).await,
            _ => Ok(()),
        }
    }

    async fn set_bytes(&self, bytes: u64) -> Result<(), Fault> {
        let change = |header: &mut [u8]| put_u64(header, field::BYTES, bytes);
        self.shared.change_header(change).await?;
        self.header.borrow_mut().bytes = bytes;
        Ok(())
    }

    async fn shrink(&self, bytes: u64) -> Result<(), Fault> {
        self.check_writable()?;
        self.outdate_bitmaps(Outdated::All).await?;
        let cluster = self.cluster_bytes();
        let end = self.bytes();
        let mut at = bytes.next_multiple_of(cluster);
        while at < end {
            let table = self.table(at)?;
            if table == 0 {
                at = self.table_end(at);
            } else if at.is_multiple_of(self.form.bytes_per_l2()) {
                at = self.drop_table(at, table).await?;
                self.relieve().await?;
            } else {
                if self.entry(at).await? != Entry::default() {
                    let table = self.writable_table(at).await?;
                    self.set_entry(table, at, Entry::default()).await?;
                }
                at += cluster;
                self.relieve_at(at).await?;
            }
        }
        self.shared.say(Event::L1ShrinkWriteTable).await;
        self.commit_freeing(true).await?;
        self.set_bytes(bytes).await
    }

    /// Gives up a whole L2 table, and all that it refers to.
    async fn drop_table(&self, offset: u64, table: u64) -> Result<u64, Fault> {
        self.shared.say(Event::L1ShrinkFreeL2Clusters).await;
        let end = self.table_end(offset);
        let mut freed = vec![(table, self.cluster_bytes())];
        for at in (offset..end).step_by(self.cluster_bytes() as usize) {
            freed.extend(self.form.referred(self.entry(at).await?));
        }
        // From here to the end nothing waits: a commit sees all of it or nothing.
        let index = (offset / self.form.bytes_per_l2()) as usize;
        self.l1.borrow_mut()[index] = 0;
        self.l1_changed.borrow_mut().insert(index);
        self.freed.borrow_mut().extend(freed);
        Ok(end)
    }

    async fn relieve_at(&self, at: u64) -> Result<(), Fault> {
        if (at / self.cluster_bytes()).is_multiple_of(CLUSTERS_BETWEEN) {
            self.relieve().await?;
        }
        Ok(())
    }

    async fn grow(&self, bytes: u64, entries: u64, preallocation: Preallocation) -> Result<(), Fault> {
        self.check_writable()?;
        self.outdate_bitmaps(Outdated::All).await?;
        let (cluster, old) = (self.cluster_bytes(), self.bytes());
        let whole = old.next_multiple_of(cluster).min(bytes);
        if whole > old {
            // What was cut off earlier, or came with the cluster's copy.
            self.zero_piece(old, whole - old).await?;
        }
        self.commit().await?;
        if entries > self.l1.borrow().len() as u64 {
            self.grow_l1(entries).await?;
        }
        let hidden = self.backing().map_or(0, |backing| backing.bytes()).min(bytes);
        let mut at = whole;
        while at < hidden {
            at = self.zero_cluster(at, hidden.next_multiple_of(cluster), false).await?;
            self.relieve_at(at).await?;
        }
        if preallocation != Preallocation::Off {
            self.preallocate(whole, bytes, preallocation).await?;
        }
        self.commit().await?;
        self.set_bytes(bytes).await
    }

    /// A longer L1 table, elsewhere.
    async fn grow_l1(&self, entries: u64) -> Result<(), Fault> {
        self.shared.say(Event::L1GrowAllocTable).await;
        let refcounts = self.check_writable()?;
        let cluster = self.cluster_bytes();
        let clusters = (entries * 8).div_ceil(cluster);
        let offset = {
            let _commit = self.commit_lock.lock().await;
            self.allocate_row(clusters).await?
        };
        let moved = self.move_l1(offset, entries).await;
        let (old, range) = match moved {
            Ok(old) => (old, (offset, entries * 8)),
            Err(fault) => {
                if !self.shared.is_header_unsettled() {
                    refcounts.release(&[(offset, clusters * cluster)], false).await?;
                }
                return Err(fault);
            }
        };
        if old.1 > 0 {
            refcounts.release(&[old], self.options.unmap).await?;
        }
        refcounts.claim("L1 table", range.0, range.1)
    }

    /// Returns where the old one was.
    async fn move_l1(&self, offset: u64, entries: u64) -> Result<(u64, u64), Fault> {
        // The new one must be counted before the header says where it is.
        self.commit().await?;
        let _commit = self.commit_lock.lock().await;
        let mut l1 = self.l1.borrow().clone();
        l1.resize(entries as usize, 0);
        self.shared.say(Event::L1GrowWriteTable).await;
        self.write_table(offset, &l1).await?;
        self.shared.say(Event::L1GrowActivateTable).await;
        self.shared.child.flush().await?;
        self.shared
            .change_header(|header| {
                put_u32(header, field::L1, entries as u32);
                put_u64(header, field::L1 + 4, offset);
            })
            .await?;
        let mut header = self.header.borrow_mut();
        let old = (header.l1_offset, u64::from(header.l1_entries) * 8);
        (header.l1_offset, header.l1_entries) = (offset, entries as u32);
        self.l1.replace(l1);
        Ok(old)
    }

    /// Gives every cluster in a range a place, of zeroes.
    async fn preallocate(&self, from: u64, to: u64, preallocation: Preallocation) -> Result<(), Fault> {
        let cluster = self.cluster_bytes();
        let mut at = from / cluster * cluster;
        while at < to {
            if self.form.own_cluster(self.entry(at).await?).is_some() {
                at += cluster;
                continue;
            }
            let table = self.writable_table(at).await?;
            let most = self.new_clusters(at, to).await?;
            let run = self.allocate_data(at, most).await?;
            let bytes = run.clusters * cluster;
            if !self.form.is_external() {
                let filled = match preallocation {
                    // Only encrypted zeroes read as zeroes.
                    _ if self.crypt.is_some() => self.write_zero_data(at, run.offset, bytes).await,
                    Preallocation::Full => self.write_zero_bytes(run.offset, bytes).await.map_err(Fault::from),
                    Preallocation::Falloc => self.clear(run.offset, bytes, false).await,
                    _ if run.fresh => self.extend_to(run.offset + bytes).await.map_err(Fault::from),
                    _ => self.clear(run.offset, bytes, true).await,
                };
                if let Err(fault) = filled {
                    self.check_writable()?.release(&[(run.offset, bytes)], false).await?;
                    return Err(fault);
                }
            }
            for index in 0..run.clusters {
                let entry = self.form.data(run.offset + index * cluster);
                self.set_entry(table, at + index * cluster, entry).await?;
            }
            at += bytes;
            self.relieve().await?;
        }
        Ok(())
    }

    async fn clear(&self, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), Fault> {
        Ok(self.data.write_zeroes(offset, bytes, may_unmap).await?)
    }

    async fn write_zero_data(&self, mut guest: u64, mut host: u64, mut bytes: u64) -> Result<(), Fault> {
        let buffer = Buffer::new(BOUNCE_BYTES.min(bytes as usize));
        while bytes > 0 {
            let step = bytes.min(buffer.bytes() as u64);
            let zeroes = Segments::of_buffer(&buffer, step as usize);
            self.write_data(guest, host, zeroes, false).await?;
            guest += step;
            host += step;
            bytes -= step;
        }
        Ok(())
    }

    /// Makes the file reach to an offset: what tables refer to must be in it.
    async fn extend_to(&self, end: u64) -> Result<(), Errno> {
        let unit = self.options.align.max(512);
        self.write_zero_bytes(end - unit, unit).await
    }

    async fn write_zero_bytes(&self, mut offset: u64, mut bytes: u64) -> Result<(), Errno> {
        let buffer = Buffer::new(BOUNCE_BYTES.min(bytes as usize));
        while bytes > 0 {
            let step = bytes.min(buffer.bytes() as u64);
            self.data
                .write(offset, Segments::of_buffer(&buffer, step as usize), false)
                .await?;
            offset += step;
            bytes -= step;
        }
        Ok(())
    }

    /// Whether a table of the active L1 table is there, for tests of what is left after shrinking.
    pub fn l2_tables(&self) -> usize {
        self.l1
            .borrow()
            .iter()
            .filter(|entry| **entry & OFFSET_MASK != 0)
            .count()
    }
}
