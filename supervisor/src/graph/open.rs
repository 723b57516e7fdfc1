//! Opening the files of nodes: by path or as a set of passed fds (`/dev/fdset/N`). A path that the operator names grants
//! exactly that file, for what the node does with it.

use super::error::GraphError;
use super::locks::Locks;
use super::node::OpenFile;
use super::options::{Aio, ChildOptions, DriverOptions, FileOptions, NodeOptions};
use super::settings::{Settings, roles};
use crate::vm::fds::{self, Fds};
use ipc::block::{DiskInfo, EngineChoice, ImageFormat};
use ipc::caps::DiskFd;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat};
use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Smallest and largest block that a guest is shown.
const SECTOR_BYTES: u32 = 512;
const LARGEST_BLOCK_BYTES: u32 = 4096;

/// The files of a tree in the order in which its nodes take them ([`NodeOptions::nodes`]), each with block-proc's fd.
#[derive(Debug, Default)]
pub struct Opened(VecDeque<OpenedFile>);

/// A file that was opened: our half, and block-proc's.
#[derive(Debug)]
pub struct OpenedFile {
    /// The supervisor's.
    pub file: OpenFile,
    /// For block-proc.
    pub disk: DiskFd,
}

impl Opened {
    /// One file.
    pub fn of(file: OpenedFile) -> Self {
        Self(VecDeque::from([file]))
    }

    /// Takes the next file.
    pub fn next(&mut self) -> Option<OpenedFile> {
        self.0.pop_front()
    }
}

/// Opens all files of a tree.
///
/// # Errors
/// The first that cannot be opened.
pub fn open_tree(options: &NodeOptions, settings: Settings, given: &Fds) -> Result<Opened, GraphError> {
    let mut opened = Opened::default();
    open_below(options, settings, given, &mut opened)?;
    Ok(opened)
}

fn open_below(options: &NodeOptions, settings: Settings, given: &Fds, opened: &mut Opened) -> Result<(), GraphError> {
    if let DriverOptions::File(file) = &options.driver {
        opened.0.push_back(open_file(file, settings, given)?);
    }
    for (child, role) in options.children().into_iter().zip(roles(options)) {
        if let ChildOptions::Inline(child) = child {
            open_below(child, settings.of_child(role, &child.common), given, opened)?;
        }
    }
    Ok(())
}

/// Opens a node's file.
///
/// # Errors
/// Why it cannot be.
pub fn open_file(options: &FileOptions, settings: Settings, given: &Fds) -> Result<OpenedFile, GraphError> {
    if options.engine == Some(Aio::Native) && !settings.direct {
        return Err(GraphError::NativeNeedsDirect);
    }
    let path = &options.path;
    let mut read_only = settings.read_only;
    let fd = match open_path(path, read_only, settings.direct, given) {
        // As QEMU: a file that cannot be written is read.
        Err(error) if settings.auto_read_only && !read_only && is_unwritable(&error) => {
            read_only = true;
            open_path(path, true, settings.direct, given)
        }
        other => other,
    }?;
    take_over(fd, options, Settings { read_only, ..settings })
}

/// What a node's file is now: it may have grown since it was opened.
///
/// # Errors
/// The system's.
pub fn info_now(file: &OpenFile) -> Result<DiskInfo, Errno> {
    let bytes = match file.info.is_block_device {
        true => block_device_size(file.lock.as_fd())?,
        false => fstat(&file.lock)?.st_size as u64,
    };
    Ok(DiskInfo {
        bytes,
        ..file.info.clone()
    })
}

/// Makes a node's file of an open one.
///
/// # Errors
/// When it is of another kind.
pub fn take_over(fd: OwnedFd, options: &FileOptions, settings: Settings) -> Result<OpenedFile, GraphError> {
    let path = &options.path;
    let failed = |errno| GraphError::Open {
        path: path.clone(),
        errno,
    };
    let status = fstat(&fd).map_err(failed)?;
    let kind = SFlag::from_bits_truncate(status.st_mode & SFlag::S_IFMT.bits());
    let (bytes, is_block_device) = match kind {
        // QEMU's file driver takes block devices still, with a warning.
        SFlag::S_IFBLK => (block_device_size(fd.as_fd()).map_err(failed)?, true),
        SFlag::S_IFREG if !options.is_device => (status.st_size as u64, false),
        SFlag::S_IFDIR => return Err(failed(Errno::EISDIR)),
        _ if options.is_device => return Err(GraphError::NotADevice(path.clone())),
        _ => return Err(GraphError::NotAFile(path.clone())),
    };
    let info = DiskInfo {
        format: ImageFormat::Raw,
        bytes,
        is_block_device,
        read_only: settings.read_only,
        discard: settings.discard,
        direct: settings.direct,
        no_flush: settings.no_flush,
        write_cache: true,
        serial: String::new(),
        logical_block_bytes: if settings.direct {
            direct_alignment(&fd, is_block_device)
        } else {
            SECTOR_BYTES
        },
    };
    let lock = DiskFd::new(fd);
    let disk = lock
        .try_clone()
        .map_err(|error| failed(error.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw)))?;
    let file = OpenFile {
        path: path.clone(),
        identity: (status.st_dev, status.st_ino),
        lock,
        anew: None,
        info,
        locks: Locks::default(),
        is_locked: options.locking && !settings.force_share,
    };
    Ok(OpenedFile { file, disk })
}

fn is_unwritable(error: &GraphError) -> bool {
    matches!(
        error,
        GraphError::Open {
            errno: Errno::EACCES | Errno::EROFS | Errno::EPERM,
            ..
        } | GraphError::FdSet(fds::FdError::NoMatch(_))
    )
}

fn open_path(path: &Path, read_only: bool, direct: bool, given: &Fds) -> Result<OwnedFd, GraphError> {
    let mut flags = if read_only { OFlag::O_RDONLY } else { OFlag::O_RDWR };
    if direct {
        flags |= OFlag::O_DIRECT;
    }
    if let Some(set) = fds::set_of(path) {
        return Ok(given.open(set?, flags)?.into_fd());
    }
    // O_NONBLOCK: a FIFO given by mistake must not hang us; it means nothing for files and block devices.
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    open(path, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::EINVAL if direct => GraphError::NoDirect(path.into()),
        errno => GraphError::Open {
            path: path.into(),
            errno,
        },
    })
}

/// The one engine that nodes ask for, if any does.
///
/// # Errors
/// When two ask for different ones.
pub fn engine<'a>(trees: impl IntoIterator<Item = &'a NodeOptions>) -> Result<Option<EngineChoice>, GraphError> {
    let mut chosen: Option<Aio> = None;
    for tree in trees {
        for node in tree.nodes() {
            let DriverOptions::File(FileOptions {
                engine: Some(wanted), ..
            }) = &node.driver
            else {
                continue;
            };
            if let Some(present) = chosen
                && choice(present) != choice(*wanted)
            {
                return Err(GraphError::OtherEngine {
                    wanted: wanted.name(),
                    present: present.name(),
                });
            }
            chosen = Some(*wanted);
        }
    }
    Ok(chosen.map(choice))
}

/// What does the I/O. io_uring does what Linux AIO did.
pub fn choice(aio: Aio) -> EngineChoice {
    match aio {
        Aio::Threads => EngineChoice::Threads,
        Aio::Native | Aio::IoUring => EngineChoice::IoUring,
    }
}

/// What a guest may address at least: requests of O_DIRECT must keep to the host's alignment, so the guest is shown
/// blocks of that size. Other requests go through the page cache.
fn direct_alignment(fd: &OwnedFd, is_block_device: bool) -> u32 {
    let found = if is_block_device {
        let mut bytes: libc::c_int = 0;
        // SAFETY: BLKSSZGET stores one int.
        unsafe { block_sector_size(fd.as_raw_fd(), &raw mut bytes) }
            .ok()
            .and_then(|_| u32::try_from(bytes).ok())
    } else {
        crate::sys::direct_io_alignment(fd.as_fd())
    };
    match found {
        Some(bytes) if bytes.is_power_of_two() && bytes <= LARGEST_BLOCK_BYTES => bytes.max(SECTOR_BYTES),
        // The file system does not say (before Linux 6.1): 4 KiB is right everywhere.
        _ => LARGEST_BLOCK_BYTES,
    }
}

nix::ioctl_read_bad!(block_sector_size, 0x1268, libc::c_int);
nix::ioctl_read!(block_get_size, 0x12, 114, u64);

fn block_device_size(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut bytes = 0;
    // SAFETY: BLKGETSIZE64 stores one u64.
    unsafe { block_get_size(fd.as_raw_fd(), &raw mut bytes) }?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::options::CommonOptions;
    use std::os::unix::fs::PermissionsExt;

    fn file(path: &Path) -> FileOptions {
        FileOptions {
            is_device: false,
            path: path.into(),
            engine: None,
            locking: true,
        }
    }

    fn refusal(options: &FileOptions, settings: Settings) -> String {
        open_file(options, settings, &Fds::default()).unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_opened_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let plain = Settings::default();
        let shown = at("none").display().to_string();
        assert_eq!(
            refusal(&file(&at("none")), plain),
            format!("Could not open '{shown}': No such file or directory")
        );
        for read_only in [false, true] {
            let text = refusal(&file(directory.path()), Settings { read_only, ..plain });
            assert!(text.ends_with("Is a directory"), "{text}");
        }
        assert_eq!(
            refusal(&file(Path::new("/dev/null")), plain),
            "'file' driver requires '/dev/null' to be a regular file"
        );
        std::fs::write(at("a"), [0; 512]).unwrap();
        let device = FileOptions {
            is_device: true,
            ..file(&at("a"))
        };
        assert!(refusal(&device, plain).starts_with("'host_device' driver requires"));
        let native = FileOptions {
            engine: Some(Aio::Native),
            ..file(&at("a"))
        };
        assert!(refusal(&native, plain).starts_with("aio=native was specified"));
        assert_eq!(
            refusal(&file(Path::new("/dev/fdset/4")), plain),
            "Failed to find fdset /dev/fdset/4"
        );
    }

    #[test]
    fn what_cannot_be_written_is_read_where_that_is_allowed() {
        if nix::unistd::geteuid().is_root() {
            println!("SKIPPED: root may write everything");
            return;
        }
        let image = tempfile::NamedTempFile::new().unwrap();
        std::fs::set_permissions(image.path(), std::fs::Permissions::from_mode(0o400)).unwrap();
        let plain = Settings::default();
        assert!(refusal(&file(image.path()), plain).ends_with("Permission denied"));
        let settings = Settings {
            auto_read_only: true,
            ..plain
        };
        let opened = open_file(&file(image.path()), settings, &Fds::default()).unwrap();
        assert!(opened.file.info.read_only);
    }

    #[test]
    fn a_trees_files_are_opened_in_order_with_what_they_inherit() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for (name, bytes) in [("a", 512), ("b", 1024)] {
            std::fs::write(at(name), vec![0; bytes]).unwrap();
        }
        let mut top = NodeOptions::image(ImageFormat::Qcow2, file(&at("a")));
        let base = NodeOptions::image(ImageFormat::Raw, file(&at("b")));
        let DriverOptions::Qcow2(qcow2) = &mut top.driver else {
            panic!()
        };
        qcow2.backing = crate::graph::options::BackingOptions::Node(ChildOptions::Inline(Box::new(base)));
        let settings = Settings::of_root(&CommonOptions::default());
        let mut opened = open_tree(&top, settings, &Fds::default()).unwrap();
        let seen: Vec<_> = std::iter::from_fn(|| opened.next())
            .map(|opened| (opened.file.info.bytes, opened.file.info.read_only))
            .collect();
        assert_eq!(seen, [(512, false), (1024, true)]);
    }

    #[test]
    fn all_nodes_have_one_engine() {
        let of = |engine| {
            NodeOptions::image(
                ImageFormat::Raw,
                FileOptions {
                    engine,
                    ..file(Path::new("a"))
                },
            )
        };
        let (threads, uring, native, any) = (
            of(Some(Aio::Threads)),
            of(Some(Aio::IoUring)),
            of(Some(Aio::Native)),
            of(None),
        );
        assert_eq!(engine([&any]).unwrap(), None);
        assert_eq!(engine([&any, &native, &uring]).unwrap(), Some(EngineChoice::IoUring));
        assert!(engine([&threads, &uring]).is_err());
    }
}
