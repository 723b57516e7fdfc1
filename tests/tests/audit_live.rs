//! `bulkhead audit live`: clean on a machine as it is, and wrong in the right line for every deviation. All deviations are made
//! from outside: edited policies, patched or exchanged programs, descriptors put into helpers, walls taken down by root,
//! processes that only pretend. The product has no switch for any of them.

use bulkhead_tests::inject::{channel_end, inject, number_of, steal};
use bulkhead_tests::machine::{Machine, programs, wait_until};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};

/// Returns from the test, and says why, when it is not run by root: installed filters are shown to nobody else.
macro_rules! need_root {
    () => {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
    };
}

/// What the audit said: its exit status and its rows.
struct Audit {
    clean: bool,
    rows: Vec<Value>,
}

impl Audit {
    fn of(pid: i32, more: &[&str]) -> Self {
        let output = Command::new(programs().join("bulkhead"))
            .args(["audit", "live", &pid.to_string(), "--json"])
            .args(more)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            matches!(output.status.code(), Some(0 | 1)),
            "{}: {errors}",
            output.status
        );
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}{errors}"));
        Self {
            clean: output.status.success(),
            rows: value["rows"].as_array().unwrap().clone(),
        }
    }

    fn differing(&self) -> Vec<String> {
        let text = |row: &Value, name: &str| row[name].as_str().unwrap().to_owned();
        let rows = self.rows.iter().filter(|row| row["state"] == "differs");
        rows.map(|row| format!("{} {}: {}", text(row, "process"), text(row, "what"), text(row, "found")))
            .collect()
    }

    /// That there is a line for a process and a wall with these words, and that the exit status is 1.
    fn expect(&self, begin: &str, words: &str) {
        let lines = self.differing();
        assert!(!self.clean, "exit status 0");
        assert!(
            lines.iter().any(|line| line.starts_with(begin) && line.contains(words)),
            "no line {begin:?} … {words:?}: {lines:#?}"
        );
    }

    /// As [`Self::expect`], and nothing else is wrong.
    fn expect_only(&self, begin: &str, words: &str) {
        self.expect(begin, words);
        let lines = self.differing();
        assert!(lines.iter().all(|line| line.starts_with(begin)), "{lines:#?}");
    }
}

fn arguments(directory: &Path) -> String {
    std::fs::write(directory.join("disk0"), vec![0; 1 << 20]).unwrap();
    format!(
        "-m 64 -smp 2 -kernel {} -append test=spin -drive file={{dir}}/disk0,if=virtio,format=raw,id=disk0",
        guest::image().display()
    )
}

/// A machine with a client and a dump-proc.
fn machine() -> (Machine, Qmp) {
    let directory = tempfile::tempdir().unwrap();
    let arguments = arguments(directory.path());
    let mut machine = Machine::start_in(directory, &arguments);
    machine.wait_for_serial("spin");
    let mut qmp = machine.qmp();
    // Looking into the guest's memory starts a dump-proc that stays.
    qmp.execute("human-monitor-command", json!({"command-line": "xp /4xb 0"}));
    wait_until("the next spare is there", || {
        machine.helpers().iter().filter(|(name, _)| name == "qmp-proc").count() == 2
    });
    (machine, qmp)
}

/// The policies of this tree in a directory, with one file changed.
fn policies_with(file: &str, old: &str, new: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let ours = concat!(env!("CARGO_MANIFEST_DIR"), "/../policies");
    for entry in std::fs::read_dir(ours).unwrap().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            std::fs::copy(&path, directory.path().join(entry.file_name())).unwrap();
        }
    }
    let path = directory.path().join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(old), "{file} has no {old}");
    std::fs::write(&path, text.replacen(old, new, 1)).unwrap();
    directory
}

#[test]
fn a_machine_is_as_declared() {
    need_kvm!();
    need_root!();
    let (machine, _qmp) = machine();
    let audit = Audit::of(machine.pid(), &[]);
    assert!(audit.clean, "{:#?}", audit.differing());
    let filters: Vec<&Value> = audit.rows.iter().filter(|row| row["what"] == "filters").collect();
    assert_eq!(filters.len(), 8, "{filters:#?}");
    for row in filters {
        assert!(row["found"].as_str().unwrap().contains("byte for byte"), "{row}");
    }
    // By name, with a picture.
    let picture = machine.path("graph.svg");
    let status = Command::new(programs().join("bulkhead"))
        .args(["audit", "live", &machine.pid().to_string(), "--graph"])
        .arg(&picture)
        .output()
        .unwrap();
    assert!(status.status.success());
    let text = std::fs::read_to_string(picture).unwrap();
    for word in [
        "<svg",
        "guest RAM",
        "vcpu-proc mapped rw",
        "dump-proc ro",
        "disk0",
        "</svg>",
    ] {
        assert!(text.contains(word), "no {word}: {text}");
    }
}

#[test]
fn looking_does_not_disturb_the_guest_or_the_monitor() {
    need_kvm!();
    need_root!();
    let (machine, mut qmp) = machine();
    for _ in 0..20 {
        let audit = Audit::of(machine.pid(), &[]);
        assert!(audit.clean, "{:#?}", audit.differing());
        assert_eq!(qmp.run("query-status")["status"], "running");
    }
}

#[test]
fn an_edited_policy_is_not_the_installed_one() {
    need_kvm!();
    need_root!();
    let (machine, _qmp) = machine();
    let first_rule = r#"{"syscall": "recvmsg","#;
    for (file, old, new, process) in [
        // A call more, a call less, another argument, a shorter list of what is forbidden, another start-up.
        (
            "dump-proc.json",
            first_rule,
            r#"{"syscall": "getppid", "comment": "an extra call"}, {"syscall": "recvmsg","#,
            "dump-proc filters",
        ),
        (
            "vcpu-proc.json",
            r#"{"syscall": "rt_sigreturn", "comment": "the end of that signal's handler"},
      {"syscall": "brk", "#,
            r#"{"syscall": "brk", "#,
            "vcpu-proc filters",
        ),
        (
            "qmp-proc.json",
            r#""op": "le", "val": 1000"#,
            r#""op": "le", "val": 1001"#,
            "qmp-proc filters",
        ),
        (
            "block-proc.json",
            r#"{"syscall": "bpf", "comment": "no helper loads programs into the kernel"},"#,
            "",
            "block-proc filters",
        ),
        (
            "opener.json",
            r#""op": "eq", "val": 10, "comment": "AF_INET6""#,
            r#""op": "eq", "val": 16, "comment": "AF_NETLINK""#,
            "opener filters",
        ),
        (
            "supervisor.json",
            r#""val": 9, "comment": "SIGKILL""#,
            r#""val": 15, "comment": "SIGTERM""#,
            "supervisor filters",
        ),
    ] {
        let policies = policies_with(file, old, new);
        let audit = Audit::of(machine.pid(), &["--policies", policies.path().to_str().unwrap()]);
        audit.expect_only(process, "the installed filter is not");
    }
    // The launcher's is every helper's too.
    let policies = policies_with("launcher.json", r#"{"syscall": "wait4", "comment": "reaping"},"#, "");
    let audit = Audit::of(machine.pid(), &["--policies", policies.path().to_str().unwrap()]);
    for process in [
        "launcher filters",
        "vcpu-proc filters",
        "block-proc filters",
        "dump-proc filters",
        "qmp-proc filters",
    ] {
        audit.expect(process, "the installed filter is not launcher.sealed");
    }
}

#[test]
fn a_declaration_that_says_something_else_differs_in_each_wall() {
    need_kvm!();
    need_root!();
    let (machine, _qmp) = machine();
    for (old, new, begin, words) in [
        (
            r#""vcpu-proc.forbidden", "vcpu-proc.sealed"]"#,
            r#""vcpu-proc.sealed"]"#,
            "vcpu-proc filters",
            "runs under 4 filters, must be 3",
        ),
        (
            r#""open files": 32,"#,
            r#""open files": 33,"#,
            "dump-proc limits",
            "open files",
        ),
        (
            r#"{"kind": "io_uring", "rights": ["rw"], "why": "one ring for each thread, restricted"},"#,
            "",
            "block-proc descriptors",
            "io_uring rw",
        ),
    ] {
        let policies = policies_with("processes.json", old, new);
        let audit = Audit::of(machine.pid(), &["--policies", policies.path().to_str().unwrap()]);
        audit.expect_only(begin, words);
    }
}

/// A descriptor that one process should not have, and what the audit says of it.
struct Leak {
    what: &'static str,
    into: &'static str,
    fd: fn(&Machine) -> OwnedFd,
    words: &'static str,
}

fn open(path: &str, write: bool) -> OwnedFd {
    std::fs::OpenOptions::new()
        .read(true)
        .write(write)
        .open(path)
        .unwrap()
        .into()
}

const LEAKS: &[Leak] = &[
    Leak {
        what: "guest RAM, writable, in the process that may only read it",
        into: "dump-proc",
        fd: |machine| steal(machine.pid(), writable_ram(machine.pid())),
        words: "memfd:bulkhead-ram rw",
    },
    Leak {
        what: "guest RAM in a monitor",
        into: "qmp-proc",
        fd: |machine| steal(machine.pid(), number_of(machine.pid(), "bulkhead-ram")),
        words: "memfd:bulkhead-ram",
    },
    Leak {
        what: "/dev/kvm in the process of the disks",
        into: "block-proc",
        fd: |_| open("/dev/kvm", true),
        words: "kvm rw (/dev/kvm) is not declared",
    },
    Leak {
        what: "the virtual machine in the process of the disks",
        into: "block-proc",
        fd: |machine| {
            let vcpu = machine.helper("vcpu-proc");
            steal(vcpu, number_of(vcpu, "kvm-vm"))
        },
        words: "kvm-vm rw",
    },
    Leak {
        what: "a file that the supervisor never opened",
        into: "block-proc",
        fd: |_| open("/etc/passwd", false),
        words: "/etc/passwd): the supervisor does not hold it",
    },
    Leak {
        what: "a directory",
        into: "block-proc",
        fd: |_| open("/", false),
        words: "directory ro (/) is not declared",
    },
    Leak {
        what: "a disk in the process of the processors",
        into: "vcpu-proc",
        fd: |machine| steal(machine.pid(), number_of(machine.pid(), "/disk0")),
        words: "/disk0) is not declared",
    },
    Leak {
        what: "a disk, read-only, in the process of the processors",
        into: "vcpu-proc",
        fd: |machine| open(machine.path("disk0").to_str().unwrap(), false),
        words: "/disk0): block-proc holds it too",
    },
    Leak {
        what: "power over the supervisor",
        into: "vcpu-proc",
        fd: |machine| {
            // SAFETY: a new fd of ours.
            unsafe {
                let fd = libc::syscall(libc::SYS_pidfd_open, machine.pid(), 0);
                <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(i32::try_from(fd).unwrap())
            }
        },
        words: "pidfd rw",
    },
    Leak {
        what: "a file in a monitor that is no stdio monitor",
        into: "qmp-proc",
        fd: |machine| open(machine.path("disk0").to_str().unwrap(), true),
        words: "/disk0): the supervisor does not hold it as its own standard input or output",
    },
    Leak {
        what: "a way out of the empty network namespace",
        into: "dump-proc",
        fd: |_| std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into(),
        words: "udp rw",
    },
];

fn writable_ram(pid: i32) -> i32 {
    let all = bulkhead_tests::procfs::descriptors(pid);
    let writable = |number: i32| {
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap();
        info.contains("flags:\t02100002")
    };
    let found = all
        .iter()
        .find(|(number, link)| link.contains("bulkhead-ram") && writable(*number));
    found.expect("guest RAM, writable").0
}

#[test]
fn every_leaked_descriptor_is_found() {
    need_kvm!();
    need_root!();
    for leak in LEAKS {
        let (machine, _qmp) = machine();
        let fd = (leak.fd)(&machine);
        let number = inject(machine.pid(), machine.helper(leak.into), fd.as_fd());
        drop(fd);
        let begin = format!("{} descriptors: fd {number}, ", leak.into);
        println!("{}: {begin}", leak.what);
        Audit::of(machine.pid(), &[]).expect_only(&begin, leak.words);
    }
}

#[test]
fn a_channel_whose_other_end_another_helper_has_is_told_at_both() {
    need_kvm!();
    need_root!();
    let (machine, _qmp) = machine();
    let vcpu = machine.helper("vcpu-proc");
    let end = steal(machine.pid(), channel_end(machine.pid(), vcpu));
    inject(machine.pid(), machine.helper("block-proc"), end.as_fd());
    drop(end);
    let audit = Audit::of(machine.pid(), &[]);
    audit.expect("block-proc descriptors", "seqpacket rw");
    audit.expect("vcpu-proc descriptors: fd 0", "block-proc");
}

#[test]
fn walls_that_root_takes_down_from_outside_are_missed() {
    need_kvm!();
    need_root!();
    let (machine, _qmp) = machine();
    let block = machine.helper("block-proc");

    // Somebody traces a helper.
    let thread = nix::unistd::Pid::from_raw(block);
    nix::sys::ptrace::seize(thread, nix::sys::ptrace::Options::empty()).unwrap();
    Audit::of(machine.pid(), &[]).expect("block-proc privileges", "is traced by process");
    nix::sys::ptrace::interrupt(thread).unwrap();
    nix::sys::wait::waitpid(thread, None).unwrap();
    nix::sys::ptrace::detach(thread, None).unwrap();
    assert!(Audit::of(machine.pid(), &[]).clean);

    // Its limits change.
    let limit = libc::rlimit {
        rlim_cur: 1000,
        rlim_max: 2048,
    };
    // SAFETY: one valid structure.
    let done = unsafe { libc::prlimit(block, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(done, 0);
    Audit::of(machine.pid(), &[]).expect_only("block-proc limits", "open files");
}

#[test]
fn a_mount_in_a_helpers_empty_root_is_found() {
    need_kvm!();
    need_root!();
    let (machine, _qmp) = machine();
    let namespace = std::fs::File::open(format!("/proc/{}/ns/mnt", machine.helper("block-proc"))).unwrap();
    // SAFETY: the child makes system calls only.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Parent { child } => {
            assert_eq!(
                nix::sys::wait::waitpid(child, None).unwrap(),
                nix::sys::wait::WaitStatus::Exited(child, 0)
            );
        }
        nix::unistd::ForkResult::Child => {
            use nix::mount::{MsFlags, mount};
            let done = nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNS).is_ok()
                && mount(Some("none"), "/", Some("tmpfs"), MsFlags::empty(), None::<&str>).is_ok();
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(!done)) }
        }
    }
    Audit::of(machine.pid(), &[]).expect_only("block-proc root", "2 mounts");
}

#[test]
fn guest_memory_that_could_be_opened_anew_is_found() {
    need_kvm!();
    need_root!();
    let (machine, _qmp) = machine();
    let ram = steal(machine.pid(), writable_ram(machine.pid()));
    nix::sys::stat::fchmod(&ram, nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR).unwrap();
    let audit = Audit::of(machine.pid(), &[]);
    audit.expect("supervisor descriptors", "open it anew");
    audit.expect("dump-proc descriptors", "open it anew");
}

/// The programs in a directory of their own.
fn copied_programs() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for program in [
        "bulkhead",
        "bulkhead-audit",
        "vcpu-proc",
        "block-proc",
        "dump-proc",
        "qmp-proc",
    ] {
        std::fs::copy(programs().join(program), directory.path().join(program)).unwrap();
    }
    directory
}

fn machine_of(programs: &Path) -> Machine {
    let directory = tempfile::tempdir().unwrap();
    let arguments = arguments(directory.path());
    let serial = format!("-serial file:{}/serial {arguments}", directory.path().display());
    let mut machine = Machine::start_command(directory, Command::new(programs.join("bulkhead")), &serial, &[]);
    machine.wait_for_serial("spin");
    machine
}

#[test]
fn a_helper_built_with_another_filter_is_found() {
    need_kvm!();
    need_root!();
    let directory = copied_programs();
    // The instructions of the sealed filter as they lie in the program, with one constant changed: longer log lines.
    let policy = audit::policy::Source::Embedded
        .read(audit::policy::Process::QmpProc)
        .unwrap();
    let sealed: Vec<u8> = policy.compile().unwrap()[&audit::policy::Kind::Sealed]
        .iter()
        .flat_map(|of| {
            let [a, b] = of.code.to_le_bytes();
            let [c, d, e, f] = of.k.to_le_bytes();
            [a, b, of.jt, of.jf, c, d, e, f]
        })
        .collect();
    let path = directory.path().join("qmp-proc");
    let mut program = std::fs::read(&path).unwrap();
    let at = program
        .windows(sealed.len())
        .position(|window| window == sealed)
        .expect("the filter");
    let constant = sealed
        .chunks_exact(8)
        .position(|of| of[4..] == 1000u32.to_le_bytes())
        .expect("a constant");
    program[at + 8 * constant + 4..][..4].copy_from_slice(&2000u32.to_le_bytes());
    std::fs::write(&path, program).unwrap();
    let machine = machine_of(directory.path());
    Audit::of(machine.pid(), &[]).expect_only("qmp-proc filters", "the installed filter is not qmp-proc.sealed");
    // Against the programs that were reviewed, it is the wrong program too.
    let reviewed = programs();
    let audit = Audit::of(machine.pid(), &["--programs", reviewed.to_str().unwrap()]);
    audit.expect("qmp-proc program", "it is not the program that is at");
    audit.expect("qmp-proc filters", "the installed filter is not qmp-proc.sealed");
}

#[test]
fn a_program_that_was_exchanged_under_a_running_machine_is_found() {
    need_kvm!();
    need_root!();
    let directory = copied_programs();
    let machine = machine_of(directory.path());
    assert!(Audit::of(machine.pid(), &[]).clean);
    std::fs::remove_file(directory.path().join("block-proc")).unwrap();
    std::fs::copy(programs().join("dump-proc"), directory.path().join("block-proc")).unwrap();
    Audit::of(machine.pid(), &[]).expect_only("block-proc program", "it is not the program that is at");
}

/// Processes that have the names and no walls; killed when dropped.
struct Pretender(Child);

impl Drop for Pretender {
    fn drop(&mut self) {
        let group = nix::unistd::Pid::from_raw(self.0.id() as i32);
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

#[test]
fn processes_without_walls_are_told_in_every_line() {
    need_kvm!();
    need_root!();
    let directory = tempfile::tempdir().unwrap();
    // A shell that is called bulkhead, with a child as the launcher, which has one called block-proc and one unknown.
    let copy = |name: &str| {
        let path = directory.path().join(name);
        std::fs::copy("/bin/sh", &path).unwrap();
        path
    };
    let (supervisor, helper, stranger) = (copy("bulkhead"), copy("block-proc"), copy("stranger"));
    let script = format!(
        "{bulkhead} -c '{block} -c \"while :; do sleep 1; done\" & {stranger} -c \"while :; do sleep 1; done\" & wait' & wait",
        bulkhead = supervisor.display(),
        block = helper.display(),
        stranger = stranger.display()
    );
    let child = Command::new(&supervisor)
        .arg("-c")
        .arg(script)
        .process_group(0)
        .spawn()
        .unwrap();
    let pid = child.id() as i32;
    let _pretender = Pretender(child);
    wait_until("the processes are there", || {
        let launcher = bulkhead_tests::procfs::children(pid);
        launcher
            .first()
            .is_some_and(|launcher| bulkhead_tests::procfs::children(*launcher).len() == 2)
    });
    let audit = Audit::of(pid, &["--programs", programs().to_str().unwrap()]);
    for (begin, words) in [
        ("block-proc filters", "runs under 0 filters, must be 4"),
        ("block-proc privileges", "may get new privileges"),
        ("block-proc capabilities", "CapPrm is"),
        ("block-proc ids", "is also that of supervisor"),
        ("block-proc namespaces", "shares ipc:"),
        ("block-proc limits", "core file size"),
        ("block-proc root", "its root directory has"),
        ("block-proc memory", "executable memory"),
        ("block-proc program", "it is not the program"),
        ("block-proc descriptors", "0 of seqpacket (the channel)"),
        ("launcher capabilities", "those of the supervisor's"),
        ("launcher filters", "runs under 0 filters, must be 1"),
        ("supervisor filters", "runs under 0 filters, must be 1"),
        ("supervisor descriptors", "0 of memfd:bulkhead-ram"),
        ("undeclared process", "stranger is no process that is declared"),
    ] {
        audit.expect(begin, words);
    }
}

#[test]
fn who_is_no_root_is_told_what_could_not_be_looked_at() {
    need_kvm!();
    need_root!();
    let (machine, _qmp) = machine();
    let directory = copied_programs();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid=54321", "--regid=54321", "--clear-groups", "--"])
        .arg(directory.path().join("bulkhead-audit"))
        .args(["live", &machine.pid().to_string(), "--json"])
        .output()
        .unwrap();
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["differences"], 0, "{value:#}");
    for row in value["rows"].as_array().unwrap() {
        let what = row["what"].as_str().unwrap();
        if ["filters", "descriptors", "memory", "namespaces", "root", "program"].contains(&what) {
            assert_eq!(row["state"], "not-checkable", "{row}");
        }
    }
}

#[test]
fn a_descriptor_that_the_parent_left_open_is_nobodys() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let left = std::fs::File::create(directory.path().join("left-open")).unwrap();
    nix::fcntl::fcntl(&left, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    let number = left.as_raw_fd();
    let mut machine = Machine::start_without_serial(directory, "-machine none", &[]);
    let _qmp = machine.qmp();
    let held = bulkhead_tests::procfs::descriptors(machine.pid());
    assert!(
        !held.iter().any(|(_, link)| link.contains("left-open")),
        "{number}: {held:?}"
    );
}
