//! The qapi crate against a whole machine. Its types are generated from QEMU's own schema: a member that is missing, has
//! another type or an unknown word is an error of the decoder. Every query, every other command and every event goes
//! through it.

use bulkhead_tests::images::damaged;
use bulkhead_tests::machine::{Machine, PATIENCE};
use bulkhead_tests::{guest, need_kvm};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use qapi::{Command, Stream, qmp};
use std::collections::BTreeSet;
use std::io::{BufReader, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The crate's type of its reply demands a member that only servers for s390x have; the schema test reads the reply.
const OTHER_TARGETS: &str = "query-cpu-model-expansion";
/// Also lists formats that QEMU does not write (kdump-zstd), which its types have no word for.
const HAS_EXTENSIONS: &str = "query-dump-guest-memory-capability";

/// A negotiated client, and the names of the events that it has decoded.
struct Client {
    qmp: qapi::Qmp<Stream<BufReader<UnixStream>, UnixStream>>,
    seen: BTreeSet<String>,
}

impl Client {
    fn new(machine: &mut Machine) -> Self {
        machine.qmp();
        let stream = UnixStream::connect(machine.path("qmp")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        let mut qmp = qapi::Qmp::new(Stream::new(reader, stream));
        let greeting = qmp.handshake().unwrap();
        assert_eq!(greeting.version.qemu.major, 10);
        Self {
            qmp,
            seen: BTreeSet::new(),
        }
    }

    #[track_caller]
    fn run<C: Command>(&mut self, command: &C) -> C::Ok {
        let result = self.qmp.execute(command);
        for event in self.qmp.events() {
            let event = serde_json::to_value(&event).unwrap();
            self.seen.insert(event["event"].as_str().unwrap().to_owned());
        }
        result.unwrap_or_else(|error| panic!("{}: {error}", C::NAME))
    }

    /// Runs a command that takes a file descriptor.
    fn run_with_fd<C: Command>(&mut self, command: &C) -> C::Ok {
        let null = std::fs::File::open("/dev/null").unwrap();
        let fds = [null.as_raw_fd()];
        let socket = self.qmp.inner().get_ref_write().as_raw_fd();
        let control = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(socket, &[IoSlice::new(b" ")], &control, MsgFlags::empty(), None).unwrap();
        self.run(command)
    }

    /// Waits until an event has been decoded.
    fn wait(&mut self, event: &str) {
        let begun = Instant::now();
        while !self.seen.contains(event) {
            assert!(begun.elapsed() < PATIENCE, "no {event}");
            std::thread::sleep(Duration::from_millis(2));
            self.run(&qmp::query_status {});
        }
    }

    fn commands(&mut self) -> BTreeSet<String> {
        self.run(&qmp::query_commands {})
            .into_iter()
            .map(|entry| entry.name)
            .collect()
    }
}

type Query = (&'static str, fn(&mut Client));

/// The queries that the crate knows and a server may have, each with a function that runs it.
macro_rules! queries {
    ($($name:ident { $($arguments:tt)* }),* $(,)?) => {{
        let list: Vec<Query> = vec![$((qmp::$name::NAME, |client| {
            client.run(&qmp::$name { $($arguments)* });
        })),*];
        list
    }};
}

fn queries() -> Vec<Query> {
    queries! {
        query_version {}, query_commands {}, query_qmp_schema {}, query_status {}, query_name {}, query_kvm {},
        query_cpus_fast {}, query_uuid {}, query_target {}, query_machines { compat_props: None },
        query_current_machine {}, query_iothreads {}, query_hotpluggable_cpus {}, query_cpu_definitions {},
        query_memory_size_summary {}, query_memdev {}, query_command_line_options { option: None }, query_dump {},
        query_fdsets {}, query_chardev {}, query_chardev_backends {},
        query_block {}, query_named_block_nodes { flat: None }, query_blockstats { query_nodes: None }, query_block_jobs {}, query_jobs {}, query_block_exports {}, query_migrate {}, query_pci {}, query_memory_devices {},
    }
}

fn machine(append: &str, more: &str) -> Machine {
    let directory = tempfile::tempdir().unwrap();
    std::fs::File::create(directory.path().join("disk"))
        .and_then(|file| file.set_len(1 << 20))
        .unwrap();
    let arguments = format!(
        "-m 64 -smp 2 -kernel {} -drive file={{dir}}/disk,if=virtio,format=raw {more}",
        guest::image().display()
    );
    Machine::start_with(directory, &arguments, &["-append", append])
}

#[test]
fn every_query_decodes_into_qemus_types() {
    need_kvm!();
    let mut machine = machine("test=spin", "");
    let mut client = Client::new(&mut machine);
    client.run_with_fd(&qmp::add_fd {
        fdset_id: Some(3),
        opaque: Some("null".to_owned()),
    });
    let commands = client.commands();
    let queries = queries();
    let known: BTreeSet<_> = queries.iter().map(|(name, _)| *name).collect();
    let supported = commands
        .iter()
        .filter(|name| name.starts_with("query-") && *name != OTHER_TARGETS && *name != HAS_EXTENSIONS);
    for name in supported.clone() {
        assert!(known.contains(name.as_str()), "{name} is not in this test's list");
    }
    let mut run = 0;
    for (name, query) in queries {
        if commands.contains(name) {
            query(&mut client);
            run += 1;
        }
    }
    assert_eq!(run, supported.count());
    println!("{run} queries decoded");
}

/// The events about a disk of which a part cannot be read, while a guest uses it, and of a job.
fn events_of_a_disk() -> BTreeSet<String> {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    damaged(&at("disk"), &at("raw"), 16 << 20);
    let arguments = format!(
        "-m 256 -S -kernel {} -drive file={{dir}}/disk,if=virtio,format=qcow2,node-name=n",
        guest::image().display()
    );
    let mut machine = Machine::start_with(directory, &arguments, &["-append", "test=blk test=spin"]);
    let mut client = Client::new(&mut machine);
    client.run(&qmp::block_set_write_threshold {
        node_name: "n".to_owned(),
        write_threshold: 1,
    });
    client.run(&qmp::cont {});
    client.wait("BLOCK_IO_ERROR");
    client.wait("BLOCK_WRITE_THRESHOLD");
    let file = qmp::BlockdevCreateOptionsFile {
        extent_size_hint: None,
        filename: machine.path("new").display().to_string(),
        nocow: None,
        preallocation: None,
        size: 0,
    };
    client.run(&qmp::blockdev_create {
        job_id: "j".to_owned(),
        options: qmp::BlockdevCreateOptions::file(file),
    });
    client.wait("JOB_STATUS_CHANGE");
    let address = serde_json::json!({"type": "unix", "data": {"path": machine.path("s")}});
    let start: qmp::nbd_server_start = serde_json::from_value(serde_json::json!({"addr": address})).unwrap();
    client.run(&start);
    let add = serde_json::json!({"type": "nbd", "id": "e", "node-name": "n"});
    let add: qmp::block_export_add = serde_json::from_value(add).unwrap();
    client.run(&add);
    client.run(&qmp::nbd_server_stop {});
    client.wait("BLOCK_EXPORT_DELETED");
    client.seen
}

/// A command whose arguments are written as a client writes them.
fn ask<C: Command + serde::de::DeserializeOwned>(arguments: serde_json::Value) -> C {
    serde_json::from_value(arguments).expect("QEMU's arguments")
}

/// The events about jobs and about devices that come and go.
fn events_of_jobs() -> BTreeSet<String> {
    let directory = tempfile::tempdir().unwrap();
    let options = "-accel qtest -drive if=ide,media=cdrom,id=cd -drive if=none,id=d,driver=null-co -device virtio-scsi,id=hba \
                   -device scsi-hd,drive=d,id=disk0,bus=hba.0";
    let mut machine = Machine::start_without_serial(directory, options, &[]);
    let mut client = Client::new(&mut machine);
    for name in ["source", "target"] {
        client.run(&ask::<qmp::blockdev_add>(
            serde_json::json!({"driver": "null-co", "node-name": name, "read-zeroes": true}),
        ));
    }
    let mirror = serde_json::json!({"job-id": "j", "device": "source", "target": "target", "sync": "none",
                                    "auto-finalize": false});
    client.run(&ask::<qmp::blockdev_mirror>(mirror));
    client.wait("BLOCK_JOB_READY");
    client.run(&ask::<qmp::block_job_complete>(serde_json::json!({"device": "j"})));
    client.wait("BLOCK_JOB_PENDING");
    client.run(&ask::<qmp::block_job_finalize>(serde_json::json!({"id": "j"})));
    client.wait("BLOCK_JOB_COMPLETED");
    let failing = serde_json::json!({"driver": "blkdebug", "node-name": "failing", "inject-error": [{"event": "none"}],
                                     "image": {"driver": "null-co"}});
    client.run(&ask::<qmp::blockdev_add>(failing));
    let commit = serde_json::json!({"job-id": "k", "device": "failing", "target": "source", "sync": "full",
                                    "on-source-error": "stop"});
    client.run(&ask::<qmp::blockdev_backup>(commit));
    client.wait("BLOCK_JOB_ERROR");
    client.run(&ask::<qmp::block_job_cancel>(
        serde_json::json!({"device": "k", "force": true}),
    ));
    client.wait("BLOCK_JOB_CANCELLED");
    client.run(&ask::<qmp::eject>(serde_json::json!({"device": "cd"})));
    client.wait("DEVICE_TRAY_MOVED");
    client.run(&ask::<qmp::device_del>(serde_json::json!({"id": "disk0"})));
    client.wait("DEVICE_DELETED");
    client.seen
}

#[test]
fn every_event_decodes_into_qemus_types() {
    need_kvm!();
    let mut seen = BTreeSet::new();
    let mut machine = machine(
        "test=panic test=panic event=2 test=rtc-set test=spin",
        "-S -action panic=none",
    );
    let mut client = Client::new(&mut machine);
    client.run(&qmp::cont {});
    client.wait("RESUME");
    client.wait("GUEST_PANICKED");
    client.wait("GUEST_CRASHLOADED");
    client.wait("RTC_CHANGE");
    client.run(&qmp::stop {});
    client.wait("STOP");
    client.run(&qmp::dump_guest_memory {
        begin: Some(0),
        detach: Some(true),
        format: Some(qmp::DumpGuestMemoryFormat::elf),
        length: Some(4096),
        paging: false,
        protocol: format!("file:{}", machine.path("d").display()),
    });
    client.wait("DUMP_COMPLETED");
    client.run(&qmp::system_powerdown {});
    client.wait("POWERDOWN");
    client.run(&qmp::set_action {
        panic: Some(qmp::PanicAction::pause),
        reboot: Some(qmp::RebootAction::reset),
        shutdown: Some(qmp::ShutdownAction::poweroff),
        watchdog: None,
    });
    client.run(&qmp::system_reset {});
    client.wait("RESET");
    client.run(&qmp::inject_nmi {});
    client.run_with_fd(&qmp::getfd { fdname: "f".to_owned() });
    client.run(&qmp::closefd { fdname: "f".to_owned() });
    let added = client.run_with_fd(&qmp::add_fd {
        fdset_id: None,
        opaque: None,
    });
    client.run(&qmp::remove_fd {
        fd: Some(added.fd),
        fdset_id: added.fdset_id,
    });
    client.run(&qmp::quit {});
    seen.append(&mut client.seen);
    seen.append(&mut events_of_a_disk());
    seen.append(&mut events_of_jobs());
    // What is left on the connection comes before its end.
    while client.qmp.execute(&qmp::query_status {}).is_ok() {}
    seen.extend(client.qmp.events().map(|event| {
        serde_json::to_value(&event).unwrap()["event"]
            .as_str()
            .unwrap()
            .to_owned()
    }));
    assert_eq!(machine.wait().code(), Some(0));
    for event in qmp_proc::schema::events::EVENTS {
        println!("{}: {}", event.name, seen.contains(event.name));
        // QEMU's types have none of ours.
        if event.name.starts_with("BULKHEAD_") {
            continue;
        }
        assert!(seen.contains(event.name), "{} was not seen", event.name);
    }
}
