//! The machine that the command line describes: validated values, no text left to parse.

use crate::graph::options::NodeOptions;
use crate::objects::Spec;
use ipc::action::Actions;
use ipc::block::RngLimit;
use ipc::blockdev::BackendOptions;
use ipc::graph::OnError;
use ipc::narrowing::Allow;
use ipc::vcpu::CpuFeature;
use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;

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
    /// `-pidfile`.
    pub pidfile: Option<PathBuf>,
    /// `-daemonize`.
    pub daemonize: bool,
    /// `-uuid`: bytes in the order of the text.
    pub uuid: Option<[u8; 16]>,
    /// `--require-sandbox`: refuse to start when a layer of the sandbox is missing.
    pub require_sandbox: bool,
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
    /// `unix:P,server=on`: a listening socket.
    UnixServer {
        /// Where.
        path: PathBuf,
        /// `wait=on`: the machine starts when the first client has connected.
        wait: bool,
    },
    /// `unix:P`: connects when the machine starts.
    UnixClient(PathBuf),
    /// `tcp:HOST:PORT,server=on`: a listening socket.
    TcpServer {
        /// Empty: every address of this host.
        host: String,
        /// 0: the system chooses.
        port: u16,
        /// As with `UnixServer`.
        wait: bool,
    },
    /// `tcp:HOST:PORT`: connects when the machine starts.
    TcpClient {
        /// A numeric address, localhost or a name in /etc/hosts.
        host: String,
        /// The port.
        port: u16,
    },
    /// `socket,fd=N`: an inherited socket.
    Inherited {
        /// The fd's number.
        fd: RawFd,
        /// It listens (`server=on`); otherwise it is connected.
        listening: bool,
    },
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
