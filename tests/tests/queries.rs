//! Queries tell what is: for each, a test changes the machine by another way and sees the answer change.
//!
//! Answers that cannot change, and why: query-target (every guest is x86-64), query-machines and query-cpu-definitions
//! (they are the lists of `-machine help` and `-cpu help`, which is tested), query-current-machine (the machine has no
//! sleep states), query-command-line-options (the options of this build: tested against what the command line takes);
//! the members of query-memdev other than its size (guest memory is always a shared memfd).

use bulkhead_tests::machine::{Machine, programs, wait_until};
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

fn machine(more: &str) -> Machine {
    let kernel = guest::image();
    Machine::start(&format!("-kernel {} -append test=spin {more}", kernel.display()))
}

fn list(value: Value) -> Vec<Value> {
    match value {
        Value::Array(items) => items,
        other => panic!("{other} is no list"),
    }
}

/// The first words of the lines of an answer to `help`.
fn listed(arguments: &[&str]) -> Vec<String> {
    let output = std::process::Command::new(programs().join("bulkhead"))
        .args(arguments)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .skip(1)
        .filter_map(|line| Some(line.split_whitespace().next()?.to_owned()))
        .collect()
}

fn names(value: Value) -> Vec<String> {
    list(value)
        .iter()
        .map(|entry| entry["name"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn the_uuid_is_the_command_lines() {
    need_kvm!();
    let uuid = "550e8400-e29b-41d4-a716-4466554400ff";
    assert_eq!(
        machine(&format!("-m 64 -uuid {uuid}")).qmp().run("query-uuid"),
        json!({"UUID": uuid})
    );
    let none = "00000000-0000-0000-0000-000000000000";
    assert_eq!(machine("-m 64").qmp().run("query-uuid"), json!({"UUID": none}));
}

#[test]
fn memory_is_as_large_as_was_asked_for() {
    need_kvm!();
    for mib in [64_u64, 96] {
        let mut machine = machine(&format!("-m {mib}"));
        let mut qmp = machine.qmp();
        assert_eq!(qmp.run("query-memory-size-summary"), json!({"base-memory": mib << 20}));
        let memory = list(qmp.run("query-memdev"));
        assert_eq!(memory.len(), 1);
        assert_eq!(memory[0]["size"], json!(mib << 20));
        assert_eq!(memory[0]["share"], json!(true));
        assert_eq!(memory[0]["policy"], json!("default"));
    }
}

#[test]
fn every_vcpu_has_its_slot_and_agrees_with_query_cpus_fast() {
    need_kvm!();
    for (smp, vcpus) in [("1", 1), ("4,sockets=2,threads=2", 4)] {
        let mut machine = machine(&format!("-m 64 -smp {smp}"));
        let mut qmp = machine.qmp();
        let slots = list(qmp.run("query-hotpluggable-cpus"));
        let mut cpus = list(qmp.run("query-cpus-fast"));
        assert_eq!((slots.len(), cpus.len()), (vcpus, vcpus));
        cpus.reverse();
        for (slot, cpu) in slots.iter().zip(&cpus) {
            assert_eq!(slot["props"], cpu["props"]);
            assert_eq!(slot["qom-path"], cpu["qom-path"]);
            assert_eq!(slot["vcpus-count"], json!(1));
        }
        let last = &slots[0]["props"];
        let expected = if vcpus == 1 { [0, 0, 0] } else { [1, 0, 1] };
        assert_eq!(
            [&last["socket-id"], &last["core-id"], &last["thread-id"]].map(|id| id.as_i64().unwrap()),
            expected
        );
    }
}

#[test]
fn iothreads_are_those_that_were_asked_for_and_each_is_a_thread_of_block_proc() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    std::fs::File::create(directory.path().join("disk"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let kernel = guest::image();
    let arguments = format!(
        "-m 64 -kernel {} -append test=spin -drive file={{dir}}/disk,if=virtio,format=raw",
        kernel.display()
    );
    // A disk has a thread, but that is no iothread.
    let mut plain = Machine::start_in(directory, &arguments);
    assert_eq!(plain.qmp().run("query-iothreads"), json!([]));
    let mut machine = machine("-m 64 -object iothread,id=io0,poll-max-ns=5 -object iothread,id=io1");
    let threads = list(machine.qmp().run("query-iothreads"));
    let block_proc = machine.helper("block-proc");
    assert_eq!(threads.len(), 2, "{threads:?}");
    assert_eq!((&threads[0]["id"], &threads[1]["id"]), (&json!("io0"), &json!("io1")));
    assert_eq!(
        (&threads[0]["poll-max-ns"], &threads[1]["poll-max-ns"]),
        (&json!(5), &json!(32768))
    );
    for (thread, name) in threads.iter().zip(["iothread-1\n", "iothread-2\n"]) {
        let id = thread["thread-id"].as_i64().unwrap();
        let comm = std::fs::read_to_string(Path::new(&format!("/proc/{block_proc}/task/{id}/comm"))).unwrap();
        assert_eq!(comm, name);
    }
}

#[test]
fn machines_and_cpu_models_are_those_of_the_command_line() {
    need_kvm!();
    let mut machine = machine("-m 64");
    let mut qmp = machine.qmp();
    assert_eq!(qmp.run("query-target"), json!({"arch": "x86_64"}));
    assert_eq!(
        qmp.run("query-current-machine"),
        json!({"wakeup-suspend-support": false})
    );
    let machines = qmp.run("query-machines");
    let defaults: Vec<_> = list(machines.clone())
        .into_iter()
        .filter(|machine| machine["is-default"] == json!(true))
        .collect();
    assert_eq!(defaults.len(), 1, "{machines}");
    assert_eq!(names(machines), listed(&["-machine", "help"]));
    let models = qmp.run("query-cpu-definitions");
    assert_eq!(defaults[0]["default-cpu-type"], models[0]["typename"]);
    assert_eq!(names(models), listed(&["-cpu", "help"]));
}

#[test]
fn the_command_line_takes_the_keys_that_are_listed() {
    need_kvm!();
    let mut machine = machine("-m 64");
    let mut qmp = machine.qmp();
    let all = list(qmp.run("query-command-line-options"));
    for option in &all {
        let name = option["option"].as_str().unwrap();
        let same = qmp.execute("query-command-line-options", json!({"option": name}));
        assert_eq!(same, json!([option]));
        // A key that is listed is never unknown; one that is not, always.
        for parameter in option["parameters"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| entry["name"].as_str().unwrap())
        {
            assert!(
                !complaint(name, parameter).contains("there is no key"),
                "-{name} {parameter}"
            );
        }
        // Those whose keys depend on a value have none here.
        let is_open = ["accel", "device", "net", "nic", "object"].contains(&name);
        assert_eq!(option["parameters"] == json!([]), is_open, "{option}");
        assert!(
            is_open || complaint(name, "nosuchkey").contains("there is no key 'nosuchkey'"),
            "-{name}"
        );
    }
    assert!(all.len() > 15, "{all:?}");
    let error = qmp
        .try_execute("query-command-line-options", json!({"option": "nosuch"}))
        .unwrap_err();
    assert_eq!(error["desc"], json!("invalid option name: nosuch"));
}

/// What the command line says about an option with this key and a value that no key has.
fn complaint(option: &str, key: &str) -> String {
    // Which keys a character device has depends on what it is.
    let backends: &[&str] = if option == "chardev" {
        &["socket,", "udp,", "file,", "pty,", "ringbuf,"]
    } else {
        &[""]
    };
    // QEMU's names of these are others than on the command line.
    let option = match option {
        "memory" => "m",
        "smp-opts" => "smp",
        "boot-opts" => "boot",
        other => other,
    };
    let complaints = backends.iter().map(|backend| {
        let value = format!("{backend}{key}=\u{1}");
        let program = std::process::Command::new(programs().join("bulkhead"))
            .args([&format!("-{option}"), &value])
            .output();
        String::from_utf8(program.unwrap().stderr).unwrap()
    });
    // The most favourable of them.
    complaints.min_by_key(|text| text.contains("there is no key")).unwrap()
}

#[test]
fn a_nonmaskable_interrupt_reaches_a_guest_that_runs_or_is_stopped() {
    need_kvm!();
    let nmi = "exception vector=2";
    // The second vCPU has not been started: it is left alone.
    let mut running = machine("-m 64 -smp 2");
    let mut qmp = running.qmp();
    running.wait_for_serial("spin");
    assert_eq!(qmp.run("inject-nmi"), json!({}));
    running.wait_for_serial(nmi);
    let mut stopped = machine("-m 64");
    let mut qmp = stopped.qmp();
    stopped.wait_for_serial("spin");
    qmp.run("stop");
    assert_eq!(qmp.run("inject-nmi"), json!({}));
    assert_eq!(qmp.run("query-status")["status"], json!("paused"));
    assert!(!stopped.serial().contains(nmi), "the guest went on while stopped");
    qmp.run("cont");
    stopped.wait_for_serial(nmi);
}

#[test]
fn a_guest_that_sets_its_clock_is_noticed_but_cannot_flood_anybody() {
    need_kvm!();
    let kernel = guest::image();
    let arguments = format!("-m 64 -kernel {} -S", kernel.display());
    let tests = [
        "-append",
        "test=rtc-set times=60 year=10 test=rtc-set times=60 year=10 test=rtc-set year=80 test=spin",
    ];
    let mut machine = Machine::start_with(tempfile::tempdir().unwrap(), &arguments, &tests);
    let mut qmp = machine.qmp();
    let begun = Instant::now();
    qmp.run("cont");
    machine.wait_for_serial("spin 0");
    // The last change is told, if late: only it leads to 2080.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
    let year = |offset: i64| 1970 + (now + offset) / 31_556_952;
    let mut events = 0;
    loop {
        let change = qmp.wait_event("RTC_CHANGE");
        events += 1;
        assert_eq!(change["qom-path"], json!("/machine/rtc"));
        if year(change["offset"].as_i64().unwrap()) == 2080 {
            break;
        }
    }
    assert!(
        events <= begun.elapsed().as_secs() + 1,
        "{events} events in {:?}",
        begun.elapsed()
    );
}

fn panicking(more: &str) -> Machine {
    let kernel = guest::image();
    let arguments = format!("-m 64 -kernel {} -S {more}", kernel.display());
    Machine::start_with(
        tempfile::tempdir().unwrap(),
        &arguments,
        &["-append", "test=panic test=hello"],
    )
}

#[test]
fn set_action_decides_what_a_panic_leads_to_and_so_does_the_command_line() {
    need_kvm!();
    for by_command in [false, true] {
        let start = |action: &str| {
            let mut machine = panicking(&if by_command {
                String::new()
            } else {
                format!("-action panic={action}")
            });
            let mut qmp = machine.qmp();
            if by_command {
                assert_eq!(qmp.execute("set-action", json!({"panic": action})), json!({}));
            }
            qmp.run("cont");
            (machine, qmp)
        };
        let (_machine, mut qmp) = start("pause");
        assert_eq!(qmp.wait_event("GUEST_PANICKED"), json!({"action": "pause"}));
        wait_until("the machine is stopped", || {
            qmp.run("query-status")["status"] == json!("guest-panicked")
        });
        let (mut machine, mut qmp) = start("none");
        assert_eq!(qmp.wait_event("GUEST_PANICKED"), json!({"action": "run"}));
        // The guest goes on to its next test and powers off.
        assert_eq!(
            qmp.wait_event("SHUTDOWN"),
            json!({"guest": true, "reason": "guest-shutdown"})
        );
        assert_eq!(machine.wait().code(), Some(0));
        for (action, status) in [("shutdown", 0), ("exit-failure", 1)] {
            let (mut machine, mut qmp) = start(action);
            assert_eq!(qmp.wait_event("GUEST_PANICKED"), json!({"action": "poweroff"}));
            assert_eq!(
                qmp.wait_event("SHUTDOWN"),
                json!({"guest": true, "reason": "guest-panic"})
            );
            assert_eq!(machine.wait().code(), Some(status), "{action}: {}", machine.log());
        }
    }
}

#[test]
fn set_action_changes_what_the_command_line_said_about_reboot_and_shutdown() {
    need_kvm!();
    let kernel = guest::image();
    let start = |append: &str, more: &str| {
        let arguments = format!("-m 64 -kernel {} -S {more}", kernel.display());
        Machine::start_with(tempfile::tempdir().unwrap(), &arguments, &["-append", append])
    };
    let mut machine = start("test=hello", "-no-shutdown");
    let mut qmp = machine.qmp();
    qmp.execute("set-action", json!({"shutdown": "poweroff", "watchdog": "inject-nmi"}));
    qmp.run("cont");
    assert_eq!(machine.wait().code(), Some(0));
    let mut machine = start("test=reset how=i8042", "-no-reboot");
    let mut qmp = machine.qmp();
    qmp.execute("set-action", json!({"reboot": "reset", "shutdown": "pause"}));
    qmp.run("cont");
    assert_eq!(qmp.wait_event("RESET"), json!({"guest": true, "reason": "guest-reset"}));
    qmp.execute("set-action", json!({"reboot": "shutdown"}));
    assert_eq!(
        qmp.wait_event("SHUTDOWN"),
        json!({"guest": true, "reason": "guest-reset"})
    );
    wait_until("the machine stays", || {
        qmp.run("query-status")["status"] == json!("shutdown")
    });
    let error = qmp.try_execute("set-action", json!({"panic": "reset"})).unwrap_err();
    assert_eq!(error["desc"], json!("Parameter 'panic' does not accept value 'reset'"));
}
