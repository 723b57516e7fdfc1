//! The walls of a running machine, as the kernel describes them in /proc.

use bulkhead_tests::machine::{Machine, wait_until};
use bulkhead_tests::{guest, need_kvm, procfs};

fn machine(disk_count: usize) -> Machine {
    let directory = tempfile::tempdir().unwrap();
    let mut arguments = format!("-m 64 -smp 2 -kernel {} -append test=spin", guest::image().display());
    for index in 0..disk_count {
        std::fs::write(directory.path().join(format!("disk{index}")), vec![0; 1 << 20]).unwrap();
        arguments += &format!(" -drive file={{dir}}/disk{index},if=virtio,format=raw,id=disk{index}");
    }
    let mut machine = Machine::start_in(directory, &arguments);
    machine.wait_for_serial("spin");
    machine
}

/// The helpers, once every one of them is sealed: the next spare comes up while the first client is served.
fn sealed_helpers(machine: &Machine) -> Vec<(String, i32)> {
    let sealed = |pid: i32| {
        procfs::statuses(pid)
            .iter()
            .all(|status| procfs::field(status, "Seccomp_filters") == "4")
    };
    wait_until("two monitor processes are there and everything is sealed", || {
        let helpers = machine.helpers();
        helpers.iter().filter(|(name, _)| name == "qmp-proc").count() == 2
            && helpers.iter().all(|(_, pid)| sealed(*pid))
    });
    machine.helpers()
}

#[test]
fn every_thread_of_every_helper_is_sealed() {
    need_kvm!();
    let mut machine = machine(1);
    let _qmp = machine.qmp();
    let helpers = sealed_helpers(&machine);
    let names: Vec<&str> = helpers.iter().map(|(name, _)| name.as_str()).collect();
    for name in ["vcpu-proc", "block-proc", "qmp-proc"] {
        assert!(names.contains(&name), "{names:?}");
    }
    let root = nix::unistd::geteuid().is_root();
    let mut uids = Vec::new();
    for (name, pid) in &helpers {
        let statuses = procfs::statuses(*pid);
        assert!(!statuses.is_empty());
        for status in &statuses {
            let thread = format!("{name} thread {}", procfs::field(status, "Name"));
            assert_eq!(procfs::field(status, "Seccomp"), "2", "{thread}");
            assert_eq!(procfs::field(status, "Seccomp_filters"), "4", "{thread}");
            assert_eq!(procfs::field(status, "NoNewPrivs"), "1", "{thread}");
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                assert_eq!(procfs::field(status, set), "0000000000000000", "{thread}: {set}");
            }
            assert_eq!(procfs::field(status, "Groups"), "", "{thread}");
        }
        uids.push(
            procfs::field(&statuses[0], "Uid")
                .split_whitespace()
                .next()
                .unwrap()
                .to_owned(),
        );
        assert_eq!(
            procfs::root_entries(*pid).unwrap(),
            Vec::<std::path::PathBuf>::new(),
            "{name} has a root with files"
        );
        for kind in ["user", "mnt", "pid", "net", "ipc", "uts"] {
            assert_ne!(
                procfs::namespace(*pid, kind),
                procfs::namespace(machine.pid(), kind),
                "{name}: {kind}"
            );
        }
    }
    if root {
        uids.push("0".into());
        let count = uids.len();
        uids.sort();
        uids.dedup();
        assert_eq!(uids.len(), count, "processes share a uid: {uids:?}");
    }
}

/// What a descriptor may be, by the role that holds it (DESIGN's table).
fn allowed(role: &str, link: &str) -> bool {
    let is = |prefix: &str| link.starts_with(prefix);
    // Channel and log.
    if is("socket:") {
        return true;
    }
    match role {
        "vcpu-proc" => {
            is("anon_inode:kvm-vm")
                || is("anon_inode:kvm-vcpu")
                || is("anon_inode:[eventfd]")
                || link.ends_with("/serial")
        }
        "block-proc" => {
            is("anon_inode:[eventfd]")
                || is("anon_inode:[io_uring]")
                || is("anon_inode:[eventpoll]")
                || link.contains("/disk")
        }
        _ => false,
    }
}

#[test]
fn no_helper_holds_a_descriptor_that_its_role_has_no_use_for() {
    need_kvm!();
    let mut machine = machine(2);
    let _qmp = machine.qmp();
    for (role, pid) in sealed_helpers(&machine) {
        // For a moment after it has sealed itself, a helper still holds its filter's listener.
        let has_listener = || {
            procfs::descriptors(pid)
                .iter()
                .any(|(_, link)| link.contains("seccomp"))
        };
        wait_until("the listener is handed over", || !has_listener());
        let descriptors = procfs::descriptors(pid);
        assert!(!descriptors.is_empty(), "{role}");
        for (number, link) in &descriptors {
            assert!(
                allowed(&role, link),
                "{role} holds {number} -> {link}; all: {descriptors:?}"
            );
        }
        let sockets = descriptors
            .iter()
            .filter(|(_, link)| link.starts_with("socket:"))
            .count();
        // Channel at 0, log at 1 and 2; a serving qmp-proc has its client too, block-proc its fence.
        let most = if ["qmp-proc", "block-proc"].contains(&role.as_str()) {
            4
        } else {
            3
        };
        assert!(sockets <= most, "{role} holds {sockets} sockets: {descriptors:?}");
    }
    let launcher = procfs::descriptors(machine.launcher());
    for (number, link) in &launcher {
        assert!(
            !link.contains("memfd") && !link.contains("disk") && !link.contains("kvm"),
            "launcher: {number} -> {link}"
        );
    }
}

#[test]
fn the_supervisor_and_the_launcher_are_sealed_too() {
    need_kvm!();
    let mut machine = machine(0);
    let _qmp = machine.qmp();
    for pid in [machine.pid(), machine.launcher()] {
        for status in procfs::statuses(pid) {
            assert_eq!(procfs::field(&status, "Seccomp"), "2");
            assert_eq!(procfs::field(&status, "NoNewPrivs"), "1");
        }
    }
    let status = &procfs::statuses(machine.pid())[0];
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(procfs::field(status, set), "0000000000000000", "supervisor: {set}");
    }
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", machine.pid())).unwrap();
    assert!(!maps.contains("bulkhead-ram"), "the supervisor maps guest RAM:\n{maps}");
}
