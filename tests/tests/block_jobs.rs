//! Block jobs of a machine whose guest writes all the while: nothing that it wrote is lost, wherever its disk moves.

use bulkhead_tests::images::{check, name, qcow2, qemu_img, qemu_io};
use bulkhead_tests::machine::{Machine, PATIENCE};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::json;
use std::process::Command;
use std::time::{Duration, Instant};

/// Waits until a job is over; it must have succeeded.
fn completed(qmp: &mut Qmp, job: &str) {
    loop {
        let event = qmp.event();
        let data = &event["data"];
        match event["event"].as_str() {
            Some("BLOCK_JOB_COMPLETED") if data["device"] == job => {
                assert!(data.get("error").is_none(), "{event}");
                return;
            }
            Some("BLOCK_JOB_CANCELLED") => panic!("{event}"),
            _ => {}
        }
    }
}

/// Waits until a mirror has converged, and has the disk move to its target.
fn moved(qmp: &mut Qmp, job: &str) {
    qmp.wait_event("BLOCK_JOB_READY");
    qmp.execute("job-complete", json!({"id": job}));
    completed(qmp, job);
}

#[test]
fn a_writing_guest_loses_nothing_while_its_disk_moves() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    qcow2(&directory.path().join("disk.qcow2"), "80M", None);
    let arguments = format!(
        "-m 256 -smp 2 -kernel {} -drive file={{dir}}/disk.qcow2,if=virtio,format=qcow2,id=d,num-queues=4",
        guest::image().display()
    );
    let append = "test=blk test=blk-verify test=blk-verify mib=64 seed=7 queues=4 test=spin";
    let mut machine = Machine::start_with(directory, &arguments, &["-append", append]);
    machine.wait_for_serial("blk slot=");
    let mut qmp = machine.qmp();
    for number in 1..=2 {
        let file = machine.path_text(&format!("s{number}"));
        qmp.execute("blockdev-snapshot-sync", json!({"device": "d", "snapshot-file": file}));
    }
    let (disk, middle) = (machine.path_text("disk.qcow2"), machine.path_text("s1"));
    qmp.execute(
        "block-commit",
        json!({"device": "d", "job-id": "middle", "top": middle, "base": disk}),
    );
    completed(&mut qmp, "middle");
    qmp.execute("block-commit", json!({"device": "d", "job-id": "active"}));
    moved(&mut qmp, "active");
    for (job, target, format, mode) in [
        ("raw", "m.raw", "raw", "background"),
        ("both", "m.qcow2", "qcow2", "write-blocking"),
    ] {
        let arguments = json!({"device": "d", "job-id": job, "target": machine.path_text(target), "format": format,
                               "sync": "full", "copy-mode": mode});
        qmp.execute("drive-mirror", arguments);
        moved(&mut qmp, job);
    }
    // The snapshot is of the moment of the backup: what is below it says what the backup must be.
    let actions = json!([
        {"type": "blockdev-snapshot-sync", "data": {"device": "d", "snapshot-file": machine.path_text("after")}},
        {"type": "drive-backup", "data": {"device": "d", "job-id": "copy", "target": machine.path_text("copy"),
                                          "format": "qcow2", "sync": "full"}},
    ]);
    qmp.execute("transaction", json!({"actions": actions}));
    completed(&mut qmp, "copy");
    machine.wait_for_serial("spin 0");
    let serial = machine.serial();
    assert!(!serial.contains("FAIL"), "{serial}\n{}", machine.log());
    qmp.execute("quit", json!({}));
    drop(qmp);
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
    for image in ["disk.qcow2", "m.qcow2", "after", "copy"] {
        check(&machine.path(image));
    }
    let (moment, copy) = (machine.path("m.qcow2"), machine.path("copy"));
    qemu_img(&["compare", "-f", "qcow2", "-F", "qcow2", name(&moment), name(&copy)]);
    let (top, raw) = (machine.path("after"), machine.path("all"));
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", name(&top), name(&raw)]);
    let data = std::fs::read(&raw).unwrap();
    assert_eq!(guest::checksum(&data[..64 << 20]), guest::pattern_checksum(64, 7));
}

#[test]
fn a_disk_is_mirrored_to_a_server() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let (source, target, socket) = (at("source"), at("target"), at("socket"));
    qcow2(&source, "8M", None);
    qemu_io(&source, "qcow2", "write -P 7 1M 2M");
    std::fs::File::create(&target)
        .and_then(|file| file.set_len(8 << 20))
        .unwrap();
    let server = Command::new("qemu-nbd")
        .args(["-t", "-f", "raw", "-x", "e", "-k", name(&socket), name(&target)])
        .spawn();
    let mut server = server.expect("qemu-nbd: `make packages` installs qemu-utils");
    let begun = Instant::now();
    while !socket.exists() {
        assert!(begun.elapsed() < PATIENCE, "qemu-nbd does not listen");
        std::thread::sleep(Duration::from_millis(2));
    }
    let mut machine = Machine::start_without_serial(directory, "-machine none", &[]);
    let mut qmp = machine.qmp();
    let file = json!({"driver": "file", "filename": machine.path_text("source")});
    qmp.execute(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "n", "file": file}),
    );
    let export = format!("nbd:unix:{}:exportname=e", socket.display());
    qmp.execute(
        "drive-mirror",
        json!({"device": "n", "job-id": "m", "target": export, "mode": "existing", "format": "raw", "sync": "full"}),
    );
    qmp.wait_event("BLOCK_JOB_READY");
    qmp.execute("block-job-cancel", json!({"device": "m"}));
    completed(&mut qmp, "m");
    qmp.execute("quit", json!({}));
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
    server.kill().and_then(|()| server.wait()).expect("the server ends");
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", name(&source), name(&target)]);
}

#[test]
fn a_job_that_is_cancelled_at_any_moment_ends_once() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    for image in ["source", "target"] {
        qcow2(&at(image), "4M", None);
    }
    qemu_io(&at("source"), "qcow2", "write -P 7 1M 1M");
    let mut machine = Machine::start_without_serial(directory, "-machine none", &[]);
    let mut qmp = machine.qmp();
    for image in ["source", "target"] {
        let cache = json!({"no-flush": true});
        let file = json!({"driver": "file", "filename": machine.path_text(image), "cache": cache});
        let node = json!({"driver": "qcow2", "node-name": image, "file": file, "cache": cache});
        qmp.execute("blockdev-add", node);
    }
    let mut seen = std::collections::BTreeSet::new();
    for round in 0..100 {
        let arguments =
            json!({"device": "source", "target": "target", "job-id": "j", "sync": "full", "auto-dismiss": false});
        qmp.execute("blockdev-backup", arguments);
        // From the beginning of the job to after its end.
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_micros(round * 60) {
            std::hint::spin_loop();
        }
        let was_taken = qmp.try_execute("job-cancel", json!({"id": "j"})).is_ok();
        let (mut ends, mut status) = (Vec::new(), json!(null));
        while status != "concluded" {
            let event = qmp.event();
            match event["event"].as_str() {
                Some("JOB_STATUS_CHANGE") => status = event["data"]["status"].clone(),
                Some(end @ ("BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED")) => ends.push(end.to_owned()),
                _ => {}
            }
        }
        assert_eq!(ends.len(), 1, "round {round}: {ends:?}");
        assert!(was_taken || ends[0] == "BLOCK_JOB_COMPLETED", "round {round}: {ends:?}");
        seen.extend(ends);
        qmp.execute("job-dismiss", json!({"id": "j"}));
        assert_eq!(qmp.wait_event("JOB_STATUS_CHANGE")["status"], "null");
    }
    println!("{seen:?}");
    qmp.execute("quit", json!({}));
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
}

/// What the target has below it in the end shows through where only a part of a cluster was written meanwhile.
#[test]
fn a_mirror_of_the_top_hides_nothing_of_what_is_below() {
    for (sync, mode, granularity) in [
        ("top", "write-blocking", 0),
        ("none", "write-blocking", 0),
        ("top", "background", 512),
        ("none", "write-blocking", 512),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        qcow2(&at("base"), "4M", None);
        qemu_io(&at("base"), "qcow2", "write -P 7 0 2M");
        qcow2(&at("disk"), "4M", Some(&at("base")));
        let arguments = "-machine none -allow-path {dir} -drive file={dir}/disk,if=none,format=qcow2,id=d";
        let mut machine = Machine::start_without_serial(directory, arguments, &[]);
        let mut qmp = machine.qmp();
        let arguments = json!({"device": "d", "job-id": "m", "target": machine.path_text("target"), "format": "qcow2",
                               "sync": sync, "copy-mode": mode, "granularity": granularity});
        qmp.execute("drive-mirror", arguments);
        qmp.wait_event("BLOCK_JOB_READY");
        for write in ["write -P 3 66k 512", "write -z 130k 1k", "write -P 4 190k 70k"] {
            let line = format!("qemu-io d \"{write}\"");
            qmp.execute("human-monitor-command", json!({"command-line": line}));
        }
        qmp.execute("job-complete", json!({"id": "m"}));
        completed(&mut qmp, "m");
        qmp.execute("quit", json!({}));
        assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
        let (disk, target) = (machine.path("disk"), machine.path("target"));
        check(&target);
        qemu_img(&["compare", "-f", "qcow2", "-F", "qcow2", name(&disk), name(&target)]);
    }
}
