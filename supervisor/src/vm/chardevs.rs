//! All character devices by label: what `query-chardev` lists, what `chardev-add` makes and `chardev-remove` takes away.
//!
//! The bytes of one in use go past here: its frontend ([`super::serial`], [`super::monitor`]) has its descriptors. A ring
//! buffer is the exception: vcpu-proc writes into a socket, and this process reads a bounded piece at a time from it, so
//! that a guest that writes without end costs neither memory nor anybody's turn.

use super::Vm;
use super::monitor::MonitorIndex;
use crate::chardev::ring::{self, Ring};
use crate::chardev::{self, Chardev, ChardevError, Listener, Name, Opened, Streams};
use crate::config::CharBackend;
use crate::sys::Poller;
use ipc::chardev::{Backend, ChardevBackendInfo, ChardevInfo, ChardevReturn, DataFormat, File, Pipe, Ringbuf};
use ipc::qmp::QmpError;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;

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
/// What chardev-add makes.
const BACKENDS: [&str; 5] = ["null", "file", "pipe", "pty", "ringbuf"];

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
    /// A listening socket without a frontend: it has one client at a time all the same.
    Socket {
        listener: Listener,
        client: Option<OwnedFd>,
    },
    /// A ring buffer, and where a frontend's output comes from.
    Ring { ring: Ring, feed: Option<OwnedFd> },
}

/// The table of character devices.
#[derive(Default)]
pub struct Chardevs {
    entries: RefCell<Vec<Entry>>,
    next: std::cell::Cell<u64>,
}

impl Chardevs {
    /// Adds a device with a frontend, and returns what the frontend gets.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn connect(&self, label: &str, opened: Opened, frontend: Frontend) -> Result<Chardev, Errno> {
        let Opened { device, name } = opened;
        let (held, device) = match device {
            Chardev::Ring(ring) => {
                let (feed, output) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
                let streams = Streams {
                    input: None,
                    output: Some(output),
                    keep: None,
                };
                let feed = Some(feed);
                (Held::Ring { ring, feed }, Chardev::Connected(streams))
            }
            device => (Held::Nothing, device),
        };
        self.push(label, name, frontend, held);
        Ok(device)
    }

    /// Adds a device that nobody uses.
    pub fn keep(&self, label: &str, opened: Opened) {
        let Opened { device, name } = opened;
        let held = match device {
            Chardev::Null => Held::Nothing,
            Chardev::Connected(streams) => Held::Streams(streams),
            Chardev::Listening(listener) => Held::Socket { listener, client: None },
            Chardev::Ring(ring) => Held::Ring { ring, feed: None },
        };
        self.push(label, name, Frontend::None, held);
    }

    fn push(&self, label: &str, name: Rc<Name>, frontend: Frontend, held: Held) {
        let number = ChardevNumber(self.next.get());
        self.next.set(number.0 + 1);
        self.entries.borrow_mut().push(Entry {
            number,
            label: label.to_owned(),
            name,
            frontend,
            held,
        });
    }

    /// Registers what it waits for.
    pub fn watch<T>(&self, poller: &mut Poller<T>, token: impl Fn(ChardevNumber) -> T) {
        for entry in self.entries.borrow().iter() {
            match &entry.held {
                Held::Socket {
                    client: Some(client), ..
                } => poller.add(client.as_fd(), libc::POLLRDHUP, token(entry.number)),
                Held::Socket { listener, client: None } => {
                    poller.add(listener.as_fd(), libc::POLLIN, token(entry.number));
                }
                Held::Ring { feed: Some(feed), .. } => poller.add(feed.as_fd(), libc::POLLIN, token(entry.number)),
                Held::Nothing | Held::Streams(_) | Held::Ring { feed: None, .. } => {}
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
            Held::Socket { listener, client } => {
                *client = match client {
                    Some(_) => None,
                    None => listener.accept(),
                };
            }
            held @ Held::Ring { .. } => take_in(held, 1),
            Held::Nothing | Held::Streams(_) => {}
        }
    }

    /// `chardev-add`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn add(&self, id: String, backend: Backend) -> Result<ChardevReturn, Error> {
        if id.is_empty() || id.len() > MAX_LABEL_BYTES {
            return Err(Error::Label);
        }
        if self.entries.borrow().iter().any(|entry| entry.label == id) {
            return Err(Error::Exists(id));
        }
        let opened = self.make(backend).map_err(|problem| Error::Add(id.clone(), problem))?;
        let pty = match &*opened.name {
            Name::Pty(path) => Some(path.display().to_string()),
            _ => None,
        };
        self.keep(&id, opened);
        Ok(ChardevReturn { pty })
    }

    fn make(&self, backend: Backend) -> Result<Opened, String> {
        if self.entries.borrow().len() >= MAX_DEVICES {
            return Err(format!("there are {MAX_DEVICES} already: remove some"));
        }
        let backend = match backend {
            Backend::Null(_) => CharBackend::Null,
            Backend::Pty(_) => CharBackend::Pty,
            Backend::File(File { input, output, append }) => CharBackend::File {
                path: output.into(),
                input: input.map(Into::into),
                append: append.unwrap_or(false),
            },
            Backend::Pipe(Pipe { device }) => CharBackend::Pipe(device.into()),
            Backend::Ringbuf(Ringbuf { size }) => {
                let size = match size {
                    Some(size) => ring::check_size(u64::try_from(size).unwrap_or(0))?,
                    None => ring::DEFAULT_BYTES,
                };
                if self.ring_bytes() + size > MAX_RING_BYTES {
                    return Err(format!(
                        "all ringbuf chardevs together have at most {MAX_RING_BYTES} bytes"
                    ));
                }
                CharBackend::Ring(size)
            }
        };
        chardev::open("chardev-add", &backend).map_err(|error: ChardevError| error.reply())
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

/// `query-chardev-backends`: what the command line has besides what chardev-add makes counts as well.
pub fn backends() -> Vec<ChardevBackendInfo> {
    let names = BACKENDS.iter().chain(&["socket", "stdio"]);
    names
        .map(|name| ChardevBackendInfo {
            name: (*name).to_owned(),
        })
        .collect()
}
