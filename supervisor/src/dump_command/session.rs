//! A connection to a monitor: one command at a time, and what the server says by itself.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;
use sendfd::SendWithFd;
use serde_json::{Value, json};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A server that serves somebody else does not even greet.
const GREETING: Duration = Duration::from_secs(5);
/// A machine that is busy answers late, but it answers.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest line that is taken, bytes.
const MAX_LINE: usize = 1 << 20;

/// Why the conversation ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Nobody is there.
    #[error("{}: {}; is that the socket of a machine that runs with -qmp unix:PATH,server=on,wait=off?", .0.display(), super::describe(.1))]
    Connect(PathBuf, std::io::Error),
    /// Somebody is there, but busy.
    #[error("{}: no greeting within {} s; perhaps another client is connected", .0.display(), GREETING.as_secs())]
    Busy(PathBuf),
    /// Not a monitor.
    #[error("{} is not the socket of a QMP monitor", .0.display())]
    NoMonitor(PathBuf),
    /// The server said no.
    #[error("{0}")]
    Refused(String),
    /// The server is gone.
    #[error("the machine has closed the connection: there is no dump")]
    Closed,
    /// It says nothing any more.
    #[error("the machine does not answer {0}")]
    Silent(String),
    /// The system's error.
    #[error("the monitor's socket: {0}")]
    Socket(#[from] std::io::Error),
}

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// Time, or something that the server said.
    Enough,
    /// A signal.
    Interrupted,
}

/// A negotiated connection.
pub struct Session {
    stream: UnixStream,
    /// Read and not yet taken apart.
    buffer: Vec<u8>,
    /// Why a dump has failed, by the latest event that said so.
    failure: Option<String>,
}

impl Session {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// See [`SessionError`].
    pub fn connect(path: &Path) -> Result<Self, SessionError> {
        let stream = UnixStream::connect(path).map_err(|error| SessionError::Connect(path.into(), error))?;
        let mut session = Self {
            stream,
            buffer: Vec::new(),
            failure: None,
        };
        match session.message(GREETING) {
            Ok(Some(greeting)) if greeting["QMP"].is_object() => {}
            Ok(None) => return Err(SessionError::Busy(path.into())),
            Ok(Some(_)) | Err(_) => return Err(SessionError::NoMonitor(path.into())),
        }
        session.execute("qmp_capabilities", json!({}))?;
        Ok(session)
    }

    /// Carries out a command: what it returns.
    ///
    /// # Errors
    /// See [`SessionError`].
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, SessionError> {
        let text = request(command, arguments);
        self.stream.write_all(text.as_bytes()).map_err(gone)?;
        self.answer(command)
    }

    /// Carries out a command with a descriptor.
    ///
    /// # Errors
    /// See [`SessionError`].
    pub fn pass(&mut self, command: &str, arguments: Value, fd: OwnedFd) -> Result<Value, SessionError> {
        let text = request(command, arguments);
        let sent = self
            .stream
            .send_with_fd(text.as_bytes(), &[fd.as_raw_fd()])
            .map_err(gone)?;
        self.stream.write_all(&text.as_bytes()[sent..]).map_err(gone)?;
        self.answer(command)
    }

    fn answer(&mut self, command: &str) -> Result<Value, SessionError> {
        let begun = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(begun.elapsed());
            let Some(mut message) = self.message(left)? else {
                return Err(SessionError::Silent(command.to_owned()));
            };
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = message.get("error") {
                let text = error["desc"].as_str().unwrap_or("refused without a reason");
                return Err(SessionError::Refused(text.to_owned()));
            }
            self.note(&message);
        }
    }

    fn note(&mut self, event: &Value) {
        if event["event"] == "DUMP_COMPLETED" {
            self.failure = event["data"]["error"].as_str().map(str::to_owned);
        }
    }

    /// Why the dump failed, if the server has said so.
    pub fn failure(&mut self) -> Option<String> {
        self.failure.take()
    }

    /// Waits so long, until the server says something, or until there is a signal.
    ///
    /// # Errors
    /// See [`SessionError`].
    pub fn wait(&mut self, longest: Duration, signals: &SignalFd) -> Result<Waited, SessionError> {
        let timeout = PollTimeout::try_from(longest).unwrap_or(PollTimeout::MAX);
        let mut fds = [
            PollFd::new(self.stream.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        let ready = poll(&mut fds, timeout).map_err(std::io::Error::from)?;
        let has = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let (said, signalled) = (has(&fds[0]), has(&fds[1]));
        if signalled {
            return Ok(Waited::Interrupted);
        }
        if ready > 0 && said {
            while let Some(event) = self.message(Duration::ZERO)? {
                self.note(&event);
            }
        }
        Ok(Waited::Enough)
    }

    /// The next message; `None`: there is none in this time.
    fn message(&mut self, longest: Duration) -> Result<Option<Value>, SessionError> {
        let begun = Instant::now();
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                let message = serde_json::from_slice(&line);
                return Ok(Some(message.map_err(std::io::Error::from)?));
            }
            if self.buffer.len() > MAX_LINE {
                return Err(std::io::Error::from(ErrorKind::InvalidData).into());
            }
            let left = longest.saturating_sub(begun.elapsed());
            // A wait of less than a millisecond rounds to none.
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(nix::errno::Errno::EINTR) => continue,
                Err(errno) => return Err(std::io::Error::from(errno).into()),
            }
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece).map_err(gone)? {
                0 => return Err(SessionError::Closed),
                count => self.buffer.extend_from_slice(&piece[..count]),
            }
        }
    }
}

/// A server that has ended is no mystery.
fn gone(error: std::io::Error) -> SessionError {
    match error.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => SessionError::Closed,
        _ => SessionError::Socket(error),
    }
}

fn request(command: &str, arguments: Value) -> String {
    let mut request = json!({"execute": command});
    if arguments.as_object().is_some_and(|arguments| !arguments.is_empty()) {
        request["arguments"] = arguments;
    }
    format!("{request}\n")
}
