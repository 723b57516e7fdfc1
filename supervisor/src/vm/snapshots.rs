//! Snapshots, in images and over them, alone and in transactions.
//!
//! Each action is done at once and can be undone; when one fails, those before it are undone, the last first. Files that were
//! made stay. What belongs together happens between two requests of the guest: no disk takes any meanwhile.

use super::jobs::{self, backup, begin};
use super::{Vm, bitmaps, create, graph, lifecycle, names, resize};
use crate::graph::bitmaps::BitmapError;
use crate::graph::error::GraphError;
use crate::graph::node::Node;
use crate::graph::open;
use crate::graph::options::{BackingOptions, DriverOptions};
use crate::graph::overlay::Insertion;
use crate::graph::settings::Settings;
use crate::helper::HelperError;
use crate::jobs::Transaction;
use crate::logging;
use ipc::block::ImageFormat;
use ipc::block_info;
use ipc::graph::{CreateQcow2, CreateSpec, EdgeChange, GraphRequest, NodeDetails, NodeId, SnapshotInfo};
use ipc::qmp::QmpError;
use ipc::snapshot::{Action, InternalSnapshot, NewImageMode, Snapshot, SnapshotSync};
use std::io::Write;
use std::path::Path;
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
enum SnapshotError {
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error(transparent)]
    Helper(#[from] HelperError),
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    #[error("Transaction aborted using Abort action")]
    Aborted,
    #[error("Action '{0}' does not support transaction property completion-mode = grouped")]
    NotGrouped(&'static str),
    #[error("New overlay node-name missing")]
    NameMissing,
    #[error("New overlay node-name already in use")]
    NameTaken,
    #[error("Unknown file format '{0}'")]
    UnknownFormat(String),
    #[error("Unknown driver '{0}'")]
    UnknownDriver(String),
    #[error("Backing file not supported for file format '{0}'")]
    NoBacking(String),
    #[error("Error: Trying to create an image with the same filename as the backing file")]
    SameFile,
    #[error("Device '{0}' is read only")]
    ReadOnly(String),
    #[error("Block format '{format}' used by device '{device}' does not support internal snapshots")]
    NoInternal { format: &'static str, device: String },
    #[error("Name is empty")]
    Empty,
    #[error("Snapshot with name '{name}' already exists on device '{device}'")]
    Exists { name: String, device: String },
    #[error("Name or id must be provided")]
    Unnamed,
    #[error("Snapshot with id '{}' and name '{}' does not exist on device '{device}'", or_null(id.as_deref()), or_null(name.as_deref()))]
    NotFound {
        id: Option<String>,
        name: Option<String>,
        device: String,
    },
}

/// What clients have always seen of a name that was not given.
fn or_null(text: Option<&str>) -> &str {
    text.unwrap_or("null")
}

impl From<SnapshotError> for QmpError {
    fn from(error: SnapshotError) -> Self {
        match error {
            SnapshotError::Graph(error) => error.into(),
            SnapshotError::Bitmap(error) => error.into(),
            error => Self::generic(error.to_string()),
        }
    }
}

/// An action that was done.
enum Done {
    /// An overlay over a node.
    External {
        base: NodeId,
        overlay: NodeId,
        back: Vec<EdgeChange>,
    },
    /// A snapshot in an image.
    Internal { node: NodeId, id: String },
    /// Something with a dirty bitmap.
    Bitmap(bitmaps::Done),
    /// A job that waits for the transaction's end.
    Job(String),
}

/// transaction, and what is one of a single action.
///
/// # Errors
/// The error reply; then all is as it was.
pub async fn transaction(vm: &Rc<Vm>, actions: &[Action], grouped: bool) -> Result<(), QmpError> {
    if grouped && let Some(alone) = actions.iter().find(|action| !action.is_job()) {
        return Err(SnapshotError::NotGrouped(alone.kind()).into());
    }
    let _turn = vm.graph_change.enter().await;
    if let [] | [_] = actions {
        return carry_out(vm, actions, grouped).await;
    }
    // The machine is not stopped or reset between the actions.
    let _run = vm.change.enter().await;
    let held = lifecycle::hold_disks(vm).await.map_err(SnapshotError::from)?;
    let result = carry_out(vm, actions, grouped).await;
    if held {
        lifecycle::release_disks(vm).await.map_err(SnapshotError::from)?;
    }
    result
}

async fn carry_out(vm: &Rc<Vm>, actions: &[Action], grouped: bool) -> Result<(), QmpError> {
    let mut done = Vec::new();
    let together = grouped.then(|| vm.jobs.borrow_mut().new_transaction());
    for action in actions {
        // A job alone ends alone, but waits for the transaction all the same.
        let ends_with = || together.unwrap_or_else(|| vm.jobs.borrow_mut().new_transaction());
        match prepare(vm, action, ends_with).await {
            Ok(step) => done.push(step),
            Err(error) => {
                for step in done.into_iter().rev() {
                    undo(vm, step).await;
                }
                graph::remove_unused(vm).await;
                return Err(error);
            }
        }
    }
    // Bitmaps that go, and what was kept to undo; jobs that have waited.
    for step in done {
        match step {
            Done::Job(id) => begin::launch(vm, &id).await,
            Done::Bitmap(step) => {
                if let Err(error) = bitmaps::keep(vm, step).await {
                    logging::line(format_args!("a transaction cannot be completed: {error}"));
                }
            }
            Done::External { .. } | Done::Internal { .. } => {}
        }
    }
    Ok(())
}

async fn prepare(vm: &Rc<Vm>, action: &Action, ends_with: impl FnOnce() -> Transaction) -> Result<Done, QmpError> {
    Ok(match action {
        Action::Abort(_) => return Err(SnapshotError::Aborted.into()),
        Action::BlockdevSnapshotSync(asked) => sync(vm, asked).await?,
        Action::BlockdevSnapshot(asked) => over_existing(vm, asked).await?,
        Action::BlockdevSnapshotInternalSync(asked) => internal(vm, asked).await?,
        Action::BlockdevBackup(asked) => Done::Job(backup::to_node(vm, asked.clone(), Some(ends_with())).await?),
        Action::DriveBackup(asked) => Done::Job(backup::to_file(vm, asked.clone(), Some(ends_with())).await?),
        Action::BlockDirtyBitmapAdd(_)
        | Action::BlockDirtyBitmapClear(_)
        | Action::BlockDirtyBitmapDisable(_)
        | Action::BlockDirtyBitmapEnable(_)
        | Action::BlockDirtyBitmapMerge(_)
        | Action::BlockDirtyBitmapRemove(_) => {
            let done = bitmaps::carry_out(vm, action).await?;
            Done::Bitmap(done.ok_or(SnapshotError::Aborted)?)
        }
    })
}

async fn undo(vm: &Vm, step: Done) {
    let undone = match step {
        Done::Job(id) => {
            jobs::undo_beginning(vm, &id).await;
            Ok(None)
        }
        Done::External { base, overlay, back } => {
            let undone = graph::change(vm, back).await;
            vm.graph.borrow_mut().move_idle_backends(overlay, base);
            undone.map(Some)
        }
        Done::Internal { node, id } => graph::ask(vm, GraphRequest::DeleteSnapshot { node, id })
            .await
            .map(|_| None),
        Done::Bitmap(step) => {
            if let Err(error) = bitmaps::undo(vm, step).await {
                logging::line(format_args!("a transaction cannot be undone completely: {error}"));
            }
            return;
        }
    };
    match undone {
        Ok(Some(devices)) => resize::announce(vm, devices).await,
        Ok(None) => {}
        Err(error) => logging::line(format_args!("a transaction cannot be undone completely: {error}")),
    }
}

async fn sync(vm: &Vm, asked: &SnapshotSync) -> Result<Done, SnapshotError> {
    graph::refresh(vm).await?;
    let base = {
        let graph = vm.graph.borrow();
        graph
            .lookup(asked.device.as_deref(), asked.node_name.as_deref())?
            .clone()
    };
    vm.graph.borrow().check_idle(base.id)?;
    let name = asked.snapshot_node_name.as_deref();
    if asked.node_name.is_some() && name.is_none() {
        return Err(SnapshotError::NameMissing);
    }
    if name.is_some_and(|name| vm.graph.borrow().lookup_any(name).is_ok()) {
        return Err(SnapshotError::NameTaken);
    }
    let format = asked.format.as_deref().unwrap_or("qcow2");
    let mode = asked.mode.unwrap_or_default();
    if mode == NewImageMode::AbsolutePaths {
        make(vm, &base, &asked.snapshot_file, format).await?;
    }
    let format = match format {
        "qcow2" => ImageFormat::Qcow2,
        "raw" => ImageFormat::Raw,
        other => return Err(SnapshotError::UnknownDriver(other.to_owned())),
    };
    let mut options = names::image(vm, &asked.snapshot_file, format).await?;
    options.name = name.map(str::to_owned).or(options.name);
    if let DriverOptions::Qcow2(qcow2) = &mut options.driver {
        // Its header is not asked: it goes over what is there.
        qcow2.backing = BackingOptions::None;
    }
    let settings = Settings {
        detect_zeroes: options.common.detect_zeroes,
        ..base.settings
    };
    vm.graph.borrow().check_names(&options)?;
    let opened = open::open_tree(&options, settings, &vm.fds.borrow())?;
    let overlay = graph::add(vm, &options, settings, opened, base.thread).await?;
    insert(vm, base.id, overlay).await
}

/// Makes the file of an overlay.
async fn make(vm: &Vm, base: &Node, file: &str, format: &str) -> Result<(), SnapshotError> {
    match format {
        "qcow2" => {}
        "raw" | "luks" | "file" | "host_device" => return Err(SnapshotError::NoBacking(format.to_owned())),
        _ => return Err(SnapshotError::UnknownFormat(format.to_owned())),
    }
    let (backing, backing_format) = {
        let graph = vm.graph.borrow();
        (graph.filename(base.id), graph.image(base.id).driver_name())
    };
    if backing == file {
        return Err(SnapshotError::SameFile);
    }
    let spec = CreateQcow2 {
        bytes: base.report.bytes.next_multiple_of(512),
        backing: Some((backing.clone(), Some(backing_format.to_owned()))),
        ..CreateQcow2::default()
    };
    announce_format(file, &spec);
    create::create_file(vm, Path::new(file), vec![CreateSpec::Qcow2(spec)]).await?;
    Ok(())
}

/// What QEMU prints on its standard output when it makes a qcow2 image, where scripts look for it.
pub fn announce_format(file: &str, spec: &CreateQcow2) {
    let backing = match &spec.backing {
        Some((name, Some(format))) => format!("backing_file={name} backing_fmt={format} "),
        Some((name, None)) => format!("backing_file={name} "),
        None => String::new(),
    };
    print(&format!(
        "Formatting '{file}', fmt=qcow2 cluster_size={} extended_l2=off compression_type=zlib size={} \
         {backing}lazy_refcounts=off refcount_bits={}\n",
        spec.cluster_bytes, spec.bytes, spec.refcount_bits
    ));
}

/// The same of a raw image.
pub fn announce_raw(file: &str, bytes: u64) {
    print(&format!("Formatting '{file}', fmt=raw size={bytes}\n"));
}

fn print(line: &str) {
    // Nobody may be listening, which changes nothing.
    let _ = std::io::stdout().write_all(line.as_bytes());
}

async fn over_existing(vm: &Vm, asked: &Snapshot) -> Result<Done, SnapshotError> {
    let (base, overlay, thread) = {
        let graph = vm.graph.borrow();
        let base = graph.lookup_any(&asked.node)?;
        let overlay = graph.lookup_any(&asked.overlay)?;
        (base.clone(), overlay.clone(), base.thread)
    };
    vm.graph.borrow().check_overlay(&overlay)?;
    if overlay.thread != thread {
        graph::move_to_thread(vm, overlay.id, thread).await?;
    }
    let overlay = vm.graph.borrow().lookup_any(&asked.overlay)?.id;
    insert(vm, base.id, overlay).await
}

/// Puts an overlay in its place.
async fn insert(vm: &Vm, base: NodeId, overlay: NodeId) -> Result<Done, SnapshotError> {
    let inserted = try_insert(vm, base, overlay).await;
    if inserted.is_err() {
        graph::remove_unused(vm).await;
    }
    inserted
}

async fn try_insert(vm: &Vm, base: NodeId, overlay: NodeId) -> Result<Done, SnapshotError> {
    let Insertion { forward, back } = {
        let graph = vm.graph.borrow();
        graph.check_idle(base)?;
        graph.check_overlay(graph.node_or_missing(overlay))?;
        graph.insertion(base, overlay)
    };
    let devices = graph::change(vm, forward).await?;
    vm.graph.borrow_mut().move_idle_backends(base, overlay);
    resize::announce(vm, devices).await;
    bitmaps::store_of(vm, base).await;
    Ok(Done::External { base, overlay, back })
}

async fn internal(vm: &Vm, asked: &InternalSnapshot) -> Result<Done, SnapshotError> {
    let (node, snapshots) = image_of(vm, &asked.device).await?;
    let device = || asked.device.clone();
    if node.settings.read_only {
        return Err(SnapshotError::ReadOnly(device()));
    }
    let snapshots = snapshots.ok_or_else(|| SnapshotError::NoInternal {
        format: node.driver_name(),
        device: device(),
    })?;
    if asked.name.is_empty() {
        return Err(SnapshotError::Empty);
    }
    if snapshots.iter().any(|snapshot| snapshot.name == asked.name) {
        return Err(SnapshotError::Exists {
            name: asked.name.clone(),
            device: device(),
        });
    }
    let id = next_id(&snapshots);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let snapshot = SnapshotInfo {
        id: id.clone(),
        name: asked.name.clone(),
        vm_state_bytes: 0,
        date_seconds: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
        date_nanoseconds: now.subsec_nanos(),
        vm_clock_ns: u64::try_from(vm.run.clock().as_nanos()).unwrap_or(u64::MAX),
        icount: None,
        disk_bytes: node.report.bytes,
    };
    let node = node.id;
    graph::ask(vm, GraphRequest::CreateSnapshot { node, snapshot }).await?;
    Ok(Done::Internal { node, id })
}

/// One more than the largest number among the ids.
fn next_id(snapshots: &[SnapshotInfo]) -> String {
    let numbers = snapshots.iter().filter_map(|snapshot| snapshot.id.parse::<u64>().ok());
    numbers.max().unwrap_or(0).saturating_add(1).to_string()
}

/// The image that a device or node shows, and the snapshots in it, if it can have any.
async fn image_of(vm: &Vm, name: &str) -> Result<(Node, Option<Vec<SnapshotInfo>>), SnapshotError> {
    graph::refresh(vm).await?;
    let graph = vm.graph.borrow();
    let root = graph.lookup_any(name)?.id;
    graph.check_idle(root)?;
    let node = graph.image(root).clone();
    let snapshots = match &node.report.details {
        NodeDetails::Qcow2(details) => Some(details.snapshots.clone()),
        _ => None,
    };
    Ok((node, snapshots))
}

/// blockdev-snapshot-delete-internal-sync: by id, by name, or by both, which then must be the same snapshot's.
///
/// # Errors
/// The error reply.
pub async fn delete_internal(
    vm: &Vm,
    device: String,
    id: Option<String>,
    name: Option<String>,
) -> Result<block_info::SnapshotInfo, QmpError> {
    let _turn = vm.graph_change.enter().await;
    Ok(delete(vm, device, id, name).await?)
}

async fn delete(
    vm: &Vm,
    device: String,
    id: Option<String>,
    name: Option<String>,
) -> Result<block_info::SnapshotInfo, SnapshotError> {
    let (node, snapshots) = image_of(vm, &device).await?;
    if id.is_none() && name.is_none() {
        return Err(SnapshotError::Unnamed);
    }
    if node.settings.read_only {
        return Err(SnapshotError::ReadOnly(device));
    }
    let is_meant = |snapshot: &&SnapshotInfo| {
        id.as_ref().is_none_or(|id| *id == snapshot.id) && name.as_ref().is_none_or(|name| *name == snapshot.name)
    };
    let Some(snapshot) = snapshots.iter().flatten().find(is_meant) else {
        return Err(SnapshotError::NotFound { id, name, device });
    };
    let request = GraphRequest::DeleteSnapshot {
        node: node.id,
        id: snapshot.id.clone(),
    };
    graph::ask(vm, request).await?;
    graph::refresh(vm).await?;
    Ok(snapshot.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_snapshot_has_the_next_number() {
        let with = |ids: &[&str]| -> Vec<SnapshotInfo> {
            let info = |id: &&str| SnapshotInfo {
                id: (*id).to_owned(),
                name: String::new(),
                vm_state_bytes: 0,
                date_seconds: 0,
                date_nanoseconds: 0,
                vm_clock_ns: 0,
                icount: None,
                disk_bytes: 0,
            };
            ids.iter().map(info).collect()
        };
        for (ids, next) in [(&[][..], "1"), (&["1", "7", "3"], "8"), (&["x", "2"], "3")] {
            assert_eq!(next_id(&with(ids)), next);
        }
    }

    #[test]
    fn what_is_not_given_is_null() {
        let error = SnapshotError::NotFound {
            id: None,
            name: Some("zz".into()),
            device: "d".into(),
        };
        assert_eq!(
            error.to_string(),
            "Snapshot with id 'null' and name 'zz' does not exist on device 'd'"
        );
    }
}
