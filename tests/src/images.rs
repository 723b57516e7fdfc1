//! Disk images, made and judged by QEMU's own tools.

use serde_json::Value;
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
