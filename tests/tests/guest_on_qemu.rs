//! The test guest on QEMU's software emulation: proves the guest itself, on a monitor that is not ours.

use bulkhead_tests::guest;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";
/// How long one run may take; emulation on a busy machine is slow.
const DEADLINE: Duration = Duration::from_secs(180);

/// Whether QEMU is there; says so when it is not.
fn qemu_is_missing() -> bool {
    let found = Command::new(QEMU)
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok();
    if !found {
        eprintln!("skipped: {QEMU} is not installed");
    }
    !found
}

/// Runs the guest; returns what it wrote to its serial port and QEMU's exit code.
fn run(command_line: &str, arguments: &[&str]) -> (String, Option<i32>) {
    let mut qemu = Command::new(QEMU)
        .args(["-M", "q35", "-accel", "tcg", "-m", "256", "-nodefaults", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio", "-kernel"])
        .arg(guest::image())
        .args(["-append", command_line])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("starting QEMU");
    let mut output = qemu.stdout.take().expect("piped");
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = output.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let start = Instant::now();
    let status = loop {
        if let Some(status) = qemu.try_wait().expect("waiting for QEMU") {
            break Some(status);
        }
        if start.elapsed() > DEADLINE {
            let _ = qemu.kill();
            let _ = qemu.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let serial = reader.join().expect("reader");
    assert!(status.is_some(), "the guest did not end in time; it said:\n{serial}");
    (serial, status.and_then(|status| status.code()))
}

#[track_caller]
fn assert_all_ok(serial: &str) {
    assert_eq!(
        guest::value(serial, "done", "failures"),
        Some("0"),
        "the guest said:\n{serial}"
    );
}

/// An empty disk image and the options that give it to the guest with four queues.
fn disk(path: &Path, mib: u64, options: &str) -> [String; 4] {
    let file = std::fs::File::create(path).expect("creating the disk");
    file.set_len(mib << 20).expect("sizing the disk");
    [
        "-drive".into(),
        format!("if=none,id=d,format=raw,discard=unmap,file={}{options}", path.display()),
        "-device".into(),
        "virtio-blk-pci,disable-legacy=on,drive=d,num-queues=4".into(),
    ]
}

#[test]
fn guest_boots_and_powers_off() {
    if qemu_is_missing() {
        return;
    }
    let (serial, code) = run("test=hello test=acpi test=pci test=rtc test=clock", &[]);
    assert_all_ok(&serial);
    assert!(guest::report(&serial).contains(&"ok hello"), "{serial}");
    assert_eq!(code, Some(0));
}

#[test]
fn fw_cfg_takes_a_note_by_its_ports_and_by_descriptors() {
    if qemu_is_missing() {
        return;
    }
    let (serial, _) = run("test=fwcfg", &["-device", "vmcoreinfo"]);
    assert_all_ok(&serial);
}

#[test]
fn pattern_written_through_four_queues_is_in_the_image() {
    if qemu_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().expect("temporary folder");
    let image = folder.path().join("disk.raw");
    let options = disk(&image, 32, "");
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let (serial, _) = run(
        "test=blk-verify mib=16 seed=42 queues=4 test=blk test=pci-move",
        &options,
    );
    assert_all_ok(&serial);
    assert_eq!(guest::value(&serial, "blk-verify", "queues"), Some("4"), "{serial}");
    let expected = format!("{:#018x}", guest::pattern_checksum(16, 42));
    assert_eq!(
        guest::value(&serial, "blk-verify", "checksum"),
        Some(&*expected),
        "{serial}"
    );
    // `blk` has overwritten the first 8 MiB since.
    let data = std::fs::read(&image).expect("reading the disk");
    for place in (8 << 20..16 << 20).step_by(8) {
        let word = u64::from_le_bytes(data[place..place + 8].try_into().expect("8 bytes"));
        assert_eq!(word, guest::pattern_word(42, place as u64 / 8), "at {place:#x}");
    }
}

#[test]
fn read_only_disk_refuses_writes() {
    if qemu_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().expect("temporary folder");
    let options = disk(&folder.path().join("disk.raw"), 16, ",readonly=on");
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let (serial, _) = run("test=blk", &options);
    assert_all_ok(&serial);
    assert_eq!(guest::value(&serial, "blk", "ro"), Some("1"), "{serial}");
}

#[test]
fn log_records_that_were_reported_durable_are_in_the_image() {
    if qemu_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().expect("temporary folder");
    let image = folder.path().join("disk.raw");
    let options = disk(&image, 16, "");
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let (serial, _) = run("test=blk-log start=16 sectors=64 count=96", &options);
    assert_all_ok(&serial);
    assert!(guest::report(&serial).contains(&"blk-log durable=96"), "{serial}");
    let data = std::fs::read(&image).expect("reading the disk");
    let records: Vec<_> = data[16 * 512..80 * 512]
        .chunks(guest::RECORD_BYTES)
        .map(guest::record_number)
        .collect();
    let expected: Vec<_> = (64..96).chain(32..64).map(Some).collect();
    assert_eq!(records, expected);
}

#[test]
fn rule_breaking_driver_is_survived() {
    if qemu_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().expect("temporary folder");
    let options = disk(&folder.path().join("disk.raw"), 16, "");
    let mut options: Vec<&str> = options.iter().map(String::as_str).collect();
    options.extend(["-device", "virtio-rng-pci,disable-legacy=on"]);
    let (serial, _) = run(
        "test=blk-evil test=msix test=rng test=rng-fill bytes=1000 buffer=100",
        &options,
    );
    assert_all_ok(&serial);
    assert_eq!(
        guest::value(&serial, "blk-evil", "result"),
        Some("needs-reset"),
        "{serial}"
    );
}

#[test]
fn benchmark_counts_every_request() {
    if qemu_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().expect("temporary folder");
    let options = disk(&folder.path().join("disk.raw"), 16, "");
    let mut options: Vec<&str> = options.iter().map(String::as_str).collect();
    options.extend(["-smp", "2"]);
    let (serial, _) = run("test=bench rw=randrw qd=16 queues=2 cpus=2 ops=3000", &options);
    assert_all_ok(&serial);
    assert_eq!(guest::value(&serial, "bench", "bytes"), Some("12288000"), "{serial}");
    let counted: u64 = guest::report(&serial)
        .iter()
        .filter(|line| line.starts_with("bench-histogram "))
        .map(|line| line.rsplit('=').next().unwrap_or("").parse::<u64>().expect("count"))
        .sum();
    assert_eq!(counted, 3000);
}

#[test]
fn four_processors_work_at_once() {
    if qemu_is_missing() {
        return;
    }
    let (serial, _) = run("test=smp cpus=4", &["-smp", "4"]);
    assert_all_ok(&serial);
    assert_eq!(guest::value(&serial, "smp", "cpus"), Some("4"), "{serial}");
}

#[test]
fn every_way_to_reset_ends_the_machine() {
    if qemu_is_missing() {
        return;
    }
    for how in ["i8042", "acpi", "triple"] {
        let (serial, code) = run(&format!("test=reset how={how}"), &[]);
        assert_eq!(guest::report(&serial), [format!("reset how={how}")]);
        assert_eq!(code, Some(0));
    }
}

#[test]
fn flat_image_starts_with_its_header() {
    let flat = std::fs::read(guest::flat_image()).expect("reading the flat guest");
    assert!(flat.starts_with(guest::FLAT_MAGIC));
    assert_eq!(flat[8..16], 0x10_0000_u64.to_le_bytes());
    assert_eq!(flat.len() % 4096, 0);
}
