//! Nodes are added with those that come along: all of them or none.

use super::super::{Vm, nbd_client, throttling};
use super::image::{create_qcow2, insert};
use super::remove;
use super::request::unexpected;
use super::spec::key;
use super::thread::move_to_thread;
use crate::backing::Chain;
use crate::graph::error::GraphError;
use crate::graph::open;
use crate::graph::open::{Opened, OpenedFile};
use crate::graph::options::{ChildOptions, DriverOptions, NodeOptions};
use crate::graph::settings::Settings;
use ipc::graph::{BlkdebugSpec, ChildRole, LuksSpec, NodeId, NodeSpec};
use ipc::virtio::IoThreadIndex;
use std::collections::BTreeMap;
use std::pin::Pin;
use std::rc::Rc;

/// Nodes that are being added.
pub(super) struct Addition {
    pub(super) thread: IoThreadIndex,
    pub(super) opened: Opened,
    pub(super) created: Vec<NodeId>,
}

type Adding<'a, T> = Pin<Box<dyn Future<Output = Result<T, GraphError>> + 'a>>;

/// Adds a node with those that come along: all, or none and an error. Nobody owns it yet. The files were opened before
/// ([`open::open_tree`]).
///
/// # Errors
/// [`GraphError`].
pub async fn add(
    vm: &Vm,
    options: &NodeOptions,
    settings: Settings,
    opened: Opened,
    thread: IoThreadIndex,
) -> Result<NodeId, GraphError> {
    vm.graph.borrow().check_names(options)?;
    let mut addition = Addition {
        thread,
        opened,
        created: Vec::new(),
    };
    let added = create(vm, &mut addition, options, settings, &mut Chain::default()).await;
    if added.is_err() {
        for node in addition.created.into_iter().rev() {
            remove(vm, node).await;
        }
    }
    added
}

/// Opens the files of a node and those that come along, and adds them in the main thread.
///
/// # Errors
/// [`GraphError`].
pub async fn open_and_add(vm: &Vm, options: &NodeOptions, settings: Settings) -> Result<NodeId, GraphError> {
    vm.graph.borrow().check_names(options)?;
    let opened = open::open_tree(options, settings, &vm.fds.borrow())?;
    add(vm, options, settings, opened, IoThreadIndex::MAIN).await
}

pub(super) fn create<'a>(
    vm: &'a Vm,
    addition: &'a mut Addition,
    options: &'a NodeOptions,
    settings: Settings,
    chain: &'a mut Chain,
) -> Adding<'a, NodeId> {
    Box::pin(async move {
        match &options.driver {
            DriverOptions::File(_) => {
                let opened = addition.opened.next();
                let opened = opened.ok_or_else(|| GraphError::BlockProc("its file is not open".to_owned()))?;
                create_file(vm, addition, options, settings, opened).await
            }
            DriverOptions::Qcow2(qcow2) => create_qcow2(vm, addition, options, qcow2, settings, chain).await,
            DriverOptions::Nbd(nbd) => {
                let spec = NodeSpec::Nbd(nbd_client::spec(vm, nbd, settings).await?);
                insert(vm, addition, options, settings, BTreeMap::new(), None, spec).await
            }
            DriverOptions::Null {
                bytes,
                latency_ns,
                read_zeroes,
                ..
            } => {
                let spec = NodeSpec::Null {
                    bytes: *bytes,
                    latency_ns: *latency_ns,
                    read_zeroes: *read_zeroes,
                };
                insert(vm, addition, options, settings, BTreeMap::new(), None, spec).await
            }
            DriverOptions::Raw { file, offset, bytes } => {
                let file = child(vm, addition, settings, ChildRole::File, file, chain).await?;
                let settings = below_is_read_only(vm, file, settings)?;
                let spec = NodeSpec::Raw {
                    file,
                    offset: *offset,
                    bytes: *bytes,
                    read_only: settings.read_only,
                };
                insert(vm, addition, options, settings, one(file), None, spec).await
            }
            DriverOptions::Luks { file, key_secret } => {
                let key = key(vm, key_secret.as_deref())?;
                let file = child(vm, addition, settings, ChildRole::File, file, chain).await?;
                let settings = below_is_read_only(vm, file, settings)?;
                let spec = NodeSpec::Luks(LuksSpec {
                    file,
                    read_only: settings.read_only,
                    key,
                });
                insert(vm, addition, options, settings, one(file), None, spec).await
            }
            DriverOptions::Throttle { file, group } => {
                let group = throttling::number(vm, group).await?;
                let file = child(vm, addition, settings, ChildRole::File, file, chain).await?;
                let settings = as_below(vm, file, settings);
                let spec = NodeSpec::Throttle { file, group };
                insert(vm, addition, options, settings, one(file), None, spec).await
            }
            DriverOptions::CopyOnRead { file } => {
                let file = child(vm, addition, settings, ChildRole::File, file, chain).await?;
                let settings = as_below(vm, file, settings);
                let spec = NodeSpec::CopyOnRead { file, for_job: false };
                insert(vm, addition, options, settings, one(file), None, spec).await
            }
            // Only jobs make them.
            DriverOptions::JobFilter { .. } => Err(unexpected()),
            DriverOptions::Blkdebug(blkdebug) => {
                let file = child(vm, addition, settings, ChildRole::File, &blkdebug.image, chain).await?;
                let settings = below_is_read_only(vm, file, settings)?;
                let spec = NodeSpec::Blkdebug(BlkdebugSpec {
                    file,
                    inject_errors: blkdebug.inject_errors.clone(),
                    set_states: blkdebug.set_states.clone(),
                    align: blkdebug.align,
                });
                insert(vm, addition, options, settings, one(file), None, spec).await
            }
        }
    })
}

pub(super) fn one(file: NodeId) -> BTreeMap<ChildRole, NodeId> {
    BTreeMap::from([(ChildRole::File, file)])
}

/// What is above a node that turned out to be read-only is so as well, where that is allowed.
pub(super) fn below_is_read_only(vm: &Vm, child: NodeId, settings: Settings) -> Result<Settings, GraphError> {
    let graph = vm.graph.borrow();
    let below = graph.node_or_missing(child).settings.read_only;
    if below && !settings.read_only && !settings.auto_read_only {
        return Err(GraphError::ReadOnly);
    }
    Ok(Settings {
        read_only: settings.read_only || below,
        ..settings
    })
}

/// A filter does nothing by itself: over a node that is read-only it is so as well.
fn as_below(vm: &Vm, child: NodeId, settings: Settings) -> Settings {
    let below = vm.graph.borrow().node_or_missing(child).settings.read_only;
    Settings {
        read_only: settings.read_only || below,
        ..settings
    }
}

pub(super) async fn child(
    vm: &Vm,
    addition: &mut Addition,
    parent: Settings,
    role: ChildRole,
    options: &ChildOptions,
    chain: &mut Chain,
) -> Result<NodeId, GraphError> {
    match options {
        ChildOptions::Inline(options) => {
            let settings = parent.of_child(role, &options.common);
            create(vm, addition, options, settings, chain).await
        }
        ChildOptions::Reference(name) => {
            let found = {
                let graph = vm.graph.borrow();
                let node = graph.lookup_any(name)?;
                (node.id, node.thread)
            };
            if found.1 != addition.thread {
                move_to_thread(vm, found.0, addition.thread).await?;
                return Ok(vm.graph.borrow().lookup_any(name)?.id);
            }
            Ok(found.0)
        }
    }
}

async fn create_file(
    vm: &Vm,
    addition: &mut Addition,
    options: &NodeOptions,
    settings: Settings,
    opened: OpenedFile,
) -> Result<NodeId, GraphError> {
    let settings = Settings {
        read_only: opened.file.info.read_only,
        ..settings
    };
    let spec = NodeSpec::File {
        disk: opened.disk,
        info: opened.file.info.clone(),
    };
    let file = Some(Rc::new(opened.file));
    insert(vm, addition, options, settings, BTreeMap::new(), file, spec).await
}
