//! The first cluster's variable part: header extensions and the backing file's name.

use super::header::{Header, V2_BYTES, V3_BYTES, extension, field, put_u32, put_u64, u32_at, u64_at};
use super::{Qcow2Node, header, io};
use ipc::Failure;
use nix::errno::Errno;

/// A header extension: its kind and its data.
pub type Extension = (u32, Vec<u8>);

/// What feature bits are called: kind (0 incompatible, 1 compatible, 2 autoclear), bit, name.
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];
/// Size of an entry of the feature name table, bytes.
const FEATURE_NAME_BYTES: usize = 48;

/// The extension that names feature bits, for programs that do not know them.
pub fn feature_names() -> Extension {
    let mut table = Vec::with_capacity(FEATURE_NAMES.len() * FEATURE_NAME_BYTES);
    for (kind, bit, name) in FEATURE_NAMES {
        let start = table.len();
        table.extend_from_slice(&[kind, bit]);
        table.extend_from_slice(name.as_bytes());
        table.resize(start + FEATURE_NAME_BYTES, 0);
    }
    (extension::FEATURE_NAMES, table)
}

/// The first cluster: `fixed` is the header itself, of which the place of the backing file's name is set here. Names of
/// features are left out where they do not fit.
///
/// # Errors
/// EINVAL when a name is longer than the format allows, ENOSPC when it all does not fit into a cluster.
pub fn first_cluster(
    fixed: &[u8],
    extensions: &[Extension],
    backing_name: &[u8],
    cluster_bytes: usize,
) -> Result<Vec<u8>, Errno> {
    if backing_name.len() > header::MAX_BACKING_NAME_BYTES as usize {
        return Err(Errno::EINVAL);
    }
    let needed = |extensions: &[&Extension]| {
        let data: usize = extensions
            .iter()
            .map(|(_, data)| 8 + data.len().next_multiple_of(8))
            .sum();
        fixed.len() + data + 8 + backing_name.len()
    };
    let mut extensions: Vec<&Extension> = extensions.iter().collect();
    if needed(&extensions) > cluster_bytes {
        extensions.retain(|(kind, _)| *kind != extension::FEATURE_NAMES);
    }
    if needed(&extensions) > cluster_bytes {
        return Err(Errno::ENOSPC);
    }
    let mut out = fixed.to_vec();
    for (kind, data) in extensions {
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    // The kind that ends the list, without data.
    out.resize(out.len() + 8, 0);
    let name_offset = if backing_name.is_empty() { 0 } else { out.len() as u64 };
    put_u64(&mut out, field::BACKING, name_offset);
    put_u32(&mut out, field::BACKING + 8, backing_name.len() as u32);
    out.extend_from_slice(backing_name);
    out.resize(cluster_bytes, 0);
    Ok(out)
}

/// The extensions of a first cluster that [`Header::parse`] has accepted.
pub(super) fn extensions(cluster: &[u8]) -> Vec<Extension> {
    let end = match u64_at(cluster, field::BACKING) as usize {
        0 => cluster.len(),
        name => name.min(cluster.len()),
    };
    let mut found = Vec::new();
    let mut at = header_bytes(cluster);
    while at + 8 <= end {
        let (kind, length) = (u32_at(cluster, at), u32_at(cluster, at + 4) as usize);
        let Some(data) = cluster[at + 8..end].get(..length) else {
            break;
        };
        if kind == extension::END {
            break;
        }
        found.push((kind, data.to_vec()));
        at += 8 + length.next_multiple_of(8);
    }
    found
}

/// Length of its header, without extensions.
pub(super) fn header_bytes(cluster: &[u8]) -> usize {
    match u32_at(cluster, 4) {
        3 => (u32_at(cluster, 100) as usize).clamp(V3_BYTES, cluster.len()),
        _ => V2_BYTES,
    }
}

impl Qcow2Node {
    /// Writes another name of a backing file, and its format, to the header; `None` takes both out. Extensions that we do
    /// not know stay.
    ///
    /// # Errors
    /// EINVAL when the name is too long, ENOSPC when there is no room for it, the child's.
    pub async fn set_backing_name(&self, backing: Option<(String, Option<String>)>) -> Result<(), Failure> {
        self.answer(self.rewrite_names(backing).await.map_err(Into::into))
            .await
            .map_err(|errno| Failure {
                message: format!(
                    "Could not change the backing file's name in the image: {}",
                    errno.desc()
                ),
                errno: Some(errno as i32),
            })
    }

    async fn rewrite_names(&self, backing: Option<(String, Option<String>)>) -> Result<(), Errno> {
        if !self.options.writable {
            return Err(Errno::EROFS);
        }
        if self.data_is_raw && backing.is_some() {
            return Err(Errno::EINVAL);
        }
        let shared = &self.shared;
        let _guard = shared.header_lock.lock().await;
        let mut cluster = io::read(&*shared.child, 0, self.cluster_bytes() as usize).await?;
        // What is in memory is what was last written.
        let known = shared.header.borrow().clone();
        cluster[..known.len()].copy_from_slice(&known);
        let (name, format) = backing.unwrap_or_default();
        let mut extensions = extensions(&cluster);
        extensions.retain(|(kind, _)| *kind != extension::BACKING_FORMAT);
        if let Some(format) = format.filter(|_| !name.is_empty()) {
            extensions.insert(0, (extension::BACKING_FORMAT, format.into_bytes()));
        }
        let fixed = &cluster[..header_bytes(&cluster)];
        let new = first_cluster(fixed, &extensions, name.as_bytes(), cluster.len())?;
        let parsed = Header::parse(&new, shared.end.get()).map_err(|_| Errno::EINVAL)?;
        self.write_first_cluster(&new, &cluster).await?;
        let length = known.len();
        shared.header.borrow_mut().copy_from_slice(&new[..length]);
        *self.header.borrow_mut() = parsed;
        Ok(())
    }
}
