//! Making sockets: in the supervisor for the command line, in the opener for commands. None of them ever blocks.

use ipc::caps::SocketFd;
use ipc::opener::{Address, OpenError, OpenRequest, OpenStep, OpenedSocket, TcpOptions};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{KeepAlive, ReuseAddr, SocketError, TcpNoDelay};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, bind, connect, getpeername,
    getsockname, getsockopt, listen, setsockopt, socket,
};
use std::ffi::OsStr;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 128;
/// How long a connection may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// A socket, or one that will be.
pub enum Progress {
    /// It is open.
    Open(OpenedSocket),
    /// It is being connected.
    Connecting(Connecting),
}

/// A TCP connection under way.
pub struct Connecting {
    socket: OwnedFd,
    /// What else can be tried, in turn.
    rest: std::vec::IntoIter<SocketAddr>,
    options: TcpOptions,
    /// When it has taken too long.
    pub deadline: Instant,
}

impl AsFd for Connecting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn at(step: OpenStep) -> impl Fn(Errno) -> OpenError {
    move |errno| OpenError {
        step,
        errno: errno as i32,
    }
}

/// Opens a socket, or begins to.
///
/// # Errors
/// What failed.
pub fn begin(request: OpenRequest) -> Result<Progress, OpenError> {
    match request {
        OpenRequest::ListenUnix { path } => listen_unix(&path).map(Progress::Open),
        OpenRequest::ConnectUnix { path } => connect_unix(&path).map(Progress::Open),
        OpenRequest::ListenInet {
            addresses,
            last_port,
            options,
        } => listen_inet(&addresses, last_port, options).map(Progress::Open),
        OpenRequest::ConnectInet { addresses, options } => Connecting::begin(addresses, options),
        OpenRequest::Datagram { remote, local } => datagram(&remote, &local).map(Progress::Open),
        OpenRequest::Adopt { fd, listen } => adopt(fd.into_fd(), listen).map(Progress::Open),
    }
}

/// Opens a socket, and waits until it is connected. A stale socket file is replaced.
///
/// # Errors
/// What failed.
pub fn open(request: OpenRequest) -> Result<OpenedSocket, OpenError> {
    let path = listens_at(&request);
    match (open_once(request), path) {
        (Err(error), Some(path)) if error.step == OpenStep::Stale => {
            remove_stale(&path)?;
            open_once(OpenRequest::ListenUnix { path })
        }
        (result, _) => result,
    }
}

/// The path at which a socket is to listen.
pub fn listens_at(request: &OpenRequest) -> Option<Vec<u8>> {
    match request {
        OpenRequest::ListenUnix { path } => Some(path.clone()),
        _ => None,
    }
}

fn open_once(request: OpenRequest) -> Result<OpenedSocket, OpenError> {
    let mut progress = begin(request)?;
    loop {
        let connecting = match progress {
            Progress::Open(opened) => return Ok(opened),
            Progress::Connecting(connecting) => connecting,
        };
        let left = connecting.deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(connecting.as_fd(), PollFlags::POLLOUT)];
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        progress = match poll(&mut fds, timeout) {
            Ok(0) => return Err(connecting.timed_out()),
            Ok(_) => connecting.ready()?,
            Err(Errno::EINTR) => Progress::Connecting(connecting),
            Err(errno) => return Err(at(OpenStep::Connect)(errno)),
        };
    }
}

fn new(family: AddressFamily, kind: SockType) -> Result<OwnedFd, OpenError> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(family, kind, flags, None).map_err(at(OpenStep::Create))
}

fn family(address: &SocketAddr) -> AddressFamily {
    match address {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// The socket and its addresses.
fn opened(socket: OwnedFd) -> Result<OpenedSocket, OpenError> {
    let local = getsockname::<SockaddrStorage>(socket.as_raw_fd()).map_err(at(OpenStep::Create))?;
    let peer = getpeername::<SockaddrStorage>(socket.as_raw_fd()).ok();
    Ok(OpenedSocket {
        socket: SocketFd::new(socket),
        local: address(&local),
        peer: peer.as_ref().map(address),
    })
}

fn address(storage: &SockaddrStorage) -> Address {
    if let Some(address) = storage.as_sockaddr_in() {
        return Address::Inet(SocketAddrV4::new(address.ip(), address.port()).into());
    }
    if let Some(address) = storage.as_sockaddr_in6() {
        return Address::Inet(SocketAddrV6::new(address.ip(), address.port(), 0, address.scope_id()).into());
    }
    // An address without a path is that of a socket without a name.
    let is_unix = storage.family() == Some(AddressFamily::Unix);
    match storage.as_unix_addr().and_then(UnixAddr::path) {
        Some(path) => Address::Unix(path.display().to_string()),
        None if is_unix => Address::Unix(String::new()),
        None => Address::Other,
    }
}

fn unix_address(path: &[u8]) -> Result<UnixAddr, OpenError> {
    UnixAddr::new(OsStr::from_bytes(path)).map_err(at(OpenStep::Path))
}

fn listen_unix(path: &[u8]) -> Result<OpenedSocket, OpenError> {
    let address = unix_address(path)?;
    let socket = new(AddressFamily::Unix, SockType::Stream)?;
    bind(socket.as_raw_fd(), &address).map_err(|errno| {
        let step = if errno == Errno::EADDRINUSE && nobody_listens(&address) {
            OpenStep::Stale
        } else {
            OpenStep::Bind
        };
        at(step)(errno)
    })?;
    start_listening(&socket, OpenStep::Listen)?;
    opened(socket)
}

/// Whether nobody listens at a path; there may be a file that is no socket.
fn nobody_listens(address: &UnixAddr) -> bool {
    new(AddressFamily::Unix, SockType::Stream)
        .is_ok_and(|socket| connect(socket.as_raw_fd(), address) == Err(Errno::ECONNREFUSED))
}

/// For an answer of [`OpenStep::Stale`]: removes the socket at a path that nobody listens at, as QEMU does; one that is in
/// use, or a file, is left alone. For the supervisor: the opener can remove nothing.
///
/// # Errors
/// There is something else at the path, or it cannot be removed.
pub fn remove_stale(path: &[u8]) -> Result<(), OpenError> {
    let path = Path::new(OsStr::from_bytes(path));
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    if !is_socket {
        return Err(at(OpenStep::Bind)(Errno::EADDRINUSE));
    }
    nix::unistd::unlink(path).map_err(at(OpenStep::Bind))
}

fn start_listening(socket: &OwnedFd, step: OpenStep) -> Result<(), OpenError> {
    let backlog = Backlog::new(BACKLOG).unwrap_or(Backlog::MAXCONN);
    listen(socket, backlog).map_err(at(step))
}

fn connect_unix(path: &[u8]) -> Result<OpenedSocket, OpenError> {
    let address = unix_address(path)?;
    let socket = new(AddressFamily::Unix, SockType::Stream)?;
    connect(socket.as_raw_fd(), &address).map_err(at(OpenStep::Connect))?;
    opened(socket)
}

fn listen_inet(addresses: &[SocketAddr], last_port: u16, options: TcpOptions) -> Result<OpenedSocket, OpenError> {
    let mut failure = at(OpenStep::FindPort)(Errno::EADDRINUSE);
    for first in addresses {
        let last = last_port.max(first.port());
        for port in first.port()..=last {
            let mut address = *first;
            address.set_port(port);
            match listen_at(&address) {
                // What is accepted inherits the options.
                Ok(socket) => return connected(socket, options),
                Err(error) if error.errno == Errno::EADDRINUSE as i32 => {
                    failure = at(OpenStep::FindPort)(Errno::EADDRINUSE);
                }
                Err(error) => {
                    failure = error;
                    break;
                }
            }
        }
    }
    Err(failure)
}

fn listen_at(address: &SocketAddr) -> Result<OwnedFd, OpenError> {
    let socket = new(family(address), SockType::Stream)?;
    setsockopt(&socket, ReuseAddr, &true).map_err(at(OpenStep::Create))?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(*address)).map_err(at(OpenStep::Bind))?;
    start_listening(&socket, OpenStep::Listen)?;
    Ok(socket)
}

impl Connecting {
    fn begin(addresses: Vec<SocketAddr>, options: TcpOptions) -> Result<Progress, OpenError> {
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        Self::try_next(addresses.into_iter(), options, deadline, Errno::EADDRNOTAVAIL)
    }

    /// Tries addresses until one is connected, or may yet be.
    fn try_next(
        mut rest: std::vec::IntoIter<SocketAddr>,
        options: TcpOptions,
        deadline: Instant,
        mut failure: Errno,
    ) -> Result<Progress, OpenError> {
        while let Some(address) = rest.next() {
            let socket = new(family(&address), SockType::Stream)?;
            match connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
                Ok(()) => return connected(socket, options).map(Progress::Open),
                Err(Errno::EINPROGRESS | Errno::EINTR) => {
                    return Ok(Progress::Connecting(Self {
                        socket,
                        rest,
                        options,
                        deadline,
                    }));
                }
                Err(errno) => failure = errno,
            }
        }
        Err(at(OpenStep::Connect)(failure))
    }

    /// The socket can be written to: the connection is there, or has failed and the next address is tried.
    ///
    /// # Errors
    /// None answers.
    pub fn ready(self) -> Result<Progress, OpenError> {
        match getsockopt(&self.socket, SocketError).map_err(at(OpenStep::Connect))? {
            0 => connected(self.socket, self.options).map(Progress::Open),
            errno => Self::try_next(self.rest, self.options, self.deadline, Errno::from_raw(errno)),
        }
    }

    /// What to tell when the deadline has passed.
    pub fn timed_out(self) -> OpenError {
        at(OpenStep::Connect)(Errno::ETIMEDOUT)
    }
}

fn connected(socket: OwnedFd, options: TcpOptions) -> Result<OpenedSocket, OpenError> {
    if options.no_delay {
        setsockopt(&socket, TcpNoDelay, &true).map_err(at(OpenStep::Connect))?;
    }
    if options.keep_alive {
        setsockopt(&socket, KeepAlive, &true).map_err(at(OpenStep::Connect))?;
    }
    opened(socket)
}

fn datagram(remote: &[SocketAddr], local: &[SocketAddr]) -> Result<OpenedSocket, OpenError> {
    let anywhere: [SocketAddr; 2] = [(Ipv4Addr::UNSPECIFIED, 0).into(), (Ipv6Addr::UNSPECIFIED, 0).into()];
    let local = if local.is_empty() { &anywhere[..] } else { local };
    let pairs = remote.iter().flat_map(|remote| {
        let same_family = local.iter().filter(|local| local.is_ipv4() == remote.is_ipv4());
        same_family.map(move |local| (remote, local))
    });
    let mut failure = at(OpenStep::Bind)(Errno::EAFNOSUPPORT);
    for (remote, local) in pairs {
        match datagram_between(local, remote) {
            Ok(socket) => return opened(socket),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

fn datagram_between(local: &SocketAddr, remote: &SocketAddr) -> Result<OwnedFd, OpenError> {
    let socket = new(family(remote), SockType::Datagram)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(*local)).map_err(at(OpenStep::Bind))?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(*remote)).map_err(at(OpenStep::Connect))?;
    Ok(socket)
}

fn adopt(fd: OwnedFd, listen: bool) -> Result<OpenedSocket, OpenError> {
    getsockname::<SockaddrStorage>(fd.as_raw_fd()).map_err(at(OpenStep::NotASocket))?;
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(at(OpenStep::NotASocket))?;
    if listen {
        start_listening(&fd, OpenStep::ListenOnFd)?;
    }
    opened(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};
    use std::os::unix::net::{UnixListener, UnixStream};

    fn bytes(path: &Path) -> Vec<u8> {
        path.as_os_str().as_bytes().to_vec()
    }

    fn inet(address: &Address) -> SocketAddr {
        match address {
            Address::Inet(address) => *address,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn step(result: Result<OpenedSocket, OpenError>) -> (OpenStep, Errno) {
        match result {
            Err(OpenError { step, errno }) => (step, Errno::from_raw(errno)),
            Ok(opened) => panic!("{opened:?}"),
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_a_busy_one_and_a_file_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let listen = || open(OpenRequest::ListenUnix { path: bytes(&path) });
        let first = listen().unwrap();
        assert_eq!(first.local, Address::Unix(path.display().to_string()));
        assert_eq!(step(listen()), (OpenStep::Bind, Errno::EADDRINUSE));
        UnixStream::connect(&path).unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "kept").unwrap();
        let at_file = open(OpenRequest::ListenUnix { path: bytes(&file) });
        assert_eq!(step(at_file), (OpenStep::Bind, Errno::EADDRINUSE));
        assert_eq!(std::fs::read(&file).unwrap(), b"kept");
        let long = open(OpenRequest::ConnectUnix { path: vec![b'x'; 200] });
        assert_eq!(step(long), (OpenStep::Path, Errno::ENAMETOOLONG));
    }

    #[test]
    fn a_client_takes_the_first_address_that_answers() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let there = listener.local_addr().unwrap();
        // Nobody listens at a port that was just free.
        let nobody = {
            let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            free.local_addr().unwrap()
        };
        let options = TcpOptions {
            no_delay: true,
            keep_alive: true,
        };
        let connect = |addresses| open(OpenRequest::ConnectInet { addresses, options });
        let opened = connect(vec![nobody, there]).unwrap();
        let (_, from) = listener.accept().unwrap();
        assert_eq!(
            (inet(&opened.local), opened.peer.as_ref().map(inet)),
            (from, Some(there))
        );
        assert!(getsockopt(&opened.socket, TcpNoDelay).unwrap() && getsockopt(&opened.socket, KeepAlive).unwrap());
        assert_eq!(step(connect(vec![nobody])), (OpenStep::Connect, Errno::ECONNREFUSED));
    }

    #[test]
    fn a_server_takes_the_first_port_that_is_free() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = taken.local_addr().unwrap();
        let listen = |last_port| {
            let addresses = vec![address];
            let options = TcpOptions::default();
            open(OpenRequest::ListenInet {
                addresses,
                last_port,
                options,
            })
        };
        assert_eq!(step(listen(0)), (OpenStep::FindPort, Errno::EADDRINUSE));
        if let Some(last) = address.port().checked_add(50) {
            let opened = inet(&listen(last).unwrap().local);
            assert!(opened.port() > address.port() && opened.port() <= last, "{opened}");
        }
        let elsewhere = open(OpenRequest::ListenInet {
            addresses: vec!["192.0.2.1:0".parse().unwrap()],
            last_port: 0,
            options: TcpOptions::default(),
        });
        assert_eq!(step(elsewhere), (OpenStep::Bind, Errno::EADDRNOTAVAIL));
    }

    #[test]
    fn a_datagram_socket_has_one_peer_of_its_own_family() {
        let peer = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let remote = peer.local_addr().unwrap();
        let opened = open(OpenRequest::Datagram {
            remote: vec![(Ipv6Addr::LOCALHOST, remote.port()).into(), remote],
            local: vec![(Ipv4Addr::LOCALHOST, 0).into()],
        })
        .unwrap();
        let socket = UdpSocket::from(opened.socket.into_fd());
        socket.send(b"hello").unwrap();
        let mut buffer = [0; 10];
        let (length, from) = peer.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from), (&b"hello"[..], inet(&opened.local)));
        let families = open(OpenRequest::Datagram {
            remote: vec![remote],
            local: vec![(Ipv6Addr::LOCALHOST, 0).into()],
        });
        assert_eq!(step(families), (OpenStep::Bind, Errno::EAFNOSUPPORT));
    }

    #[test]
    fn what_a_client_passes_must_be_a_socket_and_may_be_made_to_listen() {
        let adopt = |fd: OwnedFd, listen| {
            let fd = ipc::caps::ClientGivenFd::new(fd);
            open(OpenRequest::Adopt { fd, listen })
        };
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(step(adopt(null.into(), false)), (OpenStep::NotASocket, Errno::ENOTSOCK));
        let (one, _other) = UnixStream::pair().unwrap();
        let connected = one.try_clone().unwrap();
        assert_eq!(
            step(adopt(connected.into(), true)),
            (OpenStep::ListenOnFd, Errno::EINVAL)
        );
        assert_eq!(adopt(one.into(), false).unwrap().local, Address::Unix(String::new()));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let adopted = adopt(listener.into(), true).unwrap();
        assert_eq!(inet(&adopted.local), address);
        std::net::TcpStream::connect(address).unwrap();
    }
}
