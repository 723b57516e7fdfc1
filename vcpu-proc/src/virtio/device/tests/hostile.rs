//! A guest that writes anything anywhere: nothing panics, and no more events leave than the protocol allows.

use super::*;
use crate::layout::{ECAM_BYTES, PCI32_BASE};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Step {
    Read(Place, u8),
    Write(Place, u8, u64),
    Activated(bool),
    ResetDone,
    Broken,
    Configure(u8),
    MachineReset,
}

/// Where an access goes: mostly to places where something is.
#[derive(Debug, Clone)]
enum Place {
    Port(u64),
    Config(u64),
    Ecam(u64),
    /// Anywhere in the BAR, where it is after a reset.
    Bar(u64),
    /// The common configuration's registers.
    Common(u64),
    Window(u64),
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        (0_u64..8).prop_map(Place::Port),
        (0_u64..256).prop_map(Place::Config),
        (0..ECAM_BYTES).prop_map(Place::Ecam),
        (0..layout::BAR_BYTES).prop_map(Place::Bar),
        (0_u64..0x40).prop_map(Place::Common),
        (0_u64..0x2000_0000).prop_map(Place::Window),
    ]
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0_u64..16,
        Just(u64::MAX),
        Just(0xc000_0000),
        Just(1 << 32)
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (place(), 0_u8..4).prop_map(|(place, size)| Step::Read(place, size)),
        12 => (place(), 0_u8..4, value()).prop_map(|(place, size, value)| Step::Write(place, size, value)),
        1 => any::<bool>().prop_map(Step::Activated),
        1 => Just(Step::ResetDone),
        1 => Just(Step::Broken),
        1 => any::<u8>().prop_map(Step::Configure),
        1 => Just(Step::MachineReset),
    ]
}

struct Run {
    machine: Machine,
    ports: Bus,
}

impl Run {
    fn access(&self, place: &Place) -> (&Bus, u64) {
        match *place {
            Place::Port(offset) => (&self.ports, 0xcf8 + offset),
            Place::Config(register) => (&self.machine.memory, Machine::config(register)),
            Place::Ecam(offset) => (&self.machine.memory, ECAM_BASE + offset),
            Place::Bar(offset) | Place::Common(offset) | Place::Window(offset) => {
                (&self.machine.memory, PCI32_BASE + offset)
            }
        }
    }

    fn step(&self, step: &Step) {
        match step {
            Step::Read(place, size) => {
                let mut data = [0; 8];
                let (bus, address) = self.access(place);
                bus.read(address, &mut data[..1 << size]);
            }
            Step::Write(place, size, value) => {
                let (bus, address) = self.access(place);
                bus.write(address, &value.to_le_bytes()[..1 << size]);
            }
            Step::Activated(ok) => self.machine.device().activated(*ok),
            Step::ResetDone => self.machine.device().reset_done(),
            Step::Broken => self.machine.device().broken(),
            Step::Configure(byte) => {
                let identity = configuration(u64::from(*byte));
                self.machine.device().configure(identity).unwrap();
            }
            Step::MachineReset => self.machine.root.lock().unwrap().reset(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_sequence_of_accesses_is_survived(steps in prop::collection::vec(step(), 1..200), running: bool) {
        let (irq, kvm) = FakeKvm::manager();
        let machine = Machine::new(&irq);
        let mut ports = Bus::default();
        PciRoot::insert_into(&machine.root, &mut ports, &mut Bus::default()).unwrap();
        let run = Run { machine, ports };
        // Random writes alone rarely get a device to run.
        if running {
            Driver::start(&run.machine);
        }
        let (mut activations, mut resets) = (0, 0);
        for step in &steps {
            run.step(step);
            for event in run.machine.take_events() {
                match event {
                    VcpuEvent::ActivateDevice { activation, .. } => {
                        activations += 1;
                        prop_assert!(activation.features & !FEATURES == 0);
                        for queue in &activation.queues {
                            prop_assert!(queue.index < QUEUES && queue.size.is_power_of_two());
                            prop_assert!(queue.descriptor_table % 16 == 0);
                        }
                    }
                    VcpuEvent::ResetDevice { .. } => resets += 1,
                    other => prop_assert!(false, "{:?}", other),
                }
            }
            prop_assert!(resets <= activations);
            prop_assert!(kvm.ioeventfds().len() <= usize::from(QUEUES));
            prop_assert!(kvm.irqfds() <= usize::from(QUEUES) + 1);
        }
        run.machine.root.lock().unwrap().reset();
        prop_assert_eq!((kvm.irqfds(), kvm.ioeventfds().len()), (0, 0));
        // The machine is as good as new.
        Driver::start(&run.machine);
        prop_assert_eq!(run.machine.take_events().len(), 1);
    }
}
