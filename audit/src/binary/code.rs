//! The program's functions, who refers to whom, and which are reached.

use super::Reach;
use super::elf::Image;
use super::flow::{self, Number};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};
use std::collections::{BTreeMap, BTreeSet};

/// One function.
pub struct Function {
    /// Its name, demangled as far as people need.
    pub name: String,
    /// Its instructions.
    pub instructions: Vec<Instruction>,
    /// Addresses of code that it calls, jumps to or takes.
    references: BTreeSet<u64>,
    /// Whether it has a `syscall` instruction.
    makes_calls: bool,
    /// Whether it has one of another calling convention.
    is_foreign: bool,
}

/// All functions by address.
pub struct Program {
    functions: BTreeMap<u64, Function>,
    entry: u64,
    /// Functions that data points to.
    pointers: BTreeSet<u64>,
    /// What the program's start writes where.
    slots: BTreeMap<u64, u64>,
}

impl Program {
    /// Disassembles; `None` without symbols.
    pub fn read(image: &Image<'_>) -> Option<Self> {
        let mut starts: BTreeMap<u64, String> = BTreeMap::new();
        for (address, name) in &image.symbols {
            let known = starts.entry(*address).or_default();
            // Of several names, one without leading underscores reads best.
            if known.is_empty() || (known.starts_with('_') && !name.starts_with('_')) {
                known.clone_from(name);
            }
        }
        if starts.is_empty() {
            return None;
        }
        // Code that no symbol names begins with its section.
        for (address, _) in &image.code {
            starts
                .entry(*address)
                .or_insert_with(|| format!("code at {address:#x}"));
        }
        let slots: BTreeMap<u64, u64> = image.pointers.iter().copied().collect();
        let mut functions = BTreeMap::new();
        for (section, bytes) in &image.code {
            let end = section + bytes.len() as u64;
            let within: Vec<(u64, &String)> = starts.range(*section..end).map(|(at, name)| (*at, name)).collect();
            for (place, (start, name)) in within.iter().enumerate() {
                let next = within.get(place + 1).map_or(end, |(next, _)| *next);
                let code = &bytes[(start - section) as usize..(next - section) as usize];
                functions.insert(*start, Function::read(plain_name(name), *start, code, image, &slots));
            }
        }
        let in_table = |place: &u64| image.tables.iter().any(|table| table.contains(place));
        let pointers = image
            .pointers
            .iter()
            .filter(|(place, _)| !in_table(place))
            .map(|(_, address)| *address);
        let pointers = pointers.filter(|address| image.is_code(*address)).collect();
        Some(Self {
            functions,
            entry: image.entry,
            pointers,
            slots,
        })
    }

    /// The function that an address is in.
    fn function_at(&self, address: u64) -> Option<u64> {
        self.functions.range(..=address).next_back().map(|(start, _)| *start)
    }

    /// The functions that are reached, by address.
    fn reached(&self) -> BTreeSet<u64> {
        let roots = self.pointers.iter().copied().chain([self.entry]);
        let mut waiting: Vec<u64> = roots.filter_map(|address| self.function_at(address)).collect();
        let mut reached = BTreeSet::new();
        while let Some(start) = waiting.pop() {
            if reached.insert(start) {
                let references = self.functions[&start].references.iter();
                waiting.extend(references.filter_map(|address| self.function_at(*address)));
            }
        }
        reached
    }

    /// All calls that reached code makes.
    pub fn reach(&self) -> Reach {
        let reached = self.reached();
        let mut found = Reach {
            functions: [reached.len(), self.functions.len()],
            ..Reach::default()
        };
        // Functions that take the number as an argument, and which argument; their callers are asked in turn.
        let mut wrappers: BTreeMap<u64, usize> = BTreeMap::new();
        let mut waiting: BTreeSet<u64> = reached
            .iter()
            .copied()
            .filter(|start| self.functions[start].makes_calls)
            .collect();
        while let Some(start) = waiting.pop_first() {
            let function = &self.functions[&start];
            for number in flow::numbers(function, &wrappers, &self.slots) {
                match number {
                    Number::Known(number) => {
                        found.calls.entry(number).or_default().insert(function.name.clone());
                    }
                    Number::Argument(argument) => {
                        if wrappers.insert(start, argument) != Some(argument) {
                            let calls_it = |other: &&u64| self.functions[*other].references.contains(&start);
                            waiting.extend(reached.iter().filter(calls_it));
                        }
                    }
                    Number::Unknown => {
                        found.unresolved.insert(function.name.clone());
                    }
                }
            }
        }
        // Who has the address of such a function may call it with any number.
        for start in wrappers.keys() {
            let takes = |of: &&u64| flow::takes(&self.functions[*of], *start, &self.slots);
            let takers = reached.iter().filter(takes);
            found
                .unresolved
                .extend(takers.map(|of| self.functions[of].name.clone()));
            if self.pointers.contains(start) {
                let name = &self.functions[start].name;
                found.unresolved.insert(format!("{name} through a pointer"));
            }
        }
        let foreign = reached
            .iter()
            .map(|start| &self.functions[start])
            .filter(|of| of.is_foreign);
        found.foreign = foreign.map(|of| of.name.clone()).collect();
        found
    }
}

impl Function {
    fn read(name: String, start: u64, code: &[u8], image: &Image<'_>, slots: &BTreeMap<u64, u64>) -> Self {
        let end = start + code.len() as u64;
        let mut function = Self {
            name,
            instructions: Vec::new(),
            references: BTreeSet::new(),
            makes_calls: false,
            is_foreign: false,
        };
        for instruction in Decoder::with_ip(64, code, start, DecoderOptions::NONE) {
            match instruction.code() {
                Code::Syscall => function.makes_calls = true,
                Code::Sysenter => function.is_foreign = true,
                Code::Int_imm8 if instruction.immediate8() == 0x80 => function.is_foreign = true,
                _ => {}
            }
            let near = [OpKind::NearBranch16, OpKind::NearBranch32, OpKind::NearBranch64];
            let target = if instruction.op_count() > 0 && near.contains(&instruction.op0_kind()) {
                Some(instruction.near_branch_target())
            } else if instruction.mnemonic() == Mnemonic::Lea && instruction.is_ip_rel_memory_operand() {
                Some(instruction.ip_rel_memory_address())
            } else if instruction.is_ip_rel_memory_operand() {
                // Through a table: the function that the table's slot points to.
                slots.get(&instruction.ip_rel_memory_address()).copied()
            } else {
                absolute(&instruction)
            };
            let elsewhere = |target: &u64| !(start..end).contains(target) && image.is_code(*target);
            function.references.extend(target.filter(elsewhere));
            function.instructions.push(instruction);
        }
        function
    }
}

/// An address that is loaded as a number, as programs do that lie at fixed addresses.
fn absolute(instruction: &Instruction) -> Option<u64> {
    let immediate = [OpKind::Immediate32, OpKind::Immediate32to64, OpKind::Immediate64];
    let is_mov = instruction.mnemonic() == Mnemonic::Mov && instruction.op_count() == 2;
    (is_mov && immediate.contains(&instruction.op1_kind())).then(|| instruction.immediate(1))
}

/// Rust's mangled names as people write them, without the hash.
fn plain_name(name: &str) -> String {
    format!("{:#}", rustc_demangle::demangle(name))
}
