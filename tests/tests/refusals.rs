//! Starts that must fail: each with one line that names the thing, exit status 1, and no process left.

use bulkhead_tests::machine::{refused, wait_until};
use bulkhead_tests::{guest, need_kvm, procfs};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Starts with a good kernel and one bad thing; the line must name it.
fn check(directory: &Path, arguments: &[&str], named: &[&str]) {
    let line = refused(directory, arguments);
    for name in named {
        assert!(line.contains(name), "{arguments:?}: {line:?} does not name {name:?}");
    }
    wait_until("no process of the failed start is left", || processes_in(directory).is_empty());
}

/// Processes that run in a directory: `bulkhead` and its launcher keep the working directory of their start.
fn processes_in(directory: &Path) -> Vec<i32> {
    let all = std::fs::read_dir("/proc").expect("/proc").filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let here = |pid: &i32| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == directory);
    all.filter(here).filter(|pid| procfs::is_alive(*pid)).collect()
}

#[test]
fn each_bad_thing_is_named_in_one_line() {
    need_kvm!();
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path();
    let kernel = guest::image();
    let kernel = kernel.to_str().unwrap();
    let truncated = directory.join("truncated");
    std::fs::write(&truncated, &std::fs::read(kernel).unwrap()[..200]).unwrap();
    std::fs::write(directory.join("garbage"), [0x5a; 8192]).unwrap();
    std::fs::write(directory.join("empty"), []).unwrap();
    std::fs::create_dir(directory.join("folder")).unwrap();
    std::fs::write(directory.join("disk"), vec![0; 1 << 20]).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(directory.join("busy")).unwrap();
    let base = ["-nodefaults", "-display", "none"];
    let cases: &[(&[&str], &[&str])] = &[
        (&["-kernel", "missing"], &["-kernel", "missing"]),
        (&["-kernel", "truncated"], &["truncated"]),
        (&["-kernel", "garbage"], &["garbage"]),
        (&["-kernel", "empty"], &["empty"]),
        (&["-kernel", "folder"], &["-kernel", "folder"]),
        (&["-kernel", kernel, "-initrd", "missing"], &["-initrd", "missing"]),
        (&["-kernel", kernel, "-drive", "file=folder,if=virtio,format=raw"], &["folder", "directory"]),
        (&["-kernel", kernel, "-drive", "file=missing,if=virtio,format=raw"], &["missing"]),
        (&["-kernel", kernel, "-drive", "file=disk,if=virtio,format=raw", "-drive", "file=disk,if=virtio,format=raw"], &["disk", "in use"]),
        (&["-kernel", kernel, "-m", "0"], &["-m"]),
        (&["-kernel", kernel, "-smp", "300"], &["-smp", "300"]),
        (&["-kernel", kernel, "-smp", "6,sockets=2,cores=3"], &["-smp", "cores=3"]),
        (&["-kernel", kernel, "-qmp", "unix:busy,server=on,wait=off"], &["busy"]),
        (&["-kernel", kernel, "-serial", "unix:nodir/s,server=on,wait=off"], &["nodir/s"]),
        (&["-kernel", kernel, "-cpu", "host,+nosuchfeature"], &["nosuchfeature"]),
        (&["-kernel", kernel, "-nosuchoption"], &["nosuchoption"]),
        (&["-kernel", kernel, "-pidfile", "nodir/pid"], &["nodir/pid"]),
    ];
    for (arguments, named) in cases {
        check(directory, &[&base[..], arguments].concat(), named);
    }
}

#[test]
fn a_disk_that_another_machine_uses_is_refused() {
    need_kvm!();
    let scratch = tempfile::tempdir().unwrap();
    let disk = scratch.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let drive = format!("file={},if=virtio,format=raw", disk.display());
    let kernel = guest::image();
    let mut machine =
        bulkhead_tests::machine::Machine::start(&format!("-m 64 -S -kernel {} -drive {drive}", kernel.display()));
    machine.qmp();
    let line = refused(scratch.path(), &["-nodefaults", "-kernel", kernel.to_str().unwrap(), "-drive", &drive]);
    assert!(line.contains("in use") && line.contains(disk.to_str().unwrap()), "{line}");
}

#[test]
fn without_a_usable_dev_kvm_the_line_says_so() {
    // As a user who may not open it. Root may do everything, so root becomes somebody else for this.
    let programs = bulkhead_tests::machine::programs();
    if !nix::unistd::geteuid().is_root() || !std::path::Path::new("/usr/bin/setpriv").exists() {
        println!("SKIPPED: needs root and setpriv to start bulkhead as a user without /dev/kvm");
        return;
    }
    if std::fs::metadata("/dev/kvm").is_ok_and(|kvm| kvm.permissions().mode() & 0o006 == 0o006) {
        println!("SKIPPED: everybody may open /dev/kvm here");
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    std::fs::set_permissions(scratch.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    for program in ["bulkhead", "vcpu-proc", "block-proc", "dump-proc", "qmp-proc"] {
        std::fs::copy(programs.join(program), scratch.path().join(program)).unwrap();
    }
    std::fs::copy(guest::image(), scratch.path().join("kernel")).unwrap();
    let output = std::process::Command::new("/usr/bin/setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
        .arg(scratch.path().join("bulkhead"))
        .args(["-nodefaults", "-kernel", "kernel"])
        .current_dir(scratch.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("/dev/kvm") && text.lines().count() == 1, "{text}");
}
