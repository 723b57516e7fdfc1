//! Persistent bitmaps of other programs: who changes the disk without keeping them must say so, in time.

use super::header::{autoclear, field, put_u32, put_u64, u32_at};
use super::{Fault, Qcow2Node, io};
use nix::errno::Errno;

/// A directory entry up to its variable part, bytes.
const FIXED_BYTES: usize = 24;
/// Where its flags are.
const FLAGS_AT: usize = 12;
/// It is not up to date.
const IN_USE: u32 = 1 << 0;
/// It records changes.
const AUTO: u32 = 1 << 1;
/// Largest directory, bytes (QEMU's limit).
pub(super) const MAX_DIRECTORY_BYTES: u64 = 64 << 20;

/// Where a directory's entries are. `None`: it does not have so many.
pub(super) fn entries(directory: &[u8], count: u32) -> Option<Vec<usize>> {
    let mut found = Vec::new();
    let mut at = 0_usize;
    for _ in 0..count {
        let fixed = directory.get(at..at.checked_add(FIXED_BYTES)?)?;
        found.push(at);
        let (name, extra) = (u32_at(fixed, 16) as usize & 0xffff, u32_at(fixed, 20) as usize);
        at += (FIXED_BYTES + name + extra).next_multiple_of(8);
    }
    Some(found)
}

/// Which bitmaps of an image are up to date.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpToDate {
    /// All that say so.
    All,
    /// Of these, the ones that do not record changes.
    Resting,
    /// None, or there are none.
    None,
}

impl Qcow2Node {
    /// Says, before the first change, that bitmaps which record changes are not up to date any more: each on its own, so
    /// that the others keep their worth. `all`: none of them fits the disk any more.
    pub(super) async fn spoil_bitmaps(&self, all: bool) -> Result<(), Fault> {
        let none_suffers = || match self.bitmaps.get() {
            UpToDate::All => false,
            UpToDate::Resting => !all,
            UpToDate::None => true,
        };
        if none_suffers() {
            return Ok(());
        }
        let _guard = self.bitmaps_lock.lock().await;
        if none_suffers() {
            return Ok(());
        }
        let mut left = if all { UpToDate::None } else { UpToDate::Resting };
        if !self.mark_bitmaps(all).await? {
            // What they are cannot be understood, so the whole extension is out of date.
            self.shared
                .change_header(|header| {
                    let features = super::header::u64_at(header, field::AUTOCLEAR) & !autoclear::BITMAPS;
                    put_u64(header, field::AUTOCLEAR, features);
                })
                .await?;
            self.header.borrow_mut().autoclear &= !autoclear::BITMAPS;
            left = UpToDate::None;
        }
        self.bitmaps.set(left);
        Ok(())
    }

    /// `false`: the directory is damaged.
    async fn mark_bitmaps(&self, all: bool) -> Result<bool, Fault> {
        let (bitmaps, cluster) = (self.header().bitmaps, self.cluster_bytes());
        let Some(bitmaps) = bitmaps else { return Ok(false) };
        let (offset, bytes) = (bitmaps.directory_offset, bitmaps.directory_bytes);
        let refcounts = self.check_writable()?;
        let fits = bytes <= MAX_DIRECTORY_BYTES && offset.saturating_add(bytes) <= self.shared.end.get();
        if !fits || !self.shared.is_table_place(offset) {
            return Ok(false);
        }
        for at in (offset..offset + bytes).step_by(cluster as usize) {
            if refcounts.check_data(at).is_err() {
                return Ok(false);
            }
        }
        let whole = bytes.next_multiple_of(self.shared.l2.slice_bytes());
        let mut directory = io::read(&*self.shared.child, offset, whole as usize).await?;
        let Some(entries) = entries(&directory[..bytes as usize], bitmaps.count) else {
            return Ok(false);
        };
        for at in entries {
            let flags = u32_at(&directory, at + FLAGS_AT);
            if all || flags & AUTO != 0 {
                put_u32(&mut directory, at + FLAGS_AT, flags | IN_USE);
            }
        }
        self.write_directory(offset, &directory).await?;
        Ok(true)
    }

    async fn write_directory(&self, offset: u64, directory: &[u8]) -> Result<(), Errno> {
        io::write(&*self.shared.child, offset, directory).await?;
        self.shared.child.flush().await
    }
}
