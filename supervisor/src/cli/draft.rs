//! The machine while the options are being read, and the checks that need all of them.

use super::chardev::{self, Chardev, MonitorDraft, Source};
use super::cpu::Smp;
use super::device::{DeviceDraft, connect_devices};
use super::error::UsageError;
use super::frontends::FrontendDraft;
use super::given::Given;
use super::{Invocation, machine};
use crate::config::{
    AutomaticDump, Board, Drive, Guest, InheritedFd, RestartBudget, Topology, VmConfig, VmCoreInfoDevice,
};
use crate::graph::options::NodeOptions;
use crate::hosting::cgroup::CgroupConfig;
use crate::logging::Format;
use crate::objects::Spec;
use ipc::action::Actions;
use ipc::blockdev::BackendOptions;
use ipc::device::NewDevice;
use ipc::vcpu::CpuFeature;
use std::path::PathBuf;

/// What the options have said so far.
#[derive(Debug, Default)]
pub(super) struct Draft {
    /// An option asked for information instead of a machine.
    pub(super) answer: Option<Invocation>,
    pub(super) name: Option<String>,
    pub(super) uuid: Option<[u8; 16]>,
    pub(super) accelerator_chosen: bool,
    pub(super) board: Board,
    /// `-accel qtest`: nothing runs.
    pub(super) is_qtest: bool,
    /// 0: no `-m` yet.
    pub(super) ram_bytes: u64,
    /// `-m maxmem=`, bytes.
    pub(super) max_ram: Option<(Given, u64)>,
    pub(super) smp: Smp,
    pub(super) cpu_features: Vec<CpuFeature>,
    pub(super) kernel: Option<PathBuf>,
    pub(super) initrd: Option<PathBuf>,
    pub(super) command_line: String,
    pub(super) blockdevs: Vec<(Given, NodeOptions)>,
    pub(super) drives: Vec<Drive>,
    /// Of each drive, whether it brings its device along (`if=virtio`).
    pub(super) drive_has_device: Vec<bool>,
    /// The first that does not say whether it does.
    pub(super) drive_without_interface: Option<Given>,
    pub(super) objects: Vec<(String, Spec)>,
    /// `-machine memory-backend=`.
    pub(super) memory_backend: Option<Given>,
    /// `-spare-iothreads`; by default a few.
    pub(super) spare_io_threads: Option<u8>,
    pub(super) devices: Vec<DeviceDraft>,
    /// Devices that only `-accel qtest` has.
    pub(super) frontends: Vec<FrontendDraft>,
    /// Such devices that drives bring along.
    pub(super) brought_along: Vec<NewDevice>,
    /// Drives without an image.
    pub(super) empty_drives: Vec<BackendOptions>,
    /// The first of what a machine does not have, and why.
    pub(super) only_with_qtest: Option<(Given, &'static str)>,
    pub(super) vmcoreinfo: Option<VmCoreInfoDevice>,
    pub(super) allowed_paths: Vec<PathBuf>,
    pub(super) fds: Vec<InheritedFd>,
    pub(super) chardevs: Vec<Chardev>,
    pub(super) serial: Option<(Given, Source)>,
    pub(super) qtest: Option<(Given, Source)>,
    pub(super) monitors: Vec<MonitorDraft>,
    pub(super) no_defaults: bool,
    /// `-nographic`, as an error calls it.
    pub(super) no_graphic: Option<Given>,
    pub(super) start_paused: bool,
    pub(super) actions: Actions,
    pub(super) dump_on_panic: Option<AutomaticDump>,
    pub(super) dump_on_crash: Option<AutomaticDump>,
    pub(super) pidfile: Option<PathBuf>,
    pub(super) daemonize: bool,
    pub(super) require_sandbox: bool,
    pub(super) restart_budget: RestartBudget,
    pub(super) policy_mode: policies::Mode,
    pub(super) uid_base: Option<u32>,
    pub(super) cgroup: Option<CgroupConfig>,
    pub(super) metrics: Option<PathBuf>,
    pub(super) log_format: Format,
}

impl Draft {
    /// Whether an option so far has made a device of this id.
    pub(super) fn has_device(&self, id: &str) -> bool {
        let vmcoreinfo = self.vmcoreinfo.iter().map(|device| device.id.as_deref());
        let frontends = self.frontends.iter().map(FrontendDraft::id);
        let mut ids = self
            .devices
            .iter()
            .map(DeviceDraft::id)
            .chain(vmcoreinfo)
            .chain(frontends);
        ids.any(|known| known == Some(id))
    }

    /// Whether a drive so far has this id.
    pub(super) fn has_drive(&self, id: &str) -> bool {
        let ids = self.drives.iter().map(|drive| &drive.backend.id);
        let empty = self.empty_drives.iter().map(|drive| &drive.id);
        ids.chain(empty).any(|known| known == id)
    }

    /// What only `-accel qtest` has, which may still come: the first of such is refused without.
    pub(super) fn needs_qtest(&mut self, given: &Given, problem: &'static str) {
        self.only_with_qtest.get_or_insert_with(|| (given.clone(), problem));
    }

    /// After the last option.
    pub(super) fn finish(mut self) -> Result<VmConfig, UsageError> {
        let memory_backend = machine::connect_memory(&mut self)?;
        if self.ram_bytes == 0 && self.board == Board::Pc {
            self.ram_bytes = machine::DEFAULT_RAM_BYTES;
        }
        machine::check_max_memory(&self)?;
        let topology = match self.board {
            Board::Pc => self.smp.topology()?,
            Board::Empty => Topology {
                vcpus: 0,
                ..self.smp.topology()?
            },
        };
        let chardev::Connected {
            serial,
            serial_label,
            qtest,
            chardevs,
            monitors,
        } = chardev::connect(&mut self)?;
        super::blockdev::check_names(&self)?;
        let frontends = super::frontends::connect(&mut self)?;
        let devices = connect_devices(&self, topology.vcpus)?;
        let spare_io_threads = super::object::check_threads(&self)?;
        let is_without_guest = self.board == Board::Empty || self.is_qtest;
        if let Some(given) = self.drive_without_interface.filter(|_| !is_without_guest) {
            return Err(given.refuse("if is missing: Bulkhead's disks are virtio disks, write if=virtio"));
        }
        let guest = match self.kernel {
            Some(_) if is_without_guest => {
                return Err(UsageError::new(
                    "-kernel",
                    "no guest runs with -machine none or -accel qtest",
                ));
            }
            Some(kernel) => Some(Guest {
                kernel,
                initrd: self.initrd,
                command_line: self.command_line,
            }),
            None if is_without_guest => None,
            None => {
                let how =
                    "Bulkhead boots a kernel directly: -kernel vmlinuz [-initrd FILE] [-append TEXT] (see --help)";
                return Err(UsageError::new("-kernel is missing", how));
            }
        };
        Ok(VmConfig {
            name: self.name,
            uuid: self.uuid,
            ram_bytes: self.ram_bytes,
            topology,
            cpu_features: self.cpu_features,
            board: self.board,
            guest,
            blockdevs: self.blockdevs.into_iter().map(|(_, node)| node).collect(),
            drives: self.drives,
            objects: self.objects,
            memory_backend,
            spare_io_threads,
            devices,
            is_qtest: self.is_qtest,
            frontends,
            empty_drives: self.empty_drives,
            vmcoreinfo: self.vmcoreinfo,
            allowed_paths: self.allowed_paths,
            fds: self.fds,
            serial,
            serial_label,
            qtest,
            chardevs,
            monitors,
            start_paused: self.start_paused,
            actions: self.actions,
            dump_on_panic: self.dump_on_panic,
            dump_on_crash: self.dump_on_crash,
            pidfile: self.pidfile,
            daemonize: self.daemonize,
            require_sandbox: self.require_sandbox,
            restart_budget: self.restart_budget,
            policy_mode: self.policy_mode,
            uid_base: self.uid_base,
            cgroup: self.cgroup,
            metrics: self.metrics,
            log_format: self.log_format,
        })
    }
}
