//! The record of requests under way, and of what they have changed: shared memory that outlives block-proc, so that the next one can do again what the
//! last one had taken from the guest and not answered.
//!
//! The supervisor makes it and hands it to every block-proc in turn; it never looks at it. What a compromised block-proc
//! writes there reaches its successor, which therefore believes none of it: at worst its own guest's requests are done
//! again, or are not.
//!
//! **Layout**, little endian, in the order in which the disks are added ([`crate::block::BlockRequest::AddDevice`]): the
//! version, then for each virtqueue of each disk
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | number of the activation that the rest is about ([`crate::virtio::ActivationNumber`]); 0: none |
//! | 8 | 8 | the answer that is being given: 0, or bit 32 with the head in bits 16 to 31 and the used index before it in bits 0 to 15 |
//! | 16 | 8 × queue size | for each head: 0, or a number that says how early its request was taken |
//!
//! **Order.** A request is noted when it has been taken from the avail ring. An answer is noted, then given, then the
//! request struck out, then the answer. So whoever comes later finds each request either noted or answered: how many were
//! taken is the used index and the number of noted ones, and an answer that is still noted was given if the used index has
//! moved on.
//!
//! **The ledger** is the last [`LEDGER_BYTES`]. An answered write of the guest to a qcow2 image has its data in the image, but
//! the table entry that says where is in block-proc's memory until a flush. So each entry that changes is noted, until it is
//! in the image: the next block-proc changes it again. The ledger has chunks of [`CHUNK_BYTES`], each of one image:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | whose: the number of the image's node ([`crate::graph::NodeId`]) and 1; 0: the chunk is free |
//! | 8 | 8 | the chunks of an image come in the order of these |
//! | 16 | 8 | how many entries it has |
//! | 24 | 24 × entries | offset on the guest's disk, and the two halves of the L2 entry (0 where there is no second) |
//!
//! A chunk is claimed by its first eight bytes, last; an entry counts when the number of entries says so.

/// What the first eight bytes say.
pub const VERSION: u64 = 2;
/// Bytes before the first queue's.
pub const HEADER_BYTES: u64 = 8;
/// Bytes of a queue before its heads'.
pub const QUEUE_HEADER_BYTES: u64 = 16;
/// Size of the memory is a multiple of this.
const PAGE_BYTES: u64 = 4096;
/// Bytes of the ledger. What is never used of it takes no memory.
pub const LEDGER_BYTES: u64 = 1 << 20;
/// Bytes of one of its chunks.
pub const CHUNK_BYTES: u64 = PAGE_BYTES;
/// Bytes of a chunk before its entries.
pub const CHUNK_HEADER_BYTES: u64 = 24;
/// Bytes of an entry.
pub const NOTE_BYTES: u64 = 24;

/// Bytes of a queue of so many descriptors.
pub fn queue_bytes(queue_size: u16) -> u64 {
    QUEUE_HEADER_BYTES + 8 * u64::from(queue_size)
}

/// Bytes of all, for disks with so many queues of so many descriptors each.
pub fn total_bytes(disks: impl IntoIterator<Item = (u16, u16)>) -> u64 {
    let queues = disks
        .into_iter()
        .map(|(queues, size)| u64::from(queues) * queue_bytes(size));
    (HEADER_BYTES + queues.sum::<u64>()).next_multiple_of(PAGE_BYTES) + LEDGER_BYTES
}
