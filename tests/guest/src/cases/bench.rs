//! The benchmark: a fixed number of requests at a fixed depth, completions by polling, latency of each by the time
//! stamp counter.
//!
//! `bench rw=randread|randwrite|randrw|read|write bs=4096 qd=32 queues=1 ops=100000`, and: `cpus=N` (1: the boot
//! processor serves all queues in turn; else as many as queues, one each), `span_mib=` (the part of the disk that is
//! used), `seed=`, `size=` (descriptors a queue), `indirect=0`, `event=0`, `mode=irq` (only with one queue).
//! `qd` counts requests on each queue, `ops` those on all together.

use super::blk::{device, options};
use crate::blk::{DEVICE_TYPE, Disk, DiskQueue, MAX_QUEUES, Mode, Request, SECTOR_BYTES, kind, status};
use crate::failure::{Failure, Outcome, ensure, equal, failure};
use crate::histogram::Histogram;
use crate::queue::MAX_SLOTS;
use crate::region::Region;
use crate::script::Arguments;
use crate::spin::Spin;
use crate::virtio::Transport;
use crate::{alloc, clock, cpu, pattern, println, smp, virtio_mmio};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Where requests go and what they do.
#[derive(Clone, Copy)]
struct Load {
    /// Percentage of writes.
    writes: u64,
    random: bool,
    request_bytes: u64,
    depth: usize,
    /// The part of the disk, in requests, for this queue.
    first: u64,
    places: u64,
}

/// One queue with its share of the work.
struct Lane {
    queue: DiskQueue,
    load: Load,
    memory: Region,
    random: u64,
    next: u64,
    to_submit: u64,
    to_finish: u64,
    idle_buffers: [u16; MAX_SLOTS],
    idle: usize,
    buffer: [u16; MAX_SLOTS],
    started: [u64; MAX_SLOTS],
    histogram: Histogram,
    failed: Option<Failure>,
}

static LANES: [Spin<Option<Lane>>; MAX_QUEUES] = [const { Spin::new(None) }; MAX_QUEUES];
/// Lanes wait for this, so that all begin together.
static GO: AtomicBool = AtomicBool::new(false);
static READY: AtomicUsize = AtomicUsize::new(0);

/// Runs one measurement, on the device that the monitor's `virtio_mmio.device=` names, or on one behind PCI.
pub fn run(arguments: Arguments<'_>) -> Outcome {
    match virtio_mmio::Device::named(arguments, DEVICE_TYPE) {
        Some(device) => measure(device?, arguments),
        None => measure(device(arguments)?, arguments),
    }
}

fn measure(device: impl Transport, arguments: Arguments<'_>) -> Outcome {
    let mark = alloc::mark();
    let name = arguments.text("rw").unwrap_or("randread");
    let (writes, random) = match name {
        "randread" => (0, true),
        "randwrite" => (100, true),
        "randrw" => (arguments.number("writes", 30)?, true),
        "read" => (0, false),
        "write" => (100, false),
        _ => return Err(failure("rw= is not known")),
    };
    let request_bytes = arguments.number("bs", 4096)?;
    let depth = arguments.number("qd", 32)? as usize;
    let ops = arguments.number("ops", 100_000)?;
    let mut wanted = options(arguments, Mode::Polling)?;
    wanted.queues = arguments.number("queues", 1)? as usize;
    wanted.queue_size = arguments.number("size", 1024)? as u16;
    let cpus = arguments.number("cpus", 1)? as usize;
    ensure(
        request_bytes > 0 && request_bytes % SECTOR_BYTES == 0 && (1..=MAX_SLOTS).contains(&depth),
        "bs or qd out of range",
    )?;
    let mut disk = Disk::start(device, wanted)?;
    let queues = disk.queues();
    equal("queues", queues as u64, wanted.queues as u64)?;
    ensure(
        cpus == 1 || cpus == queues,
        "cpus is neither 1 nor the number of queues",
    )?;
    ensure(wanted.mode == Mode::Polling || queues == 1, "interrupts need queues=1")?;
    ensure(
        request_bytes <= disk.segment_bytes,
        "bs exceeds the device's segment size",
    )?;
    ensure(depth <= disk.queue(0).slots(), "qd exceeds the queue")?;
    let span = match arguments.number("span_mib", 0)? {
        0 => disk.sectors * SECTOR_BYTES,
        mib => mib << 20,
    };
    let places = span / request_bytes;
    ensure(
        span <= disk.sectors * SECTOR_BYTES && places >= queues as u64,
        "span does not fit the disk",
    )?;
    smp::start(cpus)?;
    clock::calibrate();
    for (index, queue) in disk.into_queues().into_iter().flatten().enumerate() {
        let share = places / queues as u64;
        let load = Load {
            writes,
            random,
            request_bytes,
            depth,
            first: if random { 0 } else { share * index as u64 },
            places: if random { places } else { share },
        };
        let own = ops / queues as u64 + u64::from((index as u64) < ops % queues as u64);
        let seed = pattern::word(arguments.number("seed", 1)?, index as u64) | 1;
        LANES[index].with(|place| *place = Some(Lane::new(queue, load, own, seed)));
    }
    READY.store(1, Ordering::SeqCst);
    GO.store(false, Ordering::SeqCst);
    for processor in 1..cpus {
        smp::begin(processor, one_lane, processor as u64);
    }
    while READY.load(Ordering::SeqCst) < cpus {
        core::hint::spin_loop();
    }
    let start = cpu::tsc();
    GO.store(true, Ordering::SeqCst);
    match cpus {
        1 => lanes_in_turn(queues),
        _ => one_lane(0, 0),
    }
    smp::join(1..cpus, 600_000)?;
    let ns = clock::nanoseconds(cpu::tsc() - start).max(1);
    device.reset()?;
    alloc::release(&mark);
    let mut all = Histogram::new();
    let mut kicks = 0;
    for lane in &LANES[..queues] {
        let lane = lane.with(Option::take).ok_or(failure("a lane is lost"))?;
        if let Some(error) = lane.failed {
            return Err(error);
        }
        all.merge(&lane.histogram);
        kicks += lane.queue.kicks();
    }
    println!(
        "bench rw={name} bs={request_bytes} qd={depth} queues={queues} cpus={cpus} ops={ops} bytes={} ns={ns} iops={} \
         kicks={kicks} tsc_hertz={}",
        ops * request_bytes,
        u128::from(ops) * 1_000_000_000 / u128::from(ns),
        clock::hertz()
    );
    all.print();
    Ok(())
}

/// One processor, one queue.
fn one_lane(processor: usize, index: u64) {
    if processor != 0 {
        READY.fetch_add(1, Ordering::SeqCst);
        while !GO.load(Ordering::SeqCst) {
            core::hint::spin_loop();
        }
    }
    LANES[index as usize].with(|lane| {
        let Some(lane) = lane else { return };
        lane.fill();
        while lane.busy() {
            lane.turn();
        }
    });
}

/// One processor, all queues.
fn lanes_in_turn(count: usize) {
    let each = |work: &mut dyn FnMut(&mut Lane)| {
        for lane in &LANES[..count] {
            lane.with(|lane| lane.as_mut().into_iter().for_each(&mut *work));
        }
    };
    each(&mut Lane::fill);
    loop {
        let mut busy = false;
        each(&mut |lane| {
            if lane.busy() {
                busy = true;
                lane.turn();
            }
        });
        if !busy {
            return;
        }
    }
}

impl Lane {
    fn new(queue: DiskQueue, load: Load, ops: u64, seed: u64) -> Self {
        let memory = alloc::pages(load.request_bytes.next_multiple_of(4096) * load.depth as u64);
        for place in (0..memory.bytes()).step_by(8) {
            memory.write(place, pattern::word(seed, place));
        }
        Self {
            queue,
            load,
            memory,
            random: seed,
            next: 0,
            to_submit: ops,
            to_finish: ops,
            idle_buffers: core::array::from_fn(|index| index as u16),
            idle: load.depth,
            buffer: [0; MAX_SLOTS],
            started: [0; MAX_SLOTS],
            histogram: Histogram::new(),
            failed: None,
        }
    }

    fn busy(&self) -> bool {
        self.to_finish > 0 && self.failed.is_none()
    }

    /// Puts in as many requests as the depth allows.
    fn fill(&mut self) {
        let now = cpu::tsc();
        while self.idle > 0 && self.to_submit > 0 {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            let place = if self.load.random {
                ((u128::from(self.random) * u128::from(self.load.places)) >> 64) as u64
            } else {
                self.next % self.load.places
            };
            self.next += 1;
            let write = self.load.writes == 100 || self.random % 100 < self.load.writes;
            let buffer = self.idle_buffers[self.idle - 1];
            let stride = self.load.request_bytes.next_multiple_of(4096);
            let data = self.memory.part(stride * u64::from(buffer), self.load.request_bytes);
            let Some(slot) = self.queue.submit(&Request {
                kind: if write { kind::OUT } else { kind::IN },
                sector: (self.load.first + place) * (self.load.request_bytes / SECTOR_BYTES),
                data: &[data],
            }) else {
                break;
            };
            self.idle -= 1;
            self.to_submit -= 1;
            self.buffer[usize::from(slot)] = buffer;
            self.started[usize::from(slot)] = now;
        }
        self.queue.kick();
    }

    /// Takes what is finished and puts in as much again.
    fn turn(&mut self) {
        let first = match self.queue.mode() {
            Mode::Polling => match self.queue.collect() {
                Some(finished) => finished,
                None => return core::hint::spin_loop(),
            },
            Mode::Interrupts => match self.queue.wait() {
                Ok(finished) => finished,
                Err(error) => return self.failed = Some(error),
            },
        };
        let now = cpu::tsc();
        let mut next = Some(first);
        while let Some(finished) = next {
            let slot = usize::from(finished.slot);
            if finished.status != status::OK {
                self.failed = equal("status of a request", finished.status, status::OK).err();
                return;
            }
            self.histogram.add(now.wrapping_sub(self.started[slot]));
            self.idle_buffers[self.idle] = self.buffer[slot];
            self.idle += 1;
            self.to_finish -= 1;
            next = self.queue.collect();
        }
        self.fill();
    }
}
