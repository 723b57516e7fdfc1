//! Dirty bitmaps of a machine without a guest: recorded, changed, refused, kept in images, and undone with a transaction.

use bulkhead_tests::images::{check, info, is_locked, name, qcow2, qemu_img, qemu_io};
use bulkhead_tests::machine::{Machine, wait_until};
use bulkhead_tests::qmp::Qmp;
use serde_json::{Value, json};
use std::path::Path;

const MIB: u64 = 1 << 20;

/// A machine with nothing in it, in a directory.
fn machine_in(directory: tempfile::TempDir) -> (Machine, Qmp) {
    let arguments = format!("-machine none -allow-path {}", directory.path().display());
    let mut machine = Machine::start_without_serial(directory, &arguments, &[]);
    let qmp = machine.qmp();
    (machine, qmp)
}

fn add_image(machine: &Machine, qmp: &mut Qmp, node: &str, read_only: bool) {
    qmp.execute(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": node, "read-only": read_only,
            "file": {"driver": "file", "filename": machine.path(node)}}),
    );
}

/// With images of 64 MiB as nodes of their names.
fn machine(images: &[&str]) -> (Machine, Qmp) {
    let directory = tempfile::tempdir().unwrap();
    for image in images {
        qcow2(&directory.path().join(image), "64M", None);
    }
    let (machine, mut qmp) = machine_in(directory);
    for image in images {
        add_image(&machine, &mut qmp, image, false);
    }
    (machine, qmp)
}

fn io(qmp: &mut Qmp, node: &str, command: &str) {
    let line = format!("qemu-io {node} \"{command}\"");
    let said = qmp.execute("human-monitor-command", json!({"command-line": line}));
    assert!(!said.as_str().unwrap().contains("rror"), "{said}");
}

fn bitmap(qmp: &mut Qmp, verb: &str, arguments: Value) {
    qmp.execute(&format!("block-dirty-bitmap-{verb}"), arguments);
}

/// What query-named-block-nodes shows of a node's bitmaps.
fn bitmaps(qmp: &mut Qmp, node: &str) -> Value {
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}));
    let nodes = nodes.as_array().unwrap();
    let node = nodes.iter().find(|found| found["node-name"] == node).unwrap();
    node["dirty-bitmaps"].clone()
}

fn of_name(qmp: &mut Qmp, node: &str, name: &str) -> Value {
    let all = bitmaps(qmp, node);
    let all = all.as_array().cloned().unwrap_or_default();
    all.into_iter()
        .find(|bitmap| bitmap["name"] == name)
        .unwrap_or_default()
}

fn count(qmp: &mut Qmp, node: &str, name: &str) -> u64 {
    of_name(qmp, node, name)["count"].as_u64().unwrap()
}

/// The flags of an image's bitmaps as qemu-img sees them.
fn flags(image: &Path) -> Vec<(String, Vec<String>)> {
    let info = info(image);
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().cloned();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let flags = |bitmap: &Value| bitmap["flags"].as_array().unwrap().iter().map(text).collect();
    let bitmaps = bitmaps.unwrap_or_default();
    bitmaps
        .iter()
        .map(|bitmap| (text(&bitmap["name"]), flags(bitmap)))
        .collect()
}

#[test]
fn what_is_written_is_dirty_until_somebody_clears_it() {
    let (_machine, mut qmp) = machine(&["a"]);
    bitmap(&mut qmp, "add", json!({"node": "a", "name": "x"}));
    assert_eq!(
        bitmaps(&mut qmp, "a"),
        json!([{"name": "x", "count": 0, "granularity": 65536, "recording": true, "busy": false, "persistent": false}])
    );
    io(&mut qmp, "a", "write -P 1 0 4k");
    io(&mut qmp, "a", "write -z 1M 64k");
    io(&mut qmp, "a", "discard 8M 64k");
    io(&mut qmp, "a", "read 30M 1M");
    assert_eq!(count(&mut qmp, "a", "x"), 3 * 65536);
    bitmap(
        &mut qmp,
        "add",
        json!({"node": "a", "name": "fine", "granularity": 512}),
    );
    io(&mut qmp, "a", "write -P 1 1000 100");
    assert_eq!(count(&mut qmp, "a", "fine"), 1024);
    bitmap(&mut qmp, "disable", json!({"node": "a", "name": "x"}));
    io(&mut qmp, "a", "write -P 1 40M 1M");
    assert_eq!(count(&mut qmp, "a", "x"), 3 * 65536);
    assert_eq!(of_name(&mut qmp, "a", "x")["recording"], false);
    bitmap(&mut qmp, "enable", json!({"node": "a", "name": "x"}));
    bitmap(
        &mut qmp,
        "merge",
        json!({"node": "a", "target": "x", "bitmaps": ["fine", {"node": "a", "name": "fine"}]}),
    );
    assert_eq!(count(&mut qmp, "a", "x"), 3 * 65536 + MIB);
    bitmap(&mut qmp, "clear", json!({"node": "a", "name": "x"}));
    assert_eq!(count(&mut qmp, "a", "x"), 0);
    // The file below has bitmaps of its own; it grows with what is written to it.
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}));
    let file = nodes
        .as_array()
        .unwrap()
        .iter()
        .find(|node| node["drv"] == "file")
        .unwrap();
    let file = file["node-name"].as_str().unwrap().to_owned();
    bitmap(&mut qmp, "add", json!({"node": file, "name": "below"}));
    io(&mut qmp, "a", "write -P 1 50M 2M");
    assert!(count(&mut qmp, &file, "below") >= 2 * MIB);
    qmp.execute("block_resize", json!({"node-name": "a", "size": 128 * MIB}));
    io(&mut qmp, "a", "write -P 1 127M 1M");
    assert_eq!(count(&mut qmp, "a", "x"), 3 * MIB);
    for name in ["x", "fine"] {
        bitmap(&mut qmp, "remove", json!({"node": "a", "name": name}));
    }
    assert_eq!(bitmaps(&mut qmp, "a"), Value::Null);
}

#[test]
fn refusals_are_qemus() {
    let (machine, mut qmp) = machine(&["a"]);
    qcow2(&machine.path("b"), "1M", None);
    qemu_img(&["bitmap", "--add", name(&machine.path("b")), "p"]);
    add_image(&machine, &mut qmp, "b", true);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10",
        name(&machine.path("v2")),
        "1M",
    ]);
    add_image(&machine, &mut qmp, "v2", false);
    qmp.execute(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "null", "size": 1u64 << 40}),
    );
    bitmap(&mut qmp, "add", json!({"node": "a", "name": "x"}));
    bitmap(&mut qmp, "add", json!({"node": "b", "name": "small"}));
    let long = "x".repeat(1024);
    let add = |node: &str, name: &str| ("block-dirty-bitmap-add", json!({"node": node, "name": name}));
    let persistent = |node: &str, name: &str| {
        let arguments = json!({"node": node, "name": name, "persistent": true});
        ("block-dirty-bitmap-add", arguments)
    };
    let grained = |granularity: u64| {
        let arguments = json!({"node": "a", "name": "g", "granularity": granularity});
        ("block-dirty-bitmap-add", arguments)
    };
    let merge = |target: &str, from: Value| {
        let arguments = json!({"node": "a", "target": target, "bitmaps": [from]});
        ("block-dirty-bitmap-merge", arguments)
    };
    let verb = |verb: &'static str, node: &str, name: &str| (verb, json!({"node": node, "name": name}));
    let cases: Vec<((&str, Value), String)> = vec![
        (add("a", ""), "Bitmap name cannot be empty".into()),
        (add("zz", "x"), "Cannot find device='zz' nor node-name='zz'".into()),
        (add("a", "x"), "Bitmap already exists: x".into()),
        (persistent("a", "x"), "Bitmap already exists: x".into()),
        (add("a", &long), format!("Bitmap name too long: {long}")),
        (
            persistent("a", &long),
            format!("Can't make bitmap '{long}' persistent in 'a': Name length exceeds maximum (1023 characters)"),
        ),
        (grained(1000), "Granularity must be power of 2 and at least 512".into()),
        (grained(256), "Granularity must be power of 2 and at least 512".into()),
        (grained(1 << 32), "Parameter 'granularity' expects uint32_t".into()),
        (
            persistent("null", "x"),
            "Can't store persistent bitmaps to null: Operation not supported".into(),
        ),
        (
            persistent("v2", "x"),
            "Can't make bitmap 'x' persistent in 'v2': Cannot store dirty bitmaps in qcow2 v2 files".into(),
        ),
        (
            ("block-dirty-bitmap-add", json!({"node": "null", "name": "x", "granularity": 512})),
            "A bitmap of 1099511627776 bytes with a granularity of 512 needs more than 64 MiB of memory: choose a granularity \
             of 2048 or more"
                .into(),
        ),
        (verb("block-dirty-bitmap-remove", "a", "no"), "Dirty bitmap 'no' not found".into()),
        (verb("block-dirty-bitmap-clear", "no", "x"), "Node 'no' not found".into()),
        (verb("block-dirty-bitmap-enable", "a", "no"), "Dirty bitmap 'no' not found".into()),
        (verb("block-dirty-bitmap-disable", "no", "x"), "Node 'no' not found".into()),
        (
            verb("block-dirty-bitmap-clear", "b", "p"),
            "Bitmap 'p' is readonly and cannot be modified".into(),
        ),
        (
            verb("block-dirty-bitmap-remove", "b", "p"),
            "Bitmap 'p' is readonly and cannot be modified".into(),
        ),
        (merge("no", json!("x")), "Dirty bitmap 'no' not found".into()),
        (merge("x", json!("no")), "Dirty bitmap 'no' not found".into()),
        (merge("x", json!({"node": "zz", "name": "x"})), "Node 'zz' not found".into()),
        (
            merge("x", json!({"node": "b", "name": "small"})),
            "Bitmaps are of different sizes (destination size is 67108864, source size is 1048576) and can't be merged".into(),
        ),
    ];
    for ((command, arguments), expected) in cases {
        assert_eq!(
            qmp.refusal(command, arguments.clone()),
            expected,
            "{command} {arguments}"
        );
    }
    assert_eq!(bitmaps(&mut qmp, "a").as_array().unwrap().len(), 1);
}

#[test]
fn persistent_bitmaps_go_through_restarts_and_qemu_reads_them() {
    let (mut machine, mut qmp) = machine(&["a"]);
    let directory = machine.directory.path().to_owned();
    bitmap(
        &mut qmp,
        "add",
        json!({"node": "a", "name": "kept", "persistent": true}),
    );
    bitmap(
        &mut qmp,
        "add",
        json!({"node": "a", "name": "rests", "persistent": true, "disabled": true, "granularity": 4096}),
    );
    bitmap(
        &mut qmp,
        "add",
        json!({"node": "a", "name": "gone", "persistent": true}),
    );
    bitmap(&mut qmp, "add", json!({"node": "a", "name": "passing"}));
    bitmap(&mut qmp, "remove", json!({"node": "a", "name": "gone"}));
    io(&mut qmp, "a", "write -P 1 1M 128k");
    qmp.run("quit");
    assert!(machine.wait().success());
    let image = directory.join("a");
    check(&image);
    let expected = vec![
        ("rests".to_owned(), vec![]),
        ("kept".to_owned(), vec!["auto".to_owned()]),
    ];
    assert_eq!(flags(&image), expected);
    // QEMU goes on with it.
    qemu_io(&image, "qcow2", "write -P 2 4M 64k");
    let (mut machine, mut qmp) = machine_in(std::mem::replace(&mut machine.directory, tempfile::tempdir().unwrap()));
    add_image(&machine, &mut qmp, "a", false);
    let of = |name: &str, count: u64, granularity: u64, recording: bool| {
        json!({"name": name, "count": count, "granularity": granularity, "recording": recording, "busy": false,
            "persistent": true})
    };
    assert_eq!(
        bitmaps(&mut qmp, "a"),
        json!([of("kept", 3 * 65536, 65536, true), of("rests", 0, 4096, false)])
    );
    assert_eq!(flags(&image), expected, "nothing is marked before the first write");
    io(&mut qmp, "a", "write -P 3 8M 64k");
    assert_eq!(flags(&image)[1].1, ["in-use", "auto"]);
    bitmap(
        &mut qmp,
        "merge",
        json!({"node": "a", "target": "rests", "bitmaps": ["kept"]}),
    );
    bitmap(&mut qmp, "enable", json!({"node": "a", "name": "rests"}));
    // Closing the node is enough.
    qmp.execute("blockdev-del", json!({"node-name": "a"}));
    check(&image);
    assert_eq!(flags(&image)[0], ("rests".to_owned(), vec!["auto".to_owned()]));
    add_image(&machine, &mut qmp, "a", false);
    assert_eq!(
        bitmaps(&mut qmp, "a"),
        json!([of("kept", 4 * 65536, 65536, true), of("rests", 4 * 65536, 4096, true)])
    );
    bitmap(&mut qmp, "remove", json!({"node": "a", "name": "kept"}));
    assert_eq!(flags(&image).len(), 1, "it is gone at once");
    qmp.run("quit");
    assert!(machine.wait().success());
    check(&image);
    qemu_img(&["bitmap", "--remove", name(&image), "rests"]);
    check(&image);
}

#[test]
fn bitmaps_that_nobody_came_to_write_are_inconsistent() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("a");
    qcow2(&image, "64M", None);
    for name_of in ["records", "other"] {
        qemu_img(&["bitmap", "--add", name(&image), name_of]);
    }
    let (mut machine, mut qmp) = machine_in(directory);
    add_image(&machine, &mut qmp, "a", false);
    io(&mut qmp, "a", "write -P 1 0 64k");
    machine.kill();
    drop(qmp);
    wait_until("the image is nobody's", || !is_locked(&image));
    let (mut machine, mut qmp) = machine_in(std::mem::replace(&mut machine.directory, tempfile::tempdir().unwrap()));
    add_image(&machine, &mut qmp, "a", false);
    let seen = of_name(&mut qmp, "a", "records");
    assert_eq!(
        (&seen["inconsistent"], &seen["recording"]),
        (&json!(true), &json!(false))
    );
    for verb in ["clear", "enable", "disable"] {
        assert_eq!(
            qmp.refusal(
                &format!("block-dirty-bitmap-{verb}"),
                json!({"node": "a", "name": "records"})
            ),
            "Bitmap 'records' is inconsistent and cannot be used"
        );
    }
    bitmap(&mut qmp, "remove", json!({"node": "a", "name": "records"}));
    qmp.run("quit");
    assert!(machine.wait().success());
    let image = machine.path("a");
    check(&image);
    let left = flags(&image);
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(
        left[0].1.contains(&"in-use".to_owned()),
        "what was not removed stays as it is"
    );
}

#[test]
fn a_transaction_is_all_or_nothing() {
    let (mut machine, mut qmp) = machine(&["a", "b"]);
    bitmap(&mut qmp, "add", json!({"node": "a", "name": "one", "persistent": true}));
    bitmap(&mut qmp, "add", json!({"node": "a", "name": "two"}));
    bitmap(&mut qmp, "add", json!({"node": "b", "name": "three"}));
    io(&mut qmp, "a", "write -P 1 0 1M");
    io(&mut qmp, "b", "write -P 1 4M 128k");
    let before = (bitmaps(&mut qmp, "a"), bitmaps(&mut qmp, "b"));
    let action = |verb: &str, data: Value| json!({"type": format!("block-dirty-bitmap-{verb}"), "data": data});
    let clear = |node: &str, name: &str| action("clear", json!({"node": node, "name": name}));
    let all = vec![
        clear("a", "one"),
        clear("b", "three"),
        action("disable", json!({"node": "a", "name": "two"})),
        action("add", json!({"node": "a", "name": "new", "granularity": 4096})),
        action(
            "merge",
            json!({"node": "a", "target": "new", "bitmaps": ["two", {"node": "b", "name": "three"}]}),
        ),
        action(
            "merge",
            json!({"node": "a", "target": "one", "bitmaps": [{"node": "b", "name": "three"}]}),
        ),
        action("remove", json!({"node": "b", "name": "three"})),
    ];
    let mut aborted = all.clone();
    aborted.push(json!({"type": "abort", "data": {}}));
    assert_eq!(
        qmp.refusal("transaction", json!({"actions": aborted})),
        "Transaction aborted using Abort action"
    );
    assert_eq!((bitmaps(&mut qmp, "a"), bitmaps(&mut qmp, "b")), before);
    let mut busy = all.clone();
    busy.push(clear("b", "three"));
    assert_eq!(
        qmp.refusal("transaction", json!({"actions": busy})),
        "Bitmap 'three' is currently in use by another operation and cannot be used"
    );
    assert_eq!((bitmaps(&mut qmp, "a"), bitmaps(&mut qmp, "b")), before);
    qmp.execute("transaction", json!({"actions": all}));
    assert_eq!(count(&mut qmp, "a", "one"), 0);
    assert_eq!(count(&mut qmp, "a", "new"), MIB);
    assert_eq!(of_name(&mut qmp, "a", "two")["recording"], false);
    assert_eq!(bitmaps(&mut qmp, "b"), Value::Null);
    // A snapshot and a new bitmap at one moment: it stays with its node.
    let snapshot = json!({"type": "blockdev-snapshot-sync", "data":
        {"node-name": "a", "snapshot-file": machine.path("over"), "snapshot-node-name": "over"}});
    let clear = clear("a", "new");
    qmp.execute("transaction", json!({"actions": [snapshot, clear]}));
    assert_eq!(count(&mut qmp, "a", "new"), 0);
    assert_eq!(bitmaps(&mut qmp, "over"), Value::Null);
    qmp.run("quit");
    assert!(machine.wait().success());
    check(&machine.path("a"));
    assert_eq!(flags(&machine.path("a")), [("one".to_owned(), vec!["auto".to_owned()])]);
}

/// Until a job is gone.
fn wait_for_end(qmp: &mut Qmp, job: &str) {
    loop {
        let event = qmp.wait_event("JOB_STATUS_CHANGE");
        if event["id"] == job && event["status"] == "null" {
            return;
        }
    }
}

#[test]
fn incremental_backups_restore_bit_for_bit() {
    let (mut machine, mut qmp) = machine(&["a"]);
    io(&mut qmp, "a", "write -P 1 0 8M");
    let backup = |machine: &Machine, qmp: &mut Qmp, number: u32, actions: Vec<Value>| {
        let target = format!("backup{number}");
        let base = (number > 0).then(|| machine.path(&format!("backup{}", number - 1)));
        qcow2(&machine.path(&target), "64M", base.as_deref());
        qmp.execute(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": target, "backing": null,
                "file": {"driver": "file", "filename": machine.path(&target)}}),
        );
        let mut data = json!({"job-id": target, "device": "a", "target": target, "sync": "full"});
        if number > 0 {
            data["sync"] = json!("incremental");
            data["bitmap"] = json!("since");
        }
        let mut all = actions;
        all.push(json!({"type": "blockdev-backup", "data": data}));
        qmp.execute("transaction", json!({"actions": all}));
        wait_for_end(qmp, &target);
        qmp.execute("blockdev-del", json!({"node-name": target}));
    };
    let add = json!({"type": "block-dirty-bitmap-add", "data": {"node": "a", "name": "since", "persistent": true}});
    backup(&machine, &mut qmp, 0, vec![add]);
    for number in 1..4 {
        io(&mut qmp, "a", &format!("write -P {number} {number}0M 300k"));
        io(&mut qmp, "a", &format!("write -z {number}M 64k"));
        let dirty = count(&mut qmp, "a", "since");
        assert_eq!(dirty, 6 * 65536);
        backup(&machine, &mut qmp, number, vec![]);
        assert_eq!(count(&mut qmp, "a", "since"), 0);
        io(&mut qmp, "a", "flush");
        let moment = machine.path(&format!("moment{number}"));
        std::fs::copy(machine.path("a"), &moment).unwrap();
        qemu_img(&[
            "compare",
            "-U",
            name(&moment),
            name(&machine.path(&format!("backup{number}"))),
        ]);
    }
    qmp.run("quit");
    assert!(machine.wait().success());
    check(&machine.path("a"));
    assert_eq!(
        flags(&machine.path("a")),
        [("since".to_owned(), vec!["auto".to_owned()])]
    );
}
