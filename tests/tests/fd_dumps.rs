//! Dumps into what clients pass, and what is seen of a dump from outside while it is written.

use bulkhead_tests::census::descriptor_counts;
use bulkhead_tests::machine::{Machine, wait_until};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write, pipe};
use std::os::fd::{AsFd, BorrowedFd};

const RAM_BYTES: u64 = 64 << 20;

/// A machine that waits for `cont`, with its kernel in memory.
fn machine() -> Machine {
    Machine::start(&format!(
        "-m 64 -S -append test=spin -kernel {}",
        guest::image().display()
    ))
}

fn name(qmp: &mut Qmp, fd: BorrowedFd<'_>, name: &str) {
    qmp.pass(&[fd]);
    qmp.execute("getfd", json!({"fdname": name}));
}

fn dump(protocol: &str) -> Value {
    json!({"paging": false, "protocol": protocol})
}

fn part(protocol: &str, begin: i64, length: i64) -> Value {
    json!({"paging": false, "protocol": protocol, "begin": begin, "length": length})
}

#[track_caller]
fn refused(qmp: &mut Qmp, arguments: Value) -> String {
    let error = qmp.try_execute("dump-guest-memory", arguments).unwrap_err();
    assert_eq!(error["class"], "GenericError");
    error["desc"].as_str().unwrap().to_owned()
}

fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    let mut word = [0; 8];
    word[..length].copy_from_slice(&bytes[at..at + length]);
    u64::from_le_bytes(word)
}

/// The PT_LOADs of an ELF core: guest physical address and bytes.
fn loads(core: &[u8]) -> Vec<(u64, &[u8])> {
    assert_eq!(&core[..4], b"\x7fELF");
    let (table, size, count) = (number(core, 32, 8), number(core, 54, 2), number(core, 56, 2));
    let header = |index| (table + index * size) as usize;
    let load = |at: usize| {
        let (offset, length) = (number(core, at + 8, 8) as usize, number(core, at + 32, 8) as usize);
        (number(core, at + 24, 8), &core[offset..offset + length])
    };
    (0..count)
        .map(header)
        .filter(|at| number(core, *at, 4) == 1)
        .map(load)
        .collect()
}

#[test]
fn refusals_come_in_the_protocols_words_and_order() {
    need_kvm!();
    let mut machine = machine();
    let mut qmp = machine.qmp();
    let file = format!("file:{}", machine.path("d").display());
    let directory = machine.directory.path().display().to_string();
    let with = |protocol: &str, more: Value| {
        let mut arguments = dump(protocol);
        arguments
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        arguments
    };
    let unfiltered = "kdump-compressed format doesn't support paging or filter";
    let cases = [
        (json!({}), "Parameter 'paging' is missing"),
        (json!({"paging": false}), "Parameter 'protocol' is missing"),
        (
            with(&file, json!({"format": "bogus"})),
            "Parameter 'format' does not accept value 'bogus'",
        ),
        (
            with("foo", json!({"format": "kdump-zlib", "begin": 0, "length": 4096})),
            unfiltered,
        ),
        (with("foo", json!({"format": "kdump-zlib", "length": 4096})), unfiltered),
        (
            with("foo", json!({"format": "kdump-lzo", "compression": "small"})),
            "Parameter 'compression' is for kdump-zlib and kdump-raw-zlib",
        ),
        (
            json!({"paging": true, "protocol": "foo", "format": "kdump-lzo"}),
            unfiltered,
        ),
        (
            with("foo", json!({"exclude": ["free"]})),
            "Parameter 'exclude' needs a kdump-compressed format",
        ),
        (
            with("foo", json!({"exclude": ["all"], "format": "kdump-zlib"})),
            "Parameter 'null' does not accept value 'all'",
        ),
        (with("foo", json!({"begin": 0})), "Parameter 'length' is missing"),
        (with("foo", json!({"length": 4096})), "Parameter 'begin' is missing"),
        (
            with("foo", json!({"format": "win-dmp"})),
            "win-dmp is not available now",
        ),
        (dump("foo"), "parameter 'protocol' must start with 'file:' or 'fd:'"),
        (
            dump(&directory),
            "parameter 'protocol' must start with 'file:' or 'fd:'",
        ),
        (part("fd:nope", 0, 0), "File descriptor named 'nope' has not been found"),
        (dump("fd:"), "File descriptor named '' has not been found"),
        (dump("file:"), "Could not create '': No such file or directory"),
        (
            part("file:/nonexistent/d", 0, 0),
            "Could not create '/nonexistent/d': No such file or directory",
        ),
        (
            dump(&format!("file:{directory}")),
            &format!("Could not create '{directory}': Is a directory"),
        ),
        (dump("file:/dev/fdset/4"), "Failed to find fdset /dev/fdset/4"),
        (part(&file, 0, 0), "parameter 'length' expects a non-zero size"),
        (part(&file, 1 << 40, 4096), "dump: no guest memory to dump"),
        (part(&file, -1, 4096), "dump: no guest memory to dump"),
    ];
    for (arguments, text) in cases {
        assert_eq!(refused(&mut qmp, arguments.clone()), text, "{arguments}");
    }
    assert!(!machine.path("d").exists(), "nothing of a refused dump stays");
    assert_eq!(
        qmp.run("query-dump"),
        json!({"status": "none", "completed": 0, "total": 0})
    );
    assert_eq!(
        qmp.run("query-dump-guest-memory-capability"),
        json!({"formats": ["elf", "kdump-zlib", "kdump-raw-zlib", "kdump-lzo", "kdump-raw-lzo", "kdump-snappy", "kdump-raw-snappy", "kdump-zstd", "kdump-raw-zstd"]})
    );
    assert!(!machine.helpers().iter().any(|(name, _)| name == "dump-proc"));
}

#[test]
fn a_dump_goes_into_a_passed_pipe_and_uses_the_name_up() {
    need_kvm!();
    let mut machine = machine();
    let mut qmp = machine.qmp();
    let file = machine.path("whole");
    qmp.execute("dump-guest-memory", dump(&format!("file:{}", file.display())));
    let whole = std::fs::read(&file).unwrap();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&file.metadata().unwrap().permissions()) & 0o777,
        0o400
    );
    let (mut reader, writer) = pipe().unwrap();
    name(&mut qmp, writer.as_fd(), "d");
    drop(writer);
    let drain = std::thread::spawn(move || {
        let mut text = Vec::new();
        reader.read_to_end(&mut text).unwrap();
        text
    });
    qmp.execute("dump-guest-memory", dump("fd:d"));
    // The end of file shows that nobody has kept the pipe.
    assert!(
        drain.join().unwrap() == whole,
        "the pipe has another dump than the file"
    );
    assert_eq!(
        refused(&mut qmp, dump("fd:d")),
        "File descriptor named 'd' has not been found"
    );
    assert_eq!(
        qmp.run("query-dump"),
        json!({"status": "completed", "completed": RAM_BYTES, "total": RAM_BYTES})
    );
}

/// drgn asks for single bytes.
#[test]
fn a_range_is_exact_to_the_byte_and_begins_at_the_files_offset() {
    need_kvm!();
    let mut machine = machine();
    let mut qmp = machine.qmp();
    let path = machine.path("whole");
    qmp.execute("dump-guest-memory", dump(&format!("file:{}", path.display())));
    qmp.wait_event("DUMP_COMPLETED");
    let whole = std::fs::read(path).unwrap();
    let memory = loads(&whole)[0].1;
    assert!(
        memory.windows(5).any(|window| window == b"BHG: "),
        "no kernel in memory"
    );
    for (begin, length) in [(0, 4096), (100, 5000), (0x10_0001, 1), (RAM_BYTES - 3, 1000)] {
        let inside = length.min(RAM_BYTES - begin);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"before").unwrap();
        name(&mut qmp, file.as_fd(), "d");
        qmp.execute("dump-guest-memory", part("fd:d", begin as i64, length as i64));
        let result = json!({"status": "completed", "completed": inside, "total": inside});
        assert_eq!(qmp.wait_event("DUMP_COMPLETED"), json!({"result": result}));
        assert_eq!(qmp.run("query-dump"), result);
        let mut text = Vec::new();
        assert_eq!(file.stream_position().unwrap(), file.metadata().unwrap().len());
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut text).unwrap();
        assert_eq!(&text[..6], b"before");
        let expected = &memory[begin as usize..(begin + inside) as usize];
        assert!(
            loads(&text[6..]) == [(begin, expected)],
            "begin {begin}, length {length}"
        );
    }
    // As QEMU has it, a negative length is the largest there is.
    let mut file = tempfile::tempfile().unwrap();
    name(&mut qmp, file.as_fd(), "d");
    qmp.execute("dump-guest-memory", part("fd:d", 0, -1));
    assert_eq!(qmp.run("query-dump")["total"], json!(RAM_BYTES));
    assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), whole.len() as u64);
}

#[test]
fn a_set_is_a_dumps_output_when_it_has_a_member_for_writing() {
    need_kvm!();
    let mut machine = machine();
    let mut qmp = machine.qmp();
    let path = machine.path("d");
    let both = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    qmp.pass(&[both.as_fd()]);
    qmp.execute("add-fd", json!({"fdset-id": 3}));
    assert_eq!(
        refused(&mut qmp, dump("file:/dev/fdset/3")),
        "Failed to find file descriptor with matching flags=0x241"
    );
    let write = File::options().write(true).open(&path).unwrap();
    qmp.pass(&[write.as_fd()]);
    qmp.execute("add-fd", json!({"fdset-id": 3}));
    qmp.execute("dump-guest-memory", part("file:/dev/fdset/3", 4096, 4096));
    assert_eq!(loads(&std::fs::read(&path).unwrap()).len(), 1);
    assert_eq!(
        qmp.run("query-fdsets")[0]["fds"].as_array().unwrap().len(),
        2,
        "a set is not used up"
    );
}

#[test]
fn a_detached_dump_is_watched_by_query_dump_and_refuses_what_would_disturb_it() {
    need_kvm!();
    let mut machine = Machine::start_with(
        tempfile::tempdir().unwrap(),
        &format!("-m 64 -kernel {}", guest::image().display()),
        &["-append", "test=spin"],
    );
    let mut qmp = machine.qmp();
    machine.wait_for_serial("spin");
    let before = descriptor_counts(&machine);
    let (mut reader, writer) = pipe().unwrap();
    name(&mut qmp, writer.as_fd(), "d");
    drop(writer);
    let mut arguments = dump("fd:d");
    arguments["detach"] = json!(true);
    assert_eq!(qmp.execute("dump-guest-memory", arguments), json!({}));
    // Nobody reads the pipe yet.
    let report = qmp.run("query-dump");
    assert_eq!(
        (&report["status"], &report["total"]),
        (&json!("active"), &json!(RAM_BYTES)),
        "{report}"
    );
    // No more than a pipe holds.
    assert!(report["completed"].as_u64().unwrap() <= 1 << 20, "{report}");
    qmp.wait_event("STOP");
    let busy = "There is a dump in process, please wait.";
    assert_eq!(refused(&mut qmp, dump("file:/nonexistent/d")), busy);
    for command in ["stop", "cont"] {
        assert_eq!(qmp.try_execute(command, json!({})).unwrap_err()["desc"], busy);
    }
    // Half of the memory is read, and some of it is reported.
    let mut half = vec![0; (RAM_BYTES / 2) as usize];
    reader.read_exact(&mut half).unwrap();
    wait_until("progress", || {
        let now = qmp.run("query-dump");
        assert_eq!(now["status"], "active");
        (1..RAM_BYTES).contains(&now["completed"].as_u64().unwrap())
    });
    let rest = std::thread::spawn(move || reader.read_to_end(&mut Vec::new()).unwrap());
    let result = json!({"status": "completed", "completed": RAM_BYTES, "total": RAM_BYTES});
    assert_eq!(qmp.wait_event("DUMP_COMPLETED"), json!({"result": result}));
    assert_eq!(qmp.run("query-dump"), result);
    qmp.wait_event("RESUME");
    assert!(rest.join().unwrap() as u64 >= RAM_BYTES / 2);
    wait_until("dump-proc is gone", || {
        !machine.helpers().iter().any(|(name, _)| name == "dump-proc")
    });
    assert_eq!(descriptor_counts(&machine), before);
}

#[test]
fn a_failed_dump_says_why_and_leaves_what_it_did_not_make() {
    need_kvm!();
    let mut machine = machine();
    let mut qmp = machine.qmp();
    let full = File::options().write(true).open("/dev/full").unwrap();
    name(&mut qmp, full.as_fd(), "d");
    let text = "dump: failed to write elf header: No space left on device";
    assert_eq!(refused(&mut qmp, dump("fd:d")), text);
    let result = json!({"status": "failed", "completed": 0, "total": RAM_BYTES});
    assert_eq!(
        qmp.wait_event("DUMP_COMPLETED"),
        json!({"result": result, "error": text})
    );
    assert_eq!(qmp.run("query-dump"), result);
    // A FIFO: without a reader it is refused at once; when the reader leaves the dump fails, and the name stays.
    let path = machine.path("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let protocol = format!("file:{}", path.display());
    assert_eq!(
        refused(&mut qmp, dump(&protocol)),
        format!("Could not create '{}': No such device or address", path.display())
    );
    use std::os::unix::fs::OpenOptionsExt;
    let reader = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .unwrap();
    let mut arguments = dump(&protocol);
    arguments["detach"] = json!(true);
    qmp.execute("dump-guest-memory", arguments);
    drop(reader);
    assert_eq!(qmp.wait_event("DUMP_COMPLETED")["result"]["status"], "failed");
    assert!(path.exists(), "a FIFO is removed like a file that the dump made");
}

#[test]
fn quit_does_not_wait_for_a_dump_that_nobody_reads() {
    need_kvm!();
    for running in [false, true] {
        let mut machine = machine();
        let mut qmp = machine.qmp();
        if running {
            qmp.run("cont");
        }
        let (reader, writer) = pipe().unwrap();
        name(&mut qmp, writer.as_fd(), "d");
        let mut arguments = dump("fd:d");
        arguments["detach"] = json!(true);
        qmp.execute("dump-guest-memory", arguments);
        qmp.run("quit");
        assert_eq!(qmp.wait_event("DUMP_COMPLETED")["result"]["status"], "failed");
        assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
        drop((reader, writer));
    }
}
