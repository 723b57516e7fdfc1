//! Disk images, made and judged by QEMU's own tools.

use nix::fcntl::{FcntlArg, fcntl};
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

/// Runs qemu-img; returns what it printed.
///
/// # Panics
/// When it fails.
pub fn qemu_img(arguments: &[&str]) -> String {
    run("qemu-img", arguments)
}

/// Runs one command of qemu-io on an image.
///
/// # Panics
/// When it fails.
pub fn qemu_io(image: &Path, format: &str, command: &str) -> String {
    let said = run("qemu-io", &["-f", format, "-c", command, name(image)]);
    assert!(!said.contains("failed"), "qemu-io {command}: {said}");
    said
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}: `make packages` installs qemu-utils"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    said
}

/// A path as text.
///
/// # Panics
/// When it is none.
pub fn name(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}

/// What qemu-img says of an image, also while it is in use.
pub fn info(image: &Path) -> Value {
    let said = qemu_img(&["info", "-U", "--output=json", name(image)]);
    serde_json::from_str(&said).expect("JSON of qemu-img")
}

/// Whether a program holds a lock on an image. A process that has ended may still: its ring's files are put away later.
///
/// # Panics
/// When the image cannot be asked.
pub fn is_locked(image: &Path) -> bool {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(image)
        .expect("image");
    let mut whole = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut whole)).expect("F_OFD_GETLK");
    whole.l_type != libc::F_UNLCK as i16
}

/// Makes an empty qcow2 image, over another if there is one.
pub fn qcow2(image: &Path, size: &str, base: Option<&Path>) {
    let mut arguments = vec!["create", "-q", "-f", "qcow2"];
    if let Some(base) = base {
        arguments.extend(["-F", "qcow2", "-b", name(base)]);
    }
    arguments.push(name(image));
    if base.is_none() {
        arguments.push(size);
    }
    qemu_img(&arguments);
}

/// # Panics
/// When an image is not sound.
pub fn check(image: &Path) {
    qemu_img(&["check", "-q", "-f", "qcow2", name(image)]);
}

/// As [`check`], of an image whose program was killed: clusters that nobody uses may be counted.
///
/// # Panics
/// When an image is not sound.
pub fn check_but_leaks(image: &Path) {
    let checked = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", name(image)])
        .output()
        .expect("qemu-img");
    assert!(
        matches!(checked.status.code(), Some(0 | 3)),
        "{}: {checked:?}",
        image.display()
    );
}

/// What [`damaged`] has overwritten.
pub struct Damage {
    offset: u64,
    before: [u8; 16],
}

/// Makes a compressed qcow2 image of a repeated byte and spoils its first cluster: reading it fails with EIO.
///
/// # Panics
/// When it cannot.
pub fn damaged(image: &Path, raw: &Path, bytes: usize) -> Damage {
    std::fs::write(raw, vec![0x5a; bytes]).expect("raw image");
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", name(raw), name(image)]);
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(image)
        .expect("image");
    let number = |offset: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).expect("image");
        u64::from_be_bytes(bytes)
    };
    // The header's l1_table_offset, its first entry, and that one's: clusters have 64 KiB.
    let entry = number(number(number(40)) & 0x00ff_ffff_ffff_fe00);
    assert!(entry & 1 << 62 != 0, "the first cluster is not compressed: {entry:#x}");
    let mut damage = Damage {
        offset: entry & ((1 << 54) - 1),
        before: [0; 16],
    };
    file.read_exact_at(&mut damage.before, damage.offset).expect("image");
    // There is no such kind of block.
    file.write_all_at(&[0xff; 16], damage.offset).expect("image");
    damage
}

/// Makes the image whole again.
///
/// # Panics
/// When it cannot be written.
pub fn repair(image: &Path, damage: &Damage) {
    let file = std::fs::File::options().write(true).open(image).expect("image");
    file.write_all_at(&damage.before, damage.offset).expect("image");
}
