//! Bulkhead started by an ordinary user who may open /dev/kvm: with subordinate ids every process has a host uid of its
//! own; without, the log names the missing layer and `--require-sandbox` refuses.
//!
//! Run by root, who becomes that user inside a mount namespace in which /dev/kvm, /etc/passwd, /etc/subuid and
//! /etc/subgid are the test's own. (Run by an ordinary user, all other tests are this test.)

use bulkhead_tests::machine::{Machine, programs};
use bulkhead_tests::{guest, need_kvm, procfs};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// An id that no account has.
const USER: u32 = 54_321;
/// First of its subordinate ids.
const SUBORDINATE: u32 = 1_000_000;
const SUBORDINATE_COUNT: u32 = 65_536;
/// /dev/kvm.
const KVM_MAJOR: u64 = 10;
const KVM_MINOR: u64 = 232;

fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root to become somebody else".into());
    }
    let tools = ["/usr/bin/unshare", "/usr/bin/setpriv"];
    tools
        .iter()
        .find(|tool| !Path::new(tool).exists())
        .map(|tool| format!("{tool} is not installed"))
}

/// A directory in which the user finds the programs, the guest and the files that stand in for the host's.
fn prepare(with_subordinate_ids: bool) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    for program in [
        "bulkhead",
        "bulkhead-audit",
        "vcpu-proc",
        "block-proc",
        "dump-proc",
        "qmp-proc",
    ] {
        std::fs::copy(programs().join(program), path.join(program)).unwrap();
    }
    std::fs::copy(guest::image(), path.join("guest")).unwrap();
    std::fs::write(path.join("disk"), vec![0; 1 << 20]).unwrap();
    std::fs::set_permissions(path.join("disk"), std::fs::Permissions::from_mode(0o666)).unwrap();
    let kvm = path.join("kvm");
    mknod(
        &kvm,
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o666),
        makedev(KVM_MAJOR, KVM_MINOR),
    )
    .unwrap();
    std::fs::set_permissions(&kvm, std::fs::Permissions::from_mode(0o666)).unwrap();
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
    std::fs::write(
        path.join("passwd"),
        format!("{passwd}bulkhead-test:x:{USER}:{USER}::/:/bin/sh\n"),
    )
    .unwrap();
    let ranges = if with_subordinate_ids {
        format!("bulkhead-test:{SUBORDINATE}:{SUBORDINATE_COUNT}\n")
    } else {
        String::new()
    };
    std::fs::write(path.join("ranges"), ranges).unwrap();
    directory
}

/// A command that becomes `bulkhead`, run by the user.
fn as_user(path: &Path) -> Command {
    let script = r#"
        set -e
        cd "$1"; shift
        for file in /etc/subuid /etc/subgid; do
            [ -e $file ] || continue
            mount --bind ranges $file
        done
        mount --bind passwd /etc/passwd
        mount --bind kvm /dev/kvm
        exec setpriv --reuid=54321 --regid=54321 --clear-groups -- ./bulkhead "$@""#;
    let mut command = Command::new("/usr/bin/unshare");
    command.args(["-m", "--", "sh", "-c", script, "sh"]).arg(path);
    command
}

fn start(with_subordinate_ids: bool, more: &str) -> Machine {
    let directory = prepare(with_subordinate_ids);
    let command = as_user(directory.path());
    let arguments = format!(
        "-m 64 -smp 2 -kernel {{dir}}/guest -append test=spin -serial file:{{dir}}/serial \
         -drive file={{dir}}/disk,if=virtio,format=raw {more}"
    );
    Machine::start_command(directory, command, &arguments, &[])
}

fn uids(machine: &Machine) -> Vec<u32> {
    let helpers = machine.helpers().into_iter().map(|(_, pid)| pid);
    let uid = |pid: i32| {
        procfs::field(&procfs::statuses(pid)[0], "Uid")
            .split_whitespace()
            .next()
            .unwrap()
            .parse()
            .unwrap()
    };
    helpers.chain([machine.pid()]).map(uid).collect()
}

/// What `audit live` tells that user of the user's own machine: nothing differs, and installed filters are not checkable.
/// Returns the rows of one kind.
fn audit(machine: &Machine, what: &str) -> Vec<serde_json::Value> {
    let output = Command::new("/usr/bin/setpriv")
        .args(["--reuid=54321", "--regid=54321", "--clear-groups", "--"])
        .arg(machine.path("bulkhead-audit"))
        .args(["live", &machine.pid().to_string(), "--json"])
        .output()
        .unwrap();
    let all: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = all["rows"].as_array().unwrap();
    let of_kind = |what: &str| {
        rows.iter()
            .filter(|row| row["what"] == what)
            .cloned()
            .collect::<Vec<_>>()
    };
    assert!(output.status.success(), "{rows:#?}");
    assert_eq!(of_kind("filters").len(), 6, "{rows:#?}");
    for row in of_kind("filters") {
        assert_eq!(row["state"], "not-checkable", "{row}");
        assert!(row["found"].as_str().unwrap().contains("takes root"), "{row}");
    }
    // What the owner may look at is looked at: all but the opener, which is not dumpable and in no namespace of the user's.
    let mut looked_at = ["descriptors", "namespaces", "memory", "limits"]
        .into_iter()
        .flat_map(of_kind);
    let wrong = looked_at.find(|row| row["process"] != "opener" && row["state"] != "equal");
    assert_eq!(wrong, None, "{rows:#?}");
    of_kind(what)
}

#[test]
fn subordinate_ids_give_every_process_a_uid_of_its_own() {
    need_kvm!();
    if let Some(reason) = missing() {
        println!("SKIPPED: {reason}");
        return;
    }
    if !Path::new("/usr/bin/newuidmap").exists() || !Path::new("/etc/subuid").exists() {
        println!("SKIPPED: newuidmap is not installed");
        return;
    }
    let mut machine = start(true, "--require-sandbox");
    machine.wait_for_serial("spin");
    let mut uids = uids(&machine);
    assert!(uids.contains(&USER), "{uids:?}");
    let range = SUBORDINATE..SUBORDINATE + SUBORDINATE_COUNT;
    assert!(uids.iter().all(|uid| *uid == USER || range.contains(uid)), "{uids:?}");
    let count = uids.len();
    uids.sort_unstable();
    uids.dedup();
    assert_eq!(uids.len(), count, "processes share a uid: {uids:?}");
    assert_eq!(machine.log(), "");
    let ids = audit(&machine, "ids");
    assert!(ids.iter().all(|row| row["state"] == "equal"), "{ids:#?}");
    machine.qmp().run("quit");
    assert_eq!(machine.wait().code(), Some(0));
}

#[test]
fn without_them_the_log_names_the_missing_layer_and_all_else_stands() {
    need_kvm!();
    if let Some(reason) = missing() {
        println!("SKIPPED: {reason}");
        return;
    }
    let mut machine = start(false, "");
    machine.wait_for_serial("spin");
    assert!(uids(&machine).iter().all(|uid| *uid == USER));
    assert!(
        machine.log().contains("sandbox layer missing: no host uid of its own"),
        "{}",
        machine.log()
    );
    let ids = audit(&machine, "ids");
    let missing = ids.iter().filter(|row| row["state"] == "missing").count();
    assert_eq!(missing, 4, "launcher and helpers: {ids:#?}");
    let vcpu_proc = machine.helper("vcpu-proc");
    for status in procfs::statuses(vcpu_proc) {
        assert_eq!(procfs::field(&status, "Seccomp_filters"), "4");
        assert_eq!(procfs::field(&status, "CapBnd"), "0000000000000000");
    }
    machine.qmp().run("quit");
    assert_eq!(machine.wait().code(), Some(0));
    let mut refused = start(false, "--require-sandbox");
    assert_eq!(refused.wait().code(), Some(1));
    assert!(
        refused.log().contains("--require-sandbox: no host uid of its own"),
        "{}",
        refused.log()
    );
}
