//! Monitors: a listening socket (or one fixed connection) each, and a qmp-proc for every client.
//!
//! A sealed spare is kept ready, so that a client is served as soon as it connects; while there is none, connections wait
//! in the socket's queue. Several clients are served at once, up to [`MAX_SESSIONS`].

use super::{Vm, command};
use crate::chardev::{Chardev, Listener, Streams};
use crate::config;
use crate::helper::{Helper, Part, Qmp};
use crate::logging;
use crate::sys::Poller;
use ipc::caps::ClientFd;
use ipc::narrowing::Allow;
use ipc::qmp::{MonitorSetup, QmpCall, QmpRequest, TimedEvent, ToQmp};
use std::cell::{Cell, RefCell};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Instant;

/// Clients served at once on one monitor.
pub const MAX_SESSIONS: usize = 16;
/// Spares that may die unused, one after the other, before the monitor gives up.
const MAX_LOST_SPARES: u32 = 5;

/// A monitor's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MonitorIndex(pub usize);

/// A session's number in its monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionIndex(pub usize);

/// How far a session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Not sealed yet.
    Starting,
    /// Sealed, without a client.
    Spare,
    /// With its client.
    Serving,
}

/// One client connection, or a spare.
pub struct Session {
    helper: Rc<Helper<Qmp>>,
    stage: Cell<Stage>,
    /// Whether it has passed on a command that its monitor does not have.
    exceeded: Cell<bool>,
}

/// One monitor.
pub struct Monitor {
    setup: MonitorSetup,
    listener: Option<Listener>,
    /// The one client of a monitor that does not listen, until it is served.
    fixed: RefCell<Option<Streams>>,
    sessions: RefCell<Vec<Option<Rc<Session>>>>,
    /// Whether a spare is on its way; until the launcher has started it, it is not among the sessions.
    preparing: Cell<bool>,
    lost_spares: Cell<u32>,
}

impl Session {
    /// Reads the calls that have arrived; those to commands that the monitor does not have are refused here. qmp-proc
    /// refuses them as well: what it passes on all the same is not its client's doing, and is logged once.
    fn calls(&self, allow: &Allow, part: Part, readable: bool) -> Vec<QmpCall> {
        let mut calls = self.helper.ready(part, readable);
        calls.retain(|QmpCall { call, command, .. }| {
            let Err(error) = allow.check(command) else {
                return true;
            };
            if !self.exceeded.replace(true) {
                let line = format_args!("has passed on a command that its monitor does not have: {}", error.desc);
                logging::helper(ipc::Role::Qmp, self.helper.pid, line);
            }
            self.helper.send(ToQmp::Return {
                call: *call,
                result: Err(error),
            });
            false
        });
        calls
    }
}

impl Monitor {
    /// A monitor on an open character device.
    pub fn new(config: &config::Monitor, device: Chardev, allow: Allow) -> Self {
        let (listener, fixed) = match device {
            // A ring buffer is given as the socket that feeds it.
            // One that connects by itself is refused by the command line.
            Chardev::Null | Chardev::Ring(_) | Chardev::Dialing(_) => (None, None),
            Chardev::Connected(streams) => (None, Some(streams)),
            Chardev::Listening(listener) => (Some(listener), None),
        };
        Self {
            setup: MonitorSetup {
                pretty: config.pretty,
                package: format!("Bulkhead {}", env!("CARGO_PKG_VERSION")),
                allow,
            },
            listener,
            fixed: RefCell::new(fixed),
            sessions: RefCell::default(),
            preparing: Cell::new(false),
            lost_spares: Cell::new(0),
        }
    }

    /// Registers its descriptors for one wait; new clients only with a token for them.
    pub fn watch<T>(&self, poller: &mut Poller<T>, accept: Option<T>, session: impl Fn(SessionIndex, Part) -> T) {
        if let Some(listener) = &self.listener
            && let Some(accept) = accept
            && self.spare().is_some()
        {
            poller.add(listener.as_fd(), libc::POLLIN, accept);
        }
        for (index, entry) in self.sessions.borrow().iter().enumerate() {
            if let Some(entry) = entry {
                entry.helper.watch(poller, |part| session(SessionIndex(index), part));
            }
        }
    }

    /// The earliest deadline of its helpers.
    pub fn check_deadlines(&self, now: Instant) -> Option<Instant> {
        self.sessions
            .borrow()
            .iter()
            .flatten()
            .filter_map(|session| session.helper.check_deadlines(now))
            .min()
    }

    /// Sends an event to every client.
    pub fn broadcast(&self, event: &TimedEvent) {
        for session in self.live() {
            if session.stage.get() == Stage::Serving {
                session.helper.send(ToQmp::Event(event.clone()));
            }
        }
    }

    /// Tells all sessions that there is nothing more to come; spares end at once.
    pub fn hang_up(&self) {
        for session in self.live() {
            if session.stage.get() == Stage::Serving {
                session.helper.hang_up();
            } else {
                session.helper.end();
            }
        }
    }

    /// Whether clients are still being served.
    pub fn has_sessions(&self) -> bool {
        self.live().iter().any(|session| session.stage.get() == Stage::Serving)
    }

    /// Ends all sessions.
    pub fn end(&self) {
        self.live().iter().for_each(|session| session.helper.end());
        self.sessions.borrow_mut().clear();
    }

    fn live(&self) -> Vec<Rc<Session>> {
        self.sessions
            .borrow()
            .iter()
            .flatten()
            .filter(|session| !session.helper.is_dead())
            .cloned()
            .collect()
    }

    fn spare(&self) -> Option<Rc<Session>> {
        self.live()
            .into_iter()
            .find(|session| session.stage.get() == Stage::Spare)
    }

    fn session(&self, index: SessionIndex) -> Option<Rc<Session>> {
        self.sessions.borrow().get(index.0).cloned().flatten()
    }

    fn add(&self, session: Rc<Session>) {
        let mut sessions = self.sessions.borrow_mut();
        match sessions.iter_mut().find(|slot| slot.is_none()) {
            Some(slot) => *slot = Some(session),
            None => sessions.push(Some(session)),
        }
    }

    /// Whether another spare has any use.
    fn wants_spare(&self) -> bool {
        let wanted = self.listener.is_some() || self.fixed.borrow().is_some();
        wanted
            && !self.preparing.get()
            && !self.live().iter().any(|session| session.stage.get() != Stage::Serving)
            && self.live().len() < MAX_SESSIONS
            && self.lost_spares.get() < MAX_LOST_SPARES
    }
}

/// Starts and seals a spare for a monitor.
pub async fn add_spare(vm: &Vm, index: MonitorIndex) -> Result<(), String> {
    let monitor = &vm.monitors[index.0];
    let helper = vm.start_helper::<Qmp>().await?;
    // In the table from now on, so that the event loop watches its channel.
    let session = Rc::new(Session {
        helper: Rc::clone(&helper),
        stage: Cell::new(Stage::Starting),
        exceeded: Cell::new(false),
    });
    monitor.add(Rc::clone(&session));
    helper
        .ask(QmpRequest::Setup(monitor.setup.clone()))
        .await
        .map_err(|error| format!("setting up qmp-proc: {error}"))?;
    vm.seal_helper(&helper).await?;
    session.stage.set(Stage::Spare);
    Ok(())
}

/// Keeps a spare ready. Ends when there is one or none is wanted.
pub async fn replenish(vm: Rc<Vm>, index: MonitorIndex) {
    let monitor = &vm.monitors[index.0];
    if vm.outcome.get().is_none() && monitor.wants_spare() {
        monitor.preparing.set(true);
        let added = add_spare(&vm, index).await;
        monitor.preparing.set(false);
        if let Err(error) = added {
            logging::line(format_args!("no spare monitor process: {error}"));
        }
    }
    serve_fixed(&vm, index);
}

/// Serves the one client of a monitor that does not listen.
pub fn serve_fixed(vm: &Rc<Vm>, index: MonitorIndex) {
    let monitor = &vm.monitors[index.0];
    if vm.monitors_open.get()
        && let Some(session) = monitor.spare()
        && let Some(streams) = monitor.fixed.take()
        && let Some(input) = streams.input
    {
        serve(
            vm,
            index,
            session,
            ClientFd::new(input),
            streams.output.map(ClientFd::new),
        );
    }
}

/// A client has connected.
pub fn accept(vm: &Rc<Vm>, index: MonitorIndex) {
    let monitor = &vm.monitors[index.0];
    if let Some(session) = monitor.spare()
        && let Some(client) = monitor.listener.as_ref().and_then(Listener::accept)
    {
        serve(vm, index, session, ClientFd::new(client), None);
    }
}

fn serve(vm: &Rc<Vm>, index: MonitorIndex, session: Rc<Session>, input: ClientFd, output: Option<ClientFd>) {
    session.stage.set(Stage::Serving);
    vm.monitors[index.0].lost_spares.set(0);
    let vm = Rc::clone(vm);
    let executor = Rc::clone(&vm);
    executor.executor.spawn(async move {
        // A failure means that the process is gone, and the client's connection with it.
        let _ = session.helper.ask(QmpRequest::Serve { input, output }).await;
        replenish(vm, index).await;
    });
}

impl Vm {
    pub(super) fn session_ready(
        self: &Rc<Self>,
        monitor: MonitorIndex,
        session: SessionIndex,
        part: Part,
        readable: bool,
    ) {
        let Some(session) = self.monitors[monitor.0].session(session) else {
            return;
        };
        for call in session.calls(&self.monitors[monitor.0].setup.allow, part, readable) {
            command::handle(self, Rc::clone(&session.helper), call);
        }
    }

    /// A qmp-proc has ended: its client's connection is gone, nothing else.
    pub(super) fn session_ended(self: &Rc<Self>, pid: i32, how: &str) {
        for (index, monitor) in self.monitors.iter().enumerate() {
            let found = monitor.sessions.borrow_mut().iter_mut().find_map(|slot| {
                if slot.as_ref().is_some_and(|session| session.helper.pid == pid) {
                    slot.take()
                } else {
                    None
                }
            });
            let Some(session) = found else { continue };
            if how != "exited with status 0" && !session.helper.was_told() {
                logging::helper(
                    ipc::Role::Qmp,
                    pid,
                    format_args!("has {how}; its client's connection is closed"),
                );
            }
            session.helper.reaped();
            if session.stage.get() != Stage::Serving {
                monitor.lost_spares.set(monitor.lost_spares.get() + 1);
                if monitor.lost_spares.get() == MAX_LOST_SPARES {
                    logging::line("monitor processes keep dying: this monitor takes no more clients");
                }
            }
            self.executor.spawn(replenish(Rc::clone(self), MonitorIndex(index)));
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc::qmp::{Command, ErrorClass, FromQmp};
    use ipc::{Channel, FromHelper};

    /// A qmp-proc that does as it likes: its end of the channel, and the supervisor's session with it.
    fn fake() -> (Channel<FromQmp, ToQmp>, Session) {
        let ends = crate::helper::Ends::new().unwrap();
        // Nothing that could be killed.
        let pidfd = std::fs::File::open("/dev/null").unwrap().into();
        let violations = Rc::new(crate::violations::Violations::new(
            policies::Mode::Enforce,
            None,
            Rc::default(),
        ));
        let session = Session {
            helper: Rc::new(Helper::new((0, 0, pidfd), (ends.channel, ends.log), &violations)),
            stage: Cell::new(Stage::Serving),
            exceeded: Cell::new(false),
        };
        (Channel::new(ends.helper_channel), session)
    }

    fn passed_on(allow: &Allow, commands: [Command; 3]) -> (Vec<QmpCall>, Vec<(u64, ErrorClass, String)>) {
        let (mut qmp_proc, session) = fake();
        for (call, command) in (1..).zip(commands) {
            qmp_proc
                .send(FromHelper::Event(QmpCall {
                    call,
                    command,
                    fd: None,
                }))
                .unwrap();
        }
        let calls = session.calls(allow, Part::Channel, true);
        let mut refusals = Vec::new();
        for _ in calls.len()..3 {
            match qmp_proc.recv().unwrap() {
                ToQmp::Return {
                    call,
                    result: Err(error),
                } => refusals.push((call, error.class, error.desc)),
                other => panic!("{other:?}"),
            }
        }
        (calls, refusals)
    }

    #[test]
    fn a_qmp_proc_that_passes_on_what_its_monitor_lacks_is_answered_as_if_the_command_did_not_exist() {
        let commands = || [Command::Quit, Command::QueryStatus, Command::SystemReset];
        let read_only = crate::narrowing::commands([crate::narrowing::READ_ONLY]).unwrap();
        let (calls, refusals) = passed_on(&read_only, commands());
        assert!(matches!(
            calls[..],
            [QmpCall {
                call: 2,
                command: Command::QueryStatus,
                fd: None,
            }]
        ));
        let refused = |call, name| {
            (
                call,
                ErrorClass::CommandNotFound,
                format!("The command {name} has not been found"),
            )
        };
        assert_eq!(refusals, [refused(1, "quit"), refused(3, "system_reset")]);
        let (calls, _) = passed_on(&Allow::All, commands());
        assert_eq!(calls.len(), 3);
    }
}
