//! Character devices: the supervisor opens, listens and accepts; the process that uses the bytes gets the fd.

use crate::config::CharBackend;
use crate::logging;
use nix::errno::Errno;
use nix::sys::termios::{LocalFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A character device that could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{option}: {what}: {error}")]
pub struct ChardevError {
    option: &'static str,
    what: String,
    error: std::io::Error,
}

/// An open character device.
pub enum Chardev {
    /// No bytes either way.
    Null,
    /// Connected from the start, for good.
    Connected(Streams),
    /// Waiting for clients.
    Listening(Listener),
}

/// The two directions.
pub struct Streams {
    /// Bytes from outside.
    pub input: Option<OwnedFd>,
    /// Bytes to outside; `None` with an `input`: the same fd.
    pub output: Option<OwnedFd>,
    /// Kept open while the device lives: the other side of a pty, which would hang up otherwise.
    pub keep: Option<OwnedFd>,
}

/// A listening unix socket. The file it made is removed with it.
pub struct Listener {
    socket: UnixListener,
    made: Option<PathBuf>,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Listener {
    /// The next client; `None` when there is none now.
    pub fn accept(&self) -> Option<OwnedFd> {
        self.socket.accept().ok().map(|(stream, _)| stream.into())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Opens a backend. `option` is named in errors.
///
/// # Errors
/// One line that names the option and the path.
pub fn open(option: &'static str, backend: &CharBackend) -> Result<Chardev, ChardevError> {
    let at = |what: &Path| {
        let what = what.display().to_string();
        move |error: std::io::Error| ChardevError { option, what, error }
    };
    let one_way = |output: OwnedFd| {
        Chardev::Connected(Streams {
            input: None,
            output: Some(output),
            keep: None,
        })
    };
    let both_ways = |fd: OwnedFd| {
        Chardev::Connected(Streams {
            input: Some(fd),
            output: None,
            keep: None,
        })
    };
    Ok(match backend {
        CharBackend::Null => Chardev::Null,
        CharBackend::Stdio => {
            let name = Path::new("stdio");
            let input = std::io::stdin().as_fd().try_clone_to_owned().map_err(at(name))?;
            let output = std::io::stdout().as_fd().try_clone_to_owned().map_err(at(name))?;
            Chardev::Connected(Streams {
                input: Some(input),
                output: Some(output),
                keep: None,
            })
        }
        CharBackend::File(path) => {
            let mut options = std::fs::OpenOptions::new();
            let options = options
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o666)
                .custom_flags(libc::O_NOCTTY);
            one_way(options.open(path).map_err(at(path))?.into())
        }
        CharBackend::Pty => {
            let pty = nix::pty::openpty(None, None).map_err(|errno| at(Path::new("pty"))(errno.into()))?;
            let mut attributes = tcgetattr(&pty.slave).map_err(|errno| at(Path::new("pty"))(errno.into()))?;
            cfmakeraw(&mut attributes);
            tcsetattr(&pty.slave, SetArg::TCSANOW, &attributes).map_err(|errno| at(Path::new("pty"))(errno.into()))?;
            let name = nix::unistd::ttyname(&pty.slave).map_err(|errno| at(Path::new("pty"))(errno.into()))?;
            logging::line(format_args!("char device redirected to {} ({option})", name.display()));
            Chardev::Connected(Streams {
                input: Some(pty.master),
                output: None,
                keep: Some(pty.slave),
            })
        }
        CharBackend::UnixServer { path, .. } => {
            let socket = listen(path).map_err(at(path))?;
            Chardev::Listening(Listener {
                socket,
                made: Some(path.clone()),
            })
        }
        CharBackend::UnixClient(path) => both_ways(UnixStream::connect(path).map_err(at(path))?.into()),
        CharBackend::Inherited { fd, listening } => {
            let name = format!("fd {fd}");
            let owned = adopt(*fd).map_err(|errno| at(Path::new(&name))(errno.into()))?;
            if *listening {
                let socket = UnixListener::from(owned);
                socket.set_nonblocking(true).map_err(at(Path::new(&name)))?;
                Chardev::Listening(Listener { socket, made: None })
            } else {
                both_ways(owned)
            }
        }
    })
}

/// Listens at a path. A socket file that nobody listens at any more is replaced, as QEMU does; one that is in use is not.
fn listen(path: &Path) -> std::io::Result<UnixListener> {
    let socket = match UnixListener::bind(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && is_stale(path) => {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn is_stale(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
        && UnixStream::connect(path).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
}

/// Takes over a descriptor that the parent left open for us.
fn adopt(fd: i32) -> Result<OwnedFd, Errno> {
    if fd <= 2 {
        return Err(Errno::EBADF);
    }
    // SAFETY: F_SETFD on a plain number; a closed one is an error.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(Errno::last());
    }
    // SAFETY: the descriptor is open, was given to us by number, and no other option may name it twice (each adoption
    // happens once, at start, and a second one would find its backend reported as busy by the kernel at worst).
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The terminal on standard input in raw mode, until dropped.
pub struct RawTerminal(Termios);

impl RawTerminal {
    /// Switches the terminal to raw mode but keeps ^C and friends when `signals`. `None` when stdin is no terminal.
    pub fn enter(signals: bool) -> Option<Self> {
        let saved = tcgetattr(std::io::stdin()).ok()?;
        let mut raw = saved.clone();
        cfmakeraw(&mut raw);
        // Output processing stays on: log lines on the same terminal still need their carriage returns.
        raw.output_flags = saved.output_flags;
        if signals {
            raw.local_flags |= LocalFlags::ISIG;
        }
        tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw).ok()?;
        Some(Self(saved))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_busy_one_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let backend = CharBackend::UnixServer {
            path: path.clone(),
            wait: false,
        };
        let first = open("-qmp", &backend).unwrap();
        let Err(error) = open("-qmp", &backend) else {
            panic!("a busy socket was replaced")
        };
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        drop(first);
        assert!(!path.exists(), "the socket file stayed");
    }

    #[test]
    fn a_file_that_is_no_socket_is_never_removed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let backend = CharBackend::UnixServer {
            path: file.path().into(),
            wait: false,
        };
        assert!(open("-serial", &backend).is_err());
        assert!(file.path().exists());
    }
}
