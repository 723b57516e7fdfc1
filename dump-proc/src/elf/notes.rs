//! The notes: what a Linux guest says about itself, after the registers of every vCPU, first as NT_PRSTATUS, which debuggers read, then in QEMU's form, which adds
//! control and descriptor table registers and which crash, drgn and makedumpfile know.

use crate::vmcoreinfo;
use ipc::vcpu::{Segment, VcpuRegisters};
use zerocopy::{Immutable, IntoBytes};

const NT_PRSTATUS: u32 = 1;
const NT_QEMU: u32 = 0;
const NT_VMCOREINFO: u32 = 0;

/// `struct elf_prstatus` of x86-64 Linux, as far as it means something here: 336 bytes.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ThreadStatus {
    signals: [u64; 4],
    /// Counts from 1, because readers take 0 for the idle task.
    thread_id: u32,
    other_ids: [u32; 3],
    times: [u64; 8],
    /// r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base ds es fs gs.
    registers: [u64; 27],
    has_floating_point: u64,
}

/// Version 1 of QEMU's CPU state note: 440 bytes.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct QemuCpuState {
    version: u32,
    bytes: u32,
    /// As in [`VcpuRegisters::general`].
    general: [u64; 16],
    rip: u64,
    rflags: u64,
    /// cs ds es fs gs ss ldt tr gdt idt.
    segments: [QemuSegment; 10],
    /// cr0 cr1 cr2 cr3 cr4; there is no cr1.
    control: [u64; 5],
    kernel_gs_base: u64,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct QemuSegment {
    selector: u32,
    limit: u32,
    flags: u32,
    padding: u32,
    base: u64,
}

const _: () = assert!(size_of::<ThreadStatus>() == 336 && size_of::<QemuCpuState>() == 440);

/// All notes: the first kind of every vCPU, then the second, which is the order that crash expects, then the text of the
/// guest's VMCOREINFO.
pub fn encode(cpus: &[VcpuRegisters], vmcoreinfo: Option<&[u8]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (index, cpu) in (1..).zip(cpus) {
        push(&mut bytes, b"CORE\0", NT_PRSTATUS, thread_status(index, cpu).as_bytes());
    }
    for cpu in cpus {
        push(&mut bytes, b"QEMU\0", NT_QEMU, qemu_cpu_state(cpu).as_bytes());
    }
    if let Some(text) = vmcoreinfo {
        push(&mut bytes, vmcoreinfo::NAME, NT_VMCOREINFO, text);
    }
    bytes
}

/// One note: lengths, type, name and content, the latter two padded to 4 bytes.
fn push(bytes: &mut Vec<u8>, name: &[u8], kind: u32, content: &[u8]) {
    for field in [name.len() as u32, content.len() as u32, kind] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    for part in [name, content] {
        bytes.extend_from_slice(part);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
}

fn thread_status(thread_id: u32, cpu: &VcpuRegisters) -> ThreadStatus {
    let [
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = cpu.general;
    let [cs, ds, es, fs, gs, ss] = [0, 1, 2, 3, 4, 5].map(|index: usize| u64::from(cpu.segments[index].selector));
    let (fs_base, gs_base) = (cpu.segments[3].base, cpu.segments[4].base);
    let orig_rax = 0;
    ThreadStatus {
        signals: [0; 4],
        thread_id,
        other_ids: [0; 3],
        times: [0; 8],
        registers: [
            r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, cpu.rip, cs, cpu.rflags,
            rsp, ss, fs_base, gs_base, ds, es, fs, gs,
        ],
        has_floating_point: 0,
    }
}

fn qemu_cpu_state(cpu: &VcpuRegisters) -> QemuCpuState {
    let [cs, ds, es, fs, gs, ss, ldt, tr] = &cpu.segments;
    let [cr0, cr2, cr3, cr4] = cpu.control;
    QemuCpuState {
        version: 1,
        bytes: size_of::<QemuCpuState>() as u32,
        general: cpu.general,
        rip: cpu.rip,
        rflags: cpu.rflags,
        segments: [cs, ds, es, fs, gs, ss, ldt, tr, &cpu.gdt, &cpu.idt].map(qemu_segment),
        control: [cr0, 0, cr2, cr3, cr4],
        kernel_gs_base: cpu.kernel_gs_base,
    }
}

fn qemu_segment(segment: &Segment) -> QemuSegment {
    QemuSegment {
        selector: segment.selector.into(),
        limit: segment.limit,
        flags: segment.flags,
        padding: 0,
        base: segment.base,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn thread_status_notes_of_all_cpus_come_before_qemus() {
        let bytes = encode(
            &[VcpuRegisters::default(), VcpuRegisters::default()],
            Some(b"OSRELEASE=6"),
        );
        assert_eq!(bytes.len(), 2 * (12 + 8 + 336) + 2 * (12 + 8 + 440) + 12 + 12 + 12);
        for (at, name, kind) in [
            (0, b"CORE", 1),
            (356, b"CORE", 1),
            (712, b"QEMU", 0),
            (1172, b"QEMU", 0),
            (1632, b"VMCO", 0),
        ] {
            assert_eq!(&bytes[at + 12..at + 16], name);
            assert_eq!(bytes[at + 8], kind);
        }
        assert_eq!(bytes[1632..1640], [11, 0, 0, 0, 11, 0, 0, 0]);
        assert_eq!(bytes[1644..], *b"VMCOREINFO\0\0OSRELEASE=6\0");
        assert_eq!((bytes[20 + 32], bytes[356 + 20 + 32]), (1, 2));
    }

    #[test]
    fn registers_are_where_readers_look_for_them() {
        let mut cpu = VcpuRegisters {
            general: std::array::from_fn(|index| 100 + index as u64),
            rip: 1,
            rflags: 2,
            control: [10, 12, 13, 14],
            kernel_gs_base: 99,
            ..VcpuRegisters::default()
        };
        for (index, segment) in cpu.segments.iter_mut().enumerate() {
            segment.selector = 0x10 + index as u16;
            segment.base = 0x1000 + index as u64;
        }
        cpu.idt.base = 0x7000;
        let bytes = encode(&[cpu], None);
        let status = &bytes[20..];
        let register = |index: usize| u64_at(status, 112 + 8 * index);
        assert_eq!((register(0), register(10), register(14)), (115, 100, 105));
        assert_eq!((register(16), register(18), register(19)), (1, 2, 106));
        assert_eq!((register(17), register(20), register(23)), (0x10, 0x15, 0x11));
        assert_eq!((register(21), register(22)), (0x1003, 0x1004));
        let state = &bytes[356 + 20..];
        assert_eq!(
            (u64_at(state, 8), u64_at(state, 128), u64_at(state, 136)),
            (100, 115, 1)
        );
        assert_eq!(u64_at(state, 152 + 9 * 24 + 16), 0x7000);
        let control: Vec<u64> = (0..6).map(|index| u64_at(state, 392 + 8 * index)).collect();
        assert_eq!(control, [10, 0, 12, 13, 14, 99]);
    }
}
