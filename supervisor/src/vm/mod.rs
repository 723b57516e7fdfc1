//! One virtual machine: its helpers, its run state and the event loop that everything passes through.
//!
//! The loop waits on the launcher, the opener, every helper's channel, log and listener, the listening sockets and the signals. What
//! takes several steps is an async sequence ([`crate::executor`]): [`start`] brings the machine up, [`lifecycle`] changes
//! its run state, [`monitor`] keeps clients served, [`command`] carries out what they ask ([`query`] answers what the machine
//! is, [`objects`] and [`qom`] look after the objects), [`devices`] connects the virtio devices, [`block_proc`] is where they are
//! served, [`restart`] brings it back when it has ended, [`loss`] keeps what is left when a machine cannot go on, [`graph`] changes the block graph, [`blockdev`] and [`block_info`] are the commands about it, [`resize`], [`snapshots`], [`throttling`], [`create`],
//! [`image_header`] those about images, [`jobs`] about what takes longer, [`io_errors`] says what failed, [`dump`] writes memory out,
//! [`looking`] looks into it, [`rtc`] tells clients when the guest sets its clock, [`fds`] keeps the file descriptors that
//! clients hand over, [`frontends`] and [`media`] are the devices of `-accel qtest` and what is in them, [`passwords`] unlocks images,
//! [`names`] has file names read that are descriptions.

mod alarm;
mod bitmaps;
mod block_info;
mod block_proc;
mod blockdev;
mod chardevs;
mod command;
mod cpu_model;
mod create;
mod devices;
pub mod dump;
mod exports;
pub(crate) mod fds;
mod frontends;
pub(crate) mod graph;
mod human;
mod image_header;
mod io_errors;
mod jobs;
mod lifecycle;
mod looking;
mod loss;
mod media;
mod monitor;
mod names;
mod nbd_client;
mod objects;
mod passwords;
mod qemu_io;
mod qom;
mod qtest;
mod query;
mod reopen;
mod resize;
pub(crate) mod restart;
mod rtc;
mod serial;
mod snapshots;
mod start;
mod throttling;

use crate::backing::Roots;
use crate::config::VmConfig;
use crate::counters::Counters;
use crate::executor::{Executor, Slot, Turnstile};
use crate::graph::Graph;
use crate::graph::open::Opened;
use crate::helper::{Dump, Ends, Helper, HelperError, Part, Protocol, Vcpu};
use crate::hosting::metrics::News;
use crate::hosting::warden::Warden;
use crate::jobs::Jobs;
use crate::launcher::Launcher;
use crate::logging;
use crate::objects::Objects;
use crate::opener::Opener;
use crate::ram::Ram;
use crate::sandbox::verify::{Expected, verify};
use crate::sys::Poller;
use crate::violations::Violations;
use chardevs::{ChardevNumber, Chardevs};
use dump::DumpState;
use fds::Fds;
use ipc::action::Actions;
use ipc::caps::{InflightFd, InitrdFd, KernelFd, KvmFd};
use ipc::launch::Report;
use ipc::narrowing::Allow;
use ipc::qmp::{Event, RunState, ShutdownCause, TimedEvent};
use ipc::vcpu::VcpuRequest;
use ipc::{Failure, Role};
use lifecycle::Run;
use looking::Looking;
use monitor::{Monitor, MonitorIndex, SessionIndex};
use nix::sys::signalfd::SignalFd;
use qtest::Qtest;
use rtc::RtcChanges;
use serial::Serial;
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub use start::{StartError, prepare};

/// How long helpers get to deliver their last bytes when the machine ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// How many ended helpers are remembered: more than can be starting at a time.
const ENDED_KEPT: usize = 64;

/// Reports of the launcher that one round of the event loop reads.
const REPORTS_PER_ROUND: usize = 64;

/// What the command line named, opened before anything is sealed.
pub struct Resources {
    /// The machine.
    pub config: VmConfig,
    /// The process that starts helpers.
    pub launcher: Launcher,
    /// The process that makes sockets, where one may be needed.
    pub opener: Option<Opener>,
    /// The process that clears up, where there is something to.
    pub warden: Option<Warden>,
    /// Shows other machines that these ids are taken.
    pub id_lock: Option<OwnedFd>,
    /// For vcpu-proc, if there is a guest.
    pub guest: Option<GuestFiles>,
    /// Guest RAM.
    pub ram: Ram,
    /// The record of requests under way, and its size in bytes.
    pub inflight: (InflightFd, u64),
    /// For dumps of a guest that runs on.
    pub fault_device: dump::FaultDevice,
    /// The files of each `-blockdev` and each `-drive`.
    pub disks: Vec<Opened>,
    /// Below what images may name others.
    pub roots: Roots,
    /// One per monitor: what is behind it, and the commands that it has.
    pub monitors: Vec<(crate::chardev::Chardev, Allow)>,
    /// What `-add-fd` named.
    pub fds: Fds,
    /// What `-object` named.
    pub objects: Objects,
    /// The serial port's backend.
    pub serial: crate::chardev::Chardev,
    /// The backend of `-qtest`.
    pub qtest: crate::chardev::Chardev,
    /// All character devices.
    pub(crate) chardevs: Chardevs,
    /// What helpers will have tried.
    pub violations: Rc<Violations>,
    /// SIGINT, SIGTERM, SIGHUP, SIGCHLD.
    pub signals: SignalFd,
    /// Called when the machine is up.
    pub ready: Box<dyn FnOnce()>,
}

/// What is opened for a guest.
pub struct GuestFiles {
    /// /dev/kvm; handed to vcpu-proc.
    pub kvm: KvmFd,
    /// What is booted.
    pub boot: BootFiles,
}

/// What is booted: kept, because every guest reset loads it again.
pub struct BootFiles {
    /// The kernel.
    pub kernel: KernelFd,
    /// Initial RAM disk.
    pub initrd: Option<InitrdFd>,
}

/// How the machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// As the guest, an operator or a signal wanted.
    Ended,
    /// By a failure, which has been logged.
    Failed,
}

/// What a ready descriptor belongs to.
#[derive(Debug, Clone, Copy)]
enum Token {
    Launcher,
    Opener,
    Signals,
    Vcpu(Part),
    Block(Part),
    /// What tells that nothing of an ended block-proc is left.
    Fence(usize),
    Dump(Part),
    /// A dump-proc that looks into memory, by its process id.
    Looking(i32, Part),
    /// A qmp-proc that reads names, by its process id.
    Names(i32, Part),
    Session(MonitorIndex, SessionIndex, Part),
    Monitor(MonitorIndex),
    Serial,
    NbdServer,
    Qtest,
    Chardev(ChardevNumber),
}

/// A started helper: pid, host uid, pidfd.
type Started = Slot<Result<(i32, u32, OwnedFd), String>>;

/// The machine.
pub struct Vm {
    config: VmConfig,
    executor: Executor,
    launcher: Launcher,
    opener: Option<Opener>,
    warden: Option<Warden>,
    _id_lock: Option<OwnedFd>,
    starting: RefCell<VecDeque<Started>>,
    /// Helpers that have ended, the last of them: one may have before anybody knew it.
    ended: RefCell<VecDeque<i32>>,
    ram: Ram,
    fault_device: dump::FaultDevice,
    /// Without a guest, nothing.
    boot_files: Option<BootFiles>,
    signals: SignalFd,
    vcpu: OnceCell<Rc<Helper<Vcpu>>>,
    block: block_proc::BlockProc,
    restarts: restart::Restarts,
    /// For the case that vcpu-proc ends.
    remains: loss::Remains,
    /// What has become of the helpers.
    counters: Rc<Counters>,
    violations: Rc<Violations>,
    dumper: RefCell<Option<Rc<Helper<Dump>>>>,
    dump: DumpState,
    looking: Looking,
    names: names::Names,
    fds: RefCell<Fds>,
    monitors: Vec<Monitor>,
    serial: Serial,
    qtest: Qtest,
    /// Commands of qemu-io that nobody waits for.
    manual_io: Cell<usize>,
    rtc: RtcChanges,
    chardevs: Chardevs,
    run: Run,
    change: Turnstile,
    /// One object is changed at a time. Another turnstile than the machine's: a dump that takes long holds up no object.
    object_change: Turnstile,
    vcpu_threads: RefCell<Vec<i32>>,
    /// The host's ids of the threads for iothreads, by [`ipc::virtio::IoThreadIndex`] from 1 on.
    io_threads: RefCell<Vec<Option<i32>>>,
    objects: RefCell<Objects>,
    /// What set-action changes.
    actions: Cell<Actions>,
    /// Whether a signal has asked for the end.
    signalled: Cell<bool>,
    /// The block graph, with the files' locks.
    graph: RefCell<Graph>,
    /// The graph is changed by one at a time.
    graph_change: Turnstile,
    throttle_groups: throttling::Groups,
    jobs: RefCell<Jobs>,
    alarms: alarm::Alarms,
    exports: exports::Exports,
    nbd_clients: nbd_client::NbdClients,
    job_work: jobs::JobWork,
    io_errors: io_errors::IoErrors,
    frontends: frontends::Frontends,
    /// Below what images may name others.
    roots: Roots,
    /// Whether clients are served yet.
    monitors_open: Cell<bool>,
    outcome: Cell<Option<Outcome>>,
}

impl Vm {
    /// Runs the machine to its end.
    ///
    /// # Errors
    /// When it cannot even begin.
    pub fn run(resources: Resources) -> Result<Outcome, StartError> {
        let (vm, parts) = Self::assemble(resources)?;
        vm.executor.spawn(start::bring_up(Rc::clone(&vm), parts));
        while vm.outcome.get().is_none() {
            vm.executor.run();
            if vm.outcome.get().is_some() {
                break;
            }
            vm.turn(None);
        }
        vm.say_farewell();
        vm.violations.summary().iter().for_each(logging::line);
        let outcome = vm.outcome.get().unwrap_or(Outcome::Failed);
        // Sequences hold the machine; they end with it.
        vm.executor.clear();
        match Rc::try_unwrap(vm) {
            Ok(Self { launcher, opener, .. }) => {
                launcher.end();
                if let Some(opener) = opener {
                    opener.end();
                }
            }
            Err(_) => logging::line("a sequence outlives the machine"),
        }
        Ok(outcome)
    }

    /// One round of the event loop.
    fn turn(self: &Rc<Self>, until: Option<Instant>) {
        if let Some(warden) = &self.warden {
            warden.tell(News::new(&self.counters, self.state()));
        }
        let mut poller = Poller::default();
        poller.add(self.launcher.as_fd(), libc::POLLIN, Token::Launcher);
        poller.add(self.signals.as_fd(), libc::POLLIN, Token::Signals);
        if let Some(opener) = &self.opener {
            opener.watch(&mut poller, Token::Opener);
        }
        if let Some(vcpu) = self.vcpu.get() {
            vcpu.watch(&mut poller, Token::Vcpu);
        }
        if let Some(block) = self.block.get() {
            block.watch(&mut poller, Token::Block);
        }
        let fences = self.block.fences();
        for (place, fence) in fences.iter().enumerate() {
            poller.add(fence.as_fd(), 0, Token::Fence(place));
        }
        if let Some(dumper) = self.dumper.borrow().as_ref() {
            dumper.watch(&mut poller, Token::Dump);
        }
        for helper in self.looking.helpers() {
            let pid = helper.pid;
            helper.watch(&mut poller, |part| Token::Looking(pid, part));
        }
        for helper in self.names.helpers() {
            let pid = helper.pid;
            helper.watch(&mut poller, |part| Token::Names(pid, part));
        }
        for (index, monitor) in self.monitors.iter().enumerate() {
            let monitor_index = MonitorIndex(index);
            let accept = self.monitors_open.get().then_some(Token::Monitor(monitor_index));
            monitor.watch(&mut poller, accept, |session, part| {
                Token::Session(monitor_index, session, part)
            });
        }
        self.serial.watch(&mut poller, Token::Serial);
        self.exports.watch(&mut poller, Token::NbdServer);
        self.qtest.watch(&mut poller, Token::Qtest);
        self.chardevs.watch(&mut poller, Token::Chardev);
        let deadline = self.next_deadline().into_iter().chain(until).min();
        let waited = poller.wait(deadline);
        drop(fences);
        match waited {
            Ok(ready) => ready.into_iter().for_each(|(token, readable)| {
                self.dispatch(token, readable);
                self.tell_violations();
            }),
            Err(errno) => self.fail(format_args!("poll: {errno}")),
        }
        let now = Instant::now();
        for event in self.io_errors.take_due(now) {
            self.emit(event);
        }
        if self.rtc.take_due(now) {
            self.executor.spawn(rtc::announce(Rc::clone(self)));
        }
        if self.outcome.get().is_none() {
            serial::connect(self, now);
            chardevs::connect(self, now);
        }
    }

    fn dispatch(self: &Rc<Self>, token: Token, readable: bool) {
        match token {
            Token::Launcher => self.read_launcher(),
            Token::Opener => {
                self.opener.as_ref().inspect(|opener| opener.ready());
            }
            Token::Signals => self.read_signals(),
            Token::Vcpu(part) => {
                for event in self
                    .vcpu
                    .get()
                    .map(|vcpu| vcpu.ready(part, readable))
                    .unwrap_or_default()
                {
                    self.vcpu_event(event);
                }
            }
            Token::Block(part) => {
                if let Some(block) = self.block.get() {
                    for event in block.ready(part, readable) {
                        self.block_event(&block, event);
                    }
                }
            }
            Token::Fence(place) => self.block.fence_is_down(place),
            Token::Dump(part) => {
                let dumper = self.dumper.borrow().clone();
                for event in dumper.map(|dumper| dumper.ready(part, readable)).unwrap_or_default() {
                    self.dump.progress(&event);
                }
            }
            Token::Looking(pid, part) => {
                // These report nothing by themselves.
                self.looking.helper(pid).map(|helper| helper.ready(part, readable));
            }
            Token::Names(pid, part) => {
                if let Some(helper) = self.names.helper(pid)
                    && !helper.ready(part, readable).is_empty()
                {
                    helper.kill("it has no client whose calls it could make");
                }
            }
            Token::Session(monitor, session, part) => self.session_ready(monitor, session, part, readable),
            Token::Monitor(monitor) => monitor::accept(self, monitor),
            Token::Serial => serial::accept(self),
            Token::NbdServer => exports::accept(self),
            Token::Qtest => self.qtest.ready(),
            Token::Chardev(number) => self.chardevs.ready(number),
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let now = Instant::now();
        let helpers = [
            self.vcpu.get().and_then(|helper| helper.check_deadlines(now)),
            self.block.get().and_then(|helper| helper.check_deadlines(now)),
            self.dumper
                .borrow()
                .as_ref()
                .and_then(|helper| helper.check_deadlines(now)),
        ];
        let looking = self.looking.helpers();
        let looking = looking.iter().filter_map(|helper| helper.check_deadlines(now));
        let names = self.names.helpers();
        let names = names.iter().filter_map(|helper| helper.check_deadlines(now));
        let sessions = self.monitors.iter().filter_map(|monitor| monitor.check_deadlines(now));
        helpers
            .into_iter()
            .flatten()
            .chain(looking)
            .chain(names)
            .chain(sessions)
            .chain(self.rtc.due())
            .chain(self.opener.as_ref().and_then(|opener| opener.check_deadlines(now)))
            .chain(self.serial.due())
            .chain(self.chardevs.due())
            .chain(self.io_errors.due())
            .chain(self.alarms.due())
            .min()
    }

    /// Ends the machine because of a failure.
    fn fail(&self, reason: impl std::fmt::Display) {
        if self.outcome.get().is_none() {
            logging::line(reason);
            self.outcome.set(Some(Outcome::Failed));
        }
    }

    /// Ends the machine because of a failure, unless that is only that vcpu-proc has ended, which it is kept for.
    fn fail_unless_lost(&self, reason: impl std::fmt::Display) {
        if !self.remains.is_lost() {
            self.fail(reason);
        }
    }

    /// Ends the machine as wanted.
    fn finish(&self) {
        if self.outcome.get().is_none() {
            self.outcome.set(Some(Outcome::Ended));
        }
    }

    /// Sends an event to all clients.
    fn emit(&self, event: Event) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok();
        let event = TimedEvent {
            seconds: now.map_or(-1, |now| now.as_secs() as i64),
            microseconds: now.map_or(-1, |now| now.subsec_micros().into()),
            event,
        };
        for monitor in &self.monitors {
            monitor.broadcast(&event);
        }
    }

    /// Tells the clients of what helpers have tried.
    fn tell_violations(&self) {
        self.violations
            .take_events()
            .into_iter()
            .for_each(|event| self.emit(event));
    }

    /// Starts a helper: asks the launcher and waits for its report.
    async fn start_helper<P: Protocol>(&self) -> Result<Rc<Helper<P>>, String> {
        let ends = Ends::new().map_err(|error| format!("starting {}: {error}", P::ROLE))?;
        let started = Started::default();
        self.starting.borrow_mut().push_back(started.clone());
        self.launcher
            .request(P::ROLE, ends.helper_channel, ends.helper_log)
            .map_err(|error| error.to_string())?;
        let (pid, uid, pidfd) = started.wait().await?;
        let helper = Helper::new((pid, uid, pidfd), (ends.channel, ends.log), &self.violations);
        if self.ended.borrow().contains(&pid) {
            helper.reaped();
        }
        Ok(Rc::new(helper))
    }

    /// Has a helper seal itself and checks that it did.
    async fn seal_helper<P: Protocol>(&self, helper: &Helper<P>) -> Result<crate::helper::SealDetails, String> {
        let details = helper
            .seal()
            .await
            .map_err(|error| format!("sealing {}: {error}", P::ROLE))?;
        let expected = Expected {
            uid: helper.uid,
            filters: policies::SEALED_HELPER_FILTERS,
        };
        verify(helper.pid, expected).map_err(|wrong| {
            helper.kill("its sandbox is not complete");
            format!("{} is not sealed: {wrong}", P::ROLE)
        })?;
        Ok(details)
    }

    fn read_launcher(self: &Rc<Self>) {
        for _ in 0..REPORTS_PER_ROUND {
            match self.launcher.receive() {
                Ok(None) => return,
                Ok(Some((report, pidfd))) => self.launcher_report(report, pidfd),
                Err(error) => return self.fail(error),
            }
            if self.outcome.get().is_some() {
                return;
            }
        }
    }

    fn launcher_report(self: &Rc<Self>, report: Report, pidfd: Option<OwnedFd>) {
        match report {
            Report::Started { role, pid, id } => {
                self.ended.borrow_mut().retain(|ended| *ended != pid);
                let uid = self.launcher.ids.host_uid(id.unsigned_abs());
                let started = self.starting.borrow_mut().pop_front();
                match (started, pidfd) {
                    (Some(started), Some(pidfd)) => started.fill(Ok((pid, uid, pidfd))),
                    _ => self.fail(format_args!("the launcher reported a {role} that was not asked for")),
                }
            }
            Report::Failed { role, step, errno } => {
                let reason = format!(
                    "cannot start {role}: {step}: {}",
                    nix::errno::Errno::from_raw(errno).desc()
                );
                match self.starting.borrow_mut().pop_front() {
                    Some(started) => started.fill(Err(reason)),
                    None => self.fail(reason),
                }
            }
            Report::Ended {
                role,
                pid,
                code,
                status,
            } => self.helper_ended(role, pid, code, status),
        }
    }

    /// What the end of a helper means: see the table in the crate's page.
    fn helper_ended(self: &Rc<Self>, role: Role, pid: i32, code: i32, status: i32) {
        {
            let mut ended = self.ended.borrow_mut();
            ended.push_back(pid);
            if ended.len() > ENDED_KEPT {
                ended.pop_front();
            }
        }
        if (code, status) == (libc::CLD_KILLED, libc::SIGSYS) {
            self.violations.killed_unheard(role, pid);
            self.tell_violations();
        }
        let how = match (code, status) {
            _ if let Some(how) = self.violations.how_ended(pid) => how,
            (libc::CLD_EXITED, status) => format!("exited with status {status}"),
            (_, signal) => match nix::sys::signal::Signal::try_from(signal) {
                Ok(signal) => format!("been killed by {signal}"),
                Err(_) => format!("been killed by signal {signal}"),
            },
        };
        match role {
            Role::Vcpu => self.vcpus_ended(pid, &how),
            Role::Block => self.block_ended(pid, &how),
            Role::Dump => self.dump_ended(pid, code, status, &how),
            Role::Qmp if self.names.ended(pid) => {}
            Role::Qmp => self.session_ended(pid, &how),
        }
    }

    fn vcpus_ended(self: &Rc<Self>, pid: i32, how: &str) {
        let why = format!("vcpu-proc (pid {pid}) has {how}");
        if self.outcome.get().is_none() {
            if self.monitors_open.get() {
                loss::vcpus_lost(self, &why);
            } else {
                self.fail(format_args!("{why}: the vCPUs are lost, the machine ends"));
            }
        }
        self.vcpu.get().inspect(|helper| helper.reaped());
    }

    fn block_ended(self: &Rc<Self>, pid: i32, how: &str) {
        if let Some(helper) = self.block.get().filter(|helper| helper.pid == pid) {
            helper.reaped();
        }
        if self.outcome.get().is_none() {
            restart::lost(self, &format!("block-proc (pid {pid}) has {how}"));
        }
    }

    fn read_signals(self: &Rc<Self>) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            let number = signal.ssi_signo as i32;
            if number == libc::SIGCHLD {
                // The launcher and the opener are the only children; their channels close as well and say the same.
                continue;
            }
            if self.outcome.get().is_none() {
                let name =
                    nix::sys::signal::Signal::try_from(number).map_or("a signal", nix::sys::signal::Signal::as_str);
                logging::line(format_args!("terminating on {name} from process {}", signal.ssi_pid));
                let is_up = self.monitors_open.get() || !self.vcpu_threads.borrow().is_empty();
                if self.signalled.replace(true) || !is_up {
                    // Asked twice, or before there was a machine.
                    self.finish();
                } else {
                    self.emit(Event::Shutdown {
                        guest: false,
                        reason: ShutdownCause::HostSignal,
                    });
                    self.executor.spawn(lifecycle::wind_down(Rc::clone(self)));
                }
            }
        }
    }

    /// Lets the monitors deliver what their clients have coming, for a bounded time.
    fn say_farewell(self: &Rc<Self>) {
        if let Some(vcpu) = self.vcpu.get() {
            vcpu.end();
        }
        let deadline = Instant::now() + FAREWELL;
        self.monitors.iter().for_each(Monitor::hang_up);
        while self.monitors.iter().any(Monitor::has_sessions) && Instant::now() < deadline {
            self.turn(Some(deadline));
        }
        self.monitors.iter().for_each(Monitor::end);
        // A ring's hold on a file outlives its process by a moment; the lock must not.
        if let Some(block) = self.block.get() {
            block.end();
            while !block.is_reaped() && Instant::now() < deadline {
                self.turn(Some(deadline));
            }
        }
        graph::unlock_all(&self.graph.borrow());
    }

    fn vcpu(&self) -> Result<&Rc<Helper<Vcpu>>, HelperError> {
        let missing = match self.config.guest {
            Some(_) => HelperError::Gone(Role::Vcpu),
            None => HelperError::Failed(Failure::new("this machine has no vCPUs")),
        };
        self.vcpu.get().ok_or(missing)
    }

    /// Asks vcpu-proc for something that means nothing where no guest is. A lost one has paused.
    async fn ask_vcpus(&self, request: VcpuRequest) -> Result<(), HelperError> {
        match self.config.guest {
            Some(_) => {
                let is_pause = matches!(request, VcpuRequest::Pause);
                match self.vcpu()?.ask(request).await {
                    Err(HelperError::Gone(_)) if is_pause && self.remains.is_lost() => Ok(()),
                    other => other.map(drop),
                }
            }
            None => Ok(()),
        }
    }

    fn state(&self) -> RunState {
        self.run.state()
    }
}
