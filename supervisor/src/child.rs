//! A process that the supervisor has forked itself: the launcher, the opener. They end when their channel closes, and whoever
//! does not (because somebody else has taken it over) is ended.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

/// How long one gets to end by itself, milliseconds. The launcher ends all helpers meanwhile.
const GRACE_MS: u16 = 2000;

/// See the module.
pub struct Child {
    /// Its process id.
    pub pid: Pid,
    pidfd: OwnedFd,
}

impl Child {
    /// Takes charge of a process that was just forked. Before the seal: nobody else can be this process.
    ///
    /// # Errors
    /// When this process is out of descriptors.
    pub fn new(pid: Pid) -> Result<Self, Errno> {
        // SAFETY: plain numbers; the result is checked and is a new fd of ours, close-on-exec.
        let pidfd = unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0);
            if fd < 0 {
                return Err(Errno::last());
            }
            OwnedFd::from_raw_fd(fd as i32)
        };
        Ok(Self { pid, pidfd })
    }

    /// Returns when it is gone. Its channel is closed already.
    pub fn end(self) {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        while poll(&mut fds, PollTimeout::from(GRACE_MS)) == Err(Errno::EINTR) {}
        // One that has ended does not hear it.
        crate::sys::kill_by_pidfd(self.pidfd.as_fd());
        let _ = nix::sys::wait::waitpid(self.pid, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::{ForkResult, fork};

    #[test]
    fn one_that_does_not_go_by_itself_is_ended() {
        // SAFETY: the child makes system calls only.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => loop {
                // SAFETY: waits for a signal.
                unsafe { libc::pause() };
            },
            ForkResult::Parent { child } => {
                Child::new(child).unwrap().end();
                assert_eq!(nix::sys::signal::kill(child, None), Err(Errno::ESRCH));
            }
        }
    }
}
