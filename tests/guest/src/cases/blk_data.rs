//! Data that the host checks afterwards: a known pattern, and a log that survives kills.

use super::blk::{device, options};
use crate::blk::{Disk, Mode, Request, SECTOR_BYTES, feature, kind, status};
use crate::failure::{Outcome, ensure, equal, failure};
use crate::pattern::{self, Checksum};
use crate::script::Arguments;
use crate::virtio::Transport;
use crate::{alloc, clock, cpu, println};

/// Bytes of one request.
const REQUEST_BYTES: u64 = 64 << 10;
/// Requests under way at once, over all queues.
const REQUESTS: u64 = 32;
/// First word of a log record.
pub const RECORD_MAGIC: u64 = u64::from_le_bytes(*b"BHGRECRD");

/// `mib=64 seed=1`: writes a pattern through all queues, flushes, reads it back; `write=0` only reads. Prints the
/// checksum of what was read.
pub fn verify(arguments: Arguments<'_>) -> Outcome {
    let (mib, seed) = (arguments.number("mib", 64)?, arguments.number("seed", 1)?);
    let write = arguments.number("write", 1)? != 0;
    let mark = alloc::mark();
    let device = device(arguments)?;
    let mut disk = Disk::start(device, options(arguments, Mode::Interrupts)?)?;
    let bytes = mib << 20;
    ensure(bytes <= disk.sectors * SECTOR_BYTES, "the disk is too small")?;
    let memory = alloc::pages(REQUESTS * REQUEST_BYTES);
    let start = cpu::tsc();
    let mut checksum = Checksum::EMPTY;
    for request_kind in [kind::OUT, kind::IN] {
        if request_kind == kind::OUT && !write {
            continue;
        }
        let mut place = 0;
        while place < bytes {
            let batch = (bytes - place).min(memory.bytes());
            if request_kind == kind::OUT {
                for offset in (0..batch).step_by(8) {
                    memory.write(offset, pattern::word(seed, (place + offset) / 8));
                }
            } else {
                memory.part(0, batch).fill(0xee);
            }
            for offset in (0..batch).step_by(REQUEST_BYTES as usize) {
                let number = (place + offset) / REQUEST_BYTES;
                let data = memory.part(offset, REQUEST_BYTES);
                // Reads go through another queue than the write did.
                let queue = (number + u64::from(request_kind == kind::IN)) as usize % disk.queues();
                let halves = [data.part(0, 4096), data.part(4096, REQUEST_BYTES - 4096)];
                let segments: &[_] = if number % 2 == 1 && disk.segments >= 2 {
                    &halves
                } else {
                    &[data]
                };
                disk.queue(queue)
                    .submit(&Request {
                        kind: request_kind,
                        sector: (place + offset) / SECTOR_BYTES,
                        data: segments,
                    })
                    .ok_or(failure("queue is full"))?;
                disk.queue(queue).kick();
            }
            finish(&mut disk)?;
            if request_kind == kind::IN {
                for offset in (0..batch).step_by(8) {
                    let word: u64 = memory.read(offset);
                    equal("data read back", word, pattern::word(seed, (place + offset) / 8))?;
                    checksum.add(word);
                }
            }
            place += batch;
        }
        if request_kind == kind::OUT {
            flush(&mut disk)?;
        }
    }
    let ns = clock::nanoseconds(cpu::tsc() - start);
    println!(
        "blk-verify mib={mib} seed={seed} queues={} checksum={:#018x} ns={ns}",
        disk.queues(),
        checksum.0
    );
    device.reset()?;
    alloc::release(&mark);
    Ok(())
}

fn finish(disk: &mut Disk) -> Outcome {
    for queue in 0..disk.queues() {
        while !disk.queue(queue).is_idle() {
            equal(
                "status of a read or write",
                disk.queue(queue).wait()?.status,
                status::OK,
            )?;
        }
    }
    Ok(())
}

fn flush(disk: &mut Disk) -> Outcome {
    if !disk.has(feature::FLUSH) {
        return Ok(());
    }
    let result = disk.run(
        0,
        &Request {
            kind: kind::FLUSH,
            sector: 0,
            data: &[],
        },
    )?;
    equal("status of flush", result, status::OK)
}

/// Writes numbered records, one sector each, record `n` to sector `start + n % sectors`, flushes after every `batch`
/// of them and then prints how many are durable: `blk-log durable=N` means records 0 to N-1. For ever, or `count` records.
///
/// A record is magic, number, and 62 words of pattern with the record's number as seed.
pub fn log(arguments: Arguments<'_>) -> Outcome {
    let mark = alloc::mark();
    let device = device(arguments)?;
    let mut disk = Disk::start(device, options(arguments, Mode::Interrupts)?)?;
    let batch = arguments.number("batch", 8)?.clamp(1, 64);
    let start = arguments.number("start", 0)?;
    let sectors = arguments.number("sectors", disk.sectors.saturating_sub(start))?;
    let count = arguments.number("count", u64::MAX)?;
    ensure(
        sectors >= batch && start + sectors <= disk.sectors,
        "the disk is too small",
    )?;
    let memory = alloc::pages(batch * SECTOR_BYTES);
    println!(
        "blk-log start={start} sectors={sectors} batch={batch} queues={}",
        disk.queues()
    );
    let mut number = 0;
    while number < count {
        for offset in 0..batch {
            let record = memory.part(offset * SECTOR_BYTES, SECTOR_BYTES);
            let (own, queue) = (number + offset, (number + offset) as usize % disk.queues());
            record.write(0, RECORD_MAGIC);
            record.write(8, own);
            for word in 2..SECTOR_BYTES / 8 {
                record.write(8 * word, pattern::word(own, word));
            }
            disk.queue(queue)
                .submit(&Request {
                    kind: kind::OUT,
                    sector: start + own % sectors,
                    data: &[record],
                })
                .ok_or(failure("queue is full"))?;
        }
        for queue in 0..disk.queues() {
            disk.queue(queue).kick();
        }
        finish(&mut disk)?;
        flush(&mut disk)?;
        number += batch;
        println!("blk-log durable={number}");
    }
    device.reset()?;
    alloc::release(&mark);
    Ok(())
}
