//! Every page of guest memory is in a dump as it is in memory: in every form that this build writes, into files and pipes, for
//! memory of all kinds and sizes. The judge is a reader of its own (`bulkhead_tests::dumpfile`).

use bulkhead_tests::dumpfile::ram::GuestRam;
use bulkhead_tests::dumpfile::{Dump, PAGE, Pages, notes};
use bulkhead_tests::machine::Machine;
use bulkhead_tests::need_kvm;
use bulkhead_tests::qmp::Qmp;
use serde_json::json;
use std::fs::File;
use std::io::{Read, pipe};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Memory of a machine that has not run, or why it cannot be had.
fn machine(size: &str, vcpus: usize) -> Result<(Machine, Qmp, GuestRam), String> {
    let kernel = bulkhead_tests::guest::image();
    let mut machine = Machine::start(&format!("-m {size} -smp {vcpus} -S -kernel {}", kernel.display()));
    let mut qmp = machine.qmp();
    let bytes = qmp.run("query-memory-size-summary")["base-memory"].as_u64().unwrap();
    let ram = GuestRam::of(machine.pid(), bytes)?;
    Ok((machine, qmp, ram))
}

/// Returns from the test when guest RAM cannot be looked at.
macro_rules! need_machine {
    ($size:expr, $vcpus:expr) => {{
        need_kvm!();
        match machine($size, $vcpus) {
            Ok(found) => found,
            Err(reason) => {
                println!("SKIPPED: {reason}");
                return;
            }
        }
    }};
}

fn formats(qmp: &mut Qmp) -> Vec<String> {
    let said = qmp.run("query-dump-guest-memory-capability");
    let formats = said["formats"].as_array().unwrap();
    formats
        .iter()
        .map(|format| format.as_str().unwrap().to_owned())
        .collect()
}

/// Dumps into a new file.
fn dump_to_file(qmp: &mut Qmp, format: &str) -> File {
    let file = tempfile::tempfile().unwrap();
    qmp.pass(&[file.as_fd()]);
    qmp.execute("getfd", json!({"fdname": "dump"}));
    let arguments = json!({"paging": false, "protocol": "fd:dump", "format": format});
    qmp.execute("dump-guest-memory", arguments);
    file
}

/// Dumps into a pipe, from which a thread makes a file with holes for zeroes.
fn dump_to_pipe(qmp: &mut Qmp, format: &str) -> File {
    let (mut reader, writer) = pipe().unwrap();
    qmp.pass(&[writer.as_fd()]);
    qmp.execute("getfd", json!({"fdname": "dump"}));
    drop(writer);
    let drain = std::thread::spawn(move || {
        let (file, mut at) = (tempfile::tempfile().unwrap(), 0);
        let mut buffer = vec![0; 1 << 20];
        loop {
            match reader.read(&mut buffer).unwrap() {
                0 => break,
                count => {
                    if buffer[..count].iter().any(|byte| *byte != 0) {
                        file.write_all_at(&buffer[..count], at).unwrap();
                    }
                    at += count as u64;
                }
            }
        }
        file.set_len(at).unwrap();
        file
    });
    let arguments = json!({"paging": false, "protocol": "fd:dump", "format": format});
    qmp.execute("dump-guest-memory", arguments);
    drain.join().unwrap()
}

fn is_plain_kdump(format: &str) -> bool {
    format.starts_with("kdump-raw")
}

/// Every form, each into a file and, if a pipe can take it, into a pipe; all say the same of as many pages.
#[track_caller]
fn every_form_has_all_of(qmp: &mut Qmp, ram: &GuestRam, vcpus: usize, into_pipes: bool) -> Vec<(String, Pages)> {
    let touched = ram.blocks();
    let mut found = Vec::new();
    for format in formats(qmp) {
        let mut dumps = vec![("file", dump_to_file(qmp, &format))];
        if into_pipes && !is_plain_kdump(&format) {
            dumps.push(("pipe", dump_to_pipe(qmp, &format)));
        }
        for (target, file) in dumps {
            let compared = Dump::open(file).and_then(|dump| {
                notes::check(dump.notes(), vcpus)?;
                dump.compare(ram)
            });
            let pages = compared.unwrap_or_else(|error| panic!("{format} into a {target}: {error}"));
            assert_eq!(pages.excluded, 0, "{format}");
            assert_eq!(
                pages.zero + pages.raw + pages.compressed,
                ram.bytes / PAGE as u64,
                "{format}"
            );
            found.push((format.clone(), pages));
        }
    }
    assert_eq!(ram.blocks(), touched, "dumping has allocated guest memory");
    found
}

/// What no codec makes smaller.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let words = (0..bytes.div_ceil(8) as u64).map(|index| bulkhead_tests::guest::pattern_word(seed, index));
    let mut bytes_of_words: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    bytes_of_words.truncate(bytes);
    bytes_of_words
}

/// Text, pointers, noise, zeroes that were written, and much that was never touched.
fn fill_with_all_kinds(ram: &GuestRam) {
    ram.write(
        5 * 4096 + 7,
        &b"a line that comes again and again, with a number in it\n".repeat(3000),
    );
    ram.write(3 * MIB - 100, &noise(1, MIB as usize));
    let pointers: Vec<u8> = (0..MIB / 8)
        .flat_map(|at| (0xffff_8880_0000_0000 | (at * 192)).to_le_bytes())
        .collect();
    ram.write(6 * MIB + 123, &pointers);
    ram.write(9 * MIB, &vec![0; MIB as usize]);
    for (address, bytes) in ram.pieces() {
        ram.write(address, &noise(address, (4096 + 1).min(bytes as usize)));
        ram.write(address + bytes / 2, &[7; 9]);
        ram.write(address + bytes - 4096, &[5; 4096]);
    }
}

#[test]
fn all_kinds_of_pages_are_in_every_form() {
    let (_machine, mut qmp, ram) = need_machine!("64M", 3);
    fill_with_all_kinds(&ram);
    for (format, pages) in every_form_has_all_of(&mut qmp, &ram, 3, true) {
        if format != "elf" {
            // The noise, and what of the guest's image does not get smaller.
            assert!((256..600).contains(&pages.raw), "{format}: {pages:?}");
            assert!((250..1000).contains(&pages.compressed), "{format}: {pages:?}");
        }
    }
}

/// Sizes that are no multiples of what bitmaps and chunks are made of, and such that are.
#[test]
fn memory_of_any_size_is_whole() {
    for size in ["8204K", "128M", "512M", "1025M"] {
        let (_machine, mut qmp, ram) = need_machine!(size, 1);
        ram.write(ram.bytes - 4096 - 1, &noise(3, 4097));
        ram.write(ram.bytes / 2, &[1; 3]);
        every_form_has_all_of(&mut qmp, &ram, 1, ram.bytes <= 128 * MIB);
    }
}

/// On both sides of the hole below 4 GiB, by one page and by much.
#[test]
fn the_hole_below_four_gib_is_none_of_it() {
    for size in ["3145732K", "3584M", "5G"] {
        let (_machine, mut qmp, ram) = need_machine!(size, 1);
        assert_eq!(ram.pieces(), [(0, 3 * GIB), (4 * GIB, ram.bytes - 3 * GIB)]);
        fill_with_all_kinds(&ram);
        every_form_has_all_of(&mut qmp, &ram, 1, false);
    }
}

#[test]
fn a_guest_of_noise_is_stored_as_it_is() {
    let (_machine, mut qmp, ram) = need_machine!("16M", 1);
    for piece in 0..16 {
        ram.write(piece * MIB, &noise(piece, MIB as usize));
    }
    for (format, pages) in every_form_has_all_of(&mut qmp, &ram, 1, true) {
        let expected = Pages {
            raw: 4096,
            ..Pages::default()
        };
        assert_eq!(pages, expected, "{format}");
    }
}

#[test]
fn a_guest_of_zeroes_takes_up_next_to_nothing() {
    let (_machine, mut qmp, ram) = need_machine!("256M", 1);
    // Half of it was written with zeroes: the kernel is gone.
    for piece in 0..128 {
        ram.write(piece * MIB, &vec![0; MIB as usize]);
    }
    for (format, pages) in every_form_has_all_of(&mut qmp, &ram, 1, false) {
        let expected = Pages {
            zero: 65536,
            ..Pages::default()
        };
        assert_eq!(pages, expected, "{format}");
        let file = dump_to_file(&mut qmp, &format);
        let (length, blocks) = file.metadata().map(|status| (status.len(), status.blocks())).unwrap();
        // Of a kdump there are the descriptors: 24 bytes for each page.
        let most = if format == "elf" {
            64 << 10
        } else {
            65536 * 24 + (64 << 10)
        };
        assert!(blocks * 512 <= most, "{format}: {length} bytes, {blocks} blocks");
    }
}

/// Compressed to one byte less than a page it is compressed; to a page or more it is stored as it is.
#[test]
fn pages_that_hardly_get_smaller_are_right_on_both_sides_of_the_border() {
    let (_machine, mut qmp, ram) = need_machine!("32M", 1);
    // Noise with ever longer runs in it: sizes in steps of a byte or so.
    for run in 0..4096 {
        let mut page = noise(run, PAGE);
        page[100..100 + run as usize / 8].fill(run as u8);
        ram.write(16 * MIB + run * 4096, &page);
    }
    for (format, _) in every_form_has_all_of(&mut qmp, &ram, 1, false) {
        if let Dump::Kdump(dump) = Dump::open(dump_to_file(&mut qmp, &format)).unwrap() {
            let sizes = dump.sizes();
            assert!(sizes.contains(&4095), "{format}: {:?}", sizes.last());
            assert!(sizes.iter().all(|size| *size < 4096), "{format}");
        }
    }
}
