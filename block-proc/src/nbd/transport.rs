//! A byte stream to a peer that may say anything, nothing, or go away.

use crate::buffer::{Buffer, Segments};
use crate::engine::{FileId, Operation};
use crate::executor::io::Io;
use crate::node::qcow2::locks::{Guard, Mutex};
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

/// Bytes read ahead: many small headers come with one call.
const READ_AHEAD_BYTES: usize = 16 << 10;
/// What is sent with its header in one call, bytes: copying it is cheaper than another call.
const COPIED_BYTES: usize = 32 << 10;

/// A call that moves bytes: how many.
pub type Moved<'a> = Pin<Box<dyn Future<Output = Result<usize, Errno>> + 'a>>;

/// See the module. One task reads, and one at a time writes.
pub trait Transport {
    /// Reads some bytes, at least one; 0 at the end.
    fn read(&self, into: Segments) -> Moved<'_>;

    /// Writes some bytes, at least one.
    fn write(&self, from: Segments) -> Moved<'_>;

    /// Whoever waits for the peer fails, now and from now on.
    fn close(&self);

    /// Whether it was closed from this side.
    fn is_closed(&self) -> bool;
}

/// A connected socket that never blocks.
pub struct Socket {
    io: Rc<Io>,
    file: FileId,
    closed: Cell<bool>,
    /// The file is somebody else's now.
    taken: Cell<bool>,
    /// The engine's names of what is under way.
    waits: RefCell<Vec<u32>>,
}

impl Socket {
    /// Over a file of the engine.
    pub fn new(io: Rc<Io>, file: FileId) -> Rc<Self> {
        Rc::new(Self {
            io,
            file,
            closed: Cell::new(false),
            taken: Cell::new(false),
            waits: RefCell::default(),
        })
    }

    /// Gives the socket back. Nothing of it may be under way.
    pub fn into_fd(self) -> Option<OwnedFd> {
        self.taken.set(true);
        self.io.take_file(self.file)
    }

    /// Runs an operation, which [`Transport::close`] ends.
    async fn run(&self, operation: Operation) -> Result<usize, Errno> {
        if self.closed.get() {
            return Err(Errno::ECANCELED);
        }
        let pending = self.io.submit(operation);
        let token = pending.token();
        self.waits.borrow_mut().push(token);
        let (result, _) = pending.await;
        self.waits.borrow_mut().retain(|other| *other != token);
        result
    }
}

impl Transport for Socket {
    fn read(&self, into: Segments) -> Moved<'_> {
        Box::pin(async move {
            loop {
                let (file, segments) = (self.file, into.clone());
                match self.run(Operation::ReadStream { file, segments }).await {
                    Err(Errno::EAGAIN) => drop(self.run(Operation::Ready { file, to_write: false }).await?),
                    Err(Errno::EINTR) => {}
                    result => return result,
                }
            }
        })
    }

    fn write(&self, from: Segments) -> Moved<'_> {
        Box::pin(async move {
            loop {
                let (file, segments) = (self.file, from.clone());
                match self.run(Operation::WriteStream { file, segments }).await {
                    Err(Errno::EAGAIN) => drop(self.run(Operation::Ready { file, to_write: true }).await?),
                    Err(Errno::EINTR) => {}
                    Ok(0) => return Err(Errno::EPIPE),
                    result => return result,
                }
            }
        })
    }

    fn close(&self) {
        self.closed.set(true);
        for token in self.waits.borrow().iter() {
            self.io.cancel_wait(*token);
        }
    }

    fn is_closed(&self) -> bool {
        self.closed.get()
    }
}

impl Drop for Socket {
    /// Whoever reads or writes holds it, so nothing is under way.
    fn drop(&mut self) {
        if !self.taken.get() {
            self.io.remove_file(self.file);
        }
    }
}

/// The reading half.
pub struct Reader {
    transport: Rc<dyn Transport>,
    ahead: Arc<Buffer>,
    start: usize,
    end: usize,
}

impl Reader {
    /// A reader of what comes from now on.
    pub fn new(transport: Rc<dyn Transport>) -> Self {
        Self {
            transport,
            ahead: Buffer::new(READ_AHEAD_BYTES),
            start: 0,
            end: 0,
        }
    }

    /// A reader of what another has read already and what comes after it.
    pub fn after(transport: Rc<dyn Transport>, ahead: &[u8]) -> Self {
        let mut reader = Self::new(transport);
        reader.end =
            Segments::of_buffer(&reader.ahead, READ_AHEAD_BYTES).fill_from(&ahead[..ahead.len().min(READ_AHEAD_BYTES)]);
        reader
    }

    /// What was read and not taken.
    pub fn into_ahead(self) -> Vec<u8> {
        let mut ahead = vec![0; self.end - self.start];
        self.buffered().read_into(&mut ahead);
        ahead
    }

    fn buffered(&self) -> Segments {
        let mut segments = Segments::of_buffer(&self.ahead, self.end);
        segments.advance(self.start as u64);
        segments
    }

    async fn refill(&mut self) -> Result<(), Errno> {
        let into = Segments::of_buffer(&self.ahead, READ_AHEAD_BYTES);
        let count = self.transport.read(into).await?;
        if count == 0 {
            return Err(Errno::ECONNRESET);
        }
        (self.start, self.end) = (0, count.min(READ_AHEAD_BYTES));
        Ok(())
    }

    /// Fills all of `into`.
    ///
    /// # Errors
    /// The transport's; ECONNRESET where it ends before.
    pub async fn read(&mut self, into: &mut [u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < into.len() {
            if self.start == self.end {
                self.refill().await?;
            }
            let count = self.buffered().read_into(&mut into[done..]);
            self.start += count;
            done += count;
        }
        Ok(())
    }

    /// The next bytes as a number of fixed size.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn array<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let mut bytes = [0; N];
        self.read(&mut bytes).await?;
        Ok(bytes)
    }

    /// Fills memory, past the read-ahead where that is empty.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn read_to(&mut self, mut into: Segments) -> Result<(), Errno> {
        if self.start < self.end && into.bytes() > 0 {
            let count = (self.end - self.start).min(usize::try_from(into.bytes()).unwrap_or(usize::MAX));
            self.buffered().copy_to(&into);
            self.start += count;
            into.advance(count as u64);
        }
        while into.bytes() > 0 {
            if into.bytes() < READ_AHEAD_BYTES as u64 {
                // The next header comes along.
                self.refill().await?;
                let count = (self.end as u64).min(into.bytes());
                self.buffered().copy_to(&into);
                self.start += count as usize;
                into.advance(count);
                continue;
            }
            let count = self.transport.read(into.clone()).await?;
            if count == 0 {
                return Err(Errno::ECONNRESET);
            }
            into.advance(count as u64);
        }
        Ok(())
    }

    /// Passes over bytes.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn skip(&mut self, mut bytes: u64) -> Result<(), Errno> {
        while bytes > 0 {
            if self.start == self.end {
                self.refill().await?;
            }
            let count = bytes.min((self.end - self.start) as u64);
            self.start += count as usize;
            bytes -= count;
        }
        Ok(())
    }
}

/// The writing half: messages are sent whole, one after the other.
pub struct Writer {
    transport: Rc<dyn Transport>,
    turn: Mutex,
    /// For headers, used by whose turn it is.
    buffer: Arc<Buffer>,
    failed: Cell<bool>,
}

/// The right to send what belongs together.
pub struct Turn<'a> {
    writer: &'a Writer,
    _turn: Guard<'a>,
}

impl Writer {
    /// A writer.
    pub fn new(transport: Rc<dyn Transport>) -> Self {
        Self {
            transport,
            turn: Mutex::default(),
            buffer: Buffer::new(COPIED_BYTES),
            failed: Cell::new(false),
        }
    }

    /// Waits for one's turn.
    pub async fn turn(&self) -> Turn<'_> {
        Turn {
            writer: self,
            _turn: self.turn.lock().await,
        }
    }

    /// Sends a header, and what follows it.
    ///
    /// # Errors
    /// The transport's. After the first nothing can be sent any more.
    pub async fn send(&self, header: &[u8], payload: Segments) -> Result<(), Errno> {
        self.turn().await.send(header, payload).await
    }

    async fn write_all(&self, mut from: Segments) -> Result<(), Errno> {
        while from.bytes() > 0 {
            let count = self.transport.write(from.clone()).await?;
            from.advance(count as u64);
        }
        Ok(())
    }
}

impl Turn<'_> {
    /// Sends a header, and what follows it.
    ///
    /// # Errors
    /// As [`Writer::send`].
    pub async fn send(&self, header: &[u8], payload: Segments) -> Result<(), Errno> {
        let writer = self.writer;
        if writer.failed.get() {
            return Err(Errno::EPIPE);
        }
        // Marked before: what is given up half sent must not be followed by anything.
        writer.failed.set(true);
        let mut header = header;
        while header.len() > COPIED_BYTES {
            let (front, rest) = header.split_at(COPIED_BYTES);
            let front_segments = Segments::of_buffer(&writer.buffer, COPIED_BYTES);
            front_segments.fill_from(front);
            writer.write_all(front_segments).await?;
            header = rest;
        }
        let copied = if payload.bytes() <= (COPIED_BYTES - header.len()) as u64 {
            payload.bytes() as usize
        } else {
            0
        };
        let message = Segments::of_buffer(&writer.buffer, header.len() + copied);
        message.fill_from(header);
        if copied > 0 {
            let mut behind = message.clone();
            behind.advance(header.len() as u64);
            payload.copy_to(&behind);
        }
        writer.write_all(message).await?;
        if copied == 0 {
            writer.write_all(payload).await?;
        }
        writer.failed.set(false);
        Ok(())
    }
}
