//! Jobs' part of the graph: the nodes that they use, the filters that they put in, and finding images in a chain.

use super::Graph;
use super::error::GraphError;
use super::node::Node;
use super::options::DriverOptions;
use super::permissions::Needs;
use ipc::graph::{EdgeChange, NodeDetails, NodeId};
use ipc::job::JobType;
use std::path::{Component, Path, PathBuf};

/// A node that a job uses.
#[derive(Debug, Clone)]
pub struct JobUse {
    /// The job.
    pub job: String,
    /// What it does.
    pub kind: JobType,
    /// The node.
    pub node: NodeId,
    /// What it needs there.
    pub needs: Needs,
    /// Nodes above with which it gets along, whatever they need: it knows what they do.
    pub beside: Vec<NodeId>,
}

impl Graph {
    /// The jobs that use a node.
    pub fn jobs_on(&self, id: NodeId) -> impl Iterator<Item = &JobUse> {
        self.jobs.iter().filter(move |job| job.node == id)
    }

    /// Whether a command may change what a node is: no job works on it.
    ///
    /// # Errors
    /// [`GraphError::Busy`].
    pub fn check_idle(&self, id: NodeId) -> Result<(), GraphError> {
        match self.jobs_on(id).next() {
            None => Ok(()),
            Some(job) => Err(GraphError::Busy {
                node: self.device_or_node_name(id),
                job: job.kind.name(),
            }),
        }
    }

    /// A drive's id if the node is a drive's, otherwise the node's name.
    pub fn device_or_node_name(&self, id: NodeId) -> String {
        let device = self.device_name(id);
        device.unwrap_or_else(|| self.node_or_missing(id).name.clone())
    }

    /// The id of the drive that a node is the root of.
    pub fn device_name(&self, id: NodeId) -> Option<String> {
        let named = self.backends_on(id).find(|backend| !backend.id.is_empty());
        named.map(|backend| backend.id.clone())
    }

    /// What `device` means where only the top of a tree will do.
    ///
    /// # Errors
    /// [`GraphError::NotFound`], [`GraphError::NoMedium`], or that it is not the top.
    pub fn lookup_root(&self, name: &str) -> Result<&Node, GraphError> {
        let node = self.lookup_any(name)?;
        if self.parents(node.id).next().is_some() || self.jobs_on(node.id).next().is_some() {
            return Err(GraphError::Unsupported("Need a root block node"));
        }
        Ok(node)
    }

    /// What makes all that use a node use another one, but for what is below that one (a backup over the disk it is of).
    pub fn users_to(&self, from: NodeId, to: NodeId) -> Vec<EdgeChange> {
        let below = self.tree(to);
        let parents = self.parents(from).filter(|(parent, _)| !below.contains(&parent.id));
        let parents = parents.map(|(parent, role)| EdgeChange::Child {
            parent: parent.id,
            role,
            child: Some(to),
        });
        let devices = self.backends_on(from).filter_map(|backend| backend.device);
        parents
            .chain(devices.map(|device| EdgeChange::Device { device, node: to }))
            .chain(self.exports_to(from, to))
            .collect()
    }

    /// The images of a chain from a node down to another, without that one and without filters.
    pub fn layers(&self, top: NodeId, base: Option<NodeId>) -> Vec<NodeId> {
        let chain = self.chain(top).into_iter();
        chain
            .take_while(|node| Some(node.id) != base)
            .filter(|node| !node.is_filter())
            .map(|node| node.id)
            .collect()
    }

    /// Whether a node is in the chain that begins with another.
    pub fn is_in_chain(&self, top: NodeId, node: NodeId) -> bool {
        self.chain(top).iter().any(|other| other.id == node)
    }

    /// The image below `top` whose file is called so.
    pub fn find_below(&self, top: NodeId, name: &str) -> Option<NodeId> {
        let images: Vec<NodeId> = self.layers(top, None);
        let is_meant = |pair: &&[NodeId]| {
            let (above, below) = (pair[0], self.filename(pair[1]));
            let in_header = match &self.node_or_missing(above).report.details {
                NodeDetails::Qcow2(details) => details.backing.as_ref().map(|(name, _)| name),
                NodeDetails::Plain | NodeDetails::Nbd(_) => None,
            };
            // A relative name is one from where the image above is.
            let directory = Path::new(&self.filename(above)).parent().map(Path::to_path_buf);
            let directory = directory.unwrap_or_default();
            let from_above = directory.join(name);
            // What the header says counts only where it says what is below.
            let resolved = in_header.map(|name| directory.join(name));
            let is_true = resolved.is_some_and(|path| is_same_path(Path::new(&below), &path));
            (is_true && in_header.is_some_and(|in_header| in_header == name))
                || is_same_path(Path::new(&below), Path::new(name))
                || is_same_path(Path::new(&below), &from_above)
        };
        images.windows(2).find(is_meant).map(|pair| pair[1])
    }

    /// The next image below a node, past filters.
    pub fn image_below(&self, id: NodeId) -> Option<NodeId> {
        let image = self.image(id);
        Some(self.image(image.below()?).id)
    }

    /// Past the filters that jobs have put in without a name: clients do not see them.
    pub fn explicit(&self, id: NodeId) -> &Node {
        let node = self.node_or_missing(id);
        match (&node.options.driver, node.below()) {
            (DriverOptions::JobFilter { implicit: true, .. }, Some(below)) => self.explicit(below),
            _ => node,
        }
    }

    /// A node has another number now.
    pub fn renumber(&mut self, from: NodeId, to: NodeId) {
        for node in self.nodes.values_mut() {
            node.children
                .values_mut()
                .filter(|child| **child == from)
                .for_each(|child| *child = to);
        }
        for backend in self.backends.iter_mut().filter(|backend| backend.root == Some(from)) {
            backend.root = Some(to);
        }
        for export in self.exports.iter_mut().filter(|export| export.node == from) {
            export.node = to;
        }
        self.jobs
            .iter_mut()
            .filter(|job| job.node == from)
            .for_each(|job| job.node = to);
    }
}

/// Two names of one file, as far as the names say: where links lead is not looked at.
fn is_same_path(one: &Path, other: &Path) -> bool {
    plain(one) == plain(other)
}

/// A name without `.` and `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir if plain.file_name().is_some() => {
                plain.pop();
            }
            other => plain.push(other),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_one_file_are_the_same() {
        let same = |one: &str, other: &str| is_same_path(Path::new(one), Path::new(other));
        assert!(same("/a/b/../c.img", "/a/c.img"));
        assert!(same("/a/./c.img", "/a/c.img"));
        assert!(!same("../c.img", "c.img"));
        assert!(!same("/a/c.img", "/b/c.img"));
    }
}
