//! The client's side of the fixed newstyle handshake.

use crate::buffer::Segments;
use crate::nbd::transport::{Reader, Writer};
use crate::nbd::wire::{
    BASE_ALLOCATION, ClientOption, EXPORT_NAME_PADDING, Fields, MAGIC, MAX_OPTION_BYTES, MAX_PAYLOAD_BYTES,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionReply, REPLY_IS_ERROR, export_flag, info, option, push_text, server_flag,
};
use nix::errno::Errno;

/// Most answers that one option may have: a server must end some time.
const MAX_REPLIES: usize = 1024;
/// Longest message of a server that is passed on, characters.
const MAX_MESSAGE: usize = 256;
/// Largest smallest block, bytes.
const MAX_MIN_BLOCK: u32 = 64 << 10;

/// What a server says of its export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its size.
    pub bytes: u64,
    /// [`export_flag`]s.
    pub flags: u16,
    /// Requests start and end on multiples of this many bytes: a power of two.
    pub min_block: u32,
    /// Most bytes of a request with data: a multiple of `min_block`.
    pub max_payload: u32,
    /// Replies are structured.
    pub structured: bool,
    /// The server's number for `base:allocation`.
    pub allocation: Option<u32>,
}

impl ExportInfo {
    /// Whether a flag is set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The stream ended, or did not get on.
    #[error("the NBD server's connection failed: {}", .0.desc())]
    Stream(Errno),
    /// It took too long.
    #[error("the NBD server did not finish the handshake in time")]
    TimedOut,
    /// What it says is not NBD.
    #[error("the NBD server breaks the protocol: {0}")]
    Protocol(&'static str),
    /// An old server.
    #[error("the NBD server does not speak the fixed newstyle protocol")]
    OldStyle,
    /// There is no such export.
    #[error("Requested export not available{0}")]
    NoExport(String),
    /// It wants TLS.
    #[error("Server requires TLS, which Bulkhead does not have{0}")]
    TlsRequired(String),
    /// Another refusal.
    #[error("the NBD server refuses the export ({0})")]
    Refused(String),
}

impl From<Errno> for HandshakeError {
    fn from(errno: Errno) -> Self {
        Self::Stream(errno)
    }
}

use HandshakeError::Protocol;

/// Leads the handshake to its end: what comes next are replies to requests.
///
/// # Errors
/// [`HandshakeError`]: the connection is of no use any more.
pub async fn shake_hands(reader: &mut Reader, writer: &Writer, export: &str) -> Result<ExportInfo, HandshakeError> {
    if u64::from_be_bytes(reader.array().await?) != MAGIC {
        return Err(Protocol("its greeting is not NBD's"));
    }
    if u64::from_be_bytes(reader.array().await?) != OPTION_MAGIC {
        return Err(HandshakeError::OldStyle);
    }
    let flags = u16::from_be_bytes(reader.array().await?);
    if flags & server_flag::FIXED_NEWSTYLE == 0 {
        return Err(HandshakeError::OldStyle);
    }
    let no_zeroes = flags & server_flag::NO_ZEROES;
    let ours = u32::from(server_flag::FIXED_NEWSTYLE | no_zeroes);
    send(writer, &ours.to_be_bytes()).await?;
    let mut shake = Shake { reader, writer };
    let structured = shake.structured_replies().await?;
    let allocation = if structured {
        shake.allocation(export).await?
    } else {
        None
    };
    let mut found = match shake.go(export).await? {
        Some(found) => found,
        None => shake.export_name(export, no_zeroes != 0).await?,
    };
    found.structured = structured;
    found.allocation = allocation;
    check(found)
}

/// What the server says must make sense.
fn check(mut found: ExportInfo) -> Result<ExportInfo, HandshakeError> {
    if !found.has(export_flag::HAS_FLAGS) {
        found.flags = export_flag::HAS_FLAGS;
    }
    if found.bytes > i64::MAX as u64 {
        return Err(Protocol("its export is too large"));
    }
    let min = found.min_block;
    if !min.is_power_of_two() || min > MAX_MIN_BLOCK {
        return Err(Protocol("its smallest block is not a power of two up to 65536"));
    }
    if found.max_payload < min {
        return Err(Protocol("its largest request is smaller than its smallest"));
    }
    found.max_payload = found.max_payload.min(MAX_PAYLOAD_BYTES) / min * min;
    Ok(found)
}

async fn send(writer: &Writer, bytes: &[u8]) -> Result<(), HandshakeError> {
    Ok(writer.send(bytes, Segments::default()).await?)
}

struct Shake<'a> {
    reader: &'a mut Reader,
    writer: &'a Writer,
}

/// An answer to an option.
struct Answer {
    kind: u32,
    data: Vec<u8>,
}

impl Answer {
    fn is(&self, kind: OptionReply) -> bool {
        self.kind == kind.number()
    }

    fn is_error(&self) -> bool {
        self.kind & REPLY_IS_ERROR != 0
    }

    /// What the server says about its error, harmless and short.
    fn message(&self) -> String {
        let text = String::from_utf8_lossy(&self.data);
        let text: String = text.chars().filter(|c| !c.is_control()).take(MAX_MESSAGE).collect();
        if text.is_empty() { text } else { format!(": {text}") }
    }

    fn error(&self) -> HandshakeError {
        match OptionReply::from_number(self.kind) {
            Some(OptionReply::Unknown) => HandshakeError::NoExport(self.message()),
            Some(OptionReply::TlsRequired) => HandshakeError::TlsRequired(self.message()),
            _ => HandshakeError::Refused(format!("error {:#x}{}", self.kind, self.message())),
        }
    }
}

impl Shake<'_> {
    async fn ask(&mut self, what: ClientOption, data: &[u8]) -> Result<(), HandshakeError> {
        send(self.writer, &option(what, data)).await
    }

    async fn answer(&mut self, to: ClientOption) -> Result<Answer, HandshakeError> {
        if u64::from_be_bytes(self.reader.array().await?) != OPTION_REPLY_MAGIC {
            return Err(Protocol("an answer to an option does not begin as one"));
        }
        if u32::from_be_bytes(self.reader.array().await?) != to.number() {
            return Err(Protocol("it answers another option than the one asked"));
        }
        let kind = u32::from_be_bytes(self.reader.array().await?);
        let length = u32::from_be_bytes(self.reader.array().await?) as usize;
        if length > MAX_OPTION_BYTES {
            return Err(Protocol("an answer to an option is too long"));
        }
        let mut data = vec![0; length];
        self.reader.read(&mut data).await?;
        Ok(Answer { kind, data })
    }

    async fn structured_replies(&mut self) -> Result<bool, HandshakeError> {
        self.ask(ClientOption::StructuredReply, &[]).await?;
        let answer = self.answer(ClientOption::StructuredReply).await?;
        if answer.is(OptionReply::TlsRequired) {
            return Err(answer.error());
        }
        if !answer.is_error() && !answer.is(OptionReply::Ack) {
            return Err(Protocol(
                "it answers the wish for structured replies with something else",
            ));
        }
        Ok(answer.is(OptionReply::Ack))
    }

    /// The number of `base:allocation`, where the server has it.
    async fn allocation(&mut self, export: &str) -> Result<Option<u32>, HandshakeError> {
        let mut data = Vec::new();
        push_text(&mut data, export);
        data.extend(1u32.to_be_bytes());
        push_text(&mut data, BASE_ALLOCATION);
        self.ask(ClientOption::SetMetaContext, &data).await?;
        let mut number = None;
        for _ in 0..MAX_REPLIES {
            let answer = self.answer(ClientOption::SetMetaContext).await?;
            if answer.is_error() {
                return Ok(None);
            }
            if answer.is(OptionReply::Ack) {
                return Ok(number);
            }
            let mut fields = Fields(&answer.data);
            match fields.u32() {
                Some(id) if answer.is(OptionReply::MetaContext) => {
                    if fields.0 != BASE_ALLOCATION.as_bytes() || number.replace(id).is_some() {
                        return Err(Protocol("it has metadata contexts that were not asked for"));
                    }
                }
                _ => return Err(Protocol("it answers the wish for metadata with something else")),
            }
        }
        Err(Protocol("it does not come to the end of its metadata contexts"))
    }

    /// Nothing, where the server does not know the option.
    async fn go(&mut self, export: &str) -> Result<Option<ExportInfo>, HandshakeError> {
        let mut data = Vec::new();
        push_text(&mut data, export);
        data.extend(1u16.to_be_bytes());
        data.extend(info::BLOCK_SIZE.to_be_bytes());
        self.ask(ClientOption::Go, &data).await?;
        let mut found = ExportInfo {
            bytes: 0,
            flags: 0,
            min_block: 1,
            max_payload: MAX_PAYLOAD_BYTES,
            structured: false,
            allocation: None,
        };
        let mut has_size = false;
        for _ in 0..MAX_REPLIES {
            let answer = self.answer(ClientOption::Go).await?;
            if answer.is(OptionReply::Unsupported) {
                return Ok(None);
            }
            if answer.is_error() {
                return Err(answer.error());
            }
            if answer.is(OptionReply::Ack) {
                return if has_size {
                    Ok(Some(found))
                } else {
                    Err(Protocol("it does not say how large its export is"))
                };
            }
            if !answer.is(OptionReply::Info) {
                return Err(Protocol("it answers the wish for an export with something else"));
            }
            let short = || Protocol("what it says of its export is too short");
            let mut fields = Fields(&answer.data);
            match fields.u16().ok_or_else(short)? {
                info::EXPORT => {
                    found.bytes = fields.u64().ok_or_else(short)?;
                    found.flags = fields.u16().ok_or_else(short)?;
                    has_size = true;
                }
                info::BLOCK_SIZE => {
                    found.min_block = fields.u32().ok_or_else(short)?;
                    fields.u32().ok_or_else(short)?;
                    found.max_payload = fields.u32().ok_or_else(short)?;
                }
                _ => {}
            }
        }
        Err(Protocol("it does not come to the end of what it says of its export"))
    }

    async fn export_name(&mut self, export: &str, no_zeroes: bool) -> Result<ExportInfo, HandshakeError> {
        self.ask(ClientOption::ExportName, export.as_bytes()).await?;
        let ended = |errno| match errno {
            // The only way in which it can refuse.
            Errno::ECONNRESET => HandshakeError::NoExport(String::new()),
            errno => HandshakeError::Stream(errno),
        };
        let bytes = u64::from_be_bytes(self.reader.array().await.map_err(ended)?);
        let flags = u16::from_be_bytes(self.reader.array().await?);
        if !no_zeroes {
            self.reader.skip(EXPORT_NAME_PADDING as u64).await?;
        }
        Ok(ExportInfo {
            bytes,
            flags,
            min_block: 1,
            max_payload: MAX_PAYLOAD_BYTES,
            structured: false,
            allocation: None,
        })
    }
}
