//! The 16550 serial port, and the thread between it and the byte stream that the supervisor attached.
//!
//! A vCPU never waits for the peer: what the guest writes goes into a bounded buffer, and is lost when that is full, as
//! on a line without flow control. The thread alone touches the attached fds. It reads no more than the FIFO has room
//! for, so that a fast peer waits in the kernel's buffer. Of datagrams it takes one at a time, because the kernel drops
//! what is not read of one.

use crate::bus::BusDevice;
use crate::outbox::Outbox;
use ipc::caps::ChardevFd;
use ipc::thread_queue::queue;
use ipc::vcpu::VcpuEvent;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recvmsg, sendmsg};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Bytes from the guest that may wait for a slow peer.
const MAX_BUFFERED_BYTES: usize = 1 << 20;
/// Bytes of one write to a peer that is not a socket. When poll says that a pipe or a terminal takes data, it takes
/// this much without blocking.
const STREAM_CHUNK_BYTES: usize = 256;
/// Most bytes taken from the buffer at once; a socket is offered all of them, because sending to it never blocks.
const SOCKET_CHUNK_BYTES: usize = 16 << 10;
/// Bytes of one datagram to the peer: small enough for any network.
const DATAGRAM_BYTES: usize = 1024;
/// Bytes of the largest datagram.
const MAX_DATAGRAM_BYTES: usize = 64 << 10;
/// How long [`SerialLine::drain`] waits for a peer that takes nothing.
const DRAIN_PATIENCE: Duration = Duration::from_millis(200);
/// How long it waits for one that takes a little now and then. The supervisor waits for the answer to `Pause` meanwhile.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);
/// Stack of the thread.
const STACK_BYTES: usize = 256 << 10;

/// What vCPU threads, the serial thread and the control thread share.
struct Shared {
    /// Wakes the serial thread: output to write, room for input, or another attachment.
    wake: EventFd,
    /// From the guest, not yet taken by the peer.
    buffer: Mutex<VecDeque<u8>>,
    /// Signalled when the peer has taken something, or is gone.
    taken: Condvar,
    attachment: Mutex<Attachment>,
}

/// The attached fds. The serial thread works on a copy of the `Arc`s, so that attaching never waits for it.
#[derive(Clone, Default)]
struct Attachment {
    input: Option<Arc<Stream>>,
    output: Option<Arc<Stream>>,
    datagrams: bool,
    /// Tells a new attachment from that which the thread found closed.
    generation: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Nobody will take what is buffered.
    fn discard_output(&self) {
        lock(&self.buffer).clear();
        self.taken.notify_all();
    }

    fn wake(&self) {
        // Fails only when the counter is at its limit, and then the thread is awake anyway.
        let _ = self.wake.write(1);
    }
}

/// The port's interrupt, an irqfd.
struct Interrupt(Arc<EventFd>);

impl Trigger for Interrupt {
    type E = std::io::Error;
    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

/// The FIFO has room again.
struct RoomForInput(Arc<Shared>);

impl SerialEvents for RoomForInput {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.wake();
    }
}

/// Takes what the guest writes.
struct Transmitter(Arc<Shared>);

impl Write for Transmitter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if lock(&self.0.attachment).output.is_none() {
            return Ok(bytes.len());
        }
        let mut buffer = lock(&self.0.buffer);
        let was_empty = buffer.is_empty();
        let room = MAX_BUFFERED_BYTES - buffer.len().min(MAX_BUFFERED_BYTES);
        buffer.extend(&bytes[..bytes.len().min(room)]);
        drop(buffer);
        if was_empty {
            self.0.wake();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

type Uart = Serial<Interrupt, RoomForInput, Transmitter>;

/// The port on the bus.
pub struct SerialPort {
    uart: Uart,
    interrupt: Arc<EventFd>,
    shared: Arc<Shared>,
}

impl SerialPort {
    /// `interrupt` is an irqfd of the port's interrupt.
    ///
    /// # Errors
    /// When the process has no free fd.
    pub fn new(interrupt: EventFd) -> std::io::Result<Self> {
        let interrupt = Arc::new(interrupt);
        let shared = Arc::new(Shared {
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            buffer: Mutex::default(),
            taken: Condvar::new(),
            attachment: Mutex::default(),
        });
        Ok(Self {
            uart: new_uart(&interrupt, &shared),
            interrupt,
            shared,
        })
    }

    /// The end for the control thread.
    pub fn line(&self) -> SerialLine {
        SerialLine(Arc::clone(&self.shared))
    }
}

fn new_uart(interrupt: &Arc<EventFd>, shared: &Arc<Shared>) -> Uart {
    Serial::with_events(
        Interrupt(Arc::clone(interrupt)),
        RoomForInput(Arc::clone(shared)),
        Transmitter(Arc::clone(shared)),
    )
}

impl BusDevice for SerialPort {
    fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = self.uart.read(offset);
        }
    }

    fn write(&mut self, _base: u64, offset: u64, data: &[u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            // The error would be an interrupt that cannot be counted higher: it is pending anyway.
            let _ = self.uart.write(offset, *byte);
        }
    }

    fn reset(&mut self) {
        self.uart = new_uart(&self.interrupt, &self.shared);
        // Input that waited for room in the FIFO has it now.
        self.shared.wake();
    }
}

/// Attaches byte streams to the port.
#[derive(Clone)]
pub struct SerialLine(Arc<Shared>);

impl SerialLine {
    /// Replaces what is attached. Output that the earlier peer did not take goes to the new one.
    pub fn attach(&self, input: Option<ChardevFd>, output: Option<ChardevFd>, datagrams: bool) {
        let mut attachment = lock(&self.0.attachment);
        *attachment = Attachment {
            input: input.map(|fd| Arc::new(Stream::new(fd))),
            output: output.map(|fd| Arc::new(Stream::new(fd))),
            datagrams,
            generation: attachment.generation + 1,
        };
        if attachment.output.is_none() {
            self.0.discard_output();
        }
        drop(attachment);
        self.0.wake();
    }

    /// Waits until the peer has what the guest wrote, as long as it takes some of it now and then, but not for ever: a
    /// peer that reads a byte at a time must not keep the supervisor waiting. The guest's last words before it stops or
    /// powers off are the most interesting ones.
    pub fn drain(&self) {
        let end = Instant::now() + DRAIN_LIMIT;
        let mut buffer = lock(&self.0.buffer);
        while !buffer.is_empty() && Instant::now() < end {
            let waited = self.0.taken.wait_timeout(buffer, DRAIN_PATIENCE);
            let (next, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            buffer = next;
            if timeout.timed_out() {
                return;
            }
        }
    }
}

/// Starts the thread that serves `port`. Returns when it serves: what a thread does to start is not for the sealed filter.
///
/// # Errors
/// When it cannot be started.
pub fn start_thread(port: Arc<Mutex<SerialPort>>, outbox: Outbox) -> std::io::Result<()> {
    let shared = Arc::clone(&lock(&port).shared);
    let (arrived, arrival) = queue();
    std::thread::Builder::new()
        .name("serial".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            arrived.send(());
            drop(arrived);
            let server = Server {
                port,
                shared,
                arrived: RefCell::default(),
            };
            loop {
                if let Err(closed) = server.serve_once() {
                    server.detach(closed, &outbox);
                }
            }
        })?;
    arrival
        .recv()
        .ok_or_else(|| std::io::Error::other("the thread has ended"))
}

/// Why an attachment ends.
#[derive(Debug, Clone, Copy)]
struct Closed {
    generation: u64,
    /// Whether only the input has ended (a file or pipe of input is used up): the output goes on.
    input_only: bool,
}

/// The serial thread.
struct Server {
    port: Arc<Mutex<SerialPort>>,
    shared: Arc<Shared>,
    /// What is left of a datagram.
    arrived: RefCell<VecDeque<u8>>,
}

impl Server {
    fn detach(&self, closed: Closed, outbox: &Outbox) {
        let mut attachment = lock(&self.shared.attachment);
        if attachment.generation != closed.generation {
            // Another peer was attached meanwhile.
            return;
        }
        attachment.input = None;
        if closed.input_only && attachment.output.is_some() {
            return;
        }
        attachment.output = None;
        self.shared.discard_output();
        drop(attachment);
        outbox.send(VcpuEvent::SerialClosed);
    }

    /// Waits until there is something to do, and does it once.
    fn serve_once(&self) -> Result<(), Closed> {
        let attachment = lock(&self.shared.attachment).clone();
        let closed = |input_only| Closed {
            generation: attachment.generation,
            input_only,
        };
        let output = attachment.output.as_ref();
        let has_output = !lock(&self.shared.buffer).is_empty();
        if attachment.datagrams {
            self.serve_datagrams(&attachment, has_output);
            return Ok(());
        }
        self.arrived.borrow_mut().clear();
        let room = lock(&self.port).uart.fifo_capacity();
        // Without room the input is left out: its hang-up would end the wait again and again.
        let input = attachment.input.as_ref().filter(|_| room > 0);
        let (input_ready, output_ready) = self.wait(input, output, has_output);

        if let (Some(stream), false) = (input, input_ready.is_empty()) {
            let mut bytes = vec![0; room];
            match stream.read(&mut bytes) {
                Ok(0) => return Err(closed(!stream.is_socket())),
                Ok(count) => {
                    // In loop-back mode the guest has disconnected the line, and what arrives is lost.
                    let _ = lock(&self.port).uart.enqueue_raw_bytes(&bytes[..count]);
                }
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(_) => return Err(closed(false)),
            }
        }
        if let (Some(stream), true) = (output, output_ready.contains(PollFlags::POLLOUT)) {
            // The bytes stay in the buffer until the peer has them.
            let bytes: Vec<u8> = lock(&self.shared.buffer)
                .iter()
                .take(SOCKET_CHUNK_BYTES)
                .copied()
                .collect();
            match stream.write(&bytes) {
                Ok(count) => self.taken(count, attachment.generation),
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(_) => return Err(closed(false)),
            }
        } else if output_ready.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL) {
            return Err(closed(false));
        }
        Ok(())
    }

    /// As [`Self::serve_once`], for datagrams: that nobody is at the other side, which the kernel says after a datagram
    /// that went there, is no end, because somebody may be there later.
    fn serve_datagrams(&self, attachment: &Attachment, has_output: bool) {
        let room = lock(&self.port).uart.fifo_capacity();
        let mut arrived = self.arrived.borrow_mut();
        if room > 0 && !arrived.is_empty() {
            let count = room.min(arrived.len());
            let piece: Vec<u8> = arrived.drain(..count).collect();
            let _ = lock(&self.port).uart.enqueue_raw_bytes(&piece);
            return;
        }
        let input = attachment.input.as_ref().filter(|_| arrived.is_empty());
        let output = attachment.output.as_ref();
        let (input_ready, output_ready) = self.wait(input, output, has_output);
        if let (Some(stream), false) = (input, input_ready.is_empty()) {
            let mut bytes = vec![0; MAX_DATAGRAM_BYTES];
            if let Ok(count) = stream.read(&mut bytes) {
                arrived.extend(&bytes[..count]);
            }
        } else if let (Some(stream), true) = (output, output_ready.contains(PollFlags::POLLERR)) {
            stream.forget_error();
        }
        if let (Some(stream), true) = (output, output_ready.contains(PollFlags::POLLOUT)) {
            let bytes: Vec<u8> = lock(&self.shared.buffer).iter().take(DATAGRAM_BYTES).copied().collect();
            match stream.write(&bytes) {
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                // One that did not get through is lost, as on any network.
                Ok(_) | Err(_) => self.taken(bytes.len(), attachment.generation),
            }
        }
    }

    /// The peer has taken that much. When another was attached meanwhile, the buffer may no longer start with what was
    /// written: nothing is removed then, and the new peer gets it (again).
    fn taken(&self, count: usize, generation: u64) {
        let attachment = lock(&self.shared.attachment);
        if attachment.generation == generation {
            let mut buffer = lock(&self.shared.buffer);
            let present = buffer.len();
            drop(buffer.drain(..count.min(present)));
            self.shared.taken.notify_all();
        }
    }

    /// Waits for a wake-up or one of the peers; returns what they are ready for.
    fn wait(
        &self,
        input: Option<&Arc<Stream>>,
        output: Option<&Arc<Stream>>,
        has_output: bool,
    ) -> (PollFlags, PollFlags) {
        let wanted = if has_output {
            PollFlags::POLLOUT
        } else {
            PollFlags::empty()
        };
        let mut fds = vec![PollFd::new(borrow(&self.shared.wake), PollFlags::POLLIN)];
        fds.extend(input.map(|stream| PollFd::new(stream.fd.as_fd(), PollFlags::POLLIN)));
        fds.extend(output.map(|stream| PollFd::new(stream.fd.as_fd(), wanted)));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => ipc::helper::die(&format!("serial: poll: {errno}")),
        }
        let mut results = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        let mut next = |present: bool| if present { results.next() } else { None }.unwrap_or(PollFlags::empty());
        if !next(true).is_empty() {
            let _ = self.shared.wake.read();
        }
        (next(input.is_some()), next(output.is_some()))
    }
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd is open as long as the reference lives.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// An attached fd: a socket, which is asked not to block, or anything else, which poll has found ready.
struct Stream {
    fd: ChardevFd,
    kind: Mutex<Kind>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Not yet known: treated as a socket until the kernel says ENOTSOCK.
    Unknown,
    Socket,
    Other,
}

impl Stream {
    fn new(fd: ChardevFd) -> Self {
        Self {
            fd,
            kind: Mutex::new(Kind::Unknown),
        }
    }

    fn is_socket(&self) -> bool {
        *lock(&self.kind) == Kind::Socket
    }

    /// Tries the socket call, and the plain one on what turns out not to be a socket.
    fn either(
        &self,
        socket: impl FnOnce() -> Result<usize, Errno>,
        other: impl FnOnce() -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        let mut kind = lock(&self.kind);
        if *kind != Kind::Other {
            let result = socket();
            if result != Err(Errno::ENOTSOCK) {
                *kind = Kind::Socket;
                return result;
            }
            *kind = Kind::Other;
        }
        drop(kind);
        other()
    }

    fn read(&self, bytes: &mut [u8]) -> Result<usize, Errno> {
        let fd = self.fd.as_fd();
        let bytes = std::cell::RefCell::new(bytes);
        self.either(
            || {
                let mut bytes = bytes.borrow_mut();
                let mut parts = [IoSliceMut::new(&mut bytes)];
                recvmsg::<()>(fd.as_raw_fd(), &mut parts, None, MsgFlags::MSG_DONTWAIT).map(|message| message.bytes)
            },
            || nix::unistd::read(fd, *bytes.borrow_mut()),
        )
    }

    /// Takes what the kernel has to report about an earlier datagram, so that poll does not report it again.
    fn forget_error(&self) {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
        let _ = recvmsg::<()>(
            self.fd.as_fd().as_raw_fd(),
            &mut [IoSliceMut::new(&mut [])],
            None,
            flags,
        );
    }

    fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        let fd = self.fd.as_fd();
        self.either(
            || {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                sendmsg::<()>(fd.as_raw_fd(), &[IoSlice::new(bytes)], &[], flags, None)
            },
            || nix::unistd::write(fd, &bytes[..bytes.len().min(STREAM_CHUNK_BYTES)]),
        )
    }
}

#[cfg(test)]
mod tests;
