//! Opening an image: its header is checked, its tables are looked through for clusters with two uses.

use super::bitmaps::Bitmaps;
use super::cache::{Cache, Events};
use super::crypt::Crypt;
use super::entry::{Form, OFFSET_MASK};
use super::header::{Encryption, autoclear, field, incompatible, put_u64, u64_at};
use super::locks::{Mutex, RangeLocks};
use super::refcounts::Refcounts;
use super::{Fault, Header, OpenError, Options, Qcow2Node, Shared, header, io, slice_bytes, snapshots};
use crate::ledger::Account;
use crate::node::Node;
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// What an image is opened over, beside the file that it is in.
#[derive(Default)]
pub struct Children {
    /// What unallocated clusters read as; zeroes beyond its end.
    pub backing: Option<Rc<dyn Node>>,
    /// There is none, whatever the header says.
    pub without_backing: bool,
    /// Of an image with an external data file.
    pub data_file: Option<Rc<dyn Node>>,
    /// Where changes of its tables are noted until they are in the image, and what an earlier process has left there.
    pub account: Option<Account>,
}

impl Children {
    /// An image over another one, or over none.
    pub fn over(backing: Option<Rc<dyn Node>>) -> Self {
        Self {
            backing,
            ..Self::default()
        }
    }
}

/// Reads an image's header.
///
/// # Errors
/// What is wrong with it.
pub async fn read_header(child: &dyn Node, options: &Options) -> Result<Header, OpenError> {
    Ok(read_first_cluster(child, options).await?.1)
}

pub(super) async fn read_first_cluster(child: &dyn Node, options: &Options) -> Result<(Vec<u8>, Header), OpenError> {
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
    /// Opens an image. For writing, its tables are checked for clusters with two uses, and features that we do not know and
    /// that need everybody's care are cleared. Its bitmaps are read.
    ///
    /// # Errors
    /// What is wrong with the image, or with using it so.
    pub async fn open(child: Rc<dyn Node>, mut options: Options, children: Children) -> Result<Rc<Self>, OpenError> {
        let (mut first, mut header) = read_first_cluster(&*child, &options).await?;
        if let (Some(name), None, false) = (&header.backing_name, &children.backing, children.without_backing) {
            return Err(OpenError::Backing(name.clone()));
        }
        if header.has_data_file() != children.data_file.is_some() {
            return Err(match &header.data_file {
                Some(name) => OpenError::DataFile(name.clone()),
                None if header.has_data_file() => OpenError::DataFile(String::new()),
                None => OpenError::NoDataFile,
            });
        }
        if header.encryption.is_some() && options.key.is_none() && options.may_be_locked {
            options.writable = false;
        }
        if options.writable && header.incompatible & incompatible::CORRUPT != 0 {
            return Err(OpenError::Corrupt);
        }
        if options.writable && header.incompatible & incompatible::DIRTY != 0 {
            drop(first);
            let end = Self::repair_image(child.clone(), &options, &children).await?;
            options.file_bytes = options.file_bytes.max(end);
            (first, header) = read_first_cluster(&*child, &options).await?;
            if header.incompatible & incompatible::DIRTY != 0 {
                return Err(OpenError::Dirty);
            }
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
            l2: Cache::new(
                child.clone(),
                slice,
                (options.l2_cache_bytes / slice) as usize,
                Events::L2,
            ),
            child,
            file_bytes: options.file_bytes,
            is_block_device: options.is_block_device,
            cluster_bytes,
            end: Cell::new(options.file_bytes.next_multiple_of(cluster_bytes)),
            header: RefCell::new(first),
            header_lock: Mutex::default(),
            header_unsettled: Cell::new(false),
        });
        let snapshots = snapshots::read_table(&shared, &header, options.align).await?;
        let refcounts = match options.writable {
            true => Some(Refcounts::open(shared.clone(), &header, options.refcount_cache_bytes).await?),
            false => None,
        };
        let node = Rc::new(Self {
            form: Form::of(&header),
            options,
            compression: header.compression,
            backing: RefCell::new(children.backing),
            data: children.data_file.unwrap_or_else(|| shared.child.clone()),
            data_is_raw: header.is_data_file_raw(),
            snapshots: RefCell::new(snapshots),
            bitmaps: Bitmaps::default(),
            packing: Cell::new(None),
            packing_lock: Mutex::default(),
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
            account: children.account,
            commit_lock: Mutex::default(),
            committing: Cell::new(false),
            corrupt: Cell::new(false),
            copying: Rc::default(),
            unpacked: RefCell::default(),
            header: RefCell::new(header),
            shared,
        });
        if node.options.writable {
            node.claim_tables().await?;
            node.clear_unknown_features().await?;
        }
        node.load_bitmaps().await?;
        node.take_over().await?;
        Ok(node)
    }

    /// Learns which clusters are metadata; two uses of one are damage.
    pub(super) async fn claim_tables(&self) -> Result<(), Fault> {
        let Some(refcounts) = &self.refcounts else {
            return Ok(());
        };
        let (header, cluster) = (self.header().clone(), self.cluster_bytes());
        refcounts.claim("header", 0, cluster)?;
        refcounts.claim("L1 table", header.l1_offset, u64::from(header.l1_entries) * 8)?;
        let table_bytes = u64::from(header.refcount_table_clusters) * cluster;
        refcounts.claim("refcount table", header.refcount_table_offset, table_bytes)?;
        if let Some(Encryption::Luks { offset, bytes }) = header.encryption {
            refcounts.claim("LUKS header", offset, bytes)?;
        }
        for offset in refcounts.block_offsets() {
            if !self.shared.is_table_place(offset) {
                return Err(Fault::RefcountBlock(offset));
            }
            refcounts.claim("refcount block", offset, cluster)?;
        }
        let tables: Vec<u64> = self.l1.borrow().iter().map(|entry| entry & OFFSET_MASK).collect();
        for offset in tables.into_iter().filter(|offset| *offset != 0) {
            if !self.shared.is_table_place(offset) {
                return Err(Fault::L2Table(offset));
            }
            refcounts.claim("L2 table", offset, cluster)?;
        }
        for snapshot in &*self.snapshots.borrow() {
            let (offset, bytes) = snapshot.l1_range();
            if bytes > 0 {
                refcounts.claim("L1 table of a snapshot", offset, bytes)?;
            }
        }
        let bytes = snapshots::table_bytes(&self.snapshots.borrow());
        if bytes > 0 {
            refcounts.claim("snapshot table", header.snapshots_offset, bytes)?;
        }
        Ok(())
    }

    /// Autoclear features say that who wrote last knew them.
    async fn clear_unknown_features(&self) -> Result<(), Errno> {
        let kept = self.header().autoclear & (autoclear::DATA_FILE_RAW | autoclear::BITMAPS);
        if self.header().autoclear == kept {
            return Ok(());
        }
        self.shared
            .change_header(|header| put_u64(header, field::AUTOCLEAR, kept))
            .await?;
        self.header.borrow_mut().autoclear = kept;
        Ok(())
    }
}
