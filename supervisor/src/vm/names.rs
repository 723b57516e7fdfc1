//! File names that are descriptions (`json:{…}`): a qmp-proc of its own reads each, because neither a client's text nor an
//! image's is parsed here. It serves nobody before or after.

use super::Vm;
use crate::graph::error::GraphError;
use crate::graph::options::{BackingOptions, ChildOptions, DriverOptions, FileOptions, NodeOptions, nbd};
use crate::helper::{Helper, HelperError, Qmp};
use crate::logging;
use ipc::block::ImageFormat;
use ipc::blockdev::FlatOptions;
use ipc::narrowing::Allow;
use ipc::objects::Scalar;
use ipc::qmp::{MonitorSetup, QmpReply, QmpRequest};
use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;

/// Longest name, bytes: what an image has room for is shorter.
const MAX_NAME_BYTES: usize = 64 << 10;

/// The processes that read names.
#[derive(Default)]
pub struct Names(RefCell<Vec<Rc<Helper<Qmp>>>>);

impl Names {
    /// All that run.
    pub fn helpers(&self) -> Vec<Rc<Helper<Qmp>>> {
        self.0.borrow().clone()
    }

    /// One of them, by its process id.
    pub fn helper(&self, pid: i32) -> Option<Rc<Helper<Qmp>>> {
        self.helpers().into_iter().find(|helper| helper.pid == pid)
    }

    /// A process has ended. Returns whether it was one of these.
    pub fn ended(&self, pid: i32) -> bool {
        let Some(helper) = self.helper(pid) else { return false };
        self.0.borrow_mut().retain(|helper| helper.pid != pid);
        helper.reaped();
        true
    }
}

/// Whether a name is a description.
pub fn is_description(name: &str) -> bool {
    name.starts_with("json:")
}

/// Reads a description.
///
/// # Errors
/// What is wrong with it, or that nobody can read it.
pub async fn read(vm: &Vm, name: &str) -> Result<NodeOptions, GraphError> {
    let text = name.strip_prefix("json:").unwrap_or(name);
    if text.len() > MAX_NAME_BYTES {
        return Err(GraphError::Unsupported(
            "a file name that is a description is at most 64 KiB long",
        ));
    }
    let helper = vm.start_helper::<Qmp>().await.map_err(GraphError::BlockProc)?;
    vm.names.0.borrow_mut().push(Rc::clone(&helper));
    let answer = ask(vm, &helper, text).await;
    // Its process is known until it is reaped.
    helper.end();
    match answer {
        Ok(QmpReply::Description(options)) => NodeOptions::parse(options),
        Ok(_) => Err(GraphError::BlockProc(
            "qmp-proc answered with something else".to_owned(),
        )),
        Err(text) => Err(GraphError::BlockProc(logging::printable(text.as_bytes()).to_string())),
    }
}

async fn ask(vm: &Vm, helper: &Rc<Helper<Qmp>>, text: &str) -> Result<QmpReply, String> {
    let failed = |error: HelperError| error.to_string();
    let setup = MonitorSetup {
        pretty: false,
        package: String::new(),
        allow: Allow::All,
    };
    helper.ask(QmpRequest::Setup(setup)).await.map_err(failed)?;
    vm.seal_helper(helper).await?;
    helper.ask(QmpRequest::ReadName(text.to_owned())).await.map_err(failed)
}

/// The image that a client names and that is there: by a path, by the name of an NBD export, or by a description, which may say all that blockdev-add may.
///
/// # Errors
/// What is wrong with a description.
pub async fn image(vm: &Vm, name: &str, format: ImageFormat) -> Result<NodeOptions, GraphError> {
    if nbd::is_filename(name) {
        let export = nbd::options_of(name)?.0.into_iter();
        let mut options = vec![
            ("driver".to_owned(), Scalar::from(format_name(format))),
            ("file.driver".to_owned(), Scalar::from("nbd")),
        ];
        options.extend(export.map(|(name, value)| (format!("file.{name}"), value)));
        return NodeOptions::parse(FlatOptions(options));
    }
    if !is_description(name) {
        return Ok(NodeOptions::image(format, plain(name.into())));
    }
    let described = read(vm, name).await?;
    match described.driver {
        DriverOptions::File(file) => Ok(NodeOptions {
            name: described.name,
            common: described.common,
            ..NodeOptions::image(format, file)
        }),
        _ if described.driver_name() == format_name(format) => Ok(described),
        _ => Err(GraphError::Unsupported("Driver specified twice")),
    }
}

fn format_name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Raw => "raw",
        ImageFormat::Qcow2 => "qcow2",
    }
}

fn plain(path: PathBuf) -> FileOptions {
    FileOptions {
        is_device: false,
        path,
        engine: None,
        locking: true,
    }
}

/// What a description inside an image may say: that it is a file in one of the formats. The file is opened by the rules for
/// what images name, like one that is named by its path.
pub struct Described {
    /// The file.
    pub path: String,
    /// Its format; absent: the header says it.
    pub format: Option<ImageFormat>,
    /// Of a raw image: where it begins in the file, bytes.
    pub offset: u64,
    /// Of a raw image: how long it is, bytes.
    pub bytes: Option<u64>,
}

/// Takes a description out of an image; nothing when it says more than it may (other drivers, nodes by name, secrets).
pub fn harmless(options: NodeOptions) -> Option<Described> {
    fn path(file: &FileOptions) -> Option<String> {
        (!file.is_device).then(|| file.path.to_str().map(str::to_owned))?
    }
    fn file(child: &ChildOptions) -> Option<String> {
        match child {
            ChildOptions::Inline(node) => match &node.driver {
                DriverOptions::File(file) => path(file),
                _ => None,
            },
            ChildOptions::Reference(_) => None,
        }
    }
    let described = |path, format, offset, bytes| Described {
        path,
        format,
        offset,
        bytes,
    };
    match options.driver {
        DriverOptions::File(file) => Some(described(path(&file)?, None, 0, None)),
        DriverOptions::Raw {
            file: child,
            offset,
            bytes,
        } => Some(described(file(&child)?, Some(ImageFormat::Raw), offset, bytes)),
        DriverOptions::Qcow2(qcow2)
            if qcow2.backing == BackingOptions::FromImage && qcow2.data_file.is_none() && qcow2.encrypt.is_none() =>
        {
            Some(described(file(&qcow2.file)?, Some(ImageFormat::Qcow2), 0, None))
        }
        _ => None,
    }
}
