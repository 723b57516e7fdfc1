//! block-proc is killed under a guest that writes: the guest sees a pause, and nothing that it wrote is lost.

use bulkhead_tests::images::{check, name, qcow2, qemu_img};
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
        machine.wait_for_serial("ok blk-verify");
        let mut qmp = machine.qmp();
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
            check(&image);
        }
        let data = contents(&image, format);
        let data = &data[..(MIB << 20) as usize];
        assert_eq!(guest::checksum(data), guest::pattern_checksum(MIB, ROUNDS));
    }
}
