//! Queries about block devices and nodes: what block-proc says of the images, and what the description says of the rest.

use super::{Vm, bitmaps, graph, throttling};
use crate::config::Model;
use crate::graph::Graph;
use crate::graph::error::GraphError;
use crate::graph::node::{Backend, Node};
use crate::graph::options::DriverOptions;
use crate::helper::STORAGE_DEADLINE;
use ipc::block::{BlockReply, BlockRequest, DeviceStats, IoStats};
use ipc::block_info::{
    BlockDeviceInfo, BlockDeviceStats, BlockInfo, BlockStats, CacheInfo, EncryptionInfo, FormatData, FormatSpecific,
    ImageChain, ImageInfo, IoStatus, LatencyHistogram, Qcow2BitmapInfo, StatsTree,
};
use ipc::graph::{ChildRole, ImageBitmap, NodeDetails, Qcow2Details};
use ipc::human::{BlockDevice, BlockNode};
use ipc::qmp::QmpError;
use ipc::virtio::DeviceIndex;
use nix::sys::stat::fstat;
use std::collections::BTreeMap;

/// Bytes in a unit of `st_blocks`.
const BLOCK_BYTES: i64 = 512;

/// query-block.
pub async fn blocks(vm: &Vm) -> Result<Vec<BlockInfo>, QmpError> {
    graph::refresh(vm).await?;
    let graph = vm.graph.borrow();
    let block = |backend: &Backend| BlockInfo {
        device: backend.id.clone(),
        qdev: qdev_of(vm, backend),
        ty: "unknown".to_owned(),
        removable: match &backend.frontend {
            Some(frontend) => frontend.ty.is_removable(),
            // Nobody has said yet what kind of device it is for.
            None => backend.device.is_none(),
        },
        locked: false,
        inserted: backend.root.map(|root| {
            let node = graph.explicit(root);
            device_info(vm, &graph, node, Some(backend), false)
        }),
        tray_open: backend
            .frontend
            .as_ref()
            .and_then(|frontend| frontend.ty.has_tray().then_some(frontend.is_tray_open)),
        io_status: match &backend.frontend {
            // Nobody reads or writes there, so nothing fails.
            Some(frontend) => frontend.reports_errors().then_some(IoStatus::Ok),
            None => backend.device.map(|device| vm.io_errors.status(device)),
        },
    };
    Ok(graph.backends.iter().map(block).collect())
}

/// query-named-block-nodes: the newest first.
pub async fn nodes(vm: &Vm, flat: bool) -> Result<Vec<BlockDeviceInfo>, QmpError> {
    graph::refresh(vm).await?;
    let graph = vm.graph.borrow();
    let nodes = graph.nodes.values().rev();
    Ok(nodes.map(|node| device_info(vm, &graph, node, None, flat)).collect())
}

/// Where the device of a drive is in the object tree.
pub fn qdev_of(vm: &Vm, backend: &Backend) -> Option<String> {
    match &backend.frontend {
        // The object that has the drive: by its id, which only an outer one can have.
        Some(frontend) if frontend.ty.inner().is_none() => Some(frontend.name()),
        Some(frontend) => Some(frontend.disk_path()),
        None => backend.device.and_then(|device| qdev(vm, device)),
    }
}

/// Where the device inside is in the object tree.
pub fn qdev(vm: &Vm, device: DeviceIndex) -> Option<String> {
    let devices = &vm.config.devices;
    let config = devices.get(usize::from(device.0))?;
    let path = match &config.id {
        Some(id) => format!("/machine/peripheral/{id}"),
        None => {
            let before = devices[..usize::from(device.0)].iter();
            let number = before.filter(|device| device.id.is_none()).count();
            format!("/machine/peripheral-anon/device[{number}]")
        }
    };
    matches!(config.model, Model::Block(_)).then(|| format!("{path}/virtio-backend"))
}

fn device_info(vm: &Vm, graph: &Graph, node: &Node, backend: Option<&Backend>, flat: bool) -> BlockDeviceInfo {
    let mut chain = graph.chain(node.id);
    // The node itself, and below it what clients have put there.
    chain.retain(|below| below.id == node.id || graph.explicit(below.id).id == below.id);
    let backing = node
        .children
        .get(&ChildRole::Backing)
        .map(|backing| graph.explicit(*backing).id);
    let shown = if flat { &chain[..1] } else { &chain[..] };
    let mut info = BlockDeviceInfo {
        file: graph.filename(node.id),
        node_name: Some(node.name.clone()),
        ro: node.settings.read_only,
        drv: node.driver_name().to_owned(),
        backing_file: backing.map(|backing| graph.filename(backing)),
        backing_file_depth: chain.len() as i64 - 1,
        active: true,
        encrypted: is_encrypted(node),
        encryption_key_missing: super::passwords::encryption(node),
        detect_zeroes: node.settings.detect_zeroes.name().to_owned(),
        bps: 0,
        bps_rd: 0,
        bps_wr: 0,
        iops: 0,
        iops_rd: 0,
        iops_wr: 0,
        image: ImageChain(shown.iter().map(|node| image(vm, graph, node)).collect()),
        bps_max: None,
        bps_rd_max: None,
        bps_wr_max: None,
        iops_max: None,
        iops_rd_max: None,
        iops_wr_max: None,
        bps_max_length: None,
        bps_rd_max_length: None,
        bps_wr_max_length: None,
        iops_max_length: None,
        iops_rd_max_length: None,
        iops_wr_max_length: None,
        iops_size: None,
        group: None,
        cache: CacheInfo {
            writeback: backend.is_none_or(|backend| backend.write_cache),
            direct: node.settings.direct,
            no_flush: node.settings.no_flush,
        },
        write_threshold: int(node.report.write_threshold),
        dirty_bitmaps: bitmaps::describe(graph, node.id),
    };
    throttling::describe(vm, backend, &mut info);
    info
}

fn is_encrypted(node: &Node) -> bool {
    matches!(&node.report.details, NodeDetails::Qcow2(details) if details.encryption != 0)
}

fn image(vm: &Vm, graph: &Graph, node: &Node) -> ImageInfo {
    let qcow2 = match &node.report.details {
        NodeDetails::Qcow2(details) => Some(details),
        NodeDetails::Plain | NodeDetails::Nbd(_) => None,
    };
    let named = qcow2.and_then(|details| details.backing.as_ref());
    let filename = graph.filename(node.id);
    let full = named.and_then(|(name, _)| vm.roots.resolve(filename.as_ref(), name).ok());
    let snapshots = qcow2.map(|details| details.snapshots.iter().map(Into::into).collect::<Vec<_>>());
    ImageInfo {
        format: node.driver_name().to_owned(),
        // Where there is a file below that can say so.
        dirty_flag: match qcow2 {
            Some(details) => Some(details.dirty),
            None => file_below(graph, node).map(|_| false),
        },
        actual_size: actual_size(graph, node),
        virtual_size: node.report.bytes,
        cluster_size: qcow2.map(|details| details.cluster_bytes),
        encrypted: is_encrypted(node).then_some(true),
        backing_filename: named.map(|(name, _)| name.clone()),
        full_backing_filename: full.map(|path| path.display().to_string()),
        backing_filename_format: named.and_then(|(_, format)| format.clone()),
        snapshots: snapshots.filter(|snapshots| !snapshots.is_empty()),
        format_specific: match qcow2 {
            Some(details) => Some(qcow2_specific(details)),
            None => file_below(graph, node).map(|_| FormatSpecific {
                kind: "file".to_owned(),
                data: FormatData::default(),
            }),
        },
        filename,
    }
}

/// The file that a node is, or shows byte for byte.
fn file_below<'a>(graph: &'a Graph, node: &'a Node) -> Option<&'a Node> {
    match &node.options.driver {
        DriverOptions::File(_) => Some(node),
        DriverOptions::Raw { .. } => {
            let file = node.children.get(&ChildRole::File)?;
            file_below(graph, graph.node_or_missing(*file))
        }
        _ => None,
    }
}

/// What the files of an image take, without its backing image.
fn actual_size(graph: &Graph, node: &Node) -> Option<u64> {
    if let Some(file) = &node.file {
        let status = fstat(&file.lock).ok()?;
        return u64::try_from(status.st_blocks * BLOCK_BYTES).ok();
    }
    if matches!(node.options.driver, DriverOptions::Null { .. }) {
        return Some(0);
    }
    let below = [ChildRole::File, ChildRole::DataFile]
        .iter()
        .filter_map(|role| node.children.get(role));
    let sizes: Vec<u64> = below
        .filter_map(|child| actual_size(graph, graph.node_or_missing(*child)))
        .collect();
    (!sizes.is_empty()).then(|| sizes.into_iter().sum())
}

fn qcow2_specific(details: &Qcow2Details) -> FormatSpecific {
    let is_new = details.version >= 3;
    let new = |value: bool| is_new.then_some(value);
    let encrypt = match details.encryption {
        0 => None,
        1 => Some("aes"),
        _ => Some("luks"),
    };
    FormatSpecific {
        kind: "qcow2".to_owned(),
        data: FormatData {
            compat: Some(if is_new { "1.1" } else { "0.10" }.to_owned()),
            data_file: details.data_file.as_ref().map(|(name, _)| name.clone()),
            data_file_raw: details.data_file.as_ref().map(|(_, raw)| *raw),
            extended_l2: new(details.extended_l2),
            lazy_refcounts: new(details.lazy_refcounts),
            corrupt: new(details.corrupt),
            refcount_bits: Some(details.refcount_bits.into()),
            bitmaps: bitmaps_in(details),
            encrypt: encrypt.map(|format| EncryptionInfo {
                format: format.to_owned(),
            }),
            compression_type: Some(if details.zstd { "zstd" } else { "zlib" }.to_owned()),
        },
    }
}

/// As they are in the image.
fn bitmaps_in(details: &Qcow2Details) -> Option<Vec<Qcow2BitmapInfo>> {
    let flags = |bitmap: &ImageBitmap| {
        let known = [("in-use", bitmap.in_use), ("auto", bitmap.enabled)];
        let set = known.into_iter().filter(|(_, set)| *set);
        set.map(|(name, _)| name.to_owned()).collect()
    };
    let info = |bitmap: &ImageBitmap| Qcow2BitmapInfo {
        name: bitmap.name.clone(),
        granularity: bitmap.granularity.into(),
        flags: flags(bitmap),
    };
    (!details.bitmaps.is_empty()).then(|| details.bitmaps.iter().map(info).collect())
}

/// query-blockstats.
pub async fn stats(vm: &Vm, of_nodes: bool) -> Result<Vec<StatsTree>, QmpError> {
    graph::refresh(vm).await?;
    let counters = counters(vm).await?;
    let graph = vm.graph.borrow();
    if of_nodes {
        let tree = |node: &Node| {
            let mut tree = Vec::new();
            node_stats(&graph, node, &mut tree, false);
            StatsTree(tree)
        };
        return Ok(graph.nodes.values().rev().map(tree).collect());
    }
    let of_backend = |backend: &Backend| {
        let mut tree = Vec::new();
        match backend.root {
            Some(root) => {
                node_stats(&graph, graph.explicit(root), &mut tree, true);
            }
            None => tree.push(no_stats()),
        }
        let counted = backend.device.and_then(|device| counters.get(&device));
        let root = &mut tree[0];
        root.device = Some(backend.id.clone());
        root.qdev = qdev_of(vm, backend);
        root.stats = BlockDeviceStats {
            wr_highest_offset: root.stats.wr_highest_offset,
            ..counted.map(device_stats).unwrap_or_default()
        };
        root.stats.account_failed = true;
        root.stats.account_invalid = true;
        StatsTree(tree)
    };
    Ok(graph.backends.iter().map(of_backend).collect())
}

async fn counters(vm: &Vm) -> Result<BTreeMap<DeviceIndex, DeviceStats>, GraphError> {
    let Some(block) = vm.block.serving().await else {
        return Ok(BTreeMap::new());
    };
    match block.ask_within(STORAGE_DEADLINE, BlockRequest::GetStats).await {
        Ok(BlockReply::Stats(stats)) => Ok(stats),
        Ok(_) => Err(GraphError::BlockProc(
            "block-proc answered with something else".to_owned(),
        )),
        Err(error) => Err(GraphError::BlockProc(error.to_string())),
    }
}

fn no_stats() -> BlockStats {
    BlockStats {
        device: None,
        qdev: None,
        node_name: None,
        stats: BlockDeviceStats::default(),
        parent: None,
        backing: None,
    }
}

/// Adds a node and, with `deep`, those below it; returns its place.
fn node_stats(graph: &Graph, node: &Node, tree: &mut Vec<BlockStats>, deep: bool) -> u32 {
    let place = tree.len();
    tree.push(BlockStats {
        node_name: Some(node.name.clone()),
        stats: BlockDeviceStats {
            wr_highest_offset: int(node.report.highest_write),
            ..BlockDeviceStats::default()
        },
        ..no_stats()
    });
    let mut below = |role: ChildRole| {
        let child = node.children.get(&role).filter(|_| deep || role == ChildRole::File)?;
        let child = if deep {
            graph.explicit(*child)
        } else {
            graph.node_or_missing(*child)
        };
        Some(node_stats(graph, child, tree, deep))
    };
    let (parent, backing) = (below(ChildRole::File), below(ChildRole::Backing));
    tree[place].parent = parent;
    tree[place].backing = backing;
    place as u32
}

fn device_stats(counted: &DeviceStats) -> BlockDeviceStats {
    let DeviceStats {
        read,
        write,
        flush,
        unmap,
        idle_ns,
    } = counted;
    BlockDeviceStats {
        rd_bytes: int(read.bytes),
        wr_bytes: int(write.bytes),
        unmap_bytes: int(unmap.bytes),
        rd_operations: int(read.operations),
        wr_operations: int(write.operations),
        flush_operations: int(flush.operations),
        unmap_operations: int(unmap.operations),
        rd_total_time_ns: int(read.total_ns),
        wr_total_time_ns: int(write.total_ns),
        flush_total_time_ns: int(flush.total_ns),
        unmap_total_time_ns: int(unmap.total_ns),
        idle_time_ns: idle_ns.map(int),
        failed_rd_operations: int(read.failed),
        failed_wr_operations: int(write.failed),
        failed_flush_operations: int(flush.failed),
        failed_unmap_operations: int(unmap.failed),
        invalid_rd_operations: int(read.invalid),
        invalid_wr_operations: int(write.invalid),
        invalid_flush_operations: int(flush.invalid),
        invalid_unmap_operations: int(unmap.invalid),
        rd_latency_histogram: histogram(read),
        wr_latency_histogram: histogram(write),
        flush_latency_histogram: histogram(flush),
        ..BlockDeviceStats::default()
    }
}

fn histogram(counted: &IoStats) -> Option<LatencyHistogram> {
    let histogram = counted.histogram.as_ref()?;
    Some(LatencyHistogram {
        boundaries: histogram.boundaries_ns.clone(),
        bins: histogram.bins.clone(),
    })
}

fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// info block, and info block NAME for a drive or a node.
pub fn human(vm: &Vm, name: Option<&str>) -> Vec<BlockDevice> {
    let graph = vm.graph.borrow();
    let node = |node: &Node| {
        let chain = graph.chain(node.id);
        let backing = node.children.get(&ChildRole::Backing);
        BlockNode {
            name: node.name.clone(),
            file: graph.filename(node.id),
            driver: node.driver_name().to_owned(),
            read_only: node.settings.read_only,
            direct: node.settings.direct,
            no_flush: node.settings.no_flush,
            detect_zeroes: match node.settings.detect_zeroes.name() {
                "off" => None,
                word => Some(word.to_owned()),
            },
            backing: backing.map(|backing| (graph.filename(*backing), chain.len() as u64 - 1)),
        }
    };
    let wanted = |backend: &&Backend| name.is_none_or(|name| backend.id == name);
    let mut devices: Vec<BlockDevice> = graph
        .backends
        .iter()
        .filter(wanted)
        .map(|backend| BlockDevice {
            id: backend.id.clone(),
            node: backend.root.map(|root| node(graph.explicit(root))),
            qdev: qdev_of(vm, backend),
            write_back: backend.write_cache,
        })
        .collect();
    if let Some(found) = name
        .filter(|_| devices.is_empty())
        .and_then(|name| graph.node_named(name))
    {
        devices.push(BlockDevice {
            id: String::new(),
            node: Some(node(found)),
            qdev: None,
            write_back: true,
        });
    }
    devices
}
