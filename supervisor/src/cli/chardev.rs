//! Where bytes come from and go to: `-chardev`, `-serial`, `-qmp`, `-qmp-pretty`, `-mon`, `-monitor`.
//!
//! Options may stand in any order, so they are collected first; [`connect`] then joins users and character devices.

use super::Invocation;
use super::draft::Draft;
use super::error::UsageError;
use super::given::{Given, checked_path};
use super::keyval::{Keys, Pairs, number, on_off, only, size, value};
use super::suggest::hint;
use crate::chardev::ring;
use crate::config::{AllowSource, CharBackend, Monitor};
use crate::narrowing;
use ipc::narrowing::Allow;
use std::ffi::OsStr;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;

/// A Unix socket's address has room for this many bytes of path.
const SOCKET_PATH_BYTES: usize = 107;

/// `-chardev` backends: name and what it is.
pub(super) const BACKENDS: &[(&str, &str)] = &[
    (
        "socket",
        "a socket: path=PATH or host=HOST,port=PORT[,server=on[,wait=off]], or an inherited one: fd=N[,server=on,wait=off]",
    ),
    ("stdio", "standard input and output"),
    ("file", "output into a file: path=FILE[,append=on][,input-path=FILE]"),
    (
        "pipe",
        "the FIFOs PATH.in and PATH.out, or PATH for both directions: path=PATH",
    ),
    (
        "ringbuf",
        "the newest output in memory, for ringbuf-read: size=BYTES (a power of two, 64 KiB unless given)",
    ),
    ("pty", "a pseudo-terminal, whose name is printed at start"),
    ("null", "output is discarded, there is no input"),
];

const NO_MUX: super::keyval::Key = only("mux", &["off"], "a character device has one user");

/// `-chardev`, by backend.
pub(super) static CHARDEV_FORMS: &[&Keys] = &[&SOCKET_KEYS, &FILE_KEYS, &PIPE_KEYS, &RINGBUF_KEYS, &PLAIN_KEYS];

static SOCKET_KEYS: Keys = Keys {
    implied: Some("backend"),
    list: None,
    keys: &[
        value("backend"),
        value("id"),
        value("path"),
        value("host"),
        number("port"),
        number("fd"),
        on_off("server"),
        on_off("wait"),
        only("reconnect", &["0"], "a connection that was closed stays closed"),
        only("reconnect-ms", &["0"], "a connection that was closed stays closed"),
        only("abstract", &["off"], "sockets are in the file system"),
        only("telnet", &["off"], "the bytes go over the socket as they are"),
        only("websocket", &["off"], "the bytes go over the socket as they are"),
        NO_MUX,
    ],
};

static FILE_KEYS: Keys = Keys {
    implied: Some("backend"),
    list: None,
    keys: &[
        value("backend"),
        value("id"),
        value("path"),
        on_off("append"),
        value("input-path"),
        NO_MUX,
    ],
};

static PIPE_KEYS: Keys = Keys {
    implied: Some("backend"),
    list: None,
    keys: &[value("backend"), value("id"), value("path"), NO_MUX],
};

static RINGBUF_KEYS: Keys = Keys {
    implied: Some("backend"),
    list: None,
    keys: &[value("backend"), value("id"), size("size"), NO_MUX],
};

/// stdio, null and pty.
static PLAIN_KEYS: Keys = Keys {
    implied: Some("backend"),
    list: None,
    keys: &[value("backend"), value("id"), NO_MUX],
};

/// What follows `unix:`.
static UNIX_KEYS: Keys = Keys {
    implied: Some("path"),
    list: None,
    keys: &[
        value("path"),
        on_off("server"),
        on_off("wait"),
        only("reconnect", &["0"], "a connection that was closed stays closed"),
        only("reconnect-ms", &["0"], "a connection that was closed stays closed"),
        only("abstract", &["off"], "sockets are in the file system"),
    ],
};

/// What follows `tcp:`.
static TCP_KEYS: Keys = Keys {
    implied: Some("address"),
    list: None,
    keys: &[
        value("address"),
        on_off("server"),
        on_off("wait"),
        only("reconnect", &["0"], "a connection that was closed stays closed"),
        only("reconnect-ms", &["0"], "a connection that was closed stays closed"),
    ],
};

/// What follows `tcp:` where a monitor is meant.
static TCP_MONITOR_KEYS: Keys = Keys {
    implied: Some("address"),
    list: None,
    keys: &[
        value("address"),
        on_off("server"),
        on_off("wait"),
        value("allow"),
        only("reconnect", &["0"], "a connection that was closed stays closed"),
        only("reconnect-ms", &["0"], "a connection that was closed stays closed"),
    ],
};

/// What follows `unix:` where a monitor is meant.
static UNIX_MONITOR_KEYS: Keys = Keys {
    implied: Some("path"),
    list: None,
    keys: &[
        value("path"),
        on_off("server"),
        on_off("wait"),
        value("allow"),
        only("reconnect", &["0"], "a connection that was closed stays closed"),
        only("reconnect-ms", &["0"], "a connection that was closed stays closed"),
        only("abstract", &["off"], "sockets are in the file system"),
    ],
};

/// `-mon`.
pub(super) static MON_KEYS: Keys = Keys {
    implied: Some("chardev"),
    list: None,
    keys: &[
        value("chardev"),
        value("mode"),
        on_off("pretty"),
        value("id"),
        value("allow"),
    ],
};

/// `-chardev`.
#[derive(Debug)]
pub(super) struct Chardev {
    given: Given,
    id: String,
    backend: CharBackend,
    /// The option that it serves.
    user: Option<Given>,
}

/// What a `-serial` or a monitor names.
#[derive(Debug)]
pub(super) enum Source {
    /// `none`: there is no such device.
    Nothing,
    /// A backend of its own.
    Own(CharBackend),
    /// A `-chardev`, by id.
    Chardev(String),
}

/// A monitor as given.
#[derive(Debug)]
pub(super) struct MonitorDraft {
    given: Given,
    source: Source,
    pretty: bool,
    allow: AllowSource,
}

pub(super) fn chardev(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    let first = given
        .value
        .as_bytes()
        .split(|byte| *byte == b',')
        .next()
        .unwrap_or_default();
    let name = first.strip_prefix(b"backend=").unwrap_or(first);
    let keys = match name {
        b"help" | b"?" => {
            draft.answer = Some(Invocation::ListChardevs);
            return Ok(());
        }
        b"socket" => &SOCKET_KEYS,
        b"file" => &FILE_KEYS,
        b"pipe" => &PIPE_KEYS,
        b"ringbuf" => &RINGBUF_KEYS,
        b"stdio" | b"null" | b"pty" => &PLAIN_KEYS,
        other => {
            let names = || BACKENDS.iter().map(|(name, _)| *name);
            let all = || format!("; there are {}", names().collect::<Vec<_>>().join(", "));
            let hint = hint(&String::from_utf8_lossy(other), "", names(), all);
            return Err(given.refuse(format!("there is no such character device{hint}")));
        }
    };
    let pairs = Pairs::parse(given, &given.value, keys)?;
    let id = pairs.require("id", "id=NAME, for -serial chardev:NAME or -mon NAME")?;
    if draft.chardevs.iter().any(|chardev| id.value == *chardev.id) {
        return Err(id.refuse("there is already a character device with this id: give each its own"));
    }
    let id = id.identifier()?.to_owned();
    let backend = match name {
        b"socket" => socket(&pairs)?,
        b"file" => {
            pairs.require("path", "path=FILE says where the output goes")?;
            CharBackend::File {
                path: pairs.path("path")?.unwrap_or_default(),
                input: pairs.path("input-path")?,
                append: pairs.switch("append")?.unwrap_or(false),
            }
        }
        b"pipe" => CharBackend::Pipe(pairs.require("path", "path=PATH says which FIFOs")?.path()?),
        b"ringbuf" => CharBackend::Ring(match pairs.get("size") {
            Some(given) => ring_size(given)?,
            None => ring::DEFAULT_BYTES,
        }),
        b"stdio" => CharBackend::Stdio,
        b"pty" => CharBackend::Pty,
        _ => CharBackend::Null,
    };
    draft.chardevs.push(Chardev {
        given: given.clone(),
        id,
        backend,
        user: None,
    });
    Ok(())
}

fn socket(pairs: &Pairs) -> Result<CharBackend, UsageError> {
    let server = pairs.switch("server")?.unwrap_or(false);
    let wait = pairs.switch("wait")?;
    if let Some(given) = pairs.get("wait").filter(|_| !server) {
        return Err(given.refuse("only a listening socket can wait for its client: add server=on, or leave wait away"));
    }
    if let Some(given) = pairs.get("address") {
        let (host, port) = given.text()?.rsplit_once(':').unwrap_or_default();
        return tcp(given, host, port, server, wait);
    }
    if let Some(given) = pairs.get("port") {
        if pairs.get("path").or(pairs.get("fd")).is_some() {
            return Err(given.refuse("a socket has one address: a path, host and port, or an fd"));
        }
        let host = pairs.get("host").map(Given::text).transpose()?.unwrap_or_default();
        return tcp(given, host, given.text()?, server, wait);
    }
    if let Some(given) = pairs.get("host") {
        return Err(given.refuse("the port is missing: port=PORT"));
    }
    let Some(given) = pairs.get("fd") else {
        let path = pairs.require("path", "path=PATH (or fd=N) says which socket")?;
        return match (unix_path(path)?, server) {
            (path, true) => Ok(CharBackend::UnixServer {
                path,
                wait: wait.unwrap_or(true),
            }),
            (path, false) => Ok(CharBackend::UnixClient(path)),
        };
    };
    if pairs.get("path").is_some() {
        return Err(given.refuse("a socket has either a path or an fd"));
    }
    let fd = given.number("an inherited file descriptor", 3..=RawFd::MAX)?;
    if server && wait != Some(false) {
        return Err(given.refuse("an inherited socket cannot be waited for at start: add wait=off"));
    }
    Ok(CharBackend::Inherited { fd, listening: server })
}

fn tcp(given: &Given, host: &str, port: &str, server: bool, wait: Option<bool>) -> Result<CharBackend, UsageError> {
    let port = port.parse::<u16>().ok().filter(|port| server || *port != 0);
    let port = port.ok_or_else(|| given.refuse("a TCP address is HOST:PORT, and a port is a number up to 65535"))?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host = bare.unwrap_or(host).to_owned();
    if host.is_empty() && !server {
        return Err(given.refuse("the host to connect to is missing"));
    }
    Ok(if server {
        CharBackend::TcpServer {
            host,
            port,
            wait: wait.unwrap_or(true),
        }
    } else {
        CharBackend::TcpClient { host, port }
    })
}

/// Here a number without a suffix counts bytes.
fn ring_size(given: &Given) -> Result<usize, UsageError> {
    let bytes = match given.value.to_str().and_then(|text| text.parse::<u64>().ok()) {
        Some(bytes) => bytes,
        None => given.size_bytes()?,
    };
    ring::check_size(bytes).map_err(|problem| given.refuse(problem))
}

fn unix_path(given: &Given) -> Result<std::path::PathBuf, UsageError> {
    let path = given.path()?;
    if path.as_os_str().len() > SOCKET_PATH_BYTES {
        return Err(given.refuse(format!(
            "the path of a Unix socket has at most {SOCKET_PATH_BYTES} bytes"
        )));
    }
    Ok(path)
}

/// The short form that `-serial` and `-qmp` take: `stdio`, `file:P`, `unix:P,server=on`, `chardev:ID` …
fn short_form(given: &Given, forms: &str) -> Result<Source, UsageError> {
    let text = given.value.as_bytes();
    let backend = match text {
        b"none" => return Ok(Source::Nothing),
        b"null" => CharBackend::Null,
        b"stdio" => CharBackend::Stdio,
        b"pty" => CharBackend::Pty,
        b"mon:stdio" => {
            return Err(given.refuse("there is no human monitor to share the terminal with: write stdio"));
        }
        _ => {
            if let Some(path) = text.strip_prefix(b"file:") {
                // The whole rest is the name: this form has no keys.
                CharBackend::File {
                    path: checked_path(OsStr::from_bytes(path)).map_err(|problem| given.refuse(problem))?,
                    input: None,
                    append: false,
                }
            } else if let Some(path) = text.strip_prefix(b"pipe:") {
                CharBackend::Pipe(checked_path(OsStr::from_bytes(path)).map_err(|problem| given.refuse(problem))?)
            } else if let Some(rest) = text.strip_prefix(b"unix:") {
                socket(&Pairs::parse(given, OsStr::from_bytes(rest), &UNIX_KEYS)?)?
            } else if let Some(rest) = text.strip_prefix(b"tcp:") {
                socket(&Pairs::parse(given, OsStr::from_bytes(rest), &TCP_KEYS)?)?
            } else if let Some(id) = text.strip_prefix(b"chardev:") {
                return Ok(Source::Chardev(String::from_utf8_lossy(id).into_owned()));
            } else {
                return Err(given.refuse(format!("this can be {forms}")));
            }
        }
    };
    Ok(Source::Own(backend))
}

pub(super) fn serial(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    let forms = "stdio, file:FILE, pipe:PATH, unix:PATH or tcp:HOST:PORT, both with [,server=on][,wait=off], pty, null, none or \
                 chardev:ID";
    if draft.serial.is_some() {
        return Err(given.refuse("Bulkhead has one serial port, and an earlier -serial has taken it"));
    }
    draft.serial = Some((given.clone(), short_form(given, forms)?));
    Ok(())
}

pub(super) fn qtest(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    let forms = "unix:PATH or tcp:HOST:PORT, both with [,server=on][,wait=off], null or chardev:ID";
    draft.qtest = Some((given.clone(), short_form(given, forms)?));
    Ok(())
}

pub(super) fn qmp(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    monitor_on(draft, given, false)
}

pub(super) fn qmp_pretty(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    monitor_on(draft, given, true)
}

fn monitor_on(draft: &mut Draft, given: &Given, pretty: bool) -> Result<(), UsageError> {
    let text = given.value.as_bytes();
    let unix = text.strip_prefix(b"unix:").map(|rest| (rest, &UNIX_MONITOR_KEYS));
    let tcp = text.strip_prefix(b"tcp:").map(|rest| (rest, &TCP_MONITOR_KEYS));
    let (source, allow) = match unix.or(tcp) {
        Some((rest, keys)) => {
            let pairs = Pairs::parse(given, OsStr::from_bytes(rest), keys)?;
            (Source::Own(socket(&pairs)?), allow(&pairs)?)
        }
        None => {
            let source = short_form(
                given,
                "unix:PATH or tcp:HOST:PORT, both with [,server=on][,wait=off], stdio or chardev:ID",
            )?;
            (source, AllowSource::Given(Allow::All))
        }
    };
    draft.monitors.push(MonitorDraft {
        given: given.clone(),
        source,
        pretty,
        allow,
    });
    Ok(())
}

/// `allow=name:name:…`, or with a slash in it `allow=FILE`.
fn allow(pairs: &Pairs) -> Result<AllowSource, UsageError> {
    let Some(given) = pairs.get("allow") else {
        return Ok(AllowSource::Given(Allow::All));
    };
    if given.value.as_bytes().contains(&b'/') {
        return given.path().map(AllowSource::File);
    }
    let names = narrowing::commands(given.text()?.split(':'));
    names
        .map(AllowSource::Given)
        .map_err(|problem| given.refuse(format!("{problem} (the name of a file has a slash: ./FILE)")))
}

pub(super) fn mon(draft: &mut Draft, pairs: &Pairs) -> Result<(), UsageError> {
    let chardev = pairs
        .require("chardev", "-mon chardev=ID,mode=control")?
        .identifier()?
        .to_owned();
    let no_human = "there is no human monitor, QMP is mode=control";
    let mode = pairs.require("mode", no_human)?;
    if mode.value != "control" {
        return Err(mode.refuse(no_human));
    }
    pairs.get("id").map(Given::identifier).transpose()?;
    let pretty = pairs.switch("pretty")?.unwrap_or(false);
    draft.monitors.push(MonitorDraft {
        given: pairs.whole.clone(),
        source: Source::Chardev(chardev),
        pretty,
        allow: allow(pairs)?,
    });
    Ok(())
}

/// What the machine's character devices are.
pub(super) struct Connected {
    /// The serial port's.
    pub(super) serial: Option<CharBackend>,
    /// What that is called.
    pub(super) serial_label: String,
    /// Those that nothing uses.
    /// See [`crate::config::VmConfig::qtest`].
    pub(super) qtest: Option<(CharBackend, String)>,
    pub(super) chardevs: Vec<(String, CharBackend)>,
    /// The monitors'.
    pub(super) monitors: Vec<Monitor>,
}

/// Joins users and character devices, after the last option: the serial port's backend and the monitors.
pub(super) fn connect(draft: &mut Draft) -> Result<Connected, UsageError> {
    let mut backends: Vec<(Given, CharBackend)> = Vec::new();
    for chardev in &draft.chardevs {
        claim(&mut backends, &chardev.given, &chardev.backend)?;
    }
    let mut serial_label = "serial0".to_owned();
    let serial = match draft.serial.take() {
        Some((given, source)) => {
            if let Source::Chardev(id) = &source {
                serial_label.clone_from(id);
            }
            resolve(&mut draft.chardevs, &mut backends, &given, source)?
        }
        None if draft.no_defaults => None,
        None => match &draft.no_graphic {
            Some(given) => resolve(
                &mut draft.chardevs,
                &mut backends,
                given,
                Source::Own(CharBackend::Stdio),
            )?,
            None => Some(CharBackend::Null),
        },
    };
    let qtest = match draft.qtest.take() {
        Some((given, source)) => {
            let label = match &source {
                Source::Chardev(id) => id.clone(),
                Source::Own(_) | Source::Nothing => "qtest".to_owned(),
            };
            let backend = resolve(&mut draft.chardevs, &mut backends, &given, source)?;
            backend.map(|backend| (backend, label))
        }
        None => None,
    };
    let monitors = connect_monitors(draft, &mut backends)?;
    let terminal = backends.iter().find(|(_, backend)| *backend == CharBackend::Stdio);
    if let Some((given, _)) = terminal.filter(|_| draft.daemonize) {
        return Err(given.refuse("-daemonize leaves no standard input and output: use unix:PATH or file:FILE"));
    }
    let unused = draft.chardevs.iter().filter(|chardev| chardev.user.is_none());
    let chardevs = unused
        .map(|chardev| (chardev.id.clone(), chardev.backend.clone()))
        .collect();
    Ok(Connected {
        serial,
        serial_label,
        qtest,
        chardevs,
        monitors,
    })
}

fn connect_monitors(draft: &mut Draft, backends: &mut Vec<(Given, CharBackend)>) -> Result<Vec<Monitor>, UsageError> {
    let mut monitors = Vec::new();
    let mut own = 0;
    for monitor in std::mem::take(&mut draft.monitors) {
        let MonitorDraft {
            given,
            source,
            pretty,
            allow,
        } = monitor;
        let label = match &source {
            Source::Nothing => String::new(),
            Source::Chardev(id) => id.clone(),
            Source::Own(_) => {
                own += 1;
                format!("compat_monitor{}", own - 1)
            }
        };
        match resolve(&mut draft.chardevs, backends, &given, source)? {
            // Nobody can ever speak to it.
            None | Some(CharBackend::Null) => {}
            Some(CharBackend::File { .. } | CharBackend::Pty | CharBackend::Pipe(_) | CharBackend::Ring(_)) => {
                return Err(given.refuse("a monitor needs a socket or stdio"));
            }
            Some(backend) => monitors.push(Monitor {
                backend,
                label,
                pretty,
                allow,
            }),
        }
    }
    Ok(monitors)
}

fn resolve(
    chardevs: &mut [Chardev],
    backends: &mut Vec<(Given, CharBackend)>,
    given: &Given,
    source: Source,
) -> Result<Option<CharBackend>, UsageError> {
    match source {
        Source::Nothing => Ok(None),
        Source::Own(backend) => {
            claim(backends, given, &backend)?;
            Ok(Some(backend))
        }
        Source::Chardev(id) => {
            let ids: Vec<String> = chardevs.iter().map(|chardev| chardev.id.clone()).collect();
            let Some(chardev) = chardevs.iter_mut().find(|chardev| chardev.id == id) else {
                let hint = hint(&id, "", ids.iter().map(String::as_str), String::new);
                return Err(given.refuse(format!("there is no -chardev with this id{hint}")));
            };
            if let Some(user) = &chardev.user {
                return Err(given.refuse(format!(
                    "the device is already in use by {} {}",
                    user.option, user.shown
                )));
            }
            chardev.user = Some(given.clone());
            Ok(Some(chardev.backend.clone()))
        }
    }
}

/// Two users of one terminal, socket or descriptor would take each other's bytes.
fn claim(backends: &mut Vec<(Given, CharBackend)>, given: &Given, backend: &CharBackend) -> Result<(), UsageError> {
    let earlier = backends.iter().find(|(_, earlier)| match (earlier, backend) {
        (CharBackend::Stdio, CharBackend::Stdio) => true,
        (CharBackend::UnixServer { path: one, .. }, CharBackend::UnixServer { path: other, .. }) => one == other,
        (CharBackend::Inherited { fd: one, .. }, CharBackend::Inherited { fd: other, .. }) => one == other,
        (CharBackend::File { path: one, .. }, CharBackend::File { path: other, .. }) => one == other,
        (CharBackend::Pipe(one), CharBackend::Pipe(other)) => one == other,
        _ => false,
    });
    if let Some((user, _)) = earlier {
        let what = match backend {
            CharBackend::Stdio => "standard input and output are",
            CharBackend::File { .. } => "this file is",
            _ => "this socket is",
        };
        return Err(given.refuse(format!("{what} already in use by {} {}", user.option, user.shown)));
    }
    backends.push((given.clone(), backend.clone()));
    Ok(())
}
