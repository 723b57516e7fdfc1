//! Transactions: all actions, or none, whichever of them fails.

use bulkhead_tests::images::{check, info, qcow2};
use bulkhead_tests::machine::Machine;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};

/// A machine with the drives a, b and c on images of their names.
fn machine() -> (Machine, Qmp) {
    let directory = tempfile::tempdir().unwrap();
    let mut arguments = format!("-m 64 -S -kernel {} -append test=spin", guest::image().display());
    for drive in ["a", "b", "c"] {
        qcow2(&directory.path().join(drive), "16M", None);
        arguments += &format!(" -drive file={{dir}}/{drive},if=virtio,format=qcow2,id={drive}");
    }
    let mut machine = Machine::start_in(directory, &arguments);
    let qmp = machine.qmp();
    (machine, qmp)
}

fn action(kind: &str, data: Value) -> Value {
    json!({"type": kind, "data": data})
}

fn sync(machine: &Machine, drive: &str, file: &str) -> Value {
    let file = machine.path(file).display().to_string();
    action(
        "blockdev-snapshot-sync",
        json!({"device": drive, "snapshot-file": file}),
    )
}

fn internal(drive: &str, name: &str) -> Value {
    action(
        "blockdev-snapshot-internal-sync",
        json!({"device": drive, "name": name}),
    )
}

fn transaction(qmp: &mut Qmp, actions: &[Value]) -> Result<(), String> {
    let result = qmp.try_execute("transaction", json!({"actions": actions}));
    result
        .map(|value| assert_eq!(value, json!({})))
        .map_err(|error| error["desc"].as_str().unwrap().to_owned())
}

#[test]
fn all_actions_happen_together() {
    need_kvm!();
    let (mut machine, mut qmp) = machine();
    transaction(&mut qmp, &[]).unwrap();
    qcow2(&machine.path("over"), "16M", None);
    let overlay = json!({"driver": "qcow2", "node-name": "o", "backing": null,
        "file": {"driver": "file", "filename": machine.path("over")}});
    qmp.execute("blockdev-add", overlay);
    let actions = [
        sync(&machine, "a", "a1"),
        internal("b", "s"),
        action("blockdev-snapshot", json!({"node": "c", "overlay": "o"})),
        sync(&machine, "a", "a2"),
    ];
    transaction(&mut qmp, &actions).unwrap();
    let blocks = qmp.run("query-block");
    let depth = |place: usize| blocks[place]["inserted"]["backing_file_depth"].clone();
    assert_eq!([depth(0), depth(1), depth(2)], [json!(2), json!(0), json!(1)]);
    assert_eq!(blocks[1]["inserted"]["image"]["snapshots"][0]["name"], "s");
    qmp.run("quit");
    machine.wait();
    for image in ["a", "a1", "a2", "b", "c", "over"] {
        check(&machine.path(image));
    }
}

#[test]
fn whichever_action_fails_all_is_as_before() {
    need_kvm!();
    let (mut machine, mut qmp) = machine();
    qcow2(&machine.path("over"), "16M", None);
    let overlay = json!({"driver": "qcow2", "node-name": "o", "backing": null,
        "file": {"driver": "file", "filename": machine.path("over")}});
    qmp.execute("blockdev-add", overlay);
    let before = qmp.graph();
    let good = [
        sync(&machine, "a", "a1"),
        internal("b", "s"),
        action("blockdev-snapshot", json!({"node": "c", "overlay": "o"})),
        sync(&machine, "a", "a2"),
        internal("b", "t"),
    ];
    let faults = [
        (
            action("abort", json!({})),
            "Transaction aborted using Abort action".to_owned(),
        ),
        (
            sync(&machine, "nope", "x"),
            "Cannot find device='nope' nor node-name=''".to_owned(),
        ),
        (internal("b", ""), "Name is empty".to_owned()),
        (
            action("blockdev-snapshot", json!({"node": "a", "overlay": "b"})),
            "The overlay is already in use".to_owned(),
        ),
        (
            sync(&machine, "b", "none/b"),
            format!(
                "Could not create '{}': No such file or directory",
                machine.path("none/b").display()
            ),
        ),
    ];
    for place in 0..=good.len() {
        for (fault, expected) in &faults {
            let mut actions = good[..place].to_vec();
            actions.push(fault.clone());
            actions.extend_from_slice(&good[place..]);
            assert_eq!(transaction(&mut qmp, &actions), Err(expected.clone()), "at {place}");
            assert_eq!(qmp.graph(), before, "at {place}: {expected}");
        }
    }
    // Files that were made stay, and so can be made again.
    assert!(machine.path("a1").exists());
    transaction(&mut qmp, &good).unwrap();
    qmp.run("quit");
    machine.wait();
    for image in ["a", "a1", "a2", "b", "c", "over"] {
        check(&machine.path(image));
    }
    let snapshots = info(&machine.path("b"))["snapshots"].clone();
    assert_eq!(snapshots.as_array().unwrap().len(), 2);
}

#[test]
fn the_second_of_two_snapshots_of_one_name_takes_the_first_with_it() {
    need_kvm!();
    let (_machine, mut qmp) = machine();
    let before = qmp.graph();
    assert_eq!(
        transaction(&mut qmp, &[internal("a", "s"), internal("a", "s")]),
        Err("Snapshot with name 's' already exists on device 'a'".to_owned())
    );
    assert_eq!(qmp.graph(), before);
}

/// The guest goes on while transactions come and fail; it must not lose a request to one.
#[test]
fn a_guest_that_writes_keeps_its_data_through_transactions() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    for (drive, size) in [("a", "80M"), ("b", "16M")] {
        qcow2(&directory.path().join(drive), size, None);
    }
    let arguments = format!(
        "-m 256 -smp 2 -kernel {} -drive file={{dir}}/a,if=virtio,format=qcow2,id=a,num-queues=4 \
         -drive file={{dir}}/b,if=virtio,format=qcow2,id=b",
        guest::image().display()
    );
    let append = "test=blk test=blk-verify mib=64 seed=42 queues=4";
    let mut machine = Machine::start_with(directory, &arguments, &["-append", append]);
    machine.wait_for_serial("blk slot=");
    let mut qmp = machine.qmp();
    for round in 0..4 {
        let files = [format!("a{round}"), format!("b{round}")];
        let mut actions = vec![sync(&machine, "a", &files[0]), sync(&machine, "b", &files[1])];
        if round % 2 == 1 {
            actions.push(action("abort", json!({})));
        }
        let done = transaction(&mut qmp, &actions);
        assert_eq!(done.is_err(), round % 2 == 1, "{done:?}");
    }
    drop(qmp);
    machine.wait();
    let (serial, log) = (machine.serial(), machine.log());
    assert_eq!(guest::value(&serial, "done", "failures"), Some("0"), "{serial}\n{log}");
    for image in ["a", "b", "a0", "b0", "a2", "b2"] {
        check(&machine.path(image));
    }
}
