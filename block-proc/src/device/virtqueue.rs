//! One virtqueue at work: chains out of the avail ring, answers into the used ring, the driver's interrupt.

use super::chain::BrokenChain;
use super::inflight::Notes;
use ipc::caps::CallFd;
use ipc::memory::GuestRam;
use ipc::virtio::{ActivationNumber, MAX_QUEUE_SIZE, QueueSetup};
use nix::errno::Errno;
use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{AtomicAccess, Bytes, GuestAddress};

/// How many chains are looked at ahead of their time.
pub const LOOK_AHEAD: usize = 16;

/// Why a queue can serve no longer.
#[derive(Debug, thiserror::Error)]
pub enum BrokenQueue {
    /// The ring's own structures make no sense.
    #[error("{0}")]
    Ring(#[from] virtio_queue::Error),
    /// One of its requests does not.
    #[error("{0}")]
    Chain(#[from] BrokenChain),
    /// More requests than descriptors: some descriptor was made available twice.
    #[error("more requests are in flight than the queue has descriptors")]
    Overcommitted,
}

/// See the module.
pub struct VirtQueue {
    queue: Queue,
    memory: &'static GuestRam,
    event_idx: bool,
    /// Chains taken and not yet answered.
    in_flight: u16,
    /// Answers that the driver has not been told of.
    untold: bool,
    /// An earlier block-proc may have died between answer and interrupt: raise it once without asking.
    owed: bool,
    /// Where requests under way are noted, if they are.
    notes: Option<Notes>,
    /// What an earlier block-proc has taken and not answered: taken again before anything new.
    unanswered: VecDeque<u16>,
}

impl VirtQueue {
    /// Checks what the driver programmed. With `notes`, requests are noted there; those that are noted already under the same
    /// number come first. Without, they must be answered in the order in which they were taken.
    ///
    /// # Errors
    /// When a size or an alignment is not allowed or a ring is not in RAM.
    pub fn new(
        memory: &'static GuestRam,
        setup: &QueueSetup,
        event_idx: bool,
        notes: Option<(Notes, ActivationNumber)>,
    ) -> Result<Self, virtio_queue::Error> {
        let mut queue = Queue::new(MAX_QUEUE_SIZE)?;
        queue.try_set_size(setup.size)?;
        queue.try_set_desc_table_address(GuestAddress(setup.descriptor_table))?;
        queue.try_set_avail_ring_address(GuestAddress(setup.avail_ring))?;
        queue.try_set_used_ring_address(GuestAddress(setup.used_ring))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        // virtio-queue takes an avail ring at address 0 for one that was never set.
        if setup.avail_ring == 0 || !queue.is_valid(memory) {
            return Err(virtio_queue::Error::FindMemoryRegion);
        }
        // A driver begins with an empty used ring. Where it is not, an earlier block-proc got that far.
        let start = queue.used_idx(memory, Ordering::Acquire)?.0;
        let (notes, unanswered) = match notes {
            None => (None, VecDeque::new()),
            Some((mut notes, number)) => {
                let mut unanswered = VecDeque::from(notes.begin(number, start));
                unanswered.retain(|head| *head < setup.size);
                (Some(notes), unanswered)
            }
        };
        queue.set_next_used(start);
        // Everything that was taken is answered or noted.
        queue.set_next_avail(start.wrapping_add(unanswered.len() as u16));
        Ok(Self {
            queue,
            memory,
            event_idx,
            in_flight: 0,
            untold: false,
            owed: start != 0,
            notes,
            unanswered,
        })
    }

    /// The next chain that the driver has made available.
    ///
    /// # Errors
    /// When the ring is broken.
    pub fn take(&mut self) -> Result<Option<DescriptorChain<&'static GuestRam>>, BrokenQueue> {
        let again = self.unanswered.pop_front();
        let chain = match (again, &self.notes) {
            (Some(head), Some(notes)) => notes.chain(&self.queue, head)?,
            _ => self.queue.iter(self.memory)?.next(),
        };
        let Some(chain) = chain else {
            return Ok(None);
        };
        if self.in_flight >= self.queue.size() {
            return Err(BrokenQueue::Overcommitted);
        }
        self.in_flight += 1;
        if let (None, Some(notes)) = (again, &mut self.notes) {
            notes.taken(chain.head_index());
        }
        Ok(Some(chain))
    }

    /// While we look at the ring anyway, the driver need not kick.
    ///
    /// # Errors
    /// When the ring is broken.
    pub fn disable_kicks(&mut self) -> Result<(), BrokenQueue> {
        Ok(self.queue.disable_notification(self.memory)?)
    }

    /// Has the processor fetch what the next [`LOOK_AHEAD`] chains begin with, all at once: the driver has just written it on another
    /// one, and taken one after the other each would be waited for. What makes no sense is left to [`Self::take`].
    pub fn look_ahead(&self) {
        let next = self.queue.next_avail();
        let Ok(available) = self.queue.avail_idx(self.memory, Ordering::Acquire) else {
            return;
        };
        let count = available.0.wrapping_sub(next).min(LOOK_AHEAD as u16);
        if count < 2 {
            return;
        }
        let mut headers = [0; LOOK_AHEAD];
        for (ahead, header) in (0..count).zip(&mut headers) {
            let entry = u64::from(next.wrapping_add(ahead) % self.queue.size());
            // The ring's entries of two bytes come after its flags and its index; descriptors have 16 bytes, their address first.
            let head: u16 = self.glance(self.queue.avail_ring() + 4 + 2 * entry);
            *header = self.glance(self.queue.desc_table() + 16 * u64::from(u16::from_le(head)));
        }
        let seen: u8 = headers[..usize::from(count)]
            .iter()
            .map(|header| self.glance::<u8>(u64::from_le(*header)))
            .fold(0, |all, byte| all ^ byte);
        std::hint::black_box(seen);
    }

    fn glance<T: AtomicAccess + Default>(&self, address: u64) -> T {
        self.memory
            .load(GuestAddress(address), Ordering::Relaxed)
            .unwrap_or_default()
    }

    /// Whether the driver has made something available that was not taken. So it is said of a broken ring: who takes learns why.
    pub fn has_more(&self) -> bool {
        let index = self.queue.avail_idx(self.memory, Ordering::Acquire);
        index.map_or(true, |index| index.0 != self.queue.next_avail())
    }

    /// Asks for kicks again. `true` when something was made available meanwhile: look again.
    ///
    /// # Errors
    /// When the ring is broken.
    pub fn enable_kicks(&mut self) -> Result<bool, BrokenQueue> {
        Ok(self.queue.enable_notification(self.memory)?)
    }

    /// Answers a chain: the status byte, then the used ring.
    ///
    /// # Errors
    /// When the ring is broken.
    pub fn answer(
        &mut self,
        head: u16,
        status_address: GuestAddress,
        status: u8,
        written_bytes: u32,
    ) -> Result<(), BrokenQueue> {
        self.memory
            .write_obj(status, status_address)
            .map_err(virtio_queue::Error::GuestMemory)?;
        self.give_back(head, written_bytes)
    }

    /// Puts a chain into the used ring, with the number of bytes that were written to it.
    ///
    /// # Errors
    /// When the ring is broken.
    pub fn give_back(&mut self, head: u16, written_bytes: u32) -> Result<(), BrokenQueue> {
        self.in_flight = self.in_flight.saturating_sub(1);
        if let Some(notes) = &mut self.notes {
            notes.answering(head, self.queue.next_used());
        }
        self.queue.add_used(self.memory, head, written_bytes)?;
        if let Some(notes) = &mut self.notes {
            notes.answered(head);
        }
        self.untold = true;
        Ok(())
    }

    /// Raises the interrupt, once for all answers since the last call, if the driver wants one. Returns whether it did.
    ///
    /// # Errors
    /// When the ring is broken.
    pub fn notify(&mut self, call: &CallFd) -> Result<bool, BrokenQueue> {
        let untold = std::mem::take(&mut self.untold);
        let owed = std::mem::take(&mut self.owed);
        let wanted = untold && self.driver_wants_interrupt()?;
        if !owed && !wanted {
            return Ok(false);
        }
        loop {
            match nix::unistd::write(call, &1u64.to_ne_bytes()) {
                Err(Errno::EINTR) => {}
                // EAGAIN: the counter is full, so the interrupt is pending already. Nothing else can happen.
                _ => return Ok(true),
            }
        }
    }

    fn driver_wants_interrupt(&mut self) -> Result<bool, BrokenQueue> {
        if self.event_idx {
            return Ok(self.queue.needs_notification(self.memory)?);
        }
        // The used index must be visible before the flag is read: the driver does it in the other order.
        fence(Ordering::SeqCst);
        let flags: u16 = self
            .memory
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}
