//! The process: prepares memory, seals itself on the supervisor's word, serves one client. The crate's page is in `lib.rs`.

use ipc::message::{Failure, FromHelper, Request, RequestId};
use ipc::qmp::{FromQmp, MonitorSetup, QmpReply, QmpRequest, ToQmp};
use ipc::{Channel, IpcError, helper};
use qmp_proc::connection::Connection;
use qmp_proc::json::Reader;
use qmp_proc::memory::{self, Bounded};
use qmp_proc::session::Session;

#[global_allocator]
static ALLOCATOR: Bounded = Bounded::new();

fn main() {
    let mut channel = helper::start::<FromQmp, ToQmp>();
    if let Err(error) = memory::reserve() {
        helper::die(&format!("reserving memory: {error}"));
    }
    // Takes its hash keys from the kernel, so it is made before the seal.
    let reader = Reader::default();
    let mut setup = MonitorSetup {
        pretty: false,
        package: String::new(),
        allow: ipc::narrowing::Allow::All,
    };
    let mut sealed = false;
    loop {
        let (id, request) = match channel.recv() {
            Ok(ToQmp::Request(Request { id, body })) => (id, body),
            // A spare has no client to tell.
            Ok(ToQmp::Event(_)) => continue,
            Ok(ToQmp::Return { .. }) => helper::die("an answer before any call"),
            Err(IpcError::Closed) => helper::exit_now(0),
            Err(error) => helper::die(&format!("channel: {error}")),
        };
        let result = match request {
            QmpRequest::Setup(new) => {
                setup = new;
                Ok(QmpReply::Done)
            }
            QmpRequest::Seal if sealed => Err(Failure::new("sealed already")),
            QmpRequest::Seal => {
                match policies::seal_helper(policies::Process::Qmp, policies::Mode::of_this_process()) {
                    Ok(listener) => {
                        sealed = true;
                        Ok(QmpReply::Sealed {
                            listener: ipc::caps::SeccompListener::new(listener),
                            load_address: helper::load_address(),
                        })
                    }
                    // Half a seal is none.
                    Err(error) => helper::die(&error.to_string()),
                }
            }
            QmpRequest::ReadName(_) if !sealed => Err(Failure::new("a name is read only after sealing")),
            QmpRequest::ReadName(text) => qmp_proc::name::read(&text)
                .map(QmpReply::Description)
                .map_err(Failure::new),
            QmpRequest::Serve { .. } if !sealed => Err(Failure::new("a client is served only after sealing")),
            QmpRequest::Serve { input, output } => {
                answer(&mut channel, id, Ok(QmpReply::Done));
                let connection = Connection::new(input.into_fd(), output.map(ipc::caps::ClientFd::into_fd));
                match connection.serve(&mut channel, Session::new(setup), reader) {
                    Ok(()) => helper::exit_now(0),
                    Err(error) => helper::die(&error.to_string()),
                }
            }
        };
        answer(&mut channel, id, result);
    }
}

fn answer(channel: &mut Channel<FromQmp, ToQmp>, id: RequestId, result: Result<QmpReply, Failure>) {
    if let Err(error) = channel.send(FromHelper::Reply { id, result }) {
        helper::die(&format!("channel: {error}"));
    }
}
