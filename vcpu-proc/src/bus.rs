//! Which device answers at which port or guest physical address.

use std::sync::{Arc, Mutex, PoisonError};

/// A device as the bus sees it. Calls come from vCPU threads, under the device's own lock, and must not block: a vCPU
/// that waits here cannot be paused.
pub trait BusDevice: Send {
    /// Reads `data.len()` bytes (1, 2, 4 or 8) at `base + offset`, where `base` is the start of the range that was hit:
    /// it tells apart the several ranges of one device. `data` comes filled with ones, the answer of an empty bus.
    fn read(&mut self, base: u64, offset: u64, data: &mut [u8]);
    /// Writes `data` (1, 2, 4 or 8 bytes) at `base + offset`.
    fn write(&mut self, base: u64, offset: u64, data: &[u8]);
    /// Back to the state after power-on. All vCPUs are parked.
    fn reset(&mut self);
}

/// A device shared between the bus, the vCPU threads and its owner.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Why a range cannot be added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// No bytes, or past the end of the address space.
    #[error("the range {base:#x}+{length:#x} is empty or wraps")]
    Range {
        /// Start.
        base: u64,
        /// Bytes.
        length: u64,
    },
    /// Another device is there.
    #[error("the range {base:#x}+{length:#x} overlaps that at {other:#x}")]
    Overlap {
        /// Start.
        base: u64,
        /// Bytes.
        length: u64,
        /// Start of the range that is already there.
        other: u64,
    },
}

struct Range {
    base: u64,
    length: u64,
    device: SharedDevice,
}

/// The ranges of one address space (ports, or guest physical memory), in ascending order. Built during set-up and then
/// shared read-only between the vCPU threads, so that looking up takes no lock.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

impl Bus {
    /// Adds a range.
    ///
    /// # Errors
    /// When it is empty, wraps around or overlaps another.
    pub fn insert(&mut self, base: u64, length: u64, device: SharedDevice) -> Result<(), BusError> {
        if length == 0 || base.checked_add(length - 1).is_none() {
            return Err(BusError::Range { base, length });
        }
        let index = self.ranges.partition_point(|range| range.base < base);
        let last = base + (length - 1);
        let before = index.checked_sub(1).map(|i| &self.ranges[i]);
        let overlapped = match (before, self.ranges.get(index)) {
            (Some(before), _) if before.base + (before.length - 1) >= base => Some(before.base),
            (_, Some(after)) if after.base <= last => Some(after.base),
            _ => None,
        };
        if let Some(other) = overlapped {
            return Err(BusError::Overlap { base, length, other });
        }
        self.ranges.insert(index, Range { base, length, device });
        Ok(())
    }

    /// Reads. Returns `false`, and all ones, where nothing answers.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((range, offset)) = self.find(address, data.len()) else {
            return false;
        };
        let mut device = range.device.lock().unwrap_or_else(PoisonError::into_inner);
        device.read(range.base, offset, data);
        true
    }

    /// Writes. Returns `false` where nothing answers.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((range, offset)) = self.find(address, data.len()) else {
            return false;
        };
        let mut device = range.device.lock().unwrap_or_else(PoisonError::into_inner);
        device.write(range.base, offset, data);
        true
    }

    /// The range that holds all `length` bytes at `address`.
    fn find(&self, address: u64, length: usize) -> Option<(&Range, u64)> {
        let index = self.ranges.partition_point(|range| range.base <= address);
        let range = &self.ranges[index.checked_sub(1)?];
        let offset = address - range.base;
        let end = offset.checked_add(u64::try_from(length).ok()?)?;
        (end <= range.length).then_some((range, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers every byte with its number and keeps the last write.
    struct Probe(u8, Option<(u64, u64, Vec<u8>)>);
    impl BusDevice for Probe {
        fn read(&mut self, _base: u64, _offset: u64, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write(&mut self, base: u64, offset: u64, data: &[u8]) {
            self.1 = Some((base, offset, data.to_vec()));
        }
        fn reset(&mut self) {}
    }
    fn probe(number: u8) -> Arc<Mutex<Probe>> {
        Arc::new(Mutex::new(Probe(number, None)))
    }

    #[test]
    fn accesses_reach_the_device_whose_range_holds_them() {
        let mut bus = Bus::default();
        let first = probe(1);
        bus.insert(0x3f8, 8, first.clone()).unwrap();
        bus.insert(0x70, 2, probe(2)).unwrap();
        bus.insert(0x400, 1, probe(3)).unwrap();
        for (address, length, answer) in [
            (0x3f8, 1, Some(1)),
            (0x3ff, 1, Some(1)),
            (0x70, 2, Some(2)),
            (0x400, 1, Some(3)),
            (0x3f7, 1, None),
            (0x401, 1, None),
            (0x0, 1, None),
            // Straddles the end of a range.
            (0x71, 2, None),
            (u64::MAX, 8, None),
        ] {
            let mut data = vec![0; length];
            assert_eq!(bus.read(address, &mut data), answer.is_some(), "{address:#x}");
            assert_eq!(data, vec![answer.unwrap_or(0xff); length], "{address:#x}");
        }
        assert!(bus.write(0x3f9, &[7]));
        assert_eq!(first.lock().unwrap().1, Some((0x3f8, 1, vec![7])));
        assert!(!bus.write(0x500, &[7]));
    }

    #[test]
    fn ranges_that_overlap_or_wrap_are_refused() {
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, probe(1)).unwrap();
        for (base, length) in [(0x100, 1), (0xff, 2), (0x10f, 1), (0, 0x1000)] {
            assert_eq!(
                bus.insert(base, length, probe(2)),
                Err(BusError::Overlap {
                    base,
                    length,
                    other: 0x100
                })
            );
        }
        for (base, length) in [(5, 0), (u64::MAX, 2)] {
            assert_eq!(
                bus.insert(base, length, probe(2)),
                Err(BusError::Range { base, length })
            );
        }
        bus.insert(0x110, 1, probe(3)).unwrap();
        bus.insert(u64::MAX, 1, probe(4)).unwrap();
    }
}
