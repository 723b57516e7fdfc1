//! A machine with a guest that counts and a client that asks, in which something is tried.

use super::victim::{Victim, channel, shoot};
use crate::inject::steal;
use crate::machine::{Machine, programs, wait_until};
use crate::qmp::Qmp;
use crate::{guest, procfs};
use audit::live::sockets;
use serde_json::json;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

/// How long the answer to a client who asks for nothing of a helper may take. Generous: the machines that run tests are
/// shared.
const PROMPT: Duration = Duration::from_secs(8);

/// See the module.
pub struct Scene {
    /// The machine.
    pub machine: Machine,
    observer: Qmp,
    /// A connection whose process may be lost.
    client: Option<UnixStream>,
    everybody: Vec<i32>,
}

impl Scene {
    /// A machine that runs.
    pub fn new() -> Self {
        Self::start(None)
    }

    /// As [`Self::new`], with this as the log.
    pub fn with_log(log: OwnedFd) -> Self {
        Self::start(Some(log))
    }

    fn start(log: Option<OwnedFd>) -> Self {
        let directory = tempfile::tempdir().expect("scratch directory");
        for disk in ["disk", "read-only"] {
            std::fs::write(directory.path().join(disk), vec![7; 1 << 20]).expect("disk");
        }
        let arguments = format!(
            "-serial file:{{dir}}/serial -m 32 -smp 2 -kernel {} --restart-budget 1000/60 \
             -drive file={{dir}}/disk,if=none,format=raw,id=d -device virtio-blk-pci,drive=d \
             -drive file={{dir}}/read-only,if=virtio,format=raw,id=r,readonly=on \
             -chardev socket,id=c,path={{dir}}/nobody,reconnect-ms=60000",
            guest::image().display()
        );
        let command = Command::new(programs().join("bulkhead"));
        let append = ["-append", "test=spin ms=20 count=100000000"];
        let mut machine = match log {
            None => Machine::start_command(directory, command, &arguments, &append),
            Some(log) => Machine::start_command_logging(directory, command, &arguments, &append, log),
        };
        machine.wait_for_serial("spin 0");
        let observer = machine.qmp();
        let everybody = machine.helpers().into_iter().map(|(_, pid)| pid);
        let everybody = everybody.chain([machine.launcher()]).chain(machine.opener()).collect();
        Self {
            machine,
            observer,
            client: None,
            everybody,
        }
    }

    /// A process of this kind, sealed and at work.
    ///
    /// # Panics
    /// When there is none.
    pub fn victim(&mut self, victim: Victim) -> i32 {
        match victim {
            Victim::Dump => {
                self.observer
                    .execute("human-monitor-command", json!({"command-line": "xp /4xb 0"}));
            }
            Victim::Qmp => {
                let mut stream = UnixStream::connect(self.machine.path("qmp")).expect("a client");
                let mut greeting = [0; 1];
                std::io::Read::read_exact(&mut stream, &mut greeting).expect("the greeting");
                let pid = server(&self.machine, &stream);
                self.client = Some(stream);
                return settled(pid);
            }
            _ => {}
        }
        let pid = victim.pid(&self.machine).expect("a process of this kind");
        settled(pid)
    }

    /// The helper's end of its log.
    pub fn log_of(&self, pid: i32) -> OwnedFd {
        steal(pid, ipc::helper::LOG_FD)
    }

    /// The helper's end of its channel.
    pub fn channel_of(&self, pid: i32) -> OwnedFd {
        steal(pid, channel(self.machine.pid(), pid).0)
    }

    /// The monitor answers what needs no helper.
    ///
    /// # Panics
    /// When it does not, or not soon.
    pub fn answers(&mut self) {
        let asked = Instant::now();
        self.observer.run("query-name");
        assert!(asked.elapsed() < PROMPT, "an answer took {:?}", asked.elapsed());
    }

    /// The guest goes on counting.
    ///
    /// # Panics
    /// When it does not.
    pub fn heart_beats(&self) {
        let beats = || self.machine.serial().lines().count();
        let before = beats();
        wait_until("the guest counts on", || beats() > before + 1);
    }

    /// What the end of a process of this kind means, and no more than that.
    ///
    /// # Panics
    /// When it means more.
    pub fn goes_on_without(mut self, victim: Victim, pid: i32, ended: bool) -> Self {
        if !ended {
            self.answers();
            self.heart_beats();
            assert!(
                procfs::is_alive(pid),
                "{} has ended: {}",
                victim.name(),
                self.machine.log()
            );
            if matches!(victim, Victim::Block | Victim::Vcpu | Victim::Opener | Victim::Launcher) {
                return self;
            }
            // One attempt each: these are cheap.
            shoot(pid);
        }
        match victim {
            // Without vCPUs there is no machine; without the launcher nobody starts helpers.
            Victim::Vcpu | Victim::Launcher => {
                self.comes_to_its_end();
                return Self::new();
            }
            Victim::Opener => {
                self.answers();
                self.heart_beats();
                self.end();
                return Self::new();
            }
            Victim::Block => {
                wait_until("another block-proc serves", || {
                    let new = Victim::Block.pid(&self.machine).filter(|new| *new != pid);
                    let log = self.machine.log();
                    new.is_some_and(|new| log.contains(&format!("block-proc (pid {new}) serves after")))
                });
            }
            Victim::Dump | Victim::Qmp => {}
        }
        self.answers();
        self.heart_beats();
        self
    }

    /// The machine ends by itself, or is left without vCPUs for somebody to look into.
    fn comes_to_its_end(mut self) {
        let asked = self.observer.send(&json!({"execute": "quit"}));
        drop(asked);
        let status = self.machine.wait();
        assert!(matches!(status.code(), Some(0 | 1)), "{status}: {}", self.machine.log());
        self.is_gone();
    }

    /// Ends the machine as an operator does.
    ///
    /// # Panics
    /// When it does not end, or something is left.
    pub fn end(mut self) {
        self.observer.execute("quit", json!({}));
        let status = self.machine.wait();
        assert_eq!(status.code(), Some(0), "{}", self.machine.log());
        self.is_gone();
    }

    fn is_gone(&self) {
        let alive = || self.everybody.iter().filter(|pid| procfs::is_alive(**pid)).count();
        wait_until("no process is left", || alive() == 0);
        assert!(!self.machine.path("qmp").exists(), "the monitor's socket stayed");
    }
}

impl Default for Scene {
    fn default() -> Self {
        Self::new()
    }
}

/// The process at the other end of a client's connection.
fn server(machine: &Machine, stream: &UnixStream) -> i32 {
    use std::os::fd::AsRawFd;
    let own = std::fs::read_link(format!("/proc/self/fd/{}", stream.as_raw_fd())).expect("its link");
    let peer = sockets::all(machine.pid())
        .of(&own.to_string_lossy())
        .and_then(|socket| socket.peer);
    let link = format!("socket:[{}]", peer.expect("a peer"));
    let helpers = machine.helpers().into_iter().map(|(_, pid)| pid);
    let mut serving = helpers.filter(|pid| procfs::descriptors(*pid).iter().any(|(_, held)| *held == link));
    serving.next().expect("a process that serves it")
}

/// When it is sealed, and waits for what it is told.
fn settled(pid: i32) -> i32 {
    wait_until("it is sealed and waits", || {
        let statuses = procfs::statuses(pid);
        let Some(main) = statuses.first() else { return false };
        let waits =
            std::fs::read_to_string(format!("/proc/{pid}/syscall")).is_ok_and(|call| !call.starts_with("running"));
        procfs::field(main, "Seccomp") == "2" && procfs::field(main, "State").starts_with('S') && waits
    });
    pid
}
