//! A helper started bare: no launcher, no namespaces, no stage-1 filter. The test holds the supervisor's end of the
//! channel and the log. When the helper seals itself, the stage-2 filters are loaded all the same.

use ipc::message::{FromHelper, Message, Request, RequestId};
use ipc::{Channel, Failure};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde::{Serialize, de::DeserializeOwned};
use std::collections::VecDeque;
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How long a helper may take for one answer before the test fails.
const DEADLINE: Duration = Duration::from_secs(20);

/// A running helper. Killed when dropped.
pub struct Bare<Body, Reply, Event>
where
    Request<Body>: Message,
    FromHelper<Reply, Event>: Message,
{
    /// The process.
    pub child: Child,
    channel: Channel<Request<Body>, FromHelper<Reply, Event>>,
    log: UnixDatagram,
    events: VecDeque<Event>,
    next_id: u64,
}

impl<Body, Reply, Event> Bare<Body, Reply, Event>
where
    Body: Serialize + DeserializeOwned,
    Request<Body>: Message,
    FromHelper<Reply, Event>: Message,
{
    /// Starts the executable (use `env!("CARGO_BIN_EXE_…")`).
    pub fn start(executable: &str) -> Self {
        let (ours, theirs) = ipc::channel::pair().expect("socketpair");
        let timeout = nix::sys::time::TimeVal::new(DEADLINE.as_secs() as i64, 0);
        nix::sys::socket::setsockopt(&ours, nix::sys::socket::sockopt::ReceiveTimeout, &timeout).expect("SO_RCVTIMEO");
        let (log, log_theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).expect("socketpair");
        let duplicate = log_theirs.try_clone().expect("dup");
        let child = Command::new(executable)
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::from(duplicate))
            .stderr(Stdio::from(log_theirs))
            .spawn()
            .expect("starting the helper");
        let log = UnixDatagram::from(log);
        log.set_nonblocking(true).expect("O_NONBLOCK");
        Self {
            child,
            channel: Channel::new(ours),
            log,
            events: VecDeque::new(),
            next_id: 1,
        }
    }

    /// Asks and waits for the answer; events that arrive meanwhile are kept for [`Self::event`].
    pub fn ask(&mut self, body: Body) -> Result<Reply, Failure> {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        if let Err(error) = self.channel.send(Request { id, body }) {
            panic!("sending: {error}; log: {:?}", self.log_lines());
        }
        loop {
            match self.receive() {
                FromHelper::Reply { id: answered, result } => {
                    assert_eq!(answered, id, "answer to another request");
                    return result;
                }
                FromHelper::Event(event) => self.events.push_back(event),
            }
        }
    }

    /// The next event, waiting for it.
    pub fn event(&mut self) -> Event {
        if let Some(event) = self.events.pop_front() {
            return event;
        }
        match self.receive() {
            FromHelper::Event(event) => event,
            FromHelper::Reply { id, .. } => panic!("unexpected reply to {id:?}"),
        }
    }

    /// The log lines written so far.
    pub fn log_lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(length) = self.log.recv(&mut buffer) {
            if length == 0 {
                break;
            }
            lines.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
        lines
    }

    fn receive(&mut self) -> FromHelper<Reply, Event> {
        match self.channel.recv() {
            Ok(message) => message,
            Err(error) => panic!("no message from the helper: {error}; log: {:?}", self.log_lines()),
        }
    }
}

impl<Body, Reply, Event> Drop for Bare<Body, Reply, Event>
where
    Request<Body>: Message,
    FromHelper<Reply, Event>: Message,
{
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
