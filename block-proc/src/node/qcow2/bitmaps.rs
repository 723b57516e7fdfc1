//! Persistent bitmaps, while the image is open: the directory in memory, and what it says on the disk.
//!
//! | room | what |
//! |---|---|
//! | this file | the entries, and saying in time that they are not up to date |
//! | [`super::bitmap_load`] | from the disk when the image is opened |
//! | [`super::bitmap_store`] | to the disk when it is closed; a bitmap that goes |
//!
//! What is on the disk stays as it was when the image was opened until the first change: then the bitmaps that it makes out
//! of date are marked as in use, before it happens. A program that opens an image with such a mark knows that whoever had it
//! did not come to write the bitmap: it cannot be trusted (*inconsistent*), only removed. Ours are written when the image is
//! closed, and when the machine ends.

use super::header::{put_u32, put_u64};
use super::locks::Mutex;
use super::{Fault, Qcow2Node, io};
use crate::bitmaps::SharedBitmap;
use ipc::graph::ImageBitmap;
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// A directory entry up to its variable part, bytes.
pub(super) const FIXED_BYTES: usize = 24;
/// It is not up to date.
pub(super) const IN_USE: u32 = 1 << 0;
/// It records changes.
pub(super) const AUTO: u32 = 1 << 1;
/// Who does not know its extra data may use it all the same.
pub(super) const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
/// The one type of bitmaps that there is.
pub(super) const TRACKING: u8 = 1;
/// Largest directory, bytes (QEMU's limit).
pub(super) const MAX_DIRECTORY_BYTES: u64 = 64 << 20;
/// Most bitmaps in an image (QEMU's limit).
pub const MAX_BITMAPS: usize = 65_535;
/// Most names that one description has, bytes: a message has to hold it. Those beyond are kept, but nobody can name them.
const MAX_DESCRIBED_BYTES: usize = 8 << 10;
/// Longest name, bytes (QEMU's limit).
pub const MAX_NAME_BYTES: usize = 1023;

/// An entry of the directory.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) name: Vec<u8>,
    pub(super) extra: Vec<u8>,
    pub(super) flags: u32,
    pub(super) kind: u8,
    pub(super) granularity_bits: u8,
    /// Where its table is, and how many entries that has.
    pub(super) table: (u64, u32),
    /// It is in the directory on the disk.
    pub(super) is_on_disk: bool,
    /// What it is in memory. None: nothing that we know how to use; it stays as it is.
    pub(super) bitmap: Option<SharedBitmap>,
}

impl Entry {
    /// A new bitmap that is not on the disk yet.
    fn of(bitmap: SharedBitmap) -> Option<Self> {
        let (name, granularity) = {
            let bitmap = bitmap.borrow();
            (bitmap.persistent()?.as_bytes().to_vec(), bitmap.bits().granularity())
        };
        Some(Self {
            name,
            extra: Vec::new(),
            flags: IN_USE,
            kind: TRACKING,
            granularity_bits: granularity.trailing_zeros() as u8,
            table: (0, 0),
            is_on_disk: false,
            bitmap: Some(bitmap),
        })
    }

    /// As it is in the directory.
    fn write_to(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + FIXED_BYTES, 0);
        let fixed = &mut out[start..];
        put_u64(fixed, 0, self.table.0);
        put_u32(fixed, 8, self.table.1);
        put_u32(fixed, 12, self.flags);
        (fixed[16], fixed[17]) = (self.kind, self.granularity_bits);
        fixed[18..20].copy_from_slice(&(self.name.len() as u16).to_be_bytes());
        put_u32(fixed, 20, self.extra.len() as u32);
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

/// The directory's bytes.
pub(super) fn directory<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> Vec<u8> {
    let mut out = Vec::new();
    entries.into_iter().for_each(|entry| entry.write_to(&mut out));
    out
}

/// Which bitmaps a change makes out of date.
#[derive(Debug, Clone, Copy)]
pub enum Outdated<'a> {
    /// Those that record changes.
    Recording,
    /// All: the disk has another size, or other contents.
    All,
    /// One, whose bits are changed.
    One(&'a str),
}

/// What the driver knows of its bitmaps.
#[derive(Default)]
pub(super) struct Bitmaps {
    pub(super) entries: RefCell<Vec<Entry>>,
    /// The directory on the disk, if there is one that counts: offset and bytes.
    pub(super) place: Cell<Option<(u64, u64)>>,
    /// Held while the directory on the disk changes.
    pub(super) lock: Mutex,
    /// Every bitmap that records changes is marked: nothing is to be said before a change.
    pub(super) is_marked: Cell<bool>,
    /// The disk does not have what is in memory.
    pub(super) is_changed: Cell<bool>,
}

impl Qcow2Node {
    /// Those that can be used, and those that are inconsistent.
    pub fn bitmaps(&self) -> Vec<SharedBitmap> {
        let entries = self.bitmaps.entries.borrow();
        entries.iter().filter_map(|entry| entry.bitmap.clone()).collect()
    }

    /// The bitmap of a name.
    pub fn bitmap(&self, name: &str) -> Option<SharedBitmap> {
        let entries = self.bitmaps.entries.borrow();
        let found = entries.iter().find(|entry| entry.name == name.as_bytes());
        found.and_then(|entry| entry.bitmap.clone())
    }

    /// What query-block shows of them.
    pub(super) fn describe_bitmaps(&self) -> Vec<ImageBitmap> {
        let entries = self.bitmaps.entries.borrow();
        let known = entries
            .iter()
            .filter(|entry| entry.is_on_disk && entry.bitmap.is_some());
        let mut left = MAX_DESCRIBED_BYTES;
        let fits = |entry: &&Entry| {
            let rest = left.checked_sub(entry.name.len() + FIXED_BYTES);
            left = rest.unwrap_or(0);
            rest.is_some()
        };
        known
            .take_while(fits)
            .map(|entry| ImageBitmap {
                name: String::from_utf8_lossy(&entry.name).into_owned(),
                granularity: 1 << entry.granularity_bits,
                enabled: entry.flags & AUTO != 0,
                in_use: entry.flags & IN_USE != 0,
            })
            .collect()
    }

    /// Checks that the image can keep one more bitmap.
    ///
    /// # Errors
    /// When it cannot: as QEMU says it.
    pub fn check_new_bitmap(&self, name: &str) -> Result<(), &'static str> {
        let entries = self.bitmaps.entries.borrow();
        if self.header().version < 3 {
            return Err("Cannot store dirty bitmaps in qcow2 v2 files");
        }
        if self.refcounts.is_none() {
            return Err("the image is read-only");
        }
        if entries.iter().any(|entry| entry.name == name.as_bytes()) {
            return Err("Bitmap already exists");
        }
        if entries.len() >= MAX_BITMAPS {
            return Err("Maximum number of persistent bitmaps is already reached");
        }
        let used = directory(&*entries).len() + FIXED_BYTES + name.len().next_multiple_of(8);
        if name.len() > MAX_NAME_BYTES || used as u64 > MAX_DIRECTORY_BYTES {
            return Err("Not enough space in the bitmap directory");
        }
        Ok(())
    }

    /// Keeps a bitmap that has a name for it.
    pub fn keep_bitmap(&self, bitmap: SharedBitmap) {
        if let Some(entry) = Entry::of(bitmap) {
            // The newest first, after those that are there already: where QEMU puts it.
            let mut entries = self.bitmaps.entries.borrow_mut();
            let there = entries.iter().filter(|entry| entry.is_on_disk).count();
            entries.insert(there, entry);
            self.bitmaps.is_changed.set(true);
        }
    }

    /// Forgets one that is not on the disk (any more).
    pub fn forget_bitmap(&self, bitmap: &SharedBitmap) {
        let is_it = |entry: &Entry| entry.bitmap.as_ref().is_some_and(|other| Rc::ptr_eq(other, bitmap));
        self.bitmaps.entries.borrow_mut().retain(|entry| !is_it(entry));
    }

    /// Says, before a change, which bitmaps on the disk are not up to date any more: each on its own, so that the others
    /// keep their worth if nobody comes to write them.
    pub(super) async fn outdate_bitmaps(&self, which: Outdated<'_>) -> Result<(), Fault> {
        if self.bitmaps.is_marked.get() && matches!(which, Outdated::Recording) {
            return Ok(());
        }
        let _guard = self.bitmaps.lock.lock().await;
        let suffers = |entry: &Entry| match which {
            Outdated::Recording => entry.flags & AUTO != 0,
            Outdated::All => true,
            Outdated::One(name) => entry.name == name.as_bytes(),
        };
        let mut marked = self.bitmaps.entries.borrow().clone();
        let mut any = false;
        for entry in marked.iter_mut().filter(|entry| entry.is_on_disk) {
            if suffers(entry) && entry.flags & IN_USE == 0 {
                (entry.flags, any) = (entry.flags | IN_USE, true);
            }
        }
        if any {
            self.write_marks(&marked).await?;
            let mut entries = self.bitmaps.entries.borrow_mut();
            for (entry, marked) in entries.iter_mut().zip(&marked) {
                entry.flags |= marked.flags & IN_USE;
            }
            self.bitmaps.is_changed.set(true);
        }
        if !matches!(which, Outdated::One(_)) {
            self.bitmaps.is_marked.set(true);
        }
        Ok(())
    }

    /// Writes the directory where it is.
    async fn write_marks(&self, entries: &[Entry]) -> Result<(), Fault> {
        self.check_writable()?;
        let Some((offset, bytes)) = self.bitmaps.place.get() else {
            return Ok(());
        };
        let mut directory = directory(entries.iter().filter(|entry| entry.is_on_disk));
        if directory.len() as u64 != bytes {
            return Err(Errno::EIO.into());
        }
        directory.resize(bytes.next_multiple_of(self.shared.l2.slice_bytes()) as usize, 0);
        io::write(&*self.shared.child, offset, &directory).await?;
        Ok(self.shared.child.flush().await?)
    }

    /// A bitmap's bits are about to change by something else than a write.
    ///
    /// # Errors
    /// The child's.
    pub async fn outdate_bitmap(&self, name: &str) -> Result<(), Errno> {
        let result = self.outdate_bitmaps(Outdated::One(name)).await;
        self.answer(result).await
    }

    /// The disk has other contents: everything that a bitmap records is dirty.
    pub(super) fn dirty_all_bitmaps(&self) {
        let bytes = self.header().bytes;
        for bitmap in self.bitmaps() {
            let mut bitmap = bitmap.borrow_mut();
            bitmap.resize(bytes);
            bitmap.record(0..bytes);
        }
        self.bitmaps.is_changed.set(true);
    }
}
