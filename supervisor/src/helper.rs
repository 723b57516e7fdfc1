//! A running helper, from the supervisor's side: requests with deadlines, its events, its log and its end.

use crate::credit::Credit;
use crate::executor::Slot;
use crate::logging;
use crate::sandbox::symbols::Program;
use crate::sandbox::violation;
use crate::sys::Poller;
use crate::violations::{Verdict, Violations};
use ipc::caps::SeccompListener;
use ipc::helper::MAX_LOG_LINE_BYTES;
use ipc::message::{FromHelper, Message, Request};
use ipc::{Channel, Failure, IpcError, RequestId, Role};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long a helper may take to answer. Whoever is slower counts as crashed. Only requests that wait for a disk or
/// write a dump have longer ones.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// For requests that end when the host's storage does.
pub const STORAGE_DEADLINE: Duration = Duration::from_secs(600);
/// Log lines that one helper may write in one round of the event loop.
const LOG_LINES_PER_ROUND: usize = 64;
/// Log lines that one helper may write at once, and each second.
const LOG_LINES: (u32, u32) = (500, 10);
/// What one helper may say unasked at once, and each second; then it is not listened to until the next second comes. A
/// client's commands do not count: their number is bounded by what is under way.
const EVENTS: (u32, u32) = (1000, 500);
/// What one helper may have under way in the supervisor. None that is as it was built has as much: a device waits for
/// its answer, and a monitor has at most nine commands.
const MAX_UNDER_WAY: usize = 256;

/// The types of one role's channel.
pub trait Protocol: 'static {
    /// The role.
    const ROLE: Role;
    /// Requests.
    type Body;
    /// Answers.
    type Reply;
    /// What it says unasked.
    type Event;
    /// What travels to it.
    type Out: Message;
    /// What travels from it: `FromHelper` of the two.
    type In: Message + Into<FromHelper<Self::Reply, Self::Event>>;
    /// Makes a request travel.
    fn request(request: Request<Self::Body>) -> Self::Out;
    /// Takes the sealed filter's listener out of the answer to the seal request.
    fn listener(reply: Self::Reply) -> Option<(SeccompListener, SealDetails)>;
    /// The seal request.
    fn seal() -> Self::Body;
}

/// What else a helper says when it has sealed itself.
#[derive(Debug, Default, Clone)]
pub struct SealDetails {
    /// Where its program is loaded.
    pub load_address: u64,
    /// vcpu-proc: ids of the vCPU threads in its own PID namespace.
    pub thread_ids: Vec<i32>,
    /// block-proc: the engine in use.
    pub engine: Option<ipc::block::EngineChoice>,
}

macro_rules! protocols {
    ($($(#[$doc:meta])* $name:ident: $role:expr, $body:ty, $reply:ty, $event:ty, $out:ty, |$request:ident| $wrap:expr, seal $seal:expr, $sealed:pat => $details:expr;)*) => {$(
        $(#[$doc])*
        pub struct $name;
        impl Protocol for $name {
            const ROLE: Role = $role;
            type Body = $body;
            type Reply = $reply;
            type Event = $event;
            type Out = $out;
            type In = FromHelper<$reply, $event>;
            fn request($request: Request<$body>) -> $out { $wrap }
            fn listener(reply: $reply) -> Option<(SeccompListener, SealDetails)> {
                match reply { $sealed => Some($details), _ => None }
            }
            fn seal() -> $body { $seal }
        }
    )*};
}

protocols! {
    /// vcpu-proc's.
    Vcpu: Role::Vcpu, ipc::vcpu::VcpuRequest, ipc::vcpu::VcpuReply, ipc::vcpu::VcpuEvent, ipc::vcpu::ToVcpu, |request| request,
        seal ipc::vcpu::VcpuRequest::Seal,
        ipc::vcpu::VcpuReply::Sealed { listener, load_address, thread_ids } => (listener, SealDetails { load_address, thread_ids, ..Default::default() });
    /// block-proc's.
    Block: Role::Block, ipc::block::BlockRequest, ipc::block::BlockReply, ipc::block::BlockEvent, ipc::block::ToBlock, |request| request,
        seal ipc::block::BlockRequest::Seal,
        ipc::block::BlockReply::Sealed { listener, load_address, engine } => (listener, SealDetails { load_address, engine: Some(engine), ..Default::default() });
    /// dump-proc's.
    Dump: Role::Dump, ipc::dump::DumpRequest, ipc::dump::DumpReply, ipc::dump::DumpEvent, ipc::dump::ToDump, |request| request,
        seal ipc::dump::DumpRequest::Seal,
        ipc::dump::DumpReply::Sealed { listener, load_address } => (listener, SealDetails { load_address, ..Default::default() });
    /// qmp-proc's.
    Qmp: Role::Qmp, ipc::qmp::QmpRequest, ipc::qmp::QmpReply, ipc::qmp::QmpCall, ipc::qmp::ToQmp, |request| ipc::qmp::ToQmp::Request(request),
        seal ipc::qmp::QmpRequest::Seal,
        ipc::qmp::QmpReply::Sealed { listener, load_address } => (listener, SealDetails { load_address, ..Default::default() });
}

/// Why a request has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum HelperError {
    /// The helper could not do it. It is alive and consistent.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The helper has ended or was ended for breaking the protocol.
    #[error("{0} has ended")]
    Gone(Role),
}

/// A helper's descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Its channel.
    Channel,
    /// Its log socket.
    Log,
    /// The listener of its sealed filter.
    Listener,
}

struct Waiting<Reply> {
    slot: Slot<Result<Reply, HelperError>>,
    deadline: Instant,
}

/// The ends of a new helper's channel and log that stay here, and those that travel to the launcher.
pub struct Ends {
    /// Stays.
    pub channel: OwnedFd,
    /// Stays.
    pub log: OwnedFd,
    /// Travels.
    pub helper_channel: OwnedFd,
    /// Travels.
    pub helper_log: OwnedFd,
}

impl Ends {
    /// Makes both socket pairs; the supervisor's ends never block.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> Result<Self, IpcError> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let (channel, helper_channel) = ipc::channel::pair()?;
        let (log, helper_log) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(IpcError::system("socketpair"))?;
        // The helper's log end does not block either: a full log loses lines rather than stop a helper.
        for fd in [&channel, &log, &helper_log] {
            fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(IpcError::system("fcntl"))?;
        }
        Ok(Self {
            channel,
            log,
            helper_channel,
            helper_log,
        })
    }
}

/// A running helper.
pub struct Helper<P: Protocol> {
    /// Its process id as the host numbers it.
    pub pid: i32,
    /// Its host uid.
    pub uid: u32,
    pidfd: OwnedFd,
    channel: RefCell<Channel<P::Out, P::In>>,
    log: OwnedFd,
    listener: RefCell<Option<SeccompListener>>,
    next_id: Cell<u64>,
    waiting: RefCell<HashMap<RequestId, Waiting<P::Reply>>>,
    life: Cell<Life>,
    /// Whether its end was ordered here.
    told: Cell<bool>,
    log_credit: Credit,
    is_silenced: Cell<bool>,
    event_credit: Credit,
    under_way: Rc<Cell<usize>>,
    /// What it runs, for the names of its functions.
    program: Program,
    violations: Rc<Violations>,
}

/// One thing that a helper has under way.
pub struct UnderWay(Rc<Cell<usize>>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// How far a helper's end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Alive,
    /// Killed, or found dead; the launcher has not reaped it yet.
    Ending,
    /// Reaped: what waited for it has been told.
    Ended,
}

impl<P: Protocol> Helper<P> {
    /// Takes over a helper that the launcher has started.
    pub fn new(
        (pid, uid, pidfd): (i32, u32, OwnedFd),
        (channel, log): (OwnedFd, OwnedFd),
        violations: &Rc<Violations>,
    ) -> Self {
        Self {
            pid,
            uid,
            pidfd,
            channel: RefCell::new(Channel::new(channel)),
            log,
            listener: RefCell::new(None),
            next_id: Cell::new(1),
            waiting: RefCell::default(),
            life: Cell::new(Life::Alive),
            told: Cell::new(false),
            log_credit: Credit::new(LOG_LINES.0, LOG_LINES.1),
            is_silenced: Cell::new(false),
            event_credit: Credit::new(EVENTS.0, EVENTS.1),
            under_way: Rc::default(),
            program: violations.program(P::ROLE),
            violations: Rc::clone(violations),
        }
    }

    /// Whether it has ended, or has been ended.
    pub fn is_dead(&self) -> bool {
        self.life.get() != Life::Alive
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// The helper's failure, or that it is gone; a helper that takes longer than `deadline` is killed.
    pub async fn ask_within(&self, deadline: Duration, body: P::Body) -> Result<P::Reply, HelperError> {
        let id = RequestId(self.next_id.get());
        self.next_id.set(id.0 + 1);
        let slot = Slot::default();
        let waiting = Waiting {
            slot: slot.clone(),
            deadline: Instant::now() + deadline,
        };
        self.waiting.borrow_mut().insert(id, waiting);
        self.send(P::request(Request { id, body }));
        slot.wait().await
    }

    /// Asks with the usual deadline.
    ///
    /// # Errors
    /// As [`Self::ask_within`].
    pub async fn ask(&self, body: P::Body) -> Result<P::Reply, HelperError> {
        self.ask_within(DEADLINE, body).await
    }

    /// Has the helper seal itself, and keeps the listener.
    ///
    /// # Errors
    /// As [`Self::ask_within`], or when it answers something else.
    pub async fn seal(&self) -> Result<SealDetails, HelperError> {
        let reply = self.ask(P::seal()).await?;
        let Some((listener, details)) = P::listener(reply) else {
            self.kill("it answered the seal request with something else");
            return Err(HelperError::Gone(P::ROLE));
        };
        self.program.loaded_at(details.load_address);
        self.listener.replace(Some(listener));
        Ok(details)
    }

    /// Sends a message; a helper that cannot be sent to is ended.
    pub fn send(&self, message: P::Out) {
        match self.life.get() {
            Life::Alive => {}
            Life::Ending => return,
            Life::Ended => return self.fail_waiting(),
        }
        let sent = self.channel.borrow_mut().send(message);
        self.check_sent(sent);
    }

    /// Closes the sending direction: the helper reads the end of its channel, delivers what it has and ends.
    pub fn hang_up(&self) {
        use nix::sys::socket::{Shutdown, shutdown};
        self.flush();
        let _ = shutdown(self.channel.borrow().as_fd().as_raw_fd(), Shutdown::Write);
    }

    fn flush(&self) {
        let sent = self.channel.borrow_mut().flush();
        self.check_sent(sent);
    }

    fn check_sent(&self, sent: Result<(), IpcError>) {
        match sent {
            Ok(()) | Err(IpcError::WouldBlock) => {}
            // Its end is reported by the launcher with the reason.
            Err(IpcError::Closed) => self.lose(),
            Err(error) => self.kill(&error.to_string()),
        }
    }

    /// Reads what it sent. Replies fill their slots; events are returned.
    fn receive(&self) -> Vec<P::Event> {
        /// Bounds the work of one round of the event loop.
        const MESSAGES_PER_ROUND: usize = 64;
        let mut events = Vec::new();
        for _ in 0..MESSAGES_PER_ROUND {
            if self.is_dead() || !self.may_tell(Instant::now()) {
                break;
            }
            let received = self.channel.borrow_mut().recv();
            match received.map(Into::into) {
                Ok(FromHelper::Event(event)) => {
                    self.event_credit.take();
                    events.push(event);
                }
                Ok(FromHelper::Reply { id, result }) => {
                    let waiting = self.waiting.borrow_mut().remove(&id);
                    match waiting {
                        Some(waiting) => waiting.slot.fill(result.map_err(HelperError::Failed)),
                        None => self.kill("it answered a request that was not made"),
                    }
                }
                Err(IpcError::WouldBlock) => break,
                Err(IpcError::Closed) => self.lose(),
                Err(error) => self.kill(&error.to_string()),
            }
        }
        events
    }

    /// Copies its log lines to ours.
    pub fn drain_log(&self) {
        let mut line = [0; MAX_LOG_LINE_BYTES];
        for _ in 0..LOG_LINES_PER_ROUND {
            // What it writes meanwhile waits, and then is lost: it never waits for its log.
            if !self.log_credit.is_there(Instant::now()) {
                break;
            }
            match recv(self.log.as_raw_fd(), &mut line, MsgFlags::MSG_DONTWAIT) {
                Ok(0) | Err(_) => break,
                Ok(length) => self.remark(logging::printable(&line[..length])),
            }
        }
    }

    /// Logs a line that it wrote, or has caused. Of too many the last ones are left out.
    pub fn remark(&self, text: impl std::fmt::Display) {
        if self.log_credit.take() {
            logging::helper(P::ROLE, self.pid, text);
        }
        if self.log_credit.due().is_some() && !self.is_silenced.replace(true) {
            let line = format_args!("writes too much: it has {} lines a second from now on", LOG_LINES.1);
            logging::helper(P::ROLE, self.pid, line);
        }
    }

    /// Whether it is listened to at present.
    fn may_tell(&self, now: Instant) -> bool {
        P::ROLE == Role::Qmp || self.event_credit.is_there(now)
    }

    /// Begins something that it has asked for without being asked, and that takes its time. Nothing, and its end, when it has
    /// too much under way.
    pub fn begin(&self) -> Option<UnderWay> {
        if self.under_way.get() >= MAX_UNDER_WAY {
            self.kill("it wants too much at a time");
            return None;
        }
        self.under_way.set(self.under_way.get() + 1);
        Some(UnderWay(Rc::clone(&self.under_way)))
    }

    /// Ends it for a reason, which is logged.
    pub fn kill(&self, reason: &str) {
        if !self.is_dead() {
            logging::warning(P::ROLE, self.pid, format_args!("killed by the supervisor: {reason}"));
            self.end();
        }
    }

    /// Ends it without a word: it has done its work, or is already gone. Who waits for its answers is told when the
    /// launcher has reaped it ([`Self::reaped`]), because only then it is known how it ended.
    pub fn end(&self) {
        if !self.is_dead() {
            self.told.set(true);
            self.lose();
        }
    }

    /// Its channel is closed: it has ended, or soon will have.
    fn lose(&self) {
        if !self.is_dead() {
            self.life.set(Life::Ending);
            self.drain_log();
            crate::sys::kill_by_pidfd(self.pidfd.as_fd());
        }
    }

    /// Whether the launcher has reaped it.
    pub fn is_reaped(&self) -> bool {
        self.life.get() == Life::Ended
    }

    /// Whether it owes an answer, after what has arrived from it was read.
    pub fn owes_an_answer(&self) -> bool {
        drop(self.receive());
        !self.waiting.borrow().is_empty()
    }

    /// Whether its end was ordered here.
    pub fn was_told(&self) -> bool {
        self.told.get()
    }

    /// The launcher has reaped it. What it said before it ended still counts, though not its events: whom they concern is
    /// told of the end.
    pub fn reaped(&self) {
        drop(self.receive());
        self.lose();
        self.life.set(Life::Ended);
        self.fail_waiting();
    }

    fn fail_waiting(&self) {
        for (_, waiting) in self.waiting.take() {
            waiting.slot.fill(Err(HelperError::Gone(P::ROLE)));
        }
    }

    /// Kills it when a deadline has passed; returns when there is something to do for it at the latest.
    pub fn check_deadlines(&self, now: Instant) -> Option<Instant> {
        if self.is_dead() {
            return None;
        }
        let waiting = self.waiting.borrow().values().map(|waiting| waiting.deadline).min();
        if waiting.is_some_and(|deadline| deadline <= now) {
            self.kill("it did not answer in time");
            return None;
        }
        // When it is listened to again.
        let credits = [&self.event_credit, &self.log_credit];
        let due = credits.into_iter().filter_map(Credit::due);
        waiting.into_iter().chain(due).min()
    }

    /// Registers its descriptors for one wait: channel, log and listener.
    pub fn watch<T>(&self, poller: &mut Poller<T>, token: impl Fn(Part) -> T) {
        if self.is_dead() {
            return;
        }
        let now = Instant::now();
        let channel = self.channel.borrow();
        // Who is not listened to may hang up unnoticed: its end is reported by the launcher.
        if self.may_tell(now) {
            let writable = if channel.wants_write() { libc::POLLOUT } else { 0 };
            poller.add(channel.as_fd(), libc::POLLIN | writable, token(Part::Channel));
        }
        if self.log_credit.is_there(now) {
            poller.add(self.log.as_fd(), libc::POLLIN, token(Part::Log));
        }
        if let Some(listener) = self.listener.borrow().as_ref() {
            poller.add(listener.as_fd(), libc::POLLIN, token(Part::Listener));
        }
    }

    /// Acts on a descriptor that is ready, or (not `readable`) whose other side has hung up. Events are returned.
    pub fn ready(&self, part: Part, readable: bool) -> Vec<P::Event> {
        match part {
            Part::Channel => {
                self.flush();
                self.receive()
            }
            Part::Log => {
                self.drain_log();
                Vec::new()
            }
            Part::Listener if readable => {
                self.handle_violation();
                Vec::new()
            }
            // No thread is left under the filter. Asking it for a violation now would block for ever before Linux 6.11.
            Part::Listener => {
                drop(self.listener.take());
                Vec::new()
            }
        }
    }

    /// Reads a violation from the sealed filter's listener, reports it and kills the helper, or lets the call go on in the
    /// mode for development.
    fn handle_violation(&self) {
        let notification = self
            .listener
            .borrow()
            .as_ref()
            .map(|listener| violation::receive(listener.as_fd()));
        let Some(Ok(notification)) = notification else {
            // No thread is left under the filter: the end is reported by the launcher.
            return drop(self.listener.take());
        };
        match self
            .violations
            .found(P::ROLE, self.pid, &self.program, &notification.violation)
        {
            Verdict::Kill(what) => self.kill(&format!("policy violation: {what}")),
            Verdict::Allow => {
                if let Some(listener) = self.listener.borrow().as_ref() {
                    violation::allow(listener.as_fd(), &notification);
                }
            }
        }
    }
}
