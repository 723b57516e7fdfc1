//! What each process may ask of the kernel: seccomp policies as reviewed data, and the code that loads them.
//!
//! `policies/<process>.json` is the data, in seccompiler's dialect, with a reason (`comment`) on every rule. The build
//! script compiles it to BPF; this crate holds the programs and loads them. A file has these filters:
//!
//! - `startup`: stage 1, loaded by the launcher's child before it executes the helper. Anything else kills the process.
//! - `sealed`: stage 2, loaded by the helper itself on all its threads before it reads a byte that a guest, a tenant or a
//!   client controls. Its mismatch action is written `trap` (seccompiler 0.5 knows no user notification) and compiled to
//!   `SECCOMP_RET_USER_NOTIF`: the supervisor reads number, arguments and instruction pointer, reports, and kills.
//! - `forbidden`: stacked under `sealed`; kills at once on calls that no helper may ever try (exec, ptrace, …), even if
//!   the supervisor should be gone.
//!
//! The launcher, the opener, the warden and the supervisor have one filter each, `sealed`, whose mismatch action is `kill_process`: there is
//! nobody above them to tell.
//!
//! With [`Mode::Log`], for development, nothing is killed: see [`mode`].
//!
//! Filters are inherited over fork and exec: a helper runs under the launcher's, its own `startup`, and the two of its
//! seal. [`sealed_filter_count`] is the number that /proc/PID/status must show.

pub mod mode;
pub mod syscalls;

pub use mode::Mode;

use mode::Relaxed;
use std::os::fd::{FromRawFd, OwnedFd};

/// One BPF instruction, as the kernel's `struct sock_filter`.
type Instruction = libc::sock_filter;

/// A process with a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Process {
    /// `bulkhead` itself.
    Supervisor,
    /// Its launcher.
    Launcher,
    /// Its opener.
    Opener,
    /// Its warden.
    Warden,
    /// vcpu-proc.
    Vcpu,
    /// block-proc.
    Block,
    /// dump-proc.
    Dump,
    /// qmp-proc.
    Qmp,
}

include!(concat!(env!("OUT_DIR"), "/programs.rs"));

/// A filter could not be loaded.
#[derive(Debug, thiserror::Error)]
#[error("loading the {filter} filter of {process:?}: {error}")]
pub struct PolicyError {
    process: Process,
    filter: &'static str,
    error: std::io::Error,
}

/// Which arguments of a call tell one use of it from another: those that some policy's rule looks at (bit 0: the first).
/// The others are buffers and descriptors.
pub fn filtered_arguments(syscall: &str) -> u8 {
    FILTERED_ARGUMENTS
        .iter()
        .find(|(name, _)| *name == syscall)
        .map_or(0, |(_, bits)| *bits)
}

/// How many filters a sealed helper's threads run under: the launcher's, `startup`, `forbidden` and `sealed`.
pub const SEALED_HELPER_FILTERS: u32 = 4;

/// Loads the stage-1 filter on the calling thread, which must be the process's only one. Allocates nothing, so that it
/// may run between fork and exec.
///
/// # Errors
/// The system's error, for instance when no_new_privs is not set.
pub fn load_startup(process: Process, mode: Mode) -> std::io::Result<()> {
    load(programs(process).startup, mode, 0).map(drop)
}

/// Seals the launcher, the opener or the supervisor: one filter on the calling process's only thread.
///
/// # Errors
/// As [`seal_helper`].
pub fn seal_self(process: Process, mode: Mode) -> Result<(), PolicyError> {
    set_no_new_privs(process)?;
    load(programs(process).sealed, mode, 0)
        .map(drop)
        .map_err(|error| PolicyError {
            process,
            filter: "sealed",
            error,
        })
}

/// Seals a helper: all its threads. Returns the fd on which the supervisor is told of violations; send it to the
/// supervisor at once and keep no copy.
///
/// # Errors
/// When the kernel refuses a filter; the process must not go on.
pub fn seal_helper(process: Process, mode: Mode) -> Result<OwnedFd, PolicyError> {
    set_no_new_privs(process)?;
    let programs = programs(process);
    let tsync = libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_TSYNC_ESRCH;
    load(programs.forbidden, mode, tsync).map_err(|error| PolicyError {
        process,
        filter: "forbidden",
        error,
    })?;
    load(programs.sealed, mode, tsync | libc::SECCOMP_FILTER_FLAG_NEW_LISTENER)
        .and_then(|fd| fd.ok_or_else(|| std::io::Error::other("the kernel returned no notification fd")))
        .map_err(|error| PolicyError {
            process,
            filter: "sealed",
            error,
        })
}

fn set_no_new_privs(process: Process) -> Result<(), PolicyError> {
    nix::sys::prctl::set_no_new_privs().map_err(|errno| PolicyError {
        process,
        filter: "no_new_privs",
        error: errno.into(),
    })
}

fn load(program: &'static [Instruction], mode: Mode, flags: libc::c_ulong) -> std::io::Result<Option<OwnedFd>> {
    match mode {
        Mode::Enforce => install(program, flags),
        Mode::Log => install_relaxed(program, flags),
    }
}

/// A function of its own, or every process would touch the program's room on its stack, which is 64 KiB.
#[inline(never)]
fn install_relaxed(program: &[Instruction], flags: libc::c_ulong) -> std::io::Result<Option<OwnedFd>> {
    install(Relaxed::of(program)?.instructions(), flags)
}

fn install(program: &[Instruction], flags: libc::c_ulong) -> std::io::Result<Option<OwnedFd>> {
    let fprog = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(std::io::Error::other)?,
        // The kernel does not write through this pointer.
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: fprog points to a valid program for the duration of the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const fprog,
        )
    };
    if result < 0 {
        return Err(std::io::Error::last_os_error());
    }
    if flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER == 0 {
        return Ok(None);
    }
    let fd = i32::try_from(result).map_err(std::io::Error::other)?;
    // SAFETY: with NEW_LISTENER the call returns a new fd that is ours.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
}

struct Programs {
    startup: &'static [Instruction],
    sealed: &'static [Instruction],
    forbidden: &'static [Instruction],
}
