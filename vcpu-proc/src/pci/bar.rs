//! Base address registers (PCI 3.0 §6.2.5.1), the host bridge's windows, and who lies where after power-on.
//!
//! A BAR needs no sizing logic: its size bits and type bits are simply read-only, so that the all-ones write of a
//! sizing operating system reads back as the size.

use super::config::ConfigSpace;
use std::ops::Range;

/// Type bits of a memory BAR: 64 bits wide, not prefetchable.
const TYPE_64_BIT: u32 = 0b100;
/// Offset of the first BAR.
const FIRST_BAR: usize = 0x10;

/// Where the host bridge forwards memory accesses to the bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// Below 4 GiB.
    pub low: Range<u64>,
    /// Above all RAM.
    pub high: Range<u64>,
}

impl Windows {
    /// Whether all of `start..start + bytes` is forwarded.
    pub fn contain(&self, start: u64, bytes: u64) -> bool {
        let Some(end) = start.checked_add(bytes) else {
            return false;
        };
        [&self.low, &self.high]
            .into_iter()
            .any(|window| window.start <= start && end <= window.end)
    }
}

/// How many address bits a BAR has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarWidth {
    /// One register.
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "no device of ours needs one; part of the model")
    )]
    Bits32,
    /// Two registers.
    Bits64,
}

/// A memory BAR, not prefetchable.
#[derive(Debug, Clone, Copy)]
pub struct Bar {
    /// 0 to 5; a 64-bit BAR takes the next number as well.
    pub index: u8,
    /// Size; a power of two, at least 16.
    pub bytes: u64,
    /// Address bits.
    pub width: BarWidth,
}

/// A BAR that answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodedBar {
    /// Its index.
    pub index: u8,
    /// Guest physical address.
    pub base: u64,
    /// Size.
    pub bytes: u64,
}

impl Bar {
    fn offset(self) -> usize {
        FIRST_BAR + 4 * usize::from(self.index)
    }

    /// Lays the registers out. `address` is the value after power-on, aligned to the size.
    pub fn define(self, config: &mut ConfigSpace, address: u64) {
        assert!(
            self.bytes.is_power_of_two() && self.bytes >= 16,
            "a BAR has a valid size"
        );
        let (kind, length) = match self.width {
            BarWidth::Bits32 => (0, 4),
            BarWidth::Bits64 => (TYPE_64_BIT, 8),
        };
        let value = address | u64::from(kind);
        let writable = !(self.bytes - 1);
        config.define(
            self.offset(),
            &value.to_le_bytes()[..length],
            &writable.to_le_bytes()[..length],
        );
    }

    /// Where the guest has put it.
    pub fn address(self, config: &ConfigSpace) -> u64 {
        let low = u64::from(config.u32_at(self.offset())) & !(self.bytes - 1);
        match self.width {
            BarWidth::Bits32 => low,
            BarWidth::Bits64 => low | u64::from(config.u32_at(self.offset() + 4)) << 32,
        }
    }

    /// Where it answers, if it does: memory decoding is on and it lies in a window.
    pub fn decoded(self, config: &ConfigSpace, windows: &Windows) -> Option<DecodedBar> {
        let base = self.address(config);
        (config.memory_enabled() && windows.contain(base, self.bytes)).then_some(DecodedBar {
            index: self.index,
            base,
            bytes: self.bytes,
        })
    }
}

/// The low window has no room for another BAR.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("no room for a BAR of {bytes} bytes in the PCI window")]
pub struct WindowFull {
    /// Size of the BAR.
    pub bytes: u64,
}

/// Gives out addresses in the low window, upwards, each aligned to its BAR's size.
#[derive(Debug)]
pub struct BarAllocator {
    windows: Windows,
    next: u64,
}

impl BarAllocator {
    /// Nothing is given out yet.
    pub fn new(windows: Windows) -> Self {
        let next = windows.low.start;
        Self { windows, next }
    }

    /// The windows, for [`Bar::decoded`].
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// An address for `bytes`, a power of two.
    ///
    /// # Errors
    /// When the window is full.
    pub fn allocate(&mut self, bytes: u64) -> Result<u64, WindowFull> {
        let start = self.next.next_multiple_of(bytes);
        if bytes > self.windows.low.end.saturating_sub(start) {
            return Err(WindowFull { bytes });
        }
        self.next = start + bytes;
        Ok(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::config::FunctionIdentity;

    const WINDOWS: Windows = Windows {
        low: 0xc000_0000..0xe000_0000,
        high: 0x1_0000_0000..0x2_0000_0000,
    };

    fn config() -> ConfigSpace {
        ConfigSpace::new(FunctionIdentity {
            vendor: 1,
            device: 2,
            revision: 3,
            class: [0; 3],
            subsystem_vendor: 0,
            subsystem: 0,
        })
    }

    #[test]
    fn a_32_bit_bar_can_be_sized_and_moved() {
        let mut config = config();
        let bar = Bar {
            index: 1,
            bytes: 0x1000,
            width: BarWidth::Bits32,
        };
        bar.define(&mut config, 0xc000_1000);
        config.write(0x14, &[0xff; 4]);
        assert_eq!(config.u32_at(0x14), 0xffff_f000);
        assert_eq!(
            bar.decoded(&config, &WINDOWS),
            None,
            "the end of the address space is no window"
        );
        config.write(0x14, &0xd000_0004_u32.to_le_bytes());
        assert_eq!(config.u32_at(0x14), 0xd000_0000);
        assert_eq!(bar.decoded(&config, &WINDOWS).unwrap().base, 0xd000_0000);
        config.write(0x04, &[0]);
        assert_eq!(bar.decoded(&config, &WINDOWS), None, "memory decoding is off");
        config.reset();
        assert_eq!(bar.decoded(&config, &WINDOWS).unwrap().base, 0xc000_1000);
    }

    #[test]
    fn a_64_bit_bar_can_be_sized_and_moved() {
        let mut config = config();
        let bar = Bar {
            index: 0,
            bytes: 0x8000,
            width: BarWidth::Bits64,
        };
        bar.define(&mut config, 0xc000_8000);
        config.write(0x10, &[0xff; 8]);
        assert_eq!((config.u32_at(0x10), config.u32_at(0x14)), (0xffff_8004, 0xffff_ffff));
        config.write(0x14, &1_u32.to_le_bytes());
        config.write(0x10, &0x4000_0000_u32.to_le_bytes());
        assert_eq!(bar.decoded(&config, &WINDOWS).unwrap().base, 0x1_4000_0000);
    }

    #[test]
    fn only_bars_wholly_inside_a_window_answer() {
        for (start, bytes, inside) in [
            (0xc000_0000, 0x1000, true),
            (0xdfff_f000, 0x1000, true),
            (0xdfff_f000, 0x2000, false),
            (0xbfff_f000, 0x2000, false),
            (0xfee0_0000, 0x1000, false),
            (0, 0x1000, false),
            (u64::MAX - 0xfff, 0x1000, false),
            (u64::MAX, 0x1000, false),
        ] {
            assert_eq!(WINDOWS.contain(start, bytes), inside, "{start:#x}");
        }
    }

    #[test]
    fn addresses_are_aligned_and_end_with_the_window() {
        let mut allocator = BarAllocator::new(Windows {
            low: 0xc000_0000..0xc001_0000,
            ..WINDOWS
        });
        assert_eq!(allocator.allocate(0x1000), Ok(0xc000_0000));
        assert_eq!(allocator.allocate(0x8000), Ok(0xc000_8000));
        assert_eq!(allocator.allocate(0x10), Err(WindowFull { bytes: 0x10 }));
    }
}
