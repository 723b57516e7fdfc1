//! Both engines do the same; the ring does nothing else.

use super::*;
use crate::buffer::Buffer;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::AsFd;

fn engines() -> Vec<Box<dyn Engine>> {
    vec![
        create(EngineChoice::IoUring, |_| {}).expect("this kernel has io_uring"),
        create(EngineChoice::Threads, |_| {}).unwrap(),
    ]
}

fn wait_for_completion(engine: &mut dyn Engine) -> Completion {
    let mut events = Vec::new();
    loop {
        engine.wait(&mut events, None).unwrap();
        if let Some(Event::Completed(completion)) = events.pop() {
            return completion;
        }
    }
}

#[test]
fn operations_complete_and_are_handed_back() {
    for mut engine in engines() {
        engine.start(true, 0).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let id = engine.add_file(file.into()).unwrap();
        let buffer = Buffer::new(8192);
        Segments::of_buffer(&buffer, 8192).fill_from(&[7; 8192]);
        for (token, durable) in [(0, false), (5, true)] {
            let segments = Segments::of_buffer(&buffer, 4096);
            let (file, offset) = (id, 4096 * u64::from(token));
            engine.submit(
                token,
                Operation::Write {
                    file,
                    offset,
                    segments,
                    durable,
                },
            );
            let completion = wait_for_completion(&mut *engine);
            assert_eq!((completion.token, completion.result), (token, Ok(4096)));
        }
        engine.submit(1, Operation::Sync { file: id });
        assert_eq!(wait_for_completion(&mut *engine).result, Ok(0));
        let range = |offset, mode| Operation::Range {
            file: id,
            offset,
            bytes: 512,
            mode,
        };
        engine.submit(2, range(0, RangeMode::PunchHole));
        assert_eq!(wait_for_completion(&mut *engine).result, Ok(0));
        engine.submit(
            3,
            Operation::Read {
                file: id,
                offset: 0,
                segments: Segments::of_buffer(&buffer, 8192),
            },
        );
        let completion = wait_for_completion(&mut *engine);
        assert_eq!(completion.result, Ok(8192));
        let Operation::Read { segments, .. } = completion.operation else {
            panic!("another operation")
        };
        let mut bytes = [1; 1024];
        segments.read_into(&mut bytes);
        assert_eq!((bytes[0], bytes[511], bytes[512]), (0, 0, 7));
        // Not a block device.
        engine.submit(
            4,
            Operation::Discard {
                file: id,
                offset: 0,
                bytes: 512,
            },
        );
        assert_eq!(wait_for_completion(&mut *engine).result, Err(Errno::ENOTTY));
    }
}

#[test]
fn both_find_the_holes_of_a_file() {
    use std::os::unix::fs::FileExt;
    for mut engine in engines() {
        engine.start(true, 0).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 << 20).unwrap();
        file.write_all_at(&[7; 65536], 1 << 20).unwrap();
        let file = engine.add_file(file.into()).unwrap();
        let mut extent = |offset| {
            let is_data = AtomicBool::new(false);
            engine.submit(1, Operation::Extent { file, offset, is_data });
            let over = wait_for_completion(&mut *engine);
            let Operation::Extent { is_data, .. } = over.operation else {
                unreachable!("the engine hands back what it was given")
            };
            (over.result, is_data.into_inner())
        };
        assert_eq!(extent(0), (Ok(1 << 20), false));
        assert_eq!(extent(1 << 20), (Ok((1 << 20) + 65536), true));
        assert_eq!(extent((1 << 20) + 4096), (Ok((1 << 20) + 65536), true));
        assert_eq!(extent(2 << 20), (Err(Errno::ENXIO), false));
    }
}

#[test]
fn every_write_to_an_eventfd_is_a_signal_though_nobody_reads_it() {
    for mut engine in engines() {
        let eventfd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap();
        eventfd.write(1).unwrap();
        engine.watch(eventfd.as_fd().try_clone_to_owned().unwrap(), 42).unwrap();
        engine.start(true, 0).unwrap();
        for round in 0..5 {
            let mut events = Vec::new();
            while events.is_empty() {
                engine.wait(&mut events, None).unwrap();
            }
            assert!(matches!(events[..], [Event::Signal(42)]), "round {round}");
            eventfd.write(1).unwrap();
        }
    }
}

#[test]
fn more_operations_than_the_rings_hold_all_complete() {
    for mut engine in engines() {
        engine.start(true, 0).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let id = engine.add_file(file.into()).unwrap();
        let buffer = Buffer::new(512);
        let count = 10_000;
        for token in 0..count {
            engine.submit(
                token,
                Operation::Read {
                    file: id,
                    offset: 0,
                    segments: Segments::of_buffer(&buffer, 512),
                },
            );
        }
        let mut seen = vec![false; count as usize];
        let mut events = Vec::new();
        while !seen.iter().all(|&seen| seen) {
            engine.wait(&mut events, None).unwrap();
            for event in events.drain(..) {
                if let Event::Completed(completion) = event {
                    assert_eq!(completion.result, Ok(512));
                    assert!(!std::mem::replace(&mut seen[completion.token as usize], true));
                }
            }
        }
    }
}

#[test]
fn a_wait_for_a_socket_ends_when_it_can_be_read_or_when_it_is_given_up() {
    for mut engine in engines() {
        engine.start(true, 0).unwrap();
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let file = engine.add_file(ours.into()).unwrap();
        let run = |engine: &mut Box<dyn Engine>, operation| {
            engine.submit(5, operation);
            let mut events = Vec::new();
            // Under way before it is given up.
            engine.wait(&mut events, Some(Duration::from_millis(20))).unwrap();
            if events.is_empty() {
                engine.cancel_wait(5);
            }
            while events.is_empty() {
                engine.wait(&mut events, Some(Duration::from_secs(5))).unwrap();
            }
            match events.remove(0) {
                Event::Completed(Completion { token: 5, result, .. }) => result,
                other => panic!("{other:?}"),
            }
        };
        let wait = |to_write| Operation::Ready { file, to_write };
        assert!(run(&mut engine, wait(true)).is_ok());
        assert_eq!(run(&mut engine, wait(false)), Err(Errno::ECANCELED));
        std::io::Write::write_all(&mut &theirs, b"x").unwrap();
        assert!(run(&mut engine, wait(false)).is_ok());
        let buffer = Buffer::new(4096);
        let read = Operation::ReadStream {
            file,
            segments: Segments::of_buffer(&buffer, 4096),
        };
        assert_eq!(run(&mut engine, read), Ok(1));
        let read = Operation::ReadStream {
            file,
            segments: Segments::of_buffer(&buffer, 4096),
        };
        // The ring waits by itself.
        let nothing = run(&mut engine, read).unwrap_err();
        assert!(matches!(nothing, Errno::EAGAIN | Errno::ECANCELED), "{nothing}");
        drop(theirs);
        assert!(run(&mut engine, wait(false)).is_ok());
        assert!(engine.take_file(file).is_some());
    }
}
