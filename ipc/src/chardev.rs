//! Types of the commands about character devices.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// chardev-add's `ChardevBackend`: those that can be added to a running machine. In JSON it is a tagged union; messages
/// cannot hold one, because their encoding does not name members, and have an ordinary enum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", tag = "type", content = "data", rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum Backend {
    Null(Plain),
    File(File),
    Pipe(Pipe),
    Pty(Plain),
    Ringbuf(Ringbuf),
}

/// [`Backend`] in messages.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Backend")]
enum InMessage {
    Null(Plain),
    File(File),
    Pipe(Pipe),
    Pty(Plain),
    Ringbuf(Ringbuf),
}

impl Serialize for Backend {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            Self::serialize(self, serializer)
        } else {
            InMessage::serialize(self, serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Backend {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            Self::deserialize(deserializer)
        } else {
            InMessage::deserialize(deserializer)
        }
    }
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
        ] {
            let (bytes, _) = codec::encode(&backend, 1000).unwrap();
            assert_eq!(codec::decode::<Backend>(&bytes, Vec::new(), 1000).unwrap(), backend);
        }
    }
}
