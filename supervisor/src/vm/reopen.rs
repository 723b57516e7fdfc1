//! An image is written to, or is not any more: its file is opened anew, and the nodes over it are made anew.
//!
//! Whoever asks for it (block-commit) names the image, which grants writing to it. The locks stay where they are.

use super::{Vm, graph};
use crate::graph::error::GraphError;
use crate::graph::node::Node;
use crate::graph::open::{self, OpenedFile};
use crate::graph::options::{DriverOptions, FileOptions};
use crate::graph::permissions::Permissions;
use crate::graph::settings::Settings;
use ipc::graph::{ChildRole, GraphRequest, NodeId};
use std::rc::Rc;

/// Makes an image writable, or read-only. Returns its node, which is another one where its driver has to begin anew.
///
/// # Errors
/// [`GraphError`]. Then all is as it was, but for a file that stays open for writing.
pub async fn set_writable(vm: &Vm, image: NodeId, writable: bool) -> Result<NodeId, GraphError> {
    let (driver, file, read_only) = {
        let graph = vm.graph.borrow();
        let node = graph.node_or_missing(image);
        let file = node.children.get(&ChildRole::File).copied();
        (node.options.driver.clone(), file, node.settings.read_only)
    };
    if read_only != writable {
        return Ok(image);
    }
    if let DriverOptions::File(_) = driver {
        reopen_file(vm, image, writable).await?;
        return Ok(image);
    }
    let file = match file {
        Some(file) if writable => Box::pin(set_writable(vm, file, true)).await?,
        Some(file) => file,
        // What has no file can be written to, or says itself that it cannot.
        None => return Ok(image),
    };
    let again = graph::make_again(vm, image, |settings| Settings {
        read_only: !writable,
        auto_read_only: false,
        ..settings
    })
    .await?;
    if !writable {
        Box::pin(set_writable(vm, file, false)).await?;
    }
    Ok(again)
}

async fn reopen_file(vm: &Vm, id: NodeId, writable: bool) -> Result<(), GraphError> {
    let node = vm.graph.borrow().node_or_missing(id).clone();
    let (DriverOptions::File(options), Some(now)) = (&node.options.driver, &node.file) else {
        return Err(GraphError::Fixed("filename".to_owned()));
    };
    let settings = Settings {
        read_only: !writable,
        auto_read_only: false,
        ..node.settings
    };
    // Its name as it was opened: a backing image's is relative to the image that names it.
    let options = FileOptions {
        path: now.path.clone(),
        ..options.clone()
    };
    replace_file(vm, &node, &options, settings).await
}

/// Opens a node's file anew, in another way, and has block-proc use it. Its locks stay where they are.
///
/// # Errors
/// [`GraphError`]. Then all is as it was.
pub async fn replace_file(vm: &Vm, node: &Node, options: &FileOptions, settings: Settings) -> Result<(), GraphError> {
    let Some(now) = &node.file else {
        return Err(GraphError::Fixed("filename".to_owned()));
    };
    let OpenedFile { file: opened, disk } = open::open_file(options, settings, &vm.fds.borrow())?;
    if opened.identity != now.identity {
        return Err(GraphError::Unsupported("the file of this name is another one by now"));
    }
    let read_only = opened.info.read_only;
    if read_only && vm.graph.borrow().needs(node.id).uses.contains(Permissions::WRITE) {
        return Err(GraphError::ReadOnly);
    }
    let info = opened.info.clone();
    let file = now
        .reopened(opened.lock, info.clone())
        .map_err(|errno| GraphError::Open {
            path: options.path.clone(),
            errno,
        })?;
    let node = node.id;
    graph::ask(vm, GraphRequest::ReplaceFile { node, disk, info }).await?;
    if let Some(node) = vm.graph.borrow_mut().nodes.get_mut(&node) {
        node.file = Some(Rc::new(file));
        node.settings = Settings { read_only, ..settings };
    }
    Ok(())
}
