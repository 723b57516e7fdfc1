//! Where the commands that take a file name copy to: the file is made, unless it is there, and opened.

use super::begin::BeginError;
use crate::graph::error::GraphError;
use crate::graph::open;
use crate::graph::options::{BackingOptions, ChildOptions, DriverOptions};
use crate::graph::settings::Settings;
use crate::vm::{Vm, create, graph, names, snapshots};
use ipc::block::ImageFormat;
use ipc::graph::{CreateQcow2, CreateSpec, NodeId, Preallocation};
use ipc::snapshot::NewImageMode;
use std::path::Path;

/// A target that a file name stands for.
pub struct NewTarget<'a> {
    /// The file.
    pub file: &'a str,
    /// Its format; the source's where nothing is said of one that is made.
    pub format: Option<&'a str>,
    /// Whether it is there.
    pub mode: NewImageMode,
    /// What its node is called.
    pub name: Option<&'a str>,
    /// What its header names as its backing image, if it is made.
    pub named_below: Option<NodeId>,
    /// What it is opened over.
    pub under: Under,
}

/// What a target is opened over.
#[derive(Debug, Clone, Copy)]
pub enum Under {
    /// Nothing, whatever its header says.
    Nothing,
    /// A node.
    Node(NodeId),
}

/// Makes and opens a target of the source's size, in the source's thread.
///
/// # Errors
/// [`BeginError`]. A file that was made stays.
pub async fn open(vm: &Vm, source: NodeId, target: NewTarget<'_>) -> Result<NodeId, BeginError> {
    let (settings, thread, bytes, own_format) = {
        let graph = vm.graph.borrow();
        let node = graph.node_or_missing(source);
        (
            node.settings,
            node.thread,
            node.report.bytes,
            graph.image(source).driver_name(),
        )
    };
    let format = match (target.format, target.mode) {
        (Some(format), _) => format,
        (None, NewImageMode::AbsolutePaths) => own_format,
        // An image that says so itself is one; that anything else is raw is not guessed.
        (None, NewImageMode::Existing) => "qcow2",
    };
    if target.mode == NewImageMode::AbsolutePaths {
        make(vm, &target, format, bytes).await?;
    }
    let format = match format {
        "qcow2" => ImageFormat::Qcow2,
        "raw" | "file" | "host_device" => ImageFormat::Raw,
        other => return Err(BeginError::refused(format!("Unknown driver '{other}'"))),
    };
    let mut options = names::image(vm, target.file, format).await?;
    options.name = target.name.map(str::to_owned).or(options.name);
    if let DriverOptions::Qcow2(qcow2) = &mut options.driver {
        qcow2.backing = match target.under {
            Under::Nothing => BackingOptions::None,
            Under::Node(node) => {
                let name = vm.graph.borrow().node_or_missing(node).name.clone();
                BackingOptions::Node(ChildOptions::Reference(name))
            }
        };
    }
    let settings = Settings {
        read_only: false,
        auto_read_only: false,
        force_share: false,
        detect_zeroes: options.common.detect_zeroes,
        discard: true,
        ..settings
    };
    vm.graph.borrow().check_names(&options)?;
    let opened = open::open_tree(&options, settings, &vm.fds.borrow())?;
    match graph::add(vm, &options, settings, opened, thread).await {
        Err(GraphError::NotInFormat(_)) if target.format.is_none() => Err(BeginError::refused(format!(
            "'{}' is no qcow2 image, and other formats are not guessed: say format=",
            target.file
        ))),
        added => Ok(added?),
    }
}

async fn make(vm: &Vm, target: &NewTarget<'_>, format: &str, bytes: u64) -> Result<(), BeginError> {
    let named = target.named_below.map(|node| {
        let graph = vm.graph.borrow();
        (graph.filename(node), graph.image(node).driver_name().to_owned())
    });
    let spec = match format {
        "qcow2" => {
            let spec = CreateQcow2 {
                bytes: bytes.next_multiple_of(512),
                backing: named.map(|(name, format)| (name, Some(format))),
                ..CreateQcow2::default()
            };
            snapshots::announce_format(target.file, &spec);
            CreateSpec::Qcow2(spec)
        }
        "raw" | "file" => {
            if named.is_some() {
                return Err(BeginError::refused("Backing file not supported for file format 'raw'"));
            }
            snapshots::announce_raw(target.file, bytes);
            CreateSpec::Raw {
                bytes,
                preallocation: Preallocation::Off,
            }
        }
        other => return Err(BeginError::refused(format!("Unknown file format '{other}'"))),
    };
    create::create_file(vm, Path::new(target.file), vec![spec])
        .await
        .map_err(|error| match error {
            GraphError::BlockProc(text) => BeginError::Refused(text),
            error => error.into(),
        })
}
