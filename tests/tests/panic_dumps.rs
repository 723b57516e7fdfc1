//! `-dump-on-panic`: a guest that panics leaves a dump, then what `-action panic` says is done.

use bulkhead_tests::machine::{Machine, refused, wait_until};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;

/// A machine that panics after a while.
fn machine(options: &str) -> (Machine, Qmp) {
    let line = format!("-m 64 -kernel {} {options}", guest::image().display());
    let append = ["-append", "test=spin ms=20 count=20 test=panic test=spin ms=10"];
    let mut machine = Machine::start_with(tempfile::tempdir().unwrap(), &line, &append);
    let qmp = machine.qmp();
    (machine, qmp)
}

fn events(qmp: &mut Qmp, count: usize) -> Vec<(String, Value)> {
    let event = |_| {
        let mut event = qmp.event();
        (event["event"].as_str().unwrap().to_owned(), event["data"].take())
    };
    (0..count).map(event).collect()
}

fn names(events: &[(String, Value)]) -> Vec<&str> {
    events.iter().map(|(name, _)| name.as_str()).collect()
}

const RAM_BYTES: u64 = 64 << 20;

fn is_whole_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF") && bytes.len() as u64 > RAM_BYTES && bytes.windows(5).any(|five| five == b"BHG: ")
}

#[test]
fn a_panic_leaves_a_dump_and_then_ends_the_machine() {
    need_kvm!();
    let (mut machine, mut qmp) = machine("-dump-on-panic file:{dir}/core,format=elf");
    let events = events(&mut qmp, 4);
    assert_eq!(names(&events), ["GUEST_PANICKED", "STOP", "DUMP_COMPLETED", "SHUTDOWN"]);
    assert_eq!(events[0].1, json!({"action": "poweroff"}));
    let all = json!({"status": "completed", "completed": RAM_BYTES, "total": RAM_BYTES});
    assert_eq!(events[2].1, json!({"result": all}));
    assert_eq!(events[3].1, json!({"guest": true, "reason": "guest-panic"}));
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
    let core = machine.path("core");
    assert!(is_whole_elf(&std::fs::read(&core).unwrap()));
    assert_eq!(core.metadata().unwrap().permissions().mode() & 0o777, 0o400);
    assert!(machine.log().contains("its memory is in"), "{}", machine.log());
}

#[test]
fn the_actions_follow_the_dump() {
    need_kvm!();
    let (machine, mut qmp) = machine("-dump-on-panic file:{dir}/core -action panic=pause");
    assert_eq!(
        names(&events(&mut qmp, 3)),
        ["GUEST_PANICKED", "STOP", "DUMP_COMPLETED"]
    );
    assert_eq!(
        qmp.run("query-status"),
        json!({"running": false, "status": "guest-panicked"})
    );
    assert!(std::fs::read(machine.path("core")).unwrap().starts_with(b"KDUMP   "));
    drop((machine, qmp));

    let (machine, mut qmp) = self::machine("-dump-on-panic file:{dir}/core -action panic=none");
    let seen = events(&mut qmp, 4);
    assert_eq!(names(&seen), ["GUEST_PANICKED", "STOP", "DUMP_COMPLETED", "RESUME"]);
    assert_eq!(seen[0].1, json!({"action": "run"}));
    wait_until("the guest goes on", || machine.serial().matches("spin 0").count() == 2);
    drop((machine, qmp));

    let (mut machine, mut qmp) = self::machine("-dump-on-panic file:{dir}/core -action panic=exit-failure");
    qmp.wait_event("DUMP_COMPLETED");
    assert_eq!(machine.wait().code(), Some(1));
    assert!(machine.path("core").exists());
}

#[test]
fn a_dump_that_fails_changes_nothing_else() {
    need_kvm!();
    let (mut machine, mut qmp) = machine("-dump-on-panic file:/dev/full,format=elf");
    let seen = events(&mut qmp, 4);
    assert_eq!(names(&seen), ["GUEST_PANICKED", "STOP", "DUMP_COMPLETED", "SHUTDOWN"]);
    let text = "dump: failed to write elf header: No space left on device";
    assert_eq!(seen[2].1["error"], text);
    assert_eq!(machine.wait().code(), Some(0));
    assert!(machine.log().contains(text), "{}", machine.log());
    // What was there at the start may be gone.
    let directory = tempfile::tempdir().unwrap();
    let dumps = directory.path().join("dumps");
    std::fs::create_dir(&dumps).unwrap();
    let line = format!(
        "-m 64 -S -kernel {} -dump-on-panic file:{{dir}}/dumps/core",
        guest::image().display()
    );
    let mut machine = Machine::start_with(directory, &line, &["-append", "test=panic"]);
    let mut qmp = machine.qmp();
    std::fs::remove_dir(&dumps).unwrap();
    qmp.run("cont");
    qmp.wait_event("SHUTDOWN");
    assert_eq!(machine.wait().code(), Some(0));
    let log = machine.log();
    assert!(
        log.contains("could not be dumped") && log.contains("No such file"),
        "{log}"
    );
}

#[test]
fn quit_does_not_wait_for_the_dump_of_a_panic() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    use std::os::unix::fs::OpenOptionsExt;
    let reader = std::fs::File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .unwrap();
    let line = format!(
        "-m 64 -kernel {} -dump-on-panic file:{{dir}}/fifo,format=elf",
        guest::image().display()
    );
    let append = ["-append", "test=spin ms=20 count=10 test=panic"];
    let mut machine = Machine::start_with(directory, &line, &append);
    let mut qmp = machine.qmp();
    qmp.wait_event("STOP");
    wait_until("the dump", || qmp.run("query-dump")["status"] == "active");
    let busy = "There is a dump in process, please wait.";
    for command in ["cont", "stop"] {
        assert_eq!(qmp.try_execute(command, json!({})).unwrap_err()["desc"], busy);
    }
    qmp.run("quit");
    assert_eq!(qmp.wait_event("DUMP_COMPLETED")["result"]["status"], "failed");
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
    drop(reader);
}

#[test]
fn where_no_file_can_be_made_the_machine_does_not_start() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = guest::image().display().to_string();
    let start = |dump: &str| {
        let line = ["-nodefaults", "-kernel", &kernel, "-dump-on-panic", dump];
        refused(directory.path(), &line)
    };
    for (dump, text) in [
        (
            "file:nope/core",
            "-dump-on-panic nope/core: ENOENT: No such file or directory",
        ),
        (
            "file:/dev/null/core",
            "-dump-on-panic /dev/null/core: ENOTDIR: Not a directory",
        ),
        ("file:/", "-dump-on-panic /: EISDIR: Is a directory"),
    ] {
        let said = start(dump);
        assert!(said.contains(text), "{said}");
    }
}
