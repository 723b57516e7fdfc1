//! The real executable without launcher or stage-1 filter; the test plays the supervisor and the client.
#![allow(dead_code)] // Every test binary uses its part.

use ipc::caps::ClientFd;
use ipc::channel::Channel;
use ipc::message::{FromHelper, Request, RequestId};
use ipc::narrowing::Allow;
use ipc::qmp::{
    Command, Event, FromQmp, MonitorSetup, QmpCall, QmpError, QmpReply, QmpRequest, Return, TimedEvent, ToQmp,
};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, setsockopt, socketpair, sockopt,
};
use nix::sys::time::TimeVal;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long the process may be silent without working, and how long it may work (its own processor time, which other
/// programs on a busy machine do not use up) for one answer.
pub const DEADLINE: Duration = Duration::from_secs(20);
pub const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": "Bulkhead test"}, "capabilities": ["oob"]}}"#;

/// The supervisor's side of one process.
pub struct Process {
    pub child: Child,
    pub channel: Channel<ToQmp, FromQmp>,
    log: UnixDatagram,
    listener: Option<ipc::caps::SeccompListener>,
    next_id: u64,
}

/// The client's side of a connection.
pub struct Client {
    pub stream: UnixStream,
    pub received: Vec<u8>,
    /// The process that serves it.
    server: u32,
}

impl Process {
    /// Started, set up and sealed: a spare.
    pub fn spare(pretty: bool) -> Self {
        Self::narrow_spare(pretty, Allow::All)
    }

    /// A spare of a monitor that has these commands.
    pub fn narrow_spare(pretty: bool, allow: Allow) -> Self {
        let (ours, theirs) = ipc::channel::pair().unwrap();
        setsockopt(
            &ours,
            sockopt::ReceiveTimeout,
            &TimeVal::new(DEADLINE.as_secs() as i64, 0),
        )
        .unwrap();
        let (log, log_theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let child = std::process::Command::new(env!("CARGO_BIN_EXE_qmp-proc"))
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::from(log_theirs.try_clone().unwrap()))
            .stderr(Stdio::from(log_theirs))
            .spawn()
            .unwrap();
        let log = UnixDatagram::from(log);
        log.set_nonblocking(true).unwrap();
        let mut process = Self {
            child,
            channel: Channel::new(ours),
            log,
            listener: None,
            next_id: 1,
        };
        let package = "Bulkhead test".to_owned();
        assert!(matches!(
            process.ask(QmpRequest::Setup(MonitorSetup { pretty, package, allow })),
            QmpReply::Done
        ));
        match process.ask(QmpRequest::Seal) {
            QmpReply::Sealed { listener, .. } => process.listener = Some(listener),
            QmpReply::Done | QmpReply::Description(_) => panic!("not sealed"),
        }
        process
    }

    /// A process and its client, over a socket.
    pub fn serving(pretty: bool) -> (Self, Client) {
        let mut process = Self::spare(pretty);
        let (ours, theirs) = UnixStream::pair().unwrap();
        process.serve(theirs.into(), None);
        let client = Client::new(ours, &process);
        (process, client)
    }

    /// A process and a client that has read the greeting and negotiated.
    pub fn negotiated() -> (Self, Client) {
        let (process, mut client) = Self::serving(false);
        assert_eq!(client.line(), GREETING);
        assert_eq!(client.ask(r#"{"execute": "qmp_capabilities"}"#), r#"{"return": {}}"#);
        (process, client)
    }

    pub fn serve(&mut self, input: OwnedFd, output: Option<OwnedFd>) {
        let request = QmpRequest::Serve {
            input: ClientFd::new(input),
            output: output.map(ClientFd::new),
        };
        assert!(matches!(self.ask(request), QmpReply::Done));
    }

    pub fn ask(&mut self, body: QmpRequest) -> QmpReply {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.channel.send(ToQmp::Request(Request { id, body })).unwrap();
        match self.channel.recv() {
            Ok(FromHelper::Reply { id: answered, result }) => {
                assert_eq!(answered, id);
                result.unwrap()
            }
            Ok(FromHelper::Event(call)) => panic!("a call instead of an answer: {call:?}"),
            Err(error) => panic!("{error}; log: {:?}", self.log_lines()),
        }
    }

    /// The client's next command, as it reaches the supervisor.
    pub fn call(&mut self) -> (u64, Command) {
        match self.channel.recv() {
            Ok(FromHelper::Event(QmpCall { call, command, fd })) => {
                assert!(fd.is_none(), "an fd with {command:?}");
                (call, command)
            }
            Ok(FromHelper::Reply { .. }) => panic!("an answer to nothing"),
            Err(error) => panic!("{error}; log: {:?}", self.log_lines()),
        }
    }

    /// The client's next command and the fd that came with it.
    pub fn call_with_fd(&mut self) -> (u64, Command, Option<OwnedFd>) {
        match self.channel.recv() {
            Ok(FromHelper::Event(QmpCall { call, command, fd })) => {
                (call, command, fd.map(ipc::caps::ClientGivenFd::into_fd))
            }
            other => panic!("{other:?}; log: {:?}", self.log_lines()),
        }
    }

    pub fn answer(&mut self, call: u64, result: Result<Return, QmpError>) {
        self.channel.send(ToQmp::Return { call, result }).unwrap();
    }

    pub fn event(&mut self, event: Event) {
        let event = TimedEvent {
            seconds: 1_700_000_000,
            microseconds: 42,
            event,
        };
        self.channel.send(ToQmp::Event(event)).unwrap();
    }

    pub fn log_lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = self.log.recv(&mut buffer) {
            lines.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
        lines
    }

    /// Waits for the end of the process. A violation of the policy would leave it hanging until the deadline.
    pub fn end(&mut self) -> ExitStatus {
        let mut start = Instant::now();
        let mut patience = Patience::new(self.child.id());
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            if start.elapsed() >= DEADLINE {
                assert!(patience.is_at_work(), "does not end; log: {:?}", self.log_lines());
                start = Instant::now();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// A line of /proc/PID/status or smaps_rollup, KiB.
    pub fn kib(&self, file: &str, field: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).unwrap();
        let line = text.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub fn open_fds(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .unwrap()
            .count()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Client {
    pub fn new(stream: UnixStream, server: &Process) -> Self {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Self {
            stream,
            received: Vec::new(),
            server: server.child.id(),
        }
    }

    pub fn send(&mut self, text: impl AsRef<[u8]>) {
        self.stream.write_all(text.as_ref()).unwrap();
    }

    /// Sends a text together with file descriptors.
    pub fn send_with_fds(&mut self, text: impl AsRef<[u8]>, fds: &[&OwnedFd]) {
        let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let control = [ControlMessage::ScmRights(&raw)];
        let text = [IoSlice::new(text.as_ref())];
        sendmsg::<()>(self.stream.as_raw_fd(), &text, &control, MsgFlags::empty(), None).unwrap();
    }

    /// The next line, without its CRLF.
    pub fn line(&mut self) -> String {
        self.next_line().expect("the connection ended")
    }

    /// The next line, or `None` at the end of the connection.
    pub fn next_line(&mut self) -> Option<String> {
        let mut searched = 0;
        let mut patience = Patience::new(self.server);
        loop {
            if let Some(end) = self.received[searched..].windows(2).position(|pair| pair == b"\r\n") {
                let line = self.received.drain(..searched + end + 2).collect::<Vec<_>>();
                return Some(String::from_utf8(line[..line.len() - 2].to_vec()).unwrap());
            }
            searched = self.received.len().saturating_sub(1);
            let mut buffer = vec![0; 1 << 16];
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(length) => self.received.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && patience.is_at_work() => {}
                Err(error) => panic!("reading: {error}; so far {:?}", String::from_utf8_lossy(&self.received)),
            }
        }
    }

    pub fn ask(&mut self, text: impl AsRef<[u8]>) -> String {
        self.send(text);
        self.line()
    }

    /// Everything until the end of the connection.
    pub fn rest(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.next_line()).collect()
    }

    /// Asserts that nothing arrives for a while.
    pub fn assert_silent(&mut self) {
        self.stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let mut buffer = [0; 1000];
        match self.stream.read(&mut buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            other => panic!("{other:?}: {:?}", String::from_utf8_lossy(&buffer)),
        }
        self.stream.set_read_timeout(Some(DEADLINE)).unwrap();
    }
}

/// Tells a process that works from one that hangs, on a machine that may have little time for either.
struct Patience {
    pid: u32,
    at_first: Duration,
    used: Duration,
}

impl Patience {
    fn new(pid: u32) -> Self {
        Self {
            pid,
            at_first: processor_time(pid),
            used: Duration::ZERO,
        }
    }

    /// Whether the process has worked since the last call, and not for longer than [`DEADLINE`] in all.
    fn is_at_work(&mut self) -> bool {
        let before = std::mem::replace(&mut self.used, processor_time(self.pid).saturating_sub(self.at_first));
        before < self.used && self.used < DEADLINE
    }
}

/// The processor time that a process has used, to a hundredth of a second (the kernel's unit for user space).
fn processor_time(pid: u32) -> Duration {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return Duration::ZERO; // It has ended.
    };
    // The name, in parentheses, may hold blanks; the state is the first field after it, utime and stime come 11 later.
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

/// An error reply without id.
pub fn error(class: &str, desc: &str) -> String {
    format!(r#"{{"error": {{"class": "{class}", "desc": "{desc}"}}}}"#)
}
