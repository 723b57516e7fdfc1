//! Character devices and their keys: whatever the text holds, the answer is a device or one line of error, and a device
//! that is written down again is read as the same.

use super::Invocation;
use super::objects::parsed;
use crate::chardev::ring;
use crate::config::{CharBackend, Families, Inet, Socket, SocketAddress, SocketRole};
use ipc::opener::TcpOptions;
use proptest::prelude::*;
use std::fmt::Write;
use std::time::Duration;

fn escaped(text: &str) -> String {
    text.replace(',', ",,")
}

/// The `-chardev` that describes a device; its id is `c`.
fn written(backend: &CharBackend) -> String {
    let mut text = String::new();
    let mut key = |name: &str, value: &dyn std::fmt::Display| {
        let _ = write!(text, ",{name}={}", escaped(&value.to_string()));
    };
    let on = |switch: bool| if switch { "on" } else { "off" };
    let families = |of: Families| match of {
        Families::Any => None,
        Families::V4 => Some("ipv6"),
        Families::V6 => Some("ipv4"),
    };
    let kind = match backend {
        CharBackend::Null => "null",
        CharBackend::Stdio => "stdio",
        CharBackend::Pty => "pty",
        CharBackend::File { path, input, append } => {
            key("path", &path.display());
            if let Some(input) = input {
                key("input-path", &input.display());
            }
            key("append", &on(*append));
            "file"
        }
        CharBackend::Pipe(path) => {
            key("path", &path.display());
            "pipe"
        }
        CharBackend::Ring(size) => {
            key("size", size);
            "ringbuf"
        }
        CharBackend::Udp { remote, local } => {
            key("host", &remote.host);
            key("port", &remote.port);
            if let Some(local) = local {
                key("localaddr", &local.host);
                key("localport", &local.port);
            }
            if let Some(off) = families(remote.families) {
                key(off, &"off");
            }
            "udp"
        }
        CharBackend::Socket(Socket { address, role, options }) => {
            match address {
                SocketAddress::Unix(path) => key("path", &path.display()),
                SocketAddress::Inherited(fd) => key("fd", fd),
                SocketAddress::Inet(inet) => {
                    key("host", &inet.host);
                    key("port", &inet.port);
                    if inet.last_port != inet.port {
                        key("to", &inet.last_port);
                    }
                    if let Some(off) = families(inet.families) {
                        key(off, &"off");
                    }
                }
            }
            match role {
                SocketRole::Server { wait } => {
                    key("server", &"on");
                    key("wait", &on(*wait));
                }
                SocketRole::Client { reconnect: Some(time) } => key("reconnect-ms", &time.as_millis()),
                SocketRole::Client { reconnect: None } => {}
            }
            key("nodelay", &on(options.no_delay));
            "socket"
        }
    };
    format!("{kind},id=c{text}")
}

fn name() -> impl Strategy<Value = String> {
    "[^\\x00\\[\\]]{1,20}"
}

fn families() -> impl Strategy<Value = Families> {
    prop::sample::select(vec![Families::Any, Families::V4, Families::V6])
}

fn inet(server: bool) -> impl Strategy<Value = Inet> {
    (name(), 1..=u16::MAX, any::<u16>(), families()).prop_map(move |(host, port, more, families)| Inet {
        last_port: if server { port.saturating_add(more % 9) } else { port },
        families,
        ..Inet::new(&host, port)
    })
}

fn socket() -> impl Strategy<Value = CharBackend> {
    let role = |listening: bool| {
        let reconnect = prop::option::of(1..1u64 << 32).prop_map(|ms| ms.map(Duration::from_millis));
        (any::<bool>(), reconnect).prop_map(move |(wait, reconnect)| {
            if listening {
                SocketRole::Server { wait }
            } else {
                SocketRole::Client { reconnect }
            }
        })
    };
    let address = |listening| {
        prop_oneof![
            name().prop_map(|path| SocketAddress::Unix(path.into())),
            inet(listening).prop_map(SocketAddress::Inet),
            (3..=i32::MAX).prop_map(SocketAddress::Inherited),
        ]
    };
    let side = move |listening| (address(listening), role(listening), any::<bool>());
    prop_oneof![side(true), side(false)].prop_map(|(address, role, no_delay)| {
        // Nobody can wait for an inherited one, and it cannot be connected again.
        let role = match (&address, role) {
            (SocketAddress::Inherited(_), SocketRole::Server { .. }) => SocketRole::Server { wait: false },
            (SocketAddress::Inherited(_), SocketRole::Client { .. }) => SocketRole::Client { reconnect: None },
            (_, role) => role,
        };
        let options = TcpOptions {
            no_delay,
            keep_alive: false,
        };
        CharBackend::Socket(Socket { address, role, options })
    })
}

fn udp() -> impl Strategy<Value = CharBackend> {
    let local = prop::option::of((name(), any::<u16>()));
    (name(), any::<u16>(), local, families()).prop_map(|(host, port, local, families)| {
        let inet = |host: &str, port| Inet {
            families,
            ..Inet::new(host, port)
        };
        CharBackend::Udp {
            remote: inet(&host, port),
            local: local.map(|(host, port)| inet(&host, port)),
        }
    })
}

fn backend() -> impl Strategy<Value = CharBackend> {
    let file = (name(), prop::option::of(name()), any::<bool>());
    prop_oneof![
        prop::sample::select(vec![CharBackend::Null, CharBackend::Stdio, CharBackend::Pty]),
        file.prop_map(|(path, input, append)| CharBackend::File {
            path: path.into(),
            input: input.map(Into::into),
            append,
        }),
        name().prop_map(|path| CharBackend::Pipe(path.into())),
        (0..ring::MAX_BYTES.ilog2()).prop_map(|bits| CharBackend::Ring(1 << bits)),
        socket(),
        udp(),
    ]
}

proptest! {
    #[test]
    fn a_device_that_is_written_down_is_read_as_the_same(backend in backend()) {
        let text = written(&backend);
        match parsed("-chardev", &text) {
            Ok(Invocation::Run(machine)) => prop_assert_eq!(&machine.chardevs, &[("c".to_owned(), backend)], "{}", text),
            other => prop_assert!(false, "{}: {:?}", text, other),
        }
    }

    /// Keys in any order and any number, values of all kinds, and pieces that are neither.
    #[test]
    fn arbitrary_keys_and_values_give_a_device_or_one_line(
        kind in prop::sample::select(vec!["socket", "udp", "file", "pipe", "ringbuf", "pty", "null", "stdio", "backend=socket", ""]),
        pieces in prop::collection::vec(
            (
                prop::sample::select(vec![
                    "id", "path", "host", "port", "to", "fd", "server", "noserver", "wait", "nowait", "reconnect",
                    "reconnect-ms", "ipv4", "ipv6", "nodelay", "telnet", "localaddr", "localport", "size", "append", "mux", "",
                ]),
                prop::sample::select(vec!["", "=", "=on", "=off", "=c", "=0", "=4", "=65535", "=65536", "=-1", "=,,", "=[::1]", "=="]),
                "[,=:/@a-z0-9]{0,4}",
            ),
            0..7,
        ),
    ) {
        let rest: String = pieces.iter().map(|(key, value, noise)| format!(",{key}{value}{noise}")).collect();
        if let Err(error) = parsed("-chardev", &format!("{kind}{rest}")) {
            prop_assert!(error.starts_with("-chardev ") && !error.contains(char::is_control), "{:?}", error);
        }
    }

    /// The short forms, and what follows them.
    #[test]
    fn arbitrary_short_forms_give_a_device_or_one_line(
        option in prop::sample::select(vec!["-serial", "-qmp", "-qmp-pretty"]),
        head in prop::sample::select(vec!["unix:", "tcp:", "udp:", "file:", "pipe:", "chardev:", "stdio", "null", ""]),
        tail in "[\\[\\]@:,=/a-z0-9.]{0,16}",
    ) {
        match parsed(option, &format!("{head}{tail}")) {
            Ok(Invocation::Run(machine)) => {
                // A port that can be connected to, and a path that a socket can have.
                for backend in machine.serial.iter().chain(machine.monitors.iter().map(|monitor| &monitor.backend)) {
                    if let CharBackend::Socket(Socket { address: SocketAddress::Inet(inet), role, .. }) = backend {
                        let listens = matches!(role, SocketRole::Server { .. });
                        prop_assert!(inet.port > 0 || listens);
                        prop_assert!(inet.last_port >= inet.port);
                    }
                }
            }
            Ok(_) => {}
            Err(error) => prop_assert!(error.starts_with(option) && !error.contains(char::is_control), "{:?}", error),
        }
    }
}
