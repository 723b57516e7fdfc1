//! Monitors that have only some of the commands: what a hosting provider can give to a tenant.

use bulkhead_tests::machine::{Machine, refused, wait_until};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::schema::Schema;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};

/// A machine with a second monitor at `narrow`.
fn machine(narrow: &str) -> Machine {
    let kernel = guest::image();
    Machine::start(&format!(
        "-m 64 -kernel {} -append test=spin -S {narrow}",
        kernel.display()
    ))
}

fn narrow(machine: &mut Machine) -> Qmp {
    machine.qmp();
    let path = machine.path("narrow");
    let mut client = None;
    wait_until("the narrow monitor takes clients", || {
        client = Qmp::connect(&path).ok();
        client.is_some()
    });
    client.unwrap()
}

fn commands(qmp: &mut Qmp) -> Vec<String> {
    let commands = qmp.run("query-commands");
    commands
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["name"].as_str().unwrap().to_owned())
        .collect()
}

fn not_found(name: &str) -> Value {
    json!({"class": "CommandNotFound", "desc": format!("The command {name} has not been found")})
}

/// What looks without being called `query-…`.
const LOOKING: [&str; 5] = [
    "device-list-properties",
    "qom-get",
    "qom-list",
    "qom-list-properties",
    "qom-list-types",
];

/// All that is outside of the preset, whatever commands there will be.
fn beyond_read_only(commands: &[String]) -> Vec<&String> {
    let looks = |name: &str| name.starts_with("query-") || LOOKING.contains(&name) || name == "qmp_capabilities";
    commands.iter().filter(|name| !looks(name)).collect()
}

#[test]
fn a_read_only_monitor_looks_and_cannot_touch() {
    need_kvm!();
    let mut machine = machine("-qmp unix:{dir}/narrow,server=on,wait=off,allow=read-only");
    let mut full = machine.qmp();
    let mut narrow = narrow(&mut machine);
    let all = commands(&mut full);
    let beyond = beyond_read_only(&all);
    for name in &beyond {
        assert_eq!(narrow.try_execute(name, json!({})).unwrap_err(), not_found(name));
    }
    // Arguments do not matter: they are not looked at.
    let dump = json!({"paging": false, "protocol": "file:/dev/null"});
    assert_eq!(
        narrow.try_execute("dump-guest-memory", dump).unwrap_err(),
        not_found("dump-guest-memory")
    );
    for forbidden in [
        "human-monitor-command",
        "memsave",
        "pmemsave",
        "dump-guest-memory",
        "inject-nmi",
        "qom-set",
        "object-add",
        "chardev-add",
        "ringbuf-read",
        "getfd",
        "quit",
    ] {
        assert!(beyond.iter().any(|name| *name == forbidden), "{forbidden}");
    }
    let has = commands(&mut narrow);
    assert_eq!(beyond_read_only(&has), Vec::<&String>::new());
    assert_eq!(has.len(), all.len() - beyond.len());
    // It sees what another monitor does, and the other is not narrowed.
    assert_eq!(narrow.run("query-status")["status"], json!("prelaunch"));
    full.run("cont");
    assert_eq!(narrow.event()["event"], json!("RESUME"));
    assert_eq!(narrow.run("query-status")["status"], json!("running"));
}

/// Every command of the preset is carried out, with few arguments and with many; all that can be asked is the same before
/// and after.
#[test]
fn what_only_looks_changes_nothing() {
    need_kvm!();
    let mut machine = machine(
        "-chardev null,id=n -object iothread,id=io -device virtio-rng-pci,id=rng -qmp unix:{dir}/narrow,server=on,wait=off,allow=read-only",
    );
    let mut full = machine.qmp();
    let mut narrow = narrow(&mut machine);
    let schema = Schema::new(&full.run("query-qmp-schema")).unwrap();
    let queries: Vec<String> = commands(&mut full)
        .into_iter()
        .filter(|name| name.starts_with("query-"))
        .collect();
    let everything = |qmp: &mut Qmp| -> Vec<Value> {
        let mut answers: Vec<_> = queries.iter().map(|query| qmp.query(query)).collect();
        for path in ["/objects/io", "/machine/peripheral/rng", "/machine"] {
            let properties = qmp.execute("qom-list", json!({"path": path}));
            for property in properties.as_array().unwrap() {
                let of = json!({"path": path, "property": property["name"]});
                answers.extend(qmp.try_execute("qom-get", of));
            }
            answers.push(properties);
        }
        answers
    };
    let before = everything(&mut full);
    let has = commands(&mut narrow);
    for command in schema.commands().iter().filter(|command| has.contains(&command.name)) {
        for full in [false, true] {
            // A sample's words name nothing that exists: an error is an answer as well.
            let _ = narrow.try_execute(&command.name, schema.sample(&command.arguments, full));
        }
    }
    let io_thread = json!({"path": "/objects/io", "property": "poll-max-ns"});
    assert!(narrow.try_execute("qom-get", io_thread).is_ok());
    assert_eq!(everything(&mut full), before);
    assert!(before.len() > queries.len() + 5);
}

#[test]
fn a_list_and_a_file_give_exactly_what_they_name() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(
        directory.path().join("list"),
        "# run state\nquery-status cont\nstop # and back\nquery-commands\n",
    )
    .unwrap();
    let kernel = guest::image();
    let arguments = format!(
        "-m 64 -kernel {} -append test=spin -S -chardev socket,id=a,path={{dir}}/narrow,server=on,wait=off -mon a,mode=control,allow={{dir}}/list \
         -qmp unix:{{dir}}/other,server=on,wait=off,allow=query-name:query-commands",
        kernel.display()
    );
    let mut machine = Machine::start_in(directory, &arguments);
    let mut by_file = narrow(&mut machine);
    let mut sorted = commands(&mut by_file);
    sorted.sort();
    assert_eq!(
        sorted,
        ["cont", "qmp_capabilities", "query-commands", "query-status", "stop"]
    );
    by_file.run("cont");
    assert_eq!(by_file.run("query-status")["status"], json!("running"));
    by_file.run("stop");
    assert_eq!(by_file.try_execute("quit", json!({})).unwrap_err(), not_found("quit"));
    let mut by_list = Qmp::connect(&machine.path("other")).unwrap();
    assert_eq!(by_list.run("query-name"), json!({"name": "test"}));
    assert_eq!(commands(&mut by_list).len(), 3);
    assert_eq!(
        by_list.try_execute("query-status", json!({})).unwrap_err(),
        not_found("query-status")
    );
    assert_eq!(machine.qmp().run("query-status")["status"], json!("paused"));
}

#[test]
fn a_list_with_a_typing_error_starts_nothing() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("list"), "query-status\nquery-statsu\n").unwrap();
    let kernel = guest::image();
    let kernel = kernel.to_str().unwrap();
    for (allow, problem) in [
        ("query-statsu", "there is no command 'query-statsu'"),
        ("./list", "allow=./list: there is no command 'query-statsu'"),
        ("./missing", "allow=./missing: ENOENT"),
    ] {
        let text = refused(
            directory.path(),
            &[
                "-kernel",
                kernel,
                "-qmp",
                &format!("unix:q,server=on,wait=off,allow={allow}"),
            ],
        );
        assert!(text.contains(problem), "{text}");
    }
}
