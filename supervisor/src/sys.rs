//! The supervisor's few system calls that nix does not have in a usable form.

use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

/// Descriptors of one wait, each with a token that says what to do when it is ready.
pub struct Poller<T> {
    fds: Vec<libc::pollfd>,
    tokens: Vec<T>,
}

impl<T: Copy> Default for Poller<T> {
    fn default() -> Self {
        Self {
            fds: Vec::new(),
            tokens: Vec::new(),
        }
    }
}

impl<T> Poller<T> {
    /// Watches a descriptor, which must stay open until [`Self::wait`] has returned.
    pub fn add(&mut self, fd: BorrowedFd<'_>, events: i16, token: T) {
        self.fds.push(libc::pollfd {
            fd: fd.as_raw_fd(),
            events,
            revents: 0,
        });
        self.tokens.push(token);
    }
}

impl<T: Copy> Poller<T> {
    /// Waits for the first ready descriptor or the deadline, and returns the tokens of all that are ready, each with
    /// whether there is something to read or write. If not, the other side has hung up.
    ///
    /// # Errors
    /// A system error other than an interruption.
    pub fn wait(mut self, deadline: Option<Instant>) -> Result<Vec<(T, bool)>, Errno> {
        let timeout = deadline.map_or(-1, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
            i32::try_from(left.as_millis()).unwrap_or(i32::MAX)
        });
        // SAFETY: a valid array of pollfds and its length.
        let ready = unsafe { libc::poll(self.fds.as_mut_ptr(), self.fds.len() as libc::nfds_t, timeout) };
        if ready < 0 {
            return if Errno::last() == Errno::EINTR {
                Ok(Vec::new())
            } else {
                Err(Errno::last())
            };
        }
        let ready = self.fds.iter().zip(&self.tokens).filter(|(fd, _)| fd.revents != 0);
        Ok(ready
            .map(|(fd, token)| (*token, fd.revents & (libc::POLLIN | libc::POLLOUT) != 0))
            .collect())
    }
}

/// Kills the process that a pidfd names. That it has ended already is no error.
pub fn kill_by_pidfd(pidfd: BorrowedFd<'_>) {
    // SAFETY: plain numbers; a pidfd can only ever name one process.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), libc::SIGKILL, 0, 0) };
}

/// Alignment that O_DIRECT requests to a regular file must keep, bytes; `None` where the kernel does not say.
pub fn direct_io_alignment(fd: BorrowedFd<'_>) -> Option<u32> {
    // SAFETY: all-zero is a valid statx buffer.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_EMPTY_PATH;
    // SAFETY: an empty C string and a buffer of the right type.
    let result = unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            libc::STATX_DIOALIGN,
            &raw mut status,
        )
    };
    (result == 0 && status.stx_mask & libc::STATX_DIOALIGN != 0 && status.stx_dio_offset_align > 0)
        .then_some(status.stx_dio_offset_align)
}

/// Ends the process without the standard library's clean-up, whose system calls (removing the signal stack) the sealed
/// supervisor has no other use for.
pub fn exit_now(failed: bool) -> ! {
    // SAFETY: ends the process; everything that must be undone has been dropped by the caller.
    unsafe { libc::_exit(i32::from(failed)) }
}

nix::ioctl_readwrite!(seccomp_notification_receive, b'!', 0, libc::seccomp_notif);
nix::ioctl_readwrite!(seccomp_notification_send, b'!', 1, libc::seccomp_notif_resp);

/// Receives one notification of a seccomp listener.
///
/// # Errors
/// `ENOENT` when the notifying thread is gone already.
pub fn receive_notification(listener: BorrowedFd<'_>) -> Result<libc::seccomp_notif, Errno> {
    // SAFETY: the structure is plain data, and the kernel demands that it is zero.
    let mut notification: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the request's type is this structure.
    unsafe { seccomp_notification_receive(listener.as_raw_fd(), &raw mut notification) }?;
    Ok(notification)
}

/// Has the kernel carry out the call that a notification is about. That its thread is gone is no error.
pub fn continue_notified(listener: BorrowedFd<'_>, id: u64) {
    let mut response = libc::seccomp_notif_resp {
        id,
        val: 0,
        error: 0,
        flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
    };
    // SAFETY: the request's type is this structure.
    let _ = unsafe { seccomp_notification_send(listener.as_raw_fd(), &raw mut response) };
}
