//! Supervisor ↔ dump-proc. One process writes one dump, or saves one range, and ends; or it answers questions about what is
//! in guest memory for as long as there are any.
//!
//! Order: [`DumpRequest::Setup`], where vcpu-proc is gone [`DumpRequest::TakeRunPages`], [`DumpRequest::Seal`]; after the supervisor has verified the seal, any number of
//! [`DumpRequest::Read`] and [`DumpRequest::Translate`], or one [`DumpRequest::Write`] or [`DumpRequest::Save`]. Before
//! `Write` come [`DumpRequest::Watch`] and [`DumpRequest::Arm`] if the guest runs on.

use crate::caps::{DumpFd, GuestMemRo, RunPageFd, SeccompListener};
use crate::live::MemoryWatch;
use crate::message::{FromHelper, Message, Request};
use crate::paging::{AddressSpace, Paging};
use crate::vcpu::{VcpuRegisters, VmCoreInfo};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;

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
    /// The longest read, and what is around it.
    const MAX_BYTES: usize = 2 * MAX_READ_BYTES;
}

/// Most bytes of one [`DumpRequest::Read`].
pub const MAX_READ_BYTES: usize = 128 << 10;

/// Exit status of a dump-proc that gives a live dump up, because the guest writes faster than the dump is written.
pub const OVERRUN_STATUS: i32 = 4;

/// Most processes whose writes one dump holds back: vcpu-proc and block-proc.
pub const MAX_WATCHES: usize = 2;

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
    /// vcpu-proc has ended: takes over the next vCPUs' run pages, and closes the descriptors. Before `Seal`. Answer: `Done`.
    TakeRunPages {
        /// In vCPU order, at most [`crate::vcpu::RUN_PAGES_PER_MESSAGE`].
        pages: Vec<RunPageFd>,
    },
    /// Reads the registers that are in all run pages that were taken. After `Seal`. Answer: `Registers`.
    ReadRunPages,
    /// Starts the workers, loads the sealed filter on all threads. Answer: `Sealed`.
    Seal,
    /// The dump will be of a guest that runs on: takes over what holds back writes. Nothing is held back yet. Answer: `Done`.
    Watch {
        /// Of all processes that can write guest RAM: at most [`MAX_WATCHES`].
        watches: Vec<MemoryWatch>,
        /// The range of the dump that follows.
        range: Option<DumpRange>,
    },
    /// The dump is of this moment: holds back writes to the memory that it covers, until they cannot change it any more.
    /// The guest and all disks stand until this is answered. Answer: `Done`.
    Arm,
    /// Writes the dump. Answer: `Written`.
    Write {
        /// Where to.
        output: DumpOutput,
        /// Registers of every vCPU.
        registers: Vec<VcpuRegisters>,
        /// Where the guest says that its VMCOREINFO note is; otherwise it is searched for.
        vmcoreinfo: Option<VmCoreInfo>,
        /// How.
        form: DumpForm,
    },
    /// Writes a range of memory as it is, without a header. Answer: `Saved`, or `Unmapped` when a virtual address has no
    /// RAM behind it.
    Save {
        /// Where to.
        output: DumpOutput,
        /// What `address` means.
        space: AddressSpace,
        /// First byte.
        address: u64,
        /// How many. A virtual range that ends beyond the address space is not mapped there.
        length: u64,
    },
    /// Reads memory. Answer: `Bytes`.
    Read {
        /// What `address` means.
        space: AddressSpace,
        /// First byte.
        address: u64,
        /// How many: at most [`MAX_READ_BYTES`].
        length: u32,
    },
    /// Translates a virtual address. Answer: `Translated`.
    Translate {
        /// How.
        paging: Paging,
        /// The address.
        address: u64,
    },
}

/// Where a dump goes.
#[derive(Debug, Serialize, Deserialize)]
pub struct DumpOutput {
    /// Open for writing.
    pub fd: DumpFd,
    /// What is written goes to the end, whatever offset is given (O_APPEND).
    pub appends: bool,
    /// The page cache is left out (O_DIRECT): everything that is written must be pages.
    pub direct: bool,
}

impl DumpOutput {
    /// Asks the system how it is open: dump-proc cannot.
    ///
    /// # Errors
    /// The system's.
    pub fn new(fd: OwnedFd) -> Result<Self, Errno> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        Ok(Self {
            fd: DumpFd::new(fd),
            appends: flags.contains(OFlag::O_APPEND),
            direct: flags.contains(OFlag::O_DIRECT),
        })
    }
}

/// The form of a dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DumpForm {
    /// A plain ELF core.
    Elf {
        /// Only this range of guest physical addresses.
        range: Option<DumpRange>,
        /// Segments by virtual addresses, as the vCPUs' page tables map them.
        paging: bool,
    },
    /// kdump-compressed: all of memory.
    Kdump {
        /// What makes pages small.
        compressor: Compressor,
        /// As makedumpfile's flattened stream; otherwise as the plain file, which must be seekable.
        flattened: bool,
        /// What is left out.
        exclude: Exclude,
    },
}

/// Kinds of pages that a dump leaves out, by what a Linux guest uses them for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exclude {
    /// Those that nobody uses.
    pub free: bool,
    /// Contents of files.
    pub cache: bool,
    /// Memory of processes.
    pub user: bool,
    /// All zeroes: those share one copy anyway, and readers miss them when they are not there, so this is only noted.
    pub zero: bool,
}

impl Exclude {
    /// Whether it asks for anything.
    pub fn any(&self) -> bool {
        self.drops_pages() || self.zero
    }

    /// Whether there are pages that the dump will not have.
    pub fn drops_pages(&self) -> bool {
        self.free || self.cache || self.user
    }

    /// In makedumpfile's bits.
    pub fn level(&self) -> u32 {
        let bit = |chosen: bool, bits: u32| if chosen { bits } else { 0 };
        // With and without private data.
        bit(self.zero, 1) | bit(self.cache, 2 | 4) | bit(self.user, 8) | bit(self.free, 16)
    }
}

/// What makes the pages of a kdump-compressed dump small.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compressor {
    /// RFC 1950, fast.
    Zlib,
    /// RFC 1950, small.
    SmallZlib,
    /// LZO1X.
    Lzo,
    /// Snappy's raw format.
    Snappy,
    /// Zstandard.
    Zstd,
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
        /// Where its program is loaded ([`crate::helper::load_address`]).
        load_address: u64,
    },
    /// The dump is complete.
    Written {
        /// Bytes of guest memory in it.
        memory_bytes: u64,
    },
    /// One entry per run page.
    Registers(Vec<VcpuRegisters>),
    /// The whole range is saved.
    Saved,
    /// Part of the range has no RAM behind it. What was written stays.
    Unmapped,
    /// The bytes from the wanted address up to the first that has no RAM behind it.
    Bytes(Vec<u8>),
    /// The guest physical address; `None`: nothing is mapped there.
    Translated(Option<u64>),
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
