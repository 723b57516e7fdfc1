//! The device as a Linux driver meets it: found by its PCI IDs and capabilities, programmed through its BAR.

use super::*;
use crate::bus::{Bus, BusDevice};
use crate::irq::MsiMessage;
use crate::irq::fake::FakeKvm;
use crate::layout::ECAM_BASE;
use crate::pci::config::{CAPABILITY_MSIX, CAPABILITY_VENDOR};
use crate::pci::root::PciRoot;
use ipc::caps::{CallFd, KickFd};
use ipc::virtio::{Activation, QueueSetup};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

mod hostile;
mod kvm;

const SLOT: u64 = 3;
const QUEUES: u16 = 2;
const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 9;
const RUNNING: u8 = 0x0f;

type Events = Arc<Mutex<Vec<VcpuEvent>>>;

/// A machine with one block device, seen from both sides.
struct Machine {
    memory: Bus,
    root: Arc<Mutex<PciRoot>>,
    device: Arc<Mutex<VirtioPci>>,
    /// The device side of the queues' eventfds: kick, call.
    fds: Vec<(EventFd, EventFd)>,
    events: Events,
}

fn event_pair() -> (EventFd, OwnedFd) {
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let fd = event.try_clone().unwrap().into_raw_fd();
    // SAFETY: the duplicate was given up just now.
    (event, unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Machine {
    fn new(irq: &IrqManager) -> Self {
        let events = Events::default();
        let sink = events.clone();
        let mut device = VirtioPci::new(
            DeviceIndex(7),
            DeviceKind::Block,
            (QUEUES, 256),
            irq,
            Box::new(move |event| sink.lock().unwrap().push(event)),
        )
        .unwrap();
        let mut fds = Vec::new();
        for _ in 0..QUEUES {
            let ((kick, kick_fd), (call, call_fd)) = (event_pair(), event_pair());
            fds.push((kick, call));
            assert!(!device.is_complete());
            device
                .add_queues(vec![QueueFds {
                    kick: KickFd::new(kick_fd),
                    call: CallFd::new(call_fd),
                }])
                .unwrap();
        }
        assert!(device.is_complete());
        device.configure(configuration(64)).unwrap();
        let device = Arc::new(Mutex::new(device));
        let root = Arc::new(Mutex::new(PciRoot::new(512 << 20)));
        root.lock().unwrap().add(3, device.clone()).unwrap();
        let mut memory = Bus::default();
        PciRoot::insert_into(&root, &mut Bus::default(), &mut memory).unwrap();
        Self {
            memory,
            root,
            device,
            fds,
            events,
        }
    }

    fn read(&self, address: u64, bytes: usize) -> u64 {
        let mut data = [0; 8];
        self.memory.read(address, &mut data[..bytes]);
        u64::from_le_bytes(data)
    }

    fn write(&self, address: u64, bytes: usize, value: u64) {
        self.memory.write(address, &value.to_le_bytes()[..bytes]);
    }

    fn config(register: u64) -> u64 {
        ECAM_BASE + (SLOT << 15) + register
    }

    fn config_read(&self, register: u64, bytes: usize) -> u64 {
        self.read(Self::config(register), bytes)
    }

    fn config_write(&self, register: u64, bytes: usize, value: u64) {
        self.write(Self::config(register), bytes, value);
    }

    fn device(&self) -> std::sync::MutexGuard<'_, VirtioPci> {
        self.device.lock().unwrap()
    }

    fn take_events(&self) -> Vec<VcpuEvent> {
        std::mem::take(&mut *self.events.lock().unwrap())
    }

    /// As the supervisor answers `ActivateDevice`.
    fn take_activation(&self) -> Activation {
        match self.take_events().as_slice() {
            [VcpuEvent::ActivateDevice { device, activation }] => {
                assert_eq!(*device, DeviceIndex(7));
                activation.clone()
            }
            other => panic!("{other:?}"),
        }
    }
}

fn configuration(capacity: u64) -> DeviceIdentity {
    let mut config = vec![0; 60];
    config[..8].copy_from_slice(&capacity.to_le_bytes());
    DeviceIdentity {
        features: FEATURES,
        config,
    }
}

fn fake() -> (Machine, Arc<FakeKvm>) {
    let (irq, kvm) = FakeKvm::manager();
    (Machine::new(&irq), kvm)
}

/// The structures' addresses, as found in the capabilities, and how far the driver has got.
struct Driver<'a> {
    machine: &'a Machine,
    structures: BTreeMap<u64, u64>,
    msix: u64,
    msix_table: u64,
    notify_multiplier: u64,
}

impl<'a> Driver<'a> {
    fn probe(machine: &'a Machine) -> Self {
        assert_eq!(machine.config_read(0, 4), 0x1042_1af4);
        assert_eq!(machine.config_read(8, 4), 0x0100_0001);
        assert_eq!(machine.config_read(0x3d, 1), 0, "no INTx");
        machine.config_write(4, 2, 0x0406);
        let bar = machine.config_read(0x10, 8) & !0xf;
        let mut driver = Self {
            machine,
            structures: BTreeMap::new(),
            msix: 0,
            msix_table: 0,
            notify_multiplier: 0,
        };
        assert_ne!(machine.config_read(6, 2) & 0x10, 0);
        let mut at = machine.config_read(0x34, 1);
        while at != 0 {
            match machine.config_read(at, 1).to_le_bytes()[0] {
                CAPABILITY_VENDOR => {
                    let kind = machine.config_read(at + 3, 1);
                    assert_eq!(machine.config_read(at + 4, 1), 0, "BAR 0");
                    let offset = machine.config_read(at + 8, 4);
                    driver.structures.insert(kind, bar + offset);
                    if kind == 2 {
                        driver.notify_multiplier = machine.config_read(at + 16, 4);
                    }
                }
                CAPABILITY_MSIX => {
                    driver.msix = at;
                    driver.msix_table = bar + machine.config_read(at + 4, 4);
                    assert_eq!(machine.config_read(at + 2, 2) & 0x7ff, u64::from(QUEUES));
                }
                other => panic!("capability {other:#x}"),
            }
            at = machine.config_read(at + 1, 1);
        }
        driver
    }

    fn get(&self, register: u64, bytes: usize) -> u64 {
        self.machine.read(self.structures[&1] + register, bytes)
    }

    fn set(&self, register: u64, bytes: usize, value: u64) {
        self.machine.write(self.structures[&1] + register, bytes, value);
    }

    fn status(&self) -> u8 {
        self.get(0x14, 1).to_le_bytes()[0]
    }

    fn negotiate(&self) {
        self.set(0x14, 1, 0);
        assert_eq!(self.status(), 0);
        self.set(0x14, 1, 1);
        self.set(0x14, 1, 3);
        self.set(0x00, 4, 0);
        let mut features = self.get(0x04, 4);
        self.set(0x00, 4, 1);
        features |= self.get(0x04, 4) << 32;
        assert_eq!(features, FEATURES);
        self.set(0x08, 4, 0);
        self.set(0x0c, 4, features & 0xffff_ffff);
        self.set(0x08, 4, 1);
        self.set(0x0c, 4, features >> 32);
        self.set(0x14, 1, 0x0b);
        assert_eq!(self.status(), 0x0b);
    }

    /// Enables MSI-X as Linux does: all masked, then each vector programmed and unmasked.
    fn enable_interrupts(&self) {
        self.machine.config_write(self.msix + 2, 2, 0xc000);
        for vector in 0..=u64::from(QUEUES) {
            let entry = self.msix_table + 16 * vector;
            self.machine.write(entry, 4, 0xfee0_0000);
            self.machine.write(entry + 4, 4, 0);
            self.machine.write(entry + 8, 4, 0x40 + vector);
            self.mask(vector, false);
        }
        self.machine.config_write(self.msix + 2, 2, 0x8000);
        self.set(0x10, 2, 0);
        assert_eq!(self.get(0x10, 2), 0);
    }

    fn mask(&self, vector: u64, masked: bool) {
        self.machine.write(self.msix_table + 16 * vector + 12, 4, masked.into());
    }

    fn set_queue(&self, queue: u64) {
        self.set(0x16, 2, queue);
        self.set(0x18, 2, 64);
        for (register, address) in [(0x20, 0x10_0000), (0x28, 0x10_1000), (0x30, 0x10_2000)] {
            self.set(register, 4, address + queue * 0x1_0000);
            self.set(register + 4, 4, 0);
        }
        self.set(0x1a, 2, queue + 1);
        assert_eq!(self.get(0x1a, 2), queue + 1);
        self.set(0x1c, 2, 1);
    }

    /// All of it, up to DRIVER_OK.
    fn start(machine: &'a Machine) -> Self {
        let driver = Self::probe(machine);
        driver.negotiate();
        driver.enable_interrupts();
        (0..u64::from(QUEUES)).for_each(|queue| driver.set_queue(queue));
        driver.set(0x14, 1, RUNNING.into());
        driver
    }

    fn kick_address(&self, queue: u64) -> u64 {
        self.set(0x16, 2, queue);
        self.structures[&2] + self.notify_multiplier * self.get(0x1e, 2)
    }
}

fn message(data: u32) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_0000,
        data,
    }
}

#[test]
fn a_driver_starts_the_device_with_exactly_one_event() {
    let (machine, _kvm) = fake();
    let driver = Driver::start(&machine);
    let queue = |index: u16| {
        let base = 0x10_0000 + u64::from(index) * 0x1_0000;
        QueueSetup {
            index,
            size: 64,
            descriptor_table: base,
            avail_ring: base + 0x1000,
            used_ring: base + 0x2000,
        }
    };
    assert_eq!(
        machine.take_activation(),
        Activation {
            features: FEATURES,
            queues: vec![queue(0), queue(1)],
        }
    );
    machine.device().activated(true);
    driver.set(0x14, 1, RUNNING.into());
    assert!(machine.take_events().is_empty());
    assert_eq!(driver.status(), RUNNING);
    assert_eq!(machine.read(driver.structures[&4], 8), 64, "capacity");
}

#[test]
fn kicks_go_through_kvm_while_the_device_runs_and_its_bar_is_decoded() {
    let (machine, kvm) = fake();
    let driver = Driver::start(&machine);
    let addresses = [driver.kick_address(0), driver.kick_address(1)];
    assert_eq!(kvm.ioeventfds(), addresses);
    assert!(kvm.guest_write(addresses[1]));
    assert_eq!(machine.fds[1].0.read().unwrap(), 1);
    machine.config_write(4, 2, 0);
    assert_eq!(kvm.ioeventfds(), [0; 0]);
    machine.config_write(4, 2, 2);
    assert_eq!(kvm.ioeventfds(), addresses);
    driver.set(0x14, 1, 0);
    assert_eq!(kvm.ioeventfds(), [0; 0], "the driver gave the device up");
}

#[test]
fn kicks_move_with_the_bar() {
    let (machine, kvm) = fake();
    let driver = Driver::start(&machine);
    let distance = driver.kick_address(0) - driver.structures[&1];
    // Sizing, then the 64-bit window, in the pieces in which Linux writes them.
    machine.config_write(4, 2, 4);
    machine.config_write(0x10, 4, 0xffff_ffff);
    machine.config_write(0x14, 4, 0xffff_ffff);
    assert_eq!(machine.config_read(0x10, 8), 0xffff_ffff_ffff_8004);
    machine.config_write(0x10, 4, 0x2000_0000);
    machine.config_write(0x14, 4, 1);
    machine.config_write(4, 2, 6);
    let base = 0x1_2000_0000;
    assert_eq!(kvm.ioeventfds(), [base + distance, base + distance + 4]);
    assert_eq!(machine.read(base + 0x14, 1), u64::from(RUNNING));
    assert_eq!(
        machine.read(driver.structures[&1], 4),
        0xffff_ffff,
        "nothing is left behind"
    );
}

#[test]
fn a_bar_outside_the_windows_is_not_decoded() {
    let (machine, kvm) = fake();
    Driver::start(&machine);
    for address in [0x10_0000, 0xfee0_0000, 0xe000_0000, 0xffff_ffff_ffff_0000] {
        machine.config_write(0x10, 8, address);
        assert_eq!(kvm.ioeventfds(), [0; 0], "{address:#x}");
    }
    assert_eq!(machine.config_read(0, 4), 0x1042_1af4, "ECAM is where it was");
}

#[test]
fn kicks_that_kvm_cannot_take_arrive_all_the_same() {
    let (machine, kvm) = fake();
    kvm.refuse_ioeventfds();
    let driver = Driver::start(&machine);
    let address = driver.kick_address(1);
    assert!(!kvm.guest_write(address));
    machine.write(address, 2, 1);
    assert_eq!(machine.fds[1].0.read().unwrap(), 1);
    assert!(machine.fds[0].0.read().is_err());
    machine.write(address + 4, 2, 2);
}

#[test]
fn completions_arrive_as_the_queues_own_vectors() {
    let (machine, kvm) = fake();
    Driver::start(&machine);
    machine.fds[0].1.write(1).unwrap();
    assert_eq!(kvm.take_delivered(), [message(0x41)]);
    machine.fds[1].1.write(1).unwrap();
    assert_eq!(kvm.take_delivered(), [message(0x42)]);
}

#[test]
fn a_masked_completion_waits() {
    let (machine, kvm) = fake();
    let driver = Driver::start(&machine);
    driver.mask(1, true);
    machine.fds[0].1.write(1).unwrap();
    assert_eq!(kvm.take_delivered(), []);
    assert_eq!(machine.read(driver.msix_table + 0x1000, 8), 1 << 1, "pending bits");
    driver.mask(1, false);
    assert_eq!(kvm.take_delivered(), [message(0x41)]);
}

#[test]
fn a_changed_configuration_interrupts_and_has_a_new_generation() {
    let (machine, kvm) = fake();
    let driver = Driver::start(&machine);
    let generation = driver.get(0x15, 1);
    machine.device().configure(configuration(128)).unwrap();
    assert_eq!(kvm.take_delivered(), [message(0x40)]);
    assert_ne!(driver.get(0x15, 1), generation);
    assert_eq!(machine.read(driver.structures[&4], 8), 128);
    assert_eq!(machine.read(driver.structures[&3], 1), 2, "ISR says why");
    assert_eq!(machine.read(driver.structures[&3], 1), 0, "and is cleared by reading");
    machine.device().configure(configuration(128)).unwrap();
    assert_eq!(kvm.take_delivered(), [], "nothing changed");
}

#[test]
fn nobody_is_interrupted_before_the_driver_runs() {
    let (machine, kvm) = fake();
    let driver = Driver::probe(&machine);
    driver.negotiate();
    driver.enable_interrupts();
    machine.device().configure(configuration(128)).unwrap();
    machine.device().broken();
    assert_eq!(kvm.take_delivered(), []);
    assert_eq!(driver.status(), 0x0b);
}

#[test]
fn a_reset_completes_when_the_device_has_let_go() {
    let (machine, kvm) = fake();
    let driver = Driver::start(&machine);
    machine.take_activation();
    machine.device().activated(true);
    driver.set(0x14, 1, 0);
    assert!(matches!(
        machine.take_events().as_slice(),
        [VcpuEvent::ResetDevice { device: DeviceIndex(7) }]
    ));
    assert_ne!(driver.status(), 0);
    machine.device().reset_done();
    assert_eq!(driver.status(), 0);
    assert_eq!(kvm.irqfds(), 0, "the queues have no vectors any more");
    // And it starts again.
    Driver::start(&machine);
    machine.take_activation();
}

#[test]
fn broken_rings_are_told_to_the_driver() {
    let (machine, kvm) = fake();
    let driver = Driver::start(&machine);
    machine.device().activated(true);
    machine.device().broken();
    assert_eq!(driver.status(), RUNNING | 0x40);
    assert_eq!(kvm.take_delivered(), [message(0x40)]);
}

#[test]
fn a_reset_of_the_machine_drops_everything() {
    let (machine, kvm) = fake();
    let driver = Driver::start(&machine);
    machine.config_write(0x10, 8, 0xd000_0000);
    machine.write(0xd000_0014, 1, 0);
    machine.take_events();
    machine.root.lock().unwrap().reset();
    assert_eq!((kvm.irqfds(), kvm.ioeventfds().len()), (0, 0));
    assert_eq!(driver.status(), 0, "the BAR is back and the handshake forgotten");
    assert_eq!(machine.config_read(driver.msix + 2, 2), u64::from(QUEUES));
    machine.device().reset_done();
    machine.device().activated(false);
    assert_eq!(driver.status(), 0, "answers to the former life mean nothing");
    Driver::start(&machine);
    machine.take_activation();
}

#[test]
fn configuration_space_gives_access_to_the_bar() {
    let (machine, _kvm) = fake();
    let driver = Driver::start(&machine);
    // The capability's own registers: bar, offset, length, then the data.
    let access = |offset: u64, length: u64| {
        let at = pci_cfg(&machine);
        machine.config_write(at + 4, 1, 0);
        machine.config_write(at + 8, 4, offset);
        machine.config_write(at + 12, 4, length);
        at + 16
    };
    let data = access(0x14, 1);
    assert_eq!(machine.config_read(data, 1), u64::from(RUNNING));
    machine.config_write(data, 1, 0);
    assert_ne!(driver.status(), 0, "reset is under way");
    assert_eq!(machine.take_events().len(), 2);
    for (offset, length) in [(0x15, 2), (0x8000, 4), (0x14, 0), (0x14, 8)] {
        let data = access(offset, length);
        machine.config_write(data, 4, 0);
        machine.config_read(data, 4);
    }
    let data = access(0x3004, 4);
    machine.config_write(data, 4, 1);
    assert_eq!(machine.fds[1].0.read().unwrap(), 1, "a kick");
}

/// Offset of virtio_pci_cfg_cap.
fn pci_cfg(machine: &Machine) -> u64 {
    let mut at = machine.config_read(0x34, 1);
    while machine.config_read(at + 3, 1) != 5 {
        at = machine.config_read(at + 1, 1);
    }
    at
}

#[test]
fn impossible_devices_are_refused() {
    let (irq, _kvm) = FakeKvm::manager();
    let new = |queues| VirtioPci::new(DeviceIndex(0), DeviceKind::Rng, (queues, 8), &irq, Box::new(|_| {}));
    assert!(matches!(new(0), Err(DeviceError::Queues(0))));
    assert!(matches!(new(33), Err(DeviceError::Queues(33))));
    let mut rng = new(1).unwrap();
    let identity = DeviceIdentity {
        features: 0,
        config: vec![0; 4097],
    };
    assert!(matches!(rng.configure(identity), Err(DeviceError::Config(4097))));
    let pair = || QueueFds {
        kick: KickFd::new(event_pair().1),
        call: CallFd::new(event_pair().1),
    };
    assert!(matches!(
        rng.add_queues(vec![pair(), pair()]),
        Err(DeviceError::SurplusQueues { queues: 1, fds: 2 })
    ));
    let mut config = [0; 8];
    rng.config_read(0, &mut config);
    assert_eq!(config[..4], [0xf4, 0x1a, 0x44, 0x10]);
}
