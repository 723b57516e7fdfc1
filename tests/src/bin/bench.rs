//! `make bench`: Bulkhead and QEMU in turn on the same work in the same run; prints a Markdown table.
//!
//! Rows: how long from exec until the monitor answers (in Bulkhead that is after all helper processes are sealed and
//! verified, and the kernel is loaded), and how much memory a machine takes beside guest RAM.

use bulkhead_tests::machine::programs;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, procfs};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Pairs of runs after one for warming up.
const PAIRS: usize = 10;
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
    let with_qemu = Command::new(QEMU).arg("--version").stdout(Stdio::null()).status().is_ok();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for pair in 0..=PAIRS {
        let run = measure(&bulkhead);
        let peer = with_qemu.then(|| measure(&qemu));
        if pair > 0 {
            ours.push(run);
            theirs.extend(peer);
        }
    }
    println!("| row | Bulkhead min / median / max | QEMU min / median / max | ratio of medians |");
    println!("|---|---|---|---|");
    row("exec to monitor ready, all sealed, kernel loaded (ms)", &ours, &theirs, |run| run.ready.as_secs_f64() * 1e3);
    row("memory beside guest RAM, PSS of all processes (MiB)", &ours, &theirs, |run| run.pss_kib as f64 / 1024.0);
    row("processes", &ours, &theirs, |run| run.processes as f64);
    if !with_qemu {
        println!("\nQEMU is not installed: no peer.");
    }
}

fn row(name: &str, ours: &[Run], theirs: &[Run], value: impl Fn(&Run) -> f64) {
    let summary = |runs: &[Run]| {
        let mut values: Vec<f64> = runs.iter().map(&value).collect();
        values.sort_by(f64::total_cmp);
        (values.first().copied(), values.get(values.len() / 2).copied(), values.last().copied())
    };
    let text = |(min, median, max): (Option<f64>, Option<f64>, Option<f64>)| match (min, median, max) {
        (Some(min), Some(median), Some(max)) => format!("{min:.1} / {median:.1} / {max:.1}"),
        _ => "not installed".into(),
    };
    let (our, their) = (summary(ours), summary(theirs));
    let ratio = our.1.zip(their.1).map_or_else(String::new, |(our, their)| format!("{:.2}", our / their));
    println!("| {name} | {} | {} | {ratio} |", text(our), text(their));
}

/// Two vCPUs, 256 MiB, one disk, a serial port, a monitor.
fn arguments(directory: &Path) -> Vec<String> {
    let path = directory.display();
    format!("-nodefaults -display none -m 256 -smp 2 -S -qmp unix:{path}/qmp,server=on,wait=off -serial null -kernel {}", guest::image().display())
        .split(' ')
        .map(str::to_owned)
        .collect()
}

fn bulkhead(directory: &Path) -> Command {
    let mut command = Command::new(programs().join("bulkhead"));
    command.args(arguments(directory)).arg("-drive");
    command.arg(format!("file={}/disk,if=virtio,format=raw", directory.display()));
    command
}

fn qemu(directory: &Path) -> Command {
    let mut command = Command::new(QEMU);
    command.args(arguments(directory)).args(["-M", "q35,memory-backend=ram", "-accel", "kvm"]);
    command.args(["-object", "memory-backend-memfd,id=ram,size=256M,share=on", "-drive"]);
    command.arg(format!("file={}/disk,if=virtio,format=raw", directory.display()));
    command
}

fn measure(command: &dyn Fn(&Path) -> Command) -> Run {
    let directory = tempfile::tempdir().expect("scratch directory");
    std::fs::File::create(directory.path().join("disk")).and_then(|file| file.set_len(64 << 20)).expect("disk");
    let mut command = command(directory.path());
    let start = Instant::now();
    let mut child = command.stdin(Stdio::null()).spawn().expect("starting");
    let mut qmp = loop {
        match Qmp::connect(&directory.path().join("qmp")) {
            Ok(qmp) => break qmp,
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
        assert!(start.elapsed() < Duration::from_secs(20), "the monitor does not come up");
    };
    let ready = start.elapsed();
    // The next spare monitor process belongs to what an idle machine costs.
    std::thread::sleep(Duration::from_millis(300));
    let pids = family(child.id() as i32);
    let pss_kib = pids.iter().map(|pid| procfs::pss_kib(*pid, "memfd:")).sum();
    qmp.run("quit");
    wait(&mut child);
    Run { ready, pss_kib, processes: pids.len() }
}

fn family(pid: i32) -> Vec<i32> {
    let children = procfs::children(pid);
    [pid].into_iter().chain(children.into_iter().flat_map(family)).collect()
}

fn wait(child: &mut Child) {
    let start = Instant::now();
    while child.try_wait().expect("wait").is_none() {
        if start.elapsed() > Duration::from_secs(10) {
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
