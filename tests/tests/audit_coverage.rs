//! `bulkhead audit coverage`: a recording of a machine names the rules that it needed, and the machine does not notice.

use bulkhead_tests::machine::{Machine, programs};
use serde_json::{Value, json};
use std::process::Command;

#[test]
fn a_small_run_exercises_what_it_must_and_nothing_that_policies_lack() {
    let directory = tempfile::tempdir().unwrap();
    let recording = directory.path().join("recording");
    let mut tracer = Command::new(programs().join("bulkhead-audit"));
    tracer.args(["coverage", "--record"]).arg(&recording).arg("--");
    tracer.arg(programs().join("bulkhead"));
    let disk = directory.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let drive = format!("-blockdev file,node-name=disk,filename={}", disk.display());
    let mut machine = Machine::start_command(
        tempfile::tempdir().unwrap(),
        tracer,
        &format!("-machine none --metrics unix:{{dir}}/metrics {drive}"),
        &[],
    );
    let mut qmp = machine.qmp();
    let line = "qemu-io disk \"write -P 1 0 64k\"";
    qmp.execute("human-monitor-command", json!({"command-line": line}));
    qmp.execute("quit", json!({}));
    assert!(machine.wait().success(), "{}", machine.log());
    let report = Command::new(programs().join("bulkhead-audit"))
        .args(["coverage", "--json"])
        .arg(&recording)
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&report.stdout).unwrap();
    assert_eq!(report["calls-no-rule-allows"], 0, "{report:#}");
    let count = |process: &str, filter: &str, syscall: &str| -> u64 {
        let rules = report["rules"].as_array().unwrap().iter();
        let rules = rules.filter(|rule| {
            (&rule["process"], &rule["filter"], &rule["syscall"]) == (&json!(process), &json!(filter), &json!(syscall))
        });
        rules.map(|rule| rule["count"].as_u64().unwrap()).sum()
    };
    for (process, filter, syscall) in [
        ("supervisor", "sealed", "poll"),
        ("supervisor", "sealed", "accept4"),
        ("launcher", "sealed", "clone3"),
        ("launcher", "sealed", "execveat"),
        ("launcher", "sealed", "pivot_root"),
        ("opener", "sealed", "poll"),
        ("warden", "sealed", "poll"),
        ("qmp-proc", "startup", "execveat"),
        ("qmp-proc", "startup", "seccomp"),
        ("qmp-proc", "sealed", "recvmsg"),
        ("block-proc", "startup", "seccomp"),
    ] {
        assert!(count(process, filter, syscall) > 0, "{process} {filter} {syscall}");
    }
    // There was no guest and no client of the opener's.
    for (process, filter, syscall) in [("vcpu-proc", "sealed", "ioctl"), ("opener", "sealed", "connect")] {
        assert_eq!(count(process, filter, syscall), 0, "{process} {filter} {syscall}");
    }
}
