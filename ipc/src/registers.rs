//! Registers in KVM's form, made into those that dumps and the supervisor use.

use crate::vcpu::{Segment, VcpuRegisters};
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

/// What the two structures say: all but [`VcpuRegisters::kernel_gs_base`] and [`VcpuRegisters::halted`].
pub fn from_kvm(regs: &kvm_regs, sregs: &kvm_sregs) -> VcpuRegisters {
    VcpuRegisters {
        general: [
            regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rsp, regs.rbp, regs.r8, regs.r9, regs.r10,
            regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ],
        rip: regs.rip,
        rflags: regs.rflags,
        segments: [
            sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss, sregs.ldt, sregs.tr,
        ]
        .map(|s| segment(&s)),
        gdt: table(&sregs.gdt),
        idt: table(&sregs.idt),
        control: [sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4],
        efer: sregs.efer,
        kernel_gs_base: 0,
        halted: false,
    }
}

fn segment(from: &kvm_segment) -> Segment {
    let flags = [
        (u32::from(from.type_), 8),
        (u32::from(from.s), 12),
        (u32::from(from.dpl), 13),
        (u32::from(from.present), 15),
        (u32::from(from.avl), 20),
        (u32::from(from.l), 21),
        (u32::from(from.db), 22),
        (u32::from(from.g), 23),
    ];
    Segment {
        selector: from.selector,
        base: from.base,
        limit: from.limit,
        flags: flags.iter().fold(0, |all, (value, shift)| all | value << shift),
    }
}

fn table(from: &kvm_dtable) -> Segment {
    Segment {
        base: from.base,
        limit: u32::from(from.limit),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_flags_are_the_descriptors_attribute_bits() {
        let code64 = kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector: 0x10,
            type_: 0xb,
            present: 1,
            dpl: 3,
            db: 0,
            s: 1,
            l: 1,
            g: 1,
            avl: 0,
            unusable: 0,
            padding: 0,
        };
        assert_eq!(segment(&code64).flags, 0x00a0_fb00);
    }
}
