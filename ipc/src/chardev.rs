//! Types of the commands about character devices.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// chardev-add's `ChardevBackend`: those that can be added to a running machine. In JSON it is a tagged union; messages
/// cannot hold one, because their encoding does not name members, and have an ordinary enum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", tag = "type", content = "data", rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum Backend {
    File(File),
    Pipe(Pipe),
    Socket(Socket),
    Udp(Udp),
    Pty(Plain),
    Null(Plain),
    Stdio(Stdio),
    Ringbuf(Ringbuf),
}

/// The names of [`Backend`]'s variants, in QEMU's order: what chardev-add takes and query-chardev-backends lists.
pub const BACKENDS: &[&str] = &["file", "pipe", "socket", "udp", "pty", "null", "stdio", "ringbuf"];

/// [`Backend`] in messages.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Backend")]
enum BackendInMessage {
    File(File),
    Pipe(Pipe),
    Socket(Socket),
    Udp(Udp),
    Pty(Plain),
    Null(Plain),
    Stdio(Stdio),
    Ringbuf(Ringbuf),
}

macro_rules! tagged_in_json {
    ($json:ident, $in_message:ident) => {
        impl Serialize for $json {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    Self::serialize(self, serializer)
                } else {
                    $in_message::serialize(self, serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $json {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    Self::deserialize(deserializer)
                } else {
                    $in_message::deserialize(deserializer)
                }
            }
        }
    };
}

tagged_in_json!(Backend, BackendInMessage);
tagged_in_json!(Address, AddressInMessage);

/// QMP's `SocketAddressLegacy`; a tagged union as well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", tag = "type", content = "data", rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum Address {
    Inet(Inet),
    Unix(Unix),
    Fd(Fd),
}

/// [`Address`] in messages.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Address")]
enum AddressInMessage {
    Inet(Inet),
    Unix(Unix),
    Fd(Fd),
}

/// QMP's `InetSocketAddress`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Inet {
    /// A name or a number.
    pub host: String,
    /// The port as a text.
    pub port: String,
    /// Whether the host has to be a number.
    pub numeric: Option<bool>,
    /// The last port that a server tries.
    pub to: Option<u16>,
    /// Whether IPv4 is meant.
    pub ipv4: Option<bool>,
    /// Whether IPv6 is meant.
    pub ipv6: Option<bool>,
    /// Whether a silent peer is asked now and then.
    pub keep_alive: Option<bool>,
}

/// QMP's `UnixSocketAddress`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unix {
    /// Where it is in the file system.
    pub path: String,
}

/// QMP's `FdSocketAddress`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fd {
    /// What getfd has called it.
    #[serde(rename = "str")]
    pub name: String,
}

/// QMP's `ChardevSocket`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Socket {
    /// Where it listens, or what it connects to.
    pub addr: Address,
    /// Whether it listens (by default).
    pub server: Option<bool>,
    /// Whether the command waits for the first client.
    pub wait: Option<bool>,
    /// Whether small pieces are sent at once.
    pub nodelay: Option<bool>,
    /// Only `false` is possible.
    pub telnet: Option<bool>,
    /// Seconds until a connection that has ended is tried again; 0: never.
    pub reconnect: Option<i64>,
    /// The same in milliseconds.
    pub reconnect_ms: Option<i64>,
}

/// QMP's `ChardevUdp`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Udp {
    /// The peer.
    pub remote: Address,
    /// What it is bound to.
    pub local: Option<Address>,
}

/// QMP's `ChardevStdio`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stdio {
    /// Whether ^C on the terminal ends the machine.
    pub signal: Option<bool>,
}

/// A backend without properties.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plain {}

/// QMP's `ChardevFile`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Where input comes from.
    #[serde(rename = "in")]
    pub input: Option<String>,
    /// Where output goes to.
    #[serde(rename = "out")]
    pub output: String,
    /// Whether what the file holds is kept.
    pub append: Option<bool>,
}

/// QMP's `ChardevHostdev` for a pipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipe {
    /// The FIFO, or what the names of two FIFOs have in common.
    pub device: String,
}

/// QMP's `ChardevRingbuf`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ringbuf {
    /// Bytes: a power of two.
    pub size: Option<i64>,
}

/// How the bytes of a ring buffer stand in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataFormat {
    /// As they are.
    Utf8,
    /// As Base64.
    Base64,
}

/// chardev-add's `ChardevReturn`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChardevReturn {
    /// The name of the pseudo-terminal.
    pub pty: Option<String>,
}

/// query-chardev's `ChardevInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChardevInfo {
    /// Its id.
    pub label: String,
    /// What is behind it.
    pub filename: String,
    /// Whether a serial port or a monitor uses it.
    pub frontend_open: bool,
}

/// query-chardev-backends's `ChardevBackendInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChardevBackendInfo {
    /// Its name.
    pub name: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec;

    fn inet() -> Address {
        Address::Inet(Inet {
            host: "h".into(),
            port: "1".into(),
            numeric: None,
            to: Some(2),
            ipv4: Some(true),
            ipv6: None,
            keep_alive: None,
        })
    }

    #[test]
    fn every_backend_arrives_as_it_was_sent() {
        for backend in [
            Backend::Null(Plain {}),
            Backend::Pty(Plain {}),
            Backend::File(File {
                input: None,
                output: "/o".into(),
                append: Some(true),
            }),
            Backend::Pipe(Pipe { device: "/p".into() }),
            Backend::Ringbuf(Ringbuf { size: Some(8) }),
            Backend::Stdio(Stdio { signal: Some(false) }),
            Backend::Udp(Udp {
                remote: inet(),
                local: None,
            }),
            Backend::Socket(Socket {
                addr: Address::Unix(Unix { path: "/s".into() }),
                server: Some(false),
                wait: None,
                nodelay: None,
                telnet: Some(false),
                reconnect: None,
                reconnect_ms: Some(7),
            }),
            Backend::Udp(Udp {
                remote: inet(),
                local: Some(Address::Fd(Fd { name: "n".into() })),
            }),
        ] {
            let (bytes, _) = codec::encode(&backend, 1000).unwrap();
            assert_eq!(codec::decode::<Backend>(&bytes, Vec::new(), 1000).unwrap(), backend);
        }
    }
}
