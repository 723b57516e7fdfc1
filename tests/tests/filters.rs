//! Drivers and filters of the block graph without a guest: what an operator's own requests do through them.

use bulkhead_tests::machine::Machine;
use bulkhead_tests::qmp::Qmp;
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .args(arguments)
        .output()
        .expect("qemu-img: `make packages` installs qemu-utils");
    assert!(output.status.success(), "qemu-img {arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn name(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn qemu_io(qmp: &mut Qmp, node: &str, command: &str) {
    let line = format!("qemu-io {node} \"{command}\"");
    let said = qmp.execute("human-monitor-command", json!({"command-line": line}));
    // What it finds out is on standard output.
    assert_eq!(said, "", "{line}");
}

fn end(mut machine: Machine, mut qmp: Qmp) {
    qmp.run("quit");
    assert!(machine.wait().success(), "{}", machine.log());
}

#[test]
fn copy_on_read_leaves_what_was_read_in_the_upper_image() {
    let images = tempfile::tempdir().unwrap();
    let at = |name: &str| images.path().join(name);
    std::fs::write(at("raw"), vec![0xaa; 1 << 20]).unwrap();
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        name(&at("raw")),
        name(&at("base")),
    ]);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        name(&at("base")),
        "-F",
        "qcow2",
        name(&at("top")),
    ]);
    let arguments = format!("-machine none -allow-path {}", images.path().display());
    let mut machine = Machine::start_without_serial(tempfile::tempdir().unwrap(), &arguments, &[]);
    let mut qmp = machine.qmp();
    let file = json!({"driver": "file", "filename": name(&at("top"))});
    let image = json!({"driver": "qcow2", "file": file});
    qmp.execute(
        "blockdev-add",
        json!({"driver": "copy-on-read", "node-name": "cor", "file": image}),
    );
    // Twice: the second finds it above.
    qemu_io(&mut qmp, "cor", "read -P 0xaa 65536 131072");
    qemu_io(&mut qmp, "cor", "read -P 0xaa 65536 131072");
    end(machine, qmp);
    qemu_img(&["check", "-q", "-f", "qcow2", name(&at("top"))]);
    let map: Value =
        serde_json::from_str(&qemu_img(&["map", "--output=json", "-f", "qcow2", name(&at("top"))])).unwrap();
    let own: u64 = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["depth"] == 0)
        .map(|extent| extent["length"].as_u64().unwrap())
        .sum();
    assert_eq!(own, 131_072, "{map}");
}

#[test]
fn zeroes_that_are_detected_take_no_space() {
    let images = tempfile::tempdir().unwrap();
    let path = images.path().join("disk");
    let mut machine = Machine::start_without_serial(tempfile::tempdir().unwrap(), "-machine none", &[]);
    let mut qmp = machine.qmp();
    for (mode, discard, keeps_space) in [
        ("off", "unmap", true),
        ("on", "ignore", true),
        ("unmap", "unmap", false),
    ] {
        std::fs::write(&path, vec![0xff; 1 << 20]).unwrap();
        let node = json!({"driver": "file", "filename": name(&path), "node-name": "disk",
                          "discard": discard, "detect-zeroes": mode});
        qmp.execute("blockdev-add", node);
        qemu_io(&mut qmp, "disk", "write -P 0 65536 524288");
        qemu_io(&mut qmp, "disk", "write -P 1 0 4096");
        qmp.execute("blockdev-del", json!({"node-name": "disk"}));
        let data = std::fs::read(&path).unwrap();
        assert!(data[..4096].iter().all(|byte| *byte == 1), "{mode}");
        assert!(data[65536..65536 + 524_288].iter().all(|byte| *byte == 0), "{mode}");
        assert!(data[65536 + 524_288..].iter().all(|byte| *byte == 0xff), "{mode}");
        let allocated = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert_eq!(allocated >= 1 << 20, keeps_space, "{mode}: {allocated}");
    }
    let both = json!({"driver": "file", "filename": name(&path), "node-name": "disk", "detect-zeroes": "unmap"});
    let refusal = qmp.try_execute("blockdev-add", both).unwrap_err();
    assert!(refusal["desc"].as_str().unwrap().contains("discard"), "{refusal}");
    end(machine, qmp);
}

#[test]
fn a_part_of_a_file_is_a_disk() {
    let images = tempfile::tempdir().unwrap();
    let path = images.path().join("disk");
    std::fs::write(&path, vec![7; 64 << 10]).unwrap();
    let mut machine = Machine::start_without_serial(tempfile::tempdir().unwrap(), "-machine none", &[]);
    let mut qmp = machine.qmp();
    let part = |offset: u64, size: u64| {
        json!({"driver": "raw", "node-name": "part", "offset": offset, "size": size,
               "file": {"driver": "file", "filename": name(&path)}})
    };
    for (offset, size, problem) in [
        (
            65537,
            512,
            "Offset (65537) cannot be greater than size of the containing file (65536)",
        ),
        (0, 513, "Specified size is not multiple of 512"),
        (
            61440,
            8192,
            "The sum of offset (61440) and size (8192) has to be smaller or equal to the actual size",
        ),
    ] {
        let refusal = qmp.try_execute("blockdev-add", part(offset, size)).unwrap_err();
        assert!(refusal["desc"].as_str().unwrap().contains(problem), "{refusal}");
    }
    qmp.execute("blockdev-add", part(4096, 8192));
    assert_eq!(qmp.run("query-named-block-nodes")[0]["image"]["virtual-size"], 8192);
    qemu_io(&mut qmp, "part", "write -P 9 512 4096");
    // Beyond its end nothing is written.
    qemu_io(&mut qmp, "part", "write -P 9 8192 512");
    end(machine, qmp);
    let data = std::fs::read(&path).unwrap();
    let changed: Vec<usize> = (0..data.len()).filter(|at| data[*at] != 7).collect();
    assert_eq!((changed.first(), changed.last()), (Some(&4608), Some(&8703)));
    assert!(changed.iter().all(|at| data[*at] == 9) && changed.len() == 4096);
}
