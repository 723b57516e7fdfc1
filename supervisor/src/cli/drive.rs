//! Disks: `-drive`.

use super::Invocation;
use super::draft::Draft;
use super::error::UsageError;
use super::given::{Given, checked_path};
use super::interface::Interface;
use super::keyval::{Keys, Pairs, number, on_off, only, unescape, value};
use crate::config::{Drive, DriveLimits};
use crate::graph::options::nbd;
use crate::graph::options::{Aio, ChildOptions, CommonOptions, DriverOptions, FileOptions, NodeOptions};
use crate::graph::{filename, open};
use crate::objects::throttle::Limits;
use ipc::block::ImageFormat;
use ipc::blockdev::{BackendOptions, FlatOptions};
use ipc::graph::OnError;
use ipc::objects::Scalar;
use ipc::virtio::{MAX_DEVICES, MAX_QUEUES};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// Image formats.
pub(super) const FORMATS: &[(&str, ImageFormat)] = &[("raw", ImageFormat::Raw), ("qcow2", ImageFormat::Qcow2)];

/// virtio-blk's identity string has room for this many bytes.
const SERIAL_BYTES: usize = 20;

/// `-drive`.
pub(super) static DRIVE_KEYS: Keys = Keys {
    implied: None,
    list: None,
    keys: &[
        value("file"),
        value("if"),
        value("format"),
        value("id"),
        on_off("readonly"),
        on_off("read-only"),
        value("cache"),
        on_off("cache.writeback"),
        on_off("cache.direct"),
        on_off("cache.no-flush"),
        value("aio"),
        value("discard"),
        value("serial"),
        number("num-queues"),
        value("media"),
        only(
            "snapshot",
            &["off"],
            "there are no temporary snapshots: give the guest a copy of the image",
        ),
        on_off("copy-on-read"),
        value("detect-zeroes"),
        on_off("auto-read-only"),
        value("rerror"),
        value("werror"),
    ],
};

pub(super) fn drive(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    let (own, mut node) = separate(given)?;
    let throttle = limits(given, &mut node)?;
    let pairs = &if own.is_empty() && !node.is_empty() {
        Pairs::none(given)
    } else {
        Pairs::parse(given, &own, &DRIVE_KEYS)?
    };
    if pairs
        .get("format")
        .is_some_and(|format| format.value == "help" || format.value == "?")
    {
        draft.answer = Some(Invocation::ListImageFormats);
        return Ok(());
    }
    let source = match pairs.get("file") {
        Some(given) => Source::read(given)?,
        None if node
            .iter()
            .any(|(name, _)| name == "driver" || name.starts_with("file.")) =>
        {
            Source::Described
        }
        // A drive without a medium, where that is possible.
        None => Source::Described,
    };
    let is_empty = node.is_empty() && pairs.get("file").is_none();
    if is_empty {
        let problem = "file is missing: file=FILE names the image or block device";
        if pairs.get("format").is_some() {
            return Err(given.refuse(problem));
        }
        draft.needs_qtest(given, problem);
    }
    let interface = Interface::read(draft, given, pairs)?;
    let has_device = interface == Interface::Virtio;
    if let Some(format) = format(pairs)? {
        node.push(("driver".to_owned(), format.into()));
    }
    let has_driver = |node: &[(String, Scalar)]| node.iter().any(|(name, _)| name == "driver");
    if !is_empty && !has_driver(&node) && !matches!(source, Source::Json(_)) {
        pairs.require(
            "format",
            "formats are not guessed from what a guest may have written, write format=raw or format=qcow2",
        )?;
    }
    let index = draft.drives.len();
    if index >= usize::from(MAX_DEVICES) {
        return Err(pairs.whole.refuse(format!("a machine has at most {MAX_DEVICES} disks")));
    }
    let id = match pairs.get("id") {
        Some(given) => given.identifier()?.to_owned(),
        None => interface.next_id(draft),
    };
    if draft.has_drive(&id) {
        let given = pairs.get("id").unwrap_or(&pairs.whole);
        return Err(given.refuse(format!("there is already a drive with the id {id}: give each its own")));
    }
    let cache = cache(pairs)?;
    let aio = aio(pairs, cache)?;
    for other in &draft.drives {
        let other_aio = open::engine([&other.node]).ok().flatten();
        if let (Some(aio), Some(other_aio)) = (aio, other_aio)
            && open::choice(aio) != other_aio
        {
            let given = pairs.get("aio").unwrap_or(&pairs.whole);
            let other = &other.backend.id;
            return Err(given.refuse(format!("all disks share one I/O engine, and {other} has another")));
        }
    }
    let backend = BackendOptions {
        id,
        write_cache: cache.write_back,
        read_error: pairs
            .get("rerror")
            .map(|given| on_error(given, false))
            .transpose()?
            .unwrap_or(OnError::Report),
        write_error: pairs
            .get("werror")
            .map(|given| on_error(given, true))
            .transpose()?
            .unwrap_or(OnError::Enospc),
    };
    interface.bring_device(draft, &backend.id);
    if is_empty {
        draft.empty_drives.push(backend);
        return Ok(());
    }
    let path = source.add_to(&mut node);
    if interface.is_cd() {
        node.push(("read-only".to_owned(), Scalar::Bool(true)));
    }
    add_settings(pairs, cache, &mut node)?;
    let mut node = NodeOptions::parse(FlatOptions(node)).map_err(|error| given.refuse(error.to_string()))?;
    if let Some(file) = first_file(&mut node) {
        // A name that is no UTF-8 has been replaced on the way.
        file.path = path.unwrap_or_else(|| std::mem::take(&mut file.path));
        file.engine = aio.or(file.engine);
    }
    if pairs.switch("copy-on-read")? == Some(true) {
        node = NodeOptions {
            name: None,
            common: CommonOptions {
                read_only: node.common.read_only,
                ..CommonOptions::default()
            },
            driver: DriverOptions::CopyOnRead {
                file: ChildOptions::Inline(Box::new(node)),
            },
        };
    }
    draft.drive_has_device.push(has_device);
    draft.drives.push(Drive {
        throttle,
        backend,
        node,
        serial: pairs.get("serial").map(serial).transpose()?.unwrap_or_default(),
        queues: pairs
            .get("num-queues")
            .map(|given| given.number("the count of queues", 1..=MAX_QUEUES))
            .transpose()?,
    });
    Ok(())
}

/// Options of nodes that a drive's line may have beside the drive's own.
const NODE_KEYS: &[&str] = &[
    "driver",
    "node-name",
    "backing",
    "data-file",
    "offset",
    "size",
    "lazy-refcounts",
    "cache-size",
    "l2-cache-size",
    "refcount-cache-size",
    "overlap-check",
    "throttle-group",
    "latency-ns",
    "read-zeroes",
    "image",
    "align",
    "force-share",
    "key-secret",
];
/// Nodes and lists inside a node.
const NODE_PREFIXES: &[&str] = &[
    "file.",
    "backing.",
    "data-file.",
    "image.",
    "overlap-check.",
    "encrypt.",
    LIMITS_PREFIX,
    "inject-error.",
    "set-state.",
];

/// `throttling.group`, and the limits by the names that a throttle group has for them.
fn limits(given: &Given, node: &mut Vec<(String, Scalar)>) -> Result<Option<DriveLimits>, UsageError> {
    let (mut group, mut limits, mut any) = (None, Limits::default(), false);
    for (name, value) in node.extract_if(.., |(name, _)| name.starts_with(LIMITS_PREFIX)) {
        let name = &name[LIMITS_PREFIX.len()..];
        let Scalar::Text(text) = value else { continue };
        any = true;
        if name == "group" {
            group = Some(text);
            continue;
        }
        let value = text
            .parse()
            .map_err(|_| given.refuse(format!("{LIMITS_PREFIX}{name} expects a number, not '{text}'")))?;
        limits
            .set(name, value)
            .map_err(|_| given.refuse(format!("there is no key '{LIMITS_PREFIX}{name}'")))?;
    }
    limits.check().map_err(|error| given.refuse(error.to_string()))?;
    Ok(any.then_some(DriveLimits { group, limits }))
}

const LIMITS_PREFIX: &str = "throttling.";

/// Takes the drive's own keys and its node's apart.
fn separate(given: &Given) -> Result<(OsString, Vec<(String, Scalar)>), UsageError> {
    let (mut own, mut node) = (Vec::new(), Vec::new());
    let mut rest = given.value.as_bytes();
    while !rest.is_empty() {
        let end = rest
            .iter()
            .position(|byte| matches!(byte, b'=' | b','))
            .unwrap_or(rest.len());
        let key = std::str::from_utf8(&rest[..end]).unwrap_or_default();
        let has_value = rest.get(end) == Some(&b'=');
        let is_nodes = NODE_KEYS.contains(&key) || NODE_PREFIXES.iter().any(|prefix| key.starts_with(prefix));
        let start = if has_value { end + 1 } else { 0 };
        let (value, length) = unescape(&rest[start..]);
        let length = start + length;
        if has_value && is_nodes {
            let value = value
                .into_string()
                .map_err(|_| given.refuse(format!("{key} is not UTF-8 text")))?;
            node.push((key.to_owned(), value.into()));
        } else {
            if !own.is_empty() {
                own.push(b',');
            }
            own.extend_from_slice(&rest[..length]);
        }
        rest = &rest[length..];
        rest = rest.strip_prefix(b",").unwrap_or(rest);
    }
    Ok((OsString::from_vec(own), node))
}

/// Where a drive's image is.
enum Source {
    /// `file=FILE`.
    File(PathBuf),
    /// `file=json:{…}`: a description.
    Json(FlatOptions),
    /// `file=blkdebug:…`, `file=null-co://`, `file=nbd:…`: what the name says of the node that it stands for.
    Protocol(FlatOptions),
    /// No `file=`: the other keys describe it.
    Described,
}

impl Source {
    /// A local file, or a description. QEMU reads a name with a colon before the first slash as a protocol.
    fn read(given: &Given) -> Result<Self, UsageError> {
        let name = given.value.as_bytes();
        if let Some(json) = name.strip_prefix(b"json:") {
            let options = serde_json::from_slice(json)
                .map_err(|error| given.refuse(format!("this is no JSON object of a node's options: {error}")))?;
            return Ok(Self::Json(options));
        }
        if let Some(options) = given.value.to_str().and_then(filename::options_of) {
            return Ok(Self::Protocol(options));
        }
        if let Some(name) = given.value.to_str().filter(|name| nbd::is_filename(name)) {
            let mut options = nbd::options_of(name).map_err(|error| given.refuse(error.to_string()))?;
            options.0.push(("driver".to_owned(), "nbd".into()));
            return Ok(Self::Protocol(options));
        }
        let name = name.strip_prefix(b"file:").unwrap_or(name);
        let first_part = name.split(|byte| *byte == b'/').next().unwrap_or_default();
        if first_part.contains(&b':') && given.value.as_bytes() == name {
            return Err(given.refuse(
                "disks are local files, block devices and NBD exports; a file whose name has a colon is file=./NAME",
            ));
        }
        checked_path(OsStr::from_bytes(name))
            .map(Self::File)
            .map_err(|problem| given.refuse(problem))
    }

    /// Adds it to a node's options. What the line says counts more than what is said inside JSON.
    fn add_to(self, node: &mut Vec<(String, Scalar)>) -> Option<PathBuf> {
        let mut add = |name: &str, value: Scalar| {
            if !node.iter().any(|(known, _)| known == name) {
                node.push((name.to_owned(), value));
            }
        };
        match self {
            Self::Described => None,
            Self::Protocol(options) => {
                // It is the drive's node itself where the line says so, otherwise what its format is over.
                let driver = options
                    .0
                    .iter()
                    .find(|(name, _)| name == "driver")
                    .map(|(_, value)| value.clone());
                let is_top = node
                    .iter()
                    .any(|(name, value)| name == "driver" && Some(value) == driver.as_ref());
                let prefix = if is_top { "" } else { "file." };
                for (name, value) in options.0 {
                    let name = format!("{prefix}{name}");
                    if !node.iter().any(|(known, _)| *known == name) {
                        node.push((name, value));
                    }
                }
                None
            }
            Self::Json(options) => {
                options.0.into_iter().for_each(|(name, value)| add(&name, value));
                None
            }
            Self::File(path) => {
                add("file.driver", "file".into());
                add("file.filename", path.to_string_lossy().into_owned().into());
                Some(path)
            }
        }
    }
}

fn format(pairs: &Pairs) -> Result<Option<&'static str>, UsageError> {
    let Some(given) = pairs.get("format") else {
        return Ok(None);
    };
    let formats = || FORMATS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    FORMATS
        .iter()
        .find(|(name, _)| given.value == *name)
        .map(|(name, _)| Some(*name))
        .ok_or_else(|| given.refuse(format!("the supported image formats are: {}", formats())))
}

/// What the drive's own keys say of its node.
fn add_settings(pairs: &Pairs, cache: Cache, node: &mut Vec<(String, Scalar)>) -> Result<(), UsageError> {
    let mut add = |name: &str, value: Option<Scalar>| node.extend(value.map(|value| (name.to_owned(), value)));
    let read_only = match pairs.switch("readonly")? {
        Some(read_only) => Some(read_only),
        None => pairs.switch("read-only")?,
    };
    add("read-only", read_only.map(Scalar::Bool));
    add("auto-read-only", pairs.switch("auto-read-only")?.map(Scalar::Bool));
    add("cache.direct", cache.direct.then_some(Scalar::Bool(true)));
    add("cache.no-flush", cache.no_flush.then_some(Scalar::Bool(true)));
    let discard = pairs.get("discard").map(discard).transpose()?;
    add(
        "discard",
        discard.map(|unmap| if unmap { "unmap" } else { "ignore" }.into()),
    );
    if let Some(given) = pairs.get("detect-zeroes") {
        add("detect-zeroes", Some(given.text()?.into()));
    }
    Ok(())
}

/// The file of a tree that holds its first image.
fn first_file(node: &mut NodeOptions) -> Option<&mut FileOptions> {
    let child = match &mut node.driver {
        DriverOptions::File(file) => return Some(file),
        DriverOptions::Nbd(_) | DriverOptions::Null { .. } | DriverOptions::JobFilter { .. } => return None,
        DriverOptions::Raw { file, .. }
        | DriverOptions::Throttle { file, .. }
        | DriverOptions::Luks { file, .. }
        | DriverOptions::CopyOnRead { file } => file,
        DriverOptions::Qcow2(options) => &mut options.file,
        DriverOptions::Blkdebug(options) => &mut options.image,
    };
    match child {
        ChildOptions::Inline(child) => first_file(child),
        ChildOptions::Reference(_) => None,
    }
}

/// `rerror=`, `werror=`; `None` for `auto`.
pub fn error_action(word: &str, is_write: bool) -> Result<Option<OnError>, String> {
    match word {
        "report" => Ok(Some(OnError::Report)),
        "ignore" => Ok(Some(OnError::Ignore)),
        "stop" => Ok(Some(OnError::Stop)),
        "enospc" if is_write => Ok(Some(OnError::Enospc)),
        "auto" => Ok(None),
        _ => {
            let kind = if is_write { "write" } else { "read" };
            Err(format!("'{word}' invalid {kind} error action"))
        }
    }
}

fn on_error(given: &Given, is_write: bool) -> Result<OnError, UsageError> {
    let word = given.text()?;
    let default = if is_write { OnError::Enospc } else { OnError::Report };
    error_action(word, is_write)
        .map(|action| action.unwrap_or(default))
        .map_err(|problem| given.refuse(problem))
}

/// `-allow-path`.
pub(super) fn allow_path(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    let path = checked_path(&given.value).map_err(|problem| given.refuse(problem))?;
    draft.allowed_paths.push(path);
    Ok(())
}

/// `cache=`, taken apart as QEMU does.
#[derive(Debug, Clone, Copy)]
struct Cache {
    /// The guest sees a volatile write cache.
    write_back: bool,
    /// O_DIRECT.
    direct: bool,
    /// Flushes are ignored.
    no_flush: bool,
}

/// `cache=` stands for three switches; each can be set by itself, too, and then overrides.
fn cache(pairs: &Pairs) -> Result<Cache, UsageError> {
    let default = Cache {
        write_back: true,
        direct: false,
        no_flush: false,
    };
    let mode = match pairs.get("cache") {
        None => default,
        Some(given) => match given.value.to_str() {
            Some("writeback") => default,
            Some("none" | "off") => Cache {
                direct: true,
                ..default
            },
            Some("writethrough") => Cache {
                write_back: false,
                ..default
            },
            Some("directsync") => Cache {
                write_back: false,
                direct: true,
                ..default
            },
            Some("unsafe") => Cache {
                no_flush: true,
                ..default
            },
            _ => return Err(given.refuse("cache is writeback, none, writethrough, directsync or unsafe")),
        },
    };
    Ok(Cache {
        write_back: pairs.switch("cache.writeback")?.unwrap_or(mode.write_back),
        direct: pairs.switch("cache.direct")?.unwrap_or(mode.direct),
        no_flush: pairs.switch("cache.no-flush")?.unwrap_or(mode.no_flush),
    })
}

fn aio(pairs: &Pairs, cache: Cache) -> Result<Option<Aio>, UsageError> {
    let Some(given) = pairs.get("aio") else {
        return Ok(None);
    };
    match given.value.to_str() {
        Some("threads") => Ok(Some(Aio::Threads)),
        Some("io_uring") => Ok(Some(Aio::IoUring)),
        // io_uring does what Linux AIO did. QEMU's condition stays, so that a line means the same on both.
        Some("native") if cache.direct => Ok(Some(Aio::Native)),
        Some("native") => {
            Err(given.refuse("native I/O goes past the host's page cache: add cache=none or cache.direct=on"))
        }
        _ => Err(given.refuse("aio is threads, io_uring or native")),
    }
}

fn discard(given: &Given) -> Result<bool, UsageError> {
    match given.value.to_str() {
        Some("unmap" | "on") => Ok(true),
        Some("ignore" | "off") => Ok(false),
        _ => Err(given.refuse("discard is unmap (or on), or ignore (or off)")),
    }
}

fn serial(given: &Given) -> Result<String, UsageError> {
    checked_serial(given.text()?).map_err(|problem| given.refuse(problem))
}

/// A disk's serial number.
pub(super) fn checked_serial(text: &str) -> Result<String, String> {
    if text.len() > SERIAL_BYTES {
        return Err(format!("a serial number has at most {SERIAL_BYTES} bytes"));
    }
    Ok(text.to_owned())
}
