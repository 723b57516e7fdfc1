//! Pages far from each other that are kept in step, by the processor and by a disk: a picture of memory in which they are
//! not is no picture of one instant.

use super::blk::{device, options};
use crate::blk::{Disk, Mode, Request, SECTOR_BYTES, kind, status};
use crate::failure::{Outcome, ensure, equal, failure};
use crate::region::Region;
use crate::script::Arguments;
use crate::{alloc, clock, cpu, println};

const PAGE_BYTES: u64 = 4096;
/// First words of the processor's pages; the counter follows.
const FIRST: u64 = u64::from_le_bytes(*b"BHGSTEP1");
const LAST: u64 = u64::from_le_bytes(*b"BHGSTEP2");
/// First words of the disk's even and odd sectors; the number of the pair follows.
const EVEN: u64 = u64::from_le_bytes(*b"BHGREAD1");
const ODD: u64 = u64::from_le_bytes(*b"BHGREAD2");

/// `mib=32 ms=200 disk=1`: counts in the first and the last page, in this order, and writes to all pages between them in
/// turn; with a disk also reads pairs of sectors, one into the second page and one into the last but one. For ever. Every
/// `ms` milliseconds it prints how far it is, and the longest time between two steps since the last line.
pub fn run(arguments: Arguments<'_>) -> Outcome {
    let memory = alloc::pages(arguments.number("mib", 32)? << 20);
    let period = clock::hertz() / 1000 * arguments.number("ms", 200)?;
    let pages = memory.bytes() / PAGE_BYTES;
    ensure(pages > 8, "too little memory")?;
    let page = |number: u64| memory.part(number * PAGE_BYTES, PAGE_BYTES);
    let (first, last) = (page(0), page(pages - 1));
    let mut reader = match arguments.number("disk", 1)? {
        0 => None,
        _ => Some(Reader::start(arguments, page(1), page(pages - 2))?),
    };
    for (place, word) in [(first, FIRST), (last, LAST)] {
        place.write(8, 0_u64);
        place.write(0, word);
    }
    let (mut count, mut longest) = (0, 0);
    let mut before = cpu::tsc();
    let mut next = before + period;
    loop {
        count += 1;
        first.write(8, count);
        last.write(8, count);
        memory.write((2 + count % (pages - 4)) * PAGE_BYTES + 16, count);
        if let Some(reader) = &mut reader {
            reader.step()?;
        }
        let now = cpu::tsc();
        longest = longest.max(now - before);
        before = now;
        if now >= next {
            let reads = reader.as_ref().map_or(0, |reader| reader.number);
            println!(
                "step count={count} reads={reads} longest_us={}",
                clock::nanoseconds(longest) / 1000
            );
            longest = 0;
            before = cpu::tsc();
            next = before + period;
        }
    }
}

/// Reads pairs of sectors, one request at a time.
struct Reader {
    disk: Disk,
    data: [Region; 2],
    number: u64,
}

impl Reader {
    fn start(arguments: Arguments<'_>, even: Region, odd: Region) -> Result<Self, crate::failure::Failure> {
        let disk = Disk::start(device(arguments)?, options(arguments, Mode::Polling)?)?;
        ensure(disk.segments >= 2, "a request has one segment")?;
        let data = [even.part(0, SECTOR_BYTES), odd.part(0, SECTOR_BYTES)];
        let mut reader = Self { disk, data, number: 0 };
        reader.submit()?;
        Ok(reader)
    }

    fn submit(&mut self) -> Outcome {
        let request = Request {
            kind: kind::IN,
            sector: self.number * 2 % self.disk.sectors,
            data: &self.data,
        };
        let queue = self.disk.queue(0);
        queue.submit(&request).ok_or(failure("queue is full"))?;
        queue.kick();
        Ok(())
    }

    /// When a pair has arrived it is checked, and the next is asked for.
    fn step(&mut self) -> Outcome {
        let Some(finished) = self.disk.queue(0).collect() else {
            return Ok(());
        };
        equal("status of a read", finished.status, status::OK)?;
        let pair = self.number % (self.disk.sectors / 2);
        for (data, word) in self.data.iter().zip([EVEN, ODD]) {
            equal("sector's first word", data.read::<u64>(0), word)?;
            equal("pair of sectors", data.read::<u64>(8), pair)?;
        }
        self.number += 1;
        self.submit()
    }
}
