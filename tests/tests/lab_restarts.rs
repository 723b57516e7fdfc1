//! block-proc is killed again and again under a stock Debian kernel that writes to its file system: the kernel sees no error,
//! and everything that it wrote is there. In `make soak` 50 times; otherwise a few.

use bulkhead_tests::images::{name, qemu_img};
use bulkhead_tests::lab::ext4::{assert_clean, sha256_of_file_in};
use bulkhead_tests::lab::outer::make_ext4;
use bulkhead_tests::lab::site::local_folder;
use bulkhead_tests::lab::{Machine, Must, Site, harness, machine};
use serde_json::Value;
use std::process::ExitCode;
use std::time::Duration;

/// Until a guest is up. It takes 6 s in a lab on an idle machine.
const BOOT: Duration = Duration::from_secs(120);
/// For what a guest or the monitor does at once.
const SOON: Duration = Duration::from_secs(120);
const DISK_BYTES: u64 = 256 << 20;
/// The steps of a restart, as its event names them.
const STEPS: [&str; 5] = ["pause-us", "fence-us", "spawn-us", "rebuild-us", "replay-us"];

fn main() -> ExitCode {
    let available = Site::available();
    harness::main(
        |_| available.clone(),
        &[(
            "linux_does_not_notice_that_block_proc_is_killed_under_its_file_system",
            linux_does_not_notice_that_block_proc_is_killed_under_its_file_system,
        )],
    )
}

fn linux_does_not_notice_that_block_proc_is_killed_under_its_file_system() {
    let kills = match std::env::var_os("BULKHEAD_LAB_ALL") {
        Some(_) => 50,
        None => 4,
    };
    let site = Site::start_with(machine::hypervisor).must();
    let (_folder, local) = local_folder();
    let (raw, image) = (local.join("raw"), local.join("disk"));
    make_ext4(&raw, DISK_BYTES).must();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", name(&raw), name(&image)]);
    site.put(&image, &site.path("disk"), 0o644).must();
    let drive = format!("-drive file={},if=virtio,format=qcow2,id=d", site.path("disk"));
    let machine = Machine::builder(&site, "restarts").vcpus(2).option(&drive);
    let mut machine = machine.option("--restart-budget 1000/60").start().must();
    machine.expect("guest: up", BOOT).must();
    machine.expect("guest# ", SOON).must();
    machine.shell("guest-churn start", SOON).must();
    machine.shell("guest-churn wait 2", SOON).must();

    let mut times: [Vec<u64>; STEPS.len()] = Default::default();
    for number in 1..=kills {
        site.run("kill -9 $(pidof block-proc)").ok();
        let restarted = machine.qmp.event("BULKHEAD_HELPER_RESTARTED", SOON).must();
        for (step, times) in STEPS.iter().zip(&mut times) {
            let microseconds = restarted["data"][step].as_u64();
            times.push(microseconds.unwrap_or_else(|| panic!("no {step}: {restarted}")));
        }
        // It is at different places of its work: now between two files, now in the middle of one.
        if number % 3 == 0 {
            machine.shell("guest-churn wait 1", SOON).must();
        }
    }
    let status: Value = machine.qmp.command("query-status", serde_json::json!({})).must();
    assert_eq!(status["status"], "running", "{status}");
    assert_eq!(status["helper-restarts"], kills, "{status}");

    let written = machine.shell("guest-churn wait 4", SOON).must();
    assert!(written.contains("churn: "), "{written}");
    let report = machine.shell("guest-churn end", SOON).must();
    assert!(report.contains("all as logged"), "{report}");
    let complaints = machine.shell(
        "dmesg | grep -iE 'i/o error|vda.*error|EXT4-fs (error|warning)|blocked for more'; true",
        SOON,
    );
    let complaints = complaints.must();
    assert!(
        !complaints.to_lowercase().contains("error"),
        "the guest has noticed: {complaints}"
    );
    machine.console.send("guest-poweroff\n").must();
    machine.qmp.event("SHUTDOWN", SOON).must();
    assert_eq!(machine.end(SOON).must().status, 0);

    site.get(&site.path("disk"), &image).must();
    // What was being taken for a write that was not answered yet may be leaked (docs/RESTARTS.md), and nothing else is wrong.
    qemu_img(&["check", "-q", "-r", "leaks", name(&image)]);
    qemu_img(&["check", "-q", name(&image)]);
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", name(&image), name(&raw)]);
    assert_clean(&raw);
    let sums: Vec<(&str, &str)> = report
        .lines()
        .filter_map(|line| line.trim().strip_prefix("churn: ")?.split_once(' '))
        .filter(|(_, sum)| sum.len() == 64)
        .collect();
    // As many as the machine was fast enough for, until old ones are written over.
    assert!(sums.len() >= 4, "{report}");
    for (file, sum) in sums {
        assert_eq!(sha256_of_file_in(&raw, &format!("/{file}"), &local), sum, "file {file}");
    }
    print_distribution(&mut times);
}

/// A table of what each step took.
fn print_distribution(times: &mut [Vec<u64>; STEPS.len()]) {
    println!("\n| step (ms) | min | median | 90 % below | max |\n|---|---|---|---|---|");
    for (step, times) in STEPS.iter().zip(times) {
        times.sort_unstable();
        let at = |part: usize| times[(times.len() - 1) * part / 100] as f64 / 1000.0;
        let name = step.trim_end_matches("-us");
        println!(
            "| {name} | {:.1} | {:.1} | {:.1} | {:.1} |",
            at(0),
            at(50),
            at(90),
            at(100)
        );
    }
}
