//! A vCPU's state after power-on: taken once, when KVM has just made the vCPU, and put back at every boot.

use crate::vcpu::registers::os_error;
use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::VcpuFd;

/// The time stamp counter goes on over a reset: setting it would start KVM's synchronisation heuristics.
const MSR_TSC: u32 = 0x10;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// Fast string operations.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs enabled, memory is write-back: there is no firmware that would set them up.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// Local APIC registers that a PC's firmware leaves as the MP specification wants (offsets in the register page).
const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const LAPIC_MODE_NMI: u32 = 4 << 8;
const LAPIC_MODE_EXTINT: u32 = 7 << 8;

/// Everything of a vCPU that a guest can change and a reset must put back.
pub struct PowerOnState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: Option<kvm_xcrs>,
    debug_registers: kvm_debugregs,
    events: kvm_vcpu_events,
    lapic: Box<kvm_lapic_state>,
    mp_state: kvm_mp_state,
    /// Those that KVM both reads and accepts.
    msrs: Vec<kvm_msr_entry>,
}

impl PowerOnState {
    /// Takes the state of a vCPU that has its CPUID and has never run. `msr_indices` is KVM's list.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn take(vcpu: &VcpuFd, msr_indices: &[u32]) -> std::io::Result<Self> {
        let mut lapic = Box::new(vcpu.get_lapic().map_err(os_error)?);
        set_lapic_register(&mut lapic, LAPIC_LVT_LINT0, LAPIC_MODE_EXTINT);
        set_lapic_register(&mut lapic, LAPIC_LVT_LINT1, LAPIC_MODE_NMI);
        let mut msrs = read_msrs(vcpu, msr_indices)?;
        for msr in &mut msrs {
            match msr.index {
                MSR_MISC_ENABLE => msr.data |= MISC_ENABLE_FAST_STRING,
                MSR_MTRR_DEF_TYPE => msr.data = MTRR_ENABLE_WRITE_BACK,
                _ => {}
            }
        }
        if !msrs.iter().any(|msr| msr.index == MSR_MTRR_DEF_TYPE) {
            // KVM has the MTRRs, but does not list them.
            msrs.push(kvm_msr_entry {
                index: MSR_MTRR_DEF_TYPE,
                data: MTRR_ENABLE_WRITE_BACK,
                ..Default::default()
            });
        }
        let msrs = write_msrs(vcpu, &msrs)?;
        Ok(Self {
            regs: vcpu.get_regs().map_err(os_error)?,
            sregs: vcpu.get_sregs().map_err(os_error)?,
            xsave: Box::new(vcpu.get_xsave().map_err(os_error)?),
            // Hosts without XSAVE have none.
            xcrs: vcpu.get_xcrs().ok(),
            debug_registers: vcpu.get_debug_regs().map_err(os_error)?,
            events: vcpu.get_vcpu_events().map_err(os_error)?,
            lapic,
            mp_state: vcpu.get_mp_state().map_err(os_error)?,
            msrs,
        })
    }

    /// The registers as a boot protocol starts from them.
    pub fn registers(&self) -> (kvm_regs, kvm_sregs) {
        (self.regs, self.sregs)
    }

    /// Puts the state back. The vCPU is parked.
    ///
    /// # Errors
    /// Names what KVM refuses.
    pub fn restore(&self, vcpu: &VcpuFd) -> std::io::Result<()> {
        let step = |what: &'static str| {
            move |error: kvm_ioctls::Error| std::io::Error::other(format!("resetting a vCPU: {what}: {error}"))
        };
        // Asking for it has KVM take in an INIT or start-up IPI that is still on its way to this vCPU.
        vcpu.get_mp_state().map_err(step("KVM_GET_MP_STATE"))?;
        vcpu.set_mp_state(self.mp_state).map_err(step("KVM_SET_MP_STATE"))?;
        // Special registers first: they switch the local APIC back from x2APIC mode, which its register page depends on.
        vcpu.set_sregs(&self.sregs).map_err(step("KVM_SET_SREGS"))?;
        vcpu.set_regs(&self.regs).map_err(step("KVM_SET_REGS"))?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(step("KVM_SET_XCRS"))?;
        }
        // SAFETY: the kernel reads beyond the structure only when dynamically enabled features (AMX) were requested for
        // the guest with arch_prctl, which this process never does.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(step("KVM_SET_XSAVE"))?;
        vcpu.set_lapic(&self.lapic).map_err(step("KVM_SET_LAPIC"))?;
        if write_msrs(vcpu, &self.msrs)?.len() != self.msrs.len() {
            return Err(std::io::Error::other(
                "resetting a vCPU: KVM_SET_MSRS: refused a value that it accepted before",
            ));
        }
        vcpu.set_debug_regs(&self.debug_registers)
            .map_err(step("KVM_SET_DEBUGREGS"))?;
        vcpu.set_vcpu_events(&self.events).map_err(step("KVM_SET_VCPU_EVENTS"))
    }
}

fn set_lapic_register(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (slot, byte) in lapic.regs[offset..offset + 4].iter_mut().zip(value.to_le_bytes()) {
        *slot = byte.cast_signed();
    }
}

/// Reads those of the MSRs that KVM reads, but the time stamp counter.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> std::io::Result<Vec<kvm_msr_entry>> {
    let wanted: Vec<kvm_msr_entry> = indices
        .iter()
        .filter(|index| **index != MSR_TSC)
        .map(|index| kvm_msr_entry {
            index: *index,
            ..Default::default()
        })
        .collect();
    accepted(&wanted, |msrs| vcpu.get_msrs(msrs))
}

/// Writes MSRs and returns those that KVM accepts.
fn write_msrs(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> std::io::Result<Vec<kvm_msr_entry>> {
    accepted(msrs, |msrs| vcpu.set_msrs(msrs))
}

/// KVM works through a list of MSRs until one fails: skip that one and go on behind it.
fn accepted(
    entries: &[kvm_msr_entry],
    mut ioctl: impl FnMut(&mut Msrs) -> Result<usize, kvm_ioctls::Error>,
) -> std::io::Result<Vec<kvm_msr_entry>> {
    let mut done = Vec::with_capacity(entries.len());
    let mut rest = entries;
    while !rest.is_empty() {
        let mut msrs = Msrs::from_entries(rest).map_err(|error| std::io::Error::other(format!("{error:?}")))?;
        let count = ioctl(&mut msrs).map_err(os_error)?.min(rest.len());
        done.extend_from_slice(&msrs.as_slice()[..count]);
        rest = rest.get(count + 1..).unwrap_or(&[]);
    }
    Ok(done)
}
