//! vcpu-proc: the process that runs a virtual machine's processors.
//!
//! It holds everything that KVM made for one VM (the VM and vCPU fds work in the process that created them and in no
//! other), a read-write mapping of guest RAM, and the threads that run the guest. It answers the guest's accesses to
//! ports and registers: serial port, clock, ACPI, PCI, and the registers of virtio devices, whose queues another process
//! serves. It must never hold a disk, a path, a socket to the outside, or code that reads a file format other than a
//! kernel's headers. The guest is its attacker; what an attacker gains here is one guest's RAM, the 17 system calls of
//! `policies/vcpu-proc.json`, and the channel to the supervisor.
//!
//! ```text
//!                     channel                         one thread a vCPU
//! supervisor ◀──────────────▶ control ──── gate ────▶ KVM_RUN ◀──▶ guest
//!                               ▲                        │ exits
//!                               │ outbox                 ▼
//!                               ├─────────────── ports and memory buses
//!                               │                        │
//!                               └── serial thread ◀──────┴─▶ PCI, virtio ···▶ eventfds, straight to block-proc
//! ```
//!
//! - [`control`] answers the supervisor and is the only thread that touches the channel; the others report through the
//!   [`outbox`].
//! - [`machine`] builds the VM and holds it; [`layout`] is its address map, [`cpuid`] and [`acpi`] what the guest is told.
//! - [`vcpu`] runs the guest; its gate parks and releases the threads, and stops them all when the guest resets, powers
//!   off or fails.
//! - [`bus`] finds the device; [`devices`] are those of a PC, [`pci`] and [`virtio`] the rest, [`irq`] their interrupts.
//! - [`boot`] loads kernels.
//!
//! Set-up (KVM, threads, eventfds) happens before the process is sealed; kernels are read, and the guest runs, only after.
//! A crash of this process is the end of its VM. RAM survives in the supervisor's memfd.

mod acpi;
mod boot;
mod bus;
mod control;
mod cpuid;
mod devices;
mod irq;
mod layout;
mod machine;
mod outbox;
mod pci;
mod vcpu;
mod virtio;

fn main() {
    let channel = ipc::helper::start();
    // One arena, grown by brk: the sealed filter has no mremap, and a thread's own arena would need mprotect.
    // SAFETY: mallopt changes the allocator's settings; no other thread exists yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
    }
    control::serve(channel)
}
