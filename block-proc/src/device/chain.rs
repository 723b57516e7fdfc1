//! Descriptor chains: the buffers of one request, checked to be RAM.

use crate::buffer::{MAX_SEGMENTS, Segments};
use ipc::memory::GuestRam;
use virtio_queue::DescriptorChain;
use vm_memory::GuestAddress;

/// Why a chain cannot even be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BrokenChain {
    /// The descriptors end in the middle: an index or a table outside its bounds, a loop, a nested indirect table.
    #[error("the descriptor chain does not end")]
    Unterminated,
    /// More descriptors than the largest queue has.
    #[error("the descriptor chain is longer than {MAX_SEGMENTS} descriptors")]
    TooLong,
    /// A buffer is not in RAM.
    #[error("a buffer lies outside RAM")]
    OutsideRam,
    /// A driver's buffer follows a device's.
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// Less than a header.
    #[error("the request header is too short")]
    NoHeader,
    /// No device-writable byte.
    #[error("there is no room for the status")]
    NoStatus,
    /// The same, where the answer is not a status.
    #[error("there is no room for random bytes")]
    NoRoom,
}

/// The buffers of a chain.
#[derive(Debug)]
pub struct Chain {
    /// Its first descriptor: its name in the used ring.
    pub head: u16,
    /// What the driver has written.
    pub readable: Segments,
    /// What the device is to write.
    pub writable: Segments,
    /// The last writable descriptor that is not empty: address and length.
    pub last: Option<(GuestAddress, u32)>,
}

impl Chain {
    /// Reads a chain to its end.
    ///
    /// # Errors
    /// When it is broken: the device must stop.
    pub fn read(memory: &'static GuestRam, mut chain: DescriptorChain<&'static GuestRam>) -> Result<Self, BrokenChain> {
        let mut whole = Self {
            head: chain.head_index(),
            readable: Segments::default(),
            writable: Segments::default(),
            last: None,
        };
        let mut writable_started = false;
        let mut ended = false;
        let mut count = 0;
        // virtio-queue ends the iteration without a word when it meets an error: then the last descriptor had a successor.
        for descriptor in chain.by_ref() {
            count += 1;
            if count > MAX_SEGMENTS {
                return Err(BrokenChain::TooLong);
            }
            ended = !descriptor.has_next();
            let (address, bytes) = (descriptor.addr(), descriptor.len());
            let segments = if descriptor.is_write_only() {
                writable_started = true;
                if bytes > 0 {
                    whole.last = Some((address, bytes));
                }
                &mut whole.writable
            } else {
                if writable_started {
                    return Err(BrokenChain::Order);
                }
                &mut whole.readable
            };
            if !segments.push_guest(memory, address, bytes as usize) {
                return Err(BrokenChain::OutsideRam);
            }
        }
        if ended {
            Ok(whole)
        } else {
            Err(BrokenChain::Unterminated)
        }
    }
}
