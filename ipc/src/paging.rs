//! Addresses as a client means them: guest physical, or virtual as one vCPU translates them.

use crate::vcpu::VcpuRegisters;
use serde::{Deserialize, Serialize};

/// The registers that decide how a vCPU translates virtual addresses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paging {
    /// CR0: PG switches translation on.
    pub cr0: u64,
    /// CR3: where the top table is.
    pub cr3: u64,
    /// CR4: PSE, PAE and LA57 choose the format.
    pub cr4: u64,
    /// EFER: LMA chooses the 64-bit formats.
    pub efer: u64,
}

impl From<&VcpuRegisters> for Paging {
    fn from(registers: &VcpuRegisters) -> Self {
        let [cr0, _, cr3, cr4] = registers.control;
        Self {
            cr0,
            cr3,
            cr4,
            efer: registers.efer,
        }
    }
}

/// What an address means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AddressSpace {
    /// Guest physical memory. What is no RAM reads as zeros where a whole range is saved.
    Physical,
    /// Virtual memory of a vCPU.
    Virtual(Paging),
}
