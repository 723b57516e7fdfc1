//! No reply is a constant: for each query, what makes its answer another one; or why nothing can, which is tried as well.
//!
//! What the answers are before and after is tested beside each command; here is the list that misses none.

use bulkhead_tests::machine::{Machine, wait_until};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::os::fd::AsFd;

/// What makes a query's answer another one.
enum Proof {
    /// Another command line: these arguments instead of none.
    CommandLine(&'static str),
    /// A command of the same machine.
    Command(&'static str, fn(&Machine, &mut Qmp)),
    /// What the guest does, with this command line of its own.
    Guest(&'static str),
    /// A monitor that has fewer commands.
    Narrowing,
    /// Nothing, for this reason.
    Nothing(&'static str),
}
use Proof::{Command, CommandLine, Guest, Narrowing, Nothing};

/// A machine that differs from a plain one in all that can be said on the command line.
const ANOTHER: &str = "-name another -m 96 -smp 2 -uuid 550e8400-e29b-41d4-a716-446655440000 -action panic=none \
    -drive file={dir}/disk,if=virtio,format=raw";

const PROOFS: &[(&str, Proof)] = &[
    ("query-block", Command("blockdev-add", add_drive)),
    ("query-block-exports", Command("nbd-server-add", export)),
    ("query-block-jobs", Command("blockdev-backup", back_up)),
    ("query-blockstats", Command("blockdev-add", add_drive)),
    ("query-named-block-nodes", Command("blockdev-add", add_drive)),
    ("query-commands", Narrowing),
    ("query-command-line-options", Nothing("they are those of the program")),
    (
        "query-cpu-definitions",
        Nothing("they are those of the program and the host's processor"),
    ),
    ("query-cpu-model-expansion", CommandLine("-smp 2")),
    ("query-chardev", CommandLine("-chardev null,id=n")),
    ("query-chardev-backends", Nothing("they are those of the program")),
    ("query-cpus-fast", CommandLine("-smp 2")),
    (
        "query-current-machine",
        Nothing("no machine type has a sleep state to be woken up from"),
    ),
    ("query-dump", Command("dump-guest-memory", dump)),
    (
        "query-dump-guest-memory-capability",
        Nothing("the formats are those of the program"),
    ),
    ("query-fdsets", Command("add-fd", add_fd)),
    ("query-hotpluggable-cpus", CommandLine("-smp 2")),
    ("query-iothreads", CommandLine("-object iothread,id=io0")),
    ("query-jobs", Command("blockdev-create", create_file)),
    ("query-kvm", Nothing("there is no machine without KVM")),
    ("query-machines", Nothing("they are those of the program")),
    ("query-memdev", CommandLine("-m 96")),
    ("query-memory-size-summary", CommandLine("-m 96")),
    ("query-name", CommandLine("-name another")),
    ("query-qmp-schema", Narrowing),
    ("query-status", Guest("test=panic")),
    ("query-target", Nothing("every guest is x86-64")),
    ("query-uuid", CommandLine("-uuid 550e8400-e29b-41d4-a716-446655440000")),
    ("query-version", Nothing("it is the program's")),
];

fn create_file(machine: &Machine, qmp: &mut Qmp) {
    let options = json!({"driver": "file", "filename": machine.path("new"), "size": 0});
    qmp.execute("blockdev-create", json!({"job-id": "j", "options": options}));
}

fn export(machine: &Machine, qmp: &mut Qmp) {
    qmp.execute("blockdev-add", json!({"driver": "null-co", "node-name": "exported"}));
    let address = json!({"type": "unix", "data": {"path": machine.path("s")}});
    qmp.execute("nbd-server-start", json!({"addr": address}));
    qmp.execute("nbd-server-add", json!({"device": "exported"}));
}

/// Which goes on until it is cancelled.
fn back_up(_: &Machine, qmp: &mut Qmp) {
    for name in ["source", "copy"] {
        qmp.execute("blockdev-add", json!({"driver": "null-co", "node-name": name}));
    }
    let arguments = json!({"device": "source", "target": "copy", "sync": "none", "job-id": "job"});
    qmp.execute("blockdev-backup", arguments);
}

fn dump(machine: &Machine, qmp: &mut Qmp) {
    let protocol = format!("file:{}", machine.path("d").display());
    qmp.execute("dump-guest-memory", json!({"paging": false, "protocol": protocol}));
}

/// In QMP 2.0's form, which makes a drive of a node.
fn add_drive(machine: &Machine, qmp: &mut Qmp) {
    let file = json!({"driver": "file", "filename": machine.path("disk").display().to_string()});
    qmp.execute(
        "blockdev-add",
        json!({"options": {"driver": "raw", "id": "drive", "file": file}}),
    );
}

fn add_fd(_: &Machine, qmp: &mut Qmp) {
    qmp.pass(&[std::fs::File::open("/dev/null").unwrap().as_fd()]);
    qmp.execute("add-fd", json!({}));
}

/// A machine that waits for `cont`, and a client. The guest is told what to do.
fn machine(more: &str, append: &str) -> (Machine, Qmp) {
    let directory = tempfile::tempdir().unwrap();
    std::fs::File::create(directory.path().join("disk"))
        .and_then(|file| file.set_len(1 << 20))
        .unwrap();
    let memory = if more.contains("-m ") { "" } else { "-m 64" };
    let arguments = format!("{memory} -S -kernel {} {more}", guest::image().display());
    let mut machine = Machine::start_with(directory, &arguments, &["-append", append]);
    let qmp = machine.qmp();
    (machine, qmp)
}

/// A query's answer before and after.
fn try_out(query: &str, proof: &Proof) -> (Value, Value) {
    match proof {
        CommandLine(arguments) => {
            let before = machine("", "test=spin").1.query(query);
            (before, machine(arguments, "test=spin").1.query(query))
        }
        Command(_, act) => {
            let (machine, mut qmp) = machine("", "test=spin");
            let before = qmp.query(query);
            act(&machine, &mut qmp);
            (before, qmp.query(query))
        }
        Guest(append) => {
            let (_machine, mut qmp) = machine("-action panic=pause", append);
            qmp.run("cont");
            // What the guest does shows in time; whether it ran at all when this was read does not matter.
            let before = json!({"running": true, "status": "running"});
            wait_until("the guest has acted", || qmp.query(query) != before);
            (before, qmp.query(query))
        }
        Narrowing => {
            let (machine, mut qmp) = machine("-qmp unix:{dir}/narrow,server=on,wait=off,allow=read-only", "test=spin");
            let mut narrow = None;
            wait_until("the narrow monitor takes clients", || {
                narrow = Qmp::connect(&machine.path("narrow")).ok();
                narrow.is_some()
            });
            (qmp.query(query), narrow.unwrap().query(query))
        }
        Nothing(_) => {
            let before = machine("", "test=spin").1.query(query);
            let (machine, mut qmp) = machine(ANOTHER, "test=spin");
            add_fd(&machine, &mut qmp);
            dump(&machine, &mut qmp);
            qmp.run("cont");
            (before, qmp.query(query))
        }
    }
}

#[test]
fn every_query_is_in_the_list() {
    need_kvm!();
    let (_machine, mut qmp) = machine("", "test=spin");
    let commands = qmp.run("query-commands");
    let names = commands
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["name"].as_str().unwrap());
    let queries: BTreeSet<_> = names.filter(|name| name.starts_with("query-")).collect();
    let listed: BTreeSet<_> = PROOFS.iter().map(|(query, _)| *query).collect();
    assert_eq!(listed.len(), PROOFS.len(), "one is listed twice");
    assert_eq!(queries, listed);
}

#[test]
fn every_answer_changes_with_what_it_is_about() {
    need_kvm!();
    for (query, proof) in PROOFS {
        let (before, after) = try_out(query, proof);
        let why = match proof {
            CommandLine(arguments) => format!("changes with {arguments}"),
            Command(command, _) => format!("changes with {command}"),
            Guest(append) => format!("changes when the guest does {append}"),
            Narrowing => "changes with the monitor's allow=".to_owned(),
            Nothing(reason) => format!("does not change: {reason}"),
        };
        println!("{query} {why}");
        let may_change = !matches!(proof, Nothing(_));
        assert_eq!(before != after, may_change, "{query} {why}: {before} {after}");
    }
}
