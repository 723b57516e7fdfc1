//! The block graph, as the supervisor and block-proc speak of it.
//!
//! **Who knows what.** The supervisor has the *description*: names, options, edges, users, permissions, which file is open
//! under which path. block-proc has the *nodes* themselves: drivers over open files. The supervisor decides what a client
//! may do and block-proc does it; what images contain is parsed by block-proc alone and comes back as data.
//!
//! **How a graph is built.** From the bottom: first the file nodes, each with its open file, then the formats and filters
//! over them. Whether an image has a backing or a data file only its header knows: [`Backing::FromImage`] asks, the answer
//! [`GraphReply::BackingNamed`] creates nothing, and the supervisor asks again with what it has decided and opened.
//!
//! **How it is changed.** [`GraphRequest::Change`] replaces edges, all or none, while no request is in flight in the
//! thread. Everything that can fail (opening, creating, formatting) was done before, on nodes that nobody uses yet.
//!
//! **Threads.** A node lives in one thread, its children in the same one, and a device uses a node of its own thread. A node
//! that nobody uses is moved by creating it anew in the other thread and removing the old one.

use crate::block::{DiskInfo, IoKind};
use crate::block_job::{BitmapNumber, BitmapReport, JobControl, JobNumber, JobProgress, Switch};
use crate::caps::{DiskFd, NbdSocketFd};
use crate::nbd::{ExportNumber, ExportSpec};
use crate::secret::{Secret, Seed};
use crate::virtio::{DeviceIdentity, DeviceIndex, IoThreadIndex};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Number of a node: given by the supervisor, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub u32);

/// Number of a throttle group: given by the supervisor, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GroupId(pub u32);

/// Longest chain of images below one another.
pub const MAX_CHAIN: usize = 200;

/// Which edge of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ChildRole {
    /// `file`: what holds the image, or what a filter filters.
    File,
    /// `backing`: what unallocated clusters read as.
    Backing,
    /// `data-file`: where an image with an external data file has its data.
    DataFile,
    /// `target`: where copy-before-write puts what was there.
    Target,
}

/// What is below an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// What its header says: the answer is `BackingNamed` if that is anything.
    FromImage,
    /// Nothing, whatever its header says.
    None,
    /// This node.
    Node(NodeId),
}

/// How the space of a new or grown image is provided (`preallocation=`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Preallocation {
    /// Not before it is written.
    #[default]
    Off,
    /// Tables only.
    Metadata,
    /// Space is reserved by the file system.
    Falloc,
    /// Zeroes are written.
    Full,
}

/// qcow2.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Qcow2Spec {
    /// The image.
    pub file: NodeId,
    /// What is below.
    pub backing: Backing,
    /// External data file, where the image has one.
    pub data_file: Option<NodeId>,
    /// Nothing is written to it.
    pub read_only: bool,
    /// Discarded clusters are given back (`discard=unmap`).
    pub discard: bool,
    /// `lazy-refcounts=`: as the image says when absent.
    pub lazy_refcounts: Option<bool>,
    /// `l2-cache-size=`, bytes; the driver's default when absent.
    pub l2_cache_bytes: Option<u64>,
    /// `refcount-cache-size=`, bytes; the driver's default when absent.
    pub refcount_cache_bytes: Option<u64>,
    /// The password (`encrypt.key-secret=`). An encrypted image does not open without one: the failure's error number is
    /// ENOKEY. A wrong one is EKEYREJECTED.
    pub key: Option<Secret>,
    /// An encrypted image opens without a password as well: what it says of itself is there, and none of its data.
    pub may_be_locked: bool,
}

/// luks: an encrypted disk behind its header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LuksSpec {
    /// The image.
    pub file: NodeId,
    /// Nothing is written to it.
    pub read_only: bool,
    /// The password (`key-secret=`); failures as with [`Qcow2Spec::key`].
    pub key: Option<Secret>,
}

/// nbd: an export of another program's.
#[derive(Debug, Serialize, Deserialize)]
pub struct NbdSpec {
    /// A connection to the server, on which nothing has been said.
    pub socket: NbdSocketFd,
    /// The export's name.
    pub export: String,
    /// How long requests wait for another connection (`reconnect-delay`), seconds.
    pub reconnect_delay_s: u32,
    /// Nothing is written to it.
    pub read_only: bool,
    /// An export that cannot be written is read ([`NbdDetails::read_only`] says so).
    pub auto_read_only: bool,
    /// Discards reach the server.
    pub discard: bool,
}

/// An error that blkdebug injects (`inject-error`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InjectedError {
    /// Driver event after which it applies (QEMU's name, `l2_update`…); absent: to every request.
    pub event: Option<String>,
    /// blkdebug's state in which it applies; absent: in any.
    pub state: Option<u32>,
    /// Kinds of requests; empty: all of them.
    pub iotypes: Vec<IoType>,
    /// The error number.
    pub errno: i32,
    /// Offset of the request that fails, bytes; absent: any.
    pub offset: Option<u64>,
    /// Only the first such request fails.
    pub once: bool,
    /// It fails without yielding.
    pub immediately: bool,
}

/// A change of blkdebug's state (`set-state`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetState {
    /// The driver event that makes it.
    pub event: String,
    /// From this state; absent: from any.
    pub state: Option<u32>,
    /// To this one.
    pub new_state: u32,
}

/// Kinds of requests, as blkdebug names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names say it")]
pub enum IoType {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    BlockStatus,
}

/// blkdebug.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkdebugSpec {
    /// What it filters.
    pub file: NodeId,
    /// `inject-error`.
    pub inject_errors: Vec<InjectedError>,
    /// `set-state`.
    pub set_states: Vec<SetState>,
    /// `align`: requests that are not on multiples are taken apart; absent: 1.
    pub align: Option<u32>,
}

/// The drivers, each with its options and children.
#[derive(Debug, Serialize, Deserialize)]
pub enum NodeSpec {
    /// `file` and `host_device`: an open file. `info` says what it is; its `format` means nothing here.
    File {
        /// The open file.
        disk: DiskFd,
        /// What it is.
        info: DiskInfo,
    },
    /// `raw`: a part of its child.
    Raw {
        /// The child.
        file: NodeId,
        /// Where the part begins, bytes.
        offset: u64,
        /// How long it is, bytes; absent: to the child's end, wherever that is.
        bytes: Option<u64>,
        /// Nothing is written to it.
        read_only: bool,
    },
    /// `qcow2`.
    Qcow2(Qcow2Spec),
    /// `luks`.
    Luks(LuksSpec),
    /// `nbd`.
    Nbd(NbdSpec),
    /// `null-co` and `null-aio`: reads yield zeroes or nothing, writes vanish.
    Null {
        /// Its size, bytes.
        bytes: u64,
        /// How long a request takes, nanoseconds.
        latency_ns: u64,
        /// Reads fill the buffer with zeroes; otherwise they leave what is there.
        read_zeroes: bool,
    },
    /// `throttle`.
    Throttle {
        /// What it filters.
        file: NodeId,
        /// Whose limits it obeys.
        group: GroupId,
    },
    /// `copy-on-read`: what is read from below `file`'s own layer is written to `file`.
    CopyOnRead {
        /// What it filters.
        file: NodeId,
        /// Only its job copies; what the guest reads is left where it is.
        for_job: bool,
    },
    /// `blkdebug`.
    Blkdebug(BlkdebugSpec),
    /// A filter that only passes on (`commit_top`): it stands for a job's claim on what is below.
    Pass {
        /// What it filters.
        file: NodeId,
    },
    /// `mirror_top`: tells a mirror of what is written. Without one it only passes on.
    MirrorTop {
        /// The source.
        file: NodeId,
    },
    /// `copy-before-write`: what is to be overwritten is copied to the target first, as far as its job or its bitmap wants it.
    CopyBeforeWrite(CopyBeforeWriteSpec),
    /// `snapshot-access`: what its child, a `CopyBeforeWrite` node, had when that began. Nothing is written to it.
    SnapshotAccess {
        /// The filter.
        file: NodeId,
    },
}

/// copy-before-write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyBeforeWriteSpec {
    /// What it filters.
    pub file: NodeId,
    /// Where old contents go.
    pub target: NodeId,
    /// Bytes that are copied together, a power of two: at least the target's cluster size, otherwise what is around them
    /// would be lost.
    pub cluster_bytes: u32,
    /// It waits for its job, which says what is to be copied ([`crate::block_job::JobWork::Backup`]). Otherwise it begins
    /// with the change that puts it in its place.
    pub for_job: bool,
    /// Copies only what is dirty in this bitmap when it begins.
    pub bitmap: Option<BitmapNumber>,
    /// A copy that fails spoils the snapshot (`break-snapshot`); otherwise the guest's write fails (`break-guest-write`).
    pub break_snapshot: bool,
    /// Seconds after which a copy is given up; 0: never.
    pub timeout_s: u32,
}

/// Limits of a throttle group; 0 is none. `_max` is the burst, `_max_length` its length in seconds (at least 1).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Sustained rate, bytes or requests a second; 0: no limit.
    pub average: u64,
    /// Rate in a burst; 0: no bursts beyond what QEMU allows by itself (a tenth of a second's worth).
    pub max: u64,
    /// Length of a burst, seconds: at least 1.
    pub length: u64,
}

/// All limits of a throttle group, checked by the supervisor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "they are named as in block_set_io_throttle")]
pub struct ThrottleLimits {
    pub bps_total: Limit,
    pub bps_read: Limit,
    pub bps_write: Limit,
    pub iops_total: Limit,
    pub iops_read: Limit,
    pub iops_write: Limit,
    /// A request of more bytes counts as several; 0: never.
    pub iops_size: u64,
}

/// One edge to replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EdgeChange {
    /// A node gets another child, or none (only `backing` can be missing).
    Child {
        /// The parent.
        parent: NodeId,
        /// Which of its edges.
        role: ChildRole,
        /// The new child.
        child: Option<NodeId>,
    },
    /// An export gets another node.
    Export {
        /// The export.
        export: ExportNumber,
        /// The new node.
        node: NodeId,
    },
    /// A device gets another node.
    Device {
        /// The device.
        device: DeviceIndex,
        /// The new node.
        node: NodeId,
    },
}

/// How a device uses its node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceOptions {
    /// The guest may only read.
    pub read_only: bool,
    /// The guest sees a volatile write cache (and so sends flushes). Off: every write is durable before it completes.
    pub write_cache: bool,
    /// Answer to VIRTIO_BLK_T_GET_ID: at most 20 bytes.
    pub serial: String,
    /// Logical block size shown to the guest, bytes: 512 or 4096.
    pub logical_block_bytes: u32,
    /// What becomes of a failed read.
    pub read_error: OnError,
    /// What becomes of a failed write, discard or flush.
    pub write_error: OnError,
}

/// `rerror=`, `werror=`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnError {
    /// The guest is told.
    #[default]
    Report,
    /// The guest is told that all is well.
    Ignore,
    /// As `Stop` when the space is used up, as `Report` otherwise.
    Enospc,
    /// The request is kept, the machine stops, and tries again when it goes on.
    Stop,
}

/// A format to put on a file (blockdev-create, snapshots).
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CreateSpec {
    /// A raw image: the file gets its size.
    Raw {
        /// Bytes.
        bytes: u64,
        /// Its space.
        preallocation: Preallocation,
    },
    /// A qcow2 image.
    Qcow2(CreateQcow2),
    /// The qcow2 image that was just made there becomes an encrypted one.
    Encrypt {
        /// How; absent: AES, the first way.
        luks: Option<CreateLuks>,
        /// The password.
        key: Secret,
        /// For salts and keys.
        seed: Seed,
    },
    /// An encrypted disk of its own.
    Luks {
        /// Size of the disk, bytes.
        bytes: u64,
        /// How.
        luks: CreateLuks,
        /// The password.
        key: Secret,
        /// For salts and keys.
        seed: Seed,
        /// Its space.
        preallocation: Preallocation,
    },
}

/// Algorithms of a new LUKS header, in QEMU's words; the driver's defaults when absent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateLuks {
    /// `cipher-alg`.
    pub cipher: Option<String>,
    /// `cipher-mode`.
    pub mode: Option<String>,
    /// `ivgen-alg`.
    pub iv: Option<String>,
    /// `ivgen-hash-alg`.
    pub iv_hash: Option<String>,
    /// `hash-alg`.
    pub hash: Option<String>,
    /// `iter-time`, ms.
    pub iter_time_ms: Option<u64>,
}

/// Options of a new qcow2 image, as qemu-img names them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateQcow2 {
    /// Size of the virtual disk, bytes.
    pub bytes: u64,
    /// 2 (`compat=0.10`) or 3 (`compat=1.1`).
    pub version: u32,
    /// Bytes: a power of two from 512 to 2 MiB.
    pub cluster_bytes: u32,
    /// Bits: a power of two from 1 to 64.
    pub refcount_bits: u32,
    /// Subclusters (`extended-l2`).
    pub extended_l2: bool,
    /// `lazy-refcounts`.
    pub lazy_refcounts: bool,
    /// Compressed with zstd instead of deflate.
    pub zstd: bool,
    /// Name and format of the backing file, as they are written to the header.
    pub backing: Option<(String, Option<String>)>,
    /// Name of the external data file, as it is written to the header, and whether it is `data-file-raw`.
    pub data_file: Option<(String, bool)>,
    /// Its space.
    pub preallocation: Preallocation,
}

impl Default for CreateQcow2 {
    fn default() -> Self {
        Self {
            bytes: 0,
            version: 3,
            cluster_bytes: 64 << 10,
            refcount_bits: 16,
            extended_l2: false,
            lazy_refcounts: false,
            zstd: false,
            backing: None,
            data_file: None,
            preallocation: Preallocation::Off,
        }
    }
}

/// An internal snapshot of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// A decimal number, mostly.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Saved device state, bytes.
    pub vm_state_bytes: u64,
    /// When it was made: seconds since 1970, and nanoseconds.
    pub date_seconds: u32,
    #[expect(missing_docs, reason = "see date_seconds")]
    pub date_nanoseconds: u32,
    /// The guest's clock at that time, nanoseconds.
    pub vm_clock_ns: u64,
    /// Instruction count, where it was kept.
    pub icount: Option<u64>,
    /// Size of the disk at that time, bytes.
    pub disk_bytes: u64,
}

/// What an image says of itself, beyond its size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeDetails {
    /// Nothing.
    Plain,
    /// qcow2.
    Qcow2(Qcow2Details),
    /// nbd.
    Nbd(NbdDetails),
}

/// What a server says of its export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdDetails {
    /// Nothing can be written.
    pub read_only: bool,
    /// Requests that keep to blocks of this many bytes are faster.
    pub min_block_bytes: u32,
}

/// What query-block shows of a qcow2 image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Qcow2Details {
    /// 2 or 3.
    pub version: u32,
    /// Bytes.
    pub cluster_bytes: u64,
    /// Bits.
    pub refcount_bits: u32,
    /// Compressed clusters are zstd.
    pub zstd: bool,
    /// Feature bits.
    pub lazy_refcounts: bool,
    #[expect(missing_docs, reason = "the names say it")]
    pub corrupt: bool,
    /// It was not closed properly (lazy refcounts).
    pub dirty: bool,
    /// Subclusters.
    pub extended_l2: bool,
    /// It has, or is, encrypted data: crypt_method of the header.
    pub encryption: u32,
    /// It was opened without the password that it needs.
    pub locked: bool,
    /// Name and format of the backing file in the header: untrusted.
    pub backing: Option<(String, Option<String>)>,
    /// Name of the data file in the header (untrusted), and `data-file-raw`.
    pub data_file: Option<(String, bool)>,
    /// Its internal snapshots, in the table's order.
    pub snapshots: Vec<SnapshotInfo>,
    /// The bitmaps that are in it, in the directory's order: what is on the disk now.
    pub bitmaps: Vec<ImageBitmap>,
}

/// A bitmap in an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageBitmap {
    /// Its name: untrusted.
    pub name: String,
    /// Bytes for each bit.
    pub granularity: u32,
    /// It records writes (the flag `auto`).
    pub enabled: bool,
    /// Not up to date. When the image is opened: inconsistent.
    pub in_use: bool,
}

/// A node, as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    /// Size of what it shows, bytes.
    pub bytes: u64,
    /// What its image says.
    pub details: NodeDetails,
    /// `write-threshold`; 0: none.
    pub write_threshold: u64,
    /// Where the write that reached furthest ended since the node is there, bytes.
    pub highest_write: u64,
}

/// What to do on a node without a guest (`qemu-io`), byte ranges.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ManualIo {
    /// Reads; with a pattern, compares every byte with it.
    Read {
        /// From here.
        offset: u64,
        /// So many.
        bytes: u64,
        /// What every byte should be.
        pattern: Option<u8>,
    },
    /// Fills a range with a byte.
    Write {
        /// From here.
        offset: u64,
        /// So many.
        bytes: u64,
        /// The byte.
        pattern: u8,
        /// Durable when done.
        durable: bool,
    },
    /// Write-zeroes.
    Zero {
        /// From here.
        offset: u64,
        /// So many.
        bytes: u64,
        /// May give up the space.
        may_unmap: bool,
    },
    /// Discard.
    Discard {
        /// From here.
        offset: u64,
        /// So many.
        bytes: u64,
    },
    /// Flush.
    Flush,
}

/// blkdebug's breakpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Breakpoint {
    /// The next request that comes to this driver event stays there, under a tag.
    Set {
        /// The event.
        event: String,
        /// The tag.
        tag: String,
    },
    /// Requests under a tag go on.
    Resume {
        /// The tag.
        tag: String,
    },
    /// As `Resume`, and the breakpoint is gone.
    Remove {
        /// The tag.
        tag: String,
    },
    /// Answered as soon as a request is held under the tag.
    Wait {
        /// The tag.
        tag: String,
    },
}

/// What the supervisor asks of the graph, as `BlockRequest::Graph`. "Answer" is a [`GraphReply`]; failures come with one
/// line of text and the error number where there is one.
#[derive(Debug, Serialize, Deserialize)]
pub enum GraphRequest {
    /// Creates a node. Answer: `Added`, `BackingNamed`, `DataFileNamed`; the latter two create nothing.
    Add {
        /// Its number.
        node: NodeId,
        /// Where it lives.
        thread: IoThreadIndex,
        /// What it is.
        spec: NodeSpec,
    },
    /// Has a node that nobody uses yet turn writes of zeroes into write-zeroes (`detect-zeroes`). Answer: `Done`.
    DetectZeroes {
        /// The node.
        node: NodeId,
        /// They may give up the space (`unmap`).
        may_unmap: bool,
    },
    /// Flushes a node that has no parents and no users, and closes it. Answer: `Done`.
    Remove(NodeId),
    /// Puts a node behind a device that has none. Answer: `Attached`.
    Attach {
        /// The device.
        device: DeviceIndex,
        /// The node.
        node: NodeId,
        /// How it uses it.
        options: DeviceOptions,
    },
    /// Replaces edges: all, or none and a failure. Nodes whose users change are flushed before. Answer: `Resized`, with the
    /// devices whose drivers see something else now: mostly none.
    Change(Vec<EdgeChange>),
    /// As `Change`, with jobs and bitmaps. Answer: `Resized`.
    Switch(Switch),
    /// What is asked of a job. Answer: `Done`.
    ControlJob {
        /// The job.
        job: JobNumber,
        /// What.
        control: JobControl,
    },
    /// How far all jobs are. Answer: `Jobs`.
    ReportJobs,
    /// What bitmaps are now. Answer: `Bitmaps`, with those that are there.
    ReportBitmaps,
    /// A hash of a bitmap's bits, for tests. Answer: `BitmapHash`.
    HashBitmap(BitmapNumber),
    /// Writes the persistent bitmaps of all images to them: the machine ends. Answer: `Done`.
    StoreBitmaps,
    /// Uses another open file of the same contents from now on (blockdev-reopen: other flags). Answer: `Done`.
    ReplaceFile {
        /// A `File` node.
        node: NodeId,
        /// The open file.
        disk: DiskFd,
        /// What it is.
        info: DiskInfo,
    },
    /// A node can be reached by NBD clients. Answer: `Done`.
    AddExport(ExportSpec),
    /// It cannot any more. Answer: `Done` when nothing of it is left, or a failure when it has clients.
    RemoveExport {
        /// The export.
        export: ExportNumber,
        /// Its clients are hung up on.
        hard: bool,
    },
    /// Another connection for an `nbd` node that has lost its own ([`crate::block::BlockEvent::NbdLost`]). Answer: `Done`, or
    /// a failure when the server does not have the same export any more. Carried out before what was asked for earlier.
    Reconnect {
        /// An `Nbd` node.
        node: NodeId,
        /// The connection, on which nothing has been said.
        socket: NbdSocketFd,
    },
    /// Puts a format on a `File` node that nobody uses. Answer: `Done`.
    Create {
        /// The node.
        file: NodeId,
        /// What to put there.
        spec: CreateSpec,
        /// The external data file, another `File` node that nobody uses: it gets the size of the disk.
        data_file: Option<NodeId>,
    },
    /// Changes a node's size, while no request is in flight in the thread. Answer: `Resized`.
    Resize {
        /// The node.
        node: NodeId,
        /// Its new size, bytes.
        bytes: u64,
        /// How the new part's space is provided.
        preallocation: Preallocation,
    },
    /// Makes an internal snapshot. The supervisor has chosen an id that is free. Answer: `Done`.
    CreateSnapshot {
        /// A qcow2 node.
        node: NodeId,
        /// What to write; `disk_bytes` is filled in by the driver.
        snapshot: SnapshotInfo,
    },
    /// Deletes the internal snapshot of this id. Answer: `Done`.
    DeleteSnapshot {
        /// A qcow2 node.
        node: NodeId,
        /// Its id.
        id: String,
    },
    /// Writes the name of a backing file to an image's header. Answer: `Done`.
    SetBackingName {
        /// A qcow2 node.
        node: NodeId,
        /// Name and format; absent: it has none.
        backing: Option<(String, Option<String>)>,
    },
    /// What nodes are now. Answer: `Reports`.
    Report(Vec<NodeId>),
    /// Creates a throttle group or changes its limits. Answer: `Done`.
    SetGroup {
        /// The group.
        group: GroupId,
        /// Its limits.
        limits: ThrottleLimits,
    },
    /// Forgets a group without members. Answer: `Done`.
    RemoveGroup(GroupId),
    /// Puts a device under a group's limits, or under none. Answer: `Done`.
    ThrottleDevice {
        /// The device.
        device: DeviceIndex,
        /// The group.
        group: Option<GroupId>,
    },
    /// Event `WriteThreshold`, once, when a write reaches beyond it. Answer: `Done`.
    SetWriteThreshold {
        /// The node.
        node: NodeId,
        /// Offset, bytes; 0: none.
        bytes: u64,
    },
    /// Begins to count how long a device's requests of a kind take, anew. Answer: `Done`.
    SetHistogram {
        /// The device.
        device: DeviceIndex,
        /// The kind.
        kind: IoKind,
        /// Where a bin ends and the next begins, nanoseconds, rising; empty: it is not counted any more.
        boundaries_ns: Vec<u64>,
    },
    /// A request of the operator's own. Answer: `Done`, or `Mismatch`.
    Io {
        /// The node.
        node: NodeId,
        /// What to do.
        io: ManualIo,
    },
    /// blkdebug's breakpoints. Answer: `Done`.
    Breakpoint {
        /// A blkdebug node.
        node: NodeId,
        /// What to do.
        action: Breakpoint,
    },
}

/// What block-proc answers, as `BlockReply::Graph`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GraphReply {
    /// It is so now.
    Done,
    /// The node is there.
    Added(NodeReport),
    /// The image names a backing file. Nothing was created.
    BackingNamed {
        /// Its name, as the image says: untrusted.
        name: String,
        /// Its format, as the image says: untrusted.
        format: Option<String>,
    },
    /// The image names an external data file. Nothing was created.
    DataFileNamed {
        /// Its name, as the image says: untrusted.
        name: String,
    },
    /// What the device's driver will see.
    Attached(DeviceIdentity),
    /// What the drivers of those devices see now whose configuration has changed.
    Resized(BTreeMap<DeviceIndex, DeviceIdentity>),
    /// One entry for each node that was asked for and is there.
    Reports(BTreeMap<NodeId, NodeReport>),
    /// The first byte that differs from the pattern is at this offset.
    Mismatch(u64),
    /// One entry for each job.
    Jobs(BTreeMap<JobNumber, JobProgress>),
    /// One entry for each bitmap.
    Bitmaps(BTreeMap<BitmapNumber, BitmapReport>),
    /// SHA-256, hexadecimal.
    BitmapHash(String),
}
