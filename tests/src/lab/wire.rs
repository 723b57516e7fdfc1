//! What the host and the agent in the lab say to each other over a virtio serial port.
//!
//! One frame: the length of a JSON header, the length of a payload (both 32-bit little-endian), header, payload.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::io::{self, Read, Write};

/// Largest payload: files travel in pieces.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// Who a command runs as in the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum User {
    /// uid 0.
    Root,
    /// uid 1000, in group kvm, with subordinate ids.
    Tester,
}

/// Asks the agent. Every request but `Data` and `Signal` is answered under its id.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToAgent {
    /// Runs a shell script: `Started`, later `Ended`.
    Run {
        /// Chosen by the host.
        id: u32,
        /// For `sh -c`.
        script: String,
        /// Who runs it.
        user: User,
    },
    /// Signals the process group of a script.
    Signal {
        /// That of `Run`.
        id: u32,
        /// Number.
        signal: i32,
    },
    /// Writes the payload into a file, creating it.
    Write {
        /// Chosen by the host.
        id: u32,
        /// Absolute.
        path: String,
        /// In bytes.
        offset: u64,
        /// Permission bits of a new file.
        mode: u32,
        /// The file's size afterwards, if it is to be set.
        size: Option<u64>,
    },
    /// Reads a part of a file: `Content`.
    Read {
        /// Chosen by the host.
        id: u32,
        /// Absolute.
        path: String,
        /// In bytes.
        offset: u64,
        /// At most [`MAX_PAYLOAD`].
        length: u32,
    },
    /// Connects to a socket in the lab; bytes then go both ways as `Data`.
    Connect {
        /// Chosen by the host.
        id: u32,
        /// Absolute.
        path: String,
    },
    /// The payload goes to the connection; an empty one closes the sending side.
    Data {
        /// That of `Connect`.
        id: u32,
    },
}

/// Answers and events.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromAgent {
    /// A script runs.
    Started {
        /// That of `Run`.
        id: u32,
        /// Its shell's process id.
        pid: u32,
    },
    /// A script ended; the payload is its standard output, then its standard error.
    Ended {
        /// That of `Run`.
        id: u32,
        /// Exit status, or 128 and the signal, as shells count.
        status: i32,
        /// How much of the payload is standard output.
        output_length: u32,
    },
    /// Done.
    Done {
        /// That of the request.
        id: u32,
    },
    /// A part of a file is the payload; shorter than asked for at its end.
    Content {
        /// That of `Read`.
        id: u32,
        /// Size of the whole file in bytes.
        size: u64,
    },
    /// It did not work.
    Failed {
        /// That of the request.
        id: u32,
        /// Why.
        error: String,
    },
    /// Bytes from a connection; an empty payload: its end.
    Data {
        /// That of `Connect`.
        id: u32,
    },
}

/// Writes one frame.
pub fn send(to: &mut impl Write, header: &impl Serialize, payload: &[u8]) -> io::Result<()> {
    let header = serde_json::to_vec(header)?;
    let mut frame = Vec::with_capacity(8 + header.len() + payload.len());
    frame.extend_from_slice(&(header.len() as u32).to_le_bytes());
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(&header);
    frame.extend_from_slice(payload);
    to.write_all(&frame)?;
    to.flush()
}

/// Reads one frame; `None` at the end.
pub fn receive<Header: DeserializeOwned>(from: &mut impl Read) -> io::Result<Option<(Header, Vec<u8>)>> {
    let mut lengths = [0; 8];
    match from.read_exact(&mut lengths) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let header_length = u32::from_le_bytes(lengths[..4].try_into().expect("four bytes"));
    let payload_length = u32::from_le_bytes(lengths[4..].try_into().expect("four bytes"));
    let mut header = vec![0; header_length as usize];
    from.read_exact(&mut header)?;
    let mut payload = vec![0; payload_length as usize];
    from.read_exact(&mut payload)?;
    Ok(Some((serde_json::from_slice(&header)?, payload)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_was_sent() {
        let mut bytes = Vec::new();
        send(&mut bytes, &FromAgent::Started { id: 7, pid: 8 }, b"payload").unwrap();

        let (header, payload) = receive::<FromAgent>(&mut &bytes[..]).unwrap().unwrap();

        assert!(matches!(header, FromAgent::Started { id: 7, pid: 8 }));
        assert_eq!(payload, b"payload");
        assert!(receive::<FromAgent>(&mut &[][..]).unwrap().is_none());
    }
}
