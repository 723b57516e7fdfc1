//! What every helper does first, and how it writes a log line.
//!
//! The launcher hands a helper three descriptors and no more: the channel, and the log socket as standard output and
//! standard error. There is no /proc, no file system and no environment.

use crate::channel::Channel;
use crate::message::Message;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

/// The helper's end of its channel.
pub const CHANNEL_FD: i32 = 0;
/// The log socket (also standard output's number, so that nothing else can take it).
pub const LOG_FD: i32 = 2;
/// Exit status after a panic, like a process that died of SIGABRT seen by a shell.
pub const PANIC_STATUS: i32 = 134;
/// Exit status when the channel is gone or its peer breaks the protocol.
pub const CHANNEL_LOST_STATUS: i32 = 3;
/// Longest log line that the supervisor keeps, bytes.
pub const MAX_LOG_LINE_BYTES: usize = 1000;

/// Makes this process undumpable, installs the panic hook and takes over the channel. Call it once, first in `main`.
pub fn start<Out: Message, In: Message>() -> Channel<Out, In> {
    // exec has made the process dumpable again; without this a process of the same uid could attach to it.
    if let Err(errno) = nix::sys::prctl::set_dumpable(false) {
        die(&format!("prctl(PR_SET_DUMPABLE): {errno}"));
    }
    std::panic::set_hook(Box::new(|info| {
        // The standard path would open /proc and unwind; one line and the end is all that the sealed filter allows.
        log(&format!("panic: {info}").replace('\n', " "));
        exit_now(PANIC_STATUS);
    }));
    // SAFETY: the launcher put the channel at this number and nothing in this process has touched it yet.
    Channel::new(unsafe { OwnedFd::from_raw_fd(CHANNEL_FD) })
}

unsafe extern "C" {
    /// The linker's name of the program's first byte in memory.
    static __ehdr_start: u8;
}

/// Where this program is loaded: what an address in it is relative to. The supervisor finds the functions' names by it.
pub fn load_address() -> u64 {
    (&raw const __ehdr_start).addr() as u64
}

/// Writes one line to the log socket: one packet, which the supervisor prefixes with role, pid and VM name.
pub fn log(line: &str) {
    let bytes = &line.as_bytes()[..line.len().min(MAX_LOG_LINE_BYTES)];
    // SAFETY: the descriptor is open for the life of the process.
    let fd = unsafe { BorrowedFd::borrow_raw(LOG_FD) };
    // A full log socket loses the line: a helper never waits for its log.
    let _ = nix::unistd::write(fd, bytes);
}

/// Logs why and ends the process with [`CHANNEL_LOST_STATUS`].
pub fn die(line: &str) -> ! {
    log(line);
    exit_now(CHANNEL_LOST_STATUS)
}

/// Ends all threads at once, without running destructors or exit handlers.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: exit_group has no memory effects that matter: the process is gone.
    unsafe { libc::_exit(status) }
}
