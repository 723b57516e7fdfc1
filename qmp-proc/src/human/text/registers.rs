//! A vCPU's registers in the layout that people and programs know from such monitors.

use super::END;
use ipc::vcpu::{Segment, VcpuRegisters};
use std::fmt::Write;

const EFER_LMA: u64 = 1 << 10;
const CR0_PE: u64 = 1;
const RFLAGS_VM: u64 = 1 << 17;
/// Attribute bits of a segment.
const READ_WRITE: u32 = 1 << 9;
const CONFORMING: u32 = 1 << 10;
const CODE: u32 = 1 << 11;
const NOT_SYSTEM: u32 = 1 << 12;
const LONG: u32 = 1 << 21;
const BIG: u32 = 1 << 22;
const ACCESSED: u32 = 1 << 8;

/// Where each general register is among [`VcpuRegisters::general`], in the order of the text.
const GENERAL: [(&str, usize); 16] = [
    ("AX", 0),
    ("BX", 1),
    ("CX", 2),
    ("DX", 3),
    ("SI", 4),
    ("DI", 5),
    ("BP", 7),
    ("SP", 6),
    ("8 ", 8),
    ("9 ", 9),
    ("10", 10),
    ("11", 11),
    ("12", 12),
    ("13", 13),
    ("14", 14),
    ("15", 15),
];
/// Where each segment is among [`VcpuRegisters::segments`], in the order of the text.
const SEGMENTS: [(&str, usize); 8] = [
    ("ES", 2),
    ("CS", 0),
    ("SS", 5),
    ("DS", 1),
    ("FS", 3),
    ("GS", 4),
    ("LDT", 6),
    ("TR", 7),
];

/// All lines for one vCPU.
pub fn write(registers: &VcpuRegisters) -> String {
    let long = registers.efer & EFER_LMA != 0;
    let in_64_bit_code = long && registers.segments[0].flags & LONG != 0;
    let mut text = general(registers, in_64_bit_code);
    let protected = registers.control[0] & CR0_PE != 0 && registers.rflags & RFLAGS_VM == 0;
    for (name, place) in SEGMENTS {
        text += &segment(name, &registers.segments[place], long, protected);
    }
    // Writing to a string does not fail.
    for (name, table) in [("GDT", &registers.gdt), ("IDT", &registers.idt)] {
        let base = table.base;
        let _ = if long {
            write!(text, "{name}=     {base:016x} {:08x}{END}", table.limit)
        } else {
            write!(text, "{name}=     {base:08x} {:08x}{END}", table.limit)
        };
    }
    let [cr0, cr2, cr3, cr4] = registers.control;
    let _ = if long {
        write!(text, "CR0={cr0:08x} CR2={cr2:016x} CR3={cr3:016x} CR4={cr4:08x}{END}")
    } else {
        write!(text, "CR0={cr0:08x} CR2={cr2:08x} CR3={cr3:08x} CR4={cr4:08x}{END}")
    };
    let _ = write!(text, "EFER={:016x}{END}", registers.efer);
    text
}

fn general(registers: &VcpuRegisters, wide: bool) -> String {
    let mut text = String::new();
    let names = if wide { &GENERAL[..] } else { &GENERAL[..8] };
    for (line, line_names) in names.chunks(4).enumerate() {
        let words: Vec<_> = line_names
            .iter()
            .map(|(name, place)| {
                let value = registers.general[*place];
                if wide {
                    format!("R{name}={value:016x}")
                } else {
                    format!("E{name}={:08x}", value & 0xffff_ffff)
                }
            })
            .collect();
        debug_assert!(line < 4);
        text += &words.join(" ");
        text += END;
    }
    let flags: String = [(10, 'D'), (11, 'O'), (7, 'S'), (6, 'Z'), (4, 'A'), (2, 'P'), (0, 'C')]
        .into_iter()
        .map(|(bit, letter)| if registers.rflags & 1 << bit != 0 { letter } else { '-' })
        .collect();
    let (rip, rflags) = (registers.rip, registers.rflags);
    let level = registers.segments[5].flags >> 13 & 3;
    let halted = u8::from(registers.halted);
    let state = format!("[{flags}] CPL={level} II=0 A20=1 SMM=0 HLT={halted}");
    let _ = if wide {
        write!(text, "RIP={rip:016x} RFL={rflags:08x} {state}{END}")
    } else {
        write!(text, "EIP={:08x} EFL={rflags:08x} {state}{END}", rip & 0xffff_ffff)
    };
    text
}

fn segment(name: &str, segment: &Segment, long: bool, protected: bool) -> String {
    let Segment {
        selector,
        base,
        limit,
        flags,
    } = *segment;
    let mut text = if long {
        format!("{name:<3}={selector:04x} {base:016x} {limit:08x} {flags:08x}")
    } else {
        format!("{name:<3}={selector:04x} {base:08x} {limit:08x} {flags:08x}")
    };
    if protected {
        let _ = write!(text, " DPL={} {}", flags >> 13 & 3, kind(flags, long));
    }
    text + END
}

/// What a segment is for.
fn kind(flags: u32, long: bool) -> String {
    let letter = |bit: u32, letter: char| if flags & bit != 0 { letter } else { '-' };
    if flags & NOT_SYSTEM == 0 {
        let name = match (flags >> 8 & 0xf, long) {
            (2, _) => "LDT",
            (1, false) => "TSS16-avl",
            (3, false) => "TSS16-busy",
            (9, true) => "TSS64-avl",
            (0xb, true) => "TSS64-busy",
            (9, false) => "TSS32-avl",
            (0xb, false) => "TSS32-busy",
            _ => "Reserved",
        };
        return name.to_owned();
    }
    let accessed = letter(ACCESSED, 'A');
    if flags & CODE != 0 {
        let size = match (flags & LONG != 0, flags & BIG != 0) {
            (true, _) => "CS64",
            (false, true) => "CS32",
            (false, false) => "CS16",
        };
        format!(
            "{size} [{}{}{accessed}]",
            letter(CONFORMING, 'C'),
            letter(READ_WRITE, 'R')
        )
    } else {
        let size = if flags & BIG != 0 || long { "DS  " } else { "DS16" };
        format!(
            "{size} [{}{}{accessed}]",
            letter(CONFORMING, 'E'),
            letter(READ_WRITE, 'W')
        )
    }
}
