//! A stock Debian kernel, stopped and dumped in every form that this build writes: readers that other people wrote find in each
//! what the guest said, and all forms hold the same memory.
//!
//! With `BULKHEAD_VMLINUX` (the kernel's debugging information, which `tests/lab/symbols` fetches) crash and drgn show the log
//! and all tasks with their backtraces as well. With `BULKHEAD_KEEP_DUMPS` the dumps stay in that folder.

use bulkhead_tests::dumpfile::readers::{self, Guest};
use bulkhead_tests::dumpfile::{Dump, notes};
use bulkhead_tests::lab::python::{Python, VARIABLE};
use bulkhead_tests::lab::site::local_folder;
use bulkhead_tests::lab::{Machine, Must, Site, harness, machine};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

const BOOT: Duration = Duration::from_secs(180);
const SOON: Duration = Duration::from_secs(120);
/// Compressing takes long on an emulated processor.
const DUMP: Duration = Duration::from_secs(240);
const PAGE: usize = 4096;
/// 64 MiB of pages that say their number.
const PATTERN_PAGES: usize = 16384;
const PATTERN: &str = "bulkhead pattern ";
const MARKER: &str = "a line for whoever reads the dump";

/// Set by `make soak`: every form, and the large machine. On an emulated processor that takes most of an hour.
const ALL: &str = "BULKHEAD_LAB_ALL";
/// The forms that every run tries: each codec once, in a file or as a stream.
const FORMS: [&str; 5] = [
    "elf",
    "kdump-raw-zlib",
    "kdump-lzo",
    "kdump-raw-snappy",
    "kdump-raw-zstd",
];
/// What takes long.
const LARGE: &str = "every_reader_opens_dumps_of_four_vcpus_with_memory_above_four_gib";
const UNMOVED: &str = "every_reader_opens_dumps_of_a_kernel_that_was_not_moved";
const LIVE: &str = "every_reader_opens_a_live_dump";

fn has_time() -> bool {
    std::env::var_os(ALL).is_some()
}

fn main() -> ExitCode {
    let available = Site::available();
    let possible = |name: &str| match [LARGE, UNMOVED, LIVE].contains(&name) && !has_time() {
        true => Err(format!("it takes long in the lab: make soak, which sets {ALL}")),
        false => available.clone(),
    };
    harness::main(
        possible,
        &[
            ("every_reader_opens_every_form", every_reader_opens_every_form),
            (LARGE, every_reader_opens_dumps_of_four_vcpus_with_memory_above_four_gib),
            (UNMOVED, every_reader_opens_dumps_of_a_kernel_that_was_not_moved),
            (LIVE, every_reader_opens_a_live_dump),
        ],
    )
}

fn every_reader_opens_every_form() {
    let formats = |format: &str| has_time() || FORMS.contains(&format);
    dump_and_read((1, 512), "", formats);
}

fn every_reader_opens_dumps_of_four_vcpus_with_memory_above_four_gib() {
    dump_and_read((4, 5120), "", |_| true);
}

/// Without KASLR phys_base is 0.
fn every_reader_opens_dumps_of_a_kernel_that_was_not_moved() {
    dump_and_read((2, 512), "nokaslr", |format| ["elf", "kdump-zlib"].contains(&format));
}

/// Of a guest that runs on and writes.
fn every_reader_opens_a_live_dump() {
    let site = Site::start_with(machine::hypervisor).must();
    let mut machine = Machine::builder(&site, "live").vcpus(2).memory_mib(512).start().must();
    machine.expect("guest# ", BOOT).must();
    let guest = prepare(&machine, 2);
    let busy =
        "mkdir /tmp/busy; (while true; do dd if=/dev/zero of=/tmp/busy/f bs=64k count=32; done) >/dev/null 2>&1 & true";
    machine.shell(busy, SOON).must();
    let (_folder, local) = local_folder();
    for (format, exclude) in [
        ("elf", &[][..]),
        ("kdump-lzo", &[]),
        ("kdump-raw-zlib", &["free", "user"]),
    ] {
        let there = site.path("dump");
        let mut arguments = json!({"paging": false, "protocol": format!("file:{there}"), "format": format});
        arguments["live"] = json!(true);
        arguments["detach"] = json!(true);
        if !exclude.is_empty() {
            arguments["exclude"] = json!(exclude);
        }
        machine.qmp.command("dump-guest-memory", arguments).must();
        let done = machine.qmp.event("DUMP_COMPLETED", DUMP).must();
        assert_eq!(done["data"]["result"]["status"], "completed", "{done}");
        let copy = local.join(format);
        site.get(&there, &copy).must();
        site.run(&format!("rm {there}")).ok();
        if exclude.is_empty() {
            judge(&copy, &guest);
        } else {
            readers::crash_release(&copy, &guest).unwrap_or_else(|reason| println!("  crash: SKIPPED: {reason}"));
        }
    }
    assert_eq!(machine.shell("echo still here", SOON).must().trim(), "still here");
}

/// What the guest says about itself, and is.
fn prepare(machine: &Machine, vcpus: usize) -> Guest {
    let shell = |command: &str| machine.shell(command, SOON).must();
    let number = |text: &str| -> u32 { text.trim().parse().unwrap_or_else(|_| panic!("{text}")) };
    shell(&format!("echo '{MARKER}' >/dev/kmsg"));
    // In a file system in memory.
    let fill = format!(
        "awk 'BEGIN {{ for (n = 0; n < {PATTERN_PAGES}; n++) printf \"{PATTERN}%-4078d\\n\", n }}' >/tmp/pattern"
    );
    shell(&format!("mount -t tmpfs none /tmp; {fill}; sync"));
    assert_eq!(number(&shell("stat -c %s /tmp/pattern")) as usize, PATTERN_PAGES * PAGE);
    let sleeper = shell("sleep 86399 >/dev/null 2>&1 & echo \"pid $!\"");
    let sleeper = sleeper.lines().find_map(|line| line.trim().strip_prefix("pid "));
    let processes = shell("ls -d /proc/[0-9]*");
    let banner = shell("grep ' linux_banner$' /proc/kallsyms");
    let banner = banner.split_whitespace().next().unwrap_or_default();
    Guest {
        release: shell("uname -r").trim().to_owned(),
        version: shell("cat /proc/version").trim().to_owned(),
        log_line: MARKER.to_owned(),
        processes: processes
            .split_whitespace()
            .filter_map(|path| path.rsplit('/').next()?.parse().ok())
            .collect(),
        sleeper: number(sleeper.unwrap_or_default()),
        banner: u64::from_str_radix(banner, 16).unwrap_or_else(|_| panic!("{banner}")),
        vcpus,
    }
}

fn dump_and_read((vcpus, memory_mib): (usize, u32), append: &str, wanted: impl Fn(&str) -> bool) {
    let site = Site::start_with(machine::hypervisor).must();
    let builder = Machine::builder(&site, "read")
        .vcpus(vcpus as u32)
        .memory_mib(memory_mib)
        .append(append);
    let mut machine = builder.start().must();
    machine.expect("guest# ", BOOT).must();
    let guest = prepare(&machine, vcpus);
    let moved = machine.shell("cat /proc/cmdline", SOON).must();
    assert_eq!(moved.contains("nokaslr"), append == "nokaslr");
    machine.qmp.command("stop", json!({})).must();
    let said = machine
        .qmp
        .command("query-dump-guest-memory-capability", json!({}))
        .must();
    let formats = said["formats"].as_array().expect("formats").clone();

    let (_folder, mut local) = local_folder();
    if let Some(kept) = std::env::var_os("BULKHEAD_KEEP_DUMPS") {
        local = PathBuf::from(kept).join(format!("{vcpus}-{memory_mib}"));
        std::fs::create_dir_all(&local).unwrap();
    }
    let mut dump = |format: &str, exclude: &[&str]| {
        let there = site.path("dump");
        let protocol = format!("file:{there}");
        let mut arguments = json!({"paging": false, "protocol": protocol, "format": format, "detach": true});
        if !exclude.is_empty() {
            arguments["exclude"] = json!(exclude);
        }
        machine.qmp.command("dump-guest-memory", arguments).must();
        let done = machine.qmp.event("DUMP_COMPLETED", DUMP).must();
        assert_eq!(done["data"]["result"]["status"], "completed", "{done}");
        let copy = local.join(format!("{format}{}", exclude.concat()));
        site.get(&there, &copy).must();
        site.run(&format!("rm {there}")).ok();
        println!("{format}: {} bytes", copy.metadata().unwrap().len());
        copy
    };
    // What is left out is what makedumpfile leaves out.
    let (whole, small) = (
        dump("kdump-raw-lzo", &[]),
        dump("kdump-raw-lzo", &["free", "cache", "user"]),
    );
    if let Err(reason) = readers::same_choice_as_makedumpfile(&whole, &small) {
        println!("  makedumpfile: SKIPPED: {reason}");
    }
    let mut first = None;
    for format in formats.iter().filter_map(|format| format.as_str()) {
        if !wanted(format) {
            continue;
        }
        let copy = dump(format, &[]);
        let found = judge(&copy, &guest);
        let expected = first.get_or_insert_with(|| found.clone());
        assert_eq!(
            found.len(),
            expected.len(),
            "{format}: not as many pages as the first form"
        );
        assert!(found == *expected, "{format}: other memory than the first form");
        if std::env::var_os("BULKHEAD_KEEP_DUMPS").is_none() {
            std::fs::remove_file(&copy).unwrap();
        }
    }
    // The guest is none the worse for it.
    machine.qmp.command("cont", json!({})).must();
    assert_eq!(machine.shell("echo still here", SOON).must().trim(), "still here");
}

/// Has all readers open it; returns the pages that are not zeroes, each with a number that stands for its content.
fn judge(path: &Path, guest: &Guest) -> BTreeMap<u64, u64> {
    let dump = Dump::open(File::open(path).unwrap()).must();
    let note = notes::check(dump.notes(), guest.vcpus).must();
    let note = note.expect("VMCOREINFO");
    assert_eq!(notes::value(note, "OSRELEASE"), Some(guest.release.as_str()));
    let mut codec = None;
    if let Dump::Kdump(dump) = &dump {
        codec = Some(dump.codec);
        let [system, node, release, version, machine, _] = &dump.names;
        assert_eq!(
            (system.as_str(), node.as_str(), machine.as_str()),
            ("Linux", "guest", "x86_64")
        );
        assert_eq!(release, &guest.release);
        assert!(guest.version.ends_with(version.as_str()), "{version}");
        let phys_base: i64 = notes::value(note, "NUMBER(phys_base)").unwrap().parse().unwrap();
        assert_eq!(dump.phys_base, phys_base.cast_unsigned());
        assert_eq!((dump.level, dump.vcpus), (0, guest.vcpus as u64));
    }
    let mut found = BTreeMap::new();
    let mut pattern = BTreeMap::new();
    let read = dump.each_page(|address, page| {
        let mut hasher = DefaultHasher::new();
        hasher.write(page);
        found.insert(address, hasher.finish());
        if page.starts_with(PATTERN.as_bytes()) {
            pattern.insert(page.to_vec(), address);
        }
    });
    read.must();
    let numbers: BTreeSet<usize> = pattern
        .keys()
        .map(|page| str::from_utf8(&page[PATTERN.len()..]).unwrap().trim().parse().unwrap())
        .collect();
    assert!(numbers.into_iter().eq(0..PATTERN_PAGES), "the pattern is not whole");
    // Some of them, for readers to find as well.
    let some: Vec<(u64, Vec<u8>)> = pattern
        .into_iter()
        .step_by(400)
        .map(|(page, address)| (address, page))
        .collect();

    let skipped = |reader: &str, verdict: readers::Verdict| match verdict {
        Ok(()) => println!("  {reader}: reads it"),
        Err(reason) => println!("  {reader}: SKIPPED: {reason}"),
    };
    let python = PathBuf::from(std::env::var_os(VARIABLE).unwrap_or_else(|| "python3".into()));
    let has_drgn = Python::with_drgn().map(drop);
    skipped(
        "drgn",
        has_drgn
            .clone()
            .and_then(|()| readers::drgn(&python, path, guest, &some)),
    );
    skipped("makedumpfile", readers::makedumpfile(path, codec, guest));
    if codec.is_none() {
        skipped("gdb", readers::gdb(path, guest));
        skipped("readelf", readers::readelf(path, guest));
    }
    if path
        .file_name()
        .is_some_and(|name| name.to_string_lossy().contains("raw"))
        || codec.is_none()
    {
        skipped("libkdumpfile", readers::libkdumpfile(path, guest, &some));
    }
    let symbols = std::env::var_os("BULKHEAD_VMLINUX").map(PathBuf::from);
    let symbols = symbols.ok_or_else(|| "BULKHEAD_VMLINUX does not name the kernel's debugging information".to_owned());
    skipped("crash", readers::crash_release(path, guest));
    skipped(
        "crash with symbols",
        symbols
            .clone()
            .and_then(|vmlinux| readers::crash(path, &vmlinux, guest)),
    );
    let both = has_drgn.and(symbols);
    skipped(
        "drgn with symbols",
        both.and_then(|vmlinux| readers::drgn_with_symbols(&python, path, &vmlinux, guest)),
    );
    found
}
