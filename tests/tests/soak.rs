//! What clients do a thousand times leaves nothing behind: no descriptor, no process, no memory.
//!
//! The full numbers run in `make soak`; every run of the suite does a small part of them.

use bulkhead_tests::census::{assert_nothing_left, holdings};
use bulkhead_tests::fuzz::Fuzz;
use bulkhead_tests::load::{RawClient, request};
use bulkhead_tests::machine::{Machine, PATIENCE};
use bulkhead_tests::schema::Schema;
use bulkhead_tests::{guest, need_kvm};
use serde_json::json;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

/// What a process may have grown by: pages that it touches for the first time. A leak of one byte for each of a million
/// messages, or of 100 bytes for each of ten thousand connections, is more.
const GROWTH_KIB: u64 = 512;
/// Fuzzed messages between two looks whether the server still answers.
const BATCH: usize = 200;
/// Batches on one connection.
const BATCHES_PER_CONNECTION: usize = 50;
/// Commands that would end the machine (the test's guest takes an NMI for a failure) or reach out of it.
const NOT_FUZZED: &[&str] = &[
    "quit",
    "inject-nmi",
    "dump-guest-memory",
    "memsave",
    "pmemsave",
    "human-monitor-command",
    "chardev-add",
    "chardev-change",
    "object-add",
];

/// A machine and a client that stays. It does not negotiate, so that it gets no events, which it would have to read.
fn machine(more: &str) -> (Machine, UnixStream) {
    let arguments = format!("-m 64 -smp 2 -S -kernel {} {more}", guest::image().display());
    let mut machine = Machine::start(&arguments);
    drop(machine.qmp());
    let client = UnixStream::connect(machine.path("qmp")).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_ne!((&client).read(&mut [0; 1000]).unwrap(), 0);
    (machine, client)
}

/// Does a tenth to warm up, then all of it, and compares what the processes hold.
fn soak(machine: &Machine, count: usize, mut work: impl FnMut(usize)) {
    work(count / 10);
    let before = holdings(machine);
    work(count);
    assert_nothing_left(&before, &holdings(machine), GROWTH_KIB);
}

fn descriptors(cycles: usize) {
    need_kvm!();
    let (machine, _client) = machine("");
    let null = File::open("/dev/null").unwrap();
    println!("{cycles} cycles of getfd, add-fd, remove-fd, closefd:");
    soak(&machine, cycles, |cycles| {
        let mut client = RawClient::connect(&machine.path("qmp")).unwrap();
        for _ in 0..cycles {
            let getfd = b"{\"execute\": \"getfd\", \"arguments\": {\"fdname\": \"n\"}}\n";
            client.round_trip_with_fd(getfd, null.as_fd()).unwrap();
            let add = b"{\"execute\": \"add-fd\", \"arguments\": {\"fdset-id\": 1, \"opaque\": \"null\"}}\n";
            client.round_trip_with_fd(add, null.as_fd()).unwrap();
            let remove = b"{\"execute\": \"remove-fd\", \"arguments\": {\"fdset-id\": 1}}\n";
            client.round_trip(remove).unwrap();
            let close = b"{\"execute\": \"closefd\", \"arguments\": {\"fdname\": \"n\"}}\n";
            client.round_trip(close).unwrap();
        }
        assert_eq!(client.errors, 0);
    });
}

fn connections(count: usize) {
    need_kvm!();
    let (machine, _client) = machine("");
    println!("{count} connections:");
    soak(&machine, count, |count| {
        for number in 0..count {
            let path = machine.path("qmp");
            match number % 4 {
                // Gone before it is served, and in the middle of a request.
                1 => drop(UnixStream::connect(&path).unwrap()),
                2 => {
                    let mut stream = UnixStream::connect(&path).unwrap();
                    stream.write_all(b"{\"execute\": \"qmp_cap").unwrap();
                }
                _ => {
                    let mut client = RawClient::connect(&path).unwrap();
                    client.round_trip(&request("query-status")).unwrap();
                    assert_eq!(client.errors, 0);
                }
            }
        }
    });
}

/// A connection over which fuzzed messages go.
struct FuzzedConnection {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    answers: u64,
}

impl FuzzedConnection {
    fn new(machine: &Machine) -> Self {
        let stream = UnixStream::connect(machine.path("qmp")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        let mut connection = Self {
            stream,
            reader,
            answers: 0,
        };
        connection.exchange(b"{\"execute\": \"qmp_capabilities\"}\n");
        connection
    }

    /// Sends messages, and then one that must be answered whatever the others were taken for.
    fn exchange(&mut self, messages: &[u8]) {
        let mut writer = self.stream.try_clone().unwrap();
        let last = b"\x01\n{\"execute\": \"query-version\", \"id\": \"are you there?\"}\n";
        let bytes = [messages, last].concat();
        let sender = std::thread::spawn(move || writer.write_all(&bytes));
        let mut line = String::new();
        while !line.ends_with("\"id\": \"are you there?\"}\r\n") {
            line.clear();
            let length = self.reader.read_line(&mut line).unwrap();
            assert!(length > 0, "the server ended the connection");
            self.answers += 1;
        }
        sender.join().unwrap().unwrap();
    }
}

fn fuzzed_messages(count: usize, seed: u64) {
    need_kvm!();
    let (mut machine, _client) = machine("-append test=spin");
    let schema = Schema::new(&machine.qmp().run("query-qmp-schema")).unwrap();
    let mut fuzz = Fuzz::new(seed, &schema, |name| !NOT_FUZZED.contains(&name));
    println!("{count} fuzzed messages (seed {seed}):");
    let mut answers = 0;
    soak(&machine, count, |count| {
        for connection_start in (0..count).step_by(BATCH * BATCHES_PER_CONNECTION) {
            let mut connection = FuzzedConnection::new(&machine);
            let end = count.min(connection_start + BATCH * BATCHES_PER_CONNECTION);
            for start in (connection_start..end).step_by(BATCH) {
                let messages: Vec<u8> = (start..end.min(start + BATCH)).flat_map(|_| fuzz.message()).collect();
                connection.exchange(&messages);
            }
            answers += connection.answers;
        }
    });
    println!("{answers} answers and events");
    assert!(answers as usize > count / 2);
    // And it is still a machine.
    let mut qmp = machine.qmp();
    qmp.run("stop");
    assert_eq!(qmp.run("query-status")["running"], serde_json::json!(false));
}

/// chardev-add and chardev-remove of each kind, and chardev-change; sockets with and without a peer that comes and goes.
fn character_devices(rounds: usize) {
    need_kvm!();
    let (mut machine, client) = machine("");
    let mut qmp = machine.qmp();
    drop(client);
    let path = |name: &str| machine.path(name);
    nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let unix_server = std::os::unix::net::UnixListener::bind(path("server")).unwrap();
    let tcp_server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let inet = |address: std::net::SocketAddr| json!({"type": "inet", "data": {"host": address.ip().to_string(), "port": address.port().to_string()}});
    let unix = |name: &str| json!({"type": "unix", "data": {"path": path(name)}});
    let there = inet(tcp_server.local_addr().unwrap());
    let nowhere = inet("127.0.0.1:1".parse().unwrap());
    let kinds = [
        ("null", json!({})),
        ("pty", json!({})),
        ("stdio", json!({})),
        ("ringbuf", json!({"size": 4096})),
        ("file", json!({"out": path("out")})),
        ("pipe", json!({"device": path("fifo")})),
        ("udp", json!({"remote": inet(peer.local_addr().unwrap())})),
        ("socket", json!({"addr": unix("listening")})),
        ("socket", json!({"addr": inet("127.0.0.1:0".parse().unwrap())})),
        ("socket", json!({"addr": unix("server"), "server": false})),
        ("socket", json!({"addr": there, "server": false})),
        (
            "socket",
            json!({"addr": {"type": "fd", "data": {"str": "passed"}}, "server": false}),
        ),
        // What is refused leaves nothing either, and what connects again and again is removed in between.
        ("socket", json!({"addr": nowhere, "server": false})),
        ("socket", json!({"addr": nowhere, "server": false, "reconnect-ms": 1})),
        ("socket", json!({"addr": there, "server": false, "reconnect-ms": 1})),
    ];
    let refused_each_round = 1;
    let null = File::open("/dev/null").unwrap();
    println!(
        "{rounds} rounds of chardev-add and chardev-remove, {} kinds each:",
        kinds.len()
    );
    unix_server.set_nonblocking(true).unwrap();
    tcp_server.set_nonblocking(true).unwrap();
    soak(&machine, rounds, |rounds| {
        for _ in 0..rounds {
            let mut refused = 0;
            for (kind, data) in &kinds {
                if data["addr"]["type"] == "fd" {
                    let (socket, _other) = UnixStream::pair().unwrap();
                    qmp.pass(&[socket.as_fd(), null.as_fd()]);
                    qmp.execute("getfd", json!({"fdname": "passed"}));
                }
                let backend = json!({"id": "c", "backend": {"type": kind, "data": data}});
                match qmp.try_execute("chardev-add", backend) {
                    Ok(_) => {
                        if *kind == "socket" && data.get("server").is_none() && data["addr"]["type"] == "unix" {
                            drop(UnixStream::connect(path("listening")).unwrap());
                        }
                        qmp.execute("chardev-remove", json!({"id": "c"}));
                    }
                    Err(_) => refused += 1,
                }
                // Nobody's queue fills up.
                while unix_server.accept().is_ok() || tcp_server.accept().is_ok() {}
            }
            assert_eq!(refused, refused_each_round);
            // And the serial port's, under its user.
            for (kind, data) in [
                ("socket", json!({"addr": unix("console")})),
                ("ringbuf", json!({"size": 4096})),
                ("file", json!({"out": path("out")})),
            ] {
                let backend = json!({"id": "serial0", "backend": {"type": kind, "data": data}});
                qmp.execute("chardev-change", backend);
                if kind == "socket" {
                    drop(UnixStream::connect(path("console")).unwrap());
                }
            }
        }
    });
    assert_eq!(qmp.run("query-chardev").as_array().unwrap().len(), 2);
}

#[test]
fn descriptors_that_come_and_go_leave_nothing_behind() {
    descriptors(300);
}

#[test]
#[ignore = "takes long: make soak"]
fn ten_thousand_cycles_of_descriptors_leave_nothing_behind() {
    descriptors(10_000);
}

#[test]
fn clients_that_come_and_go_leave_nothing_behind() {
    connections(100);
}

#[test]
#[ignore = "takes long: make soak"]
fn ten_thousand_clients_leave_nothing_behind() {
    connections(10_000);
}

#[test]
fn character_devices_that_come_and_go_leave_nothing_behind() {
    character_devices(50);
}

#[test]
#[ignore = "takes long: make soak"]
fn a_thousand_character_devices_of_each_kind_leave_nothing_behind() {
    character_devices(1000);
}

#[test]
fn fuzzed_messages_leave_nothing_behind() {
    fuzzed_messages(10_000, 1);
}

#[test]
#[ignore = "takes long: make soak"]
fn a_million_fuzzed_messages_leave_nothing_behind() {
    fuzzed_messages(1_000_000, 2);
}
