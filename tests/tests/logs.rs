//! `--log-format`: what a machine's log looks like.

use bulkhead_tests::machine::{Machine, PATIENCE, refused};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;

/// What a machine without a guest, ended by a signal, and its helper, ended before that, leave in the log.
fn log(format: &str) -> (i32, String) {
    let directory = tempfile::tempdir().expect("scratch directory");
    let arguments = format!("-machine none --log-format {format}");
    let mut machine = Machine::start_without_serial(directory, &arguments, &[]);
    let mut qmp = machine.qmp();
    kill(Pid::from_raw(machine.helper("block-proc")), Signal::SIGKILL).expect("kill");
    qmp.wait_event("BULKHEAD_HELPER_RESTARTED");
    let pid = machine.pid();
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("kill");
    qmp.wait_event("SHUTDOWN");
    assert!(machine.wait().success());
    (pid, machine.log())
}

#[test]
fn json_is_one_object_a_line() {
    let (pid, log) = log("json");
    let lines: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    for line in &lines {
        assert_eq!(line["vm"], "test", "{line}");
        assert!(line["time"].as_f64().expect("time") > 1e9, "{line}");
        assert!(line["role"].is_string() && line["pid"].is_i64(), "{line}");
    }
    assert!(
        lines.iter().any(|line| line["role"] == "bulkhead"
            && line["pid"] == pid
            && line["message"]
                .as_str()
                .expect("message")
                .starts_with("terminating on ")),
        "{log}"
    );
}

#[test]
fn the_journal_gets_entries_with_fields() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let journal = UnixDatagram::bind(&path).unwrap();
    let mut machine = Machine::start(&format!("-machine none --log-format journal:{}", path.display()));
    let mut qmp = machine.qmp();
    let victim = machine.helper("block-proc");
    kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
    journal.set_read_timeout(Some(PATIENCE)).unwrap();
    loop {
        let mut bytes = [0; 8192];
        let length = journal.recv(&mut bytes).expect("an entry about the death");
        let entry = String::from_utf8_lossy(&bytes[..length]).into_owned();
        let fields: BTreeMap<&str, &str> = entry.lines().map(|line| line.split_once('=').unwrap()).collect();
        assert_eq!(
            (fields["SYSLOG_IDENTIFIER"], fields["BULKHEAD_VM"]),
            ("bulkhead", "test"),
            "{entry}"
        );
        assert!(
            fields["BULKHEAD_PID"].parse::<i32>().is_ok() && !fields["BULKHEAD_ROLE"].is_empty(),
            "{entry}"
        );
        if fields["MESSAGE"].contains(&victim.to_string()) || fields["BULKHEAD_PID"] == victim.to_string() {
            break;
        }
    }
    qmp.execute("quit", json!({}));
}

#[test]
fn text_is_the_default() {
    let (pid, log) = log("text");
    assert!(log.lines().all(|line| line.starts_with("test: ")), "{log}");
    assert!(
        log.contains(&format!("test: bulkhead[{pid}]: terminating on ")),
        "{log}"
    );
}

#[test]
fn what_keeps_a_machine_from_starting_has_the_form_too() {
    let directory = tempfile::tempdir().expect("scratch directory");
    let arguments = ["-machine", "none", "--log-format", "json", "-pidfile", "nodir/pid"];
    let line = refused(directory.path(), &arguments);
    let object: Value = serde_json::from_str(line.trim_end()).unwrap_or_else(|error| panic!("{error}: {line}"));
    assert!(
        object["message"].as_str().expect("message").contains("nodir/pid"),
        "{line}"
    );
}
