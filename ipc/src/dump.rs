//! Supervisor ↔ dump-proc. One process writes one dump and ends.
//!
//! Order: [`DumpRequest::Setup`], [`DumpRequest::Seal`]; after the supervisor has verified the seal, one
//! [`DumpRequest::Write`].

use crate::caps::{DumpFd, GuestMemRo, SeccompListener};
use crate::message::{FromHelper, Message, Request};
use crate::vcpu::VcpuRegisters;
use serde::{Deserialize, Serialize};

/// To dump-proc.
pub type ToDump = Request<DumpRequest>;
/// From dump-proc.
pub type FromDump = FromHelper<DumpReply, DumpEvent>;

impl Message for ToDump {
    const KIND: u16 = 0x30;
    /// 255 register sets.
    const MAX_BYTES: usize = 1 << 20;
}
impl Message for FromDump {
    const KIND: u16 = 0x31;
}

/// What the supervisor asks of dump-proc.
#[derive(Debug, Serialize, Deserialize)]
pub enum DumpRequest {
    /// Hands over guest RAM, which is read, never mapped. Answer: `Done`.
    Setup {
        /// Guest RAM.
        memory: GuestMemRo,
        /// Size of guest RAM.
        ram_bytes: u64,
    },
    /// Starts the workers, loads the sealed filter on all threads. Answer: `Sealed`.
    Seal,
    /// Writes the dump. Answer: `Written`.
    Write {
        /// Where to.
        output: DumpFd,
        /// Registers of every vCPU.
        registers: Vec<VcpuRegisters>,
        /// Only this range of guest physical addresses.
        range: Option<DumpRange>,
    },
}

/// A range of guest physical addresses, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpRange {
    /// First byte.
    pub begin: u64,
    /// How many: not 0.
    pub length: u64,
}

/// What dump-proc answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum DumpReply {
    /// It is so now.
    Done,
    /// All threads run under the sealed filter.
    Sealed {
        /// Told of every call that the filter does not allow.
        listener: SeccompListener,
    },
    /// The dump is complete.
    Written {
        /// Bytes of guest memory in it.
        memory_bytes: u64,
    },
}

/// What dump-proc reports by itself.
#[derive(Debug, Serialize, Deserialize)]
pub enum DumpEvent {
    /// Sent now and then while it writes.
    Progress {
        /// Bytes of guest memory done.
        completed: u64,
        /// Bytes of guest memory in all.
        total: u64,
    },
}
