//! Other people's QMP clients against a whole machine: qemu.qmp's library and its shell.

use bulkhead_tests::machine::Machine;
use bulkhead_tests::{guest, need_kvm};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A Python that has qemu.qmp, if there is one: `BULKHEAD_PYTHON` (which `make test` sets), or the system's.
fn python() -> Option<PathBuf> {
    let python = PathBuf::from(std::env::var_os("BULKHEAD_PYTHON").unwrap_or_else(|| "python3".into()));
    let probe = Command::new(&python)
        .args(["-c", "import qemu.qmp"])
        .stderr(Stdio::null())
        .status();
    if probe.is_ok_and(|status| status.success()) {
        return Some(python);
    }
    println!(
        "SKIPPED: {} has no qemu.qmp (`make packages` gets it, BULKHEAD_PYTHON names it)",
        python.display()
    );
    None
}

fn machine() -> Machine {
    let arguments = format!("-m 64 -smp 2 -kernel {} -append test=spin", guest::image().display());
    let mut machine = Machine::start(&arguments);
    machine.wait_for_serial("spin");
    machine
}

#[test]
fn the_library_of_qemu_qmp_runs_every_command() {
    need_kvm!();
    let Some(python) = python() else { return };
    let mut machine = machine();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qmp_clients.py");
    let mut command = Command::new(python);
    command.arg(script).arg(machine.path("qmp")).arg(machine.path("dump"));
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}\n{}\n{}",
        String::from_utf8_lossy(&output.stderr),
        machine.log()
    );
    for line in [
        "query-name {'name': 'test'}",
        "query-kvm {'enabled': True, 'present': True}",
        "query-status {'status': 'running', 'running': True}",
        "stop {}",
        "event STOP",
        "query-status {'status': 'paused', 'running': False}",
        "cont {}",
        "event RESUME",
        "blockdev-add {}",
        "blockdev-reopen {}",
        "blockdev-del {}",
        "blockdev-create {}",
        "job-finalize GenericError",
        "job-dismiss {}",
        "block_resize {}",
        "blockdev-snapshot {}",
        "blockdev-snapshot-internal-sync {}",
        "blockdev-snapshot-sync {}",
        "change-backing-file {}",
        "transaction {}",
        "block-set-write-threshold {}",
        "object-add {}",
        "qom-set {}",
        "qom-get 2000",
        "object-del {}",
        "dump-guest-memory {}",
        "event DUMP_COMPLETED",
        "memsave {}",
        "pmemsave {}",
        "query-cpu-model-expansion dict",
        "system_reset {}",
        "event RESET",
        "system_powerdown {}",
        "event POWERDOWN",
        "no-such-command CommandNotFound",
        "block-dirty-bitmap-merge {}",
        "nbd-server-add {}",
        "block-export-del {}",
        "blockdev-mirror {}",
        "block-job-cancel {}",
        "block-commit GenericError",
        "device_add GenericError",
        "not run: []",
        "quit {}",
    ] {
        assert!(text.lines().any(|found| found == line), "no line {line:?} in:\n{text}");
    }
    assert_eq!(machine.wait().code(), Some(0));
}

#[test]
fn qmp_shell_talks_to_a_machine() {
    need_kvm!();
    let Some(python) = python() else { return };
    let mut machine = machine();
    let mut shell = Command::new(&python)
        .args(["-m", "qemu.qmp.qmp_shell"])
        .arg(machine.path("qmp"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let script = b"query-status\nstop\nquery-status\ncont\nquery-cpus-fast\nquit\n";
    shell.stdin.take().unwrap().write_all(script).unwrap();
    let output = shell.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("Welcome to the QMP low-level shell"), "{text}\n{errors}");
    for answer in ["\"running\": true", "\"status\": \"paused\"", "\"cpu-index\": 1"] {
        assert!(text.contains(answer), "no {answer} in:\n{text}\n{errors}");
    }
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
}
