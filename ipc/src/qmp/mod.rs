//! Supervisor ↔ qmp-proc. One process serves one client connection and ends with it.
//!
//! Order: [`QmpRequest::Setup`], [`QmpRequest::Seal`]; after the supervisor has verified the seal, the process waits as a
//! spare until [`QmpRequest::Serve`] gives it a client. From then on it sends [`QmpCall`]s, each answered by one
//! [`ToQmp::Return`], and receives events.
//!
//! Commands, returns and events are typed here and have QMP's names and member names by their serde attributes, so that
//! the JSON side (qmp-proc) and the acting side (supervisor) cannot drift apart. A member that is `None` is absent from
//! the JSON text.

mod command;
mod error;
mod event;
mod reply;

pub use command::{Command, DumpCompression, DumpExclude, DumpFormat, HelperRole};
pub use error::{ErrorClass, QmpError};
pub use event::{
    BlockErrorAction, BlockJobProgress, Event, IoOperation, PanicAction, PolicyViolation, ShutdownCause, TimedEvent,
    ViolationAction,
};
pub use reply::{
    AddFdInfo, CpuInfoFast, CpuInstanceProperties, DumpCapability, DumpQueryResult, DumpStatus, FdsetFdInfo, FdsetInfo,
    KvmInfo, NameInfo, Return, RunState, StatusInfo,
};

use crate::blockdev::FlatOptions;
use crate::caps::{ClientFd, ClientGivenFd, SeccompListener};
use crate::message::{FromHelper, Message, Request};
use crate::narrowing::Allow;
use serde::{Deserialize, Serialize};

/// To qmp-proc.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToQmp {
    /// The supervisor asks.
    Request(Request<QmpRequest>),
    /// The answer to a call. The events that the command caused were sent before.
    Return {
        /// The call's number.
        call: u64,
        /// What the client gets.
        result: Result<Return, QmpError>,
    },
    /// Something happened. The process delivers it when its client has negotiated.
    Event(TimedEvent),
}

/// From qmp-proc. Its events are the client's calls.
pub type FromQmp = FromHelper<QmpReply, QmpCall>;

impl Message for ToQmp {
    const KIND: u16 = 0x40;
    /// Large query results.
    const MAX_BYTES: usize = 16 << 20;
}
impl Message for FromQmp {
    const KIND: u16 = 0x41;
    /// Commands with long lists (transactions, opaque `json:` names).
    const MAX_BYTES: usize = 1 << 20;
}

/// What the supervisor asks of qmp-proc.
#[derive(Debug, Serialize, Deserialize)]
pub enum QmpRequest {
    /// What the greeting and the output format are. Answer: `Done`.
    Setup(MonitorSetup),
    /// Loads the sealed filter. Answer: `Sealed`.
    Seal,
    /// Serve this client. Answer: `Done`.
    Serve {
        /// The connection, or the input side of a stdio monitor.
        input: ClientFd,
        /// The output side, when it is another fd.
        output: Option<ClientFd>,
    },
    /// Reads a file name that is a description: what is behind `json:`. Answer: `Description`.
    ReadName(String),
}

/// Properties of the monitor that a client is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorSetup {
    /// Indent the output by 4 (`pretty=on`).
    pub pretty: bool,
    /// Bulkhead's version, for the greeting's `package`.
    pub package: String,
    /// The commands that its clients have. The supervisor checks every call against the same list.
    pub allow: Allow,
}

/// What qmp-proc answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum QmpReply {
    /// It is so now.
    Done,
    /// What a name says.
    Description(FlatOptions),
    /// All threads run under the sealed filter.
    Sealed {
        /// Told of every call that the filter does not allow.
        listener: SeccompListener,
        /// Where its program is loaded ([`crate::helper::load_address`]).
        load_address: u64,
    },
}

/// A client's command, checked against the schema.
#[derive(Debug, Serialize, Deserialize)]
pub struct QmpCall {
    /// Chosen by qmp-proc, unique among its open calls.
    pub call: u64,
    /// The command.
    pub command: Command,
    /// What the client has passed over its socket, for a command that takes it ([`Command::takes_fd`]).
    pub fd: Option<ClientGivenFd>,
}
