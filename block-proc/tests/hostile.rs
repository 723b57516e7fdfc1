//! A hostile driver breaks its own device and nothing else.

mod common;
use common::*;
use ipc::block::{BlockEvent, EngineChoice};
use ipc::virtio::{DeviceIndex, QueueSetup};

const DISK: u64 = 1 << 20;

/// Name, what the driver does to its ring, and a word of the report.
type Breakage = (&'static str, fn(&mut Queue), &'static str);

fn offer_chain(queue: &mut Queue, chain: &[Desc]) {
    queue.write_header(0, T_IN, 0);
    queue.write_chain(queue.setup.descriptor_table, 0, chain);
    queue.offer(0);
}

fn header(queue: &Queue) -> Desc {
    readable(queue.header_at(0), 16)
}

fn status(queue: &Queue) -> Desc {
    writable(queue.status_at(0), 1)
}

fn offer_indirect(queue: &mut Queue, address: u64, bytes: u32) {
    offer_chain(
        queue,
        &[Desc {
            address,
            bytes,
            flags: INDIRECT,
        }],
    );
}

const BREAKAGES: &[Breakage] = &[
    (
        "avail index far ahead",
        |q| q.avail = q.avail.wrapping_add(QUEUE_SIZE + 1),
        "available ring index",
    ),
    (
        "avail index behind",
        |q| q.avail = q.avail.wrapping_sub(1),
        "available ring index",
    ),
    ("head outside the table", |q| q.offer(QUEUE_SIZE), "does not end"),
    (
        "loop",
        |q| {
            q.write_header(0, T_IN, 0);
            let table = q.setup.descriptor_table;
            let first = Desc {
                flags: NEXT,
                ..header(q)
            };
            q.write_descriptor(table, 0, first, 1);
            q.write_descriptor(table, 1, first, 0);
            q.offer(0);
        },
        "does not end",
    ),
    (
        "next outside the table",
        |q| {
            let first = Desc {
                flags: NEXT,
                ..header(q)
            };
            q.write_descriptor(q.setup.descriptor_table, 0, first, 0x7fff);
            q.offer(0);
        },
        "does not end",
    ),
    (
        "data past the end of RAM",
        |q| offer_chain(q, &[header(q), writable(RAM_BYTES - 256, 512), status(q)]),
        "outside RAM",
    ),
    (
        "data at the end of the address space",
        |q| offer_chain(q, &[header(q), writable(u64::MAX - 255, 512), status(q)]),
        "outside RAM",
    ),
    (
        "header in the PCI hole",
        |q| offer_chain(q, &[readable(0xc000_0000, 16), status(q)]),
        "outside RAM",
    ),
    (
        "4 GiB and more",
        |q| offer_chain(q, &[header(q), writable(0, u32::MAX), status(q)]),
        "",
    ),
    ("no status", |q| offer_chain(q, &[header(q)]), "status"),
    (
        "empty status",
        |q| offer_chain(q, &[header(q), writable(q.status_at(0), 0)]),
        "status",
    ),
    ("no header", |q| offer_chain(q, &[status(q)]), "header"),
    (
        "short header",
        |q| offer_chain(q, &[readable(q.header_at(0), 15), status(q)]),
        "header",
    ),
    (
        "readable after writable",
        |q| offer_chain(q, &[header(q), status(q), readable(q.data_at(0), 512)]),
        "follows",
    ),
    (
        "indirect table outside RAM",
        |q| offer_indirect(q, RAM_BYTES, 48),
        "does not end",
    ),
    (
        "indirect table of odd size",
        |q| offer_indirect(q, q.data_at(0), 47),
        "does not end",
    ),
    (
        "empty indirect table",
        |q| offer_indirect(q, q.data_at(0), 0),
        "does not end",
    ),
    (
        "nested indirect table",
        |q| {
            let table = q.data_at(0);
            let nested = Desc {
                address: table,
                bytes: 32,
                flags: INDIRECT,
            };
            q.write_chain(table, 0, &[header(q), nested]);
            offer_indirect(q, table, 32);
        },
        "does not end",
    ),
    (
        "a chain longer than any queue",
        |q| {
            let table = q.data_at(0);
            let mut chain = vec![header(q)];
            chain.extend((0..1100).map(|_| writable(q.data_at(1), 1)));
            q.write_chain(table, 0, &chain);
            offer_indirect(q, table, 16 * 1101);
        },
        "longer",
    ),
];

#[test]
fn a_broken_ring_stops_its_device_alone_until_reset() {
    let file = image(DISK);
    let mut vm = Vm::start(EngineChoice::Auto, &[2, 1]);
    vm.attach(0, &file, info(DISK));
    vm.attach(1, &image(DISK), info(DISK));
    let mut healthy = vm.activate(1, F_FLUSH).remove(0);
    for (name, breakage, word) in BREAKAGES {
        let mut queues = vm.activate(0, F_FLUSH | F_INDIRECT);
        assert_eq!(queues[0].write(0, &pattern(1, 512)), S_OK, "{name}");
        breakage(&mut queues[0]);
        queues[0].publish();
        queues[0].kick();
        let BlockEvent::DeviceBroken { device, detail } = vm.helper.event() else {
            panic!("{name}: another event")
        };
        assert_eq!(device, DeviceIndex(0));
        assert!(detail.contains("queue 0") && detail.contains(word), "{name}: {detail}");
        // Neither queue is served any more, and nothing is reported twice.
        let mut second = queues.remove(1);
        second.prepare(0, T_IN, 0, Some(writable(second.data_at(0), 512)));
        second.publish();
        second.kick();
        queues[0].kick();
        assert_eq!(healthy.write(3, &pattern(2, 512)), S_OK, "{name}: the other device");
        vm.stats();
        assert_eq!((second.used_index(), queues[0].used_index()), (0, 1), "{name}");
        vm.reset(0);
    }
    let mut queue = vm.activate(0, F_FLUSH).remove(0);
    assert_eq!(queue.read(0, 512), (S_OK, pattern(1, 512)));
}

#[test]
fn rings_that_cannot_be_are_refused_at_activation() {
    let mut vm = Vm::start(EngineChoice::Auto, &[1]);
    vm.attach(0, &image(DISK), info(DISK));
    let good = vm.queue(0, 0).setup;
    let bad = [
        QueueSetup { index: 1, ..good },
        QueueSetup { size: 0, ..good },
        QueueSetup { size: 100, ..good },
        QueueSetup { size: 2048, ..good },
        QueueSetup {
            descriptor_table: good.descriptor_table + 8,
            ..good
        },
        QueueSetup {
            avail_ring: good.avail_ring + 1,
            ..good
        },
        QueueSetup {
            used_ring: good.used_ring + 2,
            ..good
        },
        QueueSetup {
            descriptor_table: RAM_BYTES - 16,
            ..good
        },
        QueueSetup { avail_ring: 0, ..good },
        QueueSetup {
            avail_ring: RAM_BYTES - 16,
            ..good
        },
        QueueSetup {
            used_ring: u64::MAX - 3,
            ..good
        },
    ];
    for setup in bad {
        let mut queue = vm.queue(0, 0);
        queue.setup = setup;
        assert!(vm.activate_with(0, 0, &[queue]).is_err(), "{setup:?}");
    }
    let twice = [vm.queue(0, 0), vm.queue(0, 0)];
    assert!(vm.activate_with(0, 0, &twice).is_err());
    let mut queue = vm.activate(0, 0).remove(0);
    assert_eq!(queue.write(0, &[1; 512]), S_OK);
}

#[test]
fn a_guest_that_changes_requests_in_flight_gets_wrong_data_and_nothing_worse() {
    for engine in ENGINES {
        let file = image(DISK);
        let (mut vm, mut queue) = Vm::with_disk(engine, &file, info(DISK), F_FLUSH);
        let stop = std::sync::atomic::AtomicBool::new(false);
        let scribbler = vm.queue(0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut state = 1u64;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    // Type, sector, and the data's address and length, all the time.
                    let slot = (state >> 60) as u16;
                    scribbler.put(scribbler.header_at(slot), &((state >> 40) as u32 % 16).to_le_bytes());
                    scribbler.put(scribbler.header_at(slot) + 8, &(state >> 50).to_le_bytes());
                    let descriptor = scribbler.setup.descriptor_table + u64::from(slot * 3 + 1) * 16;
                    scribbler.put(descriptor, &(state % (RAM_BYTES - 65536)).to_le_bytes()[..4]);
                }
            });
            for _ in 0..300 {
                for slot in 0..16 {
                    queue.prepare(slot, T_IN, 0, Some(writable(queue.data_at(slot), 4096)));
                }
                queue.publish();
                queue.kick();
                for _ in 0..200_000 {
                    if queue.used_index() == queue.avail {
                        break;
                    }
                    std::thread::yield_now();
                }
                queue.seen = queue.used_index();
                if queue.seen != queue.avail {
                    // Data was read into the rings: the device may be broken by now.
                    vm.reset(0);
                    queue = vm.activate(0, F_FLUSH).remove(0);
                }
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert!(vm.helper.child.try_wait().unwrap().is_none(), "block-proc is gone");
        vm.reset(0);
        let mut queue = vm.activate(0, F_FLUSH).remove(0);
        assert_eq!(queue.write(9, &pattern(4, 512)), S_OK);
        assert_eq!(queue.read(9, 512), (S_OK, pattern(4, 512)));
    }
}
