//! Rows about memory dumps: both programs dump the very same memory. Bulkhead's memory fd, filled from outside, is QEMU's
//! memory as well; both machines are stopped from the start, so nobody changes it. That takes root.
//!
//! `BULKHEAD_BENCH_DUMP_MIB` is the size of the guest, `BULKHEAD_BENCH_DUMP_PAIRS` how often each row is measured,
//! `BULKHEAD_BENCH_DUMP_FORMATS` some of the formats (`elf kdump-zlib`), `BULKHEAD_BENCH_DUMP_DISK` a directory on a disk, or
//! nothing for no rows about that.

#[path = "dumps/content.rs"]
mod content;

use super::PAIRS_OF_LOAD;
use super::peers::{family, qemu};
use super::report::Report;
use bulkhead_tests::load::{RawClient, percentile, request};
use bulkhead_tests::machine::programs;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, procfs};
use serde_json::json;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Where files are in memory.
const TMPFS: &str = "/dev/shm";
/// What one write of the plain copy takes, bytes.
const COPY_BYTES: usize = 1 << 20;

/// What is measured: the row's name, Bulkhead's arguments, and QEMU's format.
const CASES: &[(&str, &str, Option<&str>, &str)] = &[
    ("elf", "elf", None, "elf"),
    ("kdump-zlib, fast", "kdump-zlib", Some("fast"), "kdump-zlib"),
    ("kdump-zlib, small", "kdump-zlib", Some("small"), "kdump-zlib"),
    ("kdump-lzo", "kdump-lzo", None, "kdump-lzo"),
    ("kdump-snappy", "kdump-snappy", None, "kdump-snappy"),
    ("kdump-zstd", "kdump-zstd", None, "kdump-zstd"),
];

/// Where files are.
const TARGETS: [&str; 2] = ["tmpfs", "disk"];
const BESIDE: &str = "query-status on another monitor during kdump-zlib, 99 % below (ms)";

fn copy_name(target: &str) -> String {
    format!("plain copy to {target} (MB/s)")
}

/// The rows of a format.
fn row_names(name: &str, target: &str) -> [String; 4] {
    [
        "guest memory per second (MB/s)",
        "processor time (ms)",
        "the file (MB)",
        "what of it is not hole (MB)",
    ]
    .map(|what| format!("{name} to {target}, {what}"))
}

/// A stopped machine.
struct Stopped {
    child: Child,
    qmp: Qmp,
    directory: tempfile::TempDir,
}

/// What one dump took.
#[derive(Clone, Copy)]
struct Taken {
    wall: Duration,
    processor: Duration,
    /// Of the file, and what of it is really there, bytes.
    bytes: (u64, u64),
}

impl Stopped {
    fn start(mut command: Command) -> Self {
        let directory = tempfile::tempdir().expect("scratch directory");
        for name in ["qmp", "other"] {
            let path = directory.path().join(name);
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", path.display())]);
        }
        command.args(["-nodefaults", "-display", "none", "-smp", "2", "-S"]);
        let child = command.stdin(Stdio::null()).spawn().expect("starting");
        let start = Instant::now();
        let qmp = loop {
            match Qmp::connect(&directory.path().join("qmp")) {
                Ok(qmp) => break qmp,
                Err(error) => assert!(start.elapsed() < Duration::from_secs(30), "no monitor: {error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        Self { child, qmp, directory }
    }

    fn formats(&mut self) -> Vec<String> {
        let reply = self.qmp.run("query-dump-guest-memory-capability");
        let formats = reply["formats"].as_array().into_iter().flatten();
        formats.filter_map(|name| Some(name.as_str()?.to_owned())).collect()
    }

    /// From the command to DUMP_COMPLETED. The file is gone afterwards.
    fn dump(&mut self, path: &Path, format: &str, compression: Option<&str>) -> Taken {
        let pid = self.child.id() as i32;
        let protocol = format!("file:{}", path.display());
        let mut arguments = json!({"paging": false, "protocol": protocol, "format": format, "detach": true});
        if let Some(compression) = compression {
            arguments["compression"] = compression.into();
        }
        let (before, processes) = (processor_time(pid), family(pid).len());
        let start = Instant::now();
        self.qmp.execute("dump-guest-memory", arguments);
        let event = loop {
            let event = self.qmp.event();
            if event["event"] == "DUMP_COMPLETED" {
                break event;
            }
        };
        let wall = start.elapsed();
        assert_eq!(event["data"]["result"]["status"], "completed", "{event}");
        // A process's time is its parent's when it is gone.
        while family(pid).len() > processes {
            std::thread::sleep(Duration::from_millis(1));
        }
        let processor = processor_time(pid).saturating_sub(before);
        let about = std::fs::metadata(path).expect("the dump");
        std::fs::remove_file(path).expect("removing the dump");
        Taken {
            wall,
            processor,
            bytes: (about.len(), about.blocks() * 512),
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// User's and system's time of a process and its children, those that have ended included.
fn processor_time(pid: i32) -> Duration {
    let of = |pid: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
        let numbers = fields.split(' ').skip(11).take(4);
        numbers.filter_map(|ticks| ticks.parse::<u64>().ok()).sum::<u64>()
    };
    // USER_HZ is 100 on x86-64.
    Duration::from_millis(10 * family(pid).into_iter().map(of).sum::<u64>())
}

/// The path of guest RAM among the supervisor's descriptors.
fn memory_of(pid: i32, bytes: u64) -> Option<PathBuf> {
    procfs::descriptors(pid).into_iter().find_map(|(number, what)| {
        let path = PathBuf::from(format!("/proc/{pid}/fd/{number}"));
        let is_ram = what.starts_with("/memfd:") && path.metadata().is_ok_and(|about| about.len() == bytes);
        is_ram.then_some(path)
    })
}

fn setting(name: &str) -> Option<String> {
    std::env::var(format!("BULKHEAD_BENCH_DUMP_{name}")).ok()
}

fn number(name: &str, usual: u64) -> u64 {
    setting(name).map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{name}: {text}")))
}

/// What the target takes when nothing is done but reading and writing, by as many threads as there are processors.
fn plain_copy(memory: &File, path: &Path, bytes: u64) -> Duration {
    use std::os::unix::fs::OpenOptionsExt;
    let open = |flags| {
        let mut options = File::options();
        options.write(true).create(true).truncate(true).custom_flags(flags);
        options.open(path)
    };
    let output = open(libc::O_DIRECT).or_else(|_| open(0)).expect("a file");
    let next = AtomicU64::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                // Aligned as O_DIRECT wants it.
                let mut room = vec![0; COPY_BYTES + 4096];
                let skip = room.as_ptr().align_offset(4096);
                let buffer = &mut room[skip..skip + COPY_BYTES];
                loop {
                    let offset = next.fetch_add(COPY_BYTES as u64, Ordering::Relaxed);
                    if offset >= bytes {
                        return;
                    }
                    memory.read_exact_at(buffer, offset).expect("reading");
                    output.write_all_at(buffer, offset).expect("writing");
                }
            });
        }
    });
    let taken = start.elapsed();
    std::fs::remove_file(path).expect("removing the copy");
    taken
}

/// Measures all rows.
pub fn rows(report: &mut Report) {
    let wanted = setting("FORMATS");
    let is_wanted = |format: &str| {
        let listed = |wanted: &String| wanted.split(' ').any(|one| one == format);
        wanted.as_ref().is_none_or(listed)
    };
    let all = TARGETS.iter().flat_map(|target| {
        let cases = CASES.iter().flat_map(|case| row_names(case.0, target));
        cases.chain([copy_name(target)])
    });
    if !report.wants_any(&all.chain([BESIDE.to_owned()]).collect::<Vec<_>>()) {
        return;
    }
    let bytes = number("MIB", 1024) << 20;
    let pairs = number("PAIRS", PAIRS_OF_LOAD as u64) as usize;
    let mut command = Command::new(programs().join("bulkhead"));
    command
        .args(["-m", &(bytes >> 20).to_string(), "-kernel"])
        .arg(guest::image());
    let mut ours = Stopped::start(command);
    let memory = memory_of(ours.child.id() as i32, bytes).and_then(|path| {
        let file = File::options().read(true).write(true).open(&path).ok()?;
        Some((path, file))
    });
    let Some((path, memory)) = memory else {
        println!("\nno rows about dumps: filling a guest's memory from outside takes root.");
        return;
    };
    let (zeroes, kinds) = content::fill(&memory, bytes);
    let mut theirs = report.peer().map(|_| {
        let mut command = Command::new(qemu());
        command.args(["-M", "q35,memory-backend=ram", "-accel", "kvm", "-m"]);
        command.arg((bytes >> 20).to_string()).arg("-object");
        let backend = format!(
            "memory-backend-file,id=ram,size={bytes},share=on,mem-path={}",
            path.display()
        );
        command.arg(backend);
        Stopped::start(command)
    });
    let has = theirs.as_mut().map(Stopped::formats).unwrap_or_default();
    let disk = setting("DISK").map_or_else(std::env::temp_dir, PathBuf::from);
    let mut targets: Vec<_> = TARGETS.into_iter().zip([PathBuf::from(TMPFS), disk]).collect();
    targets.retain(|(_, directory)| !directory.as_os_str().is_empty());
    let rate = |taken: Duration| bytes as f64 / 1e6 / taken.as_secs_f64();
    for (target, directory) in &targets {
        let path = directory.join(format!("bulkhead-bench-{}", std::process::id()));
        if report.wants(&copy_name(target)) {
            let copy = |_| rate(plain_copy(&memory, &path, bytes));
            let limits: Vec<f64> = (0..=pairs).map(copy).skip(1).collect();
            report.row(&copy_name(target), &limits, &[]);
        }
        for (name, format, compression, their_format) in CASES {
            let names = row_names(name, target);
            if !is_wanted(format) || !report.wants_any(&names) {
                continue;
            }
            let (mut our, mut their) = (Vec::new(), Vec::new());
            for run in 0..=pairs {
                let our_run = ours.dump(&path, format, *compression);
                let peer = theirs.as_mut().filter(|_| has.iter().any(|has| has == their_format));
                let their_run = peer.map(|peer| peer.dump(&path, their_format, None));
                if run > 0 {
                    our.push(our_run);
                    their.extend(their_run);
                }
            }
            let values: [&dyn Fn(&Taken) -> f64; 4] = [
                &|taken| rate(taken.wall),
                &|taken| taken.processor.as_secs_f64() * 1e3,
                &|taken| taken.bytes.0 as f64 / 1e6,
                &|taken| taken.bytes.1 as f64 / 1e6,
            ];
            for (name, value) in names.iter().zip(values) {
                let values = |runs: &[Taken]| runs.iter().map(value).collect::<Vec<f64>>();
                report.row(name, &values(&our), &values(&their));
            }
        }
    }
    if report.wants(BESIDE) {
        beside(report, &mut ours, theirs.as_mut(), &targets[0].1);
    }
    println!(
        "\nThe guest has {} MiB, {} % of the pages are zero: {kinds}.",
        bytes >> 20,
        zeroes * 100 / (bytes >> 12)
    );
}

/// How long another monitor takes to answer during a dump.
fn beside(report: &mut Report, ours: &mut Stopped, theirs: Option<&mut Stopped>, directory: &Path) {
    let path = directory.join(format!("bulkhead-bench-{}", std::process::id()));
    let measure = |machine: &mut Stopped| {
        let socket = machine.directory.path().join("other");
        let mut client = RawClient::connect(&socket).expect("the other monitor");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let client = scope.spawn(|| {
                let query = request("query-status");
                let mut times = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    let asked = Instant::now();
                    client.round_trip(&query).expect("query-status");
                    times.push(asked.elapsed());
                    // A client that asks now and then, not one that keeps a processor busy.
                    std::thread::sleep(Duration::from_millis(1));
                }
                percentile(&mut times, 0.99).as_secs_f64() * 1e3
            });
            machine.dump(&path, "kdump-zlib", None);
            over.store(true, Ordering::Relaxed);
            client.join().expect("the client")
        })
    };
    let (ours, theirs) = (measure(ours), theirs.map(measure));
    let theirs: Vec<f64> = theirs.into_iter().collect();
    report.row(BESIDE, &[ours], &theirs);
}
