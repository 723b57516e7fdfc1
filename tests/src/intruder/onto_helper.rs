//! A real, sealed helper hears what a supervisor that was taken over says: it answers, or it ends in order. It never ends by
//! a panic or a signal, does nothing that its policy forbids, and does not grow.
//!
//! The supervisor stands still meanwhile. What it would have learned (how the helper ended, what the sealed filter has caught,
//! what the helper logged) is read from its descriptors.

use super::onto_supervisor::{Worker, peak_kib, start};
use super::player::Asks;
use super::rng::Rng;
use super::victim::{Victim, channel, freeze, shoot};
use super::{descriptors, frames, generate};
use crate::inject::steal;
use crate::machine::{Machine, PATIENCE, wait_until};
use crate::procfs;
use audit::live::sockets;
use ipc::block::ToBlock;
use ipc::caps::ClientGivenFd;
use ipc::dump::ToDump;
use ipc::launch::{PACKET_BYTES, Report, encode_request};
use ipc::opener::{OpenRequest, ToOpener};
use ipc::qmp::ToQmp;
use ipc::vcpu::{ToVcpu, VcpuRequest};
use ipc::{Request, RequestId, Role};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Instant;

/// The most memory that a helper may ever have had, KiB: the guest's 32 MiB, and its own.
const MAX_PEAK_KIB: u64 = 320 << 10;
/// The number of a request that comes last.
const LAST: RequestId = RequestId(0xFFFF_0000_0000_0001);

/// What a run did.
#[derive(Debug, Default)]
pub struct Count {
    /// Helpers that heard something.
    pub helpers: u64,
    /// Of those, how many have ended, in order.
    pub ended: u64,
    /// Messages of the right type.
    pub messages: u64,
    /// Frames that are almost frames.
    pub malformed: u64,
    /// What was answered or reported.
    pub heard: u64,
    /// The most memory that any of them had, KiB.
    pub peak_kib: u64,
}

/// Plays the supervisor of a process of this kind until the time is over.
///
/// # Panics
/// When a helper does what it must not.
pub fn run(victim: Victim, seed: u64, until: Instant) -> Count {
    super::seclusion::enter();
    let mut rng = Rng::new(seed);
    let mut count = Count::default();
    while count.helpers == 0 || Instant::now() < until {
        one_helper(victim, &mut rng, &mut count);
    }
    count
}

/// What is read of the supervisor's while it stands still.
struct Scene {
    machine: Machine,
    pid: i32,
    /// The supervisor's end.
    end: OwnedFd,
    launcher: OwnedFd,
    listeners: Vec<OwnedFd>,
    log: Option<OwnedFd>,
}

fn one_helper(victim: Victim, rng: &mut Rng, count: &mut Count) {
    let mut machine = start();
    machine.wait_for_serial("spin 0");
    let mut observer = machine.qmp();
    let worker = Worker::connect(&mut machine).expect("a client");
    let pid = match victim {
        Victim::Dump => {
            observer.execute("human-monitor-command", json!({"command-line": "xp /4xb 0"}));
            victim.pid(&machine)
        }
        Victim::Qmp => worker.server(&machine),
        _ => victim.pid(&machine),
    };
    let pid = pid.expect("a process");
    let everybody: Vec<i32> = machine
        .helpers()
        .into_iter()
        .map(|(_, pid)| pid)
        .chain([machine.launcher()])
        .collect();
    freeze(machine.pid());
    let supervisor = machine.pid();
    let listeners = procfs::descriptors(supervisor)
        .into_iter()
        .filter(|(_, link)| link.contains("seccomp"))
        .map(|(number, _)| steal(supervisor, number))
        .collect();
    let scene = Scene {
        pid,
        end: steal(supervisor, channel(supervisor, pid).1),
        launcher: steal(supervisor, channel(supervisor, machine.launcher()).1),
        listeners,
        log: log_of(supervisor, pid),
        machine,
    };
    count.helpers += 1;
    match victim {
        Victim::Vcpu => talk::<ToVcpu>(&scene, rng, count, |id| {
            Some(Request {
                id,
                body: VcpuRequest::GetRegisters,
            })
        }),
        // These wait as long as it takes where a disk or an output is a pipe at whose other end is nobody.
        Victim::Block => talk::<ToBlock>(&scene, rng, count, |_| None),
        Victim::Dump => talk::<ToDump>(&scene, rng, count, |_| None),
        Victim::Qmp => talk::<ToQmp>(&scene, rng, count, |_| None),
        Victim::Opener => talk::<ToOpener>(&scene, rng, count, |id| {
            let fd = ClientGivenFd::new(descriptors::null());
            let body = OpenRequest::Adopt { fd, listen: false };
            Some(Request { id, body })
        }),
        Victim::Launcher => packets(&scene, rng, count),
    }
    scene.judge(count);
    drop((observer, worker));
    shoot(scene.machine.pid());
    drop(scene);
    wait_until("no process is left", || {
        !everybody.iter().any(|pid| procfs::is_alive(*pid))
    });
}

/// The supervisor's end of a helper's log.
fn log_of(supervisor: i32, pid: i32) -> Option<OwnedFd> {
    let link = std::fs::read_link(format!("/proc/{pid}/fd/2")).ok()?;
    let peer = sockets::all(supervisor).of(&link.to_string_lossy())?.peer?;
    let all = procfs::descriptors(supervisor);
    let (number, _) = all.into_iter().find(|(_, link)| *link == format!("socket:[{peer}]"))?;
    Some(steal(supervisor, number))
}

impl Scene {
    /// Sends one frame, and lets the other side read first where it is full. False when nobody hears it any more.
    fn send(&self, frame: &frames::Frame, count: &mut Count) -> bool {
        let fds: Vec<_> = frame.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let began = Instant::now();
        loop {
            match frames::send(&self.end, &frame.bytes, &fds) {
                Ok(()) => return true,
                // It is busy with what it was told, which may take as long as it likes.
                Err(Errno::EAGAIN) if began.elapsed().as_millis() > 200 => return false,
                Err(Errno::EAGAIN) => {
                    self.hear(count, 5);
                }
                // A frame that no socket takes.
                Err(Errno::EMSGSIZE | Errno::EINVAL | Errno::ETOOMANYREFS) => return true,
                Err(_) => return false,
            }
        }
    }

    /// Reads what was said, waiting so long (milliseconds) for the first; false at the end.
    fn hear(&self, count: &mut Count, wait: u16) -> Option<Vec<frames::Frame>> {
        let mut fds = [PollFd::new(self.end.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::from(wait));
        let mut heard = Vec::new();
        loop {
            match frames::receive(&self.end) {
                Ok(Some(frame)) if frame.bytes.is_empty() => return None,
                Ok(Some(frame)) => heard.push(frame),
                Ok(None) => break,
                Err(_) => return None,
            }
        }
        count.heard += heard.len() as u64;
        Some(heard)
    }

    /// Whoever has hung up ends, and did not by a panic or a signal: those that the launcher does not tell of as well.
    fn wait_for_end(&self, lives: bool) {
        if !lives {
            wait_until("who has hung up has ended", || !procfs::is_alive(self.pid));
        }
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)) else {
            return;
        };
        // The supervisor, who stands still, has not reaped them.
        if stat.contains(") Z ") {
            let code = stat.trim_end().rsplit(' ').next().unwrap_or_default();
            assert!(["0", "256", "768"].contains(&code), "it has ended with {code}: {stat}");
        }
    }

    /// What became of it.
    fn judge(&self, count: &mut Count) {
        for listener in &self.listeners {
            let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut fds, PollTimeout::ZERO).unwrap_or(0);
            let violated = ready > 0
                && fds[0]
                    .revents()
                    .is_some_and(|events| events.contains(PollFlags::POLLIN));
            assert!(!violated, "its sealed filter has caught it: {}", self.last_words());
        }
        let peak = peak_kib(self.pid);
        count.peak_kib = count.peak_kib.max(peak);
        assert!(peak <= MAX_PEAK_KIB, "it has had {peak} KiB");
        // Its end is reported when it has been reaped.
        let is_helper = self.log.is_some();
        let mut owed = is_helper && !procfs::is_alive(self.pid);
        loop {
            let frame = match frames::receive(&self.launcher) {
                Ok(Some(frame)) if !frame.bytes.is_empty() => frame,
                Ok(None) if owed => {
                    let mut fds = [PollFd::new(self.launcher.as_fd(), PollFlags::POLLIN)];
                    let ready = poll(&mut fds, PollTimeout::from(PATIENCE.as_millis() as u16)).unwrap_or(0);
                    assert!(ready > 0, "its end is not reported: {:?}", procfs::statuses(self.pid));
                    continue;
                }
                _ => break,
            };
            let Some(Report::Ended {
                pid,
                code,
                status,
                role,
            }) = Report::decode(&frame.bytes)
            else {
                continue;
            };
            owed &= pid != self.pid;
            let in_order = code == libc::CLD_EXITED && [0, ipc::helper::CHANNEL_LOST_STATUS].contains(&status);
            let overrun = role == Role::Dump && status == ipc::dump::OVERRUN_STATUS;
            // Those that the launcher was asked for have nobody to talk to, and a log that is none.
            let is_other = !is_helper && pid != self.pid;
            assert!(
                in_order || overrun || is_other,
                "{role} ({pid}) has ended with {code} {status}: {}",
                self.last_words()
            );
            count.ended += u64::from(pid == self.pid);
        }
    }

    fn last_words(&self) -> String {
        let Some(log) = &self.log else { return String::new() };
        let lines = std::iter::from_fn(|| {
            frames::receive(log)
                .ok()
                .flatten()
                .filter(|frame| !frame.bytes.is_empty())
        });
        lines
            .map(|frame| String::from_utf8_lossy(&frame.bytes).into_owned())
            .collect::<Vec<_>>()
            .join("; ")
    }
}

fn talk<To: Asks>(scene: &Scene, rng: &mut Rng, count: &mut Count, last: impl Fn(RequestId) -> Option<To>) {
    let malformed_once_in = [40, 400, usize::MAX][rng.below(3)];
    for _ in 0..rng.below(400) {
        let mut dice = rng.clone();
        rng.any();
        let Some(message) = generate::message::<To>(&mut dice, || descriptors::any(rng)) else {
            continue;
        };
        let mut frames = frames::of(message);
        let at = dice.below(frames.len().max(1));
        if dice.once_in(malformed_once_in)
            && let Some(frame) = frames.get_mut(at)
        {
            frames::mutate(&mut dice, frame);
            count.malformed += 1;
        } else {
            count.messages += 1;
        }
        let hears = frames.iter().all(|frame| scene.send(frame, count));
        if !hears || scene.hear(count, 0).is_none() {
            break;
        }
    }
    if let Some(message) = last(LAST) {
        wait_for_answer(scene, count, message);
    }
    // Whoever ends gets the time to; most of those that live have nothing to say.
    let lives = scene.hear(count, 20).is_some();
    scene.wait_for_end(lives);
}

/// It answers what it always can, or it has ended.
fn wait_for_answer<To: Asks>(scene: &Scene, count: &mut Count, message: To) {
    let began = Instant::now();
    let mut frames = frames::of(message).into_iter().peekable();
    while procfs::is_alive(scene.pid) {
        while let Some(frame) = frames.peek() {
            let fds: Vec<_> = frame.fds.iter().map(AsRawFd::as_raw_fd).collect();
            match frames::send(&scene.end, &frame.bytes, &fds) {
                Err(Errno::EAGAIN) => break,
                _ => drop(frames.next()),
            }
        }
        let Some(heard) = scene.hear(count, 20) else { return };
        if heard.iter().any(is_last) {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "it does not answer: {}", scene.last_words());
    }
}

/// Whether this is the answer to the last request: number and kind come first in every answer.
fn is_last(frame: &frames::Frame) -> bool {
    let body = frame.bytes.get(ipc::frame::HEADER_BYTES..).unwrap_or_default();
    let number = LAST.0.to_le_bytes();
    // Helpers say first that it is an answer.
    body.starts_with(&number)
        || body
            .strip_prefix(&0u32.to_le_bytes())
            .is_some_and(|body| body.starts_with(&number))
}

/// The launcher: requests for helpers that come to nothing, because nobody is at their channel, and what is none.
fn packets(scene: &Scene, rng: &mut Rng, count: &mut Count) {
    for _ in 0..rng.below(40) {
        let role = Role::ALL[rng.below(Role::ALL.len())];
        let mut bytes = encode_request(role).to_vec();
        // A channel whose other end is gone: whoever is started with it ends.
        let mut fds = vec![descriptors::hung_up(), descriptors::any(rng)];
        if rng.once_in(12) {
            let at = rng.below(PACKET_BYTES);
            bytes[at] = rng.any() as u8;
            bytes.truncate(PACKET_BYTES - rng.below(2));
            count.malformed += 1;
        } else {
            count.messages += 1;
        }
        if rng.once_in(12) {
            fds.truncate(rng.below(2));
        }
        if !scene.send(&frames::Frame { bytes, fds }, count) || scene.hear(count, 100).is_none() {
            return scene.wait_for_end(false);
        }
    }
}
