//! The host's sockets by inode: what they are, and which Unix socket each is connected to.

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;

/// One socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    /// `seqpacket`, `unix-stream`, `unix-datagram`, `tcp`, `udp`.
    pub kind: &'static str,
    /// The inode of the other end.
    pub peer: Option<u32>,
}

/// All that this caller sees, by inode.
#[derive(Debug, Default)]
pub struct Sockets(BTreeMap<u32, Socket>);

impl Sockets {
    /// The socket of a descriptor, by its link (`socket:[INODE]`).
    pub fn of(&self, link: &str) -> Option<&Socket> {
        self.0.get(&inode(link)?)
    }
}

/// The inode in a socket's link.
pub fn inode(link: &str) -> Option<u32> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Reads all sockets of the supervisor's network namespace. What cannot be read is not there.
pub fn all(supervisor: i32) -> Sockets {
    let mut sockets = Sockets(unix().unwrap_or_default());
    for (file, kind) in [("tcp", "tcp"), ("tcp6", "tcp"), ("udp", "udp"), ("udp6", "udp")] {
        let text = std::fs::read_to_string(format!("/proc/{supervisor}/net/{file}")).unwrap_or_default();
        let inodes = text
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().nth(9)?.parse().ok());
        sockets
            .0
            .extend(inodes.map(|inode| (inode, Socket { kind, peer: None })));
    }
    sockets
}

/// SOCK_DIAG_BY_FAMILY, and the header's length of what is sent and received.
const BY_FAMILY: u16 = 20;
const HEADER_BYTES: usize = 16;
/// Bytes of `struct unix_diag_msg`.
const MESSAGE_BYTES: usize = 16;
/// UDIAG_SHOW_PEER and UNIX_DIAG_PEER.
const SHOW_PEER: u32 = 4;
const PEER: u16 = 2;

/// Asks sock_diag(7) for all Unix sockets.
fn unix() -> nix::Result<BTreeMap<u32, Socket>> {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    let mut request = Vec::new();
    // struct nlmsghdr: length, type, NLM_F_REQUEST | NLM_F_DUMP, sequence, port.
    request.extend(40u32.to_ne_bytes());
    request.extend(BY_FAMILY.to_ne_bytes());
    request.extend(0x301u16.to_ne_bytes());
    request.extend([0; 8]);
    // struct unix_diag_req: family, protocol, padding, states, inode, what to show, cookie.
    request.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    request.extend(u32::MAX.to_ne_bytes());
    request.extend(0u32.to_ne_bytes());
    request.extend(SHOW_PEER.to_ne_bytes());
    request.extend([0; 8]);
    send(netlink.as_raw_fd(), &request, MsgFlags::empty())?;
    let mut found = BTreeMap::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let length = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        while let Some(header) = rest.get(..HEADER_BYTES) {
            let size = word(header, 0) as usize;
            let Some(message) = rest.get(HEADER_BYTES..size) else {
                break;
            };
            if half(header, 4) != BY_FAMILY {
                // NLMSG_DONE or an error.
                return Ok(found);
            }
            found.extend(unix_socket(message));
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .map_or(0, |of| u32::from_ne_bytes([of[0], of[1], of[2], of[3]]))
}

fn half(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |of| u16::from_ne_bytes([of[0], of[1]]))
}

/// One `struct unix_diag_msg` with its attributes.
fn unix_socket(message: &[u8]) -> Option<(u32, Socket)> {
    let kind = match i32::from(*message.get(1)?) {
        libc::SOCK_STREAM => "unix-stream",
        libc::SOCK_DGRAM => "unix-datagram",
        libc::SOCK_SEQPACKET => "seqpacket",
        _ => return None,
    };
    let mut attributes = message.get(MESSAGE_BYTES..)?;
    let mut peer = None;
    while attributes.len() >= 4 {
        let size = usize::from(half(attributes, 0));
        if half(attributes, 2) == PEER && size >= 8 {
            peer = Some(word(attributes, 4)).filter(|inode| *inode != 0);
        }
        attributes = attributes.get(size.max(4).next_multiple_of(4)..).unwrap_or_default();
    }
    Some((word(message, 4), Socket { kind, peer }))
}
