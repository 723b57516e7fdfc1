//! From a command line to a running machine.
//!
//! [`prepare`] opens everything that the command line names, while the supervisor may still do so freely; every error is
//! one line that names the thing. [`bring_up`] is the first sequence in the event loop: helpers up, sealed and verified,
//! then disks, kernel and clients.

use super::block_proc::{BlockProc, Stage};
use super::chardevs::{Chardevs, Frontend};
use super::dump::{DumpState, FaultDevice};
use super::fds::{Fds, InheritError};
use super::lifecycle::Run;
use super::loss::{self, Remains};
use super::monitor::{Monitor, MonitorIndex};
use super::qtest::Qtest;
use super::restart::Restarts;
use super::rtc::RtcChanges;
use super::serial::{self, Serial};
use super::{BootFiles, GuestFiles, Resources, Vm, devices, frontends, lifecycle, monitor, passwords, throttling};
use crate::backing::Roots;
use crate::chardev::{self, Chardev, ChardevError};
use crate::config::{AllowSource, CharBackend, Guest, Socket, SocketAddress, SocketRole, Topology, VmConfig};
use crate::executor::{Executor, Slot, Turnstile};
use crate::graph::error::GraphError;
use crate::graph::open::{self, Opened};
use crate::graph::options::{DriverOptions, NodeOptions};
use crate::graph::settings::Settings;
use crate::helper::Vcpu;
use crate::hosting::cgroup::{CgroupError, Cgroups, Entries};
use crate::hosting::warden::{Charge, SocketFile, Warden, WardenError};
use crate::launcher::ids::Reserved;
use crate::launcher::{Launcher, LauncherError};
use crate::logging;
use crate::narrowing;
use crate::objects::{ObjectError, Objects};
use crate::opener::{Opener, OpenerError, sockets};
use crate::ram::Ram;
use crate::sandbox::verify::host_thread_id;
use crate::violations::Violations;
use ipc::block::EngineChoice;
use ipc::caps::{InflightFd, InitrdFd, KernelFd, KvmFd};
use ipc::narrowing::Allow;
use ipc::opener::OpenRequest;
use ipc::vcpu::{CpuTopology, VcpuRequest, VcpuSetup};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signalfd::SignalFd;
use nix::sys::stat::Mode;
use policies::Mode as PolicyMode;
use std::cell::{Cell, OnceCell, RefCell};
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::task::Poll;

/// Memory of a machine that has none, bytes.
pub(super) const MIN_RAM_BYTES: u64 = 4096;

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
    /// An inherited file descriptor.
    #[error(transparent)]
    Inherit(#[from] InheritError),
    /// A character device.
    #[error(transparent)]
    Chardev(#[from] ChardevError),
    /// The launcher.
    #[error(transparent)]
    Launcher(#[from] LauncherError),
    /// The opener.
    #[error(transparent)]
    Opener(#[from] OpenerError),
    /// The warden.
    #[error(transparent)]
    Warden(#[from] WardenError),
    /// Control groups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// An object.
    #[error("-object id={id}: {error}")]
    Object {
        /// Which.
        id: String,
        /// What is wrong with it.
        error: ObjectError,
    },
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

/// A file that is made later can be made where its directory is.
fn check_directory(option: &'static str, path: &Path) -> Result<(), StartError> {
    let failed = |errno| StartError::File {
        option,
        path: path.into(),
        errno,
    };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    match nix::sys::stat::stat(parent.unwrap_or(Path::new("."))) {
        Ok(found) if found.st_mode & libc::S_IFMT == libc::S_IFDIR => {}
        Ok(_) => return Err(failed(Errno::ENOTDIR)),
        Err(errno) => return Err(failed(errno)),
    }
    match nix::sys::stat::stat(path) {
        Ok(found) if found.st_mode & libc::S_IFMT == libc::S_IFDIR => Err(failed(Errno::EISDIR)),
        _ => Ok(()),
    }
}

/// Opens everything and starts the launcher.
///
/// # Errors
/// The first thing that does not work.
pub fn prepare(config: VmConfig, signals: SignalFd, ready: Box<dyn FnOnce()>) -> Result<Resources, StartError> {
    engine(&config).map_err(StartError::Other)?;
    let Topology {
        vcpus, cores, threads, ..
    } = config.topology;
    if config.guest.is_some() && !(CpuTopology { cores, threads }).fits(vcpus) {
        let rule = "threads must be a power of two, and so must cores where there are several sockets";
        return Err(StartError::Other(format!(
            "-smp {vcpus},cores={cores},threads={threads}: {rule}"
        )));
    }
    let guest = config.guest.as_ref().map(open_guest).transpose()?;
    for (option, dump) in [
        ("-dump-on-panic", &config.dump_on_panic),
        ("-dump-on-crash", &config.dump_on_crash),
    ] {
        if let Some(dump) = dump {
            check_directory(option, &dump.path)?;
        }
    }
    let fds = Fds::inherit(&config.fds)?;
    let disks = config
        .trees()
        .map(|tree| {
            open::open_tree(tree, Settings::of_root(&tree.common), &fds).map_err(|error| disk_error(tree, &error))
        })
        .collect::<Result<Vec<_>, _>>()
        .map_err(StartError::Other)?;
    let roots = Roots::open(&config.allowed_paths).map_err(StartError::Other)?;
    let chardevs = Chardevs::default();
    let connect = |option, label: &str, backend: &CharBackend, frontend| -> Result<_, StartError> {
        let opened = chardev::open(option, backend)?;
        let device = chardevs.connect(label, opened, frontend);
        device.map_err(|errno| StartError::Other(format!("{option}: {errno}")))
    };
    let serial = match &config.serial {
        Some(backend) => connect("-serial", &config.serial_label, backend, Frontend::Serial)?,
        None => Chardev::Null,
    };
    let qtest = match &config.qtest {
        Some((backend, label)) => connect("-qtest", label, backend, Frontend::Qtest)?,
        None => Chardev::Null,
    };
    let monitors = config
        .monitors
        .iter()
        .enumerate()
        .map(|(index, monitor)| {
            let frontend = Frontend::Monitor(MonitorIndex(index));
            let device = connect("-qmp", &monitor.label, &monitor.backend, frontend)?;
            Ok((device, allowed(&monitor.allow)?))
        })
        .collect::<Result<Vec<_>, StartError>>()?;
    for (id, backend) in &config.chardevs {
        chardevs.keep(id, chardev::open("-chardev", backend)?);
    }
    // All are copies of this process: they must have neither secrets nor guest RAM.
    let (warden, groups) = hire(&config)?;
    let (ids, id_lock) = Reserved::choose(config.uid_base)
        .map_err(StartError::Other)?
        .into_parts();
    let launcher = Launcher::start(config.policy_mode, ids, groups)?;
    let opener = if needs_opener(&config, &monitors) {
        Some(Opener::start(config.policy_mode)?)
    } else {
        None
    };
    let mut objects = Objects::from_command_line(&config.objects, config.spare_io_threads, &fds)
        .map_err(|(id, error)| StartError::Object { id, error })?;
    let backend = config.memory_backend.as_ref().and_then(|id| objects.take_memory(id));
    let ram = match backend {
        Some(ram) => ram,
        // block-proc maps something in any case.
        None => Ram::new(config.ram_bytes.max(MIN_RAM_BYTES)).map_err(StartError::Other)?,
    };
    let inflight_bytes = devices::inflight_bytes(&config);
    let inflight = crate::ram::shared(c"bulkhead-inflight", inflight_bytes).map_err(StartError::Other)?;
    report_layers(&config, &launcher)?;
    launcher.set_nonblocking()?;
    let violations = Violations::new(config.policy_mode, config.name.clone(), Rc::default());
    Ok(Resources {
        warden,
        id_lock,
        config,
        violations: Rc::new(violations),
        launcher,
        opener,
        guest,
        ram,
        inflight: (InflightFd::new(inflight), inflight_bytes),
        fault_device: FaultDevice::open(),
        disks,
        roots,
        fds,
        objects,
        monitors,
        serial,
        qtest,
        chardevs,
        signals,
        ready,
    })
}

/// Control groups, and the warden for them and for metrics. Returns where the launcher enters helpers into groups.
fn hire(config: &VmConfig) -> Result<(Option<Warden>, Entries), StartError> {
    if config.cgroup.is_none() && config.metrics.is_none() {
        return Ok((None, Vec::new()));
    }
    let listener = config.metrics.as_ref().map(|path| {
        let failed = |errno| StartError::File {
            option: "--metrics",
            path: path.clone(),
            errno,
        };
        listen(path).map_err(failed)
    });
    let listener = listener.transpose()?;
    let cgroups = config.cgroup.as_ref();
    let cgroups = cgroups.map(|groups| Cgroups::make(groups, config.name.as_deref()));
    let mut cgroups = cgroups.transpose()?.unwrap_or_default();
    cgroups.enter()?;
    let (warden, cgroups) = Warden::start(Charge {
        name: config.name.clone().unwrap_or_default(),
        listener,
        sockets: socket_files(config),
        cgroups,
        mode: config.policy_mode,
    })?;
    cgroups.expel(warden.pid())?;
    Ok((Some(warden), cgroups.entries))
}

/// A socket for metrics. One that a killed machine has left is replaced.
fn listen(path: &Path) -> Result<OwnedFd, Errno> {
    let path = path.as_os_str().as_encoded_bytes().to_vec();
    let opened = sockets::open(OpenRequest::ListenUnix { path }).map_err(|error| Errno::from_raw(error.errno))?;
    Ok(opened.socket.into_fd())
}

/// The socket files that the machine has made.
fn socket_files(config: &VmConfig) -> Vec<SocketFile> {
    let backends = config.monitors.iter().map(|monitor| &monitor.backend);
    let backends = backends
        .chain(&config.serial)
        .chain(config.qtest.iter().map(|(backend, _)| backend));
    let backends = backends.chain(config.chardevs.iter().map(|(_, backend)| backend));
    let paths = backends.filter_map(|backend| match backend {
        CharBackend::Socket(socket) if socket.is_server() => match &socket.address {
            SocketAddress::Unix(path) => Some(path),
            _ => None,
        },
        _ => None,
    });
    let paths = paths.chain(&config.metrics);
    paths.filter_map(|path| SocketFile::at(path)).collect()
}

/// Whether sockets may have to be made while the machine runs: by a client that has the command, by a device that connects
/// again, or for a node on an NBD server.
fn needs_opener(config: &VmConfig, monitors: &[(Chardev, Allow)]) -> bool {
    let dials = |backend: &CharBackend| {
        matches!(
            backend,
            CharBackend::Socket(Socket {
                role: SocketRole::Client { reconnect: Some(_) },
                ..
            })
        )
    };
    let mut backends = config
        .serial
        .iter()
        .chain(config.chardevs.iter().map(|(_, backend)| backend));
    let may_ask = |allow: &Allow| {
        let mut commands = ["chardev-add", "chardev-change", "blockdev-add", "nbd-server-start"].iter();
        commands.any(|command| allow.permits(command))
    };
    let is_nbd = |node: &NodeOptions| matches!(node.driver, DriverOptions::Nbd(_));
    let mut nodes = config.trees().flat_map(NodeOptions::nodes);
    nodes.any(is_nbd) || backends.any(dials) || monitors.iter().any(|(_, allow)| may_ask(allow))
}

/// An error about a node of the command line, with the file that it is in.
pub(super) fn disk_error(tree: &NodeOptions, error: &GraphError) -> String {
    let what = match (&tree.name, tree.first_path()) {
        (_, Some(path)) => format!("file={}", path.display()),
        (Some(name), None) => format!("node-name={name}"),
        (None, None) => format!("driver={}", tree.driver_name()),
    };
    format!("-drive {what}: {}", error.line())
}

fn open_guest(guest: &Guest) -> Result<GuestFiles, StartError> {
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let kvm = nix::fcntl::open(c"/dev/kvm", flags, Mode::empty()).map_err(StartError::Kvm)?;
    let initrd = guest.initrd.as_ref().map(|path| open_file("-initrd", path));
    Ok(GuestFiles {
        kvm: KvmFd::new(kvm),
        boot: BootFiles {
            kernel: KernelFd::new(open_file("-kernel", &guest.kernel)?),
            initrd: initrd.transpose()?.map(InitrdFd::new),
        },
    })
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
    if config.policy_mode == PolicyMode::Log {
        missing.push("no system call filters: --policy-mode log tells what policies lack and lets it go on");
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
    let fd = nix::fcntl::open(path, flags, Mode::empty()).map_err(failed)?;
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

/// The one engine of block-proc, from what the nodes ask for.
pub(super) fn engine(config: &VmConfig) -> Result<EngineChoice, String> {
    let chosen = open::engine(config.trees()).map_err(|error| error.to_string())?;
    Ok(chosen.unwrap_or(EngineChoice::Auto))
}

/// What [`bring_up`] hands over to the helpers.
pub struct Parts {
    kvm: Option<KvmFd>,
    disks: Vec<Opened>,
    ready: Box<dyn FnOnce()>,
}

impl Vm {
    /// Turns resources into a machine without helpers.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub(super) fn assemble(resources: Resources) -> Result<(Rc<Self>, Parts), StartError> {
        let Resources {
            warden,
            id_lock,
            config,
            launcher,
            opener,
            guest,
            ram,
            inflight: (inflight, inflight_bytes),
            fault_device,
            disks,
            roots,
            fds,
            objects,
            monitors,
            serial,
            qtest,
            chardevs,
            violations,
            signals,
            ready,
        } = resources;
        let monitors = config
            .monitors
            .iter()
            .zip(monitors)
            .map(|(config, (device, allow))| Monitor::new(config, device, allow))
            .collect();
        let (kvm, boot_files) = match guest {
            Some(GuestFiles { kvm, boot }) => (Some(kvm), Some(boot)),
            None => (None, None),
        };
        let vm = Self {
            actions: Cell::new(config.actions),
            counters: Rc::clone(violations.counters()),
            violations,
            config,
            executor: Executor::default(),
            launcher,
            opener,
            warden,
            _id_lock: id_lock,
            starting: RefCell::default(),
            ended: RefCell::default(),
            ram,
            fault_device,
            boot_files,
            signals,
            vcpu: OnceCell::new(),
            block: BlockProc::new(inflight, inflight_bytes),
            restarts: Restarts::default(),
            remains: Remains::default(),
            dumper: RefCell::new(None),
            dump: DumpState::default(),
            looking: super::looking::Looking::default(),
            names: super::names::Names::default(),
            fds: RefCell::new(fds),
            monitors,
            serial: Serial::new(serial),
            qtest: Qtest::new(qtest),
            manual_io: Cell::new(0),
            rtc: RtcChanges::default(),
            chardevs,
            run: Run::default(),
            change: Turnstile::default(),
            object_change: Turnstile::default(),
            vcpu_threads: RefCell::default(),
            io_threads: RefCell::default(),
            objects: RefCell::new(objects),
            signalled: Cell::new(false),
            graph: RefCell::default(),
            graph_change: Turnstile::default(),
            throttle_groups: super::throttling::Groups::default(),
            jobs: RefCell::default(),
            alarms: super::alarm::Alarms::default(),
            exports: super::exports::Exports::default(),
            nbd_clients: super::nbd_client::NbdClients::default(),
            job_work: super::jobs::JobWork::default(),
            io_errors: super::io_errors::IoErrors::default(),
            frontends: super::frontends::Frontends::default(),
            roots,
            monitors_open: Cell::new(false),
            outcome: Cell::new(None),
        };
        Ok((Rc::new(vm), Parts { kvm, disks, ready }))
    }

    /// Loads the kernel again; the vCPUs are parked.
    pub(super) async fn boot(&self) -> Result<(), String> {
        let text = |error: std::io::Error| error.to_string();
        let (Some(guest), Some(files)) = (&self.config.guest, &self.boot_files) else {
            return Ok(());
        };
        let request = VcpuRequest::Boot {
            kernel: files.kernel.try_clone().map_err(text)?,
            initrd: files
                .initrd
                .as_ref()
                .map(InitrdFd::try_clone)
                .transpose()
                .map_err(text)?,
            command_line: guest.command_line.clone(),
        };
        let failed = |error| format!("-kernel {}: {error}", guest.kernel.display());
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
        vm.fail_unless_lost(reason);
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
    let queues = devices::queue_fds(&vm.config)?;
    let (for_vcpu, for_block): (Vec<_>, Vec<_>) = queues.into_iter().unzip();
    vm.block.queues.replace(for_block);
    let with_block = devices::need_block_proc(vm);
    let vm2 = Rc::clone(vm);
    let vcpu = concurrently(vm, async move {
        match kvm {
            Some(kvm) => start_vcpu(&vm2, kvm, for_vcpu).await,
            None => Ok(()),
        }
    });
    let vm2 = Rc::clone(vm);
    let block = concurrently(vm, async move {
        if with_block {
            vm2.block.set_stage(Stage::Starting);
            devices::start_block(&vm2).await
        } else {
            Ok(())
        }
    });
    vcpu.wait().await?;
    block.wait().await?;
    for spare in spares {
        spare.wait().await?;
    }
    devices::attach(vm, disks).await?;
    frontends::begin(vm).await?;
    throttling::begin(vm).await.map_err(|error| error.to_string())?;
    if with_block {
        vm.block.set_stage(Stage::Serving);
    }
    vm.boot().await?;
    if vm.config.guest.is_some() {
        serial::attach(vm).await?;
    }
    // Clients come in when the machine is what they will see; one that the start waits for comes before.
    if waiting_backends(&vm.config).next().is_some() {
        open_monitors(vm);
        wait_for_clients(vm).await;
    }
    if let Err(error) = passwords::check(vm) {
        logging::line(format_args!(
            "{}: the machine waits for block_passwd and cont",
            error.desc
        ));
    } else if !vm.config.start_paused && vm.outcome.get().is_none() {
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

async fn start_vcpu(vm: &Rc<Vm>, kvm: KvmFd, queues: Vec<devices::DeviceQueues>) -> Result<(), String> {
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
        vmcoreinfo: vm.config.vmcoreinfo.is_some(),
    };
    helper.ask(VcpuRequest::Setup(setup)).await.map_err(failed)?;
    loss::keep_run_pages(vm, &helper).await?;
    for ((device, config), queues) in vm.devices().zip(&vm.config.devices).zip(queues) {
        let request = VcpuRequest::AddDevice {
            device,
            kind: devices::kind(config),
            slot: config.slot,
            queues: queues.len() as u16,
            queue_size: devices::queue_size(config),
        };
        helper.ask(request).await.map_err(failed)?;
        for queues in devices::chunked(queues) {
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

fn waits(backend: &CharBackend) -> bool {
    matches!(
        backend,
        CharBackend::Socket(Socket {
            role: SocketRole::Server { wait: true },
            ..
        })
    )
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
