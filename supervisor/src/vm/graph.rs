//! Changes of the block graph: on a copy of the description first, then in block-proc.
//!
//! Whoever changes the graph holds [`Vm::graph_change`] until it is done, so that there is one change at a time; queries
//! look at the description in between and find it whole.

use super::{Vm, bitmaps, nbd_client, throttling};
use crate::backing::Chain;
use crate::graph::error::GraphError;
use crate::graph::locks::LockError;
use crate::graph::node::{Backend, Node, OpenFile, no_report};
use crate::graph::open::{self, Opened, OpenedFile};
use crate::graph::options::{
    BackingOptions, ChildOptions, CommonOptions, DetectZeroes, DriverOptions, FileOptions, NodeOptions, Qcow2Options,
};
use crate::graph::settings::Settings;
use crate::graph::{Graph, permissions::Needs};
use crate::helper::{HelperError, STORAGE_DEADLINE};
use crate::logging;
use crate::objects;
use ipc::block::{BlockReply, BlockRequest, ImageFormat};
use ipc::block_job::Switch;
use ipc::graph::{
    Backing, BlkdebugSpec, ChildRole, DeviceOptions, EdgeChange, GraphReply, GraphRequest, LuksSpec, NodeDetails,
    NodeId, NodeReport, NodeSpec, Qcow2Spec,
};
use ipc::secret::Secret;
use ipc::virtio::{DeviceIdentity, DeviceIndex, IoThreadIndex};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

/// Nodes that are being added.
struct Addition {
    thread: IoThreadIndex,
    opened: Opened,
    created: Vec<NodeId>,
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

fn create<'a>(
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
                let settings = below_is_read_only(vm, file, settings)?;
                let spec = NodeSpec::Throttle { file, group };
                insert(vm, addition, options, settings, one(file), None, spec).await
            }
            DriverOptions::CopyOnRead { file } => {
                let file = child(vm, addition, settings, ChildRole::File, file, chain).await?;
                let settings = below_is_read_only(vm, file, settings)?;
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

fn one(file: NodeId) -> BTreeMap<ChildRole, NodeId> {
    BTreeMap::from([(ChildRole::File, file)])
}

/// What is above a node that turned out to be read-only is so as well, where that is allowed.
fn below_is_read_only(vm: &Vm, child: NodeId, settings: Settings) -> Result<Settings, GraphError> {
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

async fn child(
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

async fn create_qcow2(
    vm: &Vm,
    addition: &mut Addition,
    options: &NodeOptions,
    qcow2: &Qcow2Options,
    settings: Settings,
    chain: &mut Chain,
) -> Result<NodeId, GraphError> {
    let file = child(vm, addition, settings, ChildRole::File, &qcow2.file, chain).await?;
    let settings = below_is_read_only(vm, file, settings)?;
    let mut children = one(file);
    if let Some(data_file) = &qcow2.data_file {
        let data_file = child(vm, addition, settings, ChildRole::DataFile, data_file, chain).await?;
        children.insert(ChildRole::DataFile, data_file);
    }
    let mut backing = match &qcow2.backing {
        BackingOptions::FromImage => Backing::FromImage,
        BackingOptions::None => Backing::None,
        BackingOptions::Node(node) => {
            let node = child(vm, addition, settings, ChildRole::Backing, node, chain).await?;
            children.insert(ChildRole::Backing, node);
            Backing::Node(node)
        }
    };
    let image = file_of(&vm.graph.borrow(), file);
    // Before its backing images have theirs, as in QEMU. A request that creates nothing uses it up as little.
    let id = vm.graph.borrow_mut().new_id()?;
    loop {
        let spec = NodeSpec::Qcow2(Qcow2Spec {
            file,
            backing,
            data_file: children.get(&ChildRole::DataFile).copied(),
            read_only: settings.read_only,
            discard: settings.discard,
            lazy_refcounts: qcow2.lazy_refcounts,
            l2_cache_bytes: qcow2.l2_cache_bytes,
            refcount_cache_bytes: qcow2.refcount_cache_bytes,
            key: qcow2_key(vm, qcow2)?,
        });
        match insert_numbered(vm, addition, id, options, settings, children.clone(), None, spec).await? {
            Inserted::Done => return Ok(id),
            // Each is asked for once: the next request says what it is.
            Inserted::Backing(name, format) if backing == Backing::FromImage => {
                let Some(image) = &image else {
                    return Err(GraphError::Unsupported(
                        "an image that is no file cannot name its backing file: say backing=",
                    ));
                };
                chain.add(&image.path, image.identity)?;
                let node = from_image(vm, addition, image, &name, format, settings, chain).await?;
                children.insert(ChildRole::Backing, node);
                backing = Backing::Node(node);
            }
            Inserted::DataFile(name) => {
                let image = image.map(|image| image.path.clone()).unwrap_or_default();
                return Err(GraphError::DataFile { image, name });
            }
            Inserted::Backing(..) => {
                return Err(GraphError::BlockProc(
                    "block-proc asks for the backing file twice".to_owned(),
                ));
            }
        }
    }
}

/// The file that an image is in, if it is in one.
fn file_of(graph: &Graph, node: NodeId) -> Option<Rc<OpenFile>> {
    let node = graph.node_or_missing(node);
    match node.children.get(&ChildRole::File) {
        Some(below) => file_of(graph, *below),
        None => node.file.clone(),
    }
}

/// Opens the backing image that an image names, and its backing images.
async fn from_image(
    vm: &Vm,
    addition: &mut Addition,
    image: &OpenFile,
    name: &str,
    format: Option<String>,
    above: Settings,
    chain: &mut Chain,
) -> Result<NodeId, GraphError> {
    let format = match format.as_deref() {
        Some("raw") => ImageFormat::Raw,
        Some("qcow2") => ImageFormat::Qcow2,
        Some(other) => {
            return Err(GraphError::UnknownBackingFormat {
                image: image.path.clone(),
                format: other.to_owned(),
            });
        }
        None => {
            return Err(GraphError::BackingFormat {
                image: image.path.clone(),
                name: name.to_owned(),
            });
        }
    };
    let (path, fd) = vm.roots.open_named(&image.path, name)?;
    let file = FileOptions {
        is_device: false,
        path,
        engine: None,
        locking: true,
    };
    let options = NodeOptions::image(format, file.clone());
    // Through the page cache, also where the disk itself is not: base images are shared.
    let settings = Settings {
        direct: false,
        read_only: true,
        ..above.of_child(ChildRole::Backing, &CommonOptions::default())
    };
    let opened = open::take_over(fd, &file, settings.of_child(ChildRole::File, &CommonOptions::default()))?;
    // A cycle is found before its image is opened a second time.
    chain.clone().add(&opened.file.path, opened.file.identity)?;
    let file = ChildOptions::Inline(Box::new(NodeOptions {
        name: None,
        common: CommonOptions::default(),
        driver: DriverOptions::File(file),
    }));
    let before = std::mem::replace(&mut addition.opened, Opened::of(opened));
    let created = match options.driver {
        DriverOptions::Qcow2(_) => {
            let options = NodeOptions {
                driver: DriverOptions::Qcow2(Box::new(Qcow2Options::over(file))),
                ..options
            };
            create_boxed(vm, addition, options, settings, chain).await
        }
        _ => create_boxed(vm, addition, options, settings, chain).await,
    };
    addition.opened = before;
    created
}

/// [`create`] with options of its own.
async fn create_boxed(
    vm: &Vm,
    addition: &mut Addition,
    options: NodeOptions,
    settings: Settings,
    chain: &mut Chain,
) -> Result<NodeId, GraphError> {
    create(vm, addition, &options, settings, chain).await
}

enum Inserted {
    Done,
    Backing(String, Option<String>),
    DataFile(String),
}

async fn insert(
    vm: &Vm,
    addition: &mut Addition,
    options: &NodeOptions,
    settings: Settings,
    children: BTreeMap<ChildRole, NodeId>,
    file: Option<Rc<OpenFile>>,
    spec: NodeSpec,
) -> Result<NodeId, GraphError> {
    let id = vm.graph.borrow_mut().new_id()?;
    match insert_numbered(vm, addition, id, options, settings, children, file, spec).await? {
        Inserted::Done => Ok(id),
        Inserted::Backing(..) | Inserted::DataFile(_) => Err(unexpected()),
    }
}

/// Describes a node, has it checked and locked, and creates it.
#[expect(clippy::too_many_arguments, reason = "these are a node's parts")]
async fn insert_numbered(
    vm: &Vm,
    addition: &mut Addition,
    id: NodeId,
    options: &NodeOptions,
    settings: Settings,
    children: BTreeMap<ChildRole, NodeId>,
    file: Option<Rc<OpenFile>>,
    spec: NodeSpec,
) -> Result<Inserted, GraphError> {
    let node = Node {
        id,
        name: options.name.clone().unwrap_or_else(|| Graph::made_up_name(id)),
        options: options.clone(),
        settings,
        children,
        file,
        thread: addition.thread,
        is_monitor_owned: false,
        report: no_report(),
    };
    change_description(vm, |graph| {
        graph.insert(node);
        Ok(())
    })?;
    let request = GraphRequest::Add {
        node: id,
        thread: addition.thread,
        spec,
    };
    let forget = || {
        // Giving a node up needs less than there was.
        let _ = change_description(vm, |graph| {
            graph.nodes.remove(&id);
            Ok(())
        });
    };
    match ask(vm, request).await {
        Ok(GraphReply::Added(report)) => {
            set_report(vm, id, report);
            addition.created.push(id);
            detect_zeroes(vm, id, settings).await?;
            bitmaps::adopt(vm, id).await?;
            Ok(Inserted::Done)
        }
        Ok(GraphReply::BackingNamed { name, format }) => {
            forget();
            Ok(Inserted::Backing(name, format))
        }
        Ok(GraphReply::DataFileNamed { name }) => {
            forget();
            Ok(Inserted::DataFile(name))
        }
        Ok(_) => {
            forget();
            Err(unexpected())
        }
        Err(error) => {
            forget();
            Err(error)
        }
    }
}

/// Changes the description, if what it becomes is allowed and its files can be locked. Otherwise nothing changes.
///
/// # Errors
/// [`GraphError`].
pub fn change_description<T>(
    vm: &Vm,
    change: impl FnOnce(&mut Graph) -> Result<T, GraphError>,
) -> Result<T, GraphError> {
    let before = vm.graph.borrow().clone();
    let mut after = before.clone();
    let result = change(&mut after)?;
    after.check_permissions()?;
    if let Err(error) = lock(&after) {
        // What was locked before nobody else can have taken meanwhile.
        let _ = lock(&before);
        return Err(error);
    }
    let gone = before.nodes.iter().filter(|(id, _)| !after.nodes.contains_key(id));
    for file in gone.filter_map(|(_, node)| node.file.as_ref()) {
        file.locks.release(&file.lock);
    }
    // A description made by an earlier change may have got a newer number meanwhile.
    vm.graph.replace(after);
    Ok(result)
}

/// Makes every file's locks what its users need.
fn lock(graph: &Graph) -> Result<(), GraphError> {
    for node in graph.nodes.values() {
        let Some(file) = node.file.as_ref().filter(|file| file.is_locked) else {
            continue;
        };
        let needs: Needs = graph.needs(node.id);
        file.locks.change(&file.lock, needs).map_err(|error| match error {
            LockError::Taken(permission) => GraphError::Locked {
                path: file.path.clone(),
                permission,
            },
            LockError::System(errno) => GraphError::Lock {
                path: file.path.clone(),
                errno,
            },
        })?;
    }
    Ok(())
}

/// Gives up all locks: the machine ends.
pub fn unlock_all(graph: &Graph) {
    for file in graph.nodes.values().filter_map(|node| node.file.as_ref()) {
        file.locks.release(&file.lock);
    }
}

/// Removes a node that nobody uses.
pub async fn remove(vm: &Vm, id: NodeId) {
    match ask(vm, GraphRequest::Remove(id)).await {
        Ok(_) => {}
        // It is gone for clients; its file has been closed, or block-proc with it.
        Err(error) => logging::line(format_args!("{}: {error}", vm.graph.borrow().node_or_missing(id).name)),
    }
    let _ = change_description(vm, |graph| {
        graph.nodes.remove(&id);
        graph.forget_bitmaps();
        Ok(())
    });
}

/// Removes the nodes that nothing keeps any more.
pub async fn remove_unused(vm: &Vm) {
    let unused = vm.graph.borrow().unused();
    for node in unused {
        remove(vm, node).await;
    }
}

/// Puts a drive or a node behind a device, and says what its driver will see.
///
/// # Errors
/// [`GraphError`].
pub async fn attach(
    vm: &Vm,
    device: DeviceIndex,
    backend: Backend,
    serial: &str,
) -> Result<DeviceIdentity, GraphError> {
    let Some(root) = backend.root else {
        return Err(GraphError::NoMedium(backend.id));
    };
    let (read_only, logical_block_bytes) = {
        let graph = vm.graph.borrow();
        let files = graph.tree(root);
        let blocks = files.iter().filter_map(|id| {
            let node = graph.node_or_missing(*id);
            match (&node.file, &node.report.details) {
                (Some(file), _) => Some(file.info.logical_block_bytes),
                // Larger blocks are more than a guest may be shown: block-proc reads around them.
                (None, NodeDetails::Nbd(nbd)) => Some(nbd.min_block_bytes.clamp(512, 4096)),
                (None, _) => None,
            }
        });
        (
            graph.node_or_missing(root).settings.read_only,
            blocks.max().unwrap_or(512),
        )
    };
    let backend = Backend {
        device: Some(device),
        read_only,
        ..backend
    };
    let options = DeviceOptions {
        read_only,
        write_cache: backend.write_cache,
        serial: serial.to_owned(),
        logical_block_bytes,
        read_error: backend.read_error,
        write_error: backend.write_error,
    };
    change_description(vm, |graph| {
        graph
            .backends
            .retain(|other| other.id.is_empty() || other.id != backend.id);
        graph.backends.push(backend);
        Ok(())
    })?;
    let request = GraphRequest::Attach {
        device,
        node: root,
        options,
    };
    match ask(vm, request).await? {
        GraphReply::Attached(identity) => Ok(identity),
        _ => Err(unexpected()),
    }
}

/// Replaces edges: all of them or none. Returns the devices whose drivers see something else now.
///
/// # Errors
/// [`GraphError`].
pub async fn change(vm: &Vm, changes: Vec<EdgeChange>) -> Result<BTreeMap<DeviceIndex, DeviceIdentity>, GraphError> {
    let before = vm.graph.borrow().clone();
    change_description(vm, |graph| graph.move_edges(&changes))?;
    match ask(vm, GraphRequest::Change(changes)).await {
        Ok(GraphReply::Resized(devices)) => Ok(devices),
        Ok(GraphReply::Done) => Ok(BTreeMap::new()),
        other => {
            let _ = change_description(vm, |graph| {
                *graph = before;
                Ok(())
            });
            Err(other.err().unwrap_or_else(unexpected))
        }
    }
}

/// Moves a node that nobody uses, with those below it, to another thread: made anew there, removed here.
///
/// # Errors
/// [`GraphError::OtherThread`] when somebody uses it, or what creating it says.
pub async fn move_to_thread(vm: &Vm, id: NodeId, thread: IoThreadIndex) -> Result<(), GraphError> {
    let tree: Vec<Node> = {
        let graph = vm.graph.borrow();
        let tree = graph.tree(id);
        for node in &tree {
            let has_parent_outside = graph.parents(*node).any(|(parent, _)| !tree.contains(&parent.id));
            let has_device = graph.backends_on(*node).any(|backend| backend.device.is_some());
            let is_exported = graph.exports_on(*node).next().is_some();
            if has_parent_outside || has_device || is_exported {
                return Err(GraphError::OtherThread(graph.node_or_missing(*node).name.clone()));
            }
        }
        tree.iter().map(|id| graph.node_or_missing(*id).clone()).collect()
    };
    // Away from the top, so that what an image holds in memory is in its file before it is read again.
    bitmaps::refresh(vm).await?;
    for node in tree.iter().rev() {
        ask(vm, GraphRequest::Remove(node.id)).await?;
    }
    let moved = create_again(vm, &tree, thread).await;
    if moved.is_err() {
        // They are not in block-proc any more.
        let gone = change_description(vm, |graph| {
            graph.nodes.retain(|id, _| !tree.iter().any(|node| node.id == *id));
            graph.backends.retain(|backend| backend.root != Some(id));
            Ok(())
        });
        gone?;
    }
    moved
}

/// Tells a node that nobody uses yet of its `detect-zeroes`.
async fn detect_zeroes(vm: &Vm, node: NodeId, settings: Settings) -> Result<(), GraphError> {
    let may_unmap = match settings.detect_zeroes {
        DetectZeroes::Off => return Ok(()),
        DetectZeroes::On => false,
        DetectZeroes::Unmap => true,
    };
    ask(vm, GraphRequest::DetectZeroes { node, may_unmap }).await.map(drop)
}

async fn create_again(vm: &Vm, tree: &[Node], thread: IoThreadIndex) -> Result<(), GraphError> {
    let mut numbers = BTreeMap::new();
    for node in tree {
        let number = vm.graph.borrow_mut().new_id()?;
        numbers.insert(node.id, number);
        let spec = spec_again(vm, node, &numbers).await?;
        let request = GraphRequest::Add {
            node: number,
            thread,
            spec,
        };
        let GraphReply::Added(report) = ask(vm, request).await? else {
            return Err(unexpected());
        };
        set_report(vm, node.id, report);
        detect_zeroes(vm, number, node.settings).await?;
        bitmaps::come_back(vm, node.id, number).await?;
    }
    let mut graph = vm.graph.borrow_mut();
    for node in tree {
        let Some(node) = graph.nodes.remove(&node.id) else {
            continue;
        };
        let id = numbers[&node.id];
        for backend in graph
            .backends
            .iter_mut()
            .filter(|backend| backend.root == Some(node.id))
        {
            backend.root = Some(id);
        }
        graph.insert(Node {
            id,
            children: node
                .children
                .iter()
                .map(|(role, child)| (*role, numbers[child]))
                .collect(),
            thread,
            ..node
        });
    }
    Ok(())
}

/// What a node is, for creating it anew over children that have other numbers now.
async fn spec_again(vm: &Vm, node: &Node, numbers: &BTreeMap<NodeId, NodeId>) -> Result<NodeSpec, GraphError> {
    let child = |role| -> Option<NodeId> { numbers.get(node.children.get(&role)?).copied() };
    let file = || child(ChildRole::File).ok_or_else(unexpected);
    Ok(match &node.options.driver {
        DriverOptions::File(_) => {
            let open = node.file.as_ref().ok_or_else(unexpected)?;
            NodeSpec::File {
                disk: open
                    .lock
                    .try_clone()
                    .map_err(|error| GraphError::BlockProc(error.to_string()))?,
                info: open.info.clone(),
            }
        }
        DriverOptions::Raw { offset, bytes, .. } => NodeSpec::Raw {
            file: file()?,
            offset: *offset,
            bytes: *bytes,
            read_only: node.settings.read_only,
        },
        DriverOptions::Qcow2(qcow2) => NodeSpec::Qcow2(Qcow2Spec {
            file: file()?,
            backing: child(ChildRole::Backing).map_or(Backing::None, Backing::Node),
            data_file: child(ChildRole::DataFile),
            read_only: node.settings.read_only,
            discard: node.settings.discard,
            lazy_refcounts: qcow2.lazy_refcounts,
            l2_cache_bytes: qcow2.l2_cache_bytes,
            refcount_cache_bytes: qcow2.refcount_cache_bytes,
            key: qcow2_key(vm, qcow2)?,
        }),
        DriverOptions::Luks { key_secret, .. } => NodeSpec::Luks(LuksSpec {
            file: file()?,
            read_only: node.settings.read_only,
            key: key(vm, key_secret.as_deref())?,
        }),
        DriverOptions::Null {
            bytes,
            latency_ns,
            read_zeroes,
            ..
        } => NodeSpec::Null {
            bytes: *bytes,
            latency_ns: *latency_ns,
            read_zeroes: *read_zeroes,
        },
        DriverOptions::Nbd(nbd) => NodeSpec::Nbd(nbd_client::spec(vm, nbd, node.settings).await?),
        DriverOptions::Throttle { group, .. } => NodeSpec::Throttle {
            file: file()?,
            group: throttling::number(vm, group).await?,
        },
        DriverOptions::JobFilter { .. } => return Err(GraphError::OtherThread(node.name.clone())),
        DriverOptions::CopyOnRead { .. } => NodeSpec::CopyOnRead {
            file: file()?,
            for_job: false,
        },
        DriverOptions::Blkdebug(blkdebug) => NodeSpec::Blkdebug(BlkdebugSpec {
            file: file()?,
            inject_errors: blkdebug.inject_errors.clone(),
            set_states: blkdebug.set_states.clone(),
            align: blkdebug.align,
        }),
    })
}

fn qcow2_key(vm: &Vm, qcow2: &Qcow2Options) -> Result<Option<Secret>, GraphError> {
    let secret = qcow2.encrypt.as_ref().and_then(|encrypt| encrypt.key_secret.as_deref());
    key(vm, secret)
}

/// What an object of the type secret holds.
fn key(vm: &Vm, id: Option<&str>) -> Result<Option<Secret>, GraphError> {
    let Some(id) = id else { return Ok(None) };
    match vm.objects.borrow().get(id) {
        Some(objects::Backend::Secret(secret)) => secret
            .key()
            .map(Some)
            .map_err(|error| GraphError::Key(id.to_owned(), error.to_string())),
        Some(_) => Err(GraphError::Key(id.to_owned(), "it is no secret".to_owned())),
        None => Err(GraphError::NoSecret(id.to_owned())),
    }
}

/// Asks block-proc how all nodes are now, so that the description says so.
pub async fn refresh(vm: &Vm) -> Result<(), GraphError> {
    let nodes: Vec<NodeId> = vm.graph.borrow().nodes.keys().copied().collect();
    if nodes.is_empty() {
        return Ok(());
    }
    let GraphReply::Reports(reports) = ask(vm, GraphRequest::Report(nodes)).await? else {
        return Err(unexpected());
    };
    for (id, report) in reports {
        set_report(vm, id, report);
    }
    bitmaps::refresh(vm).await
}

fn set_report(vm: &Vm, id: NodeId, report: NodeReport) {
    if let Some(node) = vm.graph.borrow_mut().nodes.get_mut(&id) {
        node.report = report;
        nbd_client::opened(node);
    }
}

/// A request to block-proc about the graph. Images are read and flushed for it.
///
/// # Errors
/// What block-proc says, or that it is gone.
pub async fn ask(vm: &Vm, request: GraphRequest) -> Result<GraphReply, GraphError> {
    ask_within(vm, STORAGE_DEADLINE, request).await
}

/// As [`ask`], with another deadline.
///
/// # Errors
/// As there.
pub async fn ask_within(vm: &Vm, deadline: Duration, request: GraphRequest) -> Result<GraphReply, GraphError> {
    let block = vm
        .block
        .get()
        .ok_or_else(|| GraphError::BlockProc("there is no block-proc".to_owned()))?;
    match block.ask_within(deadline, BlockRequest::Graph(request)).await {
        Ok(BlockReply::Graph(reply)) => Ok(reply),
        Ok(_) => Err(unexpected()),
        Err(HelperError::Failed(failure)) if failure.message.starts_with("the image is not in qcow2 format") => {
            Err(GraphError::NotInFormat("qcow2"))
        }
        Err(error) => Err(GraphError::BlockProc(
            logging::printable(error.to_string().as_bytes()).to_string(),
        )),
    }
}

fn unexpected() -> GraphError {
    GraphError::BlockProc("block-proc answered with something else".to_owned())
}

/// As [`change`], with jobs and bitmaps; `describe` says what else becomes of the description.
///
/// # Errors
/// [`GraphError`]. Then nothing has changed.
pub async fn switch(
    vm: &Vm,
    switch: Switch,
    describe: impl FnOnce(&mut Graph) -> Result<(), GraphError>,
) -> Result<BTreeMap<DeviceIndex, DeviceIdentity>, GraphError> {
    let before = vm.graph.borrow().clone();
    change_description(vm, |graph| {
        graph.move_edges(&switch.changes)?;
        describe(graph)
    })?;
    if switch.is_empty() {
        return Ok(BTreeMap::new());
    }
    match ask(vm, GraphRequest::Switch(switch)).await {
        Ok(GraphReply::Resized(devices)) => Ok(devices),
        other => {
            let _ = change_description(vm, |graph| {
                *graph = before;
                Ok(())
            });
            Err(other.err().unwrap_or_else(unexpected))
        }
    }
}

/// Makes a node anew over the same children, with other settings: it takes the old one's place. Returns its number.
///
/// # Errors
/// [`GraphError`]. Then the old one stays.
pub async fn make_again(
    vm: &Vm,
    id: NodeId,
    settings: impl FnOnce(Settings) -> Settings,
) -> Result<NodeId, GraphError> {
    let old = vm.graph.borrow().node_or_missing(id).clone();
    let node = Node {
        id: vm.graph.borrow_mut().new_id()?,
        settings: settings(old.settings),
        ..old.clone()
    };
    let new = node.id;
    let same = old.children.values().map(|child| (*child, *child)).collect();
    let request = GraphRequest::Add {
        node: new,
        thread: node.thread,
        spec: spec_again(vm, &node, &same).await?,
    };
    let GraphReply::Added(report) = ask(vm, request).await? else {
        return Err(unexpected());
    };
    detect_zeroes(vm, new, node.settings).await?;
    let moved = take_place(vm, id, Node { report, ..node }).await;
    let left_over = if moved.is_ok() { id } else { new };
    if let Err(error) = ask(vm, GraphRequest::Remove(left_over)).await {
        logging::line(format_args!("{}: {error}", old.name));
    }
    moved.map(|()| new)
}

/// What uses a node uses another one, which has its name.
async fn take_place(vm: &Vm, old: NodeId, node: Node) -> Result<(), GraphError> {
    let before = vm.graph.borrow().clone();
    let new = node.id;
    let edges = change_description(vm, |graph| {
        graph.insert(node);
        let edges = graph.users_to(old, new);
        graph.nodes.remove(&old);
        graph.renumber(old, new);
        Ok(edges)
    })?;
    if edges.is_empty() {
        return Ok(());
    }
    let changed = ask(vm, GraphRequest::Change(edges)).await;
    if changed.is_err() {
        let _ = change_description(vm, |graph| {
            *graph = before;
            Ok(())
        });
    }
    changed.map(drop)
}

/// Adds a job's filter, which nobody uses yet, over its child; nothing else is told of it.
///
/// # Errors
/// [`GraphError`].
pub async fn add_filter(vm: &Vm, node: Node, spec: NodeSpec) -> Result<NodeId, GraphError> {
    let (id, thread) = (node.id, node.thread);
    change_description(vm, |graph| {
        graph.insert(node);
        Ok(())
    })?;
    match ask(vm, GraphRequest::Add { node: id, thread, spec }).await {
        Ok(GraphReply::Added(report)) => {
            set_report(vm, id, report);
            Ok(id)
        }
        other => {
            let _ = change_description(vm, |graph| {
                graph.nodes.remove(&id);
                Ok(())
            });
            Err(other.err().unwrap_or_else(unexpected))
        }
    }
}
