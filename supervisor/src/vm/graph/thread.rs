//! Nodes move to another thread: made anew there.

use super::super::{Vm, bitmaps};
use super::describe::change_description;
use super::request::{ask, unexpected};
use super::set_report;
use super::spec::{detect_zeroes, spec_again};
use crate::graph::error::GraphError;
use crate::graph::node::Node;
use ipc::graph::{GraphReply, GraphRequest, NodeId};
use ipc::virtio::IoThreadIndex;
use std::collections::BTreeMap;

/// Moves a node that nobody uses, with those below it, to another thread: made anew there, removed here.
///
/// # Errors
/// [`GraphError::OtherThread`] when somebody uses it, or what creating it says.
pub async fn move_to_thread(vm: &Vm, id: NodeId, thread: IoThreadIndex) -> Result<(), GraphError> {
    let tree: Vec<Node> = {
        let graph = vm.graph.borrow();
        let tree = graph.tree(id);
        for node in &tree {
            let has_parent_outside = graph.parents(*node).any(|(parent, _)| !tree.contains(&parent.id));
            let has_device = graph.backends_on(*node).any(|backend| backend.device.is_some());
            let is_exported = graph.exports_on(*node).next().is_some();
            if has_parent_outside || has_device || is_exported {
                return Err(GraphError::OtherThread(graph.node_or_missing(*node).name.clone()));
            }
        }
        tree.iter().map(|id| graph.node_or_missing(*id).clone()).collect()
    };
    // Away from the top, so that what an image holds in memory is in its file before it is read again.
    bitmaps::refresh(vm).await?;
    for node in tree.iter().rev() {
        ask(vm, GraphRequest::Remove(node.id)).await?;
    }
    let moved = create_again(vm, &tree, thread).await;
    if moved.is_err() {
        // They are not in block-proc any more.
        let gone = change_description(vm, |graph| {
            graph.nodes.retain(|id, _| !tree.iter().any(|node| node.id == *id));
            graph.backends.retain(|backend| backend.root != Some(id));
            Ok(())
        });
        gone?;
    }
    moved
}

async fn create_again(vm: &Vm, tree: &[Node], thread: IoThreadIndex) -> Result<(), GraphError> {
    let mut numbers = BTreeMap::new();
    for node in tree {
        let number = vm.graph.borrow_mut().new_id()?;
        numbers.insert(node.id, number);
        let spec = spec_again(vm, node, &numbers).await?;
        let request = GraphRequest::Add {
            node: number,
            thread,
            spec,
        };
        let GraphReply::Added(report) = ask(vm, request).await? else {
            return Err(unexpected());
        };
        set_report(vm, node.id, report);
        detect_zeroes(vm, number, node.settings).await?;
        bitmaps::come_back(vm, node.id, number).await?;
    }
    let mut graph = vm.graph.borrow_mut();
    for node in tree {
        let Some(node) = graph.nodes.remove(&node.id) else {
            continue;
        };
        let id = numbers[&node.id];
        for backend in graph
            .backends
            .iter_mut()
            .filter(|backend| backend.root == Some(node.id))
        {
            backend.root = Some(id);
        }
        graph.insert(Node {
            id,
            children: node
                .children
                .iter()
                .map(|(role, child)| (*role, numbers[child]))
                .collect(),
            thread,
            ..node
        });
    }
    Ok(())
}
