//! Each channel in both directions: what a helper that was taken over says to the supervisor, and what a supervisor says to
//! helpers. `BULKHEAD_FUZZ_SECONDS=600 tests/fuzz/run ipc vcpu-proc` runs one of them for longer.

use bulkhead_tests::intruder::victim::Victim;
use bulkhead_tests::intruder::{onto_helper, onto_supervisor};
use bulkhead_tests::{need_kvm, need_root};
use std::time::{Duration, Instant};

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(otherwise)
}

/// The seed and the end of a run.
fn run() -> (u64, Instant) {
    let seconds = number("BULKHEAD_FUZZ_SECONDS", 3);
    (
        number("BULKHEAD_FUZZ_SEED", 1),
        Instant::now() + Duration::from_secs(seconds),
    )
}

fn onto_supervisor(victim: Victim) {
    need_kvm!();
    need_root!();
    let (seed, until) = run();
    let count = onto_supervisor::run(victim, seed, until);
    println!("{} -> supervisor: {count:?}", victim.name());
    let said = count.said.unasked + count.said.answers + count.said.malformed;
    assert!(count.victims > 0 && said > 0, "{count:?}");
}

fn onto_helper(victim: Victim) {
    need_kvm!();
    need_root!();
    let (seed, until) = run();
    let count = onto_helper::run(victim, seed, until);
    println!("supervisor -> {}: {count:?}", victim.name());
    assert!(count.messages > 0, "{count:?}");
}

macro_rules! channels {
    ($($supervisor:ident $helper:ident $victim:ident),*) => {$(
        #[test]
        fn $supervisor() {
            onto_supervisor(Victim::$victim);
        }

        #[test]
        fn $helper() {
            onto_helper(Victim::$victim);
        }
    )*};
}

channels! {
    the_supervisor_goes_on_whatever_vcpu_proc_says vcpu_proc_answers_or_ends_whatever_the_supervisor_says Vcpu,
    the_supervisor_goes_on_whatever_block_proc_says block_proc_answers_or_ends_whatever_the_supervisor_says Block,
    the_supervisor_goes_on_whatever_dump_proc_says dump_proc_answers_or_ends_whatever_the_supervisor_says Dump,
    the_supervisor_goes_on_whatever_qmp_proc_says qmp_proc_answers_or_ends_whatever_the_supervisor_says Qmp,
    the_supervisor_goes_on_whatever_the_opener_says the_opener_answers_or_ends_whatever_the_supervisor_says Opener,
    the_supervisor_goes_on_whatever_the_launcher_says the_launcher_answers_or_ends_whatever_the_supervisor_says Launcher
}
