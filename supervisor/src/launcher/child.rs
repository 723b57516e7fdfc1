//! From clone3 to exec: how a helper becomes small. Runs in the helper's new process, before its program.
//!
//! The order matters: ids change before the root does (the tmpfs belongs to the new id), capabilities go after the last
//! step that needs one, the death signal is set after the id change (which clears it), and the seccomp filter comes last
//! because it forbids nearly all of what came before.

use super::sys;
use super::sys::SysResult;
use ipc::Role;
use ipc::helper::{CHANNEL_FD, LOG_FD};
use ipc::launch::Step;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use policies::{Mode, Process};
use std::ffi::CStr;
use std::os::fd::RawFd;

/// The id of every helper inside its own user namespace: not 0, so that exec gives no capabilities.
pub const INNER_ID: u32 = 1000;

/// What the child needs, all of it inherited.
pub struct Plan {
    /// Which helper.
    pub role: Role,
    /// The helper's end of its channel.
    pub channel: RawFd,
    /// The log socket.
    pub log: RawFd,
    /// The directory of the helper executables.
    pub executables: RawFd,
    /// Deny-all Landlock ruleset, or -1 where the kernel has none.
    pub landlock: RawFd,
    /// Where a failure is reported; becomes readable with end of file on success (close-on-exec).
    pub report: RawFd,
    /// Whether the id maps allow setgroups.
    pub may_set_groups: bool,
    /// Whether policies are enforced.
    pub mode: Mode,
}

/// Descriptor numbers after the move; everything from `END` up is closed.
const EXECUTABLES_FD: RawFd = 3;
const LANDLOCK_FD: RawFd = 4;
const REPORT_FD: RawFd = 5;
const END_FD: RawFd = 6;
/// The table of descriptors has room up to here from the start in processes with threads, which get several for each disk: there
/// the kernel makes it larger only after a grace period of all processors, 5 to 20 ms.
const ROOM_FD: RawFd = 511;

/// Executes the helper, or returns the step that failed.
pub fn run(plan: &Plan) -> (Step, Errno) {
    match prepare(plan) {
        Ok(()) => (
            Step::Exec,
            sys::execute(EXECUTABLES_FD, executable(plan.role), argument(plan.mode)),
        ),
        Err(failure) => failure,
    }
}

/// The report of a failure: two bytes that the launcher reads from the other end.
pub fn report(step: Step, errno: Errno) {
    let packet = [step as u8, u8::try_from(errno as i32).unwrap_or(u8::MAX)];
    // SAFETY: the descriptor is open: it was moved there, or nothing was moved and it is where it was.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(REPORT_FD) };
    let _ = nix::unistd::write(fd, &packet);
}

fn prepare(plan: &Plan) -> Result<(), (Step, Errno)> {
    let at = |step: Step| move |errno: Errno| (step, errno);
    move_files(plan).map_err(at(Step::Files))?;
    become_inner_user(plan.may_set_groups).map_err(at(Step::Ids))?;
    enter_empty_root().map_err(at(Step::Root))?;
    limit(plan.role).map_err(at(Step::Limits))?;
    sys::drop_bounding_set().map_err(at(Step::Capabilities))?;
    sys::lock_securebits().map_err(at(Step::Capabilities))?;
    sys::drop_capability_sets().map_err(at(Step::Capabilities))?;
    sys::die_with_parent().map_err(at(Step::Prctl))?;
    parent_is_alive().map_err(at(Step::Prctl))?;
    sys::set_no_new_privs().map_err(at(Step::Prctl))?;
    if plan.landlock >= 0 {
        sys::landlock_restrict_self(LANDLOCK_FD).map_err(at(Step::Landlock))?;
    }
    policies::load_startup(process(plan.role), plan.mode).map_err(|error| {
        (
            Step::Seccomp,
            Errno::from_raw(error.raw_os_error().unwrap_or(libc::EINVAL)),
        )
    })
}

/// The helper's policy.
pub fn process(role: Role) -> Process {
    match role {
        Role::Vcpu => Process::Vcpu,
        Role::Block => Process::Block,
        Role::Dump => Process::Dump,
        Role::Qmp => Process::Qmp,
    }
}

/// Helpers have none but in the mode for development.
fn argument(mode: Mode) -> Option<&'static CStr> {
    match mode {
        Mode::Enforce => None,
        Mode::Log => Some(policies::mode::LOG_ARGUMENT),
    }
}

fn executable(role: Role) -> &'static CStr {
    match role {
        Role::Vcpu => c"vcpu-proc",
        Role::Block => c"block-proc",
        Role::Dump => c"dump-proc",
        Role::Qmp => c"qmp-proc",
    }
}

/// Moves what is needed to fixed numbers and closes everything else. The sources are first lifted above all targets, so
/// that no move overwrites one that is still to come.
fn move_files(plan: &Plan) -> SysResult<()> {
    let lift = |fd: RawFd| sys::duplicate_above(fd, END_FD);
    let (report, channel, log) = (lift(plan.report)?, lift(plan.channel)?, lift(plan.log)?);
    let executables = lift(plan.executables)?;
    let landlock = if plan.landlock >= 0 {
        Some(lift(plan.landlock)?)
    } else {
        None
    };
    sys::duplicate_to(report, REPORT_FD, true)?;
    sys::duplicate_to(channel, CHANNEL_FD, false)?;
    sys::duplicate_to(log, 1, false)?;
    sys::duplicate_to(log, LOG_FD, false)?;
    sys::duplicate_to(executables, EXECUTABLES_FD, true)?;
    if let Some(landlock) = landlock {
        sys::duplicate_to(landlock, LANDLOCK_FD, true)?;
    }
    if matches!(plan.role, Role::Vcpu | Role::Block) {
        // Under a lower limit it stays small. It is closed below, the room remains.
        let _ = sys::duplicate_to(REPORT_FD, ROOM_FD, true);
    }
    sys::close_range(END_FD as u32, u32::MAX)
}

fn become_inner_user(may_set_groups: bool) -> SysResult<()> {
    // The raw calls: glibc's wrappers would signal all threads, and there is only one.
    let call = |number: libc::c_long, a: u32, b: u32, c: u32| {
        // SAFETY: plain numbers.
        if unsafe { libc::syscall(number, a, b, c) } < 0 {
            Err(Errno::last())
        } else {
            Ok(())
        }
    };
    if may_set_groups {
        call(libc::SYS_setgroups, 0, 0, 0)?;
    }
    call(libc::SYS_setresgid, INNER_ID, INNER_ID, INNER_ID)?;
    call(libc::SYS_setresuid, INNER_ID, INNER_ID, INNER_ID)
}

/// Makes a read-only tmpfs without a single file the root of this mount namespace, and detaches everything else.
fn enter_empty_root() -> SysResult<()> {
    const NONE: Option<&CStr> = None;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(NONE, c"/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    // Any directory will do as a mount point, and every Linux has this one.
    mount(
        Some(c"none"),
        c"/proc",
        Some(c"tmpfs"),
        flags,
        Some(c"size=4k,nr_inodes=2,mode=0555"),
    )?;
    nix::unistd::chdir(c"/proc")?;
    sys::pivot_to_current_directory()?;
    umount2(c".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir(c"/")
}

fn limit(role: Role) -> SysResult<()> {
    // Descriptors: what the role can ever hold. Threads: its fixed pools.
    let (files, threads) = match role {
        Role::Vcpu => (2048, 300),
        // Up to 16 threads with disks, each with up to 16 workers where there is no io_uring.
        Role::Block => (2048, 300),
        // Those that compress, and two that let a running guest's writes through.
        Role::Dump => (32, 18),
        Role::Qmp => (320, 1),
    };
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    setrlimit(Resource::RLIMIT_NOFILE, files, files)?;
    setrlimit(Resource::RLIMIT_NPROC, threads, threads)?;
    if role == Role::Qmp {
        // A stdio monitor may be redirected to a file; it will not need more than this. A limit that is lower stays.
        let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE)?;
        let largest = hard.min(1 << 30);
        setrlimit(Resource::RLIMIT_FSIZE, largest, largest)?;
    }
    Ok(())
}

/// PDEATHSIG only counts deaths after it was set; if the launcher or the supervisor died before, the channel is hung up.
fn parent_is_alive() -> SysResult<()> {
    let mut poll = libc::pollfd {
        fd: CHANNEL_FD,
        events: 0,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    if unsafe { libc::poll(&raw mut poll, 1, 0) } < 0 {
        return Err(Errno::last());
    }
    if poll.revents & libc::POLLHUP != 0 {
        Err(Errno::EPIPE)
    } else {
        Ok(())
    }
}
