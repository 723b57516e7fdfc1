//! What a program on a Unix host does beside its work: signals, the pid file, running in the background.

use nix::fcntl::{OFlag, open};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::unistd::ForkResult;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Blocks the signals that end the machine and makes them readable.
///
/// # Errors
/// A system error.
pub fn block_signals() -> nix::Result<SignalFd> {
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD] {
        mask.add(signal);
    }
    mask.thread_block()?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// As many descriptors as this process may have.
pub fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Closes what the parent process left open and nothing has taken over: a descriptor that nobody knows of would outlive
/// every decision about who may hold what. All that this process opens or takes over closes on exec; that tells them apart.
pub fn close_inherited() {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    let numbers: Vec<i32> = std::fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        // SAFETY: it was open a moment ago, or is an error of the call; nothing else runs in this process.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
        if fcntl(fd, FcntlArg::F_GETFD).is_ok_and(|flags| flags & FdFlag::FD_CLOEXEC.bits() == 0) {
            let _ = nix::unistd::close(number);
        }
    }
}

/// The pid file; removed with it.
pub struct PidFile(PathBuf);

impl PidFile {
    /// Writes this process's id.
    ///
    /// # Errors
    /// The file's error.
    pub fn write(path: &Path) -> std::io::Result<Self> {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o644)
            .open(path)?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Self(path.into()))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The background process's half of `-daemonize`: tells the waiting parent that the machine is up.
pub struct Daemon {
    parent: OwnedFd,
    null: OwnedFd,
}

impl Daemon {
    /// Forks. The parent waits until the machine is up, or exits with status 1 when it does not come up; the child, in a
    /// session of its own, goes on.
    ///
    /// # Errors
    /// A system error.
    pub fn start() -> nix::Result<Self> {
        let (ours, theirs) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        // SAFETY: the process has one thread.
        match unsafe { nix::unistd::fork() }? {
            ForkResult::Parent { .. } => {
                drop(theirs);
                let up = matches!(nix::unistd::read(&ours, &mut [0]), Ok(1));
                std::process::exit(i32::from(!up));
            }
            ForkResult::Child => {
                nix::unistd::setsid()?;
                let null = open(c"/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?;
                Ok(Self { parent: theirs, null })
            }
        }
    }

    /// The machine is up: lets go of the terminal and of the parent.
    pub fn ready(self) {
        let _ = nix::unistd::dup2_stdin(&self.null);
        let _ = nix::unistd::dup2_stdout(&self.null);
        let _ = nix::unistd::dup2_stderr(&self.null);
        let _ = nix::unistd::write(&self.parent, &[1]);
    }
}
