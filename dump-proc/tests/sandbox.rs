//! What dump-proc is allowed, how much memory it takes, and that it keeps to the order of its requests.

mod common;

use bulkhead_tests::bare::Bare;
use bulkhead_tests::procfs;
use common::{Dumper, MIB, Ram, dump, registers, status_of};
use ipc::Channel;
use ipc::dump::{DumpEvent, DumpForm, DumpOutput, DumpReply, DumpRequest, FromDump, ToDump};
use ipc::message::RequestId;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn start() -> Bare<DumpRequest, DumpReply, DumpEvent> {
    Bare::start(env!("CARGO_BIN_EXE_dump-proc"))
}

fn write_request() -> DumpRequest {
    DumpRequest::Write {
        output: DumpOutput::new(tempfile::tempfile().unwrap().into()).unwrap(),
        registers: vec![],
        vmcoreinfo: None,
        form: DumpForm::Elf {
            range: None,
            paging: false,
        },
    }
}

fn setup_request(ram: &Ram) -> DumpRequest {
    DumpRequest::Setup {
        memory: ram.read_only(),
        ram_bytes: ram.bytes,
    }
}

#[test]
fn nothing_is_written_before_the_seal() {
    let ram = Ram::new(MIB);
    let mut helper = start();
    let refused = |reply: Result<DumpReply, ipc::Failure>, name: &str| {
        assert_eq!(reply.unwrap_err().message, format!("dump-proc: {name} is out of order"));
    };
    refused(helper.ask(write_request()), "Write");
    refused(helper.ask(DumpRequest::Seal), "Seal");
    assert!(matches!(helper.ask(setup_request(&ram)), Ok(DumpReply::Done)));
    refused(helper.ask(write_request()), "Write");
    refused(helper.ask(setup_request(&ram)), "Setup");
    assert!(matches!(helper.ask(DumpRequest::Seal), Ok(DumpReply::Sealed { .. })));
    refused(helper.ask(setup_request(&ram)), "Setup");
    assert!(matches!(helper.ask(write_request()), Ok(DumpReply::Written { .. })));
    assert_eq!(helper.child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_size_that_the_memory_fd_does_not_have_is_refused() {
    let mut ram = Ram::new(MIB);
    ram.bytes = 2 * MIB;
    let failure = start().ask(setup_request(&ram)).unwrap_err();
    assert_eq!(
        failure.message,
        "dump-proc: the guest memory fd has 1048576 bytes, RAM is 2097152"
    );
}

#[test]
fn the_sealed_process_has_its_filters() {
    let dumper = Dumper::sealed(&Ram::new(MIB));
    let pid = dumper.bare.child.id();
    // Two of its own, plus those that this test runs under.
    let inherited: u32 = status_of(std::process::id(), "Seccomp_filters").parse().unwrap();
    let threads = procfs::statuses(pid as i32);
    assert!(!threads.is_empty());
    for thread in threads {
        assert_eq!(procfs::field(&thread, "Seccomp"), "2");
        assert_eq!(procfs::field(&thread, "NoNewPrivs"), "1");
        assert_eq!(procfs::field(&thread, "Seccomp_filters"), (inherited + 2).to_string());
    }
}

#[test]
fn the_sealed_process_holds_only_its_fds_and_maps_no_guest_memory() {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("SKIPPED: only root may look at the fds of a process that is not dumpable");
        return;
    }
    let dumper = Dumper::sealed(&Ram::new(MIB));
    let pid = dumper.bare.child.id();
    // The listener is closed when it has been sent, and so perhaps a moment after it has arrived.
    let deadline = Instant::now() + Duration::from_secs(5);
    while fds_named(pid, "anon_inode:") > 0 {
        assert!(Instant::now() < deadline, "a copy of the listener stayed behind");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(fds_named(pid, "/memfd:"), 1);
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    assert!(!maps.contains("memfd"), "guest memory is mapped: {maps}");
}

/// How many fds of the process refer to something whose name begins so.
fn fds_named(pid: u32, prefix: &str) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.to_string_lossy().starts_with(prefix))
        .count()
}

#[test]
fn memory_use_does_not_depend_on_the_guests() {
    let ram = Ram::new(512 * MIB);
    ram.fill(0, 256 * MIB);
    let mut dumper = Dumper::sealed(&ram);
    let pid = dumper.bare.child.id();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let watcher = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        for _ in 0..400 {
            reader.read_exact(&mut buffer).unwrap();
        }
        // It waits in write now, with 400 MiB done.
        let peak = status_of(pid, "VmHWM");
        std::io::copy(&mut reader, &mut std::io::sink()).unwrap();
        peak
    });
    dumper.write(writer, vec![registers(0)], None).unwrap();
    let peak = watcher.join().unwrap();
    let kib: u64 = peak.trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 6 << 10, "peak resident size {peak}");
}

#[test]
fn a_closed_channel_is_the_end() {
    // Not bare: dropping that kills.
    let (ours, theirs) = ipc::channel::pair().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_dump-proc"))
        .stdin(Stdio::from(theirs))
        .spawn()
        .unwrap();
    let mut channel: Channel<ToDump, FromDump> = Channel::new(ours);
    let (id, body) = (RequestId(1), setup_request(&Ram::new(MIB)));
    channel.send(ToDump { id, body }).unwrap();
    assert!(matches!(channel.recv(), Ok(FromDump::Reply { result: Ok(_), .. })));
    drop(channel);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// The launcher's last steps: an empty root, stage 1, then execveat. Any call of the helper's that the policy lacks
/// kills it.
#[test]
fn it_starts_seals_and_dumps_under_its_startup_filter() {
    let (ours, theirs) = ipc::channel::pair().unwrap();
    let executable = std::fs::File::open(env!("CARGO_BIN_EXE_dump-proc")).unwrap();
    let empty = tempfile::tempdir().unwrap();
    let root = std::ffi::CString::new(empty.path().to_str().unwrap()).unwrap();
    let mut command = Command::new("/nonexistent");
    command.stdin(Stdio::from(theirs));
    // SAFETY: the closure makes system calls only; it allocates nothing.
    unsafe {
        command.pre_exec(move || {
            use nix::libc;
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER)?;
            if libc::chroot(root.as_ptr()) != 0 || libc::chdir(c"/".as_ptr()) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            nix::sys::prctl::set_no_new_privs()?;
            policies::load_startup(policies::Process::Dump, policies::Mode::Enforce)?;
            let arguments = [c"dump-proc".as_ptr(), std::ptr::null()];
            let environment = [std::ptr::null::<libc::c_char>()];
            libc::syscall(
                libc::SYS_execveat,
                executable.as_raw_fd(),
                c"".as_ptr(),
                arguments.as_ptr(),
                environment.as_ptr(),
                libc::AT_EMPTY_PATH,
            );
            Err(std::io::Error::last_os_error())
        });
    }
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("SKIPPED: no user namespace to make an empty root in: {error}");
            return;
        }
    };
    // It holds the helper's end of the channel.
    drop(command);
    let mut channel: Channel<ToDump, FromDump> = Channel::new(ours);
    let ram = Ram::new(MIB);
    ram.fill(0, 100);
    for (id, body) in (1..).zip([setup_request(&ram), DumpRequest::Seal, write_request()]) {
        let id = RequestId(id);
        channel.send(ToDump { id, body }).unwrap();
        loop {
            match channel.recv() {
                Ok(FromDump::Event(_)) => {}
                Ok(FromDump::Reply { result, .. }) => {
                    result.unwrap();
                    break;
                }
                Err(error) => panic!("{error}: {:?}", child.wait()),
            }
        }
    }
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn dumping_twice_needs_two_processes() {
    let ram = Ram::new(MIB);
    dump(&ram, tempfile::tempfile().unwrap()).unwrap();
    dump(&ram, tempfile::tempfile().unwrap()).unwrap();
}
