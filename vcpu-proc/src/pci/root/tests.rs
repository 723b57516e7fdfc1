//! The root as a guest's accesses reach it, with functions that record theirs.

use super::*;
use crate::pci::bar::{Bar, BarWidth};

const WINDOW: u64 = PCI32_BASE;

/// One 32-bit BAR of 4 KiB, which reads as the low byte of the offset.
struct Probe {
    config: ConfigSpace,
    bar: Bar,
    windows: Option<Windows>,
    written: Vec<(u64, Vec<u8>)>,
    resets: usize,
}

impl Probe {
    fn shared() -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            config: ConfigSpace::new(FunctionIdentity {
                vendor: 0x1234,
                device: 0x5678,
                revision: 0,
                class: [0xff, 0, 0],
                subsystem_vendor: 0,
                subsystem: 0,
            }),
            bar: Bar {
                index: 2,
                bytes: 0x1000,
                width: BarWidth::Bits32,
            },
            windows: None,
            written: Vec::new(),
            resets: 0,
        }))
    }
}

impl PciFunction for Probe {
    fn config_read(&mut self, offset: usize, data: &mut [u8]) {
        self.config.read(offset, data);
    }
    fn config_write(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
    }
    fn assign_bars(&mut self, allocator: &mut BarAllocator) -> Result<(), WindowFull> {
        let address = allocator.allocate(self.bar.bytes)?;
        self.bar.define(&mut self.config, address);
        self.windows = Some(allocator.windows().clone());
        Ok(())
    }
    fn decoded_bars(&self, decoded: &mut Vec<DecodedBar>) {
        let windows = self.windows.as_ref().unwrap();
        decoded.extend(self.bar.decoded(&self.config, windows));
    }
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        assert_eq!(bar, 2);
        data.fill(offset.to_le_bytes()[0]);
    }
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        assert_eq!(bar, 2);
        self.written.push((offset, data.to_vec()));
    }
    fn reset(&mut self) {
        self.config.reset();
        self.resets += 1;
    }
}

/// Both buses of a machine with probes in slots 1 and 5.
struct Machine {
    ports: Bus,
    memory: Bus,
    root: Arc<Mutex<PciRoot>>,
    probes: [Arc<Mutex<Probe>>; 2],
}

impl Machine {
    fn new() -> Self {
        let root = Arc::new(Mutex::new(PciRoot::new(512 << 20)));
        let (mut ports, mut memory) = (Bus::default(), Bus::default());
        PciRoot::insert_into(&root, &mut ports, &mut memory).unwrap();
        let probes = [Probe::shared(), Probe::shared()];
        root.lock().unwrap().add(1, probes[0].clone()).unwrap();
        root.lock().unwrap().add(5, probes[1].clone()).unwrap();
        Self {
            ports,
            memory,
            root,
            probes,
        }
    }

    fn port_read<const N: usize>(&self, port: u64) -> [u8; N] {
        let mut data = [0; N];
        self.ports.read(port, &mut data);
        data
    }

    fn memory_read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.memory.read(address, &mut data);
        data
    }

    fn select(&self, address: u32) {
        self.ports.write(0xcf8, &address.to_le_bytes());
    }
}

fn ecam(slot: u64, register: u64) -> u64 {
    ECAM_BASE + (slot << 15) + register
}

#[test]
fn mechanism_1_reads_the_same_registers_as_ecam() {
    let machine = Machine::new();
    for slot in 0..32 {
        for register in (0..256).step_by(4) {
            machine.select(0x8000_0000 | slot << 11 | register);
            assert_eq!(
                machine.port_read::<4>(0xcfc),
                machine.memory_read::<4>(ecam(slot.into(), register.into())),
                "slot {slot} register {register:#x}"
            );
        }
    }
    assert_eq!(machine.memory_read(ecam(1, 0)), 0x5678_1234_u32.to_le_bytes());
    assert_eq!(machine.memory_read(ecam(2, 0)), [0xff; 4]);
}

#[test]
fn linux_recognises_mechanism_1() {
    let machine = Machine::new();
    machine.ports.write(0xcfb, &[1]);
    let former = machine.port_read::<4>(0xcf8);
    machine.select(0x8000_0000);
    assert_eq!(machine.port_read(0xcf8), 0x8000_0000_u32.to_le_bytes());
    machine.ports.write(0xcf8, &former);
    // Then it looks for a host bridge.
    machine.select(0x8000_0008);
    assert_eq!(machine.port_read(0xcfe), [0x00, 0x06]);
}

#[test]
fn data_port_accesses_of_each_size_reach_their_bytes() {
    let machine = Machine::new();
    machine.select(0x8000_0800 | 0x3c);
    machine.ports.write(0xcfc, &[0x5a]);
    machine.select(0x8000_0800 | 0x0c);
    machine.ports.write(0xcfc, &[0x10, 0, 0, 0]);
    machine.select(0x8000_0800);
    assert_eq!(machine.port_read(0xcfc), [0x34]);
    assert_eq!(machine.port_read(0xcff), [0x56]);
    assert_eq!(machine.port_read(0xcfe), [0x78, 0x56]);
    assert_eq!(machine.memory_read(ecam(1, 0x3c)), [0x5a]);
    assert_eq!(machine.memory_read(ecam(1, 0x0c)), [0x10]);
}

#[test]
fn cycles_that_go_nowhere_read_ones() {
    let machine = Machine::new();
    for address in [
        0x0000_0800, // not enabled
        0x8001_0800, // bus 1
        0x8000_0900, // function 1
        0x8000_1000, // empty slot
    ] {
        machine.select(address);
        machine.ports.write(0xcfc, &[0; 4]);
        assert_eq!(machine.port_read(0xcfc), [0xff; 4], "{address:#x}");
    }
    // Half of either register.
    assert_eq!(machine.port_read(0xcfa), [0xff; 4]);
    machine.ports.write(0xcfa, &[0; 4]);
    assert_eq!(machine.memory_read(ecam(1, 0x1000)), [0xff; 4], "function 1");
}

#[test]
fn extended_configuration_space_is_empty() {
    let machine = Machine::new();
    machine.memory.write(ecam(1, 0x100), &[0xff; 4]);
    assert_eq!(machine.memory_read(ecam(1, 0x100)), [0; 4]);
    assert_eq!(machine.memory_read(ecam(1, 0xffe)), [0; 8]);
    assert_eq!(machine.memory_read(ecam(2, 0x100)), [0xff; 4]);
}

#[test]
fn bars_are_assigned_at_power_on_and_can_be_moved() {
    let machine = Machine::new();
    assert_eq!(machine.memory_read(ecam(1, 0x18)), 0xc000_0000_u32.to_le_bytes());
    assert_eq!(machine.memory_read(ecam(5, 0x18)), 0xc000_1000_u32.to_le_bytes());
    assert_eq!(machine.memory_read(WINDOW + 0x1012), [0x12; 2]);
    machine.memory.write(ecam(5, 0x18), &0xd000_0000_u32.to_le_bytes());
    assert_eq!(machine.memory_read(WINDOW + 0x1012), [0xff; 2]);
    machine.memory.write(0xd000_0ffc, &[1; 4]);
    assert_eq!(machine.probes[1].lock().unwrap().written, [(0xffc, vec![1; 4])]);
    machine.memory.write(ecam(5, 0x04), &[0, 0]);
    assert_eq!(machine.memory_read(0xd000_0012), [0xff], "decoding is off");

    machine.root.lock().unwrap().reset();
    assert_eq!(machine.memory_read(WINDOW + 0x1012), [0x12; 2]);
    assert_eq!(machine.probes[1].lock().unwrap().resets, 1);
}

#[test]
fn overlapping_bars_answer_by_the_lowest_slot() {
    let machine = Machine::new();
    machine.memory.write(ecam(5, 0x18), &0xc000_0000_u32.to_le_bytes());
    machine.memory.write(0xc000_0000, &[7]);
    assert_eq!(machine.probes[0].lock().unwrap().written.len(), 1);
    assert_eq!(machine.probes[1].lock().unwrap().written.len(), 0);
}

#[test]
fn accesses_across_a_bars_end_reach_nothing() {
    let machine = Machine::new();
    assert_eq!(machine.memory_read(WINDOW + 0x1ffe), [0xff; 4]);
    machine.memory.write(WINDOW + 0x1ffe, &[0; 4]);
    assert_eq!(machine.probes[1].lock().unwrap().written, []);
}

#[test]
fn slots_are_given_once() {
    let machine = Machine::new();
    let mut root = machine.root.lock().unwrap();
    assert_eq!(root.add(5, Probe::shared()), Err(SlotError::Taken(5)));
    assert_eq!(root.add(0, Probe::shared()), Err(SlotError::Number(0)));
    assert_eq!(root.add(32, Probe::shared()), Err(SlotError::Number(32)));
}
