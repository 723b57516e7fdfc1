//! Persistent bitmaps from the disk. Everything there is untrusted: counts, places and lengths are checked before memory is
//! taken or anything is read.

use super::bitmaps::{
    AUTO, EXTRA_DATA_COMPATIBLE, Entry, FIXED_BYTES, IN_USE, MAX_BITMAPS, MAX_DIRECTORY_BYTES, MAX_NAME_BYTES, TRACKING,
};
use super::entry::OFFSET_MASK;
use super::header::{autoclear, u32_at, u64_at};
use super::{OpenError, Qcow2Node, io};
use crate::bitmap::Bitmap;
use crate::bitmaps::{DirtyBitmap, MAX_BITS_BYTES, bits_bytes};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

/// Most memory for the bits of all bitmaps of an image, bytes.
const MAX_ALL_BITS_BYTES: u64 = 4 * MAX_BITS_BYTES;
/// Granularities that the format allows, powers of two.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// A table's entry for a cluster of ones.
pub(super) const ALL_ONES: u64 = 1;
/// Largest table that is looked at in order to give up what it refers to, bytes.
const MAX_TABLE_BYTES: u64 = 32 << 20;

/// The entries of a directory.
///
/// # Errors
/// What is wrong with it, for a person.
pub(super) fn parse(directory: &[u8], count: u32) -> Result<Vec<Entry>, String> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut names = BTreeSet::new();
    let mut at = 0_usize;
    for number in 0..count {
        let short = || format!("the directory ends within bitmap {number}");
        let fixed = directory.get(at..at + FIXED_BYTES).ok_or_else(short)?;
        let (name, extra) = (u32_at(fixed, 16) as usize & 0xffff, u32_at(fixed, 20) as usize);
        let bytes = (FIXED_BYTES + name + extra).next_multiple_of(8);
        let variable = directory.get(at + FIXED_BYTES..at + bytes).ok_or_else(short)?;
        let entry = Entry {
            name: variable[extra..extra + name].to_vec(),
            extra: variable[..extra].to_vec(),
            flags: u32_at(fixed, 12),
            kind: fixed[16],
            granularity_bits: fixed[17],
            table: (u64_at(fixed, 0), u32_at(fixed, 8)),
            is_on_disk: true,
            bitmap: None,
        };
        if entry.name.is_empty() || entry.name.len() > MAX_NAME_BYTES {
            return Err(format!("bitmap {number} has a name of {name} bytes"));
        }
        if !names.insert(entry.name.clone()) {
            return Err(format!(
                "two bitmaps are called {:?}",
                String::from_utf8_lossy(&entry.name)
            ));
        }
        if !GRANULARITY_BITS.contains(&entry.granularity_bits) {
            return Err(format!(
                "bitmap {number} has a granularity of 2^{} bytes",
                entry.granularity_bits
            ));
        }
        entries.push(entry);
        at += bytes;
    }
    if at != directory.len() {
        return Err(format!(
            "the directory is {} bytes long, its entries {at}",
            directory.len()
        ));
    }
    Ok(entries)
}

impl Entry {
    /// Whether it is something that we know how to use.
    fn is_known(&self) -> bool {
        let has_known_flags = self.flags & !(IN_USE | AUTO | EXTRA_DATA_COMPATIBLE) == 0;
        let has_known_data = self.extra.is_empty() || self.flags & EXTRA_DATA_COMPATIBLE != 0;
        self.kind == TRACKING && has_known_flags && has_known_data
    }

    fn said(&self, what: &str) -> OpenError {
        OpenError::Bitmaps(format!("{:?}: {what}", String::from_utf8_lossy(&self.name)))
    }
}

impl Qcow2Node {
    /// Reads what the image has.
    pub(super) async fn load_bitmaps(&self) -> Result<(), OpenError> {
        let (extension, features, disk) = {
            let header = self.header();
            (header.bitmaps, header.autoclear, header.bytes)
        };
        // Without the feature bit, somebody has written to the image who does not know of them: there are none.
        let Some(extension) = extension.filter(|_| features & autoclear::BITMAPS != 0) else {
            self.bitmaps.is_marked.set(true);
            return Ok(());
        };
        let (offset, bytes) = (extension.directory_offset, extension.directory_bytes);
        if bytes == 0 || bytes > MAX_DIRECTORY_BYTES || extension.count as usize > MAX_BITMAPS {
            return Err(OpenError::Bitmaps(format!(
                "{} bitmaps in {bytes} bytes",
                extension.count
            )));
        }
        if !self.is_bitmap_place(offset, bytes) {
            return Err(OpenError::Bitmaps(format!(
                "there cannot be a directory at {offset:#x}"
            )));
        }
        let whole = bytes.next_multiple_of(self.shared.l2.slice_bytes());
        let directory = io::read(&*self.shared.child, offset, whole as usize).await?;
        let mut entries = parse(&directory[..bytes as usize], extension.count).map_err(OpenError::Bitmaps)?;
        let mut left = MAX_ALL_BITS_BYTES;
        for entry in &mut entries {
            let Ok(name) = String::from_utf8(entry.name.clone()) else {
                continue;
            };
            if !entry.is_known() {
                continue;
            }
            let granularity = 1 << entry.granularity_bits;
            let bitmap = if entry.flags & IN_USE != 0 {
                DirtyBitmap::inconsistent(0, granularity, Some(name))
            } else {
                let bits = bits_bytes(disk, granularity);
                left = left
                    .checked_sub(bits)
                    .filter(|_| bits <= MAX_BITS_BYTES)
                    .ok_or_else(|| entry.said("its bits need too much memory"))?;
                let bits = self.load_bits(entry, disk).await?;
                DirtyBitmap::new(bits, entry.flags & AUTO != 0, Some(name))
            };
            entry.bitmap = Some(Rc::new(RefCell::new(bitmap)));
        }
        self.bitmaps.place.set(Some((offset, bytes)));
        self.bitmaps.entries.replace(entries);
        Ok(())
    }

    async fn load_bits(&self, entry: &Entry, disk: u64) -> Result<Bitmap, OpenError> {
        let cluster = self.cluster_bytes();
        let mut bits = Bitmap::new(disk, 1 << entry.granularity_bits);
        let bytes = bits_bytes(disk, bits.granularity());
        let table = self.bitmap_table(entry).await?;
        if table.len() as u64 != bytes.div_ceil(cluster) {
            return Err(entry.said("its table does not fit the disk's size"));
        }
        for (number, place) in table.into_iter().enumerate() {
            let at = number as u64 * cluster;
            let length = (bytes - at).min(cluster) as usize;
            match place {
                0 => {}
                ALL_ONES => bits.load(at, &vec![0xff; length]),
                place if self.is_bitmap_place(place, cluster) => {
                    let data = io::read(&*self.shared.child, place, cluster as usize).await?;
                    bits.load(at, &data[..length]);
                }
                place => return Err(entry.said(&format!("there cannot be bits at {place:#x}"))),
            }
        }
        Ok(bits)
    }

    async fn bitmap_table(&self, entry: &Entry) -> Result<Vec<u64>, OpenError> {
        let (offset, entries) = entry.table;
        let bytes = u64::from(entries) * 8;
        if bytes == 0 {
            return Ok(Vec::new());
        }
        if bytes > MAX_TABLE_BYTES || !self.is_bitmap_place(offset, bytes) {
            return Err(entry.said("its table is too large, or lies outside of the image"));
        }
        let whole = bytes.next_multiple_of(self.shared.l2.slice_bytes());
        let table = io::read(&*self.shared.child, offset, whole as usize).await?;
        let places = table[..bytes as usize].chunks_exact(8).map(|place| u64_at(place, 0));
        Ok(places.collect())
    }

    /// Which ranges of the image an entry has. `None`: they cannot be its own, and are not touched.
    pub(super) async fn bitmap_ranges(&self, entry: &Entry) -> Option<Vec<(u64, u64)>> {
        let (cluster, (offset, entries)) = (self.cluster_bytes(), entry.table);
        if entries == 0 {
            return Some(Vec::new());
        }
        let table = self.bitmap_table(entry).await.ok()?;
        let places = table.into_iter().filter(|place| place & OFFSET_MASK != 0);
        let mut ranges: Vec<(u64, u64)> = places.map(|place| (place, cluster)).collect();
        ranges.push((offset, (u64::from(entries) * 8).next_multiple_of(cluster)));
        let mut seen = BTreeSet::new();
        for (offset, bytes) in &ranges {
            let are_its_own = (*offset..offset + bytes)
                .step_by(cluster as usize)
                .all(|at| seen.insert(at) && self.is_bitmap_place(at, 1));
            if !are_its_own {
                return None;
            }
        }
        Some(ranges)
    }

    /// Whether a range can be a bitmap's: on clusters, in the image, and not a table's of the image itself.
    pub(super) fn is_bitmap_place(&self, offset: u64, bytes: u64) -> bool {
        let Some(end) = offset.checked_add(bytes).filter(|end| *end <= self.shared.end.get()) else {
            return false;
        };
        let is_free = |at| {
            self.refcounts
                .as_ref()
                .is_none_or(|counts| counts.check_data(at).is_ok())
        };
        self.shared.is_table_place(offset) && (offset..end).step_by(self.cluster_bytes() as usize).all(is_free)
    }
}
