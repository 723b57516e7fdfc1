//! Persistent bitmaps to the disk: always to clusters that are free, then the header points at the new directory, then what
//! only the old one had becomes free. A cut at any point leaves the one or the other, and at worst clusters that nobody has.

use super::bitmap_load::ALL_ONES;
use super::bitmaps::{AUTO, Entry, directory};
use super::header::{self, Header, autoclear, extension, field, put_u32, put_u64, u64_at};
use super::names::{self, Extension};
use super::{Fault, Qcow2Node, io};
use crate::bitmap::Bitmap;
use crate::bitmaps::bits_bytes;
use nix::errno::Errno;

/// Ranges of the image.
type Ranges = Vec<(u64, u64)>;

impl Qcow2Node {
    /// Writes the bitmaps, so that whoever opens the image next can trust them. With the next change they are marked again.
    ///
    /// # Errors
    /// The child's.
    pub async fn store_bitmaps(&self) -> Result<(), Errno> {
        if self.refcounts.is_none() {
            return Ok(());
        }
        let mut any = self.bitmaps.is_changed.get();
        for bitmap in self.bitmaps() {
            any |= bitmap.borrow_mut().take_changed();
        }
        if !any {
            return Ok(());
        }
        let result = self.store_all().await;
        self.bitmaps.is_changed.set(result.is_err());
        self.answer(result).await
    }

    /// Takes a bitmap out of the image.
    ///
    /// # Errors
    /// The child's.
    pub async fn remove_bitmap(&self, name: &str) -> Result<(), Errno> {
        let result = self.remove_now(name).await;
        self.answer(result).await
    }

    async fn store_all(&self) -> Result<(), Fault> {
        let _guard = self.bitmaps.lock.lock().await;
        // A change that begins from now on waits for the lock, and marks what is stored here.
        self.bitmaps.is_marked.set(false);
        let old = self.bitmaps.entries.borrow().clone();
        let (mut new, mut given_up, mut taken) = (Vec::new(), Ranges::new(), Ranges::new());
        for entry in &old {
            let Some(bitmap) = &entry.bitmap else {
                new.push(entry.clone());
                continue;
            };
            if bitmap.borrow().is_inconsistent() {
                // As it is on the disk; and what was never there has nothing to say.
                new.extend(entry.is_on_disk.then(|| entry.clone()));
                continue;
            }
            let (bits, enabled) = (bitmap.borrow().all_bits(), bitmap.borrow().is_enabled());
            let table = match self.write_bits(&bits, &mut taken).await {
                Ok(table) => table,
                Err(fault) => return self.give_back_new(&taken, fault).await,
            };
            given_up.extend(self.bitmap_ranges(entry).await.unwrap_or_default());
            new.push(Entry {
                extra: Vec::new(),
                flags: if enabled { AUTO } else { 0 },
                table,
                is_on_disk: true,
                ..entry.clone()
            });
        }
        given_up.extend(self.put_directory(&new, taken).await?);
        for entry in self.bitmaps.entries.borrow_mut().iter_mut() {
            if let Some(stored) = new.iter().find(|stored| stored.name == entry.name) {
                *entry = stored.clone();
            }
        }
        self.give_up(&given_up).await
    }

    async fn remove_now(&self, name: &str) -> Result<(), Fault> {
        let _guard = self.bitmaps.lock.lock().await;
        let (gone, left): (Vec<Entry>, Vec<Entry>) = {
            let entries = self.bitmaps.entries.borrow();
            let on_disk = entries.iter().filter(|entry| entry.is_on_disk).cloned();
            on_disk.partition(|entry| entry.name == name.as_bytes())
        };
        let Some(gone) = gone.first() else { return Ok(()) };
        let mut given_up = self.bitmap_ranges(gone).await.unwrap_or_default();
        given_up.extend(self.put_directory(&left, Ranges::new()).await?);
        self.bitmaps
            .entries
            .borrow_mut()
            .retain(|entry| !entry.is_on_disk || entry.name != name.as_bytes());
        self.give_up(&given_up).await
    }

    /// Writes bits and their table to free clusters. Returns where the table is, and how many entries it has.
    async fn write_bits(&self, bits: &Bitmap, taken: &mut Ranges) -> Result<(u64, u32), Fault> {
        let cluster = self.cluster_bytes();
        let bytes = bits_bytes(bits.bytes(), bits.granularity());
        let mut table = Vec::new();
        for at in (0..bytes).step_by(cluster as usize) {
            let length = (bytes - at).min(cluster) as usize;
            let mut data = bits.store(at, length);
            let place = if data.iter().all(|byte| *byte == 0) {
                0
            } else if data.len() as u64 == cluster && data.iter().all(|byte| *byte == 0xff) {
                ALL_ONES
            } else {
                data.resize(cluster as usize, 0);
                self.write_anew(&data, taken).await?
            };
            table.push(place);
        }
        if table.is_empty() {
            return Ok((0, 0));
        }
        let entries: Vec<u8> = table.iter().flat_map(|place: &u64| place.to_be_bytes()).collect();
        Ok((self.write_anew(&entries, taken).await?, table.len() as u32))
    }

    /// Writes data to free clusters in a row, which `taken` lists then.
    async fn write_anew(&self, data: &[u8], taken: &mut Ranges) -> Result<u64, Fault> {
        let cluster = self.cluster_bytes();
        let mut data = data.to_vec();
        data.resize(data.len().next_multiple_of(cluster as usize), 0);
        let offset = {
            let _commit = self.commit_lock.lock().await;
            self.allocate_row(data.len() as u64 / cluster).await?
        };
        taken.push((offset, data.len() as u64));
        self.shared.use_up_to(offset, data.len() as u64);
        for (number, piece) in data.chunks(cluster as usize).enumerate() {
            io::write(&*self.shared.child, offset + number as u64 * cluster, piece).await?;
        }
        Ok(offset)
    }

    /// Makes these entries the directory. Returns where the old one was, which is not used any more.
    async fn put_directory(&self, entries: &[Entry], mut taken: Ranges) -> Result<Ranges, Fault> {
        let bytes = directory(entries);
        let place = if bytes.is_empty() {
            Ok(None)
        } else {
            let written = self.write_anew(&bytes, &mut taken).await;
            written.map(|offset| Some((offset, bytes.len() as u64)))
        };
        // What the header will refer to is counted, and on the disk, before it does.
        let pointed = match place {
            Ok(place) => match self.commit().await {
                Ok(()) => self
                    .point_at_directory(place, entries.len() as u32)
                    .await
                    .map(|()| place),
                Err(fault) => Err(fault),
            },
            Err(fault) => Err(fault),
        };
        let place = match pointed {
            Ok(place) => place,
            Err(fault) => return self.give_back_new(&taken, fault).await,
        };
        let old = self.bitmaps.place.replace(place);
        let own = old.filter(|(offset, bytes)| self.is_bitmap_place(*offset, *bytes));
        let whole = |(offset, bytes): (u64, u64)| (offset, bytes.next_multiple_of(self.cluster_bytes()));
        Ok(own.map(whole).into_iter().collect())
    }

    /// Nothing refers to these ranges any more.
    async fn give_up(&self, ranges: &[(u64, u64)]) -> Result<(), Fault> {
        self.check_writable()?.release(ranges, self.options.unmap).await?;
        self.commit().await
    }

    /// It did not come to pass: nothing refers to what was taken.
    async fn give_back_new<T>(&self, taken: &[(u64, u64)], fault: Fault) -> Result<T, Fault> {
        self.check_writable()?.release(taken, false).await?;
        Err(fault)
    }

    /// Has the header say where the directory is.
    async fn point_at_directory(&self, place: Option<(u64, u64)>, count: u32) -> Result<(), Fault> {
        let shared = &self.shared;
        shared.settle_header().await?;
        let _guard = shared.header_lock.lock().await;
        let mut cluster = io::read(&*shared.child, 0, self.cluster_bytes() as usize).await?;
        let known = shared.header.borrow().clone();
        cluster[..known.len()].copy_from_slice(&known);
        let mut extensions = names::extensions(&cluster);
        extensions.retain(|(kind, _)| *kind != extension::BITMAPS);
        let mut fixed = cluster[..names::header_bytes(&cluster)].to_vec();
        let features = u64_at(&fixed, field::AUTOCLEAR) & !autoclear::BITMAPS;
        put_u64(&mut fixed, field::AUTOCLEAR, features);
        if let Some(place) = place {
            extensions.push(bitmaps_extension(place, count));
            put_u64(&mut fixed, field::AUTOCLEAR, features | autoclear::BITMAPS);
        }
        let name = self.header().backing_name.clone().unwrap_or_default();
        let new = names::first_cluster(&fixed, &extensions, name.as_bytes(), cluster.len())?;
        let parsed = Header::parse(&new, shared.end.get()).map_err(|_| Errno::EINVAL)?;
        self.write_first_cluster(&new, &cluster).await?;
        let length = known.len();
        shared.header.borrow_mut().copy_from_slice(&new[..length]);
        *self.header.borrow_mut() = parsed;
        Ok(())
    }

    /// One write: what changes is within 4 KiB, which disks write as one.
    pub(super) async fn write_first_cluster(&self, new: &[u8], old: &[u8]) -> Result<(), Errno> {
        let changed = new.iter().zip(old).rposition(|(new, old)| new != old);
        let bytes = changed.map_or(0, |last| {
            (last + 1)
                .next_multiple_of(self.shared.header.borrow().len().min(512))
                .next_multiple_of(self.options.align as usize)
        });
        if bytes == 0 {
            return Ok(());
        }
        let written = match io::write(&*self.shared.child, 0, &new[..bytes]).await {
            Ok(()) => self.shared.child.flush().await,
            Err(errno) => Err(errno),
        };
        // The old one is written again before tables change.
        self.shared.header_unsettled.set(written.is_err());
        written
    }
}

fn bitmaps_extension((offset, bytes): (u64, u64), count: u32) -> Extension {
    let mut data = vec![0; 24];
    put_u32(&mut data, 0, count);
    put_u64(&mut data, 8, bytes);
    put_u64(&mut data, 16, offset);
    (header::extension::BITMAPS, data)
}
