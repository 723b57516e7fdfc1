//! Packets as they lie on a channel, and what can be done to them.

use super::rng::Rng;
use ipc::{Channel, Message};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// One packet: header, body and descriptors.
#[derive(Debug)]
pub struct Frame {
    /// Header and body.
    pub bytes: Vec<u8>,
    /// What travels along.
    pub fds: Vec<OwnedFd>,
}

/// Sends one packet, without waiting.
///
/// # Errors
/// The system's.
pub fn send(socket: &OwnedFd, bytes: &[u8], fds: &[RawFd]) -> Result<(), Errno> {
    let message = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &message[..] };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None).map(drop)
}

/// Receives one packet, without waiting; nothing where none is there.
///
/// # Errors
/// The system's. At the end of the channel a packet without bytes is returned.
pub fn receive(socket: &OwnedFd) -> Result<Option<Frame>, Errno> {
    let mut bytes = vec![0; ipc::frame::MAX_PACKET_BYTES];
    let mut control = nix::cmsg_space!([RawFd; 253]);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let (length, fds) = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let received = match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
            Ok(received) => received,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        let mut fds = Vec::new();
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = message {
                // SAFETY: new descriptors that nobody else knows.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        (received.bytes, fds)
    };
    bytes.truncate(length);
    Ok(Some(Frame { bytes, fds }))
}

/// The packets of a message. A message of more than a few is cut: what is wanted here are frames, and a socket of ours takes
/// only so many.
///
/// # Panics
/// When this process is out of descriptors.
pub fn of<M: Message>(message: M) -> Vec<Frame> {
    let (ours, theirs) = ipc::channel::pair().expect("socketpair");
    nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).expect("O_NONBLOCK");
    let mut channel = Channel::<M, M>::new(ours);
    if channel.send(message).is_err() {
        return Vec::new();
    }
    std::iter::from_fn(|| receive(&theirs).ok().flatten()).collect()
}

/// Changes a frame so that it is almost one: a bit, a number, the length, the kind, the number of descriptors, the end.
pub fn mutate(rng: &mut Rng, frame: &mut Frame) {
    for _ in 0..=rng.below(3) {
        let length = frame.bytes.len();
        if length == 0 {
            return;
        }
        let at = rng.below(length);
        match rng.below(9) {
            0 => frame.bytes[at] ^= 1 << rng.below(8),
            1 => frame.bytes[at] = rng.any() as u8,
            2 => frame.bytes.truncate(at),
            3 => frame.bytes.extend((0..rng.below(64)).map(|_| rng.any() as u8)),
            // Eight bytes of a number that matters: often the length of a list.
            4 => {
                let numbers = [u64::MAX, 1 << 62, 1 << 32, 1 << 20, 0, i64::MAX as u64];
                let number = numbers[rng.below(numbers.len())].to_le_bytes();
                let end = length.min(at + 8);
                frame.bytes[at..end].copy_from_slice(&number[..end - at]);
            }
            // In the header: kind, length, descriptors, flags.
            5 => {
                let at = rng.below(length.min(16));
                frame.bytes[at] = rng.any() as u8;
            }
            6 => drop(frame.fds.pop()),
            7 => {
                let more = rng.below(20);
                frame.fds.extend((0..more).map(|_| super::descriptors::any(rng)));
            }
            _ => {
                let copy = frame.bytes[at..length.min(at + 64)].to_vec();
                frame.bytes.splice(at..at, copy);
            }
        }
    }
    // The length in the header is right most of the time, or nothing behind the header would ever be reached.
    if frame.bytes.len() >= 16 && !rng.once_in(4) {
        let body = (frame.bytes.len() - 16) as u32;
        frame.bytes[8..12].copy_from_slice(&body.to_le_bytes());
        frame.bytes[12..14].copy_from_slice(&(frame.fds.len() as u16).to_le_bytes());
    }
    frame.bytes.truncate(ipc::frame::MAX_PACKET_BYTES + 100);
    frame.fds.truncate(200);
}
