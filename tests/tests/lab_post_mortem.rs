//! vcpu-proc is killed while a stock Debian kernel works: the dump that is written then opens like any other, and shows what the
//! guest ran and where each vCPU was.
//!
//! With `BULKHEAD_VMLINUX` (the kernel's debugging information) crash and drgn unwind the stacks as well.

use bulkhead_tests::dumpfile::readers::{self, Guest};
use bulkhead_tests::lab::python::{Python, VARIABLE};
use bulkhead_tests::lab::site::local_folder;
use bulkhead_tests::lab::{Machine, Must, Site, harness, machine};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

/// Until a guest is up.
const BOOT: Duration = Duration::from_secs(180);
/// For what is done at once.
const SOON: Duration = Duration::from_secs(120);
/// On an emulated processor.
const DUMP: Duration = Duration::from_secs(240);
const MARKER: &str = "the last line before vcpu-proc was killed";
const VCPUS: usize = 2;

fn main() -> ExitCode {
    let possible = Site::available().and_then(|()| Python::with_drgn().map(drop));
    harness::main(
        |_| possible.clone(),
        &[(
            "the_dump_of_a_killed_vcpu_proc_shows_what_each_vcpu_did",
            the_dump_of_a_killed_vcpu_proc_shows_what_each_vcpu_did,
        )],
    )
}

fn the_dump_of_a_killed_vcpu_proc_shows_what_each_vcpu_did() {
    let site = Site::start_with(machine::hypervisor).must();
    let there = site.path("post-mortem.dump");
    let mut machine = Machine::builder(&site, "killed")
        .vcpus(VCPUS as u32)
        .memory_mib(256)
        .option(&format!("-dump-on-crash file:{there},format=elf"))
        .start()
        .must();
    machine.expect("guest# ", BOOT).must();
    let guest = set_to_work(&machine);

    // A rude end, in the middle of whatever it is at.
    site.run("kill -9 $(pidof vcpu-proc)").ok();
    let lost = machine.qmp.event("BULKHEAD_HELPER_LOST", SOON).must();
    assert_eq!(lost["data"]["role"], "vcpu-proc", "{lost}");
    let done = machine.qmp.event("DUMP_COMPLETED", DUMP).must();
    assert_eq!(done["data"]["result"]["status"], "completed", "{done}");
    let (_folder, local) = local_folder();
    let dump = local.join("dump");
    site.get(&there, &dump).must();
    let note = readers::readelf(&dump, &guest);
    println!("readelf: {note:?}");
    println!("gdb: {:?}", readers::gdb(&dump, &guest));

    let python = PathBuf::from(std::env::var_os(VARIABLE).unwrap_or_else(|| "python3".into()));
    readers::drgn(&python, &dump, &guest, &[]).must();
    check_vcpus(&python, &dump);
    match std::env::var_os("BULKHEAD_VMLINUX").map(PathBuf::from) {
        Some(vmlinux) => {
            readers::drgn_with_symbols(&python, &dump, &vmlinux, &guest).must();
            println!("crash: {:?}", readers::crash(&dump, &vmlinux, &guest));
        }
        None => println!("crash, drgn's backtraces: SKIPPED: BULKHEAD_VMLINUX does not name debugging information"),
    }

    // The dead machine is still there, for another look.
    let status = machine.qmp.command("query-status", json!({})).must();
    assert_eq!(status["status"], "internal-error", "{status}");
    let again =
        json!({"paging": false, "protocol": format!("file:{there}"), "format": "kdump-raw-lzo", "detach": true});
    machine.qmp.command("dump-guest-memory", again).must();
    let done = machine.qmp.event("DUMP_COMPLETED", DUMP).must();
    assert_eq!(done["data"]["result"]["status"], "completed", "{done}");
    let other = local.join("other");
    site.get(&there, &other).must();
    readers::drgn(&python, &other, &guest, &[]).must();
    machine.qmp.command("quit", json!({})).must();
    assert_eq!(machine.end(SOON).must().status, 0);
}

/// Two tasks that never sleep, one mostly in the kernel, one mostly not; and what the guest says of itself.
fn set_to_work(machine: &Machine) -> Guest {
    let shell = |command: &str| machine.shell(command, SOON).must();
    let sleeper = shell("sleep 86399 >/dev/null 2>&1 & echo \"pid $!\"");
    let sleeper = sleeper
        .lines()
        .find_map(|line| line.trim().strip_prefix("pid "))
        .map(str::to_owned);
    shell("dd if=/dev/zero of=/dev/null bs=1M >/dev/null 2>&1 & :");
    shell("yes >/dev/null 2>&1 & :");
    shell(&format!("echo '{MARKER}' >/dev/kmsg"));
    let banner = shell("grep ' linux_banner$' /proc/kallsyms");
    let banner = banner.split_whitespace().next().unwrap_or_default();
    let processes = shell("ls -d /proc/[0-9]*");
    Guest {
        release: shell("uname -r").trim().to_owned(),
        version: shell("cat /proc/version").trim().to_owned(),
        log_line: MARKER.to_owned(),
        processes: processes
            .split_whitespace()
            .filter_map(|path| path.rsplit('/').next()?.parse().ok())
            .collect(),
        sleeper: sleeper
            .and_then(|pid| pid.parse().ok())
            .expect("the sleeper's process id"),
        banner: u64::from_str_radix(banner, 16).unwrap_or_else(|_| panic!("{banner}")),
        vcpus: VCPUS,
    }
}

/// Each vCPU ran something, and if it was in the kernel, its stack leads to where kernels are entered.
fn check_vcpus(python: &Path, dump: &Path) {
    const ENTRIES: [&str; 6] = [
        "entry_SYSCALL_64",
        "asm_",
        "ret_from_fork",
        "secondary_startup_64",
        "cpu_startup_entry",
        "start_kernel",
    ];
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drgn_linux.py");
    let output = Command::new(python).arg(script).arg(dump).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("vcpu ")).collect();
    assert_eq!(
        lines.len(),
        VCPUS,
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut workers = 0;
    for line in &lines {
        println!("{line}");
        let words: Vec<&str> = line.split(' ').collect();
        let [_, _, pid, comm, mode, trace @ ..] = &words[..] else {
            panic!("{line}");
        };
        workers += usize::from(["dd", "yes"].contains(comm));
        assert_eq!(*pid == "0", comm.starts_with("swapper/"), "{line}");
        if *mode == "kernel" {
            assert!(!trace[0].starts_with("0x"), "not in a function: {line}");
            let entered = |name: &&str| ENTRIES.iter().any(|entry| name.starts_with(entry));
            assert!(trace.iter().any(entered), "nobody entered the kernel: {line}");
        }
    }
    assert!(workers > 0, "nobody worked: {lines:?}");
}
