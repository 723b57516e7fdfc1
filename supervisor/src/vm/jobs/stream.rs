//! block-stream: what images below hold goes into the image above them, which then needs them no more.

use super::End;
use super::begin::{BeginError, Beginning, Common, Filter, Use, begin};
use crate::graph::Graph;
use crate::jobs::Endings;
use crate::vm::{Vm, graph, reopen};
use ipc::block_job::JobWork;
use ipc::graph::NodeId;
use ipc::job::{BlockStream, JobType};
use ipc::qmp::QmpError;
use std::rc::Rc;

/// What is to be streamed.
struct Chosen {
    top: NodeId,
    base: Option<NodeId>,
    layers: Vec<NodeId>,
}

/// block-stream.
///
/// # Errors
/// The error reply.
pub async fn stream(vm: &Rc<Vm>, asked: BlockStream) -> Result<(), QmpError> {
    let _turn = vm.graph_change.enter().await;
    Ok(carry_out(vm, asked).await?)
}

async fn carry_out(vm: &Rc<Vm>, asked: BlockStream) -> Result<(), BeginError> {
    graph::refresh(vm).await?;
    let Chosen { top, base, layers } = choose(&vm.graph.borrow(), &asked)?;
    let was_read_only = vm.graph.borrow().node_or_missing(top).settings.read_only;
    let top = reopen::set_writable(vm, top, true).await?;
    let mut uses = vec![Use {
        beside: vm.graph.borrow().parents(top).map(|(parent, _)| parent.id).collect(),
        ..Use::writes(top, Vec::new())
    }];
    uses.extend(layers.iter().map(|layer| Use::reads(*layer)));
    uses.extend(base.map(Use::reads));
    let backing_file = asked.backing_file;
    let beginning = Beginning {
        common: Common {
            id: asked.job_id,
            kind: JobType::Stream,
            endings: Endings::of(asked.auto_finalize, asked.auto_dismiss),
            speed: asked.speed.unwrap_or(0),
            on_source_error: asked.on_error,
            on_target_error: asked.on_error,
            filter_name: asked.filter_node_name,
            transaction: None,
        },
        source: top,
        filter: Filter::CopyOnRead,
        work: Box::new(move |filter| JobWork::Stream { filter, layers }),
        uses,
        end: Box::new(move |_| End::Stream {
            top,
            base,
            backing_file,
        }),
        made_writable: if was_read_only { vec![top] } else { Vec::new() },
    };
    let begun = begin(vm, beginning).await;
    if begun.is_err() && was_read_only {
        reopen::set_writable(vm, top, false).await?;
    }
    begun.map(drop)
}

/// What the command means, in QEMU's order of refusals.
fn choose(graph: &Graph, asked: &BlockStream) -> Result<Chosen, BeginError> {
    let refused = |text: String| Err(BeginError::Refused(text));
    for (one, other, names) in [
        (&asked.base, &asked.base_node, ("base", "base-node")),
        (&asked.base, &asked.bottom, ("base", "bottom")),
        (&asked.bottom, &asked.base_node, ("bottom", "base-node")),
    ] {
        if one.is_some() && other.is_some() {
            return refused(format!(
                "'{}' and '{}' cannot be specified at the same time",
                names.0, names.1
            ));
        }
    }
    let root = graph.lookup_any(&asked.device)?.id;
    graph.check_idle(root)?;
    let top = graph.image(root).id;
    let mut base = None;
    if let Some(name) = &asked.base {
        base = graph.find_below(root, name);
        if base.is_none() {
            return refused(format!("Can't find '{name}' in the backing chain"));
        }
    }
    if let Some(name) = &asked.base_node {
        let node = graph.lookup(None, Some(name))?.id;
        if node == root || !graph.is_in_chain(root, node) {
            return refused(format!("Node '{name}' is not a backing image of '{}'", asked.device));
        }
        base = Some(node);
    }
    if let Some(name) = &asked.bottom {
        let node = graph.lookup(None, Some(name))?;
        if node.is_filter() {
            return refused(format!("Node '{name}' is a filter, use a non-filter node as 'bottom'"));
        }
        if !graph.is_in_chain(root, node.id) {
            return refused(format!(
                "Node '{name}' is not in a chain starting from '{}'",
                asked.device
            ));
        }
        base = graph.image_below(node.id);
    }
    if asked.backing_file.is_some() && base.is_none() {
        return refused("backing file specified, but streaming the entire chain".to_owned());
    }
    for node in graph.chain(root) {
        if Some(node.id) == base {
            break;
        }
        graph.check_idle(node.id)?;
    }
    let layers = graph.layers(top, base).into_iter().skip(1).collect();
    Ok(Chosen { top, base, layers })
}
