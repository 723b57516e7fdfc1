//! The machine that the command line describes: validated values, no text left to parse.

use ipc::action::Actions;
use ipc::block::{EngineChoice, ImageFormat};
use ipc::narrowing::Allow;
use ipc::vcpu::CpuFeature;
use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;

/// One machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmConfig {
    /// `-name`. Logs and query-name show it.
    pub name: Option<String>,
    /// `-m`: bytes, a multiple of 4 KiB, never 0.
    pub ram_bytes: u64,
    /// `-smp`.
    pub topology: Topology,
    /// `-cpu host,…`.
    pub cpu_features: Vec<CpuFeature>,
    /// `-kernel`.
    pub kernel: PathBuf,
    /// `-initrd`.
    pub initrd: Option<PathBuf>,
    /// `-append`.
    pub command_line: String,
    /// `-drive`, in the order of the command line.
    pub drives: Vec<Drive>,
    /// `-allow-path`: directories below which images may name their backing files.
    pub allowed_paths: Vec<PathBuf>,
    /// `-add-fd`, in the order of the command line.
    pub fds: Vec<InheritedFd>,
    /// `-serial`: what is behind the one 16550, if there is one.
    pub serial: Option<CharBackend>,
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

/// `-smp`. The product of the last three is `vcpus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// 1 to [`ipc::vcpu::MAX_VCPUS`].
    pub vcpus: u16,
    /// Sockets.
    pub sockets: u16,
    /// Cores in a socket.
    pub cores: u16,
    /// Threads in a core.
    pub threads: u16,
}

/// `-drive if=virtio`: one virtio-blk device with one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    /// `id=`, or `virtioN` as QEMU numbers them.
    pub id: String,
    /// `file=`.
    pub file: PathBuf,
    /// `format=`.
    pub format: ImageFormat,
    /// `readonly=on`.
    pub read_only: bool,
    /// `cache=` and `cache.*`.
    pub cache: Cache,
    /// `aio=`.
    pub engine: EngineChoice,
    /// `discard=unmap`.
    pub discard: bool,
    /// `serial=`: at most 20 bytes.
    pub serial: String,
    /// `num-queues=`; by default one per vCPU.
    pub queues: Option<u16>,
}

/// `cache=`, taken apart as QEMU does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cache {
    /// The guest sees a volatile write cache.
    pub write_back: bool,
    /// O_DIRECT.
    pub direct: bool,
    /// Flushes are ignored.
    pub no_flush: bool,
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
    /// `file:P`: output only; the file is truncated.
    File(PathBuf),
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
