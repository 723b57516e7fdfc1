//! drive-mirror and blockdev-mirror: the target becomes what the disk is, and stays so until the disk moves to it.

use super::End;
use super::begin::{BeginError, Beginning, Common, Filter, Use, begin, bring_along, bytes_of, grow};
use super::commit::BUFFER_BYTES;
use super::sync;
use super::target::{self, NewTarget, Under};
use crate::graph::Graph;
use crate::graph::error::GraphError;
use crate::jobs::Endings;
use crate::vm::{Vm, graph};
use ipc::block_job::{CopyFrom, JobWork};
use ipc::graph::NodeId;
use ipc::job::{BlockdevMirror, CopyMode, DriveMirror, JobType, OnError, SyncMode};
use ipc::qmp::QmpError;
use std::rc::Rc;

/// Bytes that are dirty together, where neither the client nor the target's clusters say.
const GRANULARITY_BYTES: u32 = 64 << 10;
const SMALLEST_GRANULARITY: u32 = 512;
const LARGEST_GRANULARITY: u32 = 64 << 20;

/// What both commands say of the mirror itself.
struct Asked {
    id: Option<String>,
    replaces: Option<String>,
    sync: SyncMode,
    speed: Option<i64>,
    granularity: Option<u32>,
    buf_size: Option<i64>,
    on_source_error: Option<OnError>,
    on_target_error: Option<OnError>,
    unmap: bool,
    filter_name: Option<String>,
    copy_mode: Option<CopyMode>,
    endings: Endings,
    /// What goes below the target when the disk moves to it.
    backing: Option<NodeId>,
}

/// blockdev-mirror.
///
/// # Errors
/// The error reply.
pub async fn to_node(vm: &Rc<Vm>, asked: BlockdevMirror) -> Result<(), QmpError> {
    let _turn = vm.graph_change.enter().await;
    graph::refresh(vm).await?;
    let source = vm.graph.borrow().lookup_root(&asked.device)?.id;
    let target = vm.graph.borrow().lookup_any(&asked.target)?.id;
    let asked = Asked {
        id: asked.job_id,
        replaces: asked.replaces,
        sync: asked.sync,
        speed: asked.speed,
        granularity: asked.granularity,
        buf_size: asked.buf_size,
        on_source_error: asked.on_source_error,
        on_target_error: asked.on_target_error,
        unmap: true,
        filter_name: asked.filter_node_name,
        copy_mode: asked.copy_mode,
        endings: Endings::of(asked.auto_finalize, asked.auto_dismiss),
        backing: None,
    };
    Ok(mirror(vm, source, target, asked).await?)
}

/// drive-mirror: to a file, which is made unless it is there.
///
/// # Errors
/// The error reply.
pub async fn to_file(vm: &Rc<Vm>, asked: DriveMirror) -> Result<(), QmpError> {
    let _turn = vm.graph_change.enter().await;
    Ok(mirror_to_file(vm, asked).await?)
}

async fn mirror_to_file(vm: &Rc<Vm>, asked: DriveMirror) -> Result<(), BeginError> {
    graph::refresh(vm).await?;
    let source = vm.graph.borrow().lookup_root(&asked.device)?.id;
    vm.graph.borrow().check_idle(source)?;
    let (sync, under) = sync::of_new_target(&vm.graph.borrow(), source, asked.sync);
    if asked.replaces.is_some() && asked.node_name.is_none() {
        return Err(BeginError::refused(
            "a node-name must be provided when replacing a named node of the graph",
        ));
    }
    let target = target::open(
        vm,
        source,
        NewTarget {
            file: &asked.target,
            format: asked.format.as_deref(),
            mode: asked.mode.unwrap_or_default(),
            name: asked.node_name.as_deref(),
            named_below: under,
            under: Under::Nothing,
        },
    )
    .await?;
    let begun = mirror(
        vm,
        source,
        target,
        Asked {
            id: asked.job_id,
            replaces: asked.replaces,
            sync,
            speed: asked.speed,
            granularity: asked.granularity,
            buf_size: asked.buf_size,
            on_source_error: asked.on_source_error,
            on_target_error: asked.on_target_error,
            unmap: asked.unmap.unwrap_or(true),
            filter_name: None,
            copy_mode: asked.copy_mode,
            endings: Endings::of(asked.auto_finalize, asked.auto_dismiss),
            backing: under,
        },
    )
    .await;
    if begun.is_err() {
        graph::remove_unused(vm).await;
    }
    begun
}

async fn mirror(vm: &Rc<Vm>, source: NodeId, target: NodeId, asked: Asked) -> Result<(), BeginError> {
    check(&vm.graph.borrow(), source, target, &asked)?;
    let bytes = bytes_of(vm, source).await?;
    let replaced = match &asked.replaces {
        Some(name) => replaced(vm, name, source, bytes).await?,
        None => None,
    };
    let target = bring_along(vm, target, source).await?;
    grow(vm, target, bytes).await?;
    let (from, reads_zeroes, granularity) = {
        let graph = vm.graph.borrow();
        let from = sync::copied(&graph, source, asked.sync);
        let clusters = sync::cluster_bytes(&graph, target).map_or(GRANULARITY_BYTES, |bytes| bytes.max(4096));
        let granularity = match asked.granularity {
            Some(0) | None => clusters,
            // A part of a cluster would hide what the target will have below it.
            Some(granularity) if !matches!(from, CopyFrom::Layers { is_all: true, .. }) => granularity.max(clusters),
            Some(granularity) => granularity,
        };
        let reads_zeroes = asked.backing.is_none() && sync::is_alone(&graph, target);
        (from, reads_zeroes, granularity)
    };
    let buffer_bytes = asked.buf_size.and_then(|bytes| u64::try_from(bytes).ok());
    let buffer_bytes = buffer_bytes.filter(|bytes| *bytes > 0).unwrap_or(BUFFER_BYTES);
    let write_blocking = asked.copy_mode == Some(CopyMode::WriteBlocking);
    let (unmap, backing) = (asked.unmap, asked.backing);
    let beginning = Beginning {
        common: Common {
            id: asked.id,
            kind: JobType::Mirror,
            endings: asked.endings,
            speed: asked.speed.unwrap_or(0),
            on_source_error: asked.on_source_error,
            on_target_error: asked.on_target_error,
            filter_name: asked.filter_name,
            transaction: None,
        },
        source,
        filter: Filter::MirrorTop,
        work: Box::new(move |filter| JobWork::Mirror {
            filter,
            target,
            from,
            target_reads_zeroes: reads_zeroes,
            granularity,
            buffer_bytes,
            unmap,
            write_blocking,
        }),
        uses: vec![Use::reads(source), Use::writes(target, Vec::new())],
        end: Box::new(move |filter| End::Mirror {
            from: replaced.unwrap_or(filter),
            to: target,
            backing,
        }),
        made_writable: Vec::new(),
    };
    begin(vm, beginning).await.map(drop)
}

/// QEMU's refusals, in its order.
fn check(graph: &Graph, source: NodeId, target: NodeId, asked: &Asked) -> Result<(), BeginError> {
    if let Some(granularity) = asked.granularity.filter(|granularity| *granularity != 0) {
        if !(SMALLEST_GRANULARITY..=LARGEST_GRANULARITY).contains(&granularity) {
            return Err(BeginError::refused(
                "Parameter 'granularity' expects a value in range [512B, 64MB]",
            ));
        }
        if !granularity.is_power_of_two() {
            return Err(BeginError::refused("Parameter 'granularity' expects a power of 2"));
        }
    }
    graph.check_idle(source)?;
    graph.check_idle(target)?;
    if matches!(asked.sync, SyncMode::Incremental | SyncMode::Bitmap) {
        return Err(BeginError::refused(format!(
            "Sync mode '{}' not supported",
            asked.sync.name()
        )));
    }
    if asked.buf_size.is_some_and(|bytes| bytes < 0) {
        return Err(BeginError::refused("Invalid parameter 'buf-size'"));
    }
    if source == target {
        return Err(BeginError::refused("Can't mirror node into itself"));
    }
    Ok(())
}

/// The node whose users move to the target; none where these are the source's, which use the filter by then.
async fn replaced(vm: &Vm, name: &str, source: NodeId, bytes: u64) -> Result<Option<NodeId>, BeginError> {
    let node = {
        let graph = vm.graph.borrow();
        let node = graph.node_named(name).ok_or(GraphError::NoNode(name.to_owned()))?.id;
        // What lies below filters alone shows the same data as the source.
        let shown = graph.chain(source);
        let filters = shown.iter().take_while(|above| above.is_filter()).count();
        if !shown.iter().take(filters + 1).any(|shown| shown.id == node) {
            return Err(BeginError::refused(format!(
                "Cannot replace '{name}' by a node mirrored from '{}', because it cannot be guaranteed that doing so would \
                 not lead to an abrupt change of visible data",
                graph.device_or_node_name(source)
            )));
        }
        node
    };
    if bytes_of(vm, node).await? != bytes {
        return Err(BeginError::refused(
            "cannot replace image with a mirror image of different size",
        ));
    }
    if node == source {
        return Ok(None);
    }
    vm.graph.borrow().check_idle(node)?;
    Ok(Some(node))
}
