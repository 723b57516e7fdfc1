//! Other people's programs open the dump. A program that is not installed makes its test say so and stop.

mod common;

use common::{Dumper, GIB, MIB, Ram, registers};
use std::path::Path;
use std::process::Command;

/// 3 GiB + 1 MiB with a known quadword, dumped with two vCPUs.
fn sample(path: &Path) {
    let ram = Ram::new(3 * GIB + MIB);
    ram.write(0x5000, &0x0123_4567_89ab_cdef_u64.to_le_bytes());
    ram.write(4 * GIB + 8, &0xfeed_u64.to_le_bytes());
    let file = std::fs::File::create(path).unwrap();
    Dumper::sealed(&ram)
        .write(file, vec![registers(0), registers(1)], None)
        .unwrap();
}

/// What the program prints, or `None` when there is no such program. What it prints as a complaint fails the test.
fn run(program: &str, arguments: &[&str]) -> Option<String> {
    let output = match Command::new(program).args(arguments).env("LC_ALL", "C").output() {
        Ok(output) => output,
        Err(error) => {
            eprintln!("SKIPPED: {program}: {error}");
            return None;
        }
    };
    let complaints = String::from_utf8_lossy(&output.stderr).to_lowercase();
    assert!(
        output.status.success() && !complaints.contains("error"),
        "{program}: {complaints}"
    );
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The lines, with runs of blanks made one.
fn lines(text: &str) -> Vec<String> {
    text.lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

#[test]
fn readelf_sees_the_segments_and_the_notes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("dump");
    sample(&path);
    let Some(text) = run("readelf", &["-hlnW", path.to_str().unwrap()]) else {
        return;
    };
    let lines = lines(&text);
    let has = |wanted: &str| assert!(lines.iter().any(|line| line.starts_with(wanted)), "{wanted}:\n{text}");
    has("Type: CORE (Core file)");
    has("Machine: Advanced Micro Devices X86-64");
    has("Size of this header: 64 (bytes)");
    has("Number of section headers: 0");
    has("NOTE 0x0000e8 0x0000000000000000 0x0000000000000000 0x000660 0x000660");
    has("LOAD 0x003000 0x0000000000000000 0x0000000000000000 0xc0000000 0xc0000000 RWE");
    has("LOAD 0xc0003000 0x0000000100000000 0x0000000100000000 0x100000 0x100000 RWE");
    let notes: Vec<&str> = lines
        .iter()
        .map(String::as_str)
        .filter(|line| line.starts_with("CORE ") || line.starts_with("QEMU "))
        .collect();
    assert_eq!(notes.len(), 4, "{text}");
    assert!(notes[1].starts_with("CORE 0x00000150 NT_PRSTATUS"), "{notes:?}");
    assert!(notes[2].starts_with("QEMU 0x000001b8"), "{notes:?}");
}

#[test]
fn gdb_reads_registers_of_each_cpu_and_memory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("dump");
    sample(&path);
    let commands = [
        "thread 1",
        "p/x $rip",
        "thread 2",
        "p/x $rip",
        "p/x $r15",
        "x/1gx 0x5000",
        "x/1gx 0x100000008",
    ];
    let mut arguments = vec!["-batch", "-nx", "-core", path.to_str().unwrap()];
    for command in commands {
        arguments.extend(["-ex", command]);
    }
    let Some(text) = run("gdb", &arguments) else {
        return;
    };
    let lines = lines(&text);
    for wanted in [
        "$1 = 0xffffffff81000000",
        "$2 = 0xffffffff81000001",
        "$3 = 0x11111",
        "0x5000: 0x0123456789abcdef",
        "0x100000008: 0x000000000000feed",
    ] {
        assert!(lines.iter().any(|line| line == wanted), "{wanted}:\n{text}");
    }
}
