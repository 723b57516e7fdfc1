//! blockdev-create and its job: images that QEMU's tools take, and the steps that clients are told of.

use bulkhead_tests::images::{check, info};
use bulkhead_tests::machine::Machine;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

fn machine() -> (Machine, Qmp) {
    let arguments = format!("-m 64 -S -kernel {} -append test=spin", guest::image().display());
    let mut machine = Machine::start(&arguments);
    let qmp = machine.qmp();
    (machine, qmp)
}

/// The steps of a job up to this one.
fn steps(qmp: &mut Qmp, job: &str, last: &str) -> Vec<String> {
    let mut steps = Vec::new();
    while steps.last().is_none_or(|step| step != last) {
        let change = qmp.wait_event("JOB_STATUS_CHANGE");
        assert_eq!(change["id"], job);
        steps.push(change["status"].as_str().unwrap().to_owned());
    }
    steps
}

/// Creates, and returns the error of the job, if it has any.
fn create(qmp: &mut Qmp, options: Value) -> Option<String> {
    qmp.execute("blockdev-create", json!({"job-id": "j", "options": options}));
    let seen = steps(qmp, "j", "concluded");
    let jobs = qmp.run("query-jobs");
    let job = &jobs[0];
    assert_eq!(
        (&job["id"], &job["type"], &job["status"]),
        (&json!("j"), &json!("create"), &json!("concluded"))
    );
    assert_eq!(
        (&job["current-progress"], &job["total-progress"]),
        (&json!(1), &json!(1))
    );
    let error = job.get("error").map(|error| error.as_str().unwrap().to_owned());
    match &error {
        None => assert_eq!(seen, ["created", "running", "waiting", "pending", "concluded"]),
        Some(_) => assert_eq!(seen, ["created", "running", "aborting", "concluded"]),
    }
    qmp.execute("job-dismiss", json!({"id": "j"}));
    assert_eq!(steps(qmp, "j", "null"), ["null"]);
    assert_eq!(qmp.run("query-jobs"), json!([]));
    error
}

#[test]
fn an_image_is_created_over_a_file_that_was_created() {
    need_kvm!();
    let (machine, mut qmp) = machine();
    let path = machine.path("new.qcow2");
    let file = json!({"driver": "file", "filename": path, "size": 0});
    assert_eq!(create(&mut qmp, file), None);
    qmp.execute(
        "blockdev-add",
        json!({"driver": "file", "node-name": "f", "filename": path}),
    );
    let image = json!({"driver": "qcow2", "file": "f", "size": 48 * MIB, "cluster-size": 4096, "lazy-refcounts": true,
        "refcount-bits": 64, "backing-file": "base.img", "backing-fmt": "raw"});
    assert_eq!(create(&mut qmp, image), None);
    std::fs::write(machine.path("base.img"), "").unwrap();
    check(&path);
    let said = info(&path);
    let specific = &said["format-specific"]["data"];
    assert_eq!(
        (&said["virtual-size"], &said["cluster-size"]),
        (&json!(48 * MIB), &json!(4096))
    );
    assert_eq!(
        (&specific["lazy-refcounts"], &specific["refcount-bits"]),
        (&json!(true), &json!(64))
    );
    assert_eq!(
        (&said["backing-filename"], &said["backing-filename-format"]),
        (&json!("base.img"), &json!("raw"))
    );
    qmp.execute(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "q", "file": "f", "backing": null}),
    );
    let again = json!({"driver": "qcow2", "file": "f", "size": MIB});
    assert_eq!(create(&mut qmp, again).as_deref(), Some("Node f is in use"));
}

#[test]
fn a_file_gets_its_size_and_loses_what_it_had() {
    need_kvm!();
    let (machine, mut qmp) = machine();
    let path = machine.path("file");
    std::fs::write(&path, vec![7; 4096]).unwrap();
    let file = json!({"driver": "file", "filename": path, "size": 3 * MIB});
    assert_eq!(create(&mut qmp, file), None);
    assert!(std::fs::read(&path).unwrap() == vec![0; 3 << 20]);
}

#[test]
fn a_job_that_fails_says_why() {
    need_kvm!();
    let (machine, mut qmp) = machine();
    let file = json!({"driver": "file", "filename": machine.path("none/file"), "size": 0});
    let expected = format!(
        "Could not create '{}': No such file or directory",
        machine.path("none/file").display()
    );
    assert_eq!(create(&mut qmp, file), Some(expected));
    let nowhere = json!({"driver": "qcow2", "file": "nope", "size": MIB});
    assert_eq!(
        create(&mut qmp, nowhere).as_deref(),
        Some("Cannot find device='nope' nor node-name='nope'")
    );
    std::fs::write(machine.path("f"), "").unwrap();
    let node = json!({"driver": "file", "node-name": "f", "filename": machine.path("f")});
    qmp.execute("blockdev-add", node);
    for (members, expected) in [
        (json!({"size": 1000}), "Image size must be a multiple of 512 bytes"),
        (
            json!({"size": MIB, "cluster-size": 3000}),
            "Cluster size must be a power of two between 512 and 2048k",
        ),
        (
            json!({"size": MIB, "refcount-bits": 128}),
            "Refcount width must be a power of two and may not exceed 64 bits",
        ),
        (
            json!({"size": MIB, "backing-fmt": "raw"}),
            "Backing format cannot be used without backing file",
        ),
    ] {
        let mut image = json!({"driver": "qcow2", "file": "f"});
        let own = image.as_object_mut().unwrap();
        own.extend(members.as_object().unwrap().clone());
        assert_eq!(create(&mut qmp, image).as_deref(), Some(expected));
    }
}

#[test]
fn an_image_in_use_is_not_created_anew() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk"), vec![5; 1 << 20]).unwrap();
    let arguments = format!(
        "-m 64 -S -kernel {} -append test=spin -drive file={{dir}}/disk,if=virtio,format=raw",
        guest::image().display()
    );
    let mut machine = Machine::start_in(directory, &arguments);
    let mut qmp = machine.qmp();
    let file = json!({"driver": "file", "filename": machine.path("disk"), "size": 0});
    assert_eq!(create(&mut qmp, file).as_deref(), Some("Failed to get \"write\" lock"));
    assert!(std::fs::read(machine.path("disk")).unwrap() == vec![5; 1 << 20]);
}

#[test]
fn jobs_take_only_what_their_state_allows() {
    need_kvm!();
    let (machine, mut qmp) = machine();
    for command in ["job-cancel", "job-finalize", "job-dismiss"] {
        assert_eq!(qmp.refusal(command, json!({"id": "j"})), "Job not found");
    }
    let options = json!({"driver": "file", "filename": machine.path("f"), "size": 0});
    let new = |id: &str| json!({"job-id": id, "options": options});
    assert_eq!(qmp.refusal("blockdev-create", new("1")), "Invalid job ID '1'");
    qmp.execute("blockdev-create", new("j"));
    steps(&mut qmp, "j", "concluded");
    assert_eq!(qmp.refusal("blockdev-create", new("j")), "Job ID 'j' already in use");
    for verb in ["cancel", "finalize"] {
        assert_eq!(
            qmp.refusal(&format!("job-{verb}"), json!({"id": "j"})),
            format!("Job 'j' in state 'concluded' cannot accept command verb '{verb}'")
        );
    }
    qmp.execute("job-dismiss", json!({"id": "j"}));
}
