//! The last registers of vCPUs whose process has ended.
//!
//! KVM copies a vCPU's registers into its run page whenever KVM_RUN returns, also when a deadly signal returns it. The page
//! lives as long as somebody has the vCPU's descriptor or a mapping of it, and whoever has the descriptor may map it, though
//! nothing else works in a process that did not make the machine. The mappings are made before this process is sealed; what
//! is in the pages, which vcpu-proc could write as well, is read afterwards. All of it is numbers of fixed places.

use ipc::Failure;
use ipc::caps::RunPageFd;
use ipc::vcpu::{MAX_VCPUS, VcpuRegisters};
use kvm_bindings::{kvm_run, kvm_sync_regs};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use std::num::NonZeroUsize;
use std::ptr::NonNull;

/// The part of a run page that is of interest lies in its first 4 KiB.
const PAGE_BYTES: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
const _: () = assert!(std::mem::size_of::<kvm_run>() <= PAGE_BYTES.get());

/// The run pages of a machine's vCPUs, in their order. They stay mapped as long as the process lives.
#[derive(Default)]
pub struct RunPages(Vec<NonNull<kvm_run>>);

impl RunPages {
    /// Maps further pages and closes the descriptors.
    ///
    /// # Errors
    /// When there are more than a machine has, or one cannot be mapped.
    pub fn take(&mut self, pages: Vec<RunPageFd>) -> Result<(), Failure> {
        if self.0.len() + pages.len() > usize::from(MAX_VCPUS) {
            return Err(Failure::new("there are more run pages than a machine has vCPUs"));
        }
        for page in pages {
            // SAFETY: a new mapping that replaces nothing, read-only.
            let mapped = unsafe { mmap(None, PAGE_BYTES, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &page, 0) };
            let mapped = mapped.map_err(|errno| Failure::new(format!("mapping a run page: {errno}")))?;
            self.0.push(mapped.cast());
        }
        Ok(())
    }

    /// What is in them.
    pub fn registers(&self) -> Vec<VcpuRegisters> {
        let read = |page: &NonNull<kvm_run>| {
            // SAFETY: the page is mapped (see the type), large enough and aligned; any bytes are valid numbers. Nobody writes
            // it any more: the vCPU's process has ended.
            let regs: kvm_sync_regs = unsafe { (&raw const (*page.as_ptr()).s.regs).read_volatile() };
            ipc::registers::from_kvm(&regs.regs, &regs.sregs)
        };
        self.0.iter().map(read).collect()
    }
}
