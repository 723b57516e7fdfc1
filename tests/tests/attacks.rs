//! A compromised process of each kind, with the real walls around it, tries what an attacker would: every attempt is refused, or
//! is the end of it. The guest counts on, other clients are answered, and in the end nothing is left.
//!
//! Every attempt is made in a real process of a machine that runs (see `intruder::code`), and after it the machine is looked at.
//! What an attacker can say is below, and in `ipc_fuzz.rs`.

use bulkhead_tests::intruder::attempts::{Attempt, HELPERS, NOBODY, OPENER, make};
use bulkhead_tests::intruder::code::{Outcome, Puppet};
use bulkhead_tests::intruder::frames::Frame;
use bulkhead_tests::intruder::onto_supervisor::peak_kib;
use bulkhead_tests::intruder::scene::Scene;
use bulkhead_tests::intruder::victim::{Victim, freeze, shoot};
use bulkhead_tests::intruder::{descriptors, frames};
use bulkhead_tests::machine::wait_until;
use bulkhead_tests::{census, procfs};
use bulkhead_tests::{need_kvm, need_root};
use ipc::block::{BlockEvent, BlockReply, FromBlock};
use ipc::block_job::{JobEvent, JobNumber, JobProgress};
use ipc::dump::{DumpReply, FromDump};
use ipc::frame::HEADER_BYTES;
use ipc::opener::{FromOpener, OpenError, OpenStep};
use ipc::qmp::{Command, FromQmp, QmpCall, QmpReply};
use ipc::vcpu::{FromVcpu, VcpuEvent, VcpuReply};
use ipc::virtio::DeviceIndex;
use ipc::{Failure, FromHelper, Message, RequestId};
use nix::errno::Errno;
use serde_json::json;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// Makes all these attempts from inside processes of one kind. What it may all the same, its policy says.
fn all_fail_but(may: &[&str], victim: Victim, lists: &[&[Attempt]]) {
    need_kvm!();
    need_root!();
    let mut scene = Scene::new();
    let mut done = Vec::new();
    for attempt in lists.iter().copied().flatten() {
        let pid = scene.victim(victim);
        let mut puppet = Puppet::seize(pid);
        let outcome = make(attempt, &mut puppet, scene.machine.pid());
        println!("{}: {}: {outcome:?}", victim.name(), attempt.what);
        if matches!(outcome, Outcome::Done(_)) {
            done.push(attempt.what);
        }
        drop(puppet);
        let killed = matches!(outcome, Outcome::Killed(_));
        scene = scene.goes_on_without(victim, pid, killed);
    }
    assert_eq!(done, may, "what {} can do", victim.name());
    assert!(!std::path::Path::new("/tmp/made-by-an-intruder").exists());
    scene.end();
}

#[test]
fn vcpu_proc_can_do_none_of_it() {
    all_fail_but(&[], Victim::Vcpu, &[NOBODY, HELPERS]);
}

#[test]
fn block_proc_can_do_none_of_it() {
    all_fail_but(&[], Victim::Block, &[NOBODY, HELPERS]);
}

#[test]
fn dump_proc_can_do_none_of_it() {
    all_fail_but(&[], Victim::Dump, &[NOBODY, HELPERS]);
}

#[test]
fn qmp_proc_can_do_none_of_it() {
    all_fail_but(&[], Victim::Qmp, &[NOBODY, HELPERS]);
}

#[test]
fn the_opener_can_do_none_of_it() {
    all_fail_but(&[], Victim::Opener, &[NOBODY, OPENER]);
}

#[test]
fn the_launcher_can_do_none_of_it() {
    all_fail_but(LAUNCHER, Victim::Launcher, &[NOBODY]);
}

/// What the launcher's filter has because its children need it, in namespaces that have nothing.
const LAUNCHER: &[&str] = &["make a ring without restrictions"];

/// An SQE that its ring may not carry out: opcode, flags, and the result it must have.
const RING: &[(&str, u8)] = &[
    ("open a file", 18),
    ("open a file, the new way", 28),
    ("connect", 16),
    ("make a socket", 45),
    ("accept", 13),
    ("send a message", 9),
    ("remove a file", 36),
    ("make a link", 39),
    ("talk to another ring", 40),
    ("a command of a driver's", 46),
    ("read what is no registered file", 22),
    ("write what is no registered file", 23),
    ("duplicate a registered file", 54),
];

#[test]
fn no_ring_of_block_procs_opens_connects_or_touches_other_files() {
    need_kvm!();
    need_root!();
    let mut scene = Scene::new();
    let pid = scene.victim(Victim::Block);
    let held = procfs::descriptors(pid);
    let Some((ring, _)) = held.iter().find(|(_, link)| link.contains("io_uring")) else {
        println!("SKIPPED: this host has no io_uring");
        return;
    };
    let mut puppet = Puppet::seize_in(pid, thread(pid, "block-io"));
    for (what, opcode) in RING {
        let result = puppet.submit(*ring, *opcode, "/etc/passwd");
        println!("ring: {what}: {result:?}");
        // Refused by the ring's restrictions, or a number that this kernel does not know.
        let refused = [Errno::EACCES, Errno::EINVAL].map(|errno| Some(-(errno as i32)));
        assert!(refused.contains(&result), "a ring can {what}: {result:?}");
    }
    // Restrictions cannot be taken away, nor can anything be registered but files.
    for (what, operation) in [
        ("buffers", 0),
        ("files anew", 2),
        ("a personality", 9),
        ("other restrictions", 11),
    ] {
        let words = puppet.put_words(&[0; 8]);
        let outcome = puppet.call(libc::SYS_io_uring_register, &[*ring as u64, operation, words, 1]);
        println!("ring: register {what}: {outcome:?}");
        assert!(!matches!(outcome, Outcome::Done(_)), "a ring takes {what}");
        if puppet.is_gone() {
            break;
        }
    }
    drop(puppet);
    shoot(pid);
    scene.goes_on_without(Victim::Block, pid, true).end();
}

fn thread(pid: i32, name: &str) -> i32 {
    let statuses = procfs::statuses(pid);
    let status = statuses.iter().find(|status| procfs::field(status, "Name") == name);
    procfs::field(status.unwrap_or_else(|| panic!("no thread {name}")), "Pid")
        .parse()
        .unwrap()
}

#[test]
fn block_proc_writes_to_no_disk_but_its_own() {
    need_kvm!();
    need_root!();
    let mut scene = Scene::new();
    let other = Scene::new();
    let theirs = other.machine.path("disk");
    let before = std::fs::read(&theirs).unwrap();
    let read_only = scene.machine.path("read-only");
    let kept = std::fs::read(&read_only).unwrap();
    let pid = scene.victim(Victim::Block);
    let held = procfs::descriptors(pid);
    assert!(
        !held.iter().any(|(_, link)| link == theirs.to_str().unwrap()),
        "{held:?}"
    );
    let mut puppet = Puppet::seize(pid);
    let data = puppet.put(b"written by an intruder");
    let part = puppet.put_words(&[data, 22]);
    let mut written = Vec::new();
    for number in 0..64 {
        if number == ipc::helper::CHANNEL_FD || puppet.is_gone() {
            continue;
        }
        if let Outcome::Done(_) = puppet.call(libc::SYS_pwritev2, &[number as u64, part, 1, 0, 0, 0]) {
            written.extend(
                held.iter()
                    .filter(|(held, _)| *held == number)
                    .map(|(_, link)| link.clone()),
            );
        }
    }
    drop(puppet);
    // Its own disk, and nothing else that lies anywhere.
    let own = scene.machine.path("disk").display().to_string();
    assert!(written.iter().all(|link| *link == own), "{written:?}");
    assert_eq!(std::fs::read(&read_only).unwrap(), kept, "a disk that it may only read");
    assert_eq!(std::fs::read(&theirs).unwrap(), before, "another machine's disk");
    shoot(pid);
    scene.goes_on_without(Victim::Block, pid, true).end();
    other.end();
}

#[test]
fn who_floods_the_log_fills_no_disk_and_stops_nobody() {
    need_kvm!();
    need_root!();
    for victim in [Victim::Vcpu, Victim::Block, Victim::Dump, Victim::Qmp] {
        let mut scene = Scene::new();
        let pid = scene.victim(victim);
        let log = scene.log_of(pid);
        let before = scene.machine.log().len();
        // As another machine's line, after an end of the line; as the supervisor's; with a terminal's commands.
        let long = "x".repeat(4000);
        let lines = [
            "all is well\nother: bulkhead[1]: started",
            "\r\u{1b}[2Jother: bulkhead[1]: started",
            &long,
        ];
        let began = Instant::now();
        let mut sent = 0;
        while began.elapsed() < Duration::from_secs(2) {
            sent += u32::from(frames::send(&log, lines[sent as usize % 3].as_bytes(), &[]).is_ok());
            if sent % 64 == 0 {
                scene.answers();
            }
        }
        scene.heart_beats();
        let text = scene.machine.log();
        let bytes = text.len() - before;
        println!("{}: {sent} lines sent, {bytes} bytes logged", victim.name());
        // 500 lines at once, 10 each second.
        assert!(bytes < 1_000_000, "{} logs {bytes} bytes", victim.name());
        assert!(
            text.lines().all(|line| line.starts_with("test: ")),
            "a line without the machine's name"
        );
        assert!(
            !text.contains("\ntest: bulkhead[1]") && !text.contains('\u{1b}'),
            "a line of somebody else's"
        );
        scene.end();
    }
}

#[test]
fn a_log_that_nobody_reads_stops_nobody() {
    need_kvm!();
    need_root!();
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let mut scene = Scene::with_log(writer);
    let pid = scene.victim(Victim::Block);
    let log = scene.log_of(pid);
    let line = "x".repeat(900);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(1) {
        let _ = frames::send(&log, line.as_bytes(), &[]);
        scene.answers();
    }
    scene.heart_beats();
    scene.end();
    drop(reader);
}

#[test]
fn who_holds_its_answers_back_holds_up_only_who_asked_it() {
    need_kvm!();
    need_root!();
    let mut scene = Scene::new();
    let dumper = scene.victim(Victim::Dump);
    freeze(dumper);
    let mut asker = scene.machine.qmp();
    let look = json!({"execute": "human-monitor-command", "arguments": {"command-line": "xp /4xb 0"}});
    asker.send(&look).unwrap();
    let began = Instant::now();
    // Until its time is over, everybody else is served.
    wait_until("it is given up", || {
        scene.answers();
        !procfs::is_alive(dumper)
    });
    println!("given up after {:?}", began.elapsed());
    let reply = asker.reply();
    assert!(reply.get("return").is_some() || reply.get("error").is_some(), "{reply}");
    drop(asker);
    let log = scene.machine.log();
    assert!(log.contains("it did not answer in time"), "{log}");
    // The storage of a host may take longer: who waits for block-proc waits, and nobody else does.
    let block = scene.victim(Victim::Block);
    freeze(block);
    let mut asker = scene.machine.qmp();
    asker.send(&json!({"execute": "query-blockstats"})).unwrap();
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(2) {
        scene.answers();
        scene.heart_beats();
    }
    shoot(block);
    assert!(asker.reply().get("return").is_some());
    drop(asker);
    scene.goes_on_without(Victim::Block, block, true).end();
}

/// What is wrong with a frame, and what makes it so.
type Said = (&'static str, fn(&mut Frame));

/// What may not be said on a channel: each is the end of who says it.
const SAID: &[Said] = &[
    ("the wrong magic", |frame| frame.bytes[0] ^= 1),
    ("another version", |frame| frame.bytes[4] ^= 1),
    ("another role's channel", |frame| frame.bytes[6] ^= 0x70),
    ("a length that is not its own", |frame| frame.bytes[8] ^= 1),
    ("flags that there are none of", |frame| frame.bytes[14] |= 0x80),
    ("a message that goes on for ever", |frame| {
        frame.bytes[14] |= 1;
    }),
    ("nothing at all", |frame| frame.bytes.truncate(3)),
    ("numbers beyond all bounds", |frame| {
        let body = frame.bytes.len() - HEADER_BYTES;
        frame.bytes[HEADER_BYTES..].copy_from_slice(&vec![0xff; body]);
    }),
    ("a descriptor that nobody asked for", |frame| {
        frame.fds.push(descriptors::null());
        frame.bytes[12] = 1;
    }),
    ("a descriptor that it does not speak of", |frame| {
        frame.fds.push(descriptors::null())
    }),
    ("two hundred descriptors", |frame| {
        frame.fds = (0..200).map(|_| descriptors::null()).collect();
        frame.bytes[12] = 200;
    }),
    ("the answer to a question that was not asked", |_| {}),
];

#[test]
fn who_says_what_may_not_be_said_has_ended() {
    need_kvm!();
    need_root!();
    for victim in [Victim::Block, Victim::Dump, Victim::Vcpu, Victim::Opener, Victim::Qmp] {
        let mut scene = Scene::new();
        let held = |scene: &Scene| procfs::descriptors(scene.machine.pid());
        // When all is quiet.
        census::descriptor_counts(&scene.machine);
        let before = held(&scene);
        for (what, change) in SAID {
            let pid = scene.victim(victim);
            freeze(pid);
            let end = scene.channel_of(pid);
            let mut frame = unasked(victim);
            change(&mut frame);
            let fds: Vec<i32> = frame.fds.iter().map(AsRawFd::as_raw_fd).collect();
            frames::send(&end, &frame.bytes, &fds).unwrap();
            println!("{}: {what}", victim.name());
            let log = || scene.machine.log();
            if victim == Victim::Opener {
                wait_until("it is lost", || log().contains("is lost"));
            } else {
                wait_until("it has ended", || !procfs::is_alive(pid));
                wait_until("its end is logged", || {
                    log().contains(&format!("[{pid}]: killed by the supervisor"))
                });
            }
            drop((frame, end));
            scene = scene.goes_on_without(victim, pid, true);
            if !matches!(victim, Victim::Vcpu | Victim::Opener) {
                wait_until(&format!("no descriptor stays: {before:?} {:?}", held(&scene)), || {
                    held(&scene).len() <= before.len()
                });
            }
        }
        scene.end();
    }
}

/// The answer to a request that was never made.
fn unasked(victim: Victim) -> Frame {
    let (id, result) = (RequestId(0xDEAD_BEEF), Err(Failure::new("x")));
    let mut frames = match victim {
        Victim::Vcpu => frames::of::<FromVcpu>(FromHelper::Reply {
            id,
            result: result.map(|()| VcpuReply::Done),
        }),
        Victim::Block => frames::of::<FromBlock>(FromHelper::Reply {
            id,
            result: result.map(|()| BlockReply::Done),
        }),
        Victim::Dump => frames::of::<FromDump>(FromHelper::Reply {
            id,
            result: result.map(|()| DumpReply::Done),
        }),
        Victim::Qmp => frames::of::<FromQmp>(FromHelper::Reply {
            id,
            result: result.map(|()| QmpReply::Done),
        }),
        Victim::Opener | Victim::Launcher => {
            let error = OpenError {
                step: OpenStep::Create,
                errno: 1,
            };
            frames::of(FromOpener { id, result: Err(error) })
        }
    };
    frames.remove(0)
}

#[test]
fn who_floods_the_supervisor_costs_nobody_else_anything() {
    need_kvm!();
    need_root!();
    let device = DeviceIndex(0);
    let broken = || {
        FromHelper::Event(BlockEvent::DeviceBroken {
            device,
            detail: "x".repeat(10_000),
        })
    };
    let early = || {
        let (job, progress) = (JobNumber(7), JobProgress::default());
        FromHelper::Event(BlockEvent::Job {
            job,
            progress,
            what: JobEvent::Ready,
        })
    };
    let reset = || FromHelper::Event(VcpuEvent::ResetDevice { device });
    let clock = || FromHelper::Event(VcpuEvent::RtcChanged);
    let status = || {
        FromHelper::Event(QmpCall {
            call: 1,
            command: Command::QueryStatus,
            fd: None,
        })
    };
    let schema = || {
        FromHelper::Event(QmpCall {
            call: 1,
            command: Command::QueryNamedBlockNodes { flat: None },
            fd: None,
        })
    };
    flood::<FromBlock>(Victim::Block, broken);
    flood::<FromBlock>(Victim::Block, early);
    flood::<FromVcpu>(Victim::Vcpu, reset);
    flood::<FromVcpu>(Victim::Vcpu, clock);
    flood::<FromQmp>(Victim::Qmp, status);
    flood::<FromQmp>(Victim::Qmp, schema);
}

/// Says this as often as it can for a while, and never listens.
fn flood<M: Message>(victim: Victim, message: impl Fn() -> M) {
    let mut scene = Scene::new();
    let pid = scene.victim(victim);
    let others: Vec<i32> = scene
        .machine
        .helpers()
        .into_iter()
        .map(|(_, pid)| pid)
        .filter(|other| *other != pid)
        .collect();
    freeze(pid);
    let end = scene.channel_of(pid);
    let frame = frames::of(message()).remove(0);
    let began = Instant::now();
    let (mut sent, mut rounds) = (0u64, 0u64);
    while began.elapsed() < Duration::from_secs(3) && procfs::is_alive(pid) {
        sent += u64::from(frames::send(&end, &frame.bytes, &[]).is_ok());
        rounds += 1;
        if rounds % 256 == 0 {
            scene.answers();
        }
    }
    let peak = peak_kib(scene.machine.pid());
    let log = scene.machine.log();
    println!(
        "{}: {sent} messages, supervisor's peak {peak} KiB, {} bytes of log",
        victim.name(),
        log.len()
    );
    assert!(peak < 96 << 10, "the supervisor has had {peak} KiB");
    assert!(log.len() < 1_000_000, "{} bytes of log", log.len());
    scene.answers();
    // Nobody else was ended for it.
    for other in others {
        assert!(procfs::is_alive(other), "{:?} has ended: {log}", procfs::name(other));
    }
    drop(end);
    shoot(pid);
    scene.goes_on_without(victim, pid, true).end();
}
