//! New images.
//!
//! The header comes last: until it is there, nothing takes what is on the file for an image.
//!
//! Places, one after the other: header, refcount table, refcount blocks, L1 table, and with preallocation the L2 tables and
//! the data.

use super::entry::COPIED;
use super::header::{
    MAGIC, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, OFFSET_BITS, autoclear, compatible, extension, field, incompatible,
    put_u32, put_u64,
};
use super::{io, names, refcounts};
use crate::node::Node;
use ipc::Failure;
use ipc::graph::{CreateQcow2, Preallocation};
use nix::errno::Errno;
use std::rc::Rc;

/// Largest disk, bytes (QEMU's limit, and so what clients know).
pub const MAX_BYTES: u64 = (1 << 63) - (1 << 30);
/// Length of the header that we write for version 3, bytes.
const HEADER_BYTES: usize = 112;
/// Smallest clusters that can have subclusters, bytes.
const MIN_EXTENDED_CLUSTER_BYTES: u32 = 16 << 10;
const VERSION_3_ONLY: &str = "compatibility level 1.1 and above (use version=v3 or greater)";

/// Puts a new image on a node. `data_file`: of an image with an external data file; without it, that file is left as it is.
///
/// # Errors
/// What contradicts what, or the child's.
pub async fn create(child: &Rc<dyn Node>, spec: &CreateQcow2, data_file: Option<&Rc<dyn Node>>) -> Result<(), Failure> {
    check(spec)?;
    let preallocation = match &spec.data_file {
        // What reads the data file alone would not see the tables: nothing may be unallocated.
        Some((_, true)) if spec.preallocation == Preallocation::Off => Preallocation::Metadata,
        _ => spec.preallocation,
    };
    let layout = Layout::of(spec, preallocation)?;
    let cluster = spec.cluster_bytes as usize;
    let first = first_cluster(spec, &layout)?;
    let host = |errno: Errno| failure("Could not write the new image", errno);
    io::write(&**child, 0, &vec![0; cluster]).await.map_err(host)?;
    child.flush().await.map_err(host)?;
    if let Some(data_file) = data_file {
        let space = match preallocation {
            Preallocation::Metadata => Preallocation::Off,
            other => other,
        };
        data_file.resize(spec.bytes, space).await?;
    }
    layout.provide_space(child, preallocation).await?;
    layout.write_tables(child).await.map_err(host)?;
    child.flush().await.map_err(host)?;
    io::write(&**child, 0, &first).await.map_err(host)?;
    child.flush().await.map_err(host)
}

fn failure(what: &str, errno: Errno) -> Failure {
    Failure {
        message: format!("{what}: {}", errno.desc()),
        errno: Some(errno as i32),
    }
}

/// What cannot be, in the order in which clients expect to hear of it.
fn check(spec: &CreateQcow2) -> Result<(), Failure> {
    let old = spec.version < 3;
    let wrong = |said: String| Err(Failure::new(said));
    if !matches!(spec.version, 2 | 3) {
        return wrong(format!("qcow2 version {} does not exist: use v2 or v3", spec.version));
    }
    if !spec.bytes.is_multiple_of(512) {
        return wrong("Image size must be a multiple of 512 bytes".into());
    }
    if !spec.cluster_bytes.is_power_of_two() || !(512..=2 << 20).contains(&spec.cluster_bytes) {
        return wrong("Cluster size must be a power of two between 512 and 2048k".into());
    }
    if spec.extended_l2 && old {
        return wrong(format!("Extended L2 entries are only supported with {VERSION_3_ONLY}"));
    }
    if spec.extended_l2 && spec.cluster_bytes < MIN_EXTENDED_CLUSTER_BYTES {
        return wrong(format!(
            "Extended L2 entries are only supported with cluster sizes of at least {MIN_EXTENDED_CLUSTER_BYTES} bytes"
        ));
    }
    let preallocated = spec.preallocation != Preallocation::Off;
    if spec.backing.is_some() && preallocated && !spec.extended_l2 {
        return wrong("Backing file and preallocation can only be used at the same time if extended_l2 is on".into());
    }
    if spec.lazy_refcounts && old {
        return wrong(format!("Lazy refcounts only supported with {VERSION_3_ONLY}"));
    }
    if !spec.refcount_bits.is_power_of_two() || spec.refcount_bits > 64 {
        return wrong("Refcount width must be a power of two and may not exceed 64 bits".into());
    }
    if spec.refcount_bits != 16 && old {
        return wrong(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)"
                .into(),
        );
    }
    if let Some((_, raw)) = &spec.data_file {
        if *raw && spec.backing.is_some() {
            return wrong("Backing file and data-file-raw cannot be used at the same time".into());
        }
        if old {
            return wrong(format!("External data files are only supported with {VERSION_3_ONLY}"));
        }
    }
    if spec.zstd && old {
        return wrong(format!(
            "Non-zlib compression type is only supported with {VERSION_3_ONLY}"
        ));
    }
    if i64::try_from(spec.bytes).is_err() {
        return wrong("Could not resize image: Image size cannot be negative".into());
    }
    if spec.bytes > MAX_BYTES {
        return wrong(format!(
            "Could not resize image: offset({}) exceeds maximum({MAX_BYTES})",
            spec.bytes
        ));
    }
    Ok(())
}

/// Where everything is. Offsets and lengths are clusters, where nothing else is said.
struct Layout {
    cluster_bytes: u64,
    refcount_order: u32,
    extended: bool,
    table: u64,
    blocks: u64,
    l1: u64,
    l1_entries: u64,
    l2: u64,
    /// Guest clusters that get a place, in the image or in the data file.
    placed: u64,
    /// Clusters of data in the image.
    data: u64,
}

impl Layout {
    fn of(spec: &CreateQcow2, preallocation: Preallocation) -> Result<Self, Failure> {
        let cluster_bytes = u64::from(spec.cluster_bytes);
        let entry_bytes = if spec.extended_l2 { 16 } else { 8 };
        let per_l2 = cluster_bytes / entry_bytes * cluster_bytes;
        let l1_entries = spec.bytes.div_ceil(per_l2);
        let too_large = || Failure {
            message: "Could not resize image: Failed to grow the L1 table: File too large".into(),
            errno: Some(Errno::EFBIG as i32),
        };
        if l1_entries * 8 > MAX_L1_BYTES {
            return Err(too_large());
        }
        let (l2, placed) = match preallocation {
            Preallocation::Off => (0, 0),
            _ => (l1_entries, spec.bytes.div_ceil(cluster_bytes)),
        };
        let mut layout = Self {
            cluster_bytes,
            refcount_order: spec.refcount_bits.trailing_zeros(),
            extended: spec.extended_l2,
            table: 1,
            blocks: 1,
            l1: (l1_entries * 8).div_ceil(cluster_bytes),
            l1_entries,
            l2,
            placed,
            data: if spec.data_file.is_some() { 0 } else { placed },
        };
        // Counts need room that needs counts.
        loop {
            let blocks = layout.clusters().div_ceil(layout.per_block());
            let table = (blocks * 8).div_ceil(cluster_bytes);
            if (blocks, table) == (layout.blocks, layout.table) {
                break;
            }
            (layout.blocks, layout.table) = (blocks.max(layout.blocks), table.max(layout.table));
        }
        let end = layout.clusters().checked_mul(cluster_bytes);
        let table_bytes = layout.table * cluster_bytes;
        if end.is_none_or(|end| end > 1 << OFFSET_BITS) || table_bytes > MAX_REFCOUNT_TABLE_BYTES.max(cluster_bytes) {
            return Err(too_large());
        }
        Ok(layout)
    }

    fn per_block(&self) -> u64 {
        (self.cluster_bytes * 8) >> self.refcount_order
    }

    fn clusters(&self) -> u64 {
        self.data_at() + self.data
    }

    fn l1_at(&self) -> u64 {
        1 + self.table + self.blocks
    }

    fn l2_at(&self) -> u64 {
        self.l1_at() + self.l1
    }

    fn data_at(&self) -> u64 {
        self.l2_at() + self.l2
    }

    /// The file as long as the image, and its space as it is asked for.
    async fn provide_space(&self, child: &Rc<dyn Node>, preallocation: Preallocation) -> Result<(), Failure> {
        if preallocation == Preallocation::Off {
            return Ok(());
        }
        let (start, end) = (
            self.data_at() * self.cluster_bytes,
            self.clusters() * self.cluster_bytes,
        );
        let (before, space) = (
            child.bytes(),
            match preallocation {
                Preallocation::Metadata => Preallocation::Off,
                other => other,
            },
        );
        // What was on the file before is not the new disk's content.
        if before > start && end > start {
            child
                .write_zeroes(start, before.min(end) - start, space == Preallocation::Off)
                .await
                .map_err(|errno| failure("Could not clear the file", errno))?;
        }
        if before < end {
            child.resize(end, space).await?;
        }
        Ok(())
    }

    async fn write_tables(&self, child: &Rc<dyn Node>) -> Result<(), Errno> {
        let cluster = self.cluster_bytes;
        let table = (0..self.blocks).map(|block| (1 + self.table + block) * cluster);
        self.write_table(child, 1, self.table, table).await?;
        let (per_block, clusters) = (self.per_block(), self.clusters());
        for block in 0..self.blocks {
            let mut bytes = vec![0; cluster as usize];
            let used = clusters.saturating_sub(block * per_block).min(per_block);
            (0..used).for_each(|index| refcounts::put(&mut bytes, self.refcount_order, index, 1));
            io::write(&**child, (1 + self.table + block) * cluster, &bytes).await?;
        }
        let l1 = (0..self.l2).map(|table| ((self.l2_at() + table) * cluster) | COPIED);
        self.write_table(child, self.l1_at(), self.l1, l1).await?;
        let per_table = cluster / if self.extended { 16 } else { 8 };
        for table in 0..self.l2 {
            let first = table * per_table;
            let entries = (first..(first + per_table).min(self.placed)).flat_map(|guest| {
                let host = if self.data > 0 { self.data_at() + guest } else { guest };
                // With subclusters: a place, of which nothing is in use yet.
                [Some((host * cluster) | COPIED), self.extended.then_some(0)]
            });
            self.write_table(child, self.l2_at() + table, 1, entries.flatten())
                .await?;
        }
        Ok(())
    }

    /// Writes a table of `clusters`, piece by piece: it may be large.
    async fn write_table(
        &self,
        child: &Rc<dyn Node>,
        at: u64,
        clusters: u64,
        entries: impl Iterator<Item = u64>,
    ) -> Result<(), Errno> {
        let mut bytes = entries.flat_map(u64::to_be_bytes);
        for number in 0..clusters {
            let mut piece: Vec<u8> = bytes.by_ref().take(self.cluster_bytes as usize).collect();
            piece.resize(self.cluster_bytes as usize, 0);
            io::write(&**child, (at + number) * self.cluster_bytes, &piece).await?;
        }
        Ok(())
    }
}

fn first_cluster(spec: &CreateQcow2, layout: &Layout) -> Result<Vec<u8>, Failure> {
    let mut fixed = vec![
        0;
        if spec.version == 3 {
            HEADER_BYTES
        } else {
            super::header::V2_BYTES
        }
    ];
    fixed[..4].copy_from_slice(&MAGIC);
    put_u32(&mut fixed, 4, spec.version);
    put_u32(&mut fixed, 20, spec.cluster_bytes.trailing_zeros());
    put_u64(&mut fixed, field::BYTES, spec.bytes);
    put_u32(&mut fixed, field::L1, layout.l1_entries as u32);
    put_u64(&mut fixed, field::L1 + 4, layout.l1_at() * layout.cluster_bytes);
    put_u64(&mut fixed, field::REFCOUNT_TABLE, layout.cluster_bytes);
    put_u32(&mut fixed, field::REFCOUNT_TABLE + 8, layout.table as u32);
    let mut extensions = Vec::new();
    let (mut backing_name, mut backing_format) = ("", None);
    if let Some((name, format)) = &spec.backing {
        (backing_name, backing_format) = (name, format.as_ref());
    }
    if let Some(format) = backing_format {
        extensions.push((extension::BACKING_FORMAT, format.clone().into_bytes()));
    }
    if let Some((name, _)) = &spec.data_file {
        extensions.push((extension::DATA_FILE, name.clone().into_bytes()));
    }
    if spec.version == 3 {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        let data_file_raw = matches!(spec.data_file, Some((_, true)));
        let incompatible = bit(spec.data_file.is_some(), incompatible::DATA_FILE)
            | bit(spec.zstd, incompatible::COMPRESSION)
            | bit(spec.extended_l2, incompatible::EXTENDED_L2);
        put_u64(&mut fixed, field::INCOMPATIBLE, incompatible);
        let lazy = bit(spec.lazy_refcounts, compatible::LAZY_REFCOUNTS);
        put_u64(&mut fixed, field::COMPATIBLE, lazy);
        let raw = bit(data_file_raw, autoclear::DATA_FILE_RAW);
        put_u64(&mut fixed, field::AUTOCLEAR, raw);
        put_u32(&mut fixed, 96, layout.refcount_order);
        put_u32(&mut fixed, 100, HEADER_BYTES as u32);
        fixed[104] = u8::from(spec.zstd);
        extensions.push(names::feature_names());
    }
    names::first_cluster(
        &fixed,
        &extensions,
        backing_name.as_bytes(),
        spec.cluster_bytes as usize,
    )
    .map_err(|errno| {
        let format = backing_format.map_or(String::new(), |format| format.clone());
        failure(
            &format!("Could not assign backing file '{backing_name}' with format '{format}'"),
            errno,
        )
    })
}
