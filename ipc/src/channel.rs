//! One end of a channel: packets over a `SOCK_SEQPACKET` socket.

use crate::frame::{HEADER_BYTES, Header, MAX_BODY_BYTES, MAX_FDS, MAX_PACKET_BYTES};
use crate::{IpcError, Message, codec};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, RecvMsg, SockFlag, SockType, recvmsg, socketpair,
};
use sendfd::SendWithFd;
use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;

/// The kernel passes at most this many fds in one packet (SCM_MAX_FD). The control buffer has room for all of them, so
/// that a hostile packet can never be truncated with descriptors left over that nobody would close.
const SCM_MAX_FD: usize = 253;

/// How many messages may wait for a slow peer.
pub const MAX_QUEUED: usize = 1024;

/// How many bytes of messages may wait for a slow peer before the last of them: one of any size may.
pub const MAX_QUEUED_BYTES: usize = 32 << 20;

/// A connected pair of channel sockets, close-on-exec: the supervisor's end and the helper's.
///
/// # Errors
/// When the process is out of file descriptors.
pub fn pair() -> Result<(OwnedFd, OwnedFd), IpcError> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(IpcError::system("socketpair"))
}

/// A message that is being sent: its packets not yet taken by the kernel, and the message itself, which owns the fds.
struct Pending<Out> {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<RawFd>,
    started: bool,
    _message: Out,
}

/// One end: sends `Out`, receives `In`.
pub struct Channel<Out, In> {
    /// Really `SOCK_SEQPACKET`; std's datagram type is only the wrapper that sendfd accepts.
    socket: UnixDatagram,
    queue: VecDeque<Pending<Out>>,
    queued_bytes: usize,
    buffer: Box<[u8]>,
    partial: Vec<u8>,
    partial_fds: Vec<OwnedFd>,
    incoming: PhantomData<fn() -> In>,
}

impl<Out, In> AsFd for Channel<Out, In> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<Out: Message, In: Message> Channel<Out, In> {
    /// Takes over a connected socket. It blocks unless the caller made it non-blocking.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket: socket.into(),
            queue: VecDeque::new(),
            queued_bytes: 0,
            buffer: vec![0; MAX_PACKET_BYTES + 1].into_boxed_slice(),
            partial: Vec::new(),
            partial_fds: Vec::new(),
            incoming: PhantomData,
        }
    }

    /// Sends a message, or queues it when the socket is non-blocking and full (call [`Self::flush`] when it is writable).
    /// The message's fds are closed here once the kernel has them.
    ///
    /// # Errors
    /// [`IpcError::TooLarge`], [`IpcError::Overflow`], [`IpcError::Closed`] or a system error.
    pub fn send(&mut self, message: Out) -> Result<(), IpcError> {
        let (bytes, fds) = codec::encode(&message, Out::MAX_BYTES)?;
        if fds.len() > MAX_FDS {
            return Err(IpcError::Fds {
                got: fds.len(),
                wanted: MAX_FDS,
            });
        }
        if self.queue.len() >= MAX_QUEUED || self.queued_bytes >= MAX_QUEUED_BYTES {
            return Err(IpcError::Overflow {
                queued: self.queue.len(),
                limit: MAX_QUEUED,
            });
        }
        self.queued_bytes += bytes.len();
        self.queue.push_back(Pending {
            bytes,
            sent: 0,
            fds,
            started: false,
            _message: message,
        });
        match self.flush() {
            Err(IpcError::WouldBlock) => Ok(()),
            other => other,
        }
    }

    /// Whether messages wait for the socket to become writable.
    pub fn wants_write(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Sends what is queued.
    ///
    /// # Errors
    /// [`IpcError::WouldBlock`] when something is left, otherwise as [`Self::send`].
    pub fn flush(&mut self) -> Result<(), IpcError> {
        while let Some(pending) = self.queue.front_mut() {
            while !pending.started || pending.sent < pending.bytes.len() {
                let end = pending.bytes.len().min(pending.sent + MAX_BODY_BYTES);
                let chunk = &pending.bytes[pending.sent..end];
                let fds = if pending.started { &[][..] } else { &pending.fds[..] };
                let header = Header {
                    kind: Out::KIND,
                    body_bytes: chunk.len(),
                    fds: fds.len(),
                    more: end < pending.bytes.len(),
                };
                send_packet(&self.socket, &header, chunk, fds)?;
                pending.started = true;
                pending.sent = end;
            }
            self.queued_bytes -= pending.bytes.len();
            self.queue.pop_front();
        }
        Ok(())
    }

    /// Receives one message.
    ///
    /// # Errors
    /// [`IpcError::WouldBlock`] on an empty non-blocking socket; [`IpcError::Closed`] when the peer is gone; anything
    /// else means that the peer broke the protocol.
    pub fn recv(&mut self) -> Result<In, IpcError> {
        loop {
            let (length, fds) = recv_packet(self.socket.as_fd(), &mut self.buffer)?;
            if length == 0 {
                return Err(IpcError::Closed);
            }
            let (header, body) = Header::decode(&self.buffer[..length])?;
            if header.kind != In::KIND {
                return Err(IpcError::Frame("message of another channel"));
            }
            if header.fds != fds.len() {
                return Err(IpcError::Fds {
                    got: fds.len(),
                    wanted: header.fds,
                });
            }
            if self.partial.is_empty() && !header.more {
                return codec::decode(body, fds, In::MAX_BYTES);
            }
            if !self.partial.is_empty() && !fds.is_empty() {
                return Err(IpcError::Frame("file descriptors on a later chunk"));
            }
            if header.more && body.len() != MAX_BODY_BYTES {
                return Err(IpcError::Frame("a chunk that is not full before the last"));
            }
            let size = self.partial.len() + body.len();
            if size > In::MAX_BYTES {
                return Err(IpcError::TooLarge {
                    size,
                    limit: In::MAX_BYTES,
                });
            }
            self.partial.extend_from_slice(body);
            self.partial_fds.extend(fds);
            if !header.more {
                let body = std::mem::take(&mut self.partial);
                return codec::decode(&body, std::mem::take(&mut self.partial_fds), In::MAX_BYTES);
            }
        }
    }
}

fn send_packet(socket: &UnixDatagram, header: &Header, body: &[u8], fds: &[RawFd]) -> Result<(), IpcError> {
    let mut packet = Vec::with_capacity(HEADER_BYTES + body.len());
    packet.extend_from_slice(&header.encode());
    packet.extend_from_slice(body);
    loop {
        // One packet is taken whole or not at all. Rust programs ignore SIGPIPE.
        let Err(error) = socket.send_with_fd(&packet, fds) else {
            return Ok(());
        };
        match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
            Errno::EINTR => {}
            Errno::EAGAIN => return Err(IpcError::WouldBlock),
            Errno::EPIPE | Errno::ECONNRESET => return Err(IpcError::Closed),
            errno => return Err(IpcError::System { call: "sendmsg", errno }),
        }
    }
}

fn recv_packet(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), IpcError> {
    let mut control = nix::cmsg_space!([RawFd; SCM_MAX_FD]);
    let mut parts = [IoSliceMut::new(buffer)];
    let received: RecvMsg<'_, '_, ()> = loop {
        match recvmsg(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Ok(received) => break received,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Err(IpcError::WouldBlock),
            Err(Errno::ECONNRESET) => return Err(IpcError::Closed),
            Err(errno) => return Err(IpcError::System { call: "recvmsg", errno }),
        }
    };
    let mut fds = Vec::new();
    for message in received.cmsgs().map_err(IpcError::system("recvmsg: control data"))? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just installed these descriptors for us and nothing else knows their numbers.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if received.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(IpcError::Frame("packet larger than the limit"));
    }
    Ok((received.bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::DiskFd;
    use serde::{Deserialize, Serialize};

    #[derive(Debug, Serialize, Deserialize)]
    enum Test {
        Disks(Vec<DiskFd>),
        Bytes(Vec<u8>),
    }
    impl Message for Test {
        const KIND: u16 = 999;
        const MAX_BYTES: usize = 1 << 20;
    }

    fn channels() -> (Channel<Test, Test>, Channel<Test, Test>) {
        let (a, b) = pair().unwrap();
        (Channel::new(a), Channel::new(b))
    }

    fn disk() -> DiskFd {
        DiskFd::new(std::fs::File::open("/dev/null").unwrap().into())
    }

    #[test]
    fn fds_arrive_typed_and_close_on_exec() {
        let (mut a, mut b) = channels();
        a.send(Test::Disks(vec![disk(), disk()])).unwrap();
        let Test::Disks(disks) = b.recv().unwrap() else {
            panic!("wrong message")
        };
        assert_eq!(disks.len(), 2);
        let flags = nix::fcntl::fcntl(&disks[0], nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, nix::libc::FD_CLOEXEC);
    }

    #[test]
    fn a_large_message_travels_in_chunks() {
        let (mut a, mut b) = channels();
        let payload: Vec<u8> = (0..500_000u32).map(|i| i as u8).collect();
        let sent = payload.clone();
        let sender = std::thread::spawn(move || a.send(Test::Bytes(sent)).map(|()| a));
        let Test::Bytes(received) = b.recv().unwrap() else {
            panic!("wrong message")
        };
        assert_eq!(received, payload);
        sender.join().unwrap().unwrap();
    }

    #[test]
    fn more_than_sixteen_fds_are_refused_by_the_sender() {
        let (mut a, _b) = channels();
        assert!(matches!(
            a.send(Test::Disks((0..17).map(|_| disk()).collect())),
            Err(IpcError::Fds { .. })
        ));
    }

    #[test]
    fn surplus_fds_end_the_peer_and_are_closed() {
        let (a, b) = pair().unwrap();
        let mut b = Channel::<Test, Test>::new(b);
        let (bytes, _) = codec::encode(&Test::Bytes(vec![1]), 100).unwrap();
        let header = Header {
            kind: Test::KIND,
            body_bytes: bytes.len(),
            fds: 1,
            more: false,
        };
        let (reader, writer) = nix::unistd::pipe().unwrap();
        send_packet(&a.into(), &header, &bytes, &[writer.as_raw_fd()]).unwrap();
        drop(writer);
        assert!(matches!(b.recv(), Err(IpcError::Fds { got: 1, wanted: 0 })));
        // End of file: the last write end is closed.
        assert_eq!(nix::unistd::read(&reader, &mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn hostile_lengths_are_errors_not_allocations() {
        let (a, b) = pair().unwrap();
        let mut b = Channel::<Test, Test>::new(b);
        let mut body = 1u32.to_le_bytes().to_vec();
        body.extend(u64::MAX.to_le_bytes());
        let header = Header {
            kind: Test::KIND,
            body_bytes: body.len(),
            fds: 0,
            more: false,
        };
        send_packet(&a.into(), &header, &body, &[]).unwrap();
        assert!(matches!(b.recv(), Err(IpcError::Codec(_))));
    }

    #[test]
    fn a_message_over_its_limit_is_not_sent() {
        let (mut a, _b) = channels();
        assert!(matches!(
            a.send(Test::Bytes(vec![0; 2 << 20])),
            Err(IpcError::TooLarge { .. })
        ));
    }

    #[test]
    fn what_waits_for_a_peer_that_does_not_read_is_bounded_in_number_and_in_bytes() {
        for (size, most) in [(0, MAX_QUEUED), (1 << 20, 34)] {
            let (mut a, _b) = channels();
            let flag = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
            nix::fcntl::fcntl(&a, flag).unwrap();
            // What the socket itself takes comes on top.
            let limit = most + 2000;
            let sent = (0..limit).take_while(|_| a.send(Test::Bytes(vec![0; size - size / 64])).is_ok());
            assert!(sent.count() < limit, "{size}");
            assert!(matches!(a.send(Test::Bytes(vec![])), Err(IpcError::Overflow { .. })));
            assert!(a.queued_bytes <= MAX_QUEUED_BYTES + (1 << 20));
        }
    }

    #[test]
    fn a_closed_peer_is_told_apart_from_an_empty_one() {
        let (a, mut b) = channels();
        drop(a);
        assert!(matches!(b.recv(), Err(IpcError::Closed)));
    }
}
