//! What a guest may rely on: every request type, on both engines, checked in the file itself.

mod common;
use common::*;
use ipc::block::{BlockEvent, BlockRequest, DiskInfo, EngineChoice, ErrorAction, IoKind};
use ipc::graph::{DeviceOptions, GraphReply, GraphRequest, NodeId, OnError};
use ipc::virtio::DeviceIndex;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

const DISK: u64 = 8 << 20;

fn in_file(file: &std::fs::File, sector: u64, bytes: usize) -> Vec<u8> {
    let mut buffer = vec![0; bytes];
    file.read_exact_at(&mut buffer, sector * 512).unwrap();
    buffer
}

#[test]
fn written_data_lands_in_the_file_and_is_read_back() {
    for engine in ENGINES {
        let file = image(DISK);
        let (mut vm, mut queue) = Vm::with_disk(engine, &file, info(DISK), F_FLUSH);
        let data = pattern(1, 24 * 512);
        assert_eq!(queue.write(100, &data), S_OK);
        assert_eq!(in_file(&file, 100, data.len()), data);
        file.write_all_at(b"from outside", 5000 * 512).unwrap();
        let (status, read) = queue.read(5000, 1024);
        assert_eq!((status, &read[..12]), (S_OK, &b"from outside"[..]));
        let (status, length) = queue.ask(T_IN, 100, Some(writable(queue.data_at(0), 4096)));
        assert_eq!((status, length), (S_OK, 4097));
        assert_eq!(queue.get(queue.data_at(0), 4096), data[..4096]);
        let (status, length) = queue.ask(T_FLUSH, 0, None);
        assert_eq!((status, length), (S_OK, 1));
        let stats = vm.stats().remove(0);
        let (read, write, flush) = (stats.read, stats.write, stats.flush);
        assert_eq!((read.operations, write.operations, flush.operations), (2, 1, 1));
        assert_eq!((read.bytes, write.bytes, flush.bytes), (5120, 12288, 0));
        assert_eq!((read.failed, write.failed, stats.unmap.operations), (0, 0, 0));
        assert!(read.total_ns > 0 && write.total_ns > 0 && flush.total_ns > 0 && stats.idle_ns.is_some());
    }
}

#[test]
fn the_driver_is_shown_what_the_disk_can() {
    let mut vm = Vm::start(EngineChoice::Auto, &[4, 1]);
    assert_ne!(vm.engine, EngineChoice::Auto);
    let file = image(DISK + 700);
    let identity = vm.attach(0, &file, info(DISK + 700));
    let all = F_VERSION_1 | F_INDIRECT | F_EVENT_IDX | F_FLUSH | F_MQ | F_DISCARD | F_WRITE_ZEROES;
    assert_eq!(identity.features & all, all);
    assert_eq!(identity.features & F_RO, 0);
    let config = identity.config;
    let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), DISK / 512 + 1);
    assert_eq!((u32_at(12), u32_at(20)), (126, 512));
    assert_eq!(config[34..36], 4u16.to_le_bytes());
    assert_eq!((u32_at(36), u32_at(40), u32_at(44)), (0x3f_ffff, 16, 1));
    let read_only = DiskInfo {
        read_only: true,
        write_cache: false,
        logical_block_bytes: 4096,
        ..info(DISK + 700)
    };
    let identity = vm.attach(1, &file, read_only);
    assert_eq!(
        identity.features & (F_RO | F_DISCARD | F_WRITE_ZEROES | F_FLUSH | F_MQ),
        F_RO
    );
    assert_eq!(u64::from_le_bytes(identity.config[..8].try_into().unwrap()), DISK / 512);
}

#[test]
fn any_split_of_header_data_and_status_is_served() {
    for engine in ENGINES {
        let file = image(DISK);
        let (_vm, mut queue) = Vm::with_disk(engine, &file, info(DISK), F_INDIRECT);
        let data = pattern(2, 1024);
        let (header, area) = (queue.header_at(0), queue.data_at(0));
        // Header in three pieces, the last with the first data; data in odd pieces.
        queue.write_header(0, T_OUT, 7);
        let first = queue.get(header, 16);
        queue.put(area, &[&first[5..], &data[..]].concat());
        let chain = [
            readable(header, 4),
            readable(header + 4, 1),
            readable(area, 11 + 13),
            readable(area + 24, 500),
            readable(area + 524, 511),
            writable(queue.status_at(0), 1),
        ];
        assert_eq!(queue.ask_chain(&chain), (S_OK, 1));
        assert_eq!(in_file(&file, 7, 1024), data);
        // Data and status in one descriptor, after an empty one.
        queue.write_header(0, T_IN, 7);
        let chain = [
            readable(header, 16),
            writable(area, 0),
            writable(area, 100),
            writable(area + 100, 925),
        ];
        assert_eq!(
            queue.ask_chain(&chain),
            (S_UNSET, 1025),
            "the status is in the data's descriptor"
        );
        assert_eq!(queue.get(area, 1025), [&data[..], &[S_OK]].concat());
        // The same through an indirect table.
        queue.write_header(0, T_IN, 8);
        let table = area + 0x8000;
        let chain = [
            readable(header, 16),
            writable(area, 512),
            writable(queue.status_at(0), 1),
        ];
        queue.write_chain(table, 0, &chain);
        let indirect = Desc {
            address: table,
            bytes: 48,
            flags: INDIRECT,
        };
        assert_eq!(queue.ask_chain(&[indirect]), (S_OK, 513));
        assert_eq!(queue.get(area, 512), data[512..]);
    }
}

#[test]
fn ranges_outside_the_disk_fail_without_touching_it() {
    for engine in ENGINES {
        let file = image(DISK);
        let (mut vm, mut queue) = Vm::with_disk(engine, &file, info(DISK), 0);
        let end = DISK / 512;
        for sector in [end, end - 1, u64::MAX, u64::MAX - 1, 1 << 55, (1 << 55) - 1] {
            assert_eq!(queue.write(sector, &[1; 1024]), S_IOERR, "sector {sector}");
            let (status, read) = queue.read(sector, 1024);
            assert_eq!((status, read), (S_IOERR, vec![0xee; 1024]), "sector {sector}");
        }
        assert_eq!(queue.write(end - 2, &[1; 1024]), S_OK);
        assert_eq!(queue.write(0, &[1; 511]), S_IOERR);
        assert_eq!(queue.write(0, &[]), S_OK);
        assert_eq!(queue.ranges(T_DISCARD, &[(end - 1, 2, 0)]), S_IOERR);
        assert_eq!(queue.ranges(T_WRITE_ZEROES, &[(u64::MAX, 2, 0)]), S_IOERR);
        // A failed read has written nothing for certain.
        let (_, length) = queue.ask(T_IN, end, Some(writable(queue.data_at(0), 512)));
        assert_eq!(length, 0);
        assert_eq!(file.metadata().unwrap().len(), DISK);
        let stats = vm.stats().remove(0);
        assert_eq!(
            (stats.write.invalid, stats.read.invalid, stats.unmap.invalid),
            (8, 7, 1)
        );
        assert!(in_file(&file, 0, 4096).iter().all(|&byte| byte == 0));
    }
}

#[test]
fn unknown_requests_are_unsupported() {
    let file = image(DISK);
    let (_vm, mut queue) = Vm::with_disk(EngineChoice::Auto, &file, info(DISK), 0);
    for kind in [2, 3, 5, 14, 15, 0x8000_0000, u32::MAX] {
        assert_eq!(queue.ask(kind, 0, None), (S_UNSUPP, 1), "type {kind}");
    }
    assert_eq!(
        queue.ranges(T_DISCARD, &[(0, 1, 1)]),
        S_UNSUPP,
        "discard has no unmap flag"
    );
    assert_eq!(queue.ranges(T_WRITE_ZEROES, &[(0, 1, 2)]), S_UNSUPP);
    assert_eq!(queue.ranges(T_DISCARD, &[(0, 1, 0); 17]), S_IOERR);
    assert_eq!(queue.ranges(T_DISCARD, &[(0, 0x40_0000, 0)]), S_IOERR);
    let odd = Some(readable(queue.data_at(0), 17));
    assert_eq!(queue.ask(T_DISCARD, 0, odd).0, S_IOERR);
    assert_eq!(queue.ask(T_DISCARD, 0, None).0, S_IOERR);
}

#[test]
fn the_serial_number_is_cut_and_padded_to_the_buffer() {
    let file = image(DISK);
    let (_vm, mut queue) = Vm::with_disk(EngineChoice::Auto, &file, info(DISK), 0);
    let area = queue.data_at(0);
    queue.put(area, &[0xaa; 64]);
    assert_eq!(queue.ask(T_GET_ID, 0, Some(writable(area, 20))), (S_OK, 21));
    assert_eq!(queue.get(area, 21), b"bulkhead-0001\0\0\0\0\0\0\0\xaa");
    assert_eq!(queue.ask(T_GET_ID, 0, Some(writable(area, 4))), (S_OK, 5));
    assert_eq!(queue.ask(T_GET_ID, 0, Some(writable(area, 40))), (S_OK, 20));
    assert_eq!(queue.get(area + 20, 1), [0xaa]);
}

#[test]
fn a_read_only_disk_refuses_everything_that_changes_it() {
    for engine in ENGINES {
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(DISK).unwrap();
        let file = std::fs::File::open(named.path()).unwrap();
        let read_only = DiskInfo {
            read_only: true,
            ..info(DISK)
        };
        let (_vm, mut queue) = Vm::with_disk(engine, &file, read_only, F_RO | F_FLUSH);
        assert_eq!(queue.write(0, &[1; 512]), S_IOERR);
        assert_eq!(queue.ranges(T_DISCARD, &[(0, 1, 0)]), S_IOERR);
        assert_eq!(queue.ranges(T_WRITE_ZEROES, &[(0, 1, 0)]), S_IOERR);
        assert_eq!(queue.read(0, 512), (S_OK, vec![0; 512]));
        assert_eq!(queue.ask(T_FLUSH, 0, None).0, S_OK);
    }
}

#[test]
fn discard_frees_space_and_write_zeroes_makes_zeroes() {
    for engine in ENGINES {
        let file = image(DISK);
        let (mut vm, mut queue) = Vm::with_disk(engine, &file, info(DISK), 0);
        for sector in (0..1024).step_by(128) {
            assert_eq!(queue.write(sector, &pattern(sector, 65536)), S_OK);
        }
        file.sync_all().unwrap();
        let full = file.metadata().unwrap().blocks();
        // Two ranges and an empty one between them.
        assert_eq!(queue.ranges(T_DISCARD, &[(0, 256, 0), (3, 0, 0), (512, 128, 0)]), S_OK);
        assert!(
            file.metadata().unwrap().blocks() <= full - 384,
            "space was not given back"
        );
        assert!(in_file(&file, 0, 256 * 512).iter().all(|&byte| byte == 0));
        let kept = in_file(&file, 256, 128 * 512);
        assert_eq!(kept, pattern(256, 65536));
        assert_eq!(queue.ranges(T_WRITE_ZEROES, &[(257, 3, 0)]), S_OK);
        assert_eq!(in_file(&file, 257, 1536), [0; 1536]);
        assert_eq!(in_file(&file, 256, 512), kept[..512]);
        assert_eq!(in_file(&file, 260, 512), kept[2048..2560]);
        let before = file.metadata().unwrap().blocks();
        assert_eq!(queue.ranges(T_WRITE_ZEROES, &[(896, 128, 1)]), S_OK);
        assert!(file.metadata().unwrap().blocks() < before, "unmap was allowed");
        assert_eq!(file.metadata().unwrap().len(), DISK);
        let stats = &vm.stats()[0];
        let (unmap, write) = (&stats.unmap, &stats.write);
        assert_eq!((unmap.operations, unmap.bytes, write.operations - 8), (1, 384 * 512, 2));
    }
}

#[test]
fn zeroes_are_written_where_the_file_system_cannot_make_them() {
    for engine in ENGINES {
        // tmpfs has no FALLOC_FL_ZERO_RANGE.
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(DISK).unwrap();
        let without_unmap = DiskInfo {
            discard: false,
            ..info(DISK)
        };
        let (_vm, mut queue) = Vm::with_disk(engine, &file, without_unmap, 0);
        file.write_all_at(&vec![7; 4 << 20], 0).unwrap();
        assert_eq!(queue.ranges(T_WRITE_ZEROES, &[(1, 5001, 1)]), S_OK);
        assert_eq!(in_file(&file, 0, 512), [7; 512]);
        assert!(in_file(&file, 1, 5001 * 512).iter().all(|&byte| byte == 0));
        assert_eq!(in_file(&file, 5002, 512), [7; 512]);
        // Discard is accepted and ignored.
        assert_eq!(queue.ranges(T_DISCARD, &[(0, 1, 0)]), S_OK);
        assert_eq!(in_file(&file, 0, 512), [7; 512]);
    }
}

#[test]
fn direct_io_takes_any_buffer_alignment() {
    for engine in ENGINES {
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(DISK).unwrap();
        let Ok(file) = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(named.path())
        else {
            eprintln!("SKIPPED: the file system of the temporary directory has no O_DIRECT");
            return;
        };
        let direct = DiskInfo {
            direct: true,
            logical_block_bytes: 4096,
            ..info(DISK)
        };
        let (_vm, mut queue) = Vm::with_disk(engine, &file, direct, F_INDIRECT);
        let data = pattern(3, 12288);
        assert_eq!(queue.write(8, &data), S_OK);
        assert_eq!(queue.read(8, 12288), (S_OK, data.clone()));
        // Larger than a bounce buffer, at an odd address, in pieces.
        let (header, area, status) = (queue.header_at(0), queue.data_at(0) + 3, queue.status_at(0));
        let big = pattern(4, 1 << 20);
        queue.put(area, &big);
        queue.write_header(0, T_OUT, 800);
        let chain = [
            readable(header, 16),
            readable(area, 1001),
            readable(area + 1001, (1 << 20) - 1001),
            writable(status, 1),
        ];
        assert_eq!(queue.ask_chain(&chain), (S_OK, 1));
        assert_eq!(
            std::fs::read(named.path()).unwrap()[800 * 512..][..1 << 20],
            big,
            "what was written"
        );
        queue.put(area, &vec![0; 1 << 20]);
        queue.write_header(0, T_IN, 800);
        let chain = [
            readable(header, 16),
            writable(area, 700_001),
            writable(area + 700_001, (1 << 20) - 700_001),
            writable(status, 1),
        ];
        assert_eq!(queue.ask_chain(&chain), (S_OK, (1 << 20) + 1));
        assert_eq!(queue.get(area, 1 << 20), big);
        // Less than a block is refused before it reaches the host.
        assert_eq!(queue.write(1, &[0; 4096]), S_IOERR);
        assert_eq!(queue.write(8, &[0; 512]), S_IOERR);
    }
}

#[test]
fn four_queues_work_in_parallel() {
    for engine in ENGINES {
        let file = image(32 << 20);
        let mut vm = Vm::start(engine, &[4]);
        vm.attach(0, &file, info(32 << 20));
        let queues = vm.activate(0, F_FLUSH | F_EVENT_IDX | F_MQ);
        std::thread::scope(|scope| {
            for mut queue in queues {
                scope.spawn(move || {
                    let number = u64::from(queue.setup.index);
                    for round in 0..100u64 {
                        for slot in 0..16u64 {
                            let sector = number * 16384 + (round % 50 * 16 + slot) * 8;
                            let data = pattern(sector + round, 4096);
                            let at = queue.data_at(slot as u16);
                            queue.put(at, &data);
                            queue.prepare(slot as u16, T_OUT, sector, Some(readable(at, 4096)));
                        }
                        queue.publish();
                        queue.kick();
                        ask_for_interrupt_after(&queue, 16);
                        for _ in 0..16 {
                            let (head, length) = queue.wait_used();
                            assert_eq!((queue.status((head / 3) as u16), length), (S_OK, 1));
                        }
                    }
                });
            }
        });
        for number in 0..4 {
            for place in 0..800 {
                let sector = number * 16384 + place * 8;
                let round = 50 + place / 16;
                assert_eq!(
                    in_file(&file, sector, 4096),
                    pattern(sector + round, 4096),
                    "sector {sector}"
                );
            }
        }
        assert_eq!(vm.stats()[0].write.operations, 6400);
    }
}

/// Event-idx: interrupt me when that many more answers are there. Read the used ring afterwards.
fn ask_for_interrupt_after(queue: &Queue, answers: u16) {
    let event = queue.seen.wrapping_add(answers).wrapping_sub(1);
    let place = queue.setup.avail_ring + 4 + 2 * u64::from(queue.setup.size);
    queue.put(place, &event.to_le_bytes());
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    // The answers may have come before the request for the interrupt.
    if queue.used_index().wrapping_sub(queue.seen) >= answers {
        queue.call.write(1).unwrap();
    }
}

#[test]
fn event_idx_holds_interrupts_back_until_they_are_wanted() {
    for engine in ENGINES {
        let file = image(DISK);
        let (_vm, mut queue) = Vm::with_disk(engine, &file, info(DISK), F_EVENT_IDX);
        ask_for_interrupt_after(&queue, 3);
        for slot in 0..3 {
            queue.prepare(slot, T_IN, 0, Some(writable(queue.data_at(slot), 512)));
            queue.publish();
            queue.kick();
            if slot < 2 {
                while queue.used_index() != slot + 1 {
                    std::thread::yield_now();
                }
                assert!(!queue.wait_call(0), "an interrupt too early, after {}", slot + 1);
            }
        }
        assert!(queue.wait_call(20_000), "no interrupt after the third");
        assert_eq!(queue.used_index(), 3);
        // avail_event: the device asks for the kick of the next request.
        let avail_event = queue.setup.used_ring + 4 + 8 * u64::from(queue.setup.size);
        assert_eq!(queue.get(avail_event, 2), 3u16.to_le_bytes());
    }
}

#[test]
fn a_driver_that_polls_gets_no_interrupts() {
    for engine in ENGINES {
        let file = image(DISK);
        let (_vm, mut queue) = Vm::with_disk(engine, &file, info(DISK), 0);
        queue.put(queue.setup.avail_ring, &1u16.to_le_bytes());
        queue.prepare(0, T_IN, 0, Some(writable(queue.data_at(0), 512)));
        queue.publish();
        queue.kick();
        while queue.used_index() != 1 {
            std::thread::yield_now();
        }
        assert!(!queue.wait_call(50));
        assert_eq!(queue.status(0), S_OK);
    }
}

#[test]
fn host_errors_reach_the_guest_and_once_a_second_the_supervisor() {
    for engine in ENGINES {
        let file = image(DISK);
        let (mut vm, mut queue) = Vm::with_disk(engine, &file, info(DISK), 0);
        assert_eq!(queue.read(0, 512).0, S_OK);
        // The file is shorter than it was: reading is an error, not zeroes.
        file.set_len(4096).unwrap();
        let start = std::time::Instant::now();
        for _ in 0..20 {
            assert_eq!(queue.read(64, 512).0, S_IOERR);
        }
        let within_a_second = start.elapsed() < std::time::Duration::from_millis(900);
        let BlockEvent::IoError {
            device,
            node,
            kind,
            action,
            errno,
        } = vm.helper.event()
        else {
            panic!("another event")
        };
        assert_eq!((device, kind, errno), (DeviceIndex(0), IoKind::Read, libc::EIO));
        assert_eq!((node, action), (Some(NodeId(1)), ErrorAction::Report));
        assert_eq!(vm.stats()[0].read.failed, 20);
        assert_eq!(queue.read(0, 512).0, S_OK);
        // The next event is the next thing that happens, not one of the other nineteen.
        queue.offer(QUEUE_SIZE);
        queue.publish();
        queue.kick();
        if within_a_second {
            assert!(matches!(vm.helper.event(), BlockEvent::DeviceBroken { .. }));
        }
    }
}

#[test]
fn a_full_disk_is_an_error_and_not_the_end() {
    for engine in ENGINES {
        let Some(file) = file_on_small_tmpfs() else { return };
        let (mut vm, mut queue) = Vm::with_disk(engine, &file, info(DISK), F_FLUSH);
        let mut written = 0;
        while queue.write(written * 128, &pattern(written, 65536)) == S_OK {
            written += 1;
            assert!(written < 64, "a file system of 1 MiB took 4 MiB");
        }
        let BlockEvent::IoError { kind, errno, .. } = vm.helper.event() else {
            panic!("another event")
        };
        assert_eq!((kind, errno), (IoKind::Write, libc::ENOSPC));
        // What is there stays readable; room that is freed can be used again.
        assert_eq!(queue.read(0, 65536), (S_OK, pattern(0, 65536)));
        assert_eq!(queue.ranges(T_DISCARD, &[(0, 256, 0)]), S_OK);
        assert_eq!(queue.write(written * 128, &pattern(written, 65536)), S_OK);
        assert_eq!(in_file(&file, written * 128, 65536), pattern(written, 65536));
    }
}

#[test]
fn a_request_that_stops_the_machine_is_tried_again_and_loses_nothing() {
    for engine in ENGINES {
        let Some(file) = file_on_small_tmpfs() else { return };
        let mut vm = Vm::start(engine, &[1]);
        let mut queue = attach_with(&mut vm, &file, OnError::Enospc);
        let mut sector = 0;
        // One request at a time, until one is not answered.
        let kept = loop {
            queue.put(queue.data_at(0), &pattern(sector, 65536));
            queue.prepare(0, T_OUT, sector, Some(readable(queue.data_at(0), 65536)));
            queue.publish();
            queue.kick();
            if !queue.wait_call(500) {
                break sector;
            }
            assert_eq!((queue.next_used(), queue.status(0)), (Some((0, 1)), S_OK));
            sector += 128;
        };
        let event = vm.helper.event();
        let BlockEvent::IoError {
            kind, action, errno, ..
        } = event
        else {
            panic!("{event:?}")
        };
        assert_eq!((kind, action, errno), (IoKind::Write, ErrorAction::Stop, libc::ENOSPC));
        vm.done(BlockRequest::Pause);
        // Tried again without more room, it is kept again.
        vm.done(BlockRequest::Resume);
        assert!(matches!(
            vm.helper.event(),
            BlockEvent::IoError {
                action: ErrorAction::Stop,
                ..
            }
        ));
        vm.done(BlockRequest::Pause);
        assert_eq!(queue.next_used(), None);
        free(&file, 0, 256 << 10);
        vm.done(BlockRequest::Resume);
        assert_eq!(queue.wait_used(), (0, 1));
        assert_eq!(queue.status(0), S_OK);
        assert_eq!(in_file(&file, kept, 65536), pattern(kept, 65536));
        let write = vm.stats().remove(0).write;
        assert_eq!((write.failed, write.operations), (0, kept / 128 + 1));
    }
}

#[test]
fn a_reset_forgets_what_was_kept_and_ignored_errors_are_told_as_ignored() {
    for engine in ENGINES {
        let file = image(DISK);
        let mut vm = Vm::start(engine, &[1]);
        let mut queue = attach_with(&mut vm, &file, OnError::Stop);
        file.set_len(4096).unwrap();
        queue.prepare(0, T_IN, 64, Some(writable(queue.data_at(0), 512)));
        queue.publish();
        queue.kick();
        assert!(matches!(
            vm.helper.event(),
            BlockEvent::IoError {
                action: ErrorAction::Stop,
                ..
            }
        ));
        vm.reset(0);
        let mut queue = vm.activate(0, F_FLUSH).remove(0);
        vm.done(BlockRequest::Pause);
        vm.done(BlockRequest::Resume);
        assert_eq!(queue.read(0, 512).0, S_OK);
        assert_eq!(queue.next_used(), None);
        let mut vm = Vm::start(engine, &[1]);
        let file = image(DISK);
        let mut queue = attach_with(&mut vm, &file, OnError::Ignore);
        file.set_len(4096).unwrap();
        assert_eq!(queue.ask(T_IN, 64, Some(writable(queue.data_at(0), 512))), (S_OK, 513));
        assert!(matches!(
            vm.helper.event(),
            BlockEvent::IoError {
                action: ErrorAction::Ignore,
                ..
            }
        ));
    }
}

#[test]
fn how_long_requests_take_is_counted_in_bins() {
    let file = image(DISK);
    let (mut vm, mut queue) = Vm::with_disk(EngineChoice::Auto, &file, info(DISK), F_FLUSH);
    let histogram = |boundaries_ns: &[u64]| GraphRequest::SetHistogram {
        device: DeviceIndex(0),
        kind: IoKind::Read,
        boundaries_ns: boundaries_ns.to_vec(),
    };
    assert!(vm.graph(histogram(&[5, 4])).is_err());
    assert_eq!(vm.graph(histogram(&[1, u64::MAX])), Ok(GraphReply::Done));
    for sector in 0..7 {
        assert_eq!(queue.read(sector, 512).0, S_OK);
    }
    assert_eq!(queue.read(DISK / 512, 512).0, S_IOERR);
    let read = vm.stats().remove(0).read;
    assert_eq!((read.operations, read.invalid), (7, 1));
    assert_eq!(read.histogram.unwrap().bins, [0, 7, 0]);
    assert_eq!(vm.graph(histogram(&[])), Ok(GraphReply::Done));
    assert_eq!(vm.stats().remove(0).read.histogram, None);
}

/// A device over a file, with that policy for errors, and its driver.
fn attach_with(vm: &mut Vm, file: &std::fs::File, on_error: OnError) -> Queue {
    vm.add(ipc::virtio::IoThreadIndex::MAIN, NodeId(0), file_spec(file, info(DISK)));
    let attach = GraphRequest::Attach {
        device: DeviceIndex(0),
        node: NodeId(0),
        options: DeviceOptions {
            read_error: on_error,
            write_error: on_error,
            ..options(&info(DISK))
        },
    };
    assert!(matches!(vm.graph(attach), Ok(GraphReply::Attached(_))));
    vm.activate(0, F_FLUSH).remove(0)
}

/// Gives a part of a file's space back to its file system.
fn free(file: &std::fs::File, offset: i64, bytes: i64) {
    use nix::fcntl::{FallocateFlags, fallocate};
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, hole, offset, bytes).unwrap();
}

/// A file on a file system of 1 MiB, or why there is none. The mount is the calling thread's alone and goes with it.
fn file_on_small_tmpfs() -> Option<std::fs::File> {
    use nix::mount::{MsFlags, mount};
    let directory = tempfile::tempdir().unwrap();
    let mounted = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .and_then(|()| {
            mount(
                None::<&str>,
                "/",
                None::<&str>,
                MsFlags::MS_REC | MsFlags::MS_PRIVATE,
                None::<&str>,
            )
        })
        .and_then(|()| {
            mount(
                Some("tmpfs"),
                directory.path(),
                Some("tmpfs"),
                MsFlags::empty(),
                Some("size=1m"),
            )
        });
    if let Err(errno) = mounted {
        eprintln!("SKIPPED: mounting a small file system needs root: {errno}");
        return None;
    }
    let file = tempfile::tempfile_in(directory.path()).unwrap();
    file.set_len(DISK).unwrap();
    // Off the directory, so that it can be removed; the open file keeps the file system.
    nix::mount::umount2(directory.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
    Some(file)
}

#[test]
fn block_devices_are_discarded_and_zeroed() {
    for engine in ENGINES {
        let backing = tempfile::NamedTempFile::new().unwrap();
        backing.as_file().set_len(DISK).unwrap();
        let Some(device) = LoopDevice::attach(backing.as_file()) else {
            return;
        };
        let on_device = DiskInfo {
            is_block_device: true,
            ..info(DISK)
        };
        let (mut vm, mut queue) = Vm::with_disk(engine, &device.file, on_device, F_FLUSH);
        for sector in (0..1024).step_by(128) {
            assert_eq!(queue.write(sector, &pattern(sector, 65536)), S_OK);
        }
        assert_eq!(queue.ask(T_FLUSH, 0, None).0, S_OK);
        assert_eq!(in_file(backing.as_file(), 128, 65536), pattern(128, 65536));
        let full = backing.as_file().metadata().unwrap().blocks();
        assert_eq!(queue.ranges(T_DISCARD, &[(0, 256, 0)]), S_OK);
        assert!(
            backing.as_file().metadata().unwrap().blocks() < full,
            "discard did not reach the file"
        );
        assert_eq!(queue.ranges(T_WRITE_ZEROES, &[(256, 64, 0), (384, 128, 1)]), S_OK);
        assert_eq!(queue.read(256, 64 * 512), (S_OK, vec![0; 64 * 512]));
        assert_eq!(queue.read(320, 512).1, pattern(256, 65536)[32768..33280]);
        assert_eq!(queue.read(384, 65536), (S_OK, vec![0; 65536]));
        let stats = vm.stats().remove(0);
        assert_eq!((stats.read.failed, stats.write.failed, stats.unmap.failed), (0, 0, 0));
    }
}

struct LoopDevice {
    file: std::fs::File,
}

const LOOP_SET_FD: u64 = 0x4c00;
const LOOP_CLR_FD: u64 = 0x4c01;
const LOOP_CTL_GET_FREE: u64 = 0x4c82;

impl LoopDevice {
    fn attach(backing: &std::fs::File) -> Option<Self> {
        use std::os::fd::AsRawFd;
        let control = match std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control")
        {
            Ok(control) => control,
            Err(error) => {
                eprintln!("SKIPPED: no loop devices: {error}");
                return None;
            }
        };
        // Another process may take the free one first.
        for _ in 0..10 {
            // SAFETY: takes no argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            let path = format!("/dev/loop{number}");
            let Ok(file) = std::fs::OpenOptions::new().read(true).write(true).open(path) else {
                break;
            };
            // SAFETY: takes a file descriptor.
            if unsafe { libc::ioctl(file.as_raw_fd(), LOOP_SET_FD, backing.as_raw_fd()) } == 0 {
                return Some(Self { file });
            }
        }
        eprintln!(
            "SKIPPED: no loop device can be had: {}",
            std::io::Error::last_os_error()
        );
        None
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        use std::os::fd::AsRawFd;
        // SAFETY: takes no argument. The device goes when its last user has closed it.
        unsafe { libc::ioctl(self.file.as_raw_fd(), LOOP_CLR_FD, 0) };
    }
}
