//! A helper that breaks its policy is told of: a log line, an event with all that the kernel says, a count, and then what its
//! end means. The calls are made from outside, by a debugger in the helper's place; the product has no switch for that.

use bulkhead_tests::inject::call;
use bulkhead_tests::machine::{Machine, programs, wait_until};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm, procfs};
use serde_json::{Value, json};
use std::process::Command;

/// Returns from the test, and says why, when it is not run by root: nobody else may debug a helper.
macro_rules! need_root {
    () => {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
    };
}

fn machine(options: &str) -> (Machine, Qmp) {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk"), vec![0; 1 << 20]).unwrap();
    let arguments = format!(
        "-m 64 -kernel {} -append test=spin -drive file={{dir}}/disk,if=virtio,format=raw,id=d {options}",
        guest::image().display()
    );
    let mut machine = Machine::start_in(directory, &arguments);
    machine.wait_for_serial("spin");
    let qmp = machine.qmp();
    (machine, qmp)
}

/// A call that every helper's start-up needs (the C library's), that no sealed filter has, and that is not among those that no
/// helper may ever try.
const CALL: (i64, [u64; 6]) = (libc::SYS_readlink, [0, 2, 3, 4, 5, u64::MAX]);

/// What the event says that a test can know.
fn check_call(data: &Value, role: &str, pid: i32, action: &str) {
    assert_eq!(data["role"], role, "{data}");
    assert_eq!(data["pid"], pid, "{data}");
    assert_eq!(data["vm"], "test", "{data}");
    assert_eq!(data["action"], action, "{data}");
    assert_eq!((&data["syscall"], &data["number"]), (&json!("readlink"), &json!(89)));
    assert_eq!(data["arguments"], json!(CALL.1), "{data}");
    assert!(
        data["instruction-pointer"].as_u64().is_some_and(|place| place > 4096),
        "{data}"
    );
    // The C library's function in which the thread waited: these programs have symbols.
    let symbol = data["symbol"].as_str().unwrap_or_default();
    assert!(symbol.contains("+0x"), "{data}");
}

#[test]
fn block_proc_that_breaks_its_policy_is_told_of_and_replaced() {
    need_kvm!();
    need_root!();
    let (machine, mut qmp) = machine("");
    assert_eq!(qmp.run("query-status").get("policy-violations"), None);
    let helper = machine.helper("block-proc");
    assert_eq!(call(helper, CALL.0, CALL.1), None, "it lives");
    check_call(
        &qmp.wait_event("BULKHEAD_POLICY_VIOLATION"),
        "block-proc",
        helper,
        "killed",
    );
    let restarted = qmp.wait_event("BULKHEAD_HELPER_RESTARTED");
    let reason = restarted["reason"].as_str().unwrap();
    assert!(reason.contains("broken its policy (readlink)"), "{reason}");
    let status = qmp.run("query-status");
    assert_eq!(status["policy-violations"], 1, "{status}");
    assert_eq!(status["status"], "running", "{status}");
    let log = machine.log();
    let line = format!("block-proc[{helper}]: killed by the supervisor: policy violation: readlink(0x0, 0x2, 0x3,");
    assert!(log.contains(&line), "{log}");
}

#[test]
fn a_call_that_the_first_filters_lack_is_told_of_without_what_the_kernel_does_not_say() {
    need_kvm!();
    need_root!();
    let (machine, mut qmp) = machine("");
    let helper = machine.helper("block-proc");
    assert_eq!(call(helper, libc::SYS_socket, [1, 1, 0, 0, 0, 0]), None, "it lives");
    let data = qmp.wait_event("BULKHEAD_POLICY_VIOLATION");
    assert_eq!(
        data,
        json!({"role": "block-proc", "pid": helper, "vm": "test", "action": "killed"})
    );
    let restarted = qmp.wait_event("BULKHEAD_HELPER_RESTARTED");
    assert!(
        restarted["reason"].as_str().unwrap().contains("broken its policy"),
        "{restarted}"
    );
    assert_eq!(qmp.run("query-status")["policy-violations"], 1);
    assert!(
        machine
            .log()
            .contains("policy violation: a system call that its first filters lack")
    );
}

#[test]
fn a_monitor_that_breaks_its_policy_costs_its_own_client_and_others_are_told() {
    need_kvm!();
    need_root!();
    let (mut machine, mut first) = machine("");
    let serving = |machine: &Machine| {
        let helpers = machine.helpers().into_iter();
        helpers
            .filter(|(name, _)| name == "qmp-proc")
            .map(|(_, pid)| pid)
            .min()
            .unwrap()
    };
    first.run("query-status");
    let helper = serving(&machine);
    let mut second = machine.qmp();
    second.run("query-status");
    assert_eq!(call(helper, CALL.0, CALL.1), None, "it lives");
    check_call(
        &second.wait_event("BULKHEAD_POLICY_VIOLATION"),
        "qmp-proc",
        helper,
        "killed",
    );
    assert!(first.is_closed());
    assert_eq!(second.run("query-status")["status"], "running");
}

fn audit(pid: i32) -> (bool, String) {
    let output = Command::new(programs().join("bulkhead"))
        .args(["audit", "live", &pid.to_string()])
        .output()
        .unwrap();
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}

#[test]
fn the_mode_for_development_lets_all_go_on_and_lists_it_at_the_end() {
    need_kvm!();
    need_root!();
    let (mut machine, mut qmp) = machine("--policy-mode log");
    let helper = machine.helper("block-proc");
    assert!(
        machine.log().contains("sandbox layer missing: no system call filters"),
        "{}",
        machine.log()
    );

    // Once the sealed filter alone lacks it, once every one; and twice the same.
    let missing = call(helper, CALL.0, CALL.1);
    assert_eq!(missing, Some(-i64::from(libc::EFAULT)), "a name at address 0");
    check_call(
        &qmp.wait_event("BULKHEAD_POLICY_VIOLATION"),
        "block-proc",
        helper,
        "allowed",
    );
    assert!(call(helper, CALL.0, CALL.1).is_some());
    let made = call(helper, libc::SYS_socket, [1, 1, 0, 0, 0, 0]);
    assert!(made.is_some_and(|fd| fd > 2), "{made:?}");
    let data = qmp.wait_event("BULKHEAD_POLICY_VIOLATION");
    assert_eq!(
        (&data["syscall"], &data["number"]),
        (&json!("socket"), &json!(41)),
        "{data}"
    );
    // What no helper may ever try.
    assert!(call(helper, libc::SYS_ptrace, [0x4206, 1, 0, 0, 0, 0]).is_some());
    assert_eq!(qmp.wait_event("BULKHEAD_POLICY_VIOLATION")["syscall"], "ptrace");
    let status = qmp.run("query-status");
    assert_eq!(status["policy-violations"], 4, "{status}");
    assert!(procfs::is_alive(helper));
    assert_eq!(machine.helper("block-proc"), helper, "it was replaced");

    // Nobody takes such a machine for a confined one.
    let (clean, rows) = audit(machine.pid());
    assert!(!clean, "{rows}");
    for process in ["supervisor", "launcher", "vcpu-proc", "block-proc", "qmp-proc"] {
        let row = rows
            .lines()
            .find(|line| line.contains(process) && line.contains("policy mode"));
        assert!(row.is_some_and(|row| row.starts_with("DIFFERS")), "{process}: {rows}");
        let row = rows
            .lines()
            .find(|line| line.contains(process) && line.contains(" filters "));
        assert!(row.is_some_and(|row| row.starts_with("DIFFERS")), "{process}: {rows}");
    }

    qmp.run("quit");
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
    wait_until("the log is whole", || machine.log().contains("kinds of violations"));
    let log = machine.log();
    assert!(
        log.contains("--policy-mode log: 3 kinds of violations, all allowed"),
        "{log}"
    );
    assert!(log.contains("2 × block-proc: readlink("), "{log}");
    assert!(log.contains("1 × block-proc: socket("), "{log}");
}

#[test]
fn a_machine_must_not_be_told_to_have_its_sandbox_and_no_filters() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let kernel = guest::image().display().to_string();
    let line = [
        "-nodefaults",
        "-kernel",
        &kernel,
        "--require-sandbox",
        "--policy-mode",
        "log",
    ];
    let said = bulkhead_tests::machine::refused(directory.path(), &line);
    assert!(said.contains("--require-sandbox: "), "{said}");
}
