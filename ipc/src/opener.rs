//! Supervisor ↔ opener, the process that makes sockets once the supervisor has sealed itself.
//!
//! Host names are resolved before: what travels are numbers and paths. Every request gets one [`FromOpener`] of its id,
//! connections that take their time after others that were asked for later.

use crate::caps::{ClientGivenFd, SocketFd};
use crate::message::{Message, Request, RequestId};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;

/// To the opener.
pub type ToOpener = Request<OpenRequest>;

impl Message for ToOpener {
    const KIND: u16 = 0x50;
}
impl Message for FromOpener {
    const KIND: u16 = 0x51;
}

/// What is to be opened.
#[derive(Debug, Serialize, Deserialize)]
pub enum OpenRequest {
    /// A Unix socket that listens at a path. Where nobody listens any more, that is the answer: the supervisor removes
    /// the file if it is a socket, and asks again.
    ListenUnix {
        /// The path's bytes.
        path: Vec<u8>,
    },
    /// A Unix socket that is connected to the one at a path.
    ConnectUnix {
        /// The path's bytes.
        path: Vec<u8>,
    },
    /// A TCP socket that listens at the first address that can be had.
    ListenInet {
        /// The addresses; a port of 0 is chosen by the system.
        addresses: Vec<SocketAddr>,
        /// The last port to try when those before it are in use; not above the addresses' own: that alone.
        last_port: u16,
        /// What is asked of its connections.
        options: TcpOptions,
    },
    /// A TCP socket that is connected to the first address that answers.
    ConnectInet {
        /// The addresses.
        addresses: Vec<SocketAddr>,
        /// What is asked of the connection.
        options: TcpOptions,
    },
    /// A UDP socket with one peer.
    Datagram {
        /// The peer's addresses: the first that has the family of a local one is used.
        remote: Vec<SocketAddr>,
        /// Where it is bound to; empty: any address of the peer's family.
        local: Vec<SocketAddr>,
    },
    /// A socket that a client has passed: looked at, and made to listen.
    Adopt {
        /// The fd; it may be no socket at all.
        fd: ClientGivenFd,
        /// Whether it is to listen; otherwise it is connected.
        listen: bool,
    },
}

/// Options of a TCP connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpOptions {
    /// Small pieces are sent at once.
    pub no_delay: bool,
    /// The kernel asks a silent peer now and then whether it is still there.
    pub keep_alive: bool,
}

/// From the opener: the answer to a request.
#[derive(Debug, Serialize, Deserialize)]
pub struct FromOpener {
    /// The request's id.
    pub id: RequestId,
    /// What came of it.
    pub result: Result<OpenedSocket, OpenError>,
}

/// An open socket, which never blocks.
#[derive(Debug, Serialize, Deserialize)]
pub struct OpenedSocket {
    /// The socket.
    pub socket: SocketFd,
    /// Its own address.
    pub local: Address,
    /// The address of the other side, where it is connected.
    pub peer: Option<Address>,
}

/// An address of a socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Address {
    /// A Unix socket's path; empty where it has none.
    Unix(String),
    /// TCP or UDP.
    Inet(SocketAddr),
    /// Something else.
    Other,
}

/// Why a socket could not be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{step}: {}", std::io::Error::from_raw_os_error(*errno))]
pub struct OpenError {
    /// What failed.
    pub step: OpenStep,
    /// The system's error.
    pub errno: i32,
}

/// What can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OpenStep {
    /// The path is too long for a Unix socket's address.
    Path,
    /// Making the socket.
    Create,
    /// Binding it.
    Bind,
    /// Binding it: what is at the path is no socket that anybody listens at.
    Stale,
    /// All ports that may be used are in use.
    FindPort,
    /// Listening.
    Listen,
    /// Connecting.
    Connect,
    /// A client's fd is no socket.
    NotASocket,
    /// A client's socket does not listen.
    ListenOnFd,
    /// The opener has ended, or has too much to do.
    Opener,
}

impl fmt::Display for OpenStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Path => "the path of the socket is too long",
            Self::Create => "Failed to create a socket",
            Self::Bind | Self::Stale => "Failed to bind socket",
            Self::FindPort => "Failed to find an available port",
            Self::Listen => "Failed to listen on socket",
            Self::Connect => "Failed to connect",
            Self::NotASocket => "the file descriptor is not a socket",
            Self::ListenOnFd => "Failed to listen on fd socket",
            Self::Opener => "the process that opens sockets has failed",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::{Channel, pair};

    #[test]
    fn a_request_and_its_answer_arrive_as_they_were_sent() {
        let (here, there) = pair().unwrap();
        let mut supervisor = Channel::<ToOpener, FromOpener>::new(here);
        let mut opener = Channel::<FromOpener, ToOpener>::new(there);
        let id = RequestId(7);
        let addresses = vec!["127.0.0.1:7".parse().unwrap(), "[::1]:7".parse().unwrap()];
        let body = OpenRequest::ListenInet {
            addresses: addresses.clone(),
            last_port: 9,
            options: TcpOptions::default(),
        };
        supervisor.send(Request { id, body }).unwrap();
        let Request { body, .. } = opener.recv().unwrap();
        assert!(
            matches!(body, OpenRequest::ListenInet { addresses: got, last_port: 9, .. } if got == addresses),
            "the request has changed"
        );
        let (socket, _other) = pair().unwrap();
        let opened = OpenedSocket {
            socket: SocketFd::new(socket),
            local: Address::Unix("/s".into()),
            peer: Some(Address::Inet(addresses[1])),
        };
        let answer = FromOpener { id, result: Ok(opened) };
        opener.send(answer).unwrap();
        let answer = supervisor.recv().unwrap();
        assert_eq!(answer.id, id);
        let opened = answer.result.unwrap();
        assert_eq!(opened.local, Address::Unix("/s".into()));
        assert_eq!(opened.peer, Some(Address::Inet(addresses[1])));
    }
}
