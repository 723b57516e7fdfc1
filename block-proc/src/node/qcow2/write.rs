//! Writing: in place where the cluster is ours alone and in use, otherwise to a cluster that is filled first and referred
//! to afterwards.

use super::bitmaps::Outdated;
use super::entry::Content;
use super::refcounts::{Refcounts, Run};
use super::{Fault, Qcow2Node};
use crate::buffer::{BOUNCE_BYTES, Segments};
use crate::node::Node;
use crate::node::event::Event;

impl Qcow2Node {
    pub(super) async fn write_any(&self, offset: u64, from: Segments, durable: bool) -> Result<(), Fault> {
        self.check_writable()?;
        self.outdate_bitmaps(Outdated::Recording).await?;
        let bytes = from.bytes();
        self.check_whole(offset, bytes)?;
        let guard = self.locks.lock(offset..offset + bytes, false).await;
        if let Some(pieces) = self.in_place(offset, bytes).await? {
            // Unless the way to the data is on the disk, durable data is not enough.
            let at_once = durable && !self.is_dirty();
            self.write_pieces(offset, pieces, from, at_once).await?;
            drop(guard);
            return if durable && !at_once {
                self.commit().await
            } else {
                Ok(())
            };
        }
        drop(guard);
        let guard = self.locks.lock(self.clusters_around(offset, bytes), true).await;
        self.write_exclusive(offset, from).await?;
        drop(guard);
        if durable {
            self.commit().await
        } else {
            self.relieve().await
        }
    }

    /// Where a guest range can be written without changing an entry: offsets in the image and lengths.
    async fn in_place(&self, mut offset: u64, mut bytes: u64) -> Result<Option<Vec<(u64, u64)>>, Fault> {
        let refcounts = self.check_writable()?;
        let cluster = self.cluster_bytes();
        let mut pieces: Vec<(u64, u64)> = Vec::new();
        while bytes > 0 {
            let entry = self.entry(offset).await?;
            let length = bytes.min(cluster - offset % cluster);
            let Some(host) = self.form.own_cluster(entry) else {
                return Ok(None);
            };
            let host = host + offset % cluster;
            // With subclusters, all that the range touches must be in use.
            let (content, in_use) = self.content(offset, length).await?;
            if content != Content::Data(host) || in_use < length {
                return Ok(None);
            }
            self.check_data(refcounts, host)?;
            match pieces.last_mut() {
                Some((start, before)) if *start + *before == host => *before += length,
                _ => pieces.push((host, length)),
            }
            offset += length;
            bytes -= length;
        }
        Ok(Some(pieces))
    }

    async fn write_pieces(
        &self,
        mut offset: u64,
        pieces: Vec<(u64, u64)>,
        mut from: Segments,
        durable: bool,
    ) -> Result<(), Fault> {
        for (host, bytes) in pieces {
            self.shared.say(Event::WriteAio).await;
            self.write_data(offset, host, from.split_to(bytes), durable).await?;
            offset += bytes;
        }
        Ok(())
    }

    /// Writes with whatever it takes; the caller has the clusters for itself.
    pub(super) async fn write_exclusive(&self, mut offset: u64, mut from: Segments) -> Result<(), Fault> {
        let cluster = self.cluster_bytes();
        while from.bytes() > 0 {
            let length = from.bytes().min(cluster - offset % cluster);
            let done = if let Some(pieces) = self.in_place(offset, length).await? {
                self.write_pieces(offset, pieces, from.split_to(length), false).await?;
                length
            } else if let Some(host) = self.form.own_cluster(self.entry(offset).await?) {
                self.check_data(self.check_writable()?, host)?;
                let run = Run {
                    offset: host,
                    clusters: 1,
                    fresh: false,
                };
                let table = self.writable_table(offset).await?;
                self.fill(run, offset, from.split_to(length)).await?;
                self.set_entry(table, offset, self.form.data(host)).await?;
                length
            } else {
                self.write_new(offset, &mut from).await?
            };
            offset += done;
        }
        Ok(())
    }

    /// Writes as much as fits into the clusters in a row that are to be had, and returns how much that was.
    async fn write_new(&self, offset: u64, from: &mut Segments) -> Result<u64, Fault> {
        let cluster = self.cluster_bytes();
        let first = offset / cluster * cluster;
        let table = self.writable_table(offset).await?;
        let most = self.new_clusters(first, offset + from.bytes()).await?;
        let run = self.allocate_data(first, most).await?;
        let length = from.bytes().min(first + run.clusters * cluster - offset);
        if let Err(fault) = self.fill(run, offset, from.split_to(length)).await {
            // Nothing refers to them.
            if !self.form.is_external() {
                self.check_writable()?
                    .release(&[(run.offset, run.clusters * cluster)], false)
                    .await?;
            }
            return Err(fault);
        }
        for index in 0..run.clusters {
            let at = index * cluster;
            self.set_entry(table, first + at, self.form.data(run.offset + at))
                .await?;
        }
        Ok(length)
    }

    /// Places for clusters in a row, of which the first is `first`: at most `most` and at least one.
    pub(super) async fn allocate_data(&self, first: u64, most: u64) -> Result<Run, Fault> {
        if !self.form.is_external() {
            return self.allocate(most).await;
        }
        Ok(Run {
            offset: first,
            clusters: most,
            fresh: false,
        })
    }

    fn check_data(&self, refcounts: &Refcounts, host: u64) -> Result<(), Fault> {
        if self.form.is_external() {
            return Ok(());
        }
        refcounts.check_data(host)
    }

    /// How many clusters from `first` on, within one table, need new places.
    pub(super) async fn new_clusters(&self, first: u64, end: u64) -> Result<u64, Fault> {
        let end = end.min(self.table_end(first));
        let cluster = self.cluster_bytes();
        let mut count = 1;
        while first + count * cluster < end {
            if self
                .form
                .own_cluster(self.entry(first + count * cluster).await?)
                .is_some()
            {
                break;
            }
            count += 1;
        }
        Ok(count)
    }

    /// Fills clusters of the image: the data, and around it what the guest's clusters have read as so far.
    async fn fill(&self, run: Run, offset: u64, data: Segments) -> Result<(), Fault> {
        let cluster = self.cluster_bytes();
        let first = offset / cluster * cluster;
        let (end, mut run_end) = (offset + data.bytes(), first + run.clusters * cluster);
        if self.form.is_external() {
            // It is as long as the disk.
            run_end = run_end.min(self.bytes()).max(end);
        }
        self.copy(run, first, first, offset).await?;
        self.shared.say(Event::WriteAio).await;
        self.write_data(offset, run.offset + (offset - first), data, false)
            .await?;
        self.copy(run, first, end, run_end).await
    }

    /// Copies the guest range `from..to` to its place in `run`, which starts at the guest offset `first`.
    async fn copy(&self, run: Run, first: u64, from: u64, to: u64) -> Result<(), Fault> {
        let mut at = from;
        while at < to {
            let (content, bytes) = self.content(at, to - at).await?;
            let host = run.offset + (at - first);
            if content == Content::Data(host) {
                // Subclusters that are in place.
            } else if self.crypt.is_none() && self.is_zero(at, bytes).await? {
                if !run.fresh {
                    self.data.write_zeroes(host, bytes, false).await?;
                }
            } else {
                self.copy_bytes(at, host, bytes).await?;
            }
            at += bytes;
        }
        Ok(())
    }

    async fn copy_bytes(&self, mut guest: u64, mut host: u64, mut bytes: u64) -> Result<(), Fault> {
        let bounce = self.copying.take().await;
        while bytes > 0 {
            let step = bytes.min(BOUNCE_BYTES as u64);
            let segments = || Segments::of_buffer(bounce.buffer(), step as usize);
            self.shared.say(Event::CowRead).await;
            self.read_mapped(guest, segments()).await?;
            self.shared.say(Event::CowWrite).await;
            self.write_data(guest, host, segments(), false).await?;
            guest += step;
            host += step;
            bytes -= step;
        }
        Ok(())
    }
}
