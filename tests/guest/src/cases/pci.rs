//! PCI: both ways to configuration space agree, registers can be sized and moved.

use crate::blk::DEVICE_TYPE;
use crate::failure::{Outcome, ensure, equal, failure};
use crate::pci::{Access, functions, reserve, reserve_from};
use crate::virtio::Transport;
use crate::virtio_pci::{Device, find};
use crate::{println, tables};

/// Where a register is moved to: free on every machine that the guest knows.
const ELSEWHERE: u64 = 0xd000_0000;

/// Lists bus 0 by ports and by memory.
pub fn discover() -> Outcome {
    let memory = Access::memory()?.ok_or(failure("no MCFG"))?;
    let mut count = 0_u64;
    for (by_port, by_memory) in functions(Access::Ports).zip(functions(memory)) {
        equal("slots differ", by_memory.slot, by_port.slot)?;
        equal("functions differ", by_memory.number, by_port.number)?;
        for register in (0..64).step_by(4) {
            equal(
                "configuration differs",
                by_memory.read::<u32>(register),
                by_port.read::<u32>(register),
            )?;
        }
        for register in 0..16 {
            let word = by_port.read::<u32>(register & 12);
            let byte = (word >> (8 * (register & 3))) as u8;
            equal("byte by port differs", by_port.read::<u8>(register), byte)?;
            equal("byte by memory differs", by_memory.read::<u8>(register), byte)?;
            if register % 2 == 0 {
                let half = (word >> (8 * (register & 2))) as u16;
                equal("half by port differs", by_port.read::<u16>(register), half)?;
                equal("half by memory differs", by_memory.read::<u16>(register), half)?;
            }
        }
        println!(
            "pci slot={} function={} id={:04x}:{:04x} class={:08x}",
            by_port.slot,
            by_port.number,
            by_port.vendor(),
            by_port.device(),
            by_port.class()
        );
        let mut index = 0;
        while index < 6 && by_port.read::<u8>(0x0e) & 0x7f == 0 {
            let Some(bar) = by_memory.bar(index) else {
                index += 1;
                continue;
            };
            println!(
                "pci bar={index} address={:#x} bytes={:#x} wide={}",
                bar.address, bar.bytes, bar.wide
            );
            ensure(bar.bytes.is_power_of_two(), "BAR size")?;
            ensure(bar.address % bar.bytes == 0, "BAR alignment")?;
            index += if bar.wide { 2 } else { 1 };
        }
        count += 1;
    }
    equal("functions by memory", functions(memory).count() as u64, count)?;
    equal("functions by ports", functions(Access::Ports).count() as u64, count)
}

/// Moves every memory register of the first virtio-blk device, finds its structures there, and moves them back.
pub fn relocate() -> Outcome {
    let function = find(Access::Ports, DEVICE_TYPE)
        .next()
        .ok_or(failure("no virtio-blk device"))?;
    let before = Device::new(function)?;
    let (offered, capacity) = (before.offered(), before.config64(0));
    reserve_from(ELSEWHERE);
    let mut moved = [None; 6];
    let mut index = 0;
    while index < 6 {
        let Some(mut bar) = function.bar(index) else {
            index += 1;
            continue;
        };
        moved[usize::from(index)] = Some(bar);
        let target = reserve(bar.bytes)?;
        println!(
            "pci-move bar={index} from={:#x} to={target:#x} bytes={:#x}",
            bar.address, bar.bytes
        );
        function.place_bar(&mut bar, target);
        index += if bar.wide { 2 } else { 1 };
    }
    let there = Device::new(function)?;
    equal("features at the new address", there.offered(), offered)?;
    equal("capacity at the new address", there.config64(0), capacity)?;
    there.reset()?;
    crate::cases::blk::short(there)?;
    for mut bar in moved.into_iter().flatten() {
        let home = bar.address;
        function.place_bar(&mut bar, home);
        tables::map(home, bar.bytes);
    }
    let back = Device::new(function)?;
    equal("features at the old address", back.offered(), offered)?;
    crate::cases::blk::short(back)?;
    if let Some((bar, offset)) = back.common_place() {
        // Device feature select is register 0 of the common structure; `offered` left 1 there.
        back.offered();
        match back.read_through_window(bar, offset) {
            Some(value) => equal("configuration space window", value, 1_u8)?,
            None => println!("pci-move no window capability"),
        }
    }
    Ok(())
}
