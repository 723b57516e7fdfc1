//! Encryption of a new image: what is done to one that was just created, before there is any data in it.
//!
//! The LUKS header takes clusters in a row at the image's end. They are counted first, then they are filled, and only then
//! the image's header says that it is encrypted.

use super::header::{Encryption, extension, field, put_u32, u32_at, u64_at};
use super::open::read_first_cluster;
use super::refcounts::{Refcounts, Run, put};
use super::{Children, Fault, Header, OpenError, Options, Qcow2Node, io, names};
use crate::crypto::luks::{CreateOptions, create};
use crate::crypto::pace::Pace;
use crate::crypto::random::Random;
use crate::node::Node;
use ipc::secret::Secret;
use std::rc::Rc;

/// Where the encryption method is, bytes from the image's start.
const METHOD_AT: usize = 32;

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
    let (first, header) = read_first_cluster(&*child, &options).await?;
    if header.encryption.is_some() {
        return Err(OpenError::invalid("the image is encrypted already"));
    }
    let new = match encryption {
        NewEncryption::Aes => Encryption::Aes,
        NewEncryption::Luks(luks) => {
            let bytes = luks.area_bytes();
            // Before anything is written: whether there is room at all.
            first_cluster(&first, &header, Encryption::Luks { offset: 0, bytes })?;
            let pace = Pace::new(&*child, options.align.max(512) as usize);
            let created = create(&luks, key.bytes(), random, &pace).await?;
            let options = Options {
                writable: true,
                key: None,
                ..options
            };
            // Nothing of the guest's is looked at.
            let children = Children {
                backing: None,
                without_backing: true,
                data_file: header.has_data_file().then(|| child.clone()),
                account: None,
            };
            let node = Qcow2Node::open(child.clone(), options, children).await?;
            let offset = node.luks_area(bytes, created.bytes).await?;
            Encryption::Luks { offset, bytes }
        }
    };
    // The refcount table may be elsewhere now.
    let first = io::read(&*child, 0, first.len()).await?;
    io::write(&*child, 0, &first_cluster(&first, &header, new)?).await?;
    Ok(child.flush().await?)
}

/// The first cluster of an image that becomes an encrypted one.
fn first_cluster(first: &[u8], header: &Header, encryption: Encryption) -> Result<Vec<u8>, OpenError> {
    let mut fixed = first[..names::header_bytes(first)].to_vec();
    put_u32(&mut fixed, METHOD_AT, encryption.method());
    let mut extensions = names::extensions(first);
    if let Encryption::Luks { offset, bytes } = encryption {
        let place = [offset.to_be_bytes(), bytes.to_be_bytes()].concat();
        extensions.push((extension::LUKS, place));
    }
    // As it is there: what is in the parsed header is made for messages.
    let name_at = u64_at(first, field::BACKING) as usize;
    let name = match header.backing_name {
        Some(_) => &first[name_at..name_at + u32_at(first, field::BACKING + 8) as usize],
        None => &[],
    };
    names::first_cluster(&fixed, &extensions, name, first.len()).map_err(|_| {
        OpenError::invalid(
            "there is no room for the place of a LUKS header: use a shorter backing file name or larger clusters",
        )
    })
}

impl Qcow2Node {
    /// Writes the LUKS header to clusters of its own and returns where.
    async fn luks_area(&self, bytes: u64, start: Vec<u8>) -> Result<u64, OpenError> {
        let clusters = bytes.div_ceil(self.cluster_bytes());
        let offset = {
            let _commit = self.commit_lock.lock().await;
            self.check_writable()?.allocate_behind(clusters).await?.offset
        };
        let mut area = start;
        // All of it, so that the file is as long as its header says.
        area.resize((clusters * self.cluster_bytes()) as usize, 0);
        io::write(&*self.shared.child, offset, &area).await?;
        self.commit().await?;
        Ok(offset)
    }
}

impl Refcounts {
    /// Takes clusters in a row behind everything else, however many, also more than one block counts (a LUKS header in
    /// clusters of 512 bytes): the blocks for their counts come before them. The
    /// caller holds the commit lock.
    ///
    /// # Errors
    /// The child's, or ENOSPC when an image cannot be larger.
    async fn allocate_behind(&self, clusters: u64) -> Result<Run, Fault> {
        let (start, missing) = loop {
            let start = self.shared.end.get() >> self.cluster_bits;
            let missing = self.missing_blocks(start, clusters);
            let covered = self.table.borrow().len() as u64 * self.per_block();
            if start + missing.len() as u64 + clusters <= covered {
                break (start, missing);
            }
            self.hint.set(covered);
            self.grow(true).await?;
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
