//! Objects and devices over the whole machine: created on the command line and by clients, used by the guest, deleted.

use bulkhead_tests::machine::{Machine, refused, wait_until};
use bulkhead_tests::{guest, need_kvm, procfs};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;

/// A machine whose guest does as `append` says.
fn machine(directory: tempfile::TempDir, append: &str, more: &str) -> Machine {
    let arguments = format!("-m 64 -kernel {} {more}", guest::image().display());
    Machine::start_with(directory, &arguments, &["-append", append])
}

fn spinning(more: &str) -> Machine {
    machine(tempfile::tempdir().unwrap(), "test=spin", more)
}

#[track_caller]
fn finished(mut machine: Machine) -> String {
    let status = machine.wait();
    let serial = machine.serial();
    let state = format!("the guest said:\n{serial}\nlog: {}", machine.log());
    assert_eq!(guest::value(&serial, "done", "failures"), Some("0"), "{state}");
    assert_eq!(status.code(), Some(0), "{state}");
    serial
}

fn bytes(serial: &str) -> Vec<u8> {
    let hex = guest::value(serial, "rng-fill", "hex").unwrap_or_else(|| panic!("{serial}"));
    (0..hex.len() / 2)
        .map(|place| u8::from_str_radix(&hex[2 * place..2 * place + 2], 16).unwrap())
        .collect()
}

fn number(serial: &str, key: &str) -> u64 {
    guest::value(serial, "rng-fill", key).unwrap().parse().unwrap()
}

/// Both engines: a disk beside it says which.
fn engines() -> [(&'static str, tempfile::TempDir); 2] {
    ["io_uring", "threads"].map(|engine| {
        let directory = tempfile::tempdir().unwrap();
        let disk = std::fs::File::create(directory.path().join("disk")).unwrap();
        disk.set_len(16 << 20).unwrap();
        (engine, directory)
    })
}

#[test]
fn random_numbers_reach_the_guest_from_every_kind_of_source() {
    need_kvm!();
    for rng in [
        "-device virtio-rng-pci",
        "-object rng-builtin,id=r -device virtio-rng-pci,rng=r",
        "-object rng-random,id=r -device virtio-rng,rng=r,id=d,addr=1f",
    ] {
        let directory = tempfile::tempdir().unwrap();
        let serial = finished(machine(
            directory,
            "test=rng test=rng-fill bytes=100000 buffer=4096",
            rng,
        ));
        let bytes = bytes(&serial);
        assert_eq!(bytes.len(), 64);
        // 64 equal bytes, or none but zeroes, do not come by chance.
        assert!(bytes.iter().any(|byte| *byte != bytes[0]), "{serial}");
        assert_eq!(number(&serial, "bytes"), 100_000);
    }
    // A hardware source, where this host has one that gives anything.
    match std::fs::File::open("/dev/hwrng").and_then(|mut file| std::io::Read::read_exact(&mut file, &mut [0; 16])) {
        Ok(()) => {
            let rng = "-object rng-random,id=r,filename=/dev/hwrng -device virtio-rng-pci,rng=r";
            finished(machine(tempfile::tempdir().unwrap(), "test=rng", rng));
        }
        Err(error) => println!("not tested: /dev/hwrng: {error}"),
    }
}

#[test]
fn the_guest_gets_exactly_what_its_file_or_fifo_holds() {
    need_kvm!();
    let content: Vec<u8> = (0..64).map(|place| place * 3 + 7).collect();
    for (engine, directory) in engines() {
        let file = directory.path().join("numbers");
        std::fs::write(&file, &content).unwrap();
        let more = format!(
            "-drive file={{dir}}/disk,if=virtio,format=raw,aio={engine} \
             -object rng-random,id=r,filename={} -device virtio-rng-pci,rng=r",
            file.display()
        );
        // Buffers of 10 bytes cross what one read brings.
        let serial = finished(machine(directory, "test=rng-fill bytes=64 buffer=10", &more));
        assert_eq!(bytes(&serial), content, "{engine}");
    }
    for (engine, directory) in engines() {
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let more = format!(
            "-drive file={{dir}}/disk,if=virtio,format=raw,aio={engine} \
             -object rng-random,id=r,filename={} -device virtio-rng-pci,rng=r",
            fifo.display()
        );
        let mut machine = machine(directory, "test=blk test=rng-fill bytes=64 buffer=64 test=blk", &more);
        // The machine holds the reading end, so this does not wait for ever.
        let mut writer = std::fs::File::options().write(true).open(&fifo).unwrap();
        machine.wait_for_serial("ok blk");
        // A source that has nothing yet holds up neither the monitor nor a pause.
        let mut qmp = machine.qmp();
        qmp.run("stop");
        qmp.run("cont");
        for part in content.chunks(16) {
            writer.write_all(part).unwrap();
        }
        let serial = finished(machine);
        assert_eq!(bytes(&serial), content, "{engine}");
    }
}

#[test]
fn a_source_that_has_ended_is_reported_and_the_machine_goes_on() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("numbers");
    std::fs::write(&file, [1; 40]).unwrap();
    let more = format!(
        "-object rng-random,id=r,filename={} -device virtio-rng-pci,rng=r,id=short",
        file.display()
    );
    let mut machine = machine(directory, "test=rng-fill bytes=64 buffer=64", &more);
    wait_until("the end is reported", || {
        machine
            .log()
            .contains("short: the source of random bytes has none: it is at its end")
    });
    // More of it comes: it is asked again.
    let mut more = std::fs::File::options().append(true).open(&file).unwrap();
    more.write_all(&[2; 24]).unwrap();
    machine.wait_for_serial("done");
    let bytes = bytes(&machine.serial());
    assert_eq!((&bytes[..40], &bytes[40..]), (&[1; 40][..], &[2; 24][..]));
}

#[test]
fn the_guest_gets_no_more_than_its_limit() {
    need_kvm!();
    let limited = "-device virtio-rng-pci,max-bytes=16,period=200";
    let serial = finished(machine(
        tempfile::tempdir().unwrap(),
        "test=rng-fill bytes=64 buffer=64",
        limited,
    ));
    // Four periods, of which the first gives at once; the guest's clock is not the host's.
    assert!(number(&serial, "ms") >= 500, "{serial}");
    assert!(number(&serial, "answers") >= 4, "{serial}");
}

#[test]
fn a_driver_that_breaks_the_rules_of_virtio_rng_only_breaks_its_device() {
    need_kvm!();
    for (engine, directory) in engines() {
        let more = format!("-drive file={{dir}}/disk,if=virtio,format=raw,aio={engine} -device virtio-rng-pci,id=rng");
        let serial = finished(machine(directory, "test=rng-evil test=rng test=blk", &more));
        assert!(guest::report(&serial).contains(&"rng-evil cases=5"), "{serial}");
    }
}

#[test]
fn a_reset_while_a_read_is_under_way_leaves_the_device_usable() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let more = format!(
        "-object rng-random,id=r,filename={} -device virtio-rng-pci,rng=r",
        fifo.display()
    );
    let mut machine = machine(directory, "test=hello test=rng-fill bytes=32 buffer=32", &more);
    let mut writer = std::fs::File::options().write(true).open(&fifo).unwrap();
    machine.wait_for_serial("ok hello");
    let mut qmp = machine.qmp();
    for _ in 0..3 {
        qmp.run("system_reset");
        qmp.wait_event("RESET");
    }
    writer.write_all(&[9; 32]).unwrap();
    let serial = finished(machine);
    assert_eq!(bytes(&serial), [9; 32]);
}

#[test]
fn a_disk_is_served_by_the_thread_of_its_iothread() {
    need_kvm!();
    for (engine, directory) in engines() {
        let more = format!(
            "-smp 2 -object iothread,id=io0,poll-max-ns=1000000 -drive file={{dir}}/disk,if=none,format=raw,id=d,aio={engine} \
             -device virtio-blk-pci,drive=d,id=disk,iothread=io0,num-queues=2,queue-size=64"
        );
        let mut machine = machine(
            directory,
            "test=blk test=blk-verify mib=8 seed=3 queues=2 test=spin",
            &more,
        );
        let mut qmp = machine.qmp();
        let threads = qmp.run("query-iothreads");
        let thread = threads[0]["thread-id"].as_i64().unwrap();
        machine.wait_for_serial("spin 0");
        let serial = machine.serial();
        assert!(guest::report(&serial).contains(&"ok blk-verify"), "{serial}");
        // It ran for the guest, and the main thread did not.
        let block_proc = machine.helper("block-proc");
        let turns = |thread: i64| {
            let status = std::fs::read_to_string(format!("/proc/{block_proc}/task/{thread}/status")).unwrap();
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            line.unwrap().trim().parse::<u64>().unwrap()
        };
        let main = threads_named(block_proc, "block-io")[0];
        assert!(
            turns(thread) > 5 * (turns(main) + 1) || turns(thread) > 500,
            "{engine}: iothread {}, main {}",
            turns(thread),
            turns(main)
        );
        assert!(
            turns(main) < 50,
            "{engine}: the main thread served, too: {}",
            turns(main)
        );
        // Pausing and going on concerns every thread.
        qmp.run("stop");
        qmp.run("cont");
        let error = qmp.try_execute("object-del", json!({"id": "io0"})).unwrap_err();
        assert_eq!(error["desc"], json!("object 'io0' is in use, can not be deleted"));
        assert_eq!(
            qmp.execute("qom-get", json!({"path": "disk", "property": "queue-size"})),
            json!(64)
        );
        qmp.run("quit");
        assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
    }
}

fn threads_named(pid: i32, name: &str) -> Vec<i64> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let ids = threads.filter_map(|thread| thread.unwrap().file_name().to_str()?.parse().ok());
    ids.filter(|id: &i64| {
        std::fs::read_to_string(format!("/proc/{pid}/task/{id}/comm")).is_ok_and(|comm| comm.trim_end() == name)
    })
    .collect()
}

#[test]
fn object_add_takes_both_forms_and_refuses_as_qemu_does() {
    need_kvm!();
    let mut machine = spinning("");
    let mut qmp = machine.qmp();
    let add = json!({"qom-type": "rng-random", "id": "rng1", "props": {"filename": "/dev/urandom"}});
    assert_eq!(qmp.execute("object-add", add), json!({}));
    let flat = json!({"qom-type": "rng-random", "id": "rng0", "filename": "/dev/urandom"});
    assert_eq!(qmp.execute("object-add", flat.clone()), json!({}));
    for (arguments, expected) in [
        (json!({}), "Parameter 'qom-type' is missing"),
        (
            json!({"qom-type": "nope", "id": "x"}),
            "Parameter 'qom-type' does not accept value 'nope'",
        ),
        (
            flat,
            "attempt to add duplicate property 'rng0' to object (type 'container')",
        ),
        (
            json!({"qom-type": "iothread", "id": "1bad"}),
            "Parameter 'id' expects an identifier",
        ),
        (
            json!({"qom-type": "iothread", "id": "io0", "poll-max-ns": -1}),
            "poll-max-ns value must be in range [0, 9223372036854775807]",
        ),
        (
            json!({"qom-type": "rng-random", "id": "r2", "bogus": 1}),
            "Parameter 'bogus' is unexpected",
        ),
        (
            json!({"qom-type": "rng-random", "id": "r2", "filename": "/nope"}),
            "Could not open '/nope': No such file or directory",
        ),
        (
            json!({"qom-type": "rng-random", "id": "r2", "filename": "/"}),
            "Could not open '/': Is a directory",
        ),
        (
            json!({"qom-type": "memory-backend-memfd", "id": "m", "size": 4096}),
            "memory backends are made when the machine starts: use -object memory-backend-memfd",
        ),
        (
            json!({"qom-type": "throttle-group", "id": "t", "limits": {"iops-total-max": 5}}),
            "bps_max/iops_max require corresponding bps/iops values",
        ),
        (
            json!({"qom-type": "secret", "id": "s"}),
            "Either 'file' or 'data' must be provided",
        ),
    ] {
        let error = qmp.try_execute("object-add", arguments).unwrap_err();
        assert_eq!(error["desc"], json!(expected));
        assert_eq!(error["class"], json!("GenericError"));
    }
    // A source that the client has opened.
    let opened = std::fs::File::open("/dev/urandom").unwrap();
    qmp.pass(&[std::os::fd::AsFd::as_fd(&opened)]);
    qmp.execute("add-fd", json!({"fdset-id": 9}));
    let from_set = |set: u32| json!({"qom-type": "rng-random", "id": "set", "filename": format!("/dev/fdset/{set}")});
    qmp.execute("object-add", from_set(9));
    let error = qmp.try_execute("object-add", from_set(8)).unwrap_err();
    assert_eq!(
        error["desc"],
        json!("attempt to add duplicate property 'set' to object (type 'container')")
    );
    for id in ["rng0", "rng1", "set"] {
        assert_eq!(qmp.execute("object-del", json!({"id": id})), json!({}));
    }
    let error = qmp.try_execute("object-add", from_set(8)).unwrap_err();
    assert_eq!(error["desc"], json!("Failed to find fdset /dev/fdset/8"));
    qmp.execute("remove-fd", json!({"fdset-id": 9}));
    let error = qmp.try_execute("object-del", json!({"id": "rng0"})).unwrap_err();
    assert_eq!(
        error,
        json!({"class": "GenericError", "desc": "object 'rng0' not found"})
    );
    let error = qmp.try_execute("object-del", json!({})).unwrap_err();
    assert_eq!(error["desc"], json!("Parameter 'id' is missing"));
    // What a deleted object held open is closed.
    let sources = || {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", machine.pid())).unwrap();
        fds.filter(|fd| {
            let target = std::fs::read_link(fd.as_ref().unwrap().path()).unwrap_or_default();
            target == Path::new("/dev/urandom")
        })
        .count()
    };
    assert_eq!(sources(), 0);
}

#[test]
fn an_iothread_can_be_added_while_there_are_spare_threads() {
    need_kvm!();
    // Without anything that needs block-proc, it comes with the first iothread.
    let mut machine = spinning("-spare-iothreads 1");
    let mut qmp = machine.qmp();
    let add = |id: &str| json!({"qom-type": "iothread", "id": id, "poll-max-ns": 7});
    assert!(machine.helpers().iter().all(|(name, _)| name != "block-proc"));
    qmp.execute("object-add", add("io0"));
    let threads = qmp.run("query-iothreads");
    assert_eq!(
        (&threads[0]["id"], &threads[0]["poll-max-ns"]),
        (&json!("io0"), &json!(7))
    );
    let block_proc = machine.helper("block-proc");
    let thread = threads[0]["thread-id"].as_i64().unwrap();
    assert_eq!(threads_named(block_proc, "iothread-1"), [thread]);
    let error = qmp.try_execute("object-add", add("io1")).unwrap_err();
    assert!(
        error["desc"].as_str().unwrap().starts_with("no I/O thread is free"),
        "{error}"
    );
    qmp.execute("object-del", json!({"id": "io0"}));
    assert_eq!(qmp.run("query-iothreads"), json!([]));
    qmp.execute("object-add", add("io1"));
    assert_eq!(qmp.run("query-iothreads")[0]["thread-id"], json!(thread));
    qmp.run("stop");
    qmp.run("cont");
    qmp.run("quit");
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
}

#[test]
fn guest_memory_can_be_a_memory_backend() {
    need_kvm!();
    let kernel = guest::image();
    let arguments = format!(
        "-kernel {} -append test=spin -object memory-backend-memfd,id=ram,size=96M,prealloc=on \
         -object memory-backend-memfd,id=other,size=1M,share=off -machine q35,memory-backend=ram",
        kernel.display()
    );
    let mut machine = Machine::start(&arguments);
    let mut qmp = machine.qmp();
    assert_eq!(qmp.run("query-memory-size-summary"), json!({"base-memory": 96 << 20}));
    let memory = qmp.run("query-memdev");
    let shown: Vec<_> = memory
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| {
            (
                entry["id"].clone(),
                entry["size"].clone(),
                entry["share"].clone(),
                entry["prealloc"].clone(),
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            (json!("ram"), json!(96 << 20), json!(true), json!(true)),
            (json!("other"), json!(1 << 20), json!(false), json!(false)),
        ]
    );
    machine.wait_for_serial("spin");
    // Filled at once, and used by the guest: the same memfd is mapped in vcpu-proc.
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", machine.helper("vcpu-proc"))).unwrap();
    assert!(maps.contains("memfd:bulkhead-ram"), "{maps}");
    for (id, expected) in [
        ("ram", "object 'ram' is in use, can not be deleted"),
        ("nope", "object 'nope' not found"),
    ] {
        let error = qmp.try_execute("object-del", json!({"id": id})).unwrap_err();
        assert_eq!(error["desc"], json!(expected));
    }
    qmp.execute("object-del", json!({"id": "other"}));
    assert_eq!(qmp.run("query-memdev").as_array().unwrap().len(), 1);
}

#[test]
fn a_secret_is_held_by_the_supervisor_alone_and_shown_nowhere() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    // Written in pieces, so that this test's own text is not found.
    let hidden = ["hush", "-hush-", "4711"].concat();
    std::fs::write(directory.path().join("key"), &hidden).unwrap();
    let mut machine = machine(directory, "test=spin", "-object secret,id=s0,file={dir}/key");
    let mut qmp = machine.qmp();
    qmp.execute(
        "object-add",
        json!({"qom-type": "secret", "id": "s1", "data": "bGV0bWVpbg==", "format": "base64"}),
    );
    for id in ["s0", "s1"] {
        let path = format!("/objects/{id}");
        let listed = qmp.execute("qom-list", json!({"path": path}));
        for property in listed.as_array().unwrap() {
            let value = qmp.try_execute("qom-get", json!({"path": path, "property": property["name"]}));
            let text = format!("{value:?}");
            assert!(
                !text.contains(&hidden) && !text.contains("letmein") && !text.contains("bGV0"),
                "{text}"
            );
        }
        let error = qmp
            .try_execute("qom-get", json!({"path": path, "property": "data"}))
            .unwrap_err();
        assert_eq!(error["desc"], json!("Property 'secret.data' is not readable"));
        let loaded = qmp.execute("qom-get", json!({"path": path, "property": "loaded"}));
        assert_eq!(loaded, json!(true));
    }
    // The sealed supervisor reads a file as well, and none that could make it wait.
    let file = machine.path("key");
    qmp.execute("object-add", json!({"qom-type": "secret", "id": "s3", "file": file}));
    let fifo = machine.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let error = qmp
        .try_execute("object-add", json!({"qom-type": "secret", "id": "s4", "file": fifo}))
        .unwrap_err();
    assert!(
        error["desc"].as_str().unwrap().ends_with("is not a regular file"),
        "{error}"
    );
    let error = qmp
        .try_execute(
            "object-add",
            json!({"qom-type": "secret", "id": "s2", "data": "no base64!", "format": "base64"}),
        )
        .unwrap_err();
    assert_eq!(error["desc"], json!("the secret is not valid base64 data"));
    assert!(!machine.log().contains(&hidden));
    // The launcher, a copy of the supervisor from before, and the helpers do not have what the file held.
    let mut others: Vec<(String, i32)> = machine.helpers();
    others.push(("launcher".to_owned(), machine.launcher()));
    assert!(memory_holds(machine.pid(), hidden.as_bytes()), "the supervisor lost it");
    for (name, pid) in others {
        assert!(!memory_holds(pid, hidden.as_bytes()), "{name} has the secret");
    }
}

/// Whether a process has these bytes in its private writable memory.
fn memory_holds(pid: i32, needle: &[u8]) -> bool {
    use std::os::unix::fs::FileExt;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let Ok(memory) = std::fs::File::open(format!("/proc/{pid}/mem")) else {
        return false;
    };
    maps.lines()
        .filter(|line| line.contains(" rw-p "))
        .filter_map(|line| {
            let (start, end) = line.split_whitespace().next()?.split_once('-')?;
            Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
        })
        .filter(|(start, end)| end - start <= 64 << 20)
        .any(|(start, end)| {
            let mut bytes = vec![0; (end - start) as usize];
            let read = memory.read_at(&mut bytes, start).unwrap_or(0);
            bytes[..read].windows(needle.len()).any(|window| window == needle)
        })
}

#[test]
fn throttle_groups_hold_limits_that_fit_together() {
    need_kvm!();
    let mut machine = spinning("-object throttle-group,id=t0,limits.bps-total=1000,limits.bps-total-max=5000");
    let mut qmp = machine.qmp();
    let get = |qmp: &mut bulkhead_tests::qmp::Qmp, id: &str, name: &str| -> Value {
        qmp.execute("qom-get", json!({"path": format!("/objects/{id}"), "property": name}))
    };
    let limits = get(&mut qmp, "t0", "limits");
    assert_eq!(
        (
            &limits["bps-total"],
            &limits["bps-total-max"],
            &limits["bps-total-max-length"]
        ),
        (&json!(1000), &json!(5000), &json!(1))
    );
    assert_eq!(get(&mut qmp, "t0", "x-bps-total"), json!(1000));
    qmp.execute(
        "object-add",
        json!({"qom-type": "throttle-group", "id": "t1", "limits": {"iops-read": 5}}),
    );
    let set = json!({"path": "/objects/t1", "property": "limits", "value": {"iops-read": 7, "iops-write": 9}});
    assert_eq!(qmp.execute("qom-set", set), json!({}));
    assert_eq!(get(&mut qmp, "t1", "limits")["iops-read"], json!(7));
    let wrong = json!({"path": "/objects/t1", "property": "limits", "value": {"iops-total": 7}});
    let error = qmp.try_execute("qom-set", wrong).unwrap_err();
    assert!(
        error["desc"]
            .as_str()
            .unwrap()
            .contains("cannot be used at the same time"),
        "{error}"
    );
    assert_eq!(get(&mut qmp, "t1", "limits")["iops-total"], json!(0));
    qmp.execute("object-del", json!({"id": "t1"}));
}

#[test]
fn a_drive_without_a_device_is_open_and_locked() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk"), [0; 512]).unwrap();
    let drive = "if=none,format=raw,id=d,file";
    let mut machine = machine(directory, "test=spin", &format!("-drive {drive}={{dir}}/disk"));
    machine.qmp();
    let kernel = guest::image();
    let other = format!("{drive}={}", machine.path("disk").display());
    let arguments = ["-kernel", kernel.to_str().unwrap(), "-nodefaults", "-drive", &other];
    let text = refused(machine.directory.path(), &arguments);
    assert!(text.contains("in use"), "{text}");
}

#[test]
fn objects_change_while_a_dump_waits_for_its_reader() {
    need_kvm!();
    let mut machine = spinning("-object iothread,id=io0");
    let fifo = machine.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Holds the FIFO open, reads nothing.
    let _reader = std::fs::File::options().read(true).write(true).open(&fifo).unwrap();
    let mut qmp = machine.qmp();
    let protocol = format!("file:{}", fifo.display());
    qmp.execute(
        "dump-guest-memory",
        json!({"paging": false, "protocol": protocol, "detach": true}),
    );
    assert_eq!(qmp.run("query-dump")["status"], json!("active"));
    qmp.execute("object-add", json!({"qom-type": "iothread", "id": "io1"}));
    let set = json!({"path": "/objects/io0", "property": "poll-max-ns", "value": 1});
    qmp.execute("qom-set", set);
    qmp.execute("object-del", json!({"id": "io1"}));
    assert_eq!(qmp.run("query-dump")["status"], json!("active"));
    qmp.run("quit");
    assert_eq!(machine.wait().code(), Some(0), "{}", machine.log());
}

#[test]
fn what_cannot_be_made_is_refused_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = guest::image();
    let kernel = kernel.to_str().unwrap();
    for (arguments, expected) in [
        (
            &["-object", "rng-random,id=r,filename=/nope"][..],
            "-object id=r: Could not open '/nope': No such file or directory",
        ),
        (
            &["-object", "secret,id=s,file=/nope"],
            "-object id=s: Unable to read /nope",
        ),
        (&["-object", "secret,id=s,file=/dev/zero"], "is not a regular file"),
        (
            &["-device", "virtio-nope-pci"],
            "'virtio-nope-pci' is not a valid device model name",
        ),
    ] {
        let mut all = vec!["-kernel", kernel, "-nodefaults"];
        all.extend(arguments);
        let text = refused(directory.path(), &all);
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn block_proc_serves_random_numbers_within_its_policy() {
    need_kvm!();
    let mut machine = machine(
        tempfile::tempdir().unwrap(),
        "test=rng-fill bytes=5000 buffer=100 test=spin",
        "-device virtio-rng-pci,max-bytes=4000,period=10 -object iothread,id=io0",
    );
    machine.wait_for_serial("spin 0");
    let block_proc = machine.helper("block-proc");
    let status = procfs::children(machine.launcher());
    assert!(status.contains(&block_proc));
    assert!(!machine.log().contains("policy violation"), "{}", machine.log());
    let mut qmp = machine.qmp();
    assert_eq!(qmp.run("query-status")["status"], json!("running"));
}
