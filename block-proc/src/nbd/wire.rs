//! The bytes of NBD (the public protocol document, `doc/proto.md` of the NBD project): numbers, headers, and how they are
//! read and written. All integers are big-endian. Nothing here reads from a peer or allocates for one.

use nix::errno::Errno;

/// First word of a server: "NBDMAGIC".
pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of a newstyle server, and the first of every option: "IHAVEOPT".
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First word of every answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First word of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First word of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags of a server.
pub mod server_flag {
    /// The fixed newstyle negotiation.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// The 124 zeroes after an export's flags can be left out.
    pub const NO_ZEROES: u16 = 2;
}

/// Most payload of one request, bytes, where nothing else is agreed on.
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;
/// Longest name of an export or of a context, bytes.
pub const MAX_NAME_BYTES: usize = 4096;
/// Longest data of an option: a name, and some lists beside it.
pub const MAX_OPTION_BYTES: usize = 64 << 10;
/// Bytes of zeroes that end the answer to `EXPORT_NAME`.
pub const EXPORT_NAME_PADDING: usize = 124;

macro_rules! numbers {
    ($(#[$doc:meta])* $name:ident: $int:ty { $($(#[$case_doc:meta])* $case:ident = $value:expr,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$case_doc])* $case,)* }

        impl $name {
            /// What a number stands for, if it is known.
            pub fn from_number(number: $int) -> Option<Self> {
                match number {
                    $(value if value == $value => Some(Self::$case),)*
                    _ => None,
                }
            }

            /// Its number.
            pub const fn number(self) -> $int {
                match self { $(Self::$case => $value,)* }
            }
        }
    };
}

numbers! {
    /// Options of a client, in the handshake.
    ClientOption: u32 {
        /// The end of the handshake, without an answer that could refuse.
        ExportName = 1,
        /// Giving up.
        Abort = 2,
        /// Which exports there are.
        List = 3,
        /// TLS, which neither side of ours has.
        StartTls = 5,
        /// What an export is.
        Info = 6,
        /// The end of the handshake.
        Go = 7,
        /// Structured replies.
        StructuredReply = 8,
        /// Which metadata contexts there are.
        ListMetaContext = 9,
        /// Which of them are wanted.
        SetMetaContext = 10,
    }
}

numbers! {
    /// Answers to options.
    OptionReply: u32 {
        /// Done.
        Ack = 1,
        /// One export of the list.
        Server = 2,
        /// One piece of information about an export.
        Info = 3,
        /// One metadata context.
        MetaContext = 4,
        /// The option is not known.
        Unsupported = 0x8000_0001,
        /// The option is not allowed.
        Policy = 0x8000_0002,
        /// The option's data is wrong.
        Invalid = 0x8000_0003,
        /// Not possible on this platform.
        Platform = 0x8000_0004,
        /// Only with TLS.
        TlsRequired = 0x8000_0005,
        /// There is no such export.
        Unknown = 0x8000_0006,
        /// The server ends.
        Shutdown = 0x8000_0007,
        /// Only for clients that ask for the block size.
        BlockSizeRequired = 0x8000_0008,
        /// The option is too long.
        TooBig = 0x8000_0009,
    }
}

/// Set in an option's answer that is an error.
pub const REPLY_IS_ERROR: u32 = 1 << 31;

/// Kinds of information about an export.
pub mod info {
    /// Its size and flags.
    pub const EXPORT: u16 = 0;
    /// Its name.
    pub const NAME: u16 = 1;
    /// Its description.
    pub const DESCRIPTION: u16 = 2;
    /// Its smallest, best and largest request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Flags of an export.
pub mod export_flag {
    #![expect(missing_docs, reason = "the names say it")]
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const ROTATIONAL: u16 = 1 << 4;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

numbers! {
    /// Commands.
    Command: u16 {
        /// Reads.
        Read = 0,
        /// Writes.
        Write = 1,
        /// The end, without an answer.
        Disconnect = 2,
        /// What was written before is on stable storage.
        Flush = 3,
        /// A range is not needed any more.
        Trim = 4,
        /// A range will be read soon.
        Cache = 5,
        /// A range reads as zeroes.
        WriteZeroes = 6,
        /// What is known about a range.
        BlockStatus = 7,
    }
}

/// Flags of commands.
pub mod command_flag {
    /// On stable storage before it is answered.
    pub const FUA: u16 = 1;
    /// Zeroes keep their space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// The answer is one piece.
    pub const DF: u16 = 1 << 2;
    /// One extent for each context.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Zeroes only where that is faster than writing them.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// The last chunk of a reply.
pub const CHUNK_DONE: u16 = 1;

numbers! {
    /// Kinds of chunks.
    Chunk: u16 {
        /// Nothing.
        None = 0,
        /// Bytes at an offset.
        OffsetData = 1,
        /// Zeroes at an offset.
        OffsetHole = 2,
        /// Extents of one context.
        BlockStatus = 5,
        /// An error.
        Error = 0x8001,
        /// An error at an offset.
        ErrorOffset = 0x8002,
    }
}

/// Set in the kind of a chunk that is an error.
pub const CHUNK_IS_ERROR: u16 = 1 << 15;

/// Metadata context: what is allocated, and what reads as zeroes.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Metadata contexts of dirty bitmaps begin with this; the bitmap's name follows.
pub const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
/// Metadata context: how deep in the chain of images something is allocated.
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// `base:allocation`: it has no space.
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: it reads as zeroes.
pub const STATE_ZERO: u32 = 2;
/// `qemu:dirty-bitmap:`: it is dirty.
pub const STATE_DIRTY: u32 = 1;

/// Takes integers off the front of bytes.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The first bytes, if there are so many.
    pub fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(front)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    /// Two bytes.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A length and that much UTF-8 text of at most [`MAX_NAME_BYTES`].
    pub fn text(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok()?;
        if length > MAX_NAME_BYTES {
            return None;
        }
        std::str::from_utf8(self.bytes(length)?).ok()
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A header of an option: magic, number, length.
pub const OPTION_HEADER_BYTES: usize = 16;
/// A header of an answer to an option: magic, option, kind, length.
pub const OPTION_REPLY_HEADER_BYTES: usize = 20;

/// An option with its data.
pub fn option(option: ClientOption, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(OPTION_HEADER_BYTES + data.len());
    bytes.extend(OPTION_MAGIC.to_be_bytes());
    bytes.extend(option.number().to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// An answer to an option, with its data. The option may be one that is not known.
pub fn option_reply(option: u32, reply: OptionReply, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(OPTION_REPLY_HEADER_BYTES + data.len());
    bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    bytes.extend(option.to_be_bytes());
    bytes.extend(reply.number().to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// Text after its length.
pub fn push_text(into: &mut Vec<u8>, text: &str) {
    into.extend((text.len() as u32).to_be_bytes());
    into.extend(text.as_bytes());
}

/// Bytes of a request's header.
pub const REQUEST_BYTES: usize = 28;

/// A request's header. Its numbers are the peer's: the command may be unknown, the range anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// [`command_flag`]s.
    pub flags: u16,
    /// See [`Command`].
    pub command: u16,
    /// The client's name for it.
    pub cookie: u64,
    /// Where, bytes.
    pub offset: u64,
    /// How much, bytes.
    pub length: u32,
}

impl Request {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// Reads one; nothing when it is no request.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return None;
        }
        Some(Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?,
        })
    }
}

/// Bytes of a simple reply's header.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes of the header of a chunk.
pub const CHUNK_BYTES: usize = 20;

/// A simple reply's header.
pub fn simple_reply(cookie: u64, error: u32) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut bytes = [0; SIMPLE_REPLY_BYTES];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// The header of a chunk of a structured reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// [`CHUNK_DONE`].
    pub flags: u16,
    /// See [`Chunk`].
    pub kind: u16,
    /// As in the request.
    pub cookie: u64,
    /// Bytes that follow.
    pub length: u32,
}

impl ChunkHeader {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; CHUNK_BYTES] {
        let mut bytes = [0; CHUNK_BYTES];
        bytes[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }
}

/// The header of a reply, of either kind. Both begin alike: 16 bytes tell which it is, a chunk has four more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply.
    Simple {
        /// Whose.
        cookie: u64,
        /// 0, or what went wrong.
        error: u32,
    },
    /// A chunk, but for its length.
    Chunk {
        /// [`CHUNK_DONE`].
        flags: u16,
        /// See [`Chunk`].
        kind: u16,
        /// Whose.
        cookie: u64,
    },
}

impl ReplyHeader {
    /// Reads the first bytes of one; nothing when it is no reply.
    pub fn decode(bytes: &[u8; SIMPLE_REPLY_BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        match fields.u32()? {
            SIMPLE_REPLY_MAGIC => Some(Self::Simple {
                error: fields.u32()?,
                cookie: fields.u64()?,
            }),
            CHUNK_MAGIC => Some(Self::Chunk {
                flags: fields.u16()?,
                kind: fields.u16()?,
                cookie: fields.u64()?,
            }),
            _ => None,
        }
    }
}

/// The errors that the protocol has, by their numbers, which are Linux's.
const ERRORS: [Errno; 8] = [
    Errno::EPERM,
    Errno::EIO,
    Errno::ENOMEM,
    Errno::EINVAL,
    Errno::ENOSPC,
    Errno::EOVERFLOW,
    Errno::EOPNOTSUPP,
    Errno::ESHUTDOWN,
];

/// The number for an error; what the protocol does not have becomes one that it has.
pub fn error_number(errno: Errno) -> u32 {
    let known = match errno {
        Errno::EROFS | Errno::EACCES => Errno::EPERM,
        Errno::EDQUOT | Errno::EFBIG => Errno::ENOSPC,
        errno if ERRORS.contains(&errno) => errno,
        _ => Errno::EIO,
    };
    known as i32 as u32
}

/// What an error's number means. Unknown ones are EINVAL, as the protocol wants; 0 is none.
pub fn error_of(number: u32) -> Option<Errno> {
    match number {
        0 => None,
        number => Some(
            ERRORS
                .into_iter()
                .find(|errno| *errno as i32 as u32 == number)
                .unwrap_or(Errno::EINVAL),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_come_back_as_they_were_written(
            flags: u16, command: u16, cookie: u64, offset: u64, length: u32, error: u32,
        ) {
            let request = Request { flags, command, cookie, offset, length };
            prop_assert_eq!(Request::decode(&request.encode()), Some(request));
            let simple = ReplyHeader::decode(&simple_reply(cookie, error));
            prop_assert_eq!(simple, Some(ReplyHeader::Simple { cookie, error }));
            let chunk = ChunkHeader { flags, kind: command, cookie, length }.encode();
            let first: [u8; SIMPLE_REPLY_BYTES] = chunk[..SIMPLE_REPLY_BYTES].try_into().unwrap();
            prop_assert_eq!(ReplyHeader::decode(&first), Some(ReplyHeader::Chunk { flags, kind: command, cookie }));
            prop_assert_eq!(&chunk[SIMPLE_REPLY_BYTES..], length.to_be_bytes());
        }

        #[test]
        fn other_bytes_are_no_headers(mut bytes: [u8; REQUEST_BYTES]) {
            bytes[0] = 0;
            prop_assert_eq!(Request::decode(&bytes), None);
            prop_assert_eq!(ReplyHeader::decode(&bytes[..SIMPLE_REPLY_BYTES].try_into().unwrap()), None);
        }

        #[test]
        fn fields_never_go_past_the_end(bytes: Vec<u8>) {
            let mut fields = Fields(&bytes);
            while let Some(text) = fields.text() {
                prop_assert!(text.len() <= bytes.len());
            }
            let before = fields.0.len();
            if fields.u64().is_none() {
                prop_assert!(before < 8);
            }
        }
    }

    #[test]
    fn a_name_that_is_longer_than_a_name_may_be_is_none() {
        let mut long = Vec::new();
        push_text(&mut long, &"x".repeat(MAX_NAME_BYTES));
        assert!(Fields(&long).text().is_some());
        long.clear();
        push_text(&mut long, &"x".repeat(MAX_NAME_BYTES + 1));
        assert!(Fields(&long).text().is_none());
        assert!(Fields(&u32::MAX.to_be_bytes()).text().is_none());
    }

    #[test]
    fn errors_are_those_of_the_protocol() {
        for errno in ERRORS {
            assert_eq!(error_of(error_number(errno)), Some(errno));
        }
        assert_eq!(error_number(Errno::EDQUOT), 28);
        assert_eq!(error_number(Errno::ENOTTY), 5);
        assert_eq!((error_of(0), error_of(7)), (None, Some(Errno::EINVAL)));
    }

    #[test]
    fn numbers_stand_for_what_they_stand_for() {
        for number in 0..16 {
            if let Some(command) = Command::from_number(number) {
                assert_eq!(command.number(), number);
            }
        }
        assert_eq!(ClientOption::from_number(4), None);
        assert_eq!(OptionReply::from_number(0x8000_0006), Some(OptionReply::Unknown));
    }
}
