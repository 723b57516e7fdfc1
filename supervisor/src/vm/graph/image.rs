//! qcow2 images, which say themselves what is below them, and the one way by which a node of any kind comes to be.

use super::super::names::{self, Described};
use super::super::{Vm, bitmaps};
use super::add::Addition;
use super::add::{below_is_read_only, child, create, one};
use super::describe::change_description;
use super::request::{ask, unexpected};
use super::set_report;
use super::spec::{detect_zeroes, qcow2_key};
use crate::backing::{BackingError, Chain};
use crate::graph::error::GraphError;
use crate::graph::node::{Node, OpenFile, no_report};
use crate::graph::open::Opened;
use crate::graph::options::{
    BackingOptions, ChildOptions, CommonOptions, DriverOptions, FileOptions, NodeOptions, Qcow2Options,
};
use crate::graph::settings::Settings;
use crate::graph::{Graph, open};
use ipc::block::ImageFormat;
use ipc::graph::{Backing, ChildRole, GraphReply, GraphRequest, NodeId, NodeSpec, Qcow2Spec};
use std::collections::BTreeMap;
use std::rc::Rc;

pub(super) async fn create_qcow2(
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
        BackingOptions::FromImage | BackingOptions::Adjusted(_) => Backing::FromImage,
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
            may_be_locked: settings.may_be_locked,
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
                let node = from_image(vm, addition, image, &name, format, &qcow2.backing, settings, chain).await?;
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

/// A description out of an image, which may not say much.
async fn harmless(vm: &Vm, image: &OpenFile, name: &str) -> Result<Described, GraphError> {
    let options = names::read(vm, name).await?;
    let described = names::harmless(options);
    Ok(described.ok_or_else(|| BackingError::NotAPath {
        image: image.path.clone(),
        name: name.to_owned(),
    })?)
}

/// Opens the backing image that an image names, and its backing images.
#[expect(
    clippy::too_many_arguments,
    reason = "they are what the image says and what is said of it"
)]
async fn from_image(
    vm: &Vm,
    addition: &mut Addition,
    image: &OpenFile,
    name: &str,
    format: Option<String>,
    said: &BackingOptions,
    above: Settings,
    chain: &mut Chain,
) -> Result<NodeId, GraphError> {
    let described = match names::is_description(name) {
        true => Some(harmless(vm, image, name).await?),
        false => None,
    };
    let of_description = described.as_ref().and_then(|described| described.format);
    let format = match (of_description, format.as_deref()) {
        (Some(format), _) => Ok(format),
        (None, Some("raw")) => Ok(ImageFormat::Raw),
        (None, Some("qcow2")) => Ok(ImageFormat::Qcow2),
        (None, other) => Err(other),
    };
    let format = match format {
        Ok(format) => format,
        Err(Some(other)) => {
            return Err(GraphError::UnknownBackingFormat {
                image: image.path.clone(),
                format: other.to_owned(),
            });
        }
        Err(None) => {
            return Err(GraphError::BackingFormat {
                image: image.path.clone(),
                name: name.to_owned(),
            });
        }
    };
    let path = described.as_ref().map_or(name, |described| &described.path);
    let (path, fd) = vm.roots.open_named(&image.path, path)?;
    let file = FileOptions {
        is_device: false,
        path,
        engine: None,
        locking: true,
    };
    let (name, common, below) = match said {
        BackingOptions::Adjusted(said) => (said.name.clone(), said.common.clone(), said.backing.clone()),
        _ => (None, CommonOptions::default(), BackingOptions::FromImage),
    };
    if let Some(name) = &name {
        vm.graph.borrow().check_name(name)?;
    }
    let settings_below = above.of_child(ChildRole::Backing, &common);
    let options = NodeOptions {
        name,
        common,
        ..NodeOptions::image(format, file.clone())
    };
    // Through the page cache, also where the disk itself is not: base images are shared.
    let settings = Settings {
        direct: false,
        read_only: true,
        ..settings_below
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
    let driver = match options.driver {
        DriverOptions::Qcow2(_) => DriverOptions::Qcow2(Box::new(Qcow2Options {
            backing: below,
            ..Qcow2Options::over(file)
        })),
        _ => DriverOptions::Raw {
            file,
            offset: described.as_ref().map_or(0, |described| described.offset),
            bytes: described.as_ref().and_then(|described| described.bytes),
        },
    };
    let created = create_boxed(vm, addition, NodeOptions { driver, ..options }, settings, chain).await;
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

pub(super) async fn insert(
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
        password: match &spec {
            NodeSpec::Qcow2(qcow2) => qcow2.key.clone().map(Rc::new),
            NodeSpec::Luks(luks) => luks.key.clone().map(Rc::new),
            _ => None,
        },
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
