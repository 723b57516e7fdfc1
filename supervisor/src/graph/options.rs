//! A node's options, typed: what blockdev-add, `-blockdev`, `-drive` and `json:` names say of a node and of those below it.
//!
//! Values are typed already where they come from JSON, and text where they come from `key=value`; both mean the same.

mod blkdebug;
pub mod nbd;
mod reader;

use super::error::GraphError;
use ipc::blockdev::FlatOptions;
use ipc::graph::{InjectedError, SetState};
use nbd::NbdOptions;
use reader::Reader;
use std::path::PathBuf;

/// The drivers.
pub const DRIVERS: &[&str] = &[
    "blkdebug",
    "copy-on-read",
    "file",
    "host_device",
    "luks",
    "nbd",
    "null-aio",
    "null-co",
    "qcow2",
    "raw",
    "throttle",
];

/// How deep nodes may be written into one another; longer chains are made of nodes with names.
const MAX_NESTING: usize = 32;

/// A node: its name, what all nodes have, and its driver's options.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeOptions {
    /// `node-name`.
    pub name: Option<String>,
    /// What all nodes have.
    pub common: CommonOptions,
    /// The driver's.
    pub driver: DriverOptions,
}

/// What all nodes have. Absent options are inherited, or have a default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CommonOptions {
    /// `discard`: unmap.
    pub discard: Option<bool>,
    /// `cache.direct`.
    pub direct: Option<bool>,
    /// `cache.no-flush`.
    pub no_flush: Option<bool>,
    /// `read-only`.
    pub read_only: Option<bool>,
    /// `auto-read-only`.
    pub auto_read_only: Option<bool>,
    /// `force-share`.
    pub force_share: Option<bool>,
    /// `detect-zeroes`.
    pub detect_zeroes: DetectZeroes,
}

/// `detect-zeroes`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// Zeroes are written as they come.
    #[default]
    Off,
    /// As write-zeroes.
    On,
    /// As write-zeroes that may give up the space.
    Unmap,
}

impl DetectZeroes {
    /// QMP's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Unmap => "unmap",
        }
    }
}

/// The drivers' options.
#[derive(Debug, Clone, PartialEq)]
pub enum DriverOptions {
    /// `file`, `host_device`.
    File(FileOptions),
    /// `raw`.
    Raw {
        /// `file`.
        file: ChildOptions,
        /// `offset`.
        offset: u64,
        /// `size`.
        bytes: Option<u64>,
    },
    /// `qcow2`.
    Qcow2(Box<Qcow2Options>),
    /// `luks`.
    Luks {
        /// `file`.
        file: ChildOptions,
        /// `key-secret`: an object.
        key_secret: Option<String>,
    },
    /// `nbd`.
    Nbd(NbdOptions),
    /// `null-co`, `null-aio`.
    Null {
        /// It is `null-aio`.
        aio: bool,
        /// `size`.
        bytes: u64,
        /// `latency-ns`.
        latency_ns: u64,
        /// `read-zeroes`.
        read_zeroes: bool,
    },
    /// `throttle`.
    Throttle {
        /// `file`.
        file: ChildOptions,
        /// `throttle-group`.
        group: String,
    },
    /// `copy-on-read`.
    CopyOnRead {
        /// `file`.
        file: ChildOptions,
    },
    /// `blkdebug`.
    Blkdebug(Box<BlkdebugOptions>),
    /// What a job has put in. There are no options for it.
    JobFilter {
        /// What it does.
        kind: JobFilter,
        /// Its job was not told a name for it: clients do not see it where they see a drive's image.
        implicit: bool,
    },
}

/// Filters of jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobFilter {
    /// `commit_top`.
    CommitTop,
    /// `mirror_top`.
    MirrorTop,
    /// `copy-on-read`, of a stream.
    CopyOnRead,
    /// `copy-before-write`, of a backup.
    CopyBeforeWrite,
}

impl JobFilter {
    /// The driver's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::CommitTop => "commit_top",
            Self::MirrorTop => "mirror_top",
            Self::CopyOnRead => "copy-on-read",
            Self::CopyBeforeWrite => "copy-before-write",
        }
    }

    /// Whether its job has to know of every write to what is below it.
    pub fn watches_writes(self) -> bool {
        matches!(self, Self::MirrorTop | Self::CopyBeforeWrite)
    }
}

/// `file`, `host_device`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileOptions {
    /// It is `host_device`.
    pub is_device: bool,
    /// `filename`.
    pub path: PathBuf,
    /// `aio`.
    pub engine: Option<Aio>,
    /// `locking`: off is possible.
    pub locking: bool,
}

/// `aio`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aio {
    /// Threads.
    Threads,
    /// Linux AIO, which io_uring stands for.
    Native,
    /// io_uring.
    IoUring,
}

impl Aio {
    /// QMP's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Threads => "threads",
            Self::Native => "native",
            Self::IoUring => "io_uring",
        }
    }
}

/// `qcow2`.
#[derive(Debug, Clone, PartialEq)]
pub struct Qcow2Options {
    /// `file`.
    pub file: ChildOptions,
    /// `backing`.
    pub backing: BackingOptions,
    /// `data-file`.
    pub data_file: Option<ChildOptions>,
    /// `lazy-refcounts`.
    pub lazy_refcounts: Option<bool>,
    /// `l2-cache-size`.
    pub l2_cache_bytes: Option<u64>,
    /// `refcount-cache-size`.
    pub refcount_cache_bytes: Option<u64>,
    /// `encrypt`.
    pub encrypt: Option<EncryptOptions>,
}

/// `encrypt`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncryptOptions {
    /// `format`: luks; otherwise aes.
    pub is_luks: bool,
    /// `key-secret`: an object.
    pub key_secret: Option<String>,
}

/// `backing`.
#[derive(Debug, Clone, PartialEq)]
pub enum BackingOptions {
    /// Absent: what the image says.
    FromImage,
    /// What the image says, and this of it.
    Adjusted(Box<AdjustedBacking>),
    /// null.
    None,
    /// A node.
    Node(ChildOptions),
}

/// What is said of the backing image that an image names: `backing.node-name=` and the like without a driver.
#[derive(Debug, Clone, PartialEq)]
pub struct AdjustedBacking {
    /// `node-name`.
    pub name: Option<String>,
    /// What all nodes have.
    pub common: CommonOptions,
    /// Of the one below it.
    pub backing: BackingOptions,
}

/// `blkdebug`.
#[derive(Debug, Clone, PartialEq)]
pub struct BlkdebugOptions {
    /// `image`.
    pub image: ChildOptions,
    /// `inject-error`.
    pub inject_errors: Vec<InjectedError>,
    /// `set-state`.
    pub set_states: Vec<SetState>,
    /// `align`.
    pub align: Option<u32>,
}

/// A node that exists, or one that comes along.
#[derive(Debug, Clone, PartialEq)]
pub enum ChildOptions {
    /// By its name.
    Reference(String),
    /// Made with its parent.
    Inline(Box<NodeOptions>),
}

impl NodeOptions {
    /// Reads options.
    ///
    /// # Errors
    /// What is wrong, by the option's name.
    pub fn parse(options: FlatOptions) -> Result<Self, GraphError> {
        let mut reader = Reader::new(options);
        let node = node(&mut reader, "", 0)?;
        reader.finish()?;
        Ok(node)
    }

    /// Whether it is encrypted in the first of qcow2's two ways.
    pub fn is_encrypted_with_aes(&self) -> bool {
        let encrypt = match &self.driver {
            DriverOptions::Qcow2(options) => options.encrypt.as_ref(),
            _ => None,
        };
        encrypt.is_some_and(|encrypt| !encrypt.is_luks)
    }

    /// The driver's name.
    pub fn driver_name(&self) -> &'static str {
        match &self.driver {
            DriverOptions::File(file) if file.is_device => "host_device",
            DriverOptions::File(_) => "file",
            DriverOptions::Raw { .. } => "raw",
            DriverOptions::Qcow2(_) => "qcow2",
            DriverOptions::Nbd(_) => "nbd",
            DriverOptions::Null { aio: true, .. } => "null-aio",
            DriverOptions::Null { aio: false, .. } => "null-co",
            DriverOptions::Throttle { .. } => "throttle",
            DriverOptions::CopyOnRead { .. } => "copy-on-read",
            DriverOptions::Luks { .. } => "luks",
            DriverOptions::Blkdebug(_) => "blkdebug",
            DriverOptions::JobFilter { kind, .. } => kind.name(),
        }
    }

    /// Its children, the one that holds its data first.
    pub fn children(&self) -> Vec<&ChildOptions> {
        match &self.driver {
            DriverOptions::File(_)
            | DriverOptions::Nbd(_)
            | DriverOptions::Null { .. }
            | DriverOptions::JobFilter { .. } => Vec::new(),
            DriverOptions::Raw { file, .. }
            | DriverOptions::Throttle { file, .. }
            | DriverOptions::Luks { file, .. }
            | DriverOptions::CopyOnRead { file } => vec![file],
            DriverOptions::Blkdebug(options) => vec![&options.image],
            DriverOptions::Qcow2(options) => {
                let mut children = vec![&options.file];
                children.extend(&options.data_file);
                if let BackingOptions::Node(backing) = &options.backing {
                    children.push(backing);
                }
                children
            }
        }
    }

    /// It and the nodes that come with it, from the top.
    pub fn nodes(&self) -> Vec<&Self> {
        let mut nodes = vec![self];
        for child in self.children() {
            if let ChildOptions::Inline(child) = child {
                nodes.extend(child.nodes());
            }
        }
        nodes
    }

    /// The nodes outside that it and those that come with it refer to.
    pub fn references(&self) -> Vec<&str> {
        fn reference(child: &ChildOptions) -> Option<&str> {
            match child {
                ChildOptions::Reference(name) => Some(name),
                ChildOptions::Inline(_) => None,
            }
        }
        self.nodes()
            .into_iter()
            .flat_map(|node| node.children().into_iter().filter_map(reference))
            .collect()
    }

    /// A plain image: a format over a file.
    pub fn image(format: ipc::block::ImageFormat, file: FileOptions) -> Self {
        let file = ChildOptions::Inline(Box::new(Self {
            name: None,
            common: CommonOptions::default(),
            driver: DriverOptions::File(file),
        }));
        let driver = match format {
            ipc::block::ImageFormat::Raw => DriverOptions::Raw {
                file,
                offset: 0,
                bytes: None,
            },
            ipc::block::ImageFormat::Qcow2 => DriverOptions::Qcow2(Box::new(Qcow2Options::over(file))),
        };
        Self {
            name: None,
            common: CommonOptions::default(),
            driver,
        }
    }

    /// The path of the first file below, which error texts of the command line name.
    pub fn first_path(&self) -> Option<&std::path::Path> {
        self.nodes().into_iter().find_map(|node| match &node.driver {
            DriverOptions::File(file) => Some(file.path.as_path()),
            _ => None,
        })
    }
}

impl Qcow2Options {
    /// An image with nothing said about it.
    pub fn over(file: ChildOptions) -> Self {
        Self {
            file,
            backing: BackingOptions::FromImage,
            data_file: None,
            lazy_refcounts: None,
            l2_cache_bytes: None,
            refcount_cache_bytes: None,
            encrypt: None,
        }
    }
}

fn node(reader: &mut Reader, prefix: &str, depth: usize) -> Result<NodeOptions, GraphError> {
    if depth >= MAX_NESTING {
        return Err(GraphError::TooDeep(MAX_NESTING));
    }
    let at = |name: &str| format!("{prefix}{name}");
    let driver = reader
        .text(&at("driver"))?
        .ok_or_else(|| GraphError::Missing(at("driver")))?;
    let name = reader.text(&at("node-name"))?;
    let common = common(reader, prefix)?;
    let driver = match driver.as_str() {
        "file" | "host_device" => DriverOptions::File(file(reader, prefix, driver == "host_device")?),
        "raw" => DriverOptions::Raw {
            file: required_child(reader, prefix, "file", depth)?,
            offset: reader.size(&at("offset"))?.unwrap_or(0),
            bytes: reader.size(&at("size"))?,
        },
        "qcow2" => DriverOptions::Qcow2(Box::new(qcow2(reader, prefix, depth)?)),
        "nbd" => DriverOptions::Nbd(nbd::nbd(reader, prefix)?),
        "null-co" | "null-aio" => DriverOptions::Null {
            aio: driver == "null-aio",
            // QEMU's default.
            bytes: reader.size(&at("size"))?.unwrap_or(1 << 30),
            latency_ns: reader.size(&at("latency-ns"))?.unwrap_or(0),
            read_zeroes: reader.switch(&at("read-zeroes"))?.unwrap_or(false),
        },
        "throttle" => DriverOptions::Throttle {
            group: reader
                .text(&at("throttle-group"))?
                .ok_or_else(|| GraphError::Missing(at("throttle-group")))?,
            file: required_child(reader, prefix, "file", depth)?,
        },
        "luks" => DriverOptions::Luks {
            file: required_child(reader, prefix, "file", depth)?,
            key_secret: reader.text(&at("key-secret"))?,
        },
        "copy-on-read" => DriverOptions::CopyOnRead {
            file: required_child(reader, prefix, "file", depth)?,
        },
        "blkdebug" => DriverOptions::Blkdebug(Box::new(BlkdebugOptions {
            image: required_child(reader, prefix, "image", depth)?,
            inject_errors: blkdebug::inject_errors(reader, prefix)?,
            set_states: blkdebug::set_states(reader, prefix)?,
            align: blkdebug::rest(reader, prefix)?,
        })),
        _ => return Err(GraphError::Word("driver".to_owned(), driver)),
    };
    Ok(NodeOptions { name, common, driver })
}

fn common(reader: &mut Reader, prefix: &str) -> Result<CommonOptions, GraphError> {
    let at = |name: &str| format!("{prefix}{name}");
    let discard = reader.word(&at("discard"), &["ignore", "unmap", "off", "on"])?;
    let detect_zeroes = match reader.word(&at("detect-zeroes"), &["off", "on", "unmap"])? {
        Some("on") => DetectZeroes::On,
        Some("unmap") => DetectZeroes::Unmap,
        _ => DetectZeroes::Off,
    };
    if reader.switch(&at("active"))? == Some(false) {
        return Err(GraphError::Impossible(at("active"), "nodes are always active"));
    }
    let options = CommonOptions {
        discard: discard.map(|word| matches!(word, "unmap" | "on")),
        direct: reader.switch(&at("cache.direct"))?,
        no_flush: reader.switch(&at("cache.no-flush"))?,
        read_only: reader.switch(&at("read-only"))?,
        auto_read_only: reader.switch(&at("auto-read-only"))?,
        force_share: reader.switch(&at("force-share"))?,
        detect_zeroes,
    };
    if detect_zeroes == DetectZeroes::Unmap && options.discard != Some(true) {
        return Err(GraphError::Unsupported(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ));
    }
    if options.force_share == Some(true) && options.read_only != Some(true) {
        return Err(GraphError::Unsupported(
            "force-share=on can only be used with read-only images",
        ));
    }
    Ok(options)
}

fn file(reader: &mut Reader, prefix: &str, is_device: bool) -> Result<FileOptions, GraphError> {
    let at = |name: &str| format!("{prefix}{name}");
    let path = reader
        .text(&at("filename"))?
        .ok_or_else(|| GraphError::Missing(at("filename")))?;
    if path.is_empty() || path.contains('\0') {
        return Err(GraphError::Open {
            path: path.replace('\0', "").into(),
            errno: nix::errno::Errno::ENOENT,
        });
    }
    let engine = match reader.word(&at("aio"), &["threads", "native", "io_uring"])? {
        Some("threads") => Some(Aio::Threads),
        Some("native") => Some(Aio::Native),
        Some(_) => Some(Aio::IoUring),
        None => None,
    };
    let locking = reader.word(&at("locking"), &["auto", "on", "off"])? != Some("off");
    Ok(FileOptions {
        is_device,
        path: path.into(),
        engine,
        locking,
    })
}

fn qcow2(reader: &mut Reader, prefix: &str, depth: usize) -> Result<Qcow2Options, GraphError> {
    let at = |name: &str| format!("{prefix}{name}");
    let file = required_child(reader, prefix, "file", depth)?;
    let backing = backing(reader, prefix, depth)?;
    let options = Qcow2Options {
        file,
        backing,
        data_file: child(reader, prefix, "data-file", depth)?,
        lazy_refcounts: reader.switch(&at("lazy-refcounts"))?,
        l2_cache_bytes: reader.size(&at("l2-cache-size"))?,
        refcount_cache_bytes: reader.size(&at("refcount-cache-size"))?,
        encrypt: encrypt(reader, &at("encrypt."))?,
    };
    let total = reader.size(&at("cache-size"))?;
    let options = match total {
        None => options,
        Some(total) => split_cache(total, options)?,
    };
    // How much it looks before it writes: it always looks at all that is in memory, which is what "cached" says.
    for name in ["overlap-check", "overlap-check.template"] {
        reader.word(&at(name), &["none", "constant", "cached", "all"])?;
    }
    for area in OVERLAP_AREAS {
        reader.switch(&at(&format!("overlap-check.{area}")))?;
    }
    Ok(options)
}

fn backing(reader: &mut Reader, prefix: &str, depth: usize) -> Result<BackingOptions, GraphError> {
    let below = format!("{prefix}backing.");
    if reader.take_null(&format!("{prefix}backing")) {
        return Ok(BackingOptions::None);
    }
    let is_described = ["driver", "file", "file."]
        .iter()
        .any(|name| reader.has_below(&format!("{below}{name}")));
    if reader.has_below(&below) && !is_described {
        if depth >= MAX_NESTING {
            return Err(GraphError::TooDeep(MAX_NESTING));
        }
        return Ok(BackingOptions::Adjusted(Box::new(AdjustedBacking {
            name: reader.text(&format!("{below}node-name"))?,
            common: common(reader, &below)?,
            backing: backing(reader, &below, depth + 1)?,
        })));
    }
    Ok(match child(reader, prefix, "backing", depth)? {
        // Before there was null, an empty reference said it.
        Some(ChildOptions::Reference(name)) if name.is_empty() => BackingOptions::None,
        Some(child) => BackingOptions::Node(child),
        None => BackingOptions::FromImage,
    })
}

fn encrypt(reader: &mut Reader, prefix: &str) -> Result<Option<EncryptOptions>, GraphError> {
    let at = |name: &str| format!("{prefix}{name}");
    let key_secret = reader.text(&at("key-secret"))?;
    match reader.word(&at("format"), &["aes", "luks"])? {
        Some(format) => Ok(Some(EncryptOptions {
            is_luks: format == "luks",
            key_secret,
        })),
        None if key_secret.is_some() => Err(GraphError::Missing(at("format"))),
        None => Ok(None),
    }
}

/// The areas of `overlap-check`.
const OVERLAP_AREAS: &[&str] = &[
    "main-header",
    "active-l1",
    "active-l2",
    "refcount-table",
    "refcount-block",
    "snapshot-table",
    "inactive-l1",
    "inactive-l2",
    "bitmap-directory",
];

/// `cache-size` is both caches together; refcounts get what is over, or a quarter.
fn split_cache(total: u64, mut options: Qcow2Options) -> Result<Qcow2Options, GraphError> {
    let too_small =
        || GraphError::Unsupported("cache-size may not be smaller than l2-cache-size and refcount-cache-size");
    match (options.l2_cache_bytes, options.refcount_cache_bytes) {
        (Some(_), Some(_)) => {
            return Err(GraphError::Unsupported(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            ));
        }
        (Some(l2), None) => options.refcount_cache_bytes = Some(total.checked_sub(l2).ok_or_else(too_small)?),
        (None, Some(refcounts)) => options.l2_cache_bytes = Some(total.checked_sub(refcounts).ok_or_else(too_small)?),
        (None, None) => {
            options.refcount_cache_bytes = Some(total / 4);
            options.l2_cache_bytes = Some(total - total / 4);
        }
    }
    Ok(options)
}

fn required_child(reader: &mut Reader, prefix: &str, name: &str, depth: usize) -> Result<ChildOptions, GraphError> {
    child(reader, prefix, name, depth)?.ok_or_else(|| GraphError::Missing(format!("{prefix}{name}")))
}

fn child(reader: &mut Reader, prefix: &str, name: &str, depth: usize) -> Result<Option<ChildOptions>, GraphError> {
    let at = format!("{prefix}{name}");
    if let Some(reference) = reader.text(&at)? {
        return Ok(Some(ChildOptions::Reference(reference)));
    }
    let below = format!("{at}.");
    if !reader.has_below(&below) {
        return Ok(None);
    }
    let node = node(reader, &below, depth + 1)?;
    Ok(Some(ChildOptions::Inline(Box::new(node))))
}

#[cfg(test)]
mod tests;
