//! Processes of a machine are killed in turn: a clear line, a defined end, nothing left. vcpu-proc is in `post_mortem.rs`,
//! block-proc in `restarts.rs`.

use bulkhead_tests::machine::{Machine, wait_until};
use bulkhead_tests::{guest, need_kvm, procfs};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

fn machine() -> Machine {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk"), vec![0; 1 << 20]).unwrap();
    let kernel = guest::image();
    let arguments = format!(
        "-m 64 -kernel {} -append test=spin -drive file={{dir}}/disk,if=virtio,format=raw,id=d",
        kernel.display()
    );
    Machine::start_in(directory, &arguments)
}

fn shoot(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

fn all_gone(pids: &[i32]) {
    wait_until("no process is left", || !pids.iter().any(|pid| procfs::is_alive(*pid)));
}

#[test]
fn a_killed_monitor_process_costs_only_its_own_client() {
    need_kvm!();
    let mut machine = machine();
    let mut first = machine.qmp();
    let serving: Vec<i32> = machine
        .helpers()
        .into_iter()
        .filter(|(name, _)| name == "qmp-proc")
        .map(|(_, pid)| pid)
        .collect();
    let mut second = machine.qmp();
    machine.wait_for_serial("spin");
    // The first connection's process is the oldest.
    shoot(*serving.iter().min().unwrap());
    assert!(first.is_closed(), "the first client's connection goes on");
    assert_eq!(second.run("query-status")["running"], json!(true));
    assert_eq!(machine.qmp().run("query-status")["running"], json!(true));
    // Its end is logged when it has been reaped, which its client does not wait for.
    wait_until("its end is logged", || machine.log().contains("qmp-proc"));
}

#[test]
fn spares_that_are_killed_come_back() {
    need_kvm!();
    let mut machine = machine();
    machine.qmp().run("query-status");
    for _ in 0..3 {
        // Between a client's end and the next spare there may be none.
        let mut spare = None;
        wait_until("there is a spare", || {
            let helpers = machine.helpers();
            spare = helpers.iter().find(|(name, _)| name == "qmp-proc").map(|(_, pid)| *pid);
            spare.is_some()
        });
        let spare = spare.expect("waited for it");
        shoot(spare);
        wait_until("the spare is reaped", || !procfs::is_alive(spare));
        assert_eq!(machine.qmp().run("query-status")["status"], json!("running"));
    }
}

#[test]
fn nothing_outlives_the_supervisor_or_the_launcher() {
    need_kvm!();
    for supervisor in [true, false] {
        let mut machine = machine();
        machine.qmp();
        machine.wait_for_serial("spin");
        let launcher = machine.launcher();
        let pids = machine.processes();
        // The spare may be on its way.
        assert!(pids.len() >= 3, "{pids:?}");
        shoot(if supervisor { machine.pid() } else { launcher });
        let status = machine.wait();
        assert!(supervisor || status.code() == Some(1), "{status}");
        all_gone(&pids);
    }
}

#[test]
fn a_signal_ends_the_machine_in_order() {
    need_kvm!();
    let mut machine = machine();
    let mut qmp = machine.qmp();
    machine.wait_for_serial("spin");
    let pids = machine.processes();
    kill(Pid::from_raw(machine.pid()), Signal::SIGTERM).unwrap();
    assert_eq!(
        qmp.wait_event("SHUTDOWN"),
        json!({"guest": false, "reason": "host-signal"})
    );
    assert!(qmp.is_closed());
    assert_eq!(machine.wait().code(), Some(0));
    all_gone(&pids);
    assert!(!machine.path("qmp").exists());
}
