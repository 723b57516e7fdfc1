//! Load on a monitor: a client that costs next to nothing itself, and clients that keep a server busy.

use crate::qmp::query_arguments;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::fs::File;
use std::io::{IoSlice, Read, Result, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A negotiated client that neither parses nor allocates: it counts the lines that are answers.
pub struct RawClient {
    /// The connection.
    pub stream: UnixStream,
    buffer: Box<[u8]>,
    /// Bytes read of the current line.
    column: usize,
    /// Whether the current line is an event, which nobody has asked for.
    is_event: bool,
    /// How many of the answers were errors.
    pub errors: u64,
}

impl RawClient {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// When nobody listens or the server ends the connection.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(crate::machine::PATIENCE))?;
        let mut client = Self {
            stream,
            buffer: vec![0; 256 << 10].into_boxed_slice(),
            column: 0,
            is_event: false,
            errors: 0,
        };
        client.answers(1)?; // The greeting.
        client.round_trip(&request("qmp_capabilities"))?;
        Ok(client)
    }

    /// Sends a request and reads its answer.
    ///
    /// # Errors
    /// When the connection ends.
    pub fn round_trip(&mut self, request: &[u8]) -> Result<()> {
        self.stream.write_all(request)?;
        self.answers(1)
    }

    /// Reads up to the end of the last of so many answers; no more than those are still to come.
    ///
    /// # Errors
    /// When the connection ends.
    pub fn answers(&mut self, mut count: usize) -> Result<()> {
        /// Where `{"timestamp"` differs from `{"return"`, `{"error"` and `{"QMP"`.
        const TELLING: usize = 2;
        while count > 0 {
            let length = self.stream.read(&mut self.buffer)?;
            if length == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let mut rest = &self.buffer[..length];
            while !rest.is_empty() {
                if self.column <= TELLING && self.column + rest.len() > TELLING {
                    let telling = rest[TELLING - self.column];
                    self.is_event = telling == b't';
                    self.errors += u64::from(telling == b'e');
                }
                match rest.iter().position(|byte| *byte == b'\n') {
                    Some(end) => {
                        count = count.saturating_sub(usize::from(!self.is_event));
                        self.column = 0;
                        rest = &rest[end + 1..];
                    }
                    None => {
                        self.column += rest.len();
                        rest = &[];
                    }
                }
            }
        }
        Ok(())
    }

    /// Passes a file descriptor along with a request.
    ///
    /// # Errors
    /// When the connection ends.
    pub fn round_trip_with_fd(&mut self, request: &[u8], fd: BorrowedFd<'_>) -> Result<()> {
        let fds = [fd.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&fds)];
        let sent = sendmsg::<()>(
            self.stream.as_raw_fd(),
            &[IoSlice::new(request)],
            &control,
            MsgFlags::empty(),
            None,
        )?;
        self.stream.write_all(&request[sent..])?;
        self.answers(1)
    }

    /// The durations of so many round trips, one after the other.
    ///
    /// # Errors
    /// When the connection ends.
    pub fn time(&mut self, request: &[u8], count: usize) -> Result<Vec<Duration>> {
        (0..count)
            .map(|_| {
                let begun = Instant::now();
                self.round_trip(request)?;
                Ok(begun.elapsed())
            })
            .collect()
    }

    /// How long it takes to answer so many requests that are sent without waiting for the answers.
    ///
    /// # Errors
    /// When the connection ends.
    pub fn stream(&mut self, request: &[u8], count: usize) -> Result<Duration> {
        let mut writer = self.stream.try_clone()?;
        // Some at a time, as a program that writes through a buffer would.
        const AT_ONCE: usize = 16;
        let batch = request.repeat(AT_ONCE);
        let begun = Instant::now();
        let sender = std::thread::spawn(move || {
            for _ in 0..count / AT_ONCE {
                writer.write_all(&batch)?;
            }
            Ok(())
        });
        self.answers(count / AT_ONCE * AT_ONCE)?;
        let taken = begun.elapsed();
        sender
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("the sender panicked")))?;
        Ok(taken)
    }
}

/// A request for a query, or another command without arguments.
pub fn request(command: &str) -> Vec<u8> {
    let arguments = query_arguments(command);
    format!("{{\"execute\": \"{command}\", \"arguments\": {arguments}}}\n").into_bytes()
}

/// The value below which `share` of the values lie. Sorts them.
///
/// # Panics
/// When there are none.
pub fn percentile(values: &mut [Duration], share: f64) -> Duration {
    values.sort_unstable();
    values[((values.len() - 1) as f64 * share).round() as usize]
}

/// What a client that keeps the server busy does, again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// dump-guest-memory into a pipe that is read: all of the guest's memory each time.
    Dumps,
    /// getfd and closefd.
    Descriptors,
    /// A message of 63 MiB that is an error.
    Garbage,
}

/// A busy client in a thread of its own.
pub struct Busy {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

impl Busy {
    /// Begins.
    pub fn start(load: Load, socket: &Path) -> Self {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count, socket) = (Arc::clone(&stop), Arc::clone(&rounds), PathBuf::from(socket));
        let thread = std::thread::spawn(move || {
            let mut client = RawClient::connect(&socket)?;
            let garbage = match load {
                Load::Garbage => large_error(),
                _ => Vec::new(),
            };
            while !stopped.load(Ordering::Relaxed) {
                match load {
                    Load::Dumps => dump_to_pipe(&mut client)?,
                    Load::Descriptors => name_and_close(&mut client)?,
                    Load::Garbage => client.round_trip(&garbage)?,
                }
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        Self { stop, rounds, thread }
    }

    /// How often it has done its work.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// Ends it after the round that is under way.
    ///
    /// # Errors
    /// What it met.
    pub fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("the client panicked")))?;
        Ok(self.rounds.load(Ordering::Relaxed))
    }
}

/// A request of 63 MiB whose answer is an error.
pub fn large_error() -> Vec<u8> {
    let head = b"{\"execute\": \"query-status\", \"arguments\": {\"x\": \"";
    [&head[..], &vec![b'x'; 63 << 20], b"\"}}\n"].concat()
}

/// One dump of all memory into a pipe.
fn dump_to_pipe(client: &mut RawClient) -> Result<()> {
    let (mut reader, writer) = std::io::pipe()?;
    client.round_trip_with_fd(
        b"{\"execute\": \"getfd\", \"arguments\": {\"fdname\": \"dump\"}}\n",
        writer.as_fd(),
    )?;
    drop(writer);
    let drain = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
    let arguments = "{\"paging\": false, \"protocol\": \"fd:dump\"}";
    let request = format!("{{\"execute\": \"dump-guest-memory\", \"arguments\": {arguments}}}\n");
    client.stream.write_all(request.as_bytes())?;
    client.answers(1)?;
    drain
        .join()
        .unwrap_or_else(|_| Err(std::io::Error::other("the reader panicked")))?;
    Ok(())
}

fn name_and_close(client: &mut RawClient) -> Result<()> {
    let null = File::open("/dev/null")?;
    client.round_trip_with_fd(
        b"{\"execute\": \"getfd\", \"arguments\": {\"fdname\": \"n\"}}\n",
        null.as_fd(),
    )?;
    client.round_trip(b"{\"execute\": \"closefd\", \"arguments\": {\"fdname\": \"n\"}}\n")
}
