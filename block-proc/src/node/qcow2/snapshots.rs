//! The table of internal snapshots: each has an L1 table of its own.

use super::header::{Header, put_u32, put_u64, u32_at, u64_at};
use super::{OpenError, Shared, io};
use ipc::graph::SnapshotInfo;

/// An entry up to its variable part, bytes.
const FIXED_BYTES: usize = 40;
/// Most bytes of an entry that we do not know (QEMU's limit).
const MAX_EXTRA_BYTES: u32 = 1024;
/// Largest table, bytes (QEMU's limit).
pub const MAX_TABLE_BYTES: u64 = 64 << 20;
/// What we write of an entry's extra data: state size, disk size, instruction count.
const EXTRA_BYTES: usize = 24;

/// An entry of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its L1 table.
    pub l1_offset: u64,
    /// How many entries that has.
    pub l1_entries: u32,
    date_seconds: u32,
    date_nanoseconds: u32,
    vm_clock_ns: u64,
    vm_state_bytes: u32,
    /// As found: whatever other programs keep there stays.
    extra: Vec<u8>,
    id: Vec<u8>,
    name: Vec<u8>,
}

impl Snapshot {
    /// A new one. The caller has checked that id and name are not too long.
    pub fn new(info: &SnapshotInfo, l1_offset: u64, l1_entries: u32, disk_bytes: u64) -> Self {
        let mut extra = vec![0; EXTRA_BYTES];
        put_u64(&mut extra, 0, info.vm_state_bytes);
        put_u64(&mut extra, 8, disk_bytes);
        put_u64(&mut extra, 16, info.icount.unwrap_or(u64::MAX));
        Self {
            l1_offset,
            l1_entries,
            date_seconds: info.date_seconds,
            date_nanoseconds: info.date_nanoseconds,
            vm_clock_ns: info.vm_clock_ns,
            vm_state_bytes: u32::try_from(info.vm_state_bytes).unwrap_or_default(),
            extra,
            id: info.id.clone().into_bytes(),
            name: info.name.clone().into_bytes(),
        }
    }

    /// Where its L1 table is: offset and length, bytes.
    pub fn l1_range(&self) -> (u64, u64) {
        (self.l1_offset, u64::from(self.l1_entries) * 8)
    }

    /// Its id.
    pub fn id(&self) -> &[u8] {
        &self.id
    }

    /// Size of the disk at that time, bytes; `None` where the image does not say.
    pub fn disk_bytes(&self) -> Option<u64> {
        (self.extra.len() >= 16).then(|| u64_at(&self.extra, 8))
    }

    /// What it is for others. `disk_bytes`: size of the disk now.
    pub fn info(&self, disk_bytes: u64) -> SnapshotInfo {
        let vm_state_bytes = match self.extra.len() {
            8.. => u64_at(&self.extra, 0),
            _ => u64::from(self.vm_state_bytes),
        };
        let icount = (self.extra.len() >= EXTRA_BYTES).then(|| u64_at(&self.extra, 16));
        SnapshotInfo {
            id: String::from_utf8_lossy(&self.id).into_owned(),
            name: String::from_utf8_lossy(&self.name).into_owned(),
            vm_state_bytes,
            date_seconds: self.date_seconds,
            date_nanoseconds: self.date_nanoseconds,
            vm_clock_ns: self.vm_clock_ns,
            icount: icount.filter(|count| *count != u64::MAX),
            disk_bytes: self.disk_bytes().unwrap_or(disk_bytes),
        }
    }

    /// Its entry, bytes.
    fn bytes(&self) -> u64 {
        (FIXED_BYTES + self.extra.len() + self.id.len() + self.name.len()).next_multiple_of(8) as u64
    }

    fn write_to(&self, out: &mut Vec<u8>) {
        let mut fixed = [0; FIXED_BYTES];
        put_u64(&mut fixed, 0, self.l1_offset);
        put_u32(&mut fixed, 8, self.l1_entries);
        put_u32(&mut fixed, 12, (self.id.len() as u32) << 16 | self.name.len() as u32);
        put_u32(&mut fixed, 16, self.date_seconds);
        put_u32(&mut fixed, 20, self.date_nanoseconds);
        put_u64(&mut fixed, 24, self.vm_clock_ns);
        put_u32(&mut fixed, 32, self.vm_state_bytes);
        put_u32(&mut fixed, 36, self.extra.len() as u32);
        out.extend_from_slice(&fixed);
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

/// Size of a table, bytes.
pub fn table_bytes(snapshots: &[Snapshot]) -> u64 {
    snapshots.iter().map(Snapshot::bytes).sum()
}

/// A table as it is in the image.
pub fn table(snapshots: &[Snapshot]) -> Vec<u8> {
    let mut out = Vec::new();
    snapshots.iter().for_each(|snapshot| snapshot.write_to(&mut out));
    out
}

/// Reads an image's table. `align`: reads start and end on multiples of it.
///
/// # Errors
/// What is wrong with it.
pub async fn read_table(shared: &Shared, header: &Header, align: u64) -> Result<Vec<Snapshot>, OpenError> {
    let mut snapshots = Vec::new();
    let mut window = Window {
        shared,
        align,
        start: 0,
        bytes: Vec::new(),
    };
    let mut at = header.snapshots_offset;
    for _ in 0..header.snapshots {
        let fixed = window.read(at, FIXED_BYTES).await?;
        let extra_bytes = u32_at(&fixed, 36);
        if extra_bytes > MAX_EXTRA_BYTES {
            return Err(OpenError::invalid(format!(
                "a snapshot has {extra_bytes} bytes of extra data"
            )));
        }
        let (id, name) = (u32_at(&fixed, 12) >> 16, u32_at(&fixed, 12) & 0xffff);
        let length = (extra_bytes + id + name) as usize;
        let mut extra = window.read(at + FIXED_BYTES as u64, length).await?;
        let mut id = extra.split_off(extra_bytes as usize);
        let name = id.split_off(id.len() - name as usize);
        let snapshot = Snapshot {
            l1_offset: u64_at(&fixed, 0),
            l1_entries: u32_at(&fixed, 8),
            date_seconds: u32_at(&fixed, 16),
            date_nanoseconds: u32_at(&fixed, 20),
            vm_clock_ns: u64_at(&fixed, 24),
            vm_state_bytes: u32_at(&fixed, 32),
            extra,
            id,
            name,
        };
        let (offset, bytes) = snapshot.l1_range();
        let fits = bytes <= super::header::MAX_L1_BYTES && offset.saturating_add(bytes) <= shared.end.get();
        if bytes > 0 && !(shared.is_table_place(offset) && fits) {
            return Err(OpenError::invalid(format!(
                "a snapshot's L1 table ({bytes} bytes) is at {offset:#x}"
            )));
        }
        at += snapshot.bytes();
        if at - header.snapshots_offset > MAX_TABLE_BYTES {
            return Err(OpenError::invalid("the snapshot table is larger than 64 MiB"));
        }
        snapshots.push(snapshot);
    }
    Ok(snapshots)
}

/// Part of the image, read ahead: entries are small.
struct Window<'a> {
    shared: &'a Shared,
    align: u64,
    start: u64,
    bytes: Vec<u8>,
}

impl Window<'_> {
    const BYTES: u64 = 16 << 10;

    async fn read(&mut self, offset: u64, bytes: usize) -> Result<Vec<u8>, OpenError> {
        let end = offset + bytes as u64;
        if end > self.shared.end.get() {
            return Err(OpenError::invalid("the snapshot table does not end in the file"));
        }
        if offset < self.start || end > self.start + self.bytes.len() as u64 {
            self.start = offset / self.align * self.align;
            let bytes = (end - self.start).max(Self::BYTES).next_multiple_of(self.align);
            self.bytes = io::read(&*self.shared.child, self.start, bytes as usize).await?;
        }
        let at = (offset - self.start) as usize;
        Ok(self.bytes[at..at + bytes].to_vec())
    }
}
