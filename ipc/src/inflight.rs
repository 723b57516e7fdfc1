//! The record of requests under way: shared memory that outlives block-proc, so that the next one can do again what the
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

/// What the first eight bytes say.
pub const VERSION: u64 = 1;
/// Bytes before the first queue's.
pub const HEADER_BYTES: u64 = 8;
/// Bytes of a queue before its heads'.
pub const QUEUE_HEADER_BYTES: u64 = 16;
/// Size of the memory is a multiple of this.
const PAGE_BYTES: u64 = 4096;

/// Bytes of a queue of so many descriptors.
pub fn queue_bytes(queue_size: u16) -> u64 {
    QUEUE_HEADER_BYTES + 8 * u64::from(queue_size)
}

/// Bytes of all, for disks with so many queues of so many descriptors each.
pub fn total_bytes(disks: impl IntoIterator<Item = (u16, u16)>) -> u64 {
    let queues = disks
        .into_iter()
        .map(|(queues, size)| u64::from(queues) * queue_bytes(size));
    (HEADER_BYTES + queues.sum::<u64>()).next_multiple_of(PAGE_BYTES)
}
