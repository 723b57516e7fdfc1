//! Requests on one connection: sent one after the other, answered in any order.

use super::covered::Covered;
use super::handshake::ExportInfo;
use crate::buffer::Segments;
use crate::executor::spawner::Waiters;
use crate::executor::timer::Timers;
use crate::nbd::transport::{Reader, Transport, Writer};
use crate::nbd::wire::{
    CHUNK_DONE, CHUNK_IS_ERROR, Chunk, Command, Fields, ReplyHeader, Request, SIMPLE_REPLY_BYTES, error_of,
};
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

/// Most requests under way; more wait here.
const MAX_UNDER_WAY: usize = 64;
/// A server that has said nothing for this long although it owes answers is given up.
const SILENCE: Duration = Duration::from_secs(240);
/// How often that is looked at.
const LOOK: Duration = Duration::from_secs(5);
/// Longest payload of a chunk that is no data, bytes.
const MAX_SMALL_CHUNK: u32 = 64 << 10;

/// Why a request was not answered well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failed {
    /// The server's word.
    Refused(Errno),
    /// There is no connection any more. What became of the request is unknown; it may be made again.
    Lost,
}

/// What is under way.
enum Wanted {
    /// Data, to here.
    Data { into: Segments, covered: Covered },
    /// The first extent of this context.
    Extent { context: u32, found: Option<(u32, u32)> },
    /// That it is done.
    Done,
}

struct UnderWay {
    wanted: Wanted,
    offset: u64,
    length: u32,
    error: Option<Errno>,
    /// The last of its answers has arrived.
    is_over: bool,
    waker: Option<Waker>,
}

/// See the module.
pub struct Connection {
    /// What the server said of its export.
    pub info: ExportInfo,
    transport: Rc<dyn Transport>,
    writer: Writer,
    under_way: RefCell<BTreeMap<u64, UnderWay>>,
    next_cookie: Cell<u64>,
    /// Nothing more comes.
    lost: Cell<bool>,
    changed: Waiters,
    /// When the server said something last, or began to owe something.
    heard: Cell<Instant>,
}

/// Hangs up on a server that owes answers and is silent: for a task of its own.
pub async fn watch(connection: Weak<Connection>, timers: Rc<Timers>) {
    loop {
        timers.sleep_until(Instant::now() + LOOK).await;
        let Some(connection) = connection.upgrade().filter(|connection| !connection.is_lost()) else {
            return;
        };
        if !connection.under_way.borrow().is_empty() && connection.heard.get().elapsed() > SILENCE {
            connection.transport.close();
        }
    }
}

/// A server that does not keep to the protocol.
struct Violation;

impl From<Errno> for Violation {
    fn from(_: Errno) -> Self {
        Self
    }
}

impl Connection {
    /// A connection after its handshake. Run [`Self::receive`] for it.
    pub fn new(info: ExportInfo, transport: Rc<dyn Transport>, writer: Writer) -> Rc<Self> {
        Rc::new(Self {
            info,
            transport,
            writer,
            under_way: RefCell::default(),
            next_cookie: Cell::new(1),
            lost: Cell::new(false),
            changed: Waiters::default(),
            heard: Cell::new(Instant::now()),
        })
    }

    /// Whether nothing can be asked any more.
    pub fn is_lost(&self) -> bool {
        self.lost.get() || self.transport.is_closed()
    }

    /// Says goodbye. Nothing may be under way.
    pub async fn disconnect(&self) {
        let request = Request {
            flags: 0,
            command: Command::Disconnect.number(),
            cookie: 0,
            offset: 0,
            length: 0,
        };
        let _ = self.writer.send(&request.encode(), Segments::default()).await;
        self.transport.close();
    }

    /// Ends it at once.
    pub fn close(&self) {
        self.transport.close();
    }

    /// Reads into `into`, all of it: at most [`ExportInfo::max_payload`].
    ///
    /// # Errors
    /// [`Failed`].
    pub async fn read(&self, offset: u64, into: Segments) -> Result<(), Failed> {
        let length = into.bytes() as u32;
        let covered = Covered::default();
        let wanted = Wanted::Data { into, covered };
        let empty = Segments::default();
        self.ask(Command::Read, 0, offset, length, empty, wanted)
            .await
            .map(drop)
    }

    /// Writes: at most [`ExportInfo::max_payload`].
    ///
    /// # Errors
    /// [`Failed`].
    pub async fn write(&self, flags: u16, offset: u64, from: Segments) -> Result<(), Failed> {
        let length = from.bytes() as u32;
        self.ask(Command::Write, flags, offset, length, from, Wanted::Done)
            .await
            .map(drop)
    }

    /// A command without data.
    ///
    /// # Errors
    /// [`Failed`].
    pub async fn plain(&self, command: Command, flags: u16, offset: u64, length: u32) -> Result<(), Failed> {
        self.ask(command, flags, offset, length, Segments::default(), Wanted::Done)
            .await
            .map(drop)
    }

    /// The first extent of a range in a context: its length and flags.
    ///
    /// # Errors
    /// [`Failed`].
    pub async fn extent(&self, context: u32, flags: u16, offset: u64, length: u32) -> Result<(u32, u32), Failed> {
        let found = None;
        let wanted = Wanted::Extent { context, found };
        let empty = Segments::default();
        match self
            .ask(Command::BlockStatus, flags, offset, length, empty, wanted)
            .await?
        {
            Wanted::Extent { found: Some(found), .. } => Ok(found),
            _ => Err(Failed::Refused(Errno::EIO)),
        }
    }

    async fn ask(
        &self,
        command: Command,
        flags: u16,
        offset: u64,
        length: u32,
        payload: Segments,
        wanted: Wanted,
    ) -> Result<Wanted, Failed> {
        self.changed
            .until(|| (self.is_lost() || self.under_way.borrow().len() < MAX_UNDER_WAY).then_some(()))
            .await;
        if self.is_lost() {
            return Err(Failed::Lost);
        }
        let cookie = self.next_cookie.get();
        self.next_cookie.set(cookie + 1);
        if self.under_way.borrow().is_empty() {
            self.heard.set(Instant::now());
        }
        let new = UnderWay {
            wanted,
            offset,
            length,
            error: None,
            is_over: false,
            waker: None,
        };
        self.under_way.borrow_mut().insert(cookie, new);
        let request = Request {
            flags,
            command: command.number(),
            cookie,
            offset,
            length,
        };
        if self.writer.send(&request.encode(), payload).await.is_err() {
            self.transport.close();
        }
        // Also after a failure: the receiving task may be at work on our memory.
        poll_fn(|context| match self.under_way.borrow_mut().get_mut(&cookie) {
            Some(request) if !request.is_over && !self.lost.get() => {
                request.waker = Some(context.waker().clone());
                Poll::Pending
            }
            _ => Poll::Ready(()),
        })
        .await;
        let request = self.under_way.borrow_mut().remove(&cookie);
        self.changed.wake();
        match request {
            Some(UnderWay {
                is_over: true,
                error: None,
                wanted,
                ..
            }) => Ok(wanted),
            Some(UnderWay {
                is_over: true,
                error: Some(errno),
                ..
            }) => Err(Failed::Refused(errno)),
            _ => Err(Failed::Lost),
        }
    }

    /// Takes answers until there are no more: for a task of its own. When it ends, nothing is under way.
    pub async fn receive(&self, mut reader: Reader) {
        while self.receive_one(&mut reader).await.is_ok() {
            self.heard.set(Instant::now());
        }
        self.transport.close();
        self.lost.set(true);
        let mut under_way = self.under_way.borrow_mut();
        for request in under_way.values_mut() {
            request.waker.take().into_iter().for_each(Waker::wake);
        }
        self.changed.wake();
    }

    async fn receive_one(&self, reader: &mut Reader) -> Result<(), Violation> {
        let header: [u8; SIMPLE_REPLY_BYTES] = reader.array().await?;
        match ReplyHeader::decode(&header).ok_or(Violation)? {
            ReplyHeader::Simple { cookie, error } => {
                let into = match self.request(cookie, |request| request.wanted.data().cloned())? {
                    // Without an error it would be followed by data that nobody can tell apart.
                    Some(_) if self.info.structured => return Err(Violation),
                    into => into,
                };
                if let (Some(into), 0) = (into, error) {
                    let bytes = into.bytes();
                    self.receive_data(reader, into).await?;
                    self.request(cookie, |request| request.wanted.cover(0, bytes))?;
                }
                self.request(cookie, |request| request.error = error_of(error))?;
                self.finish(cookie)
            }
            ReplyHeader::Chunk { flags, kind, cookie } => {
                if !self.info.structured {
                    return Err(Violation);
                }
                let length = u32::from_be_bytes(reader.array().await?);
                self.receive_chunk(reader, cookie, kind, length).await?;
                if flags & CHUNK_DONE != 0 {
                    self.finish(cookie)?;
                }
                Ok(())
            }
        }
    }

    /// Data straight to where it is wanted. A long piece is no silence.
    async fn receive_data(&self, reader: &mut Reader, mut into: Segments) -> Result<(), Violation> {
        while into.bytes() > 0 {
            let piece = into.split_to(1 << 20);
            reader.read_to(piece).await?;
            self.heard.set(Instant::now());
        }
        Ok(())
    }

    async fn receive_chunk(&self, reader: &mut Reader, cookie: u64, kind: u16, length: u32) -> Result<(), Violation> {
        match Chunk::from_number(kind) {
            Some(Chunk::None) if length == 0 => self.request(cookie, |_| ()),
            Some(Chunk::OffsetData) if length > 8 => {
                let offset = u64::from_be_bytes(reader.array().await?);
                let into = self.part(cookie, offset, length - 8)?;
                self.receive_data(reader, into).await
            }
            Some(Chunk::OffsetHole) if length == 12 => {
                let offset = u64::from_be_bytes(reader.array().await?);
                let bytes = u32::from_be_bytes(reader.array().await?);
                self.part(cookie, offset, bytes)?.fill_zeroes();
                Ok(())
            }
            Some(Chunk::BlockStatus) if (12..=MAX_SMALL_CHUNK).contains(&length) && length % 8 == 4 => {
                let first: [u8; 12] = reader.array().await?;
                reader.skip(u64::from(length - 12)).await?;
                let mut fields = Fields(&first);
                let (id, bytes, flags) = (fields.u32(), fields.u32(), fields.u32());
                let (Some(id), Some(bytes @ 1..), Some(flags)) = (id, bytes, flags) else {
                    return Err(Violation);
                };
                self.request(cookie, |request| match &mut request.wanted {
                    Wanted::Extent { context, found } if *context == id => {
                        found.replace((bytes, flags)).map_or(Ok(()), |_| Err(Violation))
                    }
                    _ => Err(Violation),
                })?
            }
            _ if kind & CHUNK_IS_ERROR != 0 && (6..=MAX_SMALL_CHUNK).contains(&length) => {
                let number = u32::from_be_bytes(reader.array().await?);
                reader.skip(u64::from(length - 4)).await?;
                let errno = error_of(number).unwrap_or(Errno::EIO);
                self.request(cookie, |request| request.error = Some(errno))
            }
            _ => Err(Violation),
        }
    }

    /// Where a part of a read goes, if it may come.
    fn part(&self, cookie: u64, offset: u64, bytes: u32) -> Result<Segments, Violation> {
        self.request(cookie, |request| {
            let start = offset.checked_sub(request.offset).ok_or(Violation)?;
            let end = start.checked_add(u64::from(bytes)).ok_or(Violation)?;
            if bytes == 0 || end > u64::from(request.length) || !request.wanted.cover(start, end) {
                return Err(Violation);
            }
            let mut into = request.wanted.data().ok_or(Violation)?.clone();
            into.advance(start);
            Ok(into.split_to(u64::from(bytes)))
        })?
    }

    /// Looks at a request under way. A server that answers another is given up.
    fn request<T>(&self, cookie: u64, look: impl FnOnce(&mut UnderWay) -> T) -> Result<T, Violation> {
        let mut under_way = self.under_way.borrow_mut();
        let request = under_way.get_mut(&cookie).filter(|request| !request.is_over);
        request.map(look).ok_or(Violation)
    }

    fn finish(&self, cookie: u64) -> Result<(), Violation> {
        self.request(cookie, |request| {
            let is_short = match &request.wanted {
                Wanted::Data { covered, .. } => !covered.is_whole(u64::from(request.length)),
                Wanted::Extent { found, .. } => found.is_none(),
                Wanted::Done => false,
            };
            if is_short {
                request.error.get_or_insert(Errno::EIO);
            }
            request.is_over = true;
            request.waker.take().into_iter().for_each(Waker::wake);
        })
    }
}

impl Wanted {
    fn data(&self) -> Option<&Segments> {
        match self {
            Self::Data { into, .. } => Some(into),
            _ => None,
        }
    }

    fn cover(&mut self, start: u64, end: u64) -> bool {
        match self {
            Self::Data { covered, .. } => covered.add(start, end),
            _ => false,
        }
    }
}
