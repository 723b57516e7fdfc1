//! dump-guest-memory with `paging`: every segment says at which virtual address memory is, and the bytes are there once.

use bulkhead_tests::machine::Machine;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::json;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

const RAM_BYTES: u64 = 64 << 20;
const NOWHERE: u64 = u64::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Load {
    offset: u64,
    virtual_address: u64,
    guest_address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

fn u64_at(file: &File, at: u64) -> u64 {
    let mut word = [0; 8];
    file.read_exact_at(&mut word, at).unwrap();
    u64::from_le_bytes(word)
}

fn loads(file: &File) -> Vec<Load> {
    let count = u64_at(file, 56) & 0xffff;
    (1..count)
        .map(|number| {
            let field = |at| u64_at(file, 64 + number * 56 + at);
            assert_eq!(field(0) as u32, 1);
            Load {
                offset: field(8),
                virtual_address: field(16),
                guest_address: field(24),
                file_bytes: field(32),
                memory_bytes: field(40),
            }
        })
        .collect()
}

fn dump(qmp: &mut Qmp, paging: bool, more: &[(&str, u64)]) -> File {
    let file = tempfile::tempfile().unwrap();
    qmp.pass(&[file.as_fd()]);
    qmp.execute("getfd", json!({"fdname": "dump"}));
    let mut arguments = json!({"paging": paging, "protocol": "fd:dump"});
    for (key, value) in more {
        arguments[key] = json!(value);
    }
    qmp.execute("dump-guest-memory", arguments);
    file
}

fn machine(more: &str) -> Machine {
    let arguments = format!("-m 64 -kernel {} -append test=spin {more}", guest::image().display());
    Machine::start(&arguments)
}

/// The test guest maps the lower 4 GiB to themselves: 64 MiB of RAM, and much that is none.
#[test]
fn segments_are_what_the_page_tables_map_and_the_bytes_are_ram() {
    need_kvm!();
    let mut machine = machine("");
    machine.wait_for_serial("spin 1");
    let mut qmp = machine.qmp();
    qmp.run("stop");
    let (plain, paged) = (dump(&mut qmp, false, &[]), dump(&mut qmp, true, &[]));
    let whole = loads(&plain)[0];
    assert_eq!((whole.guest_address, whole.file_bytes), (0, RAM_BYTES));
    let found = loads(&paged);
    assert!(found.is_sorted_by_key(|load| load.guest_address), "{found:x?}");
    let covered: u64 = found.iter().map(|load| load.file_bytes).sum();
    assert_eq!(covered, RAM_BYTES, "{found:x?}");
    let mapped: u64 = found.iter().map(|load| load.memory_bytes).sum();
    assert!(mapped > RAM_BYTES, "{found:x?}");
    for load in &found {
        assert_eq!(load.virtual_address, load.guest_address);
        if load.guest_address >= RAM_BYTES {
            assert_eq!((load.offset, load.file_bytes), (NOWHERE, 0), "{load:x?}");
            continue;
        }
        assert_eq!(load.file_bytes, load.memory_bytes.min(RAM_BYTES - load.guest_address));
        let read = |file: &File, offset: u64| {
            let mut bytes = vec![0; load.file_bytes as usize];
            file.read_exact_at(&mut bytes, offset).unwrap();
            bytes
        };
        assert!(read(&paged, load.offset) == read(&plain, whole.offset + load.guest_address));
    }
    assert_eq!(qmp.run("query-dump")["total"], RAM_BYTES);
}

#[test]
fn a_range_clips_segments_to_the_byte() {
    need_kvm!();
    let mut machine = machine("");
    machine.wait_for_serial("spin 1");
    let mut qmp = machine.qmp();
    let file = dump(&mut qmp, true, &[("begin", 0x10_0001), ("length", 4097)]);
    let found = loads(&file);
    let [load] = found[..] else { panic!("{found:x?}") };
    assert_eq!((load.virtual_address, load.guest_address), (0x10_0001, 0x10_0001));
    assert_eq!((load.file_bytes, load.memory_bytes), (4097, 4097));
    assert_eq!(load.offset % 4096, 1);
}

/// A PVH kernel is entered without paging.
#[test]
fn before_the_guest_pages_addresses_are_physical() {
    need_kvm!();
    let mut machine = machine("-S");
    let mut qmp = machine.qmp();
    let found = loads(&dump(&mut qmp, true, &[]));
    let [load] = found[..] else { panic!("{found:x?}") };
    assert_eq!(
        (load.virtual_address, load.guest_address, load.file_bytes),
        (0, 0, RAM_BYTES)
    );
}
