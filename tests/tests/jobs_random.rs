//! Random jobs under a writing guest, random requests of clients, and then the end: by itself, by `quit`, or by the death of
//! block-proc. Nothing hangs, what the guest has flushed is in its disk, images are sound, and no process, descriptor or file is
//! left. A seed repeats a run: `BULKHEAD_SEED=7 cargo test -p bulkhead-tests --test jobs_random`.

use bulkhead_tests::images::{check, check_but_leaks, name, qcow2, qemu_img, qemu_io};
use bulkhead_tests::machine::{Machine, PATIENCE, wait_until};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{census, guest, need_kvm, procfs};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Sectors of the guest's log at the start of its disk.
const LOG_SECTORS: u64 = 8192;
/// What a run may take on a busy machine.
const RUN: Duration = Duration::from_secs(120);

struct Random {
    seed: u64,
    at: u64,
}

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.at += 1;
        guest::pattern_word(self.seed, self.at) % limit
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

/// How a run ends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    /// All jobs are seen to their end first.
    Settled,
    /// With what is under way.
    Quit,
    /// block-proc is killed with what is under way.
    Killed,
}

/// A run.
struct Run {
    random: Random,
    machine: Machine,
    qmp: Qmp,
    /// Where the guest's disk may be at the end: where it was, and where a job can move it.
    disks: Vec<PathBuf>,
}

impl Run {
    fn begin(seed: u64) -> Self {
        let random = Random { seed, at: 0 };
        let directory = tempfile::tempdir().unwrap();
        let (base, disk) = (directory.path().join("base"), directory.path().join("disk"));
        qcow2(&base, "16M", None);
        qemu_io(&base, "qcow2", "write -q -P 7 4M 8M");
        qcow2(&disk, "16M", Some(&base));
        let arguments = format!(
            "-m 64 -allow-path {{dir}} -kernel {} -drive file={{dir}}/disk,if=virtio,format=qcow2,id=d,num-queues=2",
            guest::image().display()
        );
        let append = format!("test=blk-log batch=8 sectors={LOG_SECTORS} queues=2");
        let mut machine = Machine::start_with(directory, &arguments, &["-append", &append]);
        machine.wait_for_serial("blk-log durable=");
        let qmp = machine.qmp();
        let mut run = Self {
            random,
            machine,
            qmp,
            disks: vec![disk],
        };
        if run.random.one_in(2) {
            let over = run.machine.path("over");
            let arguments = json!({"device": "d", "snapshot-file": over});
            run.qmp.execute("blockdev-snapshot-sync", arguments);
            run.disks = vec![over];
        }
        run
    }

    /// Starts a job of any kind. Some cannot be here, and are refused.
    fn start_job(&mut self, id: &str) -> &'static str {
        let has_overlay = self.disks[0].ends_with("over");
        let target = format!("target-{id}");
        let sync = self.random.of(&["full", "top", "none"]);
        let (kind, command, more) = match self.random.below(6) {
            0 => ("commit", "block-commit", json!({})),
            1 if has_overlay => ("commit", "block-commit", json!({"top": self.machine.path_text("disk")})),
            1 => ("stream", "block-stream", json!({})),
            2 if has_overlay => (
                "stream",
                "block-stream",
                json!({"base": self.machine.path_text("base")}),
            ),
            2 | 3 => {
                let mode = self.random.of(&["background", "write-blocking"]);
                let format = if sync == "full" {
                    self.random.of(&["raw", "qcow2"])
                } else {
                    "qcow2"
                };
                let more = json!({"target": self.machine.path_text(&target), "format": format, "sync": sync, "copy-mode": mode});
                ("mirror", "drive-mirror", more)
            }
            4 => {
                let more = json!({"target": self.machine.path_text(&target), "format": "qcow2", "sync": sync});
                ("backup", "drive-backup", more)
            }
            _ => {
                let bitmap = format!("bitmap-{id}");
                let persistent = self.random.one_in(2);
                let add = json!({"node": "d", "name": bitmap, "persistent": persistent});
                // A raw disk cannot keep one: then the job is refused.
                let _ = self.qmp.try_execute("block-dirty-bitmap-add", add);
                let more = json!({"target": self.machine.path_text(&target), "format": "qcow2", "sync": "incremental", "bitmap": bitmap});
                ("backup", "drive-backup", more)
            }
        };
        let mut arguments = json!({"device": "d", "job-id": id, "auto-finalize": self.random.one_in(2),
                                   "auto-dismiss": self.random.one_in(2),
                                   "speed": self.random.of(&[0u64, 0, 100_000, 2 << 20])});
        arguments
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        match command {
            "block-commit" => self.disks.push(self.machine.path("base")),
            "drive-mirror" => self.disks.push(self.machine.path(&target)),
            _ => {}
        }
        match self.qmp.try_execute(command, arguments.clone()) {
            Ok(_) => println!("  {command} {arguments}"),
            Err(error) => println!("  {command} {arguments}: {error}"),
        }
        kind
    }

    /// Any request of any job.
    fn ask(&mut self, ids: &[String], kind: &str) {
        let id = &ids[self.random.below(ids.len() as u64) as usize];
        let (command, arguments) = match self.random.below(12) {
            0 | 1 => ("job-pause", json!({"id": id})),
            2 | 3 => ("job-resume", json!({"id": id})),
            4 | 5 => {
                let speed = self.random.of(&[0u64, 1, 300_000, 10 << 20]);
                ("block-job-set-speed", json!({"device": id, "speed": speed}))
            }
            6 | 7 => ("job-complete", json!({"id": id})),
            8 if self.random.one_in(2) => ("job-cancel", json!({"id": id})),
            8 => {
                let force = self.random.one_in(2);
                ("block-job-cancel", json!({"device": id, "force": force}))
            }
            9 => ("job-finalize", json!({"id": id})),
            10 => ("job-dismiss", json!({"id": id})),
            _ if kind == "mirror" => (
                "block-job-change",
                json!({"id": id, "type": "mirror", "copy-mode": "write-blocking"}),
            ),
            _ => ("query-block-jobs", json!({})),
        };
        let said = self.qmp.try_execute(command, arguments.clone());
        println!(
            "  {command} {arguments}: {}",
            said.map_or_else(|error| error["desc"].clone(), |_| "ok".into())
        );
    }

    /// Sees every job to its end.
    fn settle(&mut self) {
        let begun = Instant::now();
        let mut was_asked = BTreeSet::new();
        loop {
            let jobs = self.qmp.run("query-jobs");
            let jobs = jobs.as_array().unwrap();
            if jobs.is_empty() {
                return;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "jobs that do not end: {jobs:?}\n{}",
                self.machine.log()
            );
            for job in jobs {
                let (id, status) = (job["id"].as_str().unwrap(), job["status"].as_str().unwrap());
                let (command, arguments) = match status {
                    "paused" | "standby" => ("job-resume", json!({"id": id})),
                    "ready" => ("job-complete", json!({"id": id})),
                    "pending" => ("job-finalize", json!({"id": id})),
                    "concluded" => ("job-dismiss", json!({"id": id})),
                    "running" if was_asked.insert(id.to_owned()) => {
                        ("block-job-set-speed", json!({"device": id, "speed": 0}))
                    }
                    // One that copies what is overwritten ends only when it is told to.
                    "running" if begun.elapsed() > Duration::from_millis(500) => ("job-cancel", json!({"id": id})),
                    _ => continue,
                };
                // Its state may be another one by now.
                let _ = self.qmp.try_execute(command, arguments);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The images of the graph.
    fn files(&mut self) -> BTreeSet<PathBuf> {
        let nodes = self.qmp.execute("query-named-block-nodes", json!({"flat": true}));
        let nodes = nodes.as_array().unwrap().iter();
        nodes
            .filter(|node| node["drv"] == "file")
            .map(|node| PathBuf::from(node["file"].as_str().unwrap()))
            .collect()
    }

    /// Descriptors of a process: how many are no images, and which images the others are.
    fn descriptors(&self, pid: i32) -> (usize, BTreeSet<PathBuf>) {
        let directory = self.machine.directory.path();
        let links = procfs::descriptors(pid);
        let images: BTreeSet<_> = links
            .iter()
            .map(|(_, link)| PathBuf::from(link.trim_end_matches(" (deleted)")))
            .filter(|link| {
                link.parent() == Some(directory) && !["log", "output", "serial"].iter().any(|own| link.ends_with(own))
            })
            .collect();
        let others = links
            .iter()
            .filter(|(_, link)| !images.contains(Path::new(link)))
            .count();
        (others, images)
    }

    /// No job has left a descriptor behind.
    fn nothing_left_open(&mut self, before: &[usize; 2]) {
        let files = self.files();
        let pids = [self.machine.pid(), self.machine.helper("block-proc")];
        for (pid, before) in pids.into_iter().zip(before) {
            let mut now = self.descriptors(pid);
            let begun = Instant::now();
            while (now.0 > *before || !now.1.is_subset(&files)) && begun.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(20));
                now = self.descriptors(pid);
            }
            assert!(
                now.0 <= *before,
                "{pid} had {before} descriptors and has {}: {:?}",
                now.0,
                procfs::descriptors(pid)
            );
            assert!(
                now.1.is_subset(&files),
                "{pid} has {:?} open, not only {files:?}",
                now.1
            );
        }
    }

    /// Ends it; returns whether block-proc was killed and the machine with it.
    fn end(&mut self, end: End) {
        let pids = self.machine.processes();
        match end {
            End::Killed => {
                let victim = self.machine.helper("block-proc");
                kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
                outlive(&mut self.machine, &mut self.qmp, victim);
            }
            End::Quit | End::Settled => {
                self.qmp.run("quit");
                assert_eq!(self.machine.wait().code(), Some(0), "{}", self.machine.log());
            }
        }
        wait_until("no process is left", || !pids.iter().any(|pid| procfs::is_alive(*pid)));
    }

    /// What the guest was told is durable is in its disk, wherever that is now.
    fn nothing_lost(&self) {
        let durable = durable(&self.machine);
        let missing: Vec<String> = self
            .disks
            .iter()
            .filter_map(|disk| missing(disk, durable).err())
            .collect();
        assert!(
            missing.len() < self.disks.len(),
            "{durable} records are durable: {missing:?}\n{}",
            self.machine.log()
        );
    }

    /// Images may have clusters that nobody uses where they were not closed.
    fn images_are_sound(&self, may_leak: bool) {
        for entry in std::fs::read_dir(self.machine.directory.path()).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if ["log", "output", "serial"].contains(&name) {
                continue;
            }
            let is_image = ["base", "disk", "over"].contains(&name) || name.starts_with("target-");
            assert!(is_image, "{name} is left");
            let content = std::fs::read(&path).unwrap();
            if !content.starts_with(b"QFI\xfb") {
                continue;
            }
            match may_leak {
                true => check_but_leaks(&path),
                false => check(&path),
            }
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", self.machine.log());
        }
    }
}

/// What a machine does whose block-proc was killed: it ends and says why, or there is another block-proc, the jobs have failed,
/// and the guest goes on.
fn outlive(machine: &mut Machine, qmp: &mut Qmp, victim: i32) {
    let supervisor = machine.pid();
    let is_new = |(name, pid): &(String, i32)| name == "block-proc" && *pid != victim;
    wait_until("the machine has ended or has another block-proc", || {
        !procfs::is_alive(supervisor) || machine.helpers().iter().any(is_new)
    });
    if !procfs::is_alive(supervisor) {
        assert_eq!(machine.wait().code(), Some(1), "{}", machine.log());
        assert!(machine.log().contains("the disks are lost"), "{}", machine.log());
        return;
    }
    wait_until("the jobs are over", || {
        let jobs = qmp.run("query-jobs");
        for job in jobs.as_array().unwrap() {
            let _ = qmp.try_execute("job-dismiss", json!({"id": job["id"]}));
        }
        jobs == json!([])
    });
    let written = durable(machine);
    wait_until("the guest goes on", || durable(machine) > written);
    qmp.run("quit");
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
}

/// How many records the guest knows to be durable.
fn durable(machine: &Machine) -> u64 {
    let serial = machine.serial();
    // The last line may be cut.
    let whole = serial.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let count = whole
        .lines()
        .rev()
        .find_map(|line| line.trim().rsplit_once("blk-log durable="));
    count.map_or(0, |(_, count)| count.parse().expect("a number"))
}

/// Says which record is not in a disk that should be.
fn missing(disk: &Path, durable: u64) -> Result<(), String> {
    let content = std::fs::read(disk).map_err(|error| format!("{}: {error}", disk.display()))?;
    let data = if content.starts_with(b"QFI\xfb") {
        let raw = disk.with_extension("raw");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", name(disk), name(&raw)]);
        let data = std::fs::read(&raw).unwrap();
        std::fs::remove_file(&raw).unwrap();
        data
    } else {
        content
    };
    for (sector, record) in data
        .chunks_exact(guest::RECORD_BYTES)
        .take(LOG_SECTORS as usize)
        .enumerate()
    {
        let sector = sector as u64;
        if sector >= durable {
            break;
        }
        // The newest durable record of this sector.
        let newest = (durable - 1 - sector) / LOG_SECTORS * LOG_SECTORS + sector;
        let found = guest::record_number(record);
        if found.is_none_or(|found| found % LOG_SECTORS != sector || found < newest) {
            return Err(format!(
                "{}: sector {sector} has {found:?}, not {newest}",
                disk.display()
            ));
        }
    }
    Ok(())
}

fn run(seed: u64) {
    println!("seed {seed}");
    let begun = Instant::now();
    let mut run = Run::begin(seed);
    let end = run.random.of(&[End::Settled, End::Quit, End::Killed]);
    if end == End::Settled {
        // The monitor's processes have come as well.
        census::descriptor_counts(&run.machine);
    }
    let pids = [run.machine.pid(), run.machine.helper("block-proc")];
    let before = pids.map(|pid| run.descriptors(pid).0);
    let mut ids = Vec::new();
    let mut kind = "";
    for number in 0..1 + run.random.below(2) {
        // A second one finds the first where it is then.
        let id = format!("j{number}");
        if number > 0 && end == End::Settled {
            run.settle();
        }
        kind = run.start_job(&id);
        ids.push(id);
        for _ in 0..run.random.below(12) {
            std::thread::sleep(Duration::from_millis(run.random.below(15)));
            run.ask(&ids, kind);
        }
    }
    println!("  {end:?} after {kind}");
    if end == End::Settled {
        run.settle();
        let written = durable(&run.machine);
        let machine = &run.machine;
        wait_until("the guest goes on", || durable(&run.machine) > written);
        assert!(!machine.serial().contains("FAIL"), "{}", machine.serial());
        run.nothing_left_open(&before);
    }
    run.end(end);
    run.nothing_lost();
    run.images_are_sound(end == End::Killed);
    assert!(begun.elapsed() < RUN, "seed {seed} took {:?}", begun.elapsed());
}

fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("BULKHEAD_SEED") {
        Ok(seed) => vec![seed.parse().expect("BULKHEAD_SEED is a number")],
        Err(_) => (1..=count).collect(),
    }
}

#[test]
fn random_jobs_lose_nothing_and_leave_nothing() {
    need_kvm!();
    seeds(20).into_iter().for_each(run);
}

#[test]
#[ignore = "minutes: make soak runs it"]
fn many_random_jobs_lose_nothing_and_leave_nothing() {
    need_kvm!();
    seeds(500).into_iter().for_each(run);
}
