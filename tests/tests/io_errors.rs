//! Requests of a guest that fail: what it is told, and clients.

use bulkhead_tests::images::{Damage, damaged, repair};
use bulkhead_tests::machine::Machine;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};

/// A guest that uses a disk of which a part cannot be read.
fn machine(policy: &str) -> (Machine, Damage) {
    let directory = tempfile::tempdir().unwrap();
    let damage = damaged(&directory.path().join("disk"), &directory.path().join("raw"), 16 << 20);
    let arguments = format!(
        "-m 256 -S -kernel {} -drive if=none,file={{dir}}/disk,format=qcow2,id=d,node-name=n,{policy} \
         -device virtio-blk-pci,drive=d,id=vd",
        guest::image().display()
    );
    (
        Machine::start_with(directory, &arguments, &["-append", "test=blk"]),
        damage,
    )
}

fn io_status(block: &Value) -> &str {
    block[0]["io-status"].as_str().unwrap()
}

#[test]
fn a_machine_stops_until_what_failed_can_be_done() {
    need_kvm!();
    let (mut machine, damage) = machine("rerror=stop,werror=stop");
    let mut qmp = machine.qmp();
    qmp.run("cont");
    let error = qmp.wait_event("BLOCK_IO_ERROR");
    assert_eq!(error["action"], "stop");
    assert_eq!(error["device"], "d");
    assert_eq!(error["node-name"], "n");
    assert_eq!(error["qom-path"], "/machine/peripheral/vd/virtio-backend");
    assert_eq!(error["nospace"], false);
    assert_eq!(error["reason"], "Input/output error");
    qmp.wait_event("STOP");
    assert_eq!(qmp.run("query-status"), json!({"running": false, "status": "io-error"}));
    assert_eq!(io_status(&qmp.run("query-block")), "failed");
    // Nothing has changed: it fails again.
    qmp.run("cont");
    qmp.wait_event("STOP");
    assert_eq!(qmp.run("query-status")["status"], "io-error");
    repair(&machine.path("disk"), &damage);
    qmp.run("cont");
    machine.wait();
    let (serial, log) = (machine.serial(), machine.log());
    assert_eq!(guest::value(&serial, "done", "failures"), Some("0"), "{serial}\n{log}");
}

#[test]
fn a_guest_that_is_told_of_its_errors_goes_on() {
    need_kvm!();
    let (mut machine, _damage) = machine("rerror=report,werror=report");
    let mut qmp = machine.qmp();
    qmp.run("cont");
    let error = qmp.wait_event("BLOCK_IO_ERROR");
    assert_eq!(error["action"], "report");
    machine.wait();
    assert_ne!(guest::value(&machine.serial(), "done", "failures"), Some("0"));
}

#[test]
fn clients_are_told_once_when_a_write_passes_the_threshold() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk"), vec![0; 16 << 20]).unwrap();
    let arguments = format!(
        "-m 256 -S -kernel {} -drive file={{dir}}/disk,if=virtio,format=raw,id=d,node-name=n",
        guest::image().display()
    );
    let mut machine = Machine::start_with(directory, &arguments, &["-append", "test=blk test=spin"]);
    let mut qmp = machine.qmp();
    let threshold = json!({"node-name": "n", "write-threshold": 1});
    qmp.execute("block-set-write-threshold", threshold);
    let shown = |block: &Value| block[0]["inserted"]["write_threshold"].clone();
    assert_eq!(shown(&qmp.run("query-block")), 1);
    let nowhere = json!({"node-name": "d", "write-threshold": 1});
    let error = qmp.try_execute("block-set-write-threshold", nowhere).unwrap_err();
    assert_eq!(error["desc"], "Device 'd' not found");
    qmp.run("cont");
    let event = qmp.wait_event("BLOCK_WRITE_THRESHOLD");
    assert_eq!(
        (&event["node-name"], &event["write-threshold"]),
        (&json!("n"), &json!(1))
    );
    assert!(event["amount-exceeded"].as_u64().unwrap() > 0, "{event}");
    assert_eq!(shown(&qmp.run("query-block")), 0);
    machine.wait_for_serial("blk round=8");
    let again = qmp
        .events()
        .into_iter()
        .filter(|event| event["event"] == "BLOCK_WRITE_THRESHOLD");
    assert_eq!(again.count(), 0);
}
