//! block_resize: what the image, the queries and the guest's driver see of it.

use bulkhead_tests::images::{check, info, qcow2};
use bulkhead_tests::machine::Machine;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

fn refusal(qmp: &mut Qmp, arguments: Value) -> String {
    let error = qmp.try_execute("block_resize", arguments).expect_err("refused");
    assert_eq!(error["class"], "GenericError");
    error["desc"].as_str().unwrap().to_owned()
}

fn virtual_size(qmp: &mut Qmp) -> u64 {
    let blocks = qmp.run("query-block");
    blocks[0]["inserted"]["image"]["virtual-size"].as_u64().unwrap()
}

#[test]
fn a_running_driver_is_interrupted_and_sees_the_new_size() {
    need_kvm!();
    for format in ["raw", "qcow2"] {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk");
        match format {
            "raw" => std::fs::File::create(&image).unwrap().set_len(16 * MIB).unwrap(),
            _ => qcow2(&image, "16M", None),
        }
        let arguments = format!(
            "-m 256 -kernel {} -drive file={{dir}}/disk,if=virtio,format={format},id=d",
            guest::image().display()
        );
        let mut machine = Machine::start_with(directory, &arguments, &["-append", "test=blk-resize"]);
        machine.wait_for_serial("blk-resize waiting sectors=32768");
        let mut qmp = machine.qmp();
        qmp.execute("block_resize", json!({"device": "d", "size": 32 * MIB}));
        assert_eq!(virtual_size(&mut qmp), 32 * MIB);
        machine.wait_for_serial("blk-resize sectors=65536");
        machine.wait();
        assert_eq!(guest::value(&machine.serial(), "done", "failures"), Some("0"));
        let image = machine.path("disk");
        assert_eq!(info(&image)["virtual-size"], 32 * MIB);
        if format == "qcow2" {
            check(&image);
        }
    }
}

#[test]
fn sizes_and_names_that_cannot_be_are_refused() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    qcow2(&directory.path().join("disk"), "16M", None);
    let arguments = format!(
        "-m 64 -S -kernel {} -drive file={{dir}}/disk,if=virtio,format=qcow2,id=d -append test=spin",
        guest::image().display()
    );
    let mut machine = Machine::start_in(directory, &arguments);
    let mut qmp = machine.qmp();
    for (arguments, expected) in [
        (json!({"size": 512}), "Cannot find device='' nor node-name=''"),
        (
            json!({"device": "x", "node-name": "y", "size": 512}),
            "Cannot find device='x' nor node-name='y'",
        ),
        (json!({"device": "d", "size": -1}), "Parameter 'size' expects a >0 size"),
        (
            json!({"device": "d", "size": 1000}),
            "The new size must be a multiple of 512",
        ),
    ] {
        assert_eq!(refusal(&mut qmp, arguments), expected);
    }
    // A device that is there counts, whatever the other name says.
    qmp.execute(
        "block_resize",
        json!({"device": "d", "node-name": "nope", "size": 24 * MIB}),
    );
    assert_eq!(virtual_size(&mut qmp), 24 * MIB);
    let file = directory_file(&mut qmp);
    let text = refusal(&mut qmp, json!({"node-name": file, "size": 512}));
    assert!(
        text.starts_with("Permission conflict on node") && text.contains("'resize'"),
        "{text}"
    );
}

/// The name of the node of the disk's file.
fn directory_file(qmp: &mut Qmp) -> String {
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}));
    let nodes = nodes.as_array().unwrap();
    let file = nodes.iter().find(|node| node["drv"] == "file").unwrap();
    file["node-name"].as_str().unwrap().to_owned()
}
