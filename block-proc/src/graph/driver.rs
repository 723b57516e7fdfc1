//! From a description to a driver at work.

use super::Children;
use crate::bitmap::Bitmap;
use crate::bitmaps::check_size;
use crate::buffer::BouncePool;
use crate::executor::io::Io;
use crate::job::copier::Copier;
use crate::ledger::{Account, Ledger};
use crate::nbd::client::{self as nbd, NbdNode};
use crate::node::Node;
use crate::node::aligned::{Aligned, MAX_BLOCK_BYTES};
use crate::node::blkdebug::BlkdebugNode;
use crate::node::blkdebug::breakpoints::Drain;
use crate::node::copy_before_write::{CopyBeforeWriteNode, Patience, SnapshotAccessNode};
use crate::node::copy_on_read::CopyOnReadNode;
use crate::node::edge::Edge;
use crate::node::luks::{self, LuksNode};
use crate::node::mirror_top::MirrorTopNode;
use crate::node::null::NullNode;
use crate::node::qcow2::{self, L2_CACHE_BYTES, OpenError, Qcow2Node, REFCOUNT_CACHE_BYTES, read_header};
use crate::node::raw::{RawNode, RawOptions};
use crate::node::throttle::ThrottleNode;
use crate::node::window::WindowNode;
use crate::throttle::Throttling;
use ipc::Failure;
use ipc::block::{BlockEvent, DiskInfo};
use ipc::caps::DiskFd;
use ipc::graph::{Backing, ChildRole, CopyBeforeWriteSpec, GraphReply, LuksSpec, NbdSpec, NodeId, NodeSpec, Qcow2Spec};
use nix::errno::Errno;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// The drivers. Typed, because some can be asked what others cannot.
#[derive(Clone)]
pub enum Driver {
    /// An open file.
    File(Rc<dyn Node>),
    /// All of its child: it is passed over.
    Whole,
    /// qcow2.
    Qcow2(Rc<Qcow2Node>),
    /// luks.
    Luks(Rc<LuksNode>),
    /// nbd.
    Nbd(Rc<NbdNode>),
    /// copy-on-read.
    CopyOnRead(Rc<CopyOnReadNode>),
    /// mirror_top.
    MirrorTop(Rc<MirrorTopNode>),
    /// copy-before-write.
    CopyBeforeWrite(Rc<CopyBeforeWriteNode>),
    /// blkdebug, and what stands before it.
    Blkdebug(Rc<BlkdebugNode>, Rc<dyn Node>),
    /// One that is asked nothing but what all are asked.
    Other(Rc<dyn Node>),
}

impl Driver {
    /// What answers requests; nothing, where that is the child's business.
    pub fn node(&self) -> Option<Rc<dyn Node>> {
        match self {
            Self::File(node) => Some(node.clone()),
            Self::Whole => None,
            Self::Qcow2(node) => Some(node.clone()),
            Self::Luks(node) => Some(node.clone()),
            Self::Nbd(node) => Some(node.clone()),
            Self::CopyOnRead(node) => Some(node.clone()),
            Self::MirrorTop(node) => Some(node.clone()),
            Self::CopyBeforeWrite(node) => Some(node.clone()),
            Self::Blkdebug(_, top) => Some(top.clone()),
            Self::Other(node) => Some(node.clone()),
        }
    }

    /// Whether there can be something below its own layer.
    pub fn can_have_backing(&self) -> bool {
        matches!(self, Self::Qcow2(_))
    }

    /// Only for drivers that can have one.
    pub fn set_backing(&self, backing: Option<Rc<dyn Node>>) {
        if let Self::Qcow2(node) = self {
            node.set_backing(backing);
        }
    }
}

/// What came of opening a node.
pub enum Opened {
    /// A driver, and whether it never writes.
    Driver(Driver, bool),
    /// Nothing yet: the answer says what is missing.
    Missing(GraphReply),
}

/// The children that a description names.
pub fn children_of(spec: &NodeSpec) -> Vec<(ChildRole, NodeId)> {
    match spec {
        NodeSpec::File { .. } | NodeSpec::Null { .. } | NodeSpec::Nbd(_) => Vec::new(),
        NodeSpec::Raw { file, .. }
        | NodeSpec::Throttle { file, .. }
        | NodeSpec::CopyOnRead { file, .. }
        | NodeSpec::Pass { file }
        | NodeSpec::MirrorTop { file }
        | NodeSpec::SnapshotAccess { file } => {
            vec![(ChildRole::File, *file)]
        }
        NodeSpec::CopyBeforeWrite(spec) => vec![(ChildRole::File, spec.file), (ChildRole::Target, spec.target)],
        NodeSpec::Luks(spec) => vec![(ChildRole::File, spec.file)],
        NodeSpec::Blkdebug(spec) => vec![(ChildRole::File, spec.file)],
        NodeSpec::Qcow2(spec) => {
            let mut children = vec![(ChildRole::File, spec.file)];
            if let Backing::Node(node) = spec.backing {
                children.push((ChildRole::Backing, node));
            }
            children.extend(spec.data_file.map(|node| (ChildRole::DataFile, node)));
            children
        }
    }
}

/// What a description names besides children.
#[derive(Default)]
pub struct Found {
    /// The filter whose snapshot it shows.
    pub filter: Option<Rc<CopyBeforeWriteNode>>,
    /// What is dirty in its bitmap.
    pub bits: Option<Bitmap>,
    /// What is below makes errors of what raw says that it does: it cannot be passed over.
    pub is_blkdebug: bool,
}

/// What drivers are made of.
#[derive(Clone)]
pub struct Parts {
    /// The thread's engine.
    pub io: Rc<Io>,
    /// Its bounce buffers.
    pub bounce: Rc<BouncePool>,
    /// Its part of the throttle groups.
    pub throttling: Rc<Throttling>,
    /// Where changes of images are noted.
    pub ledger: Arc<Ledger>,
    /// What drivers have to say to the supervisor.
    pub events: Rc<RefCell<Vec<BlockEvent>>>,
    /// When nothing may be held at a breakpoint.
    pub drain: Rc<Drain>,
}

impl Parts {
    /// A driver over an open file.
    ///
    /// # Errors
    /// When the engine has no room for it, or the description is wrong.
    pub fn file(&self, disk: DiskFd, info: &DiskInfo) -> Result<Rc<dyn Node>, Failure> {
        let align = info.logical_block_bytes;
        if info.direct && align != 512 && align != 4096 {
            return Err(Failure::new(format!(
                "O_DIRECT with blocks of {align} bytes: 512 or 4096"
            )));
        }
        let options = RawOptions {
            bytes: info.bytes,
            is_block_device: info.is_block_device,
            direct_align: info.direct.then_some(align as usize),
            unmap: info.discard,
            no_flush: info.no_flush,
        };
        let file = self.io.add_file(disk.into_fd())?;
        let raw = Rc::new(RawNode::new(self.io.clone(), file, options, self.bounce.clone()));
        Ok(match info.direct {
            true => Aligned::new(raw, align.into()),
            false => raw,
        })
    }

    async fn nbd(&self, node: NodeId, spec: NbdSpec) -> Result<Opened, Failure> {
        let events = self.events.clone();
        let around = nbd::Surroundings {
            timers: self.io.timers().clone(),
            spawner: self.io.spawner().clone(),
            bounce: self.bounce.clone(),
            on_loss: Rc::new(move || events.borrow_mut().push(BlockEvent::NbdLost { node })),
        };
        let options = nbd::Options {
            export: spec.export,
            reconnect_delay: Duration::from_secs(spec.reconnect_delay_s.into()),
            read_only: spec.read_only,
            auto_read_only: spec.auto_read_only,
            discard: spec.discard,
        };
        let transport = nbd::socket(&self.io, spec.socket)?;
        let node = NbdNode::open(around, options, transport).await?;
        let read_only = node.is_read_only();
        Ok(Opened::Driver(Driver::Nbd(node), read_only))
    }

    /// Opens a node over its children.
    ///
    /// # Errors
    /// What is wrong with an image or with its description.
    pub async fn open(self, node: NodeId, spec: NodeSpec, children: Children, found: Found) -> Result<Opened, Failure> {
        match spec {
            NodeSpec::File { disk, info } => Ok(Opened::Driver(Driver::File(self.file(disk, &info)?), info.read_only)),
            NodeSpec::Raw {
                offset: 0,
                bytes: None,
                read_only,
                ..
            } if !found.is_blkdebug => Ok(Opened::Driver(Driver::Whole, read_only)),
            NodeSpec::Raw {
                offset,
                bytes,
                read_only,
                ..
            } => {
                let window = WindowNode::new(filtered(&children)?, offset, bytes)?;
                Ok(Opened::Driver(Driver::Other(Rc::new(window)), read_only))
            }
            NodeSpec::Qcow2(spec) => open_qcow2(spec, &children, self.ledger.account(node)).await,
            NodeSpec::Luks(spec) => open_luks(spec, &children).await,
            NodeSpec::Nbd(spec) => self.nbd(node, spec).await,
            NodeSpec::Null {
                bytes,
                latency_ns,
                read_zeroes,
            } => {
                let latency = Duration::from_nanos(latency_ns);
                let null = NullNode::new(bytes, latency, read_zeroes, self.io.timers().clone());
                Ok(Opened::Driver(Driver::Other(Rc::new(null)), false))
            }
            NodeSpec::Throttle { group, .. } => {
                let filter = ThrottleNode::new(filtered(&children)?, self.throttling.join(group)?);
                Ok(Opened::Driver(Driver::Other(Rc::new(filter)), false))
            }
            NodeSpec::CopyOnRead { for_job, .. } => {
                let filter = CopyOnReadNode::new(filtered(&children)?, for_job);
                Ok(Opened::Driver(Driver::CopyOnRead(Rc::new(filter)), false))
            }
            NodeSpec::Pass { .. } => Ok(Opened::Driver(Driver::Whole, false)),
            NodeSpec::MirrorTop { .. } => {
                let filter = MirrorTopNode::new(filtered(&children)?);
                Ok(Opened::Driver(Driver::MirrorTop(Rc::new(filter)), false))
            }
            NodeSpec::CopyBeforeWrite(spec) => {
                let filter = copy_before_write(&spec, &children, &self.io)?;
                if let Some(bits) = found.bits {
                    filter.cover(&bits);
                }
                Ok(Opened::Driver(Driver::CopyBeforeWrite(Rc::new(filter)), false))
            }
            NodeSpec::SnapshotAccess { .. } => {
                let filter = found.filter.ok_or_else(|| Failure::new("a snapshot of nothing"))?;
                let snapshot = SnapshotAccessNode::new(filter);
                Ok(Opened::Driver(Driver::Other(Rc::new(snapshot)), true))
            }
            NodeSpec::Blkdebug(spec) => {
                let align = u64::from(spec.align.unwrap_or(1));
                if align > MAX_BLOCK_BYTES {
                    return Err(Failure::new(format!(
                        "Cannot meet constraints with align {align}: at most {MAX_BLOCK_BYTES}"
                    )));
                }
                let blkdebug = BlkdebugNode::new(filtered(&children)?, spec, self.drain.clone())?;
                let top: Rc<dyn Node> = match align > blkdebug.limits().align {
                    true => Aligned::new(blkdebug.clone(), align),
                    false => blkdebug.clone(),
                };
                Ok(Opened::Driver(Driver::Blkdebug(blkdebug, top), false))
            }
        }
    }
}

fn copy_before_write(spec: &CopyBeforeWriteSpec, children: &Children, io: &Io) -> Result<CopyBeforeWriteNode, Failure> {
    let cluster = u64::from(spec.cluster_bytes);
    if !cluster.is_power_of_two() || !(512..=64 << 20).contains(&cluster) {
        return Err(Failure::new(format!("clusters of {cluster} bytes")));
    }
    let source = filtered(children)?;
    let target = edge(children, ChildRole::Target).ok_or_else(|| Failure::new("a copy without a target"))?;
    let bytes = source.bytes();
    check_size(bytes, cluster)?;
    let mut left = Bitmap::new(bytes, cluster);
    left.set(0..bytes);
    let copier = Copier::new(source.clone(), target, left);
    let patience = (spec.timeout_s > 0).then(|| Patience {
        timeout: Duration::from_secs(spec.timeout_s.into()),
        timers: io.timers().clone(),
        spawner: io.spawner().clone(),
    });
    Ok(CopyBeforeWriteNode::new(
        source,
        copier,
        !spec.for_job,
        spec.break_snapshot,
        patience,
    ))
}

fn filtered(children: &Children) -> Result<Rc<dyn Node>, Failure> {
    match edge(children, ChildRole::File) {
        Some(edge) => Ok(edge),
        None => Err(Failure::new("a filter without a file")),
    }
}

fn edge(children: &Children, role: ChildRole) -> Option<Rc<Edge>> {
    children.get(&role).map(|child| child.edge.clone())
}

async fn open_qcow2(spec: Qcow2Spec, children: &Children, account: Account) -> Result<Opened, Failure> {
    let file = edge(children, ChildRole::File).ok_or_else(|| Failure::new("a qcow2 image without a file"))?;
    let limits = file.limits();
    let options = qcow2::Options {
        writable: !spec.read_only,
        unmap: spec.discard,
        file_bytes: file.bytes(),
        is_block_device: !limits.grows,
        align: limits.align,
        l2_cache_bytes: spec.l2_cache_bytes.unwrap_or(L2_CACHE_BYTES),
        refcount_cache_bytes: spec.refcount_cache_bytes.unwrap_or(REFCOUNT_CACHE_BYTES),
        key: spec.key,
        may_be_locked: spec.may_be_locked,
    };
    let header = read_header(&*file, &options).await.map_err(failure)?;
    if spec.data_file.is_none()
        && let (true, Some(name)) = (header.has_data_file(), header.data_file)
    {
        return Ok(Opened::Missing(GraphReply::DataFileNamed { name }));
    }
    if let (Backing::FromImage, Some(name)) = (spec.backing, header.backing_name) {
        let format = header.backing_format;
        return Ok(Opened::Missing(GraphReply::BackingNamed { name, format }));
    }
    let children = qcow2::Children {
        backing: edge(children, ChildRole::Backing).map(|edge| edge as Rc<dyn Node>),
        without_backing: spec.backing == Backing::None,
        data_file: edge(children, ChildRole::DataFile).map(|edge| edge as Rc<dyn Node>),
        account: Some(account),
    };
    let node = Qcow2Node::open(file, options, children).await.map_err(failure)?;
    Ok(Opened::Driver(Driver::Qcow2(node), spec.read_only))
}

async fn open_luks(spec: LuksSpec, children: &Children) -> Result<Opened, Failure> {
    let file = edge(children, ChildRole::File).ok_or_else(|| Failure::new("a luks image without a file"))?;
    let options = luks::Options {
        file_bytes: file.bytes(),
        align: file.limits().align,
        key: spec.key,
    };
    let opened = LuksNode::open(file, options).await;
    let node = opened.map_err(|error| Failure {
        message: error.to_string(),
        errno: error.errno().map(|errno| errno as i32),
    })?;
    Ok(Opened::Driver(Driver::Luks(node), spec.read_only))
}

fn failure(error: OpenError) -> Failure {
    let errno = match &error {
        OpenError::Host(errno) => Some(*errno as i32),
        OpenError::KeyRequired => Some(Errno::ENOKEY as i32),
        OpenError::Crypto(error) => error.errno().map(|errno| errno as i32),
        _ => None,
    };
    Failure {
        message: error.to_string(),
        errno,
    }
}
