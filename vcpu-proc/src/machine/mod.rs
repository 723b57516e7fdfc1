//! The machine: the VM, its vCPUs and its devices, and what the supervisor can have done to them.
//!
//! Only the control thread holds it. vCPU threads have the buses, the gate and their own vCPU.

mod address_map;
mod build;

pub use build::build;

use address_map::Board;

use crate::acpi::Tables;
use crate::boot::{self, Source, Target};
use crate::bus::SharedDevice;
use crate::cpuid::CpuModel;
use crate::devices::acpi_registers::AcpiRegisters;
use crate::devices::fw_cfg::FwCfg;
use crate::devices::rtc::Rtc;
use crate::devices::serial::{self, SerialPort};
use crate::irq::IrqManager;
use crate::outbox::Outbox;
use crate::pci::root::PciRoot;
use crate::vcpu::gate::Gate;
use crate::vcpu::run_page::RunPage;
use crate::vcpu::state::PowerOnState;
use crate::vcpu::{Buses, SharedVcpu, registers, start_threads};
use crate::virtio::VirtioPci;
use ipc::Failure;
use ipc::caps::{ChardevFd, FaultDeviceFd, RunPageFd};
use ipc::cpu::CpuProperties;
use ipc::human::AddressMap;
use ipc::live::MemoryWatch;
use ipc::memory::GuestRam;
use ipc::vcpu::{CpuFeature, KernelFormat, RUN_PAGES_PER_MESSAGE, VcpuRegisters, VmCoreInfo};
use ipc::virtio::{DeviceIndex, DeviceKind, MAX_DEVICES, QueueFds};
use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, kvm_irqchip};
use kvm_ioctls::VmFd;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_memory::{Bytes, GuestAddress};

/// See the module.
pub struct Machine {
    vm: Arc<VmFd>,
    ram: GuestRam,
    ram_bytes: u64,
    /// What this host's KVM can give, before `-cpu` switches anything.
    host_model: CpuModel,
    vcpus: Vec<SharedVcpu>,
    /// One per vCPU.
    power_on: Vec<PowerOnState>,
    /// PICs and IOAPIC after power-on.
    irqchips: Vec<kvm_irqchip>,
    tables: Tables,
    gate: Arc<Gate>,
    outbox: Outbox,
    irq: IrqManager,
    buses: Arc<Buses>,
    /// What a reset resets.
    devices: Vec<SharedDevice>,
    acpi_registers: Arc<Mutex<AcpiRegisters>>,
    rtc: Arc<Mutex<Rtc>>,
    serial: Option<Arc<Mutex<SerialPort>>>,
    fw_cfg: Option<Arc<Mutex<FwCfg>>>,
    pci: Arc<Mutex<PciRoot>>,
    virtio: Vec<(DeviceIndex, Arc<Mutex<VirtioPci>>)>,
    /// Whether vCPU 0 has a kernel to run.
    booted: bool,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failure(error: impl std::error::Error) -> Failure {
    Failure::new(error.to_string())
}

impl Machine {
    /// Adds a virtio device; its queues' eventfds follow.
    ///
    /// # Errors
    /// When the number or the slot is taken or does not exist, or KVM has no more room.
    pub fn add_device(
        &mut self,
        device: DeviceIndex,
        kind: DeviceKind,
        slot: u8,
        queues: u16,
        queue_size: u16,
    ) -> Result<(), Failure> {
        if device.0 >= MAX_DEVICES || self.device(device).is_ok() {
            return Err(Failure::new(format!("device number {} is taken or too high", device.0)));
        }
        let outbox = self.outbox.clone();
        let events = Box::new(move |event| outbox.send(event));
        let function = VirtioPci::new(device, kind, (queues, queue_size), &self.irq, events).map_err(failure)?;
        let function = Arc::new(Mutex::new(function));
        lock(&self.pci).add(slot, function.clone()).map_err(failure)?;
        self.virtio.push((device, function));
        Ok(())
    }

    /// Takes the eventfds of a device's next queues.
    ///
    /// # Errors
    /// When there is no such device or it has fewer queues.
    pub fn add_queues(&self, device: DeviceIndex, queues: Vec<QueueFds>) -> Result<(), Failure> {
        self.device(device)?.add_queues(queues).map_err(failure)
    }

    /// Starts the threads, parked. The machine is complete.
    ///
    /// # Errors
    /// When a device lacks eventfds, or a thread cannot be started.
    pub fn start(&self) -> Result<(), Failure> {
        for (index, device) in &self.virtio {
            if !lock(device).is_complete() {
                return Err(Failure::new(format!("device {} lacks eventfds of its queues", index.0)));
            }
        }
        start_threads(&self.vcpus, &self.gate, &self.buses)?;
        if let Some(port) = &self.serial {
            serial::start_thread(Arc::clone(port), self.outbox.clone())?;
        }
        Ok(())
    }

    /// The next vCPUs for who keeps their run pages.
    ///
    /// # Errors
    /// When this process is out of descriptors.
    pub fn run_pages(&self, first: u16) -> Result<Vec<RunPageFd>, Failure> {
        let wanted = self.vcpus.iter().skip(first.into()).take(RUN_PAGES_PER_MESSAGE);
        let copy = |vcpu: &SharedVcpu| {
            let vcpu = lock(vcpu);
            // SAFETY: the vCPU is open while it is locked here.
            let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
            Ok(RunPageFd::new(fd.try_clone_to_owned()?))
        };
        wanted.map(copy).collect()
    }

    /// The vCPU threads' ids, in vCPU order.
    pub fn thread_ids(&self) -> Vec<i32> {
        self.gate.thread_ids()
    }

    /// A device by its number.
    ///
    /// # Errors
    /// When there is none.
    pub fn device(&self, device: DeviceIndex) -> Result<MutexGuard<'_, VirtioPci>, Failure> {
        self.virtio
            .iter()
            .find(|(index, _)| *index == device)
            .map(|(_, function)| lock(function))
            .ok_or_else(|| Failure::new(format!("there is no device {}", device.0)))
    }

    /// Connects the serial port.
    ///
    /// # Errors
    /// When the machine has none.
    pub fn attach_serial(
        &self,
        input: Option<ChardevFd>,
        output: Option<ChardevFd>,
        datagrams: bool,
    ) -> Result<(), Failure> {
        let port = self
            .serial
            .as_ref()
            .ok_or_else(|| Failure::new("this machine has no serial port"))?;
        // The line is the port's other end: the lock is not held while the thread looks at what is attached.
        let line = lock(port).line();
        line.attach(input, output, datagrams);
        Ok(())
    }

    /// Resets everything but RAM, loads the kernel and points vCPU 0 at it.
    ///
    /// # Errors
    /// When a vCPU is not parked, or the kernel cannot be booted. The machine then has nothing to run.
    pub fn boot(&mut self, source: Source) -> Result<KernelFormat, Failure> {
        self.require_parked()?;
        self.booted = false;
        self.reset()?;
        for (address, blob) in &self.tables.blobs {
            self.ram.write_slice(blob, GuestAddress(*address)).map_err(failure)?;
        }
        let target = Target {
            ram: &self.ram,
            ram_bytes: self.ram_bytes,
            rsdp: self.tables.rsdp_address,
        };
        let (format, entry) = boot::load(&target, source).map_err(failure)?;
        boot::entry::enter(&lock(&self.vcpus[0]), &self.power_on[0], &self.ram, entry)?;
        for vcpu in &self.vcpus {
            RunPage::note_registers(&mut lock(vcpu))?;
        }
        self.booted = true;
        Ok(format)
    }

    fn reset(&self) -> Result<(), Failure> {
        for device in &self.devices {
            lock(device.as_ref()).reset();
        }
        for (vcpu, state) in self.vcpus.iter().zip(&self.power_on) {
            state.restore(&lock(vcpu))?;
        }
        build::restore_irqchips(&self.vm, &self.irqchips)?;
        Ok(())
    }

    /// Lets the vCPUs run. A machine that runs, or that is just stopping by itself, is left as it is.
    ///
    /// # Errors
    /// When there is no kernel.
    pub fn run(&self) -> Result<(), Failure> {
        if !self.booted {
            return Err(Failure::new("there is no kernel to run: Boot comes first"));
        }
        if self.gate.is_parked() {
            for vcpu in &self.vcpus {
                // Tells the guest's watchdogs that time has passed without it. Fails where the guest has no KVM clock.
                let _ = lock(vcpu).kvmclock_ctrl();
            }
            self.gate.open();
        }
        Ok(())
    }

    /// Parks all vCPUs; returns when they are.
    pub fn pause(&self) {
        self.gate.close_and_wait();
        if let Some(port) = &self.serial {
            let line = lock(port).line();
            line.drain();
        }
    }

    /// Presses the ACPI power button.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn press_power_button(&self) -> Result<(), Failure> {
        lock(&self.acpi_registers).press_power_button()?;
        Ok(())
    }

    /// A non-maskable interrupt for every vCPU that runs the guest or is halted. One that has not been started yet would
    /// not take it, and KVM would not let it wait for its start any more.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn inject_nmi(&self) -> Result<(), Failure> {
        self.gate.while_parked(|| {
            for vcpu in &self.vcpus {
                let vcpu = lock(vcpu);
                let state = vcpu.get_mp_state().map_err(failure)?.mp_state;
                if matches!(state, KVM_MP_STATE_RUNNABLE | KVM_MP_STATE_HALTED) {
                    vcpu.nmi().map_err(failure)?;
                }
            }
            Ok(())
        })
    }

    /// All vCPUs' registers, of one moment.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn registers(&self) -> Result<Vec<VcpuRegisters>, Failure> {
        self.gate.while_parked(|| {
            self.vcpus
                .iter()
                .map(|vcpu| registers::read(&lock(vcpu)).map_err(Failure::from))
                .collect()
        })
    }

    /// What CPUID would say with these features switched on or off.
    ///
    /// # Errors
    /// The name of a feature that does not exist.
    pub fn expand_cpu_model(&self, changes: &[CpuFeature]) -> Result<CpuProperties, String> {
        self.host_model.expand(changes)
    }

    /// Which device answers where.
    pub fn address_map(&self) -> AddressMap {
        let bars = lock(&self.pci).decoded_bars();
        let board = Board {
            serial: self.serial.is_some(),
            fw_cfg: self.fw_cfg.is_some(),
        };
        address_map::address_map(self.ram_bytes, board, &bars)
    }

    /// Where the guest's kernel says that its VMCOREINFO note is.
    pub fn vmcoreinfo(&self) -> Option<VmCoreInfo> {
        lock(self.fw_cfg.as_ref()?).vmcoreinfo()
    }

    /// Makes a userfaultfd of this process for a live dump.
    ///
    /// # Errors
    /// The system's.
    pub fn watch_memory(&self, device: FaultDeviceFd) -> Result<MemoryWatch, Failure> {
        ipc::live::watch(device, &self.ram).map_err(|error| Failure::new(format!("USERFAULTFD_IOC_NEW: {error}")))
    }

    /// How far the guest has set its clock from the host's, seconds.
    pub fn rtc_offset(&self) -> i64 {
        lock(&self.rtc).take_offset()
    }

    fn require_parked(&self) -> Result<(), Failure> {
        if self.gate.is_parked() {
            Ok(())
        } else {
            Err(Failure::new("the vCPUs run: Pause comes first"))
        }
    }
}
