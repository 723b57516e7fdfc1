//! Encrypted images on the whole machine: the key comes from a secret object, and what the guest writes is what QEMU's tools
//! read with the same password.

use bulkhead_tests::machine::{Machine, refused};
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};
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

/// An image of one of qcow2's two encryptions, 16 MiB.
fn qcow2(directory: &Path, format: &str) -> String {
    let file = directory.join(format).display().to_string();
    let mut options = format!("encrypt.format={format},encrypt.key-secret=key");
    if format == "luks" {
        options.push_str(",encrypt.iter-time=10");
    }
    qemu_img(&[
        "create",
        "-q",
        "--object",
        &secret(),
        "-f",
        "qcow2",
        "-o",
        &options,
        &file,
        "16M",
    ]);
    file
}

fn passwd(qmp: &mut Qmp, drive: Value, password: &str) -> Result<Value, Value> {
    let mut arguments = drive;
    arguments["password"] = json!(password);
    qmp.try_execute("block_passwd", arguments)
}

/// QMP 2.0's way: the machine waits with its disk locked until the password is there.
#[test]
fn a_drive_without_its_key_is_locked_until_block_passwd() {
    need_kvm!();
    for format in ["luks", "aes"] {
        let images = tempfile::tempdir().unwrap();
        let file = qcow2(images.path(), format);
        let arguments = format!(
            "-m 256 -kernel {} -drive if=virtio,id=d,num-queues=1,format=qcow2,file={file}",
            guest::image().display()
        );
        let append = "test=blk-verify mib=8 seed=7 queues=1";
        let mut machine = Machine::start_with(tempfile::tempdir().unwrap(), &arguments, &["-append", append]);
        let mut qmp = machine.qmp();
        assert_eq!(qmp.run("query-status")["status"], "prelaunch");
        let shown = &qmp.run("query-block")[0]["inserted"];
        assert_eq!(
            (&shown["encrypted"], &shown["encryption_key_missing"]),
            (&json!(true), &json!(true))
        );
        let refusal = qmp.try_execute("cont", json!({})).unwrap_err();
        assert_eq!(
            refusal,
            json!({"class": "DeviceEncrypted", "desc": format!("'d' ({file}) is encrypted")})
        );
        // The first format has nothing by which a wrong password would be noticed.
        if format == "luks" {
            let refusal = passwd(&mut qmp, json!({"device": "d"}), "wrong").unwrap_err();
            assert_eq!(refusal, json!({"class": "GenericError", "desc": "Password incorrect"}));
            qmp.try_execute("cont", json!({})).unwrap_err();
        }
        passwd(&mut qmp, json!({"device": "d"}), PASSWORD).unwrap();
        let shown = &qmp.run("query-block")[0]["inserted"];
        assert_eq!(
            (&shown["encrypted"], &shown["encryption_key_missing"]),
            (&json!(true), &json!(false))
        );
        qmp.run("cont");
        let status = machine.wait();
        let (serial, log) = (machine.serial(), machine.log());
        assert_eq!(
            guest::value(&serial, "done", "failures"),
            Some("0"),
            "{format}: {serial}\n{log}"
        );
        assert!(status.success(), "{format}: {log}");
        let options = format!("driver=qcow2,encrypt.key-secret=key,file.filename={file}");
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
        assert_eq!(
            guest::checksum(&data[..8 << 20]),
            guest::pattern_checksum(8, 7),
            "{format}"
        );
    }
}

#[test]
fn locked_images_show_nothing_and_only_drives_are_locked() {
    let images = tempfile::tempdir().unwrap();
    let base = qcow2(images.path(), "luks");
    let top = images.path().join("top").display().to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &base, &top]);
    std::fs::write(images.path().join("plain"), vec![0; 1 << 20]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let arguments = format!(
        "-machine none -allow-path {} -drive if=none,id=p,format=raw,file={}/plain",
        images.path().display(),
        images.path().display()
    );
    let mut machine = Machine::start_without_serial(directory, &arguments, &[]);
    let mut qmp = machine.qmp();
    // Today's form: refused without a key.
    let node = json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": base}});
    let refusal = qmp.try_execute("blockdev-add", node).unwrap_err();
    assert_eq!(refusal["desc"], "Parameter 'encrypt.key-secret' is required for cipher");
    // The form of QMP 2.0; the password is that of the image below.
    let options = json!({"driver": "qcow2", "id": "d", "node-name": "n", "file": {"driver": "file", "filename": top}});
    qmp.execute("blockdev-add", json!({"options": options}));
    qmp.run("stop");
    let refusal = qmp.try_execute("cont", json!({})).unwrap_err();
    assert_eq!(
        refusal,
        json!({"class": "DeviceEncrypted", "desc": format!("'d' ({base}) is encrypted")})
    );
    let refusal = passwd(&mut qmp, json!({"device": "p"}), PASSWORD).unwrap_err();
    assert_eq!(
        refusal,
        json!({"class": "GenericError", "desc": "Device 'p' is not encrypted"})
    );
    let refusal = passwd(&mut qmp, json!({"node-name": "nope"}), PASSWORD).unwrap_err();
    assert_eq!(refusal["desc"], "Cannot find device='' nor node-name='nope'");
    passwd(&mut qmp, json!({"node-name": "n"}), PASSWORD).unwrap();
    // Once more changes nothing.
    passwd(&mut qmp, json!({"device": "d"}), "another").unwrap();
    qmp.run("cont");
    qmp.run("quit");
    assert!(machine.wait().success());
}
