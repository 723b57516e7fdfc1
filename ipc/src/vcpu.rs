//! Supervisor ↔ vcpu-proc.
//!
//! Order: [`VcpuRequest::Setup`], [`VcpuRequest::GetRunPages`], then [`VcpuRequest::AddDevice`] and [`VcpuRequest::AddQueues`] for every device, then
//! [`VcpuRequest::Seal`]. Only after the supervisor has verified the seal follow [`VcpuRequest::ConfigureDevice`],
//! [`VcpuRequest::AttachSerial`], [`VcpuRequest::Boot`] and [`VcpuRequest::Run`].

use crate::caps::{ChardevFd, FaultDeviceFd, GuestMemRw, InitrdFd, KernelFd, KvmFd, RunPageFd, SeccompListener};
use crate::cpu::CpuProperties;
use crate::human::AddressMap;
use crate::live::MemoryWatch;
use crate::message::{FromHelper, Message, Request};
use crate::virtio::{Activation, DeviceIdentity, DeviceIndex, DeviceKind, QueueFds};
use serde::{Deserialize, Serialize};

/// Most vCPUs of one machine.
pub const MAX_VCPUS: u16 = 255;

/// Most run pages in one message: what a packet's descriptors allow, and a dump-proc's limit.
pub const RUN_PAGES_PER_MESSAGE: usize = 8;

/// To vcpu-proc.
pub type ToVcpu = Request<VcpuRequest>;
/// From vcpu-proc.
pub type FromVcpu = FromHelper<VcpuReply, VcpuEvent>;

impl Message for ToVcpu {
    const KIND: u16 = 0x10;
}
impl Message for FromVcpu {
    const KIND: u16 = 0x11;
    /// 255 register sets.
    const MAX_BYTES: usize = 1 << 20;
}

/// The machine, as far as vcpu-proc builds it.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuSetup {
    /// /dev/kvm.
    pub kvm: KvmFd,
    /// Guest RAM.
    pub memory: GuestMemRw,
    /// Size of guest RAM.
    pub ram_bytes: u64,
    /// How many vCPUs: 1 to [`MAX_VCPUS`].
    pub vcpus: u16,
    /// How the guest sees them grouped.
    pub topology: CpuTopology,
    /// CPU features switched on or off relative to the host's, by QEMU's names ("avx2", "pmu").
    pub cpu_features: Vec<CpuFeature>,
    /// Whether there is a 16550 at port 0x3f8.
    pub serial: bool,
    /// Whether there is fw_cfg with the file `etc/vmcoreinfo`.
    pub vmcoreinfo: bool,
}

/// Threads of a core and cores of a socket. APIC ids are vCPU numbers without gaps, so `threads` is a power of two, and
/// so is `cores` where there are several sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuTopology {
    /// Cores of a socket.
    pub cores: u16,
    /// Threads of a core.
    pub threads: u16,
}

impl CpuTopology {
    /// Whether `vcpus` vCPUs can be grouped so with dense APIC ids.
    pub fn fits(self, vcpus: u16) -> bool {
        let per_socket = u32::from(self.cores) * u32::from(self.threads);
        let one_socket = per_socket == u32::from(vcpus);
        per_socket > 0
            && u32::from(vcpus) % per_socket == 0
            && self.threads.is_power_of_two()
            && (one_socket || self.cores.is_power_of_two())
    }
}

/// `-cpu host,+name` or `-name`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFeature {
    /// QEMU's name of the feature.
    pub name: String,
    /// On or off.
    pub on: bool,
}

/// What the supervisor asks of vcpu-proc.
#[derive(Debug, Serialize, Deserialize)]
pub enum VcpuRequest {
    /// Creates the VM, its memory, interrupt controller and vCPUs. Answer: `Done`.
    Setup(VcpuSetup),
    /// Adds a virtio-pci device. Answer: `Done`.
    AddDevice {
        /// Its number.
        device: DeviceIndex,
        /// Its type.
        kind: DeviceKind,
        /// PCI slot (device number on bus 0), 1 to 31.
        slot: u8,
        /// How many virtqueues.
        queues: u16,
        /// Largest size of each, which drivers find there.
        queue_size: u16,
    },
    /// The eventfds of the next queues of a device, in queue order, up to
    /// [`crate::virtio::QUEUE_FDS_PER_MESSAGE`] a message. Answer: `Done`.
    AddQueues {
        /// The device.
        device: DeviceIndex,
        /// The next queues' fds.
        queues: Vec<QueueFds>,
    },
    /// Asks for the vCPUs whose run pages keep their last registers, from this one on. Answer: `RunPages`.
    GetRunPages {
        /// The first that is wanted.
        first: u16,
    },
    /// Starts all threads (parked), loads the sealed filter on all. Answer: `Sealed`.
    Seal,
    /// Sets what the device offers. Before boot, or later with a configuration-change interrupt. Answer: `Done`.
    ConfigureDevice {
        /// The device.
        device: DeviceIndex,
        /// What its driver will see.
        identity: DeviceIdentity,
    },
    /// Connects the serial port. Replaces an earlier connection. Answer: `Done`.
    AttachSerial {
        /// Bytes to the guest; `None`: there is no input.
        input: Option<ChardevFd>,
        /// Bytes from the guest; `None`: they are discarded.
        output: Option<ChardevFd>,
        /// Whether both are sockets for datagrams: nobody there is no end, and a datagram is taken as a whole.
        datagrams: bool,
    },
    /// Resets all vCPUs and devices, loads the kernel into RAM and points vCPU 0 at it. The vCPUs must be parked; they
    /// stay parked. Used at start and for every guest reset. Answer: `Booted`.
    Boot {
        /// bzImage, ELF with a PVH note, or a flat test image.
        kernel: KernelFd,
        /// Initial RAM disk.
        initrd: Option<InitrdFd>,
        /// Kernel command line, without a final NUL.
        command_line: String,
    },
    /// Lets the vCPUs run. Answer: `Done`.
    Run,
    /// Parks all vCPUs. Answer: `Done`, when the last has parked, no guest instruction can run any more, and what the
    /// guest wrote to its serial port has reached the peer (or the peer has taken nothing for a while).
    Pause,
    /// Presses the ACPI power button. Answer: `Done`.
    PowerButton,
    /// Block-proc has taken the device (or refused: the driver sees DEVICE_NEEDS_RESET). Answer: `Done`.
    DeviceActivated {
        /// The device.
        device: DeviceIndex,
        /// Whether block-proc serves it now.
        ok: bool,
    },
    /// Block-proc has let go of the device: the driver may see status 0. Answer: `Done`.
    DeviceReset {
        /// The device.
        device: DeviceIndex,
    },
    /// The device found its driver's rings broken: set DEVICE_NEEDS_RESET and interrupt. Answer: `Done`.
    DeviceBroken {
        /// The device.
        device: DeviceIndex,
    },
    /// Reads the registers of all vCPUs. They may run or be parked, and go on as they were. Answer: `Registers`.
    GetRegisters,
    /// Says how far the guest has set its real-time clock from the host's; the next change is reported again. Answer:
    /// `RtcOffset`.
    GetRtcOffset,
    /// Tells what CPUID would say with these features switched on or off, whatever `-cpu` has switched. Answer: `CpuModel`
    /// or `UnknownCpuFeature`.
    ExpandCpuModel {
        /// The changes.
        changes: Vec<CpuFeature>,
    },
    /// Tells where the guest's kernel has its VMCOREINFO note, as it wrote it to fw_cfg. Answer: `VmCoreInfo`.
    GetVmCoreInfo,
    /// Makes a userfaultfd of this process, for a live dump. Answer: `MemoryWatched`.
    WatchMemory {
        /// What it is made with.
        device: FaultDeviceFd,
    },
    /// Tells which device answers where at present. Answer: `AddressMap`.
    GetAddressMap,
    /// Gives every vCPU that the guest has started a non-maskable interrupt. They may run or be parked, and go on as they
    /// were. Answer: `Done`.
    InjectNmi,
}

/// What vcpu-proc answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum VcpuReply {
    /// It is so now.
    Done,
    /// All threads run under the sealed filter.
    Sealed {
        /// Told of every call that the filter does not allow.
        listener: SeccompListener,
        /// Where its program is loaded ([`crate::helper::load_address`]).
        load_address: u64,
        /// The vCPU threads' ids as vcpu-proc's own PID namespace numbers them, in vCPU order.
        thread_ids: Vec<i32>,
    },
    /// The next vCPUs, in their order: at most [`RUN_PAGES_PER_MESSAGE`], none after the last.
    RunPages(Vec<RunPageFd>),
    /// The kernel is in place.
    Booted {
        /// What the kernel file turned out to be.
        format: KernelFormat,
    },
    /// One entry per vCPU.
    Registers(Vec<VcpuRegisters>),
    /// Guest time minus the host's, seconds.
    RtcOffset(i64),
    /// What CPUID would say.
    CpuModel(CpuProperties),
    /// There is no feature of this name.
    UnknownCpuFeature(String),
    /// RAM and devices.
    AddressMap(AddressMap),
    /// Where the note is; `None`: the guest has not said so.
    VmCoreInfo(Option<VmCoreInfo>),
    /// Who writes guest RAM here can be held back by it.
    MemoryWatched(MemoryWatch),
}

/// Where a guest's kernel says that its VMCOREINFO note is. The guest writes what it likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmCoreInfo {
    /// Guest physical address of the note's header.
    pub address: u64,
    /// At most so many bytes, with header and name.
    pub bytes: u32,
}

/// The formats that `-kernel` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum KernelFormat {
    /// Linux bzImage, entered at its 64-bit entry point.
    BzImage,
    /// ELF with a Xen PVH note, entered in 32-bit mode.
    Pvh,
    /// Flat 64-bit image.
    Flat,
}

/// What vcpu-proc reports by itself.
#[derive(Debug, Serialize, Deserialize)]
pub enum VcpuEvent {
    /// The driver set DRIVER_OK. Answered by [`VcpuRequest::DeviceActivated`].
    ActivateDevice {
        /// The device.
        device: DeviceIndex,
        /// What the driver programmed.
        activation: Activation,
    },
    /// The driver wrote status 0 while the device was active. Answered by [`VcpuRequest::DeviceReset`].
    ResetDevice {
        /// The device.
        device: DeviceIndex,
    },
    /// The guest asked for a reset. The vCPUs have stopped running; they park at the next `Pause`.
    GuestReset,
    /// The guest powered itself off. The vCPUs have stopped running.
    GuestShutdown,
    /// The guest's kernel reported through pvpanic. After a panic the vCPUs have stopped running; when a crash kernel takes
    /// over they run on.
    GuestPanicked {
        /// `true`: crash loaded (a kdump kernel takes over); `false`: panicked.
        crash_loaded: bool,
    },
    /// A vCPU cannot go on. All vCPUs have stopped running.
    VcpuFailed {
        /// Which.
        vcpu: u16,
        /// One line: the KVM exit and the state that matters.
        detail: String,
    },
    /// The peer of the serial port is gone. Its fds are closed.
    SerialClosed,
    /// The guest has set its real-time clock, once or many times. Not repeated before [`VcpuRequest::GetRtcOffset`], so
    /// that a guest cannot flood the channel.
    RtcChanged,
}

/// A segment register as KVM and QEMU's notes describe it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// High dword of the descriptor's attribute bits: type at bit 8, S 12, DPL 13, P 15, AVL 20, L 21, D/B 22, G 23.
    pub flags: u32,
}

/// One vCPU's registers, enough for an ELF core's NT_PRSTATUS and QEMU notes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuRegisters {
    /// rax rbx rcx rdx rsi rdi rsp rbp r8 … r15, in this order.
    pub general: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// cs ds es fs gs ss ldt tr, in this order.
    pub segments: [Segment; 8],
    /// GDT and IDT: base and limit (the other fields are 0).
    pub gdt: Segment,
    /// See [`Self::gdt`].
    pub idt: Segment,
    /// cr0, cr2, cr3, cr4, in this order.
    pub control: [u64; 4],
    /// EFER.
    pub efer: u64,
    /// MSR KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// Whether it waits for an interrupt.
    pub halted: bool,
}
