//! Which number is in the register when a function makes a system call: constants followed through a function's registers.

use super::code::Function;
use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Where a call's number comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Number {
    /// It is this.
    Known(i64),
    /// The function's caller gives it as this argument.
    Argument(usize),
    /// It cannot be told.
    Unknown,
}

/// More different constants than this in one register count as unknown.
const MOST: usize = 16;

/// What a register may hold. `None`: anything.
type Value = Option<BTreeSet<Number>>;

/// Registers, by their number in the instruction set.
#[derive(Debug, Clone, PartialEq, Eq)]
struct State([Value; 16]);

/// The registers of the first arguments.
const ARGUMENTS: [Register; 6] = [
    Register::RDI,
    Register::RSI,
    Register::RDX,
    Register::RCX,
    Register::R8,
    Register::R9,
];

/// What a call leaves undefined.
const CLOBBERED: [Register; 9] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
];

impl State {
    fn at_entry() -> Self {
        let mut state = Self::unknown();
        for (index, register) in ARGUMENTS.into_iter().enumerate() {
            state.set(register, Some(BTreeSet::from([Number::Argument(index)])));
        }
        state
    }

    fn unknown() -> Self {
        Self(std::array::from_fn(|_| None))
    }

    fn get(&self, register: Register) -> Value {
        if register.is_gpr() {
            self.0[register.full_register().number()].clone()
        } else {
            None
        }
    }

    fn set(&mut self, register: Register, value: Value) {
        if register.is_gpr() {
            self.0[register.full_register().number()] = value;
        }
    }

    /// Joins another way to the same place; whether that says less than before.
    fn join(&mut self, other: &Self) -> bool {
        let before = self.clone();
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine = match (mine.take(), theirs) {
                (Some(mut one), Some(two)) => {
                    one.extend(two.iter().copied());
                    (one.len() <= MOST).then_some(one)
                }
                _ => None,
            };
        }
        *self != before
    }
}

/// The numbers of all system calls that a function makes, itself or through functions that take the number as an argument.
pub(super) fn numbers(
    function: &Function,
    wrappers: &BTreeMap<u64, usize>,
    slots: &BTreeMap<u64, u64>,
) -> BTreeSet<Number> {
    let states = states(function, slots);
    let mut found = BTreeSet::new();
    let mut note = |value: Value| match value {
        Some(numbers) => found.extend(numbers),
        None => {
            found.insert(Number::Unknown);
        }
    };
    for (instruction, state) in function.instructions.iter().zip(&states) {
        let Some(state) = state else {
            continue;
        };
        if instruction.mnemonic() == Mnemonic::Syscall {
            note(state.get(Register::RAX));
        }
        for target in targets(instruction, state, slots) {
            if let Some(argument) = wrappers.get(&target) {
                note(state.get(ARGUMENTS[*argument]));
            }
        }
    }
    found
}

/// The functions that an instruction calls or jumps to, also through a table or a register.
fn targets(instruction: &Instruction, state: &State, slots: &BTreeMap<u64, u64>) -> Vec<u64> {
    if !matches!(instruction.mnemonic(), Mnemonic::Call | Mnemonic::Jmp) {
        return Vec::new();
    }
    match instruction.op0_kind() {
        OpKind::NearBranch64 => vec![instruction.near_branch_target()],
        OpKind::Memory if instruction.is_ip_rel_memory_operand() => {
            let slot = slots.get(&instruction.ip_rel_memory_address());
            slot.copied().into_iter().collect()
        }
        OpKind::Register => {
            let known = |number| match number {
                Number::Known(address) => Some(address as u64),
                Number::Argument(_) | Number::Unknown => None,
            };
            let value = state.get(instruction.op0_register()).unwrap_or_default();
            value.into_iter().filter_map(known).collect()
        }
        _ => Vec::new(),
    }
}

/// Whether a function has the address of another for something else than calling it.
pub(super) fn takes(function: &Function, other: u64, slots: &BTreeMap<u64, u64>) -> bool {
    let is_address = |instruction: &&Instruction| loaded_address(instruction, slots) == Some(other);
    if !function.instructions.iter().any(|of| is_address(&of)) {
        return false;
    }
    let states = states(function, slots);
    let mut both = function.instructions.iter().zip(&states);
    // Called through the register that it was loaded into: not for something else.
    !both.any(|(instruction, state)| {
        let state = state.as_ref();
        state.is_some_and(|state| {
            instruction.op_count() > 0
                && instruction.op0_kind() == OpKind::Register
                && targets(instruction, state, slots).contains(&other)
        })
    })
}

/// The address that an instruction loads into a register: of code beside it, or out of a table.
fn loaded_address(instruction: &Instruction, slots: &BTreeMap<u64, u64>) -> Option<u64> {
    if !instruction.is_ip_rel_memory_operand() {
        return None;
    }
    let address = instruction.ip_rel_memory_address();
    match instruction.mnemonic() {
        Mnemonic::Lea => Some(address),
        Mnemonic::Mov if instruction.op0_kind() == OpKind::Register => slots.get(&address).copied(),
        _ => None,
    }
}

/// What the registers may hold before each instruction.
fn states(function: &Function, slots: &BTreeMap<u64, u64>) -> Vec<Option<State>> {
    let code = &function.instructions;
    let places: BTreeMap<u64, usize> = code.iter().enumerate().map(|(place, of)| (of.ip(), place)).collect();
    let mut states: Vec<Option<State>> = vec![None; code.len()];
    let mut factory = InstructionInfoFactory::new();
    let mut waiting = VecDeque::new();
    if let Some(first) = states.first_mut() {
        *first = Some(State::at_entry());
        waiting.push_back(0);
    }
    loop {
        while let Some(place) = waiting.pop_front() {
            let Some(before) = states[place].clone() else {
                continue;
            };
            let instruction = &code[place];
            let after = step(before, instruction, &mut factory, slots);
            let next = (place + 1 < code.len()).then_some(place + 1);
            let target = || places.get(&instruction.near_branch_target()).copied();
            let ways = match instruction.flow_control() {
                FlowControl::Next | FlowControl::Call | FlowControl::IndirectCall => [next, None],
                FlowControl::UnconditionalBranch => [target(), None],
                FlowControl::ConditionalBranch => [next, target()],
                FlowControl::XbeginXabortXend => [next, None],
                // A system call goes on; so does a debugger's trap.
                FlowControl::Interrupt => [next, None],
                FlowControl::Return | FlowControl::IndirectBranch | FlowControl::Exception => [None, None],
            };
            for way in ways.into_iter().flatten() {
                let changed = match &mut states[way] {
                    Some(known) => known.join(&after),
                    empty => {
                        *empty = Some(after.clone());
                        true
                    }
                };
                if changed {
                    waiting.push_back(way);
                }
            }
        }
        // What is only reached through a table of jumps: with anything in the registers.
        let Some(place) = states.iter().position(Option::is_none) else {
            return states;
        };
        states[place] = Some(State::unknown());
        waiting.push_back(place);
    }
}

/// What an instruction leaves in the registers.
fn step(
    mut state: State,
    instruction: &Instruction,
    factory: &mut InstructionInfoFactory,
    slots: &BTreeMap<u64, u64>,
) -> State {
    let registers = |index: u32| {
        (instruction.op_count() > index && instruction.op_kind(index) == OpKind::Register)
            .then(|| instruction.op_register(index))
            // Writing eight or sixteen bits keeps the rest.
            .filter(|register| register.is_gpr32() || register.is_gpr64())
    };
    let (to, from) = (registers(0), registers(1));
    let immediate = || {
        let kinds = [OpKind::Immediate32, OpKind::Immediate32to64, OpKind::Immediate64];
        kinds
            .contains(&instruction.op_kind(1))
            .then(|| BTreeSet::from([Number::Known(instruction.immediate(1) as i64)]))
    };
    match (instruction.mnemonic(), to) {
        // The kernel's answer.
        (Mnemonic::Syscall, _) => {
            for register in [Register::RAX, Register::RCX, Register::R11] {
                state.set(register, None);
            }
        }
        (Mnemonic::Mov | Mnemonic::Lea, Some(to)) if loaded_address(instruction, slots).is_some() => {
            let address = loaded_address(instruction, slots);
            state.set(
                to,
                address.map(|address| BTreeSet::from([Number::Known(address as i64)])),
            );
        }
        (Mnemonic::Mov, Some(to)) => {
            let value = from.map_or_else(immediate, |from| state.get(from));
            state.set(to, value);
        }
        (Mnemonic::Xor | Mnemonic::Sub, Some(to)) if from == Some(to) => {
            state.set(to, Some(BTreeSet::from([Number::Known(0)])));
        }
        // movsxd rax, edi and the like keep a number.
        (Mnemonic::Movsxd, Some(to)) if from.is_some() => {
            let value = from.and_then(|from| state.get(from));
            state.set(to, value);
        }
        _ => {
            if matches!(
                instruction.flow_control(),
                FlowControl::Call | FlowControl::IndirectCall
            ) {
                for register in CLOBBERED {
                    state.set(register, None);
                }
            }
            for used in factory.info(instruction).used_registers() {
                let writes = matches!(
                    used.access(),
                    OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
                );
                if writes {
                    state.set(used.register(), None);
                }
            }
        }
    }
    state
}
