//! The lab: a place in which `bulkhead` can boot a real Linux guest, wherever the tests run.
//!
//! A stock kernel needs a processor with VMX or SVM. Where the host has one ([`Site::Here`]) `bulkhead` simply runs.
//! Elsewhere ([`Site::Lab`]) QEMU emulates a whole machine with SVM. It boots Debian's cloud kernel, whose own kvm-amd
//! gives a real /dev/kvm, and `bulkhead` with its helpers runs in there:
//!
//! ```text
//! host            tests, e2fsck, a QMP client                    images: files
//!  └ QEMU         emulates 2 CPUs with SVM (accel tcg)
//!     └ outer     Debian's kernel, busybox, kvm-amd, lab-agent   images: files in /scratch (ext4)
//!        └ bulkhead and its helpers
//!           └ guest   Debian's kernel, busybox, guest-* scripts  the image: /dev/vda
//! ```
//!
//! - [`Site`] is what tests use: it runs commands, moves files, connects to sockets, the same way in both cases.
//! - [`Machine`] is one run of `bulkhead` with its serial console ([`Console`]) and its monitor ([`Qmp`]).
//! - [`guest`] builds the guest's first file system, [`outer`] the lab's; both in Rust, from Debian's packages as they are
//!   ([`pieces`]), without root and without mounting anything.
//! - The agent in the lab (`lab-agent`) speaks [`wire`] over a virtio serial port. When the host hangs up, for whatever
//!   reason, it ends, the outer system switches off, and QEMU is gone: no test leaves a lab behind.
//! - [`harness`] lets a test program find out at run time that its tests cannot run, and say so.

mod agent;
pub mod console;
pub mod cpio;
pub mod ext4;
pub mod guest;
pub mod harness;
pub mod machine;
pub mod must;
pub mod outer;
pub mod pieces;
pub mod python;
pub mod qmp;
pub mod site;
pub mod wire;

pub use console::Console;
pub use machine::{Machine, MachineBuilder};
pub use must::Must;
pub use outer::Lab;
pub use qmp::Qmp;
pub use site::{Job, Output, Site};
pub use wire::User;
