//! The messages between Bulkhead's processes, and the only way they travel.
//!
//! The topology is a star: every helper has exactly one channel, to the supervisor. A channel is a
//! `SOCK_SEQPACKET` socket pair; one packet is a [`frame`] header and a bincode body ([`codec`]), at most 64 KiB and
//! [`frame::MAX_FDS`] file descriptors. Messages larger than a packet are chunked by [`channel`] up to the limit that
//! their type declares.
//!
//! Messages are closed enums, one module per role ([`vcpu`], [`block`], [`dump`], [`qmp`], [`opener`]): `ToX` is what the
//! supervisor may say to X, `FromX` what X may say to the supervisor. A file descriptor inside a message is a typed,
//! non-`Clone` capability ([`caps`]); which capability may travel where is therefore written in the message types.
//!
//! Rules that every channel keeps:
//! - Every request carries a [`message::RequestId`] and gets exactly one reply.
//! - Lengths are checked before anything is allocated; a truncated packet, an unknown kind, surplus or missing fds are
//!   errors after which the peer is treated as crashed.
//! - Message types are not recursive and hold no sequences of zero-sized items.
//!
//! What a crash of a peer means is the supervisor's business; here it is [`IpcError::Closed`].

pub mod action;
pub mod bitmap;
pub mod block;
pub mod block_info;
pub mod block_job;
pub mod blockdev;
pub mod caps;
pub mod channel;
pub mod chardev;
mod codec;
pub mod cpu;
pub mod device;
pub mod dump;
pub mod frame;
pub mod graph;
pub mod helper;
pub mod human;
pub mod image_create;
pub mod inflight;
pub mod info;
pub mod job;
pub mod launch;
pub mod live;
pub mod memory;
pub mod message;
pub mod narrowing;
pub mod nbd;
pub mod objects;
pub mod opener;
pub mod paging;
pub mod qmp;
#[cfg(feature = "kvm-registers")]
pub mod registers;
pub mod role;
pub mod secret;
pub mod snapshot;
pub mod thread_queue;
pub mod throttling;
pub mod vcpu;
pub mod virtio;
pub mod wire_order;

pub use channel::Channel;
pub use message::{Failure, FromHelper, Message, Request, RequestId};
pub use role::Role;

/// What can go wrong on a channel. All but [`IpcError::WouldBlock`] end the peer.
#[derive(Debug, thiserror::Error)]
pub enum IpcError {
    /// The peer closed its end (or died).
    #[error("the channel is closed by its peer")]
    Closed,
    /// A non-blocking channel has no packet to read, or its send queue is full.
    #[error("the channel would block")]
    WouldBlock,
    /// The queue of a slow peer is longer than its bound.
    #[error("the peer does not read: {queued} messages are queued (limit {limit})")]
    Overflow {
        /// Messages waiting to be sent.
        queued: usize,
        /// The most that may wait.
        limit: usize,
    },
    /// The packet is not a well-formed frame.
    #[error("malformed frame: {0}")]
    Frame(&'static str),
    /// The body is not a well-formed message of the expected type.
    #[error("malformed message: {0}")]
    Codec(String),
    /// The message is larger than its type allows.
    #[error("message of {size} bytes is larger than its limit of {limit}")]
    TooLarge {
        /// Encoded size in bytes.
        size: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// A message's fds are not those that its type calls for.
    #[error("message carries {got} file descriptors, {wanted} are used")]
    Fds {
        /// How many arrived.
        got: usize,
        /// How many the body refers to.
        wanted: usize,
    },
    /// The system call failed.
    #[error("{call}: {errno}")]
    System {
        /// Name of the system call.
        call: &'static str,
        /// Its error.
        errno: nix::errno::Errno,
    },
}

impl IpcError {
    /// For `map_err` on a nix call.
    pub fn system(call: &'static str) -> impl Fn(nix::errno::Errno) -> Self {
        move |errno| Self::System { call, errno }
    }
}
