//! Nodes and devices' backends, as the supervisor describes them.

use super::locks::Locks;
use super::options::{DriverOptions, NodeOptions};
use super::settings::Settings;
use crate::frontend::Frontend;
use ipc::block::DiskInfo;
use ipc::blockdev::BackendOptions;
use ipc::caps::DiskFd;
use ipc::graph::{ChildRole, NodeDetails, NodeId, NodeReport};
use ipc::secret::Secret;
use ipc::virtio::{DeviceIndex, IoThreadIndex};
use nix::errno::Errno;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

/// A node.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its number.
    pub id: NodeId,
    /// `node-name`, or one that was made up (`#block123`).
    pub name: String,
    /// As they were given; what its children are now is in `children`.
    pub options: NodeOptions,
    /// What the options come to.
    pub settings: Settings,
    /// The nodes below.
    pub children: BTreeMap<ChildRole, NodeId>,
    /// The open file of `file` and `host_device`.
    pub file: Option<Rc<OpenFile>>,
    /// The thread of block-proc that it lives in.
    pub thread: IoThreadIndex,
    /// blockdev-add or `-blockdev` made it: it stays when nobody uses it.
    pub is_monitor_owned: bool,
    /// What block-proc said of it last.
    pub report: NodeReport,
    /// What it was unlocked with: what block_passwd has said, or its secret held when it was opened.
    pub password: Option<Rc<Secret>>,
}

/// An open file of a node.
#[derive(Debug)]
pub struct OpenFile {
    /// As it was named.
    pub path: PathBuf,
    /// Device and inode: the same file under another name is the same.
    pub identity: (u64, u64),
    /// The description that has the locks.
    pub lock: DiskFd,
    /// Ours of the description that block-proc uses since the file was opened anew; absent: it uses `lock`'s.
    pub anew: Option<DiskFd>,
    /// What it is.
    pub info: DiskInfo,
    /// The locks that it has.
    pub locks: Locks,
    /// Whether there are to be locks at all (`locking`, `force-share`).
    pub is_locked: bool,
}

impl OpenFile {
    /// The same file after it was opened anew in another way: the locks stay on the description that has them.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn reopened(&self, anew: DiskFd, info: DiskInfo) -> Result<Self, Errno> {
        let lock = self.lock.try_clone();
        Ok(Self {
            path: self.path.clone(),
            identity: self.identity,
            lock: lock.map_err(|error| error.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw))?,
            anew: Some(anew),
            info,
            locks: self.locks.clone(),
            is_locked: self.is_locked,
        })
    }

    /// Another fd of the description that block-proc uses.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn for_block_proc(&self) -> std::io::Result<DiskFd> {
        self.anew.as_ref().unwrap_or(&self.lock).try_clone()
    }
}

impl Node {
    /// The driver's name.
    pub fn driver_name(&self) -> &'static str {
        self.options.driver_name()
    }

    /// Whether it shows what its child has, but for when and how.
    pub fn is_filter(&self) -> bool {
        matches!(
            self.options.driver,
            DriverOptions::Throttle { .. } | DriverOptions::CopyOnRead { .. } | DriverOptions::JobFilter { .. }
        )
    }

    /// The node below that it shows: a filter's child, an image's backing image.
    pub fn below(&self) -> Option<NodeId> {
        let role = if self.is_filter() {
            ChildRole::File
        } else {
            ChildRole::Backing
        };
        self.children.get(&role).copied()
    }
}

/// What a device has of the graph: a drive's id, a node, and how it is used. A drive that no device uses is one as well.
#[derive(Debug, Clone)]
pub struct Backend {
    /// The drive's id; empty for a device that uses a node by its name.
    pub id: String,
    /// Its node; none: the device has no medium.
    pub root: Option<NodeId>,
    /// The device that uses it.
    pub device: Option<DeviceIndex>,
    /// The guest may only read.
    pub read_only: bool,
    /// The guest sees a volatile write cache.
    pub write_cache: bool,
    /// The block size that the guest is shown, bytes, once there is a device.
    pub logical_block_bytes: u32,
    /// What becomes of a failed read.
    pub read_error: ipc::graph::OnError,
    /// What becomes of a failed write.
    pub write_error: ipc::graph::OnError,
    /// The throttle group whose limits hold for it.
    pub throttle_group: Option<String>,
    /// The device without a guest's side that uses it.
    pub frontend: Option<Frontend>,
}

impl Backend {
    /// Whether there is a device, or what stands for one.
    pub fn has_device(&self) -> bool {
        self.device.is_some() || self.frontend.is_some()
    }

    /// A drive without a device yet.
    pub fn of_drive(options: &BackendOptions, root: NodeId) -> Self {
        Self {
            root: Some(root),
            ..Self::of_empty_drive(options)
        }
    }

    /// A drive without a device and without a medium.
    pub fn of_empty_drive(options: &BackendOptions) -> Self {
        Self {
            id: options.id.clone(),
            write_cache: options.write_cache,
            read_error: options.read_error,
            write_error: options.write_error,
            ..Self::without_medium()
        }
    }

    /// What a device has that uses a node by its name.
    pub fn of_node(root: NodeId) -> Self {
        Self {
            root: Some(root),
            ..Self::without_medium()
        }
    }

    /// What a device has that has neither a drive nor a node.
    pub fn without_medium() -> Self {
        Self {
            id: String::new(),
            root: None,
            device: None,
            read_only: false,
            write_cache: true,
            logical_block_bytes: 512,
            read_error: ipc::graph::OnError::Report,
            write_error: ipc::graph::OnError::Enospc,
            throttle_group: None,
            frontend: None,
        }
    }
}

/// What is known of a node before block-proc has said anything.
pub fn no_report() -> NodeReport {
    NodeReport {
        bytes: 0,
        details: NodeDetails::Plain,
        write_threshold: 0,
        highest_write: 0,
    }
}
