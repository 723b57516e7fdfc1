//! A client's requests, many at a time. Data goes through a few bounce buffers of the client's own, in pieces: what it can
//! make us hold is bounded by them, whatever it sends or does not read.

use super::Export;
use super::negotiation::Session;
use crate::buffer::{BOUNCE_BYTES, Bounce, BouncePool, Segments};
use crate::executor::gate::Gate;
use crate::executor::spawner::{Spawner, Waiters};
use crate::nbd::context::Context;
use crate::nbd::transport::{Reader, Transport, Writer};
use crate::nbd::wire::{
    CHUNK_DONE, Chunk, ChunkHeader, Command, MAX_PAYLOAD_BYTES, REQUEST_BYTES, Request, command_flag, error_number,
    simple_reply,
};
use crate::node::{Extent, ExtentKind, Node};
use nix::errno::Errno;
use std::cell::Cell;
use std::rc::Rc;

/// Most requests of a client under way.
const MAX_UNDER_WAY: usize = 16;
/// Longest read that a client may want in one piece, bytes.
const MAX_UNFRAGMENTED: u32 = BOUNCE_BYTES as u32;
/// Largest step of a request that needs no memory, bytes.
const RANGE_STEP_BYTES: u64 = 1 << 30;

struct Client {
    export: Rc<Export>,
    structured: bool,
    contexts: Vec<Context>,
    transport: Rc<dyn Transport>,
    writer: Writer,
    gate: Rc<Gate>,
    bounce: Rc<BouncePool>,
    under_way: Cell<usize>,
    ended: Waiters,
}

/// Serves until the client says goodbye, hangs up or breaks the protocol, and nothing of it is under way any more.
pub async fn serve(
    export: Rc<Export>,
    session: Session,
    transport: Rc<dyn Transport>,
    mut reader: Reader,
    writer: Writer,
    gate: Rc<Gate>,
    spawner: Rc<Spawner>,
) {
    let named = |name: &String| export.contexts.iter().find(|context| context.name() == *name).cloned();
    let contexts = session.contexts.iter().filter_map(named).collect();
    let client = Rc::new(Client {
        contexts,
        export,
        structured: session.structured,
        transport: transport.clone(),
        writer,
        gate,
        bounce: Rc::default(),
        under_way: Cell::new(0),
        ended: Waiters::default(),
    });
    while client.clone().take(&mut reader, &spawner).await.is_ok() {}
    // What was asked for before is still done, and answered as far as the client listens.
    let is_idle = || (client.under_way.get() == 0).then_some(());
    client.ended.until(is_idle).await;
    transport.close();
}

/// The client's end.
struct Over;

impl From<Errno> for Over {
    fn from(_: Errno) -> Self {
        Self
    }
}

/// A write whose pieces are under way.
struct Write {
    left: Cell<usize>,
    error: Cell<Option<Errno>>,
    done: Waiters,
}

impl Client {
    /// Takes one request and starts it.
    async fn take(self: Rc<Self>, reader: &mut Reader, spawner: &Spawner) -> Result<(), Over> {
        let has_room = || (self.under_way.get() < MAX_UNDER_WAY || self.transport.is_closed()).then_some(());
        self.ended.until(has_room).await;
        let header: [u8; REQUEST_BYTES] = reader.array().await?;
        let request = Request::decode(&header).ok_or(Over)?;
        let command = Command::from_number(request.command);
        if command == Some(Command::Disconnect) {
            return Err(Over);
        }
        self.under_way.set(self.under_way.get() + 1);
        let checked = self.check(command, &request);
        if command == Some(Command::Write) {
            let taken = self.clone().take_write(reader, spawner, request, checked).await;
            if taken.is_err() {
                self.is_over();
            }
            return taken;
        }
        let client = self;
        spawner.spawn(async move {
            let result = match checked {
                Ok(command) => client.carry_out(command, &request).await,
                Err(errno) => client.refuse(&request, errno).await,
            };
            if result.is_err() {
                client.transport.close();
            }
            client.is_over();
        });
        Ok(())
    }

    fn is_over(&self) {
        self.under_way.set(self.under_way.get() - 1);
        self.ended.wake();
    }

    /// Whether a request can be.
    fn check(&self, command: Option<Command>, request: &Request) -> Result<Command, Errno> {
        let command = command.ok_or(Errno::EINVAL)?;
        let writes = matches!(command, Command::Write | Command::Trim | Command::WriteZeroes);
        if writes && !self.export.spec.writable {
            return Err(Errno::EPERM);
        }
        let valid = match command {
            Command::Read if self.structured => command_flag::DF,
            Command::Write | Command::Trim => command_flag::FUA,
            Command::WriteZeroes => command_flag::FUA | command_flag::NO_HOLE,
            Command::BlockStatus => command_flag::REQ_ONE,
            _ => 0,
        };
        // A flag of no meaning here is harmless where it only asks for more.
        if request.flags & !(valid | command_flag::FUA) != 0 {
            return Err(Errno::EINVAL);
        }
        if command == Command::Flush {
            return Ok(command);
        }
        let end = request.offset.checked_add(request.length.into()).ok_or(Errno::EINVAL)?;
        let align = self.export.edge.limits().align;
        if end > self.export.edge.bytes() {
            return Err(if writes { Errno::ENOSPC } else { Errno::EINVAL });
        }
        let is_data = matches!(command, Command::Read | Command::Write);
        if is_data && request.length > MAX_PAYLOAD_BYTES {
            return Err(Errno::EINVAL);
        }
        if (request.offset | u64::from(request.length)) & (align - 1) != 0 {
            return Err(Errno::EINVAL);
        }
        let is_status = command == Command::BlockStatus;
        if is_status && (self.contexts.is_empty() || request.length == 0) {
            return Err(Errno::EINVAL);
        }
        Ok(command)
    }

    /// The data of a write, piece by piece: each is written while the next is read.
    async fn take_write(
        self: Rc<Self>,
        reader: &mut Reader,
        spawner: &Spawner,
        request: Request,
        checked: Result<Command, Errno>,
    ) -> Result<(), Over> {
        if let Err(errno) = checked {
            if request.length > MAX_PAYLOAD_BYTES {
                return Err(Over);
            }
            reader.skip(request.length.into()).await?;
            let client = self;
            spawner.spawn(async move {
                if client.refuse(&request, errno).await.is_err() {
                    client.transport.close();
                }
                client.is_over();
            });
            return Ok(());
        }
        let durable = self.export.spec.writethrough || request.flags & command_flag::FUA != 0;
        let is_one = request.length as usize <= BOUNCE_BYTES;
        let write = Rc::new(Write {
            left: Cell::new(1),
            error: Cell::new(None),
            done: Waiters::default(),
        });
        let (mut offset, mut left) = (request.offset, request.length as usize);
        let mut taken = Ok(());
        while left > 0 {
            let bytes = left.min(BOUNCE_BYTES);
            let bounce = self.bounce.take().await;
            if let Err(errno) = reader.read_to(Segments::of_buffer(bounce.buffer(), bytes)).await {
                write.error.set(Some(errno));
                taken = Err(Over);
                break;
            }
            write.left.set(write.left.get() + 1);
            let (client, part) = (self.clone(), write.clone());
            spawner.spawn(async move {
                let written = client.write_piece(offset, &bounce, bytes, durable && is_one).await;
                if let Err(errno) = written {
                    part.error.set(Some(errno));
                }
                part.left.set(part.left.get() - 1);
                part.done.wake();
            });
            offset += bytes as u64;
            left -= bytes;
        }
        let answer = async move |client: &Self| {
            write.done.until(|| (write.left.get() == 1).then_some(())).await;
            let mut result = write.error.get().map_or(Ok(()), Err);
            if durable && !is_one && result.is_ok() {
                let _pass = client.gate.enter().await;
                result = client.export.edge.flush().await;
            }
            client.answer(&request, result).await
        };
        if taken.is_err() {
            // Its pieces hold buffers of ours; nobody is there to be answered.
            let _ = answer(&self).await;
            return taken;
        }
        let client = self;
        spawner.spawn(async move {
            if answer(&client).await.is_err() {
                client.transport.close();
            }
            client.is_over();
        });
        Ok(())
    }

    async fn write_piece(&self, offset: u64, bounce: &Bounce, bytes: usize, durable: bool) -> Result<(), Errno> {
        let _pass = self.gate.enter().await;
        let from = Segments::of_buffer(bounce.buffer(), bytes);
        self.export.edge.write(offset, from, durable).await
    }

    async fn carry_out(&self, command: Command, request: &Request) -> Result<(), Errno> {
        match command {
            Command::Read if self.structured => self.read_structured(request).await,
            Command::Read => self.read_simple(request).await,
            Command::BlockStatus => self.block_status(request).await,
            _ => {
                let result = self.change(command, request).await;
                self.answer(request, result).await
            }
        }
    }

    /// What has no data of its own.
    async fn change(&self, command: Command, request: &Request) -> Result<(), Errno> {
        let node = &self.export.edge;
        // A flush is about everything, whatever range it names.
        let (mut offset, mut left) = match command {
            Command::Flush => (0, 0),
            _ => (request.offset, u64::from(request.length)),
        };
        while left > 0 {
            let step = left.min(RANGE_STEP_BYTES);
            let _pass = self.gate.enter().await;
            match command {
                Command::Trim => node.discard(offset, step).await?,
                Command::WriteZeroes => {
                    let may_unmap = request.flags & command_flag::NO_HOLE == 0;
                    node.write_zeroes(offset, step, may_unmap).await?;
                }
                // The host reads ahead by itself.
                _ => {}
            }
            offset += step;
            left -= step;
        }
        let changes = matches!(command, Command::Trim | Command::WriteZeroes);
        let durable = self.export.spec.writethrough || request.flags & command_flag::FUA != 0;
        if command == Command::Flush || changes && durable {
            let _pass = self.gate.enter().await;
            node.flush().await?;
        }
        Ok(())
    }

    async fn read_piece(&self, offset: u64, bounce: &Bounce, bytes: usize) -> Result<Segments, Errno> {
        let _pass = self.gate.enter().await;
        let into = Segments::of_buffer(bounce.buffer(), bytes);
        self.export.edge.read(offset, into.clone()).await?;
        Ok(into)
    }

    /// All pieces behind one header: an error after the first can only be told by hanging up.
    async fn read_simple(&self, request: &Request) -> Result<(), Errno> {
        if request.length == 0 {
            return self.answer(request, Ok(())).await;
        }
        let bounce = self.bounce.take().await;
        let (mut offset, mut left) = (request.offset, request.length as usize);
        let first = left.min(BOUNCE_BYTES);
        let piece = match self.read_piece(offset, &bounce, first).await {
            Ok(piece) => piece,
            Err(errno) => return self.answer(request, Err(errno)).await,
        };
        let turn = self.writer.turn().await;
        turn.send(&simple_reply(request.cookie, 0), piece).await?;
        offset += first as u64;
        left -= first;
        while left > 0 {
            let bytes = left.min(BOUNCE_BYTES);
            let piece = self.read_piece(offset, &bounce, bytes).await?;
            turn.send(&[], piece).await?;
            offset += bytes as u64;
            left -= bytes;
        }
        Ok(())
    }

    async fn read_structured(&self, request: &Request) -> Result<(), Errno> {
        let whole = request.flags & command_flag::DF != 0;
        if whole && request.length > MAX_UNFRAGMENTED {
            return self.refuse(request, Errno::EOVERFLOW).await;
        }
        if request.length == 0 {
            return self
                .chunk(request, CHUNK_DONE, Chunk::None, &[], Segments::default())
                .await;
        }
        let bounce = self.bounce.take().await;
        let end = request.offset + u64::from(request.length);
        let mut offset = request.offset;
        while offset < end {
            let hole = if whole {
                0
            } else {
                self.zeroes(offset, end - offset).await
            };
            if hole > 0 {
                let flags = if offset + hole == end { CHUNK_DONE } else { 0 };
                let payload = [&offset.to_be_bytes()[..], &(hole as u32).to_be_bytes()].concat();
                self.chunk(request, flags, Chunk::OffsetHole, &payload, Segments::default())
                    .await?;
                offset += hole;
                continue;
            }
            let bytes = (end - offset).min(BOUNCE_BYTES as u64);
            let flags = if offset + bytes == end { CHUNK_DONE } else { 0 };
            let piece = match self.read_piece(offset, &bounce, bytes as usize).await {
                Ok(piece) => piece,
                Err(errno) => return self.refuse(request, errno).await,
            };
            self.chunk(request, flags, Chunk::OffsetData, &offset.to_be_bytes(), piece)
                .await?;
            offset += bytes;
        }
        Ok(())
    }

    /// How many bytes at the beginning are known to be zeroes, without reading them. Less than a piece is not worth it.
    async fn zeroes(&self, offset: u64, bytes: u64) -> u64 {
        let _pass = self.gate.enter().await;
        let node = &self.export.edge;
        match node.status(offset, bytes).await {
            Ok(Extent {
                bytes: zeroes,
                kind: ExtentKind::Zero,
            }) => zeroes,
            Ok(Extent {
                bytes: zeroes,
                kind: ExtentKind::Unallocated,
            }) if node.below().is_none() => zeroes,
            // What cannot be told is read.
            _ => 0,
        }
    }

    async fn block_status(&self, request: &Request) -> Result<(), Errno> {
        let end = request.offset + u64::from(request.length);
        let one = request.flags & command_flag::REQ_ONE != 0;
        for (id, context) in (0_u32..).zip(&self.contexts) {
            let found = {
                let _pass = self.gate.enter().await;
                context.extents(&*self.export.edge, request.offset, end, one).await
            };
            let extents = match found {
                Ok(extents) => extents,
                Err(errno) => return self.refuse(request, errno).await,
            };
            let mut payload = id.to_be_bytes().to_vec();
            for (bytes, flags) in extents {
                payload.extend(bytes.to_be_bytes());
                payload.extend(flags.to_be_bytes());
            }
            let is_last = id as usize + 1 == self.contexts.len();
            let flags = if is_last { CHUNK_DONE } else { 0 };
            self.chunk(request, flags, Chunk::BlockStatus, &payload, Segments::default())
                .await?;
        }
        Ok(())
    }

    async fn chunk(
        &self,
        request: &Request,
        flags: u16,
        kind: Chunk,
        payload: &[u8],
        data: Segments,
    ) -> Result<(), Errno> {
        let header = ChunkHeader {
            flags,
            kind: kind.number(),
            cookie: request.cookie,
            length: payload.len() as u32 + data.bytes() as u32,
        };
        let message = [&header.encode()[..], payload].concat();
        self.writer.send(&message, data).await
    }

    /// The answer to what returns no data.
    async fn answer(&self, request: &Request, result: Result<(), Errno>) -> Result<(), Errno> {
        match result {
            Err(errno) => self.refuse(request, errno).await,
            Ok(()) => {
                let reply = simple_reply(request.cookie, 0);
                self.writer.send(&reply, Segments::default()).await
            }
        }
    }

    async fn refuse(&self, request: &Request, errno: Errno) -> Result<(), Errno> {
        let number = error_number(errno);
        if !self.structured {
            let reply = simple_reply(request.cookie, number);
            return self.writer.send(&reply, Segments::default()).await;
        }
        let text = errno.desc().as_bytes();
        let mut payload = number.to_be_bytes().to_vec();
        payload.extend((text.len() as u16).to_be_bytes());
        payload.extend(text);
        self.chunk(request, CHUNK_DONE, Chunk::Error, &payload, Segments::default())
            .await
    }
}
