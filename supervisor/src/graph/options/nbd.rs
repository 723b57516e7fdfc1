//! Options of `nbd`, and its file names (`nbd:…`, `nbd://…`, `nbd+unix://…`).

use super::reader::Reader;
use crate::config::{Families, Inet};
use crate::graph::error::GraphError;
use ipc::blockdev::FlatOptions;
use ipc::objects::Scalar;
use std::path::PathBuf;

/// The port that is meant where none is named.
pub const DEFAULT_PORT: u16 = 10809;
/// Longest `reconnect-delay`, seconds: requests of a guest, and changes of the graph that wait for them, must end.
const MAX_RECONNECT_DELAY: u64 = 300;
/// Longest name of an export, bytes.
const MAX_EXPORT_BYTES: usize = 4096;

/// `nbd`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdOptions {
    /// `server`.
    pub server: NbdServer,
    /// `export`; absent: the server's default.
    pub export: Option<String>,
    /// `reconnect-delay`, seconds.
    pub reconnect_delay_s: u32,
    /// `open-timeout`, seconds.
    pub open_timeout_s: u32,
}

/// `server`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdServer {
    /// A socket's path.
    Unix(PathBuf),
    /// A host and port, and whether the kernel asks a silent server now and then.
    Inet(Inet, bool),
    /// A connected socket that a client has passed (`getfd`), by its name.
    Fd(String),
}

/// Takes the options.
pub(super) fn nbd(reader: &mut Reader, prefix: &str) -> Result<NbdOptions, GraphError> {
    let at = |name: &str| format!("{prefix}{name}");
    if let Some(name) = reader.text(&at("filename"))? {
        let taken = ["server.type", "host", "port", "path", "export"].map(at);
        if reader.has_below(&at("server.")) || taken.iter().any(|name| reader.has_below(name)) {
            return Err(GraphError::Unsupported(
                "host/port/path and file names may not be used at the same time",
            ));
        }
        for (name, value) in options_of(&name)?.0 {
            reader.put(at(&name), value);
        }
    }
    for name in ["tls-creds", "tls-hostname"] {
        if reader.text(&at(name))?.is_some() {
            return Err(GraphError::Impossible(at(name), "Bulkhead has no TLS"));
        }
    }
    if reader.text(&at("x-dirty-bitmap"))?.is_some() {
        let why = "the dirty bitmaps of a server are read by its own clients";
        return Err(GraphError::Impossible(at("x-dirty-bitmap"), why));
    }
    let server = server(reader, prefix)?;
    let export = reader.text(&at("export"))?;
    if export.as_ref().is_some_and(|export| export.len() > MAX_EXPORT_BYTES) {
        return Err(GraphError::Unsupported("export name too long to send to server"));
    }
    let reconnect_delay = reader.size(&at("reconnect-delay"))?.unwrap_or(0);
    if reconnect_delay > MAX_RECONNECT_DELAY {
        return Err(GraphError::Impossible(at("reconnect-delay"), "at most 300 seconds"));
    }
    let open_timeout = reader.size(&at("open-timeout"))?.unwrap_or(0);
    if open_timeout > MAX_RECONNECT_DELAY {
        return Err(GraphError::Impossible(at("open-timeout"), "at most 300 seconds"));
    }
    let options = NbdOptions {
        server,
        export,
        // Both are small, by the lines above.
        reconnect_delay_s: reconnect_delay as u32,
        open_timeout_s: open_timeout as u32,
    };
    if matches!(options.server, NbdServer::Fd(_)) && (reconnect_delay, open_timeout) != (0, 0) {
        return Err(GraphError::Unsupported("a passed socket cannot be connected again"));
    }
    Ok(options)
}

fn server(reader: &mut Reader, prefix: &str) -> Result<NbdServer, GraphError> {
    let at = |name: &str| format!("{prefix}{name}");
    let required = |value: Option<String>, name: &str| value.ok_or_else(|| GraphError::Missing(at(name)));
    if reader.has_below(&at("server.")) {
        return match reader.word(&at("server.type"), &["inet", "unix", "fd", "vsock"])? {
            Some("inet") => inet(reader, &at("server.")),
            Some("unix") => Ok(unix(&required(reader.text(&at("server.path"))?, "server.path")?)),
            Some("fd") => Ok(NbdServer::Fd(required(reader.text(&at("server.str"))?, "server.str")?)),
            Some(_) => Err(GraphError::Impossible(
                at("server.type"),
                "servers are reached over unix, inet and fd",
            )),
            None => Err(GraphError::Missing(at("server.type"))),
        };
    }
    // As command lines had it before.
    match (reader.text(&at("path"))?, reader.has_below(&at("host"))) {
        (Some(_), true) => Err(GraphError::Unsupported(
            "path and host may not be used at the same time",
        )),
        (Some(path), false) => Ok(unix(&path)),
        (None, true) => inet(reader, prefix),
        (None, false) => Err(GraphError::Unsupported("NBD server address missing")),
    }
}

fn unix(path: &str) -> NbdServer {
    NbdServer::Unix(path.into())
}

fn inet(reader: &mut Reader, prefix: &str) -> Result<NbdServer, GraphError> {
    let at = |name: &str| format!("{prefix}{name}");
    let host = reader
        .text(&at("host"))?
        .ok_or_else(|| GraphError::Missing(at("host")))?;
    let port = match reader.text(&at("port"))? {
        Some(port) => port
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| GraphError::Type(at("port"), "a port"))?,
        None => DEFAULT_PORT,
    };
    let families = Families::new(reader.switch(&at("ipv4"))?, reader.switch(&at("ipv6"))?)
        .ok_or(GraphError::Unsupported("Cannot disable IPv4 and IPv6 at same time"))?;
    // Means something for servers alone.
    reader.size(&at("to"))?;
    let inet = Inet {
        families,
        numeric: reader.switch(&at("numeric"))?.unwrap_or(false),
        ..Inet::new(&host, port)
    };
    Ok(NbdServer::Inet(
        inet,
        reader.switch(&at("keep-alive"))?.unwrap_or(false),
    ))
}

impl NbdOptions {
    /// Its name where a file name is wanted.
    pub fn filename(&self) -> String {
        let export = self.export.as_ref().map(|export| format!("/{export}"));
        match &self.server {
            NbdServer::Unix(path) => {
                let export = export.unwrap_or_default();
                format!("nbd+unix://{export}?socket={}", path.display())
            }
            NbdServer::Inet(inet, _) => format!("nbd://{inet}{}", export.unwrap_or_default()),
            NbdServer::Fd(name) => {
                let server = serde_json::json!({"type": "fd", "str": name});
                let mut json = serde_json::json!({"driver": "nbd", "server": server});
                if let Some(export) = &self.export {
                    json["export"] = export.as_str().into();
                }
                format!("json:{}", crate::graph::filename::text(&json))
            }
        }
    }

    /// Its server inside another node's description.
    pub fn description(&self) -> serde_json::Value {
        let server = match &self.server {
            NbdServer::Unix(path) => serde_json::json!({"type": "unix", "path": path.display().to_string()}),
            NbdServer::Inet(inet, _) => {
                serde_json::json!({"type": "inet", "host": inet.host, "port": inet.port.to_string()})
            }
            NbdServer::Fd(name) => serde_json::json!({"type": "fd", "str": name}),
        };
        let mut json = serde_json::json!({"driver": "nbd", "server": server});
        if let Some(export) = &self.export {
            json["export"] = export.as_str().into();
        }
        json
    }
}

/// Whether a file name is one of NBD's.
pub fn is_filename(name: &str) -> bool {
    name.starts_with("nbd:") || name.starts_with("nbd+") || name.starts_with("nbds:") || name.starts_with("nbds+")
}

/// What a file name of NBD's says, as options of the node.
///
/// # Errors
/// What is wrong with it.
pub fn options_of(name: &str) -> Result<FlatOptions, GraphError> {
    let scheme = name.split_once("://");
    let parsed = match (scheme, name.strip_prefix("nbd:")) {
        (Some(("nbd" | "nbd+tcp", rest)), _) => tcp_url(rest),
        (Some(("nbd+unix", rest)), _) => unix_url(rest),
        (Some(("nbds" | "nbds+tcp" | "nbds+unix", _)), _) => {
            return Err(GraphError::Unsupported("nbds needs TLS, which Bulkhead does not have"));
        }
        (_, Some(rest)) => old_name(rest),
        _ => None,
    };
    let Parsed { server, export } = parsed.ok_or_else(|| GraphError::BadNbdName(name.to_owned()))?;
    let text = |name: &str, value: &str| (name.to_owned(), Scalar::from(value));
    let mut options = match &server {
        Place::Unix(path) => vec![text("server.type", "unix"), text("server.path", path)],
        Place::Inet(host, port) => vec![
            text("server.type", "inet"),
            text("server.host", host),
            text("server.port", port),
        ],
    };
    options.extend(export.map(|export| text("export", &export)));
    Ok(FlatOptions(options))
}

enum Place {
    Unix(String),
    Inet(String, String),
}

struct Parsed {
    server: Place,
    export: Option<String>,
}

/// `HOST[:PORT][/EXPORT]`.
fn tcp_url(rest: &str) -> Option<Parsed> {
    let (authority, path) = rest.split_once('/').map_or((rest, None), |(a, p)| (a, Some(p)));
    if authority.is_empty() || rest.contains(['?', '#']) {
        return None;
    }
    let (host, port) = host_and_port(authority)?;
    Some(Parsed {
        server: Place::Inet(unescape(host)?, port.unwrap_or("10809").to_owned()),
        export: path
            .filter(|path| !path.is_empty())
            .map(unescape)
            .map_or(Some(None), |p| p.map(Some))?,
    })
}

/// `[/EXPORT]?socket=PATH`.
fn unix_url(rest: &str) -> Option<Parsed> {
    let (path, query) = rest.split_once('?')?;
    let socket = query.strip_prefix("socket=").filter(|socket| !socket.is_empty())?;
    if socket.contains('&') {
        return None;
    }
    let export = match path.strip_prefix('/') {
        Some("") => None,
        Some(export) => Some(unescape(export)?),
        None if path.is_empty() => None,
        None => return None,
    };
    Some(Parsed {
        server: Place::Unix(unescape(socket)?),
        export,
    })
}

/// `unix:PATH[:exportname=EXPORT]`, `HOST:PORT[:exportname=EXPORT]`.
fn old_name(rest: &str) -> Option<Parsed> {
    let (place, export) = match rest.split_once(":exportname=") {
        Some((place, export)) => (place, Some(export.to_owned())),
        None => (rest, None),
    };
    let server = match place.strip_prefix("unix:") {
        Some("") => return None,
        Some(path) => Place::Unix(path.to_owned()),
        None => {
            let (host, port) = host_and_port(place)?;
            Place::Inet(host.to_owned(), port?.to_owned())
        }
    };
    Some(Parsed { server, export })
}

/// A host, which may be a number of IPv6 in brackets.
fn host_and_port(text: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, port) = rest.split_once(']')?;
        return match port {
            "" => Some((host, None)),
            port => Some((host, Some(port.strip_prefix(':')?))),
        };
    }
    match text.split_once(':') {
        Some((host, port)) if !host.is_empty() && !port.contains(':') => Some((host, Some(port))),
        Some(_) => None,
        None => Some((text, None)),
    }
}

/// `%20` and the like.
fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        if *first == b'%' {
            let digits = std::str::from_utf8(behind.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &behind[2..];
        } else {
            bytes.push(*first);
            rest = behind;
        }
    }
    let text = String::from_utf8(bytes).ok()?;
    (!text.contains('\0')).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::super::{DriverOptions, NodeOptions};
    use super::*;

    fn parsed(name: &str) -> Result<NbdOptions, String> {
        let mut options = options_of(name).map_err(|error| error.to_string())?;
        options.0.push(("driver".into(), "nbd".into()));
        match NodeOptions::parse(options).map_err(|error| error.to_string())?.driver {
            DriverOptions::Nbd(nbd) => Ok(nbd),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn names_are_read_and_shown_as_urls() {
        for (name, shown) in [
            ("nbd:unix:/tmp/s", "nbd+unix://?socket=/tmp/s"),
            ("nbd:unix:/tmp/s:exportname=a b", "nbd+unix:///a b?socket=/tmp/s"),
            ("nbd+unix:///a%20b?socket=/tmp/s", "nbd+unix:///a b?socket=/tmp/s"),
            ("nbd+unix://?socket=s", "nbd+unix://?socket=s"),
            ("nbd:localhost:10809", "nbd://localhost:10809"),
            ("nbd:[::1]:7:exportname=x", "nbd://::1:7/x"),
            ("nbd://host/x/y", "nbd://host:10809/x/y"),
            ("nbd+tcp://127.0.0.1:99", "nbd://127.0.0.1:99"),
        ] {
            assert_eq!(
                parsed(name).map(|options| options.filename()).as_deref(),
                Ok(shown),
                "{name}"
            );
        }
    }

    #[test]
    fn other_names_are_refused() {
        for name in [
            "nbd:",
            "nbd:unix:",
            "nbd:host",
            "nbd:host:x",
            "nbd:host:0",
            "nbd://",
            "nbd:///x",
            "nbd://h:70000/x",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=",
            "nbd+unix:///x?other=1",
            "nbd+unix:///%zz?socket=s",
            "nbd+unix:///%00?socket=s",
            "nbds://host/x",
            "nbd+vsock://1/x",
            "nbd://h:1:2/x",
        ] {
            assert!(parsed(name).is_err(), "{name}");
            assert!(is_filename(name), "{name}");
        }
    }
}
