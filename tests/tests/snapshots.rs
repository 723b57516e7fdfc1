//! Snapshots over images and inside them, of machines that wait and of guests that write.

use bulkhead_tests::images::{check, info, name, qcow2, qemu_img, qemu_io};
use bulkhead_tests::machine::Machine;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};
use std::path::PathBuf;

const MIB: u64 = 1 << 20;

/// A machine that waits, with a drive `d` on disk.qcow2 (16 MiB).
fn machine(arguments: &str) -> (Machine, Qmp) {
    let directory = tempfile::tempdir().unwrap();
    qcow2(&directory.path().join("disk.qcow2"), "16M", None);
    let arguments = format!(
        "-m 64 -S -kernel {} -append test=spin \
         -drive file={{dir}}/disk.qcow2,if=virtio,format=qcow2,id=d,node-name=base {arguments}",
        guest::image().display()
    );
    let mut machine = Machine::start_in(directory, &arguments);
    let qmp = machine.qmp();
    (machine, qmp)
}

/// The files of a drive's chain, from the top.
fn chain(qmp: &mut Qmp, drive: &str) -> Vec<String> {
    let blocks = qmp.run("query-block");
    let blocks = blocks.as_array().unwrap();
    let block = blocks.iter().find(|block| block["device"] == drive).unwrap();
    let mut image = &block["inserted"]["image"];
    let mut files = Vec::new();
    while !image.is_null() {
        let file = PathBuf::from(image["filename"].as_str().unwrap());
        files.push(file.file_name().unwrap().to_str().unwrap().to_owned());
        image = &image["backing-image"];
    }
    files
}

#[test]
fn an_overlay_takes_the_place_of_what_it_covers() {
    need_kvm!();
    let (machine, mut qmp) = machine("");
    qmp.execute(
        "blockdev-snapshot-sync",
        json!({"device": "d", "snapshot-file": machine.path_text("s1"), "snapshot-node-name": "one"}),
    );
    assert_eq!(chain(&mut qmp, "d"), ["s1", "disk.qcow2"]);
    qmp.execute(
        "blockdev-snapshot-sync",
        json!({"node-name": "one", "snapshot-file": machine.path_text("s2"), "snapshot-node-name": "two"}),
    );
    assert_eq!(chain(&mut qmp, "d"), ["s2", "s1", "disk.qcow2"]);
    let top = info(&machine.path("s2"));
    assert_eq!(top["backing-filename"], machine.path_text("s1"));
    assert_eq!(top["backing-filename-format"], "qcow2");
    assert_eq!(top["virtual-size"], 16 * MIB);
    drop(qmp);
    let directory = machine.directory.path().to_owned();
    assert!(directory.join("s2").exists());
    for image in ["disk.qcow2", "s1", "s2"] {
        qemu_img(&["check", "-U", "-q", "-f", "qcow2", name(&directory.join(image))]);
    }
}

#[test]
fn an_image_that_exists_becomes_the_overlay() {
    need_kvm!();
    let (machine, mut qmp) = machine("");
    qcow2(&machine.path("over"), "16M", None);
    qmp.execute(
        "blockdev-snapshot-sync",
        json!({"device": "d", "snapshot-file": machine.path_text("over"), "mode": "existing"}),
    );
    assert_eq!(chain(&mut qmp, "d"), ["over", "disk.qcow2"]);
    qcow2(&machine.path("node"), "16M", None);
    let overlay = json!({"driver": "qcow2", "node-name": "o", "backing": null,
        "file": {"driver": "file", "filename": machine.path_text("node")}});
    qmp.execute("blockdev-add", overlay);
    qmp.execute("blockdev-snapshot", json!({"node": "d", "overlay": "o"}));
    assert_eq!(chain(&mut qmp, "d"), ["node", "over", "disk.qcow2"]);
    assert_eq!(
        qmp.refusal("blockdev-snapshot", json!({"node": "d", "overlay": "o"})),
        "The overlay is already in use"
    );
    assert_eq!(
        qmp.refusal("blockdev-snapshot", json!({"node": "d", "overlay": "nope"})),
        "Cannot find device='nope' nor node-name='nope'"
    );
}

#[test]
fn overlays_that_cannot_be_are_refused_and_change_nothing() {
    need_kvm!();
    let (machine, mut qmp) = machine("");
    let at = |name: &str| machine.path_text(name);
    let missing = at("none");
    for (arguments, expected) in [
        (
            json!({"snapshot-file": at("x")}),
            "Cannot find device='' nor node-name=''".to_owned(),
        ),
        (
            json!({"node-name": "base", "snapshot-file": at("x")}),
            "New overlay node-name missing".to_owned(),
        ),
        (
            json!({"device": "d", "snapshot-file": at("x"), "snapshot-node-name": "base"}),
            "New overlay node-name already in use".to_owned(),
        ),
        (
            json!({"device": "d", "snapshot-file": at("x"), "format": "bogus"}),
            "Unknown file format 'bogus'".to_owned(),
        ),
        (
            json!({"device": "d", "snapshot-file": at("x"), "format": "raw"}),
            "Backing file not supported for file format 'raw'".to_owned(),
        ),
        (
            json!({"device": "d", "snapshot-file": at("disk.qcow2")}),
            "Error: Trying to create an image with the same filename as the backing file".to_owned(),
        ),
        (
            json!({"device": "d", "snapshot-file": missing, "mode": "existing"}),
            format!("Could not open '{missing}': No such file or directory"),
        ),
        (
            json!({"device": "d", "snapshot-file": "/nonexistent/s"}),
            "Could not create '/nonexistent/s': No such file or directory".to_owned(),
        ),
        (
            json!({"device": "d", "snapshot-file": at("x"), "snapshot-node-name": "bad name!"}),
            "Invalid node-name: 'bad name!'".to_owned(),
        ),
    ] {
        assert_eq!(qmp.refusal("blockdev-snapshot-sync", arguments), expected);
    }
    // By another name it is the same file, and in use.
    std::os::unix::fs::symlink(machine.path("disk.qcow2"), machine.path("link")).unwrap();
    let link = json!({"device": "d", "snapshot-file": at("link")});
    assert_eq!(
        qmp.refusal("blockdev-snapshot-sync", link),
        "Failed to get \"write\" lock"
    );
    assert_eq!(chain(&mut qmp, "d"), ["disk.qcow2"]);
    assert_eq!(info(&machine.path("disk.qcow2"))["virtual-size"], 16 * MIB);
}

#[test]
fn internal_snapshots_are_made_shown_and_deleted() {
    need_kvm!();
    let (mut machine, mut qmp) = machine("");
    for snapshot in ["first", "second"] {
        qmp.execute(
            "blockdev-snapshot-internal-sync",
            json!({"device": "d", "name": snapshot}),
        );
    }
    let listed = |qmp: &mut Qmp| -> Vec<(String, String)> {
        let blocks = qmp.run("query-block");
        let snapshots = blocks[0]["inserted"]["image"]["snapshots"].as_array().cloned();
        let text = |snapshot: &Value, member: &str| snapshot[member].as_str().unwrap().to_owned();
        let pair = |snapshot: &Value| (text(snapshot, "id"), text(snapshot, "name"));
        snapshots.unwrap_or_default().iter().map(pair).collect()
    };
    let pair = |id: &str, name: &str| (id.to_owned(), name.to_owned());
    assert_eq!(listed(&mut qmp), [pair("1", "first"), pair("2", "second")]);
    assert_eq!(
        qmp.refusal(
            "blockdev-snapshot-internal-sync",
            json!({"device": "d", "name": "first"})
        ),
        "Snapshot with name 'first' already exists on device 'd'"
    );
    assert_eq!(
        qmp.refusal("blockdev-snapshot-internal-sync", json!({"device": "d", "name": ""})),
        "Name is empty"
    );
    let delete = "blockdev-snapshot-delete-internal-sync";
    for (arguments, expected) in [
        (json!({"device": "d"}), "Name or id must be provided"),
        (
            json!({"device": "d", "name": "zz"}),
            "Snapshot with id 'null' and name 'zz' does not exist on device 'd'",
        ),
        (
            json!({"device": "d", "id": "1", "name": "second"}),
            "Snapshot with id '1' and name 'second' does not exist on device 'd'",
        ),
    ] {
        assert_eq!(qmp.refusal(delete, arguments), expected);
    }
    let deleted = qmp.execute(delete, json!({"device": "d", "name": "first"}));
    assert_eq!((&deleted["id"], &deleted["vm-state-size"]), (&json!("1"), &json!(0)));
    assert_eq!(listed(&mut qmp), [pair("2", "second")]);
    // Ids are not used again while there are larger ones.
    qmp.execute(
        "blockdev-snapshot-internal-sync",
        json!({"device": "d", "name": "third"}),
    );
    assert_eq!(listed(&mut qmp), [pair("2", "second"), pair("3", "third")]);
    qmp.run("quit");
    machine.wait();
    check(&machine.path("disk.qcow2"));
    let said = info(&machine.path("disk.qcow2"));
    assert_eq!(said["snapshots"][1]["name"], "third");
}

#[test]
fn images_that_hold_no_snapshots_are_refused() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk"), vec![0; 512]).unwrap();
    let arguments = format!(
        "-m 64 -S -kernel {} -append test=spin -drive file={{dir}}/disk,if=virtio,format=raw,id=d",
        guest::image().display()
    );
    let mut machine = Machine::start_in(directory, &arguments);
    let mut qmp = machine.qmp();
    assert_eq!(
        qmp.refusal("blockdev-snapshot-internal-sync", json!({"device": "d", "name": "s"})),
        "Block format 'raw' used by device 'd' does not support internal snapshots"
    );
}

/// The clock of a snapshot is the guest's: it stands while the machine does.
#[test]
fn a_snapshot_tells_how_long_the_guest_has_run() {
    need_kvm!();
    let (_machine, mut qmp) = machine("");
    let clock = |qmp: &mut Qmp, name: &str| -> i64 {
        let arguments = json!({"device": "d", "name": name});
        qmp.execute("blockdev-snapshot-internal-sync", arguments.clone());
        let info = qmp.execute("blockdev-snapshot-delete-internal-sync", arguments);
        info["vm-clock-sec"].as_i64().unwrap() * 1_000_000_000 + info["vm-clock-nsec"].as_i64().unwrap()
    };
    assert_eq!(clock(&mut qmp, "before"), 0);
    qmp.run("cont");
    std::thread::sleep(std::time::Duration::from_millis(50));
    qmp.run("stop");
    let stopped = clock(&mut qmp, "stopped");
    assert!(stopped >= 50_000_000, "{stopped}");
    assert_eq!(clock(&mut qmp, "still"), stopped);
}

/// What the guest writes after a snapshot is in the overlay; what it wrote before, and reads on, is below.
#[test]
fn a_writing_guest_does_not_notice_its_overlays() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    qcow2(&directory.path().join("disk.qcow2"), "80M", None);
    let arguments = format!(
        "-m 256 -smp 2 -kernel {} -drive file={{dir}}/disk.qcow2,if=virtio,format=qcow2,id=d,num-queues=4",
        guest::image().display()
    );
    let append = "test=blk test=blk-verify test=blk-verify mib=64 seed=42 queues=4";
    let mut machine = Machine::start_with(directory, &arguments, &["-append", append]);
    machine.wait_for_serial("blk slot=");
    let mut qmp = machine.qmp();
    for number in 1..=5 {
        let file = machine.path_text(&format!("s{number}"));
        let taken = qmp.try_execute("blockdev-snapshot-sync", json!({"device": "d", "snapshot-file": file}));
        taken.unwrap_or_else(|error| panic!("{number}: {error}\n{}", machine.log()));
    }
    drop(qmp);
    machine.wait();
    let (serial, log) = (machine.serial(), machine.log());
    assert_eq!(guest::value(&serial, "done", "failures"), Some("0"), "{serial}\n{log}");
    for image in ["disk.qcow2", "s1", "s2", "s3", "s4", "s5"] {
        check(&machine.path(image));
    }
    let raw = machine.path("raw");
    qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        name(&machine.path("s5")),
        name(&raw),
    ]);
    let data = std::fs::read(&raw).unwrap();
    assert_eq!(guest::checksum(&data[..64 << 20]), guest::pattern_checksum(64, 42));
}

#[test]
fn the_name_in_a_header_changes_and_the_chain_stays() {
    need_kvm!();
    let (machine, mut qmp) = machine("");
    qmp.execute(
        "blockdev-snapshot-sync",
        json!({"device": "d", "snapshot-file": machine.path_text("s1"), "snapshot-node-name": "one"}),
    );
    let change = "change-backing-file";
    qmp.execute(
        change,
        json!({"device": "d", "image-node-name": "one", "backing-file": "elsewhere.qcow2"}),
    );
    let top = info(&machine.path("s1"));
    assert_eq!(top["backing-filename"], "elsewhere.qcow2");
    assert_eq!(top["backing-filename-format"], "qcow2");
    assert_eq!(chain(&mut qmp, "d"), ["s1", "disk.qcow2"]);
    for (image, expected) in [
        ("nope", "Cannot find device='' nor node-name='nope'"),
        (
            "base",
            "not allowing backing file change on an image without a backing file",
        ),
    ] {
        let arguments = json!({"device": "d", "image-node-name": image, "backing-file": "x"});
        assert_eq!(qmp.refusal(change, arguments), expected);
    }
}

#[test]
fn the_data_below_an_overlay_reads_through() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk");
    std::fs::write(&disk, vec![0x5a; 1 << 20]).unwrap();
    let arguments = format!(
        "-m 64 -S -kernel {} -append test=spin -drive file={{dir}}/disk,if=virtio,format=raw,id=d",
        guest::image().display()
    );
    let mut machine = Machine::start_in(directory, &arguments);
    let mut qmp = machine.qmp();
    qmp.execute(
        "blockdev-snapshot-sync",
        json!({"device": "d", "snapshot-file": machine.path_text("over")}),
    );
    qmp.run("quit");
    machine.wait();
    assert_eq!(info(&machine.path("over"))["backing-filename-format"], "raw");
    let said = qemu_io(&machine.path("over"), "qcow2", "read -P 0x5a 0 1M");
    assert!(said.contains("read 1048576/1048576 bytes"), "{said}");
}
