//! Requests under way are noted where the next block-proc finds them ([`ipc::inflight`]), and what the last one had noted is
//! found again.

use ipc::Failure;
use ipc::inflight::{HEADER_BYTES, LEDGER_BYTES, QUEUE_HEADER_BYTES, VERSION, queue_bytes};
use ipc::memory::GuestRam;
use ipc::virtio::{ActivationNumber, MAX_QUEUE_SIZE};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap};

/// Where [`Record::chains`] has its table: no RAM is there.
const TABLE: u64 = 1 << 56;
/// Bytes of one entry.
const ENTRY_BYTES: u64 = 8;
/// Set in the word for an answer that is being given.
const ANSWERING: u64 = 1 << 32;

/// The record of all queues.
pub struct Record {
    notes: GuestRam,
    /// Guest RAM, and beside it for every head an avail ring in which that head is the only entry: so the library that reads
    /// chains off the driver's ring reads those that are found here as well.
    chains: GuestRam,
}

impl Record {
    /// Over a mapping that has room for all queues.
    ///
    /// # Errors
    /// When another version has left it, or memory is short.
    pub fn new(notes: GuestRam, memory: &GuestRam) -> Result<Self, Failure> {
        let version: u64 = notes
            .load(GuestAddress(0), Ordering::Acquire)
            .map_err(std::io::Error::other)?;
        match version {
            0 => notes
                .store(VERSION, GuestAddress(0), Ordering::Release)
                .map_err(std::io::Error::other)?,
            VERSION => {}
            other => {
                return Err(Failure::new(format!(
                    "requests under way are recorded in version {other}, this is version {VERSION}"
                )));
            }
        }
        let table = table().map_err(std::io::Error::other)?;
        let chains = memory.insert_region(Arc::new(table)).map_err(std::io::Error::other)?;
        Ok(Self { notes, chains })
    }
}

/// An avail ring for each head.
fn table() -> Result<GuestRegionMmap<()>, Box<dyn std::error::Error + Send + Sync>> {
    let heads = u64::from(MAX_QUEUE_SIZE);
    // The library wants whole rings to be in memory.
    let bytes = (heads + 1) * ENTRY_BYTES + 2 * heads;
    let region = MmapRegion::new(usize::try_from(bytes)?)?;
    let region = GuestRegionMmap::new(region, GuestAddress(TABLE)).ok_or("the table wraps around")?;
    for head in 0..MAX_QUEUE_SIZE {
        // Flags, the index of the next entry, the first entry.
        let ring = [0, 1u16.to_le(), head.to_le()];
        let entry = u64::from(head) * ENTRY_BYTES;
        for (field, value) in (0..).zip(ring) {
            region.write_obj(value, vm_memory::MemoryRegionAddress(entry + 2 * field))?;
        }
    }
    Ok(region)
}

/// The notes of one queue. The addresses are right by construction, so nothing here can fail but by a fault of our own.
#[derive(Clone, Copy)]
pub struct Notes {
    record: &'static Record,
    base: u64,
    /// Largest size of the queue.
    size: u16,
    /// What the next request is noted with.
    next: u64,
}

impl Notes {
    /// Those of the queue whose notes begin there. What is there stays as it is.
    pub fn new(record: &'static Record, base: u64, size: u16) -> Self {
        Self {
            record,
            base,
            size,
            next: 1,
        }
    }

    /// Begins with an activation: anew, or, under the number that is noted, where an earlier block-proc has got to. `used` is
    /// the driver's used index. Returns the heads of requests that were taken and not answered, the earliest first.
    pub fn begin(&mut self, number: ActivationNumber, used: u16) -> Vec<u16> {
        if self.load(0) != number.0 {
            self.store(0, 0);
            self.store(8, 0);
            (0..self.size).for_each(|head| self.set(head, 0));
            self.store(0, number.0);
            return Vec::new();
        }
        self.settle_answer(used);
        let mut noted: Vec<(u64, u16)> = (0..self.size)
            .map(|head| (self.load(place(head)), head))
            .filter(|(order, _)| *order != 0)
            .collect();
        noted.sort_unstable();
        // A hostile record may say anything.
        self.next = noted.last().map_or(0, |(order, _)| *order).saturating_add(1);
        noted.into_iter().map(|(_, head)| head).collect()
    }

    /// An answer was being given: has it been?
    fn settle_answer(&mut self, used: u16) {
        let answering = self.load(8);
        if answering & ANSWERING != 0 && answering as u16 != used {
            self.set((answering >> 16) as u16, 0);
        }
        self.store(8, 0);
    }

    /// A request was taken.
    pub fn taken(&mut self, head: u16) {
        self.set(head, self.next);
        self.next = self.next.saturating_add(1);
    }

    /// A request is about to be answered; `used` is the used index before that.
    pub fn answering(&mut self, head: u16, used: u16) {
        self.store(8, ANSWERING | u64::from(head) << 16 | u64::from(used));
    }

    /// It has been.
    pub fn answered(&mut self, head: u16) {
        self.set(head, 0);
        self.store(8, 0);
    }

    /// The chain of a head, of a queue with that descriptor table and of that size.
    ///
    /// # Errors
    /// When the driver's ring is broken.
    pub fn chain(
        &self,
        queue: &Queue,
        head: u16,
    ) -> Result<Option<DescriptorChain<&'static GuestRam>>, virtio_queue::Error> {
        let mut one = Queue::new(MAX_QUEUE_SIZE)?;
        one.try_set_size(queue.size())?;
        one.try_set_desc_table_address(GuestAddress(queue.desc_table()))?;
        one.try_set_avail_ring_address(GuestAddress(TABLE + u64::from(head) * ENTRY_BYTES))?;
        one.try_set_used_ring_address(GuestAddress(queue.used_ring()))?;
        one.set_ready(true);
        Ok(one.iter(&self.record.chains)?.next())
    }

    fn set(&self, head: u16, order: u64) {
        if head < self.size {
            self.store(place(head), order);
        }
    }

    fn load(&self, at: u64) -> u64 {
        let loaded = self.record.notes.load(GuestAddress(self.base + at), Ordering::Acquire);
        loaded.expect("the record has room for the queue")
    }

    fn store(&self, at: u64, value: u64) {
        let stored = self
            .record
            .notes
            .store(value, GuestAddress(self.base + at), Ordering::Release);
        stored.expect("the record has room for the queue");
    }
}

fn place(head: u16) -> u64 {
    QUEUE_HEADER_BYTES + 8 * u64::from(head)
}

/// Gives every queue its place in the record, in the order in which they come.
pub struct Places {
    next: u64,
    end: u64,
}

impl Places {
    /// A record of so many bytes, the ledger among them.
    pub fn new(bytes: u64) -> Self {
        Self {
            next: HEADER_BYTES,
            end: bytes.saturating_sub(LEDGER_BYTES),
        }
    }

    /// Where the next queue's notes begin.
    ///
    /// # Errors
    /// When the record has no room for it.
    pub fn take(&mut self, size: u16) -> Result<u64, Failure> {
        let base = self.next;
        let next = base + queue_bytes(size);
        if next > self.end {
            return Err(Failure::new(format!(
                "the record of requests under way has {} bytes, and more queues",
                self.end
            )));
        }
        self.next = next;
        Ok(base)
    }
}

#[cfg(test)]
mod tests;
