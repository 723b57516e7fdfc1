//! Disks on NBD servers, in the whole machine: options, names, and servers that go and come back.

use bulkhead_tests::images::name;
use bulkhead_tests::machine::{Machine, PATIENCE, refused, wait_until};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// qemu-nbd. Killed when dropped.
struct Server(Child);

impl Server {
    fn start(socket: &Path, image: &Path, more: &[&str]) -> Self {
        let _ = std::fs::remove_file(socket);
        let fixed = ["-t", "-e", "8", "-f", "raw", "-k", name(socket), "-x", "disk"];
        let child = Command::new("qemu-nbd")
            .args(fixed)
            .args(more)
            .arg(image)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("qemu-nbd: `make packages` installs qemu-utils");
        wait_until("qemu-nbd listens", || UnixStream::connect(socket).is_ok());
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn node(socket: &Path) -> Value {
    let server = json!({"type": "unix", "path": name(socket)});
    json!({"driver": "nbd", "node-name": "n", "server": server, "export": "disk"})
}

fn storage() -> Machine {
    Machine::start_without_serial(tempfile::tempdir().unwrap(), "-machine none", &[])
}

fn refusal(qmp: &mut Qmp, options: Value) -> String {
    let error = qmp.try_execute("blockdev-add", options).unwrap_err();
    error["desc"].as_str().unwrap().to_owned()
}

#[test]
fn a_node_on_a_server_has_a_url_for_a_name_and_the_servers_size() {
    let images = tempfile::tempdir().unwrap();
    let (socket, image) = (images.path().join("s"), images.path().join("image"));
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let _server = Server::start(&socket, &image, &[]);
    let mut machine = storage();
    let mut qmp = machine.qmp();
    qmp.execute("blockdev-add", node(&socket));
    qmp.execute("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "n"}));
    let nodes = qmp.run("query-named-block-nodes");
    let url = format!("nbd+unix:///disk?socket={}", name(&socket));
    for node in nodes.as_array().unwrap() {
        assert_eq!(node["file"], url.as_str());
        assert_eq!(node["image"]["virtual-size"], 1 << 20);
    }
    assert_eq!(nodes[1]["drv"], "nbd");
    for line in ["write -P 7 4096 65536", "write -z 8192 4096", "flush"] {
        let line = format!("qemu-io r \"{line}\"");
        qmp.execute("human-monitor-command", json!({"command-line": line}));
    }
    let there = std::fs::read(&image).unwrap();
    assert!(
        there[4096..8192]
            .iter()
            .chain(&there[12288..69632])
            .all(|byte| *byte == 7)
    );
    assert!(there[8192..12288].iter().all(|byte| *byte == 0));
    qmp.execute("blockdev-del", json!({"node-name": "r"}));
    qmp.execute("blockdev-del", json!({"node-name": "n"}));
    qmp.run("quit");
    assert!(machine.wait().success(), "{}", machine.log());
}

#[test]
fn refusals_say_what_is_wrong() {
    let images = tempfile::tempdir().unwrap();
    let (socket, image) = (images.path().join("s"), images.path().join("image"));
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let mut machine = storage();
    let mut qmp = machine.qmp();
    let missing = refusal(&mut qmp, node(&socket));
    assert_eq!(
        missing,
        format!("Failed to connect to '{}': No such file or directory", name(&socket))
    );
    let start = Instant::now();
    let mut patient = node(&socket);
    patient["open-timeout"] = 2.into();
    refusal(&mut qmp, patient.clone());
    assert!(start.elapsed() >= Duration::from_secs(1));
    let _server = Server::start(&socket, &image, &["-r"]);
    assert_eq!(
        refusal(&mut qmp, node(&socket)),
        "request on write denied without write permission"
    );
    let mut other = node(&socket);
    other["export"] = "other".into();
    let text = refusal(&mut qmp, other);
    assert!(text.starts_with("Requested export not available"), "{text}");
    let mut tls = node(&socket);
    tls["tls-creds"] = "t".into();
    assert_eq!(refusal(&mut qmp, tls), "Parameter 'tls-creds' is unexpected");
    let mut long = node(&socket);
    long["reconnect-delay"] = 301.into();
    assert_eq!(
        refusal(&mut qmp, long),
        "Parameter 'reconnect-delay' is not possible: at most 300 seconds"
    );
    let mut vsock = node(&socket);
    vsock["server"] = json!({"type": "vsock", "cid": "1", "port": "1"});
    assert_eq!(
        refusal(&mut qmp, vsock),
        "Parameter 'type' does not accept value 'vsock'"
    );
    qmp.run("quit");
    let refused = |drive: &str| refused(images.path(), &["-machine", "none", "-drive", drive]);
    let text = refused("if=none,format=raw,file=nbds://localhost/x");
    assert!(text.contains("nbds needs TLS, which Bulkhead does not have"), "{text}");
    let text = refused("if=none,format=raw,file=nbd:unix:s,file.tls-creds=t");
    assert!(text.contains("Parameter 'file.tls-creds' is not possible"), "{text}");
    let text = refused("if=none,format=raw,file=nbd:nobody");
    assert!(text.contains("is no name of an NBD export"), "{text}");
}

#[test]
fn names_on_the_command_line_are_connected_at_the_start() {
    let images = tempfile::tempdir().unwrap();
    let (socket, image) = (images.path().join("s"), images.path().join("image"));
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let _server = Server::start(&socket, &image, &[]);
    let drives = format!(
        "-machine none -drive if=none,id=a,format=raw,file=nbd:unix:{0}:exportname=disk,read-only=on \
         -drive if=none,id=b,format=raw,file=nbd+unix:///disk?socket={0},read-only=on \
         -blockdev driver=nbd,node-name=c,server.type=unix,server.path={0},export=disk,read-only=on",
        name(&socket)
    );
    let mut machine = Machine::start_without_serial(tempfile::tempdir().unwrap(), &drives, &[]);
    let mut qmp = machine.qmp();
    let blocks = qmp.run("query-block");
    let url = format!("nbd+unix:///disk?socket={}", name(&socket));
    for block in blocks.as_array().unwrap() {
        assert_eq!(block["inserted"]["file"], url.as_str());
    }
    assert_eq!(blocks.as_array().unwrap().len(), 2);
    qmp.run("quit");
    assert!(machine.wait().success(), "{}", machine.log());
}

#[test]
fn a_server_killed_under_load_and_started_again_costs_the_guest_nothing() {
    need_kvm!();
    let images = tempfile::tempdir().unwrap();
    let (socket, image) = (images.path().join("s"), images.path().join("image"));
    std::fs::File::create(&image)
        .and_then(|file| file.set_len(64 << 20))
        .unwrap();
    let mut server = Server::start(&socket, &image, &[]);
    let arguments = format!(
        "-m 256 -no-reboot -kernel {} -drive \
         file=nbd:unix:{}:exportname=disk,file.reconnect-delay=60,if=virtio,format=raw,id=d,num-queues=1",
        guest::image().display(),
        name(&socket)
    );
    let append = "test=bench rw=randrw bs=4096 qd=32 ops=60000";
    let mut machine = Machine::start_with(tempfile::tempdir().unwrap(), &arguments, &["-append", append]);
    for _ in 0..3 {
        let counted = |qmp: &mut Qmp| {
            let stats = qmp.run("query-blockstats");
            stats[0]["stats"]["wr_operations"].as_i64().unwrap()
        };
        let before = counted(&mut machine.qmp());
        wait_until("requests go through", || counted(&mut machine.qmp()) > before);
        drop(server);
        server = Server::start(&socket, &image, &[]);
    }
    let start = Instant::now();
    while !machine.serial().contains("iops=") {
        assert!(
            start.elapsed() < 2 * PATIENCE,
            "{}\n{}",
            machine.serial(),
            machine.log()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(machine.wait().success(), "{}", machine.log());
    assert!(
        machine.log().contains("the NBD server is connected again"),
        "{}",
        machine.log()
    );
    drop(server);
}
