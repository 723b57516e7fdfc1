//! `-machine none` and `-accel qtest`: the block graph, objects and QMP without a guest.

use bulkhead_tests::machine::{Machine, wait_until};
use bulkhead_tests::procfs;
use serde_json::json;
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
