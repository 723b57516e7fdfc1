//! Encrypted images on the whole machine: the key comes from a secret object, and what the guest writes is what QEMU's tools
//! read with the same password.

use bulkhead_tests::machine::{Machine, refused};
use bulkhead_tests::{guest, need_kvm};
use std::path::Path;
use std::process::Command;

const PASSWORD: &str = "letmein";

/// Says so when it could not measure how fast it is, which happens on a busy machine: then it is asked again.
fn qemu_img(arguments: &[&str]) {
    let mut tries = 0;
    loop {
        let output = Command::new("qemu-img")
            .args(arguments)
            .output()
            .expect("qemu-img: `make packages` installs qemu-utils");
        let said = String::from_utf8_lossy(&output.stderr);
        tries += 1;
        if !said.contains("Unable to get accurate CPU usage") || tries > 50 {
            assert!(output.status.success(), "qemu-img {arguments:?}: {output:?}");
            return;
        }
    }
}

fn secret() -> String {
    format!("secret,id=key,data={PASSWORD}")
}

/// An image of 16 MiB and the options that open it.
fn image(directory: &Path, kind: &str) -> (String, String, String) {
    let file = directory.join(kind).display().to_string();
    let (create, options, drive) = match kind {
        "luks" => (
            vec!["-f", "luks", "-o", "key-secret=key,iter-time=10"],
            format!("driver=luks,key-secret=key,file.filename={file}"),
            format!("driver=luks,key-secret=key,file.driver=file,file.filename={file}"),
        ),
        format => (
            vec!["-f", "qcow2", "-o"],
            format!("driver=qcow2,encrypt.key-secret=key,file.filename={file}"),
            format!(
                "driver=qcow2,encrypt.format={format},encrypt.key-secret=key,file.driver=file,file.filename={file}"
            ),
        ),
    };
    let of_qcow2 = match kind {
        "aes" => "encrypt.format=aes,encrypt.key-secret=key".to_owned(),
        _ => "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10".to_owned(),
    };
    let mut arguments = vec!["create", "-q", "--object"];
    let secret = secret();
    arguments.push(&secret);
    arguments.extend(create);
    if kind != "luks" {
        arguments.push(&of_qcow2);
    }
    arguments.extend([file.as_str(), "16M"]);
    qemu_img(&arguments);
    (file, options, drive)
}

#[test]
fn the_guest_and_qemu_read_what_the_other_wrote() {
    need_kvm!();
    for kind in ["luks", "qcow2", "aes"] {
        let images = tempfile::tempdir().unwrap();
        let (_, options, drive) = image(images.path(), kind);
        let drive = drive.replace("encrypt.format=qcow2", "encrypt.format=luks");
        let arguments = format!(
            "-m 256 -kernel {} -object {} -drive if=virtio,id=d,num-queues=1,{drive}",
            guest::image().display(),
            secret()
        );
        let append = "test=blk-verify mib=8 seed=7 queues=1";
        let mut machine = Machine::start_with(tempfile::tempdir().unwrap(), &arguments, &["-append", append]);
        let status = machine.wait();
        let (serial, log) = (machine.serial(), machine.log());
        assert_eq!(
            guest::value(&serial, "done", "failures"),
            Some("0"),
            "{kind}: {serial}\n{log}"
        );
        assert!(status.success(), "{kind}: {log}");
        let raw = images.path().join("raw").display().to_string();
        qemu_img(&[
            "convert",
            "--object",
            &secret(),
            "--image-opts",
            &options,
            "-O",
            "raw",
            &raw,
        ]);
        let data = std::fs::read(&raw).unwrap();
        assert_eq!(data.len(), 16 << 20, "{kind}");
        assert_eq!(
            guest::checksum(&data[..8 << 20]),
            guest::pattern_checksum(8, 7),
            "{kind}"
        );
    }
}

#[test]
fn without_the_right_key_nothing_starts() {
    need_kvm!();
    let images = tempfile::tempdir().unwrap();
    let (file, _, drive) = image(images.path(), "luks");
    let kernel = guest::image().display().to_string();
    let start = |secret: &str, drive: &str| {
        let drive = format!("if=virtio,{drive}");
        let arguments = ["-nodefaults", "-kernel", &kernel, "-object", secret, "-drive", &drive];
        refused(images.path(), &arguments)
    };
    let text = start("secret,id=key,data=wrong", &drive);
    assert!(
        text.contains("Invalid password, cannot unlock any keyslot") && text.contains(&file),
        "{text}"
    );
    let text = start(&secret(), &drive.replace("key-secret=key", "key-secret=other"));
    assert!(text.contains("No secret with id 'other'"), "{text}");
    let text = start(&secret(), &drive.replace("key-secret=key,", ""));
    assert!(text.contains("Parameter 'key-secret' is required for cipher"), "{text}");
}
