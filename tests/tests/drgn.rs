//! drgn, the programmable debugger, against a whole machine: it attaches over the QMP socket alone.

use bulkhead_tests::guest::{self, flat_from_elf};
use bulkhead_tests::machine::Machine;
use bulkhead_tests::need_kvm;
use serde_json::json;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A Python that has drgn, if there is one: `BULKHEAD_PYTHON` (which `make test` sets), or the system's.
fn python() -> Option<PathBuf> {
    let python = PathBuf::from(std::env::var_os("BULKHEAD_PYTHON").unwrap_or_else(|| "python3".into()));
    let probe = Command::new(&python)
        .args(["-c", "import drgn; drgn.Program.set_qemu_qmp"])
        .stderr(Stdio::null())
        .status();
    if probe.is_ok_and(|status| status.success()) {
        return Some(python);
    }
    println!(
        "SKIPPED: {} has no drgn that knows QMP (`make packages` gets it, BULKHEAD_PYTHON names it)",
        python.display()
    );
    None
}

#[test]
fn drgn_attaches_and_reads_memory_by_both_kinds_of_address() {
    need_kvm!();
    let Some(python) = python() else { return };
    let image = flat_from_elf(&std::fs::read(guest::image()).unwrap()).unwrap();
    let address = u64::from_le_bytes(image[8..16].try_into().unwrap());
    // Across two borders of pages.
    let length = 6000;
    let mut machine = Machine::start(&format!("-m 64 -kernel {} -append test=spin", guest::image().display()));
    machine.wait_for_serial("spin 1");
    let mut qmp = machine.qmp();
    let registers = qmp.execute("human-monitor-command", json!({"command-line": "info registers"}));
    let registers = registers.as_str().unwrap();
    let top_table = registers.split_whitespace().find_map(|word| word.strip_prefix("CR3="));
    let top_table = u64::from_str_radix(top_table.unwrap(), 16).unwrap();

    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/drgn_attach.py");
    let output = Command::new(python)
        .arg(script)
        .arg(machine.path("qmp"))
        .args([address, length, top_table].map(|number| number.to_string()))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}\n{}", machine.log());
    let bytes = image[..length as usize].iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    });
    let word = u64::from_le_bytes(image[..8].try_into().unwrap());
    let expected = format!("attached True X86_64\nphysical {bytes}\nword {word}\nfault\nvirtual {bytes}\n");
    assert_eq!(text, expected, "{errors}");
    // What it used, it gave back, and the guest ran on.
    assert_eq!(qmp.run("query-status")["status"], "running");
    let left = qmp.try_execute("closefd", json!({"fdname": "drgn-dump"})).unwrap_err();
    assert_eq!(left["desc"], "File descriptor named 'drgn-dump' not found");
}
