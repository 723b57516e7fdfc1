//! The vCPUs: one thread each, which runs the guest and answers its exits.
//!
//! A vCPU's fd is locked by its thread while it runs and free while it is parked, so that the control thread can read and
//! reset the registers of a parked vCPU. A thread parks only when KVM_RUN has said EINTR: the kernel completes a pending
//! port or memory access before it says so, and the registers are then those between two instructions.

pub mod gate;
pub mod registers;
pub mod run_page;
pub mod state;

use crate::bus::Bus;
use gate::Gate;
use ipc::vcpu::VcpuEvent;
use kvm_ioctls::{VcpuExit, VcpuFd};
use run_page::{Kick, RunPage};
use std::sync::{Arc, Mutex, PoisonError};

/// Enough for the deepest device call; the main thread's default would reserve 2 MiB for each of 255.
const STACK_BYTES: usize = 256 << 10;

/// A vCPU between its thread and the control thread.
pub type SharedVcpu = Arc<Mutex<VcpuFd>>;

/// Where the guest's accesses go.
#[derive(Default)]
pub struct Buses {
    /// Ports.
    pub ports: Bus,
    /// Guest physical memory that is not RAM.
    pub memory: Bus,
}

/// Starts the threads of all vCPUs; they park at the gate. Returns when all have.
///
/// # Errors
/// When a thread cannot be started.
pub fn start_threads(vcpus: &[SharedVcpu], gate: &Arc<Gate>, buses: &Arc<Buses>) -> std::io::Result<()> {
    run_page::install_handler()?;
    let process = libc::pid_t::try_from(std::process::id()).map_err(std::io::Error::other)?;
    for (index, vcpu) in vcpus.iter().enumerate() {
        let (vcpu, gate, buses) = (Arc::clone(vcpu), Arc::clone(gate), Arc::clone(buses));
        std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let page = RunPage::of(&mut vcpu.lock().unwrap_or_else(PoisonError::into_inner));
                let kick = Kick::for_this_thread(page, process);
                loop {
                    gate.park(index, kick);
                    let mut fd = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
                    run_until_stopped(index, &mut fd, page, &gate, &buses);
                }
            })?;
    }
    gate.close_and_wait();
    Ok(())
}

/// Runs the guest until KVM_RUN reports an interruption while the gate is closed.
fn run_until_stopped(index: usize, vcpu: &mut VcpuFd, page: RunPage, gate: &Gate, buses: &Buses) {
    loop {
        let failure = match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                let size = page.port_access_bytes();
                for access in data.chunks(size) {
                    buses.ports.write(u64::from(port), access);
                }
                continue;
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                let size = page.port_access_bytes();
                for access in data.chunks_mut(size) {
                    buses.ports.read(u64::from(port), access);
                }
                continue;
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                buses.memory.read(address, data);
                continue;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                buses.memory.write(address, data);
                continue;
            }
            // A triple fault: the processor gives up, and a PC's board resets it.
            Ok(VcpuExit::Shutdown) => {
                ipc::helper::log(&format!("vCPU {index}: triple fault, the guest resets"));
                gate.stop_and_report(VcpuEvent::GuestReset);
                continue;
            }
            Ok(VcpuExit::Intr) => continue,
            Ok(VcpuExit::InternalError) => {
                let error = page.internal_error();
                format!(
                    "KVM_EXIT_INTERNAL_ERROR: {} (suberror {}, data {:x?})",
                    internal_error_name(error.suberror),
                    error.suberror,
                    error.data
                )
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                format!("KVM_EXIT_FAIL_ENTRY: hardware entry failure {reason:#x} on host CPU {cpu}")
            }
            Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                format!("KVM_EXIT_MEMORY_FAULT: {size:#x} bytes at guest address {gpa:#x}, flags {flags:#x}")
            }
            Ok(VcpuExit::SystemEvent(kind, data)) => format!("KVM_EXIT_SYSTEM_EVENT: type {kind}, data {data:x?}"),
            Ok(other) => format!("unexpected KVM exit: {other:?}"),
            Err(error) => match error.errno() {
                libc::EINTR if gate.is_open() => continue,
                libc::EINTR => return,
                // An application processor that has just left its wait for SIPI.
                libc::EAGAIN => continue,
                libc::EFAULT => "KVM_RUN: EFAULT (a page of guest memory cannot be used)".to_owned(),
                libc::EHWPOISON => "KVM_RUN: EHWPOISON (broken host memory)".to_owned(),
                _ => format!("KVM_RUN: {error}"),
            },
        };
        gate.stop_and_report(VcpuEvent::VcpuFailed {
            vcpu: u16::try_from(index).unwrap_or(u16::MAX),
            detail: format!("{failure}; {}", registers::summary(vcpu)),
        });
    }
}

fn internal_error_name(suberror: u32) -> &'static str {
    match suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "an instruction that KVM cannot emulate",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "simultaneous exceptions",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "event delivery failed",
        kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "unexpected hardware exit",
        _ => "unknown",
    }
}
