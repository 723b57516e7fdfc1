//! Sockets behind character devices: those that listen, those that connect, and what query-chardev calls them.
//!
//! On the command line the supervisor makes them itself; for commands the opener does ([`crate::opener`]).

use super::{Chardev, Name, Opened, Streams, inet, take_inherited};
use crate::config::{Inet, Socket, SocketAddress, SocketRole};
use crate::opener::sockets;
use ipc::caps::ClientGivenFd;
use ipc::opener::{Address, OpenError, OpenRequest, OpenStep, OpenedSocket};
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Why a socket could not be opened, in the words of an error reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SocketFailure {
    /// The host has no (such) address.
    #[error("address resolution failed for {place}: Name or service not known ({why})")]
    Resolve {
        /// Host and port.
        place: String,
        /// What is known instead.
        why: inet::Unknown,
    },
    /// A Unix socket's path.
    #[error("UNIX socket path '{0}' is too long")]
    Path(String),
    /// It cannot be bound to a path.
    #[error("Failed to bind socket to {path}: {}", errno.desc())]
    BindPath {
        /// The path.
        path: String,
        /// What is wrong with it.
        errno: Errno,
    },
    /// Nobody answers.
    #[error("Failed to connect to '{place}': {}", errno.desc())]
    Connect {
        /// The path, or host and port.
        place: String,
        /// Why not.
        errno: Errno,
    },
    /// What was passed or inherited is no socket.
    #[error("File descriptor '{0}' is not a socket")]
    NotASocket(String),
    /// Neither a Unix nor a TCP socket.
    #[error("File descriptor '{0}' is neither a Unix nor a TCP socket")]
    Family(String),
    /// An inherited descriptor that is none.
    #[error("fd {fd}: {}", errno.desc())]
    Inherited {
        /// Its number.
        fd: i32,
        /// What is wrong with it.
        errno: Errno,
    },
    /// Anything else.
    #[error("{step}: {}", errno.desc())]
    Other {
        /// What failed.
        step: OpenStep,
        /// Why.
        errno: Errno,
    },
}

impl SocketFailure {
    /// `place` is the address as it was asked for.
    pub fn new(place: &str, is_path: bool, error: OpenError) -> Self {
        let errno = Errno::from_raw(error.errno);
        match error.step {
            OpenStep::Path => Self::Path(place.to_owned()),
            OpenStep::Bind | OpenStep::Stale if is_path => Self::BindPath {
                path: place.to_owned(),
                errno,
            },
            OpenStep::Connect => Self::Connect {
                place: place.to_owned(),
                errno,
            },
            OpenStep::NotASocket => Self::NotASocket(place.to_owned()),
            step => Self::Other { step, errno },
        }
    }
}

/// A request to open a socket, and what to make of the answer.
pub struct Plan {
    socket: Socket,
    place: String,
}

impl Plan {
    /// For a socket of the command line or of chardev-add. An inherited descriptor is not asked for.
    pub fn new(socket: &Socket) -> Self {
        let place = match &socket.address {
            SocketAddress::Unix(path) => path.display().to_string(),
            SocketAddress::Inet(inet) => inet.to_string(),
            SocketAddress::Inherited(fd) => fd.to_string(),
        };
        Self {
            socket: socket.clone(),
            place,
        }
    }

    /// For a socket that a client has passed.
    pub fn passed(name: &str, role: SocketRole) -> Self {
        Self {
            socket: Socket {
                address: SocketAddress::Inherited(-1),
                role,
                options: ipc::opener::TcpOptions::default(),
            },
            place: name.to_owned(),
        }
    }

    /// What is asked of [`sockets`].
    ///
    /// # Errors
    /// The host is not known, or an inherited descriptor is none.
    pub fn request(&self) -> Result<OpenRequest, SocketFailure> {
        let is_server = self.socket.is_server();
        Ok(match &self.socket.address {
            SocketAddress::Unix(path) => {
                let path = path.as_os_str().as_bytes().to_vec();
                if is_server {
                    OpenRequest::ListenUnix { path }
                } else {
                    OpenRequest::ConnectUnix { path }
                }
            }
            SocketAddress::Inet(inet) => {
                let addresses = resolve(inet, is_server)?;
                let options = self.socket.options;
                if is_server {
                    OpenRequest::ListenInet {
                        addresses,
                        last_port: inet.last_port,
                        options,
                    }
                } else {
                    OpenRequest::ConnectInet { addresses, options }
                }
            }
            SocketAddress::Inherited(fd) => OpenRequest::Adopt {
                fd: ClientGivenFd::new(
                    take_inherited(*fd).map_err(|errno| SocketFailure::Inherited { fd: *fd, errno })?,
                ),
                listen: is_server,
            },
        })
    }

    /// The failure in the words of a reply.
    pub fn failure(&self, error: OpenError) -> SocketFailure {
        SocketFailure::new(
            &self.place,
            matches!(self.socket.address, SocketAddress::Unix(_)),
            error,
        )
    }

    /// The device on an open socket.
    ///
    /// # Errors
    /// The socket that was passed is of no use.
    pub fn finish(&self, opened: OpenedSocket) -> Result<Opened, SocketFailure> {
        let OpenedSocket { socket, local, peer } = opened;
        let socket = socket.into_fd();
        if !self.socket.is_server() {
            let name = self.client_name();
            name.connected(&local, peer.as_ref());
            return Ok(Opened {
                device: Chardev::Connected(Streams::both_ways(socket)),
                name: Rc::new(Name::Socket(name)),
            });
        }
        let (socket, idle, shown) = match &local {
            Address::Unix(path) => {
                let address = match &self.socket.address {
                    SocketAddress::Unix(_) => format!("unix:{}", self.place),
                    _ if path.is_empty() => format!("fd:{}", self.place),
                    _ => format!("unix:{path}"),
                };
                (ListeningSocket::Unix(socket.into()), address.clone(), address)
            }
            Address::Inet(address) => {
                let idle = format!("tcp:{}:{}", address.ip(), address.port());
                (ListeningSocket::Tcp(socket.into()), idle, format!("tcp:{address}"))
            }
            Address::Other => return Err(SocketFailure::Family(self.place.clone())),
        };
        let made = match &self.socket.address {
            SocketAddress::Unix(path) => Some(path.clone()),
            SocketAddress::Inet(_) | SocketAddress::Inherited(_) => None,
        };
        let name = Rc::new(Name::Socket(SocketName {
            idle: format!("{idle},server=on"),
            connection: RefCell::new(format!("{shown},server=on")),
        }));
        let listener = Listener {
            socket,
            made,
            address: format!("{shown},server=on"),
            name: Rc::clone(&name),
        };
        Ok(Opened {
            device: Chardev::Listening(listener),
            name,
        })
    }

    fn client_name(&self) -> SocketName {
        let idle = match &self.socket.address {
            SocketAddress::Unix(_) => format!("unix:{}", self.place),
            SocketAddress::Inet(_) => format!("tcp:{}", self.place),
            SocketAddress::Inherited(_) => format!("fd:{}", self.place),
        };
        SocketName {
            connection: RefCell::new(idle.clone()),
            idle,
        }
    }

    /// The device that connects when it is time to, if it is to connect again and again.
    pub fn dialer(&self) -> Option<Opened> {
        let SocketRole::Client {
            reconnect: Some(interval),
        } = self.socket.role
        else {
            return None;
        };
        let name = Rc::new(Name::Socket(self.client_name()));
        let dialer = Dialer {
            plan: Self {
                socket: self.socket.clone(),
                place: self.place.clone(),
            },
            interval,
            due: Cell::new(Some(Instant::now())),
            failing: Cell::new(false),
            name: Rc::clone(&name),
        };
        Some(Opened {
            device: Chardev::Dialing(dialer),
            name,
        })
    }
}

fn resolve(inet: &Inet, is_server: bool) -> Result<Vec<SocketAddr>, SocketFailure> {
    inet::resolve(inet, is_server).map_err(|why| SocketFailure::Resolve {
        place: inet.to_string(),
        why,
    })
}

/// What is asked of [`sockets`] for datagrams.
///
/// # Errors
/// A host is not known.
pub fn udp_request(remote: &Inet, local: Option<&Inet>) -> Result<OpenRequest, SocketFailure> {
    let local = local.map(|local| resolve(local, true)).transpose()?;
    let mut to = remote.clone();
    if to.host.is_empty() {
        to.host.push_str("localhost");
    }
    Ok(OpenRequest::Datagram {
        remote: resolve(&to, false)?,
        local: local.unwrap_or_default(),
    })
}

/// The device on a socket for datagrams.
pub fn udp_device(opened: OpenedSocket) -> Opened {
    let streams = Streams {
        datagrams: true,
        ..Streams::both_ways(opened.socket.into_fd())
    };
    Opened {
        device: Chardev::Connected(streams),
        name: Rc::new(Name::Plain("udp")),
    }
}

/// Opens a socket of the command line.
pub(super) fn open(socket: &Socket) -> Result<Opened, SocketFailure> {
    let plan = Plan::new(socket);
    if let Some(opened) = plan.dialer() {
        return Ok(opened);
    }
    let opened = sockets::open(plan.request()?).map_err(|error| plan.failure(error))?;
    plan.finish(opened)
}

/// Opens a socket for datagrams of the command line.
pub(super) fn open_udp(remote: &Inet, local: Option<&Inet>) -> Result<Opened, SocketFailure> {
    let request = udp_request(remote, local)?;
    let opened = sockets::open(request).map_err(|error| SocketFailure::new(&remote.to_string(), false, error))?;
    Ok(udp_device(opened))
}

/// What query-chardev calls a socket.
pub struct SocketName {
    /// Without a connection: the address.
    idle: String,
    /// The latest connection.
    connection: RefCell<String>,
}

impl SocketName {
    pub(super) fn filename(&self, connected: bool) -> String {
        if connected {
            self.connection.borrow().clone()
        } else {
            format!("disconnected:{}", self.idle)
        }
    }

    /// A connection that was made from here. As in QEMU it has this side's name first: a Unix client has none.
    fn connected(&self, local: &Address, peer: Option<&Address>) {
        self.connection.replace(match (local, peer) {
            (Address::Inet(local), Some(Address::Inet(peer))) => format!("tcp:{local} <-> {peer}"),
            (Address::Unix(path), _) => format!("unix:{path}"),
            _ => self.idle.clone(),
        });
    }
}

/// A listening socket. The file it made is removed with it.
pub struct Listener {
    socket: ListeningSocket,
    made: Option<PathBuf>,
    address: String,
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
                let (stream, peer) = socket.accept().ok()?;
                if let Name::Socket(name) = &*self.name {
                    name.connection.replace(format!("{} <-> {peer}", self.address));
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

/// A socket that connects, and again some time after its connection has ended or an attempt has failed.
pub struct Dialer {
    plan: Plan,
    interval: Duration,
    /// When the next attempt is to begin; `None` while there is a connection, or an attempt.
    due: Cell<Option<Instant>>,
    /// Whether the last attempt has failed: only the first of several is logged.
    failing: Cell<bool>,
    name: Rc<Name>,
}

impl Dialer {
    /// When the next attempt is to begin.
    pub fn due(&self) -> Option<Instant> {
        self.due.get()
    }

    /// Whether it is time for an attempt. Whoever asks makes it.
    pub fn take_due(&self, now: Instant) -> bool {
        let is_due = self.due.get().is_some_and(|due| due <= now);
        if is_due {
            self.due.set(None);
        }
        is_due
    }

    /// What to ask the opener for.
    ///
    /// # Errors
    /// The host is not known (any more).
    pub fn request(&self) -> Result<OpenRequest, SocketFailure> {
        self.plan.request()
    }

    /// The attempt's end: the connection, or `None` and another attempt later.
    pub fn finish(&self, result: Result<OpenedSocket, SocketFailure>) -> Result<OwnedFd, Option<SocketFailure>> {
        match result {
            Ok(OpenedSocket { socket, local, peer }) => {
                self.failing.set(false);
                if let Name::Socket(name) = &*self.name {
                    name.connected(&local, peer.as_ref());
                }
                Ok(socket.into_fd())
            }
            Err(error) => {
                self.closed();
                Err((!self.failing.replace(true)).then_some(error))
            }
        }
    }

    /// A failure of the opener in the words of a reply.
    pub fn failure(&self, error: OpenError) -> SocketFailure {
        self.plan.failure(error)
    }

    /// The connection has ended.
    pub fn closed(&self) {
        self.due.set(Some(Instant::now() + self.interval));
    }
}

/// Where a device's next connection comes from.
pub enum Source {
    /// Clients connect.
    Listening(Listener),
    /// It connects to a server.
    Dialing(Dialer),
    /// There was one connection, and there will be no other.
    Spent,
}

impl Source {
    /// The connection has ended.
    pub fn closed(&self) {
        if let Self::Dialing(dialer) = self {
            dialer.closed();
        }
    }

    /// When it has to be looked after.
    pub fn due(&self) -> Option<Instant> {
        match self {
            Self::Dialing(dialer) => dialer.due(),
            Self::Listening(_) | Self::Spent => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::open;
    use super::*;
    use crate::config::CharBackend;
    use std::os::unix::net::UnixStream;

    fn server(path: &std::path::Path) -> CharBackend {
        CharBackend::Socket(Socket {
            address: SocketAddress::Unix(path.into()),
            role: SocketRole::Server { wait: false },
            options: ipc::opener::TcpOptions::default(),
        })
    }

    #[test]
    fn a_socket_file_goes_with_its_device_and_one_in_use_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let first = open("-qmp", &server(&path)).unwrap();
        let Err(error) = open("-qmp", &server(&path)) else {
            panic!("a busy socket was replaced")
        };
        let text = format!(
            "-qmp: Failed to bind socket to {}: Address already in use",
            path.display()
        );
        assert_eq!(error.to_string(), text);
        UnixStream::connect(&path).unwrap();
        drop(first);
        assert!(!path.exists(), "the socket file stayed");
    }

    #[test]
    fn a_dialer_tries_again_after_its_time_and_complains_once() {
        let socket = Socket {
            address: SocketAddress::Inet(Inet::new("127.0.0.1", 9)),
            role: SocketRole::Client {
                reconnect: Some(Duration::from_secs(3600)),
            },
            options: ipc::opener::TcpOptions::default(),
        };
        let Some(Opened {
            device: Chardev::Dialing(dialer),
            name,
        }) = Plan::new(&socket).dialer()
        else {
            panic!("no dialer")
        };
        assert_eq!(name.filename(false), "disconnected:tcp:127.0.0.1:9");
        let now = Instant::now();
        assert!(dialer.take_due(now) && !dialer.take_due(now), "one attempt at a time");
        let refused = || {
            let error = OpenError {
                step: OpenStep::Connect,
                errno: libc::ECONNREFUSED,
            };
            dialer.finish(Err(dialer.failure(error)))
        };
        let complaint = refused().unwrap_err().unwrap().to_string();
        assert_eq!(complaint, "Failed to connect to '127.0.0.1:9': Connection refused");
        assert!(refused().unwrap_err().is_none());
        assert!(!dialer.take_due(now));
        assert!(dialer.take_due(now + Duration::from_secs(7200)));
    }
}
