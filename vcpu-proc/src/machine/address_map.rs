//! Which device answers where, for people and programs that ask.

use crate::layout::{
    ACPI_PORT, ACPI_PORTS, ECAM_BASE, ECAM_BYTES, FW_CFG_PORT, FW_CFG_PORTS, I8042_PORT, I8042_PORTS, IOAPIC_BASE,
    LAPIC_BASE, PVPANIC_PORT, RTC_PORT, SERIAL_PORT,
};
use crate::pci::bar::DecodedBar;
use ipc::human::{AddressMap, AddressRange};
use ipc::memory::{PAGE_BYTES, ram_regions};

/// First port of PCI's configuration cycles, and how many.
const PCI_CONFIG: (u64, u64) = (0xcf8, 8);
/// Ports of the interrupt controllers that KVM has.
const INTERRUPT_CONTROLLERS: [(u64, u64, &str); 3] = [(0x20, 2, "pic"), (0xa0, 2, "pic"), (0x4d0, 2, "elcr")];

/// What a machine may lack.
#[derive(Debug, Clone, Copy)]
pub struct Board {
    /// The serial port.
    pub serial: bool,
    /// fw_cfg.
    pub fw_cfg: bool,
}

/// The map of a machine. Of BARs that the guest has laid over each other, the lowest slot has the range that both want.
pub fn address_map(ram_bytes: u64, board: Board, bars: &[(usize, DecodedBar)]) -> AddressMap {
    let mut memory: Vec<_> = ram_regions(ram_bytes)
        .into_iter()
        .map(|region| AddressRange {
            first: region.guest_address,
            last: region.guest_address + (region.bytes - 1),
            is_ram: true,
            name: "ram".to_owned(),
            offset: region.offset,
        })
        .collect();
    for (base, bytes, name) in [
        (ECAM_BASE, ECAM_BYTES, "pcie-mmcfg"),
        (IOAPIC_BASE, PAGE_BYTES, "ioapic"),
        (LAPIC_BASE, PAGE_BYTES, "apic"),
    ] {
        memory.push(device(base, bytes, name.to_owned()));
    }
    let mut bars = bars.to_vec();
    bars.sort_by_key(|(slot, bar)| (*slot, bar.index));
    for (slot, bar) in bars {
        let range = device(bar.base, bar.bytes, format!("pci-{slot}-bar-{}", bar.index));
        lay_under(&mut memory, range);
    }
    memory.sort_by_key(|range| range.first);

    let mut ports: Vec<_> = INTERRUPT_CONTROLLERS
        .into_iter()
        .chain([
            (I8042_PORT, I8042_PORTS, "i8042"),
            (RTC_PORT, 2, "rtc"),
            (PVPANIC_PORT, 1, "pvpanic"),
            (ACPI_PORT, ACPI_PORTS, "acpi"),
            (PCI_CONFIG.0, PCI_CONFIG.1, "pci-conf"),
        ])
        .chain(board.serial.then_some((SERIAL_PORT, 8, "serial")))
        .chain(board.fw_cfg.then_some((FW_CFG_PORT, FW_CFG_PORTS, "fwcfg")))
        .map(|(base, count, name)| device(base, count, name.to_owned()))
        .collect();
    ports.sort_by_key(|range| range.first);
    AddressMap { memory, ports }
}

fn device(base: u64, bytes: u64, name: String) -> AddressRange {
    AddressRange {
        first: base,
        last: base + (bytes - 1),
        is_ram: false,
        name,
        offset: 0,
    }
}

/// Adds the parts of a range that nothing has yet.
fn lay_under(ranges: &mut Vec<AddressRange>, range: AddressRange) {
    let mut parts = vec![range];
    for taken in ranges.iter() {
        parts = parts.into_iter().flat_map(|part| without(part, taken)).collect();
    }
    ranges.extend(parts);
}

/// What of a range lies outside of another.
fn without(range: AddressRange, taken: &AddressRange) -> Vec<AddressRange> {
    if range.last < taken.first || range.first > taken.last {
        return vec![range];
    }
    let mut parts = Vec::new();
    if range.first < taken.first {
        parts.push(AddressRange {
            last: taken.first - 1,
            ..range.clone()
        });
    }
    if range.last > taken.last {
        parts.push(AddressRange {
            first: taken.last + 1,
            offset: range.offset + (taken.last + 1 - range.first),
            ..range
        });
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn bar(base: u64, bytes: u64) -> DecodedBar {
        DecodedBar { index: 0, base, bytes }
    }

    #[test]
    fn ranges_are_in_order_and_do_not_overlap_however_the_guest_lays_its_bars() {
        let bars = [
            (2, bar(0xc000_0000, 0x4000)),
            (1, bar(0xc000_1000, 0x1000)),
            (3, bar(8 * GIB, 0x1000)),
            (4, bar(0xc000_1000, 0x1000)),
        ];
        let board = Board {
            serial: true,
            fw_cfg: true,
        };
        let map = address_map(5 * GIB, board, &bars);
        for ranges in [&map.memory, &map.ports] {
            assert!(ranges.iter().all(|range| range.first <= range.last));
            assert!(
                ranges.windows(2).all(|pair| pair[0].last < pair[1].first),
                "{ranges:#x?}"
            );
        }
        let named = |name: &str| -> Vec<_> {
            let found = map.memory.iter().filter(|range| range.name == name);
            found.map(|range| (range.first, range.last, range.offset)).collect()
        };
        assert_eq!(named("ram"), [(0, 3 * GIB - 1, 0), (4 * GIB, 6 * GIB - 1, 3 * GIB)]);
        assert_eq!(named("pci-1-bar-0"), [(0xc000_1000, 0xc000_1fff, 0)]);
        assert_eq!(
            named("pci-2-bar-0"),
            [(0xc000_0000, 0xc000_0fff, 0), (0xc000_2000, 0xc000_3fff, 0x2000)]
        );
        assert_eq!(named("pci-4-bar-0"), []);
    }
}
