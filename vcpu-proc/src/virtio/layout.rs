//! The structures of a virtio PCI device: where they lie in its one BAR, and the vendor capabilities that say so
//! (virtio 1.2 §4.1.4).
//!
//! Each structure has pages of its own, so that an operating system can map each with the attributes it likes and KVM
//! never has to decide about part of a page.

use crate::pci::config::{CAPABILITY_MSIX, CAPABILITY_VENDOR, ConfigSpace};
use crate::pci::msix;
use std::ops::Range;

/// The BAR with all structures.
pub const BAR_INDEX: u8 = 0;
/// Its size.
pub const BAR_BYTES: u64 = 0x8000;

const PAGE: u64 = 0x1000;
/// Common configuration.
pub const COMMON: Range<u64> = 0..PAGE;
/// ISR status.
pub const ISR: Range<u64> = PAGE..2 * PAGE;
/// Device configuration.
pub const DEVICE: Range<u64> = 2 * PAGE..3 * PAGE;
/// Notifications: one 32-bit register per queue.
pub const NOTIFY: Range<u64> = 3 * PAGE..4 * PAGE;
/// MSI-X table.
pub const MSIX_TABLE: Range<u64> = 4 * PAGE..5 * PAGE;
/// MSI-X pending bits.
pub const MSIX_PBA: Range<u64> = 5 * PAGE..6 * PAGE;

/// Distance of the queues' notification registers, bytes.
pub const NOTIFY_MULTIPLIER: u64 = 4;

/// cfg_type values.
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_PCI: u8 = 5;

/// Bytes of struct virtio_pci_cap.
const CAP_BYTES: u8 = 16;
/// Bytes of a structure's capability with one more register behind it.
const LONG_CAP_BYTES: u8 = CAP_BYTES + 4;
/// Offset of the window in the capability for access through configuration space.
const PCI_CFG_DATA: usize = 16;

/// Offsets of the capabilities that the device looks into, in configuration space.
#[derive(Debug, Clone, Copy)]
pub struct Capabilities {
    /// virtio_pci_cfg_cap.
    pub pci_cfg: usize,
    /// MSI-X.
    pub msix: usize,
}

/// Adds all capabilities.
pub fn add_capabilities(config: &mut ConfigSpace, vectors: u16) -> Capabilities {
    let length = |range: &Range<u64>| range.end - range.start;
    for (kind, range) in [(TYPE_COMMON, &COMMON), (TYPE_ISR, &ISR), (TYPE_DEVICE, &DEVICE)] {
        let body = body(CAP_BYTES, kind, range.start, length(range));
        config.add_capability(CAPABILITY_VENDOR, &body, &[0; 14]);
    }
    let mut notify = [0; 18];
    notify[..14].copy_from_slice(&body(LONG_CAP_BYTES, TYPE_NOTIFY, NOTIFY.start, length(&NOTIFY)));
    notify[14..].copy_from_slice(&field(NOTIFY_MULTIPLIER));
    config.add_capability(CAPABILITY_VENDOR, &notify, &[0; 18]);

    // The driver chooses bar, offset and length, then accesses the four bytes behind them.
    let mut pci_cfg = [0; 18];
    pci_cfg[..14].copy_from_slice(&body(LONG_CAP_BYTES, TYPE_PCI, 0, 0));
    let mut writable = [0; 18];
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    let pci_cfg = config.add_capability(CAPABILITY_VENDOR, &pci_cfg, &writable);

    let (table, pba) = (offset32(MSIX_TABLE.start), offset32(MSIX_PBA.start));
    let (body, writable) = msix::capability(vectors, BAR_INDEX, table, pba);
    let msix = config.add_capability(CAPABILITY_MSIX, &body, &writable);
    Capabilities { pci_cfg, msix }
}

/// struct virtio_pci_cap after ID and next pointer: cap_len, cfg_type, bar, id, padding, offset, length.
fn body(cap_bytes: u8, kind: u8, offset: u64, length: u64) -> [u8; 14] {
    let mut body = [0; 14];
    body[..3].copy_from_slice(&[cap_bytes, kind, BAR_INDEX]);
    body[6..10].copy_from_slice(&field(offset));
    body[10..14].copy_from_slice(&field(length));
    body
}

fn offset32(value: u64) -> u32 {
    u32::try_from(value).expect("the BAR is small")
}

fn field(value: u64) -> [u8; 4] {
    offset32(value).to_le_bytes()
}

impl Capabilities {
    /// The bytes of configuration space that stand for a piece of the BAR.
    pub fn pci_cfg_data(self) -> Range<usize> {
        let start = self.pci_cfg + PCI_CFG_DATA;
        start..start + 4
    }

    /// Which piece of the BAR the driver has chosen: offset and length. `None` unless it is one that virtio 1.2
    /// §4.1.4.9 allows: 1, 2 or 4 bytes, aligned, inside our BAR.
    pub fn pci_cfg_target(self, config: &ConfigSpace) -> Option<(u64, usize)> {
        let bar = config.u16_at(self.pci_cfg + 4) & 0xff;
        let offset = u64::from(config.u32_at(self.pci_cfg + 8));
        let length = config.u32_at(self.pci_cfg + 12);
        let valid = bar == u16::from(BAR_INDEX)
            && matches!(length, 1 | 2 | 4)
            && offset % u64::from(length) == 0
            && offset < BAR_BYTES;
        valid.then_some((offset, usize::try_from(length).ok()?))
    }
}
