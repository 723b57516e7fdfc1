//! QEMU's own block tests, unmodified, on Bulkhead in QEMU's place. `tests/iotests/fetch` gets them (`make packages` calls
//! it); `make iotests` runs them alone, `tests/iotests/run FORMAT NUMBER` a single one.

use bulkhead_tests::lab::harness;
use bulkhead_tests::machine::programs;
use std::path::Path;
use std::process::{Command, ExitCode};

/// Format and number, by the name of the test.
macro_rules! iotests {
    ($($name:ident: $format:literal $number:literal, $what:literal;)*) => {
        fn main() -> ExitCode {
            harness::main(|_| possible(), &[$((stringify!($name), $name)),*])
        }
        $(
            #[doc = $what]
            fn $name() {
                run($format, $number);
            }
        )*
    };
}

iotests! {
    raw_045: "raw" "045", "File descriptors: -add-fd, add-fd, remove-fd, getfd, closefd.";
    raw_175: "raw" "175", "block_resize of an empty file gives it its first block.";
    qcow2_040: "qcow2" "040", "block-commit: of every layer, through filters, with errors, with a device that goes.";
    qcow2_055: "qcow2" "055", "drive-backup and blockdev-backup, alone and in transactions, paused, compressed.";
    qcow2_056: "qcow2" "056", "drive-backup: what is copied, how it is dismissed, writes that come before.";
    qcow2_057: "qcow2" "057", "Internal snapshots.";
    qcow2_085: "qcow2" "085", "Snapshots over images: commands, transactions, refusals.";
    qcow2_087: "qcow2" "087", "Refusals of blockdev-add; encrypted images.";
    qcow2_095: "qcow2" "095", "block-commit into an image that is smaller.";
    qcow2_096: "qcow2" "096", "A device's limits stay with it when a snapshot is taken.";
    qcow2_139: "qcow2" "139", "blockdev-del and who keeps a node; devices, trays and media.";
    qcow2_141: "qcow2" "141", "Nodes with jobs do not go.";
    qcow2_144: "qcow2" "144", "A snapshot is committed, and another one is taken.";
    qcow2_184: "qcow2" "184", "Throttle nodes and groups.";
}

fn possible() -> Result<(), String> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    if !tests.join(".cache/iotests/src/tests/qemu-iotests/check").exists() {
        return Err("QEMU's block tests are not here: tests/iotests/fetch gets them".to_owned());
    }
    for tool in ["qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon", "python3"] {
        if Command::new(tool).arg("--version").output().is_err() {
            return Err(format!("{tool} is not installed"));
        }
    }
    Ok(())
}

/// On a busy machine qemu-img cannot measure how fast it is, and then a test that needs it does not run: it is tried again.
const BUSY: &str = "Unable to get accurate CPU usage";
const TRIES: usize = 20;

fn run(format: &str, number: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("iotests/run");
    for tries in 1.. {
        let output = Command::new(&script)
            .args([format, number])
            .env("BULKHEAD", programs().join("bulkhead"))
            .output()
            .expect("the script runs");
        let text = String::from_utf8_lossy(&output.stdout);
        if text.contains(BUSY) && tries < TRIES {
            continue;
        }
        // A test that does not apply counts as passed for `check`.
        assert!(
            output.status.success() && text.contains("Passed all 1 iotests") && !text.contains("Not run"),
            "{text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        return;
    }
}
