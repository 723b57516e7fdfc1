//! From a command line to a running machine.
//!
//! [`prepare`] opens everything that the command line names, while the supervisor may still do so freely; every error is
//! one line that names the thing. [`bring_up`] is the first sequence in the event loop: helpers up, sealed and verified,
//! then disks, kernel and clients.

use super::dump::DumpState;
use super::fds::{self, Fds, InheritError};
use super::lifecycle::Run;
use super::monitor::{Monitor, MonitorIndex};
use super::serial::{self, Serial};
use super::{Resources, Vm, lifecycle, monitor};
use crate::backing::Roots;
use crate::chardev::{self, ChardevError};
use crate::config::{AllowSource, CharBackend, Drive, Topology, VmConfig};
use crate::disk::{self, DiskError};
use crate::executor::{Executor, Slot, Turnstile};
use crate::helper::{Block, Helper, Vcpu};
use crate::launcher::{Launcher, LauncherError};
use crate::logging;
use crate::narrowing;
use crate::ram::Ram;
use crate::sandbox::verify::{host_thread_id, threads_named};
use ipc::block::{BlockReply, BlockRequest, BlockSetup, DiskInfo, EngineChoice};
use ipc::caps::{CallFd, DiskFd, InitrdFd, KernelFd, KickFd, KvmFd};
use ipc::narrowing::Allow;
use ipc::vcpu::{CpuTopology, VcpuRequest, VcpuSetup};
use ipc::virtio::{DeviceIndex, DeviceKind, MAX_DEVICES, MAX_QUEUES, QUEUE_FDS_PER_MESSAGE, QueueFds};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signalfd::SignalFd;
use nix::sys::stat::Mode;
use std::cell::{Cell, OnceCell, RefCell};
use std::future::poll_fn;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::task::Poll;

/// Why a machine could not be started: one line that names the thing.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file that the command line names.
    #[error("{option} {path}: {errno}")]
    File {
        /// The option.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        errno: Errno,
    },
    /// /dev/kvm.
    #[error("/dev/kvm: {0}: Bulkhead needs KVM (`bulkhead doctor` says more)")]
    Kvm(Errno),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// An inherited file descriptor.
    #[error(transparent)]
    Inherit(#[from] InheritError),
    /// A character device.
    #[error(transparent)]
    Chardev(#[from] ChardevError),
    /// The launcher.
    #[error(transparent)]
    Launcher(#[from] LauncherError),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

/// Opens everything and starts the launcher.
///
/// # Errors
/// The first thing that does not work.
pub fn prepare(config: VmConfig, signals: SignalFd, ready: Box<dyn FnOnce()>) -> Result<Resources, StartError> {
    if config.drives.len() > usize::from(MAX_DEVICES) {
        return Err(StartError::Other(format!(
            "-drive: {} disks; the most is {MAX_DEVICES}",
            config.drives.len()
        )));
    }
    engine(&config.drives).map_err(StartError::Other)?;
    let Topology {
        vcpus, cores, threads, ..
    } = config.topology;
    if !(CpuTopology { cores, threads }).fits(vcpus) {
        let rule = "threads must be a power of two, and so must cores where there are several sockets";
        return Err(StartError::Other(format!(
            "-smp {vcpus},cores={cores},threads={threads}: {rule}"
        )));
    }
    let kvm = open(c"/dev/kvm", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).map_err(StartError::Kvm)?;
    let kernel = KernelFd::new(open_file("-kernel", &config.kernel)?);
    let initrd = config
        .initrd
        .as_ref()
        .map(|path| open_file("-initrd", path))
        .transpose()?
        .map(InitrdFd::new);
    let fds = Fds::inherit(&config.fds)?;
    check_shared_sets(&config.drives)?;
    let disks = config
        .drives
        .iter()
        .map(|drive| disk::open_drive(drive, &fds))
        .collect::<Result<Vec<_>, _>>()?;
    let roots = Roots::open(&config.allowed_paths).map_err(StartError::Other)?;
    let serial = chardev::open("-serial", config.serial.as_ref().unwrap_or(&CharBackend::Null))?;
    let monitors = config
        .monitors
        .iter()
        .map(|monitor| Ok((chardev::open("-qmp", &monitor.backend)?, allowed(&monitor.allow)?)))
        .collect::<Result<Vec<_>, StartError>>()?;
    let ram = Ram::new(config.ram_bytes).map_err(StartError::Other)?;
    let launcher = Launcher::start()?;
    report_layers(&config, &launcher)?;
    launcher.set_nonblocking()?;
    Ok(Resources {
        config,
        launcher,
        kvm: KvmFd::new(kvm),
        ram,
        kernel,
        initrd,
        disks,
        roots,
        fds,
        monitors,
        serial,
        signals,
        ready,
    })
}

/// Locks keep two users of one file apart, but not when both have the same open file description.
fn check_shared_sets(drives: &[Drive]) -> Result<(), StartError> {
    let writes_set = |drive: &&Drive| !drive.read_only && fds::set_of(&drive.file).is_some();
    for (index, drive) in drives.iter().enumerate() {
        if writes_set(&drive)
            && drives[..index]
                .iter()
                .filter(writes_set)
                .any(|other| other.file == drive.file)
        {
            let file = drive.file.display();
            return Err(StartError::Other(format!(
                "-drive file={file}: is in use: another disk writes to this set"
            )));
        }
    }
    Ok(())
}

/// Says which layers of the sandbox this host or caller cannot have, or refuses with `--require-sandbox`.
fn report_layers(config: &VmConfig, launcher: &Launcher) -> Result<(), StartError> {
    let mut missing = Vec::new();
    if !launcher.ids.is_distinct() {
        missing.push("no host uid of its own for each process (start as root, or give this user a range in /etc/subuid and /etc/subgid and install newuidmap)");
    }
    if !launcher.landlock {
        missing.push("no Landlock (the kernel has none, or it is switched off)");
    }
    if config.require_sandbox
        && let Some(first) = missing.first()
    {
        return Err(StartError::Other(format!("--require-sandbox: {first}")));
    }
    missing
        .iter()
        .for_each(|layer| logging::line(format_args!("sandbox layer missing: {layer}")));
    Ok(())
}

fn open_file(option: &'static str, path: &Path) -> Result<OwnedFd, StartError> {
    let failed = |errno| StartError::File {
        option,
        path: path.into(),
        errno,
    };
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let fd = open(path, flags, Mode::empty()).map_err(failed)?;
    let mode = nix::sys::stat::fstat(&fd).map_err(failed)?.st_mode;
    match mode & libc::S_IFMT {
        libc::S_IFREG => Ok(fd),
        libc::S_IFDIR => Err(failed(Errno::EISDIR)),
        _ => Err(StartError::Other(format!(
            "{option} {}: is not a regular file",
            path.display()
        ))),
    }
}

/// The commands of a monitor.
fn allowed(source: &AllowSource) -> Result<Allow, StartError> {
    match source {
        AllowSource::Given(allow) => Ok(allow.clone()),
        AllowSource::File(path) => {
            narrowing::read(path).map_err(|problem| StartError::Other(format!("allow={}: {problem}", path.display())))
        }
    }
}

/// The one engine of block-proc, from what the drives ask for.
fn engine(drives: &[Drive]) -> Result<EngineChoice, String> {
    let mut wanted = drives
        .iter()
        .map(|drive| drive.engine)
        .filter(|engine| *engine != EngineChoice::Auto);
    let first = wanted.next().unwrap_or(EngineChoice::Auto);
    if wanted.any(|other| other != first) {
        return Err("-drive: all disks share one I/O engine: give them the same aio=".into());
    }
    Ok(first)
}

/// What [`bring_up`] hands over to the helpers.
pub struct Parts {
    kvm: KvmFd,
    disks: Vec<(DiskFd, DiskInfo)>,
    ready: Box<dyn FnOnce()>,
}

impl Vm {
    /// Turns resources into a machine without helpers.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub(super) fn assemble(resources: Resources) -> Result<(Rc<Self>, Parts), StartError> {
        let Resources {
            config,
            launcher,
            kvm,
            ram,
            kernel,
            initrd,
            disks,
            roots,
            fds,
            monitors,
            serial,
            signals,
            ready,
        } = resources;
        let monitors = config
            .monitors
            .iter()
            .zip(monitors)
            .map(|(config, (device, allow))| Monitor::new(config, device, allow))
            .collect();
        let disk_locks = disks.iter().map(|(disk, _)| disk.try_clone()).collect::<Result<_, _>>();
        let vm = Self {
            actions: Cell::new(config.actions),
            config,
            executor: Executor::default(),
            launcher,
            starting: RefCell::default(),
            ram,
            kernel,
            initrd,
            signals,
            vcpu: OnceCell::new(),
            block: OnceCell::new(),
            dumper: RefCell::new(None),
            dump: DumpState::default(),
            fds: RefCell::new(fds),
            monitors,
            serial: Serial::new(serial),
            run: Run::default(),
            change: Turnstile::default(),
            vcpu_threads: RefCell::default(),
            io_threads: RefCell::default(),
            signalled: Cell::new(false),
            disk_locks: disk_locks.map_err(|error| StartError::Other(format!("-drive: {error}")))?,
            roots,
            monitors_open: Cell::new(false),
            outcome: Cell::new(None),
        };
        Ok((Rc::new(vm), Parts { kvm, disks, ready }))
    }

    /// Loads the kernel again; the vCPUs are parked.
    pub(super) async fn boot(&self) -> Result<(), String> {
        let text = |error: std::io::Error| error.to_string();
        let request = VcpuRequest::Boot {
            kernel: self.kernel.try_clone().map_err(text)?,
            initrd: self
                .initrd
                .as_ref()
                .map(InitrdFd::try_clone)
                .transpose()
                .map_err(text)?,
            command_line: self.config.command_line.clone(),
        };
        let failed = |error| format!("-kernel {}: {error}", self.config.kernel.display());
        self.vcpu()
            .map_err(failed)?
            .ask(request)
            .await
            .map(drop)
            .map_err(failed)
    }
}

/// The first sequence: everything up to the first guest instruction.
pub async fn bring_up(vm: Rc<Vm>, parts: Parts) {
    if let Err(reason) = try_bring_up(&vm, parts).await {
        vm.fail(reason);
    }
}

async fn try_bring_up(vm: &Rc<Vm>, parts: Parts) -> Result<(), String> {
    let Parts { kvm, disks, ready } = parts;
    // The helpers come up side by side: each waits mostly for the kernel.
    let spares: Vec<_> = (0..vm.monitors.len())
        .map(|index| {
            let vm2 = Rc::clone(vm);
            concurrently(vm, async move { monitor::add_spare(&vm2, MonitorIndex(index)).await })
        })
        .collect();
    let queues = queue_fds(&vm.config)?;
    let (for_vcpu, for_block): (Vec<_>, Vec<_>) = queues.into_iter().unzip();
    let with_disks = !disks.is_empty();
    let vm2 = Rc::clone(vm);
    let vcpu = concurrently(vm, async move { start_vcpu(&vm2, kvm, for_vcpu).await });
    let vm2 = Rc::clone(vm);
    let block = concurrently(vm, async move {
        if with_disks {
            start_block(&vm2, for_block).await
        } else {
            Ok(())
        }
    });
    vcpu.wait().await?;
    block.wait().await?;
    for spare in spares {
        spare.wait().await?;
    }
    attach_disks(vm, disks).await?;
    vm.boot().await?;
    serial::attach(vm).await?;
    // Clients come in when the machine is what they will see; one that the start waits for comes before.
    if waiting_backends(&vm.config).next().is_some() {
        open_monitors(vm);
        wait_for_clients(vm).await;
    }
    if !vm.config.start_paused && vm.outcome.get().is_none() {
        let _turn = vm.change.enter().await;
        lifecycle::go(vm).await.map_err(|error| error.to_string())?;
    }
    open_monitors(vm);
    ready();
    Ok(())
}

/// From now on clients are served.
fn open_monitors(vm: &Rc<Vm>) {
    vm.monitors_open.set(true);
    for index in 0..vm.monitors.len() {
        monitor::serve_fixed(vm, MonitorIndex(index));
    }
}

/// Runs a part of the start beside the others.
fn concurrently(vm: &Rc<Vm>, part: impl Future<Output = Result<(), String>> + 'static) -> Slot<Result<(), String>> {
    let slot = Slot::default();
    let filled = slot.clone();
    vm.executor.spawn(async move { filled.fill(part.await) });
    slot
}

/// block-proc's name for the thread that serves the disks' queues.
const IO_THREAD: &str = "block-io";

type DeviceQueues = Vec<QueueFds>;

/// The eventfds of all queues of all devices, twice: for the transport and for the device.
fn queue_fds(config: &VmConfig) -> Result<Vec<(DeviceQueues, DeviceQueues)>, String> {
    let event = || -> Result<(OwnedFd, OwnedFd), std::io::Error> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let event = event.as_fd().try_clone_to_owned()?;
        Ok((event.try_clone()?, event))
    };
    let pair = || -> Result<(QueueFds, QueueFds), std::io::Error> {
        let (kick, kick2) = event()?;
        let (call, call2) = event()?;
        Ok((
            QueueFds {
                kick: KickFd::new(kick),
                call: CallFd::new(call),
            },
            QueueFds {
                kick: KickFd::new(kick2),
                call: CallFd::new(call2),
            },
        ))
    };
    let device = |drive: &Drive| {
        (0..queue_count(config, drive))
            .map(|_| pair())
            .collect::<Result<Vec<_>, _>>()
    };
    let devices = config.drives.iter().map(device).collect::<Result<Vec<_>, _>>();
    let devices = devices.map_err(|error| format!("eventfds of the virtqueues: {error}"))?;
    Ok(devices.into_iter().map(|queues| queues.into_iter().unzip()).collect())
}

fn queue_count(config: &VmConfig, drive: &Drive) -> u16 {
    drive.queues.unwrap_or(config.topology.vcpus).clamp(1, MAX_QUEUES)
}

async fn start_vcpu(vm: &Rc<Vm>, kvm: KvmFd, queues: Vec<DeviceQueues>) -> Result<(), String> {
    let helper = vm.start_helper::<Vcpu>().await?;
    let _ = vm.vcpu.set(Rc::clone(&helper));
    let failed = |error: crate::helper::HelperError| error.to_string();
    let setup = VcpuSetup {
        kvm,
        memory: vm.ram.read_write.try_clone().map_err(|error| error.to_string())?,
        ram_bytes: vm.config.ram_bytes,
        vcpus: vm.config.topology.vcpus,
        topology: CpuTopology {
            cores: vm.config.topology.cores,
            threads: vm.config.topology.threads,
        },
        cpu_features: vm.config.cpu_features.clone(),
        serial: vm.config.serial.is_some(),
    };
    helper.ask(VcpuRequest::Setup(setup)).await.map_err(failed)?;
    for (device, queues) in vm.devices().zip(queues) {
        let count = queues.len() as u16;
        let request = VcpuRequest::AddDevice {
            device,
            kind: DeviceKind::Block,
            slot: device.0 + 1,
            queues: count,
        };
        helper.ask(request).await.map_err(failed)?;
        for queues in chunked(queues) {
            helper
                .ask(VcpuRequest::AddQueues { device, queues })
                .await
                .map_err(failed)?;
        }
    }
    let details = vm.seal_helper(&helper).await?;
    let threads = details
        .thread_ids
        .iter()
        .map(|inner| host_thread_id(helper.pid, *inner).unwrap_or(*inner))
        .collect();
    vm.vcpu_threads.replace(threads);
    Ok(())
}

async fn start_block(vm: &Rc<Vm>, queues: Vec<DeviceQueues>) -> Result<(), String> {
    let helper: Rc<Helper<Block>> = vm.start_helper().await?;
    let _ = vm.block.set(Rc::clone(&helper));
    let failed = |error: crate::helper::HelperError| error.to_string();
    let setup = BlockSetup {
        memory: vm.ram.read_write.try_clone().map_err(|error| error.to_string())?,
        ram_bytes: vm.config.ram_bytes,
        engine: engine(&vm.config.drives)?,
    };
    helper.ask(BlockRequest::Setup(setup)).await.map_err(failed)?;
    for (device, queues) in vm.devices().zip(queues) {
        helper
            .ask(BlockRequest::AddDevice {
                device,
                queues: queues.len() as u16,
            })
            .await
            .map_err(failed)?;
        for queues in chunked(queues) {
            helper
                .ask(BlockRequest::AddQueues { device, queues })
                .await
                .map_err(failed)?;
        }
    }
    let details = vm.seal_helper(&helper).await?;
    vm.io_threads.replace(threads_named(helper.pid, IO_THREAD));
    if engine(&vm.config.drives)? == EngineChoice::Auto && details.engine == Some(EngineChoice::Threads) {
        logging::line("this host offers no io_uring: disks are served by threads, which costs speed");
    }
    Ok(())
}

/// Pieces that fit into one message.
fn chunked(queues: DeviceQueues) -> Vec<DeviceQueues> {
    let mut queues = queues.into_iter().peekable();
    let mut chunks = Vec::new();
    while queues.peek().is_some() {
        chunks.push(queues.by_ref().take(QUEUE_FDS_PER_MESSAGE).collect());
    }
    chunks
}

/// Gives block-proc its disks, and vcpu-proc what their drivers will see.
async fn attach_disks(vm: &Vm, disks: Vec<(DiskFd, DiskInfo)>) -> Result<(), String> {
    for (index, (disk, info)) in disks.into_iter().enumerate() {
        let device = DeviceIndex(index as u8);
        let failed =
            |error: &dyn std::fmt::Display| format!("-drive file={}: {error}", vm.config.drives[index].file.display());
        let Some(block) = vm.block.get() else {
            return Err(failed(&"block-proc is not running"));
        };
        let drive = &vm.config.drives[index];
        let mut chain = vm.roots.chain(drive, &disk).map_err(|errno| failed(&errno))?;
        let mut request = BlockRequest::AttachDisk { device, disk, info };
        let reply = loop {
            let reply = block.ask(request).await.map_err(|error| failed(&error))?;
            let BlockReply::BackingNeeded { name, format } = reply else {
                break reply;
            };
            let (disk, info) = vm
                .roots
                .open_backing(&mut chain, &name, format, drive.cache.no_flush)
                .map_err(|error| failed(&error))?;
            request = BlockRequest::AddBacking { device, disk, info };
        };
        let BlockReply::DiskAttached(identity) = reply else {
            return Err(failed(&"block-proc answered with something else"));
        };
        let vcpu = vm.vcpu().map_err(|error| failed(&error))?;
        vcpu.ask(VcpuRequest::ConfigureDevice { device, identity })
            .await
            .map_err(|error| failed(&error))?;
    }
    Ok(())
}

fn waits(backend: &CharBackend) -> bool {
    matches!(backend, CharBackend::UnixServer { wait: true, .. })
}

/// The backends with `wait=on`.
fn waiting_backends(config: &VmConfig) -> impl Iterator<Item = &CharBackend> {
    config
        .monitors
        .iter()
        .map(|monitor| &monitor.backend)
        .chain(&config.serial)
        .filter(|backend| waits(backend))
}

/// `wait=on`: the machine starts when every such backend has its client.
async fn wait_for_clients(vm: &Vm) {
    poll_fn(|_| {
        let monitors = vm.config.monitors.iter().zip(&vm.monitors);
        let all = monitors
            .filter(|(config, _)| waits(&config.backend))
            .all(|(_, monitor)| monitor.has_sessions());
        let serial = !vm.config.serial.as_ref().is_some_and(waits) || vm.serial.is_connected();
        if (all && serial) || vm.outcome.get().is_some() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}
