//! Not a test but a measurement, beside QEMU's storage daemon in the same run:
//! `cargo test --release -p block-proc --test jobs_bench -- --ignored --nocapture`.
//!
//! Images are in the page cache and nothing is flushed, so that it is the copying that is measured. `BENCH_MIB` is the size of
//! the disk.

mod common;
mod jobs_common;
use common::*;
use ipc::block::EngineChoice;
use ipc::block_job::{BitmapMode, CopyFrom, JobControl, JobEvent, JobWork, Switch};
use ipc::graph::{Backing, CopyBeforeWriteSpec, NodeId, NodeSpec};
use jobs_common::{DEVICE, MAIN, backing_to, has_qemu_img, qemu_img};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const ROUNDS: usize = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Mirror,
    Backup,
    Commit,
}

struct Case<'a> {
    dir: &'a Path,
    kind: Kind,
    format: &'a str,
    bytes: u64,
}

impl Case<'_> {
    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// A source that is `filled` per cent data, in pieces of 1 MiB, and whatever it is copied to.
    fn make(&self, filled: u64) {
        let plain = self.path("plain");
        let file = File::create(&plain).unwrap();
        file.set_len(self.bytes).unwrap();
        let piece = pattern(1, 1 << 20);
        for number in (0..self.bytes >> 20).filter(|number| number * 37 % 100 < filled) {
            file.write_all_at(&piece, number << 20).unwrap();
        }
        let (source, target, base) = (self.path("source"), self.path("target"), self.path("base"));
        let size = self.bytes.to_string();
        match (self.kind, self.format) {
            (Kind::Commit, format) => {
                qemu_img(&["create", "-q", "-f", format, &base, &size]);
                qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &plain, &source]);
                qemu_img(&["rebase", "-u", "-f", "qcow2", "-F", format, "-b", &base, &source]);
            }
            (_, "raw") => {
                std::fs::rename(&plain, &source).unwrap();
                File::create(&target).unwrap().set_len(self.bytes).unwrap();
            }
            (_, _) => {
                qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &plain, &source]);
                qemu_img(&["create", "-q", "-f", "qcow2", &target, &size]);
            }
        }
    }

    fn ours(&self) -> Duration {
        let mut vm = Vm::start(EngineChoice::Auto, &[1]);
        let mut next = 0;
        let mut open = |vm: &mut Vm, name: &str, format: &str, backing: Option<NodeId>| {
            let file = File::options().read(true).write(true).open(self.path(name)).unwrap();
            let mut info = info(file.metadata().unwrap().len());
            info.no_flush = true;
            let (below, node) = (NodeId(next), NodeId(next + 1));
            next += 2;
            vm.add(MAIN, below, file_spec(&file, info));
            let spec = match format {
                "raw" => raw_spec(below, false),
                _ => NodeSpec::Qcow2(qcow2_spec(below, backing.map_or(Backing::None, Backing::Node))),
            };
            vm.add(MAIN, node, spec);
            node
        };
        let filter = NodeId(100);
        let (work, changes) = if self.kind == Kind::Commit {
            let base = open(&mut vm, "base", self.format, None);
            let source = open(&mut vm, "source", "qcow2", Some(base));
            qemu_img(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                &self.path("top"),
                &self.bytes.to_string(),
            ]);
            let top = open(&mut vm, "top", "qcow2", Some(source));
            vm.add(MAIN, filter, NodeSpec::Pass { file: source });
            let work = JobWork::Commit {
                top: source,
                layers: vec![source],
                base,
            };
            (work, vec![backing_to(top, Some(filter))])
        } else {
            let source = open(&mut vm, "source", self.format, None);
            let target = open(&mut vm, "target", self.format, None);
            let attach = ipc::graph::GraphRequest::Attach {
                device: DEVICE,
                node: source,
                options: options(&info(self.bytes)),
            };
            vm.graph(attach).unwrap();
            let from = CopyFrom::Layers {
                nodes: vec![source],
                is_all: true,
            };
            let work = if self.kind == Kind::Mirror {
                vm.add(MAIN, filter, NodeSpec::MirrorTop { file: source });
                JobWork::Mirror {
                    filter,
                    target,
                    from,
                    target_reads_zeroes: true,
                    granularity: 64 << 10,
                    buffer_bytes: 16 << 20,
                    unmap: true,
                    write_blocking: false,
                }
            } else {
                let spec = CopyBeforeWriteSpec {
                    file: source,
                    target,
                    cluster_bytes: 64 << 10,
                    for_job: true,
                    bitmap: None,
                    break_snapshot: true,
                    timeout_s: 0,
                };
                vm.add(MAIN, filter, NodeSpec::CopyBeforeWrite(spec));
                JobWork::Backup {
                    filter,
                    from,
                    bitmap: None,
                    bitmap_mode: BitmapMode::Never,
                    target_reads_zeroes: true,
                    compress: false,
                    max_workers: 64,
                    max_chunk: 0,
                }
            };
            let device = ipc::graph::EdgeChange::Device {
                device: DEVICE,
                node: filter,
            };
            (work, vec![device])
        };
        let job = ipc::block_job::JobNumber(1);
        let spec = ipc::block_job::JobSpec {
            job,
            work,
            speed: 0,
            on_source_error: Default::default(),
            on_target_error: Default::default(),
            paused: false,
        };
        let start = Instant::now();
        let switch = Switch {
            changes,
            start: vec![spec],
            ..Switch::default()
        };
        vm.graph(ipc::graph::GraphRequest::Switch(switch)).unwrap();
        loop {
            if let ipc::block::BlockEvent::Job { what, .. } = vm.helper.event() {
                assert!(matches!(what, JobEvent::Ready | JobEvent::Ended(Ok(()))), "{what:?}");
                break;
            }
        }
        let took = start.elapsed();
        let control = JobControl::End { success: true };
        vm.graph(ipc::graph::GraphRequest::ControlJob { job, control }).unwrap();
        took
    }

    fn qemu(&self) -> Duration {
        let node = |name: &str, format: &str, rest: &str| {
            let path = self.path(name);
            format!(
                "driver={format},node-name={name},file.driver=file,file.filename={path},file.aio=io_uring,\
                 file.cache.no-flush=on,discard=unmap,file.discard=unmap{rest}"
            )
        };
        let mut nodes = Vec::new();
        let (command, end) = match self.kind {
            Kind::Commit => {
                qemu_img(&[
                    "create",
                    "-q",
                    "-f",
                    "qcow2",
                    &self.path("top"),
                    &self.bytes.to_string(),
                ]);
                nodes.push(node("base", self.format, ""));
                nodes.push(node("source", "qcow2", ",backing=base"));
                nodes.push(node("top", "qcow2", ",backing=source"));
                let command = r#""block-commit","arguments":{"device":"top","top-node":"source","base-node":"base","job-id":"j"}"#;
                (command, "BLOCK_JOB_COMPLETED")
            }
            kind => {
                nodes.push(node("source", self.format, ""));
                nodes.push(node("target", self.format, ""));
                match kind {
                    Kind::Mirror => (
                        r#""blockdev-mirror","arguments":{"device":"source","target":"target","sync":"full","job-id":"j"}"#,
                        "BLOCK_JOB_READY",
                    ),
                    _ => (
                        r#""blockdev-backup","arguments":{"device":"source","target":"target","sync":"full","job-id":"j"}"#,
                        "BLOCK_JOB_COMPLETED",
                    ),
                }
            }
        };
        let mut daemon = Daemon::start(&nodes);
        let start = Instant::now();
        daemon.say(&format!("{{\"execute\":{command}}}"));
        daemon.wait(end);
        start.elapsed()
    }
}

struct Daemon {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Daemon {
    fn start(nodes: &[String]) -> Self {
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--chardev", "stdio,id=m", "--monitor", "chardev=m"]);
        for node in nodes {
            command.args(["--blockdev", node]);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut daemon = Self { child, lines };
        daemon.wait("QMP");
        daemon.say(r#"{"execute":"qmp_capabilities"}"#);
        daemon.wait("return");
        daemon
    }

    fn say(&mut self, line: &str) {
        let input = self.child.stdin.as_mut().unwrap();
        writeln!(input, "{line}").unwrap();
    }

    fn wait(&mut self, word: &str) {
        loop {
            let line = self.lines.next().expect("the daemon has ended").unwrap();
            assert!(!line.contains("\"error\""), "{line}");
            if line.contains(word) {
                return;
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "prints numbers; run it on a quiet machine"]
fn copies_beside_qemu() {
    let is_there = Command::new("qemu-storage-daemon").arg("--version").output().is_ok();
    if !has_qemu_img() || !is_there {
        return;
    }
    let mib: u64 = std::env::var("BENCH_MIB").map_or(1024, |mib| mib.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    println!("| job | images | data | here, ms | QEMU, ms | QEMU / here |");
    println!("|---|---|---|---|---|---|");
    for kind in [Kind::Mirror, Kind::Backup, Kind::Commit] {
        for format in ["raw", "qcow2"] {
            for filled in [100, 50, 2] {
                let case = Case {
                    dir: dir.path(),
                    kind,
                    format,
                    bytes: mib << 20,
                };
                let mut took = [Vec::new(), Vec::new()];
                for _ in 0..ROUNDS {
                    case.make(filled);
                    took[0].push(case.ours());
                    case.make(filled);
                    took[1].push(case.qemu());
                }
                // The best of each: what else the machine does only makes it slower.
                let [ours, qemu] = took.map(|took| took.into_iter().min().unwrap_or_default().as_secs_f64() * 1000.0);
                println!(
                    "| {kind:?} | {format} | {filled}% | {ours:.0} | {qemu:.0} | {:.2} |",
                    qemu / ours
                );
            }
        }
    }
}
