//! File descriptors that clients pass to a running machine, and what commands do with them.

use bulkhead_tests::census::descriptor_counts;
use bulkhead_tests::machine::Machine;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{PipeReader, PipeWriter, pipe};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// A machine that waits for `cont`.
fn machine(more: &str) -> Machine {
    Machine::start(&format!("-m 64 -S -kernel {} {more}", guest::image().display()))
}

fn null() -> File {
    File::open("/dev/null").unwrap()
}

/// Passes an fd and has a command take it.
fn give(qmp: &mut Qmp, fd: BorrowedFd<'_>, command: &str, arguments: Value) -> Value {
    qmp.pass(&[fd]);
    qmp.execute(command, arguments)
}

#[track_caller]
fn refused(qmp: &mut Qmp, command: &str, arguments: Value) -> String {
    let error = qmp.try_execute(command, arguments).unwrap_err();
    assert_eq!(error["class"], "GenericError");
    error["desc"].as_str().unwrap().to_owned()
}

/// Whether all write ends of a pipe are closed.
fn is_closed(reader: &PipeReader) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap();
    fds[0].revents().unwrap().contains(PollFlags::POLLHUP)
}

/// The texts are those of a live server.
#[test]
fn every_refusal_is_in_the_protocols_words() {
    need_kvm!();
    let mut machine = machine("");
    let mut qmp = machine.qmp();
    let not_supplied = "No file descriptor supplied via SCM_RIGHTS";
    let without_fd = [
        ("getfd", json!({"fdname": "a"}), not_supplied),
        ("getfd", json!({"fdname": "1a"}), not_supplied),
        ("getfd", json!({}), "Parameter 'fdname' is missing"),
        (
            "closefd",
            json!({"fdname": "zz"}),
            "File descriptor named 'zz' not found",
        ),
        ("closefd", json!({}), "Parameter 'fdname' is missing"),
        ("add-fd", json!({}), not_supplied),
        ("add-fd", json!({"fdset-id": -1}), not_supplied),
        (
            "add-fd",
            json!({"fdset-id": "7"}),
            "Invalid parameter type for 'fdset-id', expected: integer",
        ),
        (
            "remove-fd",
            json!({"fdset-id": 99}),
            "File descriptor named 'fdset-id:99' not found",
        ),
        (
            "remove-fd",
            json!({"fdset-id": 7, "fd": 999}),
            "File descriptor named 'fdset-id:7, fd:999' not found",
        ),
        ("remove-fd", json!({}), "Parameter 'fdset-id' is missing"),
        ("query-fdsets", json!({"x": 1}), "Parameter 'x' is unexpected"),
    ];
    for (command, arguments, text) in without_fd {
        assert_eq!(
            refused(&mut qmp, command, arguments.clone()),
            text,
            "{command} {arguments}"
        );
    }
    let null = null();
    qmp.pass(&[null.as_fd()]);
    assert_eq!(
        refused(&mut qmp, "getfd", json!({"fdname": "1a"})),
        "Parameter 'fdname' expects a name not starting with a digit"
    );
    assert_eq!(
        refused(&mut qmp, "getfd", json!({"fdname": "a"})),
        not_supplied,
        "the refused command has used it up"
    );
    qmp.pass(&[null.as_fd()]);
    assert_eq!(
        refused(&mut qmp, "add-fd", json!({"fdset-id": -1})),
        "Parameter 'fdset-id' expects a non-negative value"
    );
    assert_eq!(give(&mut qmp, null.as_fd(), "getfd", json!({"fdname": ""})), json!({}));
    assert_eq!(give(&mut qmp, null.as_fd(), "getfd", json!({"fdname": "a"})), json!({}));
    assert_eq!(qmp.execute("closefd", json!({"fdname": "a"})), json!({}));
    assert_eq!(
        refused(&mut qmp, "closefd", json!({"fdname": "a"})),
        "File descriptor named 'a' not found"
    );
}

#[test]
fn sets_have_the_lowest_free_number_and_are_listed_from_the_highest() {
    need_kvm!();
    let mut machine = machine("");
    let mut qmp = machine.qmp();
    let null = null();
    let mut add = |arguments: Value| {
        let added = give(&mut qmp, null.as_fd(), "add-fd", arguments);
        (added["fdset-id"].as_i64().unwrap(), added["fd"].as_i64().unwrap())
    };
    let (zero, one) = (add(json!({})), add(json!({})));
    assert_eq!((zero.0, one.0), (0, 1));
    let (first, second) = (
        add(json!({"fdset-id": 7, "opaque": "r:/x"})),
        add(json!({"fdset-id": 7})),
    );
    let seven = json!({"fdset-id": 7, "fds": [{"fd": first.1, "opaque": "r:/x"}, {"fd": second.1}]});
    let low = [
        json!({"fdset-id": 1, "fds": [{"fd": one.1}]}),
        json!({"fdset-id": 0, "fds": [{"fd": zero.1}]}),
    ];
    assert_eq!(qmp.run("query-fdsets"), json!([seven, low[0], low[1]]));
    assert_eq!(
        refused(&mut qmp, "remove-fd", json!({"fdset-id": 7, "fd": zero.1})),
        format!("File descriptor named 'fdset-id:7, fd:{}' not found", zero.1)
    );
    qmp.execute("remove-fd", json!({"fdset-id": 7, "fd": first.1}));
    assert_eq!(
        qmp.run("query-fdsets")[0],
        json!({"fdset-id": 7, "fds": [{"fd": second.1}]})
    );
    qmp.execute("remove-fd", json!({"fdset-id": 7}));
    assert_eq!(qmp.run("query-fdsets"), json!([low[0], low[1]]));
    let next = give(&mut qmp, null.as_fd(), "add-fd", json!({}));
    assert_eq!(next["fdset-id"], 2);
}

#[test]
fn the_newest_passed_fd_is_used_and_all_others_are_closed() {
    need_kvm!();
    let mut machine = machine("");
    let mut qmp = machine.qmp();
    let before = descriptor_counts(&machine);
    let ends: Vec<(PipeReader, PipeWriter)> = (0..5).map(|_| pipe().unwrap()).collect();
    let (readers, writers): (Vec<_>, Vec<_>) = ends.into_iter().unzip();
    qmp.pass(&[writers[0].as_fd()]);
    qmp.run("query-status");
    qmp.pass(&[writers[1].as_fd(), writers[2].as_fd(), writers[3].as_fd()]);
    // Another command in between changes nothing.
    qmp.run("query-status");
    qmp.execute("getfd", json!({"fdname": "x"}));
    let still = writers.into_iter().nth(4).unwrap();
    let open: Vec<bool> = readers.iter().map(|reader| !is_closed(reader)).collect();
    assert_eq!(
        open,
        [false, true, false, false, true],
        "only the first one of the last message is kept"
    );
    // The same name again: the one before is closed.
    give(&mut qmp, still.as_fd(), "getfd", json!({"fdname": "x"}));
    drop(still);
    assert!(is_closed(&readers[1]) && !is_closed(&readers[4]));
    qmp.execute("closefd", json!({"fdname": "x"}));
    assert!(is_closed(&readers[4]));
    assert_eq!(descriptor_counts(&machine), before);
}

#[test]
fn fds_survive_their_client_and_all_monitors_share_them() {
    need_kvm!();
    let mut machine = machine("-qmp unix:{dir}/second,server=on,wait=off");
    let mut first = machine.qmp();
    let (reader, writer) = pipe().unwrap();
    give(&mut first, writer.as_fd(), "getfd", json!({"fdname": "kept"}));
    let null = null();
    let added = give(&mut first, null.as_fd(), "add-fd", json!({"opaque": "note"}));
    drop((first, writer));
    let mut second = Qmp::connect(&machine.path("second")).unwrap();
    let expected = json!([{"fdset-id": 0, "fds": [{"fd": added["fd"], "opaque": "note"}]}]);
    assert_eq!(second.run("query-fdsets"), expected);
    assert!(!is_closed(&reader));
    let mut third = machine.qmp();
    assert_eq!(third.run("query-fdsets"), expected);
    third.execute("closefd", json!({"fdname": "kept"}));
    assert!(is_closed(&reader));
    second.execute("remove-fd", json!({"fdset-id": 0}));
    assert_eq!(third.run("query-fdsets"), json!([]));
}

#[test]
fn a_thousand_cycles_leave_no_descriptor_in_any_process() {
    need_kvm!();
    let mut machine = machine("");
    let mut qmp = machine.qmp();
    let before = descriptor_counts(&machine);
    let null = null();
    for _ in 0..1000 {
        give(&mut qmp, null.as_fd(), "getfd", json!({"fdname": "x"}));
        qmp.execute("closefd", json!({"fdname": "x"}));
        let added = give(&mut qmp, null.as_fd(), "add-fd", json!({}));
        qmp.execute("remove-fd", json!({"fdset-id": added["fdset-id"], "fd": added["fd"]}));
    }
    let after = descriptor_counts(&machine);
    println!("before {before:?}\nafter  {after:?}");
    assert_eq!(after, before);
}

/// A file that a process started from here inherits.
fn inheritable(file: File) -> File {
    fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    file
}

fn read_write(path: &std::path::Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

#[test]
fn a_disk_is_opened_from_a_set_of_the_command_line() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    File::create(&image).unwrap().set_len(20 << 20).unwrap();
    let reader = inheritable(File::open(&image).unwrap());
    let writer = inheritable(read_write(&image));
    let other = inheritable(small_image(directory.path()));
    let arguments = format!(
        "-m 256 -smp 2 -kernel {} -add-fd fd={},set=1,opaque=image:r -add-fd fd={},set=1,opaque=image:w+ \
         -drive file=/dev/fdset/1,if=virtio,format=raw,id=d -drive file=/dev/fdset/0,if=virtio,format=raw,readonly=on,id=e \
         -add-fd fd={},set=0 -no-shutdown",
        guest::image().display(),
        reader.as_raw_fd(),
        writer.as_raw_fd(),
        other.as_raw_fd(),
    );
    let mut machine = Machine::start_with(
        directory,
        &arguments,
        &["-append", "test=blk test=blk-verify mib=8 seed=5 queues=2"],
    );
    let mut qmp = machine.qmp();
    machine.wait_for_serial("done failures=0\n");
    assert_eq!(
        guest::value(&machine.serial(), "done", "failures"),
        Some("0"),
        "{}",
        machine.serial()
    );
    let sets = qmp.run("query-fdsets");
    let opaque = |set: usize, member: usize| sets[set]["fds"][member]["opaque"].clone();
    assert_eq!(
        (&sets[0]["fdset-id"], &sets[1]["fdset-id"]),
        (&json!(1), &json!(0)),
        "{sets}"
    );
    assert_eq!((opaque(0, 0), opaque(0, 1)), (json!("image:r"), json!("image:w+")));
    let written = std::fs::read(&image).unwrap();
    assert_eq!(guest::checksum(&written[..8 << 20]), guest::pattern_checksum(8, 5));
    // The disk has its own duplicate: removing the set does not take it away.
    qmp.execute("remove-fd", json!({"fdset-id": 1}));
    assert_eq!(qmp.run("query-fdsets").as_array().unwrap().len(), 1);
}

fn small_image(directory: &std::path::Path) -> File {
    let path = directory.join("small");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    File::open(path).unwrap()
}

#[test]
fn sets_of_the_command_line_that_cannot_work_are_named_in_one_line() {
    need_kvm!();
    let scratch = tempfile::tempdir().unwrap();
    let image = scratch.path().join("image");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let read_only = inheritable(File::open(&image).unwrap());
    let writable = inheritable(read_write(&image));
    let closed = File::open(&image).unwrap();
    let kernel = guest::image();
    let add = |file: &File, set| format!("fd={},set={set}", file.as_raw_fd());
    let (ro, rw, not_inherited) = (add(&read_only, 1), add(&writable, 2), add(&closed, 1));
    let (one, two) = (
        "file=/dev/fdset/1,if=virtio,format=raw",
        "file=/dev/fdset/2,if=virtio,format=raw",
    );
    let direct = "file=/dev/fdset/2,if=virtio,format=raw,cache=none";
    let bad = "file=/dev/fdset/x,if=virtio,format=raw";
    let cases: &[(&[&str], &str)] = &[
        (
            &["-drive", one],
            "-drive file=/dev/fdset/1: Failed to find fdset /dev/fdset/1",
        ),
        (
            &["-add-fd", &ro, "-drive", one],
            "Failed to find file descriptor with matching flags=0x2",
        ),
        (
            &["-add-fd", &rw, "-drive", direct],
            "Failed to find file descriptor with matching flags=0x4002",
        ),
        (&["-drive", bad], "Could not parse fdset /dev/fdset/x"),
        (&["-add-fd", &not_inherited], "no such file descriptor was inherited"),
        (
            &["-add-fd", &rw, "-drive", two, "-drive", two],
            "-drive file=/dev/fdset/2: Failed to get \"write\" lock: /dev/fdset/2 is in use",
        ),
        // Two descriptions of one file: the locks tell.
        (
            &[
                "-add-fd",
                &rw,
                "-drive",
                two,
                "-drive",
                &format!("file={},if=virtio,format=raw", image.display()),
            ],
            "in use",
        ),
    ];
    for (arguments, text) in cases {
        let base = ["-nodefaults", "-kernel", kernel.to_str().unwrap()];
        let line = bulkhead_tests::machine::refused(scratch.path(), &[&base[..], arguments].concat());
        assert!(line.contains(text), "{arguments:?}: {line}");
    }
    drop((read_only, writable));
}
