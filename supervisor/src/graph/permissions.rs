//! Who may do what on a node: QEMU's permissions, as far as they decide anything here.
//!
//! Every user of a node (a device, a node above) says what it does there and what it can bear others to do. Two users get
//! along if neither does what the other cannot bear. A format writes to its file when it is writable itself; a filter, and
//! raw, does below what is done to it from above.

use super::Graph;
use super::error::GraphError;
use super::node::{Backend, Node};
use super::options::DriverOptions;
use ipc::graph::{ChildRole, NodeId};

/// A set of permissions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Permissions(u8);

/// What stands for each bit, in QEMU's words.
const NAMES: [(Permissions, &str); 3] = [
    (Permissions::READ, "consistent read"),
    (Permissions::WRITE, "write"),
    (Permissions::RESIZE, "resize"),
];

impl Permissions {
    /// None.
    pub const NONE: Self = Self(0);
    /// Reading what others do not change meanwhile.
    pub const READ: Self = Self(1);
    /// Writing.
    pub const WRITE: Self = Self(2);
    /// Changing the size.
    pub const RESIZE: Self = Self(4);

    /// Both together.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What is in both.
    pub const fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether the other is part of it.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The name of the first.
    fn first_name(self) -> &'static str {
        let mut names = NAMES.iter().filter(|(bit, _)| self.contains(*bit));
        names.next().map_or("no", |(_, name)| name)
    }

    fn names(self) -> String {
        let names = NAMES.iter().filter(|(bit, _)| self.contains(*bit));
        names.map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
    }
}

/// What a user does, and what it cannot bear.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// What it does.
    pub uses: Permissions,
    /// What nobody else may do.
    pub unshared: Permissions,
}

impl Needs {
    /// Of a device.
    pub fn of_device(read_only: bool) -> Self {
        let write = if read_only {
            Permissions::NONE
        } else {
            Permissions::WRITE
        };
        Self {
            uses: Permissions::READ.and(write),
            unshared: Permissions::WRITE,
        }
    }

    /// Of an image format on what holds it.
    fn of_format(read_only: bool) -> Self {
        let unshared = Permissions::WRITE.and(Permissions::RESIZE);
        let uses = if read_only {
            Permissions::READ
        } else {
            Permissions::READ.and(unshared)
        };
        Self { uses, unshared }
    }

    /// Of who makes a copy: nobody else writes there.
    pub fn of_copier() -> Self {
        let write = Permissions::WRITE.and(Permissions::RESIZE);
        Self {
            uses: Permissions::READ.and(write),
            unshared: write,
        }
    }

    /// Of who reads, whatever others do.
    pub fn of_reader() -> Self {
        Self {
            uses: Permissions::READ,
            unshared: Permissions::NONE,
        }
    }

    /// Both together.
    pub fn and(self, other: Self) -> Self {
        Self {
            uses: self.uses.and(other.uses),
            unshared: self.unshared.and(other.unshared),
        }
    }
}

/// One user of a node and what it needs.
struct Claim {
    by: String,
    needs: Needs,
    /// The node above whose claim it is.
    from: Option<NodeId>,
    /// Whose claims it gets along with.
    beside: Vec<NodeId>,
    /// A drive's that waits for its device: nobody drives it, and jobs may write there.
    is_idle: bool,
    /// A job's, or its filter's.
    is_job: bool,
}

impl Graph {
    /// What all users of a node need together.
    pub fn needs(&self, node: NodeId) -> Needs {
        let claims = self.claims(node).into_iter();
        claims.fold(Needs::default(), |sum, claim| sum.and(claim.needs))
    }

    /// Whether somebody writes to a node.
    pub fn is_written(&self, node: NodeId) -> bool {
        self.needs(node).uses.contains(Permissions::WRITE)
    }

    fn claims(&self, node: NodeId) -> Vec<Claim> {
        let name = &self.node_or_missing(node).name;
        let parents = self.parents(node).map(|(parent, role)| Claim {
            by: format!(
                "node '{}' (uses node '{name}' as '{}' child)",
                parent.name,
                role_name(role)
            ),
            needs: self.needs_of_parent(parent, role),
            from: Some(parent.id),
            beside: Vec::new(),
            is_idle: false,
            is_job: role == ChildRole::Target,
        });
        // A drive that waits for its device writes like the device.
        let users = self.backends_on(node).map(|backend| Claim {
            by: format!(
                "block device '{}' (uses node '{name}' as 'root' child)",
                self.backend_name(backend)
            ),
            needs: self.needs_of_backend(node, backend),
            from: None,
            beside: Vec::new(),
            is_idle: !backend.has_device(),
            is_job: false,
        });
        let jobs = self.jobs_on(node).map(|job| Claim {
            by: format!("block job '{}' (uses node '{name}' as '{}')", job.job, job.kind.name()),
            needs: job.needs,
            from: None,
            beside: job.beside.clone(),
            is_idle: false,
            is_job: true,
        });
        let exports = self.exports_on(node).map(|export| Claim {
            by: format!("an unnamed block device (uses node '{name}' as 'root' child)"),
            needs: export.needs(),
            from: None,
            beside: Vec::new(),
            is_idle: false,
            is_job: false,
        });
        parents.chain(users).chain(jobs).chain(exports).collect()
    }

    fn needs_of_backend(&self, node: NodeId, backend: &Backend) -> Needs {
        let has_device = backend.has_device();
        let needs = Needs::of_device(if has_device {
            backend.read_only
        } else {
            self.node_or_missing(node).settings.read_only
        });
        let frontend = backend.frontend.as_ref();
        let shares = frontend.is_some_and(|frontend| frontend.shares_writing);
        Needs {
            unshared: if shares { Permissions::NONE } else { needs.unshared },
            ..needs
        }
    }

    fn needs_of_parent(&self, parent: &Node, role: ChildRole) -> Needs {
        match &parent.options.driver {
            DriverOptions::Qcow2(_) if role == ChildRole::Backing => Needs {
                // It must not change, unless whoever sees the image above can bear that.
                unshared: if self.needs(parent.id).unshared.contains(Permissions::WRITE) {
                    Permissions::WRITE.and(Permissions::RESIZE)
                } else {
                    Permissions::NONE
                },
                uses: Permissions::READ,
            },
            DriverOptions::Qcow2(_) => Needs::of_format(parent.settings.read_only),
            // A backup's target may be written to besides, as in QEMU, but its size must stay.
            _ if role == ChildRole::Target => Needs {
                unshared: Permissions::RESIZE,
                ..Needs::of_copier()
            },
            // A job that must know of every write knows of those that pass its filter, as soon as that is in its place.
            DriverOptions::JobFilter { kind, .. } if kind.watches_writes() && !self.claims(parent.id).is_empty() => {
                let needs = self.needs(parent.id);
                Needs {
                    unshared: needs.unshared.and(Permissions::WRITE),
                    ..needs
                }
            }
            _ => self.needs(parent.id),
        }
    }

    /// Whether a node's size may be changed by a command, which is a user for that long.
    ///
    /// # Errors
    /// The first user that cannot bear it.
    pub fn check_resize(&self, id: NodeId) -> Result<(), GraphError> {
        let node = self.node_or_missing(id);
        if node.settings.read_only {
            return Err(GraphError::ReadOnly);
        }
        let command = Claim {
            by: format!("an unnamed block device (uses node '{}' as 'root' child)", node.name),
            needs: Needs {
                uses: Permissions::RESIZE,
                unshared: Permissions::NONE,
            },
            from: None,
            beside: Vec::new(),
            is_idle: false,
            is_job: false,
        };
        self.claims(id)
            .iter()
            .try_for_each(|claim| check_pair(node, &command, claim))
    }

    /// Whether all users get along, and nobody writes to a read-only node.
    ///
    /// # Errors
    /// The first two that do not.
    pub fn check_permissions(&self) -> Result<(), GraphError> {
        for node in self.nodes.values() {
            let claims = self.claims(node.id);
            let writes = |claim: &Claim| claim.needs.uses.contains(Permissions::WRITE);
            if node.settings.read_only && claims.iter().any(writes) {
                return Err(GraphError::ReadOnly);
            }
            for (place, claim) in claims.iter().enumerate() {
                for other in claims.iter().skip(place + 1) {
                    check_pair(node, claim, other)?;
                    check_pair(node, other, claim)?;
                }
            }
        }
        self.check_files()
    }

    /// Two nodes on one file are two programs to each other. Locks do not say so where both have one description of it
    /// (a set of fds), or where there are no locks.
    fn check_files(&self) -> Result<(), GraphError> {
        let files = self.nodes.values().filter_map(|node| {
            let file = node.file.as_ref().filter(|file| file.is_locked)?;
            Some((file, self.needs(node.id)))
        });
        let files: Vec<_> = files.collect();
        for (place, (file, needs)) in files.iter().enumerate() {
            for (other, others) in files.iter().skip(place + 1) {
                let conflict = needs
                    .uses
                    .common(others.unshared)
                    .and(others.uses.common(needs.unshared));
                if file.identity == other.identity && !conflict.is_empty() {
                    return Err(GraphError::Locked {
                        path: other.path.clone(),
                        permission: conflict.first_name(),
                    });
                }
            }
        }
        Ok(())
    }
}

fn check_pair(node: &Node, by: &Claim, with: &Claim) -> Result<(), GraphError> {
    let known = |one: &Claim, other: &Claim| {
        (one.is_idle && other.is_job) || other.from.is_some_and(|from| one.beside.contains(&from))
    };
    let conflict = by.needs.uses.common(with.needs.unshared);
    if conflict.is_empty() || known(by, with) || known(with, by) {
        return Ok(());
    }
    Err(GraphError::Conflict {
        node: node.name.clone(),
        permissions: conflict.names(),
        by: by.by.clone(),
        with: with.by.clone(),
    })
}

/// QEMU's name of an edge.
pub fn role_name(role: ChildRole) -> &'static str {
    match role {
        ChildRole::File => "file",
        ChildRole::Backing => "backing",
        ChildRole::DataFile => "data-file",
        ChildRole::Target => "target",
    }
}
