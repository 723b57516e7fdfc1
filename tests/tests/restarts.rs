//! block-proc is killed under a guest that writes: the guest sees a pause, and nothing that it wrote is lost.

use bulkhead_tests::images::{check, check_but_leaks, name, qcow2, qemu_img};
use bulkhead_tests::machine::Machine;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::path::Path;

const MIB: u64 = 32;

fn shoot(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// Kills block-proc and waits until another one serves; returns what the event says.
fn restart(machine: &mut Machine, qmp: &mut Qmp) -> Value {
    shoot(machine.helper("block-proc"));
    qmp.wait_event("BULKHEAD_HELPER_RESTARTED")
}

/// So many rounds of writing and reading back, each with a pattern of its own.
fn rounds(count: u64) -> String {
    let round = |seed| format!("test=blk-verify mib={MIB} seed={seed} queues=4 ");
    (1..=count).map(round).collect::<String>() + "test=spin"
}

fn contents(image: &Path, format: &str) -> Vec<u8> {
    let raw = image.with_extension("all");
    qemu_img(&["convert", "-f", format, "-O", "raw", name(image), name(&raw)]);
    std::fs::read(&raw).unwrap()
}

fn a_disk(directory: &Path, format: &str, file: &str) {
    let image = directory.join(file);
    match format {
        "qcow2" => qcow2(&image, "40M", None),
        _ => std::fs::File::create(&image).unwrap().set_len(40 << 20).unwrap(),
    }
}

#[test]
fn a_guest_loses_nothing_when_block_proc_is_killed_again_and_again() {
    need_kvm!();
    const ROUNDS: u64 = 12;
    const KILLS: usize = 12;
    for (format, engine, threads) in [
        ("qcow2", "io_uring", ""),
        ("raw", "threads", ""),
        ("qcow2", "threads", ",iothread=t"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        a_disk(directory.path(), format, "disk");
        let arguments = format!(
            "-m 128 -smp 2 -kernel {} --restart-budget 1000/60 -object iothread,id=t \
             -drive file={{dir}}/disk,if=none,format={format},id=d,aio={engine} \
             -device virtio-blk-pci,drive=d,num-queues=4{threads}",
            guest::image().display()
        );
        let append = rounds(ROUNDS);
        let mut machine = Machine::start_with(directory, &arguments, &["-append", &append]);
        // From the beginning: while the image grows, what is answered is not all in its tables.
        let mut qmp = machine.qmp();
        machine.wait_for_serial("BHG");
        for number in 1..=KILLS {
            let restarted = restart(&mut machine, &mut qmp);
            assert_eq!(restarted["role"], json!("block-proc"), "{restarted}");
            let status = qmp.run("query-status");
            assert_eq!(status["helper-restarts"], json!(number), "{status}");
            assert_eq!(status["status"], json!("running"), "{status}");
        }
        machine.wait_for_serial("spin 0");
        let serial = machine.serial();
        assert!(
            !serial.contains("FAIL"),
            "{format} {engine}: {serial}\n{}",
            machine.log()
        );
        qmp.execute("quit", json!({}));
        drop(qmp);
        assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
        let image = machine.path("disk");
        if format == "qcow2" {
            check_but_leaks(&image);
        }
        let data = contents(&image, format);
        let data = &data[..(MIB << 20) as usize];
        assert_eq!(guest::checksum(data), guest::pattern_checksum(MIB, ROUNDS));
    }
}

/// Where a format has to find room for what is written, the way to it must not be in block-proc's memory alone when the guest
/// is answered: nothing is flushed before all is written.
#[test]
fn answered_writes_to_new_clusters_outlive_block_proc() {
    need_kvm!();
    const MIB: u64 = 192;
    let directory = tempfile::tempdir().unwrap();
    qcow2(&directory.path().join("disk"), "256M", None);
    let arguments = format!(
        "-m 512 -smp 2 -kernel {} --restart-budget 100000/60 \
         -drive file={{dir}}/disk,if=virtio,format=qcow2,id=d,num-queues=4",
        guest::image().display()
    );
    let append = format!("test=blk-verify mib={MIB} seed=1 queues=4 test=spin");
    let mut machine = Machine::start_with(directory, &arguments, &["-append", &append]);
    let mut qmp = machine.qmp();
    let mut kills = 0;
    while kills < 12 && !machine.serial().contains(" blk-verify") {
        restart(&mut machine, &mut qmp);
        kills += 1;
    }
    machine.wait_for_serial("spin 0");
    println!("{kills} kills");
    assert!(
        !machine.serial().contains("FAIL"),
        "{}\n{}",
        machine.serial(),
        machine.log()
    );
    assert!(kills > 0, "the guest was too fast");
    qmp.execute("quit", json!({}));
    drop(qmp);
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
    let image = machine.path("disk");
    // Clusters of writes that were not answered yet may be leaked.
    qemu_img(&["check", "-q", "-r", "leaks", name(&image)]);
    let data = &contents(&image, "qcow2")[..(MIB << 20) as usize];
    assert_eq!(guest::checksum(data), guest::pattern_checksum(MIB, 1));
}

/// So many kills under load, the times of each step, and how long the guest was not served.
#[test]
#[ignore = "takes minutes: make soak"]
fn a_thousand_kills_lose_nothing() {
    need_kvm!();
    const KILLS: usize = 1000;
    const ROUNDS: u64 = 60;
    let mut steps: [Vec<u64>; 5] = Default::default();
    let mut left = KILLS;
    while left > 0 {
        let directory = tempfile::tempdir().unwrap();
        a_disk(directory.path(), "qcow2", "disk");
        let arguments = format!(
            "-m 128 -smp 2 -kernel {} --restart-budget 100000/60 \
             -drive file={{dir}}/disk,if=virtio,format=qcow2,id=d,num-queues=4",
            guest::image().display()
        );
        let append = rounds(ROUNDS);
        let mut machine = Machine::start_with(directory, &arguments, &["-append", &append]);
        // From the beginning: while the image grows, what is answered is not all in its tables.
        let mut qmp = machine.qmp();
        machine.wait_for_serial("BHG");
        while left > 0 && !machine.serial().contains("spin 0") {
            let restarted = restart(&mut machine, &mut qmp);
            for (step, times) in ["pause-us", "fence-us", "spawn-us", "rebuild-us", "replay-us"]
                .iter()
                .zip(&mut steps)
            {
                times.push(restarted[step].as_u64().unwrap());
            }
            left -= 1;
        }
        machine.wait_for_serial("spin 0");
        assert!(!machine.serial().contains("FAIL"), "{}", machine.log());
        qmp.execute("quit", json!({}));
        drop(qmp);
        assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
        check_but_leaks(&machine.path("disk"));
        let data = contents(&machine.path("disk"), "qcow2");
        assert_eq!(
            guest::checksum(&data[..(MIB << 20) as usize]),
            guest::pattern_checksum(MIB, ROUNDS)
        );
    }
    println!("| step (ms) | min | median | 90 % below | 99 % below | max |\n|---|---|---|---|---|---|");
    for (step, times) in ["pause", "fence", "spawn", "rebuild", "replay"].iter().zip(&mut steps) {
        times.sort_unstable();
        let at = |part: usize| times[(times.len() - 1) * part / 100] as f64 / 1000.0;
        println!(
            "| {step} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} |",
            at(0),
            at(50),
            at(90),
            at(99),
            at(100)
        );
    }
}

/// Names and files of all nodes.
fn nodes(qmp: &mut Qmp) -> Vec<(Value, Value)> {
    let nodes = qmp.run("query-named-block-nodes");
    let shown = |node: &Value| (node["node-name"].clone(), node["file"].clone());
    let mut nodes: Vec<_> = nodes.as_array().unwrap().iter().map(shown).collect();
    nodes.sort_by_key(|(name, _)| name.as_str().map(str::to_owned));
    nodes
}

#[test]
fn the_graph_comes_back_and_its_jobs_have_failed() {
    let directory = tempfile::tempdir().unwrap();
    qcow2(&directory.path().join("disk"), "40M", None);
    let disk = "driver=qcow2,node-name=n,file.driver=file,file.filename={dir}/disk,file.node-name=f";
    let arguments = format!("-machine none -blockdev {disk} -object throttle-group,id=g,x-iops-total=100000");
    let mut machine = Machine::start_without_serial(directory, &arguments, &[]);
    let mut qmp = machine.qmp();
    let path = |machine: &Machine, name: &str| machine.path(name).display().to_string();
    qmp.execute(
        "human-monitor-command",
        json!({"command-line": "qemu-io n \"write -P 5 0 16M\""}),
    );
    let snapshot = json!({"node-name": "n", "snapshot-file": path(&machine, "s"), "snapshot-node-name": "s"});
    qmp.execute("blockdev-snapshot-sync", snapshot);
    qmp.execute(
        "blockdev-add",
        json!({"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "s"}),
    );
    for (name, persistent) in [("kept", true), ("lost", false)] {
        let add = json!({"node": "s", "name": name, "persistent": persistent});
        qmp.execute("block-dirty-bitmap-add", add);
    }
    qmp.execute(
        "block-set-write-threshold",
        json!({"node-name": "s", "write-threshold": 12345}),
    );
    qmp.execute(
        "nbd-server-start",
        json!({"addr": {"type": "unix", "data": {"path": path(&machine, "nbd")}}}),
    );
    qmp.execute(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "t", "name": "e"}),
    );
    let before = nodes(&mut qmp);

    let mirror = json!({"device": "t", "job-id": "m", "target": path(&machine, "m"), "sync": "full", "speed": 4096,
                        "format": "raw"});
    qmp.execute("drive-mirror", mirror.clone());
    shoot(machine.helper("block-proc"));
    let failed = qmp.wait_event("BLOCK_JOB_COMPLETED");
    assert_eq!(
        (&failed["device"], &failed["error"]),
        (&json!("m"), &json!("block-proc has ended"))
    );
    qmp.wait_event("BULKHEAD_HELPER_RESTARTED");
    assert_eq!(qmp.run("query-block-jobs"), json!([]));
    assert_eq!(nodes(&mut qmp), before);
    let all = qmp.run("query-named-block-nodes");
    let of = |name: &str| {
        all.as_array()
            .unwrap()
            .iter()
            .find(|node| node["node-name"] == name)
            .unwrap()
            .clone()
    };
    assert_eq!(of("s")["write_threshold"], json!(12345));
    let bitmaps = of("s")["dirty-bitmaps"].clone();
    let lost: Vec<_> = bitmaps
        .as_array()
        .unwrap()
        .iter()
        .map(|bitmap| (bitmap["name"].clone(), bitmap.get("inconsistent").is_some()))
        .collect();
    assert!(lost.contains(&(json!("lost"), true)), "{bitmaps}");
    assert!(lost.contains(&(json!("kept"), false)), "{bitmaps}");
    let read = qmp.execute(
        "human-monitor-command",
        json!({"command-line": "qemu-io t \"read -P 5 0 16M\""}),
    );
    assert!(!read.to_string().contains("failed"), "{read}");
    // The export is there for clients that connect again.
    let url = format!("nbd+unix:///e?socket={}", machine.path("nbd").display());
    assert!(qemu_img(&["info", "-f", "raw", &url]).contains("40 MiB"));

    // And everything can be done again.
    qmp.execute("drive-mirror", {
        let mut again = mirror;
        again["speed"] = json!(0);
        again
    });
    qmp.wait_event("BLOCK_JOB_READY");
    qmp.execute("block-job-cancel", json!({"device": "m"}));
    qmp.wait_event("BLOCK_JOB_COMPLETED");
    qmp.execute("quit", json!({}));
    drop(qmp);
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
    check_but_leaks(&machine.path("disk"));
    check_but_leaks(&machine.path("s"));
    let data = std::fs::read(machine.path("m")).unwrap();
    assert!(data[..16 << 20].iter().all(|byte| *byte == 5), "the mirror differs");
}

#[test]
fn one_that_ends_too_often_stops_the_machine_which_can_still_be_looked_into() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    a_disk(directory.path(), "raw", "disk");
    let arguments = format!(
        "-m 64 -kernel {} --restart-budget 1/60 -append test=spin -drive file={{dir}}/disk,if=virtio,format=raw,id=d",
        guest::image().display()
    );
    let mut machine = Machine::start_in(directory, &arguments);
    let mut qmp = machine.qmp();
    machine.wait_for_serial("spin 1");
    restart(&mut machine, &mut qmp);
    shoot(machine.helper("block-proc"));
    let lost = qmp.wait_event("BULKHEAD_HELPER_LOST");
    assert_eq!(lost["role"], json!("block-proc"));
    qmp.wait_event("STOP");
    let status = qmp.run("query-status");
    assert_eq!(
        (&status["status"], &status["running"], &status["helper-restarts"]),
        (&json!("internal-error"), &json!(false), &json!(1))
    );
    let dump = format!("file:{}", machine.path("dump").display());
    qmp.execute("dump-guest-memory", json!({"paging": false, "protocol": dump}));
    assert!(machine.path("dump").metadata().unwrap().len() > 64 << 20);
    let refused = qmp.try_execute("cont", json!({})).unwrap_err();
    let text =
        "block-proc has ended for good: this machine can be dumped, looked into and ended, but does not run again";
    assert_eq!(refused["desc"], text);
    let refused = qmp
        .try_execute("block_resize", json!({"device": "d", "size": 1 << 20}))
        .unwrap_err();
    assert_eq!(refused["desc"], json!("there is no block-proc"));
    qmp.execute("quit", json!({}));
    drop(qmp);
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
}

#[test]
fn an_operator_replaces_block_proc_and_a_stopped_machine_stays_stopped() {
    need_kvm!();
    const ROUNDS: u64 = 4;
    let directory = tempfile::tempdir().unwrap();
    a_disk(directory.path(), "qcow2", "disk");
    let arguments = format!(
        "-m 128 -smp 2 -kernel {} --restart-budget 1/60 -drive file={{dir}}/disk,if=virtio,format=qcow2,id=d,num-queues=4",
        guest::image().display()
    );
    let append = rounds(ROUNDS);
    let mut machine = Machine::start_with(directory, &arguments, &["-append", &append]);
    machine.wait_for_serial("ok blk-verify");
    let mut qmp = machine.qmp();
    let first = machine.helper("block-proc");
    // One that is asked for does not count.
    for _ in 0..2 {
        let restarted = qmp.execute("bulkhead-restart-helper", json!({"role": "block-proc"}));
        assert_eq!(restarted["reason"], json!("bulkhead-restart-helper"));
        assert_eq!(restarted["pid"], json!(machine.helper("block-proc")));
        assert_ne!(machine.helper("block-proc"), first);
    }
    qmp.run("stop");
    restart(&mut machine, &mut qmp);
    assert_eq!(qmp.run("query-status")["status"], json!("paused"));
    qmp.run("cont");
    machine.wait_for_serial("spin 0");
    assert!(!machine.serial().contains("FAIL"), "{}", machine.log());
    qmp.execute("quit", json!({}));
    drop(qmp);
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
    check(&machine.path("disk"));
    let data = contents(&machine.path("disk"), "qcow2");
    assert_eq!(
        guest::checksum(&data[..(MIB << 20) as usize]),
        guest::pattern_checksum(MIB, ROUNDS)
    );
}
