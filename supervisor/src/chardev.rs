//! Character devices: the supervisor opens, listens and accepts; the process that uses the bytes gets the fd.

pub mod inet;
pub mod ring;

use crate::config::CharBackend;
use crate::logging;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::termios::{LocalFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use ring::Ring;
use std::cell::RefCell;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// A character device that could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{option}: {what}: {error}")]
pub struct ChardevError {
    option: &'static str,
    what: String,
    error: std::io::Error,
}

impl ChardevError {
    /// In the words of an error reply.
    pub fn reply(&self) -> String {
        let errno = self.error.raw_os_error().map(Errno::from_raw);
        match errno {
            Some(errno) => format!("Could not open '{}': {}", self.what, errno.desc()),
            None => format!("Could not open '{}': {}", self.what, self.error),
        }
    }
}

/// An open character device and what query-chardev calls it.
pub struct Opened {
    /// The device.
    pub device: Chardev,
    /// Its name.
    pub name: Rc<Name>,
}

/// What is behind a character device, as query-chardev tells it.
pub enum Name {
    /// The backend's name.
    Plain(&'static str),
    /// A pseudo-terminal.
    Pty(PathBuf),
    /// A socket.
    Socket {
        /// Protocol and address.
        address: String,
        /// Whether it waits for clients.
        listening: bool,
        /// The address of the client, where it has one.
        peer: RefCell<Option<String>>,
    },
}

impl Name {
    fn socket(address: String, listening: bool) -> Self {
        Self::Socket {
            address,
            listening,
            peer: RefCell::default(),
        }
    }

    /// query-chardev's `filename`.
    pub fn filename(&self, connected: bool) -> String {
        match self {
            Self::Plain(name) => (*name).to_owned(),
            Self::Pty(path) => format!("pty:{}", path.display()),
            Self::Socket {
                address,
                listening,
                peer,
            } => {
                let state = if connected { "" } else { "disconnected:" };
                let server = if *listening { ",server=on" } else { "" };
                let peer = match &*peer.borrow() {
                    Some(peer) if connected => format!(" <-> {peer}"),
                    _ => String::new(),
                };
                format!("{state}{address}{server}{peer}")
            }
        }
    }
}

/// An open character device.
pub enum Chardev {
    /// No bytes either way.
    Null,
    /// Connected from the start, for good.
    Connected(Streams),
    /// Waiting for clients.
    Listening(Listener),
    /// Output stays in memory.
    Ring(Ring),
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

/// A listening socket. The file it made is removed with it.
pub struct Listener {
    socket: ListeningSocket,
    made: Option<PathBuf>,
    name: Rc<Name>,
}

enum ListeningSocket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            ListeningSocket::Unix(socket) => socket.as_fd(),
            ListeningSocket::Tcp(socket) => socket.as_fd(),
        }
    }
}

impl Listener {
    /// The next client; `None` when there is none now.
    pub fn accept(&self) -> Option<OwnedFd> {
        match &self.socket {
            ListeningSocket::Unix(socket) => socket.accept().ok().map(|(stream, _)| stream.into()),
            ListeningSocket::Tcp(socket) => {
                let (stream, address) = socket.accept().ok()?;
                if let Name::Socket { peer, .. } = &*self.name {
                    peer.replace(Some(address.to_string()));
                }
                Some(stream.into())
            }
        }
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
pub fn open(option: &'static str, backend: &CharBackend) -> Result<Opened, ChardevError> {
    let at = |what: &dyn std::fmt::Display| {
        let what = what.to_string();
        move |error: std::io::Error| ChardevError { option, what, error }
    };
    let both_ways = |fd: OwnedFd| {
        Chardev::Connected(Streams {
            input: Some(fd),
            output: None,
            keep: None,
        })
    };
    let listening = |socket: ListeningSocket, made: Option<PathBuf>, address: String| {
        let name = Rc::new(Name::socket(address, true));
        let listener = Listener {
            socket,
            made,
            name: Rc::clone(&name),
        };
        (Chardev::Listening(listener), name)
    };
    let plain = |name| Rc::new(Name::Plain(name));
    let (device, name) = match backend {
        CharBackend::Null => (Chardev::Null, plain("null")),
        CharBackend::Ring(size) => (Chardev::Ring(Ring::new(*size)), plain("ringbuf")),
        CharBackend::Stdio => {
            let input = std::io::stdin().as_fd().try_clone_to_owned().map_err(at(&"stdio"))?;
            let output = std::io::stdout().as_fd().try_clone_to_owned().map_err(at(&"stdio"))?;
            let streams = Streams {
                input: Some(input),
                output: Some(output),
                keep: None,
            };
            (Chardev::Connected(streams), plain("stdio"))
        }
        CharBackend::File { path, input, append } => {
            let input = input
                .as_ref()
                .map(|path| open_path(path, OFlag::O_RDONLY).map_err(at(&path.display())))
                .transpose()?;
            let how = if *append { OFlag::O_APPEND } else { OFlag::O_TRUNC };
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | how;
            let streams = Streams {
                input,
                output: Some(open_path(path, flags).map_err(at(&path.display()))?),
                keep: None,
            };
            (Chardev::Connected(streams), plain("file"))
        }
        CharBackend::Pipe(path) => (
            Chardev::Connected(open_pipe(path).map_err(at(&path.display()))?),
            plain("pipe"),
        ),
        CharBackend::Pty => {
            let (streams, path) = open_pty().map_err(|errno| at(&"pty")(errno.into()))?;
            logging::line(format_args!("char device redirected to {} ({option})", path.display()));
            (Chardev::Connected(streams), Rc::new(Name::Pty(path)))
        }
        CharBackend::UnixServer { path, .. } => {
            let socket = listen(path).map_err(at(&path.display()))?;
            let address = format!("unix:{}", path.display());
            listening(ListeningSocket::Unix(socket), Some(path.clone()), address)
        }
        CharBackend::UnixClient(path) => {
            let socket = UnixStream::connect(path).map_err(at(&path.display()))?;
            let name = Name::socket(format!("unix:{}", path.display()), false);
            (both_ways(socket.into()), Rc::new(name))
        }
        CharBackend::TcpServer { host, port, .. } => {
            let failed = |error| at(&format!("tcp:{host}:{port}"))(error);
            let addresses = inet::resolve(host, *port).map_err(failed)?;
            let socket = TcpListener::bind(&addresses[..]).map_err(failed)?;
            socket.set_nonblocking(true).map_err(failed)?;
            let address = format!("tcp:{}", socket.local_addr().map_err(failed)?);
            listening(ListeningSocket::Tcp(socket), None, address)
        }
        CharBackend::TcpClient { host, port } => {
            let failed = |error| at(&format!("tcp:{host}:{port}"))(error);
            let addresses = inet::resolve(host, *port).map_err(failed)?;
            let socket = TcpStream::connect(&addresses[..]).map_err(failed)?;
            let name = Name::socket(format!("tcp:{}", socket.local_addr().map_err(failed)?), false);
            if let Name::Socket { peer, .. } = &name {
                peer.replace(Some(socket.peer_addr().map_err(failed)?.to_string()));
            }
            (both_ways(socket.into()), Rc::new(name))
        }
        CharBackend::Inherited { fd, listening: true } => {
            let number = format!("fd {fd}");
            let owned = adopt(*fd).map_err(|errno| at(&number)(errno.into()))?;
            let socket = UnixListener::from(owned);
            socket.set_nonblocking(true).map_err(at(&number))?;
            let address = unix_address(socket.local_addr(), *fd);
            listening(ListeningSocket::Unix(socket), None, address)
        }
        CharBackend::Inherited { fd, listening: false } => {
            let socket = UnixStream::from(adopt(*fd).map_err(|errno| at(&format!("fd {fd}"))(errno.into()))?);
            let name = Name::socket(unix_address(socket.local_addr(), *fd), false);
            (both_ways(socket.into()), Rc::new(name))
        }
    };
    Ok(Opened { device, name })
}

/// What an inherited socket is called: its path, or else its number.
fn unix_address(address: std::io::Result<std::os::unix::net::SocketAddr>, fd: i32) -> String {
    let path = address
        .ok()
        .and_then(|address| address.as_pathname().map(Path::to_owned));
    path.map_or_else(|| format!("fd:{fd}"), |path| format!("unix:{}", path.display()))
}

/// Opens a path without waiting for the other side of a FIFO: nobody may keep the supervisor waiting.
fn open_path(path: &Path, flags: OFlag) -> std::io::Result<OwnedFd> {
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o666);
    Ok(nix::fcntl::open(path, flags, mode)?)
}

/// Two FIFOs, `PATH.in` and `PATH.out`, or else one for both directions. Opened for both, each is open at once and never
/// comes to an end.
fn open_pipe(path: &Path) -> std::io::Result<Streams> {
    let side = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        open_path(Path::new(&name), OFlag::O_RDWR)
    };
    let (input, output) = match (side(".in"), side(".out")) {
        (Ok(input), Ok(output)) => (input, Some(output)),
        _ => (open_path(path, OFlag::O_RDWR)?, None),
    };
    Ok(Streams {
        input: Some(input),
        output,
        keep: None,
    })
}

/// A new pseudo-terminal in raw mode, and the name of the side for others.
fn open_pty() -> Result<(Streams, PathBuf), Errno> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = nix::pty::posix_openpt(flags)?;
    nix::pty::unlockpt(&master)?;
    let path = PathBuf::from(nix::pty::ptsname_r(&master)?);
    let slave = nix::fcntl::open(&path, flags, nix::sys::stat::Mode::empty())?;
    let mut attributes = tcgetattr(&slave)?;
    cfmakeraw(&mut attributes);
    tcsetattr(&slave, SetArg::TCSANOW, &attributes)?;
    let streams = Streams {
        input: Some(master.into()),
        output: None,
        keep: Some(slave),
    };
    Ok((streams, path))
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
