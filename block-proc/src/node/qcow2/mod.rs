//! The qcow2 driver, versions 2 and 3, over a child node that holds the image.
//!
//! | room | what |
//! |---|---|
//! | [`header`] | the header, checked |
//! | [`entry`] | what an L2 entry means |
//! | [`cache`] | L2 tables and refcount blocks in memory, bounded |
//! | [`refcounts`] | counts, allocation |
//! | [`map`] | from guest offsets to entries, and changing them |
//! | [`read`], [`write`], [`zero`] | requests |
//! | [`crypt`], [`encrypt`] | data of encrypted images, and making one |
//! | [`commit`] | the order in which changes reach the disk |
//! | [`locks`] | which requests wait for which |
//!
//! **Order on the disk.** Data goes to newly allocated clusters at once, all changes of metadata stay in memory. A commit
//! (a flush of the guest, or too much in memory) takes a consistent copy of what changed and writes it in two steps with
//! a flush of the child between: first refcounts, then the tables that refer to the clusters. References that disappear
//! are counted down after that. A cut at any point leaves counts that are too large (leaked clusters), never a table that
//! refers to a free cluster or to one whose data is not there.
//!
//! **Order of requests.** Reads and writes to clusters that need no allocation share a lock on their range; whatever
//! changes an entry has the range of its clusters for itself. Nobody is held up by requests elsewhere.
//!
//! **Refcounts are never postponed**, also where an image allows that (lazy refcounts), so we never set the dirty bit.

pub mod cache;
pub mod commit;
pub mod compressed;
pub mod crypt;
pub mod encrypt;
pub mod entry;
pub mod error;
pub mod header;
pub mod io;
pub mod locks;
pub mod map;
pub mod read;
pub mod refcounts;
pub mod write;
pub mod zero;

pub use error::{Fault, OpenError};
pub use header::Header;

use super::{Node, NodeFuture};
use crate::buffer::{BouncePool, Segments};
use cache::Cache;
use compressed::Extent;
use crypt::Crypt;
use entry::{Form, OFFSET_MASK};
use header::{Encryption, field, incompatible, put_u64, u32_at, u64_at};
use ipc::secret::Secret;
use locks::{Mutex, RangeLocks};
use nix::errno::Errno;
use refcounts::Refcounts;
use std::cell::{Cell, RefCell};
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
}

/// The node below, and its size.
pub struct Backing {
    /// What unallocated clusters read as.
    pub node: Rc<dyn Node>,
    /// Beyond it, they read as zeroes.
    pub bytes: u64,
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
    /// The L2 tables.
    l2: Cache,
}

impl Shared {
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
        change(&mut self.header.borrow_mut());
        let bytes = self.header.borrow().clone();
        io::write(&*self.child, 0, &bytes).await?;
        self.child.flush().await
    }
}

/// See the module.
pub struct Qcow2Node {
    shared: Rc<Shared>,
    form: Form,
    header: Header,
    options: Options,
    backing: Option<Backing>,
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
    commit_lock: Mutex,
    committing: Cell<bool>,
    corrupt: Cell<bool>,
    /// For copying, apart from the child's own, because a task must not hold two of one pool.
    copying: Rc<BouncePool>,
    /// The compressed cluster that was read last.
    unpacked: RefCell<Option<(Extent, Rc<Vec<u8>>)>>,
}

/// Reads an image's header.
///
/// # Errors
/// What is wrong with it.
pub async fn read_header(child: &dyn Node, options: &Options) -> Result<Header, OpenError> {
    Ok(read_first_cluster(child, options).await?.1)
}

async fn read_first_cluster(child: &dyn Node, options: &Options) -> Result<(Vec<u8>, Header), OpenError> {
    let probe = io::read(child, 0, header::PROBE_BYTES.max(options.align as usize)).await?;
    let cluster_bytes = Header::probe(&probe)?;
    if (cluster_bytes as u64) < options.align {
        return Err(OpenError::Alignment(options.align));
    }
    let cluster = io::read(child, 0, cluster_bytes).await?;
    let header = Header::parse(&cluster, options.file_bytes)?;
    Ok((cluster, header))
}

impl Qcow2Node {
    /// Opens an image. For writing, its tables are checked for clusters with two uses, and what says that others keep
    /// track of changes (bitmaps) is cleared.
    ///
    /// # Errors
    /// What is wrong with the image, or with using it so.
    pub async fn open(
        child: Rc<dyn Node>,
        mut options: Options,
        backing: Option<Backing>,
    ) -> Result<Rc<Self>, OpenError> {
        let (mut first, header) = read_first_cluster(&*child, &options).await?;
        if let (Some(name), None) = (&header.backing_name, &backing) {
            return Err(OpenError::Backing(name.clone()));
        }
        if options.writable && header.incompatible & incompatible::CORRUPT != 0 {
            return Err(OpenError::Corrupt);
        }
        if options.writable && header.incompatible & incompatible::DIRTY != 0 {
            return Err(OpenError::Dirty);
        }
        let crypt = Crypt::open(&header, &*child, &options).await?;
        // The node needs no password from here on.
        options.key = None;
        let cluster_bytes = 1_u64 << header.cluster_bits;
        let slice = slice_bytes(cluster_bytes);
        first.truncate(slice as usize);
        let l1_bytes = (header.l1_entries as usize * 8).next_multiple_of(slice as usize);
        let l1 = match header.l1_entries {
            0 => Vec::new(),
            _ => io::read(&*child, header.l1_offset, l1_bytes).await?,
        };
        let shared = Rc::new(Shared {
            l2: Cache::new(child.clone(), slice, (options.l2_cache_bytes / slice) as usize),
            child,
            file_bytes: options.file_bytes,
            is_block_device: options.is_block_device,
            cluster_bytes,
            end: Cell::new(options.file_bytes.next_multiple_of(cluster_bytes)),
            header: RefCell::new(first),
            header_lock: Mutex::default(),
        });
        let refcounts = match options.writable {
            true => Some(Refcounts::open(shared.clone(), &header, options.refcount_cache_bytes).await?),
            false => None,
        };
        let node = Rc::new(Self {
            form: Form::of(&header),
            options,
            backing,
            crypt,
            l1: RefCell::new(
                l1.chunks_exact(8)
                    .take(header.l1_entries as usize)
                    .map(|entry| u64_at(entry, 0))
                    .collect(),
            ),
            l1_changed: RefCell::default(),
            l1_locks: RangeLocks::default(),
            locks: RangeLocks::default(),
            refcounts,
            freed: RefCell::default(),
            commit_lock: Mutex::default(),
            committing: Cell::new(false),
            corrupt: Cell::new(false),
            copying: Rc::default(),
            unpacked: RefCell::default(),
            header,
            shared,
        });
        if node.options.writable {
            node.claim_tables().await?;
            if node.header.autoclear != 0 {
                node.shared
                    .change_header(|header| put_u64(header, field::AUTOCLEAR, 0))
                    .await?;
            }
        }
        Ok(node)
    }

    /// Learns which clusters are metadata; two uses of one are damage.
    async fn claim_tables(&self) -> Result<(), OpenError> {
        let Some(refcounts) = &self.refcounts else {
            return Ok(());
        };
        let (header, cluster) = (&self.header, self.cluster_bytes());
        refcounts.claim("header", 0, cluster)?;
        refcounts.claim("L1 table", header.l1_offset, u64::from(header.l1_entries) * 8)?;
        let table_bytes = u64::from(header.refcount_table_clusters) * cluster;
        refcounts.claim("refcount table", header.refcount_table_offset, table_bytes)?;
        if let Some(Encryption::Luks { offset, bytes }) = header.encryption {
            refcounts.claim("LUKS header", offset, bytes)?;
        }
        for offset in refcounts.block_offsets() {
            if !self.shared.is_table_place(offset) {
                return Err(Fault::RefcountBlock(offset).into());
            }
            refcounts.claim("refcount block", offset, cluster)?;
        }
        let tables: Vec<u64> = self.l1.borrow().iter().map(|entry| entry & OFFSET_MASK).collect();
        for offset in tables.into_iter().filter(|offset| *offset != 0) {
            if !self.shared.is_table_place(offset) {
                return Err(Fault::L2Table(offset).into());
            }
            refcounts.claim("L2 table", offset, cluster)?;
        }
        self.claim_snapshots(refcounts).await
    }

    async fn claim_snapshots(&self, refcounts: &Refcounts) -> Result<(), OpenError> {
        /// An entry up to its variable part.
        const FIXED_BYTES: u64 = 40;
        let mut at = self.header.snapshots_offset;
        for _ in 0..self.header.snapshots {
            let start = at / self.options.align * self.options.align;
            let bytes = (at - start + FIXED_BYTES).next_multiple_of(self.options.align);
            let entry = io::read(&*self.shared.child, start, bytes as usize).await?;
            let entry = &entry[(at - start) as usize..];
            let (l1_offset, l1_entries) = (u64_at(entry, 0), u64::from(u32_at(entry, 8)));
            let names = u64::from(u32_at(entry, 12) >> 16) + u64::from(u32_at(entry, 12) & 0xffff);
            if l1_entries > 0 {
                if !self.shared.is_table_place(l1_offset) || l1_entries * 8 > self.shared.end.get() {
                    return Err(OpenError::invalid(format!(
                        "a snapshot's L1 table is at {l1_offset:#x}"
                    )));
                }
                refcounts.claim("L1 table of a snapshot", l1_offset, l1_entries * 8)?;
            }
            at += (FIXED_BYTES + u64::from(u32_at(entry, 36)) + names).next_multiple_of(8);
            if at > self.shared.end.get() {
                return Err(OpenError::invalid("the snapshot table does not end in the file"));
            }
        }
        if self.header.snapshots > 0 {
            let bytes = at - self.header.snapshots_offset;
            refcounts.claim("snapshot table", self.header.snapshots_offset, bytes)?;
        }
        Ok(())
    }

    /// The header as it was when the image was opened.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How many slices of L2 tables are in memory.
    pub fn cached_slices(&self) -> usize {
        self.shared.l2.slices()
    }

    fn cluster_bytes(&self) -> u64 {
        1 << self.header.cluster_bits
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
        if self.options.writable && self.header.version >= 3 {
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
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        Box::pin(async move { self.answer(self.read_shared(offset, into).await).await })
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
        Box::pin(async move { self.answer(self.commit().await).await })
    }

    fn bytes(&self) -> u64 {
        self.header.bytes
    }
}
