//! `make bench`, `make bench ROWS="start growth"` with some groups of rows, or `make bench ROW=TEXT` with the rows that have the
//! text in their names: Bulkhead and a peer in turn on the same work in the same run. Prints Markdown tables; BULKHEAD_BENCH_PAGE
//! names the page that gets them as well.
//!
//! A group is a module of its own, or one of its functions; `start` is here: how long from exec until the monitor answers (in
//! Bulkhead that is after all helper processes are sealed and verified, and the kernel is loaded), and what a machine takes.

mod beside;
mod disk;
mod dumps;
mod filters;
mod growth;
mod jobs;
mod microvms;
mod monitor;
mod peers;
mod report;
mod restarts;

use peers::{Peer, Started, family, memory_mib};
use report::Report;
use std::time::Duration;

/// Pairs of runs after one for warming up.
const PAIRS: usize = 10;
/// Pairs of runs of the rows which take longer.
const PAIRS_OF_LOAD: usize = 5;

/// A group's name, what is beside Bulkhead, and what measures it.
type Group = (&'static str, Option<Peer>, fn(&mut Report));

const GROUPS: [Group; 17] = [
    ("start", Some(Peer::Qemu), start_rows),
    ("growth", Some(Peer::Qemu), growth::rows),
    ("microvm", Some(Peer::Microvm), microvms::rows),
    ("firecracker", Some(Peer::Firecracker), microvms::rows),
    ("monitor", Some(Peer::Qemu), monitor::rows),
    ("disk", Some(Peer::Qemu), disk::rows),
    ("depths", Some(Peer::Qemu), disk::depth_rows),
    ("engines", Some(Peer::Qemu), disk::engine_rows),
    ("chains", Some(Peer::Qemu), disk::chain_rows),
    ("filters", Some(Peer::Unfiltered), filters::rows),
    ("restarts", None, restarts::rows),
    ("jobs", Some(Peer::Qemu), jobs::rows),
    ("storage-daemon", Some(Peer::StorageDaemon), jobs::rows),
    ("images", Some(Peer::Img), jobs::rows),
    ("beside", Some(Peer::Qemu), beside::guest_rows),
    ("queries", Some(Peer::Qemu), beside::query_rows),
    ("dumps", Some(Peer::Qemu), dumps::rows),
];

fn main() {
    if let Some(reason) = bulkhead_tests::machine::kvm_missing() {
        println!("no rows: {reason}");
        return;
    }
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let unknown = wanted.iter().find(|name| GROUPS.iter().all(|group| group.0 != **name));
    if let Some(name) = unknown {
        let names = GROUPS.map(|group| group.0).join(" ");
        eprintln!("bench: there are no rows \"{name}\"; there are: {names}");
        std::process::exit(2);
    }
    let only = std::env::var("ROW").unwrap_or_default();
    let mut report = Report::new(only, std::env::var_os("BULKHEAD_BENCH_PAGE").map(Into::into));
    for (name, peer, measure) in GROUPS {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            report.group(name, peer, measure);
        }
    }
}

/// A started monitor, and what was measured of it.
struct Run {
    ready: Duration,
    memory_mib: f64,
    processes: usize,
}

fn start_rows(report: &mut Report) {
    type Value = fn(&Run) -> f64;
    let values: [(&str, Value); 3] = [
        ("exec to monitor ready, all sealed, kernel loaded (ms)", |run| {
            run.ready.as_secs_f64() * 1e3
        }),
        ("memory beside guest RAM, PSS of all processes (MiB)", |run| {
            run.memory_mib
        }),
        ("processes", |run| run.processes as f64),
    ];
    if !report.wants_any(&values.map(|(name, _)| name)) {
        return;
    }
    let (ours, theirs) = report.pairs(PAIRS, |peer| {
        let machine = peer.start(&["qmp"]);
        let run = Run::of(&machine);
        machine.end();
        run
    });
    for (name, value) in values {
        let values = |runs: &[Run]| runs.iter().map(value).collect::<Vec<f64>>();
        report.row(name, &values(&ours), &values(&theirs));
    }
}

impl Run {
    fn of(machine: &Started) -> Self {
        // The next spare monitor process belongs to what an idle machine costs.
        std::thread::sleep(Duration::from_millis(300));
        let pid = machine.child.id() as i32;
        Self {
            ready: machine.ready,
            memory_mib: memory_mib(pid),
            processes: family(pid).len(),
        }
    }
}
