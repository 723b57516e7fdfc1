//! virtio-rng: what a driver gets, from sources that give, wait, end and fail; and threads of iothreads.

mod common;
use common::*;
use ipc::block::{BlockEvent, BlockReply, BlockRequest, EngineChoice, Polling, RngLimit};
use ipc::caps::RngSourceFd;
use ipc::graph::{GraphRequest, NodeId};
use ipc::virtio::{DeviceIndex, DeviceKind, IoThreadIndex};
use std::io::{PipeReader, PipeWriter, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

const RNG: DeviceIndex = DeviceIndex(1);
const NO_LIMIT: RngLimit = RngLimit {
    max_bytes: i64::MAX as u64,
    period_ms: 1000,
};

fn add_rng(thread: u8, queues: u16) -> BlockRequest {
    BlockRequest::AddDevice {
        device: RNG,
        kind: DeviceKind::Rng,
        thread: IoThreadIndex(thread),
        queues,
        queue_size: 8,
    }
}

fn attach(vm: &mut Vm, source: impl Into<OwnedFd>, limit: RngLimit) -> Result<BlockReply, ipc::Failure> {
    vm.helper.ask(BlockRequest::AttachRng {
        device: RNG,
        source: RngSourceFd::new(source.into()),
        limit,
    })
}

/// A disk on the main thread, a virtio-rng device on another.
fn vm(engine: EngineChoice, source: impl Into<OwnedFd>, limit: RngLimit) -> (Vm, Queue) {
    let (memory, ram) = ram();
    let devices = vec![add_device(DeviceIndex(0), 1), add_rng(1, 1)];
    let mut vm = Vm::start_devices(engine, 1, devices, memory, ram);
    let Ok(BlockReply::RngAttached(identity)) = attach(&mut vm, source, limit) else {
        panic!("not attached")
    };
    assert_eq!(identity.features, F_VERSION_1 | F_INDIRECT | F_EVENT_IDX);
    assert!(identity.config.is_empty());
    let queue = activate(&mut vm);
    (vm, queue)
}

fn activate(vm: &mut Vm) -> Queue {
    let mut queue = vm.queue(RNG.0, 0);
    queue.setup.size = 8;
    queue.clear();
    vm.activate_with(RNG.0, 0, std::slice::from_ref(&queue))
        .expect("Activate");
    queue
}

/// Offers a buffer of this size in descriptor `slot`.
fn offer(queue: &mut Queue, slot: u16, bytes: u32) {
    let desc = writable(queue.data_at(slot), bytes);
    queue.write_descriptor(queue.setup.descriptor_table, slot, desc, 0);
    queue.offer(slot);
    queue.publish();
    queue.kick();
}

fn pipe() -> (PipeReader, PipeWriter) {
    std::io::pipe().unwrap()
}

#[test]
fn buffers_come_back_in_order_with_what_the_source_gave() {
    for engine in ENGINES {
        let (reader, mut writer) = pipe();
        let (_vm, mut queue) = vm(engine, reader, NO_LIMIT);
        for slot in 0..4 {
            offer(&mut queue, slot, 10);
        }
        writer.write_all(b"abcdefghij0123").unwrap();
        assert_eq!(queue.wait_used(), (0, 10));
        assert_eq!(queue.get(queue.data_at(0), 10), b"abcdefghij");
        assert_eq!(queue.wait_used(), (1, 4));
        assert_eq!(queue.get(queue.data_at(1), 10), b"0123\0\0\0\0\0\0");
        writer.write_all(b"xy").unwrap();
        assert_eq!(queue.wait_used(), (2, 2));
    }
}

#[test]
fn a_source_that_blocks_holds_up_neither_pause_nor_reset_nor_a_disk() {
    for engine in ENGINES {
        let (reader, mut writer) = pipe();
        let (mut vm, mut queue) = vm(engine, reader, NO_LIMIT);
        offer(&mut queue, 0, 16);
        let file = image(1 << 20);
        vm.attach(0, &file, info(1 << 20));
        let mut disk = vm.activate(0, F_FLUSH).remove(0);
        assert_eq!(disk.write(0, &pattern(1, 4096)), S_OK);
        vm.done(BlockRequest::Pause);
        writer.write_all(b"kept for later..").unwrap();
        // Paused: nothing may change in guest memory.
        assert!(!queue.wait_call(100) && queue.next_used().is_none());
        vm.done(BlockRequest::Resume);
        assert_eq!(queue.wait_used(), (0, 16));
        // What a driver asked for that is gone is given to the next, and not to memory that is no buffer any more.
        offer(&mut queue, 1, 16);
        vm.reset(RNG.0);
        writer.write_all(b"for the next one").unwrap();
        let mut queue = activate(&mut vm);
        queue.put(queue.data_at(1), &[0; 16]);
        offer(&mut queue, 2, 16);
        assert_eq!(queue.wait_used(), (2, 16));
        assert_eq!(queue.get(queue.data_at(2), 16), b"for the next one");
        assert_eq!(queue.get(queue.data_at(1), 16), [0; 16]);
        assert_eq!(disk.read(0, 4096), (S_OK, pattern(1, 4096)));
        assert_eq!(vm.stats().len(), 1);
    }
}

#[test]
fn a_limit_holds_in_every_period() {
    for engine in ENGINES {
        let limit = RngLimit {
            max_bytes: 100,
            period_ms: 150,
        };
        let source = std::fs::File::open("/dev/urandom").unwrap();
        let (_vm, mut queue) = vm(engine, source, limit);
        let start = Instant::now();
        let mut given = 0;
        for slot in 0..8 {
            offer(&mut queue, slot, 64);
            given += queue.wait_used().1;
            let periods = 1 + start.elapsed().as_millis() / 150;
            assert!(
                u128::from(given) <= 100 * periods,
                "{engine:?}: {given} in {periods} periods"
            );
        }
        // 8 buffers take 4 to 6 periods: the first gives at once.
        assert!(
            start.elapsed() >= Duration::from_millis(3 * 150),
            "{:?}",
            start.elapsed()
        );
    }
}

#[test]
fn a_limit_of_nothing_gives_nothing() {
    let limit = RngLimit {
        max_bytes: 0,
        period_ms: 1,
    };
    let (mut vm, mut queue) = vm(EngineChoice::Auto, std::fs::File::open("/dev/zero").unwrap(), limit);
    offer(&mut queue, 0, 64);
    assert!(!queue.wait_call(100));
    vm.reset(RNG.0);
}

#[test]
fn an_end_is_told_once_and_asked_again() {
    for engine in ENGINES {
        let mut file = tempfile::tempfile().unwrap();
        let source = file.try_clone().unwrap();
        let (mut vm, mut queue) = vm(engine, source, NO_LIMIT);
        offer(&mut queue, 0, 8);
        let event = vm.helper.event();
        assert!(
            matches!(event, BlockEvent::RngDry { device: RNG, errno: 0 }),
            "{event:?}"
        );
        // The position is shared with the source: write behind it, and go back.
        file.write_all(b"new data").unwrap();
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(0)).unwrap();
        assert_eq!(queue.wait_used(), (0, 8));
        assert_eq!(queue.get(queue.data_at(0), 8), b"new data");
    }
}

#[test]
fn a_failing_source_is_told_with_its_error() {
    for engine in ENGINES {
        let directory = std::fs::File::open("/").unwrap();
        let (mut vm, mut queue) = vm(engine, directory, NO_LIMIT);
        offer(&mut queue, 0, 8);
        let event = vm.helper.event();
        let expected = libc::EISDIR;
        assert!(
            matches!(event, BlockEvent::RngDry { device: RNG, errno } if errno == expected),
            "{engine:?}: {event:?}"
        );
        vm.reset(RNG.0);
    }
}

#[test]
fn hostile_buffers_break_the_device_and_nothing_else() {
    for engine in ENGINES {
        let source = std::fs::File::open("/dev/urandom").unwrap();
        let (mut vm, mut queue) = vm(engine, source, NO_LIMIT);
        let table = queue.setup.descriptor_table;
        let data = queue.data_at(0);
        for desc in [
            readable(data, 16),
            writable(data, 0),
            writable(RAM_BYTES - 8, 16),
            writable(u64::MAX - 8, 16),
            Desc {
                flags: WRITE | NEXT,
                ..writable(data, 16)
            },
        ] {
            queue.write_descriptor(table, 0, desc, 0);
            queue.offer(0);
            queue.publish();
            queue.kick();
            let event = vm.helper.event();
            assert!(
                matches!(event, BlockEvent::DeviceBroken { device: RNG, .. }),
                "{desc:?}: {event:?}"
            );
            // Broken until it is reset.
            queue.kick();
            assert!(queue.next_used().is_none());
            vm.reset(RNG.0);
            queue = activate(&mut vm);
            offer(&mut queue, 1, 32);
            assert_eq!(queue.wait_used(), (1, 32));
        }
    }
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let (memory, ram) = ram();
    let mut vm = Vm::start_devices(EngineChoice::Auto, 1, vec![add_device(DeviceIndex(0), 1)], memory, ram);
    let zero = || std::fs::File::open("/dev/zero").unwrap();
    let refused = |result: Result<BlockReply, ipc::Failure>| result.unwrap_err().message;
    assert!(refused(attach(&mut vm, zero(), NO_LIMIT)).contains("there is no device 1"));
    let limit = RngLimit {
        max_bytes: 1,
        period_ms: 0,
    };
    let on_disk = vm.helper.ask(BlockRequest::AttachRng {
        device: DeviceIndex(0),
        source: RngSourceFd::new(zero().into()),
        limit,
    });
    assert!(refused(on_disk).contains("is no virtio-rng device"));
    let polling = Polling::default();
    let thread = IoThreadIndex(2);
    let unknown = vm.helper.ask(BlockRequest::SetPolling { thread, polling });
    assert!(refused(unknown).contains("there is no I/O thread 2"));
    let (mut vm, _queue) = self::vm(EngineChoice::Auto, zero(), NO_LIMIT);
    assert!(refused(attach(&mut vm, zero(), NO_LIMIT)).contains("has a source already"));
    vm.add(IoThreadIndex::MAIN, NodeId(9), file_spec(&image(512), info(512)));
    let attach = GraphRequest::Attach {
        device: RNG,
        node: NodeId(9),
        options: options(&info(512)),
    };
    let refused = vm.graph(attach).unwrap_err().message;
    assert!(
        refused.contains("device 1 and node 9 are in different threads"),
        "{refused}"
    );
}

#[test]
fn every_thread_pauses_and_goes_on() {
    for engine in ENGINES {
        let (memory, ram) = ram();
        let disk = |index: u8| BlockRequest::AddDevice {
            device: DeviceIndex(index),
            kind: DeviceKind::Block,
            thread: IoThreadIndex(index),
            queues: 1,
            queue_size: 128,
        };
        let mut vm = Vm::start_devices(engine, 2, (0..3).map(disk).collect(), memory, ram);
        let files: Vec<_> = (0..3).map(|_| image(1 << 20)).collect();
        let mut queues = Vec::new();
        for (index, file) in (0..).zip(&files) {
            vm.attach_in(IoThreadIndex(index), index, file, info(1 << 20));
            queues.push(vm.activate(index, F_FLUSH).remove(0));
        }
        for queue in &mut queues {
            assert_eq!(queue.write(0, &pattern(1, 512)), S_OK);
        }
        vm.done(BlockRequest::Pause);
        for queue in &mut queues {
            // The interrupt of the write before may still be there.
            let _ = queue.call.read();
            queue.put(queue.data_at(0), &pattern(2, 512));
            queue.prepare(0, T_OUT, 1, Some(readable(queue.data_at(0), 512)));
            queue.publish();
            queue.kick();
            assert!(
                !queue.wait_call(50) && queue.next_used().is_none(),
                "served while paused"
            );
        }
        assert!(vm.helper.ask(BlockRequest::Pause).is_err());
        vm.done(BlockRequest::Resume);
        for queue in &mut queues {
            assert_eq!(queue.wait_used().0, 0);
            assert_eq!(queue.status(0), S_OK);
        }
        let writes: Vec<u64> = vm.stats().iter().map(|stats| stats.write.operations).collect();
        assert_eq!(writes, [2, 2, 2]);
    }
}
