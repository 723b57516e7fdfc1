//! The driver's side of a split virtqueue.
//!
//! Every request has a slot; slot `n` owns the descriptors from `n * stride` on, so nothing has to be searched and a
//! completion's head names its slot.

use crate::alloc;
use crate::region::Region;
use core::sync::atomic::{Ordering, fence};

/// Descriptor flags.
pub mod flag {
    /// `next` is valid.
    pub const NEXT: u16 = 1;
    /// The device writes here.
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;
}

/// Most buffers of one request without an indirect table.
pub const DIRECT_BUFFERS: u16 = 8;
/// Most buffers of one request in an indirect table.
pub const INDIRECT_BUFFERS: usize = 32;
/// Most slots that a queue uses.
pub const MAX_SLOTS: usize = 256;

/// The ring features that were agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
    /// VIRTIO_F_EVENT_IDX.
    pub event_index: bool,
}

/// One buffer of a request.
#[derive(Clone, Copy)]
pub struct Buffer {
    /// Where.
    pub memory: Region,
    /// Whether the device writes it.
    pub device_writes: bool,
}

/// A request that the device has finished.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// Which.
    pub slot: u16,
    /// How many bytes it says it has written.
    pub written: u32,
}

/// A virtqueue.
pub struct Queue {
    /// Its number.
    pub index: u16,
    /// The machine's vector for its interrupts.
    pub vector: u8,
    /// Descriptor table.
    pub descriptors: Region,
    /// Avail ring.
    pub avail: Region,
    /// Used ring.
    pub used: Region,
    size: u16,
    features: Features,
    doorbell: Region,
    stride: u16,
    tables: Option<Region>,
    next_avail: u16,
    announced: u16,
    next_used: u16,
    interrupts: bool,
    free: [u16; MAX_SLOTS],
    free_count: usize,
    /// How often the device was notified.
    pub kicks: u64,
}

impl Queue {
    /// Allocates the rings. The doorbell takes the queue's number: two bytes by PCI, four by memory-mapped registers.
    pub fn new(index: u16, size: u16, features: Features, doorbell: Region, vector: u8) -> Self {
        let entries = u64::from(size);
        let stride = if features.indirect { 1 } else { DIRECT_BUFFERS };
        let slots = usize::from(size / stride).clamp(1, MAX_SLOTS);
        let tables = features
            .indirect
            .then(|| alloc::pages(16 * (INDIRECT_BUFFERS * slots) as u64));
        let mut free = [0; MAX_SLOTS];
        for (slot, place) in free.iter_mut().enumerate() {
            *place = (slots.saturating_sub(1 + slot)) as u16;
        }
        Self {
            index,
            vector,
            descriptors: alloc::pages(16 * entries),
            avail: alloc::pages(6 + 2 * entries),
            used: alloc::pages(6 + 8 * entries),
            size,
            features,
            doorbell,
            stride,
            tables,
            next_avail: 0,
            announced: 0,
            next_used: 0,
            interrupts: false,
            free,
            free_count: slots,
            kicks: 0,
        }
    }

    /// How many requests fit at once.
    pub fn slots(&self) -> usize {
        usize::from(self.size / self.stride).clamp(1, MAX_SLOTS)
    }

    /// A slot that no request uses.
    pub fn take_slot(&mut self) -> Option<u16> {
        self.free_count = self.free_count.checked_sub(1)?;
        Some(self.free[self.free_count])
    }

    /// How many slots are free.
    pub fn free_slots(&self) -> usize {
        self.free_count
    }

    /// Puts a request into the ring; the device sees it, but is not notified.
    pub fn submit(&mut self, slot: u16, buffers: &[Buffer]) {
        assert!(!buffers.is_empty());
        let head = slot * self.stride;
        match self.tables {
            Some(tables) => {
                assert!(buffers.len() <= INDIRECT_BUFFERS);
                let bytes = 16 * INDIRECT_BUFFERS as u64;
                let table = tables.part(bytes * u64::from(slot), bytes);
                chain(table, 0, buffers);
                let place = 16 * u64::from(head);
                self.descriptors.write(place, table.address());
                self.descriptors
                    .write(place + 8, (16 * buffers.len() as u64) | u64::from(flag::INDIRECT) << 32);
            }
            None => {
                assert!(
                    buffers.len() <= usize::from(self.stride),
                    "too many buffers without an indirect table"
                );
                chain(self.descriptors, head, buffers);
            }
        }
        self.publish(head);
    }

    /// Puts a descriptor index into the ring, whatever it is.
    pub fn publish(&mut self, head: u16) {
        let place = 4 + 2 * u64::from(self.next_avail % self.size);
        self.avail.write(place, head);
        self.next_avail = self.next_avail.wrapping_add(1);
        fence(Ordering::SeqCst);
        self.avail.write(2, self.next_avail);
    }

    /// Notifies the device, unless it does not want to be.
    pub fn kick(&mut self) {
        fence(Ordering::SeqCst);
        let (old, new) = (self.announced, self.next_avail);
        if old == new {
            return;
        }
        self.announced = new;
        let wanted = if self.features.event_index {
            let event: u16 = self.used.read(4 + 8 * u64::from(self.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.used.read::<u16>(0) & 1 == 0
        };
        if wanted {
            self.ring_doorbell();
        }
    }

    /// Notifies the device.
    pub fn ring_doorbell(&mut self) {
        self.kicks += 1;
        match self.doorbell.bytes() {
            2 => self.doorbell.write(0, self.index),
            _ => self.doorbell.write(0, u32::from(self.index)),
        }
    }

    /// The next finished request. Its slot is free again.
    pub fn complete(&mut self) -> Option<Completion> {
        if self.used.read::<u16>(2) == self.next_used {
            return None;
        }
        fence(Ordering::SeqCst);
        let entry: u64 = {
            let place = 4 + 8 * u64::from(self.next_used % self.size);
            u64::from(self.used.read::<u32>(place)) | u64::from(self.used.read::<u32>(place + 4)) << 32
        };
        self.next_used = self.next_used.wrapping_add(1);
        let slot = entry as u32 as u16 / self.stride;
        assert!(
            (entry as u32) < u32::from(self.size) && usize::from(slot) < self.slots() && self.free_count < self.slots(),
            "used ring of queue {} names head {}",
            self.index,
            entry as u32
        );
        self.free[self.free_count] = slot;
        self.free_count += 1;
        Some(Completion {
            slot,
            written: (entry >> 32) as u32,
        })
    }

    /// Asks for an interrupt at the next completion. What is complete by now may not cause one: look after it.
    pub fn arm_interrupt(&mut self) {
        self.interrupts = true;
        if self.features.event_index {
            self.avail.write(4 + 2 * u64::from(self.size), self.next_used);
        } else {
            self.avail.write(0, 0_u16);
        }
        fence(Ordering::SeqCst);
    }

    /// Asks for no interrupts.
    pub fn disarm_interrupt(&mut self) {
        self.interrupts = false;
        if self.features.event_index {
            // As far away as the counter allows; completions in between would have to be 32768 to reach it.
            self.avail
                .write(4 + 2 * u64::from(self.size), self.next_used.wrapping_sub(1));
        } else {
            self.avail.write(0, 1_u16);
        }
        fence(Ordering::SeqCst);
    }
}

/// Writes a chain of descriptors into a table.
pub fn chain(table: Region, first: u16, buffers: &[Buffer]) {
    for (number, buffer) in (0..).zip(buffers) {
        let last = usize::from(number) + 1 == buffers.len();
        let flags = if buffer.device_writes { flag::WRITE } else { 0 } | if last { 0 } else { flag::NEXT };
        let next = if last { 0 } else { first + number + 1 };
        write_descriptor(
            table,
            first + number,
            buffer.memory.address(),
            buffer.memory.bytes() as u32,
            flags,
            next,
        );
    }
}

/// Writes one descriptor, whatever it says.
pub fn write_descriptor(table: Region, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
    let place = 16 * u64::from(index);
    table.write(place, address);
    table.write(
        place + 8,
        u64::from(bytes) | u64::from(flags) << 32 | u64::from(next) << 48,
    );
}
