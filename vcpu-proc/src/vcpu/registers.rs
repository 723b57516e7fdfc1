//! Reading a parked vCPU's registers into the form that dumps and the supervisor use.

use ipc::vcpu::VcpuRegisters;
use kvm_bindings::{KVM_MP_STATE_HALTED, Msrs, kvm_msr_entry};
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
        kernel_gs_base: kernel_gs_base(vcpu)?,
        halted: vcpu.get_mp_state().map_err(os_error)?.mp_state == KVM_MP_STATE_HALTED,
        ..ipc::registers::from_kvm(&regs, &sregs)
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
