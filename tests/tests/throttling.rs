//! Limits of disks' I/O, held against what the guest gets. The guest keeps many requests in flight and looks for completions
//! by itself.

use bulkhead_tests::machine::Machine;
use bulkhead_tests::{guest, need_kvm};
use serde_json::json;

/// Requests per second of a run of the guest's benchmark.
fn rate(drive: &str, load: &str, before: impl FnOnce(&mut Machine)) -> f64 {
    let directory = tempfile::tempdir().unwrap();
    std::fs::File::create(directory.path().join("disk"))
        .and_then(|file| file.set_len(64 << 20))
        .unwrap();
    let arguments = format!(
        "-m 256 -S -no-reboot -kernel {} -drive file={{dir}}/disk,if=virtio,format=raw,id=d,num-queues=1{drive}",
        guest::image().display()
    );
    let append = format!("test=bench {load}");
    let mut machine = Machine::start_with(directory, &arguments, &["-append", &append]);
    before(&mut machine);
    machine.qmp().run("cont");
    assert!(machine.wait().success(), "{}", machine.log());
    let serial = machine.serial();
    let rate = guest::value(&serial, "bench", "iops").and_then(|rate| rate.parse().ok());
    rate.unwrap_or_else(|| panic!("{serial}"))
}

#[track_caller]
fn assert_within(rate: f64, expected: f64) {
    let difference = (rate - expected).abs() / expected;
    assert!(difference <= 0.05, "{rate} instead of {expected}");
}

/// Ten seconds' worth; a tenth of a second's is free at the start.
#[test]
fn a_limit_of_requests_is_held_for_ten_seconds() {
    need_kvm!();
    let load = "rw=randrw bs=4096 qd=32 ops=10000";
    assert_within(rate(",throttling.iops-total=1000", load, |_| ()), 1000.0);
}

#[test]
fn a_limit_of_bytes_is_held_for_ten_seconds() {
    need_kvm!();
    let limits = |machine: &mut Machine| {
        let mut limits = json!({"device": "d", "bps": 0, "bps_rd": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0});
        limits["bps_wr"] = (20 << 20).into();
        machine.qmp().execute("block_set_io_throttle", limits);
    };
    // 320 of 64 KiB are 20 MiB.
    let load = "rw=randwrite bs=65536 qd=32 ops=3200";
    assert_within(rate("", load, limits), 320.0);
}

/// 3 seconds at 1,000 and the rest at 200.
#[test]
fn a_burst_has_its_rate_for_its_length() {
    need_kvm!();
    let limits = ",throttling.iops-total=200,throttling.iops-total-max=1000,throttling.iops-total-max-length=3";
    let load = "rw=randread bs=4096 qd=16 ops=4000";
    // The bucket of a burst holds 3,000 beyond what leaks from it: 3,750 are through after 3.75 seconds, the last 250 after
    // 1.25 more.
    assert_within(rate(limits, load, |_| ()), 4000.0 / 5.0);
}
