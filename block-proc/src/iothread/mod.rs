//! The data plane: a thread that owns devices, an executor and an engine. There is a main one, and one for each iothread
//! object; a device belongs to one of them.
//!
//! [`graph`] carries out what the supervisor asks of the nodes, [`jobs`] has jobs go on.
//!
//! A turn of its loop: run every task that is ready; answer what ended; carry out commands of the control thread; raise
//! each touched queue's interrupt once; start the queued I/O and wait, all in the engine's one blocking call.

mod encrypt;
mod graph;
mod jobs;
mod rings;

pub use graph::is_exclusive;

use crate::device::inflight::Notes;
use crate::device::rng::{Rng, Step};
use crate::device::serve::{Answer, serve};
use crate::device::{Device, Disk, Work};
use crate::engine::{Engine, Operation};
use crate::executor::Executor;
use crate::executor::gate::Gate;
use crate::executor::io::Io;
use crate::job::{self, Job, Stepped};
use crate::ledger::Ledger;
use crate::mailbox::Mailbox;
use crate::nbd::server::Exports;
use crate::nbd::server::hub::{Handover, Hub};
use crate::polling::Poller;
use crate::throttle::{Groups, Throttling};
use ipc::block::{BlockEvent, BlockReply, FromBlock, Polling, RngLimit, io_thread_name};
use ipc::block_job::JobNumber;
use ipc::caps::{CallFd, NbdSocketFd, RngSourceFd};
use ipc::graph::GraphRequest;
use ipc::helper;
use ipc::memory::GuestRam;
use ipc::message::{Failure, FromHelper, RequestId};
use ipc::nbd::{ExportNumber, NbdClient};
use ipc::thread_queue::queue;
use ipc::virtio::{Activation, ActivationNumber, DeviceIndex, IoThreadIndex};
use nix::errno::Errno;
use rings::Rings;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Signal of the commands' mailbox. Queues have the signals that [`kick_signal`] makes, all smaller.
const COMMANDS: u32 = u32::MAX;

/// The signal by which a queue's kick is reported.
pub fn kick_signal(device: DeviceIndex, queue: u16) -> u32 {
    u32::from(device.0) << 16 | u32::from(queue)
}

/// What the control thread asks for. Carried out in order; each is answered before the next begins, but those of the graph
/// have an order of their own.
pub struct Command {
    /// Repeated in the answer.
    pub id: RequestId,
    /// What to do.
    pub action: Action,
}

/// See the requests of the same names in [`ipc::block`].
pub enum Action {
    /// Graph.
    Graph(GraphRequest),
    /// AttachRng.
    AttachRng(DeviceIndex, RngSourceFd, RngLimit),
    /// SetPolling.
    SetPolling(Polling),
    /// Activate.
    Activate(DeviceIndex, ActivationNumber, Activation),
    /// Reset.
    Reset(DeviceIndex),
    /// Pause.
    Pause,
    /// Resume.
    Resume,
    /// ServeNbd.
    ServeNbd(NbdClient, NbdSocketFd, u32),
    /// DropNbdClients.
    DropNbdClients,
    /// A client of an export of this thread that has chosen it in another. Not answered.
    Adopt(Box<Handover>),
    /// GetStats.
    Stats,
    /// The supervisor has been sent the answer to the request that has the thread for itself. Not answered.
    Told,
}

/// What the data plane starts with.
pub struct Setup {
    /// Which thread it is.
    pub thread: IoThreadIndex,
    /// Its engine, not yet started; kicks are watched already.
    pub engine: Box<dyn Engine>,
    /// Guest RAM.
    pub memory: &'static GuestRam,
    /// Its disks: largest size of a queue, and the queues' call eventfds and notes.
    pub disks: BTreeMap<DeviceIndex, (u16, Vec<(CallFd, Notes)>)>,
    /// Its virtio-rng devices, by the call eventfd of their queue.
    pub rngs: BTreeMap<DeviceIndex, CallFd>,
    /// The throttle groups of all threads.
    pub groups: Arc<Groups>,
    /// The exports of all threads.
    pub hub: Arc<Hub>,
    /// Where changes of images are noted.
    pub ledger: Arc<Ledger>,
    /// From the control thread.
    pub commands: Arc<Mailbox<Command>>,
    /// To the control thread, and on to the supervisor.
    pub outgoing: Arc<Mailbox<FromBlock>>,
}

impl Setup {
    /// Whether nodes may live here: beside disks, and in the main thread.
    fn has_nodes(&self) -> bool {
        self.thread == IoThreadIndex::MAIN || !self.disks.is_empty()
    }
}

/// Starts the thread and, through it, those of the engine; returns when all are up.
///
/// # Errors
/// The system's.
pub fn start(mut setup: Setup) -> std::io::Result<()> {
    setup
        .engine
        .watch(setup.commands.as_fd().try_clone_to_owned()?, COMMANDS)?;
    let (report, started) = queue();
    std::thread::Builder::new()
        .name(io_thread_name(setup.thread))
        .spawn(move || {
            let result = setup.engine.start(setup.has_nodes(), setup.rngs.len());
            let failed = result.is_err();
            report.send(result);
            // Gone before the process is sealed, so that dropping it later needs nothing of the kernel.
            drop(report);
            if !failed {
                IoThread::new(setup).run();
            }
        })?;
    started
        .recv()
        .unwrap_or_else(|| Err(std::io::Error::other("the thread has ended")))
}

/// How a task ends.
enum Finished {
    Request {
        device: DeviceIndex,
        queue: usize,
        answer: Answer,
        since: Instant,
    },
    /// A read of a virtio-rng device's source.
    Random {
        device: DeviceIndex,
        result: Result<usize, Errno>,
    },
    /// Something that the graph was asked for.
    Graph(Box<graph::Ended>),
    /// A task that nobody waits for.
    Background,
    /// The last client of an export is gone.
    ExportGone(RequestId, ExportNumber),
    /// A step of a job.
    Job(JobNumber, job::Step, Stepped),
    /// A request is held where somebody waited for that.
    Held(RequestId, Result<(), Errno>),
    /// One of the flushes of a pause.
    Flush(Result<(), Errno>),
}

/// A command that waits for requests to end.
enum Waiting {
    Reset(RequestId, DeviceIndex),
    /// Until no request is in flight.
    PauseDrain(RequestId),
    /// Until that many flushes are done.
    PauseFlush {
        id: RequestId,
        left: usize,
        error: Option<Errno>,
    },
}

struct IoThread {
    throttling: Rc<Throttling>,
    io: Rc<Io>,
    executor: Executor<Finished>,
    memory: &'static GuestRam,
    devices: BTreeMap<DeviceIndex, Device>,
    rngs: BTreeMap<DeviceIndex, Rng>,
    /// The number under which each device is active.
    activations: BTreeMap<DeviceIndex, ActivationNumber>,
    poller: Poller,
    graph: graph::GraphWork,
    exports: Rc<Exports>,
    /// For the requests of exports' clients.
    gate: Rc<Gate>,
    jobs: BTreeMap<JobNumber, Job>,
    /// Requests of the guest that are under way.
    guest_tasks: usize,
    /// When the last of them ended.
    guest_seen: Option<Instant>,
    /// Tasks at work on nodes: requests, flushes and what the graph was asked for.
    node_tasks: usize,
    paused: bool,
    /// The machine goes on: what was kept when it failed is to be tried again.
    retry: bool,
    waiting: Option<Waiting>,
    /// Commands behind the waiting one.
    queued: VecDeque<Command>,
    commands: Arc<Mailbox<Command>>,
    outgoing: Arc<Mailbox<FromBlock>>,
    /// Queues that are looked at without being kicked.
    rings: Rings,
    /// Queues with answers that their driver may not know of.
    touched: BTreeSet<(DeviceIndex, usize)>,
    /// Reused from turn to turn.
    work: Vec<Work>,
}

impl IoThread {
    fn new(setup: Setup) -> Self {
        let has_nodes = setup.has_nodes();
        let io = Io::new(setup.engine);
        let throttling = Throttling::new(setup.groups, io.timers().clone());
        let gate = Rc::new(Gate::default());
        let exports = Exports::new(
            setup.thread,
            setup.hub,
            io.clone(),
            gate.clone(),
            setup.outgoing.clone(),
        );
        Self {
            exports,
            gate,
            graph: graph::GraphWork::new(&io, has_nodes, throttling.clone(), setup.ledger),
            throttling,
            jobs: BTreeMap::new(),
            guest_tasks: 0,
            guest_seen: None,
            node_tasks: 0,
            io,
            executor: Executor::default(),
            memory: setup.memory,
            devices: setup
                .disks
                .into_iter()
                .map(|(index, (queue_size, queues))| (index, Device::new(index, queue_size, queues)))
                .collect(),
            rngs: setup
                .rngs
                .into_iter()
                .map(|(index, call)| (index, Rng::new(index, call)))
                .collect(),
            activations: BTreeMap::new(),
            poller: Poller::default(),
            paused: false,
            retry: false,
            waiting: None,
            queued: VecDeque::new(),
            commands: setup.commands,
            outgoing: setup.outgoing,
            rings: Rings::default(),
            touched: BTreeSet::new(),
            work: Vec::new(),
        }
    }

    fn run(mut self) -> ! {
        let mut signals = Vec::new();
        let mut finished = Vec::new();
        let mut has_looked = false;
        loop {
            // A command may start tasks and a finished task may let the next command begin.
            loop {
                self.throttling.set_draining(self.paused || self.graph.is_changing());
                self.gate.set_closed(self.graph.is_changing());
                self.set_draining(self.waiting.is_some() || self.graph.is_changing());
                self.executor.run_until(&mut finished, || self.io.is_turn_over());
                let mut progress = !finished.is_empty();
                for task in self.io.spawner().take() {
                    progress = true;
                    self.executor.spawn(async move {
                        task.await;
                        Finished::Background
                    });
                }
                if progress {
                    let now = Instant::now();
                    finished.drain(..).for_each(|task| self.finish(task, now));
                }
                if (!self.carry_out_commands() && !progress) || self.io.is_turn_over() {
                    break;
                }
            }
            // Tasks may be ready.
            let go_on = self.io.is_turn_over().then_some(Duration::ZERO);
            let mut timeout = self
                .advance_rngs()
                .into_iter()
                .chain(self.advance_jobs())
                .chain(go_on)
                .min();
            let answered = self.notify();
            self.report_passed();
            if let (Some(interrupted), false) = (answered, has_looked)
                && self.look(!interrupted)
            {
                has_looked = true;
                continue;
            }
            has_looked = false;
            if !self.rings.is_empty() && timeout != Some(Duration::ZERO) {
                match self.io.begin() {
                    Ok(is_over) if is_over || self.ask_for_kicks() => timeout = Some(Duration::ZERO),
                    Ok(_) => {}
                    Err(error) => helper::die(&format!("the block I/O engine failed: {error}")),
                }
            }
            if let Err(error) = self.wait(&mut signals, timeout) {
                helper::die(&format!("the block I/O engine failed: {error}"));
            }
            for signal in signals.drain(..) {
                if signal == COMMANDS {
                    while let Some(command) = self.commands.take() {
                        match command.action {
                            Action::Graph(request) => self.ask_graph(command.id, request),
                            Action::Adopt(handover) => self.exports.adopt(*handover),
                            Action::Told => self.graph.told(),
                            _ => self.queued.push_back(command),
                        }
                    }
                } else {
                    self.rings.kicked();
                    self.scan(DeviceIndex((signal >> 16) as u8), (signal & 0xffff) as usize);
                }
            }
        }
    }

    /// Waits for signals and completions: first looking, as long as the poller says, then sleeping.
    fn wait(&mut self, signals: &mut Vec<u32>, timeout: Option<Duration>) -> std::io::Result<()> {
        if !self.poller.is_on() {
            return self.io.wait(signals, timeout).map(drop);
        }
        let start = Instant::now();
        let look = self.poller.time().min(timeout.unwrap_or(Duration::MAX));
        let mut any = false;
        while !any && start.elapsed() < look {
            any = self.io.wait(signals, Some(Duration::ZERO))?;
        }
        if !any {
            self.io.wait(signals, timeout)?;
        }
        self.poller.adapt(start.elapsed());
        Ok(())
    }

    /// Lets every virtio-rng device do one step: what a driver can have done in one turn is bounded. Returns how long
    /// there is nothing more to do.
    fn advance_rngs(&mut self) -> Option<Duration> {
        if self.paused || self.rngs.is_empty() {
            return None;
        }
        let now = Instant::now();
        let mut wake_at: Option<Instant> = None;
        let mut events = Vec::new();
        for (index, rng) in &mut self.rngs {
            let again = match rng.advance(self.memory, now) {
                Ok(Step::Idle) => rng.wake_at(now),
                Ok(Step::Gave) => {
                    self.touched.insert((*index, 0));
                    Some(now)
                }
                Ok(Step::Read { file, into }) => {
                    let (io, device) = (self.io.clone(), *index);
                    self.executor.spawn(async move {
                        let operation = Operation::ReadStream { file, segments: into };
                        let (result, _) = io.submit(operation).await;
                        Finished::Random { device, result }
                    });
                    // The task has yet to run for the first time.
                    Some(now)
                }
                Err(event) => {
                    events.push(event);
                    None
                }
            };
            wake_at = wake_at.into_iter().chain(again).min();
        }
        events.into_iter().for_each(|event| self.report(Err(event)));
        wake_at.map(|wake_at| wake_at.saturating_duration_since(now))
    }

    /// Takes what a queue has and starts it.
    fn scan(&mut self, index: DeviceIndex, queue: usize) {
        if self.paused || self.graph.is_changing() {
            return;
        }
        let Some(device) = self.devices.get_mut(&index) else {
            return;
        };
        let result = device.take(queue, self.memory, &mut self.work);
        self.rings.woken(index, queue);
        self.start_work(index);
        self.report(result);
    }

    /// Starts what was taken from a device.
    fn start_work(&mut self, index: DeviceIndex) {
        for work in self.work.drain(..) {
            let Work {
                queue,
                request,
                disk,
                durable,
                since,
                throttle,
            } = work;
            self.node_tasks += 1;
            self.guest_tasks += 1;
            self.executor.spawn(async move {
                if let (Some(member), Some(direction)) = (throttle, request.direction()) {
                    member.pass(direction, request.bytes()).await;
                }
                Finished::Request {
                    device: index,
                    queue,
                    answer: serve(request, disk, durable).await,
                    since,
                }
            });
        }
    }

    /// Takes what there is anywhere, after requests were not taken for a while.
    fn scan_every_device(&mut self) {
        if self.paused || self.graph.is_changing() {
            return;
        }
        let all: Vec<DeviceIndex> = self.devices.keys().copied().collect();
        let retry = std::mem::take(&mut self.retry);
        for index in all {
            if let (true, Some(device)) = (retry, self.devices.get_mut(&index)) {
                device.take_kept(&mut self.work);
                self.start_work(index);
            }
            self.scan_all(index);
        }
    }

    fn scan_all(&mut self, index: DeviceIndex) {
        let queues = self.devices.get(&index).map_or(0, Device::queues);
        for queue in 0..queues {
            self.scan(index, queue);
        }
    }

    /// A task has ended.
    fn finish(&mut self, finished: Finished, now: Instant) {
        match finished {
            Finished::Request {
                device,
                queue,
                answer,
                since,
            } => {
                self.node_tasks -= 1;
                self.guest_tasks -= 1;
                self.guest_seen = Some(now);
                if let Some(owner) = self.devices.get_mut(&device) {
                    let result = owner.finish(queue, answer, since, now);
                    self.touched.insert((device, queue));
                    self.report(result);
                }
            }
            Finished::Random { device, result } => {
                let result = self
                    .rngs
                    .get_mut(&device)
                    .map_or(Ok(()), |rng| rng.read(result, Instant::now()));
                self.report(result);
            }
            Finished::Job(job, step, result) => {
                self.node_tasks -= 1;
                self.job_stepped(job, &step, result, now);
            }
            Finished::Graph(ended) => {
                self.node_tasks -= 1;
                self.graph_ended(*ended);
            }
            Finished::Background => {}
            Finished::ExportGone(id, export) => self.export_gone(id, export),
            // It was at work on no node, so a drain does not wait for it.
            Finished::Held(id, result) => self.held(id, result),
            Finished::Flush(result) => {
                self.node_tasks -= 1;
                if let Some(Waiting::PauseFlush { left, error, .. }) = &mut self.waiting {
                    *left -= 1;
                    *error = error.or(result.err());
                }
            }
        }
    }

    /// Tells drivers of their answers. Returns whether there were any for disks' drivers, and then whether one of these had to be
    /// interrupted: it does not look for them.
    fn notify(&mut self) -> Option<bool> {
        let mut told = None;
        for (device, queue) in std::mem::take(&mut self.touched) {
            let result = match (self.devices.get_mut(&device), self.rngs.get_mut(&device)) {
                (Some(device), _) => device.notify(queue).map(|interrupted| {
                    told = Some(told.unwrap_or(false) || interrupted);
                }),
                (None, Some(rng)) => rng.notify(),
                (None, None) => Ok(()),
            };
            self.report(result);
        }
        told
    }

    /// Ends the command that waits, if it can, and begins those behind it. Returns whether anything happened.
    fn carry_out_commands(&mut self) -> bool {
        let mut any = self.advance_graph();
        loop {
            if let Some(waiting) = self.waiting.take() {
                self.waiting = self.go_on(waiting);
                if self.waiting.is_some() {
                    return any;
                }
                any = true;
            }
            let Some(command) = self.queued.pop_front() else {
                return any;
            };
            any = true;
            self.begin(command);
        }
    }

    fn begin(&mut self, Command { id, action }: Command) {
        let result = match action {
            Action::Graph(request) => return self.ask_graph(id, request),
            Action::ServeNbd(client, socket, handshake_s) => self
                .exports
                .serve(client, socket, handshake_s)
                .map(|()| BlockReply::Done),
            Action::DropNbdClients => {
                self.exports.drop_clients();
                Ok(BlockReply::Done)
            }
            Action::Adopt(handover) => return self.exports.adopt(*handover),
            Action::Told => return self.graph.told(),
            Action::AttachRng(device, source, limit) => self.attach_rng(device, source, limit),
            Action::SetPolling(polling) => {
                self.poller.configure(polling);
                self.io.set_max_batch(polling.max_batch);
                Ok(BlockReply::Done)
            }
            Action::Activate(device, number, activation) => self.activate(device, number, &activation),
            Action::Reset(device) if self.rngs.contains_key(&device) => {
                self.activations.remove(&device);
                self.rngs.get_mut(&device).into_iter().for_each(Rng::reset);
                Ok(BlockReply::Done)
            }
            Action::Reset(device) => match self.device(device) {
                Ok(owner) => {
                    owner.stop();
                    self.activations.remove(&device);
                    self.waiting = Some(Waiting::Reset(id, device));
                    return;
                }
                Err(failure) => Err(failure),
            },
            Action::Pause if self.paused => Err(Failure::new("the block devices are paused already")),
            Action::Pause => {
                self.paused = true;
                self.waiting = Some(Waiting::PauseDrain(id));
                return;
            }
            Action::Resume if !self.paused => Err(Failure::new("the block devices are not paused")),
            Action::Resume => {
                self.paused = false;
                self.retry = true;
                self.scan_every_device();
                Ok(BlockReply::Done)
            }
            Action::Stats => Ok(BlockReply::Stats(
                self.devices
                    .iter()
                    .map(|(index, device)| (*index, device.stats()))
                    .collect(),
            )),
        };
        self.reply(id, result);
    }

    /// What is still to be waited for, or nothing and the answer is given.
    fn go_on(&mut self, waiting: Waiting) -> Option<Waiting> {
        match waiting {
            Waiting::Reset(id, index) => {
                if let Some(device) = self.devices.get_mut(&index) {
                    if device.in_flight() > 0 {
                        return Some(waiting);
                    }
                    device.forget_rings();
                }
                self.reply(id, Ok(BlockReply::Done));
                None
            }
            Waiting::PauseDrain(id) => {
                if self.devices.values().any(|device| device.in_flight() > 0) {
                    return Some(waiting);
                }
                let disks: Vec<Rc<Disk>> = self.devices.values().filter_map(Device::disk).cloned().collect();
                let targets = self.graph.written_without_device();
                let left = disks.len() + targets.len();
                self.node_tasks += left;
                for disk in disks {
                    self.executor.spawn(async move { Finished::Flush(disk.flush().await) });
                }
                for target in targets {
                    self.executor
                        .spawn(async move { Finished::Flush(target.node().flush().await) });
                }
                self.go_on(Waiting::PauseFlush { id, left, error: None })
            }
            Waiting::PauseFlush { left: 1.., .. } => Some(waiting),
            Waiting::PauseFlush { id, error, .. } => {
                let result = match error {
                    None => Ok(BlockReply::Done),
                    Some(errno) => Err(Failure {
                        message: format!("paused, but a disk could not be flushed: {errno}"),
                        errno: Some(errno as i32),
                    }),
                };
                self.reply(id, result);
                None
            }
        }
    }

    fn device(&mut self, index: DeviceIndex) -> Result<&mut Device, Failure> {
        self.devices
            .get_mut(&index)
            .ok_or_else(|| Failure::new(format!("there is no disk device {}", index.0)))
    }

    fn attach_rng(&mut self, index: DeviceIndex, source: RngSourceFd, limit: RngLimit) -> Result<BlockReply, Failure> {
        let rng = self
            .rngs
            .get_mut(&index)
            .ok_or_else(|| Failure::new(format!("device {} is no virtio-rng device", index.0)))?;
        if rng.is_attached() {
            return Err(Failure::new(format!("device {} has a source already", index.0)));
        }
        if limit.period_ms == 0 {
            return Err(Failure::new("a period of random bytes has no length"));
        }
        let file = self.io.add_file(source.into_fd())?;
        Ok(BlockReply::RngAttached(rng.attach(file, limit)))
    }

    fn activate(
        &mut self,
        index: DeviceIndex,
        number: ActivationNumber,
        activation: &Activation,
    ) -> Result<BlockReply, Failure> {
        if self.activations.get(&index) == Some(&number) {
            return Ok(BlockReply::Done);
        }
        let memory = self.memory;
        if let Some(rng) = self.rngs.get_mut(&index) {
            rng.activate(memory, activation)?;
            self.activations.insert(index, number);
            self.touched.insert((index, 0));
            return Ok(BlockReply::Done);
        }
        let device = self.device(index)?;
        device.activate(memory, activation, number)?;
        self.activations.insert(index, number);
        self.touched
            .extend(activation.queues.iter().map(|queue| (index, usize::from(queue.index))));
        self.scan_all(index);
        Ok(BlockReply::Done)
    }

    fn reply(&self, id: RequestId, result: Result<BlockReply, Failure>) {
        self.outgoing.put(FromHelper::Reply { id, result });
    }

    fn report(&self, result: Result<(), BlockEvent>) {
        if let Err(event) = result {
            self.outgoing.put(FromHelper::Event(event));
        }
    }
}
