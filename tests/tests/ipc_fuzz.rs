//! Each channel in both directions: what a helper that was taken over says to the supervisor, and what a supervisor says to
//! helpers. `BULKHEAD_FUZZ_SECONDS=600 tests/fuzz/run ipc vcpu-proc` runs one of them for longer.

use bulkhead_tests::intruder::onto_supervisor;
use bulkhead_tests::intruder::victim::Victim;
use bulkhead_tests::{need_kvm, need_root};
use std::time::{Duration, Instant};

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

fn onto_supervisor(victim: Victim) {
    need_kvm!();
    need_root!();
    let seed = number("BULKHEAD_FUZZ_SEED", 1);
    let until = Instant::now() + Duration::from_secs(number("BULKHEAD_FUZZ_SECONDS", 3));
    let count = onto_supervisor::run(victim, seed, until);
    println!("{} -> supervisor: {count:?}", victim.name());
    assert!(count.victims > 0 && count.said.unasked + count.said.answers > 0, "{count:?}");
}

#[test]
fn the_supervisor_goes_on_whatever_vcpu_proc_says() {
    onto_supervisor(Victim::Vcpu);
}

#[test]
fn the_supervisor_goes_on_whatever_block_proc_says() {
    onto_supervisor(Victim::Block);
}

#[test]
fn the_supervisor_goes_on_whatever_dump_proc_says() {
    onto_supervisor(Victim::Dump);
}

#[test]
fn the_supervisor_goes_on_whatever_qmp_proc_says() {
    onto_supervisor(Victim::Qmp);
}

#[test]
fn the_supervisor_goes_on_whatever_the_opener_says() {
    onto_supervisor(Victim::Opener);
}

#[test]
fn the_supervisor_goes_on_whatever_the_launcher_says() {
    onto_supervisor(Victim::Launcher);
}
