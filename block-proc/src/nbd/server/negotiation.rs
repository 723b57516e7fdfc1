//! The server's side of the handshake: a client looks around and chooses an export.

use super::hub::{Hub, Published};
use crate::buffer::Segments;
use crate::nbd::transport::{Reader, Writer};
use crate::nbd::wire::{
    BASE_ALLOCATION, ClientOption, DIRTY_BITMAP, EXPORT_NAME_PADDING, Fields, MAGIC, MAX_NAME_BYTES, MAX_OPTION_BYTES,
    MAX_PAYLOAD_BYTES, OPTION_MAGIC, OptionReply, export_flag, info, option_reply, push_text, server_flag,
};
use ipc::nbd::ExportNumber;
use ipc::virtio::IoThreadIndex;
use nix::errno::Errno;

/// Bytes of an option that is too long which are passed over; a client that sends more is hung up on.
const MAX_SKIPPED_BYTES: u32 = 32 << 20;
/// What requests should be multiples of, bytes.
const PREFERRED_BYTES: u32 = 64 << 10;

/// What a client has chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// The export.
    pub export: ExportNumber,
    /// Where its node lives.
    pub thread: IoThreadIndex,
    /// Replies are structured.
    pub structured: bool,
    /// The names of the metadata contexts that it wants: each one's number is its place.
    pub contexts: Vec<String>,
}

/// Why a client has not got to the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It hung up, or was hung up on.
    Stream(Errno),
    /// It said goodbye.
    Abort,
    /// It does not keep to the protocol.
    Protocol,
    /// It asked, in the old way that knows no refusal, for an export that is not there.
    NoExport,
}

impl From<Errno> for Ended {
    fn from(errno: Errno) -> Self {
        Self::Stream(errno)
    }
}

/// Leads the handshake with a client to its end.
///
/// # Errors
/// [`Ended`]: hang up.
pub async fn negotiate(reader: &mut Reader, writer: &Writer, hub: &Hub) -> Result<Session, Ended> {
    let flags = server_flag::FIXED_NEWSTYLE | server_flag::NO_ZEROES;
    let hello = [
        &MAGIC.to_be_bytes()[..],
        &OPTION_MAGIC.to_be_bytes(),
        &flags.to_be_bytes(),
    ]
    .concat();
    writer.send(&hello, Segments::default()).await?;
    let client = u32::from_be_bytes(reader.array().await?);
    if client & !u32::from(flags) != 0 {
        return Err(Ended::Protocol);
    }
    let mut negotiation = Negotiation {
        reader,
        writer,
        hub,
        is_fixed: client & u32::from(server_flag::FIXED_NEWSTYLE) != 0,
        no_zeroes: client & u32::from(server_flag::NO_ZEROES) != 0,
        structured: false,
        contexts: None,
    };
    loop {
        if let Some(session) = negotiation.option().await? {
            return Ok(session);
        }
    }
}

struct Negotiation<'a> {
    reader: &'a mut Reader,
    writer: &'a Writer,
    hub: &'a Hub,
    is_fixed: bool,
    no_zeroes: bool,
    structured: bool,
    /// The export for which contexts were chosen, and which.
    contexts: Option<(String, Vec<String>)>,
}

/// An option whose data is wrong, or that cannot be.
struct Refusal(OptionReply, &'static str);

impl Negotiation<'_> {
    async fn reply(&self, option: u32, kind: OptionReply, data: &[u8]) -> Result<(), Ended> {
        let reply = option_reply(option, kind, data);
        Ok(self.writer.send(&reply, Segments::default()).await?)
    }

    /// The next option; the session, if it was the last.
    async fn option(&mut self) -> Result<Option<Session>, Ended> {
        if u64::from_be_bytes(self.reader.array().await?) != OPTION_MAGIC {
            return Err(Ended::Protocol);
        }
        let number = u32::from_be_bytes(self.reader.array().await?);
        let length = u32::from_be_bytes(self.reader.array().await?);
        let option = ClientOption::from_number(number);
        if !self.is_fixed && option != Some(ClientOption::ExportName) {
            return Err(Ended::Protocol);
        }
        if length as usize > MAX_OPTION_BYTES {
            if length > MAX_SKIPPED_BYTES || option == Some(ClientOption::ExportName) {
                return Err(Ended::Protocol);
            }
            self.reader.skip(u64::from(length)).await?;
            self.reply(number, OptionReply::TooBig, b"option is too long").await?;
            return Ok(None);
        }
        let mut data = vec![0; length as usize];
        self.reader.read(&mut data).await?;
        let done = match option {
            Some(ClientOption::ExportName) => return self.export_name(&data).await.map(Some),
            Some(ClientOption::Abort) => {
                let _ = self.reply(number, OptionReply::Ack, &[]).await;
                return Err(Ended::Abort);
            }
            Some(ClientOption::Go) => match self.information(number, &data).await? {
                Ok((name, known)) => {
                    self.reply(number, OptionReply::Ack, &[]).await?;
                    return Ok(Some(self.session(&name, &known)));
                }
                Err(refusal) => Err(refusal),
            },
            Some(ClientOption::Info) => self.information(number, &data).await?.map(drop),
            Some(ClientOption::List) => self.list(number, &data).await?,
            Some(ClientOption::StructuredReply) if !data.is_empty() => {
                Err(Refusal(OptionReply::Invalid, "option has no data"))
            }
            Some(ClientOption::StructuredReply) if self.structured => {
                Err(Refusal(OptionReply::Invalid, "structured reply already negotiated"))
            }
            Some(ClientOption::StructuredReply) => {
                self.structured = true;
                Ok(())
            }
            Some(ClientOption::ListMetaContext) => self.list_contexts(number, &data).await?,
            Some(ClientOption::SetMetaContext) => self.set_contexts(number, &data).await?,
            Some(ClientOption::StartTls) => Err(Refusal(OptionReply::Policy, "TLS not configured")),
            None => Err(Refusal(OptionReply::Unsupported, "Unsupported option")),
        };
        match done {
            Ok(()) => self.reply(number, OptionReply::Ack, &[]).await?,
            Err(Refusal(kind, text)) => self.reply(number, kind, text.as_bytes()).await?,
        }
        Ok(None)
    }

    fn session(&mut self, name: &str, known: &Published) -> Session {
        let chosen = self.contexts.take().filter(|(export, _)| export == name);
        Session {
            export: known.export,
            thread: known.thread,
            structured: self.structured,
            contexts: chosen.map(|(_, contexts)| contexts).unwrap_or_default(),
        }
    }

    fn flags(&self, known: &Published) -> u16 {
        if self.structured {
            known.flags | export_flag::SEND_DF
        } else {
            known.flags
        }
    }

    async fn export_name(&mut self, data: &[u8]) -> Result<Session, Ended> {
        let name = std::str::from_utf8(data).map_err(|_| Ended::Protocol)?;
        let known = self.hub.find(name).ok_or(Ended::NoExport)?;
        let mut answer = known.bytes.to_be_bytes().to_vec();
        answer.extend(self.flags(&known).to_be_bytes());
        if !self.no_zeroes {
            answer.resize(answer.len() + EXPORT_NAME_PADDING, 0);
        }
        self.writer.send(&answer, Segments::default()).await?;
        Ok(self.session(name, &known))
    }

    async fn list(&mut self, number: u32, data: &[u8]) -> Result<Result<(), Refusal>, Ended> {
        if !data.is_empty() {
            return Ok(Err(Refusal(OptionReply::Invalid, "option has no data")));
        }
        for (name, description) in self.hub.list() {
            let mut entry = Vec::new();
            push_text(&mut entry, &name);
            entry.extend(description.unwrap_or_default().as_bytes());
            self.reply(number, OptionReply::Server, &entry).await?;
        }
        Ok(Ok(()))
    }

    /// `INFO` and `GO`, but for the last word.
    async fn information(&mut self, number: u32, data: &[u8]) -> Result<Result<(String, Published), Refusal>, Ended> {
        let invalid = Refusal(OptionReply::Invalid, "malformed request for an export");
        let mut fields = Fields(data);
        let (Some(name), Some(count)) = (fields.text(), fields.u16()) else {
            return Ok(Err(invalid));
        };
        if fields.0.len() != usize::from(count) * 2 {
            return Ok(Err(invalid));
        }
        let mut wanted = Vec::new();
        while let Some(kind) = fields.u16() {
            // Each counts once, however often it is asked for.
            if !wanted.contains(&kind) && kind <= info::BLOCK_SIZE {
                wanted.push(kind);
            }
        }
        let Some(known) = self.hub.find(name) else {
            return Ok(Err(Refusal(OptionReply::Unknown, "export not present")));
        };
        for kind in wanted {
            match (kind, &known.description) {
                (info::NAME, _) => {
                    let data = [&info::NAME.to_be_bytes()[..], name.as_bytes()].concat();
                    self.reply(number, OptionReply::Info, &data).await?;
                }
                (info::DESCRIPTION, Some(description)) => {
                    let data = [&info::DESCRIPTION.to_be_bytes()[..], description.as_bytes()].concat();
                    self.reply(number, OptionReply::Info, &data).await?;
                }
                _ => {}
            }
        }
        let mut blocks = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for bytes in [known.min_block, PREFERRED_BYTES, MAX_PAYLOAD_BYTES] {
            blocks.extend(bytes.to_be_bytes());
        }
        self.reply(number, OptionReply::Info, &blocks).await?;
        let mut export = info::EXPORT.to_be_bytes().to_vec();
        export.extend(known.bytes.to_be_bytes());
        export.extend(self.flags(&known).to_be_bytes());
        self.reply(number, OptionReply::Info, &export).await?;
        Ok(Ok((name.to_owned(), known)))
    }

    /// The export's name, and what contexts are asked for.
    fn queries<'a>(&self, data: &'a [u8]) -> Result<(&'a str, Published, Vec<&'a str>), Refusal> {
        if !self.structured {
            return Err(Refusal(
                OptionReply::Invalid,
                "request option when structured reply is not negotiated",
            ));
        }
        let invalid = || Refusal(OptionReply::Invalid, "malformed query of contexts");
        let mut fields = Fields(data);
        let name = fields.text().ok_or_else(invalid)?;
        let count = fields.u32().ok_or_else(invalid)?;
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(fields.text().ok_or_else(invalid)?);
        }
        if !fields.is_empty() {
            return Err(invalid());
        }
        let known = self.hub.find(name);
        let known = known.ok_or(Refusal(OptionReply::Unknown, "export not present"))?;
        Ok((name, known, queries))
    }

    async fn list_contexts(&mut self, number: u32, data: &[u8]) -> Result<Result<(), Refusal>, Ended> {
        let (_, known, queries) = match self.queries(data) {
            Ok(queries) => queries,
            Err(refusal) => return Ok(Err(refusal)),
        };
        for context in &known.contexts {
            let is_meant = |query: &&str| *query == context || is_wildcard(query) && context.starts_with(query);
            if queries.is_empty() || queries.iter().any(is_meant) {
                let data = [&0_u32.to_be_bytes()[..], context.as_bytes()].concat();
                self.reply(number, OptionReply::MetaContext, &data).await?;
            }
        }
        Ok(Ok(()))
    }

    async fn set_contexts(&mut self, number: u32, data: &[u8]) -> Result<Result<(), Refusal>, Ended> {
        self.contexts = None;
        let (name, known, queries) = match self.queries(data) {
            Ok(queries) => queries,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let chosen: Vec<String> = known
            .contexts
            .into_iter()
            .filter(|context| queries.contains(&context.as_str()))
            .collect();
        for (id, context) in (0_u32..).zip(&chosen) {
            let data = [&id.to_be_bytes()[..], context.as_bytes()].concat();
            self.reply(number, OptionReply::MetaContext, &data).await?;
        }
        self.contexts = Some((name.to_owned(), chosen));
        Ok(Ok(()))
    }
}

/// What stands for all that begin so, in a list.
fn is_wildcard(query: &str) -> bool {
    let base = BASE_ALLOCATION.split_inclusive(':').next().unwrap_or_default();
    query == base || query == "qemu:" || query == DIRTY_BITMAP
}

/// Whether a name can be that of an export.
pub fn is_name(name: &str) -> bool {
    name.len() <= MAX_NAME_BYTES && !name.contains('\0')
}
