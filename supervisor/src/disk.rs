//! Opening the images that the command line names, by path or as a set of inherited fds (`/dev/fdset/N`): type, size and
//! the locks that keep other programs off.
//!
//! The locks are QEMU's, so that its tools and Bulkhead keep each other off an image in use: shared OFD locks on single
//! bytes far inside the file, byte 100+n for "I use permission n" and 200+n for "I do not share permission n". Whoever
//! finds the byte that contradicts him locked by another has to give up. They live on the open file description, which
//! block-proc's copy of the fd shares.

use crate::config::Drive;
use crate::vm::fds::{self, FdError, Fds};
use ipc::block::DiskInfo;
use ipc::caps::DiskFd;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::{Mode, SFlag, fstat};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// A disk that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("-drive file={path}: {problem}")]
pub struct DiskError {
    path: PathBuf,
    problem: Problem,
}

#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("{0}")]
    System(Errno),
    #[error("is a directory, not an image")]
    Directory,
    #[error("is neither a regular file nor a block device")]
    OtherType,
    #[error("is in use by another process (its \"{0}\" lock is taken)")]
    InUse(&'static str),
    #[error(transparent)]
    FdSet(#[from] FdError),
    #[error("cannot be opened with O_DIRECT (cache.direct=on): the file system does not support it")]
    NoDirect,
}

/// Permissions of QEMU's block layer: bit number and name.
const CONSISTENT_READ: (i64, &str) = (0, "consistent read");
const WRITE: (i64, &str) = (1, "write");
const RESIZE: (i64, &str) = (3, "resize");
/// Smallest and largest block that a guest is shown.
const SECTOR_BYTES: u32 = 512;
const LARGEST_BLOCK_BYTES: u32 = 4096;
const USED_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;

/// Opens and locks a drive's image.
///
/// # Errors
/// One line that names the image and what is wrong with it.
pub fn open_drive(drive: &Drive, given: &Fds) -> Result<(DiskFd, DiskInfo), DiskError> {
    let at = |problem: Problem| DiskError {
        path: drive.file.clone(),
        problem,
    };
    let fd = open_image(&drive.file, drive.read_only, drive.cache.direct, given).map_err(at)?;
    let status = fstat(&fd).map_err(|errno| at(Problem::System(errno)))?;
    let (bytes, is_block_device) = match SFlag::from_bits_truncate(status.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFREG => (status.st_size as u64, false),
        SFlag::S_IFBLK => (
            block_device_size(&fd).map_err(|errno| at(Problem::System(errno)))?,
            true,
        ),
        SFlag::S_IFDIR => return Err(at(Problem::Directory)),
        _ => return Err(at(Problem::OtherType)),
    };
    lock(&fd, drive.read_only).map_err(at)?;
    let info = DiskInfo {
        format: drive.format,
        bytes,
        is_block_device,
        read_only: drive.read_only,
        discard: drive.discard,
        direct: drive.cache.direct,
        no_flush: drive.cache.no_flush,
        write_cache: drive.cache.write_back,
        serial: drive.serial.clone(),
        logical_block_bytes: if drive.cache.direct {
            direct_alignment(&fd, is_block_device)
        } else {
            SECTOR_BYTES
        },
    };
    Ok((DiskFd::new(fd), info))
}

fn open_image(path: &Path, read_only: bool, direct: bool, given: &Fds) -> Result<OwnedFd, Problem> {
    let mut flags = if read_only { OFlag::O_RDONLY } else { OFlag::O_RDWR };
    if direct {
        flags |= OFlag::O_DIRECT;
    }
    if let Some(set) = fds::set_of(path) {
        return Ok(given.open(set?, flags)?.into_fd());
    }
    // O_NONBLOCK: a FIFO given by mistake must not hang the start; it means nothing for files and block devices.
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    open(path, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::EISDIR => Problem::Directory,
        Errno::EINVAL if direct => Problem::NoDirect,
        errno => Problem::System(errno),
    })
}

/// What a guest may address at least: requests of O_DIRECT must keep to the host's alignment, so the guest is shown
/// blocks of that size. Other requests go through the page cache.
fn direct_alignment(fd: &OwnedFd, is_block_device: bool) -> u32 {
    use std::os::fd::AsRawFd;
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

fn block_device_size(fd: &OwnedFd) -> Result<u64, Errno> {
    use std::os::fd::AsRawFd;
    let mut bytes = 0;
    // SAFETY: BLKGETSIZE64 stores one u64.
    unsafe { block_get_size(fd.as_raw_fd(), &raw mut bytes) }?;
    Ok(bytes)
}

fn lock(fd: &OwnedFd, read_only: bool) -> Result<(), Problem> {
    let used: &[_] = if read_only {
        &[CONSISTENT_READ]
    } else {
        &[CONSISTENT_READ, WRITE]
    };
    let unshared = [WRITE, RESIZE];
    for byte in used
        .iter()
        .map(|(bit, _)| USED_BASE + bit)
        .chain(unshared.iter().map(|(bit, _)| UNSHARED_BASE + bit))
    {
        match fcntl(fd, FcntlArg::F_OFD_SETLK(&byte_lock(byte, libc::F_RDLCK))) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(Problem::InUse(WRITE.1)),
            // A file system without locks cannot tell; QEMU goes on as well.
            Err(Errno::ENOLCK | Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(()),
            Err(errno) => return Err(Problem::System(errno)),
        }
    }
    let contradictions = used
        .iter()
        .map(|(bit, name)| (UNSHARED_BASE + bit, *name))
        .chain(unshared.iter().map(|(bit, name)| (USED_BASE + bit, *name)));
    for (byte, name) in contradictions {
        let mut probe = byte_lock(byte, libc::F_WRLCK);
        fcntl(fd, FcntlArg::F_OFD_GETLK(&mut probe)).map_err(Problem::System)?;
        if probe.l_type != libc::F_UNLCK as i16 {
            return Err(Problem::InUse(name));
        }
    }
    Ok(())
}

/// Locks an image that others may read as well, and nobody may write.
///
/// # Errors
/// What is wrong, as text.
pub fn lock_read_only(fd: &OwnedFd) -> Result<(), String> {
    lock(fd, true).map_err(|problem| problem.to_string())
}

/// Gives up all locks on a disk's description.
pub fn unlock(disk: &DiskFd) {
    let everything = libc::flock {
        l_len: 0,
        ..byte_lock(0, libc::F_UNLCK)
    };
    // Fails only where locking did.
    let _ = fcntl(disk.as_fd(), FcntlArg::F_OFD_SETLK(&everything));
}

fn byte_lock(byte: i64, kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Cache;
    use ipc::block::{EngineChoice, ImageFormat};

    fn drive(file: &Path, read_only: bool) -> Drive {
        Drive {
            id: "d".into(),
            file: file.into(),
            format: ImageFormat::Raw,
            read_only,
            cache: Cache {
                write_back: true,
                direct: false,
                no_flush: false,
            },
            engine: EngineChoice::Auto,
            discard: false,
            serial: String::new(),
            queues: None,
        }
    }

    fn open(drive: &Drive) -> Result<(DiskFd, DiskInfo), DiskError> {
        open_drive(drive, &Fds::default())
    }

    #[test]
    fn a_writer_keeps_every_other_user_off() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let held = open(&drive(file.path(), false)).unwrap();
        for read_only in [false, true] {
            let error = open(&drive(file.path(), read_only)).unwrap_err().to_string();
            assert!(error.contains("in use"), "{error}");
        }
        drop(held);
        open(&drive(file.path(), false)).unwrap();
    }

    #[test]
    fn readers_share_an_image_and_keep_writers_off() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let _first = open(&drive(file.path(), true)).unwrap();
        let _second = open(&drive(file.path(), true)).unwrap();
        assert!(open(&drive(file.path(), false)).is_err());
    }

    #[test]
    fn directories_and_missing_files_are_named() {
        let directory = tempfile::tempdir().unwrap();
        for read_only in [false, true] {
            let error = open(&drive(directory.path(), read_only)).unwrap_err().to_string();
            assert!(
                error.contains("is a directory") && error.contains(directory.path().to_str().unwrap()),
                "{error}"
            );
        }
        assert!(
            open(&drive(&directory.path().join("none"), false))
                .unwrap_err()
                .to_string()
                .contains("ENOENT")
        );
    }
}
