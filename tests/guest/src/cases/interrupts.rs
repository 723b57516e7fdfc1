//! MSI-X beyond the ordinary: masks, pending interrupts, other vectors, and the configuration's own interrupt.

use super::blk::{device, options};
use crate::blk::{Disk, Mode, Request, kind, status};
use crate::clock::{self, Deadline};
use crate::failure::{Outcome, ensure, equal};
use crate::script::Arguments;
use crate::virtio::Transport;
use crate::virtio_pci::{Device, FIRST_VECTOR};
use crate::{alloc, lapic, println, tables};

/// A vector that no device uses otherwise.
const OTHER_VECTOR: u8 = 0x4a;
/// How long an interrupt that should not come is waited for.
const QUIET_US: u64 = 20_000;

/// Finishes a read without looking at interrupts; they may come or not.
fn read(disk: &mut Disk) -> Outcome {
    let queue = disk.queue(0);
    let data = alloc::pages(512).part(0, 512);
    queue.ring().arm_interrupt();
    queue.submit(&Request {
        kind: kind::IN,
        sector: 0,
        data: &[data],
    });
    queue.kick();
    let deadline = Deadline::after_ms(20_000);
    loop {
        if let Some(finished) = queue.collect() {
            return equal("status of a read", finished.status, status::OK);
        }
        ensure(!deadline.passed(), "request does not finish")?;
    }
}

/// A read whose interrupt has to be held back until `unmask`, and then has to come once.
fn held_back(disk: &mut Disk, entry: u16, vector: u8, mask: impl Fn(&Device, bool)) -> Outcome {
    let device = disk.device;
    let seen = tables::interrupts(vector);
    mask(&device, true);
    read(disk)?;
    ensure(!lapic::wait(vector, seen, QUIET_US / 1000), "interrupt although masked")?;
    ensure(device.pending(entry), "masked interrupt is not shown as pending")?;
    mask(&device, false);
    ensure(lapic::wait(vector, seen, 10_000), "no interrupt after unmasking")?;
    lapic::wait(vector, seen + 1, QUIET_US / 1000);
    equal("interrupts after unmasking", tables::interrupts(vector), seen + 1)?;
    ensure(!device.pending(entry), "interrupt is still pending after it came")
}

/// Masks entries one by one and all at once, and moves an entry to another vector.
pub fn msix(arguments: Arguments<'_>) -> Outcome {
    let mark = alloc::mark();
    let mut disk = Disk::start(device(arguments)?, options(arguments, Mode::Interrupts)?)?;
    let device = disk.device;
    let entry = device.queue_entry(0);
    let vector = FIRST_VECTOR + entry as u8;
    // A device may interrupt once more than needed when it starts: let that pass.
    read(&mut disk)?;
    clock::pause_us(QUIET_US);
    lapic::wait(OTHER_VECTOR, tables::interrupts(OTHER_VECTOR), 1);
    held_back(&mut disk, entry, vector, |device, masked| device.mask(entry, masked))?;
    held_back(&mut disk, entry, vector, |device, masked| device.mask_all(masked))?;
    let (old, new) = (tables::interrupts(vector), tables::interrupts(OTHER_VECTOR));
    device.mask(entry, true);
    device.route(entry, OTHER_VECTOR);
    device.mask(entry, false);
    read(&mut disk)?;
    ensure(lapic::wait(OTHER_VECTOR, new, 10_000), "no interrupt by the new vector")?;
    equal("interrupts by the old vector", tables::interrupts(vector), old)?;
    held_back(&mut disk, entry, OTHER_VECTOR, |device, masked| {
        device.mask(entry, masked)
    })?;
    println!("msix vectors={} entry={entry}", device.vectors);
    device.reset()?;
    alloc::release(&mark);
    Ok(())
}

/// Waits until the host changes the disk's size, `ms` milliseconds at most, and prints the new one.
pub fn resize(arguments: Arguments<'_>) -> Outcome {
    let timeout_ms = arguments.number("ms", 60_000)?;
    let mark = alloc::mark();
    let disk = Disk::start(device(arguments)?, options(arguments, Mode::Interrupts)?)?;
    let seen = tables::interrupts(FIRST_VECTOR);
    println!(
        "blk-resize waiting sectors={} generation={}",
        disk.sectors,
        disk.device.generation()
    );
    ensure(
        lapic::wait(FIRST_VECTOR, seen, timeout_ms),
        "no configuration interrupt",
    )?;
    clock::pause_us(1000);
    let sectors = disk.device.config64(0);
    println!("blk-resize sectors={sectors} generation={}", disk.device.generation());
    ensure(sectors != disk.sectors, "the size is the same")?;
    disk.device.reset()?;
    alloc::release(&mark);
    Ok(())
}
