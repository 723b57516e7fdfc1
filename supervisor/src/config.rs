//! The machine that the command line describes: validated values, no text left to parse.

use crate::graph::options::NodeOptions;
use crate::hosting::cgroup::CgroupConfig;
use crate::logging::Format;
use crate::objects::Spec;
use crate::objects::throttle::Limits;
use ipc::action::Actions;
use ipc::block::RngLimit;
use ipc::blockdev::BackendOptions;
use ipc::device::NewDevice;
use ipc::graph::OnError;
use ipc::narrowing::Allow;
use ipc::opener::TcpOptions;
use ipc::qmp::DumpFormat;
use ipc::vcpu::CpuFeature;
use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

/// One machine.
#[derive(Debug, Clone, PartialEq)]
pub struct VmConfig {
    /// `-name`. Logs and query-name show it.
    pub name: Option<String>,
    /// `-m`: bytes, a multiple of 4 KiB, never 0.
    pub ram_bytes: u64,
    /// `-smp`.
    pub topology: Topology,
    /// `-cpu host,…`.
    pub cpu_features: Vec<CpuFeature>,
    /// `-machine`.
    pub board: Board,
    /// What runs on it. Without (`-machine none`, `-accel qtest`) there is no vcpu-proc: the block graph, objects and
    /// character devices are served alone.
    pub guest: Option<Guest>,
    /// `-blockdev`, in the order of the command line: nodes with names.
    pub blockdevs: Vec<NodeOptions>,
    /// `-drive`, in the order of the command line.
    pub drives: Vec<Drive>,
    /// `-object`: ids and what they are, in the order of the command line.
    pub objects: Vec<(String, Spec)>,
    /// `-machine memory-backend=`: the object that is guest RAM.
    pub memory_backend: Option<String>,
    /// `-spare-iothreads`: how many iothreads object-add can add later.
    pub spare_io_threads: u8,
    /// The virtio devices: `-device` in the order of the command line, then those of `-drive if=virtio`.
    pub devices: Vec<Device>,
    /// `-accel qtest`: its devices are [`Self::frontends`].
    pub is_qtest: bool,
    /// The devices of `-accel qtest`, those that drives bring along last.
    pub frontends: Vec<NewDevice>,
    /// Drives without an image, for those devices.
    pub empty_drives: Vec<BackendOptions>,
    /// `-device vmcoreinfo`.
    pub vmcoreinfo: Option<VmCoreInfoDevice>,
    /// `-allow-path`: directories below which images may name their backing files.
    pub allowed_paths: Vec<PathBuf>,
    /// `-add-fd`, in the order of the command line.
    pub fds: Vec<InheritedFd>,
    /// `-serial`: what is behind the one 16550, if there is one.
    pub serial: Option<CharBackend>,
    /// What query-chardev calls it.
    pub serial_label: String,
    /// `-qtest`: where its client is, and what query-chardev calls that.
    pub qtest: Option<(CharBackend, String)>,
    /// `-chardev` that nothing uses, by id.
    pub chardevs: Vec<(String, CharBackend)>,
    /// `-qmp`, `-mon`.
    pub monitors: Vec<Monitor>,
    /// `-S`: wait for `cont`.
    pub start_paused: bool,
    /// `-action`, `-no-reboot`, `-no-shutdown`: what set-action changes later.
    pub actions: Actions,
    /// `-dump-on-panic`.
    pub dump_on_panic: Option<AutomaticDump>,
    /// `-dump-on-crash`.
    pub dump_on_crash: Option<AutomaticDump>,
    /// `-pidfile`.
    pub pidfile: Option<PathBuf>,
    /// `-daemonize`.
    pub daemonize: bool,
    /// `-uuid`: bytes in the order of the text.
    pub uuid: Option<[u8; 16]>,
    /// `--require-sandbox`: refuse to start when a layer of the sandbox is missing.
    pub require_sandbox: bool,
    /// `--restart-budget`: how often block-proc is started again.
    pub restart_budget: RestartBudget,
    /// `--policy-mode`: whether a call that a policy lacks ends its process.
    pub policy_mode: policies::Mode,
    /// `-sandbox uid-base=`: the first of the machine's ids.
    pub uid_base: Option<u32>,
    /// `-cgroup`.
    pub cgroup: Option<CgroupConfig>,
    /// `--metrics`: the socket that is made.
    pub metrics: Option<PathBuf>,
    /// `--log-format`.
    pub log_format: Format,
}

/// How many restarts there may be, and in how long a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestartBudget {
    /// So many; 0: none.
    pub restarts: usize,
    /// In this time.
    pub period: Duration,
}

impl Default for RestartBudget {
    fn default() -> Self {
        Self {
            restarts: 3,
            period: Duration::from_secs(60),
        }
    }
}

/// `-machine`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Board {
    /// PCI Express, virtio.
    #[default]
    Pc,
    /// `none`: nothing, no vCPU, no memory, no devices.
    Empty,
}

/// `-dump-on-panic`, `-dump-on-crash`: where guest memory goes when that happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AutomaticDump {
    /// The file.
    pub path: PathBuf,
    /// How it is written.
    pub format: DumpFormat,
}

/// What is booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// `-kernel`.
    pub kernel: PathBuf,
    /// `-initrd`.
    pub initrd: Option<PathBuf>,
    /// `-append`.
    pub command_line: String,
}

/// `-smp`. The product of the last three is `vcpus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// 1 to [`ipc::vcpu::MAX_VCPUS`]; 0 on a board without anything.
    pub vcpus: u16,
    /// Sockets.
    pub sockets: u16,
    /// Cores in a socket.
    pub cores: u16,
    /// Threads in a core.
    pub threads: u16,
}

/// `-drive`: a node and how a device uses it. With `if=virtio` it brings its device along.
#[derive(Debug, Clone, PartialEq)]
pub struct Drive {
    /// `id=`, or `virtioN` as QEMU numbers them, and what goes with it.
    pub backend: BackendOptions,
    /// The image.
    pub node: NodeOptions,
    /// `serial=`: at most 20 bytes.
    pub serial: String,
    /// `num-queues=`; by default one per vCPU.
    pub queues: Option<u16>,
    /// `throttling.*`.
    pub throttle: Option<DriveLimits>,
}

/// Limits of a drive's I/O.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriveLimits {
    /// The group; without a name it is the drive's own.
    pub group: Option<String>,
    /// Its limits.
    pub limits: Limits,
}

/// A virtio device behind PCI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// `id=`; without one it is anonymous.
    pub id: Option<String>,
    /// `addr=`, or the first that is free: 1 to 31.
    pub slot: u8,
    /// What it is.
    pub model: Model,
}

/// vmcoreinfo: fw_cfg with the file in which the guest says where its VMCOREINFO note is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmCoreInfoDevice {
    /// `id=`; without one it is anonymous.
    pub id: Option<String>,
    /// How many of [`VmConfig::devices`] come before it on the command line.
    pub place: usize,
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Model {
    /// virtio-blk-pci.
    Block(BlockDevice),
    /// virtio-rng-pci.
    Rng(RngDevice),
}

/// virtio-blk-pci.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    /// `drive=`: the id of a drive, or the name of a node.
    pub drive: String,
    /// `iothread=`: the object that serves it.
    pub io_thread: Option<String>,
    /// `num-queues=`, 1 to [`ipc::virtio::MAX_QUEUES`].
    pub queues: u16,
    /// `queue-size=`: a power of two.
    pub queue_size: u16,
    /// `serial=`: at most 20 bytes.
    pub serial: String,
    /// `bootindex=`: kept and shown; the machine boots what `-kernel` names.
    pub boot_index: Option<i32>,
    /// `write-cache=`; absent (`auto`): as the drive says.
    pub write_cache: Option<bool>,
    /// `rerror=`; absent (`auto`): as the drive says.
    pub read_error: Option<OnError>,
    /// `werror=`; absent (`auto`): as the drive says.
    pub write_error: Option<OnError>,
}

/// virtio-rng-pci.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RngDevice {
    /// `rng=`: the object with the random bytes; without one they are the host kernel's.
    pub backend: Option<String>,
    /// `max-bytes=` and `period=`.
    pub limit: RngLimit,
}

impl VmConfig {
    /// All nodes that the command line describes: those of `-blockdev` first.
    pub fn trees(&self) -> impl Iterator<Item = &NodeOptions> {
        self.blockdevs.iter().chain(self.drives.iter().map(|drive| &drive.node))
    }
}

impl Device {
    /// Whether it uses the object of this id.
    pub fn uses(&self, id: &str) -> bool {
        match &self.model {
            Model::Block(block) => block.io_thread.as_deref() == Some(id),
            Model::Rng(rng) => rng.backend.as_deref() == Some(id),
        }
    }
}

/// `-add-fd`: a file descriptor of the parent's, for a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InheritedFd {
    /// Its number: not one of the standard three.
    pub fd: RawFd,
    /// The set that it belongs to.
    pub set: FdSetId,
    /// The client's note.
    pub opaque: Option<String>,
}

/// The number of a set of file descriptors: not negative.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct FdSetId(i64);

impl FdSetId {
    /// The set of this number, unless it is negative.
    pub fn new(number: i64) -> Option<Self> {
        (number >= 0).then_some(Self(number))
    }

    /// Its number.
    pub fn number(self) -> i64 {
        self.0
    }

    /// The one of the next higher number.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for FdSetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What is behind a character device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CharBackend {
    /// `null`: output is discarded, there is no input.
    Null,
    /// `stdio`.
    Stdio,
    /// `file:P`.
    File {
        /// Where output goes to.
        path: PathBuf,
        /// `input-path=`: where input comes from.
        input: Option<PathBuf>,
        /// `append=on`: what the file holds is kept.
        append: bool,
    },
    /// `pipe:P`: the FIFOs P.in and P.out, or P for both directions.
    Pipe(PathBuf),
    /// `ringbuf`: the newest output stays in memory, this many bytes.
    Ring(usize),
    /// `pty`: a pseudo-terminal whose name is printed.
    Pty,
    /// A Unix or TCP socket.
    Socket(Socket),
    /// `udp:HOST:PORT`: datagrams from and to one peer.
    Udp {
        /// The peer.
        remote: Inet,
        /// What it is bound to.
        local: Option<Inet>,
    },
}

/// A stream socket behind a character device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    /// Where.
    pub address: SocketAddress,
    /// Who calls whom.
    pub role: SocketRole,
    /// Of TCP alone.
    pub options: TcpOptions,
}

impl Socket {
    /// Whether it listens.
    pub fn is_server(&self) -> bool {
        matches!(self.role, SocketRole::Server { .. })
    }
}

/// Where a socket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketAddress {
    /// `unix:P`.
    Unix(PathBuf),
    /// `tcp:HOST:PORT`.
    Inet(Inet),
    /// `socket,fd=N`: the number of an inherited socket.
    Inherited(RawFd),
}

/// Which side a socket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketRole {
    /// `server=on`: it listens.
    Server {
        /// `wait=on`: the machine starts when the first client has connected.
        wait: bool,
    },
    /// It connects when the machine starts.
    Client {
        /// `reconnect-ms=`: how long after a connection has ended, or has failed, it is tried again.
        reconnect: Option<Duration>,
    },
}

/// A host and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inet {
    /// A numeric address, localhost or a name in /etc/hosts; empty: any address of this host.
    pub host: String,
    /// 0: the system chooses.
    pub port: u16,
    /// `to=`: the last port that a server tries.
    pub last_port: u16,
    /// `ipv4=` and `ipv6=`.
    pub families: Families,
    /// `numeric=on`: the host must be a number.
    pub numeric: bool,
}

impl Inet {
    /// Any family, one port.
    pub fn new(host: &str, port: u16) -> Self {
        Self {
            host: host.to_owned(),
            port,
            last_port: port,
            families: Families::Any,
            numeric: false,
        }
    }
}

impl fmt::Display for Inet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Which addresses of a host are meant.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Families {
    /// All.
    #[default]
    Any,
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Families {
    /// `ipv4=` and `ipv6=` as QEMU combines them; `None` when both are off.
    pub fn new(v4: Option<bool>, v6: Option<bool>) -> Option<Self> {
        match (v4, v6) {
            (Some(false), Some(false)) => None,
            (Some(true), Some(true)) | (None, None) => Some(Self::Any),
            (Some(true), _) | (_, Some(false)) => Some(Self::V4),
            (_, Some(true)) | (Some(false), _) => Some(Self::V6),
        }
    }
}

/// A QMP monitor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Monitor {
    /// Where its clients come from.
    pub backend: CharBackend,
    /// What query-chardev calls that.
    pub label: String,
    /// `pretty=on`.
    pub pretty: bool,
    /// `allow=`.
    pub allow: AllowSource,
}

/// Where the list of a monitor's commands is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllowSource {
    /// Here.
    Given(Allow),
    /// In this file, which is read at start.
    File(PathBuf),
}
