//! Character devices: what the serial port and monitors are connected to, and what clients add and remove.

use bulkhead_tests::machine::{Machine, wait_until};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;

/// A machine without a serial port that waits for `cont`.
fn machine(arguments: &str) -> Machine {
    start(tempfile::tempdir().unwrap(), &format!("-S {arguments}"))
}

/// The guest says hello on its serial port, then powers off, and the machine stays.
fn start(directory: tempfile::TempDir, arguments: &str) -> Machine {
    let all = format!("-m 64 -no-shutdown -kernel {} {arguments}", guest::image().display());
    Machine::start_without_serial(directory, &all, &["-append", "test=hello"])
}

#[track_caller]
fn refused(qmp: &mut Qmp, command: &str, arguments: Value) -> String {
    let error = qmp.try_execute(command, arguments).unwrap_err();
    assert_eq!(error["class"], "GenericError");
    error["desc"].as_str().unwrap().to_owned()
}

fn add(qmp: &mut Qmp, id: &str, kind: &str, data: Value) -> Value {
    qmp.execute(
        "chardev-add",
        json!({"id": id, "backend": {"type": kind, "data": data}}),
    )
}

fn refused_add(qmp: &mut Qmp, id: &str, kind: &str, data: Value) -> String {
    refused(
        qmp,
        "chardev-add",
        json!({"id": id, "backend": {"type": kind, "data": data}}),
    )
}

/// What query-chardev says about one device: file name and whether it is in use.
fn device(qmp: &mut Qmp, label: &str) -> Option<(String, bool)> {
    let all = qmp.run("query-chardev");
    let found = all.as_array().unwrap().iter().find(|entry| entry["label"] == label)?;
    Some((
        found["filename"].as_str().unwrap().to_owned(),
        found["frontend-open"].as_bool().unwrap(),
    ))
}

fn is(filename: &str, in_use: bool) -> Option<(String, bool)> {
    Some((filename.to_owned(), in_use))
}

/// Reads until the guest is through.
#[track_caller]
fn read_hello(stream: impl Read) {
    let mut bytes = std::io::BufReader::new(stream).bytes();
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).contains("ok hello") {
        let byte = bytes.next().expect("an end before the greeting").unwrap();
        text.push(byte);
    }
}

#[test]
fn every_device_of_the_command_line_is_listed_with_its_label() {
    need_kvm!();
    let mut machine = machine("-serial null -chardev ringbuf,id=spare,size=16 -chardev file,id=out,path={dir}/out");
    let socket = machine.path("qmp").display().to_string();
    let mut qmp = machine.qmp();
    assert_eq!(device(&mut qmp, "serial0"), is("null", true));
    assert_eq!(device(&mut qmp, "spare"), is("ringbuf", false));
    assert_eq!(device(&mut qmp, "out"), is("file", false));
    assert_eq!(
        device(&mut qmp, "compat_monitor0"),
        is(&format!("unix:{socket},server=on"), true)
    );
    assert_eq!(qmp.run("query-chardev").as_array().unwrap().len(), 4);
    let backends = qmp.run("query-chardev-backends");
    let listed: Vec<_> = backends
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| &entry["name"])
        .collect();
    // Exactly what chardev-add takes: the schema has its words.
    let schema = qmp.run("query-qmp-schema");
    let entry = |name: &Value| {
        schema
            .as_array()
            .unwrap()
            .iter()
            .find(|entry| entry["name"] == *name)
            .unwrap()
    };
    let member = |of: &Value, name: &str| {
        let members = of["members"].as_array().unwrap();
        members.iter().find(|member| member["name"] == name).unwrap()["type"].clone()
    };
    let arguments = entry(&entry(&json!("chardev-add"))["arg-type"]);
    let backend = entry(&member(arguments, "backend"));
    let words = entry(&member(backend, "type"))["members"].as_array().unwrap();
    let words: Vec<_> = words.iter().map(|word| &word["name"]).collect();
    assert_eq!(listed, words);
    assert_eq!(listed.len(), backend["variants"].as_array().unwrap().len());
}

/// The texts are those of a live server.
#[test]
fn every_refusal_is_in_the_protocols_words() {
    need_kvm!();
    let mut machine = machine("-serial null");
    let mut qmp = machine.qmp();
    assert_eq!(add(&mut qmp, "a", "null", json!({})), json!({}));
    assert_eq!(
        refused_add(&mut qmp, "a", "null", json!({})),
        "Chardev with id 'a' already exists"
    );
    assert_eq!(
        refused_add(&mut qmp, "f", "file", json!({"out": "/nonexistent/x"})),
        "Failed to add chardev 'f': Could not open '/nonexistent/x': No such file or directory"
    );
    assert_eq!(
        refused_add(&mut qmp, "p", "pipe", json!({"device": "/nonexistent/p"})),
        "Failed to add chardev 'p': Could not open '/nonexistent/p': No such file or directory"
    );
    for size in [1000, 0, -8] {
        assert_eq!(
            refused_add(&mut qmp, "r", "ringbuf", json!({"size": size})),
            "Failed to add chardev 'r': size of ringbuf chardev must be power of two"
        );
    }
    assert!(refused_add(&mut qmp, "r", "ringbuf", json!({"size": 1u64 << 40})).contains("at most"));
    assert_eq!(
        refused_add(&mut qmp, "s", "bogus", json!({})),
        "Parameter 'type' does not accept value 'bogus'"
    );
    let add_without_data = json!({"id": "n", "backend": {"type": "null"}});
    assert_eq!(
        refused(&mut qmp, "chardev-add", add_without_data),
        "Parameter 'backend.data' is missing"
    );
    for (command, arguments, text) in [
        ("chardev-remove", json!({"id": "zz"}), "Chardev 'zz' not found"),
        ("chardev-remove", json!({"id": "serial0"}), "Chardev 'serial0' is busy"),
        (
            "chardev-remove",
            json!({"id": "compat_monitor0"}),
            "Chardev 'compat_monitor0' is busy",
        ),
        (
            "ringbuf-read",
            json!({"device": "zz", "size": 1}),
            "Device 'zz' not found",
        ),
        (
            "ringbuf-read",
            json!({"device": "a", "size": 1}),
            "a is not a ringbuf device",
        ),
        (
            "ringbuf-write",
            json!({"device": "a", "data": "x"}),
            "a is not a ringbuf device",
        ),
    ] {
        assert_eq!(refused(&mut qmp, command, arguments), text);
    }
    add(&mut qmp, "r", "ringbuf", json!({}));
    assert_eq!(
        refused(&mut qmp, "ringbuf-read", json!({"device": "r", "size": 0})),
        "size must be greater than zero"
    );
    assert_eq!(
        refused(
            &mut qmp,
            "ringbuf-write",
            json!({"device": "r", "data": "!!", "format": "base64"})
        ),
        "Base64 data contains invalid characters"
    );
}

#[test]
fn a_ring_gives_back_the_newest_that_was_written_once() {
    need_kvm!();
    let mut machine = machine("");
    let mut qmp = machine.qmp();
    add(&mut qmp, "r", "ringbuf", json!({"size": 8}));
    qmp.execute("ringbuf-write", json!({"device": "r", "data": "0123456789"}));
    let mut read =
        |size, format: &str| qmp.execute("ringbuf-read", json!({"device": "r", "size": size, "format": format}));
    assert_eq!(read(4, "utf8"), "2345");
    assert_eq!(read(100, "base64"), "Njc4OQ==");
    assert_eq!(read(100, "utf8"), "");
    qmp.execute(
        "ringbuf-write",
        json!({"device": "r", "data": "/8OD", "format": "base64"}),
    );
    assert_eq!(
        qmp.execute("ringbuf-read", json!({"device": "r", "size": 1})),
        "\u{fffd}"
    );
}

#[test]
fn added_devices_are_real_and_go_when_they_are_removed() {
    need_kvm!();
    let mut machine = machine("");
    let directory = machine.directory.path().to_owned();
    let path = |name: &str| directory.join(name).display().to_string();
    let mut qmp = machine.qmp();
    let holds = |pid: i32, target: &str| {
        let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        entries
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .filter(|link| link == Path::new(target))
            .count()
    };
    std::fs::write(path("kept"), "before\n").unwrap();
    std::fs::write(path("emptied"), "before\n").unwrap();
    add(&mut qmp, "kept", "file", json!({"out": path("kept"), "append": true}));
    add(
        &mut qmp,
        "emptied",
        "file",
        json!({"out": path("emptied"), "in": path("kept")}),
    );
    assert_eq!(std::fs::read_to_string(path("kept")).unwrap(), "before\n");
    assert_eq!(std::fs::read_to_string(path("emptied")).unwrap(), "");
    assert_eq!(holds(machine.pid(), &path("emptied")), 1);
    nix::unistd::mkfifo(Path::new(&path("fifo")), nix::sys::stat::Mode::S_IRWXU).unwrap();
    add(&mut qmp, "fifo", "pipe", json!({"device": path("fifo")}));
    assert_eq!(device(&mut qmp, "fifo"), is("pipe", false));
    // A FIFO that nobody reads keeps nobody waiting.
    nix::unistd::mkfifo(Path::new(&path("nobody")), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(refused_add(&mut qmp, "n", "file", json!({"out": path("nobody")})).contains("Could not open"));
    let added = add(&mut qmp, "t", "pty", json!({}));
    let pty = added["pty"].as_str().unwrap().to_owned();
    assert_eq!(device(&mut qmp, "t"), is(&format!("pty:{pty}"), false));
    assert!(Path::new(&pty).exists());
    for id in ["kept", "emptied", "fifo", "t"] {
        assert_eq!(qmp.execute("chardev-remove", json!({"id": id})), json!({}));
        assert_eq!(device(&mut qmp, id), None);
    }
    for target in [path("kept"), path("emptied"), path("fifo"), pty] {
        assert_eq!(holds(machine.pid(), &target), 0, "{target} is still open");
    }
    add(&mut qmp, "t", "null", json!({}));
    assert_eq!(device(&mut qmp, "t"), is("null", false));
}

#[test]
fn a_ring_behind_the_serial_port_collects_what_the_guest_says() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let mut machine = start(directory, "-chardev ringbuf,id=ring -serial chardev:ring");
    let mut qmp = machine.qmp();
    assert_eq!(device(&mut qmp, "ring"), is("ringbuf", true));
    assert_eq!(
        refused(&mut qmp, "chardev-remove", json!({"id": "ring"})),
        "Chardev 'ring' is busy"
    );
    let mut text = String::new();
    wait_until("the guest has said hello into the ring", || {
        let piece = qmp.execute("ringbuf-read", json!({"device": "ring", "size": 1000}));
        text += piece.as_str().unwrap();
        text.contains("ok hello")
    });
}

#[test]
fn a_small_ring_keeps_the_end_of_what_the_guest_says() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let mut machine = start(directory, "-chardev ringbuf,id=ring,size=16 -serial chardev:ring");
    let mut qmp = machine.qmp();
    wait_until("the guest has powered off", || {
        qmp.run("query-status")["status"] == "shutdown"
    });
    let last = qmp.execute("ringbuf-read", json!({"device": "ring", "size": 1000}));
    let last = last.as_str().unwrap();
    assert_eq!(last.len(), 16, "{last:?}");
    assert!(last.contains("failures=0"), "{last:?}");
}

#[test]
fn a_tcp_client_of_the_serial_port_reads_the_guest_and_is_listed() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let mut machine = start(directory, "-S -serial tcp:localhost:0,server=on,wait=off");
    let mut qmp = machine.qmp();
    let (name, in_use) = device(&mut qmp, "serial0").unwrap();
    assert!(in_use);
    let address = name
        .strip_prefix("disconnected:tcp:")
        .and_then(|name| name.strip_suffix(",server=on"))
        .unwrap_or_else(|| panic!("{name}"))
        .to_owned();
    let client = TcpStream::connect(&address).unwrap();
    let connected = format!("tcp:{address},server=on <-> {}", client.local_addr().unwrap());
    wait_until("the client is listed", || {
        device(&mut qmp, "serial0") == is(&connected, true)
    });
    qmp.run("cont");
    read_hello(&client);
    drop(client);
    wait_until("the client is gone", || device(&mut qmp, "serial0") == is(&name, true));
}

#[test]
fn the_serial_port_connects_to_a_tcp_server() {
    need_kvm!();
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = server.local_addr().unwrap();
    let mut machine = machine(&format!("-serial tcp:{address}"));
    let mut qmp = machine.qmp();
    let (client, from) = server.accept().unwrap();
    assert_eq!(
        device(&mut qmp, "serial0"),
        is(&format!("tcp:{from} <-> {address}"), true)
    );
    qmp.run("cont");
    read_hello(client);
}

#[test]
fn the_serial_port_writes_to_a_fifo_a_pty_and_the_end_of_a_file() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    for name in ["p.in", "p.out"] {
        nix::unistd::mkfifo(&directory.path().join(name), nix::sys::stat::Mode::S_IRWXU).unwrap();
    }
    let mut machine = start(directory, "-S -serial pipe:{dir}/p");
    let reader = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(machine.path("p.out"))
        .unwrap();
    let mut qmp = machine.qmp();
    assert_eq!(device(&mut qmp, "serial0"), is("pipe", true));
    qmp.run("cont");
    read_hello(reader);
    drop(machine);

    let mut machine = self::machine("-serial pty");
    let mut qmp = machine.qmp();
    let (name, _) = device(&mut qmp, "serial0").unwrap();
    let terminal = std::fs::File::open(name.strip_prefix("pty:").unwrap()).unwrap();
    qmp.run("cont");
    read_hello(terminal);
    drop(machine);

    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("log.txt"), "before\n").unwrap();
    let machine = start(
        directory,
        "-chardev file,id=c,path={dir}/log.txt,append=on -serial chardev:c",
    );
    wait_until("the guest has said hello into the file", || {
        let text = std::fs::read_to_string(machine.path("log.txt")).unwrap();
        text.starts_with("before\n") && text.contains("ok hello")
    });
}

#[test]
fn a_monitor_on_tcp_serves_its_clients() {
    need_kvm!();
    let mut machine = machine("-chardev socket,id=m,host=127.0.0.1,port=0,server=on,wait=off -mon m,mode=control");
    let mut qmp = machine.qmp();
    let (name, _) = device(&mut qmp, "m").unwrap();
    let address = name
        .strip_prefix("disconnected:tcp:")
        .and_then(|name| name.strip_suffix(",server=on"))
        .unwrap_or_else(|| panic!("{name}"));
    let mut client = TcpStream::connect(address).unwrap();
    client
        .write_all(b"{'execute': 'qmp_capabilities'} {'execute': 'query-name', 'id': 'last'}")
        .unwrap();
    let mut bytes = std::io::BufReader::new(client).bytes();
    let mut text = String::new();
    while !text.contains("last") {
        text.push(char::from(bytes.next().unwrap().unwrap()));
    }
    assert!(text.contains(r#""name": "test""#), "{text}");
}

#[test]
fn a_socket_that_nobody_uses_has_one_client_at_a_time() {
    need_kvm!();
    let mut machine = machine("-chardev socket,id=s,path={dir}/s,server=on,wait=off");
    let path = machine.path("s");
    let mut qmp = machine.qmp();
    let connected = format!("unix:{},server=on", path.display());
    let disconnected = format!("disconnected:{connected}");
    assert_eq!(device(&mut qmp, "s"), is(&disconnected, false));
    for _ in 0..2 {
        let client = std::os::unix::net::UnixStream::connect(&path).unwrap();
        wait_until("the client is listed", || {
            device(&mut qmp, "s") == is(&connected, false)
        });
        drop(client);
        wait_until("it is gone", || device(&mut qmp, "s") == is(&disconnected, false));
    }
    qmp.execute("chardev-remove", json!({"id": "s"}));
    assert!(!path.exists(), "the socket's file stayed");
}
