//! Encryption of a new image: what is done to one that was just created, before there is any data in it.
//!
//! The LUKS header takes clusters in a row at the image's end. They are counted first, then they are filled, and only then
//! the image's header says that it is encrypted.

use super::header::{EXTENSION_LUKS, Encryption, put_u64, u32_at, u64_at};
use super::refcounts::{Refcounts, Run, put};
use super::{Backing, Fault, OpenError, Options, Qcow2Node, io, read_first_cluster};
use crate::crypto::luks::{CreateOptions, create};
use crate::crypto::pace::Pace;
use crate::crypto::random::Random;
use crate::node::Node;
use ipc::secret::Secret;
use std::rc::Rc;

/// Where the encryption method is, bytes from the image's start.
const METHOD_AT: usize = 32;
/// Where the header's length is, in version 3.
const LENGTH_AT: usize = 100;
/// Header of an extension, bytes.
const EXTENSION_BYTES: usize = 8;

/// How a new image is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewEncryption {
    /// The first format. Nobody should want it any more.
    Aes,
    /// LUKS.
    Luks(CreateOptions),
}

/// Encrypts an image that has no data yet.
///
/// # Errors
/// What is wrong with the image, no room in it, or the child's.
pub async fn encrypt(
    child: Rc<dyn Node>,
    options: Options,
    encryption: NewEncryption,
    key: &Secret,
    random: &mut Random,
) -> Result<(), OpenError> {
    let (mut first, header) = read_first_cluster(&*child, &options).await?;
    if header.encryption.is_some() {
        return Err(OpenError::invalid("the image is encrypted already"));
    }
    let (method, place) = match encryption {
        NewEncryption::Aes => (1_u32, None),
        NewEncryption::Luks(luks) => {
            let bytes = luks.area_bytes();
            // Before anything is written: whether there is room at all.
            add_extension(&mut first, header.version, 0, bytes)?;
            let pace = Pace::new(&*child, options.align.max(512) as usize);
            let created = create(&luks, key.bytes(), random, &pace).await?;
            let options = Options {
                writable: true,
                key: None,
                ..options
            };
            let node = Qcow2Node::open(
                child.clone(),
                options,
                unused_backing(header.backing_name.as_ref(), &child),
            )
            .await?;
            let offset = node.luks_area(bytes, created.bytes).await?;
            (2, Some(Encryption::Luks { offset, bytes }))
        }
    };
    // The refcount table may be elsewhere now.
    first = io::read(&*child, 0, first.len()).await?;
    first[METHOD_AT..METHOD_AT + 4].copy_from_slice(&method.to_be_bytes());
    if let Some(Encryption::Luks { offset, bytes }) = place {
        add_extension(&mut first, header.version, offset, bytes)?;
    }
    io::write(&*child, 0, &first).await?;
    Ok(child.flush().await?)
}

/// Nothing is read from the backing file, but without one an image that has one does not open: the image itself will do.
fn unused_backing(name: Option<&String>, child: &Rc<dyn Node>) -> Option<Backing> {
    name.map(|_| Backing {
        node: child.clone(),
        bytes: 0,
    })
}

impl Qcow2Node {
    /// Writes the LUKS header to clusters of its own and returns where.
    async fn luks_area(&self, bytes: u64, start: Vec<u8>) -> Result<u64, OpenError> {
        let clusters = bytes.div_ceil(self.cluster_bytes());
        let run = {
            let _commit = self.commit_lock.lock().await;
            self.check_writable()?.allocate_row(clusters).await?
        };
        let mut area = start;
        // All of it, so that the file is as long as its header says.
        area.resize((clusters * self.cluster_bytes()) as usize, 0);
        io::write(&*self.shared.child, run.offset, &area).await?;
        self.commit().await?;
        Ok(run.offset)
    }
}

impl Refcounts {
    /// Takes clusters in a row behind everything else, however many; the blocks for their counts come before them. The
    /// caller holds the commit lock.
    ///
    /// # Errors
    /// The child's, or ENOSPC when an image cannot be larger.
    async fn allocate_row(&self, clusters: u64) -> Result<Run, Fault> {
        let (start, missing) = loop {
            let start = self.shared.end.get() >> self.cluster_bits;
            let missing = self.missing_blocks(start, clusters);
            let covered = self.table.borrow().len() as u64 * self.per_block();
            if start + missing.len() as u64 + clusters <= covered {
                break (start, missing);
            }
            self.hint.set(covered);
            self.grow().await?;
        };
        let _guard = self.lock.lock().await;
        let first = start + missing.len() as u64;
        self.check_space(first + clusters)?;
        let zeroes = vec![0; self.cluster_bytes() as usize];
        for (place, block) in (start..).zip(missing) {
            let offset = place << self.cluster_bits;
            self.claim("refcount block", offset, self.cluster_bytes())?;
            io::write(&*self.shared.child, offset, &zeroes).await?;
            self.run(place, 1);
            self.blocks.forget(offset..offset + self.cluster_bytes());
            self.table.borrow_mut()[block as usize] = offset;
            self.changed.borrow_mut().insert(block as usize);
        }
        for cluster in start..first + clusters {
            let (slice, index) = self
                .place(cluster)?
                .ok_or(Fault::Unreferenced(cluster << self.cluster_bits))?;
            let set = || self.blocks.change(slice, |bytes| put(bytes, self.order, index, 1));
            while set().is_none() {
                self.blocks.load(slice).await?;
            }
        }
        Ok(self.run(first, clusters))
    }

    /// The blocks that are needed, and not there, for so many clusters from `start` on behind those blocks.
    fn missing_blocks(&self, start: u64, clusters: u64) -> Vec<u64> {
        let table = self.table.borrow();
        let mut missing: Vec<u64> = Vec::new();
        loop {
            let end = start + missing.len() as u64 + clusters;
            let blocks = start / self.per_block()..=(end - 1) / self.per_block();
            let now: Vec<u64> = blocks
                .filter(|block| table.get(*block as usize).is_none_or(|offset| *offset == 0))
                .collect();
            if now.len() == missing.len() {
                return missing;
            }
            missing = now;
        }
    }
}

/// Puts the place of the LUKS header behind the extensions that are there; what comes after them is the backing file's name.
fn add_extension(first: &mut [u8], version: u32, offset: u64, bytes: u64) -> Result<(), OpenError> {
    let mut at = match version {
        2 => super::header::V2_BYTES,
        _ => u32_at(first, LENGTH_AT) as usize,
    };
    // The header was checked: extensions end in the cluster, or it does.
    while at + EXTENSION_BYTES <= first.len() && u32_at(first, at) != 0 {
        at += EXTENSION_BYTES + (u32_at(first, at + 4) as usize).next_multiple_of(8);
    }
    let (name_offset, name_bytes) = (u64_at(first, 8) as usize, u32_at(first, 16) as usize);
    let name = match name_offset {
        0 => Vec::new(),
        _ => first[name_offset..name_offset + name_bytes].to_vec(),
    };
    let luks_bytes = EXTENSION_BYTES + 16;
    let name_at = at + luks_bytes + EXTENSION_BYTES;
    if name_at + name.len() > first.len() {
        return Err(OpenError::invalid(
            "there is no room for the place of a LUKS header: use a shorter backing file name or larger clusters",
        ));
    }
    first[at..].fill(0);
    first[at..at + 4].copy_from_slice(&EXTENSION_LUKS.to_be_bytes());
    first[at + 4..at + 8].copy_from_slice(&16_u32.to_be_bytes());
    put_u64(first, at + 8, offset);
    put_u64(first, at + 16, bytes);
    if name_offset != 0 {
        first[name_at..name_at + name.len()].copy_from_slice(&name);
        put_u64(first, 8, name_at as u64);
    }
    Ok(())
}
