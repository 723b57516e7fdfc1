//! The control thread: answers the supervisor's requests in the order that `ipc::vcpu` prescribes, and passes on what the
//! other threads report.

use crate::boot::Source;
use crate::machine::{self, Machine};
use crate::outbox::Outbox;
use ipc::caps::SeccompListener;
use ipc::helper::die;
use ipc::vcpu::{FromVcpu, ToVcpu, VcpuReply, VcpuRequest};
use ipc::{Channel, Failure, FromHelper};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use policies::Process;
use std::os::fd::AsFd;

/// How far the machine is.
enum Phase {
    /// Nothing is there.
    Empty,
    /// Devices can be added.
    Building(Box<Machine>),
    /// The filter is loaded; the machine can be booted.
    Sealed(Box<Machine>),
}

/// Serves until the supervisor closes the channel; never returns.
pub fn serve(mut channel: Channel<FromVcpu, ToVcpu>) -> ! {
    let outbox = Outbox::new().unwrap_or_else(|error| die(&format!("eventfd: {error}")));
    let mut phase = Phase::Empty;
    loop {
        let has_request = wait(&channel, &outbox);
        send_events(&mut channel, &outbox);
        if !has_request {
            continue;
        }
        match channel.recv() {
            Ok(request) => {
                let result = handle(&mut phase, request.body, &outbox);
                // What happened before the answer is told before the answer.
                send_events(&mut channel, &outbox);
                send(&mut channel, FromHelper::Reply { id: request.id, result });
            }
            Err(error) => die(&format!("channel: {error}")),
        }
    }
}

/// Waits for a request or an event; returns whether there is a request.
fn wait(channel: &Channel<FromVcpu, ToVcpu>, outbox: &Outbox) -> bool {
    let mut fds = [
        PollFd::new(channel.as_fd(), PollFlags::POLLIN),
        PollFd::new(outbox.as_fd(), PollFlags::POLLIN),
    ];
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => fds[0].any().unwrap_or(false),
        Err(errno) => die(&format!("poll: {errno}")),
    }
}

fn send_events(channel: &mut Channel<FromVcpu, ToVcpu>, outbox: &Outbox) {
    for event in outbox.take() {
        send(channel, FromHelper::Event(event));
    }
}

fn send(channel: &mut Channel<FromVcpu, ToVcpu>, message: FromVcpu) {
    if let Err(error) = channel.send(message) {
        die(&format!("channel: {error}"));
    }
}

fn handle(phase: &mut Phase, request: VcpuRequest, outbox: &Outbox) -> Result<VcpuReply, Failure> {
    match std::mem::replace(phase, Phase::Empty) {
        Phase::Empty => {
            let VcpuRequest::Setup(setup) = request else {
                return Err(Failure::new("Setup comes first"));
            };
            *phase = Phase::Building(Box::new(machine::build(setup, outbox)?));
            Ok(VcpuReply::Done)
        }
        Phase::Building(machine) => {
            let (next, result) = add(machine, request);
            *phase = next;
            result
        }
        Phase::Sealed(mut machine) => {
            let result = operate(&mut machine, request);
            *phase = Phase::Sealed(machine);
            result
        }
    }
}

/// Requests between Setup and Seal.
fn add(mut machine: Box<Machine>, request: VcpuRequest) -> (Phase, Result<VcpuReply, Failure>) {
    let result = match request {
        VcpuRequest::AddDevice {
            device,
            kind,
            slot,
            queues,
            queue_size,
        } => machine.add_device(device, kind, slot, queues, queue_size),
        VcpuRequest::AddQueues { device, queues } => machine.add_queues(device, queues),
        VcpuRequest::GetRunPages { first } => {
            let pages = machine.run_pages(first).map(VcpuReply::RunPages);
            return (Phase::Building(machine), pages);
        }
        VcpuRequest::Seal => {
            return match machine.start() {
                Ok(()) => {
                    let sealed = seal(&machine);
                    (Phase::Sealed(machine), Ok(sealed))
                }
                Err(failure) => (Phase::Building(machine), Err(failure)),
            };
        }
        VcpuRequest::Setup(_) => Err(Failure::new("the machine is set up already")),
        _ => Err(Failure::new("Seal comes before anything else is done with the machine")),
    };
    (Phase::Building(machine), result.map(|()| VcpuReply::Done))
}

/// Loads the sealed filter on all threads. A process that cannot be sealed must not go on.
fn seal(machine: &Machine) -> VcpuReply {
    match policies::seal_helper(Process::Vcpu, policies::Mode::of_this_process()) {
        Ok(listener) => VcpuReply::Sealed {
            listener: SeccompListener::new(listener),
            load_address: ipc::helper::load_address(),
            thread_ids: machine.thread_ids(),
        },
        Err(error) => die(&error.to_string()),
    }
}

/// Requests after Seal.
fn operate(machine: &mut Machine, request: VcpuRequest) -> Result<VcpuReply, Failure> {
    match request {
        VcpuRequest::ConfigureDevice { device, identity } => machine
            .device(device)?
            .configure(identity)
            .map_err(|error| Failure::new(error.to_string()))?,
        VcpuRequest::AttachSerial {
            input,
            output,
            datagrams,
        } => machine.attach_serial(input, output, datagrams)?,
        VcpuRequest::Boot {
            kernel,
            initrd,
            command_line,
        } => {
            let format = machine.boot(Source {
                kernel,
                initrd,
                command_line,
            })?;
            return Ok(VcpuReply::Booted { format });
        }
        VcpuRequest::Run => machine.run()?,
        VcpuRequest::Pause => machine.pause(),
        VcpuRequest::PowerButton => machine.press_power_button()?,
        VcpuRequest::DeviceActivated { device, ok } => machine.device(device)?.activated(ok),
        VcpuRequest::DeviceReset { device } => machine.device(device)?.reset_done(),
        VcpuRequest::DeviceBroken { device } => machine.device(device)?.broken(),
        VcpuRequest::InjectNmi => machine.inject_nmi()?,
        VcpuRequest::GetRtcOffset => return Ok(VcpuReply::RtcOffset(machine.rtc_offset())),
        VcpuRequest::ExpandCpuModel { changes } => {
            return Ok(match machine.expand_cpu_model(&changes) {
                Ok(properties) => VcpuReply::CpuModel(properties),
                Err(name) => VcpuReply::UnknownCpuFeature(name),
            });
        }
        VcpuRequest::GetAddressMap => return Ok(VcpuReply::AddressMap(machine.address_map())),
        VcpuRequest::GetVmCoreInfo => return Ok(VcpuReply::VmCoreInfo(machine.vmcoreinfo())),
        VcpuRequest::WatchMemory { device } => return Ok(VcpuReply::MemoryWatched(machine.watch_memory(device)?)),
        VcpuRequest::GetRegisters => return Ok(VcpuReply::Registers(machine.registers()?)),
        VcpuRequest::Setup(_)
        | VcpuRequest::AddDevice { .. }
        | VcpuRequest::AddQueues { .. }
        | VcpuRequest::GetRunPages { .. }
        | VcpuRequest::Seal => {
            return Err(Failure::new("the machine is sealed: nothing can be added to it"));
        }
    }
    Ok(VcpuReply::Done)
}
