//! blockdev-add, blockdev-del and blockdev-reopen.

use super::{Vm, graph, reopen};
use crate::graph::error::GraphError;
use crate::graph::node::{Backend, Node};
use crate::graph::options::{BackingOptions, ChildOptions, DriverOptions, NodeOptions};
use crate::graph::settings::Settings;
use ipc::blockdev::{FlatOptions, NewBlockdev};
use ipc::graph::{ChildRole, EdgeChange, GraphRequest, ManualIo, NodeDetails, NodeId};
use std::rc::Rc;

/// blockdev-add: in QMP 2.0's form it makes a drive of the node as well.
///
/// # Errors
/// [`GraphError`].
pub async fn add(vm: &Rc<Vm>, new: NewBlockdev) -> Result<(), GraphError> {
    let options = NodeOptions::parse(new.options)?;
    let _turn = vm.graph_change.enter().await;
    if options.name.is_none() && new.backend.is_none() {
        return Err(GraphError::NoName);
    }
    if let Some(backend) = &new.backend {
        vm.graph.borrow().check_drive_id(&backend.id)?;
    }
    if new.backend.is_none() && options.nodes().into_iter().any(NodeOptions::is_encrypted_with_aes) {
        // As QEMU 10: for images of that time there are `-drive` and the form of that time.
        return Err(GraphError::Unsupported(
            "Use of AES-CBC encrypted qcow2 images is no longer supported in system emulators",
        ));
    }
    super::devices::need_block(vm).await.map_err(GraphError::BlockProc)?;
    let settings = match &new.backend {
        Some(_) => Settings::of_drive(&options.common),
        None => Settings::of_root(&options.common),
    };
    let root = graph::open_and_add(vm, &options, settings).await?;
    graph::change_description(vm, |graph| {
        match &new.backend {
            Some(backend) => graph.backends.push(Backend::of_drive(backend, root)),
            None => graph.own(root),
        }
        Ok(())
    })
}

/// blockdev-del.
///
/// # Errors
/// [`GraphError`].
pub async fn delete(vm: &Vm, name: &str) -> Result<(), GraphError> {
    let _turn = vm.graph_change.enter().await;
    let id = {
        let graph = vm.graph.borrow();
        let node = graph
            .node_named(name)
            .ok_or_else(|| GraphError::NoNode(name.to_owned()))?;
        if graph.backends_on(node.id).next().is_some() {
            return Err(GraphError::InUse(name.to_owned()));
        }
        let mut overlays = graph.parents(node.id).filter(|(_, role)| *role == ChildRole::Backing);
        if let Some((overlay, _)) = overlays.next() {
            return Err(GraphError::IsBacking {
                node: name.to_owned(),
                overlay: overlay.name.clone(),
            });
        }
        graph.check_idle(node.id)?;
        if !node.is_monitor_owned {
            return Err(GraphError::NotOwned(name.to_owned()));
        }
        if graph.is_used(node.id) {
            return Err(GraphError::InUse(name.to_owned()));
        }
        node.id
    };
    graph::remove(vm, id).await;
    graph::remove_unused(vm).await;
    Ok(())
}

/// blockdev-reopen: what is not said has its default again. Of an image its backing node can be changed, of a file how it is
/// open. What a driver reads when it begins (`read-only`, `discard`, `detect-zeroes`, qcow2's caches and `lazy-refcounts`) can
/// be changed of an image that is read-only, or that nobody writes to at the time: its node is made anew.
///
/// # Errors
/// [`GraphError`]. What was changed before one of several fails stays.
pub async fn reopen(vm: &Vm, all: Vec<FlatOptions>) -> Result<(), GraphError> {
    let _turn = vm.graph_change.enter().await;
    for options in all {
        let options = NodeOptions::parse(options)?;
        let name = options.name.clone();
        let name = name.ok_or(GraphError::Unsupported("node-name not specified"))?;
        let node = {
            let graph = vm.graph.borrow();
            graph.node_named(&name).cloned().ok_or(GraphError::NoNode(name))?
        };
        reopen_one(vm, &node, options).await?;
    }
    Ok(())
}

async fn reopen_one(vm: &Vm, node: &Node, options: NodeOptions) -> Result<(), GraphError> {
    if options.driver_name() != node.driver_name() {
        return Err(GraphError::Fixed("driver".to_owned()));
    }
    let settings = Settings {
        may_be_locked: node.settings.may_be_locked,
        ..Settings::of_root(&options.common)
    };
    let mut changes = Vec::new();
    match (&node.options.driver, &options.driver) {
        (DriverOptions::File(_), DriverOptions::File(_)) => return reopen_file(vm, node, options, settings).await,
        (DriverOptions::Qcow2(old), DriverOptions::Qcow2(new)) => {
            same_child(vm, node, ChildRole::File, &new.file)?;
            if old.encrypt != new.encrypt {
                return Err(GraphError::Fixed("encrypt".to_owned()));
            }
            changes.extend(backing_change(vm, node, &new.backing)?);
        }
        (
            DriverOptions::Raw { offset, bytes, .. },
            DriverOptions::Raw {
                file,
                offset: to,
                bytes: new,
            },
        ) => {
            same_child(vm, node, ChildRole::File, file)?;
            if (offset, bytes) != (to, new) {
                return Err(GraphError::Fixed("offset".to_owned()));
            }
        }
        (DriverOptions::Nbd(old), DriverOptions::Nbd(new)) if old != new => {
            return Err(GraphError::Fixed("server".to_owned()));
        }
        (_, new) => {
            for (child, role) in children(new) {
                same_child(vm, node, role, child)?;
            }
        }
    }
    // The file below has them, and is reopened by itself.
    for (name, differs) in [
        ("cache.direct", settings.direct != node.settings.direct),
        ("cache.no-flush", settings.no_flush != node.settings.no_flush),
    ] {
        if differs {
            return Err(GraphError::Fixed(name.to_owned()));
        }
    }
    let anew = made_anew_by(node, &options, settings);
    if let Some(option) = anew {
        check_anew(vm, node, option, settings).await?;
    }
    if !changes.is_empty() {
        graph::change(vm, changes).await?;
        graph::remove_unused(vm).await;
    }
    if anew.is_some() {
        let change = |node: &mut Node| {
            node.options = options;
            node.settings = settings;
        };
        return graph::make_again_with(vm, node.id, change).await.map(drop);
    }
    if let Some(node) = vm.graph.borrow_mut().nodes.get_mut(&node.id) {
        node.options = options;
        node.settings = settings;
    }
    Ok(())
}

/// The first option whose change takes making the node anew: its driver reads it when it begins.
fn made_anew_by(node: &Node, options: &NodeOptions, settings: Settings) -> Option<&'static str> {
    let old = node.settings;
    if let (DriverOptions::Qcow2(old), DriverOptions::Qcow2(new)) = (&node.options.driver, &options.driver) {
        let changed = [
            ("lazy-refcounts", old.lazy_refcounts != new.lazy_refcounts),
            ("l2-cache-size", old.l2_cache_bytes != new.l2_cache_bytes),
            (
                "refcount-cache-size",
                old.refcount_cache_bytes != new.refcount_cache_bytes,
            ),
        ];
        if let Some((name, _)) = changed.into_iter().find(|(_, differs)| *differs) {
            return Some(name);
        }
    }
    let changed = [
        ("read-only", settings.read_only != old.read_only),
        ("discard", settings.discard != old.discard),
        ("detect-zeroes", settings.detect_zeroes != old.detect_zeroes),
    ];
    changed.into_iter().find(|(_, differs)| *differs).map(|(name, _)| name)
}

/// For a moment both the old and the new node are open: only one of them may have something that is not in the file.
async fn check_anew(vm: &Vm, node: &Node, option: &str, settings: Settings) -> Result<(), GraphError> {
    vm.graph.borrow().check_idle(node.id)?;
    if !node.settings.read_only {
        let keeps = match &node.report.details {
            NodeDetails::Qcow2(details) => details.lazy_refcounts || !details.bitmaps.is_empty(),
            _ => false,
        };
        if keeps || vm.graph.borrow().is_written(node.id) {
            return Err(GraphError::FixedInUse(option.to_owned()));
        }
        let flush = GraphRequest::Io {
            node: node.id,
            io: ManualIo::Flush,
        };
        graph::ask(vm, flush).await?;
    } else if !settings.read_only
        && let Some(file) = node.children.get(&ChildRole::File)
        && vm.graph.borrow().node_or_missing(*file).settings.read_only
    {
        // It is reopened first, by its name.
        return Err(GraphError::ReadOnly);
    }
    Ok(())
}

fn children(driver: &DriverOptions) -> Vec<(&ChildOptions, ChildRole)> {
    match driver {
        DriverOptions::Raw { file, .. }
        | DriverOptions::Throttle { file, .. }
        | DriverOptions::Luks { file, .. }
        | DriverOptions::CopyOnRead { file } => {
            vec![(file, ChildRole::File)]
        }
        DriverOptions::Blkdebug(options) => vec![(&options.image, ChildRole::File)],
        DriverOptions::Qcow2(options) => vec![(&options.file, ChildRole::File)],
        DriverOptions::File(_)
        | DriverOptions::Nbd(_)
        | DriverOptions::Null { .. }
        | DriverOptions::JobFilter { .. } => Vec::new(),
    }
}

/// A child stays: it is named, or described as it is.
fn same_child(vm: &Vm, node: &Node, role: ChildRole, options: &ChildOptions) -> Result<(), GraphError> {
    let graph = vm.graph.borrow();
    let is_same = match options {
        ChildOptions::Reference(name) => Some(graph.lookup_any(name)?.id) == node.children.get(&role).copied(),
        ChildOptions::Inline(described) => node
            .children
            .get(&role)
            .map(|child| graph.node_or_missing(*child))
            .is_some_and(|child| child.options.driver == described.driver),
    };
    if is_same {
        Ok(())
    } else {
        Err(GraphError::Fixed(crate::graph::permissions::role_name(role).to_owned()))
    }
}

/// Another backing node, if it is another.
fn backing_change(vm: &Vm, node: &Node, backing: &BackingOptions) -> Result<Option<EdgeChange>, GraphError> {
    let now = node.children.get(&ChildRole::Backing).copied();
    let wanted: Option<NodeId> = match backing {
        // As QEMU: an image that has a backing node has to say what becomes of it.
        BackingOptions::FromImage | BackingOptions::Adjusted(_) if now.is_some() => {
            return Err(GraphError::Missing("backing".to_owned()));
        }
        BackingOptions::FromImage | BackingOptions::Adjusted(_) | BackingOptions::None => None,
        BackingOptions::Node(ChildOptions::Reference(name)) => Some(vm.graph.borrow().lookup_any(name)?.id),
        BackingOptions::Node(described @ ChildOptions::Inline(_)) => {
            same_child(vm, node, ChildRole::Backing, described)?;
            now
        }
    };
    Ok((wanted != now).then_some(EdgeChange::Child {
        parent: node.id,
        role: ChildRole::Backing,
        child: wanted,
    }))
}

/// The same file, open in another way. Its locks stay where they are.
async fn reopen_file(vm: &Vm, node: &Node, options: NodeOptions, settings: Settings) -> Result<(), GraphError> {
    let (DriverOptions::File(old), DriverOptions::File(new)) = (&node.options.driver, &options.driver) else {
        return Err(GraphError::Fixed("driver".to_owned()));
    };
    if old.path != new.path {
        return Err(GraphError::Fixed("filename".to_owned()));
    }
    if settings == node.settings {
        return Ok(());
    }
    reopen::replace_file(vm, node, new, settings).await?;
    if let Some(node) = vm.graph.borrow_mut().nodes.get_mut(&node.id) {
        node.options = options;
    }
    Ok(())
}
