//! The VMCOREINFO note in dumps: as the guest announces it, as it is searched for, and never from before a reset.

use bulkhead_tests::machine::Machine;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::json;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

/// What the test guest writes.
const TEXT: &str = "OSRELEASE=0.0.0-guest\nPAGESIZE=4096\n";

fn machine(append: &str, more: &str) -> Machine {
    let arguments = format!("-m 64 -kernel {} {more}", guest::image().display());
    Machine::start_with(tempfile::tempdir().unwrap(), &arguments, &["-append", append])
}

/// The notes of a dump: name and content. `more` are further arguments of the dump.
fn notes(qmp: &mut Qmp, more: &[(&str, i64)]) -> Vec<(String, Vec<u8>)> {
    let file = tempfile::tempfile().unwrap();
    qmp.pass(&[file.as_fd()]);
    qmp.execute("getfd", json!({"fdname": "notes"}));
    let mut arguments = json!({"paging": false, "protocol": "fd:notes"});
    for (key, value) in more {
        arguments[key] = json!(value);
    }
    qmp.execute("dump-guest-memory", arguments);
    let number = |at: u64, length: usize| {
        let mut word = [0; 8];
        file.read_exact_at(&mut word[..length], at).unwrap();
        u64::from_le_bytes(word)
    };
    // The first program header is that of the notes.
    assert_eq!(number(64, 4), 4);
    let (mut at, end) = (number(72, 8), number(72, 8) + number(96, 8));
    let mut found = Vec::new();
    while at < end {
        let (name_bytes, bytes) = (number(at, 4), number(at + 4, 4));
        let name_end = at + 12 + name_bytes.next_multiple_of(4);
        let mut name = vec![0; name_bytes as usize];
        file.read_exact_at(&mut name, at + 12).unwrap();
        let mut content = vec![0; bytes as usize];
        file.read_exact_at(&mut content, name_end).unwrap();
        let name = String::from_utf8(name).unwrap().trim_end_matches('\0').to_owned();
        found.push((name, content));
        at = name_end + bytes.next_multiple_of(4);
    }
    assert_eq!(at, end);
    found
}

fn vmcoreinfo(qmp: &mut Qmp, more: &[(&str, i64)]) -> Option<String> {
    let notes = notes(qmp, more);
    let names: Vec<&str> = notes.iter().map(|(name, _)| name.as_str()).collect();
    let (_, rest) = names.split_at(2);
    assert_eq!(names[..2], ["CORE", "QEMU"]);
    match rest {
        [] => None,
        ["VMCOREINFO"] => Some(String::from_utf8(notes[2].1.clone()).unwrap()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_the_guest_announces_is_in_every_dump_until_the_machine_is_reset() {
    need_kvm!();
    // Where a search would not find it.
    let mut machine = machine("test=fwcfg at=100 test=spin", "-device vmcoreinfo,id=note");
    machine.wait_for_serial("spin 1");
    let serial = machine.serial();
    assert!(guest::report(&serial).contains(&"ok fwcfg"), "{serial}");
    let mut qmp = machine.qmp();
    assert_eq!(vmcoreinfo(&mut qmp, &[]).as_deref(), Some(TEXT));
    // As drgn asks.
    assert_eq!(
        vmcoreinfo(&mut qmp, &[("begin", 0), ("length", 1)]).as_deref(),
        Some(TEXT)
    );
    assert_eq!(qmp.run("query-status")["status"], "running");

    qmp.run("stop");
    qmp.run("system_reset");
    assert_eq!(vmcoreinfo(&mut qmp, &[]), None, "the new guest has said nothing");
    qmp.run("cont");
    let announced = |machine: &Machine| machine.serial().matches("ok fwcfg").count();
    bulkhead_tests::machine::wait_until("the guest announces it again", || announced(&machine) == 2);
    assert_eq!(vmcoreinfo(&mut qmp, &[]).as_deref(), Some(TEXT));
}

#[test]
fn a_note_that_is_not_announced_is_searched_for() {
    need_kvm!();
    for (place, expected) in [("", Some(TEXT)), ("at=8", None)] {
        let mut machine = machine(&format!("test=fwcfg tell=0 {place} test=spin"), "");
        machine.wait_for_serial("spin 1");
        let mut qmp = machine.qmp();
        assert_eq!(vmcoreinfo(&mut qmp, &[]).as_deref(), expected, "{place}");
        let part = [("begin", 4096), ("length", 5000)];
        assert_eq!(vmcoreinfo(&mut qmp, &part).as_deref(), expected, "{place}");
    }
}

#[test]
fn without_the_device_there_is_no_fw_cfg() {
    need_kvm!();
    let mut without = machine("test=fwcfg test=spin", "");
    without.wait_for_serial("spin 1");
    let serial = without.serial();
    assert!(serial.contains("FAIL fwcfg signature: got 0xffffffff"), "{serial}");
    let ports = |qmp: &mut Qmp| {
        let map = qmp.execute("human-monitor-command", json!({"command-line": "info mtree -f"}));
        map.as_str().unwrap().contains("fwcfg")
    };
    assert!(!ports(&mut without.qmp()));
    let mut with = machine("test=spin", "-device vmcoreinfo");
    assert!(ports(&mut with.qmp()));
}

#[test]
fn the_device_is_in_the_object_tree() {
    need_kvm!();
    let devices = "-device virtio-rng-pci -device vmcoreinfo -device virtio-rng-pci,id=r";
    let mut anonymous = machine("test=spin", devices);
    let mut qmp = anonymous.qmp();
    let path = "/machine/peripheral-anon/device[1]";
    let get =
        |qmp: &mut Qmp, path: &str, property: &str| qmp.execute("qom-get", json!({"path": path, "property": property}));
    assert_eq!(get(&mut qmp, path, "type"), "vmcoreinfo");
    assert_eq!(
        get(&mut qmp, "/machine/peripheral-anon/device[0]", "type"),
        "virtio-rng-pci"
    );
    let mut named = machine("test=spin", "-device vmcoreinfo,id=note");
    let mut qmp = named.qmp();
    assert_eq!(get(&mut qmp, "/machine/peripheral/note", "type"), "vmcoreinfo");
    assert_eq!(get(&mut qmp, "note", "hotpluggable"), false);
    let properties = qmp.execute("device-list-properties", json!({"typename": "vmcoreinfo"}));
    assert_eq!(properties, json!([]));
    let types = qmp.execute("qom-list-types", json!({"implements": "device"}));
    let names = types.as_array().unwrap().iter().map(|entry| &entry["name"]);
    assert_eq!(names.filter(|name| *name == "vmcoreinfo").count(), 1);
}
