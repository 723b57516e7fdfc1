//! Rows about the data path: the same freestanding guest drives a virtio disk of both programs. It keeps a fixed number of
//! requests in flight and looks for completions by itself, so that what is measured is the monitor.
//!
//! `disk` has one depth and all images; `depths` and `engines` have raw and allocated images at several depths, numbers of
//! queues and with both engines; `chains` has images under images.

use super::{PAIRS_OF_LOAD, Peer, pairs, table};
use bulkhead_tests::guest;
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
    /// Nothing is there yet: every write is a cluster's first.
    Empty,
}

impl Image {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Raw, "raw"),
        (Self::Allocated, "qcow2"),
        (Self::Backed, "qcow2 over a full backing file"),
        (Self::Empty, "empty qcow2"),
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
            Self::Empty => {
                let empty = path("empty.qcow2");
                let size = format!("{DISK_MIB}M");
                qemu_img(&["create", "-q", "-f", "qcow2", &empty, &size]);
                (empty, "qcow2")
            }
        }
    }
}

fn qemu_img(arguments: &[&str]) {
    let status = Command::new("qemu-img").args(arguments).status().expect("qemu-img");
    assert!(status.success(), "qemu-img {arguments:?}");
}

/// What the guest does.
#[derive(Debug, Clone, Copy)]
struct Load {
    /// Its word for it.
    rw: &'static str,
    request_bytes: u64,
    depth: u64,
    queues: u64,
    requests: u64,
    /// What else it is told.
    more: &'static str,
}

impl Load {
    const fn small(rw: &'static str, depth: u64, queues: u64) -> Self {
        Self {
            rw,
            request_bytes: 4096,
            depth,
            queues,
            requests: match depth {
                1 => 8_000,
                2..32 => 40_000,
                _ => 100_000,
            },
            more: "",
        }
    }

    const fn large(rw: &'static str) -> Self {
        Self {
            rw,
            request_bytes: 1 << 20,
            depth: 8,
            queues: 1,
            requests: 1500,
            more: "",
        }
    }

    /// What to call it, and what its number counts.
    fn name(&self) -> String {
        let what = match self.rw {
            "randread" => "random reads",
            "randwrite" => "random writes",
            "randrw" => "random reads, 30 % writes",
            "read" => "reads in order",
            _ => "writes in order",
        };
        match self.request_bytes {
            4096 => format!("4 KiB {what} (per second)"),
            _ => format!("1 MiB {what} (MiB/s)"),
        }
    }

    fn arguments(&self) -> String {
        let Self {
            rw,
            request_bytes,
            depth,
            queues,
            requests,
            more,
        } = self;
        format!("rw={rw} bs={request_bytes} qd={depth} queues={queues} ops={requests} {more}")
    }
}

/// What a run of the guest says.
struct Measured {
    /// Requests per second.
    rate: f64,
    /// Processor time of all processes for a request, µs: what polls, the guest, is in it.
    time: f64,
}

/// A disk: its file, its format, and what submits requests.
struct Disk<'a> {
    file: &'a str,
    format: &'a str,
    aio: &'a str,
    cache: &'a str,
    /// What of it the guest uses, MiB.
    span_mib: u64,
}

fn measure(peer: Peer, disk: &Disk<'_>, load: &Load, directory: &Path) -> Measured {
    let Disk {
        file,
        format,
        aio,
        cache,
        span_mib,
    } = disk;
    let drive = format!("if=none,id=d,format={format},file={file},cache={cache},aio={aio}");
    let device = format!("virtio-blk-pci,drive=d,num-queues={}", load.queues);
    let mut command = peer.program();
    match peer {
        Peer::Bulkhead => {
            command.arg("-allow-path").arg(directory);
            command.args(["-device", &device]);
        }
        Peer::Qemu => {
            command.args(["-M", "q35", "-accel", "kvm"]);
            command.args(["-device", &format!("{device},disable-legacy=on")]);
        }
    }
    let before = processor_time();
    let output = command
        .args(["-nodefaults", "-display", "none", "-m", "256", "-no-reboot"])
        .args(["-serial", "stdio", "-drive", &drive])
        .arg("-kernel")
        .arg(guest::image())
        .args([
            "-append",
            &format!("test=bench {} span_mib={span_mib}", load.arguments()),
        ])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .expect("running the guest");
    let spent = processor_time() - before;
    let serial = String::from_utf8_lossy(&output.stdout);
    let rate = guest::value(&serial, "bench", "iops").and_then(|rate| rate.parse().ok());
    Measured {
        rate: rate.unwrap_or_else(|| panic!("{peer:?}, {file}, {load:?}: the guest said:\n{serial}")),
        time: spent / load.requests as f64,
    }
}

/// What all processes have used that were started here and have ended, µs.
fn processor_time() -> f64 {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike;
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("getrusage");
    (usage.user_time() + usage.system_time()).num_microseconds() as f64
}

/// Measures and prints one row, or two: what a request costs as well.
fn compare(name: &str, with_qemu: bool, with_time: bool, load: &Load, run: impl FnMut(Peer) -> Measured) {
    let scale = load.request_bytes.div_ceil(1 << 20) as f64;
    let (ours, theirs) = pairs(PAIRS_OF_LOAD, with_qemu, run);
    let rates = |runs: &[Measured]| runs.iter().map(|run| run.rate * scale).collect::<Vec<_>>();
    table::row(&format!("{name}, {}", load.name()), &rates(&ours), &rates(&theirs));
    if with_time {
        let times = |runs: &[Measured]| runs.iter().map(|run| run.time).collect::<Vec<_>>();
        let name = format!("{name}, {}: processor time of one (µs)", load.name());
        table::row(&name, &times(&ours), &times(&theirs));
    }
}

fn compare_image(
    name: &str,
    with_qemu: bool,
    with_time: bool,
    (image, aio): (Image, &str),
    load: &Load,
    directory: &Path,
) {
    compare(name, with_qemu, with_time, load, |peer| {
        let (file, format) = image.make(directory);
        let disk = Disk {
            file: &file,
            format,
            aio,
            cache: "none",
            span_mib: DISK_MIB,
        };
        measure(peer, &disk, load, directory)
    });
}

/// Where images are, when qemu-img is there to make them.
fn scratch() -> Option<tempfile::TempDir> {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        println!("\nqemu-img is not installed: no rows about disks.");
        return None;
    }
    Some(tempfile::tempdir().expect("scratch directory"))
}

/// Prints the rows of all images.
pub fn rows(with_qemu: bool) {
    let Some(directory) = scratch() else { return };
    let loads = [
        Load::small("randread", 32, 1),
        Load::small("randwrite", 32, 1),
        Load::large("read"),
        Load::large("write"),
    ];
    for (image, name) in Image::ALL {
        // Nothing is read from an empty image.
        for load in loads
            .iter()
            .filter(|load| image != Image::Empty || load.rw.contains("write"))
        {
            compare_image(name, with_qemu, true, (image, "io_uring"), load, directory.path());
        }
    }
}

/// Prints the rows of all depths and numbers of queues.
pub fn depth_rows(with_qemu: bool) {
    let Some(directory) = scratch() else { return };
    for (image, name) in [(Image::Raw, "raw"), (Image::Allocated, "qcow2")] {
        for queues in [1, 4] {
            for depth in [1, 8, 32, 128] {
                for rw in ["randread", "randwrite", "randrw"] {
                    let name = format!("{name}, {queues} × depth {depth}");
                    let load = Load::small(rw, depth, queues);
                    compare_image(&name, with_qemu, false, (image, "io_uring"), &load, directory.path());
                }
            }
        }
        // The device says for each request that it is done, and is told of each.
        let load = Load {
            more: "event=0",
            ..Load::small("randread", 32, 1)
        };
        let name = format!("{name}, depth 32, without event-idx");
        compare_image(&name, with_qemu, false, (image, "io_uring"), &load, directory.path());
    }
}

/// Prints the rows of the engine that uses threads.
pub fn engine_rows(with_qemu: bool) {
    let Some(directory) = scratch() else { return };
    for (image, name) in [(Image::Raw, "raw"), (Image::Allocated, "qcow2")] {
        for load in [
            Load::small("randread", 32, 1),
            Load::small("randwrite", 32, 1),
            Load::large("read"),
        ] {
            let name = format!("{name}, aio=threads");
            compare_image(&name, with_qemu, true, (image, "threads"), &load, directory.path());
        }
    }
}

/// Prints the rows of chains of images, each empty but the lowest, and of a large image. All through the page cache: Bulkhead
/// opens backing images like that in any case.
pub fn chain_rows(with_qemu: bool) {
    let Some(directory) = scratch() else { return };
    let path = |name: &str| directory.path().join(name).display().to_string();
    let (mut below, _) = Image::Allocated.make(directory.path());
    let load = Load::small("randread", 32, 1);
    let mut layers = 1;
    for wanted in [1, 10, 50, 200] {
        while layers < wanted {
            let top = path(&format!("layer-{layers}.qcow2"));
            qemu_img(&["create", "-q", "-f", "qcow2", "-b", &below, "-F", "qcow2", &top]);
            below = top;
            layers += 1;
        }
        let disk = Disk {
            file: &below,
            format: "qcow2",
            aio: "io_uring",
            cache: "writeback",
            span_mib: DISK_MIB,
        };
        let name = format!("chain of {wanted}");
        compare(&name, with_qemu, false, &load, |peer| {
            measure(peer, &disk, &load, directory.path())
        });
    }
    for (size, mib) in [("64G", 64 << 10), ("1T", 1 << 20), ("8T", 8 << 20)] {
        let file = path("large.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", &file, size]);
        let disk = Disk {
            file: &file,
            format: "qcow2",
            aio: "io_uring",
            cache: "writeback",
            span_mib: mib,
        };
        let load = Load {
            requests: 20_000,
            ..load
        };
        let name = format!("empty image of {size}iB");
        compare(&name, with_qemu, false, &load, |peer| {
            measure(peer, &disk, &load, directory.path())
        });
    }
}
