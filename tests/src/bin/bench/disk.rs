//! Rows about the data path: the same freestanding guest drives a virtio disk of both programs. It keeps a fixed number of
//! requests in flight and looks for completions by itself, so that what is measured is the monitor.
//!
//! `disk` has one depth and all images; `depths` and `engines` have raw and allocated images at several depths, numbers of
//! queues and with both engines; `chains` has images under images.

use super::peers::Peer;
use super::report::Report;
use super::{PAIRS_OF_LOAD, microvms};
use bulkhead_tests::guest;
use bulkhead_tests::images::qemu_img;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

/// Size of the disk, MiB.
const DISK_MIB: u64 = 256;
/// Of guest RAM.
const MEMORY_MIB: u64 = 256;

/// What is behind the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Image {
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

/// What the guest does.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Its word for it.
    pub rw: &'static str,
    request_bytes: u64,
    pub depth: u64,
    queues: u64,
    pub requests: u64,
    /// What else it is told.
    pub more: &'static str,
}

impl Load {
    pub const fn small(rw: &'static str, depth: u64, queues: u64) -> Self {
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

    pub const fn large(rw: &'static str) -> Self {
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
pub struct Measured {
    /// Requests per second.
    pub rate: f64,
    /// Processor time of all processes for a request, µs: what polls, the guest, is in it.
    time: f64,
}

impl Measured {
    /// What the guest said, without the processor time.
    pub fn of(said: &str) -> Self {
        Self {
            rate: number(said, "bench", "iops"),
            time: 0.0,
        }
    }
}

/// A disk: its file, its format, and what submits requests.
pub struct Disk<'a> {
    file: &'a str,
    format: &'a str,
    aio: &'a str,
    cache: &'a str,
    /// What of it the guest uses, MiB.
    span_mib: u64,
}

impl Disk<'_> {
    /// The command of a peer that runs the guest with this disk, its serial port being standard output.
    pub fn command(&self, peer: Peer, load: &Load, directory: &Path) -> Command {
        let Self {
            file,
            format,
            aio,
            cache,
            span_mib,
        } = self;
        let mut orders = format!("test=bench {} span_mib={span_mib}", load.arguments());
        let mut command = peer.machine();
        if peer == Peer::Firecracker {
            microvms::configure(&mut command, directory, &orders, MEMORY_MIB, Some(file));
            return command;
        }
        let queues = format!("num-queues={}", load.queues);
        let device = match peer {
            Peer::Qemu => format!("virtio-blk-pci,disable-legacy=on,drive=d,{queues}"),
            Peer::Microvm => {
                command.args(["-global", "virtio-mmio.force-legacy=false"]);
                orders += microvms::FIRST_DEVICE;
                format!("virtio-blk-device,drive=d,{queues}")
            }
            _ => {
                command.arg("-allow-path").arg(directory);
                format!("virtio-blk-pci,drive=d,{queues}")
            }
        };
        let drive = format!("if=none,id=d,format={format},file={file},cache={cache},aio={aio}");
        command
            .args(["-nodefaults", "-display", "none", "-m", &MEMORY_MIB.to_string()])
            .args(["-no-reboot", "-serial", "stdio", "-drive", &drive, "-device", &device])
            .arg("-kernel")
            .arg(guest::image())
            .args(["-append", &orders]);
        command
    }
}

/// The guest's lines until it has measured. A program that cannot write to its serial port may end: the port is kept.
pub fn report_of(serial: &mut impl BufRead) -> String {
    let mut said = String::new();
    while !["ok bench", "FAIL"].iter().any(|end| said.contains(end)) {
        let length = serial.read_line(&mut said).expect("reading the serial port");
        assert!(length > 0, "the machine ended; the guest said:\n{said}");
    }
    said
}

/// A number that the guest has reported.
pub fn number(said: &str, word: &str, key: &str) -> f64 {
    let value = guest::value(said, word, key).and_then(|value| value.parse().ok());
    value.unwrap_or_else(|| panic!("the guest said:\n{said}"))
}

/// Runs the guest.
pub fn measure(peer: Peer, disk: &Disk<'_>, load: &Load, directory: &Path) -> Measured {
    let before = processor_time();
    let mut child = disk
        .command(peer, load, directory)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("running the guest");
    let mut serial = BufReader::new(child.stdout.take().expect("a pipe"));
    let said = report_of(&mut serial);
    child.wait().expect("waiting");
    Measured {
        time: (processor_time() - before) / load.requests as f64,
        ..Measured::of(&said)
    }
}

/// What all processes have used that were started here and have ended, µs.
fn processor_time() -> f64 {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike;
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("getrusage");
    (usage.user_time() + usage.system_time()).num_microseconds() as f64
}

/// Measures one row, or two: what a request costs as well.
fn compare(report: &mut Report, name: &str, with_time: bool, load: &Load, run: impl FnMut(Peer) -> Measured) {
    let name = format!("{name}, {}", load.name());
    if !report.wants(&name) {
        return;
    }
    let scale = load.request_bytes.div_ceil(1 << 20) as f64;
    let (ours, theirs) = report.pairs(PAIRS_OF_LOAD, run);
    let rates = |runs: &[Measured]| runs.iter().map(|run| run.rate * scale).collect::<Vec<_>>();
    report.row(&name, &rates(&ours), &rates(&theirs));
    if with_time {
        let times = |runs: &[Measured]| runs.iter().map(|run| run.time).collect::<Vec<_>>();
        let name = format!("{name}: processor time of one (µs)");
        report.row(&name, &times(&ours), &times(&theirs));
    }
}

/// The same on an image: what it is, what submits requests, and how it is cached. `measure` runs the guest.
pub fn compare_image(
    report: &mut Report,
    name: &str,
    with_time: bool,
    (image, aio, cache): (Image, &str, &str),
    load: &Load,
    directory: &Path,
    measure: fn(Peer, &Disk<'_>, &Load, &Path) -> Measured,
) {
    compare(report, name, with_time, load, |peer| {
        let (file, format) = image.make(directory);
        let disk = Disk {
            file: &file,
            format,
            aio,
            cache,
            span_mib: DISK_MIB,
        };
        measure(peer, &disk, load, directory)
    });
}

/// Where images are, when qemu-img is there to make them.
pub fn scratch() -> Option<tempfile::TempDir> {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        println!("\nqemu-img is not installed: no rows about disks.");
        return None;
    }
    Some(tempfile::tempdir().expect("scratch directory"))
}

/// Measures the rows of all images.
pub fn rows(report: &mut Report) {
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
            let place = (image, "io_uring", "none");
            compare_image(report, name, true, place, load, directory.path(), measure);
        }
    }
    // Where no disk sets the pace.
    for (image, name) in [(Image::Raw, "raw"), (Image::Allocated, "qcow2")] {
        for load in &loads {
            let name = format!("{name} in the page cache");
            let place = (image, "io_uring", "writeback");
            compare_image(report, &name, true, place, load, directory.path(), measure);
        }
    }
}

/// Measures the rows of all depths and numbers of queues.
pub fn depth_rows(report: &mut Report) {
    let Some(directory) = scratch() else { return };
    for (image, name) in [(Image::Raw, "raw"), (Image::Allocated, "qcow2")] {
        for queues in [1, 4] {
            for depth in [1, 8, 32, 128] {
                for rw in ["randread", "randwrite", "randrw"] {
                    let name = format!("{name}, {queues} × depth {depth}");
                    let load = Load::small(rw, depth, queues);
                    let place = (image, "io_uring", "none");
                    compare_image(report, &name, false, place, &load, directory.path(), measure);
                }
            }
        }
        // The device says for each request that it is done, and is told of each.
        let load = Load {
            more: "event=0",
            ..Load::small("randread", 32, 1)
        };
        let name = format!("{name}, depth 32, without event-idx");
        let place = (image, "io_uring", "none");
        compare_image(report, &name, false, place, &load, directory.path(), measure);
    }
}

/// Measures the rows of the engine that uses threads.
pub fn engine_rows(report: &mut Report) {
    let Some(directory) = scratch() else { return };
    for (image, name) in [(Image::Raw, "raw"), (Image::Allocated, "qcow2")] {
        for load in [
            Load::small("randread", 32, 1),
            Load::small("randwrite", 32, 1),
            Load::large("read"),
        ] {
            let name = format!("{name}, aio=threads");
            let place = (image, "threads", "none");
            compare_image(report, &name, true, place, &load, directory.path(), measure);
        }
    }
}

/// Measures the rows of chains of images, each empty but the lowest, and of a large image. All through the page cache: Bulkhead
/// opens backing images like that in any case.
pub fn chain_rows(report: &mut Report) {
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
        compare(report, &name, false, &load, |peer| {
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
        compare(report, &name, false, &load, |peer| {
            measure(peer, &disk, &load, directory.path())
        });
    }
}
