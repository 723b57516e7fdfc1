//! Dumps of a guest that runs on: the memory of one instant, and a guest that hardly notices.

use bulkhead_tests::census::descriptor_counts;
use bulkhead_tests::machine::{Machine, wait_until};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::io::{PipeReader, Read, pipe};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

const RAM_BYTES: u64 = 64 << 20;
const DISK_SECTORS: u64 = 4096;

/// Returns from the test when this host cannot do live dumps, and says why.
macro_rules! need_userfaultfd {
    () => {
        need_kvm!();
        if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/userfaultfd") {
            println!("SKIPPED: /dev/userfaultfd: {error}");
            return;
        }
    };
}

/// A disk of pairs of sectors, as the guest expects them.
fn disk() -> Vec<u8> {
    let mut disk = Vec::new();
    for sector in 0..DISK_SECTORS {
        let begin = disk.len();
        disk.extend_from_slice(if sector % 2 == 0 { b"BHGREAD1" } else { b"BHGREAD2" });
        disk.extend_from_slice(&(sector / 2).to_le_bytes());
        disk.resize(begin + 512, sector as u8);
    }
    disk
}

/// A machine whose guest keeps pages in step, and rewrites more than can be put aside.
fn stepping(engine: &str) -> (Machine, Qmp) {
    stepping_in(engine, 32)
}

/// As above, with so many MiB.
fn stepping_in(engine: &str, mib: u64) -> (Machine, Qmp) {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk"), disk()).unwrap();
    let line = format!(
        "-m 64 -kernel {} -drive file={{dir}}/disk,if=virtio,format=raw,id=d,aio={engine}",
        guest::image().display()
    );
    let append = format!("test=step mib={mib} ms=50");
    let mut machine = Machine::start_with(directory, &line, &["-append", &append]);
    let qmp = machine.qmp();
    machine.wait_for_serial("step count=");
    (machine, qmp)
}

fn live(path: &Path) -> Value {
    json!({"paging": false, "protocol": format!("file:{}", path.display()), "live": true})
}

/// The words after each of these, at the beginnings of pages.
fn pairs(dump: &[u8], words: [&[u8; 8]; 2]) -> (u64, u64) {
    let find = |word: &[u8; 8]| {
        let mut found = dump
            .chunks_exact(4096)
            .filter(|page| page.starts_with(word))
            .map(|page| u64::from_le_bytes(page[8..16].try_into().unwrap()));
        let number = found.next().expect("a page of a pair");
        assert_eq!(found.next(), None, "a pair has two pages");
        number
    };
    (find(words[0]), find(words[1]))
}

/// What the guest has said last: steps, reads, and the longest time between two steps of all lines from `since` on.
fn progress(machine: &Machine, since: usize) -> (u64, u64, Duration) {
    let serial = machine.serial();
    let lines: Vec<_> = serial[since..]
        .lines()
        .filter(|line| line.contains("longest_us="))
        .collect();
    let number = |line: &str, key: &str| -> Option<u64> {
        let value = line.split(key).nth(1)?;
        value.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    let longest = lines.iter().filter_map(|line| number(line, "longest_us=")).max();
    let last = |key| lines.iter().rev().find_map(|line| number(line, key)).unwrap_or(0);
    (
        last("count="),
        last("reads="),
        Duration::from_micros(longest.unwrap_or(0)),
    )
}

fn names(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["event"].as_str().unwrap()).collect()
}

fn consistent_dumps(engine: &str, count: usize) {
    let (machine, mut qmp) = stepping(engine);
    // Without any dump, for comparison.
    std::thread::sleep(Duration::from_millis(500));
    let (steps_before, reads_before, idle) = progress(&machine, 0);
    let since = machine.serial().len();
    qmp.events();
    let mut ahead = 0;
    let start = Instant::now();
    for number in 0..count {
        let path = machine.path("core");
        qmp.execute("dump-guest-memory", live(&path));
        assert_eq!(names(&qmp.events()), ["DUMP_COMPLETED"], "the guest was stopped");
        let dump = std::fs::read(&path).unwrap();
        let (first, last) = pairs(&dump, [b"BHGSTEP1", b"BHGSTEP2"]);
        assert!(
            first == last || first == last + 1,
            "dump {number}: the processor's pages are torn: {first} and {last}"
        );
        ahead += usize::from(first != last);
        let (even, odd) = pairs(&dump, [b"BHGREAD1", b"BHGREAD2"]);
        assert_eq!(even, odd, "dump {number}: the disk's pages are torn");
        std::fs::remove_file(path).unwrap();
    }
    let took = start.elapsed();
    wait_until("the guest goes on", || progress(&machine, since).0 > steps_before);
    let (steps, reads, longest) = progress(&machine, since);
    assert!(reads > reads_before, "no block I/O meanwhile");
    assert!(!machine.serial().contains("FAIL"), "{}", machine.serial());
    let pauses: Vec<f64> = machine
        .log()
        .lines()
        .filter_map(|line| line.split("stood for ").nth(1)?.split(' ').next()?.parse().ok())
        .collect();
    assert_eq!(pauses.len(), count);
    println!(
        "{engine}: {count} live dumps in {took:?}, no torn pair ({ahead} between the two writes); meanwhile {} steps and {} \
         reads; longest stall of the guest {longest:?} (without dumps {idle:?}); paused {:.1} ms at most",
        steps - steps_before,
        reads - reads_before,
        pauses.iter().copied().fold(0.0, f64::max),
    );
}

#[test]
fn a_hundred_live_dumps_have_no_torn_pair() {
    need_userfaultfd!();
    consistent_dumps("io_uring", 100);
}

#[test]
fn live_dumps_have_no_torn_pair_with_the_other_engine() {
    need_userfaultfd!();
    consistent_dumps("threads", 10);
}

/// Into a pipe: the dump takes a while, and the guest changes its memory meanwhile.
#[test]
fn the_reader_of_a_pipe_gets_the_memory_of_the_beginning() {
    need_userfaultfd!();
    let (machine, mut qmp) = stepping("io_uring");
    let mut reader = stuck(&mut qmp);
    let mut dump = Vec::new();
    reader.read_to_end(&mut dump).unwrap();
    assert_eq!(qmp.wait_event("DUMP_COMPLETED")["result"]["status"], "completed");
    let (first, last) = pairs(&dump, [b"BHGSTEP1", b"BHGSTEP2"]);
    assert!(first == last || first == last + 1, "{first} and {last}");
    let (even, odd) = pairs(&dump, [b"BHGREAD1", b"BHGREAD2"]);
    assert_eq!(even, odd);
    goes_on(&machine);
}

/// Nobody reads the dump, and the guest rewrites more than can be put aside.
#[test]
fn a_guest_that_is_too_fast_costs_the_dump_and_not_the_guest() {
    need_userfaultfd!();
    let (machine, mut qmp) = stepping("io_uring");
    let reader = stuck(&mut qmp);
    let told = qmp.wait_event("DUMP_COMPLETED");
    assert_eq!(told["result"]["status"], "failed");
    assert_eq!(
        told["error"],
        "dump: the guest changes its memory faster than the live dump is written"
    );
    goes_on(&machine);
    drop(reader);
}

/// A detached live dump into a pipe that nobody reads.
fn stuck(qmp: &mut Qmp) -> PipeReader {
    let (reader, writer) = pipe().unwrap();
    qmp.pass(&[writer.as_fd()]);
    qmp.execute("getfd", json!({"fdname": "d"}));
    drop(writer);
    let arguments = json!({"paging": false, "protocol": "fd:d", "detach": true, "live": true});
    qmp.execute("dump-guest-memory", arguments);
    reader
}

fn goes_on(machine: &Machine) {
    let since = machine.serial().len();
    wait_until("steps and reads", || {
        let (steps, reads, _) = progress(machine, since);
        steps > 0 && reads > 0
    });
    assert!(!machine.serial().contains("FAIL"), "{}", machine.serial());
}

#[test]
fn a_killed_dump_proc_lets_the_guest_go_on() {
    need_userfaultfd!();
    let (machine, mut qmp) = stepping_in("io_uring", 4);
    let before = descriptor_counts(&machine);
    for _ in 0..5 {
        let reader = stuck(&mut qmp);
        wait_until("the dump has begun", || {
            machine.log().contains("stood for") && machine.helpers().iter().any(|(name, _)| name == "dump-proc")
        });
        kill(Pid::from_raw(machine.helper("dump-proc")), Signal::SIGKILL).unwrap();
        let told = qmp.wait_event("DUMP_COMPLETED");
        assert_eq!(told["result"]["status"], "failed", "{told}");
        goes_on(&machine);
        drop(reader);
        wait_until("dump-proc is gone", || {
            !machine.helpers().iter().any(|(name, _)| name == "dump-proc")
        });
    }
    assert_eq!(descriptor_counts(&machine), before);
}

/// Nothing that may happen to a machine waits for a live dump, but another dump.
#[test]
fn a_live_dump_is_no_obstacle() {
    need_userfaultfd!();
    let (machine, mut qmp) = stepping_in("io_uring", 4);
    let reader = stuck(&mut qmp);
    wait_until("the dump has begun", || machine.log().contains("stood for"));
    let busy = "There is a dump in process, please wait.";
    let error = qmp
        .try_execute("dump-guest-memory", live(&machine.path("second")))
        .unwrap_err();
    assert_eq!(error["desc"], busy);
    qmp.run("stop");
    assert_eq!(qmp.run("query-status")["status"], "paused");
    qmp.run("cont");
    goes_on(&machine);
    let since = machine.serial().len();
    qmp.run("system_reset");
    qmp.wait_event("RESET");
    wait_until("the guest starts again", || progress(&machine, since).0 > 0);
    assert_eq!(qmp.run("query-dump")["status"], "active");
    drop(reader);
    let told = qmp.wait_event("DUMP_COMPLETED");
    assert_eq!(told["result"]["status"], "failed");
    assert!(told["error"].as_str().unwrap().contains("Broken pipe"), "{told}");
    goes_on(&machine);
}

#[test]
fn quit_ends_a_live_dump() {
    need_userfaultfd!();
    let (mut machine, mut qmp) = stepping_in("io_uring", 4);
    let reader = stuck(&mut qmp);
    wait_until("the dump has begun", || machine.log().contains("stood for"));
    qmp.run("quit");
    assert_eq!(qmp.wait_event("DUMP_COMPLETED")["result"]["status"], "failed");
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
    drop(reader);
}

/// Stopped or running, the whole or a part, in all forms: the same content, and a machine that is as it was.
#[test]
fn a_live_dump_of_a_guest_that_stands_is_the_dump() {
    need_userfaultfd!();
    let (machine, mut qmp) = stepping("io_uring");
    qmp.run("stop");
    qmp.events();
    let mut dump = |arguments: &Value, name: &str, is_live: bool| {
        let path = machine.path(name);
        let mut arguments = arguments.clone();
        arguments["protocol"] = json!(format!("file:{}", path.display()));
        arguments["live"] = json!(is_live);
        qmp.execute("dump-guest-memory", arguments);
        assert_eq!(names(&qmp.events()), ["DUMP_COMPLETED"]);
        assert_eq!(qmp.run("query-status")["status"], "paused");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        bytes
    };
    for arguments in [
        json!({"paging": false}),
        json!({"paging": true}),
        json!({"paging": false, "begin": 4096, "length": 5000}),
    ] {
        let (still, live) = (dump(&arguments, "a", false), dump(&arguments, "b", true));
        assert!(still == live, "{arguments}");
    }
    for format in ["kdump-zlib", "kdump-raw-lzo", "kdump-raw-snappy"] {
        let arguments = json!({"paging": false, "format": format});
        let (still, live) = (dump(&arguments, "a", false), dump(&arguments, "b", true));
        // The order of pages is free.
        assert!(still.len().abs_diff(live.len()) < 1 << 20, "{format}");
    }
    assert_eq!(
        qmp.run("query-dump"),
        json!({"status": "completed", "completed": RAM_BYTES, "total": RAM_BYTES})
    );
    qmp.run("cont");
    goes_on(&machine);
}
