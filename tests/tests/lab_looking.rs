//! Looking into a stock Debian kernel: by its own page tables, at the addresses that it says.

use bulkhead_tests::lab::{Machine, Must, Site, harness, machine};
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;

/// Until a guest is up.
const BOOT: Duration = Duration::from_secs(120);
/// For what a guest does at once.
const SOON: Duration = Duration::from_secs(60);
/// How much of the kernel's banner is compared, bytes.
const BANNER_BYTES: usize = 64;

fn main() -> ExitCode {
    let available = Site::available();
    harness::main(
        |_| available.clone(),
        &[(
            "the_kernels_banner_is_read_by_virtual_and_by_physical_address",
            the_kernels_banner_is_read_by_virtual_and_by_physical_address,
        )],
    )
}

/// The kernel lies where KASLR has put it, in large pages of the upper half.
fn the_kernels_banner_is_read_by_virtual_and_by_physical_address() {
    let site = Site::start_with(machine::hypervisor).must();
    let mut machine = Machine::builder(&site, "looking").start().must();
    machine.expect("guest# ", BOOT).must();
    let version = machine.shell("cat /proc/version", SOON).must();
    let expected = version.trim().as_bytes()[..BANNER_BYTES].to_vec();
    let symbol = machine.shell("grep ' linux_banner$' /proc/kallsyms", SOON).must();
    let address = symbol.split_whitespace().next().unwrap_or_default().to_owned();
    assert!(address.starts_with("ffffffff"), "{symbol}");

    assert_eq!(
        shown(&mut machine, &format!("x /{BANNER_BYTES}xb 0x{address}")),
        expected
    );
    let translated = human(&mut machine, &format!("gva2gpa 0x{address}"));
    let physical = translated
        .trim()
        .strip_prefix("gpa: ")
        .unwrap_or_else(|| panic!("{translated}"));
    assert_eq!(
        shown(&mut machine, &format!("xp /{BANNER_BYTES}xb {physical}")),
        expected
    );
    // The guest is none the worse for it.
    assert_eq!(machine.shell("echo still here", SOON).must().trim(), "still here");
}

fn human(machine: &mut Machine<'_>, line: &str) -> String {
    let reply = machine
        .qmp
        .command("human-monitor-command", json!({"command-line": line}))
        .must();
    reply.as_str().unwrap_or_else(|| panic!("{reply}")).to_owned()
}

/// The bytes that a memory command shows.
fn shown(machine: &mut Machine<'_>, line: &str) -> Vec<u8> {
    let text = human(machine, line);
    let items = text
        .lines()
        .filter_map(|line| line.split_once(": "))
        .flat_map(|(_, items)| items.split_whitespace());
    items
        .map(|item| {
            let digits = item.strip_prefix("0x").unwrap_or_else(|| panic!("{text}"));
            u8::from_str_radix(digits, 16).unwrap_or_else(|_| panic!("{text}"))
        })
        .collect()
}
