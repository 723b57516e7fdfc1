//! Exports of nodes, used by QEMU's and libnbd's tools, by many clients at once, and by clients that lie.

mod common;
use common::*;
use ipc::Failure;
use ipc::block::{BlockEvent, BlockRequest, EngineChoice};
use ipc::caps::NbdSocketFd;
use ipc::graph::{Backing, CreateQcow2, CreateSpec, EdgeChange, GraphReply, GraphRequest, ManualIo, NodeId, NodeSpec};
use ipc::nbd::{ExportNumber, ExportSpec, NbdClient};
use ipc::virtio::{DeviceIndex, IoThreadIndex};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MAIN: IoThreadIndex = IoThreadIndex::MAIN;
const DISK: u64 = 8 << 20;

/// block-proc, and a socket whose clients it gets.
struct Server {
    vm: Vm,
    listener: UnixListener,
    directory: tempfile::TempDir,
    next: u32,
    gone: Vec<NbdClient>,
}

impl Server {
    fn new(vm: Vm) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("s")).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self {
            vm,
            listener,
            directory,
            next: 0,
            gone: Vec::new(),
        }
    }

    /// With one raw disk, which is export 0, called "disk".
    fn with_disk(engine: EngineChoice, file: &File) -> Self {
        let mut server = Self::new(Vm::start(engine, &[]));
        let info = info(file.metadata().unwrap().len());
        server.vm.add(MAIN, NodeId(0), file_spec(file, info));
        server.vm.add(MAIN, NodeId(1), raw_spec(NodeId(0), false));
        server.export(spec(0, 1, "disk")).unwrap();
        server
    }

    fn export(&mut self, spec: ExportSpec) -> Result<GraphReply, Failure> {
        self.vm.graph(GraphRequest::AddExport(spec))
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    fn url(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    /// Hands over who has connected.
    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            stream.set_nonblocking(true).unwrap();
            let client = NbdClient(self.next);
            self.next += 1;
            self.vm.done(BlockRequest::ServeNbd {
                client,
                socket: NbdSocketFd::new(stream.into()),
                handshake_s: 10,
            });
        }
    }

    fn connect(&mut self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        self.accept();
        stream
    }

    /// Serves until all of them have ended; says what each printed.
    fn serve(&mut self, children: Vec<Child>) -> Vec<String> {
        let start = Instant::now();
        let mut children = children;
        while children.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
            self.accept();
            assert!(start.elapsed() < Duration::from_secs(120), "a client does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
        let outputs = children.into_iter().map(|child| child.wait_with_output().unwrap());
        let outputs = outputs.map(|output| {
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(
                output.status.success(),
                "{said}{}",
                String::from_utf8_lossy(&output.stderr)
            );
            said
        });
        outputs.collect()
    }

    fn run(&mut self, program: &str, arguments: &[&str]) -> Option<String> {
        let child = spawn(program, arguments)?;
        Some(self.serve(vec![child]).remove(0))
    }

    fn wait_gone(&mut self) -> NbdClient {
        match self.vm.helper.event() {
            BlockEvent::NbdClientGone(client) => {
                self.gone.push(client);
                client
            }
            other => panic!("{other:?}"),
        }
    }
}

fn spawn(program: &str, arguments: &[&str]) -> Option<Child> {
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    if child.is_err() {
        println!("SKIPPED: {program} is not installed");
    }
    child.ok()
}

fn spec(export: u32, node: u32, name: &str) -> ExportSpec {
    ExportSpec {
        export: ExportNumber(export),
        node: NodeId(node),
        name: name.into(),
        description: None,
        writable: true,
        writethrough: false,
        bitmaps: Vec::new(),
        allocation_depth: false,
    }
}

fn filled(bytes: u64, seed: u64) -> File {
    let file = image(bytes);
    for at in (0..bytes).step_by(65536) {
        file.write_all_at(&pattern(seed + at, 65536.min((bytes - at) as usize)), at)
            .unwrap();
    }
    file
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn images_are_copied_out_and_in_by_the_tools_of_others() {
    for engine in ENGINES {
        let file = filled(DISK, 1);
        let mut server = Server::with_disk(engine, &file);
        let copy = server.directory.path().join("copy");
        let (url, copy_name) = (server.url("disk"), copy.to_str().unwrap().to_owned());
        if server.run("nbdcopy", &[&url, &copy_name]).is_some() {
            assert!(std::fs::read(&copy).unwrap() == contents(&file));
        }
        server
            .run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &url, &copy_name])
            .expect("qemu-img");
        let compare = ["compare", "-f", "raw", "-F", "qcow2", &url, &copy_name];
        assert!(server.run("qemu-img", &compare).unwrap().contains("identical"));
        // And in.
        let other = filled(DISK, 1000);
        let plain = server.directory.path().join("other");
        std::fs::write(&plain, contents(&other)).unwrap();
        let arguments = ["convert", "-n", "-f", "raw", "-O", "raw", plain.to_str().unwrap(), &url];
        server.run("qemu-img", &arguments).unwrap();
        assert!(contents(&file) == contents(&other));
        std::fs::write(&plain, vec![0; DISK as usize]).unwrap();
        if server.run("nbdcopy", &[plain.to_str().unwrap(), &url]).is_some() {
            assert!(contents(&file) == vec![0; DISK as usize]);
        }
    }
}

#[test]
fn what_is_said_of_exports_is_what_they_are() {
    let file = filled(DISK, 1);
    let mut server = Server::with_disk(EngineChoice::Auto, &file);
    let second = ExportSpec {
        description: Some("the same, to look at".into()),
        writable: false,
        allocation_depth: true,
        ..spec(1, 1, "")
    };
    server.export(second).unwrap();
    let refused = server.export(spec(2, 1, "disk")).unwrap_err().message;
    assert_eq!(refused, "NBD server already has export named 'disk'");
    let base = server.url("");
    let Some(said) = server.run("nbdinfo", &["--json", "--list", &base]) else {
        return;
    };
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(
        (&said["protocol"], &said["structured"]),
        (&"newstyle-fixed".into(), &true.into())
    );
    let exports = said["exports"].as_array().unwrap();
    let names: Vec<_> = exports
        .iter()
        .map(|export| export["export-name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["", "disk"]);
    for (export, read_only) in exports.iter().zip([true, false]) {
        assert_eq!(export["is_read_only"], read_only);
        assert_eq!(export["export-size"], DISK);
        assert_eq!(
            (&export["can_fua"], &export["can_multi_conn"], &export["can_df"]),
            (&true.into(), &true.into(), &true.into())
        );
        assert_eq!(
            (&export["can_trim"], &export["can_zero"]),
            (&(!read_only).into(), &(!read_only).into())
        );
    }
    assert_eq!(exports[0]["description"], "the same, to look at");
    assert_eq!(
        exports[0]["contexts"],
        serde_json::json!(["base:allocation", "qemu:allocation-depth"])
    );
    let refused = spawn("nbdinfo", &[&server.url("nobody")]).map(|mut child| {
        while child.try_wait().unwrap().is_none() {
            server.accept();
        }
        child.wait().unwrap().success()
    });
    assert_eq!(refused, Some(false));
}

/// A qcow2 image over a backing image of the same size, in nodes 0 to 3: the export of 3 is called "disk".
fn chain(engine: EngineChoice) -> (Server, [File; 2]) {
    let (base, top) = (filled(DISK, 1), image(0));
    let mut server = Server::new(Vm::start(engine, &[]));
    server.vm.add(MAIN, NodeId(0), file_spec(&base, info(DISK)));
    server.vm.add(MAIN, NodeId(1), raw_spec(NodeId(0), true));
    server.vm.add(MAIN, NodeId(2), file_spec(&top, info(0)));
    let create = GraphRequest::Create {
        file: NodeId(2),
        spec: CreateSpec::Qcow2(CreateQcow2 {
            bytes: DISK,
            backing: Some(("base".into(), Some("raw".into()))),
            ..CreateQcow2::default()
        }),
        data_file: None,
    };
    assert_eq!(server.vm.graph(create), Ok(GraphReply::Done));
    let qcow2 = qcow2_spec(NodeId(2), Backing::Node(NodeId(1)));
    server.vm.add(MAIN, NodeId(3), NodeSpec::Qcow2(qcow2));
    let export = ExportSpec {
        allocation_depth: true,
        ..spec(0, 3, "disk")
    };
    server.export(export).unwrap();
    (server, [base, top])
}

#[test]
fn a_chain_shows_where_there_is_what() {
    for engine in ENGINES {
        let (mut server, _files) = chain(engine);
        for (offset, zero) in [(1 << 20, false), (4 << 20, true)] {
            let io = if zero {
                ManualIo::Zero {
                    offset,
                    bytes: 1 << 20,
                    may_unmap: true,
                }
            } else {
                ManualIo::Write {
                    offset,
                    bytes: 1 << 20,
                    pattern: 7,
                    durable: false,
                }
            };
            let node = NodeId(3);
            assert_eq!(server.vm.graph(GraphRequest::Io { node, io }), Ok(GraphReply::Done));
        }
        let url = server.url("disk");
        let map = server
            .run("qemu-img", &["map", "--output=json", "-f", "raw", &url])
            .unwrap();
        let map: Value = serde_json::from_str(&map).unwrap();
        let extents: Vec<_> = map
            .as_array()
            .unwrap()
            .iter()
            .map(|extent| {
                (
                    extent["start"].as_u64().unwrap(),
                    extent["length"].as_u64().unwrap(),
                    extent["zero"].as_bool().unwrap(),
                )
            })
            .collect();
        assert_eq!(
            extents,
            [(0, 4 << 20, false), (4 << 20, 1 << 20, true), (5 << 20, 3 << 20, false)]
        );
        let Some(map) = server.run("nbdinfo", &["--json", "--map=qemu:allocation-depth", &url]) else {
            continue;
        };
        let map: Value = serde_json::from_str(&map).unwrap();
        let depths: Vec<_> = map
            .as_array()
            .unwrap()
            .iter()
            .map(|extent| (extent["offset"].as_u64().unwrap(), extent["type"].as_u64().unwrap()))
            .collect();
        assert_eq!(depths, [(0, 2), (1 << 20, 1), (2 << 20, 2), (4 << 20, 1), (5 << 20, 2)]);
    }
}

#[test]
fn many_clients_write_at_once_while_the_graph_changes_below_them() {
    for engine in ENGINES {
        let file = image(64 << 20);
        let mut server = Server::with_disk(engine, &file);
        server.vm.add(MAIN, NodeId(2), raw_spec(NodeId(0), false));
        let url = server.url("disk");
        let children: Vec<Child> = (0..6_u64)
            .map(|number| {
                let commands = (0..40_u64).flat_map(|step| {
                    let offset = ((number * 10) << 20) + step * 262_144;
                    let pattern = number * 40 + step + 1;
                    [
                        "-c".to_owned(),
                        format!("aio_write -P {} {offset} 262144", pattern % 255),
                    ]
                });
                let mut arguments: Vec<String> = vec!["-f".into(), "raw".into()];
                arguments.extend(commands);
                arguments.extend([
                    "-c".into(),
                    "aio_flush".into(),
                    "-c".into(),
                    "flush".into(),
                    url.clone(),
                ]);
                let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
                spawn("qemu-io", &arguments).expect("qemu-io")
            })
            .collect();
        let mut left = children;
        let mut change = 0;
        while left.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
            server.accept();
            change += 1;
            let export = ExportNumber(0);
            let node = NodeId(1 + change % 2);
            let moved = server
                .vm
                .graph(GraphRequest::Change(vec![EdgeChange::Export { export, node }]));
            assert!(matches!(moved, Ok(GraphReply::Resized(_))), "{moved:?}");
        }
        server.serve(left);
        let there = contents(&file);
        for number in 0..6_usize {
            for step in 0..40 {
                let offset = ((number * 10) << 20) + step * 262_144;
                let pattern = ((number * 40 + step + 1) % 255) as u8;
                assert!(
                    there[offset..offset + 262_144].iter().all(|byte| *byte == pattern),
                    "{number} {step}"
                );
            }
        }
    }
}

#[test]
fn an_export_in_another_thread_gets_its_clients_with_what_they_have_said() {
    for engine in ENGINES {
        let thread = IoThreadIndex(1);
        let (memory, ram) = ram();
        let device = BlockRequest::AddDevice {
            device: DeviceIndex(0),
            kind: ipc::virtio::DeviceKind::Block,
            thread,
            queues: 1,
            queue_size: 256,
        };
        let mut server = Server::new(Vm::start_devices(engine, 1, vec![device], memory, ram));
        let file = filled(DISK, 3);
        server.vm.attach_in(thread, 0, &file, info(DISK));
        server.export(spec(0, 1, "disk")).unwrap();
        let url = server.url("disk");
        let copy = server.directory.path().join("copy");
        let convert = ["convert", "-f", "raw", "-O", "raw", &url, copy.to_str().unwrap()];
        server.run("qemu-img", &convert).unwrap();
        assert!(std::fs::read(&copy).unwrap() == contents(&file));
        // All in one piece: what follows the choice is not lost.
        let mut stream = server.connect();
        stream
            .write_all(&[&[0, 0, 0, 3][..], &choose("disk"), &request(0, 5, 0, 512)].concat())
            .unwrap();
        let mut answer = vec![0; 18 + 10 + 16 + 512];
        stream.read_exact(&mut answer).unwrap();
        assert!(answer[44..] == contents(&file)[..512]);
    }
}

/// The old way of choosing.
fn choose(name: &str) -> Vec<u8> {
    let length = (name.len() as u32).to_be_bytes();
    [&b"IHAVEOPT\0\0\0\x01"[..], &length, name.as_bytes()].concat()
}

fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    [
        &0x2560_9513_u32.to_be_bytes()[..],
        &[0, 0],
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

/// A client that has chosen "disk", with simple replies.
fn chosen(server: &mut Server) -> UnixStream {
    let mut stream = server.connect();
    stream
        .write_all(&[&[0, 0, 0, 3][..], &choose("disk")].concat())
        .unwrap();
    stream.read_exact(&mut [0; 28]).unwrap();
    stream
}

#[test]
fn requests_that_cannot_be_are_refused_and_the_client_goes_on() {
    for engine in ENGINES {
        let file = filled(DISK, 1);
        let mut server = Server::with_disk(engine, &file);
        let mut stream = chosen(&mut server);
        for (command, offset, length, error) in [
            (0, DISK, 512, 22),
            (0, u64::MAX, 512, 22),
            (0, 0, 32 << 20, 22),
            (0, 0, u32::MAX, 22),
            (1, DISK - 1, 512, 28),
            (4, DISK, 1, 28),
            (6, 1, u32::MAX, 28),
            (7, 0, 512, 22),
            (9, 0, 0, 22),
            (0xffff, 0, 0, 22),
            (5, 0, 512, 0),
            (3, u64::MAX, 7, 0),
            (1, 0, 0, 0),
            (0, 0, 0, 0),
        ] {
            stream.write_all(&request(command, 3, offset, length)).unwrap();
            if command == 1 {
                stream.write_all(&vec![0; length as usize]).unwrap();
            }
            let mut answer = [0; 16];
            stream.read_exact(&mut answer).unwrap();
            let expected = [
                &0x6744_6698_u32.to_be_bytes()[..],
                &u32::to_be_bytes(error),
                &3_u64.to_be_bytes(),
            ]
            .concat();
            assert_eq!(answer[..], expected, "{command} {offset} {length}");
        }
        // Large requests come in pieces.
        let (mut large, bytes) = (request(1, 4, 0, DISK as u32), pattern(9, DISK as usize));
        large.extend(&bytes);
        stream.write_all(&large).unwrap();
        stream.read_exact(&mut [0; 16]).unwrap();
        assert!(contents(&file) == bytes);
        stream.write_all(&request(0, 5, 0, DISK as u32)).unwrap();
        let mut answer = vec![0; 16 + DISK as usize];
        stream.read_exact(&mut answer).unwrap();
        assert!(answer[16..] == bytes);
        // The end has no answer.
        stream.write_all(&request(2, 6, 0, 0)).unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
        server.wait_gone();
    }
}

#[test]
fn an_export_with_clients_goes_only_when_they_may_be_hung_up_on() {
    for engine in ENGINES {
        let file = filled(DISK, 1);
        let mut server = Server::with_disk(engine, &file);
        let mut stream = chosen(&mut server);
        let export = ExportNumber(0);
        let remove = |hard| GraphRequest::RemoveExport { export, hard };
        // It is in the thread by the time that it has an answer.
        stream.write_all(&request(0, 1, 0, 512)).unwrap();
        stream.read_exact(&mut [0; 528]).unwrap();
        assert_eq!(
            server.vm.graph(remove(false)).unwrap_err().message,
            "export 'disk' still in use"
        );
        let in_use = server.vm.graph(GraphRequest::Remove(NodeId(1))).unwrap_err().message;
        assert_eq!(in_use, "node 1 is used by export 0");
        // It does not read its answers.
        for cookie in 0..64 {
            let _ = stream.write_all(&request(0, cookie, 0, DISK as u32));
        }
        assert_eq!(server.vm.graph(remove(true)), Ok(GraphReply::Done));
        server.wait_gone();
        assert_eq!(server.vm.graph(GraphRequest::Remove(NodeId(1))), Ok(GraphReply::Done));
        assert!(server.vm.graph(remove(true)).is_err());
        // The name is free again, also for others.
        server.vm.add(MAIN, NodeId(5), raw_spec(NodeId(0), false));
        server.export(spec(7, 5, "disk")).unwrap();
        let stream = chosen(&mut server);
        server.vm.done(BlockRequest::DropNbdClients);
        server.wait_gone();
        drop(stream);
    }
}

#[test]
fn a_client_that_vanishes_leaves_nothing_behind() {
    for engine in ENGINES {
        let file = image(DISK);
        let mut server = Server::with_disk(engine, &file);
        for cut in [1, 27, 28, 30, 5000, 300_000] {
            let mut stream = chosen(&mut server);
            let mut bytes = request(1, 1, 0, 400_000);
            bytes.resize(28 + 400_000, 5);
            stream.write_all(&bytes[..cut]).unwrap();
            drop(stream);
            server.wait_gone();
        }
        // Nobody is counted any more.
        let export = ExportNumber(0);
        let remove = GraphRequest::RemoveExport { export, hard: false };
        assert_eq!(server.vm.graph(remove), Ok(GraphReply::Done));
    }
}

#[test]
fn hostile_bytes_end_their_own_connection_and_nothing_else() {
    let option = |number: u32, data: Vec<u8>| {
        [
            &b"IHAVEOPT"[..],
            &number.to_be_bytes(),
            &(data.len() as u32).to_be_bytes(),
            &data,
        ]
        .concat()
    };
    let piece = prop_oneof![
        Just(vec![0, 0, 0, 3]),
        Just(choose("disk")),
        Just(choose("nobody")),
        Just(b"IHAVEOPT\0\0\0\x03\xff\xff\xff\xff".to_vec()),
        (0_u32..14, prop::collection::vec(any::<u8>(), 0..40)).prop_map(move |(number, data)| option(number, data)),
        Just(option(7, [&[0, 0, 0, 4][..], b"disk", &[0, 1, 0, 3]].concat())),
        Just(option(8, vec![])),
        Just(option(
            10,
            [
                &[0, 0, 0, 4][..],
                b"disk",
                &[0, 0, 0, 1, 0, 0, 0, 15],
                b"base:allocation"
            ]
            .concat()
        )),
        Just(option(10, [&[0, 0, 0, 4][..], b"disk", &[0xff; 8]].concat())),
        (0_u16..10, any::<u16>(), 0..2 * DISK, 0..2_000_000_u32).prop_map(|(command, flags, offset, length)| {
            let mut bytes = request(command, 1, offset, length);
            bytes[4..6].copy_from_slice(&flags.to_be_bytes());
            bytes
        }),
        prop::collection::vec(any::<u8>(), 0..100),
        Just(vec![0; 100_000]),
    ];
    for engine in ENGINES {
        let file = filled(DISK, 1);
        let server = std::cell::RefCell::new(Server::with_disk(engine, &file));
        let config = Config {
            cases: 150,
            failure_persistence: None,
            ..Config::default()
        };
        TestRunner::new(config)
            .run(&prop::collection::vec(piece.clone(), 1..12), |pieces| {
                let mut server = server.borrow_mut();
                let mut stream = server.connect();
                stream.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
                for piece in pieces {
                    if stream.write_all(&piece).is_err() {
                        break;
                    }
                }
                drop(stream);
                server.wait_gone();
                Ok(())
            })
            .unwrap();
        let mut server = server.into_inner();
        let mut stream = chosen(&mut server);
        stream.write_all(&request(0, 1, 0, 512)).unwrap();
        stream.read_exact(&mut [0; 528]).unwrap();
    }
}

#[test]
fn a_client_that_does_not_choose_is_hung_up_on() {
    let file = image(DISK);
    let mut server = Server::with_disk(EngineChoice::Auto, &file);
    let (theirs, mut ours) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    server.vm.done(BlockRequest::ServeNbd {
        client: NbdClient(9),
        socket: NbdSocketFd::new(theirs.into()),
        handshake_s: 1,
    });
    let start = Instant::now();
    ours.read_to_end(&mut Vec::new()).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(900));
    assert_eq!(server.wait_gone(), NbdClient(9));
}
