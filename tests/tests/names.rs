//! File names that are descriptions (`json:{…}`) or have a protocol: on the command line, in commands, and inside images.

use bulkhead_tests::images::{qcow2, qemu_img, qemu_io};
use bulkhead_tests::machine::{Machine, refused};
use serde_json::{Value, json};
use std::path::Path;

fn described(value: &Value) -> String {
    format!("json:{value}")
}

/// An image over what a name says.
fn over(directory: &Path, name: &str, format: &str) -> String {
    let image = directory.join("top").display().to_string();
    qemu_img(&[
        "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", format, &image, "1M",
    ]);
    image
}

fn without_guest(directory: &Path, arguments: &str) -> Machine {
    let arguments = format!("-machine none {arguments}").replace("{images}", &directory.display().to_string());
    Machine::start_without_serial(tempfile::tempdir().unwrap(), &arguments, &[])
}

#[test]
fn a_snapshot_goes_to_what_a_description_says() {
    let images = tempfile::tempdir().unwrap();
    let image = images.path().join("a");
    qcow2(&image, "1M", None);
    let overlay = images.path().join("b");
    qcow2(&overlay, "1M", None);
    let mut machine = without_guest(images.path(), "-drive if=none,id=d,format=qcow2,file={images}/a");
    let mut qmp = machine.qmp();
    let name = described(
        &json!({"driver": "qcow2", "node-name": "o", "discard": "unmap", "l2-cache-size": 65536,
        "file": {"driver": "file", "filename": overlay, "locking": "off"}}),
    );
    let snapshot = json!({"device": "d", "snapshot-file": name, "mode": "existing"});
    qmp.execute("blockdev-snapshot-sync", snapshot.clone());
    assert_eq!(qmp.run("query-block")[0]["inserted"]["node-name"], "o");
    assert_eq!(qmp.run("query-block")[0]["inserted"]["backing_file_depth"], 1);
    for (name, text) in [
        ("json:{", "Could not parse the JSON options"),
        ("json:[]", "Invalid JSON object given"),
        (
            "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"null-co\"}}",
            "Driver specified twice",
        ),
        (
            "json:{\"driver\":\"nope\"}",
            "Parameter 'driver' does not accept value 'nope'",
        ),
    ] {
        let snapshot = json!({"device": "d", "snapshot-file": name, "mode": "existing"});
        let refusal = qmp.try_execute("blockdev-snapshot-sync", snapshot).unwrap_err();
        assert!(refusal["desc"].as_str().unwrap().starts_with(text), "{refusal}");
    }
    qmp.run("quit");
    assert!(machine.wait().success());
}

#[test]
fn an_image_may_describe_a_file_below_what_it_may_name() {
    let images = tempfile::tempdir().unwrap();
    let base = images.path().join("base");
    std::fs::write(&base, vec![7; 2 << 20]).unwrap();
    let file = json!({"driver": "file", "filename": base});
    for name in [
        json!({"driver": "raw", "file": file, "offset": 1 << 20, "size": 1 << 20}),
        json!({"driver": "raw", "file.driver": "file", "file.filename": "base"}),
        file.clone(),
    ] {
        let top = over(images.path(), &described(&name), "raw");
        let mut machine = without_guest(
            images.path(),
            &format!("-allow-path {{images}} -drive if=none,id=d,format=qcow2,file={top}"),
        );
        let mut qmp = machine.qmp();
        assert_eq!(qmp.run("query-block")[0]["inserted"]["backing_file_depth"], 1, "{name}");
        let line = "qemu-io d \"read -q -P 7 0 1M\"";
        let said = qmp.execute("human-monitor-command", json!({"command-line": line}));
        assert_eq!(said, "", "{name}");
        qmp.run("quit");
        assert!(machine.wait().success());
    }
}

#[test]
fn an_image_may_describe_nothing_else() {
    let images = tempfile::tempdir().unwrap();
    std::fs::write(images.path().join("base"), vec![7; 1 << 20]).unwrap();
    let elsewhere = tempfile::NamedTempFile::new().unwrap();
    for (name, text) in [
        (
            described(&json!({"driver": "raw", "file": {"driver": "file", "filename": elsewhere.path()}})),
            "would allow it",
        ),
        (
            described(&json!({"driver": "raw", "file": {"driver": "host_device", "filename": "/dev/vda"}})),
            "is not the path of a local file",
        ),
        (
            described(&json!({"driver": "null-co"})),
            "is not the path of a local file",
        ),
        (
            described(&json!({"driver": "raw", "file": "n"})),
            "is not the path of a local file",
        ),
        (
            described(&json!({"driver": "nbd", "server": {"type": "unix", "path": "/s"}})),
            "is not the path of a local file",
        ),
        ("json:{nope}".to_owned(), "Could not parse the JSON options"),
    ] {
        let top = over(images.path(), &name, "raw");
        let drive = format!("if=none,id=d,format=qcow2,file={top}");
        let allowed = images.path().display().to_string();
        let arguments = [
            "-nodefaults",
            "-machine",
            "none",
            "-allow-path",
            &allowed,
            "-blockdev",
            "null-co,node-name=n",
            "-drive",
            &drive,
        ];
        let said = refused(images.path(), &arguments);
        assert!(said.contains(text), "{name}: {said}");
    }
}

#[test]
fn a_name_with_a_protocol_is_its_node() {
    let images = tempfile::tempdir().unwrap();
    let image = images.path().join("a");
    qcow2(&image, "1M", None);
    qemu_io(&image, "qcow2", "write -P 5 0 64k");
    let mut machine = without_guest(
        images.path(),
        "-drive if=none,id=d,format=qcow2,file=blkdebug::{images}/a \
         -drive if=none,id=e,driver=blkdebug,align=4096,file=blkdebug::null-co:// -drive if=none,id=f,format=raw,file=null-co://",
    );
    let mut qmp = machine.qmp();
    let blocks = qmp.run("query-block");
    let driver = |place: usize| blocks[place]["inserted"]["drv"].clone();
    assert_eq!(
        (driver(0), driver(1), driver(2)),
        (json!("qcow2"), json!("blkdebug"), json!("raw"))
    );
    let line = "qemu-io d \"read -q -P 5 0 64k\"";
    assert_eq!(qmp.execute("human-monitor-command", json!({"command-line": line})), "");
    qmp.run("quit");
    assert!(machine.wait().success());
}

/// What is said of a backing image without saying what it is.
#[test]
fn backing_images_that_an_image_names_get_their_names() {
    let images = tempfile::tempdir().unwrap();
    let [a, b, c] = ["a", "b", "c"].map(|name| images.path().join(name));
    qcow2(&a, "1M", None);
    qcow2(&b, "1M", Some(&a));
    qcow2(&c, "1M", Some(&b));
    let mut machine = without_guest(
        images.path(),
        "-allow-path {images} -drive if=none,id=d,format=qcow2,file={images}/c,node-name=top,backing.node-name=mid,backing.backing.node-name=base",
    );
    let mut qmp = machine.qmp();
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}));
    let mut files: Vec<_> = nodes
        .as_array()
        .unwrap()
        .iter()
        .filter(|node| node["drv"] == "qcow2")
        .map(|node| (node["node-name"].as_str().unwrap(), node["file"].as_str().unwrap()))
        .collect();
    files.sort_unstable();
    let [a, b, c] = [a, b, c].map(|path| path.display().to_string());
    assert_eq!(files, [("base", a.as_str()), ("mid", b.as_str()), ("top", c.as_str())]);
    qmp.run("quit");
    assert!(machine.wait().success());
}
