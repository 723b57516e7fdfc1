//! Sockets behind character devices, as options describe them.

use super::error::UsageError;
use super::given::Given;
use super::keyval::Pairs;
use crate::config::{CharBackend, Families, Inet, Socket, SocketAddress, SocketRole};
use ipc::opener::TcpOptions;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

/// A Unix socket's address has room for this many bytes of path.
const SOCKET_PATH_BYTES: usize = 107;

/// `-chardev socket` and what follows `unix:` and `tcp:`.
pub(super) fn socket(pairs: &Pairs) -> Result<CharBackend, UsageError> {
    let server = pairs.switch("server")?.unwrap_or(false);
    let wait = pairs.switch("wait")?;
    if let Some(given) = pairs.get("wait").filter(|_| !server) {
        return Err(given.refuse("only a listening socket can wait for its client: add server=on, or leave wait away"));
    }
    let address = address(pairs, server)?;
    if let (SocketAddress::Inherited(_), Some(given)) = (&address, pairs.get("fd"))
        && server
        && wait != Some(false)
    {
        return Err(given.refuse("an inherited socket cannot be waited for at start: add wait=off"));
    }
    let reconnect = reconnect(pairs)?;
    let role = if server {
        SocketRole::Server {
            wait: wait.unwrap_or(true),
        }
    } else {
        SocketRole::Client { reconnect }
    };
    if reconnect.is_some() && (server || matches!(address, SocketAddress::Inherited(_))) {
        let given = pairs
            .get("reconnect")
            .or(pairs.get("reconnect-ms"))
            .unwrap_or(&pairs.whole);
        return Err(given.refuse("only a socket that connects to an address can do so again"));
    }
    let options = TcpOptions {
        no_delay: pairs.switch("nodelay")?.unwrap_or(false),
        keep_alive: false,
    };
    Ok(CharBackend::Socket(Socket { address, role, options }))
}

fn address(pairs: &Pairs, server: bool) -> Result<SocketAddress, UsageError> {
    if let Some(given) = pairs.get("address") {
        let (host, port) = given.text()?.rsplit_once(':').unwrap_or_default();
        return Ok(SocketAddress::Inet(tcp(pairs, given, host, port, server)?));
    }
    if let Some(given) = pairs.get("port") {
        if pairs.get("path").or(pairs.get("fd")).is_some() {
            return Err(given.refuse("a socket has one address: a path, host and port, or an fd"));
        }
        let host = pairs.get("host").map(Given::text).transpose()?.unwrap_or_default();
        return Ok(SocketAddress::Inet(tcp(pairs, given, host, given.text()?, server)?));
    }
    if let Some(given) = pairs.get("host") {
        return Err(given.refuse("the port is missing: port=PORT"));
    }
    let Some(given) = pairs.get("fd") else {
        let path = pairs.require("path", "path=PATH (or fd=N) says which socket")?;
        return Ok(SocketAddress::Unix(unix_path(path)?));
    };
    if pairs.get("path").is_some() {
        return Err(given.refuse("a socket has either a path or an fd"));
    }
    let fd = given.number("an inherited file descriptor", 3..=RawFd::MAX)?;
    Ok(SocketAddress::Inherited(fd))
}

fn tcp(pairs: &Pairs, given: &Given, host: &str, port: &str, server: bool) -> Result<Inet, UsageError> {
    let port = port.parse::<u16>().ok().filter(|port| server || *port != 0);
    let port = port.ok_or_else(|| given.refuse("a TCP address is HOST:PORT, and a port is a number up to 65535"))?;
    let host = without_brackets(host);
    if host.is_empty() && !server {
        return Err(given.refuse("the host to connect to is missing"));
    }
    let last_port = match pairs.get("to") {
        Some(to) if !server => return Err(to.refuse("only a listening socket tries several ports")),
        Some(to) => to.number("the last port", port..=u16::MAX)?,
        None => port,
    };
    Ok(Inet {
        last_port,
        families: families(pairs)?,
        ..Inet::new(host, port)
    })
}

fn without_brackets(host: &str) -> &str {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    bare.unwrap_or(host)
}

fn families(pairs: &Pairs) -> Result<Families, UsageError> {
    let (v4, v6) = (pairs.switch("ipv4")?, pairs.switch("ipv6")?);
    Families::new(v4, v6).ok_or_else(|| pairs.whole.refuse("ipv4 and ipv6 cannot both be off"))
}

/// `reconnect=` (seconds) or `reconnect-ms=`; 0 is never.
fn reconnect(pairs: &Pairs) -> Result<Option<Duration>, UsageError> {
    let time = |name: &str, unit_ms: u64| {
        let given = pairs.get(name);
        let number = given.map(|given| given.number("a time until the next attempt", 0..=u64::from(u32::MAX)));
        number.transpose().map(|number| number.map(|number| number * unit_ms))
    };
    let ms = match (time("reconnect", 1000)?, time("reconnect-ms", 1)?) {
        (Some(_), Some(_)) => {
            return Err(pairs.whole.refuse("reconnect and reconnect-ms exclude each other"));
        }
        (seconds, ms) => seconds.or(ms).unwrap_or(0),
    };
    Ok((ms > 0).then(|| Duration::from_millis(ms)))
}

/// `-chardev udp`.
pub(super) fn udp(pairs: &Pairs) -> Result<CharBackend, UsageError> {
    let families = families(pairs)?;
    let text = |key: &str| pairs.get(key).map(Given::text).transpose();
    let port = pairs.require("port", "port=PORT says where the datagrams go")?;
    let host = text("host")?.unwrap_or("localhost");
    let remote = Inet {
        families,
        ..udp_address(port, host, port.text()?)?
    };
    let local = match (pairs.get("localaddr"), pairs.get("localport")) {
        (None, None) => None,
        (address, port) => {
            let given = port.or(address).unwrap_or(&pairs.whole);
            let address = address.map(Given::text).transpose()?.unwrap_or_default();
            let port = port.map(Given::text).transpose()?.unwrap_or("0");
            Some(Inet {
                families,
                ..udp_address(given, address, port)?
            })
        }
    };
    Ok(CharBackend::Udp { remote, local })
}

/// What follows `udp:`: `[HOST]:PORT[@[LOCAL-HOST]:LOCAL-PORT]`.
pub(super) fn short_udp(given: &Given, text: &str) -> Result<CharBackend, UsageError> {
    let (remote, local) = match text.split_once('@') {
        Some((remote, local)) => (remote, Some(local)),
        None => (text, None),
    };
    let pair = |text: &str| {
        let (host, port) = text.rsplit_once(':').unwrap_or((text, ""));
        udp_address(given, host, port)
    };
    let mut remote = pair(remote)?;
    if remote.host.is_empty() {
        remote.host.push_str("localhost");
    }
    Ok(CharBackend::Udp {
        remote,
        local: local.map(pair).transpose()?,
    })
}

fn udp_address(given: &Given, host: &str, port: &str) -> Result<Inet, UsageError> {
    let port = port.parse::<u16>().ok();
    let port = port.ok_or_else(|| given.refuse("a UDP address is HOST:PORT, and a port is a number up to 65535"))?;
    Ok(Inet::new(without_brackets(host), port))
}

fn unix_path(given: &Given) -> Result<PathBuf, UsageError> {
    let path = given.path()?;
    if path.as_os_str().len() > SOCKET_PATH_BYTES {
        return Err(given.refuse(format!(
            "the path of a Unix socket has at most {SOCKET_PATH_BYTES} bytes"
        )));
    }
    Ok(path)
}
