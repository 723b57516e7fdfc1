//! The `kvm_run` page that a vCPU shares with the kernel, with its last registers in it, and the signal that gets its thread
//! out of the guest.
//!
//! Stopping loses no wake-up: the stopper sets `immediate_exit` first and signals then. Either the thread has not yet
//! entered KVM_RUN, which then sees `immediate_exit` and returns EINTR at once, or it has, and the signal returns it.

use crate::vcpu::registers::os_error;
use kvm_bindings::{KVM_EXIT_IO, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_run, kvm_sync_regs};
use kvm_ioctls::VcpuFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

/// A vCPU's run page. It stays mapped as long as its `VcpuFd` lives; vCPUs live as long as the process.
#[derive(Debug, Clone, Copy)]
pub struct RunPage(NonNull<kvm_run>);

// SAFETY: the page is shared memory that the kernel writes while the vCPU's thread is inside KVM_RUN. Other threads touch
// `immediate_exit` only, atomically.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

/// What the kernel left behind with KVM_EXIT_INTERNAL_ERROR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InternalError {
    /// KVM_INTERNAL_ERROR_*.
    pub suberror: u32,
    /// Its data.
    pub data: Vec<u64>,
}

impl RunPage {
    /// The page of a vCPU that is never dropped.
    pub fn of(vcpu: &mut VcpuFd) -> Self {
        Self(NonNull::from(vcpu.get_kvm_run()))
    }

    /// Whether the next KVM_RUN (or the running one, once a signal interrupts it) returns without running the guest.
    pub fn set_immediate_exit(self, exit: bool) {
        // SAFETY: the page is mapped (see the type), the field is one byte, and every access to it is through this atomic
        // or by the kernel.
        let field = unsafe { AtomicU8::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) };
        field.store(u8::from(exit), Ordering::SeqCst);
    }

    /// Has KVM leave the registers in the page whenever KVM_RUN returns, also when a deadly signal returns it: that is what
    /// is left of the vCPU if this process ends. The vCPU has not run yet.
    pub fn keep_registers(self) {
        // SAFETY: the page is mapped (see the type), the kernel reads the field in KVM_RUN only.
        unsafe { (*self.0.as_ptr()).kvm_valid_regs = u64::from(KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS) };
    }

    /// Puts a parked vCPU's registers there that were set otherwise: KVM_RUN has not returned since.
    ///
    /// # Errors
    /// When KVM refuses to tell them.
    pub fn note_registers(vcpu: &mut VcpuFd) -> std::io::Result<()> {
        let noted = kvm_sync_regs {
            regs: vcpu.get_regs().map_err(os_error)?,
            sregs: vcpu.get_sregs().map_err(os_error)?,
            ..Default::default()
        };
        *vcpu.sync_regs_mut() = noted;
        Ok(())
    }

    /// Bytes of one access of the port exit that KVM_RUN has just returned. A string instruction reports many at once.
    pub fn port_access_bytes(self) -> usize {
        // SAFETY: the page is mapped, the vCPU's own thread asks, outside KVM_RUN; plain integers.
        let (reason, io) = unsafe {
            let run = self.0.as_ptr();
            ((*run).exit_reason, (*run).__bindgen_anon_1.io)
        };
        debug_assert_eq!(reason, KVM_EXIT_IO);
        usize::from(io.size).clamp(1, 4)
    }

    /// The details of the KVM_EXIT_INTERNAL_ERROR that KVM_RUN has just returned.
    pub fn internal_error(self) -> InternalError {
        // SAFETY: as for `port_access_bytes`.
        let internal = unsafe { (*self.0.as_ptr()).__bindgen_anon_1.internal };
        let count = usize::try_from(internal.ndata).unwrap_or(0).min(internal.data.len());
        InternalError {
            suberror: internal.suberror,
            data: internal.data[..count].to_vec(),
        }
    }
}

/// How to reach a vCPU's thread.
#[derive(Debug, Clone, Copy)]
pub struct Kick {
    page: RunPage,
    process: libc::pid_t,
    thread: libc::pid_t,
}

impl Kick {
    /// For the calling thread, which runs the vCPU of `page`. `process` is this process's id.
    pub fn for_this_thread(page: RunPage, process: libc::pid_t) -> Self {
        Self {
            page,
            process,
            thread: nix::unistd::gettid().as_raw(),
        }
    }

    /// The thread's id as this process's PID namespace numbers it.
    pub fn thread_id(&self) -> libc::pid_t {
        self.thread
    }

    /// Gets the thread out of the guest and keeps it out.
    pub fn stop(&self) {
        self.page.set_immediate_exit(true);
        // SAFETY: tgkill touches no memory; the signal has a handler (`install_handler`) and the thread never ends.
        unsafe { libc::syscall(libc::SYS_tgkill, self.process, self.thread, signal()) };
    }

    /// Lets the thread enter the guest again.
    pub fn allow(&self) {
        self.page.set_immediate_exit(false);
    }
}

/// The signal that interrupts KVM_RUN: the first real-time signal that the C library leaves to us. policies/vcpu-proc.json
/// names the number.
fn signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn on_signal(_signal: i32) {}

/// Installs the handler of the stop signal, which does nothing: interrupting is the effect. Other system calls that it
/// hits are restarted.
///
/// # Errors
/// When the kernel refuses.
pub fn install_handler() -> std::io::Result<()> {
    let handler: extern "C" fn(i32) = on_signal;
    // SAFETY: a zeroed sigaction is valid; the handler is async-signal-safe because it does nothing.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(signal(), &raw const action, std::ptr::null_mut())
    };
    if result != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}
