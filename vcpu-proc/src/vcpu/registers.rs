//! Reading a parked vCPU's registers into the form that dumps and the supervisor use.

use ipc::vcpu::{Segment, VcpuRegisters};
use kvm_bindings::{KVM_MP_STATE_HALTED, Msrs, kvm_dtable, kvm_msr_entry, kvm_segment};
use kvm_ioctls::VcpuFd;

const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

/// All registers of [`VcpuRegisters`].
///
/// # Errors
/// When KVM refuses.
pub fn read(vcpu: &VcpuFd) -> std::io::Result<VcpuRegisters> {
    let regs = vcpu.get_regs().map_err(os_error)?;
    let sregs = vcpu.get_sregs().map_err(os_error)?;
    Ok(VcpuRegisters {
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
        kernel_gs_base: kernel_gs_base(vcpu)?,
        halted: vcpu.get_mp_state().map_err(os_error)?.mp_state == KVM_MP_STATE_HALTED,
    })
}

/// Where a vCPU is, for one line of an error report.
pub fn summary(vcpu: &VcpuFd) -> String {
    match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => format!(
            "rip {:#x} cs {:#x} rsp {:#x} cr0 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
            regs.rip, sregs.cs.selector, regs.rsp, sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer
        ),
        _ => "its registers cannot be read".to_owned(),
    }
}

/// KVM's errors carry an errno.
pub fn os_error(error: kvm_ioctls::Error) -> std::io::Error {
    std::io::Error::from_raw_os_error(error.errno())
}

fn kernel_gs_base(vcpu: &VcpuFd) -> std::io::Result<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry {
        index: MSR_KERNEL_GS_BASE,
        ..Default::default()
    }])
    .map_err(|error| std::io::Error::other(format!("{error:?}")))?;
    match vcpu.get_msrs(&mut msrs).map_err(os_error)? {
        1 => Ok(msrs.as_slice()[0].data),
        _ => Err(std::io::Error::other("KVM cannot read MSR KERNEL_GS_BASE")),
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
