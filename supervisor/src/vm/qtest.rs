//! `-qtest`: the part of QEMU's qtest protocol that means something without a guest, its clock. One line a command, one line
//! an answer.
//!
//! The clock is of virtual nanoseconds and moves only by these commands. Nothing else of Bulkhead looks at it.

use crate::chardev::{Chardev, Listener};
use crate::sys::Poller;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, sendmsg};
use std::cell::{Cell, RefCell};
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Bytes of the longest command line.
const MAX_LINE_BYTES: usize = 4096;

/// The server of one client at a time.
#[derive(Default)]
pub struct Qtest {
    listener: Option<Listener>,
    client: RefCell<Option<Client>>,
    clock_ns: Cell<i64>,
}

struct Client {
    stream: OwnedFd,
    /// The beginning of a line.
    line: Vec<u8>,
}

impl Qtest {
    /// On an open character device.
    pub fn new(device: Chardev) -> Self {
        let (listener, stream) = match device {
            Chardev::Null | Chardev::Ring(_) => (None, None),
            Chardev::Connected(streams) => (None, streams.input),
            Chardev::Listening(listener) => (Some(listener), None),
        };
        let client = stream.map(Client::new);
        Self {
            listener,
            client: RefCell::new(client),
            clock_ns: Cell::new(0),
        }
    }

    /// Whether a client is connected.
    pub fn is_connected(&self) -> bool {
        self.client.borrow().is_some()
    }

    /// Registers what it waits for.
    pub fn watch<T>(&self, poller: &mut Poller<T>, token: T) {
        match (&*self.client.borrow(), &self.listener) {
            (Some(client), _) => poller.add(client.stream.as_fd(), libc::POLLIN, token),
            (None, Some(listener)) => poller.add(listener.as_fd(), libc::POLLIN, token),
            (None, None) => {}
        }
    }

    /// Something has come: a client, or a piece of what it says.
    pub fn ready(&self) {
        let mut slot = self.client.borrow_mut();
        let Some(client) = &mut *slot else {
            *slot = self.listener.as_ref().and_then(Listener::accept).map(Client::new);
            return;
        };
        if !client.take_in(|line| self.answer(line)) {
            *slot = None;
        }
    }

    fn answer(&self, line: &str) -> String {
        let mut words = line.split_ascii_whitespace();
        let command = words.next().unwrap_or_default();
        let number = words.next().map(parse_number);
        let now = self.clock_ns.get();
        let moved = match (command, number) {
            // Without a number: to the next timer. There is none.
            ("clock_step", None) => Some(now),
            ("clock_step", Some(Some(step))) => now.checked_add(step).filter(|_| step >= 0),
            ("clock_set", Some(Some(time))) => Some(time.max(now)),
            ("clock_step" | "clock_set", _) => None,
            _ => return format!("FAIL Unknown command '{command}'\n"),
        };
        match moved {
            Some(time) => {
                self.clock_ns.set(time);
                format!("OK {time}\n")
            }
            None => "FAIL invalid time\n".to_owned(),
        }
    }
}

impl Client {
    fn new(stream: OwnedFd) -> Self {
        Self {
            stream,
            line: Vec::new(),
        }
    }

    /// Reads once and answers the lines that are complete. Returns whether the client is still there.
    fn take_in(&mut self, answer: impl Fn(&str) -> String) -> bool {
        let mut bytes = [0; MAX_LINE_BYTES];
        let count = match recv(self.stream.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return false,
            Ok(count) => count,
            Err(Errno::EAGAIN | Errno::EINTR) => return true,
            Err(_) => return false,
        };
        self.line.extend_from_slice(&bytes[..count]);
        while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            let answer = answer(String::from_utf8_lossy(&line).trim_end());
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let pieces = [IoSlice::new(answer.as_bytes())];
            // One that reads no answers has no use for the rest of them.
            if sendmsg::<()>(self.stream.as_raw_fd(), &pieces, &[], flags, None) != Ok(answer.len()) {
                return false;
            }
        }
        self.line.len() <= MAX_LINE_BYTES
    }
}

/// Decimal, or hexadecimal after 0x.
fn parse_number(word: &str) -> Option<i64> {
    match word.strip_prefix("0x") {
        Some(digits) => i64::from_str_radix(digits, 16).ok(),
        None => word.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chardev::Streams;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_clock_moves_by_command_alone_and_never_back() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let qtest = Qtest::new(Chardev::Connected(Streams {
            input: Some(theirs.into()),
            output: None,
            keep: None,
        }));
        let mut replies = BufReader::new(ours.try_clone().unwrap()).lines();
        for (command, expected) in [
            ("clock_step", "OK 0"),
            ("clock_step 1000", "OK 1000"),
            ("clock_set 0x1000", "OK 4096"),
            ("clock_set 5", "OK 4096"),
            ("clock_step -1", "FAIL invalid time"),
            ("clock_step 9223372036854775807", "FAIL invalid time"),
            ("readb 0", "FAIL Unknown command 'readb'"),
        ] {
            // In two pieces: a line is complete when its end is there.
            let (first, rest) = command.split_at(3);
            ours.write_all(first.as_bytes()).unwrap();
            qtest.ready();
            ours.write_all(format!("{rest}\n").as_bytes()).unwrap();
            qtest.ready();
            assert_eq!(replies.next().unwrap().unwrap(), expected, "{command}");
        }
        drop((ours, replies));
        qtest.ready();
        assert!(!qtest.is_connected());
    }
}
