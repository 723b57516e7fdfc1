//! What the supervisor may rely on: order of requests, pause, reset, activation, death.

mod common;
use common::*;
use ipc::block::{BlockReply, BlockRequest, DiskInfo, EngineChoice};
use ipc::graph::{GraphRequest, NodeId};
use ipc::virtio::{Activation, ActivationNumber, DeviceIndex, IoThreadIndex};
use std::os::unix::fs::FileExt;

const DISK: u64 = 32 << 20;
const SLOTS: u16 = 32;

/// 32 writes of 64 KiB, offered and not yet published.
fn offer_writes(queue: &mut Queue, seed: u64) {
    for slot in 0..SLOTS {
        let data = pattern(seed + u64::from(slot), 65536);
        queue.put(queue.data_at(slot), &data);
        queue.prepare(
            slot,
            T_OUT,
            u64::from(slot) * 128,
            Some(readable(queue.data_at(slot), 65536)),
        );
    }
}

fn assert_written(file: &std::fs::File, seed: u64) {
    for slot in 0..u64::from(SLOTS) {
        let mut buffer = vec![0; 65536];
        file.read_exact_at(&mut buffer, slot * 65536).unwrap();
        assert!(buffer == pattern(seed + slot, 65536), "slot {slot}");
    }
}

fn stays(queue: &Queue) -> u16 {
    let used = queue.used_index();
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert_eq!(queue.used_index(), used, "a request was answered");
    used
}

#[test]
fn requests_out_of_order_fail_and_change_nothing() {
    let device = DeviceIndex(0);
    let activation = || Activation {
        features: 0,
        queues: Vec::new(),
    };
    let mut early = bulkhead_tests::bare::Bare::start(env!("CARGO_BIN_EXE_block-proc"));
    let mut refused = |request: BlockRequest| assert!(early.ask(request).is_err());
    refused(add_device(device, 1));
    refused(BlockRequest::Seal);
    refused(BlockRequest::Pause);
    refused(BlockRequest::GetStats);
    refused(BlockRequest::Activate {
        device,
        number: ActivationNumber(1),
        activation: activation(),
    });
    let (memory, _) = ram();
    let setup = |memory| BlockRequest::Setup(block_setup(memory, EngineChoice::Auto, 0));
    assert!(matches!(early.ask(setup(memory)), Ok(BlockReply::Done)));
    let mut refused = |request: BlockRequest| assert!(early.ask(request).is_err());
    refused(setup(ram().0));
    refused(add_device(device, 0));
    refused(add_device(device, 33));
    refused(add_device(DeviceIndex(24), 1));
    refused(BlockRequest::AddQueues {
        device,
        queues: Vec::new(),
    });
    assert!(early.ask(add_device(device, 1)).is_ok());
    assert!(early.ask(add_device(device, 1)).is_err());
    assert!(early.ask(BlockRequest::Seal).is_err(), "a queue is missing");
    drop(early);

    let file = image(DISK);
    let mut vm = Vm::start(EngineChoice::Auto, &[1]);
    vm.add(IoThreadIndex::MAIN, NodeId(7), file_spec(&file, info(DISK)));
    let attach = |device, info: DiskInfo| {
        BlockRequest::Graph(GraphRequest::Attach {
            device: DeviceIndex(device),
            node: NodeId(7),
            options: options(&info),
        })
    };
    let mut refused = |request: BlockRequest| assert!(vm.helper.ask(request).is_err());
    refused(BlockRequest::Seal);
    refused(setup(ram().0));
    refused(BlockRequest::Resume);
    refused(BlockRequest::Activate {
        device,
        number: ActivationNumber(1),
        activation: activation(),
    });
    refused(BlockRequest::Reset { device: DeviceIndex(1) });
    refused(attach(1, info(DISK)));
    refused(attach(
        0,
        DiskInfo {
            logical_block_bytes: 1024,
            ..info(DISK)
        },
    ));
    refused(attach(
        0,
        DiskInfo {
            serial: "123456789012345678901".into(),
            ..info(DISK)
        },
    ));
    vm.attach(0, &file, info(DISK));
    assert!(vm.helper.ask(attach(0, info(DISK))).is_err());
    vm.reset(0);
    let mut queue = vm.activate(0, 0).remove(0);
    assert!(vm.activate_with(0, 0, &[]).is_err(), "active already");
    vm.done(BlockRequest::Pause);
    assert!(vm.helper.ask(BlockRequest::Pause).is_err());
    vm.done(BlockRequest::Resume);
    assert_eq!(queue.write(0, &[1; 512]), S_OK);
}

#[test]
fn activation_serves_what_is_there_without_a_kick() {
    for engine in ENGINES {
        let file = image(DISK);
        let mut vm = Vm::start(engine, &[1]);
        vm.attach(0, &file, info(DISK));
        let mut queue = vm.queue(0, 0);
        queue.clear();
        offer_writes(&mut queue, 7);
        queue.publish();
        vm.activate_with(0, F_FLUSH, std::slice::from_ref(&queue)).unwrap();
        (0..SLOTS).for_each(|_| assert_eq!(queue.wait_used().1, 1));
        assert_written(&file, 7);
    }
}

#[test]
fn pause_completes_what_is_in_flight_and_takes_no_more() {
    for engine in ENGINES {
        let file = image(DISK);
        // No F_FLUSH: every write is durable, and so takes its time.
        let (mut vm, mut queue) = Vm::with_disk(engine, &file, info(DISK), 0);
        for round in 0..5u16 {
            offer_writes(&mut queue, 100);
            queue.publish();
            queue.kick();
            vm.done(BlockRequest::Pause);
            let used = stays(&queue);
            assert!(
                used == round * SLOTS || used == (round + 1) * SLOTS,
                "a part of a batch was taken"
            );
            queue.kick();
            assert_eq!(stays(&queue), used);
            vm.done(BlockRequest::Resume);
            for _ in 0..SLOTS {
                let (head, length) = queue.wait_used();
                assert_eq!((queue.status(head as u16 / 3), length), (S_OK, 1));
            }
        }
        assert_written(&file, 100);
        assert_eq!(vm.stats()[0].write.operations, 5 * u64::from(SLOTS));
    }
}

#[test]
fn a_driver_may_be_activated_while_paused_and_is_served_on_resume() {
    let file = image(DISK);
    let mut vm = Vm::start(EngineChoice::Auto, &[1]);
    vm.attach(0, &file, info(DISK));
    vm.done(BlockRequest::Pause);
    let mut queue = vm.queue(0, 0);
    queue.clear();
    offer_writes(&mut queue, 9);
    queue.publish();
    vm.activate_with(0, F_FLUSH, std::slice::from_ref(&queue)).unwrap();
    assert_eq!(stays(&queue), 0);
    vm.done(BlockRequest::Resume);
    (0..SLOTS).for_each(|_| assert_eq!(queue.wait_used().1, 1));
    assert_written(&file, 9);
}

#[test]
fn after_reset_nothing_touches_the_guest_until_it_activates_again() {
    for engine in ENGINES {
        let file = image(DISK);
        let mut vm = Vm::start(engine, &[1, 1]);
        vm.attach(0, &file, info(DISK));
        let other_file = image(DISK);
        vm.attach(1, &other_file, info(DISK));
        let mut other = vm.activate(1, F_FLUSH).remove(0);
        for round in 0..5 {
            let mut queue = vm.activate(0, 0).remove(0);
            offer_writes(&mut queue, round);
            queue.publish();
            queue.kick();
            vm.reset(0);
            let used = stays(&queue);
            assert!(used == 0 || used == SLOTS, "{used} of a batch were answered");
            queue.kick();
            assert_eq!(stays(&queue), used);
            assert_eq!(
                other.write(u64::from(round as u32), &[1; 512]),
                S_OK,
                "the other device goes on"
            );
        }
        let mut queue = vm.activate(0, F_FLUSH).remove(0);
        offer_writes(&mut queue, 50);
        queue.publish();
        queue.kick();
        (0..SLOTS).for_each(|_| assert_eq!(queue.wait_used().1, 1));
        assert_written(&file, 50);
    }
}

#[test]
fn killed_block_proc_loses_no_acknowledged_write() {
    for engine in ENGINES {
        let file = image(DISK);
        let (mut vm, mut queue) = Vm::with_disk(engine, &file, info(DISK), F_FLUSH);
        let mut acknowledged = vec![None; 64];
        let mut flushed = 0;
        let killer = {
            let pid = nix::unistd::Pid::from_raw(vm.helper.child.id() as i32);
            std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(300));
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
            })
        };
        'load: for round in 0.. {
            let place = round % 64;
            let data = pattern(round, 4096);
            queue.put(queue.data_at(0), &data);
            let write = (T_OUT, Some(readable(queue.data_at(0), 4096)));
            for (kind, data) in [write, (T_FLUSH, None)] {
                queue.prepare(0, kind, place * 8, data);
                queue.publish();
                queue.kick();
                while queue.used_index() == queue.seen {
                    if vm.helper.child.try_wait().unwrap().is_some() {
                        // This place may hold the old or the new data.
                        acknowledged[place as usize] = None;
                        break 'load;
                    }
                    std::thread::yield_now();
                }
                queue.next_used();
                assert_eq!(queue.status(0), S_OK);
            }
            acknowledged[place as usize] = Some(round);
            flushed += 1;
        }
        killer.join().unwrap();
        assert!(flushed > 0, "nothing was written before the kill");
        for (place, round) in acknowledged.iter().enumerate() {
            let mut buffer = vec![0; 4096];
            file.read_exact_at(&mut buffer, place as u64 * 4096).unwrap();
            if let Some(round) = round {
                assert!(buffer == pattern(*round, 4096), "place {place}, round {round}");
            }
        }
        vm.helper.child.wait().unwrap();
    }
}

#[test]
fn a_successor_goes_on_where_the_used_ring_ends() {
    for engine in ENGINES {
        let file = image(DISK);
        let (memory, mapping) = ram();
        let again = memory.try_clone().unwrap();
        let mut vm = Vm::start_on(engine, &[1], memory, mapping.clone());
        vm.attach(0, &file, info(DISK));
        let mut queue = vm.activate(0, F_FLUSH | F_EVENT_IDX).remove(0);
        for sector in 0..300 {
            // No interrupt is asked for beyond the first: look at the ring.
            queue.put(queue.data_at(0), &pattern(sector, 512));
            queue.prepare(0, T_OUT, sector, Some(readable(queue.data_at(0), 512)));
            queue.publish();
            queue.kick();
            while queue.next_used().is_none() {
                std::thread::yield_now();
            }
        }
        vm.helper.child.kill().unwrap();
        vm.helper.child.wait().unwrap();
        queue.put(queue.data_at(0), &pattern(1000, 512));
        queue.prepare(0, T_OUT, 1000, Some(readable(queue.data_at(0), 512)));
        queue.publish();

        let mut successor = Vm::start_on(engine, &[1], again, mapping);
        successor.attach(0, &file, info(DISK));
        let mut ours = successor.queue(0, 0);
        (ours.avail, ours.seen) = (queue.avail, queue.seen);
        successor
            .activate_with(0, F_FLUSH | F_EVENT_IDX, std::slice::from_ref(&ours))
            .unwrap();
        assert!(
            ours.wait_call(20_000),
            "an interrupt may have been lost with the predecessor"
        );
        while ours.next_used().is_none() {
            std::thread::yield_now();
        }
        let mut buffer = [0; 512];
        file.read_exact_at(&mut buffer, 1000 * 512).unwrap();
        assert_eq!(buffer[..], pattern(1000, 512));
        assert_eq!(
            successor.stats()[0].write.operations,
            1,
            "only what was not answered is done again"
        );
    }
}

#[test]
fn block_proc_ends_with_its_supervisor() {
    let vm = Vm::start(EngineChoice::Auto, &[1]);
    let mut child = {
        let mut vm = vm;
        std::mem::replace(
            &mut vm.helper.child,
            std::process::Command::new("/bin/true").spawn().unwrap(),
        )
    };
    // The channel went with `vm`.
    assert_eq!(child.wait().unwrap().code(), Some(ipc::helper::CHANNEL_LOST_STATUS));
}
