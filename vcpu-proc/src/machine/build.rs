//! Making the VM: what `Setup` asks for.

use super::Machine;
use crate::acpi::{AcpiConfig, build_tables};
use crate::bus::SharedDevice;
use crate::cpuid::CpuModel;
use crate::devices::acpi_registers::AcpiRegisters;
use crate::devices::fw_cfg::FwCfg;
use crate::devices::i8042::I8042;
use crate::devices::pvpanic::PvPanic;
use crate::devices::rtc::Rtc;
use crate::devices::serial::SerialPort;
use crate::irq::IrqManager;
use crate::layout::{
    ACPI_PORT, ACPI_PORTS, FW_CFG_PORT, FW_CFG_PORTS, GED_GSI, I8042_PORT, I8042_PORTS, KERNEL_RAM_START,
    KVM_IDENTITY_MAP, KVM_TSS, PVPANIC_PORT, RTC_PORT, SERIAL_GSI, SERIAL_PORT, pci64_window,
};
use crate::outbox::Outbox;
use crate::pci::root::PciRoot;
use crate::vcpu::gate::Gate;
use crate::vcpu::registers::os_error;
use crate::vcpu::run_page::RunPage;
use crate::vcpu::state::PowerOnState;
use crate::vcpu::{Buses, SharedVcpu};
use ipc::Failure;
use ipc::caps::KvmFd;
use ipc::memory::{GuestRam, PAGE_BYTES, map_read_write};
use ipc::vcpu::{CpuFeature, CpuTopology, MAX_VCPUS, VcpuSetup};
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES,
    kvm_irqchip, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::{Arc, Mutex};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The least RAM that holds the boot structures and any kernel at all.
const MIN_RAM_BYTES: u64 = KERNEL_RAM_START + (1 << 20);
/// No processor has more than 52 bits of physical address.
const MAX_RAM_BYTES: u64 = 1 << 51;

/// What this process cannot do without, and the name to complain by.
const NEEDED: [(Cap, &str); 10] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SyncRegs, "KVM_CAP_SYNC_REGS"),
];

/// Puts the system call in front of KVM's error.
fn kvm_error(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Failure {
    move |error| Failure {
        message: format!("{call}: {error}"),
        errno: Some(error.errno()),
    }
}

/// Builds the whole machine but for its virtio devices. /dev/kvm and the memory fd are closed when this returns.
///
/// # Errors
/// Names what is wrong with the request, or what KVM cannot do.
pub fn build(setup: VcpuSetup, outbox: &Outbox) -> Result<Machine, Failure> {
    let ram_bytes = setup.ram_bytes;
    check_sizes(&setup)?;
    let kvm = open_kvm(setup.kvm)?;
    let [model, host_model] = cpu_models(&kvm, setup.vcpus, setup.topology, &setup.cpu_features)?;
    let (window, window_bytes) = pci64_window(ram_bytes);
    let address_bits = model.physical_address_bits();
    if address_bits < 64 && window + window_bytes > 1 << address_bits {
        return Err(Failure::new(format!(
            "{ram_bytes} bytes of RAM do not fit into this host's {address_bits} bits of guest physical address"
        )));
    }
    let ram = map_read_write(setup.memory, ram_bytes)?;
    let vm = create_vm(&kvm, &ram)?;
    let (vcpus, power_on) = create_vcpus(&kvm, &vm, &model, setup.vcpus)?;
    let mut irqchips = Vec::new();
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip).map_err(kvm_error("KVM_GET_IRQCHIP"))?;
        irqchips.push(chip);
    }
    let tables = build_tables(AcpiConfig {
        vcpus: setup.vcpus,
        ram_bytes,
        serial: setup.serial,
        fw_cfg: setup.vmcoreinfo,
    })
    .map_err(|error| Failure::new(error.to_string()))?;

    let irq = IrqManager::new(Arc::clone(&vm));
    let gate = Arc::new(Gate::new(usize::from(setup.vcpus), outbox.clone()));
    let mut board = Board::default();
    let acpi_registers = Arc::new(Mutex::new(AcpiRegisters::new(
        Arc::clone(&gate),
        interrupt_line(&irq, GED_GSI)?,
    )));
    board.plug(ACPI_PORT, ACPI_PORTS, acpi_registers.clone())?;
    board.plug(
        I8042_PORT,
        I8042_PORTS,
        Arc::new(Mutex::new(I8042::new(Arc::clone(&gate)))),
    )?;
    let rtc = Arc::new(Mutex::new(Rtc::new(ram_bytes, outbox.clone())));
    board.plug(RTC_PORT, 2, rtc.clone())?;
    board.plug(
        PVPANIC_PORT,
        1,
        Arc::new(Mutex::new(PvPanic::new(Arc::clone(&gate), outbox.clone()))),
    )?;
    let serial = if setup.serial {
        let port = Arc::new(Mutex::new(SerialPort::new(interrupt_line(&irq, SERIAL_GSI)?)?));
        board.plug(SERIAL_PORT, 8, port.clone())?;
        Some(port)
    } else {
        None
    };
    let fw_cfg = if setup.vmcoreinfo {
        let device = Arc::new(Mutex::new(FwCfg::new(ram.clone())));
        board.plug(FW_CFG_PORT, FW_CFG_PORTS, device.clone())?;
        Some(device)
    } else {
        None
    };
    let pci = Arc::new(Mutex::new(PciRoot::new(ram_bytes)));
    PciRoot::insert_into(&pci, &mut board.buses.ports, &mut board.buses.memory)
        .map_err(|error| Failure::new(error.to_string()))?;
    board.devices.push(pci.clone());

    Ok(Machine {
        vm,
        ram,
        ram_bytes,
        host_model,
        vcpus,
        power_on,
        irqchips,
        tables,
        gate,
        outbox: outbox.clone(),
        irq,
        buses: Arc::new(board.buses),
        devices: board.devices,
        acpi_registers,
        rtc,
        serial,
        fw_cfg,
        pci,
        virtio: Vec::new(),
        booted: false,
    })
}

/// The buses while they are being filled, and the list of what a reset resets.
#[derive(Default)]
struct Board {
    buses: Buses,
    devices: Vec<SharedDevice>,
}

impl Board {
    fn plug(&mut self, port: u64, ports: u64, device: SharedDevice) -> Result<(), Failure> {
        self.buses
            .ports
            .insert(port, ports, Arc::clone(&device))
            .map_err(|error| Failure::new(error.to_string()))?;
        self.devices.push(device);
        Ok(())
    }
}

fn check_sizes(setup: &VcpuSetup) -> Result<(), Failure> {
    if setup.vcpus == 0 || setup.vcpus > MAX_VCPUS {
        return Err(Failure::new(format!(
            "a machine has 1 to {MAX_VCPUS} vCPUs, not {}",
            setup.vcpus
        )));
    }
    if !setup.topology.fits(setup.vcpus) {
        return Err(Failure::new(format!(
            "{} vCPUs cannot be grouped into sockets of {} cores of {} threads",
            setup.vcpus, setup.topology.cores, setup.topology.threads
        )));
    }
    if !(MIN_RAM_BYTES..=MAX_RAM_BYTES).contains(&setup.ram_bytes) || !setup.ram_bytes.is_multiple_of(PAGE_BYTES) {
        return Err(Failure::new(format!(
            "RAM of {} bytes is not possible: at least {MIN_RAM_BYTES}, in pages of {PAGE_BYTES}",
            setup.ram_bytes
        )));
    }
    Ok(())
}

fn open_kvm(fd: KvmFd) -> Result<Kvm, Failure> {
    // SAFETY: the descriptor is ours and open; the supervisor vouches that it is /dev/kvm, and every request checks it.
    let kvm = unsafe { Kvm::from_raw_fd(fd.into_fd().into_raw_fd()) };
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(Failure::new(format!(
            "KVM has API version {version}, wanted is {KVM_API_VERSION}"
        )));
    }
    for (capability, name) in NEEDED {
        if !kvm.check_extension(capability) {
            return Err(Failure::new(format!("this host's KVM lacks {name}")));
        }
    }
    Ok(kvm)
}

/// The model of this machine, and the host's without its changes. The kernel takes long to say what it supports.
fn cpu_models(kvm: &Kvm, vcpus: u16, topology: CpuTopology, changes: &[CpuFeature]) -> Result<[CpuModel; 2], Failure> {
    let most = kvm.get_max_vcpus();
    if usize::from(vcpus) > most {
        return Err(Failure::new(format!(
            "this host's KVM gives a machine at most {most} vCPUs, not {vcpus}"
        )));
    }
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm_error("KVM_GET_SUPPORTED_CPUID"))?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let model = |changes| CpuModel::new(supported.as_slice(), topology, deadline, changes);
    Ok([model(changes)?, model(&[])?])
}

fn create_vm(kvm: &Kvm, ram: &GuestRam) -> Result<Arc<VmFd>, Failure> {
    let vm = kvm.create_vm().map_err(kvm_error("KVM_CREATE_VM"))?;
    vm.set_identity_map_address(KVM_IDENTITY_MAP)
        .map_err(kvm_error("KVM_SET_IDENTITY_MAP_ADDR"))?;
    let tss = usize::try_from(KVM_TSS).map_err(|error| Failure::new(error.to_string()))?;
    vm.set_tss_address(tss).map_err(kvm_error("KVM_SET_TSS_ADDR"))?;
    for (slot, region) in (0..).zip(ram.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is our mapping of guest RAM, which is never unmapped; what the guest does to it is visible
        // to volatile accesses only, which is how vm-memory reads it.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm_error("KVM_SET_USER_MEMORY_REGION"))?;
    }
    // After the memory: what the controllers leave to be cleared up takes the kernel a tick of its clock, and a change of memory
    // waits for it.
    vm.create_irq_chip().map_err(kvm_error("KVM_CREATE_IRQCHIP"))?;
    Ok(Arc::new(vm))
}

fn create_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    model: &CpuModel,
    count: u16,
) -> Result<(Vec<SharedVcpu>, Vec<PowerOnState>), Failure> {
    let msrs = kvm.get_msr_index_list().map_err(kvm_error("KVM_GET_MSR_INDEX_LIST"))?;
    let (mut vcpus, mut states) = (Vec::new(), Vec::new());
    for index in 0..count {
        let mut vcpu = vm.create_vcpu(u64::from(index)).map_err(kvm_error("KVM_CREATE_VCPU"))?;
        RunPage::of(&mut vcpu).keep_registers();
        let cpuid = CpuId::from_entries(&model.for_vcpu(index)).map_err(|error| Failure::new(format!("{error:?}")))?;
        vcpu.set_cpuid2(&cpuid).map_err(kvm_error("KVM_SET_CPUID2"))?;
        states.push(PowerOnState::take(&vcpu, msrs.as_slice())?);
        vcpus.push(Arc::new(Mutex::new(vcpu)));
    }
    Ok((vcpus, states))
}

/// An eventfd that raises a pin of the IOAPIC, edge-triggered.
fn interrupt_line(irq: &IrqManager, gsi: u32) -> Result<EventFd, Failure> {
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    irq.connect_irqfd(&event, gsi)?;
    Ok(event)
}

/// Puts the interrupt controllers back.
///
/// # Errors
/// When KVM refuses.
pub fn restore_irqchips(vm: &VmFd, irqchips: &[kvm_irqchip]) -> std::io::Result<()> {
    irqchips
        .iter()
        .try_for_each(|chip| vm.set_irqchip(chip).map_err(os_error))
}
