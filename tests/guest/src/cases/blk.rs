//! Everything a virtio-blk device has to do, in every combination of ring features and ways to wait.

use crate::blk::{DEVICE_TYPE, Disk, Mode, Options, Request, SECTOR_BYTES, feature, kind, status};
use crate::failure::{Failure, Outcome, ensure, equal, failure};
use crate::pattern;
use crate::pci::Access;
use crate::region::Region;
use crate::script::Arguments;
use crate::virtio::Transport;
use crate::virtio_pci::{Device, FIRST_VECTOR, find};
use crate::{alloc, println, start_info, tables};

/// The part of the disk that the test writes.
const AREA_SECTORS: u64 = 16384;
/// Requests at once on each queue.
const DEPTH: usize = 4;
/// A request's data: so many blocks of so many bytes.
const BLOCK_BYTES: u64 = 4096;
const MAX_BLOCKS: u64 = 4;
/// Flag of discard and write zeroes: deallocate.
const UNMAP: u32 = 1;

/// The disk that the arguments name by `dev=N`, the first without.
pub fn device(arguments: Arguments<'_>) -> Result<Device, Failure> {
    let access = match arguments.text("access") {
        Some("ecam") => Access::memory()?.ok_or(failure("no MCFG"))?,
        _ => Access::Ports,
    };
    let number = arguments.number("dev", 0)? as usize;
    Device::new(
        find(access, DEVICE_TYPE)
            .nth(number)
            .ok_or(failure("no such virtio-blk device"))?,
    )
}

/// The options that the arguments name: `queues=`, `size=`, `mode=poll|irq`, `indirect=0|1`, `event=0|1`.
pub fn options(arguments: Arguments<'_>, mode: Mode) -> Result<Options, Failure> {
    Ok(Options {
        queues: arguments.number("queues", 4)? as usize,
        queue_size: arguments.number("size", 256)? as u16,
        mode: match arguments.text("mode") {
            Some("poll") => Mode::Polling,
            Some("irq") => Mode::Interrupts,
            _ => mode,
        },
        indirect: arguments.number("indirect", 1)? != 0,
        event_index: arguments.number("event", 1)? != 0,
    })
}

/// Runs all requests in all combinations; every combination begins with a reset of the device.
pub fn run(arguments: Arguments<'_>) -> Outcome {
    let device = device(arguments)?;
    let mut wanted = options(arguments, Mode::Interrupts)?;
    let mark = alloc::mark();
    let mut disk = Disk::start(device, wanted)?;
    println!(
        "blk slot={} sectors={} queues={} offered={:#x} features={:#x} ro={} segments={} block={} vectors={}",
        device.function.slot,
        disk.sectors,
        disk.queues(),
        disk.offered,
        disk.features,
        u8::from(disk.read_only()),
        disk.segments,
        disk.block_bytes(),
        device.vectors,
    );
    if arguments.text("queues").is_some() {
        equal("queues", disk.queues() as u64, wanted.queues as u64)?;
    }
    print_id(&mut disk)?;
    device.reset()?;
    let mut round = 0_u64;
    for mode in [Mode::Interrupts, Mode::Polling] {
        for (indirect, event_index) in [(true, true), (true, false), (false, true), (false, false)] {
            alloc::release(&mark);
            wanted = Options {
                mode,
                indirect,
                event_index,
                ..wanted
            };
            round += 1;
            let mut disk = Disk::start(device, wanted)?;
            let before = interrupts(disk.queues());
            exercise(&mut disk, round).inspect_err(|_| println!("blk failing options={wanted:?}"))?;
            let count = interrupts(disk.queues()) - before;
            let kicks: u64 = (0..disk.queues()).map(|index| disk.queue(index).kicks()).sum();
            println!(
                "blk round={round} mode={mode:?} indirect={} event_index={} interrupts={count} kicks={kicks}",
                disk.has(feature::INDIRECT),
                disk.has(feature::EVENT_INDEX),
            );
            match mode {
                Mode::Interrupts => ensure(count > 0, "no interrupts")?,
                Mode::Polling if disk.has(feature::EVENT_INDEX) => {
                    equal("interrupts although none were wanted", count, 0_u8)?;
                }
                Mode::Polling => {}
            }
        }
    }
    device.reset()?;
    alloc::release(&mark);
    Ok(())
}

/// One write and one read on every queue.
pub fn short(device: Device) -> Outcome {
    let mark = alloc::mark();
    let mut disk = Disk::start(
        device,
        Options {
            queues: 4,
            queue_size: 64,
            mode: Mode::Interrupts,
            indirect: true,
            event_index: true,
        },
    )?;
    write_and_read(&mut disk, 99)?;
    device.reset()?;
    alloc::release(&mark);
    Ok(())
}

fn interrupts(queues: usize) -> u64 {
    (1..=queues as u8)
        .map(|entry| tables::interrupts(FIRST_VECTOR + entry))
        .sum()
}

fn print_id(disk: &mut Disk) -> Outcome {
    let buffer = alloc::pages(4096).part(0, 20);
    let result = disk.run(
        0,
        &Request {
            kind: kind::GET_ID,
            sector: 0,
            data: &[buffer],
        },
    )?;
    equal("status of get-id", result, status::OK)?;
    let mut id = [0; 20];
    buffer.copy_to(&mut id);
    let length = id.iter().position(|byte| *byte == 0).unwrap_or(id.len());
    println!("blk id={}", core::str::from_utf8(&id[..length]).unwrap_or("?"));
    Ok(())
}

fn exercise(disk: &mut Disk, round: u64) -> Outcome {
    let buffer = alloc::pages(BLOCK_BYTES);
    ensure(
        disk.sectors >= 2 * BLOCK_BYTES / SECTOR_BYTES,
        "the disk is too small for the test",
    )?;
    if disk.read_only() {
        refuses_writes(disk, buffer)?;
    } else {
        write_and_read(disk, round)?;
        if disk.has(feature::FLUSH) {
            for queue in 0..disk.queues() {
                let result = disk.run(
                    queue,
                    &Request {
                        kind: kind::FLUSH,
                        sector: 0,
                        data: &[],
                    },
                )?;
                equal("status of flush", result, status::OK)?;
            }
        }
        if disk.has(feature::WRITE_ZEROES) {
            zeroes(disk, buffer, 0)?;
            zeroes(disk, buffer, UNMAP)?;
        }
        if disk.has(feature::DISCARD) {
            discards(disk, buffer)?;
        }
    }
    for queue in 0..disk.queues() {
        let result = disk.run(
            queue,
            &Request {
                kind: 0x7654,
                sector: 0,
                data: &[buffer],
            },
        )?;
        equal("status of an unknown request", result, status::UNSUPPORTED)?;
    }
    outside(disk, buffer)
}

/// Memory for data: alternately below and above 4 GiB, where the machine has some there.
fn data_memory(bytes: u64) -> (Region, Region) {
    let low = alloc::pages(bytes);
    let high = start_info::ram().find(|(start, length)| *start >= 1 << 32 && *length >= bytes);
    let other = match high {
        Some((start, _)) => {
            tables::map(start, bytes);
            Region::new(start, bytes)
        }
        None => alloc::pages(bytes),
    };
    (low, other)
}

/// Writes different data through all queues at once, then reads it back through other queues than it was written by.
fn write_and_read(disk: &mut Disk, round: u64) -> Outcome {
    let request_bytes = MAX_BLOCKS * BLOCK_BYTES;
    let total = request_bytes * (disk.queues() * DEPTH) as u64;
    let (written, read) = data_memory(total);
    let area = AREA_SECTORS.min(disk.sectors) * SECTOR_BYTES;
    let rotate = (round as usize) % disk.queues();
    for (request_kind, memory, shift) in [(kind::OUT, written, 0), (kind::IN, read, rotate)] {
        memory.fill(0xa5);
        if request_kind == kind::OUT {
            for index in 0..total / 8 {
                memory.write(8 * index, pattern::word(round, index));
            }
        }
        let mut expected = [[0_u32; 256]; crate::blk::MAX_QUEUES];
        for number in 0..disk.queues() * DEPTH {
            let place = number as u64 * request_bytes;
            let blocks = 1 + (number as u64 + round) % MAX_BLOCKS;
            let data = memory.part(place, blocks * BLOCK_BYTES);
            let mut segments = [data; MAX_BLOCKS as usize];
            let parts = (blocks as usize).min(disk.segments);
            for (part, segment) in segments.iter_mut().enumerate().take(parts) {
                let start = part as u64 * BLOCK_BYTES;
                let end = if part + 1 == parts {
                    data.bytes()
                } else {
                    start + BLOCK_BYTES
                };
                *segment = data.part(start, end - start);
            }
            let queue = (number + shift) % disk.queues();
            let slot = disk.queue(queue).submit(&Request {
                kind: request_kind,
                sector: place % (area - request_bytes + SECTOR_BYTES) / SECTOR_BYTES,
                data: &segments[..parts],
            });
            let slot = slot.ok_or(failure("queue is full"))?;
            let reads = if request_kind == kind::IN {
                data.bytes() as u32
            } else {
                0
            };
            expected[queue][usize::from(slot)] = reads + 1;
            if disk.queue(queue).ring().free_slots() == 0 {
                break;
            }
        }
        for queue in 0..disk.queues() {
            disk.queue(queue).kick();
        }
        for (queue, expected) in expected.iter().enumerate().take(disk.queues()) {
            while !disk.queue(queue).is_idle() {
                let finished = disk.queue(queue).wait()?;
                equal("status of a read or write", finished.status, status::OK)?;
                equal(
                    "bytes written by the device",
                    finished.written,
                    expected[usize::from(finished.slot)],
                )?;
            }
        }
    }
    for number in 0..(disk.queues() * DEPTH) as u64 {
        let blocks = 1 + (number + round) % MAX_BLOCKS;
        let start = number * request_bytes;
        for place in (start..start + blocks * BLOCK_BYTES).step_by(8) {
            equal("data read back", read.read::<u64>(place), written.read::<u64>(place))?;
        }
        if blocks < MAX_BLOCKS {
            let behind = read.read::<u64>(start + blocks * BLOCK_BYTES);
            equal("data behind a request's buffer", behind, 0xa5a5_a5a5_a5a5_a5a5_u64)?;
        }
    }
    Ok(())
}

/// The data of discard and write zeroes.
fn range(sector: u64, sectors: u32, flags: u32) -> Region {
    let range = alloc::pages(16);
    range.write(0, sector);
    range.write(8, u64::from(sectors) | u64::from(flags) << 32);
    range.part(0, 16)
}

fn transfer(disk: &mut Disk, request_kind: u32, sector: u64, buffer: Region) -> Outcome {
    let result = disk.run(
        0,
        &Request {
            kind: request_kind,
            sector,
            data: &[buffer],
        },
    )?;
    equal("status of a read or write", result, status::OK)
}

/// Zeroes one sector between two others.
fn zeroes(disk: &mut Disk, buffer: Region, flags: u32) -> Outcome {
    buffer.fill(0x5a);
    transfer(disk, kind::OUT, 8, buffer)?;
    let queue = disk.queues() - 1;
    let result = disk.run(
        queue,
        &Request {
            kind: kind::WRITE_ZEROES,
            sector: 0,
            data: &[range(9, 1, flags)],
        },
    )?;
    equal("status of write-zeroes", result, status::OK)?;
    buffer.fill(0xff);
    transfer(disk, kind::IN, 8, buffer)?;
    for place in (0..buffer.bytes()).step_by(8) {
        let want = if (512..1024).contains(&place) {
            0_u64
        } else {
            0x5a5a_5a5a_5a5a_5a5a
        };
        equal("data after write-zeroes", buffer.read::<u64>(place), want)?;
    }
    let result = disk.run(
        queue,
        &Request {
            kind: kind::WRITE_ZEROES,
            sector: 0,
            data: &[range(disk.sectors, 1, flags)],
        },
    )?;
    equal("status of write-zeroes outside", result, status::IO_ERROR)?;
    let result = disk.run(
        queue,
        &Request {
            kind: kind::WRITE_ZEROES,
            sector: 0,
            data: &[range(8, 1, 0x8000_0000)],
        },
    )?;
    equal(
        "status of write-zeroes with a reserved flag",
        result,
        status::UNSUPPORTED,
    )
}

/// Discards, and is refused what the specification forbids.
fn discards(disk: &mut Disk, buffer: Region) -> Outcome {
    for (sector, flags, want) in [
        (64, 0, status::OK),
        (64, UNMAP, status::UNSUPPORTED),
        (disk.sectors, 0, status::IO_ERROR),
    ] {
        let result = disk.run(
            0,
            &Request {
                kind: kind::DISCARD,
                sector: 0,
                data: &[range(sector, 8, flags)],
            },
        )?;
        equal("status of discard", result, want)?;
    }
    // Whatever is there now, it can be read.
    transfer(disk, kind::IN, 64, buffer)
}

/// Requests outside of the disk fail and leave the queue in order.
fn outside(disk: &mut Disk, buffer: Region) -> Outcome {
    for sector in [disk.sectors, disk.sectors - 1, u64::MAX, u64::MAX / 512, 1 << 55] {
        for request_kind in [kind::IN, kind::OUT] {
            let result = disk.run(
                0,
                &Request {
                    kind: request_kind,
                    sector,
                    data: &[buffer],
                },
            )?;
            equal("status of a request outside of the disk", result, status::IO_ERROR)?;
        }
    }
    let last = disk.sectors - buffer.bytes() / SECTOR_BYTES;
    transfer(disk, kind::IN, last, buffer)
}

/// A read-only disk refuses writes and keeps its data.
fn refuses_writes(disk: &mut Disk, buffer: Region) -> Outcome {
    transfer(disk, kind::IN, 0, buffer)?;
    let before: u64 = buffer.read(0);
    buffer.write(0, !before);
    for queue in 0..disk.queues() {
        let result = disk.run(
            queue,
            &Request {
                kind: kind::OUT,
                sector: 0,
                data: &[buffer],
            },
        )?;
        equal("status of a write to a read-only disk", result, status::IO_ERROR)?;
    }
    transfer(disk, kind::IN, 0, buffer)?;
    equal("data of a read-only disk", buffer.read::<u64>(0), before)
}
