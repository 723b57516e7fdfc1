//! A virtio-blk driver: up to four queues, completions by polling or by interrupt.

use crate::clock::Deadline;
use crate::failure::{Failure, ensure, failure};
use crate::queue::{Buffer, Features, Queue};
use crate::region::Region;
use crate::virtio::Transport;
use crate::virtio_pci::Device;
use crate::{alloc, lapic, tables};

/// Virtio's number of the device type.
pub const DEVICE_TYPE: u16 = 2;
/// Queues that the driver uses at most.
pub const MAX_QUEUES: usize = 4;
/// Bytes of a sector, in requests and in the configuration.
pub const SECTOR_BYTES: u64 = 512;
/// How long any request may take. Generous: emulators on busy machines are slow.
const TIMEOUT_MS: u64 = 60_000;

/// Feature bits.
pub mod feature {
    /// Limit of a segment's length.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// Limit of a request's segments.
    pub const SEG_MAX: u64 = 1 << 2;
    /// Writes fail.
    pub const READ_ONLY: u64 = 1 << 5;
    /// Block size is given.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// Flush exists.
    pub const FLUSH: u64 = 1 << 9;
    /// More than one queue.
    pub const MULTI_QUEUE: u64 = 1 << 12;
    /// Discard exists.
    pub const DISCARD: u64 = 1 << 13;
    /// Write zeroes exists.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// Indirect descriptors.
    pub const INDIRECT: u64 = 1 << 28;
    /// Event indices.
    pub const EVENT_INDEX: u64 = 1 << 29;
    /// The modern interface.
    pub const VERSION_1: u64 = 1 << 32;
}

/// Request types.
pub mod kind {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Make writes durable.
    pub const FLUSH: u32 = 4;
    /// The disk's name.
    pub const GET_ID: u32 = 8;
    /// Contents are not needed any more.
    pub const DISCARD: u32 = 11;
    /// Write zeroes.
    pub const WRITE_ZEROES: u32 = 13;
}

/// Request results.
pub mod status {
    /// Done.
    pub const OK: u8 = 0;
    /// Failed.
    pub const IO_ERROR: u8 = 1;
    /// No such request.
    pub const UNSUPPORTED: u8 = 2;
}

/// Places in the configuration.
mod config {
    pub const CAPACITY: u64 = 0;
    pub const SIZE_MAX: u64 = 8;
    pub const SEG_MAX: u64 = 12;
    pub const BLK_SIZE: u64 = 20;
    pub const NUM_QUEUES: u64 = 34;
}

/// How the driver learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It looks.
    Polling,
    /// By MSI-X.
    Interrupts,
}

/// What the driver asks for when it starts the device.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Queues.
    pub queues: usize,
    /// Descriptors in each.
    pub queue_size: u16,
    /// See [`Mode`].
    pub mode: Mode,
    /// Indirect descriptors, when offered.
    pub indirect: bool,
    /// Event indices, when offered.
    pub event_index: bool,
}

/// A request.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Its type.
    pub kind: u32,
    /// Its first sector.
    pub sector: u64,
    /// Its data.
    pub data: &'a [Region],
}

/// A finished request.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    /// Its slot.
    pub slot: u16,
    /// What became of it.
    pub status: u8,
    /// How many bytes the device has written, the status included.
    pub written: u32,
}

/// One queue and the memory for its requests' headers and results.
pub struct DiskQueue {
    queue: Queue,
    /// For each slot 64 bytes: header at 0, status at 16.
    control: Region,
    mode: Mode,
    seen_interrupts: u64,
    /// An interrupt came and the ring has not been found empty since.
    may_collect: bool,
}

/// A disk that is ready.
pub struct Disk<T = Device> {
    /// Its transport.
    pub device: T,
    /// What it offered.
    pub offered: u64,
    /// What was agreed on.
    pub features: u64,
    /// Its size.
    pub sectors: u64,
    /// Most data segments of a request.
    pub segments: usize,
    /// Most bytes of a segment.
    pub segment_bytes: u64,
    queues: [Option<DiskQueue>; MAX_QUEUES],
    count: usize,
}

impl<T: Transport> Disk<T> {
    /// Resets the device and starts it.
    pub fn start(device: T, options: Options) -> Result<Self, Failure> {
        device.reset()?;
        let offered = device.offered();
        ensure(offered & feature::VERSION_1 != 0, "device is not modern")?;
        let mut wanted = feature::VERSION_1
            | feature::SIZE_MAX
            | feature::SEG_MAX
            | feature::READ_ONLY
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::MULTI_QUEUE
            | feature::DISCARD
            | feature::WRITE_ZEROES;
        if options.indirect {
            wanted |= feature::INDIRECT;
        }
        if options.event_index {
            wanted |= feature::EVENT_INDEX;
        }
        let features = offered & wanted;
        device.negotiate(features)?;
        device.route_interrupts()?;
        let sectors = device.config64(config::CAPACITY);
        let there = if features & feature::MULTI_QUEUE != 0 {
            let count: u16 = device.config().read(config::NUM_QUEUES);
            ensure(count >= 1 && count <= device.queues(), "number of queues")?;
            usize::from(count)
        } else {
            1
        };
        let ring = Features {
            indirect: features & feature::INDIRECT != 0,
            event_index: features & feature::EVENT_INDEX != 0,
        };
        let count = options.queues.min(there).min(MAX_QUEUES);
        let mut queues = [const { None }; MAX_QUEUES];
        for (index, place) in (0..).zip(queues.iter_mut().take(count)) {
            let queue = device.queue(index, options.queue_size, ring)?;
            *place = Some(DiskQueue::new(queue, options.mode));
        }
        device.start()?;
        let limit = |bit: u64, place: u64, otherwise: u32| {
            if features & bit != 0 {
                device.config().read::<u32>(place)
            } else {
                otherwise
            }
        };
        let buffers = if ring.indirect {
            crate::queue::INDIRECT_BUFFERS
        } else {
            crate::queue::DIRECT_BUFFERS.into()
        };
        Ok(Self {
            device,
            offered,
            features,
            sectors,
            segments: (limit(feature::SEG_MAX, config::SEG_MAX, 1) as usize).clamp(1, buffers - 2),
            segment_bytes: limit(feature::SIZE_MAX, config::SIZE_MAX, 1 << 30).into(),
            queues,
            count,
        })
    }

    /// Whether the device says that it takes no writes.
    pub fn read_only(&self) -> bool {
        self.features & feature::READ_ONLY != 0
    }

    /// Whether a feature was agreed on.
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// The block size that the device prefers.
    pub fn block_bytes(&self) -> u32 {
        if self.has(feature::BLK_SIZE) {
            self.device.config().read(config::BLK_SIZE)
        } else {
            512
        }
    }

    /// How many queues are in use.
    pub fn queues(&self) -> usize {
        self.count
    }

    /// A queue.
    pub fn queue(&mut self, index: usize) -> &mut DiskQueue {
        self.queues[index].as_mut().expect("queue in use")
    }

    /// All queues, to be used by one processor each.
    pub fn into_queues(self) -> [Option<DiskQueue>; MAX_QUEUES] {
        self.queues
    }

    /// Does one request and returns its status.
    pub fn run(&mut self, queue: usize, request: &Request<'_>) -> Result<u8, Failure> {
        let queue = self.queue(queue);
        queue.submit(request).ok_or(failure("queue is full"))?;
        queue.kick();
        Ok(queue.wait()?.status)
    }
}

impl DiskQueue {
    fn new(mut queue: Queue, mode: Mode) -> Self {
        match mode {
            Mode::Polling => queue.disarm_interrupt(),
            Mode::Interrupts => queue.arm_interrupt(),
        }
        Self {
            control: alloc::pages(64 * queue.slots() as u64),
            seen_interrupts: tables::interrupts(queue.vector),
            queue,
            mode,
            may_collect: false,
        }
    }

    /// How many requests fit at once.
    pub fn slots(&self) -> usize {
        self.queue.slots()
    }

    /// How it learns of completions.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Whether no request is under way.
    pub fn is_idle(&self) -> bool {
        self.queue.free_slots() == self.queue.slots()
    }

    /// How often the device was notified.
    pub fn kicks(&self) -> u64 {
        self.queue.kicks
    }

    /// The ring itself, for tests that break it.
    pub fn ring(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Puts a request into the ring. `None`: no room.
    pub fn submit(&mut self, request: &Request<'_>) -> Option<u16> {
        let slot = self.queue.take_slot()?;
        let control = self.control.part(64 * u64::from(slot), 64);
        control.write(0, u64::from(request.kind));
        control.write(8, request.sector);
        control.write(16, 0xff_u8);
        let read = Buffer {
            memory: control.part(0, 16),
            device_writes: false,
        };
        let mut buffers = [read; crate::queue::INDIRECT_BUFFERS];
        let device_writes = matches!(request.kind, kind::IN | kind::GET_ID);
        for (place, data) in buffers[1..].iter_mut().zip(request.data) {
            *place = Buffer {
                memory: *data,
                device_writes,
            };
        }
        buffers[1 + request.data.len()] = Buffer {
            memory: control.part(16, 1),
            device_writes: true,
        };
        self.queue.submit(slot, &buffers[..2 + request.data.len()]);
        Some(slot)
    }

    /// Tells the device about what was submitted.
    pub fn kick(&mut self) {
        self.queue.kick();
    }

    /// The next finished request, without waiting.
    pub fn collect(&mut self) -> Option<Finished> {
        self.queue.complete().map(|completion| Finished {
            slot: completion.slot,
            status: self.control.read(64 * u64::from(completion.slot) + 16),
            written: completion.written,
        })
    }

    /// The next finished request. In interrupt mode only after an interrupt has come for it.
    pub fn wait(&mut self) -> Result<Finished, Failure> {
        match self.mode {
            Mode::Polling => {
                let deadline = Deadline::after_ms(TIMEOUT_MS);
                loop {
                    if let Some(finished) = self.collect() {
                        return Ok(finished);
                    }
                    ensure(!deadline.passed(), "request does not finish")?;
                    core::hint::spin_loop();
                }
            }
            Mode::Interrupts => loop {
                if self.may_collect {
                    if let Some(finished) = self.collect() {
                        return Ok(finished);
                    }
                    self.queue.arm_interrupt();
                    if let Some(finished) = self.collect() {
                        return Ok(finished);
                    }
                    self.may_collect = false;
                }
                let arrived = lapic::wait(self.queue.vector, self.seen_interrupts, TIMEOUT_MS);
                ensure(arrived, "no interrupt for a request")?;
                self.seen_interrupts = tables::interrupts(self.queue.vector);
                self.may_collect = true;
            },
        }
    }
}
