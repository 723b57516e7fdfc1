//! What is refused of block jobs, bitmaps, transactions and exports: each pair of a request and its error, and each state of a
//! job with each request that a client can make of it. QEMU itself is asked the same where it is installed.
//!
//! `tests/data/job_refusals.jsonl` has one request a line:
//! - `scene`: a new machine, with images of 16 MiB in its directory: `top` over `mid` over `base`, `target`, `raw`; `small` has
//!   1 MiB.
//! - `do`: a command that works.
//! - `refused`, `error`: one that does not, and its class and words.
//! - `qemu`, `why`: what QEMU 7.2 says instead, `null` if that varies, and why it is not the same here.
//!
//! `{dir}` is the machine's directory.

use bulkhead_tests::images::qcow2;
use bulkhead_tests::machine::{Machine, wait_until};
use bulkhead_tests::qmp::Qmp;
use serde_json::{Value, json};
use std::process::Command;

const PAIRS: &str = include_str!("../data/job_refusals.jsonl");
const QEMU: &str = "qemu-system-x86_64";

/// Who is asked.
#[derive(Clone, Copy, PartialEq)]
enum Server {
    Bulkhead,
    Qemu,
}

impl Server {
    /// With the images.
    fn start(self) -> (Machine, Qmp) {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for (name, below) in [
            ("base", None),
            ("mid", Some("base")),
            ("top", Some("mid")),
            ("target", None),
        ] {
            qcow2(&at(name), "16M", below.map(&at).as_deref());
        }
        qcow2(&at("small"), "1M", None);
        std::fs::File::create(at("raw"))
            .and_then(|file| file.set_len(16 << 20))
            .unwrap();
        let mut machine = match self {
            Self::Bulkhead => Machine::start_without_serial(directory, "-machine none", &[]),
            Self::Qemu => Machine::start_command(directory, Command::new(QEMU), "-machine none", &[]),
        };
        let qmp = machine.qmp();
        (machine, qmp)
    }
}

/// Whether there is a QEMU of the version that the table knows.
fn has_qemu() -> bool {
    let version = Command::new(QEMU).arg("--version").output();
    let is_there = version.is_ok_and(|said| String::from_utf8_lossy(&said.stdout).contains("version 7.2."));
    if !is_there {
        println!("SKIPPED: QEMU 7.2 is not installed");
    }
    is_there
}

fn with_directory(value: &Value, from: &str, to: &str) -> Value {
    serde_json::from_str(&value.to_string().replace(from, to)).unwrap()
}

/// Asks everything, and says how many answers are as they should be.
fn walk(server: Server) -> usize {
    let (mut machine, mut qmp) = server.start();
    let mut wrong = Vec::new();
    let mut right = 0;
    for line in PAIRS.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        if line.get("scene").is_some() {
            (machine, qmp) = server.start();
            continue;
        }
        let directory = machine.directory.path().display().to_string();
        let arguments = with_directory(&line["arguments"], "{dir}", &directory);
        if let Some(command) = line["do"].as_str() {
            qmp.execute(command, arguments);
            continue;
        }
        let expected = match (server, line.get("qemu"), line.get("why")) {
            (Server::Qemu, Some(theirs), _) => theirs,
            _ => &line["error"],
        };
        let command = line["refused"].as_str().unwrap();
        let said = qmp.try_execute(command, arguments);
        let said = said.map_or_else(
            |error| with_directory(&error, &directory, "{dir}"),
            |value| json!({"return": value}),
        );
        if *expected != said && !expected.is_null() {
            wrong.push(format!("{command} {}\n  {said}\n  not {expected}", line["arguments"]));
        } else {
            right += 1;
        }
    }
    assert!(wrong.is_empty(), "{} are wrong:\n{}", wrong.len(), wrong.join("\n"));
    right
}

#[test]
fn each_refusal_has_its_class_and_words() {
    assert!(walk(Server::Bulkhead) > 270);
}

#[test]
fn qemu_refuses_the_same() {
    if has_qemu() {
        walk(Server::Qemu);
    }
}

/// The states that last, and how a job gets there.
const STATES: [&str; 6] = ["running", "paused", "ready", "standby", "pending", "concluded"];

/// Each request in each state: `+` works; `v` is against the table of verbs; `p` is paused already; `n` is not paused; `u` is
/// a user's pause in the way.
const VERBS: [(&str, &str); 13] = [
    ("job-pause", "+p+pvv"),
    ("job-resume", "n+n+nn"),
    ("job-cancel", "+++++v"),
    ("job-complete", "vv++vv"),
    ("job-finalize", "vvvv+v"),
    ("job-dismiss", "vvvvv+"),
    ("block-job-pause", "+p+pvv"),
    ("block-job-resume", "n+n+nn"),
    ("block-job-cancel", "+u+u+v"),
    ("block-job-complete", "vv++vv"),
    ("block-job-set-speed", "++++vv"),
    ("block-job-finalize", "vvvv+v"),
    ("block-job-dismiss", "vvvvv+"),
];

fn status(qmp: &mut Qmp) -> Option<String> {
    let jobs = qmp.run("query-jobs");
    Some(jobs.get(0)?["status"].as_str()?.to_owned())
}

fn begin(qmp: &mut Qmp, state: &str) {
    let common = |sync: &str| json!({"job-id": "j", "device": "top", "target": "t", "sync": sync});
    let (command, mut arguments) = match state {
        "ready" | "standby" => ("blockdev-mirror", common("full")),
        _ => ("blockdev-backup", common("full")),
    };
    match state {
        "running" | "paused" => arguments["speed"] = json!(1),
        "pending" => arguments["auto-finalize"] = json!(false),
        "concluded" => arguments["auto-dismiss"] = json!(false),
        _ => {}
    }
    qmp.execute(command, arguments);
    if state == "standby" {
        wait_until("the mirror is ready", || status(qmp).as_deref() == Some("ready"));
    }
    if matches!(state, "paused" | "standby") {
        qmp.execute("job-pause", json!({"id": "j"}));
    }
    wait_until(state, || status(qmp).as_deref() == Some(state));
}

/// Whatever is left of the job.
fn sweep(qmp: &mut Qmp) {
    wait_until("the job is gone", || {
        match status(qmp).as_deref() {
            None => return true,
            Some("concluded") => drop(qmp.try_execute("job-dismiss", json!({"id": "j"}))),
            Some(_) => drop(qmp.try_execute("block-job-cancel", json!({"device": "j", "force": true}))),
        }
        false
    });
}

/// What is said, or nothing.
fn expected(mark: char, command: &str, state: &str) -> Option<String> {
    let verb = command.rsplit_once("job-").map_or(command, |(_, verb)| verb);
    match mark {
        '+' => None,
        'v' => Some(format!(
            "Job 'j' in state '{state}' cannot accept command verb '{verb}'"
        )),
        'p' => Some("Job is already paused".to_owned()),
        'n' => Some("Can't resume a job that was not paused".to_owned()),
        'u' => Some("The block job for device 'j' is currently paused".to_owned()),
        other => panic!("{other}"),
    }
}

fn walk_states(server: Server) {
    let (machine, mut qmp) = server.start();
    let image = |name: &str, node: &str| {
        json!({"driver": "qcow2", "node-name": node, "backing": null,
               "file": {"driver": "file", "filename": machine.path(name)}})
    };
    qmp.execute("blockdev-add", image("base", "top"));
    qmp.execute("blockdev-add", image("target", "t"));
    let fill = json!({"command-line": "qemu-io top \"write -P 1 0 4M\""});
    qmp.execute("human-monitor-command", fill);
    for (command, marks) in VERBS {
        for (state, mark) in STATES.into_iter().zip(marks.chars()) {
            begin(&mut qmp, state);
            let mut arguments = match command {
                "block-job-finalize" | "block-job-dismiss" => json!({"id": "j"}),
                _ if command.starts_with("block-") => json!({"device": "j"}),
                _ => json!({"id": "j"}),
            };
            if command == "block-job-set-speed" {
                arguments["speed"] = json!(2);
            }
            let said = qmp.try_execute(command, arguments).err();
            let said = said.map(|error| error["desc"].as_str().unwrap().to_owned());
            assert_eq!(said, expected(mark, command, state), "{command} of a {state} job");
            sweep(&mut qmp);
        }
    }
}

#[test]
fn each_state_takes_what_the_table_says() {
    walk_states(Server::Bulkhead);
}

#[test]
fn qemus_states_take_the_same() {
    if has_qemu() {
        walk_states(Server::Qemu);
    }
}
