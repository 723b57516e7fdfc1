//! Opening what images name: backing files.
//!
//! A name found inside an image is untrusted data. It grants nothing: it is opened read-only, and only below a directory
//! that the operator has allowed (`-allow-path`), component by component without following a symbolic link. Relative names
//! count from the image's directory.

use crate::vm::fds;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, SFlag, fstat};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// Longest chain of images.
const MAX_DEPTH: usize = ipc::graph::MAX_CHAIN;

/// Why a backing file is not opened.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// Not below an allowed directory.
    #[error(
        "the image {image} has the backing file {name:?}, which is not below a directory that images may name: \
         -allow-path {} would allow it",
        directory.display()
    )]
    NotAllowed {
        /// The image that names it.
        image: PathBuf,
        /// The name.
        name: String,
        /// Its directory.
        directory: PathBuf,
    },
    /// Not a plain path.
    #[error("the image {image} has the backing file {name:?}, which is not the path of a local file")]
    NotAPath {
        /// The image that names it.
        image: PathBuf,
        /// The name.
        name: String,
    },
    /// It cannot be opened.
    #[error("the backing file {}: {problem}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system says.
        problem: String,
    },
    /// An image is its own backing file, over some others.
    #[error("the backing file {} is in the chain of images already", .0.display())]
    Cycle(PathBuf),
    /// Too many.
    #[error("the chain of backing files is longer than {MAX_DEPTH} images")]
    TooDeep,
}

struct Root {
    path: PathBuf,
    directory: OwnedFd,
}

/// The directories below which images may name others.
pub struct Roots {
    roots: Vec<Root>,
    /// Where relative paths of the command line begin.
    current: PathBuf,
}

/// The images of one disk, from the top: what they are, to find cycles.
#[derive(Debug, Clone, Default)]
pub struct Chain {
    seen: Vec<(u64, u64)>,
}

impl Chain {
    /// Adds an image by its device and inode.
    ///
    /// # Errors
    /// [`BackingError::TooDeep`], [`BackingError::Cycle`].
    pub fn add(&mut self, path: &Path, identity: (u64, u64)) -> Result<(), BackingError> {
        if self.seen.len() >= MAX_DEPTH {
            return Err(BackingError::TooDeep);
        }
        if self.seen.contains(&identity) {
            return Err(BackingError::Cycle(path.into()));
        }
        self.seen.push(identity);
        Ok(())
    }
}

impl Roots {
    /// Opens the allowed directories.
    ///
    /// # Errors
    /// One line with the directory that cannot be.
    pub fn open(allowed: &[PathBuf]) -> Result<Self, String> {
        let current = std::env::current_dir().map_err(|error| format!("the current directory: {error}"))?;
        let roots = allowed
            .iter()
            .map(|path| {
                let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
                let directory = open(path, flags, Mode::empty())
                    .map_err(|errno| format!("-allow-path {}: {errno}", path.display()))?;
                let path = plain(&current.join(path));
                Ok(Root { path, directory })
            })
            .collect::<Result<_, String>>()?;
        Ok(Self { roots, current })
    }

    /// The absolute path that a name in an image means.
    ///
    /// # Errors
    /// [`BackingError::NotAPath`].
    pub fn resolve(&self, image: &Path, name: &str) -> Result<PathBuf, BackingError> {
        path_of(&self.current.join(image), name)
    }

    /// Opens the file that an image names, for reading.
    ///
    /// # Errors
    /// [`BackingError`].
    pub fn open_named(&self, image: &Path, name: &str) -> Result<(PathBuf, OwnedFd), BackingError> {
        let image = self.current.join(image);
        let path = path_of(&image, name)?;
        let root = self
            .roots
            .iter()
            .find(|root| {
                path.strip_prefix(&root.path)
                    .is_ok_and(|rest| rest.file_name().is_some())
            })
            .ok_or_else(|| BackingError::NotAllowed {
                image,
                name: name.into(),
                directory: path.parent().unwrap_or(Path::new("/")).into(),
            })?;
        let failed = |problem: String| BackingError::File {
            path: path.clone(),
            problem,
        };
        let fd = open_below(root, &path).map_err(|errno| {
            failed(match errno {
                Errno::ELOOP | Errno::ENOTDIR => "has a symbolic link in its path below the allowed directory".into(),
                errno => errno.to_string(),
            })
        })?;
        let status = fstat(&fd).map_err(|errno| failed(errno.to_string()))?;
        if SFlag::from_bits_truncate(status.st_mode & SFlag::S_IFMT.bits()) != SFlag::S_IFREG {
            return Err(failed("is not a regular file".into()));
        }
        Ok((path, fd))
    }
}

/// The absolute path that a name in an image means.
fn path_of(image: &Path, name: &str) -> Result<PathBuf, BackingError> {
    let not_a_path = || BackingError::NotAPath {
        image: image.into(),
        name: name.into(),
    };
    let first_part = name.split('/').next().unwrap_or_default();
    let relative_to_nothing = !name.starts_with('/') && fds::set_of(image).is_some();
    if name.is_empty() || name.contains('\0') || first_part.contains(':') || relative_to_nothing {
        return Err(not_a_path());
    }
    let directory = image.parent().unwrap_or(Path::new("/"));
    Ok(plain(&directory.join(name)))
}

/// Without `.` and `..`. What that means where there are symbolic links does not matter: none is followed.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => drop(plain.pop()),
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    plain
}

fn open_below(root: &Root, path: &Path) -> Result<OwnedFd, Errno> {
    let rest = path.strip_prefix(&root.path).map_err(|_| Errno::EACCES)?;
    let mut directory: Option<OwnedFd> = None;
    let mut components = rest.components().peekable();
    while let Some(component) = components.next() {
        let Component::Normal(name) = component else {
            return Err(Errno::EACCES);
        };
        let at = directory.as_ref().unwrap_or(&root.directory).as_fd();
        let more = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        if components.peek().is_none() {
            let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | more;
            return openat(at, name, flags, Mode::empty());
        }
        directory = Some(openat(
            at,
            name,
            OFlag::O_PATH | OFlag::O_DIRECTORY | more,
            Mode::empty(),
        )?);
    }
    Err(Errno::EISDIR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_images_count_from_the_image() {
        let of = |name| path_of(Path::new("/srv/images/top"), name);
        assert_eq!(of("base").unwrap(), Path::new("/srv/images/base"));
        assert_eq!(of("./a/../base").unwrap(), Path::new("/srv/images/base"));
        assert_eq!(of("../../../etc/shadow").unwrap(), Path::new("/etc/shadow"));
        assert_eq!(of("/dev/sda").unwrap(), Path::new("/dev/sda"));
        for name in ["", "nbd://host/x", "json:{}", "a\0b", "fat:rw:/"] {
            assert!(matches!(of(name), Err(BackingError::NotAPath { .. })), "{name}");
        }
        let set = path_of(Path::new("/dev/fdset/1"), "base");
        assert!(matches!(set, Err(BackingError::NotAPath { .. })));
    }

    #[test]
    fn no_link_leads_out_of_an_allowed_directory() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("allowed")).unwrap();
        std::fs::create_dir(at("elsewhere")).unwrap();
        std::fs::write(at("elsewhere/secret"), "x").unwrap();
        std::fs::write(at("allowed/base"), [0; 512]).unwrap();
        std::os::unix::fs::symlink(at("elsewhere/secret"), at("allowed/link")).unwrap();
        std::os::unix::fs::symlink(at("elsewhere"), at("allowed/directory")).unwrap();
        let roots = Roots::open(&[at("allowed")]).unwrap();
        let open = |name: &str| {
            let (_, fd) = roots.open_named(&at("allowed/top"), name)?;
            Ok::<_, BackingError>(fstat(&fd).unwrap().st_size)
        };
        assert_eq!(open("base").unwrap(), 512);
        assert_eq!(open("../allowed/base").unwrap(), 512);
        for name in ["link", "directory/secret"] {
            assert!(matches!(open(name), Err(BackingError::File { .. })), "{name}");
        }
        for name in ["../elsewhere/secret", "/etc/shadow", "."] {
            let error = open(name).unwrap_err();
            assert!(matches!(error, BackingError::NotAllowed { .. }), "{name}: {error}");
        }
        assert!(
            open("../elsewhere/secret")
                .unwrap_err()
                .to_string()
                .contains("-allow-path")
        );
    }
}
