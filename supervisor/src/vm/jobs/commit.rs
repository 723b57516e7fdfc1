//! block-commit: what images hold goes into one below them.
//!
//! Images that nobody writes to are copied once, and left out. The image that is written to (the active layer) is mirrored
//! into the lower one, until its client completes the job.

use super::End;
use super::begin::{BeginError, Beginning, Common, Filter, MakeEnd, MakeWork, Use, begin, grow};
use crate::graph::Graph;
use crate::graph::error::GraphError;
use crate::jobs::Endings;
use crate::vm::{Vm, graph, reopen};
use ipc::block_job::{CopyFrom, JobWork};
use ipc::graph::NodeId;
use ipc::job::{BlockCommit, JobType};
use ipc::qmp::QmpError;
use std::rc::Rc;

/// Dirty bytes that a commit of an active layer copies together.
const GRANULARITY_BYTES: u32 = 64 << 10;
/// Most bytes in flight.
pub const BUFFER_BYTES: u64 = 16 << 20;

/// What is to be committed.
struct Chosen {
    root: NodeId,
    top: NodeId,
    base: NodeId,
    layers: Vec<NodeId>,
    is_active: bool,
}

/// block-commit.
///
/// # Errors
/// The error reply.
pub async fn commit(vm: &Rc<Vm>, asked: BlockCommit) -> Result<(), QmpError> {
    let _turn = vm.graph_change.enter().await;
    Ok(carry_out(vm, asked).await?)
}

async fn carry_out(vm: &Rc<Vm>, asked: BlockCommit) -> Result<(), BeginError> {
    graph::refresh(vm).await?;
    let chosen = choose(&vm.graph.borrow(), &asked)?;
    let Chosen {
        top, layers, is_active, ..
    } = chosen;
    let id = match asked.job_id {
        Some(id) => Some(id),
        None => {
            let graph = vm.graph.borrow();
            let root = graph.lookup_any(&asked.device)?.id;
            Some(super::begin::default_id(&graph, graph.explicit(root).id)?)
        }
    };
    let was_read_only = vm.graph.borrow().node_or_missing(chosen.base).settings.read_only;
    let base = if asked.speed.unwrap_or(0) < 0 {
        // It will not begin.
        chosen.base
    } else {
        let base = reopen::set_writable(vm, chosen.base, true).await?;
        let bytes = vm.graph.borrow().node_or_missing(top).report.bytes;
        grow(vm, base, bytes).await?;
        base
    };
    let made_writable = if was_read_only { vec![base] } else { Vec::new() };
    let above: Vec<NodeId> = {
        let graph = vm.graph.borrow();
        graph
            .parents(base)
            .map(|(parent, _)| parent.id)
            .filter(|parent| graph.is_in_chain(top, *parent))
            .collect()
    };
    let mut uses = vec![Use::writes(base, above)];
    uses.extend(layers.iter().map(|layer| Use::reads(*layer)));
    if !is_active {
        // Its header will be written to, or that of one between.
        uses.push(Use::reads(chosen.root));
    }
    let common = Common {
        id,
        kind: JobType::Commit,
        endings: Endings::of(asked.auto_finalize, asked.auto_dismiss),
        speed: asked.speed.unwrap_or(0),
        on_source_error: asked.on_error,
        on_target_error: asked.on_error,
        filter_name: asked.filter_node_name,
        transaction: None,
    };
    let (filter, work, end): (_, MakeWork, MakeEnd) = if is_active {
        let work = move |filter| JobWork::Mirror {
            filter,
            target: base,
            from: CopyFrom::Layers {
                nodes: layers,
                is_all: false,
            },
            target_reads_zeroes: false,
            granularity: GRANULARITY_BYTES,
            buffer_bytes: BUFFER_BYTES,
            unmap: true,
            write_blocking: false,
        };
        let end = move |filter| End::Mirror {
            from: filter,
            to: base,
            backing: None,
        };
        (Filter::MirrorTop, Box::new(work), Box::new(end))
    } else {
        let work = move |_| JobWork::Commit { top, layers, base };
        let backing_file = asked.backing_file;
        (
            Filter::CommitTop,
            Box::new(work),
            Box::new(move |_| End::Commit { base, backing_file }),
        )
    };
    let beginning = Beginning {
        common,
        source: top,
        filter,
        work,
        uses,
        end,
        made_writable,
    };
    let begun = begin(vm, beginning).await;
    if begun.is_err() && was_read_only && base != chosen.base {
        reopen::set_writable(vm, base, false).await?;
    }
    begun.map(drop)
}

/// What the command means, in QEMU's order of refusals.
fn choose(graph: &Graph, asked: &BlockCommit) -> Result<Chosen, BeginError> {
    let root = match graph.lookup_any(&asked.device) {
        Ok(_) => graph.lookup_root(&asked.device)?.id,
        Err(GraphError::NotFound { .. }) => return Err(GraphError::NoDevice(asked.device.clone()).into()),
        Err(error) => return Err(error.into()),
    };
    graph.check_idle(root)?;
    let both = |what: &str| BeginError::refused(format!("'{what}-node' and '{what}' are mutually exclusive"));
    let outside = |name: &str| BeginError::refused(format!("'{name}' is not in this backing file chain"));
    let top = match (&asked.top_node, &asked.top) {
        (Some(_), Some(_)) => return Err(both("top")),
        (Some(name), None) => {
            let node = graph.lookup(None, Some(name))?.id;
            if !graph.is_in_chain(root, node) {
                return Err(outside(name));
            }
            node
        }
        (None, Some(name)) if graph.filename(root) != *name => graph
            .find_below(root, name)
            .ok_or_else(|| BeginError::refused(format!("Top image file {name} not found")))?,
        (None, _) => root,
    };
    let base = match (&asked.base_node, &asked.base) {
        (Some(_), Some(_)) => return Err(both("base")),
        (Some(name), None) => {
            let node = graph.lookup(None, Some(name))?.id;
            if !graph.is_in_chain(top, node) {
                return Err(outside(name));
            }
            node
        }
        (None, Some(name)) => graph
            .find_below(top, name)
            .ok_or_else(|| BeginError::refused(format!("Can't find '{name}' in the backing chain")))?,
        (None, None) => graph
            .chain(top)
            .last()
            .map(|node| node.id)
            .ok_or_else(|| BeginError::refused("There is no backing image"))?,
    };
    for node in graph.chain(top) {
        graph.check_idle(node.id)?;
        if node.id == base {
            break;
        }
    }
    if top == base || graph.image(top).id == graph.image(base).id {
        return Err(BeginError::refused("cannot commit an image into itself"));
    }
    let is_root = graph.image(top).id == graph.image(root).id;
    let is_active = is_root || graph.is_written(top);
    if is_active && asked.backing_file.is_some() {
        return Err(BeginError::refused(if is_root {
            "'backing-file' specified, but 'top' is the active layer"
        } else {
            "'backing-file' specified, but 'top' has a writer on it"
        }));
    }
    if !is_active {
        for (parent, _) in graph.parents(top) {
            graph.check_idle(parent.id)?;
        }
    }
    Ok(Chosen {
        root,
        top,
        base,
        layers: graph.layers(top, Some(base)),
        is_active,
    })
}
