//! Dirty bitmaps: the commands, what transactions do with them, and those that come with images.

use super::{Vm, graph};
use crate::graph::bitmaps::{Bitmap, BitmapError, MAX_NAME_BYTES, Use};
use crate::graph::error::GraphError;
use crate::graph::node::Node;
use crate::logging;
use ipc::bitmap::{AddBitmap, BitmapName, BitmapSha256, BitmapSource, DirtyInfo, MergeBitmaps};
use ipc::block_job::{BitmapAction, BitmapNumber, BitmapReport, Switch};
use ipc::graph::{GraphReply, GraphRequest, NodeDetails, NodeId};
use ipc::qmp::QmpError;
use std::collections::BTreeMap;

/// Bytes for each bit where nobody says how many: the size of clusters within these bounds (QEMU's), or the larger one.
const DEFAULT_GRANULARITY: std::ops::RangeInclusive<u64> = 4096..=65_536;
/// Smallest granularity, bytes.
const MIN_GRANULARITY: u32 = 512;

impl From<BitmapError> for QmpError {
    fn from(error: BitmapError) -> Self {
        match error {
            BitmapError::Graph(error) => error.into(),
            error => Self::generic(error.to_string()),
        }
    }
}

/// What was done, and can be undone.
pub enum Done {
    /// It is new.
    Added(BitmapNumber),
    /// Its bits were changed: what they were is kept until [`keep`].
    Changed(BitmapNumber),
    /// It was switched on or off, and was this before.
    Switched(BitmapNumber, bool),
    /// It will go with [`keep`], and is busy until then.
    Leaves(BitmapNumber),
}

/// One command that is no transaction.
///
/// # Errors
/// The error reply.
pub async fn alone(vm: &Vm, action: &ipc::snapshot::Action) -> Result<(), QmpError> {
    let _turn = vm.graph_change.enter().await;
    if let Some(done) = carry_out(vm, action).await? {
        keep(vm, done).await?;
    }
    Ok(())
}

/// Does an action, so that it can be undone. Nothing, if it is none on bitmaps.
///
/// # Errors
/// Why it is not possible.
pub async fn carry_out(vm: &Vm, action: &ipc::snapshot::Action) -> Result<Option<Done>, BitmapError> {
    use ipc::snapshot::Action;
    graph::refresh(vm).await?;
    Ok(Some(match action {
        Action::BlockDirtyBitmapAdd(asked) => add(vm, asked).await?,
        Action::BlockDirtyBitmapRemove(of) => leave(vm, of)?,
        Action::BlockDirtyBitmapClear(of) => {
            let number = vm.graph.borrow().usable_bitmap(&of.node, &of.name, Use::Change)?.number;
            switch(vm, vec![BitmapAction::Clear(number)]).await?;
            Done::Changed(number)
        }
        Action::BlockDirtyBitmapEnable(of) => set_enabled(vm, of, true).await?,
        Action::BlockDirtyBitmapDisable(of) => set_enabled(vm, of, false).await?,
        Action::BlockDirtyBitmapMerge(asked) => merge(vm, asked).await?,
        _ => return Ok(None),
    }))
}

/// What was done stays so.
///
/// # Errors
/// block-proc's.
pub async fn keep(vm: &Vm, done: Done) -> Result<(), BitmapError> {
    match done {
        Done::Changed(number) => switch(vm, vec![BitmapAction::Forget(number)]).await,
        Done::Leaves(number) => {
            let removed = switch(vm, vec![BitmapAction::Remove(number)]).await;
            match removed {
                Ok(()) => drop(vm.graph.borrow_mut().bitmaps.remove(&number)),
                Err(_) => change(vm, number, |bitmap| bitmap.leaves = false),
            }
            removed
        }
        Done::Added(_) | Done::Switched(..) => Ok(()),
    }
}

/// It is as it was before.
///
/// # Errors
/// block-proc's.
pub async fn undo(vm: &Vm, done: Done) -> Result<(), BitmapError> {
    match done {
        Done::Added(number) => {
            switch(vm, vec![BitmapAction::Remove(number)]).await?;
            vm.graph.borrow_mut().bitmaps.remove(&number);
        }
        Done::Changed(number) => switch(vm, vec![BitmapAction::Restore(number)]).await?,
        Done::Switched(number, before) => {
            switch(vm, vec![BitmapAction::SetEnabled(number, before)]).await?;
            change(vm, number, |bitmap| bitmap.enabled = before);
        }
        Done::Leaves(number) => change(vm, number, |bitmap| bitmap.leaves = false),
    }
    Ok(())
}

async fn add(vm: &Vm, asked: &AddBitmap) -> Result<Done, BitmapError> {
    let AddBitmap { name, granularity, .. } = asked;
    if name.is_empty() {
        return Err(BitmapError::NoName);
    }
    let persistent = asked.persistent.unwrap_or(false);
    let (node, granularity) = {
        let graph = vm.graph.borrow();
        let node = graph.explicit(graph.lookup_any(&asked.node)?.id);
        let granularity = match granularity {
            Some(bytes) if *bytes < MIN_GRANULARITY || !bytes.is_power_of_two() => {
                return Err(BitmapError::Granularity);
            }
            Some(bytes) => *bytes,
            None => default_granularity(node),
        };
        if persistent {
            check_store(&graph, node, name)?;
        }
        if graph.bitmap_named(node.id, name).is_some() {
            return Err(BitmapError::Exists(name.clone()));
        }
        if name.len() > MAX_NAME_BYTES {
            return Err(BitmapError::LongName(name.clone()));
        }
        (node.id, granularity)
    };
    let number = vm.graph.borrow_mut().new_bitmap()?;
    let enabled = !asked.disabled.unwrap_or(false);
    let action = BitmapAction::Add {
        bitmap: number,
        node,
        granularity,
        disabled: !enabled,
        persistent: persistent.then(|| name.clone()),
        lost: false,
    };
    switch(vm, vec![action]).await?;
    let bitmap = Bitmap {
        number,
        node,
        name: name.clone(),
        granularity,
        persistent,
        enabled,
        inconsistent: false,
        leaves: false,
        report: None,
    };
    vm.graph.borrow_mut().bitmaps.insert(number, bitmap);
    Ok(Done::Added(number))
}

fn default_granularity(node: &Node) -> u32 {
    let bytes = match &node.report.details {
        NodeDetails::Qcow2(details) => details.cluster_bytes,
        NodeDetails::Plain | NodeDetails::Nbd(_) => *DEFAULT_GRANULARITY.end(),
    };
    bytes.clamp(*DEFAULT_GRANULARITY.start(), *DEFAULT_GRANULARITY.end()) as u32
}

/// Whether an image can keep a bitmap, as far as can be said here.
fn check_store(graph: &crate::graph::Graph, node: &Node, name: &str) -> Result<(), BitmapError> {
    let image = || {
        let drive = graph.backends_on(node.id).find(|backend| !backend.id.is_empty());
        drive.map_or_else(|| node.name.clone(), |drive| drive.id.clone())
    };
    let NodeDetails::Qcow2(details) = &node.report.details else {
        return Err(BitmapError::NoStore(image()));
    };
    let why = if details.version < 3 {
        "Cannot store dirty bitmaps in qcow2 v2 files"
    } else if name.len() > MAX_NAME_BYTES {
        "Name length exceeds maximum (1023 characters)"
    } else if node.settings.read_only {
        "The image is read-only"
    } else {
        return Ok(());
    };
    Err(BitmapError::NotKept {
        bitmap: name.to_owned(),
        image: image(),
        why,
    })
}

fn leave(vm: &Vm, of: &BitmapName) -> Result<Done, BitmapError> {
    let number = vm.graph.borrow().usable_bitmap(&of.node, &of.name, Use::Remove)?.number;
    change(vm, number, |bitmap| bitmap.leaves = true);
    Ok(Done::Leaves(number))
}

async fn set_enabled(vm: &Vm, of: &BitmapName, enabled: bool) -> Result<Done, BitmapError> {
    let (number, before) = {
        let graph = vm.graph.borrow();
        let bitmap = graph.usable_bitmap(&of.node, &of.name, Use::Look)?;
        (bitmap.number, bitmap.enabled)
    };
    if before != enabled {
        switch(vm, vec![BitmapAction::SetEnabled(number, enabled)]).await?;
        change(vm, number, |bitmap| bitmap.enabled = enabled);
    }
    Ok(Done::Switched(number, before))
}

async fn merge(vm: &Vm, asked: &MergeBitmaps) -> Result<Done, BitmapError> {
    let (into, actions) = {
        let graph = vm.graph.borrow();
        let bytes = |bitmap: &Bitmap| graph.node_or_missing(bitmap.node).report.bytes;
        let target = graph.usable_bitmap(&asked.node, &asked.target, Use::Change)?;
        let mut actions = Vec::new();
        for source in &asked.bitmaps {
            let from = match source {
                BitmapSource::Here(name) => graph.usable_bitmap(&asked.node, name, Use::Look)?,
                BitmapSource::Of(of) => graph.usable_bitmap(&of.node, &of.name, Use::Look)?,
            };
            if bytes(target) != bytes(from) {
                return Err(BitmapError::Sizes {
                    into: bytes(target),
                    from: bytes(from),
                });
            }
            actions.push(BitmapAction::Merge {
                into: target.number,
                from: from.number,
            });
        }
        (target.number, actions)
    };
    if !actions.is_empty() {
        switch(vm, actions).await?;
    }
    Ok(Done::Changed(into))
}

fn change(vm: &Vm, number: BitmapNumber, change: impl FnOnce(&mut Bitmap)) {
    if let Some(bitmap) = vm.graph.borrow_mut().bitmaps.get_mut(&number) {
        change(bitmap);
    }
}

async fn switch(vm: &Vm, bitmaps: Vec<BitmapAction>) -> Result<(), BitmapError> {
    let switch = Switch {
        bitmaps,
        ..Switch::default()
    };
    graph::ask(vm, GraphRequest::Switch(switch)).await?;
    Ok(())
}

/// Takes the bitmaps of an image that was just opened, before anybody uses it.
///
/// # Errors
/// block-proc's.
pub async fn adopt(vm: &Vm, node: NodeId) -> Result<(), GraphError> {
    let found = match &vm.graph.borrow().node_or_missing(node).report.details {
        NodeDetails::Qcow2(details) => details.bitmaps.clone(),
        NodeDetails::Plain | NodeDetails::Nbd(_) => return Ok(()),
    };
    for bitmap in found {
        let number = match vm.graph.borrow_mut().new_bitmap() {
            Ok(number) => number,
            Err(error) => {
                logging::line(format_args!("a bitmap of an image stays without a name: {error}"));
                return Ok(());
            }
        };
        let adopted = Bitmap {
            number,
            node,
            name: bitmap.name,
            granularity: bitmap.granularity,
            persistent: true,
            enabled: bitmap.enabled && !bitmap.in_use,
            inconsistent: bitmap.in_use,
            leaves: false,
            report: None,
        };
        place(vm, adopted, false).await?;
    }
    Ok(())
}

/// Puts bitmaps back onto a node that was made anew. What its image keeps comes from there; what nobody keeps is lost, but
/// for those that had nothing dirty, which a node without users still has not.
///
/// # Errors
/// block-proc's.
pub async fn come_back(vm: &Vm, old: NodeId, new: NodeId) -> Result<(), GraphError> {
    let bitmaps: Vec<Bitmap> = {
        let mut graph = vm.graph.borrow_mut();
        let numbers: Vec<BitmapNumber> = graph.bitmaps_on(old).map(|bitmap| bitmap.number).collect();
        numbers
            .into_iter()
            .rev()
            .filter_map(|number| graph.bitmaps.remove(&number))
            .collect()
    };
    for bitmap in bitmaps {
        let was_clean = bitmap
            .report
            .is_some_and(|report| report.dirty_bytes == 0 && !report.inconsistent);
        let lost = !bitmap.persistent && !was_clean;
        let bitmap = Bitmap {
            node: new,
            inconsistent: bitmap.inconsistent || lost,
            ..bitmap
        };
        place(vm, bitmap, lost).await?;
    }
    Ok(())
}

async fn place(vm: &Vm, bitmap: Bitmap, lost: bool) -> Result<(), GraphError> {
    graph::ask(vm, place_request(&bitmap, lost)).await?;
    vm.graph.borrow_mut().bitmaps.insert(bitmap.number, bitmap);
    Ok(())
}

/// What puts a bitmap onto its node. `lost`: what was dirty is not known any more.
pub fn place_request(bitmap: &Bitmap, lost: bool) -> GraphRequest {
    let action = BitmapAction::Add {
        bitmap: bitmap.number,
        node: bitmap.node,
        granularity: bitmap.granularity,
        disabled: !bitmap.enabled,
        persistent: bitmap.persistent.then(|| bitmap.name.clone()),
        lost,
    };
    GraphRequest::Switch(Switch {
        bitmaps: vec![action],
        ..Switch::default()
    })
}

/// Asks block-proc how they are now.
///
/// # Errors
/// block-proc's.
pub async fn refresh(vm: &Vm) -> Result<(), GraphError> {
    if vm.graph.borrow().bitmaps.is_empty() {
        return Ok(());
    }
    if let GraphReply::Bitmaps(reports) = graph::ask(vm, GraphRequest::ReportBitmaps).await? {
        take_reports(vm, reports);
    }
    Ok(())
}

/// How they are, as block-proc says.
pub fn take_reports(vm: &Vm, reports: BTreeMap<BitmapNumber, BitmapReport>) {
    for (number, report) in reports {
        change(vm, number, |bitmap| {
            bitmap.enabled = report.enabled;
            bitmap.inconsistent = report.inconsistent;
            bitmap.report = Some(report);
        });
    }
}

/// The machine ends: images keep what they are to keep.
pub async fn store(vm: &Vm) {
    if !vm.graph.borrow().bitmaps.values().any(|bitmap| bitmap.persistent) {
        return;
    }
    if let Err(error) = graph::ask(vm, GraphRequest::StoreBitmaps).await {
        logging::line(format_args!("dirty bitmaps could not be kept in their images: {error}"));
    }
}

/// An image is not written to any more: what it is to keep is written now, as QEMU does it.
pub async fn store_of(vm: &Vm, node: NodeId) {
    if vm.graph.borrow().bitmaps_on(node).any(|bitmap| bitmap.persistent) {
        store(vm).await;
    }
}

/// x-debug-block-dirty-bitmap-sha256: of a bitmap that can be read.
///
/// # Errors
/// The error reply.
pub async fn sha256(vm: &Vm, of: &BitmapName) -> Result<BitmapSha256, QmpError> {
    refresh(vm).await?;
    let number = vm.graph.borrow().usable_bitmap(&of.node, &of.name, Use::Look)?.number;
    match graph::ask(vm, GraphRequest::HashBitmap(number)).await? {
        GraphReply::BitmapHash(sha256) => Ok(BitmapSha256 { sha256 }),
        _ => Err(QmpError::generic("block-proc answered with something else")),
    }
}

/// What query-block shows of those on a node.
pub fn describe(graph: &crate::graph::Graph, node: NodeId) -> Option<Vec<DirtyInfo>> {
    let mut shown = Vec::new();
    for bitmap in graph.bitmaps_on(node) {
        let Some(report) = &bitmap.report else { continue };
        let info = DirtyInfo {
            name: Some(bitmap.name.clone()),
            count: i64::try_from(report.dirty_bytes).unwrap_or(i64::MAX),
            granularity: report.granularity.into(),
            recording: report.enabled,
            busy: bitmap.is_busy(),
            persistent: bitmap.persistent,
            inconsistent: report.inconsistent.then_some(true),
        };
        if let Some(apart) = report.apart_bytes {
            // What is collected while a job works with it is a bitmap of its own, without a name.
            shown.push(DirtyInfo {
                name: None,
                count: i64::try_from(apart).unwrap_or(i64::MAX),
                busy: false,
                persistent: false,
                ..info.clone()
            });
        }
        shown.push(info);
    }
    (!shown.is_empty()).then_some(shown)
}
