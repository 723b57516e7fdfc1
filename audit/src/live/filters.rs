//! The filters that a thread really runs under, by PTRACE_SECCOMP_GET_FILTER.
//!
//! The kernel gives them only of a stopped thread and only to a caller with CAP_SYS_ADMIN in the first user namespace that
//! runs under no filter itself. A thread is stopped for some microseconds; a system call that it waits in goes on or is made
//! again.

use crate::policy::compile::Instruction;
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// More than any process has.
const MAX_FILTERS: usize = 64;
/// PTRACE_SECCOMP_GET_FILTER.
const GET_FILTER: libc::c_uint = 0x420c;
/// CAP_SYS_ADMIN.
const SYS_ADMIN: u64 = 1 << 21;

/// Why this caller cannot read filters, if it cannot.
pub fn not_readable() -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let number = |name| super::process::field(&status, name).and_then(|text| u64::from_str_radix(text, 16).ok());
    if number("Seccomp") != Some(0) {
        return Some("this audit runs under a filter itself".into());
    }
    let may = number("CapEff").is_some_and(|capabilities| capabilities & SYS_ADMIN != 0);
    (!may).then(|| "reading installed filters takes root (CAP_SYS_ADMIN)".into())
}

/// A stopped thread; goes on when dropped.
struct Stopped(Pid);

impl Stopped {
    fn stop(thread: i32) -> nix::Result<Self> {
        let thread = Pid::from_raw(thread);
        ptrace::seize(thread, ptrace::Options::empty())?;
        let stopped = Self(thread);
        ptrace::interrupt(thread)?;
        waitpid(thread, Some(WaitPidFlag::__WALL))?;
        Ok(stopped)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = ptrace::detach(self.0, None);
    }
}

/// The filters of a thread, the oldest first.
///
/// # Errors
/// The system's; ESRCH when the thread has ended.
pub fn of_thread(thread: i32) -> nix::Result<Vec<Vec<Instruction>>> {
    let stopped = Stopped::stop(thread)?;
    let mut filters = Vec::new();
    while filters.len() < MAX_FILTERS {
        match program(&stopped, filters.len()) {
            Ok(filter) => filters.push(filter),
            Err(Errno::ENOENT) => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(filters)
}

/// One of them; ENOENT after the last.
fn program(stopped: &Stopped, index: usize) -> nix::Result<Vec<Instruction>> {
    let get = |buffer: *mut Instruction| {
        // SAFETY: the request writes as many instructions as it returned for no buffer, which do not change: the thread is
        // stopped. The type has the kernel's layout.
        let length = unsafe { libc::ptrace(GET_FILTER, stopped.0.as_raw(), index, buffer) };
        Errno::result(length).map(|length| length as usize)
    };
    let length = get(std::ptr::null_mut())?;
    let nothing = Instruction {
        code: 0,
        jt: 0,
        jf: 0,
        k: 0,
    };
    let mut filter = vec![nothing; length];
    get(filter.as_mut_ptr())?;
    Ok(filter)
}
