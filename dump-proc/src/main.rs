//! dump-proc: writes one dump of guest memory or saves one range of it, then ends; or answers what is at an address.
//!
//! **Holds**: a read-only fd of guest RAM, the vCPUs' registers (of a dead vcpu-proc: a read-only mapping of their run pages), one output fd. **Never holds**: disks, /dev/kvm, a way to
//! write guest RAM, a path. **Talks to**: the supervisor. **Its crash means**: this dump fails with an error; the VM goes
//! on. It is started when a dump or a save is asked for, which is cancelled by killing it; the one for short looks stays.
//!
//! ```text
//! supervisor ──Setup (memory fd)──▶ memory ─┐
//!            ──Seal───────────────▶ filters │
//!            ──Write (output fd,            ▼
//!                     registers)──▶ elf: header, notes, then extent by extent ──▶ output
//!            ◀─Progress …, Written ─────────┘
//! ```
//!
//! - [`control`]: the order of the requests, and their answers.
//! - [`memory`]: which bytes of guest RAM a dump covers, and where the memory fd has data.
//! - [`elf`]: the plain ELF core: layout, headers, notes, and the order of writing.
//! - [`kdump`]: the kdump-compressed format, with its [`codec`]s, by all [`workers`] at once.
//! - [`exclude`]: which pages a dump leaves out when it is asked to.
//! - [`vmcoreinfo`]: a Linux guest's note about itself; [`kernel`]: where that kernel has its memory.
//! - [`mapping`]: all that the guest's page tables map.
//! - [`look`]: ranges without a header, and short reads; [`paging`] finds virtual addresses. Page tables are the guest's
//!   word, so they are walked here, in the process that can only read, and not where the guest could gain something.
//! - [`run_pages`]: the last registers, when vcpu-proc has ended and cannot tell them.
//! - [`live`]: memory as it was when the dump began, though the guest runs on.
//! - [`output`]: what the output fd is, and so how it is written: at offsets with holes left out, or as a stream.
//!
//! Guest RAM is never mapped. It is read with `pread`, 1 MiB at a time: as fast as writing from a mapping (the copy stays
//! in the cache), without page tables to fill, with memory use that does not depend on the guest's, and without any way
//! to allocate a hole of the memory fd by looking at it, which reading a mapping would do. It also spares the sealed
//! process mmap.

mod codec;
mod control;
mod elf;
mod exclude;
mod kdump;
mod kernel;
mod live;
mod look;
mod mapping;
mod memory;
mod output;
mod paging;
mod run_pages;
mod vmcoreinfo;
mod workers;

use nix::sys::signal::{SigHandler, Signal, signal};

fn main() {
    let channel = ipc::helper::start();
    ignore_write_signals();
    prepare_heap();
    control::run(channel)
}

/// A reader that went away and a file size limit are errors of `write`, not the end of the process.
fn ignore_write_signals() {
    for ignored in [Signal::SIGPIPE, Signal::SIGXFSZ] {
        // SAFETY: ignoring a signal installs no handler code.
        if let Err(errno) = unsafe { signal(ignored, SigHandler::SigIgn) } {
            ipc::helper::die(&format!("ignoring {ignored}: {errno}"));
        }
    }
}

/// Makes malloc use brk alone: the sealed filter allows neither mmap nor mremap.
fn prepare_heap() {
    // SAFETY: mallopt only sets parameters of the allocator; there is one thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
        // What a page took is kept for the next one.
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
    }
}
