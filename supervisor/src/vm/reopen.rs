//! An image is written to, or is not any more: its file is opened anew, and the nodes over it are made anew.
//!
//! Whoever asks for it (block-commit) names the image, which grants writing to it. The locks stay where they are.

use super::{Vm, graph};
use crate::graph::error::GraphError;
use crate::graph::open;
use crate::graph::options::DriverOptions;
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
    let options = crate::graph::options::FileOptions {
        path: now.path.clone(),
        ..options.clone()
    };
    let opened = open::open_file(&options, settings, &vm.fds.borrow())?;
    if opened.file.identity != now.identity {
        return Err(GraphError::Unsupported("the file of this name is another one by now"));
    }
    let info = opened.file.info.clone();
    let request = GraphRequest::ReplaceFile {
        node: id,
        disk: opened.disk,
        info: info.clone(),
    };
    graph::ask(vm, request).await?;
    let file = now.reopened(info).map_err(|errno| GraphError::Open {
        path: options.path.clone(),
        errno,
    })?;
    if let Some(node) = vm.graph.borrow_mut().nodes.get_mut(&id) {
        node.file = Some(Rc::new(file));
        node.settings = settings;
    }
    Ok(())
}
