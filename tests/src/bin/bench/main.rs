//! `make bench`, or `make bench ROWS="start growth monitor disk depths engines chains dumps jobs beside queries"` with some of them:
//! Bulkhead and QEMU in turn on the same work in the same run; prints a Markdown table.
//!
//! Rows: how long from exec until the monitor answers (in Bulkhead that is after all helper processes are sealed and
//! verified, and the kernel is loaded), how much memory a machine takes beside guest RAM, those of [`growth`], [`monitor`],
//! [`disk`], [`dumps`], [`jobs`] and [`beside`].

mod beside;
mod disk;
mod dumps;
mod growth;
mod jobs;
mod monitor;
mod table;

use bulkhead_tests::machine::programs;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, procfs};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Pairs of runs after one for warming up.
const PAIRS: usize = 10;
/// Pairs of runs of the monitor's rows, which take longer.
const PAIRS_OF_LOAD: usize = 5;
const QEMU: &str = "qemu-system-x86_64";

/// A started monitor, and what was measured of it.
struct Run {
    ready: Duration,
    pss_kib: u64,
    processes: usize,
}

fn main() {
    if let Some(reason) = bulkhead_tests::machine::kvm_missing() {
        println!("no rows: {reason}");
        return;
    }
    let with_qemu = Command::new(QEMU)
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok();
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let has = |part: &str| wanted.is_empty() || wanted.iter().any(|name| name == part);
    table::head();
    if has("start") {
        start_rows(with_qemu);
    }
    if has("monitor") {
        monitor::rows(with_qemu);
    }
    if has("growth") {
        growth::rows(with_qemu);
    }
    if has("disk") {
        disk::rows(with_qemu);
    }
    if has("depths") {
        disk::depth_rows(with_qemu);
    }
    if has("engines") {
        disk::engine_rows(with_qemu);
    }
    if has("chains") {
        disk::chain_rows(with_qemu);
    }
    // `jobs=TEXT`: those that have it in their name.
    let only = wanted.iter().find_map(|name| name.strip_prefix("jobs="));
    if has("jobs") || only.is_some() {
        jobs::rows(with_qemu, only.unwrap_or(""));
    }
    if has("beside") {
        beside::guest_rows(with_qemu);
    }
    if has("queries") {
        beside::query_rows(with_qemu);
    }
    if has("dumps") {
        dumps::rows(with_qemu);
    }
    if !with_qemu {
        println!("\nQEMU is not installed: no peer.");
    }
}

fn start_rows(with_qemu: bool) {
    let (ours, theirs) = pairs(PAIRS, with_qemu, measure);
    let row = |name: &str, value: &dyn Fn(&Run) -> f64| {
        let values = |runs: &[Run]| runs.iter().map(value).collect::<Vec<f64>>();
        table::row(name, &values(&ours), &values(&theirs));
    };
    row("exec to monitor ready, all sealed, kernel loaded (ms)", &|run| {
        run.ready.as_secs_f64() * 1e3
    });
    row("memory beside guest RAM, PSS of all processes (MiB)", &|run| {
        run.pss_kib as f64 / 1024.0
    });
    row("processes", &|run| run.processes as f64);
}

/// What both say in turn, in so many pairs of runs after one for warming up.
fn pairs<T>(count: usize, with_qemu: bool, mut run: impl FnMut(Peer) -> T) -> (Vec<T>, Vec<T>) {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for pair in 0..=count {
        let our = run(Peer::Bulkhead);
        let their = with_qemu.then(|| run(Peer::Qemu));
        if pair > 0 {
            ours.push(our);
            theirs.extend(their);
        }
    }
    (ours, theirs)
}

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    Bulkhead,
    Qemu,
}

/// A machine that has been started. A client of the first monitor is connected.
struct Started {
    child: Child,
    directory: tempfile::TempDir,
    qmp: Qmp,
    ready: Duration,
}

impl Peer {
    /// Starts it with these monitors and waits for the first one.
    fn start(self, monitors: &[&str]) -> Started {
        let directory = tempfile::tempdir().expect("scratch directory");
        std::fs::File::create(directory.path().join("disk"))
            .and_then(|file| file.set_len(64 << 20))
            .expect("disk");
        let command = self.command(directory.path());
        Started::launch(command, directory, monitors)
    }

    /// Starts it without a machine: nothing but the block graph and monitors. It may open what is in the folder.
    fn start_bare(self, folder: &Path, monitors: &[&str]) -> Started {
        let mut command = self.program();
        if self == Self::Bulkhead {
            command.arg("-allow-path").arg(folder);
        }
        command.args(["-machine", "none", "-nodefaults", "-display", "none"]);
        let directory = tempfile::tempdir().expect("scratch directory");
        Started::launch(command, directory, monitors)
    }

    fn program(self) -> Command {
        match self {
            Self::Bulkhead => Command::new(programs().join("bulkhead")),
            Self::Qemu => Command::new(QEMU),
        }
    }

    /// Two vCPUs, 256 MiB, one disk, a serial port.
    fn command(self, directory: &Path) -> Command {
        let mut command = self.program();
        if self == Self::Qemu {
            command.args(["-M", "q35,memory-backend=ram", "-accel", "kvm"]);
            command.args(["-object", "memory-backend-memfd,id=ram,size=256M,share=on"]);
        }
        command.args(["-nodefaults", "-display", "none", "-m", "256", "-smp", "2", "-S"]);
        command.args(["-serial", "null", "-kernel"]).arg(guest::image());
        command.arg("-drive");
        command.arg(format!("file={}/disk,if=virtio,format=raw", directory.display()));
        command
    }
}

impl Started {
    /// Starts a program with these monitors and waits for the first one.
    fn launch(mut command: Command, directory: tempfile::TempDir, monitors: &[&str]) -> Self {
        for name in monitors {
            let path = directory.path().join(name);
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", path.display())]);
        }
        let start = Instant::now();
        let child = command.stdin(Stdio::null()).spawn().expect("starting");
        let qmp = loop {
            match Qmp::connect(&directory.path().join(monitors[0])) {
                Ok(qmp) => break qmp,
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "the monitor does not come up"
            );
        };
        Self {
            child,
            directory,
            qmp,
            ready: start.elapsed(),
        }
    }

    fn socket(&self, monitor: &str) -> PathBuf {
        self.directory.path().join(monitor)
    }

    /// The names of its commands.
    fn commands(&mut self) -> Vec<String> {
        let list = self.qmp.run("query-commands");
        let name = |entry: &serde_json::Value| Some(entry["name"].as_str()?.to_owned());
        list.as_array().into_iter().flatten().filter_map(name).collect()
    }

    /// Ends it in the middle of whatever it does.
    fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn end(mut self) {
        self.qmp.run("quit");
        let start = Instant::now();
        while self.child.try_wait().expect("wait").is_none() {
            if start.elapsed() > Duration::from_secs(10) {
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn measure(peer: Peer) -> Run {
    let machine = peer.start(&["qmp"]);
    let run = Run::of(&machine);
    machine.end();
    run
}

impl Run {
    fn of(machine: &Started) -> Self {
        // The next spare monitor process belongs to what an idle machine costs.
        std::thread::sleep(Duration::from_millis(300));
        let pids = family(machine.child.id() as i32);
        Self {
            ready: machine.ready,
            pss_kib: pids.iter().map(|pid| procfs::pss_kib(*pid, "memfd:")).sum(),
            processes: pids.len(),
        }
    }
}

fn family(pid: i32) -> Vec<i32> {
    let children = procfs::children(pid);
    [pid].into_iter().chain(children.into_iter().flat_map(family)).collect()
}
