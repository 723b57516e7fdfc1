//! fw_cfg, QEMU's interface between firmware and machine, as far as a kernel needs it to say where its VMCOREINFO note is.
//!
//! There is one file, `etc/vmcoreinfo`, which the guest writes: 16 bytes with a format, and the size and guest physical
//! address of the note. They are taken as they come; who reads memory by them checks them. The interface is QEMU's
//! (docs/specs/fw_cfg.rst): a selector and a data port of one byte, and an address port that takes the guest physical
//! address of a descriptor, big endian like the descriptor itself:
//!
//! ```text
//! control u32: the key in the upper half, what to do in the lower | length u32 | address u64
//! ```
//!
//! Only by a descriptor can a file be written.

use crate::bus::BusDevice;
use crate::layout::{FW_CFG_DATA_PORT, FW_CFG_DMA_HIGH_PORT, FW_CFG_DMA_LOW_PORT, FW_CFG_PORT};
use ipc::memory::GuestRam;
use ipc::vcpu::VmCoreInfo;
use vm_memory::{Bytes, GuestAddress};

/// Keys.
const SIGNATURE: u16 = 0x0000;
const FEATURES: u16 = 0x0001;
const DIRECTORY: u16 = 0x0019;
/// The first file.
const VMCOREINFO: u16 = 0x0020;
/// Part of the selector that names no other item.
const WRITE_CHANNEL: u16 = 0x4000;

/// There are the two ports, and there are descriptors.
const BOTH_INTERFACES: u32 = 0b11;
/// What the address port reads as.
const DMA_SIGNATURE: &[u8; 8] = b"QEMU CFG";

/// Bits of a descriptor's control field.
const DMA_ERROR: u32 = 1;
const DMA_READ: u32 = 1 << 1;
const DMA_SKIP: u32 = 1 << 2;
const DMA_SELECT: u32 = 1 << 3;
const DMA_WRITE: u32 = 1 << 4;
/// The most that one descriptor moves, bytes. Behind an item's end there are zeros without end, and a vCPU that is busy
/// writing those cannot be paused.
const MAX_DMA_BYTES: u32 = 64 << 10;

const FILE_NAME: &[u8] = b"etc/vmcoreinfo";
const FILE_BYTES: usize = 16;
/// Format of a note: that of an ELF file. 0 is none.
const FORMAT_ELF: u16 = 1;

/// What a file that the guest has not written says: the format that the host knows.
const INITIAL: [u8; FILE_BYTES] = {
    let mut content = [0; FILE_BYTES];
    content[0] = FORMAT_ELF as u8;
    content
};

/// See the module.
pub struct FwCfg {
    ram: GuestRam,
    directory: Vec<u8>,
    /// Host format u16, guest format u16, size u32, address u64, little endian.
    file: [u8; FILE_BYTES],
    /// Whether the guest has written all of it at once.
    is_written: bool,
    key: u16,
    /// Of the next byte of the selected item.
    offset: usize,
    /// Upper half of a descriptor's address, until the lower comes.
    dma_high: u32,
}

impl FwCfg {
    /// With the file as the guest finds it first.
    pub fn new(ram: GuestRam) -> Self {
        let mut directory = Vec::new();
        directory.extend(1_u32.to_be_bytes());
        directory.extend((FILE_BYTES as u32).to_be_bytes());
        directory.extend(VMCOREINFO.to_be_bytes());
        directory.extend(0_u16.to_be_bytes());
        directory.extend(FILE_NAME);
        // Names have 56 bytes.
        directory.resize(directory.len() + 56 - FILE_NAME.len(), 0);
        Self {
            ram,
            directory,
            file: INITIAL,
            is_written: false,
            key: SIGNATURE,
            offset: 0,
            dma_high: 0,
        }
    }

    /// Where the guest's kernel says that its note is.
    pub fn vmcoreinfo(&self) -> Option<VmCoreInfo> {
        let [_, _, format_low, format_high, s0, s1, s2, s3, address @ ..] = self.file;
        let format = u16::from_le_bytes([format_low, format_high]);
        (self.is_written && format == FORMAT_ELF).then(|| VmCoreInfo {
            bytes: u32::from_le_bytes([s0, s1, s2, s3]),
            address: u64::from_le_bytes(address),
        })
    }

    fn select(&mut self, key: u16) {
        self.key = key & !WRITE_CHANNEL;
        self.offset = 0;
    }

    /// The next bytes of the selected item; zeros behind its end, and for an item that does not exist.
    fn take(&mut self, data: &mut [u8]) {
        let features = BOTH_INTERFACES.to_le_bytes();
        let item: &[u8] = match self.key {
            SIGNATURE => b"QEMU",
            FEATURES => &features,
            DIRECTORY => &self.directory,
            VMCOREINFO => &self.file,
            _ => &[],
        };
        let rest = item.get(self.offset..).unwrap_or_default();
        let count = rest.len().min(data.len());
        data[..count].copy_from_slice(&rest[..count]);
        data[count..].fill(0);
        self.skip(data.len());
    }

    fn skip(&mut self, count: usize) {
        self.offset = self.offset.saturating_add(count);
    }

    /// Carries a descriptor out. One that does not lie in RAM is forgotten: there is nowhere to say so.
    fn transfer(&mut self, descriptor: GuestAddress) {
        let mut fields = [0; 16];
        if self.ram.read_slice(&mut fields, descriptor).is_err() {
            return;
        }
        let [c0, c1, c2, c3, l0, l1, l2, l3, address @ ..] = fields;
        let control = u32::from_be_bytes([c0, c1, c2, c3]);
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        let address = GuestAddress(u64::from_be_bytes(address));
        if control & DMA_SELECT != 0 {
            self.select((control >> 16) as u16);
        }
        let done = if control & DMA_READ != 0 {
            self.read_to(address, length)
        } else if control & DMA_WRITE != 0 {
            self.write_from(address, length)
        } else {
            if control & DMA_SKIP != 0 {
                self.skip(length as usize);
            }
            Some(())
        };
        let answer = if done.is_some() { 0 } else { DMA_ERROR };
        // The guest waits for it; that it could be read a moment ago means that it can be written.
        let _ = self.ram.write_slice(&answer.to_be_bytes(), descriptor);
    }

    fn read_to(&mut self, address: GuestAddress, length: u32) -> Option<()> {
        if length > MAX_DMA_BYTES {
            return None;
        }
        let mut data = vec![0; length as usize];
        self.take(&mut data);
        self.ram.write_slice(&data, address).ok()
    }

    fn write_from(&mut self, address: GuestAddress, length: u32) -> Option<()> {
        if self.key != VMCOREINFO {
            return None;
        }
        let first = self.offset;
        let target = self.file.get_mut(first..first.checked_add(length as usize)?)?;
        // Half a write is none.
        let mut data = vec![0; target.len()];
        self.ram.read_slice(&mut data, address).ok()?;
        target.copy_from_slice(&data);
        self.is_written = data.len() == FILE_BYTES;
        self.skip(data.len());
        Some(())
    }
}

impl BusDevice for FwCfg {
    fn read(&mut self, base: u64, offset: u64, data: &mut [u8]) {
        match base + offset {
            FW_CFG_PORT => data.fill(0),
            FW_CFG_DATA_PORT if data.len() == 1 => self.take(data),
            port => {
                let signature = port
                    .checked_sub(FW_CFG_DMA_HIGH_PORT)
                    .and_then(|from| DMA_SIGNATURE.get(usize::try_from(from).ok()?..));
                for (byte, value) in data.iter_mut().zip(signature.into_iter().flatten()) {
                    *byte = *value;
                }
            }
        }
    }

    fn write(&mut self, base: u64, offset: u64, data: &[u8]) {
        match (base + offset, data) {
            (FW_CFG_PORT, [low, high]) => self.select(u16::from_le_bytes([*low, *high])),
            (FW_CFG_DMA_HIGH_PORT, &[a, b, c, d]) => self.dma_high = u32::from_be_bytes([a, b, c, d]),
            (FW_CFG_DMA_LOW_PORT, &[a, b, c, d]) => {
                let high = std::mem::take(&mut self.dma_high);
                let low = u32::from_be_bytes([a, b, c, d]);
                self.transfer(GuestAddress(u64::from(high) << 32 | u64::from(low)));
            }
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.file = INITIAL;
        self.is_written = false;
        self.select(SIGNATURE);
        self.dma_high = 0;
    }
}

#[cfg(test)]
#[path = "fw_cfg_test.rs"]
mod tests;
