//! ext4 images, judged on the host by e2fsprogs.

use super::pieces::find_program;
use std::path::Path;
use std::process::{Command, Output};

/// # Panics
/// When `e2fsck -fn` finds something to repair.
pub fn assert_clean(image: &Path) {
    let output = run("e2fsck", &["-fn"], image);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// A file inside, as text.
pub fn cat(image: &Path, path: &str) -> String {
    let output = run("debugfs", &["-R", &format!("cat {path}")], image);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The checksum of a file inside; it is copied to the folder `local` for that.
///
/// # Panics
/// When sha256sum is missing.
pub fn sha256_of_file_in(image: &Path, path: &str, local: &Path) -> String {
    let copy = local.join("copy");
    run("debugfs", &["-R", &format!("dump {path} {}", copy.display())], image);
    let output = Command::new("sha256sum").arg(&copy).output().expect("sha256sum starts");
    String::from_utf8_lossy(&output.stdout)[..64].to_owned()
}

fn run(name: &str, arguments: &[&str], image: &Path) -> Output {
    let program = find_program(name).unwrap_or_else(|| panic!("no {name} (make packages installs e2fsprogs)"));
    let output = Command::new(program).args(arguments).arg(image).output();
    output.unwrap_or_else(|error| panic!("{name}: {error}"))
}
