//! The I/O engines: who talks to the kernel about host files, and who waits for it.
//!
//! An engine takes [`Operation`]s by value and hands each back with its result, so that the memory that the kernel works
//! on is owned by the engine for exactly as long as the kernel may touch it. The same wait reports eventfds that were
//! signalled: one blocking call per turn of the data plane.

pub mod io_uring;
mod pool;
mod syscalls;
mod table;
pub mod threads;

use crate::buffer::Segments;
use ipc::block::EngineChoice;
use nix::errno::Errno;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

#[cfg(test)]
mod tests;

/// The engine's name for an open host file, from [`Engine::add_file`] to [`Engine::remove_file`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileId(pub u32);

/// What `fallocate` does to a range; the file's size never changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeMode {
    /// Gives the space back; reads as zeroes.
    PunchHole,
    /// Reads as zeroes; the space stays allocated.
    Zero,
    /// Gets space where it has none, also past the end.
    Allocate,
}

impl RangeMode {
    /// The mode argument of fallocate(2). KEEP_SIZE is obligatory with PUNCH_HOLE, and block devices insist on it.
    pub fn flags(self) -> i32 {
        match self {
            Self::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Self::Zero => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
            Self::Allocate => libc::FALLOC_FL_KEEP_SIZE,
        }
    }
}

/// One system operation on a host file. Offsets and lengths are bytes.
#[derive(Debug)]
pub enum Operation {
    /// preadv.
    Read {
        /// The file.
        file: FileId,
        /// Where.
        offset: u64,
        /// Into what.
        segments: Segments,
    },
    /// preadv at the file's own position; it may wait for ever. From a socket that never blocks it ends with EAGAIN, or waits
    /// where that costs no thread.
    ReadStream {
        /// The file.
        file: FileId,
        /// Into what.
        segments: Segments,
    },
    /// pwritev at no position: to a socket that never blocks. EAGAIN as above.
    WriteStream {
        /// The file.
        file: FileId,
        /// From what.
        segments: Segments,
    },
    /// Waits until a socket that never blocks can be read from or written to, or has failed. Whoever gives it up says so
    /// with [`Engine::cancel_wait`].
    Ready {
        /// The socket.
        file: FileId,
        /// Whether it is to be written to.
        to_write: bool,
    },
    /// pwritev, with RWF_DSYNC when `durable`.
    Write {
        /// The file.
        file: FileId,
        /// Where.
        offset: u64,
        /// From what.
        segments: Segments,
        /// On stable storage when it completes.
        durable: bool,
    },
    /// fdatasync.
    Sync {
        /// The file.
        file: FileId,
    },
    /// fallocate.
    Range {
        /// The file.
        file: FileId,
        /// Where.
        offset: u64,
        /// How much.
        bytes: u64,
        /// What becomes of it.
        mode: RangeMode,
    },
    /// ftruncate.
    Truncate {
        /// The file.
        file: FileId,
        /// Its new length.
        bytes: u64,
    },
    /// lseek, for holes: the file's own position moves, which nobody uses. The result is where the data or the hole at the
    /// offset ends; ENXIO: a hole, and nothing behind it.
    Extent {
        /// The file.
        file: FileId,
        /// From where on.
        offset: u64,
        /// Set if there is data.
        is_data: AtomicBool,
    },
    /// ioctl BLKDISCARD: block devices only.
    Discard {
        /// The block device.
        file: FileId,
        /// Where.
        offset: u64,
        /// How much.
        bytes: u64,
    },
}

impl Operation {
    /// The file that it is about.
    pub fn file(&self) -> FileId {
        match *self {
            Self::Read { file, .. }
            | Self::ReadStream { file, .. }
            | Self::WriteStream { file, .. }
            | Self::Ready { file, .. }
            | Self::Write { file, .. }
            | Self::Sync { file }
            | Self::Range { file, .. }
            | Self::Truncate { file, .. }
            | Self::Extent { file, .. }
            | Self::Discard { file, .. } => file,
        }
    }

    /// How many bytes it moves.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Read { segments, .. }
            | Self::Write { segments, .. }
            | Self::ReadStream { segments, .. }
            | Self::WriteStream { segments, .. } => segments.bytes(),
            _ => 0,
        }
    }
}

/// An operation that is over.
#[derive(Debug)]
pub struct Completion {
    /// As given to [`Engine::submit`].
    pub token: u32,
    /// Bytes moved (0 where none are), an extent's end, or the system's error.
    pub result: Result<usize, Errno>,
    /// The operation, handed back.
    pub operation: Operation,
}

/// What a wait can end with.
#[derive(Debug)]
pub enum Event {
    /// The eventfd with this number was written since the last report. Its counter is left as it is: the engines report
    /// edges, so nobody has to spend a system call on reading it.
    Signal(u32),
    /// An operation is over.
    Completed(Completion),
}

/// Interface of the engines. One thread uses an engine; it may be made on another.
pub trait Engine: Send {
    /// Which one it is: never `Auto`.
    fn choice(&self) -> EngineChoice;

    /// Reports writes to `eventfd` as [`Event::Signal`]. Only before [`Self::start`].
    ///
    /// # Errors
    /// The system's, or no room.
    fn watch(&mut self, eventfd: OwnedFd, signal: u32) -> std::io::Result<()>;

    /// Holds an open file for as long as the kernel may be at work on any operation, also after the process is gone. Only
    /// before [`Self::start`].
    ///
    /// # Errors
    /// The system's, or no room.
    fn hold(&mut self, file: BorrowedFd<'_>) -> std::io::Result<()>;

    /// Called once on the thread that will use the engine, before the process is sealed: starts the engine's threads, and
    /// from here on only what the sealed policy allows is used. `streams` is how many [`Operation::ReadStream`] there may
    /// be at a time: none of them delays another operation. Without `disks` there will be no others.
    ///
    /// # Errors
    /// The system's.
    fn start(&mut self, disks: bool, streams: usize) -> std::io::Result<()>;

    /// Takes a host file.
    ///
    /// # Errors
    /// The system's, or no room.
    fn add_file(&mut self, file: OwnedFd) -> std::io::Result<FileId>;

    /// Closes a file that no operation is about any more. Its name may be given to another one.
    fn remove_file(&mut self, file: FileId);

    /// Gives a file back that no operation is about any more, if nobody else has it.
    fn take_file(&mut self, file: FileId) -> Option<OwnedFd>;

    /// Queues an operation. `token` is free again when its completion was reported. Nothing need happen before the next
    /// [`Self::wait`].
    fn submit(&mut self, token: u32, operation: Operation);

    /// Has an operation on a socket end soon, with ECANCELED if nothing else: a ring waits for sockets by itself.
    fn cancel_wait(&mut self, token: u32);

    /// Starts what was queued, without waiting for anything.
    ///
    /// # Errors
    /// The system's: the engine is unusable then.
    fn flush(&mut self) -> std::io::Result<()>;

    /// Starts what was queued. Returns whether a wait would have something to report at once, as far as can be told without it.
    ///
    /// # Errors
    /// The system's: the engine is unusable then.
    fn begin(&mut self) -> std::io::Result<bool>;

    /// Starts what was queued and waits for at least one event, at most for `timeout`. May return with none.
    ///
    /// # Errors
    /// The system's: the engine is unusable then.
    fn wait(&mut self, events: &mut Vec<Event>, timeout: Option<Duration>) -> std::io::Result<()>;
}

/// Makes the engine that was asked for. `log` is told when `Auto` has to fall back.
///
/// # Errors
/// When the chosen one cannot be had here.
pub fn create(choice: EngineChoice, log: impl Fn(&str)) -> std::io::Result<Box<dyn Engine>> {
    match choice {
        EngineChoice::IoUring => Ok(Box::new(io_uring::IoUringEngine::new()?)),
        EngineChoice::Threads => Ok(Box::new(threads::ThreadEngine::new()?)),
        EngineChoice::Auto => match io_uring::IoUringEngine::new() {
            Ok(engine) => Ok(Box::new(engine)),
            Err(error) => {
                log(&format!(
                    "io_uring cannot be used here ({error}); block I/O uses threads"
                ));
                Ok(Box::new(threads::ThreadEngine::new()?))
            }
        },
    }
}
