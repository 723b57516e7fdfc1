//! Exports of the whole machine's nodes: commands, refusals, events, and the tools of others as clients.

use bulkhead_tests::images::{name, qemu_img};
use bulkhead_tests::machine::{Machine, wait_until};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

const DISK: u64 = 8 << 20;

fn storage(more: &str) -> (Machine, Qmp, tempfile::TempDir) {
    let images = tempfile::tempdir().unwrap();
    std::fs::write(images.path().join("image"), vec![7; DISK as usize]).unwrap();
    let mut machine =
        Machine::start_without_serial(tempfile::tempdir().unwrap(), &format!("-machine none {more}"), &[]);
    let qmp = machine.qmp();
    (machine, qmp, images)
}

fn add_image(qmp: &mut Qmp, images: &Path, more: Value) {
    let mut node = json!({"driver": "raw", "node-name": "n",
        "file": {"driver": "file", "filename": name(&images.join("image"))}});
    node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    qmp.execute("blockdev-add", node);
}

fn start(qmp: &mut Qmp, socket: &Path) {
    let addr = json!({"type": "unix", "data": {"path": name(socket)}});
    qmp.execute("nbd-server-start", json!({"addr": addr}));
}

fn url(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", name(socket))
}

fn export(id: &str) -> Value {
    json!({"type": "nbd", "id": id, "node-name": "n"})
}

#[test]
fn commands_do_and_refuse_what_they_should() {
    let (mut machine, mut qmp, images) = storage("");
    let socket = images.path().join("s");
    add_image(&mut qmp, images.path(), json!({}));
    for (command, arguments) in [
        ("nbd-server-stop", json!({})),
        ("nbd-server-add", json!({"device": "n"})),
        ("block-export-add", export("e")),
    ] {
        assert_eq!(qmp.refusal(command, arguments), "NBD server not running");
    }
    start(&mut qmp, &socket);
    let addr = json!({"type": "unix", "data": {"path": name(&socket)}});
    assert_eq!(
        qmp.refusal("nbd-server-start", json!({"addr": addr})),
        "NBD server already running"
    );
    qmp.execute("block-export-add", export("e"));
    let mut other = export("f");
    other["name"] = "n".into();
    assert_eq!(
        qmp.refusal("block-export-add", other),
        "NBD server already has export named 'n'"
    );
    assert_eq!(
        qmp.refusal("block-export-add", export("e")),
        "Block export id 'e' is already in use"
    );
    assert_eq!(qmp.refusal("block-export-add", export("1")), "Invalid block export id");
    let mut missing = export("f");
    missing["node-name"] = "x".into();
    assert_eq!(
        qmp.refusal("block-export-add", missing),
        "Cannot find device='' nor node-name='x'"
    );
    let mut bitmap = export("f");
    bitmap["name"] = "f".into();
    bitmap["bitmaps"] = json!(["b"]);
    assert_eq!(qmp.refusal("block-export-add", bitmap), "Bitmap 'b' is not found");
    assert_eq!(
        qmp.run("query-block-exports"),
        json!([{"id": "e", "type": "nbd", "node-name": "n", "shutting-down": false}])
    );
    assert_eq!(
        qmp.refusal("blockdev-del", json!({"node-name": "n"})),
        "Node n is in use"
    );
    assert_eq!(
        qmp.refusal("block-export-del", json!({"id": "x"})),
        "Export 'x' is not found"
    );
    qmp.execute(
        "nbd-server-add",
        json!({"device": "n", "name": "old", "writable": true}),
    );
    qmp.execute("block-export-del", json!({"id": "e"}));
    assert_eq!(qmp.wait_event("BLOCK_EXPORT_DELETED"), json!({"id": "e"}));
    qmp.execute("nbd-server-remove", json!({"name": "old", "mode": "hard"}));
    assert_eq!(qmp.wait_event("BLOCK_EXPORT_DELETED"), json!({"id": "old"}));
    assert_eq!(qmp.run("query-block-exports"), json!([]));
    qmp.execute("blockdev-del", json!({"node-name": "n"}));
    add_image(&mut qmp, images.path(), json!({"read-only": true}));
    let mut writable = export("e");
    writable["writable"] = true.into();
    assert_eq!(
        qmp.refusal("block-export-add", writable),
        "Cannot export read-only node as writable"
    );
    qmp.execute("nbd-server-add", json!({"device": "n", "writable": true}));
    qmp.run("nbd-server-stop");
    assert_eq!(qmp.wait_event("BLOCK_EXPORT_DELETED"), json!({"id": "n"}));
    assert!(!socket.exists());
    qmp.run("quit");
    assert!(machine.wait().success(), "{}", machine.log());
}

#[test]
fn clients_copy_out_and_in_over_unix_sockets_and_tcp() {
    let (mut machine, mut qmp, images) = storage("");
    let at = |name: &str| images.path().join(name);
    add_image(&mut qmp, images.path(), json!({}));
    start(&mut qmp, &at("s"));
    let mut writable = export("e");
    writable["writable"] = true.into();
    qmp.execute("block-export-add", writable);
    let n = url(&at("s"), "n");
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &n, name(&at("copy"))]);
    let same = qemu_img(&["compare", "-f", "raw", "-F", "qcow2", &n, name(&at("copy"))]);
    assert!(same.contains("identical"), "{same}");
    std::fs::write(at("new"), vec![9; DISK as usize]).unwrap();
    qemu_img(&["convert", "-n", "-f", "raw", "-O", "raw", name(&at("new")), &n]);
    assert!(std::fs::read(at("image")).unwrap() == vec![9; DISK as usize]);
    qmp.run("nbd-server-stop");
    // The system chooses a free port; somebody may take it again, but hardly so soon.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let addr = json!({"type": "inet", "data": {"host": "127.0.0.1", "port": port.to_string()}});
    qmp.execute("nbd-server-start", json!({"addr": addr}));
    qmp.execute("nbd-server-add", json!({"device": "n", "name": "x"}));
    let tcp = format!("nbd://127.0.0.1:{port}/x");
    let same = qemu_img(&["compare", "-f", "raw", "-F", "raw", &tcp, name(&at("new"))]);
    assert!(same.contains("identical"), "{same}");
    qmp.run("quit");
    assert!(machine.wait().success(), "{}", machine.log());
}

#[test]
fn a_machine_is_a_client_of_another_one() {
    let (mut server, mut theirs, images) = storage("");
    add_image(&mut theirs, images.path(), json!({}));
    let socket = images.path().join("s");
    start(&mut theirs, &socket);
    let mut writable = export("e");
    writable["writable"] = true.into();
    theirs.execute("block-export-add", writable);
    let mut client = Machine::start_without_serial(tempfile::tempdir().unwrap(), "-machine none", &[]);
    let mut ours = client.qmp();
    let address = json!({"type": "unix", "path": name(&socket)});
    ours.execute(
        "blockdev-add",
        json!({"driver": "nbd", "node-name": "c", "server": address, "export": "n"}),
    );
    ours.execute(
        "human-monitor-command",
        json!({"command-line": "qemu-io c \"write -P 3 65536 65536\""}),
    );
    let there = std::fs::read(images.path().join("image")).unwrap();
    assert!(there[65536..131_072].iter().all(|byte| *byte == 3));
    let in_use = theirs.refusal("block-export-del", json!({"id": "e"}));
    assert_eq!(in_use, "export 'e' still in use");
    theirs.execute("block-export-del", json!({"id": "e", "mode": "hard"}));
    assert_eq!(theirs.wait_event("BLOCK_EXPORT_DELETED"), json!({"id": "e"}));
    for (qmp, machine) in [(&mut ours, &mut client), (&mut theirs, &mut server)] {
        qmp.run("quit");
        assert!(machine.wait().success(), "{}", machine.log());
    }
}

#[test]
fn no_more_clients_than_wanted_are_served_at_a_time() {
    let (_machine, mut qmp, images) = storage("");
    let socket = images.path().join("s");
    add_image(&mut qmp, images.path(), json!({}));
    let addr = json!({"type": "unix", "data": {"path": name(&socket)}});
    qmp.execute(
        "nbd-server-start",
        json!({"addr": addr, "max-connections": 1, "handshake-max-seconds": 0}),
    );
    let hello = |stream: &mut UnixStream| std::io::Read::read_exact(stream, &mut [0; 18]);
    let mut first = UnixStream::connect(&socket).unwrap();
    hello(&mut first).unwrap();
    let mut second = UnixStream::connect(&socket).unwrap();
    second
        .set_read_timeout(Some(std::time::Duration::from_millis(300)))
        .unwrap();
    hello(&mut second).unwrap_err();
    drop(first);
    second
        .set_read_timeout(Some(std::time::Duration::from_secs(20)))
        .unwrap();
    hello(&mut second).unwrap();
}

#[test]
fn a_server_that_stops_under_load_leaves_nothing() {
    let (mut machine, mut qmp, images) = storage("");
    let socket = images.path().join("s");
    add_image(&mut qmp, images.path(), json!({}));
    for _ in 0..3 {
        start(&mut qmp, &socket);
        let mut writable = export("e");
        writable["writable"] = true.into();
        qmp.execute("block-export-add", writable);
        let n = url(&socket, "n");
        let mut clients: Vec<_> = (0..4)
            .map(|_| {
                let commands = (0..60).flat_map(|_| ["-c", "aio_write -P 5 0 4M"]);
                Command::new("qemu-io")
                    .args(["-f", "raw"])
                    .args(commands)
                    .arg(&n)
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .expect("qemu-io")
            })
            .collect();
        let image = images.path().join("image");
        wait_until("they write", || std::fs::read(&image).unwrap()[0] == 5);
        qmp.run("nbd-server-stop");
        assert_eq!(qmp.run("query-block-exports"), json!([]));
        std::fs::write(&image, vec![7; DISK as usize]).unwrap();
        for client in &mut clients {
            client.wait().unwrap();
        }
    }
    qmp.execute("blockdev-del", json!({"node-name": "n"}));
    qmp.run("quit");
    assert!(machine.wait().success(), "{}", machine.log());
}

#[test]
fn a_guest_writes_while_its_disk_is_read_and_only_one_may_write() {
    need_kvm!();
    let images = tempfile::tempdir().unwrap();
    let (image, socket) = (images.path().join("image"), images.path().join("s"));
    std::fs::File::create(&image)
        .and_then(|file| file.set_len(64 << 20))
        .unwrap();
    let arguments = format!(
        "-m 256 -no-reboot -kernel {} -drive file={},if=virtio,format=raw,id=d,num-queues=1,node-name=n",
        guest::image().display(),
        name(&image)
    );
    let append = "test=bench rw=randwrite bs=4096 qd=32 ops=4000000";
    let mut machine = Machine::start_with(tempfile::tempdir().unwrap(), &arguments, &["-append", append]);
    let mut qmp = machine.qmp();
    start(&mut qmp, &socket);
    let conflict = qmp.refusal("nbd-server-add", json!({"device": "d", "writable": true}));
    assert!(
        conflict.contains("permissions 'write' are both required by"),
        "{conflict}"
    );
    qmp.execute("nbd-server-add", json!({"device": "d"}));
    let copy = images.path().join("copy");
    for _ in 0..3 {
        qemu_img(&["convert", "-f", "raw", "-O", "raw", &url(&socket, "d"), name(&copy)]);
        assert_eq!(std::fs::metadata(&copy).unwrap().len(), 64 << 20);
    }
    let written = |qmp: &mut Qmp| {
        qmp.run("query-blockstats")[0]["stats"]["wr_operations"]
            .as_u64()
            .unwrap()
    };
    let before = written(&mut qmp);
    wait_until("the guest goes on", || written(&mut qmp) > before);
    qmp.run("quit");
    assert!(machine.wait().success(), "{}", machine.log());
}

#[test]
fn dirty_bitmaps_are_shown_to_clients() {
    let (_machine, mut qmp, images) = storage("");
    let socket = images.path().join("s");
    add_image(&mut qmp, images.path(), json!({}));
    qmp.execute(
        "block-dirty-bitmap-add",
        json!({"node": "n", "name": "b", "granularity": 65536}),
    );
    qmp.execute(
        "human-monitor-command",
        json!({"command-line": "qemu-io n \"write -P 3 1M 128k\""}),
    );
    qmp.execute("block-dirty-bitmap-disable", json!({"node": "n", "name": "b"}));
    start(&mut qmp, &socket);
    let mut with_bitmap = export("e");
    with_bitmap["bitmaps"] = json!(["b"]);
    qmp.execute("block-export-add", with_bitmap);
    let map = Command::new("nbdinfo")
        .args(["--json", "--map=qemu:dirty-bitmap:b", &url(&socket, "n")])
        .output();
    let Ok(map) = map else {
        println!("SKIPPED: nbdinfo is not installed");
        return;
    };
    let map: Value = serde_json::from_slice(&map.stdout).unwrap();
    let extents: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|extent| {
            (
                extent["offset"].as_u64().unwrap(),
                extent["length"].as_u64().unwrap(),
                extent["type"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        extents,
        [
            (0, 1 << 20, 0),
            (1 << 20, 128 << 10, 1),
            (1_179_648, DISK - 1_179_648, 0)
        ]
    );
    let busy = qmp.refusal("block-dirty-bitmap-remove", json!({"node": "n", "name": "b"}));
    assert_eq!(
        busy,
        "Bitmap 'b' is currently in use by another operation and cannot be used"
    );
    qmp.execute("block-export-del", json!({"id": "e"}));
    qmp.execute("block-dirty-bitmap-remove", json!({"node": "n", "name": "b"}));
}
