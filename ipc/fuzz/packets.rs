//! Packets of a fuzzer's making through a real channel: a socket, with descriptors.

use ipc::frame::{HEADER_BYTES, Header, MAX_BODY_BYTES};
use ipc::{Channel, IpcError, Message};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};

/// The first byte says which direction; packets follow.
pub fn both<To: Message, From: Message>(bytes: &[u8]) {
    let Some((direction, packets)) = bytes.split_first() else {
        return;
    };
    match direction & 1 {
        0 => one::<To>(packets),
        _ => one::<From>(packets),
    }
}

/// Sends packets, each with two bytes of length, one that says how many descriptors travel along (and more), and as many bytes.
fn one<In: Message>(mut rest: &[u8]) {
    let lowest = lowest_free();
    let (ours, theirs) = ipc::channel::pair().expect("socketpair");
    let mut channel = Channel::<In, In>::new(theirs);
    let file = std::fs::File::open("/dev/null").expect("/dev/null");
    for _ in 0..16 {
        let Some(([a, b, shape], after)) = rest.split_first_chunk() else {
            break;
        };
        let length = usize::from(u16::from_le_bytes([*a, *b]))
            .min(after.len())
            .min(MAX_BODY_BYTES);
        let (body, after) = after.split_at(length);
        rest = after;
        let fds = usize::from(shape & 31);
        if !send(&ours, &packet::<In>(body, fds, *shape), &vec![file.as_raw_fd(); fds]) {
            break;
        }
    }
    drop(ours);
    loop {
        match channel.recv() {
            // What has been understood can be said.
            Ok(message) => drop(channel.send(message)),
            Err(IpcError::Closed | IpcError::WouldBlock) => break,
            // The peer is ended for it.
            Err(_) => break,
        }
    }
    drop((channel, file));
    assert_eq!(lowest_free(), lowest, "a descriptor stays");
}

/// Mostly with a header that fits, or nothing behind it would ever be read.
fn packet<In: Message>(body: &[u8], fds: usize, shape: u8) -> Vec<u8> {
    if shape & 0x80 != 0 && body.len() >= HEADER_BYTES {
        return body.to_vec();
    }
    let header = Header {
        kind: In::KIND,
        body_bytes: body.len(),
        fds,
        more: shape & 0x40 != 0,
    };
    [&header.encode()[..], body].concat()
}

fn send(socket: &OwnedFd, bytes: &[u8], fds: &[i32]) -> bool {
    let message = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &message[..] };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None).is_ok()
}

fn lowest_free() -> i32 {
    nix::unistd::dup(std::io::stderr()).expect("dup").as_raw_fd()
}
