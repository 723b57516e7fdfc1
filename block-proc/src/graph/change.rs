//! Moving edges: checked as a whole, then done as a whole.

use super::{Child, Graph, Member, User};
use crate::node::Node;
use crate::node::edge::{Edge, Target};
use ipc::Failure;
use ipc::graph::{ChildRole, EdgeChange, NodeId};
use ipc::virtio::DeviceIndex;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Which nodes are below which.
pub type Edges = BTreeMap<NodeId, BTreeMap<ChildRole, NodeId>>;

/// How many nodes there are on the longest way down from a node; nothing if there is a circle.
pub fn depth(edges: &Edges, node: NodeId) -> Option<usize> {
    // Nodes from the last to be left to the first; without recursion, because the graph may be deep.
    let mut depths: BTreeMap<NodeId, usize> = BTreeMap::new();
    let mut open: Vec<NodeId> = vec![node];
    let mut on_the_way: BTreeSet<NodeId> = BTreeSet::new();
    while let Some(at) = open.last().copied() {
        let below = || edges.get(&at).into_iter().flat_map(BTreeMap::values);
        if on_the_way.insert(at) {
            for child in below().filter(|child| !depths.contains_key(child)) {
                if on_the_way.contains(child) {
                    return None;
                }
                open.push(*child);
            }
        } else {
            open.pop();
            let deepest = below().filter_map(|child| depths.get(child)).max();
            depths.insert(at, deepest.map_or(1, |depth| depth + 1));
        }
    }
    depths.get(&node).copied()
}

impl Graph {
    /// Whether a change is possible: every node there, no circle, nothing too deep. `writes` says whether a device does.
    ///
    /// # Errors
    /// What is impossible about it.
    pub fn check_change(&self, changes: &[EdgeChange], writes: impl Fn(DeviceIndex) -> bool) -> Result<(), Failure> {
        let mut edges = self.edges();
        let mut seen = BTreeSet::new();
        let mut seen_devices = BTreeSet::new();
        let mut seen_exports = BTreeSet::new();
        for change in changes {
            let first = match *change {
                EdgeChange::Child { parent, role, child } => {
                    self.check_child(parent, role, child)?;
                    let below = edges.entry(parent).or_default();
                    match child {
                        Some(child) => below.insert(role, child),
                        None => below.remove(&role),
                    };
                    seen.insert((parent, role))
                }
                EdgeChange::Export { export, node } => {
                    let user = User::Export(export.0);
                    let used = self.users.get(&user);
                    let used = used.ok_or_else(|| Failure::new(format!("{user} has no node")))?;
                    let writes = self.member(used.node).is_ok_and(|member| !member.read_only);
                    self.member(node)?;
                    self.check_writable(user, node, writes)?;
                    seen_exports.insert(export)
                }
                EdgeChange::Device { device, node } => {
                    if !self.users.contains_key(&User::Device(device)) {
                        return Err(Failure::new(format!("device {} has no node", device.0)));
                    }
                    self.member(node)?;
                    self.check_writable(User::Device(device), node, writes(device))?;
                    seen_devices.insert(device)
                }
            };
            if !first {
                return Err(Failure::new("an edge is changed twice"));
            }
        }
        for node in edges.keys() {
            match depth(&edges, *node) {
                None => return Err(Failure::new(format!("node {} would be below itself", node.0))),
                Some(depth) if depth > super::MAX_DEPTH => {
                    return Err(Failure::new(format!(
                        "more than {} nodes would be below one another",
                        super::MAX_DEPTH
                    )));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn check_child(&self, parent: NodeId, role: ChildRole, child: Option<NodeId>) -> Result<(), Failure> {
        let member = self.member(parent)?;
        if let Some(child) = child {
            self.member(child)?;
        }
        let possible = match role {
            ChildRole::Backing => member.driver.can_have_backing(),
            // Neither can come or go.
            ChildRole::File | ChildRole::DataFile | ChildRole::Target => {
                child.is_some() && member.children.contains_key(&role)
            }
        };
        if !possible {
            return Err(Failure::new(format!(
                "node {} cannot have this child {role:?}",
                parent.0
            )));
        }
        Ok(())
    }

    /// What must be flushed before a change: whatever it takes a user from.
    pub fn to_flush(&self, changes: &[EdgeChange]) -> Vec<Rc<Target>> {
        let mut nodes = BTreeSet::new();
        for change in changes {
            match change {
                EdgeChange::Child {
                    parent,
                    role,
                    child: new,
                } => {
                    // The parent may have something for its child. What goes below an image is not written to any more.
                    nodes.insert(*parent);
                    nodes.extend(*new);
                    let child = self.member(*parent).and_then(|member| member.child(*role));
                    nodes.extend(child.map(|child| child.node));
                }
                EdgeChange::Export { export, .. } => {
                    nodes.extend(self.users.get(&User::Export(export.0)).map(|user| user.node));
                }
                EdgeChange::Device { device, .. } => {
                    nodes.extend(self.users.get(&User::Device(*device)).map(|user| user.node));
                }
            }
        }
        self.targets_to_flush(nodes)
    }

    /// Those of the nodes to which something can have been written.
    pub fn targets_to_flush(&self, nodes: impl IntoIterator<Item = NodeId>) -> Vec<Rc<Target>> {
        let written = |node: &NodeId| self.member(*node).is_ok_and(|member| !member.read_only);
        let nodes = nodes.into_iter().filter(written);
        nodes.filter_map(|node| self.target(node).ok()).collect()
    }

    /// Makes a change that was checked. Nothing may be under way.
    ///
    /// # Errors
    /// None, after [`Self::check_change`].
    pub fn apply(&mut self, changes: &[EdgeChange]) -> Result<(), Failure> {
        for change in changes {
            match *change {
                EdgeChange::Child { parent, role, child } => {
                    let target = child.map(|child| self.target(child)).transpose()?;
                    if let Some(member) = self.members.get_mut(&parent) {
                        member.set_child(role, child.zip(target));
                    }
                }
                EdgeChange::Export { export, node } => {
                    let target = self.target(node)?;
                    if let Some(user) = self.users.get_mut(&User::Export(export.0)) {
                        user.moved_to(node, target);
                    }
                }
                EdgeChange::Device { device, node } => {
                    let target = self.target(node)?;
                    if let Some(user) = self.users.get_mut(&User::Device(device)) {
                        user.moved_to(node, target);
                    }
                }
            }
        }
        self.point_all()
    }

    /// Points every edge at where it leads: a node that is passed over may have got another child.
    pub(super) fn point_all(&mut self) -> Result<(), Failure> {
        let children = self.members.values().flat_map(|member| member.children.values());
        for child in children.chain(self.users.values()) {
            child.edge.point_at(self.target(child.node)?);
        }
        Ok(())
    }
}

impl Member {
    fn set_child(&mut self, role: ChildRole, to: Option<(NodeId, Rc<Target>)>) {
        match (self.children.get_mut(&role), to) {
            (Some(child), Some((node, target))) => child.moved_to(node, target),
            (None, Some((node, target))) => {
                let edge = Edge::to(target);
                self.driver.set_backing(Some(edge.clone() as Rc<dyn Node>));
                self.children.insert(role, Child { edge, node });
            }
            (_, None) => {
                self.driver.set_backing(None);
                self.children.remove(&role);
            }
        }
    }
}
