//! The control thread: the supervisor's requests, in the order that [`ipc::block`] prescribes.
//!
//! Before the seal it builds; afterwards it only passes commands to the data plane and answers and events back.

use crate::device::inflight::{self, Notes, Record};
use crate::engine::{self, Engine};
use crate::graph::places::{Places, Recipient};
use crate::iothread::{self, Action, Command, kick_signal};
use crate::ledger::Ledger;
use crate::mailbox::Mailbox;
use crate::nbd::server::hub::Hub;
use crate::throttle::Groups;
use ipc::block::{BlockReply, BlockRequest, BlockSetup, EngineChoice, FromBlock, ToBlock};
use ipc::caps::{CallFd, FenceFd, SeccompListener};
use ipc::graph::{GraphReply, GraphRequest};
use ipc::helper;
use ipc::memory::{GuestRam, map_inflight, map_read_write};
use ipc::message::{Failure, FromHelper, RequestId};
use ipc::virtio::{
    DeviceIndex, DeviceKind, IoThreadIndex, MAX_DEVICES, MAX_IO_THREADS, MAX_QUEUE_SIZE, MAX_QUEUES, MIN_QUEUE_SIZE,
    QueueFds,
};
use ipc::{Channel, IpcError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;

/// What there is before the seal.
#[derive(Default)]
struct Building {
    machine: Option<Machine>,
    devices: BTreeMap<DeviceIndex, BuildingDevice>,
}

struct Machine {
    memory: &'static GuestRam,
    /// Where requests under way are noted, and where the next queue's notes begin.
    record: &'static Record,
    notes: inflight::Places,
    /// Where changes of images are noted.
    ledger: Arc<Ledger>,
    /// What tells the supervisor that nothing of this process is left: never closed.
    fence: &'static FenceFd,
    /// What every thread with devices uses.
    choice: EngineChoice,
    /// One per thread, as soon as it has a device; the main one is the first.
    engines: Vec<Option<Box<dyn Engine>>>,
}

struct BuildingDevice {
    kind: DeviceKind,
    thread: IoThreadIndex,
    queues: u16,
    queue_size: u16,
    calls: Vec<CallFd>,
    /// For each queue, if they are noted.
    notes: Vec<Notes>,
}

enum State {
    Building(Building),
    /// Sealed: the data plane runs.
    Running(DataPlane),
}

/// Serves the supervisor until it is gone.
pub fn run(mut channel: Channel<FromBlock, ToBlock>) -> ! {
    let outgoing = match Mailbox::new() {
        Ok(mailbox) => Arc::new(mailbox),
        Err(error) => helper::die(&format!("eventfd: {error}")),
    };
    let mut gathering = Gathering::default();
    let mut state = State::Building(Building::default());
    loop {
        let (request, messages) = wait(&channel, &outgoing);
        if messages {
            outgoing.acknowledge();
            while let Some(message) = outgoing.take() {
                if let Some(message) = gathering.add(message) {
                    let State::Running(plane) = &mut state else {
                        send(&mut channel, message);
                        continue;
                    };
                    plane.places.answered(&message);
                    let told = plane.waits_until_told(&message);
                    send(&mut channel, message);
                    if let Some(thread) = told {
                        plane.tell(thread);
                    }
                }
            }
        }
        if request {
            let ToBlock { id, body } = channel.recv().unwrap_or_else(|error| lost(&error));
            let result = match &mut state {
                State::Running(plane) => match body {
                    BlockRequest::WatchMemory { device } => ipc::live::watch(device, plane.memory)
                        .map(BlockReply::MemoryWatched)
                        .map_err(|error| Failure::new(format!("USERFAULTFD_IOC_NEW: {error}"))),
                    body => match plane.pass_on(id, body, &mut gathering) {
                        Ok(()) => continue,
                        Err(failure) => Err(failure),
                    },
                },
                State::Building(building) => match build(building, body, &outgoing) {
                    Ok(Built::Done) => Ok(BlockReply::Done),
                    Ok(Built::Sealed(sealed)) => {
                        let (reply, plane) = *sealed;
                        state = State::Running(plane);
                        Ok(reply)
                    }
                    Err(failure) => Err(failure),
                },
            };
            // The reply owns the listener: sending it drops our copy.
            send(&mut channel, FromHelper::Reply { id, result });
        }
    }
}

/// Waits for a request of the supervisor or a message of the data plane: which is there?
fn wait(channel: &Channel<FromBlock, ToBlock>, outgoing: &Mailbox<FromBlock>) -> (bool, bool) {
    let mut fds = [
        PollFd::new(channel.as_fd(), PollFlags::POLLIN),
        PollFd::new(outgoing.as_fd(), PollFlags::POLLIN),
    ];
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) => {}
        Err(Errno::EINTR) => return (false, false),
        Err(errno) => helper::die(&format!("poll: {errno}")),
    }
    // POLLHUP and POLLERR as well: receiving then tells what it is.
    let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
    (ready(&fds[0]), ready(&fds[1]))
}

fn send(channel: &mut Channel<FromBlock, ToBlock>, message: FromBlock) {
    if let Err(error) = channel.send(message) {
        lost(&error);
    }
}

fn lost(error: &IpcError) -> ! {
    helper::die(&format!("the supervisor's channel: {error}"))
}

enum Built {
    Done,
    Sealed(Box<(BlockReply, DataPlane)>),
}

fn build(building: &mut Building, request: BlockRequest, outgoing: &Arc<Mailbox<FromBlock>>) -> Result<Built, Failure> {
    match request {
        BlockRequest::Setup(setup) => set_up(building, setup),
        BlockRequest::AddDevice {
            device,
            kind,
            thread,
            queues,
            queue_size,
        } => {
            let new = BuildingDevice {
                kind,
                thread,
                queues,
                queue_size,
                calls: Vec::new(),
                notes: Vec::new(),
            };
            add_device(building, device, new)
        }
        BlockRequest::AddQueues { device, queues } => add_queues(building, device, queues),
        BlockRequest::Seal => return seal(building, outgoing),
        _ => Err(Failure::new("block-proc is not sealed yet")),
    }
    .map(|()| Built::Done)
}

fn set_up(building: &mut Building, setup: BlockSetup) -> Result<(), Failure> {
    if building.machine.is_some() {
        return Err(Failure::new("block-proc is set up already"));
    }
    if setup.io_threads >= MAX_IO_THREADS {
        return Err(Failure::new(format!(
            "{} threads beside the main one: at most {}",
            setup.io_threads,
            MAX_IO_THREADS - 1
        )));
    }
    let memory = map_read_write(setup.memory, setup.ram_bytes)?;
    let notes = map_inflight(setup.inflight, setup.inflight_bytes)?;
    let ledger = Ledger::new(notes.clone(), setup.inflight_bytes)?;
    let record = Record::new(notes, &memory)?;
    // Held and mapped as long as the process lives.
    let fence: &'static FenceFd = Box::leak(Box::new(setup.fence));
    let main = create_engine(setup.engine, fence)?;
    let choice = main.choice();
    let mut engines = vec![Some(main)];
    engines.extend((0..setup.io_threads).map(|_| None));
    building.machine = Some(Machine {
        choice,
        engines,
        memory: Box::leak(Box::new(memory)),
        record: Box::leak(Box::new(record)),
        notes: inflight::Places::new(setup.inflight_bytes),
        ledger,
        fence,
    });
    Ok(())
}

/// An engine whose requests keep the fence up.
fn create_engine(choice: EngineChoice, fence: &FenceFd) -> Result<Box<dyn Engine>, Failure> {
    let mut engine = engine::create(choice, helper::log)?;
    engine.hold(fence.as_fd())?;
    Ok(engine)
}

fn add_device(building: &mut Building, device: DeviceIndex, mut new: BuildingDevice) -> Result<(), Failure> {
    let Some(machine) = &mut building.machine else {
        return Err(Failure::new("block-proc is not set up yet"));
    };
    let BuildingDevice {
        kind,
        thread,
        queues,
        queue_size,
        ..
    } = new;
    if usize::from(thread.0) >= machine.engines.len() {
        return Err(Failure::new(format!("there is no I/O thread {}", thread.0)));
    }
    if kind == DeviceKind::Rng && queues > 1 {
        return Err(Failure::new(format!(
            "device {}: a virtio-rng device has one queue",
            device.0
        )));
    }
    if !(MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&queue_size) {
        return Err(Failure::new(format!(
            "device {}: queues of {queue_size} descriptors",
            device.0
        )));
    }
    if device.0 >= MAX_DEVICES || queues == 0 || queues > MAX_QUEUES {
        return Err(Failure::new(format!(
            "device {} with {queues} queues: at most {MAX_DEVICES} devices of 1 to {MAX_QUEUES} queues",
            device.0
        )));
    }
    if building.devices.contains_key(&device) {
        return Err(Failure::new(format!("device {} exists already", device.0)));
    }
    let engine = &mut machine.engines[usize::from(thread.0)];
    if engine.is_none() {
        *engine = Some(create_engine(machine.choice, machine.fence)?);
    }
    // Random bytes are given in order and one buffer at a time: they need no notes.
    if kind == DeviceKind::Block {
        for _ in 0..queues {
            let base = machine.notes.take(queue_size)?;
            new.notes.push(Notes::new(machine.record, base, queue_size));
        }
    }
    building.devices.insert(device, new);
    Ok(())
}

fn add_queues(building: &mut Building, index: DeviceIndex, queues: Vec<QueueFds>) -> Result<(), Failure> {
    let (Some(machine), Some(device)) = (&mut building.machine, building.devices.get_mut(&index)) else {
        return Err(Failure::new(format!("there is no device {}", index.0)));
    };
    if device.calls.len() + queues.len() > usize::from(device.queues) {
        return Err(Failure::new(format!(
            "device {} has only {} queues",
            index.0, device.queues
        )));
    }
    for QueueFds { kick, call } in queues {
        let queue = device.calls.len() as u16;
        let engine = &mut machine.engines[usize::from(device.thread.0)];
        // AddDevice has made it.
        let engine = engine
            .as_mut()
            .ok_or_else(|| Failure::new("the thread has no engine"))?;
        engine.watch(kick.into_fd(), kick_signal(index, queue))?;
        device.calls.push(call);
    }
    Ok(())
}

fn seal(building: &mut Building, outgoing: &Arc<Mailbox<FromBlock>>) -> Result<Built, Failure> {
    for (index, device) in &building.devices {
        if device.calls.len() != usize::from(device.queues) {
            return Err(Failure::new(format!(
                "device {} has {} of its {} queues",
                index.0,
                device.calls.len(),
                device.queues
            )));
        }
    }
    let Machine {
        memory,
        choice,
        engines,
        ledger,
        fence,
        ..
    } = building
        .machine
        .take()
        .ok_or_else(|| Failure::new("block-proc is not set up yet"))?;
    let mut plane = DataPlane {
        memory,
        threads: Vec::new(),
        places: Places::new(
            building
                .devices
                .iter()
                .map(|(index, device)| (*index, device.thread))
                .collect(),
        ),
        alone: BTreeMap::new(),
    };
    let groups = Arc::new(Groups::default());
    let hub = Arc::new(Hub::default());
    let mut devices = std::mem::take(&mut building.devices);
    for (thread, engine) in (0..).map(IoThreadIndex).zip(engines) {
        // A thread without devices and nodes only waits: for that it needs no ring.
        let engine = match engine {
            Some(engine) => engine,
            None => create_engine(EngineChoice::Threads, fence)?,
        };
        let (mut disks, mut rngs) = (BTreeMap::new(), BTreeMap::new());
        for (index, mut device) in devices.extract_if(.., |_, device| device.thread == thread) {
            match device.kind {
                DeviceKind::Block => {
                    let queues = device.calls.into_iter().zip(device.notes);
                    disks.insert(index, (device.queue_size, queues.collect()));
                }
                DeviceKind::Rng => rngs.extend(device.calls.pop().map(|call| (index, call))),
            }
        }
        let commands = Arc::new(Mailbox::new()?);
        let taker = commands.clone();
        hub.add_thread(thread, move |handover| {
            let action = Action::Adopt(Box::new(handover));
            // Not answered.
            let id = RequestId(0);
            taker.put(Command { id, action });
        });
        iothread::start(iothread::Setup {
            thread,
            engine,
            memory,
            disks,
            rngs,
            groups: groups.clone(),
            hub: hub.clone(),
            ledger: ledger.clone(),
            commands: commands.clone(),
            outgoing: outgoing.clone(),
        })?;
        plane.threads.push(commands);
    }
    let listener = policies::seal_helper(policies::Process::Block, policies::Mode::of_this_process())
        .unwrap_or_else(|error| helper::die(&format!("cannot seal: {error}")));
    let reply = BlockReply::Sealed {
        listener: SeccompListener::new(listener),
        load_address: helper::load_address(),
        engine: choice,
    };
    Ok(Built::Sealed(Box::new((reply, plane))))
}

/// The threads of the data plane, and which of them has which device and node.
struct DataPlane {
    memory: &'static GuestRam,
    threads: Vec<Arc<Mailbox<Command>>>,
    places: Places,
    /// Requests that have their thread for themselves until their answer has been sent.
    alone: BTreeMap<RequestId, IoThreadIndex>,
}

impl DataPlane {
    /// The thread that waits until a message has been sent.
    fn waits_until_told(&mut self, message: &FromBlock) -> Option<IoThreadIndex> {
        match message {
            FromHelper::Reply { id, .. } => self.alone.remove(id),
            FromHelper::Event(_) => None,
        }
    }

    fn tell(&self, thread: IoThreadIndex) {
        // Not answered.
        let id = RequestId(0);
        let action = Action::Told;
        // It has answered, so it is there.
        let _ = self.put(thread, Command { id, action });
    }

    /// Gives a request to the thread that it concerns, or to all.
    fn pass_on(&mut self, id: RequestId, request: BlockRequest, gathering: &mut Gathering) -> Result<(), Failure> {
        let (thread, action) = match request {
            BlockRequest::Pause => {
                self.put_all(id, gathering, || Action::Pause);
                return Ok(());
            }
            BlockRequest::Resume => {
                self.put_all(id, gathering, || Action::Resume);
                return Ok(());
            }
            BlockRequest::GetStats => {
                self.put_all(id, gathering, || Action::Stats);
                return Ok(());
            }
            BlockRequest::DropNbdClients => {
                self.put_all(id, gathering, || Action::DropNbdClients);
                return Ok(());
            }
            BlockRequest::ServeNbd {
                client,
                socket,
                handshake_s,
            } => (IoThreadIndex::MAIN, Action::ServeNbd(client, socket, handshake_s)),
            BlockRequest::Graph(request) => return self.pass_on_graph(id, request, gathering),
            BlockRequest::AttachRng { device, source, limit } => {
                (self.places.of_device(device)?, Action::AttachRng(device, source, limit))
            }
            BlockRequest::Activate {
                device,
                number,
                activation,
            } => (
                self.places.of_device(device)?,
                Action::Activate(device, number, activation),
            ),
            BlockRequest::Reset { device } => (self.places.of_device(device)?, Action::Reset(device)),
            BlockRequest::SetPolling { thread, polling } => (thread, Action::SetPolling(polling)),
            BlockRequest::Setup(_)
            | BlockRequest::WatchMemory { .. }
            | BlockRequest::AddDevice { .. }
            | BlockRequest::AddQueues { .. }
            | BlockRequest::Seal => return Err(Failure::new("block-proc is sealed already")),
        };
        self.put(thread, Command { id, action })
    }

    fn pass_on_graph(
        &mut self,
        id: RequestId,
        request: GraphRequest,
        gathering: &mut Gathering,
    ) -> Result<(), Failure> {
        match (self.places.recipient(id, &request)?, request) {
            (Recipient::Thread(thread), request) => {
                if iothread::is_exclusive(&request) {
                    self.alone.insert(id, thread);
                }
                let action = Action::Graph(request);
                let put = self.put(thread, Command { id, action });
                if put.is_err() {
                    self.places.forget(id);
                    self.alone.remove(&id);
                }
                put
            }
            (Recipient::All, GraphRequest::Report(nodes)) => {
                self.put_all(id, gathering, || Action::Graph(GraphRequest::Report(nodes.clone())));
                Ok(())
            }
            (Recipient::All, GraphRequest::ReportBitmaps) => {
                self.put_all(id, gathering, || Action::Graph(GraphRequest::ReportBitmaps));
                Ok(())
            }
            (Recipient::All, GraphRequest::ReportJobs) => {
                self.put_all(id, gathering, || Action::Graph(GraphRequest::ReportJobs));
                Ok(())
            }
            (Recipient::All, GraphRequest::StoreBitmaps) => {
                self.put_all(id, gathering, || Action::Graph(GraphRequest::StoreBitmaps));
                Ok(())
            }
            (Recipient::All, GraphRequest::SetGroup { group, limits }) => {
                self.put_all(id, gathering, || {
                    Action::Graph(GraphRequest::SetGroup { group, limits })
                });
                Ok(())
            }
            (Recipient::All, GraphRequest::RemoveGroup(group)) => {
                self.put_all(id, gathering, || Action::Graph(GraphRequest::RemoveGroup(group)));
                Ok(())
            }
            (Recipient::All, _) => Err(Failure::new("no thread can do this")),
        }
    }

    fn put(&self, thread: IoThreadIndex, command: Command) -> Result<(), Failure> {
        let commands = self.threads.get(usize::from(thread.0));
        commands
            .ok_or_else(|| Failure::new(format!("there is no I/O thread {}", thread.0)))?
            .put(command);
        Ok(())
    }

    fn put_all(&self, id: RequestId, gathering: &mut Gathering, make: impl Fn() -> Action) {
        gathering.expect(id, self.threads.len());
        for commands in &self.threads {
            commands.put(Command { id, action: make() });
        }
    }
}

/// Requests that go to all threads: their answers become one.
#[derive(Default)]
struct Gathering(BTreeMap<RequestId, Gathered>);

struct Gathered {
    left: usize,
    result: Result<BlockReply, Failure>,
}

impl Gathering {
    fn expect(&mut self, id: RequestId, threads: usize) {
        let result = Ok(BlockReply::Done);
        self.0.insert(id, Gathered { left: threads, result });
    }

    /// Takes a thread's message; returns what is to be said to the supervisor, if it is complete.
    fn add(&mut self, message: FromBlock) -> Option<FromBlock> {
        let (id, result) = match message {
            FromHelper::Reply { id, result } if self.0.contains_key(&id) => (id, result),
            other => return Some(other),
        };
        let gathered = self.0.get_mut(&id)?;
        gathered.left -= 1;
        gathered.result = match (std::mem::replace(&mut gathered.result, Ok(BlockReply::Done)), result) {
            (Err(failure), _) | (Ok(_), Err(failure)) => Err(failure),
            (Ok(BlockReply::Stats(mut some)), Ok(BlockReply::Stats(more))) => {
                some.extend(more);
                Ok(BlockReply::Stats(some))
            }
            (
                Ok(BlockReply::Graph(GraphReply::Reports(mut some))),
                Ok(BlockReply::Graph(GraphReply::Reports(more))),
            ) => {
                some.extend(more);
                Ok(BlockReply::Graph(GraphReply::Reports(some)))
            }
            (
                Ok(BlockReply::Graph(GraphReply::Bitmaps(mut some))),
                Ok(BlockReply::Graph(GraphReply::Bitmaps(more))),
            ) => {
                some.extend(more);
                Ok(BlockReply::Graph(GraphReply::Bitmaps(some)))
            }
            (Ok(BlockReply::Graph(GraphReply::Jobs(mut some))), Ok(BlockReply::Graph(GraphReply::Jobs(more)))) => {
                some.extend(more);
                Ok(BlockReply::Graph(GraphReply::Jobs(some)))
            }
            (Ok(_), Ok(reply)) => Ok(reply),
        };
        if gathered.left > 0 {
            return None;
        }
        let Gathered { result, .. } = self.0.remove(&id)?;
        Some(FromHelper::Reply { id, result })
    }
}
