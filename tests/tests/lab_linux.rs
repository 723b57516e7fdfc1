//! A stock Debian kernel as the guest: what only a real operating system can prove.

use bulkhead_tests::images::{check, name, qemu_img};
use bulkhead_tests::lab::ext4::{assert_clean, cat, sha256_of_file_in};
use bulkhead_tests::lab::outer::make_ext4;
use bulkhead_tests::lab::site::local_folder;
use bulkhead_tests::lab::{Machine, MachineBuilder, Must, Site, User, harness, machine};
use serde_json::json;
use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Duration;

/// Until a guest is up. It takes 6 s in a lab on an idle machine.
const BOOT: Duration = Duration::from_secs(120);
/// For what a guest does at once.
const SOON: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let available = Site::available();
    harness::main(
        |name| match available {
            Ok(()) if name == "an_ordinary_user_runs_a_guest" => Site::has_users(),
            _ => available.clone(),
        },
        &[
            (
                "guest_with_one_vcpu_keeps_its_files_and_powers_off",
                guest_with_one_vcpu_keeps_its_files_and_powers_off,
            ),
            (
                "guest_with_four_vcpus_keeps_its_files_and_powers_off",
                guest_with_four_vcpus_keeps_its_files_and_powers_off,
            ),
            (
                "power_button_reboot_and_panic_are_reported",
                power_button_reboot_and_panic_are_reported,
            ),
            (
                "stop_halts_the_guest_and_cont_resumes_it",
                stop_halts_the_guest_and_cont_resumes_it,
            ),
            ("an_ordinary_user_runs_a_guest", an_ordinary_user_runs_a_guest),
            ("the_console_takes_many_commands", the_console_takes_many_commands),
            (
                "linux_writes_to_an_image_and_to_its_mirror",
                linux_writes_to_an_image_and_to_its_mirror,
            ),
            (
                "linux_reads_random_numbers_of_the_hosts_device",
                linux_reads_random_numbers_of_the_hosts_device,
            ),
        ],
    )
}

fn guest_with_one_vcpu_keeps_its_files_and_powers_off() {
    files_survive(1);
}

fn guest_with_four_vcpus_keeps_its_files_and_powers_off() {
    files_survive(4);
}

/// The guest boots to a shell, writes 64 MiB to ext4, reads them back and powers off; the host finds the file system
/// clean and the same bytes in it.
fn files_survive(vcpus: u32) {
    let site = site();
    let (_folder, local) = local_folder();
    let image = local.join("disk.img");
    make_ext4(&image, 256 << 20).must();
    let disk = site.path("disk.img");
    site.put(&image, &disk, 0o644).must();
    let mut machine = start(Machine::builder(&site, "files").vcpus(vcpus).disk(&disk));

    machine.expect("guest: up", BOOT).must();
    machine.expect("guest# ", SOON).must();
    assert_eq!(machine.shell("nproc", SOON).must(), vcpus.to_string());
    let interrupts = machine.shell("guest-irqs", SOON).must();
    for queue in 0..vcpus {
        let name = format!("-req.{queue}");
        assert!(
            interrupts
                .lines()
                .any(|line| line.contains("MSI") && line.contains(&name)),
            "no MSI-X vector for queue {queue}:\n{interrupts}"
        );
    }
    let report = machine.shell("guest-disk 64", Duration::from_secs(240)).must();
    assert!(report.contains("disk: same checksum"), "{report}");
    machine.console.send("guest-poweroff\n").must();

    let shutdown = machine.qmp.event("SHUTDOWN", SOON).must();
    assert_eq!(shutdown["data"]["guest"], json!(true), "{shutdown}");
    assert_eq!(shutdown["data"]["reason"], json!("guest-shutdown"), "{shutdown}");
    let end = machine.end(SOON).must();
    assert_eq!(end.status, 0, "{end:?}");

    site.get(&disk, &image).must();
    let checksum = report
        .lines()
        .find_map(|line| line.trim().strip_prefix("disk: wrote "))
        .expect("the guest names its checksum");
    assert_clean(&image);
    assert_eq!(cat(&image, "/data.sha256").trim(), checksum);
    assert_eq!(sha256_of_file_in(&image, "/data", &local), checksum);
}

fn power_button_reboot_and_panic_are_reported() {
    let site = site();

    // The power button reaches the guest as an input event, and the guest powers off by itself.
    let mut machine = start(Machine::builder(&site, "button").run("button"));
    machine.expect("button: waiting", BOOT).must();
    machine.qmp.command("system_powerdown", json!({})).must();
    machine.qmp.event("POWERDOWN", SOON).must();
    machine.expect("button: pressed", SOON).must();
    let shutdown = machine.qmp.event("SHUTDOWN", SOON).must();
    assert_eq!(shutdown["data"]["guest"], json!(true), "{shutdown}");
    assert_eq!(machine.end(SOON).must().status, 0);

    // A reboot is a RESET by the guest, and the machine comes up again.
    let mut machine = start(Machine::builder(&site, "reboot").vcpus(2));
    machine.expect("guest# ", BOOT).must();
    machine.console.send("guest-reboot\n").must();
    let reset = machine.qmp.event("RESET", SOON).must();
    assert_eq!(reset["data"]["guest"], json!(true), "{reset}");
    machine.expect("guest: up", BOOT).must();
    machine.expect("guest# ", SOON).must();
    // So is one that the monitor asks for.
    machine.qmp.command("system_reset", json!({})).must();
    let reset = machine.qmp.event("RESET", SOON).must();
    assert_eq!(reset["data"]["guest"], json!(false), "{reset}");
    machine.expect("guest: up", BOOT).must();
    machine.qmp.command("quit", json!({})).must();
    let shutdown = machine.qmp.event("SHUTDOWN", SOON).must();
    assert_eq!(shutdown["data"]["guest"], json!(false), "{shutdown}");
    assert_eq!(machine.end(SOON).must().status, 0);

    // With -no-reboot it ends instead.
    let mut machine = start(Machine::builder(&site, "no-reboot").run("reboot").option("-no-reboot"));
    let shutdown = machine.qmp.event("SHUTDOWN", BOOT).must();
    assert_eq!(shutdown["data"]["reason"], json!("guest-reset"), "{shutdown}");
    assert_eq!(machine.end(SOON).must().status, 0);

    // A panic is reported by the guest's pvpanic driver.
    let mut machine = start(Machine::builder(&site, "panic").run("panic"));
    let panicked = machine.qmp.event("GUEST_PANICKED", BOOT).must();
    assert!(panicked["data"]["action"].is_string(), "{panicked}");
    let kernel = machine.expect("Kernel panic", SOON);
    assert!(kernel.is_ok(), "{kernel:?}");
}

fn stop_halts_the_guest_and_cont_resumes_it() {
    let site = site();
    let mut machine = start(Machine::builder(&site, "stop").vcpus(2).run("count"));
    machine.expect("count 3", BOOT).must();

    machine.qmp.command("stop", json!({})).must();
    machine.qmp.event("STOP", SOON).must();
    let status = machine.qmp.command("query-status", json!({})).must();
    assert_eq!(status["running"], json!(false), "{status}");
    // Bytes that were already on their way may still arrive.
    std::thread::sleep(Duration::from_millis(500));
    let before = machine.console.transcript().len();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(machine.console.transcript().len(), before, "a stopped guest prints");

    machine.qmp.command("cont", json!({})).must();
    machine.qmp.event("RESUME", SOON).must();
    let last = machine.console.transcript().matches("count ").count();
    machine.expect(&format!("count {}", last + 5), SOON).must();
    machine.qmp.command("quit", json!({})).must();
    assert_eq!(machine.end(SOON).must().status, 0);
}

fn an_ordinary_user_runs_a_guest() {
    let site = site();
    let (_folder, local) = local_folder();
    let image = local.join("disk.img");
    make_ext4(&image, 64 << 20).must();
    let disk = site.path("disk.img");
    site.put(&image, &disk, 0o644).must();
    site.run(&format!("chown tester:tester {disk}")).ok();
    let mut machine = start(Machine::builder(&site, "user").user(User::Tester).disk(&disk));

    machine.expect("guest# ", BOOT).must();
    let report = machine.shell("guest-disk 4", SOON).must();
    assert!(report.contains("disk: same checksum"), "{report}");
    let helpers = helpers(&site);
    assert_eq!(
        helpers.len(),
        4,
        "a qmp-proc for the client, its spare, vcpu-proc, block-proc: {helpers:#?}"
    );
    for helper in &helpers {
        assert_eq!(
            helper.rest, "NoNewPrivs 1, Seccomp 2, CapEff 0, CapBnd 0, root empty",
            "{}",
            helper.name
        );
        assert!(
            (100_000..165_536).contains(&helper.uid),
            "{} has uid {}",
            helper.name,
            helper.uid
        );
    }
    let uids: BTreeSet<u32> = helpers.iter().map(|helper| helper.uid).collect();
    assert_eq!(uids.len(), helpers.len(), "two helpers share a uid: {helpers:#?}");
    machine.console.send("guest-poweroff\n").must();

    machine.qmp.event("SHUTDOWN", SOON).must();
    assert_eq!(machine.end(SOON).must().status, 0);
}

/// A helper process, as the /proc of the system that runs it shows it.
#[derive(Debug)]
struct Helper {
    name: String,
    uid: u32,
    rest: String,
}

fn helpers(site: &Site) -> Vec<Helper> {
    let script = r#"
        for process in /proc/[0-9]*; do
            program=$(readlink "$process/exe") || continue
            case $program in */*-proc) ;; *) continue ;; esac
            root=$(ls -A "$process/root" | wc -l)
            [ "$root" = 0 ] && root=empty
            # One line for all threads; where they differ there are several.
            for task in "$process"/task/*; do
                awk -v program="${program##*/}" -v root="$root" '
                    { value[$1] = $2 }
                    function number(name) { sub("^0+", "", value[name]); return value[name] == "" ? 0 : value[name] }
                    END { printf "%s %s NoNewPrivs %s, Seccomp %s, CapEff %s, CapBnd %s, root %s\n", program, value["Uid:"],
                        number("NoNewPrivs:"), number("Seccomp:"), number("CapEff:"), number("CapBnd:"), root }
                ' "$task/status"
            done | sort -u
        done"#;
    site.run(script)
        .ok()
        .lines()
        .map(|line| {
            let mut parts = line.splitn(3, ' ');
            let mut next = || parts.next().expect("three parts").to_owned();
            Helper {
                name: next(),
                uid: next().parse().expect("a uid"),
                rest: next(),
            }
        })
        .collect()
}

/// Typed commands and their output, many times: each byte is an interrupt or two.
fn the_console_takes_many_commands() {
    let site = site();
    let machine = start(Machine::builder(&site, "console"));
    machine.expect("guest# ", BOOT).must();
    for round in 0..40 {
        let lines = machine.shell("dmesg | grep -c .", SOON).must();
        assert!(
            lines.parse::<u32>().is_ok_and(|lines| lines > 100),
            "round {round}: {lines}"
        );
        assert_eq!(
            machine.shell(&format!("echo $(({round} * 3))"), SOON).must(),
            (round * 3).to_string()
        );
    }
}

/// rng-random on the host's own generator, and on its pool; the guest's driver reads either as /dev/hwrng.
fn linux_reads_random_numbers_of_the_hosts_device() {
    let site = site();
    // Not every machine has a generator; the lab does.
    let has_generator = matches!(site, Site::Lab(_)) || site.run("head -c 1 /dev/hwrng >/dev/null").status == 0;
    let mut sources = vec!["/dev/urandom"];
    if has_generator {
        sources.push("/dev/hwrng");
    }
    for (index, source) in sources.into_iter().enumerate() {
        let options = format!(
            "-object rng-random,filename={source},id=rng0 -device virtio-rng-pci,rng=rng0,id=hwrng0,max-bytes=1024,period=1000"
        );
        let mut machine = start(Machine::builder(&site, &format!("rng{index}")).option(&options));
        machine.expect("guest# ", BOOT).must();
        let current = machine.shell("cat /sys/class/misc/hw_random/rng_current", SOON).must();
        assert!(current.starts_with("virtio_rng"), "{source}: {current}");
        let read = || -> BTreeSet<String> {
            let command =
                "dd if=/dev/hwrng bs=64 count=4 iflag=fullblock 2>/dev/null | hexdump -ve '16/1 \"%02x\" \"\\n\"'";
            machine
                .shell(command, SOON)
                .must()
                .lines()
                .map(|line| line.trim().to_owned())
                .collect()
        };
        let (first, second) = (read(), read());
        // 256 bytes in lines of 16, no line like another.
        assert!(first.iter().chain(&second).all(|line| line.len() == 32), "{first:?}");
        assert_eq!((first.len(), second.len()), (16, 16), "{source}: {first:?} {second:?}");
        assert!(first.is_disjoint(&second), "{source}: {first:?} {second:?}");
        machine.qmp.command("quit", json!({})).must();
        assert_eq!(machine.end(SOON).must().status, 0);
    }
}

/// Linux writes to a qcow2 image under which a backup is made, and to a raw mirror of it: the image is whole, the mirror is the
/// same, and the backup opens as a file system.
fn linux_writes_to_an_image_and_to_its_mirror() {
    let site = site();
    let (_folder, local) = local_folder();
    let (raw, image) = (local.join("disk.img"), local.join("disk.qcow2"));
    make_ext4(&raw, 256 << 20).must();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", name(&raw), name(&image)]);
    let [disk, mirror, backup] = ["disk.qcow2", "mirror.img", "backup.qcow2"].map(|name| site.path(name));
    site.put(&image, &disk, 0o644).must();
    let drive = format!("-drive file={disk},if=virtio,format=qcow2,id=d");
    let mut machine = start(Machine::builder(&site, "image").option(&drive));
    machine.expect("guest: up", BOOT).must();
    machine.expect("guest# ", SOON).must();
    let qmp = &mut machine.qmp;
    let arguments = json!({"device": "d", "job-id": "mirror", "target": mirror, "format": "raw", "sync": "full",
                           "copy-mode": "write-blocking"});
    qmp.command("drive-mirror", arguments).must();
    qmp.event("BLOCK_JOB_READY", SOON).must();
    let report = machine.shell("guest-disk 64", Duration::from_secs(240)).must();
    assert!(report.contains("disk: same checksum"), "{report}");
    let qmp = &mut machine.qmp;
    qmp.command("stop", json!({})).must();
    // The mirror ends as a copy of this moment.
    qmp.command("block-job-cancel", json!({"device": "mirror"})).must();
    qmp.event("BLOCK_JOB_COMPLETED", SOON).must();
    let arguments = json!({"device": "d", "job-id": "backup", "target": backup, "format": "qcow2", "sync": "full"});
    qmp.command("drive-backup", arguments).must();
    qmp.event("BLOCK_JOB_COMPLETED", SOON).must();
    qmp.command("quit", json!({})).must();
    assert_eq!(machine.end(SOON).must().status, 0);
    let copy = local.join("backup.qcow2");
    for (from, to) in [(&disk, &image), (&mirror, &raw), (&backup, &copy)] {
        site.get(from, to).must();
    }
    for image in [&image, &copy] {
        check(image);
        qemu_img(&["compare", "-f", "qcow2", "-F", "raw", name(image), name(&raw)]);
    }
    let checksum = report
        .lines()
        .find_map(|line| line.trim().strip_prefix("disk: wrote "))
        .expect("the guest names its checksum");
    assert_eq!(cat(&raw, "/data.sha256").trim(), checksum);
    assert_eq!(sha256_of_file_in(&raw, "/data", &local), checksum);
}

fn site() -> Site {
    Site::start_with(machine::hypervisor).must()
}

fn start(builder: MachineBuilder<'_>) -> Machine<'_> {
    builder.start().must()
}
