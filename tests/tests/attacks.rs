//! A compromised process of each kind, with the real walls around it, tries what an attacker would: every attempt is refused, or
//! is the end of it. The guest counts on, other clients are answered, and in the end nothing is left.
//!
//! Every attempt is made in a real process of a machine that runs (see `intruder::code`), and after it the machine is looked at.
//! What an attacker can say is below, and in `ipc_fuzz.rs`.

use bulkhead_tests::intruder::attempts::{Attempt, HELPERS, NOBODY, OPENER, make};
use bulkhead_tests::intruder::code::{Outcome, Puppet};
use bulkhead_tests::intruder::frames;
use bulkhead_tests::intruder::scene::Scene;
use bulkhead_tests::intruder::victim::{Victim, shoot};
use bulkhead_tests::machine::wait_until;
use bulkhead_tests::procfs;
use bulkhead_tests::{need_kvm, need_root};
use nix::errno::Errno;
use serde_json::json;
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
    let pid = scene.victim(Victim::Block);
    bulkhead_tests::intruder::victim::freeze(pid);
    let mut asker = scene.machine.qmp();
    asker.send(&json!({"execute": "query-blockstats"})).unwrap();
    let began = Instant::now();
    // Until its time is over, everybody else is served.
    wait_until("it is given up", || {
        scene.answers();
        !procfs::is_alive(pid)
    });
    assert!(began.elapsed() > Duration::from_secs(5), "{:?}", began.elapsed());
    let reply = asker.reply();
    assert!(reply.get("return").is_some() || reply.get("error").is_some(), "{reply}");
    drop(asker);
    let log = scene.machine.log();
    assert!(log.contains("it did not answer in time"), "{log}");
    scene.goes_on_without(Victim::Block, pid, true).end();
}
