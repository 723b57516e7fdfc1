//! The object tree over the whole machine: every path, every property, and what clients may change.

use bulkhead_tests::machine::Machine;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};

/// A machine with one of everything.
fn machine() -> Machine {
    let directory = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        let disk = std::fs::File::create(directory.path().join(name)).unwrap();
        disk.set_len(1 << 20).unwrap();
    }
    let arguments = format!(
        "-m 64 -smp 2 -kernel {} -append test=spin -drive file={{dir}}/a,if=virtio,format=raw,id=plain \
         -drive file={{dir}}/b,if=none,format=raw,id=d0 -object iothread,id=io0 \
         -device virtio-blk-pci,drive=d0,id=disk0,iothread=io0,serial=S1,bootindex=3,addr=7 -object rng-builtin,id=r0 \
         -device virtio-rng-pci,rng=r0,max-bytes=1000,period=50,id=rng0 -object rng-random,id=r1 \
         -object secret,id=s0,data=x -object throttle-group,id=t0 -object memory-backend-memfd,id=m0,size=1M",
        guest::image().display()
    );
    Machine::start_in(directory, &arguments)
}

fn list(qmp: &mut Qmp, path: &str) -> Vec<(String, String)> {
    let listed = qmp.execute("qom-list", json!({"path": path}));
    let entries = listed.as_array().unwrap().iter();
    entries
        .map(|entry| {
            let text = |key: &str| entry[key].as_str().unwrap().to_owned();
            (text("name"), text("type"))
        })
        .collect()
}

fn get(qmp: &mut Qmp, path: &str, property: &str) -> Value {
    qmp.execute("qom-get", json!({"path": path, "property": property}))
}

fn error(qmp: &mut Qmp, command: &str, arguments: Value) -> (String, String) {
    let error = qmp.try_execute(command, arguments).unwrap_err();
    (
        error["class"].as_str().unwrap().to_owned(),
        error["desc"].as_str().unwrap().to_owned(),
    )
}

/// Goes through all that there is below a path; returns how many objects and properties that was.
fn walk(qmp: &mut Qmp, path: &str, ty: &str) -> (usize, usize) {
    let entries = list(qmp, path);
    assert_eq!(entries[0], ("type".to_owned(), "string".to_owned()), "{path}");
    assert_eq!(get(qmp, path, "type"), json!(ty), "{path}");
    // The type is known and tells the same properties, children and live values aside.
    let known = qmp.execute("qom-list-properties", json!({"typename": ty}));
    let known: Vec<_> = known
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| {
            (
                entry["name"].as_str().unwrap().to_owned(),
                entry["type"].as_str().unwrap().to_owned(),
            )
        })
        .collect();
    for entry in &known {
        assert!(entries.contains(entry), "{path} has no {entry:?}");
    }
    let (mut objects, mut properties) = (1, 0);
    for (name, entry_type) in entries {
        properties += 1;
        let value = qmp.try_execute("qom-get", json!({"path": path, "property": name}));
        if ty == "secret" && name == "data" {
            assert_eq!(
                value.unwrap_err()["desc"],
                json!("Property 'secret.data' is not readable")
            );
            continue;
        }
        let value = value.unwrap_or_else(|error| panic!("{path}.{name}: {error}"));
        match &*entry_type {
            "bool" => assert!(value.is_boolean(), "{path}.{name} = {value}"),
            "int" | "int32" | "uint16" | "uint32" | "uint64" => assert!(value.is_i64(), "{path}.{name} = {value}"),
            "ThrottleLimits" => assert!(value.is_object(), "{path}.{name} = {value}"),
            link if link.starts_with("link<") => {
                // A link leads to an object, or nowhere.
                let target = value.as_str().unwrap().to_owned();
                assert!(target.is_empty() || !list(qmp, &target).is_empty(), "{path}.{name}");
            }
            child if child.starts_with("child<") => {
                let below = format!("{}/{name}", path.trim_end_matches('/'));
                assert_eq!(value, json!(below));
                let ty = &child["child<".len()..child.len() - 1];
                let (more_objects, more_properties) = walk(qmp, &below, ty);
                objects += more_objects;
                properties += more_properties;
            }
            _ => assert!(value.is_string(), "{path}.{name} = {value}"),
        }
    }
    (objects, properties)
}

#[test]
fn every_object_of_the_tree_is_listed_and_every_property_read_or_refused() {
    need_kvm!();
    let mut machine = machine();
    let mut qmp = machine.qmp();
    let (objects, properties) = walk(&mut qmp, "/", "container");
    // Root, machine, 3 containers below it, 2 CPUs, 3 devices of 3 objects, /objects and 6 objects.
    assert_eq!(objects, 1 + 1 + 3 + 2 + 3 * 3 + 1 + 6);
    assert!(properties > 100, "{properties}");
}

#[test]
fn properties_tell_what_the_machine_is() {
    need_kvm!();
    let mut machine = machine();
    let mut qmp = machine.qmp();
    for (path, property, expected) in [
        ("/machine/peripheral/disk0", "drive", json!("d0")),
        ("/machine/peripheral/disk0", "addr", json!(7 << 3)),
        ("/machine/peripheral/disk0", "serial", json!("S1")),
        ("/machine/peripheral/disk0", "num-queues", json!(2)),
        ("/machine/peripheral/disk0", "bootindex", json!(3)),
        (
            "/machine/peripheral/disk0/virtio-backend",
            "iothread",
            json!("/objects/io0"),
        ),
        ("/machine/peripheral/rng0", "rng", json!("/objects/r0")),
        ("/machine/peripheral/rng0/virtio-backend", "period", json!(50)),
        ("/machine/peripheral/rng0", "max-bytes", json!(1000)),
        ("/machine/peripheral-anon/device[0]", "drive", json!("plain")),
        ("/machine/unattached/device[1]", "core-id", json!(1)),
        ("/machine", "append", json!("test=spin")),
        ("/machine", "peripheral", json!("/machine/peripheral")),
        ("/objects/r1", "filename", json!("/dev/urandom")),
        ("/objects/m0", "size", json!(1 << 20)),
        // By the end of a path, and over a link.
        ("disk0", "type", json!("virtio-blk-pci")),
        ("peripheral/rng0/rng", "type", json!("rng-builtin")),
        ("/machine/peripheral/disk0/iothread", "type", json!("iothread")),
    ] {
        assert_eq!(get(&mut qmp, path, property), expected, "{path}.{property}");
    }
    // The same CPU by another command; the same thread by another.
    let cpus = qmp.run("query-cpus-fast");
    let path = cpus[1]["qom-path"].as_str().unwrap();
    assert_eq!(get(&mut qmp, path, "core-id"), cpus[1]["props"]["core-id"]);
    let threads = qmp.run("query-iothreads");
    assert_eq!(get(&mut qmp, "/objects/io0", "thread-id"), threads[0]["thread-id"]);
}

#[test]
fn faults_have_the_classes_and_texts_of_a_live_server() {
    need_kvm!();
    let mut machine = machine();
    let mut qmp = machine.qmp();
    let generic = "GenericError";
    let set = |path: &str, property: &str, value: Value| json!({"path": path, "property": property, "value": value});
    for (command, arguments, class, desc) in [
        (
            "qom-list",
            json!({"path": "/nope"}),
            "DeviceNotFound",
            "Device '/nope' not found",
        ),
        (
            "qom-list",
            json!({"path": "device[0]"}),
            generic,
            "Path 'device[0]' is ambiguous",
        ),
        ("qom-list", json!({"path": ""}), generic, "Path '' is ambiguous"),
        (
            "qom-get",
            json!({"path": "device[0]", "property": "type"}),
            "DeviceNotFound",
            "Device 'device[0]' not found",
        ),
        (
            "qom-get",
            json!({"path": "/objects/io0", "property": "nope"}),
            generic,
            "Property 'iothread.nope' not found",
        ),
        (
            "qom-set",
            set("/objects/io0", "nope", json!(1)),
            generic,
            "Property 'iothread.nope' not found",
        ),
        (
            "qom-set",
            set("/objects/io0", "type", json!("x")),
            generic,
            "Property 'iothread.type' is not writable",
        ),
        (
            "qom-set",
            set("/objects/io0", "poll-max-ns", json!("x")),
            generic,
            "Invalid parameter type for 'poll-max-ns', expected: integer",
        ),
        (
            "qom-set",
            set("/objects/io0", "poll-max-ns", json!(-1)),
            generic,
            "poll-max-ns value must be in range [0, 9223372036854775807]",
        ),
        (
            "qom-set",
            set("/machine/peripheral/disk0", "num-queues", json!(2)),
            generic,
            "Attempt to set property 'num-queues' on device 'disk0' (type 'virtio-blk-pci') after it was realized",
        ),
        (
            "qom-set",
            set("/objects/r1", "filename", json!("x")),
            generic,
            "Property 'filename' can no longer be set",
        ),
        (
            "qom-set",
            set("/objects/t0", "limits", json!({"iops-zotal": 5})),
            generic,
            "Parameter 'limits.iops-zotal' is unexpected",
        ),
        (
            "qom-set",
            set("/objects/t0", "x-iops-total", json!(77)),
            generic,
            "Property cannot be set after initialization",
        ),
        (
            "qom-set",
            set("/machine", "append", json!("x")),
            generic,
            "Property 'bulkhead-machine.append' is not writable",
        ),
        (
            "qom-list-properties",
            json!({"typename": "nope"}),
            "DeviceNotFound",
            "Class 'nope' not found",
        ),
        (
            "device-list-properties",
            json!({"typename": "nope"}),
            "DeviceNotFound",
            "Device 'nope' not found",
        ),
        (
            "device-list-properties",
            json!({"typename": "iothread"}),
            generic,
            "Parameter 'typename' expects a non-abstract device type",
        ),
        (
            "device-list-properties",
            json!({"typename": "virtio-device"}),
            generic,
            "Parameter 'typename' expects a non-abstract device type",
        ),
    ] {
        let found = error(&mut qmp, command, arguments.clone());
        assert_eq!(found, (class.to_owned(), desc.to_owned()), "{command} {arguments}");
    }
}

#[test]
fn what_is_set_is_read_back_and_used() {
    need_kvm!();
    let mut machine = machine();
    let mut qmp = machine.qmp();
    for (name, value) in [
        ("poll-max-ns", 123_456),
        ("poll-grow", 3),
        ("poll-shrink", 4),
        ("aio-max-batch", 5),
    ] {
        let arguments = json!({"path": "/objects/io0", "property": name, "value": value});
        assert_eq!(qmp.execute("qom-set", arguments), json!({}));
        assert_eq!(get(&mut qmp, "/objects/io0", name), json!(value));
        assert_eq!(qmp.run("query-iothreads")[0][name], json!(value));
    }
    // An object that comes and goes.
    qmp.execute("object-add", json!({"qom-type": "rng-builtin", "id": "late"}));
    assert!(list(&mut qmp, "/objects").contains(&("late".to_owned(), "child<rng-builtin>".to_owned())));
    qmp.execute("object-del", json!({"id": "late"}));
    assert!(list(&mut qmp, "/objects").iter().all(|(name, _)| name != "late"));
}

#[test]
fn types_are_listed_by_what_they_implement() {
    need_kvm!();
    let mut machine = machine();
    let mut qmp = machine.qmp();
    let mut names = |arguments: Value| {
        let types = qmp.execute("qom-list-types", arguments);
        let mut names: Vec<_> = types
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| entry["name"].as_str().unwrap().to_owned())
            .collect();
        names.sort_unstable();
        names
    };
    assert_eq!(
        names(json!({"implements": "rng-backend"})),
        ["rng-builtin", "rng-random"]
    );
    assert_eq!(
        names(json!({"implements": "rng-backend", "abstract": true})),
        ["rng-backend", "rng-builtin", "rng-random"]
    );
    assert_eq!(names(json!({"implements": "nope"})), [""; 0]);
    let creatable = names(json!({"implements": "user-creatable"}));
    assert_eq!(
        creatable,
        [
            "iothread",
            "memory-backend-memfd",
            "rng-builtin",
            "rng-random",
            "secret",
            "throttle-group"
        ]
    );
    let devices = names(json!({"implements": "pci-device"}));
    assert_eq!(devices, ["virtio-blk-pci", "virtio-rng-pci"]);
    let all = names(json!({"abstract": true}));
    for ty in &all {
        qmp.execute("qom-list-properties", json!({"typename": ty}));
    }
    for device in devices {
        let properties = qmp.execute("device-list-properties", json!({"typename": device}));
        let addr = properties
            .as_array()
            .unwrap()
            .iter()
            .find(|entry| entry["name"] == "addr");
        assert_eq!(addr.unwrap()["default-value"], json!(-1), "{device}");
    }
}
