//! Why something about the graph is refused: the texts that clients know from QEMU.

use crate::backing::BackingError;
use crate::vm::fds::FdError;
use ipc::qmp::{ErrorClass, QmpError};
use nix::errno::Errno;
use std::path::PathBuf;

/// A refusal.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    /// A mandatory option is absent.
    #[error("Parameter '{0}' is missing")]
    Missing(String),
    /// An option that the driver does not have.
    #[error("Parameter '{0}' is unexpected")]
    Unexpected(String),
    /// A value of another type.
    #[error("Invalid parameter type for '{0}', expected: {1}")]
    Type(String, &'static str),
    /// A word that is not one of those possible.
    #[error("Parameter '{0}' does not accept value '{1}'")]
    Word(String, String),
    /// An option whose value this build cannot honour.
    #[error("Parameter '{0}' is not possible: {1}")]
    Impossible(String, &'static str),
    /// Too many nodes in one another.
    #[error("The nodes are nested more than {0} deep")]
    TooDeep(usize),
    /// blockdev-add without a name.
    #[error("'node-name' must be specified for the root node")]
    NoName,
    /// A name that is no identifier.
    #[error("Invalid node-name: '{0}'")]
    BadName(String),
    /// A name that is taken by a node.
    #[error("Duplicate nodes with node-name='{0}'")]
    DuplicateName(String),
    /// A name that is taken by a device.
    #[error("node-name={0} is conflicting with a device id")]
    NameIsDevice(String),
    /// A device's id that is taken by a node.
    #[error("Device name '{0}' conflicts with an existing node name")]
    DeviceIsNode(String),
    /// A device's id that is taken.
    #[error("Device with id '{0}' already exists")]
    DuplicateDevice(String),
    /// Neither a device nor a node.
    #[error("Cannot find device='{device}' nor node-name='{node}'")]
    NotFound {
        /// `device`, or nothing.
        device: String,
        /// `node-name`, or nothing.
        node: String,
    },
    /// No such node (blockdev-del and -reopen).
    #[error("Failed to find node with node-name='{0}'")]
    NoNode(String),
    /// No such device, where the class says so.
    #[error("Device '{0}' not found")]
    NoDevice(String),
    /// A device without an image.
    #[error("Device '{0}' has no medium")]
    NoMedium(String),
    /// Somebody uses it.
    #[error("Node {0} is in use")]
    InUse(String),
    /// A job works on it.
    #[error("Node '{node}' is busy: block device is in use by block job: {job}")]
    Busy {
        /// The drive or the node.
        node: String,
        /// What the job does.
        job: &'static str,
    },
    /// An image is over it.
    #[error("Node '{node}' is busy: node is used as backing hd of '{overlay}'")]
    IsBacking {
        /// The node.
        node: String,
        /// The node of the image.
        overlay: String,
    },
    /// It was not made by blockdev-add.
    #[error("Node {0} is not owned by the monitor")]
    NotOwned(String),
    /// Two users do not get along.
    #[error(
        "Permission conflict on node '{node}': permissions '{permissions}' are both required by {by} and unshared by {with}."
    )]
    Conflict {
        /// The node.
        node: String,
        /// What is wanted, separated by commas.
        permissions: String,
        /// Who wants it.
        by: String,
        /// Who does not share it.
        with: String,
    },
    /// A writer on a node that is read-only.
    #[error("Block node is read-only")]
    ReadOnly,
    /// A node cannot be its own child.
    #[error("Making '{child}' a {role} child of '{parent}' would create a cycle")]
    Cycle {
        /// Which child.
        role: &'static str,
        /// Who would be the parent.
        parent: String,
        /// Who would be the child.
        child: String,
    },
    /// Nodes of one tree live in one thread.
    #[error("Cannot change the thread of node '{0}': it is in use")]
    OtherThread(String),
    /// A file that cannot be opened.
    #[error("Could not open '{}': {}", path.display(), errno.desc())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// O_DIRECT on a file system that has none.
    #[error("Could not open '{}': file system does not support O_DIRECT (cache.direct=on)", .0.display())]
    NoDirect(PathBuf),
    /// `file` on something else.
    #[error("'file' driver requires '{}' to be a regular file", .0.display())]
    NotAFile(PathBuf),
    /// `host_device` on something else.
    #[error("'host_device' driver requires '{}' to be a block device", .0.display())]
    NotADevice(PathBuf),
    /// Somebody else holds the image's lock.
    #[error("Failed to get \"{permission}\" lock")]
    Locked {
        /// The image.
        path: PathBuf,
        /// What was wanted.
        permission: &'static str,
    },
    /// The locks of the host's file system do not work.
    #[error("Could not lock '{}': {}", path.display(), errno.desc())]
    Lock {
        /// The image.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// `aio=native` without O_DIRECT.
    #[error("aio=native was specified, but it requires cache.direct=on, which was not specified.")]
    NativeNeedsDirect,
    /// All nodes share an engine.
    #[error("aio={wanted} is not possible: this machine's I/O engine is {present}, for all nodes")]
    OtherEngine {
        /// What is wanted.
        wanted: &'static str,
        /// What is there.
        present: &'static str,
    },
    /// A set of fds.
    #[error(transparent)]
    FdSet(#[from] FdError),
    /// A file that an image names.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// A backing image without a format.
    #[error(
        "the image {} does not say which format its backing file '{name}' has, and formats are not guessed: \
         qemu-img rebase -u -F FORMAT writes it into the image",
        image.display()
    )]
    BackingFormat {
        /// The image.
        image: PathBuf,
        /// What it names.
        name: String,
    },
    /// A backing image in a format that is not supported.
    #[error("the image {} has a backing file in the format {format:?}: the supported image formats are raw and qcow2", image.display())]
    UnknownBackingFormat {
        /// The image.
        image: PathBuf,
        /// What it names.
        format: String,
    },
    /// An image with an external data file that nobody has named.
    #[error(
        "the image {} has its data in the file {name:?}: name it (data-file.driver=file,data-file.filename=…), \
         because an image's word grants no writing",
        image.display()
    )]
    DataFile {
        /// The image.
        image: PathBuf,
        /// What it names.
        name: String,
    },
    /// Something else than an image of the format.
    #[error("Image is not in {0} format")]
    NotInFormat(&'static str),
    /// The bound on how many there may be.
    #[error("there are {0} nodes already: delete some")]
    TooMany(usize),
    /// reopen: what cannot be changed.
    #[error("Cannot change the option '{0}'")]
    Fixed(String),
    /// reopen: what cannot be changed of an image that is written to, or keeps something for its end.
    #[error("Cannot change the option '{0}' of a node that is written to: stop its users first")]
    FixedInUse(String),
    /// What block-proc says.
    #[error("{0}")]
    BlockProc(String),
    /// A password that does not fit, in block-proc's words.
    #[error("{0}")]
    WrongKey(String),
    /// A secret that is not there.
    #[error("No secret with id '{0}'")]
    NoSecret(String),
    /// An object that is no key.
    #[error("Object with id '{0}' cannot be a key: {1}")]
    Key(String, String),
    /// A throttle group that is not there.
    #[error("Throttle group '{0}' does not exist")]
    NoGroup(String),
    /// A file name that begins as NBD's do.
    #[error(
        "'{0}' is no name of an NBD export: nbd:unix:PATH:exportname=NAME, nbd://HOST:PORT/NAME, nbd+unix:///NAME?socket=PATH"
    )]
    BadNbdName(String),
    /// No connection to a server.
    #[error("{0}")]
    Connect(String),
    /// What this build does not do.
    #[error("{0}")]
    Unsupported(&'static str),
}

impl From<GraphError> for QmpError {
    fn from(error: GraphError) -> Self {
        let class = match error {
            GraphError::NoDevice(_) => ErrorClass::DeviceNotFound,
            _ => ErrorClass::GenericError,
        };
        Self {
            class,
            desc: error.to_string(),
        }
    }
}

impl GraphError {
    /// For the command line, where nobody else says what the file is.
    pub fn line(&self) -> String {
        match self {
            Self::Locked { path, .. } => format!("{self}: {} is in use by another process", path.display()),
            error => error.to_string(),
        }
    }
}
