//! The human monitor's commands: qmp-proc reads a client's line and writes the text of the answer; what travels is typed.

use crate::graph::{Breakpoint, ManualIo};
use crate::qmp::{CpuInfoFast, KvmInfo, NameInfo, StatusInfo};
use crate::vcpu::VcpuRegisters;
use serde::{Deserialize, Serialize};

/// What is asked of the supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HumanCommand {
    /// info status.
    Status,
    /// info name.
    Name,
    /// info uuid.
    Uuid,
    /// info kvm.
    Kvm,
    /// info cpus.
    Cpus,
    /// info block.
    Block {
        /// The only one that is wanted.
        device: Option<String>,
    },
    /// info mtree.
    MemoryTree,
    /// info registers.
    Registers(WhichCpus),
    /// x, xp.
    Memory {
        /// Whether the address is one of the vCPU's virtual ones.
        is_virtual: bool,
        /// First byte.
        address: u64,
        /// How many: at most [`crate::dump::MAX_READ_BYTES`].
        length: u32,
    },
    /// gva2gpa.
    Translate {
        /// The virtual address.
        address: u64,
    },
    /// qemu-io.
    QemuIo {
        /// A drive's id or a node's name; with `is_qdev`, a device's id or path.
        target: String,
        /// `-d`.
        is_qdev: bool,
        /// What to do there.
        command: IoCommand,
    },
}

/// A command of qemu-io.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoCommand {
    /// Reading, writing, flushing.
    Io {
        /// What to do.
        io: ManualIo,
        /// `-q`: nothing is printed when it works.
        quiet: bool,
        /// `aio_read`, `aio_write`: it is not waited for.
        background: bool,
    },
    /// `aio_flush`: waits for all that was not waited for.
    WaitForAll,
    /// `break`, `resume`, `remove_break`, `wait_break`.
    Breakpoint(Breakpoint),
    /// `length`.
    Length,
}

/// Whose registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhichCpus {
    /// Those of the vCPU that the command is for.
    Current,
    /// Those of the vCPU of this number.
    Number(i64),
    /// All.
    All,
}

/// What the supervisor answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HumanReply {
    /// info status.
    Status(StatusInfo),
    /// info name.
    Name(NameInfo),
    /// info uuid.
    Uuid(String),
    /// info kvm.
    Kvm(KvmInfo),
    /// info cpus, and the number of the vCPU that the command is for.
    Cpus(Vec<CpuInfoFast>, i64),
    /// info block.
    Block(Vec<BlockDevice>),
    /// info mtree.
    MemoryTree(AddressMap),
    /// info registers: numbers and registers.
    Registers(Vec<(u16, VcpuRegisters)>),
    /// There is no vCPU of the wanted number.
    NoSuchCpu,
    /// x, xp: the bytes up to the first that cannot be read.
    Bytes(Vec<u8>),
    /// gva2gpa: the guest physical address, if there is one.
    Translated(Option<u64>),
    /// qemu-io: what it prints has been printed on standard output.
    Done,
    /// qemu-io: why it could not begin.
    Refused(String),
}

/// A drive or a node, as far as info block shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDevice {
    /// The drive's id; empty for a device on a node.
    pub id: String,
    /// Its node, if it has a medium.
    pub node: Option<BlockNode>,
    /// The device's object.
    pub qdev: Option<String>,
    /// The guest sees a volatile write cache.
    pub write_back: bool,
}

/// A node, as far as info block shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockNode {
    /// Its name.
    pub name: String,
    /// Its file.
    pub file: String,
    /// Its driver.
    pub driver: String,
    /// `read-only`.
    pub read_only: bool,
    /// O_DIRECT.
    pub direct: bool,
    /// Flushes are ignored.
    pub no_flush: bool,
    /// `detect-zeroes`, unless it is off.
    pub detect_zeroes: Option<String>,
    /// The backing file, and how many are below one another.
    pub backing: Option<(String, u64)>,
}

/// Which device answers where. Ranges are in ascending order and do not overlap.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressMap {
    /// Guest physical memory.
    pub memory: Vec<AddressRange>,
    /// Ports.
    pub ports: Vec<AddressRange>,
}

/// A range of addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressRange {
    /// First address.
    pub first: u64,
    /// Last address.
    pub last: u64,
    /// Whether it is RAM; otherwise a device.
    pub is_ram: bool,
    /// What answers.
    pub name: String,
    /// Where in the RAM or the device the range begins.
    pub offset: u64,
}
