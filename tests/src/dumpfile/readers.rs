//! Other people's readers of dumps: each is run on a dump of a Linux guest and must find in it what the guest itself said.

use super::kdump::KdumpDump;
use crate::lab::pieces::find_program;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a guest said about itself before it was stopped and dumped.
pub struct Guest {
    /// `uname -r`.
    pub release: String,
    /// /proc/version.
    pub version: String,
    /// A line of its log.
    pub log_line: String,
    /// Process ids of what it runs, with those that came and went.
    pub processes: BTreeSet<u32>,
    /// One that was started for this.
    pub sleeper: u32,
    /// Virtual address of linux_banner.
    pub banner: u64,
    /// How many vCPUs.
    pub vcpus: usize,
}

/// Whether a reader was there; otherwise what is missing.
pub type Verdict = Result<(), String>;

/// Runs a program; panics unless it succeeds.
#[track_caller]
fn run(command: &mut Command) -> String {
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{text}\n{errors}",
        output.status
    );
    text + &errors
}

/// Runs a Python script that is longer than an argument may be.
#[track_caller]
fn run_script(python: &Path, script: &str, dump: &Path) {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), script).expect("writing a script");
    run(Command::new(python).arg(file.path()).arg(dump));
}

fn program(name: &str) -> Result<PathBuf, String> {
    find_program(name).ok_or_else(|| format!("{name} is not installed"))
}

/// drgn without debugging information: the kernel's names, banner and tasks; and memory by physical address.
///
/// # Errors
/// When there is no Python with drgn.
pub fn drgn(python: &Path, dump: &Path, guest: &Guest, pages: &[(u64, Vec<u8>)]) -> Verdict {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drgn_linux.py");
    let text = run(Command::new(python).arg(script).arg(dump));
    let has = |line: String| assert!(text.lines().any(|found| found == line), "{line}:\n{text}");
    has(format!("vmcoreinfo {}", guest.release));
    has(format!("memory {}", guest.release));
    has(format!("banner {}", guest.version));
    has("idle swapper/0".into());
    has(format!("task {} sleep 1", guest.sleeper));
    let tasks: BTreeSet<u32> = text
        .lines()
        .filter_map(|line| line.strip_prefix("task ")?.split(' ').next()?.parse().ok())
        .collect();
    let missing: Vec<_> = guest.processes.difference(&tasks).collect();
    assert!(missing.len() <= 5, "{missing:?}\n{text}");

    let mut script = "import sys, drgn\nprog = drgn.Program()\nprog.set_core_dump(sys.argv[1])\n".to_owned();
    for (address, page) in pages {
        let text = String::from_utf8_lossy(page);
        let _ = writeln!(
            script,
            "assert prog.read({address}, 4096, physical=True) == {text:?}.encode()"
        );
    }
    run_script(python, &script, dump);
    Ok(())
}

/// makedumpfile takes the guest's log out of the dump, and makes a small one of it that has the kernel and nothing else.
///
/// # Errors
/// When it is not installed or lacks a codec.
pub fn makedumpfile(dump: &Path, codec: Option<u32>, guest: &Guest) -> Verdict {
    let program = program("makedumpfile")?;
    let said = run(Command::new(&program).arg("-v"));
    let lacks = |name: &str| said.contains(&format!("{name}\tdisabled"));
    for (flag, name) in [(2, "lzo"), (4, "snappy"), (0x20, "zstd")] {
        if codec == Some(flag) && lacks(name) {
            return Err(format!("this makedumpfile was built without {name}"));
        }
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut dump = dump.to_owned();
    let mut magic = [0; 8];
    std::io::Read::read_exact(&mut File::open(&dump).expect("the dump"), &mut magic).expect("reading the dump");
    if &magic == b"makedump" {
        let plain = folder.path().join("plain");
        let mut command = Command::new(&program);
        command
            .arg("-R")
            .arg(&plain)
            .stdin(File::open(&dump).expect("the dump"));
        let output = command.output().expect("makedumpfile");
        assert!(output.status.success(), "{output:?}");
        dump = plain;
    }
    let log = folder.path().join("log");
    run(Command::new(&program).arg("--dump-dmesg").arg(&dump).arg(&log));
    let log = fs::read_to_string(log).expect("the log");
    assert!(log.contains(&guest.log_line), "{log}");
    assert!(log.contains("Linux version"), "{log}");

    let small = folder.path().join("small");
    run(Command::new(&program).args(["-c", "-d", "31"]).arg(&dump).arg(&small));
    let filtered = KdumpDump::open(File::open(&small).expect("the small dump"));
    let filtered = filtered.unwrap_or_else(|error| panic!("makedumpfile's own: {error}"));
    let (has, of) = filtered.counts();
    assert!(has > 1000 && has < of / 2, "{has} pages of {of}");
    Ok(())
}

/// Of the same memory `small` has the pages that `makedumpfile -d 30` leaves.
///
/// # Errors
/// When it is not installed.
pub fn same_choice_as_makedumpfile(whole: &Path, small: &Path) -> Verdict {
    let program = program("makedumpfile")?;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let theirs = folder.path().join("theirs");
    run(Command::new(program).args(["-c", "-d", "30"]).arg(whole).arg(&theirs));
    let open = |path: &Path| {
        let dump = KdumpDump::open(File::open(path).expect("a dump"));
        dump.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let (ours, theirs) = (open(small), open(&theirs));
    let frames = theirs.counts().1.max(ours.counts().1);
    let differ: Vec<u64> = (0..frames.next_multiple_of(1 << 20) * 2)
        .filter(|frame| ours.has(*frame) != theirs.has(*frame))
        .collect();
    assert!(differ.is_empty(), "{} page frames: {:x?}", differ.len(), differ.first());
    let (has, of) = ours.counts();
    assert!(has > 1000 && has < of / 2, "{has} pages of {of}");
    Ok(())
}

/// gdb finds the processors and reads the kernel's text by its virtual address.
///
/// # Errors
/// When it is not installed.
pub fn gdb(dump: &Path, guest: &Guest) -> Verdict {
    let mut command = Command::new(program("gdb")?);
    command
        .args(["-batch", "-nx", "-ex", "set print elements 0", "-core"])
        .arg(dump);
    command.args(["-ex", &format!("printf \"banner %s\\n\", (char *) {:#x}", guest.banner)]);
    command.args(["-ex", "info threads"]);
    let text = run(&mut command);
    assert!(text.contains(&format!("banner {}", guest.version)), "{text}");
    let threads = text.lines().filter(|line| line.contains("LWP ")).count();
    assert!(threads >= guest.vcpus, "{text}");
    Ok(())
}

/// readelf has nothing to complain about.
///
/// # Errors
/// When it is not installed.
pub fn readelf(dump: &Path, guest: &Guest) -> Verdict {
    let text = run(Command::new(program("readelf")?).arg("-hlnW").arg(dump));
    assert!(!text.contains("readelf: "), "{text}");
    assert_eq!(text.matches("NT_PRSTATUS").count(), guest.vcpus, "{text}");
    assert!(text.contains("VMCOREINFO"), "{text}");
    Ok(())
}

/// libkdumpfile knows the architecture and reads all of these pages; flattened dumps since 0.5.3.
///
/// # Errors
/// When the system's Python does not have it.
pub fn libkdumpfile(dump: &Path, guest: &Guest, pages: &[(u64, Vec<u8>)]) -> Verdict {
    let python = Path::new("/usr/bin/python3");
    let probe = "import kdumpfile";
    let found = Command::new(python).args(["-c", probe]).stderr(Stdio::null()).status();
    if !found.is_ok_and(|status| status.success()) {
        return Err("python3-libkdumpfile is not installed".into());
    }
    let mut script = "import sys, kdumpfile\ndump = kdumpfile.kdumpfile(sys.argv[1])\n".to_owned();
    for (name, value) in [
        ("arch.name", format!("{:?}", "x86_64")),
        ("cpu.number", guest.vcpus.to_string()),
        ("linux.uts.release", format!("{:?}", guest.release)),
    ] {
        let _ = writeln!(script, "assert dump.attr[{name:?}] == {value}, dump.attr[{name:?}]");
    }
    for (address, page) in pages {
        let text = String::from_utf8_lossy(page);
        let _ = writeln!(
            script,
            "assert bytes(dump.read(kdumpfile.KDUMP_MACHPHYSADDR, {address}, 4096)) == {text:?}.encode()"
        );
    }
    run_script(python, &script, dump);
    Ok(())
}

/// crash without debugging information tells the release, which takes its reading the dump, and nothing else.
///
/// # Errors
/// When it is not installed, and for a flattened dump, of which it says "unknown" when the headers are the last record.
pub fn crash_release(dump: &Path, guest: &Guest) -> Verdict {
    let program = program("crash")?;
    let mut magic = [0; 8];
    std::io::Read::read_exact(&mut File::open(dump).expect("the dump"), &mut magic).expect("reading the dump");
    if &magic == b"makedump" {
        return Err("crash --osrelease takes the first record for the headers".into());
    }
    let text = run(Command::new(program).arg("--osrelease").arg(dump));
    assert_eq!(text.trim(), guest.release);
    Ok(())
}

/// crash with the kernel's debugging information: its log, what memory is used for, and as many tasks as it finds: those that
/// run, at least.
///
/// # Errors
/// When it is not installed.
pub fn crash(dump: &Path, vmlinux: &Path, guest: &Guest) -> Verdict {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let commands = folder.path().join("commands");
    fs::write(&commands, "sys\nlog\nkmem -i\nps\nbt -a\nquit\n").expect("writing commands");
    let mut command = Command::new(program("crash")?);
    command.args(["-s", "-i"]).arg(commands).arg(vmlinux).arg(dump);
    let text = run(&mut command);
    let tasks = (0..guest.vcpus).map(|cpu| format!("[swapper/{cpu}]"));
    let said = [&guest.release, &guest.log_line, "TOTAL MEM"].map(str::to_owned);
    for wanted in said.into_iter().chain(tasks) {
        assert!(text.contains(&wanted), "{wanted}:\n{text}");
    }
    Ok(())
}

/// drgn with the kernel's debugging information: every task with its backtrace, the running ones too, and the log.
///
/// # Errors
/// None; the arguments say that it is there.
pub fn drgn_with_symbols(python: &Path, dump: &Path, vmlinux: &Path, guest: &Guest) -> Verdict {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drgn_symbols.py");
    let text = run(Command::new(python).arg(script).arg(vmlinux).arg(dump));
    assert!(text.contains(&guest.log_line), "{text}");
    let traced = |pid: u32| text.lines().find(|line| line.starts_with(&format!("trace {pid} ")));
    let sleeper = traced(guest.sleeper).unwrap_or_else(|| panic!("{text}"));
    assert!(sleeper.contains("hrtimer_nanosleep"), "{sleeper}");
    for cpu in 0..guest.vcpus {
        let line = text.lines().find(|line| line.starts_with(&format!("cpu {cpu} ")));
        // The frame of a processor that runs is where its registers say.
        assert!(line.is_some_and(|line| line.split(' ').count() > 3), "{text}");
    }
    Ok(())
}
