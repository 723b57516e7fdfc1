//! Nodes of the block graph: made, shown, used and deleted over QMP and on the command line.

use bulkhead_tests::images::qcow2;
use bulkhead_tests::machine::{Machine, refused, wait_until};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .args(arguments)
        .output()
        .expect("qemu-img: `make packages` installs qemu-utils");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {said}");
    said
}

/// Whether QEMU's tools find an image in use when they want to write to it.
fn is_locked(image: &Path) -> bool {
    let output = Command::new("qemu-img")
        .args(["resize", "-f", "raw", image.to_str().unwrap(), "+0"])
        .output()
        .expect("qemu-img");
    String::from_utf8_lossy(&output.stderr).contains("lock")
}

/// A machine that waits for `cont`, in a directory with r.raw and the chain top.qcow2, mid.qcow2, base.qcow2.
fn machine(arguments: &str) -> (Machine, Qmp) {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    File::create(at("r.raw"))
        .and_then(|file| file.set_len(1 << 20))
        .unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", &at("base.qcow2"), "16M"]);
    for (image, base) in [("mid.qcow2", "base.qcow2"), ("top.qcow2", "mid.qcow2")] {
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            &at(base),
            "-F",
            "qcow2",
            &at(image),
        ]);
    }
    let arguments = format!(
        "-m 64 -S -kernel {} -append test=spin {arguments}",
        guest::image().display()
    );
    let mut machine = Machine::start_in(directory, &arguments);
    let qmp = machine.qmp();
    (machine, qmp)
}

fn names(qmp: &mut Qmp) -> Vec<String> {
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}));
    let name = |node: &Value| node["node-name"].as_str().unwrap().to_owned();
    nodes.as_array().unwrap().iter().map(name).collect()
}

#[track_caller]
fn refusal(qmp: &mut Qmp, command: &str, arguments: Value) -> String {
    let error = qmp.try_execute(command, arguments).expect_err("refused");
    assert_eq!(error["class"], "GenericError", "{error}");
    error["desc"].as_str().unwrap().to_owned()
}

#[test]
fn nodes_are_made_shown_and_deleted() {
    need_kvm!();
    let (machine, mut qmp) = machine("");
    assert_eq!(names(&mut qmp), Vec::<String>::new());
    let file = machine.path_text("r.raw");
    qmp.execute(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "n", "offset": 4096, "size": 8192,
               "file": {"driver": "file", "node-name": "f", "filename": file}}),
    );
    // The newest first; a node comes after what is below it.
    assert_eq!(names(&mut qmp), ["n", "f"]);
    let nodes = qmp.run("query-named-block-nodes");
    assert_eq!(nodes[0]["image"]["virtual-size"], 8192);
    assert_eq!(nodes[0]["drv"], "raw");
    assert_eq!(nodes[1]["image"]["virtual-size"], 1 << 20);
    assert_eq!(nodes[1]["file"], file.as_str());
    assert_eq!(nodes[1]["image"]["actual-size"], 0);
    let name = nodes[0]["file"].as_str().unwrap();
    assert!(name.starts_with("json:") && name.contains("4096"), "{name}");
    for (node, text) in [
        ("f", "Node f is not owned by the monitor"),
        ("zz", "Failed to find node with node-name='zz'"),
    ] {
        assert_eq!(refusal(&mut qmp, "blockdev-del", json!({"node-name": node})), text);
    }
    qmp.execute(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "over", "read-only": true, "file": "n"}),
    );
    let text = refusal(&mut qmp, "blockdev-del", json!({"node-name": "n"}));
    assert_eq!(text, "Node n is in use");
    qmp.execute("blockdev-del", json!({"node-name": "over"}));
    // What came along goes along.
    qmp.execute("blockdev-del", json!({"node-name": "n"}));
    assert_eq!(names(&mut qmp), Vec::<String>::new());
}

/// A drive's chain, its device and its nodes, as clients see them.
#[test]
fn a_drives_chain_is_shown_whole() {
    need_kvm!();
    let (machine, mut qmp) = machine(
        "-allow-path {dir} -drive if=none,id=drive0,file={dir}/top.qcow2,format=qcow2,discard=unmap,detect-zeroes=unmap,node-name=top \
         -device virtio-blk-pci,drive=drive0,id=vd0,write-cache=off -drive if=none,id=spare,file={dir}/r.raw,format=raw,readonly=on",
    );
    let blocks = qmp.run("query-block");
    let [spare, drive] = &blocks.as_array().unwrap()[..] else {
        panic!("{blocks}")
    };
    assert_eq!(drive["device"], "drive0");
    assert_eq!(drive["qdev"], "/machine/peripheral/vd0/virtio-backend");
    assert_eq!(
        (&drive["io-status"], &drive["removable"]),
        (&json!("ok"), &json!(false))
    );
    let inserted = &drive["inserted"];
    assert_eq!(inserted["node-name"], "top");
    assert_eq!(inserted["backing_file_depth"], 2);
    assert_eq!(inserted["backing_file"], machine.path_text("mid.qcow2").as_str());
    assert_eq!(inserted["detect_zeroes"], "unmap");
    assert_eq!(
        inserted["cache"],
        json!({"writeback": false, "direct": false, "no-flush": false})
    );
    let base = &inserted["image"]["backing-image"]["backing-image"];
    assert_eq!(base["filename"], machine.path_text("base.qcow2").as_str());
    assert_eq!(
        (&base["virtual-size"], &base["cluster-size"]),
        (&json!(16 << 20), &json!(65536))
    );
    assert_eq!(base["format-specific"]["data"]["compat"], "1.1");
    assert_eq!(base.get("backing-image"), None);
    assert_eq!(spare["device"], "spare");
    assert_eq!((&spare["removable"], spare.get("qdev")), (&json!(true), None));
    assert_eq!(spare["inserted"]["ro"], true);
    // Three images in three files, and the spare one in its.
    assert_eq!(names(&mut qmp).len(), 8);
    let flat = qmp.execute("query-named-block-nodes", json!({"flat": true}));
    assert!(
        flat.as_array()
            .unwrap()
            .iter()
            .all(|node| node["image"].get("backing-image").is_none())
    );
    let stats = qmp.run("query-blockstats");
    let stats = stats
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| entry["device"] == "drive0")
        .unwrap();
    assert_eq!(stats["node-name"], "top");
    assert_eq!(stats["backing"]["backing"]["stats"]["rd_bytes"], 0);
    assert!(stats["parent"]["node-name"].as_str().unwrap().starts_with("#block"));
    let of_nodes = qmp.execute("query-blockstats", json!({"query-nodes": true}));
    assert_eq!(of_nodes.as_array().unwrap().len(), 8);
    let text = qmp.execute("human-monitor-command", json!({"command-line": "info block drive0"}));
    let text = text.as_str().unwrap();
    let top = machine.path_text("top.qcow2");
    assert!(text.starts_with(&format!("drive0 (top): {top} (qcow2)\r\n")), "{text}");
    assert!(
        text.contains("Attached to:      /machine/peripheral/vd0/virtio-backend"),
        "{text}"
    );
    assert!(text.contains("mid.qcow2 (chain depth: 2)"), "{text}");
}

/// `-blockdev` in both forms, by a device that uses the node by its name; what the guest writes is in the image.
#[test]
fn a_guest_writes_through_nodes_with_names() {
    need_kvm!();
    let images = tempfile::tempdir().unwrap();
    let image = images.path().join("disk.qcow2");
    let name = image.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", name, "80M"]);
    let object = json!({"driver": "qcow2", "node-name": "disk", "file": "storage", "cache": {"direct": false}});
    let arguments = format!(
        "-m 256 -smp 2 -kernel {} -object iothread,id=io -blockdev driver=file,node-name=storage,filename={name} \
         -blockdev {} -device virtio-blk-pci,drive=disk,iothread=io,num-queues=2",
        guest::image().display(),
        object.to_string().replace(' ', ""),
    );
    let append = "test=blk test=blk-verify mib=8 seed=5 queues=2";
    let mut machine = Machine::start_with(tempfile::tempdir().unwrap(), &arguments, &["-append", append]);
    machine.wait();
    let (serial, log) = (machine.serial(), machine.log());
    assert_eq!(guest::value(&serial, "done", "failures"), Some("0"), "{serial}\n{log}");
    drop(machine);
    qemu_img(&["check", "-q", "-f", "qcow2", name]);
    let raw = images.path().join("raw");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", name, raw.to_str().unwrap()]);
    let data = std::fs::read(&raw).unwrap();
    assert_eq!(guest::checksum(&data[..8 << 20]), guest::pattern_checksum(8, 5));
}

/// A file is locked as long as, and as much as, somebody uses it.
#[test]
fn locks_follow_the_users() {
    need_kvm!();
    let (machine, mut qmp) = machine("");
    let (file, image) = (machine.path_text("r.raw"), machine.path("r.raw"));
    qmp.execute(
        "blockdev-add",
        json!({"driver": "file", "node-name": "f", "filename": file}),
    );
    assert!(!is_locked(&image), "a node that nobody uses locks nothing");
    qmp.execute("blockdev-add", json!({"driver": "raw", "node-name": "n", "file": "f"}));
    assert!(!is_locked(&image), "raw does what is done to it: nothing");
    let top = machine.path_text("base.qcow2");
    let add = json!({"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": top}});
    qmp.execute("blockdev-add", add.clone());
    assert!(is_locked(&machine.path("base.qcow2")));
    let mut again = add;
    again["node-name"] = json!("q2");
    let text = refusal(&mut qmp, "blockdev-add", again);
    assert!(
        text.starts_with("Failed to get \"") && text.ends_with("\" lock"),
        "{text}"
    );
    assert_eq!(names(&mut qmp).len(), 4, "what failed has left nothing");
    qmp.execute("blockdev-del", json!({"node-name": "q"}));
    wait_until("the lock is given up", || !is_locked(&machine.path("base.qcow2")));
}

/// What images name is opened below -allow-path alone; what clients name, as they say.
#[test]
fn names_in_images_grant_nothing() {
    need_kvm!();
    let (machine, mut qmp) = machine("");
    let open = |node: &str, more: Value| {
        let mut options = json!({"driver": "qcow2", "node-name": node,
                                 "file": {"driver": "file", "filename": machine.path_text("top.qcow2")}});
        for (name, value) in more.as_object().unwrap() {
            options[name] = value.clone();
        }
        options
    };
    let text = refusal(&mut qmp, "blockdev-add", open("a", json!({})));
    assert!(text.contains("mid.qcow2") && text.contains("-allow-path"), "{text}");
    assert_eq!(names(&mut qmp), Vec::<String>::new());
    qmp.execute("blockdev-add", open("alone", json!({"backing": null})));
    qmp.execute("blockdev-del", json!({"node-name": "alone"}));
    let below = json!({"driver": "qcow2", "node-name": "mid", "read-only": true, "backing": null,
                       "file": {"driver": "file", "filename": machine.path_text("mid.qcow2")}});
    qmp.execute("blockdev-add", below);
    qmp.execute("blockdev-add", open("top", json!({"backing": "mid"})));
    let nodes = qmp.run("query-named-block-nodes");
    assert_eq!(nodes[0]["backing_file_depth"], 1);
    // Another below, and none.
    for (backing, depth) in [(json!(null), 0), (json!("mid"), 1)] {
        let options = open("top", json!({"backing": backing}));
        qmp.execute("blockdev-reopen", json!({"options": [options]}));
        assert_eq!(qmp.run("query-named-block-nodes")[0]["backing_file_depth"], depth);
    }
    let text = refusal(
        &mut qmp,
        "blockdev-reopen",
        json!({"options": [open("top", json!({}))]}),
    );
    assert_eq!(text, "Parameter 'backing' is missing");
    let text = refusal(&mut qmp, "blockdev-del", json!({"node-name": "mid"}));
    assert_eq!(text, "Node 'mid' is busy: node is used as backing hd of 'top'");
}

/// QMP 2.0's blockdev-add makes a drive, on a set of passed descriptors.
#[test]
fn the_old_form_makes_a_drive() {
    need_kvm!();
    let (machine, mut qmp) = machine("");
    let image = File::options()
        .read(true)
        .write(true)
        .open(machine.path("r.raw"))
        .unwrap();
    qmp.pass(&[image.as_fd()]);
    qmp.execute("add-fd", json!({"fdset-id": 4}));
    let options = |id: &str| {
        json!({"options": {"driver": "raw", "id": id, "cache": {"writeback": false}, "rerror": "stop",
                           "file": {"driver": "file", "filename": "/dev/fdset/4"}}})
    };
    qmp.execute("blockdev-add", options("my_disk"));
    let blocks = qmp.run("query-block");
    assert_eq!(blocks[0]["device"], "my_disk");
    assert_eq!(blocks[0]["inserted"]["file"], "/dev/fdset/4");
    assert_eq!(blocks[0]["inserted"]["cache"]["writeback"], false);
    let text = refusal(&mut qmp, "blockdev-add", options("my_disk"));
    assert_eq!(text, "Device with id 'my_disk' already exists");
}

/// How a file is open can be changed under a device; what cannot be changed is said.
#[test]
fn a_file_is_reopened_in_another_way() {
    need_kvm!();
    let (machine, mut qmp) = machine(
        "-blockdev file,node-name=f,filename={dir}/r.raw -blockdev raw,node-name=n,file=f -device virtio-blk-pci,drive=n",
    );
    let image = machine.path("r.raw");
    assert!(is_locked(&image));
    let reopen = |more: Value| {
        let mut options = json!({"driver": "file", "node-name": "f", "filename": machine.path_text("r.raw")});
        for (name, value) in more.as_object().unwrap() {
            options[name] = value.clone();
        }
        json!({"options": [options]})
    };
    qmp.execute("blockdev-reopen", reopen(json!({"cache": {"no-flush": true}})));
    let nodes = qmp.run("query-named-block-nodes");
    assert_eq!(
        (&nodes[1]["node-name"], &nodes[1]["cache"]["no-flush"]),
        (&json!("f"), &json!(true))
    );
    assert!(is_locked(&image), "the lock is where it was");
    let text = refusal(&mut qmp, "blockdev-reopen", reopen(json!({"read-only": true})));
    assert_eq!(text, "Block node is read-only");
    let text = refusal(&mut qmp, "blockdev-reopen", reopen(json!({"filename": "/etc/passwd"})));
    assert_eq!(text, "Cannot change the option 'filename'");
    qmp.execute("cont", json!({}));
    qmp.execute("stop", json!({}));
}

/// What a driver reads when it begins can be changed while nobody writes; otherwise it is said that it cannot.
#[test]
fn an_image_is_reopened_with_other_options() {
    need_kvm!();
    let (machine, mut qmp) = machine("");
    qcow2(&machine.path("x.qcow2"), "1M", None);
    let file = |read_only: bool| json!({"driver": "file", "node-name": "xf", "filename": machine.path_text("x.qcow2"), "read-only": read_only});
    let image = |more: Value| {
        let mut options = json!({"driver": "qcow2", "node-name": "x", "file": "xf"});
        for (name, value) in more.as_object().unwrap() {
            options[name] = value.clone();
        }
        options
    };
    let reopen = |options: Value| json!({"options": [options]});
    qmp.execute("blockdev-add", file(true));
    qmp.execute("blockdev-add", image(json!({"read-only": true})));
    let text = refusal(&mut qmp, "blockdev-reopen", reopen(image(json!({}))));
    assert_eq!(text, "Block node is read-only");
    qmp.execute(
        "blockdev-reopen",
        reopen(image(json!({"read-only": true, "l2-cache-size": 65536, "cache": {}}))),
    );
    // The file, then the image, in one command.
    qmp.execute(
        "blockdev-reopen",
        json!({"options": [file(false), image(json!({"discard": "unmap"}))]}),
    );
    let shown = |qmp: &mut Qmp| {
        let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}));
        let found = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "x");
        found.unwrap().clone()
    };
    assert_eq!(shown(&mut qmp)["ro"], false);
    let io = |qmp: &mut Qmp, line: &str| {
        let line = format!("qemu-io x \"{line}\"");
        assert_eq!(qmp.execute("human-monitor-command", json!({"command-line": line})), "");
    };
    io(&mut qmp, "write -q -P 9 0 64k");
    // What was written is there for the node that follows.
    qmp.execute(
        "blockdev-reopen",
        reopen(image(json!({"detect-zeroes": "on", "lazy-refcounts": false}))),
    );
    assert_eq!(shown(&mut qmp)["detect_zeroes"], "on");
    io(&mut qmp, "read -q -P 9 0 64k");
    io(&mut qmp, "write -q -P 8 64k 64k");
    let text = refusal(
        &mut qmp,
        "blockdev-reopen",
        reopen(image(json!({"cache": {"no-flush": true}}))),
    );
    assert_eq!(text, "Cannot change the option 'cache.no-flush'");
    let text = refusal(
        &mut qmp,
        "blockdev-reopen",
        reopen(image(json!({"encrypt": {"format": "luks", "key-secret": "k"}}))),
    );
    assert_eq!(text, "Cannot change the option 'encrypt'");
    // A filter over it that belongs to a drive writes to it.
    let above = json!({"options": {"driver": "raw", "id": "d", "file": "x"}});
    qmp.execute("blockdev-add", above);
    let text = refusal(
        &mut qmp,
        "blockdev-reopen",
        reopen(image(json!({"lazy-refcounts": false, "l2-cache-size": 131_072}))),
    );
    assert!(
        text.starts_with("Cannot change the option 'l2-cache-size' of a node that is written to"),
        "{text}"
    );
    qmp.execute("eject", json!({"device": "d"}));
    qmp.execute("blockdev-del", json!({"node-name": "x"}));
    qmp.execute("blockdev-del", json!({"node-name": "xf"}));
    bulkhead_tests::images::check(&machine.path("x.qcow2"));
}

#[test]
fn nodes_that_cannot_be_end_the_start_with_a_line() {
    need_kvm!();
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path();
    std::fs::write(directory.join("disk"), vec![0; 1 << 20]).unwrap();
    let kernel = guest::image();
    let base = ["-nodefaults", "-display", "none", "-kernel", kernel.to_str().unwrap()];
    let cases: &[(&[&str], &[&str])] = &[
        (
            &["-blockdev", "raw,node-name=a,file=none"],
            &["node-name=a", "Cannot find device='none' nor node-name='none'"],
        ),
        (
            &["-blockdev", "file,node-name=a,filename=missing"],
            &["missing", "No such file"],
        ),
        (
            &["-blockdev", "qcow2,node-name=a,file.driver=file,file.filename=disk"],
            &["disk", "Image is not in qcow2 format"],
        ),
        (
            &[
                "-drive",
                "if=virtio,format=raw,file=disk,id=a",
                "-drive",
                "if=virtio,format=raw,file=disk,id=b,readonly=on",
            ],
            &["disk", "in use"],
        ),
    ];
    for (arguments, named) in cases {
        let line = refused(directory, &[&base[..], arguments].concat());
        for name in *named {
            assert!(line.contains(name), "{arguments:?}: {line:?} does not name {name:?}");
        }
    }
}
