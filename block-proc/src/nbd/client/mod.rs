//! The driver `nbd`: an export of another program's as a node.
//!
//! When the connection is lost, the supervisor is told and brings another. Requests wait for it for `reconnect-delay`, are
//! made again on it (all that NBD has may be made twice), and fail with EIO after that time.

mod aligned;
pub mod connection;
pub mod covered;
pub mod handshake;

use super::transport::{Reader, Socket, Transport, Writer};
use super::wire::{Command, STATE_ZERO, command_flag, export_flag};
use crate::buffer::{BOUNCE_BYTES, BouncePool, Buffer, Segments};
use crate::executor::io::Io;
use crate::executor::spawner::{Spawner, Waiters};
use crate::executor::timer::Timers;
use crate::node::qcow2::locks::Mutex;
use crate::node::{Extent, ExtentKind, Limits, Node, NodeFuture};
use connection::{Connection, Failed, watch};
use handshake::{ExportInfo, HandshakeError, shake_hands};
use ipc::Failure;
use ipc::caps::NbdSocketFd;
use ipc::graph::{NbdDetails, NodeDetails};
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// Most bytes of a request without data.
const RANGE_STEP_BYTES: u64 = 1 << 30;

/// What a node is made of.
#[derive(Clone)]
pub struct Surroundings {
    /// The thread's timers.
    pub timers: Rc<Timers>,
    /// Where its tasks go.
    pub spawner: Rc<Spawner>,
    /// Bounce buffers.
    pub bounce: Rc<BouncePool>,
    /// Called when the connection is lost.
    pub on_loss: Rc<dyn Fn()>,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The export's name.
    pub export: String,
    /// How long requests wait for another connection.
    pub reconnect_delay: Duration,
    /// Nothing is to be written.
    pub read_only: bool,
    /// An export that cannot be written is read.
    pub auto_read_only: bool,
    /// Discards reach the server.
    pub discard: bool,
}

enum State {
    Connected(Rc<Connection>),
    Lost(Instant),
}

/// See the module.
pub struct NbdNode {
    around: Surroundings,
    options: Options,
    /// As it was first; what another connection says must agree.
    info: ExportInfo,
    read_only: bool,
    state: RefCell<State>,
    changed: Waiters,
    /// The server's word that it does not do that after all.
    no_write_zeroes: Cell<bool>,
    zeroes: Arc<Buffer>,
    /// Writes that do not keep to the server's blocks change them one at a time.
    unaligned: Mutex,
    me: Weak<Self>,
}

/// A connected socket of the supervisor's as a transport.
///
/// # Errors
/// When the engine has no room for it.
pub fn socket(io: &Rc<Io>, socket: NbdSocketFd) -> std::io::Result<Rc<Socket>> {
    let file = io.add_file(socket.into_fd())?;
    Ok(Socket::new(io.clone(), file))
}

async fn connect(
    around: &Surroundings,
    transport: Rc<dyn Transport>,
    export: &str,
) -> Result<(Rc<Connection>, Reader), HandshakeError> {
    let mut reader = Reader::new(transport.clone());
    let writer = Writer::new(transport.clone());
    let is_over = Rc::new(Cell::new(false));
    // Not kept open for it.
    let (timers, late, over) = (around.timers.clone(), Rc::downgrade(&transport), is_over.clone());
    around.spawner.spawn(async move {
        timers.sleep_until(Instant::now() + HANDSHAKE).await;
        if let (false, Some(late)) = (over.get(), late.upgrade()) {
            late.close();
        }
    });
    let shaken = shake_hands(&mut reader, &writer, export).await;
    is_over.set(true);
    match shaken {
        Ok(info) => Ok((Connection::new(info, transport, writer), reader)),
        Err(HandshakeError::Stream(Errno::ECANCELED)) => Err(HandshakeError::TimedOut),
        Err(error) => {
            transport.close();
            Err(error)
        }
    }
}

fn failure(error: HandshakeError) -> Failure {
    let errno = match &error {
        HandshakeError::Stream(errno) => Some(*errno as i32),
        _ => None,
    };
    Failure {
        message: error.to_string(),
        errno,
    }
}

impl NbdNode {
    /// Opens an export over a connected socket.
    ///
    /// # Errors
    /// What the server says, or is wrong with it.
    pub async fn open(
        around: Surroundings,
        options: Options,
        transport: Rc<dyn Transport>,
    ) -> Result<Rc<Self>, Failure> {
        let (connection, reader) = connect(&around, transport, &options.export).await.map_err(failure)?;
        let info = connection.info;
        let is_fixed = info.has(export_flag::READ_ONLY);
        let wrong = if is_fixed && !options.read_only && !options.auto_read_only {
            Some(Failure::new("request on write denied without write permission"))
        } else if !info.bytes.is_multiple_of(u64::from(info.min_block)) {
            let (bytes, block) = (info.bytes, info.min_block);
            let text = format!("export size '{bytes}' is not multiple of minimum block size '{block}'");
            Some(Failure::new(text))
        } else {
            None
        };
        if let Some(failure) = wrong {
            connection.disconnect().await;
            return Err(failure);
        }
        let node = Rc::new_cyclic(|me| Self {
            around,
            read_only: options.read_only || is_fixed,
            options,
            info,
            state: RefCell::new(State::Connected(connection.clone())),
            changed: Waiters::default(),
            no_write_zeroes: Cell::new(false),
            zeroes: Buffer::new(BOUNCE_BYTES),
            unaligned: Mutex::default(),
            me: me.clone(),
        });
        node.run(connection, reader);
        Ok(node)
    }

    /// Whether nothing can be written.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Goes on over another connection.
    ///
    /// # Errors
    /// When there is one already, or the server has something else than before.
    pub async fn reconnect(&self, transport: Rc<dyn Transport>) -> Result<(), Failure> {
        if matches!(*self.state.borrow(), State::Connected(_)) {
            return Err(Failure::new("the NBD server is connected already"));
        }
        let connected = connect(&self.around, transport, &self.options.export).await;
        let (connection, reader) = connected.map_err(failure)?;
        let new = connection.info;
        let wrong = if new.bytes != self.info.bytes {
            Some("the NBD server's export has another size than before")
        } else if new.has(export_flag::READ_ONLY) && !self.read_only {
            Some("the NBD server's export can only be read now")
        } else if new.min_block > self.info.min_block || new.max_payload < self.info.max_payload {
            Some("the NBD server's export takes other requests than before")
        } else if matches!(*self.state.borrow(), State::Connected(_)) {
            Some("the NBD server is connected already")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            connection.disconnect().await;
            return Err(Failure::new(wrong));
        }
        self.state.replace(State::Connected(connection.clone()));
        self.run(connection, reader);
        self.changed.wake();
        Ok(())
    }

    /// Starts the tasks of a connection.
    fn run(&self, connection: Rc<Connection>, reader: Reader) {
        let watched = Rc::downgrade(&connection);
        self.around.spawner.spawn(watch(watched, self.around.timers.clone()));
        let me = self.me.clone();
        self.around.spawner.spawn(async move {
            connection.receive(reader).await;
            if let Some(node) = me.upgrade() {
                node.lost();
            }
        });
    }

    fn lost(&self) {
        self.state.replace(State::Lost(Instant::now()));
        self.changed.wake();
        (self.around.on_loss)();
        if !self.options.reconnect_delay.is_zero() {
            let (timers, me) = (self.around.timers.clone(), self.me.clone());
            let deadline = Instant::now() + self.options.reconnect_delay;
            self.around.spawner.spawn(async move {
                timers.sleep_until(deadline).await;
                if let Some(node) = me.upgrade() {
                    node.changed.wake();
                }
            });
        }
    }

    /// The connection, or the next one.
    async fn connection(&self) -> Result<Rc<Connection>, Errno> {
        self.changed
            .until(|| match &*self.state.borrow() {
                State::Connected(connection) if !connection.is_lost() => Some(Ok(connection.clone())),
                // Its end is about to be told.
                State::Connected(_) => None,
                State::Lost(since) if since.elapsed() >= self.options.reconnect_delay => Some(Err(Errno::EIO)),
                State::Lost(_) => None,
            })
            .await
    }

    /// Makes a request until a server has answered it.
    async fn ask<T>(&self, request: impl AsyncFn(&Connection) -> Result<T, Failed>) -> Result<T, Errno> {
        loop {
            let connection = self.connection().await?;
            match request(&connection).await {
                Ok(answer) => return Ok(answer),
                Err(Failed::Refused(errno)) => return Err(errno),
                Err(Failed::Lost) if self.options.reconnect_delay.is_zero() => return Err(Errno::EIO),
                Err(Failed::Lost) => {}
            }
        }
    }

    fn has(&self, flag: u16) -> bool {
        self.info.has(flag)
    }

    /// Keeps to the server's blocks; may end behind the export, where there are zeroes.
    async fn read_blocks(&self, mut offset: u64, mut into: Segments) -> Result<(), Errno> {
        let inside = self.info.bytes.saturating_sub(offset).min(into.bytes());
        let mut left = into.split_to(inside);
        into.fill_zeroes();
        while left.bytes() > 0 {
            let piece = left.split_to(u64::from(self.info.max_payload));
            let bytes = piece.bytes();
            self.ask(async |connection| connection.read(offset, piece.clone()).await)
                .await?;
            offset += bytes;
        }
        Ok(())
    }

    /// Keeps to the server's blocks.
    async fn write_blocks(&self, mut offset: u64, mut from: Segments, durable: bool) -> Result<(), Errno> {
        let can_fua = self.has(export_flag::SEND_FUA);
        let flags = if durable && can_fua { command_flag::FUA } else { 0 };
        while from.bytes() > 0 {
            let piece = from.split_to(u64::from(self.info.max_payload));
            let bytes = piece.bytes();
            self.ask(async |connection| connection.write(flags, offset, piece.clone()).await)
                .await?;
            offset += bytes;
        }
        if durable && !can_fua {
            self.sync().await?;
        }
        Ok(())
    }

    async fn write_zeroes_blocks(&self, mut offset: u64, mut bytes: u64, may_unmap: bool) -> Result<(), Errno> {
        let flags = if may_unmap { 0 } else { command_flag::NO_HOLE };
        while bytes > 0 {
            let possible = self.has(export_flag::SEND_WRITE_ZEROES) && !self.no_write_zeroes.get();
            let step = bytes.min(if possible {
                RANGE_STEP_BYTES
            } else {
                BOUNCE_BYTES as u64
            });
            if possible {
                let zero = async |connection: &Connection| {
                    connection.plain(Command::WriteZeroes, flags, offset, step as u32).await
                };
                match self.ask(zero).await {
                    Err(Errno::EOPNOTSUPP) => {
                        self.no_write_zeroes.set(true);
                        continue;
                    }
                    result => result?,
                }
            } else {
                let zeroes = Segments::of_buffer(&self.zeroes, step as usize);
                self.write_blocks(offset, zeroes, false).await?;
            }
            offset += step;
            bytes -= step;
        }
        Ok(())
    }

    async fn trim(&self, offset: u64, bytes: u64) -> Result<(), Errno> {
        if !self.options.discard || !self.has(export_flag::SEND_TRIM) {
            return Ok(());
        }
        // A block of which a part is still wanted stays.
        let block = u64::from(self.info.min_block);
        let end = (offset + bytes) / block * block;
        let mut offset = offset.next_multiple_of(block);
        while offset < end {
            let step = (end - offset).min(RANGE_STEP_BYTES);
            let trim = async |connection: &Connection| connection.plain(Command::Trim, 0, offset, step as u32).await;
            self.ask(trim).await?;
            offset += step;
        }
        Ok(())
    }

    async fn sync(&self) -> Result<(), Errno> {
        if !self.has(export_flag::SEND_FLUSH) {
            return Ok(());
        }
        self.ask(async |connection| connection.plain(Command::Flush, 0, 0, 0).await)
            .await
    }

    async fn extent(&self, offset: u64, bytes: u64) -> Result<Extent, Errno> {
        let block = u64::from(self.info.min_block);
        let start = offset / block * block;
        let end = (offset + bytes).next_multiple_of(block).min(self.info.bytes);
        let data = Extent {
            bytes,
            kind: ExtentKind::Data,
        };
        if start >= end {
            let kind = ExtentKind::Zero;
            return Ok(Extent { bytes, kind });
        }
        let length = (end - start).min(RANGE_STEP_BYTES) as u32;
        let found = self
            .ask(async |connection| match connection.info.allocation {
                Some(context) => {
                    let found = connection.extent(context, command_flag::REQ_ONE, start, length).await;
                    found.map(Some)
                }
                None => Ok(None),
            })
            .await?;
        let Some((found, flags)) = found else { return Ok(data) };
        // A server's extent may be no multiple of its blocks.
        let found = u64::from(found.min(length)) / block * block;
        let Some(here) = (start + found).checked_sub(offset).filter(|here| *here > 0) else {
            return Ok(Extent {
                bytes: bytes.min(start + block - offset),
                ..data
            });
        };
        let kind = if flags & STATE_ZERO != 0 {
            ExtentKind::Zero
        } else {
            ExtentKind::Data
        };
        Ok(Extent {
            bytes: here.min(bytes),
            kind,
        })
    }
}

impl Drop for NbdNode {
    /// Requests hold the node, so none is under way.
    fn drop(&mut self) {
        if let State::Connected(connection) = &*self.state.borrow() {
            let connection = connection.clone();
            let late = (Rc::downgrade(&connection), self.around.timers.clone());
            self.around.spawner.spawn(async move { connection.disconnect().await });
            // A server that does not even read that.
            self.around.spawner.spawn(async move {
                let (connection, timers) = late;
                timers.sleep_until(Instant::now() + HANDSHAKE).await;
                connection.upgrade().inspect(|connection| connection.close());
            });
        }
    }
}

impl Node for NbdNode {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        if self.is_aligned(offset, into.bytes()) {
            Box::pin(self.read_blocks(offset, into))
        } else {
            Box::pin(self.read_unaligned(offset, into))
        }
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        if self.is_aligned(offset, from.bytes()) {
            Box::pin(self.write_blocks(offset, from, durable))
        } else {
            Box::pin(self.write_unaligned(offset, from, durable))
        }
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        if self.is_aligned(offset, bytes) {
            Box::pin(self.write_zeroes_blocks(offset, bytes, may_unmap))
        } else {
            Box::pin(self.write_zeroes_unaligned(offset, bytes, may_unmap))
        }
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        Box::pin(self.trim(offset, bytes))
    }

    fn flush(&self) -> NodeFuture<'_> {
        Box::pin(self.sync())
    }

    fn bytes(&self) -> u64 {
        self.info.bytes
    }

    fn status(&self, offset: u64, bytes: u64) -> NodeFuture<'_, Extent> {
        Box::pin(self.extent(offset, bytes))
    }

    fn limits(&self) -> Limits {
        Limits {
            align: u64::from(self.info.min_block),
            grows: false,
        }
    }

    fn details(&self) -> NodeFuture<'_, NodeDetails> {
        let details = NbdDetails {
            read_only: self.read_only,
            min_block_bytes: self.info.min_block,
        };
        Box::pin(async move { Ok(NodeDetails::Nbd(details)) })
    }
}
