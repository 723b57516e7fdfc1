//! The nodes of one thread, the edges between them, and who uses them.
//!
//! | room | what |
//! |---|---|
//! | this file | which nodes there are and what they hold of each other |
//! | [`bitmaps`] | the dirty bitmaps on them |
//! | [`driver`] | from a description to a driver at work |
//! | [`change`] | moving edges, all or none |
//! | [`manual`] | requests of the operator's own |
//! | [`places`] | which thread has which node (for the control thread) |
//!
//! The graph itself never waits. What takes time (opening, flushing, the operator's requests) are tasks of the thread that
//! owns the graph; as long as one is at work on a node, the node is *held*: it cannot be removed. A change of edges comes
//! when no task and no request is under way.

pub mod bitmaps;
pub mod change;
pub mod driver;
pub mod manual;
pub mod places;

use crate::node::Node;
use crate::node::blkdebug::BlkdebugNode;
use crate::node::detect_zeroes::DetectZeroes;
use crate::node::edge::{Edge, Passed, Target, Watch};
use crate::node::qcow2::Qcow2Node;
use driver::{Driver, Found};
use ipc::Failure;
use ipc::block_job::{BitmapNumber, JobNumber};
use ipc::graph::{ChildRole, CopyBeforeWriteSpec, MAX_CHAIN, NodeId, NodeSpec};
use ipc::virtio::DeviceIndex;
use nix::errno::Errno;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Most nodes below one another: a chain of images, its file, and some filters. A request needs stack for each.
pub const MAX_DEPTH: usize = MAX_CHAIN + 24;

/// An edge and the node that it was pointed at.
#[derive(Clone)]
pub struct Child {
    /// What the parent's driver holds.
    pub edge: Rc<Edge>,
    /// Which node that is.
    pub node: NodeId,
}

impl Child {
    fn moved_to(&mut self, node: NodeId, target: Rc<Target>) {
        self.edge.point_at(target);
        self.node = node;
    }
}

/// A node of the graph.
pub struct Member {
    /// What it does.
    pub driver: Driver,
    /// Nothing is written to it.
    pub read_only: bool,
    children: BTreeMap<ChildRole, Child>,
    watch: Rc<Watch>,
    /// Writes of zeroes become write-zeroes, which may unmap or not.
    detect_zeroes: Option<bool>,
    /// Tasks at work on it.
    held: usize,
}

/// Who uses a node from above the graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum User {
    /// A device.
    Device(DeviceIndex),
    /// A job: a number of its own for each node that it uses.
    Job(JobNumber, usize),
    /// An export, by the number that the supervisor has given it.
    Export(u32),
}

impl std::fmt::Display for User {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Device(device) => write!(formatter, "device {}", device.0),
            Self::Job(job, _) => write!(formatter, "job {}", job.0),
            Self::Export(export) => write!(formatter, "export {export}"),
        }
    }
}

/// See the module.
#[derive(Default)]
pub struct Graph {
    members: BTreeMap<NodeId, Member>,
    /// Numbers of nodes that are being opened.
    opening: BTreeSet<NodeId>,
    /// Nodes that are being closed: for everybody else they are gone.
    closing: BTreeSet<NodeId>,
    users: BTreeMap<User, Child>,
    passed: Rc<RefCell<Vec<Passed>>>,
    bitmaps: BTreeMap<BitmapNumber, bitmaps::Member>,
}

impl Graph {
    /// A node that is there.
    ///
    /// # Errors
    /// When it is not.
    pub fn member(&self, node: NodeId) -> Result<&Member, Failure> {
        let member = self.members.get(&node).filter(|_| !self.closing.contains(&node));
        member.ok_or_else(|| Failure::new(format!("there is no node {} in this thread", node.0)))
    }

    /// Where an edge to a node leads: past those that change nothing, to the first that does.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn target(&self, node: NodeId) -> Result<Rc<Target>, Failure> {
        let mut watches = Vec::new();
        let mut at = node;
        let mut detect_zeroes = None;
        loop {
            let member = self.member(at)?;
            watches.push(member.watch.clone());
            detect_zeroes = detect_zeroes.or(member.detect_zeroes);
            if let Some(node) = member.driver.node() {
                let node = match detect_zeroes {
                    Some(may_unmap) => DetectZeroes::new(node, may_unmap),
                    None => node,
                };
                return Ok(Target::new(node, watches));
            }
            at = member.child(ChildRole::File)?.node;
        }
    }

    /// What a description names besides children.
    ///
    /// # Errors
    /// What is not there, or is something else.
    pub fn find(&self, spec: &NodeSpec) -> Result<Found, Failure> {
        let mut found = Found::default();
        match spec {
            NodeSpec::Raw { file, .. } => {
                found.is_blkdebug = matches!(self.member(*file)?.driver, Driver::Blkdebug(..));
            }
            NodeSpec::SnapshotAccess { file } => match &self.member(*file)?.driver {
                Driver::CopyBeforeWrite(filter) => found.filter = Some(filter.clone()),
                _ => return Err(wrong_driver(*file, "a copy-before-write filter")),
            },
            NodeSpec::CopyBeforeWrite(CopyBeforeWriteSpec {
                bitmap: Some(number), ..
            }) => {
                let bitmap = self.bitmap(*number);
                let bitmap = bitmap.ok_or_else(|| Failure::new(format!("there is no bitmap {}", number.0)))?;
                bitmap.borrow().check_free()?;
                found.bits = Some(bitmap.borrow().bits().clone());
            }
            _ => {}
        }
        Ok(found)
    }

    /// Takes a number for a node, and its children for it.
    ///
    /// # Errors
    /// When the number is in use, a child is not there, or there are too many below one another.
    pub fn reserve(&mut self, node: NodeId, children: &[(ChildRole, NodeId)]) -> Result<Children, Failure> {
        if self.members.contains_key(&node) || self.opening.contains(&node) {
            return Err(Failure::new(format!("node {} exists already", node.0)));
        }
        let mut taken = Children::new();
        for (role, child) in children {
            if self.depth(*child)? >= MAX_DEPTH {
                return Err(Failure::new(format!("more than {MAX_DEPTH} nodes below one another")));
            }
            let edge = Edge::to(self.target(*child)?);
            taken.insert(*role, Child { edge, node: *child });
        }
        for child in taken.values() {
            self.hold(child.node);
        }
        self.opening.insert(node);
        Ok(taken)
    }

    /// The end of what [`Self::reserve`] began: there is a node now, or not.
    pub fn settle(&mut self, node: NodeId, children: Children, opened: Option<(Driver, bool)>) {
        self.opening.remove(&node);
        for child in children.values() {
            self.release(child.node);
        }
        if let Some((driver, read_only)) = opened {
            let watch = Rc::new(Watch::new(node, self.passed.clone()));
            if let Driver::Qcow2(image) = &driver {
                // Nothing that is written may pass them by, whether they have numbers yet or not.
                watch.bitmaps().replace(image.bitmaps());
            }
            let member = Member {
                driver,
                read_only,
                children,
                watch,
                detect_zeroes: None,
                held: 0,
            };
            self.members.insert(node, member);
        }
    }

    /// Has a node look for zeroes. Nobody may use it yet: edges that lead to it already go past this.
    ///
    /// # Errors
    /// When there is no such node, or it is in use.
    pub fn set_detect_zeroes(&mut self, node: NodeId, may_unmap: bool) -> Result<(), Failure> {
        self.check_unused(node)?;
        if let Some(member) = self.members.get_mut(&node) {
            member.detect_zeroes = Some(may_unmap);
        }
        Ok(())
    }

    /// A task begins to work on a node.
    pub fn hold(&mut self, node: NodeId) {
        if let Some(member) = self.members.get_mut(&node) {
            member.held += 1;
        }
    }

    /// It is done with it.
    pub fn release(&mut self, node: NodeId) {
        if let Some(member) = self.members.get_mut(&node) {
            member.held -= 1;
        }
    }

    /// Begins to close a node: returns it, and whether there may be something to flush.
    ///
    /// # Errors
    /// When it is in use, or not there.
    pub fn begin_removal(&mut self, node: NodeId) -> Result<Option<Rc<Target>>, Failure> {
        self.check_unused(node)?;
        let flush = if self.member(node)?.read_only {
            None
        } else {
            Some(self.target(node)?)
        };
        self.closing.insert(node);
        Ok(flush)
    }

    /// It is flushed: forgets it, which closes its file.
    pub fn finish_removal(&mut self, node: NodeId) {
        self.closing.remove(&node);
        self.members.remove(&node);
        self.forget_bitmaps_of(node);
    }

    /// An edge for a user that had none.
    ///
    /// # Errors
    /// When there is no such node, or it is read-only and the user is not.
    pub fn attach(&mut self, user: User, node: NodeId, writes: bool) -> Result<Rc<Edge>, Failure> {
        let edge = Edge::to(self.target(node)?);
        self.check_writable(user, node, writes)?;
        let child = Child {
            edge: edge.clone(),
            node,
        };
        self.users.insert(user, child);
        Ok(edge)
    }

    /// A user is gone.
    pub fn detach(&mut self, user: User) {
        self.users.remove(&user);
    }

    fn check_writable(&self, user: User, node: NodeId, writes: bool) -> Result<(), Failure> {
        if writes && self.member(node)?.read_only {
            return Err(Failure::new(format!("{user} writes, and node {} is read-only", node.0)));
        }
        Ok(())
    }

    /// A file node gets another file of the same contents. Nothing may be under way.
    ///
    /// # Errors
    /// When there is no such node, or it is no file.
    pub fn replace_file(&mut self, node: NodeId, file: Rc<dyn Node>, read_only: bool) -> Result<(), Failure> {
        match self.members.get_mut(&node) {
            Some(Member {
                driver, read_only: ro, ..
            }) if matches!(driver, Driver::File(_)) => {
                *driver = Driver::File(file);
                *ro = read_only;
            }
            _ => return Err(wrong_driver(node, "a file")),
        }
        self.point_all()
    }

    /// A qcow2 image.
    ///
    /// # Errors
    /// When there is no such node, or it is something else.
    pub fn qcow2(&self, node: NodeId) -> Result<Rc<Qcow2Node>, Failure> {
        match &self.member(node)?.driver {
            Driver::Qcow2(qcow2) => Ok(qcow2.clone()),
            _ => Err(wrong_driver(node, "a qcow2 image")),
        }
    }

    /// The first blkdebug node of a node and what its image is in.
    ///
    /// # Errors
    /// When there is no such node, or no blkdebug (ENOTSUP).
    pub fn blkdebug(&self, node: NodeId) -> Result<Rc<BlkdebugNode>, Failure> {
        let mut at = node;
        loop {
            let member = self.member(at)?;
            if let Driver::Blkdebug(blkdebug, _) = &member.driver {
                return Ok(blkdebug.clone());
            }
            match member.children.get(&ChildRole::File) {
                Some(child) => at = child.node,
                None => {
                    return Err(Failure {
                        message: "Operation not supported".to_owned(),
                        errno: Some(Errno::ENOTSUP as i32),
                    });
                }
            }
        }
    }

    /// A file that nobody uses, to be written anew.
    ///
    /// # Errors
    /// When there is no such node, it is something else, or it is in use.
    pub fn unused_file(&self, node: NodeId) -> Result<Rc<Target>, Failure> {
        let member = self.member(node)?;
        if !matches!(member.driver, Driver::File(_)) {
            return Err(wrong_driver(node, "a file"));
        }
        self.check_unused(node)?;
        self.target(node)
    }

    fn check_unused(&self, node: NodeId) -> Result<(), Failure> {
        if self.member(node)?.held > 0 {
            return Err(Failure::new(format!("node {} is at work", node.0)));
        }
        if let Some(parent) = self.parent_of(node) {
            return Err(Failure::new(format!("node {} is a child of node {}", node.0, parent.0)));
        }
        if let Some((user, _)) = self.users.iter().find(|(_, used)| used.node == node) {
            return Err(Failure::new(format!("node {} is used by {user}", node.0)));
        }
        Ok(())
    }

    /// What watches the writes to a node.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn watch(&self, node: NodeId) -> Result<&Watch, Failure> {
        Ok(&self.member(node)?.watch)
    }

    /// The nodes at the top of everything that can have been written and that no device has: they are flushed by nobody else.
    pub fn written_without_device(&self) -> Vec<Rc<Target>> {
        let is_below = |node: NodeId| {
            let of_members = self.members.values().flat_map(|member| member.children.values());
            // An export's clients flush what they want to be flushed, and it goes on when a machine stops.
            let of_users = self.users.iter().filter(|(user, _)| !matches!(user, User::Export(_)));
            let below = of_members.chain(of_users.map(|(_, child)| child));
            below.into_iter().any(|child| child.node == node)
        };
        let tops = self
            .members
            .iter()
            .filter(|(node, member)| !member.read_only && !is_below(**node));
        tops.filter_map(|(node, _)| self.target(*node).ok()).collect()
    }

    /// Thresholds that were passed since the last call.
    pub fn take_passed(&self) -> Vec<Passed> {
        self.passed.take()
    }

    fn parent_of(&self, node: NodeId) -> Option<NodeId> {
        let parent = |member: &Member| member.children.values().any(|child| child.node == node);
        self.members
            .iter()
            .find(|(_, member)| parent(member))
            .map(|(parent, _)| *parent)
    }

    /// How many nodes there are on the longest way down from a node.
    fn depth(&self, node: NodeId) -> Result<usize, Failure> {
        self.member(node)?;
        let edges = self.edges();
        change::depth(&edges, node).ok_or_else(|| Failure::new("the nodes form a circle"))
    }

    fn edges(&self) -> change::Edges {
        let children = |member: &Member| {
            member
                .children
                .iter()
                .map(|(role, child)| (*role, child.node))
                .collect()
        };
        let members = self.members.iter();
        members.map(|(node, member)| (*node, children(member))).collect()
    }
}

/// The children that a new node will have.
pub type Children = BTreeMap<ChildRole, Child>;

impl Member {
    /// One of its children.
    ///
    /// # Errors
    /// When it has none in that role.
    pub fn child(&self, role: ChildRole) -> Result<&Child, Failure> {
        let child = self.children.get(&role);
        child.ok_or_else(|| Failure::new(format!("the node has no child {role:?}")))
    }
}

/// What is not a node of its own, for messages.
pub(crate) fn wrong_driver(node: NodeId, wanted: &str) -> Failure {
    Failure::new(format!("node {} is not {wanted}", node.0))
}
