//! The graph of nodes in a real block-proc: built, changed under load, taken apart, and asked for what cannot be.

mod common;
use common::*;
use ipc::block::{DiskInfo, EngineChoice};
use ipc::graph::{
    Backing, ChildRole, CreateQcow2, CreateSpec, EdgeChange, GraphReply, GraphRequest, ManualIo, NodeId, NodeSpec,
    Preallocation,
};
use ipc::virtio::{DeviceIndex, IoThreadIndex};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::fs::File;
use std::os::unix::fs::FileExt;

const MAIN: IoThreadIndex = IoThreadIndex::MAIN;
const DISK: u64 = 1 << 20;
const DEVICE: DeviceIndex = DeviceIndex(0);

fn read(offset: u64, bytes: u64, pattern: u8) -> ManualIo {
    ManualIo::Read {
        offset,
        bytes,
        pattern: Some(pattern),
    }
}

fn write(offset: u64, bytes: u64, pattern: u8) -> ManualIo {
    ManualIo::Write {
        offset,
        bytes,
        pattern,
        durable: false,
    }
}

trait Asking {
    fn io(&mut self, node: u32, io: ManualIo) -> Result<GraphReply, ipc::Failure>;
    fn refused(&mut self, request: GraphRequest) -> String;
    fn all_well(&mut self, request: GraphRequest);
    fn overlay(&mut self, file: u32, node: u32, backing: Backing, bytes: u64) -> File;
}

impl Asking for Vm {
    fn io(&mut self, node: u32, io: ManualIo) -> Result<GraphReply, ipc::Failure> {
        self.graph(GraphRequest::Io { node: NodeId(node), io })
    }

    fn refused(&mut self, request: GraphRequest) -> String {
        self.graph(request).expect_err("it should be refused").message
    }

    fn all_well(&mut self, request: GraphRequest) {
        assert_eq!(self.graph(request), Ok(GraphReply::Done));
    }

    /// A new qcow2 image.
    fn overlay(&mut self, file: u32, node: u32, backing: Backing, bytes: u64) -> File {
        let image = image(0);
        self.add(MAIN, NodeId(file), file_spec(&image, info(0)));
        let spec = CreateQcow2 {
            bytes,
            cluster_bytes: 4096,
            backing: (backing != Backing::None).then(|| ("base".into(), Some("raw".into()))),
            ..CreateQcow2::default()
        };
        self.all_well(GraphRequest::Create {
            file: NodeId(file),
            spec: CreateSpec::Qcow2(spec),
            data_file: None,
        });
        self.add(MAIN, NodeId(node), NodeSpec::Qcow2(qcow2_spec(NodeId(file), backing)));
        image
    }
}

fn move_device(node: u32) -> GraphRequest {
    GraphRequest::Change(vec![EdgeChange::Device {
        device: DEVICE,
        node: NodeId(node),
    }])
}

fn nothing_resized() -> Result<GraphReply, ipc::Failure> {
    Ok(GraphReply::Resized(Default::default()))
}

/// 32 writes, one per slot, of a pattern that depends on the round; published, not kicked.
fn offer_round(queue: &mut Queue, round: u64) {
    for slot in 0..32 {
        queue.put(queue.data_at(slot), &pattern(round * 32 + u64::from(slot), 4096));
        let data = readable(queue.data_at(slot), 4096);
        queue.prepare(slot, T_OUT, u64::from(slot) * 8, Some(data));
    }
    queue.publish();
}

#[test]
fn a_change_under_load_loses_no_request() {
    for engine in ENGINES {
        let file = image(DISK);
        let (mut vm, mut queue) = Vm::with_disk(engine, &file, info(DISK), F_FLUSH);
        // Node 1 is the device's; node 11 is another way to the same file.
        vm.add(MAIN, NodeId(10), file_spec(&file, info(DISK)));
        vm.add(MAIN, NodeId(11), raw_spec(NodeId(10), false));
        for round in 0..150 {
            offer_round(&mut queue, round);
            queue.kick();
            let change = match round % 3 {
                0 => move_device(11),
                1 => move_device(1),
                _ => GraphRequest::ReplaceFile {
                    node: NodeId(0),
                    disk: ipc::caps::DiskFd::new(file.try_clone().unwrap().into()),
                    info: info(DISK),
                },
            };
            let expected = if round % 3 == 2 {
                Ok(GraphReply::Done)
            } else {
                nothing_resized()
            };
            assert_eq!(vm.graph(change), expected);
            let mut heads: Vec<u32> = (0..32).map(|_| queue.wait_used().0).collect();
            heads.sort_unstable();
            assert!(
                heads
                    .iter()
                    .eq((0..32).map(|slot| slot * 3).collect::<Vec<u32>>().iter())
            );
            for slot in 0..32_u16 {
                assert_eq!(queue.status(slot), S_OK);
                let mut there = vec![0; 4096];
                file.read_exact_at(&mut there, u64::from(slot) * 4096).unwrap();
                assert!(
                    there == pattern(round * 32 + u64::from(slot), 4096),
                    "round {round} slot {slot}"
                );
            }
        }
        let stats = vm.stats().remove(0);
        assert_eq!((stats.write.operations, stats.write.failed), (150 * 32, 0));
    }
}

#[test]
fn a_snapshot_under_load_keeps_what_was_there_and_gets_what_comes() {
    for engine in ENGINES {
        let file = image(DISK);
        let (mut vm, mut queue) = Vm::with_disk(engine, &file, info(DISK), F_FLUSH);
        let mut top = 1;
        for layer in 0..8_u32 {
            let (file, node) = (100 + layer * 2, 101 + layer * 2);
            // As blockdev-snapshot does it: opened without, then put on top.
            let _image = vm.overlay(file, node, Backing::None, DISK);
            offer_round(&mut queue, u64::from(layer));
            queue.kick();
            let change = vec![
                EdgeChange::Child {
                    parent: NodeId(node),
                    role: ChildRole::Backing,
                    child: Some(NodeId(top)),
                },
                EdgeChange::Device {
                    device: DEVICE,
                    node: NodeId(node),
                },
            ];
            assert_eq!(vm.graph(GraphRequest::Change(change)), nothing_resized());
            (0..32).for_each(|_| assert_eq!(queue.wait_used().1, 1));
            top = node;
            for slot in 0..32 {
                let expected = pattern(u64::from(layer) * 32 + slot, 4096);
                queue.put(queue.data_at(0), &vec![0xee; 4096]);
                assert_eq!(queue.read(slot * 8, 4096), (S_OK, expected));
            }
        }
        assert_eq!(queue.ask(T_FLUSH, 0, None).0, S_OK);
    }
}

#[test]
fn a_machine_without_devices_has_nodes() {
    for engine in ENGINES {
        let mut vm = Vm::start(engine, &[]);
        let file = image(DISK);
        let report = vm.add(MAIN, NodeId(1), file_spec(&file, info(DISK)));
        assert_eq!((report.bytes, report.write_threshold), (DISK, 0));
        assert_eq!(vm.io(1, write(1000, 700_000, 7)), Ok(GraphReply::Done));
        assert_eq!(vm.io(1, read(1000, 700_000, 7)), Ok(GraphReply::Done));
        assert_eq!(vm.io(1, read(999, 700_000, 7)), Ok(GraphReply::Mismatch(999)));
        let zero = ManualIo::Zero {
            offset: 300_000,
            bytes: 4096,
            may_unmap: true,
        };
        assert_eq!(vm.io(1, zero), Ok(GraphReply::Done));
        assert_eq!(vm.io(1, read(1000, 700_000, 7)), Ok(GraphReply::Mismatch(300_000)));
        assert_eq!(vm.io(1, ManualIo::Flush), Ok(GraphReply::Done));
        let discard = ManualIo::Discard { offset: 0, bytes: DISK };
        assert_eq!(vm.io(1, discard), Ok(GraphReply::Done));
        for beyond in [read(DISK, 1, 0), write(DISK - 1, 2, 0), read(u64::MAX, 2, 0)] {
            assert_eq!(vm.io(1, beyond).unwrap_err().errno, Some(libc::EIO));
        }
        let overlay = vm.overlay(2, 3, Backing::Node(NodeId(1)), DISK);
        assert_eq!(vm.io(3, write(4096, 100, 9)), Ok(GraphReply::Done));
        assert_eq!(vm.io(3, read(4096, 100, 9)), Ok(GraphReply::Done));
        assert_eq!(vm.io(1, read(4096, 100, 0)), Ok(GraphReply::Done));
        vm.all_well(GraphRequest::Remove(NodeId(3)));
        vm.all_well(GraphRequest::Remove(NodeId(2)));
        vm.all_well(GraphRequest::Remove(NodeId(1)));
        assert!(overlay.metadata().unwrap().len() > 0);
    }
}

#[test]
fn an_image_that_names_another_says_so_and_creates_nothing() {
    let mut vm = Vm::start(EngineChoice::Auto, &[1]);
    let base = image(DISK);
    vm.add(MAIN, NodeId(0), file_spec(&base, info(DISK)));
    let _image = vm.overlay(1, 2, Backing::Node(NodeId(0)), DISK);
    vm.all_well(GraphRequest::Remove(NodeId(2)));
    for _ in 0..2 {
        let reply = vm.graph(GraphRequest::Add {
            node: NodeId(2),
            thread: MAIN,
            spec: NodeSpec::Qcow2(qcow2_spec(NodeId(1), Backing::FromImage)),
        });
        let named = GraphReply::BackingNamed {
            name: "base".into(),
            format: Some("raw".into()),
        };
        assert_eq!(reply, Ok(named));
    }
    let reply = vm.graph(GraphRequest::Report(vec![NodeId(0), NodeId(2), NodeId(77)]));
    let Ok(GraphReply::Reports(reports)) = reply else {
        panic!("{reply:?}")
    };
    assert_eq!(reports.into_keys().collect::<Vec<_>>(), [NodeId(0)]);
    vm.add(MAIN, NodeId(2), NodeSpec::Qcow2(qcow2_spec(NodeId(1), Backing::None)));
    let header = GraphRequest::SetBackingName {
        node: NodeId(2),
        backing: None,
    };
    vm.all_well(header);
    vm.all_well(GraphRequest::Remove(NodeId(2)));
    vm.add(
        MAIN,
        NodeId(2),
        NodeSpec::Qcow2(qcow2_spec(NodeId(1), Backing::FromImage)),
    );
}

#[test]
fn what_is_in_use_is_not_removed_and_what_cannot_be_is_refused() {
    let file = image(DISK);
    let (mut vm, mut queue) = Vm::with_disk(EngineChoice::Auto, &file, info(DISK), F_FLUSH);
    let _overlay = vm.overlay(20, 21, Backing::Node(NodeId(1)), DISK);
    let child = |parent, role, child: Option<u32>| EdgeChange::Child {
        parent: NodeId(parent),
        role,
        child: child.map(NodeId),
    };
    let read_only = DiskInfo {
        read_only: true,
        ..info(DISK)
    };
    vm.add(MAIN, NodeId(30), file_spec(&file, read_only));
    let add = |node, spec| GraphRequest::Add {
        node: NodeId(node),
        thread: MAIN,
        spec,
    };
    let backing = |parent, to| child(parent, ChildRole::Backing, Some(to));
    for (said, request) in [
        ("node 1 is a child of node 21", GraphRequest::Remove(NodeId(1))),
        ("node 0 is a child of node 1", GraphRequest::Remove(NodeId(0))),
        ("there is no node 5", GraphRequest::Remove(NodeId(5))),
        ("there is no node 5", move_device(5)),
        ("is read-only", move_device(30)),
        ("would be below itself", GraphRequest::Change(vec![backing(21, 21)])),
        (
            "would be below itself",
            GraphRequest::Change(vec![child(1, ChildRole::File, Some(21))]),
        ),
        ("cannot have this child", GraphRequest::Change(vec![backing(1, 30)])),
        (
            "cannot have this child",
            GraphRequest::Change(vec![child(21, ChildRole::File, None)]),
        ),
        (
            "cannot have this child",
            GraphRequest::Change(vec![child(21, ChildRole::DataFile, Some(30))]),
        ),
        (
            "changed twice",
            GraphRequest::Change(vec![backing(21, 30), backing(21, 0)]),
        ),
        ("a change of no edge", GraphRequest::Change(Vec::new())),
        // Nothing of a change is done when a part of it is impossible.
        (
            "there is no node 99",
            GraphRequest::Change(vec![backing(21, 30), backing(99, 30)]),
        ),
        ("exists already", add(21, raw_spec(NodeId(0), false))),
        ("there is no node 98", add(97, raw_spec(NodeId(98), false))),
        (
            "not a qcow2 image",
            GraphRequest::SetBackingName {
                node: NodeId(1),
                backing: None,
            },
        ),
        (
            "is a child of",
            GraphRequest::Create {
                file: NodeId(20),
                spec: CreateSpec::Raw {
                    bytes: 0,
                    preallocation: Preallocation::Off,
                },
                data_file: None,
            },
        ),
        (
            "Operation not supported",
            GraphRequest::Breakpoint {
                node: NodeId(1),
                action: ipc::graph::Breakpoint::Wait { tag: "A".into() },
            },
        ),
        (
            "there is no device 3",
            GraphRequest::Attach {
                device: DeviceIndex(3),
                node: NodeId(21),
                options: options(&info(DISK)),
            },
        ),
        (
            "has a disk already",
            GraphRequest::Attach {
                device: DEVICE,
                node: NodeId(21),
                options: options(&info(DISK)),
            },
        ),
        (
            "there is no I/O thread 1",
            GraphRequest::Add {
                node: NodeId(40),
                thread: IoThreadIndex(1),
                spec: file_spec(&file, info(DISK)),
            },
        ),
    ] {
        let answer = vm.refused(request);
        assert!(answer.contains(said), "{answer:?} instead of {said:?}");
    }
    // The number of a node that did not come is free.
    vm.add(MAIN, NodeId(40), file_spec(&file, info(DISK)));
    assert_eq!(vm.graph(move_device(21)), nothing_resized());
    assert_eq!(queue.write(0, &pattern(3, 512)), S_OK);
    assert_eq!(queue.read(0, 512), (S_OK, pattern(3, 512)));
    let said = vm.refused(GraphRequest::Remove(NodeId(21)));
    assert!(said.contains("node 21 is used by device 0"), "{said}");
    assert_eq!(vm.graph(GraphRequest::Change(vec![backing(21, 30)])), nothing_resized());
    vm.all_well(GraphRequest::Remove(NodeId(1)));
    vm.all_well(GraphRequest::Remove(NodeId(0)));
    assert_eq!(queue.read(0, 512), (S_OK, pattern(3, 512)));
}

#[test]
fn files_of_removed_nodes_are_closed() {
    for engine in ENGINES {
        let mut vm = Vm::start(engine, &[]);
        let file = image(DISK);
        let open = |vm: &Vm| {
            std::fs::read_dir(format!("/proc/{}/fd", vm.helper.child.id()))
                .unwrap()
                .count()
        };
        // Its copy of the seccomp listener is closed by now: the next request comes after that.
        vm.add(MAIN, NodeId(9999), file_spec(&file, info(DISK)));
        let before = open(&vm);
        for round in 0..1500 {
            vm.add(MAIN, NodeId(round), file_spec(&file, info(DISK)));
            if round % 100 == 0 {
                assert_eq!(vm.io(round, read(0, 512, 0)), Ok(GraphReply::Done));
            }
            vm.all_well(GraphRequest::Remove(NodeId(round)));
        }
        assert_eq!(open(&vm), before);
    }
}

#[test]
fn a_chain_of_200_images_is_read_to_its_bottom_and_is_the_longest() {
    for engine in ENGINES {
        let base = image(DISK);
        base.write_all_at(&pattern(1, 4096), 0).unwrap();
        let mut vm = Vm::start(engine, &[1]);
        vm.add(MAIN, NodeId(0), file_spec(&base, info(DISK)));
        vm.add(MAIN, NodeId(1), raw_spec(NodeId(0), true));
        let mut top = 1;
        for image in 1..200 {
            let (file, node) = (image * 2, image * 2 + 1);
            vm.overlay(file, node, Backing::Node(NodeId(top)), DISK);
            top = node;
        }
        let attach = GraphRequest::Attach {
            device: DEVICE,
            node: NodeId(top),
            options: options(&info(DISK)),
        };
        assert!(matches!(vm.graph(attach), Ok(GraphReply::Attached(_))));
        let mut queue = vm.activate(0, F_FLUSH).remove(0);
        assert_eq!(queue.read(0, 4096), (S_OK, pattern(1, 4096)));
        assert_eq!(queue.write(4, &pattern(2, 512)), S_OK);
        let mut expected = pattern(1, 4096);
        expected[2048..2560].copy_from_slice(&pattern(2, 512));
        assert_eq!(queue.read(0, 4096), (S_OK, expected));
        let mut deeper = 1000;
        let said = loop {
            let spec = raw_spec(NodeId(top), false);
            let node = NodeId(deeper);
            match vm.graph(GraphRequest::Add {
                node,
                thread: MAIN,
                spec,
            }) {
                Ok(_) => (top, deeper) = (deeper, deeper + 1),
                Err(failure) => break failure.message,
            }
            assert!(deeper < 1100, "nodes without end");
        };
        assert!(said.contains("nodes below one another"), "{said}");
    }
}

#[test]
fn a_threshold_is_passed_once() {
    let file = image(DISK);
    let (mut vm, mut queue) = Vm::with_disk(EngineChoice::Auto, &file, info(DISK), F_FLUSH);
    let threshold = |node, bytes| GraphRequest::SetWriteThreshold {
        node: NodeId(node),
        bytes,
    };
    // On the file, which the raw node above it is passed over for.
    vm.all_well(threshold(0, 4096));
    assert_eq!(queue.write(0, &pattern(1, 4096)), S_OK);
    assert_eq!(queue.write(7, &pattern(1, 1024)), S_OK);
    assert_eq!(queue.write(8, &pattern(1, 1024)), S_OK);
    let event = vm.helper.event();
    let ipc::block::BlockEvent::WriteThreshold {
        node,
        excess_bytes,
        threshold_bytes,
    } = event
    else {
        panic!("{event:?}")
    };
    assert_eq!((node, excess_bytes, threshold_bytes), (NodeId(0), 512, 4096));
    let Ok(GraphReply::Reports(reports)) = vm.graph(GraphRequest::Report(vec![NodeId(0)])) else {
        panic!("no report")
    };
    assert_eq!(reports[&NodeId(0)].write_threshold, 0);
}

#[test]
fn a_disk_gets_another_size_and_its_driver_is_told() {
    for engine in ENGINES {
        let file = image(DISK);
        let (mut vm, mut queue) = Vm::with_disk(engine, &file, info(DISK), F_FLUSH);
        assert_eq!(queue.write(DISK / 512 - 1, &pattern(1, 512)), S_OK);
        let resize = |vm: &mut Vm, bytes, preallocation| {
            let node = NodeId(1);
            match vm.graph(GraphRequest::Resize {
                node,
                bytes,
                preallocation,
            }) {
                Ok(GraphReply::Resized(mut devices)) => devices
                    .remove(&DEVICE)
                    .map(|identity| u64::from_le_bytes(std::array::from_fn(|i| identity.config[i]))),
                other => panic!("{other:?}"),
            }
        };
        let steps = [
            (DISK * 2, Preallocation::Off),
            (DISK * 3, Preallocation::Falloc),
            (DISK * 4 + 100, Preallocation::Full),
        ];
        for (bytes, preallocation) in steps {
            assert_eq!(resize(&mut vm, bytes, preallocation), Some(bytes / 512));
            assert_eq!(file.metadata().unwrap().len(), bytes);
            assert_eq!(queue.read(bytes / 512 - 1, 512), (S_OK, vec![0; 512]));
            assert_eq!(queue.read(bytes / 512, 512).0, S_IOERR);
        }
        assert_eq!(queue.read(DISK / 512 - 1, 512), (S_OK, pattern(1, 512)));
        assert_eq!(resize(&mut vm, DISK * 4 + 100, Preallocation::Off), None);
        // Requests that are there already when it shrinks are answered one way or the other.
        offer_round(&mut queue, 1);
        queue.kick();
        assert_eq!(resize(&mut vm, 4096 * 16, Preallocation::Off), Some(128));
        (0..32).for_each(|_| {
            queue.wait_used();
        });
        for slot in 0..16 {
            assert_eq!(queue.status(slot), S_OK);
        }
        assert_eq!(file.metadata().unwrap().len(), 4096 * 16);
        assert_eq!(queue.read(128, 512).0, S_IOERR);
        assert_eq!(queue.write(128, &[1; 512]), S_IOERR);
    }
}

fn any_node() -> impl Strategy<Value = u32> {
    0..12_u32
}

/// Requests without sense, as far as they need no fd.
fn any_request() -> impl Strategy<Value = (u8, u32, u32, u64)> {
    (0..13_u8, any_node(), any_node(), prop_oneof![0..DISK, any::<u64>()])
}

#[test]
fn any_order_of_requests_is_answered() {
    let file = image(DISK);
    let (vm, queue) = Vm::with_disk(EngineChoice::Auto, &file, info(DISK), F_FLUSH);
    let state = std::cell::RefCell::new((vm, queue));
    let mut runner = TestRunner::new(Config {
        cases: 60,
        failure_persistence: None,
        ..Config::default()
    });
    runner
        .run(&proptest::collection::vec(any_request(), 1..60), |requests| {
            let (vm, queue) = &mut *state.borrow_mut();
            for (kind, a, b, number) in requests {
                let (first, second) = (NodeId(a), NodeId(b));
                let bytes = number % (2 * DISK);
                let request = match kind {
                    0 => GraphRequest::Add {
                        node: first,
                        thread: MAIN,
                        spec: file_spec(&file, info(DISK)),
                    },
                    1 => GraphRequest::Add {
                        node: first,
                        thread: IoThreadIndex((number % 3) as u8),
                        spec: raw_spec(second, number % 2 == 0),
                    },
                    2 => GraphRequest::Add {
                        node: first,
                        thread: MAIN,
                        spec: NodeSpec::Qcow2(qcow2_spec(second, Backing::Node(NodeId(number as u32 % 12)))),
                    },
                    3 | 4 => GraphRequest::Remove(first),
                    5 => move_device(a),
                    6 => GraphRequest::Change(vec![EdgeChange::Child {
                        parent: first,
                        role: ChildRole::File,
                        child: (number % 4 != 0).then_some(second),
                    }]),
                    7 => GraphRequest::Change(vec![
                        EdgeChange::Child {
                            parent: first,
                            role: ChildRole::Backing,
                            child: Some(second),
                        },
                        EdgeChange::Device {
                            device: DeviceIndex((number % 2) as u8),
                            node: first,
                        },
                    ]),
                    8 => GraphRequest::Report(vec![first, second]),
                    9 => GraphRequest::Io {
                        node: first,
                        io: read(number, bytes, 1),
                    },
                    10 => GraphRequest::Io {
                        node: first,
                        io: ManualIo::Flush,
                    },
                    11 => GraphRequest::SetWriteThreshold { node: first, bytes },
                    _ => GraphRequest::Attach {
                        device: DeviceIndex((number % 3) as u8),
                        node: first,
                        options: options(&info(DISK)),
                    },
                };
                let _ = vm.graph(request);
            }
            // Whatever the graph is now, the guest's disk is there.
            prop_assert_eq!(queue.write(0, &pattern(1, 512)), S_OK);
            Ok(())
        })
        .unwrap();
}
