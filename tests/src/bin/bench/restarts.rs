//! Rows about block-proc's restart: how long a guest that reads and writes is not served when block-proc is killed. No other
//! program has anything to put beside it: there the machine is gone.

use super::report::Report;
use bulkhead_tests::guest;
use bulkhead_tests::images::qcow2;
use bulkhead_tests::machine::Machine;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

/// Kills of each kind.
const KILLS: usize = 50;
/// What the event says of each, and what to call it.
const STEPS: [(&str, &str); 5] = [
    ("pause-us", "the guest is not served"),
    ("fence-us", "until the kernel has put the dead one away"),
    ("spawn-us", "start"),
    ("rebuild-us", "making the graph again"),
    ("replay-us", "doing again what was under way"),
];

/// Measures all rows.
pub fn rows(report: &mut Report) {
    for engine in ["io_uring", "threads"] {
        let name = |what: &str| format!("block-proc killed, aio={engine}: {what} (ms)");
        if !report.wants_any(&STEPS.map(|(_, what)| name(what))) {
            continue;
        }
        let directory = tempfile::tempdir().expect("scratch directory");
        qcow2(&directory.path().join("disk"), "256M", None);
        let arguments = format!(
            "-m 128 -smp 2 -kernel {} --restart-budget 100000/60 \
             -drive file={{dir}}/disk,if=virtio,format=qcow2,id=d,num-queues=4,aio={engine}",
            guest::image().display()
        );
        let orders = "test=bench rw=randrw bs=4096 qd=8 queues=4 ops=1000000000";
        let mut machine = Machine::start_with(directory, &arguments, &["-append", orders]);
        let mut qmp = machine.qmp();
        let mut steps: [Vec<f64>; STEPS.len()] = Default::default();
        for _ in 0..KILLS {
            kill(Pid::from_raw(machine.helper("block-proc")), Signal::SIGKILL).expect("block-proc");
            let event = qmp.wait_event("BULKHEAD_HELPER_RESTARTED");
            for (values, (key, _)) in steps.iter_mut().zip(STEPS) {
                values.push(event[key].as_f64().expect("a duration") / 1e3);
            }
        }
        qmp.execute("quit", json!({}));
        machine.wait();
        for (values, (_, what)) in steps.iter().zip(STEPS) {
            report.row(&name(what), values, &[]);
        }
    }
}
