//! vcpu-proc is killed and the evidence survives: the machine stays with its memory and its vCPUs' last registers, to be dumped
//! and looked into until it is told to end.

use bulkhead_tests::dumpfile::Dump;
use bulkhead_tests::inject::call;
use bulkhead_tests::machine::{Machine, wait_until};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm, procfs};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const RAM_BYTES: u64 = 64 << 20;

fn start(options: &str) -> Machine {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk"), vec![0; 1 << 20]).unwrap();
    let arguments = format!(
        "-m 64 -smp 2 -kernel {} -append test=spin -drive file={{dir}}/disk,if=virtio,format=raw,id=d {options}",
        guest::image().display()
    );
    Machine::start_in(directory, &arguments)
}

fn running(options: &str) -> (Machine, Qmp) {
    let mut machine = start(options);
    machine.wait_for_serial("spin");
    let qmp = machine.qmp();
    (machine, qmp)
}

fn shoot(machine: &Machine) -> i32 {
    let victim = machine.helper("vcpu-proc");
    kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
    victim
}

/// All vCPUs' registers as a human sees them, but KERNEL_GS_BASE and whether they are halted, which the run page has not.
fn registers(qmp: &mut Qmp) -> String {
    let text = qmp.execute("human-monitor-command", json!({"command-line": "info registers -a"}));
    let text = text.as_str().unwrap();
    assert_eq!(text.matches("CPU#").count(), 2, "{text}");
    text.split(" HLT=")
        .map(|part| part.trim_start_matches(['0', '1']))
        .collect()
}

fn lost(qmp: &mut Qmp, victim: i32) {
    let event = qmp.wait_event("BULKHEAD_HELPER_LOST");
    assert_eq!(event["role"], "vcpu-proc");
    let reason = event["reason"].as_str().unwrap();
    assert!(reason.contains(&victim.to_string()), "{reason}");
    qmp.wait_event("STOP");
    let status = qmp.run("query-status");
    assert_eq!(
        (&status["status"], &status["running"]),
        (&json!("internal-error"), &json!(false))
    );
}

/// A whole dump of both vCPUs.
fn check_dump(path: &std::path::Path) {
    let dump = Dump::open(std::fs::File::open(path).unwrap()).unwrap();
    bulkhead_tests::dumpfile::notes::check(dump.notes(), 2).unwrap();
    assert!(path.metadata().unwrap().len() > 0);
}

fn refused(qmp: &mut Qmp, command: &str, arguments: Value) -> String {
    let error = qmp.try_execute(command, arguments).expect_err(command);
    error["desc"].as_str().unwrap().to_owned()
}

#[test]
fn the_machine_stays_to_be_dumped_and_looked_into_and_does_not_run_again() {
    need_kvm!();
    let (mut machine, mut qmp) = running("");
    let pids: Vec<i32> = machine.helpers().into_iter().map(|(_, pid)| pid).collect();
    let before = registers(&mut qmp);
    let victim = shoot(&machine);
    lost(&mut qmp, victim);

    // The control registers and tables of a guest that spins do not change.
    let after = registers(&mut qmp);
    let tables = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| {
            ["GDT", "IDT", "CR0", "EFER"]
                .iter()
                .any(|begin| line.starts_with(begin))
        });
        lines.map(str::to_owned).collect()
    };
    assert!(tables(&before).len() >= 6, "{before}");
    assert_eq!(tables(&before), tables(&after));
    assert_eq!(after, registers(&mut qmp), "they change though nobody runs");

    for format in ["elf", "kdump-raw-zlib"] {
        let path = machine.path(format);
        let protocol = format!("file:{}", path.display());
        qmp.execute(
            "dump-guest-memory",
            json!({"paging": false, "protocol": protocol, "format": format}),
        );
        check_dump(&path);
    }
    let elf = std::fs::read(machine.path("elf")).unwrap();
    assert!(elf.len() as u64 > RAM_BYTES && elf.windows(5).any(|five| five == b"BHG: "));
    let saved = machine.path("saved");
    qmp.execute("pmemsave", json!({"val": 0, "size": 4096, "filename": saved}));
    assert_eq!(saved.metadata().unwrap().len(), 4096);

    let text =
        "vcpu-proc has ended for good: this machine can be dumped, looked into and ended, but does not run again";
    for command in ["cont", "system_reset", "system_powerdown"] {
        assert_eq!(refused(&mut qmp, command, json!({})), text, "{command}");
    }
    let live = json!({"paging": false, "protocol": "file:/dev/null", "live": true});
    assert_eq!(refused(&mut qmp, "dump-guest-memory", live), text);
    assert_eq!(refused(&mut qmp, "inject-nmi", json!({})), "vcpu-proc has ended");
    qmp.run("stop");
    qmp.run("query-cpus-fast");
    qmp.run("query-block");
    assert_eq!(qmp.run("query-status")["status"], "internal-error");

    qmp.run("quit");
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
    wait_until("no process is left", || !pids.iter().any(|pid| procfs::is_alive(*pid)));
    assert!(!machine.path("qmp").exists(), "the monitor's socket stayed");
    let log = machine.log();
    let words = ["vcpu-proc", "SIGKILL", "the vCPUs are lost", &victim.to_string()];
    assert!(words.iter().all(|word| log.contains(word)), "{log}");
}

#[test]
fn the_last_registers_of_a_stopped_machine_are_those_that_it_stopped_with() {
    need_kvm!();
    let (machine, mut qmp) = running("");
    qmp.run("stop");
    qmp.wait_event("STOP");
    let before = registers(&mut qmp);
    shoot(&machine);
    qmp.wait_event("BULKHEAD_HELPER_LOST");
    assert_eq!(registers(&mut qmp), before);
    wait_until("the run state says so", || {
        qmp.run("query-status")["status"] == "internal-error"
    });
    // Clients know that it is stopped.
    assert!(!qmp.events().iter().any(|event| event["event"] == "STOP"));
}

#[test]
fn a_machine_that_has_not_run_yet_has_the_registers_that_it_would_begin_with() {
    need_kvm!();
    let mut machine = start("-S");
    let mut qmp = machine.qmp();
    let before = registers(&mut qmp);
    assert!(
        !before.contains("IP=00000000 ") && !before.contains("IP=0000000000000000 "),
        "{before}"
    );
    shoot(&machine);
    qmp.wait_event("BULKHEAD_HELPER_LOST");
    assert_eq!(registers(&mut qmp), before);
}

#[test]
fn a_dump_is_written_at_once_where_that_is_wanted() {
    need_kvm!();
    let (machine, mut qmp) = running("-dump-on-crash file:{dir}/core");
    let victim = shoot(&machine);
    lost(&mut qmp, victim);
    let done = qmp.wait_event("DUMP_COMPLETED");
    assert_eq!(done["result"]["status"], "completed", "{done}");
    check_dump(&machine.path("core"));
    // The log has it when the clients have been told.
    wait_until("the log says where", || {
        machine.log().contains("internal error: its memory is in")
    });
    assert_eq!(qmp.run("query-status")["status"], "internal-error");
}

#[test]
fn it_ends_after_the_dump_where_the_action_says_so() {
    need_kvm!();
    for option in [true, false] {
        let options = if option { "-action helper-loss=shutdown" } else { "" };
        let (mut machine, mut qmp) = running(&format!("-dump-on-crash file:{{dir}}/core,format=elf {options}"));
        if !option {
            qmp.execute("set-action", json!({"helper-loss": "shutdown"}));
        }
        shoot(&machine);
        qmp.wait_event("DUMP_COMPLETED");
        assert_eq!(
            qmp.wait_event("SHUTDOWN"),
            json!({"guest": false, "reason": "host-error"})
        );
        assert_eq!(machine.wait().code(), Some(1));
        check_dump(&machine.path("core"));
        assert!(machine.log().contains("the machine ends"), "{}", machine.log());
    }
}

#[test]
fn a_broken_policy_is_such_an_end() {
    need_kvm!();
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: needs root");
        return;
    }
    let (machine, mut qmp) = running("");
    let victim = machine.helper("vcpu-proc");
    assert_eq!(call(victim, libc::SYS_readlink, [0; 6]), None, "it lives");
    let violation = qmp.wait_event("BULKHEAD_POLICY_VIOLATION");
    assert_eq!(
        (&violation["role"], &violation["syscall"]),
        (&json!("vcpu-proc"), &json!("readlink"))
    );
    let event = qmp.wait_event("BULKHEAD_HELPER_LOST");
    assert!(
        event["reason"]
            .as_str()
            .unwrap()
            .contains("broken its policy (readlink)"),
        "{event}"
    );
    qmp.wait_event("STOP");
    registers(&mut qmp);
}

#[test]
fn a_block_proc_that_ends_too_often_is_one_too() {
    need_kvm!();
    let (machine, mut qmp) = running("--restart-budget 0/60 -dump-on-crash file:{dir}/core");
    kill(Pid::from_raw(machine.helper("block-proc")), Signal::SIGKILL).unwrap();
    assert_eq!(qmp.wait_event("BULKHEAD_HELPER_LOST")["role"], "block-proc");
    assert_eq!(qmp.wait_event("DUMP_COMPLETED")["result"]["status"], "completed");
    check_dump(&machine.path("core"));
    let refusal = refused(&mut qmp, "system_reset", json!({}));
    assert!(refusal.starts_with("block-proc has ended for good"), "{refusal}");
}

#[test]
fn a_machine_that_nobody_could_ask_ends() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let kernel = guest::image().display().to_string();
    let log = std::fs::File::create(directory.path().join("log")).unwrap();
    let mut child = std::process::Command::new(bulkhead_tests::machine::programs().join("bulkhead"))
        .args(["-nodefaults", "-m", "64", "-append", "test=spin", "-kernel", &kernel])
        .args(["-dump-on-crash", "file:core", "-pidfile", "pid"])
        .current_dir(directory.path())
        .stdin(std::process::Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let supervisor = child.id() as i32;
    let vcpu = || {
        let launchers = procfs::children(supervisor).into_iter();
        let mut helpers = launchers.flat_map(procfs::children);
        helpers.find(|pid| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "vcpu-proc\n"))
    };
    // Until it is up, its end would be the machine's: only then does a vCPU consume time.
    wait_until("the guest runs", || vcpu().is_some_and(has_run));
    kill(Pid::from_raw(vcpu().unwrap()), Signal::SIGKILL).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let log = std::fs::read_to_string(directory.path().join("log")).unwrap();
    assert!(
        log.contains("its memory is in core") && log.contains("the machine ends"),
        "{log}"
    );
    assert!(directory.path().join("core").exists());
}

/// Whether a vCPU of this process has used half a second.
fn has_run(pid: i32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let ticks = |stat: String| -> Option<u64> { stat.rsplit(')').next()?.split_whitespace().nth(11)?.parse().ok() };
    tasks
        .filter_map(|task| {
            let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
            let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
            name.starts_with("vcpu0").then(|| ticks(stat))?
        })
        .any(|ticks| ticks >= 50)
}
