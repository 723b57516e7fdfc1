//! Dumps that fail, and what disturbs a dump: the guest goes on, the reason is told, nothing is left behind.

use bulkhead_tests::census::descriptor_counts;
use bulkhead_tests::dumpfile::Dump;
use bulkhead_tests::machine::{Machine, wait_until};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm, procfs};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{PipeReader, Read, Seek, SeekFrom, Write, pipe};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

const RAM_BYTES: u64 = 64 << 20;
/// How much [`stuck`] has read of its dump.
const BEGUN: usize = 256 << 10;

fn arguments() -> String {
    format!("-m 64 -kernel {}", guest::image().display())
}

/// A machine whose guest prints a line every few milliseconds.
fn machine() -> (Machine, Qmp) {
    let directory = tempfile::tempdir().unwrap();
    let mut machine = Machine::start_with(directory, &arguments(), &["-append", "test=spin ms=10"]);
    let qmp = machine.qmp();
    machine.wait_for_serial("spin 0");
    (machine, qmp)
}

fn name(qmp: &mut Qmp, fd: BorrowedFd<'_>) {
    qmp.pass(&[fd]);
    qmp.execute("getfd", json!({"fdname": "d"}));
}

fn file(path: &Path) -> Value {
    json!({"paging": false, "protocol": format!("file:{}", path.display())})
}

fn with(mut arguments: Value, member: &str, value: impl Into<Value>) -> Value {
    arguments[member] = value.into();
    arguments
}

/// A detached dump into a pipe that nobody reads: it goes on until something else happens.
fn stuck(qmp: &mut Qmp) -> PipeReader {
    let (mut reader, writer) = pipe().unwrap();
    name(qmp, writer.as_fd());
    drop(writer);
    let arguments = json!({"paging": false, "protocol": "fd:d", "detach": true});
    qmp.execute("dump-guest-memory", arguments);
    qmp.wait_event("STOP");
    // The header and more.
    reader.read_exact(&mut vec![0; BEGUN]).unwrap();
    reader
}

fn read_all(mut reader: PipeReader) -> std::thread::JoinHandle<u64> {
    std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()).unwrap())
}

/// The names of the events up to and with this one.
fn events_until(qmp: &mut Qmp, last: &str) -> Vec<(String, Value)> {
    let mut seen = Vec::new();
    loop {
        let mut event = qmp.event();
        let name = event["event"].as_str().unwrap().to_owned();
        let is_last = name == last;
        seen.push((name, event["data"].take()));
        if is_last {
            return seen;
        }
    }
}

/// The guest has printed something since now.
#[track_caller]
fn guest_goes_on(machine: &Machine, qmp: &mut Qmp) {
    assert_eq!(qmp.run("query-status")["status"], "running");
    let before = machine.serial().len();
    wait_until("the guest goes on", || machine.serial().len() > before);
}

/// Has a dump fail, detached or not: STOP, DUMP_COMPLETED with the error, RESUME, and a guest that runs.
#[track_caller]
fn fails(machine: &Machine, qmp: &mut Qmp, arguments: &Value, text: &str) {
    let error = qmp
        .try_execute("dump-guest-memory", arguments.clone())
        .expect_err("a dump that must fail");
    assert_eq!(error, json!({"class": "GenericError", "desc": text}), "{arguments}");
    failed_in_order(machine, qmp, text);
}

#[track_caller]
fn failed_in_order(machine: &Machine, qmp: &mut Qmp, text: &str) {
    let events = events_until(qmp, "RESUME");
    let names: Vec<_> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["STOP", "DUMP_COMPLETED", "RESUME"]);
    let told = &events[1].1;
    assert_eq!(told["result"]["status"], "failed");
    assert_eq!(told["error"], text);
    assert_eq!(qmp.run("query-dump"), told["result"]);
    guest_goes_on(machine, qmp);
}

fn dump_proc_ends(machine: &Machine) {
    wait_until("dump-proc is gone", || {
        !machine.helpers().iter().any(|(name, _)| name == "dump-proc")
    });
}

/// A file system of a given size, for as long as this lives.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(path: PathBuf, bytes: u64) -> Option<Self> {
        std::fs::create_dir(&path).unwrap();
        let options = format!("size={bytes}");
        mount(
            Some("none"),
            &path,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .ok()?;
        Some(Self(path))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_fails_the_dump_and_is_given_back() {
    need_kvm!();
    let (machine, mut qmp) = machine();
    fill(&machine, 16 << 20);
    let Some(disk) = SmallDisk::new(machine.path("small"), 1 << 20) else {
        println!("SKIPPED: only root can mount a small disk");
        return;
    };
    let path = disk.0.join("dump");
    let full = "dump: failed to save memory: No space left on device";
    for format in ["elf", "kdump-zlib", "kdump-raw-lzo", "kdump-snappy"] {
        fails(&machine, &mut qmp, &with(file(&path), "format", format), full);
        assert!(!path.exists(), "half a {format} dump stays");
    }
    let detached = with(file(&path), "detach", true);
    assert_eq!(qmp.execute("dump-guest-memory", detached), json!({}));
    failed_in_order(&machine, &mut qmp, full);
    assert_eq!(std::fs::read_dir(&disk.0).unwrap().count(), 0);
    dump_proc_ends(&machine);
}

#[test]
fn outputs_that_cannot_be_written_are_told_apart() {
    need_kvm!();
    let (machine, mut qmp) = machine();
    let named = json!({"paging": false, "protocol": "fd:d"});
    let full = "dump: failed to write elf header: No space left on device";
    for format in ["elf", "kdump-zlib", "kdump-lzo"] {
        let device = File::options().write(true).open("/dev/full").unwrap();
        name(&mut qmp, device.as_fd());
        fails(&machine, &mut qmp, &with(named.clone(), "format", format), full);
        fails(
            &machine,
            &mut qmp,
            &with(file(Path::new("/dev/full")), "format", format),
            full,
        );
        let read_only = File::open(guest::image()).unwrap();
        name(&mut qmp, read_only.as_fd());
        let text = "dump: failed to write elf header: Bad file descriptor";
        fails(&machine, &mut qmp, &with(named.clone(), "format", format), text);
        let (reader, writer) = pipe().unwrap();
        name(&mut qmp, writer.as_fd());
        drop((reader, writer));
        let text = "dump: failed to write elf header: Broken pipe";
        fails(&machine, &mut qmp, &with(named.clone(), "format", format), text);
    }
    assert!(Path::new("/dev/full").exists());
    dump_proc_ends(&machine);
}

#[test]
fn a_reader_that_leaves_fails_the_dump() {
    need_kvm!();
    let (machine, mut qmp) = machine();
    let reader = stuck(&mut qmp);
    drop(reader);
    let told = qmp.wait_event("DUMP_COMPLETED");
    assert_eq!(told["error"], "dump: failed to save memory: Broken pipe");
    qmp.wait_event("RESUME");
    guest_goes_on(&machine, &mut qmp);
}

/// QEMU dies of SIGXFSZ.
#[test]
fn a_file_size_limit_is_an_error_like_others() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new("prlimit");
    // Guest RAM is a file as well, so it may not be lower.
    command.arg(format!("--fsize={RAM_BYTES}"));
    command.arg(bulkhead_tests::machine::programs().join("bulkhead"));
    let serial = format!("-serial file:{}/serial {}", directory.path().display(), arguments());
    let mut machine = Machine::start_command(directory, command, &serial, &["-append", "test=spin ms=10"]);
    let mut qmp = machine.qmp();
    machine.wait_for_serial("spin 0");
    let path = machine.path("dump");
    let text = "dump: failed to save memory: File too large";
    fails(&machine, &mut qmp, &file(&path), text);
    assert!(!path.exists());
    for (format, text) in [
        ("elf", "dump: failed to write elf header: File too large"),
        ("kdump-zlib", "dump: failed to write elf header: File too large"),
    ] {
        let mut behind = tempfile::tempfile().unwrap();
        behind.seek(SeekFrom::Start(RAM_BYTES)).unwrap();
        name(&mut qmp, behind.as_fd());
        let arguments = json!({"paging": false, "protocol": "fd:d", "format": format});
        fails(&machine, &mut qmp, &arguments, text);
    }
    qmp.execute("dump-guest-memory", with(file(&path), "format", "kdump-zlib"));
    assert!(path.metadata().unwrap().len() < RAM_BYTES);
}

#[test]
fn what_a_file_opened_for_appending_holds_stays_before_the_dump() {
    need_kvm!();
    let (machine, mut qmp) = machine();
    qmp.run("stop");
    let whole = machine.path("whole");
    for format in ["elf", "kdump-zlib"] {
        let _ = std::fs::remove_file(&whole);
        qmp.execute("dump-guest-memory", with(file(&whole), "format", format));
        let path = machine.path("log");
        std::fs::write(&path, "before").unwrap();
        let end = File::options().append(true).open(&path).unwrap();
        name(&mut qmp, end.as_fd());
        let named = json!({"paging": false, "protocol": "fd:d", "format": format});
        qmp.execute("dump-guest-memory", named);
        let text = std::fs::read(&path).unwrap();
        assert_eq!(&text[..6], b"before");
        if format == "elf" {
            assert!(
                text[6..] == std::fs::read(&whole).unwrap(),
                "not the dump of a new file"
            );
        } else {
            assert_eq!(&text[6..18], b"makedumpfile");
        }
        name(&mut qmp, end.as_fd());
        let raw = json!({"paging": false, "protocol": "fd:d", "format": "kdump-raw-zlib"});
        let error = qmp.try_execute("dump-guest-memory", raw).unwrap_err();
        assert_eq!(error["desc"], "kdump-raw formats require a seekable file");
    }
}

#[test]
fn a_killed_dump_proc_costs_its_dump_alone() {
    need_kvm!();
    let (machine, mut qmp) = machine();
    let before = descriptor_counts(&machine);
    let reader = stuck(&mut qmp);
    kill(Pid::from_raw(machine.helper("dump-proc")), Signal::SIGKILL).unwrap();
    let told = qmp.wait_event("DUMP_COMPLETED");
    assert_eq!(told["result"]["status"], "failed");
    let text = told["error"].as_str().unwrap();
    assert!(text.contains("dump-proc"), "{text}");
    qmp.wait_event("RESUME");
    guest_goes_on(&machine, &mut qmp);
    assert!(read_all(reader).join().unwrap() < RAM_BYTES);
    assert_eq!(descriptor_counts(&machine), before);
    wait_until("its end is logged", || {
        machine.log().contains("its dump fails, the machine goes on")
    });
    // The next one is none the worse.
    qmp.execute("dump-guest-memory", file(&machine.path("next")));
    assert_eq!(qmp.run("query-dump")["status"], "completed");
}

/// Whether the file under its final name is whole can be told by its being there.
#[test]
fn a_dump_proc_killed_while_it_writes_a_file_leaves_no_file() {
    need_kvm!();
    let (machine, mut qmp) = machine();
    fill(&machine, RAM_BYTES - (8 << 20));
    let path = machine.path("dump");
    let mut killed = 0;
    for delay_ms in 0..8 {
        let mut arguments = with(file(&path), "detach", true);
        arguments["format"] = json!("kdump-zlib");
        qmp.execute("dump-guest-memory", arguments);
        wait_until("dump-proc", || {
            qmp.run("query-dump")["status"] != "active" || machine.helpers().iter().any(|(name, _)| name == "dump-proc")
        });
        std::thread::sleep(std::time::Duration::from_millis(delay_ms));
        if let Some((_, pid)) = machine.helpers().iter().find(|(name, _)| name == "dump-proc") {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        let told = qmp.wait_event("DUMP_COMPLETED");
        qmp.wait_event("RESUME");
        let is_whole = told["result"]["status"] == "completed";
        assert_eq!(path.exists(), is_whole, "{told}");
        killed += usize::from(!is_whole);
        if is_whole {
            std::fs::remove_file(&path).unwrap();
        }
        guest_goes_on(&machine, &mut qmp);
    }
    assert!(killed > 0, "no dump was under way");
}

/// Nobody is left who could remove it.
#[test]
fn half_a_dump_of_a_killed_machine_is_taken_for_none() {
    need_kvm!();
    for format in ["elf", "kdump-raw-zlib"] {
        let mut halves = 0;
        for _ in 0..20 {
            let (mut machine, mut qmp) = machine();
            fill(&machine, RAM_BYTES - (8 << 20));
            let path = machine.path("dump");
            let arguments = with(with(file(&path), "format", format), "detach", true);
            qmp.execute("dump-guest-memory", arguments);
            wait_until("the dump has begun", || {
                path.metadata().is_ok_and(|about| about.len() > 1 << 20)
            });
            machine.kill();
            let written = std::fs::read(&path).unwrap();
            assert!(written.len() > 1 << 20);
            halves += usize::from(Dump::open(File::open(&path).unwrap()).is_err());
            if halves > 0 {
                assert_eq!(written[0], 0, "{format}");
                break;
            }
        }
        assert!(halves > 0, "no {format} dump was under way");
    }
}

#[test]
fn a_client_that_leaves_does_not_end_its_dump() {
    need_kvm!();
    let (machine, mut qmp) = machine();
    for detach in [true, false] {
        let mut client = Qmp::connect(&machine.path("qmp")).unwrap();
        let (mut reader, writer) = pipe().unwrap();
        name(&mut client, writer.as_fd());
        drop(writer);
        let arguments = json!({"paging": false, "protocol": "fd:d", "detach": detach});
        client
            .send(&json!({"execute": "dump-guest-memory", "arguments": arguments}))
            .unwrap();
        reader.read_exact(&mut [0]).unwrap();
        drop(client);
        // The guest's part of the session is over; the other client sees the dump go on.
        assert_eq!(qmp.run("query-dump")["status"], "active");
        let rest = read_all(reader);
        let told = qmp.wait_event("DUMP_COMPLETED");
        assert_eq!(told["result"]["status"], "completed", "detach {detach}: {told}");
        assert!(rest.join().unwrap() >= RAM_BYTES);
        qmp.wait_event("RESUME");
    }
    guest_goes_on(&machine, &mut qmp);
}

/// QEMU aborts.
#[test]
fn a_reset_waits_for_the_dump_and_then_happens() {
    need_kvm!();
    let (machine, mut qmp) = machine();
    let reader = stuck(&mut qmp);
    qmp.run("system_reset");
    assert_eq!(qmp.run("query-status")["status"], "save-vm");
    assert_eq!(qmp.run("query-dump")["status"], "active");
    let rest = read_all(reader);
    let names: Vec<_> = events_until(&mut qmp, "RESET")
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(names, ["DUMP_COMPLETED", "RESUME", "RESET"]);
    assert!(rest.join().unwrap() + BEGUN as u64 >= RAM_BYTES);
    wait_until("the guest starts again", || {
        machine.serial().matches("spin 0").count() == 2
    });
}

#[test]
fn a_signal_ends_a_machine_in_the_middle_of_a_dump() {
    need_kvm!();
    let (mut machine, mut qmp) = machine();
    let reader = stuck(&mut qmp);
    kill(Pid::from_raw(machine.pid()), Signal::SIGTERM).unwrap();
    let told = qmp.wait_event("DUMP_COMPLETED");
    assert_eq!(told["result"]["status"], "failed");
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
    drop(reader);
}

/// Dumps may not be written by anybody; the next one to the same file still takes their place.
#[test]
fn a_dump_takes_the_place_of_an_earlier_one() {
    need_kvm!();
    let (machine, mut qmp) = machine();
    let path = machine.path("dump");
    for format in ["elf", "kdump-zlib", "elf"] {
        qmp.execute("dump-guest-memory", with(file(&path), "format", format));
        let begin = if format == "elf" { b"\x7fELF" } else { b"make" };
        assert!(std::fs::read(&path).unwrap().starts_with(begin), "{format}");
    }
    // What is no dump stays.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "mine").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o444);
    std::fs::set_permissions(&path, mode).unwrap();
    let error = qmp.try_execute("dump-guest-memory", file(&path)).unwrap_err();
    let text = format!("Could not create '{}': Permission denied", path.display());
    assert_eq!(error["desc"], text);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
}

/// Whoever is stopped stays so, whatever becomes of the dump.
#[test]
fn a_dump_starts_no_guest_that_stood() {
    need_kvm!();
    let panicked = || {
        let append = ["-append", "test=panic", "-action", "panic=pause"];
        let mut machine = Machine::start_with(tempfile::tempdir().unwrap(), &arguments(), &append);
        let mut qmp = machine.qmp();
        wait_until("the panic", || qmp.run("query-status")["status"] == "guest-panicked");
        (machine, qmp, "guest-panicked")
    };
    let paused = || {
        let (machine, mut qmp) = machine();
        qmp.run("stop");
        (machine, qmp, "paused")
    };
    for (machine, mut qmp, status) in [paused(), panicked()] {
        qmp.events();
        for (path, succeeds) in [(machine.path("dump"), true), ("/dev/full".into(), false)] {
            let result = qmp.try_execute("dump-guest-memory", file(&path));
            assert_eq!(result.is_ok(), succeeds, "{result:?}");
            assert_eq!(qmp.run("query-status"), json!({"running": false, "status": status}));
            let events = qmp.events();
            let names: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
            assert_eq!(names, ["DUMP_COMPLETED"]);
        }
        dump_proc_ends(&machine);
    }
}

/// The memory file of the machine's RAM, as the supervisor has it.
fn ram(machine: &Machine) -> File {
    let descriptors = procfs::descriptors(machine.pid());
    let (number, _) = descriptors
        .iter()
        .find(|(_, target)| target.contains("memfd:"))
        .unwrap_or_else(|| panic!("no memory among {descriptors:?}"));
    let path = format!("/proc/{}/fd/{number}", machine.pid());
    File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Writes into the last bytes of the guest's memory what no codec makes smaller.
fn fill(machine: &Machine, bytes: u64) {
    let memory = ram(machine);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut page = [0; 4096];
    for offset in (RAM_BYTES - bytes..RAM_BYTES).step_by(page.len()) {
        for word in page.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        memory.write_all_at(&page, offset).unwrap();
    }
}

#[test]
fn a_dump_takes_little_memory_and_none_of_the_guests() {
    need_kvm!();
    let (machine, mut qmp) = machine();
    fill(&machine, 24 << 20);
    qmp.run("stop");
    let held = || ram(&machine).metadata().unwrap().blocks();
    let before = held();
    for format in ["elf", "kdump-zlib", "kdump-lzo", "kdump-snappy", "kdump-raw-zlib"] {
        qmp.execute("dump-guest-memory", with(file(&machine.path(format)), "format", format));
        assert_eq!(held(), before, "{format} has touched memory that the guest never did");
    }
    qmp.execute("dump-guest-memory", with(file(&machine.path("paged")), "paging", true));
    assert_eq!(held(), before);
    // Half way through, whatever it keeps is in use. Guest RAM is not mapped, so all of its memory is its own.
    let workers = std::thread::available_parallelism().unwrap().get().min(16) as u64;
    for format in ["elf", "kdump-zlib"] {
        dump_proc_ends(&machine);
        let (mut reader, writer) = pipe().unwrap();
        name(&mut qmp, writer.as_fd());
        drop(writer);
        let arguments = json!({"paging": false, "protocol": "fd:d", "detach": true, "format": format});
        qmp.execute("dump-guest-memory", arguments);
        reader.read_exact(&mut vec![0; 12 << 20]).unwrap();
        let statuses = procfs::statuses(machine.helper("dump-proc"));
        let peak = procfs::field(&statuses[0], "VmHWM");
        let kib: u64 = peak.split_whitespace().next().unwrap().parse().unwrap();
        assert!(kib < (8 + 5 * workers) << 10, "{format}: {peak} with {workers} workers");
        let rest = read_all(reader);
        assert_eq!(qmp.wait_event("DUMP_COMPLETED")["result"]["status"], "completed");
        rest.join().unwrap();
    }
}

/// A reader that takes a few bytes at a time, of a pipe that does not block: every write is short or refused.
#[test]
fn short_writes_and_a_full_pipe_lose_nothing() {
    need_kvm!();
    let (machine, mut qmp) = machine();
    qmp.run("stop");
    let whole = machine.path("whole");
    let part = |arguments: Value| with(with(arguments, "begin", 0), "length", 8 << 20);
    qmp.execute("dump-guest-memory", part(file(&whole)));
    let (mut reader, writer) = pipe().unwrap();
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
    name(&mut qmp, writer.as_fd());
    drop(writer);
    let drain = std::thread::spawn(move || {
        let mut text = Vec::new();
        let mut few = [0; 1777];
        loop {
            match reader.read(&mut few).unwrap() {
                0 => return text,
                count => text.write_all(&few[..count]).unwrap(),
            }
        }
    });
    qmp.execute("dump-guest-memory", part(json!({"paging": false, "protocol": "fd:d"})));
    assert!(drain.join().unwrap() == std::fs::read(whole).unwrap());
}
