//! What somebody inside a helper would try with system calls. All of it is refused, or ends the process.

use super::code::{Outcome, Puppet};
use libc as c;

/// One argument of a call.
#[derive(Debug, Clone, Copy)]
pub enum Arg {
    /// A number.
    N(i64),
    /// The address of a text.
    Text(&'static str),
    /// The address of words.
    Words(&'static [u64]),
    /// The address of so many bytes of zeroes.
    Zeroes(usize),
    /// The descriptor whose link begins so, where there is one, otherwise 0.
    Fd(&'static str),
    /// The start of the process's own stack page.
    Stack,
    /// The supervisor's process id.
    Supervisor,
}

use Arg::{Fd, N, Stack, Supervisor, Text, Words, Zeroes};

/// One attempt.
pub struct Attempt {
    /// What it is for.
    pub what: &'static str,
    /// The system call.
    pub call: i64,
    /// Its arguments.
    pub arguments: &'static [Arg],
}

const fn attempt(what: &'static str, call: i64, arguments: &'static [Arg]) -> Attempt {
    Attempt { what, call, arguments }
}

/// 1 TiB.
const TERABYTE: i64 = 1 << 40;
const RW: i64 = (c::PROT_READ | c::PROT_WRITE) as i64;
const RX: i64 = (c::PROT_READ | c::PROT_EXEC) as i64;
const ANON: i64 = (c::MAP_PRIVATE | c::MAP_ANONYMOUS) as i64;
const SHARED: i64 = c::MAP_SHARED as i64;
const HERE: i64 = c::AT_FDCWD as i64;
/// KVM_CREATE_VM.
const CREATE_VM: i64 = 0xAE01;
/// A number of the x32 interface.
const X32: i64 = 0x4000_0000;

/// What no process of a machine may do: helpers, opener, launcher.
pub const NOBODY: &[Attempt] = &[
    attempt(
        "replace a file of the system's",
        c::SYS_open,
        &[Text("/etc/passwd"), N(c::O_RDWR as i64)],
    ),
    attempt(
        "read what only root may read",
        c::SYS_openat,
        &[N(HERE), Text("/etc/shadow"), N(0)],
    ),
    attempt(
        "open the host's memory",
        c::SYS_openat,
        &[N(HERE), Text("/dev/mem"), N(c::O_RDWR as i64)],
    ),
    attempt(
        "open /dev/kvm",
        c::SYS_openat2,
        &[N(HERE), Text("/dev/kvm"), Words(&[2, 0, 0]), N(24)],
    ),
    attempt(
        "make a file",
        c::SYS_creat,
        &[Text("/tmp/made-by-an-intruder"), N(0o666)],
    ),
    attempt("open by handle", c::SYS_open_by_handle_at, &[N(0), Zeroes(64), N(0)]),
    attempt(
        "map executable memory",
        c::SYS_mmap,
        &[N(0), N(4096), N(RX), N(ANON), N(-1), N(0)],
    ),
    attempt("make its stack executable", c::SYS_mprotect, &[Stack, N(4096), N(RX)]),
    attempt(
        "make its stack executable by a key",
        c::SYS_pkey_mprotect,
        &[Stack, N(4096), N(RX), N(-1)],
    ),
    attempt(
        "make a ring without restrictions",
        c::SYS_io_uring_setup,
        &[N(8), Zeroes(120)],
    ),
    attempt(
        "look into the supervisor",
        c::SYS_ptrace,
        &[N(c::PTRACE_SEIZE as i64), Supervisor, N(0), N(0)],
    ),
    attempt(
        "read the supervisor's memory",
        c::SYS_process_vm_readv,
        &[Supervisor, Zeroes(16), N(1), Zeroes(16), N(1), N(0)],
    ),
    attempt(
        "write the supervisor's memory",
        c::SYS_process_vm_writev,
        &[Supervisor, Zeroes(16), N(1), Zeroes(16), N(1), N(0)],
    ),
    attempt("stop the supervisor", c::SYS_kill, &[Supervisor, N(c::SIGSTOP as i64)]),
    attempt(
        "take the supervisor's descriptors",
        c::SYS_pidfd_getfd,
        &[N(0), N(3), N(0)],
    ),
    attempt(
        "talk to a virtual machine's host",
        c::SYS_socket,
        &[N(c::AF_VSOCK as i64), N(c::SOCK_STREAM as i64), N(0)],
    ),
    attempt(
        "talk to the kernel's network",
        c::SYS_socket,
        &[N(c::AF_NETLINK as i64), N(c::SOCK_RAW as i64), N(0)],
    ),
    attempt(
        "see all packets",
        c::SYS_socket,
        &[N(c::AF_PACKET as i64), N(c::SOCK_RAW as i64), N(0)],
    ),
    attempt("become another program", c::SYS_execve, &[Text("/bin/sh"), N(0), N(0)]),
    attempt("a program for the kernel", c::SYS_bpf, &[N(0), Zeroes(128), N(128)]),
    attempt(
        "watch the kernel",
        c::SYS_perf_event_open,
        &[Zeroes(128), N(0), N(-1), N(-1), N(0)],
    ),
    attempt("handle page faults", c::SYS_userfaultfd, &[N(1)]),
    attempt("read keys", c::SYS_keyctl, &[N(0), N(-5), N(0)]),
    attempt(
        "add a key",
        c::SYS_add_key,
        &[Text("user"), Text("x"), Text("y"), N(1), N(-5)],
    ),
    attempt("read the kernel's log", c::SYS_syslog, &[N(3), Zeroes(1024), N(1024)]),
    attempt("load a module", c::SYS_init_module, &[Zeroes(64), N(64), Text("")]),
    attempt("load another kernel", c::SYS_kexec_load, &[N(0), N(0), N(0), N(0)]),
    attempt(
        "mount",
        c::SYS_mount,
        &[Text("none"), Text("/"), Text("tmpfs"), N(0), N(0)],
    ),
    attempt("change the root", c::SYS_chroot, &[Text("/")]),
    attempt("become root", c::SYS_setuid, &[N(0), N(0)]),
    attempt("ports", c::SYS_iopl, &[N(3)]),
    attempt(
        "another descriptor table",
        c::SYS_modify_ldt,
        &[N(1), Zeroes(16), N(16)],
    ),
    attempt(
        "address space without surprises",
        c::SYS_personality,
        &[N(c::ADDR_NO_RANDOMIZE as i64)],
    ),
    attempt("the time", c::SYS_clock_settime, &[N(0), Words(&[0, 0])]),
    attempt("a filter of its own", c::SYS_seccomp, &[N(1), N(0), Zeroes(16)]),
    attempt("another interface's numbers", X32 | c::SYS_getpid, &[]),
    attempt(
        "another interface's numbers: open",
        X32 | c::SYS_open,
        &[Text("/etc/passwd"), N(0)],
    ),
];

/// What no helper may do besides.
pub const HELPERS: &[Attempt] = &[
    attempt("read a file", c::SYS_openat, &[N(HERE), Text("/etc/passwd"), N(0)]),
    attempt(
        "read a file that is not there",
        c::SYS_openat,
        &[N(HERE), Text("x"), N(0)],
    ),
    attempt(
        "open its memory",
        c::SYS_openat,
        &[N(HERE), Text("/proc/self/mem"), N(c::O_RDWR as i64)],
    ),
    attempt(
        "reopen a descriptor",
        c::SYS_open,
        &[Text("/proc/self/fd/0"), N(c::O_RDWR as i64)],
    ),
    attempt("give memory a mode", c::SYS_fchmod, &[Fd("/memfd"), N(0o777)]),
    attempt(
        "map guest memory writable",
        c::SYS_mmap,
        &[N(0), N(4096), N(RW), N(SHARED), Fd("/memfd"), N(0)],
    ),
    attempt(
        "map guest memory executable",
        c::SYS_mmap,
        &[N(0), N(4096), N(RX), N(SHARED), Fd("/memfd"), N(0)],
    ),
    attempt("memory that can be executed", c::SYS_memfd_create, &[Text("x"), N(0)]),
    attempt(
        "make a machine",
        c::SYS_ioctl,
        &[Fd("anon_inode:kvm-vm"), N(CREATE_VM), N(0)],
    ),
    attempt(
        "push text into a terminal",
        c::SYS_ioctl,
        &[N(2), N(c::TIOCSTI as i64), Text("x")],
    ),
    attempt("end its neighbours", c::SYS_kill, &[N(-1), N(9)]),
    attempt("end the first process it sees", c::SYS_kill, &[N(1), N(9)]),
    attempt(
        "end a thread of another",
        c::SYS_tgkill,
        &[Supervisor, Supervisor, N(9)],
    ),
    attempt("name another process", c::SYS_pidfd_open, &[Supervisor, N(0)]),
    attempt(
        "connect out",
        c::SYS_socket,
        &[N(c::AF_INET as i64), N(c::SOCK_STREAM as i64), N(0)],
    ),
    attempt(
        "connect to a neighbour",
        c::SYS_socket,
        &[N(c::AF_UNIX as i64), N(c::SOCK_STREAM as i64), N(0)],
    ),
    attempt(
        "connect what it has",
        c::SYS_connect,
        &[N(0), Words(&[0x0061_6263_0000_0001]), N(8)],
    ),
    attempt("listen", c::SYS_listen, &[N(0), N(1)]),
    attempt(
        "a program by descriptor",
        c::SYS_execveat,
        &[N(0), Text(""), N(0), N(0), N(c::AT_EMPTY_PATH as i64)],
    ),
    attempt("a process", c::SYS_fork, &[]),
    attempt("a process that waits", c::SYS_vfork, &[]),
    attempt("a process, the old way", c::SYS_clone, &[N(c::SIGCHLD as i64)]),
    attempt("a process, the new way", c::SYS_clone3, &[Zeroes(88), N(88)]),
    attempt(
        "more descriptors",
        c::SYS_prlimit64,
        &[N(0), N(c::RLIMIT_NOFILE as i64), Words(&[1 << 20, 1 << 20]), N(0)],
    ),
    attempt(
        "namespaces",
        c::SYS_unshare,
        &[N((c::CLONE_NEWUSER | c::CLONE_NEWNET) as i64)],
    ),
    attempt("another's namespaces", c::SYS_setns, &[N(0), N(0)]),
    attempt("another root", c::SYS_pivot_root, &[Text("/"), Text("/")]),
    attempt(
        "capabilities",
        c::SYS_capset,
        &[Words(&[0x2008_0522]), Words(&[u64::MAX, u64::MAX, u64::MAX])],
    ),
    attempt("be dumpable", c::SYS_prctl, &[N(c::PR_SET_DUMPABLE as i64), N(1)]),
    attempt(
        "outlive its parent",
        c::SYS_prctl,
        &[N(c::PR_SET_PDEATHSIG as i64), N(0)],
    ),
    attempt(
        "all memory there is",
        c::SYS_mmap,
        &[N(0), N(TERABYTE), N(RW), N(ANON), N(-1), N(0)],
    ),
    attempt("memory that stays", c::SYS_mlockall, &[N(3)]),
    attempt(
        "a new name for a file",
        c::SYS_linkat,
        &[N(HERE), Text("x"), N(HERE), Text("y"), N(0)],
    ),
    attempt(
        "a message queue that all see",
        c::SYS_mq_open,
        &[Text("x"), N(c::O_CREAT as i64), N(0o666), N(0)],
    ),
    attempt("memory that all see", c::SYS_shmget, &[N(1), N(4096), N(0o1666)]),
    attempt("a timer that signals", c::SYS_timer_create, &[N(0), N(0), Zeroes(8)]),
    attempt("its own priority", c::SYS_setpriority, &[N(0), N(0), N(-20)]),
    attempt(
        "the processor for itself",
        c::SYS_sched_setscheduler,
        &[N(0), N(1), Words(&[99])],
    ),
];

/// What the opener may not do besides: it has sockets, and nothing that is in a file.
pub const OPENER: &[Attempt] = &[
    attempt("read a file", c::SYS_openat, &[N(HERE), Text("/etc/passwd"), N(0)]),
    attempt(
        "reopen a descriptor",
        c::SYS_open,
        &[Text("/proc/self/fd/0"), N(c::O_RDWR as i64)],
    ),
    attempt("remove a file", c::SYS_unlink, &[Text("/nowhere")]),
    attempt("move a file", c::SYS_rename, &[Text("/nowhere"), Text("/there")]),
    attempt("end its neighbours", c::SYS_kill, &[N(-1), N(0)]),
    attempt("a process", c::SYS_fork, &[]),
    attempt("a process, the new way", c::SYS_clone3, &[Zeroes(88), N(88)]),
    attempt(
        "namespaces",
        c::SYS_unshare,
        &[N((c::CLONE_NEWUSER | c::CLONE_NEWNET) as i64)],
    ),
    attempt(
        "more descriptors",
        c::SYS_prlimit64,
        &[N(0), N(c::RLIMIT_NOFILE as i64), Words(&[1 << 20, 1 << 20]), N(0)],
    ),
];

/// Makes an attempt.
pub fn make(attempt: &Attempt, puppet: &mut Puppet, supervisor: i32) -> Outcome {
    let arguments: Vec<u64> = attempt
        .arguments
        .iter()
        .map(|argument| match *argument {
            N(number) => number as u64,
            Text(text) => puppet.put_text(text),
            Words(words) => puppet.put_words(words),
            Zeroes(bytes) => puppet.put(&vec![0; bytes]),
            Fd(begin) => {
                let held = crate::procfs::descriptors(puppet.pid);
                let found = held.iter().find(|(_, link)| link.starts_with(begin));
                found.map_or(0, |(number, _)| *number as u64)
            }
            Stack => puppet.stack_page(),
            Supervisor => supervisor as u64,
        })
        .collect();
    puppet.call(attempt.call, &arguments)
}
