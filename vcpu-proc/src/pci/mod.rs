//! One PCI bus: a host bridge at 00:00.0 and up to 31 single-function devices.
//!
//! There are three ways in, all through [`root::PciRoot`]: the ports of configuration mechanism #1 (PCI 3.0 §3.2.2.3),
//! ECAM (PCIe 5.0 §7.2.2), and the memory windows in which the BARs lie. A device is a [`PciFunction`]: 256 bytes of
//! configuration space ([`config`]), base address registers ([`bar`]) and, where it interrupts, MSI-X ([`msix`]).
//! There are no bridges, no I/O BARs, no INTx and no option ROMs: nothing that a modern guest would miss.
//!
//! The guest is the adversary of all of this. Whatever it reads or writes, with any size at any offset, costs a bounded
//! amount of work, and a BAR is decoded only while it lies wholly inside a window of the host bridge, so that no guest
//! can lay a device over RAM or over another part of the chipset.

pub mod bar;
pub mod config;
pub mod msix;
pub mod root;

use bar::{BarAllocator, DecodedBar};

/// A device on the bus. Calls come with the root's lock held.
pub trait PciFunction: Send {
    /// Reads configuration space. The access lies within its 256 bytes.
    fn config_read(&mut self, offset: usize, data: &mut [u8]);
    /// Writes configuration space. The access lies within its 256 bytes.
    fn config_write(&mut self, offset: usize, data: &[u8]);
    /// Takes an address for each BAR, once, when the function is put on the bus. These are the addresses after each
    /// reset, as a firmware would have assigned them.
    ///
    /// # Errors
    /// When the window is full.
    fn assign_bars(&mut self, allocator: &mut BarAllocator) -> Result<(), bar::WindowFull>;
    /// Appends the BARs that answer at present.
    fn decoded_bars(&self, decoded: &mut Vec<DecodedBar>);
    /// Reads from a BAR. The access lies within it. `data` comes filled with ones.
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]);
    /// Writes to a BAR. The access lies within it.
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]);
    /// Back to the state after power-on. All vCPUs are parked.
    fn reset(&mut self);
}
