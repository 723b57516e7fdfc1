//! Nodes on NBD servers: QEMU's and nbdkit's, servers that die, and servers that lie.

mod common;
use common::*;
use ipc::Failure;
use ipc::block::{BlockEvent, EngineChoice};
use ipc::caps::NbdSocketFd;
use ipc::graph::{Backing, GraphReply, GraphRequest, ManualIo, NbdSpec, NodeDetails, NodeId, NodeSpec};
use ipc::virtio::{DeviceIndex, IoThreadIndex};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MAIN: IoThreadIndex = IoThreadIndex::MAIN;
const NODE: NodeId = NodeId(1);
const DISK: u64 = 4 << 20;

/// A server on a socket. Killed when dropped.
struct Server(Child);

impl Server {
    fn start(socket: &Path, program: &str, arguments: &[&str]) -> Option<Self> {
        let _ = std::fs::remove_file(socket);
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = child else {
            println!("SKIPPED: {program} is not installed");
            return None;
        };
        let server = Self(child);
        let start = Instant::now();
        while UnixStream::connect(socket).is_err() {
            assert!(start.elapsed() < Duration::from_secs(20), "{program} does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Some(server)
    }

    /// qemu-nbd, for any number of clients one after the other.
    fn qemu(socket: &Path, image: &Path, more: &[&str]) -> Option<Self> {
        let (socket_name, image) = (socket.to_str().unwrap(), image.to_str().unwrap());
        let fixed = ["-t", "-e", "8", "-f", "raw", "-k", socket_name, "-x", "disk"];
        let arguments = [&fixed, more, &[image]].concat();
        Self::start(socket, "qemu-nbd", &arguments)
    }

    fn nbdkit(socket: &Path, more: &[&str]) -> Option<Self> {
        let arguments = [&["-f", "-U", socket.to_str().unwrap()], more].concat();
        Self::start(socket, "nbdkit", &arguments)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn connect(socket: &Path) -> NbdSocketFd {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_nonblocking(true).unwrap();
    NbdSocketFd::new(stream.into())
}

fn spec(socket: NbdSocketFd) -> NbdSpec {
    NbdSpec {
        socket,
        export: "disk".into(),
        reconnect_delay_s: 0,
        read_only: false,
        auto_read_only: false,
        discard: true,
    }
}

trait Asking {
    fn io(&mut self, io: ManualIo) -> Result<GraphReply, Failure>;
    fn well(&mut self, io: ManualIo);
    fn reads(&mut self, offset: u64, bytes: u64, pattern: u8) -> bool;
}

impl Asking for Vm {
    fn io(&mut self, io: ManualIo) -> Result<GraphReply, Failure> {
        self.graph(GraphRequest::Io { node: NODE, io })
    }

    fn well(&mut self, io: ManualIo) {
        assert_eq!(self.io(io.clone()), Ok(GraphReply::Done), "{io:?}");
    }

    fn reads(&mut self, offset: u64, bytes: u64, pattern: u8) -> bool {
        let pattern = Some(pattern);
        match self.io(ManualIo::Read { offset, bytes, pattern }) {
            Ok(GraphReply::Done) => true,
            Ok(GraphReply::Mismatch(_)) => false,
            other => panic!("{other:?}"),
        }
    }
}

fn write(offset: u64, bytes: u64, pattern: u8) -> ManualIo {
    ManualIo::Write {
        offset,
        bytes,
        pattern,
        durable: offset.is_multiple_of(3),
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Flush,
    Read(u64, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0..DISK, 1..600_000_u64).prop_map(|(offset, bytes)| (offset, bytes.min(DISK - offset)));
    let step = prop_oneof![
        4 => (range(), any::<u8>()).prop_map(|((o, b), p)| Step::Write(o, b, p)),
        2 => (range(), any::<bool>()).prop_map(|((o, b), u)| Step::Zero(o, b, u)),
        1 => Just(Step::Flush),
        2 => range().prop_map(|(o, b)| Step::Read(o, b)),
    ];
    prop::collection::vec(step, 1..30)
}

/// Random requests, and the same on an array. What a request covers in parts is looked at in runs of equal bytes.
fn compare(vm: &mut Vm, model: &mut [u8], steps: Vec<Step>) {
    for step in steps {
        match step {
            Step::Write(offset, bytes, pattern) => {
                vm.well(write(offset, bytes, pattern));
                model[offset as usize..(offset + bytes) as usize].fill(pattern);
            }
            Step::Zero(offset, bytes, may_unmap) => {
                vm.well(ManualIo::Zero {
                    offset,
                    bytes,
                    may_unmap,
                });
                model[offset as usize..(offset + bytes) as usize].fill(0);
            }
            Step::Flush => vm.well(ManualIo::Flush),
            Step::Read(offset, bytes) => {
                let range = &model[offset as usize..(offset + bytes) as usize];
                let mut at = offset;
                for run in range.chunk_by(|a, b| a == b) {
                    assert!(vm.reads(at, run.len() as u64, run[0]), "at {at}");
                    at += run.len() as u64;
                }
            }
        }
    }
}

fn random(engine: EngineChoice, start: impl Fn(&Path, &Path) -> Option<Server>, export: &str, cases: u32) {
    let directory = tempfile::tempdir().unwrap();
    let (socket, image) = (directory.path().join("s"), directory.path().join("image"));
    std::fs::write(&image, vec![0; DISK as usize]).unwrap();
    let Some(server) = start(&socket, &image) else { return };
    let mut vm = Vm::start(engine, &[]);
    let report = vm.add(
        MAIN,
        NODE,
        NodeSpec::Nbd(NbdSpec {
            export: export.into(),
            ..spec(connect(&socket))
        }),
    );
    assert_eq!(report.bytes, DISK);
    let (model, vm) = (
        std::cell::RefCell::new(vec![0; DISK as usize]),
        std::cell::RefCell::new(vm),
    );
    TestRunner::new(Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    })
    .run(&steps(), |steps| {
        compare(&mut vm.borrow_mut(), &mut model.borrow_mut(), steps);
        Ok(())
    })
    .unwrap();
    vm.borrow_mut().well(ManualIo::Flush);
    assert!(
        std::fs::read(&image).unwrap() == *model.borrow(),
        "the server's file differs"
    );
    assert_eq!(vm.borrow_mut().graph(GraphRequest::Remove(NODE)), Ok(GraphReply::Done));
    drop(server);
}

#[test]
fn random_requests_leave_what_they_leave_in_a_plain_array() {
    for engine in ENGINES {
        random(engine, |socket, image| Server::qemu(socket, image, &[]), "disk", 40);
    }
}

#[test]
fn a_server_without_structured_replies_and_without_go_is_spoken_to_as_well() {
    let start = |socket: &Path, image: &Path| {
        let file = format!("file={}", image.display());
        Server::nbdkit(socket, &["--no-sr", "file", &file])
    };
    random(EngineChoice::Auto, start, "", 20);
    // The only option that an old server has is the name.
    let start = |socket: &Path, image: &Path| {
        let file = format!("file={}", image.display());
        Server::nbdkit(socket, &["--mask-handshake=0x1", "file", &file])
    };
    random(EngineChoice::Threads, start, "", 5);
}

#[test]
fn a_server_of_large_blocks_gets_whole_blocks() {
    let start = |socket: &Path, image: &Path| {
        let file = format!("file={}", image.display());
        let policy = [
            "--filter=blocksize-policy",
            "file",
            &file,
            "blocksize-minimum=4096",
            "blocksize-preferred=64K",
            "blocksize-maximum=1M",
            "blocksize-error-policy=error",
        ];
        Server::nbdkit(socket, &policy)
    };
    for engine in ENGINES {
        random(engine, start, "", 20);
    }
}

#[test]
fn a_server_that_cannot_do_more_than_read_and_write_is_enough() {
    let start = |socket: &Path, image: &Path| {
        let file = format!("file={}", image.display());
        Server::nbdkit(socket, &["--filter=nozero", "file", &file])
    };
    random(EngineChoice::Auto, start, "", 10);
}

#[test]
fn a_qcow2_image_on_a_server_is_one() {
    for engine in ENGINES {
        let directory = tempfile::tempdir().unwrap();
        let (socket, image) = (directory.path().join("s"), directory.path().join("image"));
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "4M"])
            .status();
        assert!(made.expect("qemu-img").success());
        std::fs::OpenOptions::new()
            .write(true)
            .open(&image)
            .unwrap()
            .set_len(8 << 20)
            .unwrap();
        let Some(server) = Server::qemu(&socket, &image, &[]) else {
            return;
        };
        let mut vm = Vm::start(engine, &[]);
        vm.add(MAIN, NodeId(0), NodeSpec::Nbd(spec(connect(&socket))));
        vm.add(MAIN, NODE, NodeSpec::Qcow2(qcow2_spec(NodeId(0), Backing::None)));
        vm.well(write(100_000, 300_000, 7));
        vm.well(write(3 << 20, 1 << 20, 9));
        assert!(vm.reads(100_000, 300_000, 7) && vm.reads(3 << 20, 1 << 20, 9) && vm.reads(0, 65536, 0));
        for node in [1, 0] {
            assert_eq!(vm.graph(GraphRequest::Remove(NodeId(node))), Ok(GraphReply::Done));
        }
        drop(server);
        let checked = Command::new("qemu-img")
            .args(["check", "-q", "-f", "qcow2", image.to_str().unwrap()])
            .status();
        assert!(checked.unwrap().success());
    }
}

#[test]
fn a_guest_keeps_many_requests_under_way() {
    for engine in ENGINES {
        let directory = tempfile::tempdir().unwrap();
        let (socket, image) = (directory.path().join("s"), directory.path().join("image"));
        std::fs::write(&image, vec![0; DISK as usize]).unwrap();
        let Some(_server) = Server::qemu(&socket, &image, &[]) else {
            return;
        };
        let mut vm = Vm::start(engine, &[1]);
        vm.add(MAIN, NODE, NodeSpec::Nbd(spec(connect(&socket))));
        let attach = GraphRequest::Attach {
            device: DeviceIndex(0),
            node: NODE,
            options: options(&info(DISK)),
        };
        assert!(matches!(vm.graph(attach), Ok(GraphReply::Attached(_))));
        let mut queue = vm.activate(0, F_FLUSH).remove(0);
        for round in 0..20_u64 {
            for slot in 0..32_u16 {
                queue.put(queue.data_at(slot), &pattern(round * 32 + u64::from(slot), 65536));
                let data = readable(queue.data_at(slot), 65536);
                queue.prepare(slot, T_OUT, u64::from(slot) * 128, Some(data));
            }
            queue.publish();
            queue.kick();
            for _ in 0..32 {
                queue.wait_used();
            }
            for slot in 0..32_u16 {
                assert_eq!(queue.status(slot), S_OK);
                let there = queue.read(u64::from(slot) * 128, 65536);
                assert!(
                    there == (S_OK, pattern(round * 32 + u64::from(slot), 65536)),
                    "{round} {slot}"
                );
            }
        }
    }
}

#[test]
fn an_export_that_can_only_be_read_is_refused_or_read() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, image) = (directory.path().join("s"), directory.path().join("image"));
    std::fs::write(&image, vec![5; DISK as usize]).unwrap();
    let Some(_server) = Server::qemu(&socket, &image, &["-r"]) else {
        return;
    };
    let mut vm = Vm::start(EngineChoice::Auto, &[]);
    let add = |spec| GraphRequest::Add {
        node: NODE,
        thread: MAIN,
        spec: NodeSpec::Nbd(spec),
    };
    let refused = vm.graph(add(spec(connect(&socket)))).unwrap_err();
    assert_eq!(refused.message, "request on write denied without write permission");
    let other = NbdSpec {
        export: "other".into(),
        read_only: true,
        ..spec(connect(&socket))
    };
    let refused = vm.graph(add(other)).unwrap_err().message;
    assert!(refused.starts_with("Requested export not available"), "{refused}");
    let auto = NbdSpec {
        auto_read_only: true,
        ..spec(connect(&socket))
    };
    match vm.graph(add(auto)).unwrap() {
        GraphReply::Added(report) => {
            assert!(matches!(report.details, NodeDetails::Nbd(details) if details.read_only));
        }
        other => panic!("{other:?}"),
    }
    assert!(vm.reads(0, DISK, 5));
    assert!(vm.io(write(0, 512, 1)).is_err());
}

#[test]
fn requests_wait_for_a_server_that_comes_back_and_fail_when_none_does() {
    for engine in ENGINES {
        let directory = tempfile::tempdir().unwrap();
        let (socket, image) = (directory.path().join("s"), directory.path().join("image"));
        std::fs::write(&image, vec![0; DISK as usize]).unwrap();
        let Some(server) = Server::qemu(&socket, &image, &[]) else {
            return;
        };
        let mut vm = Vm::start(engine, &[1]);
        let patient = NbdSpec {
            reconnect_delay_s: 2,
            ..spec(connect(&socket))
        };
        vm.add(MAIN, NODE, NodeSpec::Nbd(patient));
        let attach = GraphRequest::Attach {
            device: DeviceIndex(0),
            node: NODE,
            options: options(&info(DISK)),
        };
        vm.graph(attach).unwrap();
        let mut queue = vm.activate(0, F_FLUSH).remove(0);
        assert_eq!(queue.write(0, &pattern(1, 4096)), S_OK);
        drop(server);
        assert!(matches!(vm.helper.event(), BlockEvent::NbdLost { node: NODE }));
        // Two requests wait.
        for slot in 0..2_u16 {
            queue.put(queue.data_at(slot), &pattern(u64::from(slot) + 10, 4096));
            let data = readable(queue.data_at(slot), 4096);
            queue.prepare(slot, T_OUT, u64::from(slot) * 8, Some(data));
        }
        queue.publish();
        queue.kick();
        let Some(server) = Server::qemu(&socket, &image, &[]) else {
            return;
        };
        let reconnect = GraphRequest::Reconnect {
            node: NODE,
            socket: connect(&socket),
        };
        assert_eq!(vm.graph(reconnect), Ok(GraphReply::Done));
        queue.wait_used();
        queue.wait_used();
        for slot in 0..2_u16 {
            assert_eq!(queue.status(slot), S_OK);
        }
        assert!(queue.read(8, 4096) == (S_OK, pattern(11, 4096)));
        let again = vm.graph(GraphRequest::Reconnect {
            node: NODE,
            socket: connect(&socket),
        });
        assert_eq!(again.unwrap_err().message, "the NBD server is connected already");
        drop(server);
        assert!(matches!(vm.helper.event(), BlockEvent::NbdLost { node: NODE }));
        let start = Instant::now();
        assert_eq!(queue.write(0, &pattern(1, 4096)), S_IOERR);
        assert!(start.elapsed() > Duration::from_millis(1500), "{:?}", start.elapsed());
        // Then at once.
        let start = Instant::now();
        assert_eq!(queue.read(0, 4096).0, S_IOERR);
        assert!(start.elapsed() < Duration::from_secs(1));
        // A server with another disk is not taken.
        std::fs::write(&image, vec![0; 512]).unwrap();
        let Some(_server) = Server::qemu(&socket, &image, &[]) else {
            return;
        };
        let other = vm.graph(GraphRequest::Reconnect {
            node: NODE,
            socket: connect(&socket),
        });
        assert_eq!(
            other.unwrap_err().message,
            "the NBD server's export has another size than before"
        );
    }
}

/// A server made of bytes: reads and writes as the list says, then hangs up, or waits until the client does.
fn scripted(script: Vec<(usize, Vec<u8>)>, hang_up: bool) -> (NbdSocketFd, std::thread::JoinHandle<()>) {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("s")).unwrap();
    let socket = connect(&directory.path().join("s"));
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        for (expected, bytes) in script {
            if stream.read_exact(&mut vec![0; expected]).is_err() || stream.write_all(&bytes).is_err() {
                return;
            }
        }
        if !hang_up {
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    (socket, thread)
}

fn hello() -> Vec<u8> {
    [&b"NBDMAGICIHAVEOPT"[..], &[0, 3]].concat()
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// Up to the end of a handshake with structured replies; the export has `DISK` bytes.
fn shaken() -> Vec<(usize, Vec<u8>)> {
    let mut go = reply(7, 3, &[&[0, 0][..], &DISK.to_be_bytes(), &[0x05, 0x6d]].concat());
    go.extend(reply(7, 1, &[]));
    vec![
        (0, hello()),
        (4 + 16, reply(8, 1, &[])),
        (
            16 + 4 + 4 + 4 + 15,
            [
                reply(10, 4, &[&[0, 0, 0, 9][..], b"base:allocation"].concat()),
                reply(10, 1, &[]),
            ]
            .concat(),
        ),
        (16 + 4 + 2 + 2, go),
    ]
}

fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes
}

#[test]
fn a_handshake_of_lies_is_refused() {
    let long = [
        0x0003_e889_0455_65a9_u64.to_be_bytes().as_slice(),
        &[0, 0, 0, 8, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff],
    ]
    .concat();
    let many: Vec<u8> = std::iter::repeat_n(reply(7, 3, &[0, 9]), 2000).flatten().collect();
    let mut endless = shaken();
    endless[3].1 = many;
    let mut huge = shaken();
    huge[3].1 = reply(7, 3, &[&[0, 0][..], &u64::MAX.to_be_bytes(), &[0, 1]].concat());
    huge[3].1.extend(reply(7, 1, &[]));
    let mut odd = shaken();
    let block = [3_u16.to_be_bytes().as_slice(), &7_u32.to_be_bytes(), &[0; 8]].concat();
    odd[3].1 = [reply(7, 3, &block), odd[3].1.clone()].concat();
    let mut uninvited = shaken();
    uninvited[2].1 = reply(10, 4, &[&[0, 0, 0, 9][..], b"other:thing"].concat());
    for (script, hang_up, expected) in [
        (vec![], true, "connection failed"),
        (
            vec![(0, b"HTTP/1.1 400 Bad Request".to_vec())],
            false,
            "its greeting is not NBD's",
        ),
        (
            vec![(0, b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53".to_vec())],
            false,
            "fixed newstyle",
        ),
        (
            vec![(0, [&b"NBDMAGICIHAVEOPT"[..], &[0, 0]].concat())],
            false,
            "fixed newstyle",
        ),
        (vec![(0, hello()), (20, long)], false, "too long"),
        (vec![(0, hello()), (20, reply(3, 1, &[]))], false, "another option"),
        (
            vec![(0, hello()), (20, reply(8, 0x8000_0005, b"use \x1bTLS"))],
            false,
            "requires TLS, which Bulkhead does not have: use TLS",
        ),
        (endless, false, "does not come to the end"),
        (huge, false, "too large"),
        (odd, false, "not a power of two"),
        (uninvited, false, "not asked for"),
    ] {
        let mut vm = Vm::start(EngineChoice::Auto, &[]);
        let (socket, thread) = scripted(script, hang_up);
        let add = GraphRequest::Add {
            node: NODE,
            thread: MAIN,
            spec: NodeSpec::Nbd(NbdSpec {
                export: String::new(),
                ..spec(socket)
            }),
        };
        let refused = vm.graph(add).unwrap_err().message;
        assert!(refused.contains(expected), "{refused} instead of {expected}");
        thread.join().unwrap();
    }
}

#[test]
fn a_server_that_lies_about_requests_is_hung_up_on() {
    let data = |offset: u64, bytes: usize| [&offset.to_be_bytes()[..], &vec![1; bytes]].concat();
    let hole = |offset: u64, bytes: u32| [&offset.to_be_bytes()[..], &bytes.to_be_bytes()].concat();
    let simple = |magic: u32, cookie: u64| [&magic.to_be_bytes()[..], &[0; 4], &cookie.to_be_bytes()].concat();
    for (engine, answer) in ENGINES.into_iter().flat_map(|engine| {
        [
            vec![0; 64],
            simple(0x6744_6698, 1),
            simple(0x6744_6698, 99),
            chunk(1, 1, 99, &data(0, 4096)),
            chunk(1, 1, 1, &data(4096, 4096)),
            chunk(1, 1, 1, &data(0, 4097)),
            chunk(1, 1, 1, &data(u64::MAX, 4096)),
            chunk(0, 1, 1, &data(0, 0)),
            [chunk(0, 1, 1, &data(0, 2048)), chunk(1, 1, 1, &data(2047, 2048))].concat(),
            chunk(1, 2, 1, &hole(0, u32::MAX)),
            chunk(1, 2, 1, &hole(0, 0)),
            chunk(1, 5, 1, &[0; 12]),
            chunk(1, 77, 1, &[]),
            chunk(0, 0, 1, &[1]),
            chunk(1, 0x8001, 1, &[0; 5]),
        ]
        .map(|answer| (engine, answer))
    }) {
        let mut script = shaken();
        script.push((28, answer.clone()));
        let (socket, thread) = scripted(script, false);
        let mut vm = Vm::start(engine, &[]);
        vm.add(
            MAIN,
            NODE,
            NodeSpec::Nbd(NbdSpec {
                export: String::new(),
                ..spec(socket)
            }),
        );
        let read = ManualIo::Read {
            offset: 0,
            bytes: 4096,
            pattern: None,
        };
        let failed = vm.io(read).unwrap_err();
        assert_eq!(failed.errno, Some(libc::EIO), "{answer:?}");
        assert!(matches!(vm.helper.event(), BlockEvent::NbdLost { node: NODE }));
        thread.join().unwrap();
    }
}

#[test]
fn errors_and_parts_of_a_structured_reply_are_understood() {
    let data = |offset: u64, byte: u8, bytes: usize| [&offset.to_be_bytes()[..], &vec![byte; bytes]].concat();
    let hole = |offset: u64, bytes: u32| [&offset.to_be_bytes()[..], &bytes.to_be_bytes()].concat();
    let mut script = shaken();
    // In any order, with a hole.
    script.push((
        28,
        [
            chunk(0, 1, 1, &data(3072, 0, 1024)),
            chunk(0, 2, 1, &hole(0, 3072)),
            chunk(1, 0, 1, &[]),
        ]
        .concat(),
    ));
    // Refused, after a part.
    let error = [&28_u32.to_be_bytes()[..], &[0, 4], b"full"].concat();
    script.push((
        28,
        [chunk(0, 1, 2, &data(0, 1, 10)), chunk(1, 0x8001, 2, &error)].concat(),
    ));
    // Less than was asked for is no answer.
    script.push((28, chunk(1, 1, 3, &data(0, 0, 4095))));
    let (socket, thread) = scripted(script, true);
    let mut vm = Vm::start(EngineChoice::Auto, &[]);
    vm.add(
        MAIN,
        NODE,
        NodeSpec::Nbd(NbdSpec {
            export: String::new(),
            ..spec(socket)
        }),
    );
    let read = ManualIo::Read {
        offset: 0,
        bytes: 4096,
        pattern: Some(0),
    };
    assert_eq!(vm.io(read.clone()), Ok(GraphReply::Done));
    assert_eq!(vm.io(read.clone()).unwrap_err().errno, Some(libc::ENOSPC));
    assert_eq!(vm.io(read).unwrap_err().errno, Some(libc::EIO));
    thread.join().unwrap();
}
