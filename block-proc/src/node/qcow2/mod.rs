//! The qcow2 driver, versions 2 and 3, over a child node that holds the image.
//!
//! | room | what |
//! |---|---|
//! | [`header`] | the header, checked |
//! | [`open`] | opening: which clusters are metadata |
//! | [`entry`] | what an L2 entry means |
//! | [`cache`] | L2 tables and refcount blocks in memory, bounded |
//! | [`refcounts`] | counts, allocation |
//! | [`map`] | from guest offsets to entries, and changing them |
//! | [`read`], [`write`], [`zero`] | requests |
//! | [`crypt`], [`encrypt`] | data of encrypted images, and making one |
//! | [`commit`] | the order in which changes reach the disk |
//! | `takeover` | changes that a process has answered and not committed before it died |
//! | [`locks`] | which requests wait for which |
//! | [`create`] | new images |
//! | [`resize`] | another size |
//! | [`write_compressed`] | compressed clusters |
//! | [`names`] | the header's extensions, and names in it |
//! | [`details`] | what an image says of itself, and which parts of it are data |
//! | [`snapshots`], [`snapshot_ops`] | the table of internal snapshots, and making and deleting them |
//! | `switch`, `recount` | from one set of tables to another, at once |
//! | `repair` | counts from scratch, for an image that was not closed |
//! | [`bitmaps`], [`bitmap_load`], [`bitmap_store`] | persistent bitmaps |
//!
//! **Order on the disk.** Data goes to newly allocated clusters at once, all changes of metadata stay in memory. A commit
//! (a flush of the guest, or too much in memory) takes a consistent copy of what changed and writes it in two steps with
//! a flush of the child between: first refcounts, then the tables that refer to the clusters. References that disappear
//! are counted down after that. A cut at any point leaves counts that are too large (leaked clusters), never a table that
//! refers to a free cluster or to one whose data is not there.
//!
//! **When the process dies** and the host does not, what the guest was answered must be there: whatever is flushed next has
//! to include it. So every entry that changes is noted in memory that stays ([`crate::ledger`]) until it is committed.
//!
//! **Order of requests.** Reads and writes to clusters that need no allocation share a lock on their range; whatever
//! changes an entry has the range of its clusters for itself. Nobody is held up by requests elsewhere.
//!
//! **Refcounts are never postponed**, also where an image allows that (lazy refcounts), so we never set the dirty bit. An
//! image that another program has left dirty is repaired when it is opened for writing.

pub mod bitmap_load;
pub mod bitmap_store;
pub mod bitmaps;
pub mod cache;
pub mod commit;
pub mod compressed;
pub mod create;
pub mod crypt;
pub mod details;
pub mod encrypt;
pub mod entry;
pub mod error;
pub mod header;
pub mod io;
pub mod locks;
pub mod map;
pub mod names;
pub mod open;
pub mod read;
mod recount;
pub mod refcounts;
mod repair;
pub mod resize;
pub mod snapshot_ops;
pub mod snapshots;
mod switch;
mod takeover;
pub mod write;
pub mod write_compressed;
pub mod zero;

pub use error::{Fault, OpenError};
pub use header::Header;
pub use open::{Children, read_header};

use super::{Limits, Node, NodeFuture, Pass};
use crate::buffer::{BouncePool, Segments};
use crate::crypto::SECTOR_BYTES;
use crate::ledger::Account;
use crate::node::event::{Event, say};
use cache::Cache;
use compressed::{Compression, Extent};
use crypt::Crypt;
use entry::Form;
use header::{field, incompatible, put_u64, u64_at};
use ipc::Failure;
use ipc::graph::{NodeDetails, Preallocation};
use ipc::secret::Secret;
use locks::{Mutex, RangeLocks};
use nix::errno::Errno;
use refcounts::Refcounts;
use snapshots::Snapshot;
use std::cell::{Cell, Ref, RefCell};
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;

/// Most of L2 tables that is kept, bytes (QEMU's default).
pub const L2_CACHE_BYTES: u64 = 32 << 20;
/// Most of refcount blocks that is kept, bytes.
pub const REFCOUNT_CACHE_BYTES: u64 = 4 << 20;
/// Size of a slice of a table, bytes, where clusters are not smaller.
const SLICE_BYTES: u64 = 4096;

/// How the image is used.
#[derive(Debug, Clone)]
pub struct Options {
    /// The guest may write. The image's tables are looked through when it is opened.
    pub writable: bool,
    /// Discarded clusters are given back to the host.
    pub unmap: bool,
    /// Length of the image file or block device.
    pub file_bytes: u64,
    /// The child is a block device: it does not grow, and its unused part is not zeroes.
    pub is_block_device: bool,
    /// Requests to the child start and end on multiples of this many bytes (1: no matter).
    pub align: u64,
    /// Most of L2 tables that is kept in memory, bytes: [`L2_CACHE_BYTES`].
    pub l2_cache_bytes: u64,
    /// Most of refcount blocks that is kept in memory, bytes: [`REFCOUNT_CACHE_BYTES`].
    pub refcount_cache_bytes: u64,
    /// The password, for an encrypted image.
    pub key: Option<Secret>,
    /// An encrypted image opens without a password as well, and then shows no data and is not changed.
    pub may_be_locked: bool,
}

/// What the parts of the driver share.
pub struct Shared {
    /// The image.
    pub child: Rc<dyn Node>,
    /// See [`Options`].
    pub file_bytes: u64,
    /// See [`Options`].
    pub is_block_device: bool,
    cluster_bytes: u64,
    /// Nothing at or after this offset was ever used.
    end: Cell<u64>,
    /// The start of the first cluster, as it is on the disk.
    header: RefCell<Vec<u8>>,
    header_lock: Mutex,
    /// Writing the header has failed: nobody knows which one is on the disk.
    header_unsettled: Cell<bool>,
    /// The L2 tables.
    l2: Cache,
}

impl Shared {
    /// Says what is about to be done with the image. It may wait, at a breakpoint.
    async fn say(&self, event: Event) {
        say(&*self.child, event).await;
    }

    /// Whether the offset can be a table's: on a cluster, in the part of the image that was ever used.
    fn is_table_place(&self, offset: u64) -> bool {
        offset != 0 && offset.is_multiple_of(self.cluster_bytes) && offset < self.end.get()
    }

    /// Says that a range is in use from now on. Returns whether it reads as zeroes.
    fn use_up_to(&self, offset: u64, bytes: u64) -> bool {
        let fresh = !self.is_block_device && offset >= self.end.get();
        self.end.set(self.end.get().max(offset + bytes));
        fresh
    }

    /// A cluster is no table any more.
    fn forget_table(&self, range: Range<u64>) {
        self.l2.forget(range);
    }

    /// Changes the header, on the disk as well, and flushes.
    async fn change_header(&self, change: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        let _guard = self.header_lock.lock().await;
        let before = self.header.borrow().clone();
        change(&mut self.header.borrow_mut());
        let written = self.write_header().await;
        if written.is_err() {
            self.header.replace(before);
            self.header_unsettled.set(true);
            // It may be the flush that failed, and the new one is there: whoever changed it believes that it is not, and so
            // must the next reader. If this fails as well, it stays unsettled.
            let _ = self.write_header().await;
        }
        written
    }

    async fn write_header(&self) -> Result<(), Errno> {
        let bytes = self.header.borrow().clone();
        io::write(&*self.child, 0, &bytes).await?;
        self.child.flush().await?;
        self.header_unsettled.set(false);
        Ok(())
    }

    /// Whether the header on the disk may be one that was given up: what it refers to must stay as it is.
    fn is_header_unsettled(&self) -> bool {
        self.header_unsettled.get()
    }

    /// Makes sure that the header on the disk is the one that we know, before tables change again.
    async fn settle_header(&self) -> Result<(), Errno> {
        if !self.header_unsettled.get() {
            return Ok(());
        }
        let _guard = self.header_lock.lock().await;
        self.write_header().await
    }
}

/// See the module.
pub struct Qcow2Node {
    shared: Rc<Shared>,
    form: Form,
    /// As it is on the disk, or about to be.
    header: RefCell<Header>,
    options: Options,
    compression: Compression,
    backing: RefCell<Option<Rc<dyn Node>>>,
    /// Where guest data is: the image, or its external data file.
    data: Rc<dyn Node>,
    /// The external data file can be read as a raw image, and must stay so.
    data_is_raw: bool,
    snapshots: RefCell<Vec<Snapshot>>,
    bitmaps: bitmaps::Bitmaps,
    /// Where the next compressed data goes.
    packing: Cell<Option<write_compressed::Open>>,
    packing_lock: Mutex,
    crypt: Option<Crypt>,
    l1: RefCell<Vec<u64>>,
    /// Entries of the L1 table that are to be written.
    l1_changed: RefCell<BTreeSet<usize>>,
    /// Who gives an L1 entry a new table has it for itself.
    l1_locks: RangeLocks,
    /// On guest bytes.
    locks: RangeLocks,
    /// Of an image that is written.
    refcounts: Option<Refcounts>,
    /// Ranges of the image to which references were taken back since the last commit.
    freed: RefCell<Vec<(u64, u64)>>,
    /// Where changed entries are noted until they are committed.
    account: Option<Account>,
    commit_lock: Mutex,
    committing: Cell<bool>,
    corrupt: Cell<bool>,
    /// For copying, apart from the child's own, because a task must not hold two of one pool.
    copying: Rc<BouncePool>,
    /// The compressed cluster that was read last.
    unpacked: RefCell<Option<(Extent, Rc<Vec<u8>>)>>,
}

impl Qcow2Node {
    /// The header.
    pub fn header(&self) -> Ref<'_, Header> {
        self.header.borrow()
    }

    /// What is below, if there is anything.
    pub fn backing(&self) -> Option<Rc<dyn Node>> {
        self.backing.borrow().clone()
    }

    /// Puts another node below, or nothing. No request may be in flight. The header keeps the name that it has.
    pub fn set_backing(&self, backing: Option<Rc<dyn Node>>) {
        self.backing.replace(backing);
    }

    /// Whether an unallocated cluster may come to read as anything but zeroes: an image that names a backing file has it
    /// again some day, although it was opened without.
    fn may_have_backing(&self) -> bool {
        self.backing.borrow().is_some() || self.header.borrow().backing_name.is_some()
    }

    /// Whether what is below reads as zeroes from this offset on, and will.
    fn backing_is_over(&self, offset: u64) -> bool {
        match &*self.backing.borrow() {
            Some(backing) => offset >= backing.bytes(),
            None => self.header.borrow().backing_name.is_none(),
        }
    }

    /// Where guest data is, if that is not the image itself.
    pub fn data_file(&self) -> Option<Rc<dyn Node>> {
        self.form.is_external().then(|| self.data.clone())
    }

    /// How many slices of L2 tables are in memory.
    pub fn cached_slices(&self) -> usize {
        self.shared.l2.slices()
    }

    fn cluster_bytes(&self) -> u64 {
        self.shared.cluster_bytes
    }

    /// The whole clusters around a range.
    fn clusters_around(&self, offset: u64, bytes: u64) -> Range<u64> {
        let cluster = self.cluster_bytes();
        offset / cluster * cluster..(offset + bytes).next_multiple_of(cluster)
    }

    /// What a fault means for the guest. An image that contradicts itself is not written any more, and is marked.
    async fn answer<T>(&self, result: Result<T, Fault>) -> Result<T, Errno> {
        let fault = match result {
            Ok(value) => return Ok(value),
            Err(Fault::Errno(errno)) => return Err(errno),
            Err(fault) => fault,
        };
        if matches!(fault, Fault::Compressed(_) | Fault::CompressedEncrypted) || self.corrupt.replace(true) {
            return Err(Errno::EIO);
        }
        ipc::helper::log(&format!("a qcow2 image is damaged: {fault}"));
        if self.options.writable && self.header().version >= 3 {
            // If the host cannot write this either, there is nothing left to do.
            let _ = self
                .shared
                .change_header(|header| {
                    let features = u64_at(header, field::INCOMPATIBLE) | incompatible::CORRUPT;
                    put_u64(header, field::INCOMPATIBLE, features);
                })
                .await;
        }
        Err(Errno::EIO)
    }

    fn check_writable(&self) -> Result<&Refcounts, Fault> {
        match &self.refcounts {
            Some(refcounts) if !self.corrupt.get() => Ok(refcounts),
            Some(_) => Err(Errno::EIO.into()),
            None => Err(Errno::EROFS.into()),
        }
    }
}

/// Size of the pieces in which tables are read and written, bytes.
fn slice_bytes(cluster_bytes: u64) -> u64 {
    cluster_bytes.min(SLICE_BYTES)
}

/// The pieces of a table at `offset` in which these entries are.
fn table_pieces(table: &[u64], offset: u64, changed: &BTreeSet<usize>, piece: u64) -> Vec<(u64, Vec<u8>)> {
    let per_piece = piece as usize / 8;
    let pieces: BTreeSet<usize> = changed.iter().map(|entry| entry / per_piece).collect();
    pieces
        .into_iter()
        .map(|number| {
            let entries = table.iter().skip(number * per_piece).take(per_piece);
            let mut bytes: Vec<u8> = entries.flat_map(|entry| entry.to_be_bytes()).collect();
            bytes.resize(piece as usize, 0);
            (offset + number as u64 * piece, bytes)
        })
        .collect()
}

impl Node for Qcow2Node {
    fn write_compressed(&self, offset: u64, from: Segments) -> NodeFuture<'_> {
        Box::pin(async move {
            let (mut left, mut at) = (from, offset);
            while left.bytes() > 0 {
                let cluster = left.split_to(self.cluster_bytes());
                let bytes = cluster.bytes();
                Self::write_compressed(self, at, cluster).await?;
                at += bytes;
            }
            Ok(())
        })
    }

    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        Box::pin(async move { self.answer(self.read_shared(offset, into).await).await })
    }

    fn passes_read(&self, offset: u64, bytes: u64) -> Option<Pass> {
        self.pass(offset, bytes)
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        Box::pin(async move { self.answer(self.write_any(offset, from, durable).await).await })
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        Box::pin(async move { self.answer(self.zero_range(offset, bytes, may_unmap).await).await })
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        Box::pin(async move { self.answer(self.discard_range(offset, bytes).await).await })
    }

    fn flush(&self) -> NodeFuture<'_> {
        Box::pin(async move {
            self.shared.say(Event::FlushToOs).await;
            self.answer(self.commit().await).await
        })
    }

    fn bytes(&self) -> u64 {
        self.header.borrow().bytes
    }

    fn status(&self, offset: u64, bytes: u64) -> NodeFuture<'_, super::Extent> {
        Box::pin(async move { self.answer(self.first_extent(offset, bytes).await).await })
    }

    fn below(&self) -> Option<Rc<dyn Node>> {
        self.backing()
    }

    fn resize(&self, bytes: u64, preallocation: Preallocation) -> NodeFuture<'_, (), Failure> {
        Box::pin(self.resize_to(bytes, preallocation))
    }

    fn limits(&self) -> Limits {
        let align = if self.crypt.is_some() { SECTOR_BYTES as u64 } else { 1 };
        Limits { align, grows: false }
    }

    fn details(&self) -> NodeFuture<'_, NodeDetails> {
        Box::pin(async move { Ok(NodeDetails::Qcow2(self.describe())) })
    }
}
