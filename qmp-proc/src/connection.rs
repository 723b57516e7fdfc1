//! The process's only system calls after sealing: the client's fds, the channel, and waiting for both.

use crate::json::{Printer, Reader};
use crate::session::{Session, SessionError};
use ipc::caps::ClientGivenFd;
use ipc::message::FromHelper;
use ipc::qmp::{FromQmp, QmpError, ToQmp};
use ipc::{Channel, IpcError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Bytes read from the client at a time.
const READ_BYTES: usize = 16 << 10;
/// Bytes of text prepared for the client at a time.
const WRITE_BYTES: usize = 32 << 10;
/// A pipe that polls writable takes this much without blocking (PIPE_BUF).
const PIPE_WRITE_BYTES: usize = 4096;
/// The kernel passes at most this many fds in one message (SCM_MAX_FD).
const SCM_MAX_FD: usize = 253;
/// How long the last answers may take to leave once the supervisor has closed the channel, milliseconds without progress.
const LINGER_MS: u16 = 1000;

/// Why a connection ended otherwise than by its client's or the supervisor's leaving.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The channel broke, or its peer broke the protocol.
    #[error("channel: {0}")]
    Channel(#[from] IpcError),
    /// The session cannot go on.
    #[error("{0}")]
    Session(#[from] SessionError),
    /// The client sent more file descriptors than this process may hold.
    #[error("the client sent more file descriptors than fit; connection ended")]
    TooManyFds,
    /// A message that has no place here.
    #[error("unexpected request from the supervisor")]
    UnexpectedRequest,
    /// A system call failed.
    #[error("{0}: {1}")]
    System(&'static str, Errno),
}

/// One client's connection.
pub struct Connection {
    input: OwnedFd,
    /// The output side, when it is another fd.
    output: Option<OwnedFd>,
    /// Whether the sides are sockets; a stdio monitor's are pipes or a terminal. Assumed until the kernel says otherwise.
    input_is_socket: bool,
    output_is_socket: bool,
    /// Read but not parsed: `read[parsed..]`.
    read: Vec<u8>,
    parsed: usize,
    /// No more input will come.
    end_of_input: bool,
    /// The input side has reported a hang-up, and will go on doing so.
    hang_up_seen: bool,
    /// The client is gone altogether: answers reach nobody.
    gone: bool,
    printer: Option<Printer>,
    /// Printed but not sent: `text[sent..]`.
    text: Vec<u8>,
    sent: usize,
    /// The fd that the client sent last: the first of its message. It stays until a command takes it or the client sends
    /// another.
    received: Option<ClientGivenFd>,
}

impl Connection {
    /// A connection over a socket, or over two fds.
    pub fn new(input: OwnedFd, output: Option<OwnedFd>) -> Self {
        Self {
            input,
            output,
            input_is_socket: true,
            output_is_socket: true,
            read: Vec::new(),
            parsed: 0,
            end_of_input: false,
            hang_up_seen: false,
            gone: false,
            printer: None,
            text: Vec::new(),
            sent: 0,
            received: None,
        }
    }

    /// Serves the client until it leaves or the channel closes.
    ///
    /// # Errors
    /// [`ConnectionError`].
    pub fn serve(
        mut self,
        channel: &mut Channel<FromQmp, ToQmp>,
        mut session: Session,
        mut reader: Reader,
    ) -> Result<(), ConnectionError> {
        loop {
            self.parse(&mut session, &mut reader);
            self.forward(channel, &mut session)?;
            self.send(&mut session)?;
            if self.is_over(&session) {
                return Ok(());
            }
            if session.wants_input() && self.parsed < self.read.len() {
                continue;
            }
            if self.wait(channel.as_fd(), &session)? {
                match channel.recv() {
                    Ok(ToQmp::Return { call, result }) => session.returned(call, result)?,
                    Ok(ToQmp::Event(event)) => session.event(&event)?,
                    Ok(ToQmp::Request(_)) => return Err(ConnectionError::UnexpectedRequest),
                    Err(IpcError::Closed) => return self.finish(&mut session),
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }

    /// Parses what has been read, as far as the session takes it.
    fn parse(&mut self, session: &mut Session, reader: &mut Reader) {
        while session.wants_input() && self.parsed < self.read.len() {
            let mut rest = &self.read[self.parsed..];
            let message = reader.next(&mut rest);
            self.parsed = self.read.len() - rest.len();
            if let Some(message) = message {
                session.input(message);
            }
        }
        if self.parsed == self.read.len() {
            self.read.clear();
            self.parsed = 0;
        }
    }

    /// Whether nothing is left to do: no more requests can come, and the answers are sent or have no reader.
    fn is_over(&self, session: &Session) -> bool {
        let all_answered = session.is_idle() && self.all_sent();
        self.end_of_input && self.read.is_empty() && (all_answered || self.gone && !session.has_waiting())
    }

    fn all_sent(&self) -> bool {
        self.printer.is_none() && self.sent == self.text.len()
    }

    /// Waits for the channel, the client, or room for output. Reads from the client; tells whether the channel has
    /// something.
    fn wait(&mut self, channel: BorrowedFd<'_>, session: &Session) -> Result<bool, ConnectionError> {
        let wants_input = !self.end_of_input && self.read.is_empty() && session.wants_input();
        // Without interest in input the poll still tells of a hang-up, which is good to know once.
        let watch_input = wants_input || !self.hang_up_seen && !self.end_of_input;
        let wants_output = !self.all_sent();
        let mut interest = PollFlags::empty();
        interest.set(PollFlags::POLLIN, wants_input);
        let mut fds = vec![PollFd::new(channel, PollFlags::POLLIN)];
        if watch_input {
            fds.push(PollFd::new(self.input.as_fd(), interest));
        }
        if wants_output {
            fds.push(PollFd::new(self.output_fd(), PollFlags::POLLOUT));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(ConnectionError::System("poll", errno)),
        }
        let happened = |fd: &PollFd<'_>| fd.revents().unwrap_or(PollFlags::empty());
        let on_channel = !happened(&fds[0]).is_empty();
        let on_input = if watch_input {
            happened(&fds[1])
        } else {
            PollFlags::empty()
        };
        drop(fds);
        if on_input.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) {
            self.hang_up_seen = true;
            // The end of an input pipe says nothing about the output.
            self.gone |= self.output.is_none();
            // One look at what is left, so that a client that only left is not waited for.
            if self.read.is_empty() {
                self.receive()?;
            }
        } else if on_input.contains(PollFlags::POLLIN) {
            self.receive()?;
        }
        Ok(on_channel)
    }

    /// Reads once from the client.
    fn receive(&mut self) -> Result<(), ConnectionError> {
        self.read.resize(READ_BYTES, 0);
        let result = if self.input_is_socket {
            self.receive_message()
        } else {
            self.read_bytes()
        };
        let length = match result {
            Ok(0) => {
                self.end_of_input = true;
                0
            }
            Ok(length) => length,
            Err(ConnectionError::System(_, Errno::ENOTSOCK)) => {
                self.input_is_socket = false;
                return self.receive();
            }
            Err(ConnectionError::System(_, Errno::EAGAIN | Errno::EINTR)) => 0,
            Err(ConnectionError::System(_, Errno::ECONNRESET | Errno::EIO)) => {
                self.end_of_input = true;
                self.gone = true;
                0
            }
            Err(error) => return Err(error),
        };
        self.read.truncate(length);
        self.parsed = 0;
        Ok(())
    }

    fn receive_message(&mut self) -> Result<usize, ConnectionError> {
        let mut control = nix::cmsg_space!([RawFd; SCM_MAX_FD]);
        let mut parts = [IoSliceMut::new(&mut self.read)];
        let received = recvmsg::<()>(
            self.input.as_raw_fd(),
            &mut parts,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
        )
        .map_err(|errno| ConnectionError::System("recvmsg", errno))?;
        // nix reports a truncated control message as an error here. There is room for all that the kernel passes, so only
        // this process's own limit can have cut it short.
        let messages = received.cmsgs().map_err(|_| ConnectionError::TooManyFds)?;
        for message in messages {
            if let ControlMessageOwned::ScmRights(raw) = message {
                // SAFETY: the kernel has just installed these descriptors for us and nothing else knows their numbers.
                let mut fds = raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
                if let Some(first) = fds.next() {
                    self.received = Some(ClientGivenFd::new(first));
                }
                // The others of this message are closed here.
                fds.for_each(drop);
            }
        }
        Ok(received.bytes)
    }

    fn read_bytes(&mut self) -> Result<usize, ConnectionError> {
        nix::unistd::read(&self.input, &mut self.read).map_err(|errno| ConnectionError::System("read", errno))
    }

    fn output_fd(&self) -> BorrowedFd<'_> {
        self.output.as_ref().unwrap_or(&self.input).as_fd()
    }

    /// Prints and sends what the client takes now.
    fn send(&mut self, session: &mut Session) -> Result<(), ConnectionError> {
        loop {
            if self.gone {
                // Nobody reads it.
                while session.next_output().is_some() {}
                self.printer = None;
                self.text.clear();
                self.sent = 0;
            }
            while self.text.len() < WRITE_BYTES {
                match &mut self.printer {
                    Some(printer) => {
                        printer.fill(&mut self.text, WRITE_BYTES);
                        if printer.is_finished() {
                            self.printer = None;
                        }
                    }
                    None => match session.next_output() {
                        Some(message) => self.printer = Some(Printer::new(message, session.setup().pretty)),
                        None => break,
                    },
                }
            }
            if self.text.is_empty() {
                return Ok(());
            }
            match self.write_bytes() {
                Ok(length) => self.sent += length,
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
                Err(Errno::EPIPE | Errno::ECONNRESET | Errno::EIO) => {
                    self.gone = true;
                    continue;
                }
                Err(errno) => return Err(ConnectionError::System("sending to the client", errno)),
            }
            if self.sent == self.text.len() {
                self.text.clear();
                self.sent = 0;
            }
        }
    }

    /// Sends once, without blocking.
    fn write_bytes(&mut self) -> nix::Result<usize> {
        let text = &self.text[self.sent..];
        if self.output_is_socket {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(self.output_fd().as_raw_fd(), &[IoSlice::new(text)], &[], flags, None) {
                Err(Errno::ENOTSOCK) => {}
                result => return result,
            }
            self.output_is_socket = false;
        }
        let mut room = [PollFd::new(self.output_fd(), PollFlags::POLLOUT)];
        if poll(&mut room, PollTimeout::ZERO)? == 0 {
            return Err(Errno::EAGAIN);
        }
        nix::unistd::write(
            self.output_fd(),
            &self.text[self.sent..][..PIPE_WRITE_BYTES.min(self.text.len() - self.sent)],
        )
    }

    /// The supervisor has closed the channel: the last answers leave (that of `quit`), then the connection ends.
    fn finish(mut self, session: &mut Session) -> Result<(), ConnectionError> {
        loop {
            self.send(session)?;
            if self.all_sent() {
                return Ok(());
            }
            let mut room = [PollFd::new(self.output_fd(), PollFlags::POLLOUT)];
            match poll(&mut room, LINGER_MS) {
                // It does not read.
                Ok(0) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(ConnectionError::System("poll", errno)),
            }
        }
    }

    /// Sends the session's calls to the supervisor, with the client's fd for a command that takes it.
    fn forward(&mut self, channel: &mut Channel<FromQmp, ToQmp>, session: &mut Session) -> Result<(), ConnectionError> {
        while let Some(mut call) = session.next_call() {
            let number = call.call;
            if call.command.takes_fd() {
                call.fd = self.received.take();
            }
            match channel.send(FromHelper::Event(call)) {
                Ok(()) => {}
                Err(IpcError::TooLarge { size, limit }) => {
                    let error = format!("The command's arguments take {size} bytes, at most {limit} are possible");
                    session.returned(number, Err(QmpError::generic(error)))?;
                }
                // Its last messages are still to be read.
                Err(IpcError::Closed) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
