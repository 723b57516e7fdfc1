//! All character devices by label: what `query-chardev` lists, what `chardev-add` makes and `chardev-remove` takes away.
//!
//! The bytes of one in use go past here: its frontend ([`super::serial`], [`super::monitor`]) has its descriptors. A ring
//! buffer is the exception: vcpu-proc writes into a socket, and this process reads a bounded piece at a time from it, so
//! that a guest that writes without end costs neither memory nor anybody's turn.

mod add;
pub(super) use add::inet;

pub use add::{add, change};

use super::Vm;
use super::monitor::MonitorIndex;
use crate::chardev::ring::{self, Ring};
use crate::chardev::{Chardev, Dialer, Name, Opened, RawTerminal, Source, Streams};
use crate::executor::Turnstile;
use crate::logging;
use crate::opener::sockets;
use crate::sys::Poller;
use ipc::chardev::{ChardevBackendInfo, ChardevInfo, DataFormat};
use ipc::opener::{OpenError, OpenRequest, OpenStep, OpenedSocket};
use ipc::qmp::QmpError;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Instant;

/// Devices at most.
const MAX_DEVICES: usize = 128;
/// Bytes of all ring buffers together.
const MAX_RING_BYTES: usize = 64 << 20;
/// Bytes of the longest label.
const MAX_LABEL_BYTES: usize = 1024;
/// Bytes read from a ring buffer's socket at a time.
const PIECE_BYTES: usize = 16 << 10;
/// Pieces that one ringbuf-read takes in before it answers.
const MAX_PIECES: usize = 32;

/// Why a command about a character device is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// chardev-remove: it is not there.
    #[error("Chardev '{0}' not found")]
    NotFound(String),
    /// chardev-remove: it has a frontend.
    #[error("Chardev '{0}' is busy")]
    Busy(String),
    /// chardev-add: the id is taken.
    #[error("Chardev with id '{0}' already exists")]
    Exists(String),
    /// chardev-add: the id is not one.
    #[error("Parameter 'id' expects 1 to {MAX_LABEL_BYTES} bytes")]
    Label,
    /// chardev-add: it cannot be made.
    #[error("Failed to add chardev '{0}': {1}")]
    Add(String, String),
    /// chardev-change: it is not there.
    #[error("Chardev '{0}' does not exist")]
    Missing(String),
    /// chardev-change: its user must keep it.
    #[error("Chardev user does not support chardev hotswap")]
    Hotswap,
    /// chardev-change: the new one cannot be made.
    #[error("{0}")]
    Change(String),
    /// ringbuf-read, ringbuf-write: it is not there.
    #[error("Device '{0}' not found")]
    NoDevice(String),
    /// ringbuf-read, ringbuf-write: it is something else.
    #[error("{0} is not a ringbuf device")]
    NoRing(String),
    /// ringbuf-read: nothing is asked for.
    #[error("size must be greater than zero")]
    Size,
    /// ringbuf-write: not Base64.
    #[error("Base64 data contains invalid characters")]
    Base64,
}

impl From<Error> for QmpError {
    fn from(error: Error) -> Self {
        Self::generic(error.to_string())
    }
}

/// Who uses a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frontend {
    /// Nobody.
    None,
    /// The serial port.
    Serial,
    /// The qtest server.
    Qtest,
    /// A monitor.
    Monitor(MonitorIndex),
}

/// Names a device in the event loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChardevNumber(u64);

struct Entry {
    number: ChardevNumber,
    label: String,
    name: Rc<Name>,
    frontend: Frontend,
    held: Held,
}

/// What this process itself keeps of a device.
enum Held {
    /// Nothing: it is with its frontend, or is nothing.
    Nothing,
    /// Descriptors that nobody uses yet; held, because they are the device.
    #[expect(dead_code, reason = "held open only")]
    Streams(Streams),
    /// Standard input and output, and the terminal there in raw mode.
    Terminal(Streams, Option<RawTerminal>),
    /// A socket without a frontend: it has one connection at a time all the same.
    Socket { source: Source, client: Option<OwnedFd> },
    /// A ring buffer, and where a frontend's output comes from.
    Ring { ring: Ring, feed: Option<OwnedFd> },
}

/// The table of character devices.
#[derive(Default)]
pub struct Chardevs {
    entries: RefCell<Vec<Entry>>,
    /// Labels of devices that are being made.
    reserved: RefCell<Vec<String>>,
    /// One device is changed at a time.
    change: Turnstile,
    next: std::cell::Cell<u64>,
}

impl Chardevs {
    /// Adds a device with a frontend, and returns what the frontend gets.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn connect(&self, label: &str, opened: Opened, frontend: Frontend) -> Result<Chardev, Errno> {
        let Opened { device, name } = opened;
        let (held, device) = for_frontend(device)?;
        self.push(label, name, frontend, held);
        Ok(device)
    }

    /// Adds a device that nobody uses.
    pub fn keep(&self, label: &str, opened: Opened) -> ChardevNumber {
        let Opened { device, name } = opened;
        let held = match device {
            Chardev::Null => Held::Nothing,
            Chardev::Connected(streams) if matches!(*name, Name::Socket(_)) => Held::Socket {
                source: Source::Spent,
                client: streams.input,
            },
            Chardev::Connected(streams) => Held::Streams(streams),
            Chardev::Listening(listener) => Held::Socket {
                source: Source::Listening(listener),
                client: None,
            },
            Chardev::Dialing(dialer) => Held::Socket {
                source: Source::Dialing(dialer),
                client: None,
            },
            Chardev::Ring(ring) => Held::Ring { ring, feed: None },
        };
        self.push(label, name, Frontend::None, held)
    }

    fn push(&self, label: &str, name: Rc<Name>, frontend: Frontend, held: Held) -> ChardevNumber {
        let number = ChardevNumber(self.next.get());
        self.next.set(number.0 + 1);
        self.entries.borrow_mut().push(Entry {
            number,
            label: label.to_owned(),
            name,
            frontend,
            held,
        });
        number
    }

    /// Registers what it waits for.
    pub fn watch<T>(&self, poller: &mut Poller<T>, token: impl Fn(ChardevNumber) -> T) {
        for entry in self.entries.borrow().iter() {
            match &entry.held {
                Held::Socket {
                    client: Some(client), ..
                } => poller.add(client.as_fd(), libc::POLLRDHUP, token(entry.number)),
                Held::Socket {
                    source: Source::Listening(listener),
                    client: None,
                } => poller.add(listener.as_fd(), libc::POLLIN, token(entry.number)),
                Held::Ring { feed: Some(feed), .. } => poller.add(feed.as_fd(), libc::POLLIN, token(entry.number)),
                Held::Nothing
                | Held::Streams(_)
                | Held::Terminal(..)
                | Held::Socket { client: None, .. }
                | Held::Ring { feed: None, .. } => {}
            }
        }
    }

    /// Something has happened to a device.
    pub fn ready(&self, number: ChardevNumber) {
        let mut entries = self.entries.borrow_mut();
        let Some(entry) = entries.iter_mut().find(|entry| entry.number == number) else {
            return;
        };
        match &mut entry.held {
            Held::Socket { source, client } => {
                *client = match (&client, &source) {
                    (Some(_), source) => {
                        source.closed();
                        None
                    }
                    (None, Source::Listening(listener)) => listener.accept(),
                    (None, Source::Dialing(_) | Source::Spent) => None,
                };
            }
            held @ Held::Ring { .. } => take_in(held, 1),
            Held::Nothing | Held::Streams(_) | Held::Terminal(..) => {}
        }
    }

    fn ring_bytes(&self) -> usize {
        let entries = self.entries.borrow();
        let sizes = entries.iter().map(|entry| match &entry.held {
            Held::Ring { ring, .. } => ring.size(),
            _ => 0,
        });
        sizes.sum()
    }

    /// `chardev-remove`.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Busy`].
    pub fn remove(&self, id: String) -> Result<(), Error> {
        let mut entries = self.entries.borrow_mut();
        let Some(place) = entries.iter().position(|entry| entry.label == id) else {
            return Err(Error::NotFound(id));
        };
        if entries[place].frontend != Frontend::None {
            return Err(Error::Busy(id));
        }
        drop(entries.remove(place));
        Ok(())
    }

    /// `ringbuf-write`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn write(&self, device: &str, data: String, format: Option<DataFormat>) -> Result<(), Error> {
        self.with_ring(device, |held| {
            let bytes = match format {
                Some(DataFormat::Base64) => ring::from_base64(&data).ok_or(Error::Base64)?,
                Some(DataFormat::Utf8) | None => data.into_bytes(),
            };
            take_in(held, MAX_PIECES);
            if let Held::Ring { ring, .. } = held {
                ring.write(&bytes);
            }
            Ok(())
        })
    }

    /// `ringbuf-read`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn read(&self, device: &str, size: i64, format: Option<DataFormat>) -> Result<String, Error> {
        self.with_ring(device, |held| {
            if size <= 0 {
                return Err(Error::Size);
            }
            take_in(held, MAX_PIECES);
            let bytes = match held {
                Held::Ring { ring, .. } => ring.read(usize::try_from(size).unwrap_or(usize::MAX).min(MAX_READ_BYTES)),
                _ => Vec::new(),
            };
            Ok(match format {
                Some(DataFormat::Base64) => ring::to_base64(&bytes),
                Some(DataFormat::Utf8) | None => String::from_utf8_lossy(&bytes).into_owned(),
            })
        })
    }

    fn with_ring<T>(&self, device: &str, act: impl FnOnce(&mut Held) -> Result<T, Error>) -> Result<T, Error> {
        let mut entries = self.entries.borrow_mut();
        match entries.iter_mut().find(|entry| entry.label == device) {
            None => Err(Error::NoDevice(device.to_owned())),
            Some(entry) if matches!(entry.held, Held::Ring { .. }) => act(&mut entry.held),
            Some(_) => Err(Error::NoRing(device.to_owned())),
        }
    }
}

/// What stays here of a device with a frontend, and what the frontend gets: of a ring buffer a socket that feeds it.
fn for_frontend(device: Chardev) -> Result<(Held, Chardev), Errno> {
    let Chardev::Ring(ring) = device else {
        return Ok((Held::Nothing, device));
    };
    let (feed, output) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
    let streams = Streams {
        output: Some(output),
        ..Streams::default()
    };
    let feed = Some(feed);
    Ok((Held::Ring { ring, feed }, Chardev::Connected(streams)))
}

/// Bytes that one ringbuf-read returns at most: three of them may become nine in UTF-8, and a message has a limit.
const MAX_READ_BYTES: usize = 4 << 20;

/// Moves what has arrived into the ring, some pieces at most.
fn take_in(held: &mut Held, pieces: usize) {
    let Held::Ring { ring, feed } = held else { return };
    let mut bytes = vec![0; PIECE_BYTES];
    for _ in 0..pieces {
        let Some(socket) = feed else { return };
        match recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => *feed = None,
            Ok(count) => ring.write(&bytes[..count]),
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            Err(_) => *feed = None,
        }
    }
}

/// `query-chardev`.
pub fn list(vm: &Vm) -> Vec<ChardevInfo> {
    let info = |entry: &Entry| {
        let connected = match (entry.frontend, &entry.held) {
            (Frontend::Serial, _) => vm.serial.is_connected(),
            (Frontend::Qtest, _) => vm.qtest.is_connected(),
            (Frontend::Monitor(index), _) => vm.monitors[index.0].has_sessions(),
            (Frontend::None, Held::Socket { client, .. }) => client.is_some(),
            (Frontend::None, _) => true,
        };
        ChardevInfo {
            label: entry.label.clone(),
            filename: entry.name.filename(connected),
            frontend_open: entry.frontend != Frontend::None,
        }
    };
    vm.chardevs.entries.borrow().iter().map(info).collect()
}

/// `query-chardev-backends`.
pub fn backends() -> Vec<ChardevBackendInfo> {
    let info = |name: &&str| ChardevBackendInfo {
        name: (*name).to_owned(),
    };
    ipc::chardev::BACKENDS.iter().map(info).collect()
}

/// Begins to connect the devices for which it is time.
pub fn connect(vm: &Rc<Vm>, now: Instant) {
    for number in vm.chardevs.take_due(now) {
        let vm = Rc::clone(vm);
        let executor = Rc::clone(&vm);
        executor.executor.spawn(async move {
            // The device may be removed while it is being connected.
            let Some((label, request)) = vm
                .chardevs
                .with_dialer(number, |label, dialer| (label.to_owned(), dialer.request()))
            else {
                return;
            };
            let result = match request {
                Ok(request) => Ok(open(&vm, request).await),
                Err(unknown) => Err(unknown),
            };
            vm.chardevs.connected(number, &label, result);
        });
    }
}

/// Has a dialer's socket opened: the connection, or `None` and another attempt later.
pub async fn dial(vm: &Vm, label: &str, dialer: &Dialer) -> Option<OwnedFd> {
    let result = match dialer.request() {
        Ok(request) => open(vm, request).await.map_err(|error| dialer.failure(error)),
        Err(unknown) => Err(unknown),
    };
    dialer.finish(result).map_err(|error| complain(label, error)).ok()
}

fn complain(label: &str, error: Option<crate::chardev::SocketFailure>) {
    if let Some(error) = error {
        logging::line(format_args!("character device {label} is not connected: {error}"));
    }
}

/// Has the opener make a socket. A stale socket file is removed here, and it is asked again.
pub(super) async fn open(vm: &Vm, request: OpenRequest) -> Result<OpenedSocket, OpenError> {
    let path = sockets::listens_at(&request);
    match (ask_opener(vm, request).await, path) {
        (Err(error), Some(path)) if error.step == OpenStep::Stale => {
            sockets::remove_stale(&path)?;
            ask_opener(vm, OpenRequest::ListenUnix { path }).await
        }
        (result, _) => result,
    }
}

async fn ask_opener(vm: &Vm, request: OpenRequest) -> Result<OpenedSocket, OpenError> {
    match &vm.opener {
        Some(opener) => opener.open(request).await,
        None => Err(OpenError {
            step: OpenStep::Opener,
            errno: Errno::ENOSYS as i32,
        }),
    }
}

impl Chardevs {
    /// When the next device is to connect.
    pub fn due(&self) -> Option<Instant> {
        let entries = self.entries.borrow();
        let due = entries.iter().filter_map(|entry| match &entry.held {
            Held::Socket { source, client: None } => source.due(),
            _ => None,
        });
        due.min()
    }

    fn take_due(&self, now: Instant) -> Vec<ChardevNumber> {
        let entries = self.entries.borrow();
        let due = entries.iter().filter(|entry| match &entry.held {
            Held::Socket {
                source: Source::Dialing(dialer),
                client: None,
            } => dialer.take_due(now),
            _ => false,
        });
        due.map(|entry| entry.number).collect()
    }

    fn with_dialer<T>(&self, number: ChardevNumber, act: impl FnOnce(&str, &Dialer) -> T) -> Option<T> {
        let entries = self.entries.borrow();
        let entry = entries.iter().find(|entry| entry.number == number)?;
        match &entry.held {
            Held::Socket {
                source: Source::Dialing(dialer),
                ..
            } => Some(act(&entry.label, dialer)),
            _ => None,
        }
    }

    /// The end of an attempt. Of a device that is gone the connection is closed.
    fn connected(
        &self,
        number: ChardevNumber,
        label: &str,
        result: Result<Result<OpenedSocket, OpenError>, crate::chardev::SocketFailure>,
    ) {
        let mut entries = self.entries.borrow_mut();
        let Some(entry) = entries.iter_mut().find(|entry| entry.number == number) else {
            return;
        };
        if let Held::Socket {
            source: Source::Dialing(dialer),
            client,
        } = &mut entry.held
        {
            let result = result.and_then(|result| result.map_err(|error| dialer.failure(error)));
            match dialer.finish(result) {
                Ok(connection) => *client = Some(connection),
                Err(error) => complain(label, error),
            }
        }
    }
}
