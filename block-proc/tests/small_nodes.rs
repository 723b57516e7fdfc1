//! The nodes that are a page each: null, a window of a file, copy-on-read, throttle, and the status of files.

mod qcow2_common;

use block_proc::buffer::{BouncePool, Segments};
use block_proc::engine::{self};
use block_proc::executor::Executor;
use block_proc::executor::io::Io;
use block_proc::executor::timer::Timers;
use block_proc::node::copy_on_read::CopyOnReadNode;
use block_proc::node::null::NullNode;
use block_proc::node::raw::{RawNode, RawOptions};
use block_proc::node::throttle::ThrottleNode;
use block_proc::node::window::WindowNode;
use block_proc::node::{Extent, ExtentKind, Node};
use block_proc::throttle::{Groups, Throttling};
use ipc::block::EngineChoice;
use ipc::graph::{CreateQcow2, GroupId, Limit, Preallocation, ThrottleLimits};
use nix::errno::Errno;
use qcow2_common::{Memory, block_on, content, make, open, read, segments};
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Runs one future to its end, also where it sleeps.
fn block_on_sleeping<T: 'static>(timers: &Timers, future: impl Future<Output = T> + 'static) -> T {
    let mut executor = Executor::default();
    executor.spawn(future);
    let mut finished = Vec::new();
    loop {
        executor.run(&mut finished);
        if let Some(result) = finished.pop() {
            return result;
        }
        std::thread::sleep(timers.idle_for().expect("it waits for something that never comes"));
        timers.wake();
    }
}

#[test]
fn null_takes_everything_and_gives_zeroes_or_nothing() {
    let timers = Rc::new(Timers::default());
    for (read_zeroes, expected, kind) in [(true, 0, ExtentKind::Zero), (false, 0xee, ExtentKind::Data)] {
        let node = Rc::new(NullNode::new(1 << 40, Duration::ZERO, read_zeroes, timers.clone()));
        assert_eq!(node.bytes(), 1 << 40);
        block_on(async move {
            node.write(4096, segments(&[1; 512]), true).await.unwrap();
            node.write_zeroes(0, 1 << 40, true).await.unwrap();
            node.discard(0, 1 << 40).await.unwrap();
            node.flush().await.unwrap();
            let memory = segments(&[0xee; 512]);
            node.read(4096, memory.clone()).await.unwrap();
            let mut seen = [1; 512];
            memory.read_into(&mut seen);
            assert_eq!(seen, [expected; 512]);
            let bytes = 1 << 20;
            assert_eq!(node.status(0, bytes).await, Ok(Extent { bytes, kind }));
            assert!(node.resize(0, Preallocation::Off).await.is_err());
        });
    }
}

#[test]
fn every_request_to_null_takes_its_latency() {
    let timers = Rc::new(Timers::default());
    let latency = Duration::from_millis(20);
    let node = Rc::new(NullNode::new(4096, latency, true, timers.clone()));
    let start = Instant::now();
    block_on_sleeping(&timers, async move {
        node.read(0, segments(&[0; 512])).await.unwrap();
        node.write(0, segments(&[0; 512]), false).await.unwrap();
        node.flush().await.unwrap();
    });
    assert!(start.elapsed() >= 3 * latency);
}

#[test]
fn a_window_is_a_part_of_its_child_and_touches_nothing_else() {
    let memory = Memory::new(vec![7; 8192], 1);
    for (offset, bytes, problem) in [
        (8193, None, "Offset (8193) cannot be greater than size"),
        (0, Some(100), "Specified size is not multiple of 512"),
        (4096, Some(4608), "The sum of offset (4096) and size (4608)"),
    ] {
        let failure = WindowNode::new(memory.clone(), offset, bytes).err().unwrap();
        assert!(failure.message.starts_with(problem), "{failure}");
    }
    let window = Rc::new(WindowNode::new(memory.clone(), 1024, Some(2048)).unwrap());
    assert_eq!((window.bytes(), window.limits().grows), (2048, false));
    let same = window.clone();
    block_on(async move {
        same.write(0, segments(&[1; 512]), false).await.unwrap();
        same.write_zeroes(512, 512, false).await.unwrap();
        assert_eq!(
            read(&*same, 0, 2048).await.unwrap(),
            [vec![1; 512], vec![0; 512], vec![7; 1024]].concat()
        );
        same.discard(1536, 512).await.unwrap();
        let failure = same.resize(4096, Preallocation::Off).await.unwrap_err();
        assert_eq!(failure.message, "Cannot resize fixed-size raw disks");
    });
    let mut expected = vec![7; 8192];
    expected[1024..1536].fill(1);
    expected[1536..2048].fill(0);
    expected[2560..3072].fill(0);
    assert_eq!(*memory.bytes.borrow(), expected);
    // Without a size it goes on to its child's end, wherever that is.
    let open = Rc::new(WindowNode::new(memory.clone(), 1024, None).unwrap());
    assert_eq!(open.bytes(), 7168);
    let same = open.clone();
    block_on(async move {
        same.resize(512, Preallocation::Off).await.unwrap();
        assert!(same.resize(u64::MAX, Preallocation::Off).await.is_err());
    });
    assert_eq!((open.bytes(), memory.bytes()), (512, 1536));
    // A fixed one of which the end is gone shows what is left.
    assert_eq!(window.bytes(), 512);
}

fn overlay() -> (Rc<Memory>, Rc<Memory>, Rc<CopyOnReadNode>) {
    let spec = CreateQcow2 {
        bytes: 1 << 20,
        cluster_bytes: 4096,
        backing: Some(("base".into(), Some("raw".into()))),
        ..CreateQcow2::default()
    };
    let (child, base) = (make(&spec, None).unwrap(), Memory::new(vec![5; 1 << 20], 3));
    let image = open(&child, Some(base.clone())).unwrap();
    (child, base, Rc::new(CopyOnReadNode::new(image, false)))
}

#[test]
fn what_was_read_from_below_is_above_from_then_on() {
    let (child, base, node) = overlay();
    let same = node.clone();
    let seen = block_on(async move {
        same.write(4096, segments(&[6; 4096]), false).await.unwrap();
        let seen = read(&*same, 0, 16384).await.unwrap();
        let Extent { bytes, kind } = same.status(0, 1 << 20).await.unwrap();
        assert_eq!((bytes, kind), (16384, ExtentKind::Data));
        same.flush().await.unwrap();
        seen
    });
    assert_eq!(seen, [vec![5; 4096], vec![6; 4096], vec![5; 8192]].concat());
    // Nobody needs the base for it any more.
    base.bytes.replace(vec![9; 1 << 20]);
    let image = open(&child, Some(base)).unwrap();
    assert_eq!(content(&image)[..16384], seen);
    assert_eq!(content(&image)[16384], 9);
}

#[test]
fn a_copy_never_undoes_a_write_that_crosses_it() {
    for seed in 0..50 {
        let (child, _base, node) = overlay();
        child.turns.set(1 + seed % 5);
        let mut executor = Executor::default();
        for number in 0..16_u64 {
            let node = node.clone();
            executor.spawn(async move {
                if number % 2 == 0 {
                    read(&*node, 0, 32768).await.map(drop)
                } else {
                    let at = number * 2048;
                    node.write(at, segments(&[number as u8; 1024]), false).await
                }
            });
        }
        let mut results = Vec::new();
        executor.run(&mut results);
        assert!(results.len() == 16 && results.iter().all(Result::is_ok), "{results:?}");
        let seen = block_on(async move { read(&*node, 0, 34816).await }).unwrap();
        for number in (1..16).step_by(2) {
            assert_eq!(seen[number * 2048..][..1024], [number as u8; 1024], "seed {seed}");
            assert_eq!(seen[number * 2048 + 1024..][..1024], [5; 1024], "seed {seed}");
        }
    }
}

#[test]
fn a_failed_copy_fails_the_read() {
    let (child, _base, node) = overlay();
    child.writes_left.set(Some(0));
    let same = node.clone();
    assert_eq!(block_on(async move { read(&*same, 0, 4096).await }), Err(Errno::EIO));
    child.writes_left.set(None);
    assert_eq!(block_on(async move { read(&*node, 0, 4096).await }), Ok(vec![5; 4096]));
}

#[test]
fn a_throttle_node_passes_on_what_its_group_allows() {
    let timers = Rc::new(Timers::default());
    let groups = Arc::new(Groups::default());
    let limits = ThrottleLimits {
        iops_write: Limit {
            average: 100,
            max: 0,
            length: 1,
        },
        ..Default::default()
    };
    groups.set(GroupId(1), &limits);
    let throttling = Throttling::new(groups, timers.clone());
    let memory = Memory::new(vec![7; 1 << 20], 1);
    memory.turns.set(0);
    let node = Rc::new(ThrottleNode::new(memory.clone(), throttling.join(GroupId(1)).unwrap()));
    assert_eq!(node.bytes(), 1 << 20);
    let writes = 40;
    let (same, start) = (node.clone(), Instant::now());
    block_on_sleeping(&timers, async move {
        for number in 0..writes {
            match number % 3 {
                0 => same.write(number * 512, segments(&[number as u8; 512]), false).await,
                1 => same.write_zeroes(number * 512, 512, false).await,
                _ => same.discard(number * 512, 512).await,
            }
            .unwrap();
        }
    });
    // A tenth of a second's worth may come at once.
    assert!(
        start.elapsed() >= Duration::from_millis((writes - 11) * 10),
        "{:?}",
        start.elapsed()
    );
    // Reads and flushes have no limit; nobody has to sleep for them.
    let seen = block_on(async move {
        node.flush().await.unwrap();
        for _ in 0..500 {
            read(&*node, 0, 512).await.unwrap();
        }
        read(&*node, 3 * 512, 512).await.unwrap()
    });
    assert_eq!(seen, vec![3; 512]);
}

#[test]
fn a_file_knows_its_holes() {
    for choice in [EngineChoice::IoUring, EngineChoice::Threads] {
        let mut engine = engine::create(choice, |_| {}).expect("an engine");
        engine.start(true, 0).unwrap();
        let io = Io::new(engine);
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        for at in [0, 2 << 20] {
            file.write_all_at(&[7; 65536], at).unwrap();
        }
        let file = io.add_file(file.into()).unwrap();
        let options = RawOptions {
            bytes: 4 << 20,
            is_block_device: false,
            direct_align: None,
            unmap: true,
            no_flush: false,
        };
        let node = Rc::new(RawNode::new(io.clone(), file, options, Rc::<BouncePool>::default()));
        let mut executor = Executor::default();
        executor.spawn(async move {
            let mut found = Vec::new();
            let mut at = 0;
            while at < 5 << 20 {
                let extent = node.status(at, (5 << 20) - at).await.unwrap();
                found.push((at, extent.bytes, extent.kind));
                at += extent.bytes;
            }
            // Not more than was asked for.
            assert_eq!(node.status(1 << 20, 512).await.unwrap().bytes, 512);
            node.write(3 << 20, segments(&[1; 65536]), false).await.unwrap();
            assert_eq!(node.status(3 << 20, 512).await.unwrap().kind, ExtentKind::Data);
            let into: Segments = segments(&[1; 512]);
            node.read(1 << 20, into).await.unwrap();
            found
        });
        let mut finished = Vec::new();
        while finished.is_empty() {
            executor.run(&mut finished);
            if finished.is_empty() {
                io.wait(&mut Vec::new(), None).unwrap();
            }
        }
        let (data, zero) = (ExtentKind::Data, ExtentKind::Zero);
        let hole = (2 << 20) - 65536;
        let expected = [
            (0, 65536, data),
            (65536, hole, zero),
            (2 << 20, 65536, data),
            ((2 << 20) + 65536, (3 << 20) - 65536, zero),
        ];
        assert_eq!(finished[0], expected, "{choice:?}");
    }
}
