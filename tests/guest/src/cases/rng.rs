//! virtio-rng.

use crate::clock::{Deadline, nanoseconds};
use crate::cpu::tsc;
use crate::failure::{Failure, Outcome, ensure, failure};
use crate::pci::Access;
use crate::queue::{Buffer, Completion, Features, Queue, flag, write_descriptor};
use crate::script::Arguments;
use crate::virtio::{Transport, status};
use crate::virtio_pci::{Device, find};
use crate::{alloc, lapic, println, tables};
use core::fmt;

const DEVICE_TYPE: u16 = 4;
const VERSION_1: u64 = 1 << 32;
const BYTES: u64 = 64;

/// Two answers, by interrupt, that differ.
pub fn run() -> Outcome {
    let function = find(Access::Ports, DEVICE_TYPE)
        .next()
        .ok_or(failure("no virtio-rng device"))?;
    let device = Device::new(function)?;
    let mark = alloc::mark();
    device.negotiate(VERSION_1)?;
    device.route_interrupts()?;
    let plain = Features {
        indirect: false,
        event_index: false,
    };
    let mut queue = device.queue(0, 8, plain)?;
    device.start()?;
    let memory = alloc::pages(2 * BYTES);
    let mut answers = [[0_u8; BYTES as usize]; 2];
    for (index, answer) in (0..).zip(&mut answers) {
        let part = memory.part(index * BYTES, BYTES);
        queue.arm_interrupt();
        let seen = tables::interrupts(queue.vector);
        let slot = queue.take_slot().ok_or(failure("queue is full"))?;
        queue.submit(
            slot,
            &[Buffer {
                memory: part,
                device_writes: true,
            }],
        );
        queue.kick();
        ensure(lapic::wait(queue.vector, seen, 20_000), "no interrupt")?;
        let deadline = Deadline::after_ms(1000);
        let done = loop {
            if let Some(done) = queue.complete() {
                break done;
            }
            ensure(!deadline.passed(), "interrupt without an answer")?;
        };
        ensure(
            done.written > 0 && u64::from(done.written) <= BYTES,
            "number of random bytes",
        )?;
        part.copy_to(answer);
        println!("rng bytes={} first={:#04x}", done.written, answer[0]);
    }
    ensure(answers[0] != answers[1], "the same bytes twice")?;
    device.reset()?;
    alloc::release(&mark);
    Ok(())
}

/// Most bytes that a test prints.
const SHOWN: u64 = 64;
/// How long a slow source may take.
const FILL_MS: u64 = 30_000;
const QUEUE_SIZE: u16 = 8;

/// Bytes in hexadecimal.
struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

fn ready() -> Result<(Device, Queue), Failure> {
    let function = find(Access::Ports, DEVICE_TYPE)
        .next()
        .ok_or(failure("no virtio-rng device"))?;
    let device = Device::new(function)?;
    let queue = prepare(&device)?;
    Ok((device, queue))
}

fn prepare(device: &Device) -> Result<Queue, Failure> {
    device.negotiate(VERSION_1)?;
    let plain = Features {
        indirect: false,
        event_index: false,
    };
    let mut queue = device.queue(0, QUEUE_SIZE, plain)?;
    queue.disarm_interrupt();
    device.start()?;
    Ok(queue)
}

fn wait(queue: &mut Queue) -> Result<Completion, Failure> {
    let deadline = Deadline::after_ms(FILL_MS);
    loop {
        if let Some(done) = queue.complete() {
            return Ok(done);
        }
        ensure(!deadline.passed(), "no random bytes")?;
        core::hint::spin_loop();
    }
}

/// So many bytes in buffers of `buffer=`, in the order in which they came, without an interrupt; prints the first of
/// them and how long it took.
pub fn fill(arguments: Arguments<'_>) -> Outcome {
    let (total, buffer) = (arguments.number("bytes", BYTES)?, arguments.number("buffer", BYTES)?);
    ensure(buffer > 0 && buffer <= 4096, "buffer")?;
    let mark = alloc::mark();
    let (device, mut queue) = ready()?;
    let memory = alloc::pages(buffer);
    let mut shown = [0_u8; SHOWN as usize];
    let mut chunk = [0_u8; 4096];
    let (mut filled, mut answers) = (0, 0_u64);
    let start = tsc();
    while filled < total {
        let part = memory.part(0, buffer.min(total - filled));
        let slot = queue.take_slot().ok_or(failure("queue is full"))?;
        queue.submit(
            slot,
            &[Buffer {
                memory: part,
                device_writes: true,
            }],
        );
        queue.kick();
        let written = u64::from(wait(&mut queue)?.written);
        ensure(written > 0 && written <= part.bytes(), "number of random bytes")?;
        let bytes = &mut chunk[..written as usize];
        part.part(0, written).copy_to(bytes);
        for (place, byte) in (filled..SHOWN).zip(bytes) {
            shown[place as usize] = *byte;
        }
        filled += written;
        answers += 1;
    }
    let ms = nanoseconds(tsc() - start) / 1_000_000;
    let shown = Hex(&shown[..total.min(SHOWN) as usize]);
    println!("rng-fill bytes={filled} answers={answers} ms={ms} hex={shown}");
    device.reset()?;
    alloc::release(&mark);
    Ok(())
}

/// Buffers that no driver may offer: the device wants a reset, and serves as ever after it.
pub fn evil() -> Outcome {
    let mark = alloc::mark();
    let (device, mut queue) = ready()?;
    let memory = alloc::pages(BYTES);
    for case in 0..5 {
        let (address, bytes, flags, next) = match case {
            // Nothing to write to.
            0 => (memory.address(), BYTES as u32, 0, 0),
            1 => (memory.address(), 0, flag::WRITE, 0),
            // Not RAM.
            2 => (u64::MAX - 63, BYTES as u32, flag::WRITE, 0),
            // A loop; a descriptor that does not exist.
            3 => (memory.address(), BYTES as u32, flag::WRITE | flag::NEXT, 0),
            _ => (memory.address(), BYTES as u32, flag::WRITE | flag::NEXT, QUEUE_SIZE),
        };
        write_descriptor(queue.descriptors, 0, address, bytes, flags, next);
        queue.publish(0);
        queue.ring_doorbell();
        let deadline = Deadline::after_ms(FILL_MS);
        while device.status() & status::NEEDS_RESET == 0 {
            ensure(!deadline.passed(), "a broken ring is taken for a good one")?;
        }
        device.reset()?;
        queue = prepare(&device)?;
        let slot = queue.take_slot().ok_or(failure("queue is full"))?;
        queue.submit(
            slot,
            &[Buffer {
                memory,
                device_writes: true,
            }],
        );
        queue.kick();
        ensure(wait(&mut queue)?.written > 0, "no bytes after a reset")?;
    }
    println!("rng-evil cases=5");
    device.reset()?;
    alloc::release(&mark);
    Ok(())
}
