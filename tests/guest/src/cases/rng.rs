//! virtio-rng.

use crate::clock::Deadline;
use crate::failure::{Outcome, ensure, failure};
use crate::pci::Access;
use crate::queue::{Buffer, Features};
use crate::virtio_pci::{Device, find};
use crate::{alloc, lapic, println, tables};

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
