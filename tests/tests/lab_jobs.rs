//! A stock Debian kernel writes to its disk all the while that jobs move the disk from image to image and copy it: what it
//! wrote is what it logged, and each copy is the disk of its moment.

use bulkhead_tests::images::{name, qemu_img};
use bulkhead_tests::lab::ext4::{assert_clean, sha256_of_file_in};
use bulkhead_tests::lab::outer::make_ext4;
use bulkhead_tests::lab::site::local_folder;
use bulkhead_tests::lab::{Machine, Must, Qmp, Site, harness, machine};
use serde_json::{Value, json};
use std::process::ExitCode;
use std::time::Duration;

/// Until a guest is up. It takes 6 s in a lab on an idle machine.
const BOOT: Duration = Duration::from_secs(120);
/// For what a guest or a job does at once.
const SOON: Duration = Duration::from_secs(120);
/// How many files the guest writes between two steps, and while a job is ready.
const FILES: u32 = 8;

fn main() -> ExitCode {
    let available = Site::available();
    harness::main(
        |_| available.clone(),
        &[(
            "linux_writes_while_its_disk_is_committed_mirrored_and_backed_up",
            linux_writes_while_its_disk_is_committed_mirrored_and_backed_up,
        )],
    )
}

/// A guest that writes all the time.
struct Churn<'site> {
    machine: Machine<'site>,
}

impl Churn<'_> {
    /// Lets it write some more.
    fn go_on(&self) {
        let said = self
            .machine
            .shell(&format!("guest-churn wait {FILES}"), Duration::from_secs(240));
        let said = said.must();
        assert!(said.contains("churn: ") && said.ends_with("files"), "{said}");
    }

    fn command(&mut self, command: &str, arguments: Value) {
        self.machine.qmp.command(command, arguments).must();
    }

    /// Waits until a job is over; it must have succeeded.
    fn completed(&mut self, job: &str) {
        completed(&mut self.machine.qmp, job);
    }

    /// Waits until a job has caught up with the guest, and has the disk move.
    fn moved(&mut self, job: &str) {
        let ready = self.machine.qmp.event("BLOCK_JOB_READY", SOON).must();
        assert_eq!(ready["data"]["device"], job, "{ready}");
        self.go_on();
        self.command("block-job-complete", json!({"device": job}));
        self.completed(job);
    }
}

fn completed(qmp: &mut Qmp, job: &str) {
    let event = qmp.event("BLOCK_JOB_COMPLETED", SOON).must();
    assert_eq!(event["data"]["device"], job, "{event}");
    assert!(event["data"].get("error").is_none(), "{event}");
}

/// The backups: the first is whole, each other one holds what changed since the one before.
const BACKUPS: [&str; 4] = ["full", "inc1", "inc2", "inc3"];
/// Where the disk has been, and where it ends.
const CHAIN: [&str; 4] = ["disk", "s1", "s2", "mirror"];
const DISK_BYTES: u64 = 256 << 20;

fn linux_writes_while_its_disk_is_committed_mirrored_and_backed_up() {
    let site = Site::start_with(machine::hypervisor).must();
    let (_folder, local) = local_folder();
    let (raw, image) = (local.join("raw"), local.join("disk"));
    make_ext4(&raw, DISK_BYTES).must();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", name(&raw), name(&image)]);
    site.put(&image, &site.path("disk"), 0o644).must();
    // The images for what changed name the backup before them.
    for pair in BACKUPS.windows(2) {
        let image = local.join(pair[1]);
        let size = DISK_BYTES.to_string();
        let below = ["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", pair[0]];
        qemu_img(&[&below[..], &[name(&image), &size]].concat());
        site.put(&image, &site.path(pair[1]), 0o644).must();
    }
    let drive = format!("-drive file={},if=virtio,format=qcow2,id=d", site.path("disk"));
    let machine = Machine::builder(&site, "jobs").vcpus(2).option(&drive).start().must();
    machine.expect("guest: up", BOOT).must();
    machine.expect("guest# ", SOON).must();
    machine.shell("guest-churn start", SOON).must();
    let mut guest = Churn { machine };

    guest.go_on();
    for overlay in ["s1", "s2"] {
        guest.command(
            "blockdev-snapshot-sync",
            json!({"device": "d", "snapshot-file": site.path(overlay)}),
        );
        guest.go_on();
    }
    let middle = json!({"device": "d", "job-id": "middle", "top": site.path("s1"), "base": site.path("disk")});
    guest.command("block-commit", middle);
    guest.completed("middle");
    guest.go_on();
    guest.command("block-commit", json!({"device": "d", "job-id": "active"}));
    guest.moved("active");
    let mirror = json!({"device": "d", "job-id": "mirror", "target": site.path("mirror"), "format": "qcow2",
                        "sync": "full"});
    guest.command("drive-mirror", mirror);
    guest.moved("mirror");

    for backup in BACKUPS {
        guest.go_on();
        let mut copy = json!({"device": "d", "job-id": backup, "target": site.path(backup), "format": "qcow2"});
        let mut actions = Vec::new();
        if backup == "full" {
            copy["sync"] = json!("full");
            let bitmap = json!({"node": "d", "name": "changes", "persistent": true});
            actions.push(json!({"type": "block-dirty-bitmap-add", "data": bitmap}));
        } else {
            copy["sync"] = json!("incremental");
            copy["bitmap"] = json!("changes");
            copy["mode"] = json!("existing");
        }
        // The snapshot says what the backup must be: it is of the same moment and made in another way.
        let moment = json!({"device": "d", "name": backup});
        actions.push(json!({"type": "blockdev-snapshot-internal-sync", "data": moment}));
        actions.push(json!({"type": "drive-backup", "data": copy}));
        guest.command("transaction", json!({ "actions": actions }));
        guest.completed(backup);
    }
    guest.go_on();

    let report = guest.machine.shell("guest-churn end", SOON).must();
    assert!(report.contains("all as logged"), "{report}");
    let sums: Vec<(&str, &str)> = report
        .lines()
        .filter_map(|line| line.trim().strip_prefix("churn: ")?.split_once(' '))
        .filter(|(_, sum)| sum.len() == 64)
        .collect();
    assert_eq!(sums.len(), 24, "{report}");
    let mut machine = guest.machine;
    machine.console.send("guest-poweroff\n").must();
    machine.qmp.event("SHUTDOWN", SOON).must();
    assert_eq!(machine.end(SOON).must().status, 0);

    for image in CHAIN.iter().chain(&BACKUPS) {
        let copy = local.join(image);
        site.get(&site.path(image), &copy).must();
        // By itself: what is below it may have another name here.
        let alone = json!({"driver": "qcow2", "file": {"driver": "file", "filename": copy}, "backing": null});
        qemu_img(&["check", "-q", &format!("json:{alone}")]);
    }
    let disk = local.join("mirror");
    for backup in BACKUPS {
        let snapshot = format!("snapshot.name={backup}");
        qemu_img(&["convert", "-l", &snapshot, "-O", "raw", name(&disk), name(&raw)]);
        let copy = local.join(backup);
        qemu_img(&["compare", "-f", "raw", "-F", "qcow2", name(&raw), name(&copy)]);
    }
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", name(&disk), name(&raw)]);
    assert_clean(&raw);
    for (file, sum) in sums {
        assert_eq!(sha256_of_file_in(&raw, &format!("/{file}"), &local), sum, "file {file}");
    }
}
