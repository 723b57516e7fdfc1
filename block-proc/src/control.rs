//! The control thread: the supervisor's requests, in the order that [`ipc::block`] prescribes.
//!
//! Before the seal it builds; afterwards it only passes commands to the data plane and answers and events back.

use crate::engine::{self, Engine};
use crate::iothread::{self, Action, Command, kick_signal};
use crate::mailbox::Mailbox;
use ipc::block::{BlockReply, BlockRequest, BlockSetup, FromBlock, ToBlock};
use ipc::caps::{CallFd, SeccompListener};
use ipc::helper;
use ipc::memory::{GuestRam, map_read_write};
use ipc::message::{Failure, FromHelper};
use ipc::virtio::{DeviceIndex, MAX_DEVICES, MAX_QUEUES, QueueFds};
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
    engine: Box<dyn Engine>,
}

struct BuildingDevice {
    queues: u16,
    calls: Vec<CallFd>,
}

enum State {
    Building(Building),
    /// Sealed: the data plane runs.
    Running(Arc<Mailbox<Command>>),
}

/// Serves the supervisor until it is gone.
pub fn run(mut channel: Channel<FromBlock, ToBlock>) -> ! {
    let outgoing = match Mailbox::new() {
        Ok(mailbox) => Arc::new(mailbox),
        Err(error) => helper::die(&format!("eventfd: {error}")),
    };
    let mut state = State::Building(Building::default());
    loop {
        let (request, messages) = wait(&channel, &outgoing);
        if messages {
            outgoing.acknowledge();
            while let Some(message) = outgoing.take() {
                send(&mut channel, message);
            }
        }
        if request {
            let ToBlock { id, body } = channel.recv().unwrap_or_else(|error| lost(&error));
            let result = match &mut state {
                State::Running(commands) => match action(body) {
                    Ok(action) => {
                        commands.put(Command { id, action });
                        continue;
                    }
                    Err(failure) => Err(failure),
                },
                State::Building(building) => match build(building, body, &outgoing) {
                    Ok(Built::Done) => Ok(BlockReply::Done),
                    Ok(Built::Sealed(reply, commands)) => {
                        state = State::Running(commands);
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
    Sealed(BlockReply, Arc<Mailbox<Command>>),
}

fn build(building: &mut Building, request: BlockRequest, outgoing: &Arc<Mailbox<FromBlock>>) -> Result<Built, Failure> {
    match request {
        BlockRequest::Setup(setup) => set_up(building, setup),
        BlockRequest::AddDevice { device, queues } => add_device(building, device, queues),
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
    let memory = map_read_write(setup.memory, setup.ram_bytes)?;
    building.machine = Some(Machine {
        engine: engine::create(setup.engine, helper::log)?,
        // Mapped as long as the process lives.
        memory: Box::leak(Box::new(memory)),
    });
    Ok(())
}

fn add_device(building: &mut Building, device: DeviceIndex, queues: u16) -> Result<(), Failure> {
    if building.machine.is_none() {
        return Err(Failure::new("block-proc is not set up yet"));
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
    let calls = Vec::new();
    building.devices.insert(device, BuildingDevice { queues, calls });
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
        machine.engine.watch(kick.into_fd(), kick_signal(index, queue))?;
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
    let Machine { memory, engine } = building
        .machine
        .take()
        .ok_or_else(|| Failure::new("block-proc is not set up yet"))?;
    let choice = engine.choice();
    let commands = Arc::new(Mailbox::new()?);
    iothread::start(iothread::Setup {
        engine,
        memory,
        devices: std::mem::take(&mut building.devices)
            .into_iter()
            .map(|(index, device)| (index, device.calls))
            .collect(),
        commands: commands.clone(),
        outgoing: outgoing.clone(),
    })?;
    let listener = policies::seal_helper(policies::Process::Block)
        .unwrap_or_else(|error| helper::die(&format!("cannot seal: {error}")));
    let reply = BlockReply::Sealed {
        listener: SeccompListener::new(listener),
        engine: choice,
    };
    Ok(Built::Sealed(reply, commands))
}

/// What a request means once the process is sealed.
fn action(request: BlockRequest) -> Result<Action, Failure> {
    Ok(match request {
        BlockRequest::AttachDisk { device, disk, info } => Action::Attach(device, disk, info),
        BlockRequest::AddBacking { device, disk, info } => Action::AddBacking(device, disk, info),
        BlockRequest::Activate { device, activation } => Action::Activate(device, activation),
        BlockRequest::Reset { device } => Action::Reset(device),
        BlockRequest::Pause => Action::Pause,
        BlockRequest::Resume => Action::Resume,
        BlockRequest::GetStats => Action::Stats,
        BlockRequest::Setup(_)
        | BlockRequest::AddDevice { .. }
        | BlockRequest::AddQueues { .. }
        | BlockRequest::Seal => return Err(Failure::new("block-proc is sealed already")),
    })
}
