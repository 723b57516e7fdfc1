//! Rows about a guest beside jobs: how much of its speed is left while its disk is backed up or mirrored without a limit,
//! how fast the job is meanwhile, and how long queries of another client take.

use super::jobs::{self, Format, Place};
use super::peers::{Peer, Started};
use super::report::Report;
use super::{PAIRS_OF_LOAD, disk, monitor};
use bulkhead_tests::guest;
use bulkhead_tests::images::name;
use bulkhead_tests::load::RawClient;
use bulkhead_tests::qmp::Qmp;
use serde_json::json;
use std::io::BufReader;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

/// What is done to the guest's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Job {
    Backup,
    Mirror,
}

impl Job {
    const ALL: [(Self, &'static str); 2] = [(Self::Backup, "backup"), (Self::Mirror, "mirror")];

    fn command(self) -> &'static str {
        match self {
            Self::Backup => "blockdev-backup",
            Self::Mirror => "blockdev-mirror",
        }
    }
}

/// How many requests the guest has: beside a job, QEMU's has some hundred a second.
fn requests(peer: Peer, job: Option<Job>) -> usize {
    match (job, peer) {
        (None, _) => 50_000,
        (Some(_), Peer::Bulkhead) => 20_000,
        (Some(_), _) => 1_500,
    }
}

/// What the guest does.
const LOADS: [(&str, &str); 2] = [("randread", "4 KiB random reads"), ("randwrite", "4 KiB random writes")];

/// A job of one disk, again and again, on a monitor of its own.
struct Again {
    stop: Arc<AtomicBool>,
    /// What the jobs have copied that are over.
    bytes: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Again {
    /// Begins the first one.
    fn start(mut qmp: Qmp, job: Job, id: &'static str, device: &str, target: &str) -> Self {
        let arguments = json!({"job-id": id, "device": device, "target": target, "sync": "full"});
        let begin = move |qmp: &mut Qmp| qmp.execute(job.command(), arguments.clone());
        begin(&mut qmp);
        let stop = Arc::new(AtomicBool::new(false));
        let bytes = Arc::new(AtomicU64::new(0));
        let (stopped, copied) = (Arc::clone(&stop), Arc::clone(&bytes));
        let thread = std::thread::spawn(move || {
            loop {
                let event = qmp.event();
                let data = &event["data"];
                match event["event"].as_str() {
                    Some("BLOCK_JOB_READY") => {
                        copied.fetch_add(data["offset"].as_u64().unwrap_or(0), Ordering::Relaxed);
                        // Who ends it all may have done so by now.
                        let _ = qmp.try_execute("block-job-cancel", json!({"device": id, "force": true}));
                    }
                    Some("BLOCK_JOB_COMPLETED") if job == Job::Backup => {
                        copied.fetch_add(data["offset"].as_u64().unwrap_or(0), Ordering::Relaxed);
                    }
                    // It is gone, and its nodes are free.
                    Some("JOB_STATUS_CHANGE") if data["id"] == id && data["status"] == "null" => {
                        if stopped.load(Ordering::Relaxed) {
                            return;
                        }
                        begin(&mut qmp);
                    }
                    _ => {}
                }
            }
        });
        Self { stop, bytes, thread }
    }

    /// What was copied so far, by what another client sees.
    fn progress(&self, qmp: &mut Qmp) -> u64 {
        let before = self.bytes.load(Ordering::Relaxed);
        let jobs = qmp.run("query-block-jobs");
        before + jobs[0]["offset"].as_u64().unwrap_or(0)
    }

    /// Ends it.
    fn end(self, qmp: &mut Qmp) {
        self.stop.store(true, Ordering::Relaxed);
        let jobs = qmp.run("query-block-jobs");
        for job in jobs.as_array().into_iter().flatten() {
            // It may be over by now.
            let _ = qmp.try_execute("block-job-cancel", json!({"device": job["device"], "force": true}));
        }
        self.thread.join().expect("the client of the jobs");
    }
}

/// What was measured of a guest.
struct Measured {
    /// Requests per second.
    rate: f64,
    /// 99 % of its requests took less, µs.
    slowest: f64,
    /// What was copied meanwhile, MiB/s.
    copied: f64,
}

fn measure(peer: Peer, format: Format, load: &str, job: Option<Job>, folder: &Path) -> Measured {
    let requests = requests(peer, job);
    let mut command = peer.machine();
    if peer == Peer::Bulkhead {
        command.arg("-allow-path").arg(folder);
    }
    let old = if peer == Peer::Qemu { "disable-legacy=on," } else { "" };
    let source = jobs::source(folder, format);
    let drive = format!(
        "if=none,id=d,format={},file={},cache=none,aio=io_uring,discard=unmap",
        format.name(),
        name(&source)
    );
    command
        .args(["-nodefaults", "-display", "none", "-m", "256", "-S", "-serial", "stdio"])
        .args(["-drive", &drive, "-device"])
        .arg(format!("virtio-blk-pci,{old}drive=d,num-queues=1"))
        .arg("-kernel")
        .arg(guest::image())
        .arg("-append")
        .arg(format!("test=bench rw={load} bs=4096 qd=32 ops={requests} test=spin"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let target = folder.join("target");
    jobs::make_empty(&target, format, jobs::IMAGE_MIB);
    let scratch = tempfile::tempdir().expect("scratch directory");
    let mut machine = Started::launch(command, scratch, &["admin", "jobs"]);
    let again = job.map(|job| {
        let mut qmp = Qmp::connect(&machine.socket("jobs")).expect("a second monitor");
        qmp.execute("blockdev-add", jobs::node("target", &target, format, Place::Disk));
        Again::start(qmp, job, "job", "d", "target")
    });
    machine.qmp.run("cont");
    let begun = Instant::now();
    let before = again.as_ref().map_or(0, |again| again.progress(&mut machine.qmp));
    // Kept to the end, which is not the guest's: it spins.
    let mut serial = BufReader::new(machine.child.stdout.take().expect("a pipe"));
    let said = disk::report_of(&mut serial);
    let taken = begun.elapsed().as_secs_f64();
    let after = again.as_ref().map_or(0, |again| again.progress(&mut machine.qmp));
    if let Some(again) = again {
        again.end(&mut machine.qmp);
    }
    machine.end();
    Measured {
        rate: disk::number(&said, "bench", "iops"),
        slowest: disk::number(&said, "bench-latency", "p99_ns") / 1e3,
        copied: after.saturating_sub(before) as f64 / taken / f64::from(1 << 20),
    }
}

/// The rows of a load: alone, and three beside each job.
fn names(format: Format, load: &str) -> Vec<String> {
    let what = format!("{}, {load}", format.name());
    let beside = Job::ALL.iter().flat_map(|(_, word)| {
        [
            format!("{what} beside a {word}, of those alone (%)"),
            format!("{what} beside a {word}, 99 % below (µs)"),
            format!("{what} beside a {word}, copied meanwhile (MiB/s)"),
        ]
    });
    [format!("{what} alone, 99 % below (µs)")]
        .into_iter()
        .chain(beside)
        .collect()
}

/// One load alone and beside each job, in the order of [`names`].
fn run(peer: Peer, format: Format, load: &str, folder: &Path) -> Vec<f64> {
    let alone = measure(peer, format, load, None, folder);
    let mut values = vec![alone.slowest];
    for (job, _) in Job::ALL {
        let beside = measure(peer, format, load, Some(job), folder);
        values.extend([beside.rate / alone.rate * 100.0, beside.slowest, beside.copied]);
    }
    values
}

/// The slowest percent (ms) of a client's queries while a disk is backed up and another is mirrored.
fn measure_queries(peer: Peer, queries: &[Vec<u8>], folder: &Path) -> std::io::Result<f64> {
    let mut machine = peer.start_bare(folder, &["admin", "backup", "mirror", "client"]);
    let running = Job::ALL.map(|(job, word)| {
        let mut qmp = Qmp::connect(&machine.socket(word)).expect("a monitor");
        let target = folder.join(word);
        jobs::make_empty(&target, Format::Qcow2, jobs::IMAGE_MIB);
        let format = if job == Job::Backup { Format::Raw } else { Format::Qcow2 };
        let nodes = [format!("{word}-source"), format!("{word}-target")];
        qmp.execute(
            "blockdev-add",
            jobs::node(&nodes[0], &jobs::source(folder, format), format, Place::Memory),
        );
        qmp.execute(
            "blockdev-add",
            jobs::node(&nodes[1], &target, Format::Qcow2, Place::Memory),
        );
        Again::start(qmp, job, word, &nodes[0], &nodes[1])
    });
    let mut client = RawClient::connect(&machine.socket("client"))?;
    let slowest = monitor::slowest_percent(&mut client, queries)?;
    for again in running {
        again.end(&mut machine.qmp);
    }
    machine.end();
    Ok(slowest)
}

/// Measures the row about queries.
pub fn query_rows(report: &mut Report) {
    let name = "any query while one disk is backed up and another mirrored, 99 % below (ms)";
    if !report.wants(name) {
        return;
    }
    let folder = Place::Memory.folder();
    jobs::make_sources(folder.path(), true);
    let queries = monitor::queries();
    let (ours, theirs) = report.pairs(PAIRS_OF_LOAD, |peer| {
        let slowest = measure_queries(peer, &queries, folder.path());
        slowest.unwrap_or_else(|error| panic!("{peer:?}: {error}"))
    });
    report.row(name, &ours, &theirs);
}

/// Measures the rows about a guest.
pub fn guest_rows(report: &mut Report) {
    let wants = |format, load| report.wants_any(&names(format, load));
    let all = [Format::Raw, Format::Qcow2].map(|format| LOADS.map(|load| (format, load)));
    let wanted: Vec<_> = all
        .into_iter()
        .flatten()
        .filter(|(format, load)| wants(*format, load.1))
        .collect();
    if wanted.is_empty() {
        return;
    }
    let folder = Place::Disk.folder();
    jobs::make_sources(folder.path(), true);
    for (format, load) in wanted {
        let (ours, theirs) = report.pairs(PAIRS_OF_LOAD, |peer| run(peer, format, load.0, folder.path()));
        for (place, name) in names(format, load.1).iter().enumerate() {
            let values = |runs: &[Vec<f64>]| runs.iter().map(|run| run[place]).collect::<Vec<_>>();
            report.row(name, &values(&ours), &values(&theirs));
        }
    }
}
