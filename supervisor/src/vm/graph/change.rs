//! Edges and nodes of a graph in use are replaced: all of them or none.

use super::super::Vm;
use super::super::block_proc::Stage;
use super::describe::change_description;
use super::request::{ask, unexpected};
use super::set_report;
use super::spec::{detect_zeroes, spec_again};
use crate::graph::Graph;
use crate::graph::error::GraphError;
use crate::graph::node::Node;
use crate::graph::settings::Settings;
use crate::logging;
use ipc::block_job::Switch;
use ipc::graph::{EdgeChange, GraphReply, GraphRequest, NodeId, NodeSpec};
use ipc::virtio::{DeviceIdentity, DeviceIndex};
use std::collections::BTreeMap;

/// Replaces edges: all of them or none. Returns the devices whose drivers see something else now.
///
/// # Errors
/// [`GraphError`].
pub async fn change(vm: &Vm, changes: Vec<EdgeChange>) -> Result<BTreeMap<DeviceIndex, DeviceIdentity>, GraphError> {
    let before = vm.graph.borrow().clone();
    change_description(vm, |graph| graph.move_edges(&changes))?;
    match ask(vm, GraphRequest::Change(changes)).await {
        Ok(GraphReply::Resized(devices)) => Ok(devices),
        Ok(GraphReply::Done) => Ok(BTreeMap::new()),
        other => {
            let _ = change_description(vm, |graph| {
                *graph = before;
                Ok(())
            });
            Err(other.err().unwrap_or_else(unexpected))
        }
    }
}

/// As [`change`], with jobs and bitmaps; `describe` says what else becomes of the description.
///
/// # Errors
/// [`GraphError`]. Then nothing has changed.
pub async fn switch(
    vm: &Vm,
    switch: Switch,
    describe: impl FnOnce(&mut Graph) -> Result<(), GraphError>,
) -> Result<BTreeMap<DeviceIndex, DeviceIdentity>, GraphError> {
    let before = vm.graph.borrow().clone();
    change_description(vm, |graph| {
        graph.move_edges(&switch.changes)?;
        describe(graph)
    })?;
    if switch.is_empty() {
        return Ok(BTreeMap::new());
    }
    match ask(vm, GraphRequest::Switch(switch)).await {
        Ok(GraphReply::Resized(devices)) => Ok(devices),
        other => {
            let _ = change_description(vm, |graph| {
                *graph = before;
                Ok(())
            });
            Err(other.err().unwrap_or_else(unexpected))
        }
    }
}

/// Makes a node anew over the same children, with other settings: it takes the old one's place. Returns its number.
///
/// # Errors
/// [`GraphError`]. Then the old one stays.
pub async fn make_again(
    vm: &Vm,
    id: NodeId,
    settings: impl FnOnce(Settings) -> Settings,
) -> Result<NodeId, GraphError> {
    make_again_with(vm, id, |node| node.settings = settings(node.settings)).await
}

/// As [`make_again`], with anything that a node is made of.
///
/// # Errors
/// As there.
pub async fn make_again_with(vm: &Vm, id: NodeId, change: impl FnOnce(&mut Node)) -> Result<NodeId, GraphError> {
    let old = vm.graph.borrow().node_or_missing(id).clone();
    let mut node = Node {
        id: vm.graph.borrow_mut().new_id()?,
        ..old.clone()
    };
    change(&mut node);
    let new = node.id;
    let same = old.children.values().map(|child| (*child, *child)).collect();
    let request = GraphRequest::Add {
        node: new,
        thread: node.thread,
        spec: spec_again(vm, &node, &same).await?,
    };
    // Without a block-proc the description is enough: the next one makes its nodes of it.
    let report = match vm.block.stage() {
        Stage::Lost => old.report.clone(),
        _ => match ask(vm, request).await? {
            GraphReply::Added(report) => report,
            _ => return Err(unexpected()),
        },
    };
    detect_zeroes(vm, new, node.settings).await?;
    let moved = take_place(vm, id, Node { report, ..node }).await;
    let left_over = if moved.is_ok() { id } else { new };
    if let Err(error) = ask(vm, GraphRequest::Remove(left_over)).await {
        logging::line(format_args!("{}: {error}", old.name));
    }
    moved.map(|()| new)
}

/// What uses a node uses another one, which has its name.
async fn take_place(vm: &Vm, old: NodeId, node: Node) -> Result<(), GraphError> {
    let before = vm.graph.borrow().clone();
    let new = node.id;
    let edges = change_description(vm, |graph| {
        graph.insert(node);
        let edges = graph.users_to(old, new);
        graph.nodes.remove(&old);
        graph.renumber(old, new);
        Ok(edges)
    })?;
    if edges.is_empty() {
        return Ok(());
    }
    let changed = ask(vm, GraphRequest::Change(edges)).await;
    if changed.is_err() {
        let _ = change_description(vm, |graph| {
            *graph = before;
            Ok(())
        });
    }
    changed.map(drop)
}

/// Adds a job's filter, which nobody uses yet, over its child; nothing else is told of it.
///
/// # Errors
/// [`GraphError`].
pub async fn add_filter(vm: &Vm, node: Node, spec: NodeSpec) -> Result<NodeId, GraphError> {
    let (id, thread) = (node.id, node.thread);
    change_description(vm, |graph| {
        graph.insert(node);
        Ok(())
    })?;
    match ask(vm, GraphRequest::Add { node: id, thread, spec }).await {
        Ok(GraphReply::Added(report)) => {
            set_report(vm, id, report);
            Ok(id)
        }
        other => {
            let _ = change_description(vm, |graph| {
                graph.nodes.remove(&id);
                Ok(())
            });
            Err(other.err().unwrap_or_else(unexpected))
        }
    }
}
