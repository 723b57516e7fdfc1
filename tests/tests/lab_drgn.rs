//! A debugger and dumps of a stock Debian kernel: the VMCOREINFO note as the guest announces it and as it is searched for.

use bulkhead_tests::lab::pieces::find_program;
use bulkhead_tests::lab::python::Python;
use bulkhead_tests::lab::site::local_folder;
use bulkhead_tests::lab::{Machine, Must, Site, User, harness, machine};
use serde_json::json;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

/// Until a guest is up.
const BOOT: Duration = Duration::from_secs(120);
/// For what a guest does at once.
const SOON: Duration = Duration::from_secs(60);
/// For drgn: a second or two, but for the emulation.
const DRGN: Duration = Duration::from_secs(180);

fn main() -> ExitCode {
    let available = Site::available();
    harness::main(
        |name| match available {
            Ok(()) if name == "drgn_lists_a_guests_tasks_over_qmp_and_in_a_dump" => Python::with_drgn().map(drop),
            _ => available.clone(),
        },
        &[
            (
                "linux_announces_its_note_and_gdb_reads_the_kernel_in_the_dump",
                linux_announces_its_note_and_gdb_reads_the_kernel_in_the_dump,
            ),
            (
                "drgn_lists_a_guests_tasks_over_qmp_and_in_a_dump",
                drgn_lists_a_guests_tasks_over_qmp_and_in_a_dump,
            ),
        ],
    )
}

/// Linux's own driver finds fw_cfg and writes where the note is; a dump has that note, and the kernel's addresses.
fn linux_announces_its_note_and_gdb_reads_the_kernel_in_the_dump() {
    let site = Site::start_with(machine::hypervisor).must();
    let mut machine = Machine::builder(&site, "announced")
        // Both dumps come to this machine.
        .memory_mib(256)
        .option("-device vmcoreinfo")
        .start()
        .must();
    machine.expect("guest# ", BOOT).must();
    let raw = "/sys/firmware/qemu_fw_cfg/by_name/etc/vmcoreinfo/raw";
    let said = machine.shell(&format!("hexdump -ve '1/1 \"%02x\"' {raw}"), SOON).must();
    let note = machine.shell("cat /sys/kernel/vmcoreinfo", SOON).must();
    let release = machine.shell("uname -r", SOON).must();
    let (address, bytes) = note.split_once(' ').unwrap_or_else(|| panic!("{note}"));
    let address = u64::from_str_radix(address.trim_start_matches("0x"), 16).unwrap();
    let bytes = u32::from_str_radix(bytes, 16).unwrap();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let expected = hex(&1_u16.to_le_bytes()) + &hex(&bytes.to_le_bytes()) + &hex(&address.to_le_bytes());
    assert_eq!(said.get(4..), Some(expected.as_str()), "{note}");

    // A debugger that knows nothing of page tables reads the kernel by the kernel's own addresses: in its image, and where
    // it has all of RAM.
    let symbols = machine
        .shell("grep -E ' (linux_banner|page_offset_base)$' /proc/kallsyms", SOON)
        .must();
    let symbol = |name: &str| -> String {
        let line = symbols.lines().find(|line| line.trim().ends_with(name));
        line.and_then(|line| line.split_whitespace().next())
            .unwrap_or_else(|| panic!("{symbols}"))
            .to_owned()
    };
    let version = machine.shell("cat /proc/version", SOON).must();
    let banner = format!("printf \"banner %s\\n\", (char *) 0x{}", symbol("linux_banner"));
    // RAM begins there, and the note is that far into it.
    let note = format!(
        "printf \"note %s\\n\", (char *) (*(long *) 0x{} + {address} + 12)",
        symbol("page_offset_base")
    );
    let (_folder, local) = local_folder();
    for paging in [false, true] {
        let dump = site.path("announced.dump");
        let arguments = json!({"paging": paging, "protocol": format!("file:{dump}")});
        machine.qmp.command("dump-guest-memory", arguments).must();
        let copy = local.join("dump");
        site.get(&dump, &copy).must();
        site.run(&format!("rm {dump}")).ok();
        let image = std::fs::read(&copy).unwrap();
        let text = format!("OSRELEASE={}\n", release.trim());
        let head = &image[..1 << 20];
        let found = |text: &[u8]| head.windows(text.len()).position(|part| part == text);
        let name = found(b"VMCOREINFO\0").expect("a note of that name");
        assert_eq!(found(text.as_bytes()), Some(name + 12));
        let Some(gdb) = find_program("gdb") else {
            println!("gdb is not installed: the dump is not opened by it");
            return;
        };
        let output = Command::new(gdb)
            .args(["-batch", "-nx", "-ex", "set print elements 0", "-core"])
            .arg(&copy)
            .args(["-ex", &banner, "-ex", &note])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        let has = |wanted: &str| assert!(text.contains(wanted), "paging {paging}: {wanted}: {text}\n{errors}");
        has(&format!("banner {}", version.trim()));
        has("note VMCOREINFO\n");
    }
    // The guest is none the worse for it.
    assert_eq!(machine.shell("echo still here", SOON).must().trim(), "still here");
}

/// With the socket alone, without debugging information, of a guest that announces nothing.
fn drgn_lists_a_guests_tasks_over_qmp_and_in_a_dump() {
    let python = Python::with_drgn().must();
    let site = Site::start_with(|lab| python.add_to(machine::hypervisor(lab))).must();
    let monitor = site.path("debugger.qmp");
    let option = format!("-qmp unix:{monitor},server=on,wait=off");
    let mut machine = Machine::builder(&site, "drgn").option(&option).start().must();
    machine.expect("guest# ", BOOT).must();
    let release = machine.shell("uname -r", SOON).must();
    let version = machine.shell("cat /proc/version", SOON).must();
    let sleeper = machine
        .shell("sleep 86399 >/dev/null 2>&1 & echo \"pid $!\"", SOON)
        .must();
    let sleeper = sleeper
        .lines()
        .find_map(|line| line.trim().strip_prefix("pid "))
        .unwrap_or_else(|| panic!("{sleeper}"));
    let processes = machine
        .shell(
            "cat /proc/[0-9]*/stat | sed 's/^\\([0-9]*\\) (\\(.*\\)) .*/task \\1 \\2/'",
            SOON,
        )
        .must();

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drgn_linux.py");
    let command = python.command(&site, &script).must();
    let dump = site.path("drgn.dump");
    // What the guest itself lists is all there, but for what has ended or begun since, of which there is little.
    let tasks = |text: &str| -> BTreeSet<String> {
        let lines = text.lines().map(str::trim).filter(|line| line.starts_with("task "));
        lines
            .map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" "))
            .collect()
    };
    let listed = tasks(&processes);
    assert!(listed.len() > 30, "{processes}");
    let check = |target: &str| {
        // Into files: when it takes too long, they say how far it came.
        let (output, log) = (site.path("drgn.out"), site.path("drgn.log"));
        let job = site
            .spawn(&format!("exec {command} {target} >{output} 2>{log}"), User::Root)
            .must();
        let end = job.wait(DRGN);
        let text = site.run(&format!("cat {output}")).stdout;
        let errors = site.run(&format!("cat {log}")).stdout;
        let end = end.unwrap_or_else(|error| panic!("drgn {target}: {error}\n{text}\n{errors}"));
        assert_eq!(end.status, 0, "{target}: {text}\n{errors}");
        println!("\n{target}\n{errors}");
        let has = |line: &str| assert!(text.lines().any(|found| found == line), "{line}:\n{text}\n{errors}");
        has(&format!("vmcoreinfo {release}"));
        has(&format!("memory {release}"));
        has(&format!("banner {version}"));
        has("idle swapper/0");
        has(&format!("task {sleeper} sleep 1"));
        let read = tasks(&text);
        let missing: Vec<_> = listed.difference(&read).collect();
        assert!(missing.len() <= 5, "{missing:?}\n{text}");
    };
    check(&monitor);
    let arguments = json!({"paging": false, "protocol": format!("file:{dump}")});
    machine.qmp.command("dump-guest-memory", arguments).must();
    check(&dump);
    assert_eq!(machine.shell("echo still here", SOON).must().trim(), "still here");
}
