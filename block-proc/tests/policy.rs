//! The policy: a whole life fits into it, and what it denies is denied.

mod common;
use common::*;
use ipc::block::{BlockReply, BlockRequest, EngineChoice, FromBlock, Polling, ToBlock};
use ipc::caps::{CallFd, KickFd};
use ipc::graph::{GraphRequest, NodeId};
use ipc::message::{FromHelper, Request, RequestId};
use ipc::virtio::{Activation, ActivationNumber, DeviceIndex, IoThreadIndex, QueueFds};
use ipc::{Channel, Failure};
use policies::{Mode, Process, load_startup, seal_helper};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};

/// Starts block-proc after `load_filter` has run in the new process, as the launcher's child does.
fn start_under(load_filter: fn() -> std::io::Result<()>) -> (std::process::Child, Channel<ToBlock, FromBlock>) {
    let (ours, theirs) = ipc::channel::pair().unwrap();
    let timeout = nix::sys::time::TimeVal::new(20, 0);
    nix::sys::socket::setsockopt(&ours, nix::sys::socket::sockopt::ReceiveTimeout, &timeout).unwrap();
    let executable = std::fs::File::open(env!("CARGO_BIN_EXE_block-proc")).unwrap();
    let mut command = Command::new("unused: the hook executes");
    command.env_clear().stdin(Stdio::from(theirs)).stderr(Stdio::piped());
    // SAFETY: between fork and exec only system calls are made; nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_no_new_privs()?;
            load_filter()?;
            let name = c"block-proc".as_ptr();
            let (argv, envp) = ([name, std::ptr::null()], [std::ptr::null::<libc::c_char>()]);
            libc::syscall(
                libc::SYS_execveat,
                executable.as_raw_fd(),
                c"".as_ptr(),
                argv.as_ptr(),
                envp.as_ptr(),
                libc::AT_EMPTY_PATH,
            );
            Err(std::io::Error::last_os_error())
        });
    }
    let child = command.spawn().expect("execveat under the filter");
    (child, Channel::new(ours))
}

/// A host that forbids io_uring: io_uring_setup fails with EPERM.
fn forbid_io_uring() -> std::io::Result<()> {
    let instruction = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let program = [
        // The system call's number; if it is io_uring_setup, EPERM, otherwise go on.
        instruction(0x20, 0, 0, 0),
        instruction(0x15, 0, 1, libc::SYS_io_uring_setup as u32),
        instruction(0x06, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        instruction(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let fprog = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the program outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const fprog) };
    nix::errno::Errno::result(result).map(drop).map_err(Into::into)
}

#[test]
fn without_io_uring_auto_means_threads_and_says_so() {
    let setup = |engine| BlockRequest::Setup(block_setup(ram().0, engine, 0));
    let (mut child, mut channel) = start_under(forbid_io_uring);
    let failure = ask(&mut channel, setup(EngineChoice::IoUring)).unwrap_err();
    assert_eq!(failure.errno, Some(libc::EPERM), "{failure}");
    ask(&mut channel, setup(EngineChoice::Auto)).unwrap();
    let sealed = ask(&mut channel, BlockRequest::Seal).unwrap();
    assert!(matches!(
        sealed,
        BlockReply::Sealed {
            engine: EngineChoice::Threads,
            ..
        }
    ));
    drop(channel);
    let mut log = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut log).unwrap();
    assert!(log.contains("io_uring cannot be used here"), "{log}");
    child.wait().unwrap();
}

fn ask(channel: &mut Channel<ToBlock, FromBlock>, body: BlockRequest) -> Result<BlockReply, Failure> {
    channel.send(Request { id: RequestId(1), body }).unwrap();
    match channel
        .recv()
        .expect("an answer: was it killed by the start-up filter?")
    {
        FromHelper::Reply { result, .. } => result,
        FromHelper::Event(event) => panic!("unexpected event {event:?}"),
    }
}

#[test]
fn a_whole_life_fits_into_the_startup_filter() {
    for engine in ENGINES {
        let (mut child, mut channel) = start_under(|| load_startup(Process::Block, Mode::Enforce));
        let (memory, mapping) = ram();
        let device = DeviceIndex(0);
        let (kick, call) = (eventfd(), eventfd());
        let setup = block_setup(memory, engine, 1);
        ask(&mut channel, BlockRequest::Setup(setup)).unwrap();
        ask(&mut channel, add_device(device, 1)).unwrap();
        let queues = vec![QueueFds {
            kick: KickFd::new(kick.as_fd().try_clone_to_owned().unwrap()),
            call: CallFd::new(call.as_fd().try_clone_to_owned().unwrap()),
        }];
        ask(&mut channel, BlockRequest::AddQueues { device, queues }).unwrap();
        let sealed = ask(&mut channel, BlockRequest::Seal).unwrap();
        assert_eq!(
            filters(child.id()),
            [3],
            "startup, forbidden and sealed, on every thread"
        );
        let file = image(1 << 20);
        let (node, other, thread) = (NodeId(1), NodeId(2), IoThreadIndex::MAIN);
        for node in [node, other] {
            let spec = file_spec(&file, info(1 << 20));
            let add = GraphRequest::Add { node, thread, spec };
            ask(&mut channel, BlockRequest::Graph(add)).unwrap();
        }
        ask(&mut channel, BlockRequest::Graph(GraphRequest::Remove(other))).unwrap();
        let attach = GraphRequest::Attach {
            device,
            node,
            options: options(&info(1 << 20)),
        };
        ask(&mut channel, BlockRequest::Graph(attach)).unwrap();
        // Any queue will do to lay rings out in this RAM.
        let template = Vm::start_on(engine, &[1], ram().0, mapping);
        let mut queue = template.queue(0, 0);
        (queue.kick, queue.call) = (kick, call);
        let activation = Activation {
            features: F_VERSION_1 | F_FLUSH,
            queues: vec![queue.setup],
        };
        let number = ActivationNumber(1);
        ask(
            &mut channel,
            BlockRequest::Activate {
                device,
                number,
                activation,
            },
        )
        .unwrap();
        assert_eq!(queue.write(0, &pattern(1, 4096)), S_OK);
        assert_eq!(queue.read(0, 4096), (S_OK, pattern(1, 4096)));
        assert_eq!(queue.ask(T_FLUSH, 0, None).0, S_OK);
        assert_eq!(queue.ranges(T_WRITE_ZEROES, &[(0, 1, 0)]), S_OK);
        assert_eq!(queue.ranges(T_DISCARD, &[(0, 1, 0)]), S_OK);
        // Looking for work before sleeping, and sleeping until a moment.
        let polling = Polling {
            max_ns: 1_000_000,
            max_batch: 1,
            ..Polling::default()
        };
        let thread = IoThreadIndex::MAIN;
        ask(&mut channel, BlockRequest::SetPolling { thread, polling }).unwrap();
        for sector in 0..8 {
            assert_eq!(queue.write(sector, &pattern(sector, 512)), S_OK);
        }
        ask(&mut channel, BlockRequest::Pause).unwrap();
        ask(&mut channel, BlockRequest::Resume).unwrap();
        ask(&mut channel, BlockRequest::GetStats).unwrap();
        assert_eq!(filters(child.id()), [3], "also the kernel's io_uring workers");
        drop(channel);
        assert_eq!(child.wait().unwrap().code(), Some(ipc::helper::CHANNEL_LOST_STATUS));
        drop(sealed);
    }
}

/// The numbers of filters that the threads of a process run under, without repetitions.
fn filters(pid: u32) -> Vec<u32> {
    let mut counts: Vec<u32> = std::fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).ok())
        .map(|status| {
            let line = status
                .lines()
                .find(|line| line.starts_with("Seccomp_filters:"))
                .unwrap();
            line["Seccomp_filters:".len()..].trim().parse().unwrap()
        })
        .collect();
    counts.sort_unstable();
    counts.dedup();
    counts
}

const CHILD: &str = "BLOCK_POLICY_CHILD";

/// System calls that a sealed block-proc is held at: name, number, arguments.
const HELD: &[(&str, libc::c_long, [usize; 6])] = &[
    ("lseek SEEK_SET", libc::SYS_lseek, [0; 6]),
    ("lseek SEEK_END", libc::SYS_lseek, [0, 0, 2, 0, 0, 0]),
    ("pread64", libc::SYS_pread64, [0; 6]),
    ("memfd_create", libc::SYS_memfd_create, [0; 6]),
    ("fcntl", libc::SYS_fcntl, [0, libc::F_GETFL as usize, 0, 0, 0, 0]),
    ("dup", libc::SYS_dup, [0; 6]),
    ("getpid", libc::SYS_getpid, [0; 6]),
    ("clone3", libc::SYS_clone3, [0; 6]),
    ("kill", libc::SYS_kill, [1, 0, 0, 0, 0, 0]),
    ("mprotect", libc::SYS_mprotect, [0x1000, 0, 4, 0, 0, 0]),
    ("mmap, executable", libc::SYS_mmap, [0, 4096, 7, 34, usize::MAX, 0]),
    ("mmap of a file", libc::SYS_mmap, [0, 4096, 3, 2, 0, 0]),
    ("mmap, shared", libc::SYS_mmap, [0, 4096, 3, 33, usize::MAX, 0]),
    ("ioctl BLKZEROOUT", libc::SYS_ioctl, [0, 0x127f, 0, 0, 0, 0]),
    ("ioctl TIOCSTI", libc::SYS_ioctl, [0, 0x5412, 0, 0, 0, 0]),
    ("io_uring_register buffers", libc::SYS_io_uring_register, [0; 6]),
    (
        "io_uring_register unregister files",
        libc::SYS_io_uring_register,
        [0, 3, 0, 0, 0, 0],
    ),
    (
        "fallocate without KEEP_SIZE",
        libc::SYS_fallocate,
        [0, 0, 0, 4096, 0, 0],
    ),
    ("fallocate collapse", libc::SYS_fallocate, [0, 8, 0, 4096, 0, 0]),
    ("pwritev2 append", libc::SYS_pwritev2, [0, 0, 0, 0, 0, 16]),
    ("recvmsg on another socket", libc::SYS_recvmsg, [5, 0, 0, 0, 0, 0]),
    ("sendmsg on another socket", libc::SYS_sendmsg, [5, 0, 0, 0, 0, 0]),
    ("futex requeue", libc::SYS_futex, [0, 3, 0, 0, 0, 0]),
    ("prctl", libc::SYS_prctl, [4, 1, 0, 0, 0, 0]),
    ("seccomp", libc::SYS_seccomp, [0; 6]),
];

/// Those that kill at once, without asking anybody.
const KILLED: &[(&str, libc::c_long)] = &[
    ("io_uring_setup", libc::SYS_io_uring_setup),
    ("openat", libc::SYS_openat),
    ("execve", libc::SYS_execve),
    ("socket", libc::SYS_socket),
    ("ptrace", libc::SYS_ptrace),
];

fn call(number: libc::c_long, a: [usize; 6]) -> i32 {
    // SAFETY: every call of the tables is denied, or fails on its arguments.
    let result = unsafe { libc::syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]) };
    if result < 0 { nix::errno::Errno::last_raw() } else { 0 }
}

/// Not a test by itself: what the other tests run in a process of its own, because a seal cannot be taken off.
#[test]
fn sealed_child() {
    let Ok(what) = std::env::var(CHILD) else { return };
    let listener = seal_helper(Process::Block, Mode::Enforce).unwrap();
    // Without a listener, what would be held and reported fails with ENOSYS.
    drop(listener);
    let mut status = 0;
    match what.strip_prefix("kill ").map(str::parse) {
        Some(Ok(number)) => {
            call(number, [0; 6]);
            status = 255;
        }
        _ => {
            for (place, (_, number, arguments)) in (1..).zip(HELD) {
                if call(*number, *arguments) != libc::ENOSYS {
                    status = place;
                }
            }
        }
    }
    // SAFETY: ends the process.
    unsafe { libc::_exit(status) }
}

fn run_child(what: &str) -> std::process::ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "sealed_child", "--nocapture"])
        .env(CHILD, what)
        .stdout(Stdio::null())
        .status()
        .unwrap()
}

#[test]
fn what_block_proc_does_not_need_is_held_and_reported() {
    let status = run_child("held");
    let code = status.code().unwrap_or_else(|| panic!("{status}"));
    assert!(code == 0, "not denied: {}", HELD[(code - 1) as usize].0);
}

#[test]
fn what_no_helper_may_try_kills_at_once() {
    for (name, number) in KILLED {
        let status = run_child(&format!("kill {number}"));
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{name}: {status}");
    }
}

#[test]
fn the_engine_that_was_asked_for_is_the_one_that_runs() {
    for engine in ENGINES {
        assert_eq!(Vm::start(engine, &[1]).engine, engine);
    }
    assert_eq!(Vm::start(EngineChoice::Auto, &[1]).engine, EngineChoice::IoUring);
}
