//! Recorded requests and replies of a QEMU 10.0.2 server against a whole machine: the same classes, texts and values.
//!
//! `tests/data/replies.jsonl` has one pair a line, in the order in which they were recorded:
//! - `scene`, `machine`: a new machine, with these arguments.
//! - `name`, `execute`, `arguments`, `return` or `error`, `events` (those up to the next pair).
//! - `pass`: what is passed along for the command to take: `null`, `full` (the devices), `file`, `pipe`.
//! - `pending`: what is missing here, `command X (why)` or `format X (why)`. Such a pair is not run; as soon as X exists it
//!   must be.
//! - `cut`: the recording's reply is incomplete; the pair is not run.
//! - `ours`, `why`: the reply and the events where we answer otherwise on purpose.
//!
//! `{dir}` is a scratch directory, `$ram` the guest's memory in bytes; any other `$word` is a number of the server's own
//! choice, the same wherever the word stands.

use bulkhead_tests::machine::Machine;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

const PAIRS: &str = include_str!("../data/replies.jsonl");
/// QEMU counts the video memory and the firmware as well.
const RAM_BYTES: u64 = 64 << 20;
/// How long events may take that follow a reply (those of a detached dump).
const EVENT_DEADLINE: Duration = Duration::from_secs(20);

fn lines() -> Vec<Value> {
    PAIRS.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The numbers that stand for `$words`.
struct Words(BTreeMap<String, Value>);

impl Words {
    fn new() -> Self {
        Self(BTreeMap::from([("$ram".to_owned(), json!(RAM_BYTES))]))
    }

    /// Puts in what is known: the directory and the words.
    fn fill(&self, value: &Value, directory: &str) -> Value {
        match value {
            Value::String(text) if self.0.contains_key(text) => self.0[text].clone(),
            Value::String(text) => json!(text.replace("{dir}", directory)),
            Value::Array(items) => items.iter().map(|item| self.fill(item, directory)).collect(),
            Value::Object(members) => {
                let fill = |(name, value): (&String, &Value)| (name.clone(), self.fill(value, directory));
                Value::Object(members.iter().map(fill).collect())
            }
            other => other.clone(),
        }
    }

    /// Learns the words that an expected value still has from the received one.
    fn learn(&mut self, expected: &Value, received: &Value) {
        match (expected, received) {
            (Value::String(word), number @ Value::Number(_)) if word.starts_with('$') => {
                self.0.insert(word.clone(), number.clone());
            }
            (Value::Array(expected), Value::Array(received)) => {
                expected
                    .iter()
                    .zip(received)
                    .for_each(|(expected, received)| self.learn(expected, received));
            }
            (Value::Object(expected), Value::Object(received)) => {
                for (name, expected) in expected {
                    self.learn(expected, received.get(name).unwrap_or(&Value::Null));
                }
            }
            _ => {}
        }
    }
}

fn passed(what: &str, machine: &Machine) -> OwnedFd {
    let device = |path: &str| File::options().read(true).write(true).open(path).unwrap().into();
    match what {
        "null" => device("/dev/null"),
        "full" => device("/dev/full"),
        "file" => File::create(machine.path("passed")).unwrap().into(),
        "pipe" => std::io::pipe().unwrap().1.into(),
        other => panic!("what is {other}?"),
    }
}

/// The missing thing that a pair waits for: its kind and its name.
fn pending(pair: &Value) -> Option<(&str, &str)> {
    let mut words = pair["pending"].as_str()?.split(' ');
    Some((words.next()?, words.next()?))
}

fn reply_of(pair: &Value) -> Value {
    let mut reply = Map::new();
    for member in ["return", "error"] {
        if let Some(value) = pair.get(member) {
            reply.insert(member.into(), value.clone());
        }
    }
    Value::Object(reply)
}

/// Events without their times.
fn bare(events: Vec<Value>) -> Vec<Value> {
    let bare = |mut event: Value| {
        event.as_object_mut().unwrap().remove("timestamp");
        event
    };
    events.into_iter().map(bare).collect()
}

/// Runs a pair; what is wrong with the answer.
fn run(qmp: &mut Qmp, machine: &Machine, words: &mut Words, pair: &Value) -> Result<(), String> {
    let directory = machine.directory.path().display().to_string();
    // Dump files cannot be written a second time by an ordinary user.
    let _ = std::fs::remove_file(machine.path("d"));
    if let Some(what) = pair["pass"].as_str() {
        let fd = passed(what, machine);
        qmp.pass(&[fd.as_fd()]);
    }
    let mut request = json!({"execute": pair["execute"]});
    if let Some(arguments) = pair.get("arguments") {
        request["arguments"] = words.fill(arguments, &directory);
    }
    let received = qmp.request(&request);
    let pair = pair.get("ours").unwrap_or(pair);
    let expected = reply_of(pair);
    let events = pair.get("events").cloned().unwrap_or_else(|| json!([]));
    words.learn(&words.fill(&expected, &directory), &received);
    let expected = words.fill(&expected, &directory);
    if received != expected {
        return Err(format!("answered {received}, expected {expected}"));
    }
    let events = words.fill(&events, &directory);
    let events = events.as_array().unwrap();
    let mut seen = bare(qmp.events());
    let begun = Instant::now();
    while seen.len() < events.len() && begun.elapsed() < EVENT_DEADLINE {
        std::thread::sleep(Duration::from_millis(2));
        seen.extend(bare(qmp.events()));
    }
    if seen != *events {
        return Err(format!("events {seen:?}, expected {events:?}"));
    }
    Ok(())
}

/// A directory with the images that the recordings speak of: a chain of three, one alone, a raw one.
fn images() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    File::create(at("r.raw"))
        .and_then(|file| file.set_len(1 << 20))
        .unwrap();
    let images = [
        ("base.qcow2", None),
        ("mid.qcow2", Some("base.qcow2")),
        ("top.qcow2", Some("mid.qcow2")),
        ("b.qcow2", None),
    ];
    for (name, base) in images {
        let path = at(name);
        let mut command = std::process::Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]);
        match base {
            Some(base) => command.args(["-b", &at(base), "-F", "qcow2", &path]),
            None => command.args([&*path, "16M"]),
        };
        let made = command.status().expect("qemu-img: `make packages` installs qemu-utils");
        assert!(made.success(), "{name}");
    }
    directory
}

#[test]
fn every_recorded_pair_of_a_command_that_exists_is_answered_alike() {
    need_kvm!();
    let kernel = guest::image();
    let mut current: Option<(Machine, Qmp, Words)> = None;
    let (mut wrong, mut compared) = (Vec::new(), 0);
    for line in lines() {
        if let Some(arguments) = line["machine"].as_str() {
            let arguments = format!("{arguments} -kernel {} -append test=spin", kernel.display());
            let mut machine = Machine::start_in(images(), &arguments);
            let qmp = machine.qmp();
            current = Some((machine, qmp, Words::new()));
            continue;
        }
        let (machine, qmp, words) = current.as_mut().expect("a scene comes first");
        if pending(&line).is_none() && line.get("cut").is_none() {
            compared += 1;
            if let Err(error) = run(qmp, machine, words, &line) {
                wrong.push(format!("{}: {error}", line["name"]));
            }
        }
    }
    println!("{compared} pairs compared");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(compared >= 70, "only {compared} pairs");
}

/// Whoever adds a command makes its pairs count.
#[test]
fn no_pair_is_pending_whose_command_or_format_exists() {
    need_kvm!();
    let mut machine = Machine::start(&format!("-m 64 -S -kernel {}", guest::image().display()));
    let mut qmp = machine.qmp();
    let commands = qmp.run("query-commands");
    let exists = |kind: &str, name: &str, formats: &Value| match kind {
        "command" => commands.as_array().unwrap().contains(&json!({"name": name})),
        "format" => formats.as_array().unwrap().contains(&json!(name)),
        other => panic!("pending for want of a {other}?"),
    };
    let formats = qmp.run("query-dump-guest-memory-capability")["formats"].take();
    let lines = lines();
    let mut late = Vec::new();
    for (pair, (kind, name)) in lines.iter().filter_map(|pair| Some((pair, pending(pair)?))) {
        println!(
            "pending: {}: {}",
            pair["name"].as_str().unwrap(),
            pair["pending"].as_str().unwrap()
        );
        if exists(kind, name, &formats) {
            late.push(format!("{}: {kind} {name} exists: remove `pending`", pair["name"]));
        }
    }
    assert!(late.is_empty(), "{}", late.join("\n"));
}

#[test]
fn the_table_of_pairs_is_whole() {
    let mut names = BTreeSet::new();
    for pair in lines().iter().filter(|line| line.get("scene").is_none()) {
        let name = pair["name"].as_str().unwrap();
        assert!(names.insert(name.to_owned()), "two pairs are called {name}");
        let replies = ["return", "error", "cut"]
            .iter()
            .filter(|member| pair.get(**member).is_some());
        assert_eq!(replies.count(), 1, "{name}");
        assert_eq!(pair.get("ours").is_some(), pair.get("why").is_some(), "{name}");
        if let Some(ours) = pair.get("ours") {
            let same = reply_of(ours) == reply_of(pair) && ours.get("events") == pair.get("events");
            assert!(!same, "{name}: `ours` is what was recorded");
        }
        assert_eq!(pair.get("pending").is_some(), pending(pair).is_some(), "{name}");
    }
    assert_eq!(names.len(), 244);
}
