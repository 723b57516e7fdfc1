//! The order of the requests: Setup, Seal, then questions, or one Write or Save; and their answers.

use crate::elf;
use crate::kdump::{self, Sources};
use crate::live::{Guards, Live};
use crate::look;
use crate::memory::GuestMemory;
use crate::run_pages::RunPages;
use crate::workers::Workers;
use ipc::caps::SeccompListener;
use ipc::dump::{DumpEvent, DumpForm, DumpReply, DumpRequest, FromDump, ToDump};
use ipc::{Channel, Failure, IpcError, RequestId, helper};
use std::sync::Arc;

/// How far the helper has come.
enum State {
    /// Nothing has been handed over.
    Fresh,
    /// Guest RAM is here.
    Ready(GuestMemory),
    /// The sealed filter is loaded; what comes now may depend on the guest and on clients.
    Sealed(Arc<GuestMemory>),
}

type Supervisor = Channel<FromDump, ToDump>;

/// Serves the supervisor until the dump is written or the channel is closed.
pub fn run(mut channel: Supervisor) -> ! {
    let mut state = State::Fresh;
    let mut run_pages = RunPages::default();
    let workers = Workers::start().unwrap_or_else(|error| helper::die(&format!("threads: {error}")));
    let guards = Guards::start().unwrap_or_else(|error| helper::die(&format!("threads: {error}")));
    loop {
        let request = match channel.recv() {
            Ok(request) => request,
            // Not needed any more: the dump was called off.
            Err(IpcError::Closed) => helper::exit_now(0),
            Err(error) => helper::die(&format!("channel: {error}")),
        };
        let id = request.id;
        state = match (state, request.body) {
            (State::Fresh, DumpRequest::Setup { memory, ram_bytes }) => match GuestMemory::new(memory, ram_bytes) {
                Ok(memory) => {
                    reply(&mut channel, id, Ok(DumpReply::Done));
                    State::Ready(memory)
                }
                Err(failure) => {
                    reply(&mut channel, id, Err(failure));
                    State::Fresh
                }
            },
            (State::Ready(memory), DumpRequest::TakeRunPages { pages }) => {
                reply(&mut channel, id, run_pages.take(pages).map(|()| DumpReply::Done));
                State::Ready(memory)
            }
            (State::Sealed(memory), DumpRequest::ReadRunPages) => {
                reply(&mut channel, id, Ok(DumpReply::Registers(run_pages.registers())));
                State::Sealed(memory)
            }
            (State::Ready(memory), DumpRequest::Seal) => {
                seal(&mut channel, id);
                State::Sealed(Arc::new(memory))
            }
            (State::Sealed(memory), DumpRequest::Watch { watches, range }) => {
                let live = Live::new(watches, &memory.pieces(range));
                let watched = live.and_then(|live| memory.go_live(live));
                reply(&mut channel, id, watched.map(|()| DumpReply::Done));
                State::Sealed(memory)
            }
            (State::Sealed(memory), DumpRequest::Arm) => {
                let armed = guards.arm(&memory);
                reply(&mut channel, id, armed.map(|()| DumpReply::Done));
                State::Sealed(memory)
            }
            (
                State::Sealed(memory),
                DumpRequest::Write {
                    output,
                    registers,
                    vmcoreinfo,
                    form,
                },
            ) => {
                let mut progress = |completed, total| {
                    let event = DumpEvent::Progress { completed, total };
                    send(&mut channel, FromDump::Event(event));
                };
                // The output is closed by then: the reader of a pipe has its end of file.
                let result = match form {
                    DumpForm::Elf { range, paging } => {
                        let what = (range, paging);
                        elf::write(&memory, &registers, vmcoreinfo, what, output, &workers, &mut progress)
                    }
                    DumpForm::Kdump {
                        compressor,
                        flattened,
                        exclude,
                    } => {
                        let sources = Sources {
                            memory: &memory,
                            registers: &registers,
                            vmcoreinfo,
                            exclude,
                        };
                        kdump::write(&sources, compressor, flattened, output, &workers, &mut progress)
                    }
                };
                let result = result.map(|memory_bytes| DumpReply::Written { memory_bytes });
                reply(&mut channel, id, result.map_err(Failure::from));
                helper::exit_now(0)
            }
            (
                State::Sealed(memory),
                DumpRequest::Save {
                    output,
                    space,
                    address,
                    length,
                },
            ) => {
                let result = look::save(&memory, output, &space, address, length);
                reply(&mut channel, id, result);
                State::Sealed(memory)
            }
            (State::Sealed(memory), DumpRequest::Read { space, address, length }) => {
                reply(&mut channel, id, look::read(&memory, &space, address, length));
                State::Sealed(memory)
            }
            (State::Sealed(memory), DumpRequest::Translate { paging, address }) => {
                reply(&mut channel, id, look::resolve(&memory, &paging, address));
                State::Sealed(memory)
            }
            (state, refused) => {
                let failure = Failure::new(format!("dump-proc: {} is out of order", name(&refused)));
                reply(&mut channel, id, Err(failure));
                state
            }
        };
    }
}

fn seal(channel: &mut Supervisor, id: RequestId) {
    match policies::seal_helper(policies::Process::Dump, policies::Mode::of_this_process()) {
        Ok(listener) => {
            let sealed = DumpReply::Sealed {
                listener: SeccompListener::new(listener),
                load_address: helper::load_address(),
            };
            reply(channel, id, Ok(sealed));
        }
        // Perhaps half sealed: not a process to go on with.
        Err(error) => helper::die(&error.to_string()),
    }
}

fn reply(channel: &mut Supervisor, id: RequestId, result: Result<DumpReply, Failure>) {
    send(channel, FromDump::Reply { id, result });
}

fn send(channel: &mut Supervisor, message: FromDump) {
    if let Err(error) = channel.send(message) {
        helper::die(&format!("channel: {error}"));
    }
}

fn name(request: &DumpRequest) -> &'static str {
    match request {
        DumpRequest::Setup { .. } => "Setup",
        DumpRequest::TakeRunPages { .. } => "TakeRunPages",
        DumpRequest::ReadRunPages => "ReadRunPages",
        DumpRequest::Seal => "Seal",
        DumpRequest::Watch { .. } => "Watch",
        DumpRequest::Arm => "Arm",
        DumpRequest::Write { .. } => "Write",
        DumpRequest::Save { .. } => "Save",
        DumpRequest::Read { .. } => "Read",
        DumpRequest::Translate { .. } => "Translate",
    }
}
