//! Character devices: the supervisor opens and accepts; the process that uses the bytes gets the fd. Sockets are in
//! [`socket`].

pub mod inet;
pub mod ring;
pub mod socket;

use crate::config::CharBackend;
use crate::logging;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::termios::{LocalFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use ring::Ring;
pub use socket::{Dialer, Listener, SocketFailure, SocketName, Source};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// A character device of the command line that could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{option}: {error}")]
pub struct ChardevError {
    option: &'static str,
    #[source]
    error: OpenFailure,
}

impl ChardevError {
    /// `option` is the one that asked for it.
    pub fn new(option: &'static str, error: OpenFailure) -> Self {
        Self { option, error }
    }
}

/// Why a character device could not be opened, in the words of an error reply.
#[derive(Debug, thiserror::Error)]
pub enum OpenFailure {
    /// A file, a FIFO, a terminal.
    #[error("Could not open '{what}': {}", .errno.desc())]
    File {
        /// Its name.
        what: String,
        /// What is wrong with it.
        errno: Errno,
    },
    /// A socket.
    #[error(transparent)]
    Socket(#[from] SocketFailure),
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
    Socket(SocketName),
}

impl Name {
    /// query-chardev's `filename`.
    pub fn filename(&self, connected: bool) -> String {
        match self {
            Self::Plain(name) => (*name).to_owned(),
            Self::Pty(path) => format!("pty:{}", path.display()),
            Self::Socket(name) => name.filename(connected),
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
    /// Connecting, and again when the connection has ended.
    Dialing(Dialer),
    /// Output stays in memory.
    Ring(Ring),
}

/// The two directions.
#[derive(Default)]
pub struct Streams {
    /// Bytes from outside.
    pub input: Option<OwnedFd>,
    /// Bytes to outside; `None` with an `input`: the same fd.
    pub output: Option<OwnedFd>,
    /// Kept open while the device lives: the other side of a pty, which would hang up otherwise.
    pub keep: Option<OwnedFd>,
    /// Whether they are a socket for datagrams, each of which counts as a whole.
    pub datagrams: bool,
}

impl Streams {
    /// One descriptor for both directions.
    pub fn both_ways(fd: OwnedFd) -> Self {
        Self {
            input: Some(fd),
            output: None,
            keep: None,
            datagrams: false,
        }
    }

    /// The same once more, without what is only kept.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        let copy = |fd: &Option<OwnedFd>| fd.as_ref().map(OwnedFd::try_clone).transpose();
        Ok(Self {
            input: copy(&self.input)?,
            output: copy(&self.output)?,
            keep: None,
            datagrams: self.datagrams,
        })
    }
}

/// Opens a backend of the command line, where the supervisor may still do everything itself. `option` is named in errors.
///
/// # Errors
/// One line that names the option and the path.
pub fn open(option: &'static str, backend: &CharBackend) -> Result<Opened, ChardevError> {
    let failed = |error| ChardevError::new(option, error);
    let opened = match backend {
        CharBackend::Socket(socket) => socket::open(socket).map_err(OpenFailure::from),
        CharBackend::Udp { remote, local } => socket::open_udp(remote, local.as_ref()).map_err(OpenFailure::from),
        other => open_file(other),
    };
    let opened = opened.map_err(failed)?;
    if let Name::Pty(path) = &*opened.name {
        logging::line(format_args!("char device redirected to {} ({option})", path.display()));
    }
    Ok(opened)
}

/// Opens what is not a socket.
///
/// # Errors
/// Which name could not be opened.
pub fn open_file(backend: &CharBackend) -> Result<Opened, OpenFailure> {
    let at = |what: &dyn std::fmt::Display| {
        let what = what.to_string();
        move |errno: Errno| OpenFailure::File { what, errno }
    };
    let plain = |name| Rc::new(Name::Plain(name));
    let (device, name) = match backend {
        CharBackend::Null => (Chardev::Null, plain("null")),
        CharBackend::Ring(size) => (Chardev::Ring(Ring::new(*size)), plain("ringbuf")),
        CharBackend::Stdio => {
            let copy = |fd: BorrowedFd<'_>| {
                let copy = fd.try_clone_to_owned();
                copy.map_err(|error| at(&"stdio")(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EMFILE))))
            };
            let streams = Streams {
                input: Some(copy(std::io::stdin().as_fd())?),
                output: Some(copy(std::io::stdout().as_fd())?),
                keep: None,
                datagrams: false,
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
                datagrams: false,
            };
            (Chardev::Connected(streams), plain("file"))
        }
        CharBackend::Pipe(path) => (
            Chardev::Connected(open_pipe(path).map_err(at(&path.display()))?),
            plain("pipe"),
        ),
        CharBackend::Pty => {
            let (streams, path) = open_pty().map_err(at(&"pty"))?;
            (Chardev::Connected(streams), Rc::new(Name::Pty(path)))
        }
        CharBackend::Socket(_) | CharBackend::Udp { .. } => return Err(at(&"socket")(Errno::EINVAL)),
    };
    Ok(Opened { device, name })
}

/// Opens a path without waiting for the other side of a FIFO: nobody may keep the supervisor waiting.
fn open_path(path: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o666);
    nix::fcntl::open(path, flags, mode)
}

/// Two FIFOs, `PATH.in` and `PATH.out`, or else one for both directions. Opened for both, each is open at once and never
/// comes to an end.
fn open_pipe(path: &Path) -> Result<Streams, Errno> {
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
        datagrams: false,
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
        datagrams: false,
    };
    Ok((streams, path))
}

/// Takes over a descriptor that the parent left open for us.
fn take_inherited(fd: i32) -> Result<OwnedFd, Errno> {
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
