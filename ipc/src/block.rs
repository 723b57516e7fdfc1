//! Supervisor ↔ block-proc.
//!
//! Order: [`BlockRequest::Setup`], [`BlockRequest::AddDevice`] and [`BlockRequest::AddQueues`] for every device,
//! [`BlockRequest::Seal`]. Only after the supervisor has verified the seal come disks and sources of random bytes.

use crate::block_job::{JobEvent, JobNumber, JobProgress};
use crate::caps::{FaultDeviceFd, FenceFd, GuestMemRw, InflightFd, NbdSocketFd, RngSourceFd, SeccompListener};
use crate::graph::{GraphReply, GraphRequest, NodeId};
use crate::live::MemoryWatch;
use crate::message::{FromHelper, Message, Request};
use crate::nbd::NbdClient;
use crate::virtio::{Activation, ActivationNumber, DeviceIdentity, DeviceIndex, DeviceKind, IoThreadIndex, QueueFds};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// To block-proc.
pub type ToBlock = Request<BlockRequest>;
/// From block-proc.
pub type FromBlock = FromHelper<BlockReply, BlockEvent>;

impl Message for ToBlock {
    const KIND: u16 = 0x20;
}
impl Message for FromBlock {
    const KIND: u16 = 0x21;
    /// Reports of many images, each with its snapshots and bitmaps.
    const MAX_BYTES: usize = 16 << 20;
}

/// Which system interface does the I/O (`aio=`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EngineChoice {
    /// io_uring where the host has it, otherwise threads.
    Auto,
    /// A sealed io_uring; an error where the host forbids it.
    IoUring,
    /// A fixed pool of threads with preadv2/pwritev2.
    Threads,
}

/// What block-proc maps and creates before it seals.
#[derive(Debug, Serialize, Deserialize)]
pub struct BlockSetup {
    /// Guest RAM.
    pub memory: GuestMemRw,
    /// Size of guest RAM.
    pub ram_bytes: u64,
    /// The I/O engine of every thread.
    pub engine: EngineChoice,
    /// How many threads there are beside the main one, for iothread objects. Their name in /proc is
    /// [`io_thread_name`].
    pub io_threads: u8,
    /// The record of requests under way.
    pub inflight: InflightFd,
    /// Its size, bytes: for all disks that will be added.
    pub inflight_bytes: u64,
    /// Held, by the process and by what the kernel does for it, and never used.
    pub fence: FenceFd,
}

/// The name in /proc of the thread that serves virtqueues.
pub fn io_thread_name(thread: IoThreadIndex) -> String {
    match thread {
        IoThreadIndex::MAIN => "block-io".to_owned(),
        IoThreadIndex(number) => format!("iothread-{number}"),
    }
}

/// How a thread looks for work before it sleeps, by the names of an iothread's properties.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Polling {
    /// `poll-max-ns`: longest time, nanoseconds; 0: it sleeps at once.
    pub max_ns: u64,
    /// `poll-grow`: by what the time is multiplied when it was too short; 0 means 2.
    pub grow: u64,
    /// `poll-shrink`: by what it is divided when it was too long; 0: it goes to nothing.
    pub shrink: u64,
    /// `aio-max-batch`: most requests that are collected before the system is told of them; 0: the engine's own bound.
    pub max_batch: u64,
}

/// What a virtio-rng device gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngLimit {
    /// Most bytes in a period.
    pub max_bytes: u64,
    /// The period, milliseconds: not 0.
    pub period_ms: u32,
}

/// How an image holds a disk (`format=`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageFormat {
    /// Byte for byte.
    Raw,
    /// QEMU's copy-on-write format. Only block-proc reads it.
    Qcow2,
}

/// What a disk is, read by the supervisor when it opened it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Its format.
    pub format: ImageFormat,
    /// Length of the file or device, bytes. Of a raw image that is the capacity; the tail beyond the last full 512-byte sector is not visible to the guest.
    pub bytes: u64,
    /// Block device instead of a regular file.
    pub is_block_device: bool,
    /// The guest may only read. The fd is read-only as well.
    pub read_only: bool,
    /// Discard reaches the host (`discard=unmap`); otherwise it is accepted and ignored.
    pub discard: bool,
    /// Opened with O_DIRECT (`cache=none`, `cache.direct=on`).
    pub direct: bool,
    /// Flush requests are not passed to the host (`cache=unsafe`).
    pub no_flush: bool,
    /// The guest sees a volatile write cache (and so sends flushes). Off (`cache=writethrough`): every write is durable
    /// before it completes.
    pub write_cache: bool,
    /// Answer to VIRTIO_BLK_T_GET_ID: at most 20 bytes.
    pub serial: String,
    /// Logical block size shown to the guest, bytes: 512 or 4096.
    pub logical_block_bytes: u32,
}

/// What the supervisor asks of block-proc.
#[derive(Debug, Serialize, Deserialize)]
pub enum BlockRequest {
    /// Maps guest RAM and creates the engine. Answer: `Done`.
    Setup(BlockSetup),
    /// Makes a userfaultfd of this process, for a live dump. Only sealed, and with all disks paused. Answer:
    /// `MemoryWatched`.
    WatchMemory {
        /// What it is made with.
        device: FaultDeviceFd,
    },
    /// A virtio device. Answer: `Done`.
    AddDevice {
        /// Its number.
        device: DeviceIndex,
        /// What it is.
        kind: DeviceKind,
        /// Who serves it.
        thread: IoThreadIndex,
        /// How many virtqueues.
        queues: u16,
        /// Largest size of each.
        queue_size: u16,
    },
    /// The eventfds of the next queues of a device, in queue order. Answer: `Done`.
    AddQueues {
        /// The device.
        device: DeviceIndex,
        /// The next queues' fds.
        queues: Vec<QueueFds>,
    },
    /// Starts all threads, loads the sealed filter on all. Answer: `Sealed`.
    Seal,
    /// Nodes, and what is behind disk devices. Answer: `Graph`.
    Graph(GraphRequest),
    /// A client has connected to the NBD server. Answer: `Done`, at once; its end is told by [`BlockEvent::NbdClientGone`].
    ServeNbd {
        /// Its number.
        client: NbdClient,
        /// The connection.
        socket: NbdSocketFd,
        /// How long it may take to choose an export, seconds; 0: as long as it likes.
        handshake_s: u32,
    },
    /// Hangs up on all NBD clients. Answer: `Done`, at once.
    DropNbdClients,
    /// Puts a source of random bytes behind a virtio-rng device. Answer: `RngAttached`.
    AttachRng {
        /// The device.
        device: DeviceIndex,
        /// The open source. It may block: it has a thread to itself where reading takes one.
        source: RngSourceFd,
        /// How much the guest gets.
        limit: RngLimit,
    },
    /// How a thread polls. Answer: `Done`.
    SetPolling {
        /// The thread.
        thread: IoThreadIndex,
        /// How.
        polling: Polling,
    },
    /// The driver is ready: serve these queues, beginning with a scan that waits for no kick. Answer: `Done`, or a
    /// failure when the driver's addresses are not in RAM. Under a number for which requests are recorded those are done
    /// again first, in the order in which they were taken. Under the number that the device is active with: `Done`.
    Activate {
        /// The device.
        device: DeviceIndex,
        /// Another one for each time that a driver gets ready.
        number: ActivationNumber,
        /// What the driver programmed.
        activation: Activation,
    },
    /// Stop serving the device. Answer: `Done`, when no request is in flight and none will be taken.
    Reset {
        /// The device.
        device: DeviceIndex,
    },
    /// Take no more requests from any queue. Answer: `Done`, when none is in flight and what the guest had written is
    /// flushed to its files (QEMU does the same when a machine stops).
    Pause,
    /// Take requests again, beginning with a scan of every queue. Answer: `Done`.
    Resume,
    /// Counters. Answer: `Stats`.
    GetStats,
}

/// What block-proc answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum BlockReply {
    /// It is so now.
    Done,
    /// All threads run under the sealed filter.
    Sealed {
        /// Told of every call that the filter does not allow.
        listener: SeccompListener,
        /// Where its program is loaded ([`crate::helper::load_address`]).
        load_address: u64,
        /// What `Auto` became: never `Auto`.
        engine: EngineChoice,
    },
    /// See [`GraphRequest`].
    Graph(GraphReply),
    /// What the device's driver will see.
    RngAttached(DeviceIdentity),
    /// One entry per disk.
    Stats(BTreeMap<DeviceIndex, DeviceStats>),
    /// Who writes guest RAM here can be held back by it.
    MemoryWatched(MemoryWatch),
}

/// Kinds of requests that are counted apart. A write of zeroes is a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names say it")]
pub enum IoKind {
    Read,
    Write,
    Flush,
    /// Discard.
    Unmap,
}

/// Counters of one device since it was attached. Requests are never merged.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct DeviceStats {
    pub read: IoStats,
    pub write: IoStats,
    pub flush: IoStats,
    pub unmap: IoStats,
    /// How long ago the last request ended, nanoseconds.
    pub idle_ns: Option<u64>,
}

/// Counters of one kind of requests.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoStats {
    /// Requests that ended well.
    pub operations: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that could not be: refused before anything was done.
    pub invalid: u64,
    /// How long all but the latter took together, nanoseconds.
    pub total_ns: u64,
    /// How many took how long, where that is asked for.
    pub histogram: Option<LatencyHistogram>,
}

/// How many requests took how long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatencyHistogram {
    /// Where a bin ends and the next begins, nanoseconds, rising.
    pub boundaries_ns: Vec<u64>,
    /// One more than boundaries.
    pub bins: Vec<u64>,
}

/// What became of a request that the host failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorAction {
    /// The guest was told.
    Report,
    /// The guest was told that all is well.
    Ignore,
    /// It is kept, and tried again with the next `Resume`. The supervisor stops the machine.
    Stop,
}

/// What block-proc reports by itself.
#[derive(Debug, Serialize, Deserialize)]
pub enum BlockEvent {
    /// A driver's ring is broken; the device serves nothing until it is reset.
    DeviceBroken {
        /// The device.
        device: DeviceIndex,
        /// One line: which queue and what is wrong with it.
        detail: String,
    },
    /// The host's file system or device failed a request. What is not kept is told once a second at most.
    IoError {
        /// The device.
        device: DeviceIndex,
        /// Its node.
        node: Option<NodeId>,
        /// What it was.
        kind: IoKind,
        /// What became of it.
        action: ErrorAction,
        /// The system's error number.
        errno: i32,
    },
    /// A write has passed a node's threshold, which is none any more.
    WriteThreshold {
        /// The node.
        node: NodeId,
        /// How far beyond it the write reached, bytes.
        excess_bytes: u64,
        /// Where it was, bytes.
        threshold_bytes: u64,
    },
    /// An NBD client has hung up, or was hung up on.
    NbdClientGone(NbdClient),
    /// A node has lost its NBD server: another connection is wanted.
    NbdLost {
        /// The node.
        node: NodeId,
    },
    /// A job has something to tell.
    Job {
        /// The job.
        job: JobNumber,
        /// How far it is.
        progress: JobProgress,
        /// What it tells.
        what: JobEvent,
    },
    /// A source of random bytes has none at the moment. It is asked again later.
    RngDry {
        /// The device.
        device: DeviceIndex,
        /// The system's error number; 0: the source is at its end.
        errno: i32,
    },
}
