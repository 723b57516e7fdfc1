//! Many machines on one host: each with ids and control groups of its own, with metrics, and leaving nothing behind however it
//! ends.

use bulkhead_tests::machine::{Machine, programs, wait_until};
use bulkhead_tests::procfs;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// Returns from the test, and says why, where control groups cannot be made.
macro_rules! need_groups {
    () => {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        if roots().is_empty() {
            println!("SKIPPED: no hierarchy of control groups is mounted");
            return;
        }
    };
}

/// The hierarchies in which machines make groups.
fn roots() -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let of = |kind: &str| {
        let lines = mounts.lines().filter(|line| line.contains(kind));
        lines
            .map(|line| PathBuf::from(line.split(' ').nth(4).unwrap()))
            .collect::<Vec<_>>()
    };
    // Where version 1 has the controllers that count, version 2 may have others.
    let limits_memory = |root: &PathBuf| {
        let controllers = std::fs::read_to_string(root.join("cgroup.controllers"));
        controllers.is_ok_and(|text| text.split_whitespace().any(|name| name == "memory"))
    };
    let second: Vec<_> = of(" - cgroup2 ").into_iter().filter(limits_memory).collect();
    if !second.is_empty() {
        return second;
    }
    let names = ["cpu", "cpuacct", "memory", "pids", "blkio"];
    let used = |root: &PathBuf| {
        let name = root.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.split(',').any(|name| names.contains(&name))
    };
    of(" - cgroup ").into_iter().filter(used).collect()
}

/// A parent for one test's groups; removed at the end, which only works when nothing is left in it.
struct Parent(String);

impl Parent {
    fn new(test: &str) -> Self {
        Self(format!("bulkhead-test-{test}-{}", std::process::id()))
    }

    /// What is in it, in all hierarchies.
    fn groups(&self) -> Vec<PathBuf> {
        let entries = roots()
            .into_iter()
            .flat_map(|root| std::fs::read_dir(root.join(&self.0)).into_iter().flatten());
        let entries = entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|of| of.is_dir()));
        // Where wardens stay.
        let entries = entries.filter(|entry| entry.file_name() != "warden");
        entries.map(|entry| entry.path()).collect()
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            wait_until("no control group is left", || self.groups().is_empty());
        }
        for root in roots() {
            let _ = std::fs::remove_dir(root.join(&self.0).join("warden"));
            let _ = std::fs::remove_dir(root.join(&self.0));
        }
    }
}

fn scrape(path: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The metrics of a machine: name with labels, value.
fn metrics(path: &Path) -> BTreeMap<String, f64> {
    let answer = scrape(path, "GET /metrics HTTP/1.1\r\nHost: bulkhead\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.0 200 OK\r\n"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    let lines = body.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

fn warden(machine: &Machine) -> i32 {
    let children = procfs::children(machine.pid());
    let is_warden = |pid: &i32| procfs::name(*pid).as_deref() == Some("warden");
    children.into_iter().find(is_warden).expect("a warden")
}

fn uids(machine: &Machine) -> BTreeSet<u32> {
    let mut helpers = machine.helpers();
    // One that is being started has no id of its own before it has its program.
    helpers.retain(|(name, _)| name.ends_with("-proc"));
    let pids = helpers.iter().map(|(_, pid)| *pid).chain([machine.launcher()]);
    let real = |pid: i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        procfs::field(&status, "Uid")
            .split_whitespace()
            .next()
            .unwrap()
            .parse::<u32>()
            .unwrap()
    };
    let found: Vec<u32> = pids.map(real).collect();
    let set: BTreeSet<u32> = found.iter().copied().collect();
    assert_eq!(set.len(), found.len(), "roles of one machine share an id: {found:?}");
    set
}

const NO_GUEST: &str = "-machine none -metrics unix:{dir}/metrics";

fn tenant(parent: &Parent, more: &str) -> Machine {
    Machine::start(&format!("{NO_GUEST} -cgroup parent={} {more}", parent.0))
}

/// Starts so many machines, looks at each, ends half of them by quit and kills the others' supervisors.
fn many(count: usize) {
    let parent = Parent::new(&format!("many-{count}"));
    let mut machines: Vec<Machine> = (0..count).map(|_| tenant(&parent, "")).collect();
    let mut ids = BTreeSet::new();
    let mut processes = Vec::new();
    for machine in &mut machines {
        // As long as the client is there, so is its qmp-proc.
        let _client = machine.qmp();
        let own = uids(machine);
        assert!(
            !own.contains(&0) && ids.is_disjoint(&own),
            "{own:?} are not its own: {ids:?}"
        );
        ids.extend(own);
        processes.extend(machine.processes());
        let metrics = metrics(&machine.path("metrics"));
        assert!(metrics["bulkhead_uptime_seconds{vm=\"test\"}"] > 0.0);
        for role in ["supervisor", "block-proc", "qmp-proc"] {
            for metric in ["cpu_seconds_total", "memory_bytes", "threads"] {
                let name = format!("bulkhead_{metric}{{vm=\"test\",role=\"{role}\"}}");
                assert!(
                    metrics.get(&name).is_some_and(|value| *value > 0.0),
                    "{name}: {metrics:#?}"
                );
            }
        }
    }
    assert_eq!(parent.groups().len(), count * roots().len());
    for (place, machine) in machines.iter_mut().enumerate() {
        if place % 2 == 0 {
            machine.qmp().execute("quit", json!({}));
            assert!(machine.wait().success());
        } else {
            machine.kill();
        }
    }
    wait_until("no control group is left", || parent.groups().is_empty());
    wait_until("no process is left", || {
        !processes.iter().any(|pid| procfs::is_alive(*pid))
    });
    for machine in &machines {
        for socket in ["qmp", "metrics"] {
            assert!(!machine.path(socket).exists(), "{socket} is left");
        }
    }
}

#[test]
fn twenty_machines_share_no_id_and_leave_nothing() {
    need_groups!();
    many(20);
}

#[test]
#[ignore = "a hundred machines: for make soak"]
fn a_hundred_machines_share_no_id_and_leave_nothing() {
    need_groups!();
    many(100);
}

#[test]
fn limits_are_there_before_a_helper_is_and_hold_for_its_successor() {
    need_groups!();
    let parent = Parent::new("limits");
    let limits = "block.pids.max=77,block.memory.max=512M,all.cpu.max=200000/100000";
    let mut machine = Machine::start(&format!("{NO_GUEST} -cgroup parent={},{limits}", parent.0));
    let mut qmp = machine.qmp();
    let find = |file: &str| {
        let groups = parent
            .groups()
            .into_iter()
            .map(|group| group.join("block-proc").join(file));
        groups.filter_map(|path| std::fs::read_to_string(path).ok()).next()
    };
    assert_eq!(find("pids.max").unwrap().trim(), "77");
    let memory = find("memory.max").or_else(|| find("memory.limit_in_bytes")).unwrap();
    assert_eq!(memory.trim(), (512 << 20).to_string());
    let quota = find("cpu.cfs_quota_us").or_else(|| find("cpu.max")).unwrap();
    assert!(quota.starts_with("200000"), "{quota}");
    let first = machine.helper("block-proc");
    let members = || find("cgroup.procs").unwrap().trim().to_owned();
    assert_eq!(members(), first.to_string());
    qmp.execute("bulkhead-restart-helper", json!({"role": "block-proc"}));
    let successor = machine.helper("block-proc");
    assert_ne!(first, successor);
    wait_until("the successor alone is in the group", || {
        members() == successor.to_string()
    });
    let name = "bulkhead_restarts_total{vm=\"test\",role=\"block-proc\"}";
    wait_until("the restart is counted", || {
        metrics(&machine.path("metrics"))[name] > 0.0
    });
}

#[test]
fn metrics_say_what_state_the_machine_is_in_and_ask_for_http() {
    let mut machine = Machine::start(NO_GUEST);
    let mut qmp = machine.qmp();
    let path = machine.path("metrics");
    let state = qmp.execute("query-status", json!({}))["status"]
        .as_str()
        .unwrap()
        .to_owned();
    let name = format!("bulkhead_run_state{{vm=\"test\",state=\"{state}\"}}");
    wait_until("the state is told", || metrics(&path).get(&name) == Some(&1.0));
    assert_eq!(
        metrics(&path)["bulkhead_violations_total{vm=\"test\",role=\"qmp-proc\"}"],
        0.0
    );
    for (request, answer) in [
        ("GET /etc/passwd HTTP/1.0\r\n\r\n", "HTTP/1.0 404 "),
        ("POST /metrics HTTP/1.0\r\n\r\n", "HTTP/1.0 405 "),
        ("nonsense\n\n", "HTTP/1.0 405 "),
    ] {
        assert!(scrape(&path, request).starts_with(answer), "{request:?}");
    }
    // Longer than any request, and never ending: hung up on.
    let mut stream = UnixStream::connect(&path).unwrap();
    let _ = stream.write_all(&[b'a'; 64 << 10]);
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert_eq!(rest, b"");
    // Clients that say nothing keep nobody away for long, and the machine not at all.
    let silent: Vec<_> = (0..20).map(|_| UnixStream::connect(&path).unwrap()).collect();
    assert_eq!(qmp.execute("query-status", json!({}))["status"], state.as_str());
    drop(silent);
    assert!(metrics(&path).contains_key(&name));
}

#[test]
fn a_file_where_the_metrics_shall_be_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, "precious").unwrap();
    let option = format!("unix:{}", path.display());
    let refusal = bulkhead_tests::machine::refused(directory.path(), &["-machine", "none", "--metrics", &option]);
    assert!(refusal.contains("--metrics") && refusal.contains("in use"), "{refusal}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    // A socket that nobody listens at any more is in nobody's way.
    let stale = directory.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let mut machine = Machine::start(&format!("-machine none --metrics unix:{}", stale.display()));
    machine.qmp();
    assert!(metrics(&stale)["bulkhead_uptime_seconds{vm=\"test\"}"] > 0.0);
}

#[test]
fn without_its_warden_a_machine_goes_on() {
    let mut machine = Machine::start(NO_GUEST);
    let mut qmp = machine.qmp();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(warden(&machine)),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    qmp.execute("query-status", json!({}));
    qmp.execute("quit", json!({}));
    assert!(machine.wait().success());
}

#[test]
fn the_audit_of_a_hosted_machine_is_clean() {
    need_groups!();
    let parent = Parent::new("audit");
    let mut machine = tenant(&parent, "");
    machine.qmp();
    let _scraper = UnixStream::connect(machine.path("metrics")).unwrap();
    let output = std::process::Command::new(programs().join("bulkhead"))
        .args(["audit", "live", &machine.pid().to_string()])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("warden"), "{text}");
}

#[test]
fn two_machines_are_not_given_the_same_ids() {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: needs root");
        return;
    }
    // Far from where ids are taken by themselves.
    let base = 0x6000_0000 + (std::process::id() % (1 << 20)) * 64;
    let mut first = Machine::start(&format!("-machine none -sandbox on,uid-base={base}"));
    first.qmp();
    assert!(uids(&first).iter().all(|uid| (base..base + 64).contains(uid)));
    let option = format!("on,uid-base={base}");
    let scratch = tempfile::tempdir().unwrap();
    let refusal = bulkhead_tests::machine::refused(scratch.path(), &["-machine", "none", "-sandbox", &option]);
    assert!(refusal.contains("another machine has ids of this range"), "{refusal}");
    first.kill();
    let mut next = Machine::start(&format!("-machine none -sandbox on,uid-base={base}"));
    next.qmp();
}
