//! Rows about the data path: the same freestanding guest drives a virtio disk of both programs. It keeps a fixed number of
//! requests in flight and looks for completions by itself, so that what is measured is the monitor.

use super::{PAIRS_OF_LOAD, Peer, QEMU, table};
use bulkhead_tests::guest;
use bulkhead_tests::machine::programs;
use std::path::Path;
use std::process::{Command, Stdio};

/// Size of the disk, MiB.
const DISK_MIB: u64 = 256;

/// What is behind the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Image {
    Raw,
    /// Every cluster is there.
    Allocated,
    /// An empty image over one in which every cluster is.
    Backed,
}

impl Image {
    const ALL: [(Self, &'static str); 3] = [
        (Self::Raw, "raw"),
        (Self::Allocated, "qcow2"),
        (Self::Backed, "qcow2 over a full backing file"),
    ];

    /// Its file, as new.
    fn make(self, directory: &Path) -> (String, &'static str) {
        let path = |name: &str| directory.join(name).display().to_string();
        let (raw, full) = (path("raw"), path("full.qcow2"));
        if !Path::new(&raw).exists() {
            // No zeroes: nothing of it must be a hole.
            let byte = |index: u64| (index % 251) as u8 | 1;
            let data: Vec<u8> = (0..DISK_MIB << 20).map(byte).collect();
            std::fs::write(&raw, data).expect("the raw image");
            qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &raw, &full]);
        }
        match self {
            Self::Raw => (raw, "raw"),
            Self::Allocated => (full, "qcow2"),
            Self::Backed => {
                let top = path("top.qcow2");
                qemu_img(&["create", "-q", "-f", "qcow2", "-b", &full, "-F", "qcow2", &top]);
                (top, "qcow2")
            }
        }
    }
}

fn qemu_img(arguments: &[&str]) {
    let status = Command::new("qemu-img").args(arguments).status().expect("qemu-img");
    assert!(status.success(), "qemu-img {arguments:?}");
}

/// What the guest does: its words for it, what to call it, and bytes of a request when bytes are what counts.
const LOADS: [(&str, &str, Option<u64>); 4] = [
    (
        "rw=randread bs=4096 qd=32 ops=100000",
        "4 KiB random reads (per second)",
        None,
    ),
    (
        "rw=randwrite bs=4096 qd=32 ops=100000",
        "4 KiB random writes (per second)",
        None,
    ),
    (
        "rw=read bs=1048576 qd=8 ops=1500",
        "1 MiB reads in order (MiB/s)",
        Some(1),
    ),
    (
        "rw=write bs=1048576 qd=8 ops=1500",
        "1 MiB writes in order (MiB/s)",
        Some(1),
    ),
];

/// Requests per second.
fn measure(peer: Peer, image: Image, load: &str, directory: &Path) -> f64 {
    let (file, format) = image.make(directory);
    let drive = format!("if=none,id=d,format={format},file={file},cache=none,aio=io_uring");
    let mut command = match peer {
        Peer::Bulkhead => {
            let mut command = Command::new(programs().join("bulkhead"));
            command.arg("-allow-path").arg(directory);
            command.args(["-device", "virtio-blk-pci,drive=d,num-queues=1"]);
            command
        }
        Peer::Qemu => {
            let mut command = Command::new(QEMU);
            command.args(["-M", "q35", "-accel", "kvm"]);
            command.args(["-device", "virtio-blk-pci,disable-legacy=on,drive=d,num-queues=1"]);
            command
        }
    };
    let output = command
        .args(["-nodefaults", "-display", "none", "-m", "256", "-no-reboot"])
        .args(["-serial", "stdio", "-drive", &drive])
        .arg("-kernel")
        .arg(guest::image())
        .args(["-append", &format!("test=bench {load} span_mib={DISK_MIB}")])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .expect("running the guest");
    let serial = String::from_utf8_lossy(&output.stdout);
    let rate = guest::value(&serial, "bench", "iops").and_then(|rate| rate.parse().ok());
    rate.unwrap_or_else(|| panic!("{peer:?}, {image:?}, {load}: the guest said:\n{serial}"))
}

/// Prints all rows.
pub fn rows(with_qemu: bool) {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        println!("\nqemu-img is not installed: no rows about disks.");
        return;
    }
    let directory = tempfile::tempdir().expect("scratch directory");
    for (image, name) in Image::ALL {
        for (load, what, mib) in LOADS {
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for pair in 0..=PAIRS_OF_LOAD {
                let scale = mib.unwrap_or(1) as f64;
                let our = measure(Peer::Bulkhead, image, load, directory.path()) * scale;
                let their = with_qemu.then(|| measure(Peer::Qemu, image, load, directory.path()) * scale);
                if pair > 0 {
                    ours.push(our);
                    theirs.extend(their);
                }
            }
            table::row(&format!("{name}, {what}"), &ours, &theirs);
        }
    }
}
