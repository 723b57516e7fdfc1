//! The frame: a 16-byte little-endian header in front of every packet's body.
//!
//! ```text
//! offset  size  field
//!      0     4  magic "BHIP"
//!      4     2  version
//!      6     2  kind: which message type the body is (see message::Message::KIND)
//!      8     4  length of the body in this packet, bytes
//!     12     2  number of file descriptors in this packet
//!     14     2  flags: bit 0 = more packets of this message follow
//! ```

use crate::IpcError;

/// "BHIP", little endian.
pub const MAGIC: u32 = u32::from_le_bytes(*b"BHIP");
/// Version of the wire format. Helpers and supervisor come from one build, so there is no negotiation.
pub const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 16;
/// Largest packet, header included.
pub const MAX_PACKET_BYTES: usize = 64 * 1024;
/// Largest body of one packet.
pub const MAX_BODY_BYTES: usize = MAX_PACKET_BYTES - HEADER_BYTES;
/// Most file descriptors that one message may carry.
pub const MAX_FDS: usize = 16;

const FLAG_MORE: u16 = 1;

/// A decoded header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Message type of the body.
    pub kind: u16,
    /// Bytes of body in this packet.
    pub body_bytes: usize,
    /// File descriptors in this packet.
    pub fds: usize,
    /// Whether another packet of the same message follows.
    pub more: bool,
}

impl Header {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4..6].copy_from_slice(&VERSION.to_le_bytes());
        out[6..8].copy_from_slice(&self.kind.to_le_bytes());
        out[8..12].copy_from_slice(&(self.body_bytes as u32).to_le_bytes());
        out[12..14].copy_from_slice(&(self.fds as u16).to_le_bytes());
        out[14..16].copy_from_slice(&(if self.more { FLAG_MORE } else { 0 }).to_le_bytes());
        out
    }

    /// Reads a packet's header and returns it with the packet's body.
    ///
    /// # Errors
    /// [`IpcError::Frame`] on a short packet, a wrong magic, version or flag, and when the stated length is not the
    /// packet's.
    pub fn decode(packet: &[u8]) -> Result<(Self, &[u8]), IpcError> {
        let (header, body) = packet
            .split_at_checked(HEADER_BYTES)
            .ok_or(IpcError::Frame("packet shorter than a header"))?;
        let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if u32_at(0) != MAGIC {
            return Err(IpcError::Frame("wrong magic"));
        }
        if u16_at(4) != VERSION {
            return Err(IpcError::Frame("wrong version"));
        }
        let flags = u16_at(14);
        if flags & !FLAG_MORE != 0 {
            return Err(IpcError::Frame("unknown flag"));
        }
        if u32_at(8) as usize != body.len() {
            return Err(IpcError::Frame("length field differs from the packet's length"));
        }
        let header = Self {
            kind: u16_at(6),
            body_bytes: body.len(),
            fds: u16_at(12).into(),
            more: flags & FLAG_MORE != 0,
        };
        if header.fds > MAX_FDS {
            return Err(IpcError::Frame("too many file descriptors"));
        }
        Ok((header, body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_reads_back_as_written(kind: u16, fds in 0..=MAX_FDS, more: bool, body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let header = Header { kind, body_bytes: body.len(), fds, more };
            let packet = [&header.encode()[..], &body].concat();
            let (read, read_body) = Header::decode(&packet).unwrap();
            prop_assert_eq!(read, header);
            prop_assert_eq!(read_body, &body[..]);
        }

        #[test]
        fn arbitrary_bytes_never_panic(packet in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Header::decode(&packet);
        }
    }

    #[test]
    fn a_wrong_length_is_refused() {
        let mut packet = Header {
            kind: 1,
            body_bytes: 4,
            fds: 0,
            more: false,
        }
        .encode()
        .to_vec();
        packet.extend([0; 3]);
        assert!(matches!(Header::decode(&packet), Err(IpcError::Frame(_))));
    }
}
