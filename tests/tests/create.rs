//! blockdev-create of encrypted disks and images, and of images with a data file: what is made is what QEMU's tools take, and
//! what is written through us is what they read.

use bulkhead_tests::machine::Machine;
use bulkhead_tests::qmp::Qmp;
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

const MIB: u64 = 1 << 20;
const PASSWORD: &str = "letmein";

fn machine() -> (Machine, Qmp) {
    let directory = tempfile::tempdir().unwrap();
    let arguments = format!("-machine none -object secret,id=key,data={PASSWORD}");
    let mut machine = Machine::start_without_serial(directory, &arguments, &[]);
    let qmp = machine.qmp();
    (machine, qmp)
}

/// Creates, and returns the error of the job, if it has any.
fn create(qmp: &mut Qmp, options: Value) -> Option<String> {
    qmp.execute("blockdev-create", json!({"job-id": "j", "options": options}));
    while qmp.wait_event("JOB_STATUS_CHANGE")["status"] != "concluded" {}
    let jobs = qmp.run("query-jobs");
    qmp.execute("job-dismiss", json!({"id": "j"}));
    Some(jobs[0].get("error")?.as_str().unwrap().to_owned())
}

/// A node of a new, empty file.
fn file(machine: &Machine, qmp: &mut Qmp, name: &str) -> String {
    let path = machine.path(name).display().to_string();
    assert_eq!(
        create(
            qmp,
            json!({"driver": "file", "filename": path, "size": 0, "nocow": true, "extent-size-hint": 65536})
        ),
        None
    );
    qmp.execute(
        "blockdev-add",
        json!({"driver": "file", "node-name": name, "filename": path}),
    );
    path
}

/// Writes to an image through us, and the same to a raw file. It is a drive of QMP 2.0's: today's form opens no image of the
/// first encryption.
fn write(qmp: &mut Qmp, mut image: Value, id: &str, raw: &Path) {
    image["id"] = json!(id);
    qmp.execute("blockdev-add", json!({"options": image}));
    let mut expected = vec![0; 4 * MIB as usize];
    for (pattern, offset, bytes) in [
        (0x11, 0, MIB),
        (0x22, 3 * MIB - 512, 70_144),
        (0x33, 4 * MIB - 65_536, 65_536),
    ] {
        let line = format!("qemu-io {id} \"write -q -P {pattern} {offset} {bytes}\"");
        let said = qmp.execute("human-monitor-command", json!({"command-line": line}));
        assert_eq!(said, "");
        expected[offset as usize..(offset + bytes) as usize].fill(pattern);
    }
    qmp.execute("eject", json!({"device": id}));
    std::fs::write(raw, expected).unwrap();
}

/// QEMU's tool, with the password; asked again when it could not measure how fast it is.
fn qemu_img(arguments: &[&str]) -> String {
    let secret = format!("secret,id=key,data={PASSWORD}");
    for _ in 0..50 {
        let mut command = Command::new("qemu-img");
        let output = command
            .arg(arguments[0])
            .args(["--object", &secret])
            .args(&arguments[1..])
            .output();
        let output = output.expect("qemu-img: `make packages` installs qemu-utils");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if !said.contains("Unable to get accurate CPU usage") {
            assert!(output.status.success(), "qemu-img {arguments:?}: {output:?}");
            return String::from_utf8_lossy(&output.stdout).into_owned();
        }
    }
    panic!("qemu-img cannot measure this machine");
}

fn is_same(image: &str, raw: &Path) {
    let raw = format!("driver=raw,file.filename={}", raw.display());
    qemu_img(&["compare", "--image-opts", image, &raw]);
}

#[test]
fn encrypted_images_open_with_their_password() {
    let (machine, mut qmp) = machine();
    let luks = json!({"format": "luks", "key-secret": "key", "iter-time": 10});
    let other = json!({"format": "luks", "key-secret": "key", "iter-time": 10, "cipher-alg": "aes-128",
        "cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha256", "hash-alg": "sha512"});
    let cases = [
        ("luks", json!({"encrypt": luks}), "luks"),
        ("old", json!({"encrypt": {"format": "aes", "key-secret": "key"}}), "aes"),
        (
            "older",
            json!({"encrypt": {"format": "qcow", "key-secret": "key"}, "version": "v2"}),
            "aes",
        ),
        (
            "other",
            json!({"encrypt": other, "cluster-size": 4096, "refcount-bits": 1}),
            "luks",
        ),
        ("extended", json!({"encrypt": luks, "extended-l2": true}), "luks"),
    ];
    for (name, more, format) in cases {
        let path = file(&machine, &mut qmp, name);
        let mut options = json!({"driver": "qcow2", "file": name, "size": 4 * MIB});
        for (key, value) in more.as_object().unwrap() {
            options[key] = value.clone();
        }
        assert_eq!(create(&mut qmp, options), None, "{name}");
        let image = json!({"driver": "qcow2", "file": name, "encrypt": {"format": format, "key-secret": "key"}});
        let raw = machine.path("raw");
        write(&mut qmp, image, &format!("drive-{name}"), &raw);
        qmp.execute("blockdev-del", json!({"node-name": name}));
        let options = format!("driver=qcow2,encrypt.key-secret=key,file.filename={path}");
        qemu_img(&["check", "--image-opts", &options]);
        let info: Value =
            serde_json::from_str(&qemu_img(&["info", "--output=json", "--image-opts", &options])).unwrap();
        assert_eq!(info["format-specific"]["data"]["encrypt"]["format"], format, "{name}");
        is_same(&options, &raw);
    }
}

#[test]
fn encrypted_disks_open_with_their_password() {
    let (machine, mut qmp) = machine();
    for (name, more) in [
        ("plain", json!({})),
        (
            "other",
            json!({"cipher-alg": "aes-256", "cipher-mode": "cbc", "ivgen-alg": "plain", "hash-alg": "sha1"}),
        ),
        ("full", json!({"preallocation": "full"})),
    ] {
        let path = file(&machine, &mut qmp, name);
        let mut options =
            json!({"driver": "luks", "file": name, "size": 4 * MIB, "key-secret": "key", "iter-time": 10});
        for (key, value) in more.as_object().unwrap() {
            options[key] = value.clone();
        }
        assert_eq!(create(&mut qmp, options), None, "{name}");
        let image = json!({"driver": "luks", "file": name, "key-secret": "key"});
        let raw = machine.path("raw");
        let written = format!("driver=luks,key-secret=key,file.filename={path}");
        if name == "full" {
            // What nobody wrote reads as anything there; its size has to be right all the same.
            let allocated = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap()) * 512;
            assert!(allocated >= 4 * MIB, "{allocated}");
        }
        write(&mut qmp, image, &format!("drive-{name}"), &raw);
        qmp.execute("blockdev-del", json!({"node-name": name}));
        let info: Value =
            serde_json::from_str(&qemu_img(&["info", "--output=json", "--image-opts", &written])).unwrap();
        assert_eq!(info["virtual-size"], 4 * MIB, "{name}");
        for (offset, bytes) in [(0, MIB), (3 * MIB - 512, 70_144), (4 * MIB - 65_536, 65_536)] {
            let part = |image: &str| format!("driver=raw,offset={offset},size={bytes},{image}");
            let image = part(&format!(
                "file.driver=luks,file.key-secret=key,file.file.filename={path}"
            ));
            let expected = part(&format!("file.filename={}", raw.display()));
            qemu_img(&["compare", "--image-opts", &image, &expected]);
        }
    }
}

#[test]
fn an_image_has_its_data_in_a_file_of_its_own() {
    let (machine, mut qmp) = machine();
    for (name, is_raw) in [("shared", false), ("alone", true)] {
        let data = format!("{name}-data");
        let (path, data_path) = (file(&machine, &mut qmp, name), file(&machine, &mut qmp, &data));
        let options =
            json!({"driver": "qcow2", "file": name, "size": 4 * MIB, "data-file": data, "data-file-raw": is_raw});
        assert_eq!(create(&mut qmp, options), None);
        let image = json!({"driver": "qcow2", "file": name, "data-file": data});
        let raw = machine.path("raw");
        write(&mut qmp, image, &format!("drive-{name}"), &raw);
        for node in [name, &data] {
            qmp.execute("blockdev-del", json!({"node-name": node}));
        }
        qemu_img(&["check", &path]);
        let info: Value = serde_json::from_str(&qemu_img(&["info", "--output=json", &path])).unwrap();
        let said = &info["format-specific"]["data"];
        assert_eq!(
            (&said["data-file"], &said["data-file-raw"]),
            (&json!(data_path), &json!(is_raw))
        );
        is_same(&format!("driver=qcow2,file.filename={path}"), &raw);
        if is_raw {
            is_same(&format!("driver=raw,file.filename={data_path}"), &raw);
        }
    }
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let (machine, mut qmp) = machine();
    file(&machine, &mut qmp, "f");
    let mut refused = |more: Value, text: &str| {
        let mut options = json!({"driver": "qcow2", "file": "f", "size": MIB});
        for (key, value) in more.as_object().unwrap() {
            options[key] = value.clone();
        }
        assert_eq!(create(&mut qmp, options).as_deref(), Some(text), "{more}");
    };
    refused(
        json!({"encrypt": {"format": "luks"}}),
        "Parameter 'encrypt.key-secret' is required for cipher",
    );
    refused(
        json!({"driver": "luks"}),
        "Parameter 'key-secret' is required for cipher",
    );
    refused(
        json!({"driver": "luks", "key-secret": "nope"}),
        "No secret with id 'nope'",
    );
    refused(
        json!({"driver": "luks", "key-secret": "key", "iter-time": 0}),
        "iter-time must be greater than 0",
    );
    refused(json!({"data-file-raw": true}), "data-file-raw requires data-file");
    refused(json!({"data-file": "f"}), "Node f is in use");
    let text = "Cannot find device='nope' nor node-name='nope'";
    refused(json!({"data-file": "nope"}), text);
}
