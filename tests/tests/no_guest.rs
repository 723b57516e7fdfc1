//! `-machine none` and `-accel qtest`: the block graph, objects and QMP without a guest.

use bulkhead_tests::machine::{Machine, wait_until};
use bulkhead_tests::procfs;
use bulkhead_tests::qmp::Qmp;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

/// A process that is just being started still has its parent's name.
fn has_only_block_and_monitor_processes(machine: &Machine) {
    wait_until("block-proc and qmp-procs alone", || {
        let mut names: Vec<String> = machine.helpers().into_iter().map(|(name, _)| name).collect();
        names.sort();
        names.dedup();
        names == ["block-proc", "qmp-proc"]
    });
}

#[test]
fn without_a_machine_there_is_no_vcpu_process_and_no_kvm() {
    let directory = tempfile::tempdir().expect("scratch directory");
    let mut machine = Machine::start_without_serial(directory, "-machine none", &[]);
    let mut qmp = machine.qmp();
    has_only_block_and_monitor_processes(&machine);
    let block = machine.helper("block-proc");
    for pid in [machine.pid(), machine.launcher(), block] {
        let links = procfs::descriptors(pid);
        assert!(!links.iter().any(|(_, link)| link.contains("kvm")), "{pid}: {links:?}");
    }
    for status in procfs::statuses(block) {
        assert_eq!(procfs::field(&status, "Seccomp_filters"), "4");
    }

    assert_eq!(qmp.run("query-status"), json!({"running": true, "status": "running"}));
    assert_eq!(qmp.run("query-kvm"), json!({"enabled": false, "present": true}));
    assert_eq!(qmp.run("query-cpus-fast"), json!([]));
    assert_eq!(qmp.run("query-memory-size-summary"), json!({"base-memory": 0}));
    let refusal = qmp.try_execute("inject-nmi", json!({})).unwrap_err();
    assert_eq!(refusal["desc"], "machine does not provide NMIs");
    let dump = json!({"paging": false, "protocol": "file:/nowhere"});
    assert!(qmp.try_execute("dump-guest-memory", dump).is_err());
    qmp.run("stop");
    assert_eq!(qmp.run("query-status"), json!({"running": false, "status": "paused"}));
    qmp.run("cont");
    qmp.run("system_reset");
    qmp.run("quit");
    assert!(machine.wait().success());
}

#[test]
fn a_signal_ends_it_as_it_ends_a_machine() {
    let directory = tempfile::tempdir().expect("scratch directory");
    let mut machine = Machine::start_without_serial(directory, "-machine none", &[]);
    let mut qmp = machine.qmp();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(machine.pid()),
        nix::sys::signal::Signal::SIGTERM,
    )
    .expect("kill");
    let event = qmp.wait_event("SHUTDOWN");
    assert_eq!(event, json!({"guest": false, "reason": "host-signal"}));
    assert!(machine.wait().success());
}

#[test]
fn devices_exist_though_nothing_drives_them_and_the_clock_is_the_clients() {
    let directory = tempfile::tempdir().expect("scratch directory");
    std::fs::write(directory.path().join("disk"), vec![0; 1 << 20]).expect("disk");
    let mut machine = Machine::start_without_serial(
        directory,
        "-accel qtest -smp 2 -m 64 -drive file={dir}/disk,if=none,id=d,format=raw \
         -device virtio-blk-pci,drive=d,id=disk0 -qtest unix:{dir}/qtest,server=on,wait=off",
        &[],
    );
    let mut qmp = machine.qmp();
    has_only_block_and_monitor_processes(&machine);
    let path = json!({"path": "/machine/peripheral/disk0", "property": "type"});
    assert_eq!(qmp.execute("qom-get", path), "virtio-blk-pci");
    assert_eq!(qmp.run("query-memory-size-summary"), json!({"base-memory": 64 << 20}));

    let mut clock = UnixStream::connect(machine.path("qtest")).expect("the qtest socket");
    let mut answers = BufReader::new(clock.try_clone().expect("clone")).lines();
    for (command, answer) in [
        ("clock_step 1000\n", "OK 1000"),
        ("clock_step\n", "OK 1000"),
        ("outb 0 0\n", "FAIL Unknown command 'outb'"),
    ] {
        clock.write_all(command.as_bytes()).expect("writing");
        assert_eq!(answers.next().expect("an answer").expect("reading"), answer);
    }
    drop((clock, answers));
    // The next client may come.
    wait_until("another client is served", || {
        let Ok(mut clock) = UnixStream::connect(machine.path("qtest")) else {
            return false;
        };
        clock.write_all(b"clock_step 1\n").expect("writing");
        let mut answer = String::new();
        BufReader::new(clock)
            .read_line(&mut answer)
            .is_ok_and(|_| answer == "OK 1001\n")
    });
    qmp.run("quit");
    assert!(machine.wait().success());
}

/// The entry of query-block with this device.
fn device(qmp: &mut Qmp, path: &str) -> Option<Value> {
    let blocks = qmp.run("query-block");
    let found = blocks
        .as_array()
        .expect("a list")
        .iter()
        .find(|block| block["qdev"] == path);
    found.cloned()
}

#[test]
fn devices_come_and_go_with_what_they_use() {
    let directory = tempfile::tempdir().expect("scratch directory");
    for name in ["disk", "other", "third"] {
        std::fs::write(directory.path().join(name), vec![0; 1 << 20]).expect("disk");
    }
    let mut machine = Machine::start_without_serial(
        directory,
        "-accel qtest -object iothread,id=io0 -device virtio-scsi,id=hba,iothread=io0 \
         -drive file={dir}/disk,if=none,id=d,format=raw -drive file={dir}/other,if=virtio,format=raw \
         -drive if=ide,media=cdrom,id=cd -device scsi-hd,drive=d,id=disk0,bus=hba.0",
        &[],
    );
    let mut qmp = machine.qmp();
    let disk = device(&mut qmp, "disk0").expect("the disk");
    assert_eq!(
        (&disk["device"], &disk["removable"], disk.get("tray_open")),
        (&json!("d"), &json!(false), None)
    );
    assert!(device(&mut qmp, "/machine/peripheral-anon/device[0]/virtio-backend").is_some());
    let cd = device(&mut qmp, "/machine/peripheral-anon/device[1]").expect("the drive");
    assert_eq!(
        (&cd["removable"], &cd["tray_open"], cd.get("inserted")),
        (&json!(true), &json!(false), None)
    );
    assert_eq!(
        qmp.refusal("object-del", json!({"id": "io0"})),
        "object 'io0' is in use, can not be deleted"
    );

    let node =
        json!({"driver": "raw", "node-name": "n", "file": {"driver": "file", "filename": machine.path("third")}});
    qmp.execute("blockdev-add", node);
    for (arguments, text) in [
        (json!({"driver": "nope"}), "'nope' is not a valid device model name"),
        (
            json!({"driver": "scsi-hd", "bus": "nope.0", "drive": "n"}),
            "Bus 'nope.0' not found",
        ),
        (json!({"driver": "scsi-hd"}), "drive property not set"),
        (
            json!({"driver": "scsi-hd", "drive": "nope"}),
            "Property 'scsi-hd.drive' can't find value 'nope'",
        ),
        (
            json!({"driver": "scsi-hd", "drive": "d"}),
            "Drive 'd' is already in use by another device",
        ),
        (
            json!({"driver": "scsi-hd", "drive": "n", "id": "disk0"}),
            "Duplicate device ID 'disk0'",
        ),
        (
            json!({"driver": "scsi-hd", "drive": "n", "addr": "5"}),
            "Property 'scsi-hd.addr' not found",
        ),
    ] {
        assert_eq!(qmp.refusal("device_add", arguments.clone()), text, "{arguments}");
    }
    qmp.execute("device_add", json!({"driver": "virtio-blk", "id": "v", "drive": "n"}));
    let text = qmp.refusal("device_add", json!({"driver": "virtio-blk", "id": "w", "drive": "n"}));
    assert!(text.starts_with("Permission conflict on node 'n'"), "{text}");
    assert_eq!(
        qmp.refusal("blockdev-del", json!({"node-name": "n"})),
        "Node n is in use"
    );
    qmp.events();
    qmp.execute("device_del", json!({"id": "v"}));
    let path = "/machine/peripheral/v";
    assert_eq!(
        qmp.wait_event("DEVICE_DELETED"),
        json!({"path": format!("{path}/virtio-backend")})
    );
    assert_eq!(qmp.wait_event("DEVICE_DELETED"), json!({"device": "v", "path": path}));
    qmp.execute("blockdev-del", json!({"node-name": "n"}));
    // A controller takes its disks along, and a disk its drive.
    qmp.execute("device_del", json!({"id": "hba"}));
    assert_eq!(qmp.wait_event("DEVICE_DELETED")["device"], "disk0");
    assert_eq!(qmp.wait_event("DEVICE_DELETED")["device"], "hba");
    assert_eq!(device(&mut qmp, "disk0"), None);
    let text = qmp.refusal("query-named-block-nodes", json!({"x": 1}));
    assert_eq!(text, "Parameter 'x' is unexpected");
    qmp.execute("object-del", json!({"id": "io0"}));
    let error = qmp.try_execute("device_del", json!({"id": "disk0"})).unwrap_err();
    assert_eq!(
        error,
        json!({"class": "DeviceNotFound", "desc": "Device 'disk0' not found"})
    );
    qmp.run("quit");
    assert!(machine.wait().success());
}

#[test]
fn media_are_changed_through_an_open_tray() {
    let directory = tempfile::tempdir().expect("scratch directory");
    std::fs::write(directory.path().join("disk"), vec![0; 1 << 20]).expect("disk");
    let mut machine = Machine::start_without_serial(
        directory,
        "-accel qtest -drive if=none,id=d -device ide-cd,drive=d,id=cd -device floppy,id=fd -drive if=none,id=idle \
         -blockdev raw,node-name=n,file.driver=file,file.filename={dir}/disk -device ide-hd,drive=n,id=hd,share-rw=on",
        &[],
    );
    let mut qmp = machine.qmp();
    let cd = json!({"id": "cd"});
    let moved = |open: bool| json!({"device": "d", "id": "cd", "tray-open": open});
    let insert = json!({"id": "cd", "node-name": "n"});
    assert_eq!(
        qmp.refusal("blockdev-insert-medium", insert.clone()),
        "Node 'n' is already in use"
    );
    for command in [
        "eject",
        "blockdev-open-tray",
        "blockdev-close-tray",
        "blockdev-remove-medium",
    ] {
        let text = qmp.refusal(command, json!({"id": "hd"}));
        assert_eq!(text, "Device 'hd' is not removable", "{command}");
    }
    qmp.execute("device_del", json!({"id": "hd"}));
    assert_eq!(
        qmp.refusal("blockdev-insert-medium", insert.clone()),
        "Tray of device 'cd' is not open"
    );
    assert_eq!(
        qmp.refusal("blockdev-open-tray", json!({"id": "fd"})),
        "Device 'fd' does not have a tray"
    );
    assert_eq!(qmp.refusal("eject", json!({})), "Need exactly one of 'device' and 'id'");
    let error = qmp.try_execute("eject", json!({"device": "nope"})).unwrap_err();
    assert_eq!(error["class"], "DeviceNotFound");

    qmp.execute("blockdev-open-tray", json!({"device": "d"}));
    assert_eq!(qmp.wait_event("DEVICE_TRAY_MOVED"), moved(true));
    qmp.execute("blockdev-insert-medium", insert.clone());
    let text = qmp.refusal("blockdev-insert-medium", json!({"id": "cd", "node-name": "nope"}));
    assert_eq!(text, "Node 'nope' not found");
    qmp.execute("blockdev-close-tray", cd.clone());
    assert_eq!(qmp.wait_event("DEVICE_TRAY_MOVED"), moved(false));
    let block = device(&mut qmp, "cd").expect("the drive");
    assert_eq!(
        (&block["inserted"]["node-name"], &block["tray_open"]),
        (&json!("n"), &json!(false))
    );
    assert_eq!(
        qmp.refusal("blockdev-remove-medium", cd.clone()),
        "Tray of device 'cd' is not open"
    );
    qmp.execute("eject", cd.clone());
    assert_eq!(qmp.wait_event("DEVICE_TRAY_MOVED"), moved(true));
    let block = device(&mut qmp, "cd").expect("the drive");
    assert_eq!((block.get("inserted"), &block["tray_open"]), (None, &json!(true)));
    // What has no tray is always open; a drive without a device as well.
    qmp.execute("blockdev-insert-medium", json!({"id": "fd", "node-name": "n"}));
    qmp.execute("eject", json!({"id": "fd"}));
    qmp.execute("eject", json!({"device": "idle"}));
    qmp.execute("blockdev-del", json!({"node-name": "n"}));
    qmp.run("quit");
    assert!(machine.wait().success());
}

#[test]
fn without_qtest_there_is_no_bus() {
    let directory = tempfile::tempdir().expect("scratch directory");
    let mut machine = Machine::start_without_serial(directory, "-machine none", &[]);
    let mut qmp = machine.qmp();
    let text = qmp.refusal("device_add", json!({"driver": "virtio-blk-pci", "drive": "d"}));
    assert_eq!(text, "No 'PCI' bus found for device 'virtio-blk-pci'");
    assert_eq!(
        qmp.refusal("device_add", json!({"driver": "scsi-hd"})),
        "'scsi-hd' is not a valid device model name"
    );
    qmp.run("quit");
    assert!(machine.wait().success());
}
