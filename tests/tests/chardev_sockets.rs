//! Sockets behind character devices that are added to a running machine, and the process that makes them.

use bulkhead_tests::machine::{Machine, wait_until};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm, procfs};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, getsockname, listen, socket};
use serde_json::{Value, json};
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

/// The guest says hello on its serial port, then powers off, and the machine stays.
fn machine(arguments: &str) -> Machine {
    let all = format!("-m 64 -S -no-shutdown -kernel {} {arguments}", guest::image().display());
    Machine::start_without_serial(tempfile::tempdir().unwrap(), &all, &["-append", "test=hello"])
}

fn request(id: &str, kind: &str, data: &Value) -> Value {
    json!({"id": id, "backend": {"type": kind, "data": data}})
}

#[track_caller]
fn add(qmp: &mut Qmp, id: &str, kind: &str, data: Value) {
    assert_eq!(qmp.execute("chardev-add", request(id, kind, &data)), json!({}));
}

/// What follows "Failed to add chardev 'ID': ".
#[track_caller]
fn refused(qmp: &mut Qmp, kind: &str, data: Value) -> String {
    let error = qmp.try_execute("chardev-add", request("x", kind, &data)).unwrap_err();
    assert_eq!(error["class"], "GenericError");
    let text = error["desc"].as_str().unwrap();
    text.strip_prefix("Failed to add chardev 'x': ")
        .unwrap_or(text)
        .to_owned()
}

fn filename(qmp: &mut Qmp, label: &str) -> Option<String> {
    let all = qmp.run("query-chardev");
    let entry = all.as_array().unwrap().iter().find(|entry| entry["label"] == label)?;
    assert_eq!(entry["frontend-open"], label == "serial0");
    Some(entry["filename"].as_str().unwrap().to_owned())
}

#[track_caller]
fn wait_for(qmp: &mut Qmp, label: &str, wanted: &str) {
    wait_until(&format!("{label} is {wanted}"), || {
        filename(qmp, label).as_deref() == Some(wanted)
    });
}

fn inet(address: SocketAddr) -> Value {
    json!({"type": "inet", "data": {"host": address.ip().to_string(), "port": address.port().to_string()}})
}

fn unix(path: &std::path::Path) -> Value {
    json!({"type": "unix", "data": {"path": path}})
}

fn fd(name: &str) -> Value {
    json!({"type": "fd", "data": {"str": name}})
}

const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn local_listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind(ANY_PORT).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[test]
fn a_unix_socket_listens_has_one_client_at_a_time_and_goes() {
    need_kvm!();
    let mut machine = machine("");
    let path = machine.path("s");
    let mut qmp = machine.qmp();
    add(&mut qmp, "s", "socket", json!({"addr": unix(&path)}));
    let listening = format!("disconnected:unix:{},server=on", path.display());
    assert_eq!(filename(&mut qmp, "s").unwrap(), listening);
    for _ in 0..2 {
        let client = UnixStream::connect(&path).unwrap();
        wait_for(&mut qmp, "s", &format!("unix:{},server=on", path.display()));
        drop(client);
        wait_for(&mut qmp, "s", &listening);
    }
    let in_use = refused(&mut qmp, "socket", json!({"addr": unix(&path), "wait": false}));
    assert_eq!(
        in_use,
        format!("Failed to bind socket to {}: Address already in use", path.display())
    );
    qmp.execute("chardev-remove", json!({"id": "s"}));
    assert!(!path.exists(), "the socket's file stayed");
    // A file that nobody listens at any more is replaced.
    drop(UnixListener::bind(&path).unwrap());
    add(&mut qmp, "s", "socket", json!({"addr": unix(&path)}));
    UnixStream::connect(&path).unwrap();
}

#[test]
fn a_tcp_server_takes_a_port_of_a_range() {
    need_kvm!();
    let mut machine = machine("");
    let mut qmp = machine.qmp();
    let data = json!({"addr": inet(ANY_PORT), "server": true, "wait": false, "telnet": false, "nodelay": true});
    add(&mut qmp, "t", "socket", data);
    let name = filename(&mut qmp, "t").unwrap();
    let address = name
        .strip_prefix("disconnected:tcp:")
        .and_then(|name| name.strip_suffix(",server=on"))
        .unwrap_or_else(|| panic!("{name}"));
    let client = TcpStream::connect(address).unwrap();
    let from = client.local_addr().unwrap();
    wait_for(&mut qmp, "t", &format!("tcp:{address},server=on <-> {from}"));
    drop(client);
    wait_for(&mut qmp, "t", &name);
    let (_taken, taken) = local_listener();
    let in_use = refused(&mut qmp, "socket", json!({"addr": inet(taken)}));
    assert_eq!(in_use, "Failed to find an available port: Address already in use");
    if taken.port() < u16::MAX - 50 {
        let mut range = inet(taken);
        range["data"]["to"] = json!(taken.port() + 50);
        add(&mut qmp, "range", "socket", json!({"addr": range}));
        let name = filename(&mut qmp, "range").unwrap();
        let port: u16 = name.split([':', ',']).nth(3).unwrap().parse().unwrap();
        assert!(port > taken.port() && port <= taken.port() + 50, "{name}");
    }
    let mut six = inet("[::1]:0".parse().unwrap());
    six["data"]["ipv6"] = json!(true);
    if UdpSocket::bind("[::1]:0").is_ok() {
        add(&mut qmp, "six", "socket", json!({"addr": six}));
        let name = filename(&mut qmp, "six").unwrap();
        assert!(name.starts_with("disconnected:tcp:::1:"), "{name}");
    }
}

#[test]
fn clients_of_unix_and_tcp_servers_stay_until_those_hang_up() {
    need_kvm!();
    let mut machine = machine("");
    let path = machine.path("server");
    let mut qmp = machine.qmp();
    let unix_server = UnixListener::bind(&path).unwrap();
    add(&mut qmp, "u", "socket", json!({"addr": unix(&path), "server": false}));
    // A Unix client has no name of its own.
    assert_eq!(filename(&mut qmp, "u").unwrap(), "unix:");
    drop(unix_server.accept().unwrap());
    wait_for(&mut qmp, "u", &format!("disconnected:unix:{}", path.display()));

    let (server, address) = local_listener();
    let mut addr = inet(address);
    addr["data"]["keep-alive"] = json!(true);
    add(
        &mut qmp,
        "t",
        "socket",
        json!({"addr": addr, "server": false, "nodelay": true}),
    );
    let (connection, from) = server.accept().unwrap();
    assert_eq!(filename(&mut qmp, "t").unwrap(), format!("tcp:{from} <-> {address}"));
    qmp.execute("chardev-remove", json!({"id": "t"}));
    assert_eq!(
        (&connection).read(&mut [0; 1]).unwrap(),
        0,
        "the connection is still there"
    );
}

/// The texts are those of a live server, but for what is said about names.
#[test]
fn every_refusal_is_in_the_protocols_words() {
    need_kvm!();
    let mut machine = machine("");
    let mut qmp = machine.qmp();
    let nobody = local_listener().1;
    let missing = machine.path("missing");
    let long = std::path::PathBuf::from("x".repeat(200));
    let host = |host: &str, port: &str| json!({"type": "inet", "data": {"host": host, "port": port}});
    let with = |mut address: Value, name: &str, value: Value| {
        address["data"][name] = value;
        address
    };
    let no_family = with(with(inet(nobody), "ipv4", json!(false)), "ipv6", json!(false));
    let client = |addr: Value| json!({"addr": addr, "server": false});
    let cases = [
        (
            client(unix(&missing)),
            format!("Failed to connect to '{}': No such file or directory", missing.display()),
        ),
        (
            json!({"addr": unix(&machine.path("no/dir"))}),
            format!("Failed to bind socket to {}: No such file or directory", machine.path("no/dir").display()),
        ),
        (client(unix(&long)), format!("UNIX socket path '{}' is too long", long.display())),
        (client(inet(nobody)), format!("Failed to connect to '{nobody}': Connection refused")),
        (
            client(host("nosuch.invalid", "1")),
            "address resolution failed for nosuch.invalid:1: Name or service not known (only numbers, localhost and the \
             names in /etc/hosts are)"
                .into(),
        ),
        (
            client(host("127.0.0.1", "x")),
            "address resolution failed for 127.0.0.1:x: Servname not supported for ai_socktype".into(),
        ),
        (
            json!({"addr": host("192.0.2.1", "0")}),
            "Failed to bind socket: Cannot assign requested address".into(),
        ),
        (json!({"addr": no_family}), "Cannot disable IPv4 and IPv6 at same time".into()),
        (
            json!({"addr": inet(nobody), "reconnect": 1}),
            "'reconnect' option is incompatible with socket in server listen mode".into(),
        ),
        (
            json!({"addr": inet(nobody), "server": false, "wait": false}),
            "'wait' option is incompatible with socket in client connect mode".into(),
        ),
        (
            json!({"addr": inet(nobody), "server": false, "reconnect": 1, "reconnect-ms": 1}),
            "'reconnect' and 'reconnect-ms' are mutually exclusive".into(),
        ),
        (
            json!({"addr": fd("n"), "server": false, "reconnect": 1}),
            "'reconnect' option is incompatible with 'fd' address type".into(),
        ),
        (
            json!({"addr": inet(nobody), "telnet": true}),
            "the bytes go over the socket as they are: 'telnet' can only be false".into(),
        ),
        (
            json!({"addr": fd("nofd")}),
            "File descriptor named 'nofd' has not been found".into(),
        ),
    ];
    for (data, text) in cases {
        assert_eq!(refused(&mut qmp, "socket", data.clone()), text, "{data}");
    }
    for (data, text) in [
        (
            json!({"remote": unix(&missing)}),
            "socket type unsupported for datagram".to_owned(),
        ),
        (
            json!({"remote": inet(nobody), "local": host("192.0.2.1", "0")}),
            "Failed to bind socket: Cannot assign requested address".into(),
        ),
    ] {
        assert_eq!(refused(&mut qmp, "udp", data.clone()), text, "{data}");
    }
    let vsock = json!({"addr": {"type": "vsock", "data": {"cid": "2", "port": "1"}}});
    assert_eq!(
        refused(&mut qmp, "socket", vsock),
        "Parameter 'type' does not accept value 'vsock'"
    );
    let no_port = json!({"addr": {"type": "inet", "data": {"host": "h"}}});
    assert_eq!(
        refused(&mut qmp, "socket", no_port),
        "Parameter 'backend.data.addr.data.port' is missing"
    );
    let port = json!({"addr": with(inet(nobody), "to", json!(70000))});
    assert_eq!(refused(&mut qmp, "socket", port), "Parameter 'to' expects uint16_t");
    // Nothing of all that was added.
    assert_eq!(qmp.run("query-chardev").as_array().unwrap().len(), 1);
}

#[test]
fn passed_sockets_are_taken_by_name_and_used_up() {
    need_kvm!();
    let mut machine = machine("");
    let mut qmp = machine.qmp();
    let pass = |qmp: &mut Qmp, fd: &dyn AsFd, name: &str| {
        qmp.pass(&[fd.as_fd()]);
        qmp.execute("getfd", json!({"fdname": name}));
    };
    let (ours, theirs) = UnixStream::pair().unwrap();
    pass(&mut qmp, &theirs, "pair");
    drop(theirs);
    add(&mut qmp, "p", "socket", json!({"addr": fd("pair"), "server": false}));
    assert_eq!(filename(&mut qmp, "p").unwrap(), "unix:");
    drop(ours);
    wait_for(&mut qmp, "p", "disconnected:fd:pair");
    assert_eq!(
        refused(&mut qmp, "socket", json!({"addr": fd("pair"), "server": false})),
        "File descriptor named 'pair' has not been found"
    );
    let (listener, address) = local_listener();
    pass(&mut qmp, &listener, "listener");
    drop(listener);
    add(&mut qmp, "l", "socket", json!({"addr": fd("listener")}));
    assert_eq!(
        filename(&mut qmp, "l").unwrap(),
        format!("disconnected:tcp:{address},server=on")
    );
    let client = TcpStream::connect(address).unwrap();
    let from = client.local_addr().unwrap();
    wait_for(&mut qmp, "l", &format!("tcp:{address},server=on <-> {from}"));

    pass(&mut qmp, &std::fs::File::open("/dev/null").unwrap(), "null");
    assert_eq!(
        refused(&mut qmp, "socket", json!({"addr": fd("null"), "server": false})),
        "File descriptor 'null' is not a socket"
    );
    let (one, _other) = UnixStream::pair().unwrap();
    pass(&mut qmp, &one, "connected");
    assert_eq!(
        refused(&mut qmp, "socket", json!({"addr": fd("connected"), "server": true})),
        "Failed to listen on fd socket: Invalid argument"
    );
}

#[test]
fn a_socket_that_connects_again_does_so_until_it_is_removed() {
    need_kvm!();
    let mut machine = machine("");
    let path = machine.path("later");
    let mut qmp = machine.qmp();
    let data = json!({"addr": unix(&path), "server": false, "reconnect-ms": 20});
    add(&mut qmp, "r", "socket", data);
    let disconnected = format!("disconnected:unix:{}", path.display());
    assert_eq!(filename(&mut qmp, "r").unwrap(), disconnected);
    let server = UnixListener::bind(&path).unwrap();
    for _ in 0..3 {
        let (connection, _) = server.accept().unwrap();
        wait_for(&mut qmp, "r", "unix:");
        drop(connection);
    }
    let (_last, _) = server.accept().unwrap();
    drop(server);
    std::fs::remove_file(&path).unwrap();
    qmp.execute("chardev-remove", json!({"id": "r"}));
    let complaints = machine.log().matches("character device r is not connected").count();
    assert!(complaints <= 1, "{}", machine.log());
    assert_eq!(filename(&mut qmp, "r"), None);
}

#[test]
fn a_command_that_waits_for_a_client_delays_nobody_else() {
    need_kvm!();
    let mut machine = machine("");
    let path = machine.path("s");
    let (mut waiting, mut other) = (machine.qmp(), machine.qmp());
    let data = json!({"addr": unix(&path), "wait": true});
    waiting
        .send(&json!({"execute": "chardev-add", "arguments": request("w", "socket", &data), "id": 1}))
        .unwrap();
    wait_for(
        &mut other,
        "w",
        &format!("disconnected:unix:{},server=on", path.display()),
    );
    let taken = other
        .try_execute("chardev-add", request("w", "null", &json!({})))
        .unwrap_err();
    assert_eq!(taken["desc"], "Chardev with id 'w' already exists");
    let client = UnixStream::connect(&path).unwrap();
    assert_eq!(
        waiting.request(&json!({"execute": "query-name", "id": 2}))["return"],
        json!({})
    );
    drop(client);
    // And one that is removed while it waits.
    let data = json!({"addr": unix(&machine.path("t")), "wait": true});
    let mut waiting = machine.qmp();
    waiting
        .send(&json!({"execute": "chardev-add", "arguments": request("t", "socket", &data)}))
        .unwrap();
    wait_until("it is there", || filename(&mut other, "t").is_some());
    other.execute("chardev-remove", json!({"id": "t"}));
    let reply = waiting.request(&json!({"execute": "query-name"}));
    assert_eq!(
        reply["error"]["desc"],
        "Failed to add chardev 't': it was removed before a client connected"
    );
}

/// Nobody accepts, and the queue is full: the kernel neither refuses nor connects.
#[test]
fn a_server_that_does_not_answer_keeps_nobody_else_waiting() {
    need_kvm!();
    let silent = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(silent.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).unwrap();
    listen(&silent, Backlog::new(0).unwrap()).unwrap();
    let port = getsockname::<SockaddrIn>(silent.as_raw_fd()).unwrap().port();
    let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    let mut queued = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        queued.push(stream);
    }
    let mut machine = machine("");
    let (mut slow, mut other) = (machine.qmp(), machine.qmp());
    let data = json!({"addr": inet(address), "server": false});
    slow.send(&json!({"execute": "chardev-add", "arguments": request("slow", "socket", &data)}))
        .unwrap();
    let path = machine.path("meanwhile");
    let begun = Instant::now();
    for round in 0..20 {
        let id = format!("m{round}");
        add(&mut other, &id, "socket", json!({"addr": unix(&path)}));
        other.execute("chardev-remove", json!({"id": id}));
        assert_eq!(filename(&mut other, "slow"), None);
    }
    println!("20 rounds in {:?}", begun.elapsed());
    // There is room in the queue: the next attempt of the kernel's gets through.
    queued.clear();
    let listener = TcpListener::from(silent);
    let accepting = std::thread::spawn(move || listener.incoming().take(64).collect::<Vec<_>>());
    assert_eq!(slow.request(&json!({"execute": "query-name"}))["return"], json!({}));
    assert!(filename(&mut other, "slow").unwrap().starts_with("tcp:127.0.0.1:"));
    drop(accepting);
}

#[test]
fn datagrams_are_added_with_and_without_an_address_of_their_own() {
    need_kvm!();
    let peer = UdpSocket::bind(ANY_PORT).unwrap();
    let there = peer.local_addr().unwrap();
    let mut machine = machine("");
    let mut qmp = machine.qmp();
    add(&mut qmp, "u", "udp", json!({"remote": inet(there)}));
    let here = local_listener().1;
    add(
        &mut qmp,
        "v",
        "udp",
        json!({"remote": inet(there), "local": inet(here)}),
    );
    assert_eq!(filename(&mut qmp, "u").unwrap(), "udp");
    assert!(UdpSocket::bind(here).is_err(), "nobody is bound to it");
    qmp.execute("chardev-remove", json!({"id": "v"}));
    UdpSocket::bind(here).unwrap();
}

#[test]
fn the_guest_speaks_and_is_spoken_to_by_datagrams() {
    need_kvm!();
    let peer = UdpSocket::bind(ANY_PORT).unwrap();
    peer.set_read_timeout(Some(bulkhead_tests::machine::PATIENCE)).unwrap();
    let there = peer.local_addr().unwrap();
    let mut machine = machine(&format!("-serial udp:{there}@127.0.0.1:0"));
    let mut qmp = machine.qmp();
    assert_eq!(filename(&mut qmp, "serial0").unwrap(), "udp");
    qmp.run("cont");
    let mut text = String::new();
    while !text.contains("ok hello") {
        let mut datagram = [0; 2000];
        let (count, _) = peer.recv_from(&mut datagram).unwrap();
        text += std::str::from_utf8(&datagram[..count]).unwrap();
    }
}

#[test]
fn the_serial_port_connects_again_when_its_server_is_back() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let mut machine = machine(&format!("-serial unix:{},reconnect-ms=20", path.display()));
    let mut qmp = machine.qmp();
    let disconnected = format!("disconnected:unix:{}", path.display());
    wait_for(&mut qmp, "serial0", &disconnected);
    let server = UnixListener::bind(&path).unwrap();
    drop(server.accept().unwrap());
    let (mut connection, _) = server.accept().unwrap();
    wait_for(&mut qmp, "serial0", "unix:");
    qmp.run("cont");
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).contains("ok hello") {
        let mut piece = [0; 100];
        let count = connection.read(&mut piece).unwrap();
        assert_ne!(count, 0, "it has hung up after {text:?}");
        text.extend_from_slice(&piece[..count]);
    }
}

fn change(qmp: &mut Qmp, id: &str, kind: &str, data: Value) -> Result<Value, String> {
    let changed = qmp.try_execute("chardev-change", request(id, kind, &data));
    changed.map_err(|error| error["desc"].as_str().unwrap().to_owned())
}

#[test]
fn a_device_is_changed_under_its_user_or_not_at_all() {
    need_kvm!();
    let mut machine = machine("-serial unix:{dir}/a,server=on,wait=off -chardev null,id=spare");
    let (first, second) = (machine.path("a"), machine.path("b"));
    let mut qmp = machine.qmp();
    let early = UnixStream::connect(&first).unwrap();
    wait_for(&mut qmp, "serial0", &format!("unix:{},server=on", first.display()));
    for (id, kind, data, text) in [
        ("zz", "null", json!({}), "Chardev 'zz' does not exist"),
        (
            "compat_monitor0",
            "null",
            json!({}),
            "Chardev user does not support chardev hotswap",
        ),
        (
            "serial0",
            "file",
            json!({"out": "/nonexistent/x"}),
            "Could not open '/nonexistent/x': No such file or directory",
        ),
        (
            "serial0",
            "socket",
            json!({"addr": fd("nofd")}),
            "File descriptor named 'nofd' has not been found",
        ),
    ] {
        assert_eq!(change(&mut qmp, id, kind, data).unwrap_err(), text);
    }
    assert_eq!(
        filename(&mut qmp, "serial0").unwrap(),
        format!("unix:{},server=on", first.display())
    );
    assert_eq!(change(&mut qmp, "spare", "ringbuf", json!({})), Ok(json!({})));
    assert_eq!(filename(&mut qmp, "spare").unwrap(), "ringbuf");

    assert_eq!(
        change(&mut qmp, "serial0", "socket", json!({"addr": unix(&second)})),
        Ok(json!({}))
    );
    assert_eq!(
        (&early).read(&mut [0; 1]).unwrap(),
        0,
        "the former client is still connected"
    );
    assert!(!first.exists(), "the former socket's file stayed");
    let pty = change(&mut qmp, "serial0", "pty", json!({})).unwrap();
    let name = filename(&mut qmp, "serial0").unwrap();
    assert_eq!(name, format!("pty:{}", pty["pty"].as_str().unwrap()));
    assert_eq!(change(&mut qmp, "serial0", "ringbuf", json!({})), Ok(json!({})));
    qmp.run("cont");
    let mut text = String::new();
    wait_until("the guest has said hello into the ring", || {
        let piece = qmp.execute("ringbuf-read", json!({"device": "serial0", "size": 1000}));
        text += piece.as_str().unwrap();
        text.contains("ok hello")
    });
}

/// As those do who look at a console now and then: a ring while nobody looks, and a socket when somebody does.
#[test]
fn a_guest_that_speaks_to_a_ring_goes_on_to_speak_to_a_socket() {
    need_kvm!();
    let mut machine = machine("-chardev ringbuf,id=serial0 -serial chardev:serial0");
    let path = machine.path("console");
    let mut qmp = machine.qmp();
    let data = json!({"addr": unix(&path), "server": true, "wait": false});
    assert_eq!(change(&mut qmp, "serial0", "socket", data), Ok(json!({})));
    let mut client = UnixStream::connect(&path).unwrap();
    wait_for(&mut qmp, "serial0", &format!("unix:{},server=on", path.display()));
    qmp.run("cont");
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).contains("ok hello") {
        let mut piece = [0; 100];
        let count = client.read(&mut piece).unwrap();
        assert_ne!(count, 0, "it has hung up after {text:?}");
        text.extend_from_slice(&piece[..count]);
    }
}

#[test]
fn standard_input_and_output_have_one_user() {
    need_kvm!();
    let mut machine = machine("-chardev stdio,id=first");
    let mut qmp = machine.qmp();
    assert_eq!(
        refused(&mut qmp, "stdio", json!({})),
        "cannot use stdio by multiple character devices"
    );
    for signal in [true, false] {
        qmp.execute("chardev-remove", json!({"id": "first"}));
        add(&mut qmp, "first", "stdio", json!({"signal": signal}));
        assert_eq!(filename(&mut qmp, "first").unwrap(), "stdio");
    }
}

#[test]
fn the_opener_has_the_network_and_nothing_else() {
    need_kvm!();
    let mut machine = machine("");
    let mut qmp = machine.qmp();
    let opener = machine.opener().expect("an opener");
    for status in procfs::statuses(opener) {
        assert_eq!(procfs::field(&status, "Seccomp"), "2");
        assert_eq!(procfs::field(&status, "Seccomp_filters"), "1");
        assert_eq!(procfs::field(&status, "NoNewPrivs"), "1");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(procfs::field(&status, set), "0000000000000000", "{set}");
        }
        assert_eq!(procfs::field(&status, "Threads"), "1");
    }
    let links: Vec<_> = procfs::descriptors(opener).into_iter().map(|(_, link)| link).collect();
    let expected = |link: &String| link == "/dev/null" || link.starts_with("socket:");
    assert!(links.len() == 4 && links.iter().all(expected), "{links:?}");
    // Its death costs sockets, and nothing else.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(opener), nix::sys::signal::Signal::SIGKILL).unwrap();
    wait_until("its loss is noticed", || machine.log().contains("opener"));
    let path = machine.path("s");
    assert_eq!(
        refused(&mut qmp, "socket", json!({"addr": unix(&path)})),
        "the process that opens sockets has failed: Broken pipe"
    );
    add(&mut qmp, "n", "null", json!({}));
    qmp.run("cont");
    qmp.run("quit");
    assert!(machine.wait().success());
}

#[test]
fn without_a_client_who_may_ask_for_sockets_there_is_no_opener() {
    need_kvm!();
    let kernel = guest::image();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("narrow");
    let mut command = std::process::Command::new(bulkhead_tests::machine::programs().join("bulkhead"));
    let arguments = format!("unix:{},server=on,wait=off,allow=query-status", path.display());
    let child = command
        .args(["-m", "64", "-S", "-nodefaults", "-qmp", &arguments, "-kernel"])
        .arg(&kernel)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let child = Killed(child);
    let mut client = None;
    wait_until("the monitor takes clients", || {
        client = Qmp::connect(&path).ok();
        client.is_some()
    });
    let names: Vec<_> = procfs::children(child.0.id() as i32)
        .into_iter()
        .filter_map(procfs::name)
        .collect();
    assert_eq!(names.len(), 1, "{names:?}");
    assert!(!names.contains(&"opener".to_owned()));
}

/// Killed when dropped.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
