//! Errors made by blkdebug below an image: what clients, guests and images see of them.

use bulkhead_tests::images::{check, info, name, qcow2, qemu_img};
use bulkhead_tests::machine::Machine;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Block-proc and monitors alone, with images of these names in its directory.
fn storage(images: &[&str]) -> (Machine, Qmp) {
    let directory = tempfile::tempdir().unwrap();
    for image in images {
        qcow2(&directory.path().join(image), "16M", None);
    }
    let mut machine = Machine::start_without_serial(directory, "-machine none", &[]);
    let qmp = machine.qmp();
    (machine, qmp)
}

/// A qcow2 image over blkdebug over a file, and its rules.
fn image(path: &Path, node: &str, rules: &Value) -> Value {
    let mut blkdebug = json!({"driver": "blkdebug", "image": {"driver": "file", "filename": path}});
    for (rule, value) in rules.as_object().into_iter().flatten() {
        blkdebug[rule] = value.clone();
    }
    json!({"driver": "qcow2", "node-name": node, "discard": "unmap", "file": blkdebug})
}

fn qemu_io(qmp: &mut Qmp, node: &str, command: &str) {
    let line = format!("qemu-io {node} \"{command}\"");
    assert_eq!(qmp.execute("human-monitor-command", json!({"command-line": line})), "");
}

fn end(mut machine: Machine, mut qmp: Qmp) {
    qmp.run("quit");
    assert!(machine.wait().success(), "{}", machine.log());
}

#[test]
fn rules_fail_what_they_name_and_nothing_else() {
    let (machine, mut qmp) = storage(&["disk"]);
    let rules = json!({"inject-error": [
        {"event": "write_aio", "errno": 28, "once": true},
        {"event": "l2_update", "state": 2, "iotype": "write"}],
        "set-state": [{"event": "l2_update", "state": 1, "new_state": 2}, {"event": "cluster_free", "new_state": 1}]});
    let node = image(&machine.path("disk"), "d", &rules);
    qmp.execute("blockdev-add", node);
    let commands = [
        "write -P 1 0 64k",
        "write -P 1 0 64k",
        "flush",
        "write -P 2 64k 64k",
        "flush",
        "read -P 1 0 64k",
    ];
    for command in commands {
        qemu_io(&mut qmp, "d", command);
    }
    let output = machine.output();
    let said: Vec<&str> = output.lines().filter(|line| !line.contains(" ops; ")).collect();
    let expected = [
        "write failed: No space left on device",
        "wrote 65536/65536 bytes at offset 0",
        "wrote 65536/65536 bytes at offset 65536",
        "flush failed: I/O error",
        "read 65536/65536 bytes at offset 0",
    ];
    assert_eq!(said, expected);
    end(machine, qmp);
}

#[test]
fn what_blkdebug_does_not_do_is_refused_by_name() {
    let (machine, mut qmp) = storage(&["disk"]);
    for (rules, problem) in [
        (json!({"config": "rules"}), "config"),
        (json!({"align": 3}), "Cannot meet constraints with align"),
        (json!({"max-transfer": 4096}), "max-transfer"),
    ] {
        let node = image(&machine.path("disk"), "d", &rules);
        let refusal = qmp.try_execute("blockdev-add", node).unwrap_err();
        assert!(refusal["desc"].as_str().unwrap().contains(problem), "{refusal}");
    }
    end(machine, qmp);
}

#[test]
fn requests_of_any_size_pass_an_alignment() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk"), vec![7; 10_000]).unwrap();
    let mut machine = Machine::start_without_serial(directory, "-machine none", &[]);
    let mut qmp = machine.qmp();
    let file = json!({"driver": "file", "filename": machine.path("disk")});
    let rules = json!([{"event": "pwritev_rmw_tail", "iotype": "read", "once": true}]);
    let node = json!({"driver": "blkdebug", "node-name": "d", "align": 4096, "image": file, "inject-error": rules});
    qmp.execute("blockdev-add", node);
    // The first fails when it reads what is around it.
    qemu_io(&mut qmp, "d", "write -P 1 9000 1000");
    qemu_io(&mut qmp, "d", "write -P 2 100 5000");
    qemu_io(&mut qmp, "d", "write -z 9990 10");
    qemu_io(&mut qmp, "d", "read -P 2 101 4998");
    assert!(
        machine.output().starts_with("write failed: I/O error\n"),
        "{}",
        machine.output()
    );
    let path = machine.path("disk");
    qmp.execute("blockdev-del", json!({"node-name": "d"}));
    let data = std::fs::read(path).unwrap();
    let mut expected = vec![7; 10_000];
    expected[100..5100].fill(2);
    expected[9990..].fill(0);
    assert!(data == expected);
    end(machine, qmp);
}

#[test]
fn a_held_request_goes_on_when_it_is_told_to() {
    let (machine, mut qmp) = storage(&["disk"]);
    qmp.execute("blockdev-add", image(&machine.path("disk"), "d", &json!({})));
    qemu_io(&mut qmp, "d", "break write_aio A");
    qemu_io(&mut qmp, "d", "aio_write -P 5 0 64k");
    qemu_io(&mut qmp, "d", "wait_break A");
    assert_eq!(machine.output(), "", "it is under way");
    // Others are not held up, neither on the node nor on the monitor.
    qemu_io(&mut qmp, "d", "write -q -P 6 1M 64k");
    qmp.run("query-named-block-nodes");
    qemu_io(&mut qmp, "d", "resume A");
    qemu_io(&mut qmp, "d", "aio_flush");
    qemu_io(&mut qmp, "d", "read -q -P 5 0 64k");
    for command in ["resume A", "break nothing A", "remove_break A", "write_break"] {
        let line = format!("qemu-io d \"{command}\"");
        qmp.execute("human-monitor-command", json!({"command-line": line}));
    }
    let output = machine.output();
    let said: Vec<&str> = output.lines().filter(|line| !line.contains(" ops; ")).collect();
    let expected = [
        "wrote 65536/65536 bytes at offset 0",
        "Could not resume request: No such file or directory",
        "Could not set a breakpoint: No such file or directory",
        "Could not remove breakpoint A: No such file or directory",
    ];
    assert_eq!(said, expected);
    let path = machine.path("disk");
    qmp.execute("blockdev-del", json!({"node-name": "d"}));
    check(&path);
    end(machine, qmp);
}

/// QEMU waits for ever here. Whoever drains wins: see block-proc's `breakpoints`.
#[test]
fn a_change_of_the_graph_does_not_wait_for_a_held_request() {
    let (machine, mut qmp) = storage(&["disk"]);
    qmp.execute("blockdev-add", image(&machine.path("disk"), "d", &json!({})));
    qemu_io(&mut qmp, "d", "break write_aio A");
    qemu_io(&mut qmp, "d", "aio_write -P 5 0 64k");
    qemu_io(&mut qmp, "d", "wait_break A");
    let overlay = json!({"node-name": "d", "snapshot-file": machine.path("over"), "snapshot-node-name": "o"});
    qmp.execute("blockdev-snapshot-sync", overlay);
    qemu_io(&mut qmp, "d", "aio_flush");
    let output = machine.output();
    assert!(output.contains("\nwrote 65536/65536 bytes at offset 0\n"), "{output}");
    qemu_io(&mut qmp, "o", "read -q -P 5 0 64k");
    // And a pause, with a request held that came after it.
    qemu_io(&mut qmp, "d", "break read_aio B");
    qemu_io(&mut qmp, "o", "aio_read -P 5 0 64k");
    qemu_io(&mut qmp, "d", "wait_break B");
    qmp.run("stop");
    qemu_io(&mut qmp, "d", "aio_flush");
    end(machine, qmp);
}

/// A guest with a disk over blkdebug that has such a rule.
fn guest_with(rule: &str, policy: &str) -> Machine {
    let directory = tempfile::tempdir().unwrap();
    qcow2(&directory.path().join("disk"), "16M", None);
    let arguments = format!(
        "-m 256 -S -kernel {} -device virtio-blk-pci,drive=d,id=vd \
         -drive if=none,id=d,format=qcow2,{policy},file.driver=blkdebug,file.image.driver=file,\
         file.image.filename={{dir}}/disk,{rule}",
        guest::image().display()
    );
    Machine::start_with(directory, &arguments, &["-append", "test=blk"])
}

#[test]
fn a_machine_whose_disk_is_full_waits_until_there_is_room() {
    need_kvm!();
    for (policy, errors) in [("werror=enospc", 1), ("werror=stop,rerror=stop", 3)] {
        let mut rule = String::new();
        for at in 0..errors {
            rule += &format!(
                "file.inject-error.{at}.event=none,file.inject-error.{at}.errno=28,file.inject-error.{at}.once=on,\
                 file.inject-error.{at}.iotype=write,"
            );
        }
        let mut machine = guest_with(rule.trim_end_matches(','), policy);
        let mut qmp = machine.qmp();
        qmp.run("cont");
        let (mut failed, mut stopped) = (0, 0);
        loop {
            let event = qmp.event();
            match event["event"].as_str().unwrap() {
                "BLOCK_IO_ERROR" => {
                    failed += 1;
                    let said = ["action", "nospace", "operation", "reason"].map(|member| &event["data"][member]);
                    let expected = [
                        json!("stop"),
                        json!(true),
                        json!("write"),
                        json!("No space left on device"),
                    ];
                    assert_eq!(said, expected.each_ref());
                }
                // Requests that are under way together fail together.
                "STOP" => {
                    stopped += 1;
                    assert_eq!(qmp.run("query-status")["status"], "io-error");
                    assert_eq!(qmp.run("query-block")[0]["io-status"], "nospace");
                    qmp.run("cont");
                }
                "SHUTDOWN" => break,
                _ => {}
            }
        }
        // There are not more events of errors than a client can read.
        let possible = 1..=errors;
        assert!(
            possible.contains(&failed) && possible.contains(&stopped),
            "{failed}, {stopped}"
        );
        machine.wait();
        let (serial, log) = (machine.serial(), machine.log());
        assert_eq!(
            guest::value(&serial, "done", "failures"),
            Some("0"),
            "{policy}: {serial}\n{log}"
        );
        check(&machine.path("disk"));
    }
}

#[test]
fn an_image_that_contradicts_itself_is_marked_even_if_that_fails_at_first() {
    for marking_fails in [false, true] {
        let (machine, mut qmp) = storage(&["disk"]);
        let path = machine.path("disk");
        qemu_img(&["bench", "-q", "-w", "-c", "4", "-s", "64k", "-f", "qcow2", name(&path)]);
        let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        let number = |at| {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, at).unwrap();
            u64::from_be_bytes(bytes) & 0x00ff_ffff_ffff_fe00
        };
        // The first entry refers to the L1 table.
        let (l1, l2) = (number(40), number(number(40)));
        file.write_all_at(&(l1 | 1 << 63).to_be_bytes(), l2).unwrap();
        let rules = match marking_fails {
            true => json!({"inject-error": [{"event": "none", "iotype": "write", "sector": 0, "once": true}]}),
            false => json!({}),
        };
        qmp.execute("blockdev-add", image(&path, "d", &rules));
        let marked = |qmp: &mut Qmp| {
            let nodes = qmp.run("query-named-block-nodes");
            let node = nodes
                .as_array()
                .unwrap()
                .iter()
                .find(|node| node["node-name"] == "d")
                .unwrap();
            node["image"]["format-specific"]["data"]["corrupt"].clone()
        };
        assert_eq!(marked(&mut qmp), false);
        qemu_io(&mut qmp, "d", "write -P 1 0 64k");
        qemu_io(&mut qmp, "d", "write -P 1 1M 64k");
        assert_eq!(machine.output(), "write failed: I/O error\nwrite failed: I/O error\n");
        assert_eq!(marked(&mut qmp), true);
        assert_eq!(number(l1) & !(1 << 63), l2, "the L1 table was not overwritten");
        qmp.execute("blockdev-del", json!({"node-name": "d"}));
        let incompatible = number_of_features(&file);
        assert_eq!(incompatible & 2 != 0, !marking_fails);
        let again = qmp.try_execute("blockdev-add", image(&path, "d", &json!({})));
        assert_eq!(again.is_err(), !marking_fails, "{again:?}");
        end(machine, qmp);
    }
}

fn number_of_features(file: &std::fs::File) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 72).unwrap();
    u64::from_be_bytes(bytes)
}

/// What an image holds: its size, its snapshots, its content.
fn content(path: &Path, scratch: &Path) -> (Value, Value, Vec<u8>) {
    // The machine has it open: a copy, which also is what a power cut would leave.
    let copy = scratch.join("copy");
    std::fs::copy(path, &copy).unwrap();
    check(&copy);
    let info = info(&copy);
    let raw = scratch.join("raw");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", name(&copy), name(&raw)]);
    (
        info["virtual-size"].clone(),
        info["snapshots"].clone(),
        std::fs::read(raw).unwrap(),
    )
}

/// Four images, three of them used by devices that nobody drives: what those use is flushed before it changes.
fn four_images(failing: &str, rules: &Value) -> (Machine, Qmp) {
    let directory = tempfile::tempdir().unwrap();
    let mut whole = Vec::new();
    for node in NODES {
        let path = directory.path().join(node);
        qcow2(&path, "16M", None);
        let mut image = image(&path, node, if node == failing { rules } else { &Value::Null });
        if node == "o" {
            image["backing"] = Value::Null;
        } else {
            whole.extend([
                "-device".to_owned(),
                format!("virtio-blk-pci,drive={node},id=dev-{node}"),
            ]);
        }
        whole.extend(["-blockdev".to_owned(), image.to_string()]);
    }
    let whole: Vec<&str> = whole.iter().map(String::as_str).collect();
    let mut machine = Machine::start_without_serial(directory, "-accel qtest -m 64", &whole);
    let mut qmp = machine.qmp();
    for node in NODES {
        qemu_io(&mut qmp, node, "write -q -P 1 0 128k");
        qemu_io(&mut qmp, node, "flush");
        qemu_io(&mut qmp, node, "write -q -P 2 64k 64k");
        qemu_io(&mut qmp, node, "flush");
        qemu_io(&mut qmp, node, "read -q 0 512");
    }
    assert_eq!(machine.output(), "", "{failing}: {rules}");
    (machine, qmp)
}

const NODES: [&str; 4] = ["a", "b", "c", "o"];

/// Injects an error into the `number`th request of a kind that comes with an event after the image was filled; opening and
/// filling do not count.
fn rules(event: &str, number: u64) -> Value {
    // A transaction of several actions holds the disks, and flushes them once for that. Who only wants to stop goes on when
    // it fails, so the next flush has to fail as well.
    let kind = if event.starts_with("flush") { "flush" } else { "write" };
    let times = if kind == "flush" && number == 1 { 2 } else { 1 };
    let rule = json!({"event": event, "once": true, "state": 1 + number, "iotype": kind});
    let mut states = vec![json!({"event": "read_aio", "state": 1, "new_state": 2})];
    for state in 2..=number {
        states.push(json!({"event": event, "state": state, "new_state": state + 1}));
    }
    json!({"inject-error": vec![rule; times], "set-state": states})
}

#[test]
fn a_transaction_of_which_any_action_fails_in_its_image_leaves_all_as_it_was() {
    let scratch = tempfile::tempdir().unwrap();
    let contents = |machine: &Machine| NODES.map(|node| content(&machine.path(node), scratch.path()));
    // Snapshots write in many places; of an image that gets an overlay only the flush is left.
    let of_snapshots = [
        "cluster_alloc",
        "refblock_load",
        "refblock_update_part",
        "l2_update",
        "l1_update",
        "pwritev",
        "pwritev_done",
        "flush_to_os",
        "flush_to_disk",
    ];
    let mut cases = vec![("a", "flush_to_disk", 1), ("c", "flush_to_disk", 1)];
    for event in of_snapshots {
        cases.extend([1, 3, 5, 8].map(|number| ("b", event, number)));
    }
    let mut files = None;
    let mut failed = std::collections::BTreeMap::<&str, usize>::new();
    for (drive, event, number) in cases {
        let (machine, mut qmp) = four_images(drive, &rules(event, number));
        let files = files.get_or_insert_with(|| contents(&machine));
        let before = qmp.graph();
        let actions = json!({"actions": [
            {"type": "blockdev-snapshot-sync", "data": {"node-name": "a", "snapshot-file": machine.path("a1"),
                                                        "snapshot-node-name": "a1"}},
            {"type": "blockdev-snapshot-internal-sync", "data": {"device": "b", "name": "s"}},
            {"type": "blockdev-snapshot", "data": {"node": "c", "overlay": "o"}},
            {"type": "blockdev-snapshot-internal-sync", "data": {"device": "b", "name": "t"}},
        ]});
        let case = format!("{drive}, {event} for the {number}th time");
        if let Err(error) = qmp.try_execute("transaction", actions.clone()) {
            *failed.entry(drive).or_default() += 1;
            assert_eq!(qmp.graph(), before, "{case}: {error}");
            assert!(contents(&machine) == *files, "{case}: {error}");
            // The error came once: what is left is usable.
            qmp.execute("transaction", actions);
        }
        let found = qmp.run("query-named-block-nodes");
        let found = found.as_array().unwrap().iter().find(|node| node["node-name"] == "b");
        assert_eq!(
            found.unwrap()["image"]["snapshots"].as_array().unwrap().len(),
            2,
            "{case}"
        );
        end(machine, qmp);
    }
    println!("failed transactions by image: {failed:?}");
    assert!(failed.get("b").is_some_and(|count| *count >= 15), "{failed:?}");
    assert!(failed.contains_key("a") && failed.contains_key("c"), "{failed:?}");
}
