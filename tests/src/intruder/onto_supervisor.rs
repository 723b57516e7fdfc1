//! The supervisor hears what a helper that was taken over says, and goes on.

use super::player::{Said, player};
use super::rng::Rng;
use super::victim::{Victim, shoot, take_over};
use crate::machine::{Machine, PATIENCE, programs, wait_until};
use crate::qmp::Qmp;
use crate::{census, guest, procfs};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

/// The most memory of its own that the supervisor may ever have had, KiB. One message may have 16 MiB.
const MAX_PEAK_KIB: u64 = 192 << 10;
/// More descriptors than before that a supervisor may have in the end: nodes and devices that clients added.
const MAX_MORE_FDS: usize = 6;
/// Processes that are taken over in one machine.
const VICTIMS_PER_MACHINE: usize = 25;

/// What a run did.
#[derive(Debug, Default)]
pub struct Count {
    /// Machines.
    pub machines: u64,
    /// Processes that were taken over.
    pub victims: u64,
    /// Of those, how many the supervisor ended.
    pub ended: u64,
    /// What they said.
    pub said: Said,
    /// The most memory of its own that any supervisor had, KiB.
    pub peak_kib: u64,
    /// The longest that an answer to somebody else took.
    pub slowest_answer: Duration,
}

/// Plays a process of this kind until the time is over.
///
/// # Panics
/// When a supervisor crashes, hangs, grows, or keeps descriptors.
pub fn run(victim: Victim, seed: u64, until: Instant) -> Count {
    super::seclusion::enter();
    let mut rng = Rng::new(seed);
    let mut count = Count::default();
    while count.machines == 0 || Instant::now() < until {
        count.machines += 1;
        one_machine(victim, &mut rng, until, &mut count);
    }
    count
}

pub(super) fn start() -> Machine {
    let directory = tempfile::tempdir().expect("scratch directory");
    let disk = std::fs::File::create(directory.path().join("disk")).expect("disk");
    disk.set_len(1 << 20).expect("disk");
    let arguments = format!(
        "-m 32 -smp 2 -kernel {} -append test=spin --restart-budget 100/60 \
         -drive file={{dir}}/disk,if=none,format=raw,id=d -device virtio-blk-pci,drive=d \
         -device virtio-rng-pci -chardev socket,id=c,path={{dir}}/nobody,reconnect-ms=60000",
        guest::image().display()
    );
    // A monitor that is played can have files made: here, and nowhere else.
    let mut command = Command::new(programs().join("bulkhead"));
    command.current_dir(directory.path());
    let serial = format!("-serial file:{}/serial {arguments}", directory.path().display());
    Machine::start_command(directory, command, &serial, &[])
}

fn one_machine(victim: Victim, rng: &mut Rng, until: Instant, count: &mut Count) {
    let mut machine = start();
    machine.wait_for_serial("spin 0");
    let mut observer = machine.qmp();
    let others: Vec<i32> = census::descriptor_counts(&machine)
        .into_iter()
        .map(|(_, pid, _)| pid)
        .collect();
    let before = procfs::descriptors(machine.pid());
    for number in 0..VICTIMS_PER_MACHINE {
        if number > 0 && Instant::now() >= until || !one_victim(victim, &mut machine, &mut observer, rng, count) {
            break;
        }
    }
    count.peak_kib = count.peak_kib.max(peak_kib(machine.pid()));
    check_memory(&machine);
    if !ends(&mut machine) {
        leaves_nothing(&mut machine, &mut observer, &before);
        let _ = observer.send(&json!({"execute": "quit"}));
    }
    let status = machine.wait();
    let log = machine.log();
    assert!(
        matches!(status.code(), Some(0 | 1)) && !log.contains("panic"),
        "{status}: {log}"
    );
    wait_until("no process is left", || {
        !others.iter().any(|pid| procfs::is_alive(*pid))
    });
}

/// Whether the machine has ended, or is about to.
fn ends(machine: &mut Machine) -> bool {
    !procfs::is_alive(machine.pid()) || procfs::children(machine.pid()).is_empty()
}

/// Takes one process over and says what comes to mind; false when the machine has ended of it.
fn one_victim(victim: Victim, machine: &mut Machine, observer: &mut Qmp, rng: &mut Rng, count: &mut Count) -> bool {
    let Some(mut worker) = Worker::connect(machine) else {
        return false;
    };
    let Some(pid) = find(victim, machine, observer, &worker) else {
        return !ends(machine);
    };
    let Some(end) = take_over(machine, pid) else {
        return !ends(machine);
    };
    count.victims += 1;
    // Some keep to the format, and come further.
    let malformed = [12, 100, usize::MAX][rng.below(3)];
    let mut player = player(victim, end, malformed);
    let mut alive = true;
    for round in 0..rng.below(200) {
        worker.provoke(victim, rng, machine);
        alive = player.read() && player.say(rng) && procfs::is_alive(pid);
        // One that stands still holds up the supervisor's end for a while.
        if !alive && !rng.once_in(8) {
            shoot(pid);
        }
        if round % 8 == 0 || !alive {
            let Some(took) = answer(machine, observer) else {
                count.said += player.said();
                return false;
            };
            count.slowest_answer = count.slowest_answer.max(took);
        }
        if !alive {
            break;
        }
    }
    count.said += player.said();
    count.ended += u64::from(!alive);
    shoot(pid);
    drop((player, worker));
    settle(victim, machine, observer, pid)
}

/// The process that is to be taken over.
fn find(victim: Victim, machine: &Machine, observer: &mut Qmp, worker: &Worker) -> Option<i32> {
    match victim {
        Victim::Dump => {
            let _ = observer.try_execute("human-monitor-command", json!({"command-line": "xp /4xb 0"}));
        }
        Victim::Qmp => return worker.server(machine),
        _ => {}
    }
    victim.pid(machine)
}

/// Asks something that no helper but the asker's own has part in; nothing when the machine has ended.
fn answer(machine: &mut Machine, observer: &mut Qmp) -> Option<Duration> {
    let asked = Instant::now();
    if observer.send(&json!({"execute": "query-name", "id": "alive"})).is_err() {
        return lost(machine);
    }
    loop {
        match observer.read() {
            Ok(message) if message["id"] == "alive" => break,
            Ok(_) => {}
            Err(_) => return lost(machine),
        }
    }
    check_memory(machine);
    Some(asked.elapsed())
}

/// The observer has no connection any more: then the machine is at its end, in order.
fn lost(machine: &mut Machine) -> Option<Duration> {
    let status = machine.wait();
    assert!(matches!(status.code(), Some(0 | 1)), "{status}: {}", machine.log());
    None
}

/// Waits until another one has taken its place, where one does; false when the machine ends.
fn settle(victim: Victim, machine: &mut Machine, observer: &mut Qmp, pid: i32) -> bool {
    match victim {
        Victim::Block => {
            let start = Instant::now();
            loop {
                let Some(_) = answer(machine, observer) else {
                    return false;
                };
                if machine.log().contains("the disks are lost, the machine stops") {
                    // What the supervisor knew of the disks was a lie. That is the end of them, and of nothing else.
                    return false;
                }
                let new = machine
                    .helpers()
                    .into_iter()
                    .find(|(name, new)| name == "block-proc" && *new != pid);
                if new.is_some_and(|(_, new)| is_serving(machine, new)) {
                    return true;
                }
                assert!(
                    start.elapsed() < PATIENCE,
                    "no block-proc comes back: {}",
                    machine.log()
                );
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Victim::Dump | Victim::Qmp => answer(machine, observer).is_some(),
        // Without them nothing more can be tried.
        Victim::Vcpu | Victim::Opener | Victim::Launcher => false,
    }
}

/// Whether the supervisor has said so in its log.
fn is_serving(machine: &Machine, pid: i32) -> bool {
    machine.log().contains(&format!("block-proc (pid {pid}) serves after"))
}

/// The most memory that a process has had, KiB.
pub fn peak_kib(pid: i32) -> u64 {
    let statuses = procfs::statuses(pid);
    let status = statuses.first().map_or("", String::as_str);
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    kib.unwrap_or(0)
}

fn check_memory(machine: &Machine) {
    let peak = peak_kib(machine.pid());
    assert!(
        peak <= MAX_PEAK_KIB,
        "the supervisor has had {peak} KiB: {}",
        machine.log()
    );
}

/// The supervisor's descriptors, when all is quiet again, are those from before.
fn leaves_nothing(machine: &mut Machine, observer: &mut Qmp, before: &[(i32, String)]) {
    let start = Instant::now();
    while answer(machine, observer).is_some() {
        let now = procfs::descriptors(machine.pid());
        if now.len() <= before.len() + MAX_MORE_FDS {
            return;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "descriptors stay: {now:?}\nbefore: {before:?}\n{}",
            machine.log()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A client that asks for what needs the helper, and does not wait for answers.
pub(super) struct Worker {
    stream: UnixStream,
    /// qmp-procs that were there before it connected.
    asked: u64,
}

impl Worker {
    pub(super) fn connect(machine: &mut Machine) -> Option<Self> {
        let start = Instant::now();
        let path = machine.path("qmp");
        while start.elapsed() < PATIENCE {
            if ends(machine) {
                return None;
            }
            if let Ok(stream) = UnixStream::connect(&path) {
                stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
                let mut worker = Self { stream, asked: 0 };
                // The greeting, so that its process is there.
                let mut byte = [0; 4096];
                if matches!(worker.stream.read(&mut byte), Ok(1..)) {
                    worker.stream.set_nonblocking(true).expect("O_NONBLOCK");
                    worker.ask(&json!({"execute": "qmp_capabilities"}));
                    return Some(worker);
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        panic!("no monitor: {}", machine.log());
    }

    fn ask(&mut self, request: &Value) {
        let _ = self.stream.write_all(format!("{request}\n").as_bytes());
        let mut answers = [0; 1 << 16];
        while matches!(self.stream.read(&mut answers), Ok(1..)) {}
        self.asked += 1;
    }

    /// The process at the other end.
    pub(super) fn server(&self, machine: &Machine) -> Option<i32> {
        use std::os::fd::AsRawFd;
        let own = std::fs::read_link(format!("/proc/self/fd/{}", self.stream.as_raw_fd())).ok()?;
        let sockets = audit::live::sockets::all(machine.pid());
        let peer = sockets.of(&own.to_string_lossy())?.peer?;
        let link = format!("socket:[{peer}]");
        let helpers = machine.helpers().into_iter().map(|(_, pid)| pid);
        helpers
            .into_iter()
            .find(|pid| procfs::descriptors(*pid).iter().any(|(_, held)| *held == link))
    }

    /// Asks for something in which a process of this kind has part.
    fn provoke(&mut self, victim: Victim, rng: &mut Rng, machine: &Machine) {
        let requests = requests(victim, machine, self.asked);
        let request = &requests[rng.below(requests.len())];
        self.ask(request);
    }
}

fn requests(victim: Victim, machine: &Machine, number: u64) -> Vec<Value> {
    let ask = |command: &str, arguments: Value| json!({"execute": command, "arguments": arguments});
    let plain = |command: &str| json!({"execute": command});
    let human = |line: &str| ask("human-monitor-command", json!({"command-line": line}));
    let dump = || {
        let file = format!("file:{}", machine.path("dump").display());
        ask(
            "dump-guest-memory",
            json!({"paging": false, "protocol": file, "detach": true}),
        )
    };
    match victim {
        Victim::Vcpu => vec![
            plain("stop"),
            plain("cont"),
            plain("system_reset"),
            plain("system_powerdown"),
            plain("query-cpus-fast"),
            plain("inject-nmi"),
            human("info registers"),
            ask(
                "query-cpu-model-expansion",
                json!({"type": "full", "model": {"name": "host"}}),
            ),
            dump(),
        ],
        Victim::Block => vec![
            plain("stop"),
            plain("cont"),
            plain("query-block"),
            plain("query-blockstats"),
            plain("query-named-block-nodes"),
            plain("query-block-jobs"),
            ask("block_resize", json!({"device": "d", "size": 1 << 20})),
            ask(
                "blockdev-add",
                json!({"driver": "null-co", "node-name": "n", "size": 65536}),
            ),
            ask("blockdev-del", json!({"node-name": "n"})),
            ask("block-dirty-bitmap-add", json!({"node": "d", "name": "b"})),
            ask("block-dirty-bitmap-remove", json!({"node": "d", "name": "b"})),
            human("qemu-io d \"read 0 512\""),
        ],
        Victim::Dump => vec![human("xp /4xb 0"), human("x /4xb 0"), dump(), plain("query-dump")],
        Victim::Qmp => vec![plain("query-status")],
        Victim::Opener => {
            let path = machine.path("made").display().to_string();
            let address = json!({"type": "unix", "data": {"path": path}});
            let inet = json!({"type": "inet", "data": {"host": "127.0.0.1", "port": "1"}});
            let socket = |address: &Value, server: bool| {
                let data = json!({"addr": address, "server": server, "wait": false});
                let id = format!("c{number}");
                ask(
                    "chardev-add",
                    json!({"id": id, "backend": {"type": "socket", "data": data}}),
                )
            };
            vec![
                socket(&address, true),
                socket(&address, false),
                socket(&inet, false),
                ask("nbd-server-start", json!({"addr": address})),
                plain("nbd-server-stop"),
                ask(
                    "chardev-remove",
                    json!({"id": format!("c{}", number.saturating_sub(1))}),
                ),
            ]
        }
        // A client more needs a spare more; a look into memory another helper.
        Victim::Launcher => vec![human("xp /4xb 0"), dump()],
    }
}
