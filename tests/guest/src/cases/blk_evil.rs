//! A driver that breaks the rules. Whatever the device makes of it, the machine has to go on, and after a reset the
//! device has to work as ever.
//!
//! Each case prints `blk-evil case=NAME result=…`: `needs-reset`, `status=N` (a completion, with the status byte), or
//! `silent`.

use super::blk::{device, short};
use crate::blk::{Disk, Mode, Options, feature, kind};
use crate::clock::Deadline;
use crate::failure::{Failure, Outcome, ensure, equal, failure};
use crate::queue::{Queue, flag, write_descriptor};
use crate::region::Region;
use crate::script::Arguments;
use crate::virtio::{Transport, status};
use crate::virtio_pci::Device;
use crate::{alloc, println, start_info};

/// How long a reaction is waited for.
const PATIENCE_MS: u64 = 300;
const QUEUE_SIZE: u16 = 64;

/// Memory of one case: header at 0, status byte at 64, an indirect table at 1024, data at 4096.
#[derive(Clone, Copy)]
struct Scratch(Region);

impl Scratch {
    fn header(self) -> u64 {
        self.0.address()
    }
    fn status(self) -> u64 {
        self.0.address() + 64
    }
    fn table(self) -> Region {
        self.0.part(1024, 3072)
    }
    fn data(self) -> u64 {
        self.0.address() + 4096
    }
}

type Case = (&'static str, fn(&mut Queue, Scratch));

/// Writes header, data and status descriptors with these addresses, lengths and flags from `first` on.
fn request(table: Region, first: u16, parts: &[(u64, u32, u16)]) {
    for (number, (address, bytes, flags)) in (0..).zip(parts) {
        let last = usize::from(number) + 1 == parts.len();
        let next = if last { 0 } else { flag::NEXT };
        write_descriptor(
            table,
            first + number,
            *address,
            *bytes,
            flags | next,
            first + number + 1,
        );
    }
}

fn send(queue: &mut Queue, parts: &[(u64, u32, u16)]) {
    request(queue.descriptors, 0, parts);
    queue.publish(0);
}

fn send_indirect(queue: &mut Queue, table: u64, bytes: u32, flags: u16) {
    write_descriptor(queue.descriptors, 0, table, bytes, flag::INDIRECT | flags, 1);
    queue.publish(0);
}

/// A good request's parts.
fn good(scratch: Scratch) -> [(u64, u32, u16); 3] {
    [
        (scratch.header(), 16, 0),
        (scratch.data(), 512, flag::WRITE),
        (scratch.status(), 1, flag::WRITE),
    ]
}

fn with_data(queue: &mut Queue, scratch: Scratch, address: u64, bytes: u32) {
    let [header, _, status] = good(scratch);
    send(queue, &[header, (address, bytes, flag::WRITE), status]);
}

fn ram_end() -> u64 {
    start_info::ram().map(|(start, bytes)| start + bytes).max().unwrap_or(0)
}

const CASES: &[Case] = &[
    ("descriptor-loop", |queue, scratch| {
        request(queue.descriptors, 0, &good(scratch));
        write_descriptor(queue.descriptors, 1, scratch.data(), 512, flag::WRITE | flag::NEXT, 1);
        queue.publish(0);
    }),
    ("next-outside", |queue, scratch| {
        write_descriptor(queue.descriptors, 0, scratch.header(), 16, flag::NEXT, QUEUE_SIZE);
        queue.publish(0);
    }),
    ("head-outside", |queue, _| queue.publish(QUEUE_SIZE)),
    ("head-far-outside", |queue, _| queue.publish(0xffff)),
    ("avail-jump", |queue, scratch| {
        request(queue.descriptors, 0, &good(scratch));
        queue.avail.write::<u16>(2, 0x7000);
    }),
    ("chain-of-all", |queue, scratch| {
        for index in 0..QUEUE_SIZE {
            write_descriptor(
                queue.descriptors,
                index,
                scratch.data(),
                512,
                flag::WRITE | flag::NEXT,
                (index + 1) % QUEUE_SIZE,
            );
        }
        queue.publish(0);
    }),
    ("header-in-nowhere", |queue, scratch| {
        let [_, data, status] = good(scratch);
        send(queue, &[(0xffff_ff00_0000_0000, 16, 0), data, status]);
    }),
    ("data-in-nowhere", |queue, scratch| {
        with_data(queue, scratch, 0xff_ffff_f000, 4096)
    }),
    ("data-in-device", |queue, scratch| {
        with_data(queue, scratch, 0xc000_0000, 4096)
    }),
    ("data-over-end-of-ram", |queue, scratch| {
        with_data(queue, scratch, ram_end() - 512, 4096)
    }),
    ("data-wraps", |queue, scratch| {
        with_data(queue, scratch, u64::MAX - 511, 4096)
    }),
    ("data-huge", |queue, scratch| {
        with_data(queue, scratch, scratch.data(), 0xffff_fe00)
    }),
    ("data-odd", |queue, scratch| {
        with_data(queue, scratch, scratch.data(), 513)
    }),
    ("data-empty", |queue, scratch| {
        with_data(queue, scratch, scratch.data(), 0)
    }),
    ("status-in-nowhere", |queue, scratch| {
        let [header, data, _] = good(scratch);
        send(queue, &[header, data, (0xff_ffff_f000, 1, flag::WRITE)]);
    }),
    ("header-short", |queue, scratch| {
        let [_, data, status] = good(scratch);
        send(queue, &[(scratch.header(), 8, 0), data, status]);
    }),
    ("header-split", |queue, scratch| {
        let [_, data, status] = good(scratch);
        send(
            queue,
            &[(scratch.header(), 7, 0), (scratch.header() + 7, 9, 0), data, status],
        );
    }),
    ("header-writable", |queue, scratch| {
        let [_, data, status] = good(scratch);
        send(queue, &[(scratch.header(), 16, flag::WRITE), data, status]);
    }),
    ("status-read-only", |queue, scratch| {
        let [header, data, _] = good(scratch);
        send(queue, &[header, data, (scratch.status(), 1, 0)]);
    }),
    ("status-missing", |queue, scratch| {
        send(queue, &[(scratch.header(), 16, 0)])
    }),
    ("status-empty", |queue, scratch| {
        let [header, data, _] = good(scratch);
        send(queue, &[header, data, (scratch.status(), 0, flag::WRITE)]);
    }),
    ("readable-after-writable", |queue, scratch| {
        let [header, data, status] = good(scratch);
        send(queue, &[header, data, (scratch.data(), 512, 0), status]);
    }),
    ("write-into-device-memory", |queue, scratch| {
        scratch.0.write(0, u64::from(kind::OUT));
        let [header, _, status] = good(scratch);
        send(queue, &[header, (0xe000_0000, 512, 0), status]);
    }),
    ("discard-odd-range", |queue, scratch| {
        scratch.0.write(0, u64::from(kind::DISCARD));
        let [header, _, status] = good(scratch);
        send(queue, &[header, (scratch.data(), 17, 0), status]);
    }),
    ("zeroes-many-ranges", |queue, scratch| {
        scratch.0.write(0, u64::from(kind::WRITE_ZEROES));
        let [header, _, status] = good(scratch);
        send(queue, &[header, (scratch.data(), 4096, 0), status]);
    }),
    ("indirect-odd-length", |queue, scratch| {
        request(scratch.table(), 0, &good(scratch));
        send_indirect(queue, scratch.table().address(), 47, 0);
    }),
    ("indirect-empty", |queue, scratch| {
        send_indirect(queue, scratch.table().address(), 0, 0)
    }),
    ("indirect-huge", |queue, scratch| {
        send_indirect(queue, scratch.table().address(), 0xffff_fff0, 0)
    }),
    ("indirect-in-nowhere", |queue, _| {
        send_indirect(queue, 0xff_ffff_f000, 48, 0)
    }),
    ("indirect-nested", |queue, scratch| {
        let table = scratch.table();
        write_descriptor(table, 0, table.address(), 48, flag::INDIRECT, 0);
        send_indirect(queue, table.address(), 48, 0);
    }),
    ("indirect-and-next", |queue, scratch| {
        request(scratch.table(), 0, &good(scratch));
        write_descriptor(queue.descriptors, 1, scratch.data(), 512, flag::WRITE, 0);
        send_indirect(queue, scratch.table().address(), 48, flag::NEXT);
    }),
    ("indirect-next-outside", |queue, scratch| {
        let table = scratch.table();
        request(table, 0, &good(scratch));
        write_descriptor(table, 1, scratch.data(), 512, flag::WRITE | flag::NEXT, 3);
        send_indirect(queue, table.address(), 48, 0);
    }),
    ("indirect-loop", |queue, scratch| {
        let table = scratch.table();
        request(table, 0, &good(scratch));
        write_descriptor(table, 1, scratch.data(), 512, flag::WRITE | flag::NEXT, 0);
        send_indirect(queue, table.address(), 48, 0);
    }),
    ("same-head-twice", |queue, scratch| {
        send(queue, &good(scratch));
        queue.publish(0);
    }),
    ("status-over-used-ring", |queue, scratch| {
        let [header, data, _] = good(scratch);
        let used = queue.used.address();
        send(queue, &[header, data, (used + 2, 1, flag::WRITE)]);
    }),
];

/// All cases, or the one that `case=NAME` names.
pub fn run(arguments: Arguments<'_>) -> Outcome {
    let device = device(arguments)?;
    let only = arguments.text("case");
    let mut count = 0_u64;
    for (name, act) in CASES {
        if only.is_some_and(|only| only != *name) {
            continue;
        }
        one(device, name, *act).inspect_err(|_| println!("blk-evil failing case={name}"))?;
        count += 1;
    }
    if only.is_none() {
        setup(device)?;
    }
    println!("blk-evil cases={count}");
    ensure(count > 0, "no such case")
}

fn start(device: Device) -> Result<Disk, Failure> {
    Disk::start(
        device,
        Options {
            queues: 2,
            queue_size: QUEUE_SIZE,
            mode: Mode::Polling,
            indirect: true,
            event_index: false,
        },
    )
}

fn one(device: Device, name: &str, act: fn(&mut Queue, Scratch)) -> Outcome {
    let mark = alloc::mark();
    let mut disk = start(device)?;
    if disk.offered & feature::INDIRECT == 0 && name.starts_with("indirect") {
        return Ok(());
    }
    let scratch = Scratch(alloc::pages(3 * 4096));
    scratch.0.write(64, 0xee_u8);
    let queue = disk.queue(0).ring();
    act(queue, scratch);
    queue.ring_doorbell();
    let deadline = Deadline::after_ms(PATIENCE_MS);
    loop {
        if device.status() & status::NEEDS_RESET != 0 {
            println!("blk-evil case={name} result=needs-reset");
            break;
        }
        if queue.used.read::<u16>(2) != 0 {
            println!("blk-evil case={name} result=status={:#x}", scratch.0.read::<u8>(64));
            break;
        }
        if deadline.passed() {
            println!("blk-evil case={name} result=silent");
            break;
        }
    }
    device.reset()?;
    alloc::release(&mark);
    short(device)
}

/// Rules about setting a device up.
fn setup(device: Device) -> Outcome {
    device.reset()?;
    let offered = device.offered();
    let foreign = (0..64)
        .map(|bit| 1 << bit)
        .find(|bit| offered & bit == 0)
        .ok_or(failure("all features offered"))?;
    let refused = device.negotiate(feature::VERSION_1 | foreign).is_err();
    println!("blk-evil case=foreign-feature refused={refused}");
    device.reset()?;
    // Ready without any queue, then a notification.
    device.negotiate(feature::VERSION_1)?;
    device.start()?;
    device.reset()?;
    // A queue that does not exist.
    equal(
        "size of a queue that does not exist",
        device.queue_size(device.queues()),
        0_u16,
    )?;
    // Rings outside of RAM.
    device.negotiate(feature::VERSION_1)?;
    device.queue_at(0, 0xff_ffff_0000)?;
    let ready = device.start();
    println!("blk-evil case=rings-in-nowhere needs-reset={}", ready.is_err());
    device.reset()?;
    short(device)
}
