//! qcow2 images on the whole machine: what the guest writes is what QEMU's tools read.

use bulkhead_tests::machine::{Machine, wait_until};
use bulkhead_tests::{guest, need_kvm};
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

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Writes 64 MiB through four queues, in the guest; then the host looks.
#[track_caller]
fn write_and_compare(create: &[&str], drive: &str) {
    let directory = tempfile::tempdir().unwrap();
    // Beside the machine's directory, which goes with it.
    let images = tempfile::tempdir().unwrap();
    let image = images.path().join("disk.qcow2");
    qemu_img(&[&["create", "-q", "-f", "qcow2"], create, &[name(&image), "80M"]].concat());
    let arguments = format!(
        "-m 256 -smp 4 -kernel {} -drive file={},if=virtio,format=qcow2,id=d,num-queues=4,{drive}",
        guest::image().display(),
        image.display()
    );
    let append = "test=blk test=blk-verify mib=64 seed=42 queues=4";
    let mut machine = Machine::start_with(directory, &arguments, &["-append", append]);
    let status = machine.wait();
    let (serial, log) = (machine.serial(), machine.log());
    assert_eq!(guest::value(&serial, "done", "failures"), Some("0"), "{serial}\n{log}");
    assert_eq!(status.code(), Some(0), "{log}");
    drop(machine);
    qemu_img(&["check", "-q", "-f", "qcow2", name(&image)]);
    let raw = images.path().join("disk.raw");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", name(&image), name(&raw)]);
    let data = std::fs::read(&raw).unwrap();
    assert_eq!(data.len(), 80 << 20);
    assert_eq!(guest::checksum(&data[..64 << 20]), guest::pattern_checksum(64, 42));
}

#[test]
fn what_the_guest_wrote_is_in_the_image() {
    need_kvm!();
    write_and_compare(&[], "discard=unmap,aio=io_uring");
    write_and_compare(&["-o", "cluster_size=4096,refcount_bits=1"], "aio=threads");
    write_and_compare(&["-o", "compat=0.10"], "cache.direct=on,discard=unmap");
    write_and_compare(&["-o", "extended_l2=on,cluster_size=2M"], "cache=writethrough");
}

/// The guest sees the size that the image says, not the file's; and what QEMU wrote, compressed.
#[test]
fn a_compressed_read_only_image_reads() {
    need_kvm!();
    for compression in ["zlib", "zstd"] {
        let images = tempfile::tempdir().unwrap();
        let (raw, image) = (images.path().join("raw"), images.path().join("qcow2"));
        std::fs::write(&raw, vec![0x5a; 16 << 20]).unwrap();
        let kind = format!("compression_type={compression}");
        qemu_img(&["convert", "-c", "-O", "qcow2", "-o", &kind, name(&raw), name(&image)]);
        let before = std::fs::read(&image).unwrap();
        let arguments = format!(
            "-m 256 -kernel {} -drive file={},if=virtio,format=qcow2,readonly=on",
            guest::image().display(),
            image.display()
        );
        let mut machine = Machine::start_with(tempfile::tempdir().unwrap(), &arguments, &["-append", "test=blk"]);
        machine.wait();
        let serial = machine.serial();
        assert_eq!(guest::value(&serial, "done", "failures"), Some("0"), "{serial}");
        assert_eq!(guest::value(&serial, "blk", "ro"), Some("1"), "{serial}");
        assert_eq!(guest::value(&serial, "blk", "sectors"), Some("32768"), "{serial}");
        assert_eq!(std::fs::read(&image).unwrap(), before);
    }
}

/// Everything dies in the middle of writing, twenty times: clusters may be lost, nothing else.
#[test]
fn a_killed_machine_leaves_a_sound_image() {
    need_kvm!();
    for round in 0..20_u64 {
        let images = tempfile::tempdir().unwrap();
        let image = images.path().join("disk.qcow2");
        let options = ["cluster_size=512", "cluster_size=4096", "cluster_size=65536"][round as usize % 3];
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name(&image), "80M"]);
        let arguments = format!(
            "-m 256 -smp 2 -kernel {} -drive file={},if=virtio,format=qcow2,num-queues=2,discard=unmap",
            guest::image().display(),
            image.display()
        );
        let append = "test=blk-verify mib=64 seed=3 queues=2";
        let machine = Machine::start_with(tempfile::tempdir().unwrap(), &arguments, &["-append", append]);
        let enough = (1 << 20) + (round * 2_654_435_761) % (40 << 20);
        wait_until("the guest writes", || std::fs::metadata(&image).unwrap().len() > enough);
        drop(machine);
        // The helpers end a moment later, and their locks with them: until then qemu-img fails with 1.
        let mut code = None;
        let mut said = String::new();
        wait_until("the image is free", || {
            let output = Command::new("qemu-img")
                .args(["check", "-f", "qcow2", name(&image)])
                .output()
                .unwrap();
            code = output.status.code();
            said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            code != Some(1)
        });
        assert!(matches!(code, Some(0 | 3)), "round {round}: {code:?} {said}");
    }
}

/// Three images: the guest reads through them, and writes to the top one only.
#[test]
fn a_chain_below_an_allowed_directory_is_opened() {
    need_kvm!();
    let images = tempfile::tempdir().unwrap();
    let at = |name: &str| images.path().join(name);
    std::fs::create_dir(at("bases")).unwrap();
    std::fs::write(at("bases/base"), vec![0x5a; 30 << 20]).unwrap();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base",
        "-F",
        "raw",
        name(&at("bases/middle")),
    ]);
    let top = at("top");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "bases/middle",
        "-F",
        "qcow2",
        name(&top),
        "80M",
    ]);
    let below = || {
        (
            std::fs::read(at("bases/base")).unwrap(),
            std::fs::read(at("bases/middle")).unwrap(),
        )
    };
    let before = below();
    let arguments = format!(
        "-m 256 -smp 2 -kernel {} -allow-path {} -drive file={},if=virtio,format=qcow2,num-queues=2,discard=unmap",
        guest::image().display(),
        at("bases").display(),
        top.display()
    );
    let append = "test=blk test=blk-verify mib=8 seed=7 queues=2";
    let mut machine = Machine::start_with(tempfile::tempdir().unwrap(), &arguments, &["-append", append]);
    machine.wait();
    let (serial, log) = (machine.serial(), machine.log());
    assert_eq!(guest::value(&serial, "done", "failures"), Some("0"), "{serial}\n{log}");
    assert!(below() == before);
    qemu_img(&["check", "-q", "-f", "qcow2", name(&top)]);
    qemu_img(&["convert", "-O", "raw", name(&top), name(&at("raw"))]);
    let data = std::fs::read(at("raw")).unwrap();
    assert_eq!(guest::checksum(&data[..8 << 20]), guest::pattern_checksum(8, 7));
    assert!(data[20 << 20..30 << 20].iter().all(|byte| *byte == 0x5a));
}

/// An image that is its own base, over another.
#[test]
fn a_cycle_of_images_is_refused() {
    need_kvm!();
    let images = tempfile::tempdir().unwrap();
    let (one, two) = (images.path().join("one"), images.path().join("two"));
    for (image, base) in [(&one, "two"), (&two, "one")] {
        qemu_img(&[
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-b",
            base,
            "-F",
            "qcow2",
            name(image),
            "1M",
        ]);
    }
    let allowed = format!("-allow-path {}", images.path().display());
    refused_with(&one, "in the chain of images already", &allowed, "");
    refused_with(&one, "in the chain of images already", &allowed, ",readonly=on");
}

/// A name inside an image is the image's word only: nothing is opened for it.
#[test]
fn an_image_with_a_backing_file_elsewhere_is_refused() {
    need_kvm!();
    let images = tempfile::tempdir().unwrap();
    let image = images.path().join("overlay");
    qemu_img(&[
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "/etc/shadow",
        "-F",
        "raw",
        name(&image),
        "1M",
    ]);
    refused(&image, "the backing file \"/etc/shadow\"");
    refused(&image, "-allow-path /etc would allow it");
    // The backing format's header extension becomes one that nobody knows.
    let mut bytes = std::fs::read(&image).unwrap();
    let at = bytes
        .windows(4)
        .position(|four| four == [0xe2, 0x79, 0x2a, 0xca])
        .unwrap();
    bytes[at] = 0x11;
    std::fs::write(&image, bytes).unwrap();
    refused(&image, "does not say which format");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    refused(&image, "not in qcow2 format");
}

#[track_caller]
fn refused(image: &Path, why: &str) {
    refused_with(image, why, "", "");
}

#[track_caller]
fn refused_with(image: &Path, why: &str, options: &str, drive: &str) {
    let arguments = format!(
        "-m 128 -kernel {} {options} -drive file={},if=virtio,format=qcow2{drive}",
        guest::image().display(),
        image.display()
    );
    let mut machine = Machine::start_with(tempfile::tempdir().unwrap(), &arguments, &["-append", "test=hello"]);
    let status = machine.wait();
    let log = machine.log();
    assert_ne!(status.code(), Some(0), "{log}");
    assert!(log.contains(why) && log.contains(name(image)), "{log}");
}
