//! blkdebug: which requests fail, and which are held.

mod qcow2_common;

use block_proc::buffer::Segments;
use block_proc::executor::Executor;
use block_proc::node::blkdebug::BlkdebugNode;
use block_proc::node::blkdebug::breakpoints::Drain;
use block_proc::node::event::Event;
use block_proc::node::event::Held as Wait;
use block_proc::node::qcow2::{Children, Options, Qcow2Node};
use block_proc::node::{Node, NodeFuture};
use ipc::graph::{BlkdebugSpec, CreateQcow2, InjectedError, IoType, NodeId, Preallocation, SetState};
use nix::errno::Errno;
use qcow2_common::{Memory, block_on, make, options, read, segments, snapshot_info};
use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;

fn rule(event: &str) -> InjectedError {
    InjectedError {
        event: (event != "none").then(|| event.to_owned()),
        state: None,
        iotypes: vec![
            IoType::Read,
            IoType::Write,
            IoType::WriteZeroes,
            IoType::Discard,
            IoType::Flush,
        ],
        errno: Errno::EIO as i32,
        offset: None,
        once: false,
        immediately: false,
    }
}

fn spec(inject_errors: Vec<InjectedError>, set_states: Vec<SetState>) -> BlkdebugSpec {
    BlkdebugSpec {
        file: NodeId(1),
        inject_errors,
        set_states,
        align: None,
    }
}

fn over(child: Rc<dyn Node>, errors: Vec<InjectedError>, states: Vec<SetState>) -> Rc<BlkdebugNode> {
    BlkdebugNode::new(child, spec(errors, states), Rc::default()).unwrap()
}

fn memory(bytes: usize) -> Rc<Memory> {
    Memory::new(vec![7; bytes], 1)
}

/// What the six kinds of requests end with.
fn all_kinds(node: &Rc<BlkdebugNode>, offset: u64) -> [Result<(), Errno>; 6] {
    let node = node.clone();
    block_on(async move {
        [
            read(&*node, offset, 512).await.map(drop),
            node.write(offset, segments(&[1; 512]), false).await,
            node.write_zeroes(offset, 512, false).await,
            node.discard(offset, 512).await,
            node.flush().await,
            node.status(offset, 512).await.map(drop),
        ]
    })
}

#[test]
fn without_an_event_a_rule_holds_from_the_beginning_for_the_kinds_and_the_place_it_names() {
    let (ok, eio) = (Ok(()), Err(Errno::EIO));
    let node = over(memory(4096), vec![rule("none")], vec![]);
    assert_eq!(
        all_kinds(&node, 0),
        [eio, eio, eio, eio, eio, ok],
        "not what asks about the mapping"
    );
    let with = |change: fn(&mut InjectedError)| {
        let mut rule = rule("none");
        change(&mut rule);
        over(memory(4096), vec![rule], vec![])
    };
    let node = with(|rule| (rule.iotypes, rule.errno) = (vec![IoType::Flush], Errno::ENOSPC as i32));
    assert_eq!(all_kinds(&node, 0), [ok, ok, ok, ok, Err(Errno::ENOSPC), ok]);
    let node = with(|rule| rule.iotypes = vec![IoType::BlockStatus]);
    assert_eq!(all_kinds(&node, 0), [ok, ok, ok, ok, ok, eio]);
    let node = with(|rule| rule.offset = Some(1024));
    assert_eq!(all_kinds(&node, 512), [ok; 6], "it ends where the place begins");
    assert_eq!(
        all_kinds(&node, 1024),
        [eio, eio, eio, eio, ok, ok],
        "a flush has no place"
    );
    assert_eq!(all_kinds(&node, 1536), [ok; 6]);
    let node = with(|rule| (rule.once, rule.immediately) = (true, true));
    assert_eq!(all_kinds(&node, 0), [eio, ok, ok, ok, ok, ok]);
}

#[test]
fn what_fails_has_not_happened() {
    let child = memory(4096);
    let node = over(child.clone(), vec![rule("none")], vec![]);
    let _ = all_kinds(&node, 0);
    assert!(child.bytes.borrow().iter().all(|byte| *byte == 7));
}

#[test]
fn an_event_makes_its_rules_active_in_the_place_of_others() {
    let mut on_read = rule("read_aio");
    on_read.iotypes = vec![IoType::Read];
    let mut on_write = rule("write_aio");
    (on_write.iotypes, on_write.once) = (vec![IoType::Write], true);
    let node = over(memory(4096), vec![on_read, on_write], vec![]);
    let (ok, eio) = (Ok(()), Err(Errno::EIO));
    assert_eq!(all_kinds(&node, 0), [ok; 6]);
    assert!(node.event(Event::ReadAio).is_none());
    assert_eq!(all_kinds(&node, 0), [eio, ok, ok, ok, ok, ok]);
    assert_eq!(all_kinds(&node, 0)[0], eio, "until another event");
    node.event(Event::L2Load);
    assert_eq!(all_kinds(&node, 0)[0], eio, "no rule names that one");
    node.event(Event::WriteAio);
    assert_eq!(all_kinds(&node, 0), [ok, eio, ok, ok, ok, ok]);
    node.event(Event::WriteAio);
    assert_eq!(all_kinds(&node, 0), [ok; 6], "once is once");
}

#[test]
fn states_lead_to_each_other_and_rules_wait_for_theirs() {
    let state = |event: &str, state, new_state| SetState {
        event: event.to_owned(),
        state,
        new_state,
    };
    let mut third = rule("l2_update");
    third.state = Some(3);
    let states = vec![
        state("l2_load", Some(1), 2),
        state("l2_load", Some(2), 3),
        state("flush_to_disk", None, 1),
    ];
    let node = over(memory(4096), vec![third], states);
    let fails = || {
        node.event(Event::L2Update);
        let same = node.clone();
        block_on(async move { read(&*same, 0, 512).await }).is_err()
    };
    assert!(!fails(), "it begins with 1");
    node.event(Event::L2Load);
    assert!(!fails(), "one event is one step");
    node.event(Event::L2Load);
    assert!(fails());
    // The flush itself says so.
    let same = node.clone();
    block_on(async move { same.flush().await }).unwrap_err();
    let same = node.clone();
    assert!(
        block_on(async move { read(&*same, 0, 512).await }).is_err(),
        "what is active stays"
    );
    node.event(Event::L2Load);
    node.event(Event::L2Load);
    assert!(fails(), "and round again");
}

#[test]
fn names_of_events_are_checked() {
    for event in Event::ALL {
        assert_eq!(Event::named(event.name()), Some(*event));
    }
    let wrong = BlkdebugNode::new(memory(512), spec(vec![rule("l3_update")], vec![]), Rc::default());
    assert_eq!(wrong.err().unwrap().message, "blkdebug knows no event \"l3_update\"");
}

/// An image with a backing file, all of it under recording.
struct Recorded {
    child: Rc<Memory>,
    events: RefCell<Vec<&'static str>>,
}

impl Recorded {
    fn over(child: Rc<Memory>) -> Rc<Self> {
        Rc::new(Self {
            child,
            events: RefCell::default(),
        })
    }
}

impl Node for Recorded {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        self.child.read(offset, into)
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        self.child.write(offset, from, durable)
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        self.child.write_zeroes(offset, bytes, may_unmap)
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        self.child.discard(offset, bytes)
    }

    fn flush(&self) -> NodeFuture<'_> {
        self.child.flush()
    }

    fn bytes(&self) -> u64 {
        self.child.bytes()
    }

    fn resize(&self, bytes: u64, preallocation: Preallocation) -> NodeFuture<'_, (), ipc::Failure> {
        self.child.resize(bytes, preallocation)
    }

    fn event(&self, event: Event) -> Option<Wait> {
        self.events.borrow_mut().push(event.name());
        None
    }
}

fn image(bytes: u64) -> Rc<Memory> {
    let spec = CreateQcow2 {
        bytes,
        cluster_bytes: 4096,
        ..CreateQcow2::default()
    };
    make(&spec, None).unwrap()
}

fn small_caches(child: &Memory) -> Options {
    Options {
        l2_cache_bytes: 4096,
        refcount_cache_bytes: 4096,
        ..options(child)
    }
}

/// Requests to an image.
type Work = Box<dyn FnOnce(Rc<Qcow2Node>) -> Pin<Box<dyn Future<Output = ()>>>>;

#[test]
fn a_qcow2_image_says_what_it_does() {
    let child = image(64 << 20);
    let recorded = Recorded::over(child.clone());
    let options = small_caches(&child);
    let backing = Memory::new(vec![3; 16 << 20], 2);
    let node = block_on(Qcow2Node::open(
        recorded.clone(),
        options,
        Children::over(Some(backing)),
    ))
    .unwrap();
    let said = || std::mem::take(&mut *recorded.events.borrow_mut());
    let expect = |what: &str, wanted: &[&str]| {
        let said = said();
        for event in wanted {
            assert!(said.contains(event), "{what}: {event} is not in {said:?}");
        }
    };
    expect("opening", &["reftable_load"]);
    let run = |work: Work| {
        block_on(work(node.clone()));
    };
    run(Box::new(|node| {
        Box::pin(async move { drop(read(&*node, 0, 512).await.unwrap()) })
    }));
    expect("reading from below", &["read_backing_aio"]);
    run(Box::new(|node| {
        Box::pin(async move { node.write(1 << 20, segments(&[1; 512]), false).await.unwrap() })
    }));
    let wanted = [
        "refblock_load",
        "l2_alloc_write",
        "cluster_alloc",
        "cow_read",
        "cow_write",
        "write_aio",
    ];
    expect("a new cluster", &wanted);
    run(Box::new(|node| Box::pin(async move { node.flush().await.unwrap() })));
    expect(
        "a flush",
        &["flush_to_os", "refblock_update_part", "l2_update", "l1_update"],
    );
    run(Box::new(|node| {
        Box::pin(async move { drop(read(&*node, 1 << 20, 512).await.unwrap()) })
    }));
    expect("reading its own", &["read_aio"]);
    run(Box::new(|node| {
        Box::pin(async move {
            // Tables far apart, in a cache of two slices.
            for table in 0..8_u64 {
                node.write(table * (2 << 20), segments(&[1; 512]), false).await.unwrap();
            }
            node.flush().await.unwrap();
            drop(read(&*node, 0, 512).await.unwrap());
        })
    }));
    expect("tables that do not fit", &["l2_load"]);
    run(Box::new(|node| {
        Box::pin(async move {
            node.create_snapshot(&snapshot_info("1")).await.unwrap();
            node.write(1 << 20, segments(&[2; 512]), false).await.unwrap();
        })
    }));
    expect("a table that a snapshot has", &["l2_alloc_cow_read", "l2_alloc_write"]);
    run(Box::new(|node| {
        Box::pin(async move {
            node.delete_snapshot("1").await.unwrap();
            node.write_compressed(8 << 20, segments(&[9; 4096])).await.unwrap();
            node.write_compressed((8 << 20) + 4096, segments(&[8; 4096]))
                .await
                .unwrap();
            node.flush().await.unwrap();
            drop(read(&*node, 8 << 20, 512).await.unwrap());
        })
    }));
    let wanted = [
        "cluster_free",
        "cluster_alloc_bytes",
        "write_compressed",
        "l2_update_compressed",
        "read_compressed",
    ];
    expect("compressed clusters", &wanted);
    run(Box::new(|node| {
        Box::pin(async move { node.resize(4 << 30, Preallocation::Off).await.unwrap() })
    }));
    expect(
        "a longer L1 table",
        &["l1_grow_alloc_table", "l1_grow_write_table", "l1_grow_activate_table"],
    );
    run(Box::new(|node| {
        Box::pin(async move { node.resize(1 << 20, Preallocation::Off).await.unwrap() })
    }));
    expect(
        "a smaller disk",
        &["l1_shrink_write_table", "l1_shrink_free_l2_clusters"],
    );
}

#[test]
fn a_failed_update_of_a_table_fails_the_flush_and_the_next_one_repairs_it() {
    for event in [
        "l2_update",
        "refblock_update_part",
        "l1_update",
        "refblock_alloc_hookup",
        "flush_to_disk",
    ] {
        let child = image(64 << 20);
        let mut once = rule(event);
        once.once = true;
        let options = small_caches(&child);
        let blkdebug = over(child.clone(), vec![once], vec![]);
        let node = block_on(Qcow2Node::open(blkdebug, options, Children::over(None))).unwrap();
        let seen = block_on(async move {
            node.write(0, segments(&[1; 8192]), false).await.unwrap();
            // An image that is new has a block for its counts: that event does not come.
            let first = node.flush().await;
            assert_eq!(first.is_err(), event != "refblock_alloc_hookup", "{event}: {first:?}");
            node.flush().await.unwrap();
            read(&*node, 0, 8192).await.unwrap()
        });
        assert_eq!(seen, vec![1; 8192]);
        let again = qcow2_common::open(&child, None).unwrap();
        assert_eq!(
            qcow2_common::content(&again)[..8193],
            [vec![1; 8192], vec![0]].concat(),
            "{event}"
        );
    }
}

/// A write that comes to a breakpoint, and who looks after it.
struct Held {
    node: Rc<BlkdebugNode>,
    drain: Rc<Drain>,
    executor: Executor<Result<(), Errno>>,
}

impl Held {
    fn at(event: &str) -> Self {
        let drain = Rc::<Drain>::default();
        let node = BlkdebugNode::new(memory(4096), spec(vec![], vec![]), drain.clone()).unwrap();
        node.breakpoints().set(event, "A".into()).unwrap();
        let mut executor = Executor::default();
        let same = node.clone();
        executor.spawn(async move { same.write(0, segments(&[1; 512]), false).await });
        Self { node, drain, executor }
    }

    fn ended(&mut self) -> usize {
        let mut ended = Vec::new();
        self.executor.run(&mut ended);
        assert!(ended.iter().all(Result::is_ok));
        ended.len()
    }
}

#[test]
fn a_request_is_held_at_a_breakpoint_until_it_is_told_to_go_on() {
    let mut held = Held::at("pwritev");
    let breakpoints = held.node.breakpoints().clone();
    assert_eq!(breakpoints.resume("A"), Err(Errno::ENOENT), "nobody has come yet");
    let (waiter, seen) = (breakpoints.clone(), Rc::new(Cell::new(false)));
    let mark = seen.clone();
    held.executor.spawn(async move {
        waiter.wait("A").await?;
        mark.set(true);
        Ok(())
    });
    assert_eq!(held.ended(), 1, "who waits for it to be held");
    assert!(seen.get());
    // The breakpoint is used up: the next one passes.
    let same = held.node.clone();
    held.executor
        .spawn(async move { same.write(512, segments(&[1; 512]), false).await });
    assert_eq!(held.ended(), 1);
    assert_eq!(breakpoints.resume("B"), Err(Errno::ENOENT));
    breakpoints.resume("A").unwrap();
    assert_eq!(held.ended(), 1);
    assert_eq!(breakpoints.set("pwritev_", "A".into()), Err(Errno::ENOENT));
}

#[test]
fn a_breakpoint_that_is_removed_lets_go_and_holds_nobody() {
    let mut held = Held::at("pwritev_done");
    let breakpoints = held.node.breakpoints().clone();
    assert_eq!(held.ended(), 0);
    breakpoints.set("pwritev_done", "A".into()).unwrap();
    breakpoints.remove("A").unwrap();
    assert_eq!(breakpoints.remove("A"), Err(Errno::ENOENT));
    let same = held.node.clone();
    held.executor
        .spawn(async move { same.write(512, segments(&[1; 512]), false).await });
    assert_eq!(held.ended(), 2);
}

#[test]
fn a_drain_lets_everybody_go_and_keeps_breakpoints_that_nobody_reached() {
    let mut held = Held::at("pwritev");
    let breakpoints = held.node.breakpoints().clone();
    assert_eq!(held.ended(), 0);
    breakpoints.set("pwritev", "B".into()).unwrap();
    held.drain.set(true);
    let same = held.node.clone();
    held.executor
        .spawn(async move { same.write(512, segments(&[1; 512]), false).await });
    assert_eq!(held.ended(), 2);
    assert_eq!(breakpoints.resume("A"), Err(Errno::ENOENT), "it went on by itself");
    held.drain.set(false);
    let same = held.node.clone();
    held.executor
        .spawn(async move { same.write(512, segments(&[1; 512]), false).await });
    assert_eq!(held.ended(), 0);
    breakpoints.resume("B").unwrap();
    assert_eq!(held.ended(), 1);
}

#[test]
fn who_waits_for_a_node_that_goes_away_is_told() {
    let node = over(memory(512), vec![], vec![]);
    let breakpoints = node.breakpoints().clone();
    let mut executor = Executor::default();
    executor.spawn(async move { breakpoints.wait("A").await });
    let mut ended = Vec::new();
    executor.run(&mut ended);
    assert!(ended.is_empty());
    drop(node);
    executor.run(&mut ended);
    assert_eq!(ended, [Err(Errno::ENOENT)]);
}
