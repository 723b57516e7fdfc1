//! Rows about block jobs: how long from the command until everything is copied, without a guest. A commit or a backup is
//! over then, a mirror or the commit of an active layer is ready.

use super::PAIRS_OF_LOAD;
use super::peers::Peer;
use super::report::Report;
use bulkhead_tests::images::{name, qemu_img};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Size of the images, MiB.
pub const IMAGE_MIB: usize = 1024;
/// How much of an image is compressed, MiB: that takes a second for each 50.
const COMPRESSED_MIB: usize = 96;
/// Where files are in memory, on every Linux.
const MEMORY: &str = "/dev/shm";

/// Where images are, and how they are opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In memory, with the defaults of both programs.
    Memory,
    /// On a disk, without the host's page cache.
    Disk,
}

impl Place {
    const ALL: [(Self, &'static str); 2] = [(Self::Memory, "in memory"), (Self::Disk, "on disk")];

    pub fn folder(self) -> tempfile::TempDir {
        let folder = match self {
            Self::Memory => tempfile::tempdir_in(MEMORY),
            Self::Disk => tempfile::tempdir(),
        };
        folder.expect("scratch directory")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2,
}

impl Format {
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Mirror,
    Backup,
    /// A backup that compresses.
    Compressed,
    /// Of an image that has an empty one over it.
    Commit,
    ActiveCommit,
}

/// A measurement: what goes from which format into which.
type Row = (Work, Format, Format, &'static str);

const ROWS: [Row; 13] = [
    (Work::Mirror, Format::Raw, Format::Raw, "mirror, raw to raw"),
    (Work::Mirror, Format::Raw, Format::Qcow2, "mirror, raw to qcow2"),
    (Work::Mirror, Format::Qcow2, Format::Raw, "mirror, qcow2 to raw"),
    (Work::Mirror, Format::Qcow2, Format::Qcow2, "mirror, qcow2 to qcow2"),
    (Work::Backup, Format::Raw, Format::Raw, "backup, raw to raw"),
    (Work::Backup, Format::Raw, Format::Qcow2, "backup, raw to qcow2"),
    (Work::Backup, Format::Qcow2, Format::Raw, "backup, qcow2 to raw"),
    (Work::Backup, Format::Qcow2, Format::Qcow2, "backup, qcow2 to qcow2"),
    (
        Work::Compressed,
        Format::Raw,
        Format::Qcow2,
        "compressed backup, raw to qcow2",
    ),
    (Work::Commit, Format::Qcow2, Format::Raw, "commit, qcow2 to raw"),
    (Work::Commit, Format::Qcow2, Format::Qcow2, "commit, qcow2 to qcow2"),
    (
        Work::ActiveCommit,
        Format::Qcow2,
        Format::Raw,
        "active commit, qcow2 to raw",
    ),
    (
        Work::ActiveCommit,
        Format::Qcow2,
        Format::Qcow2,
        "active commit, qcow2 to qcow2",
    ),
];

impl Work {
    /// Whether the tool for images does the same.
    fn is_for_images(self) -> bool {
        matches!(self, Self::Backup | Self::Compressed | Self::Commit)
    }
}

/// Makes the sources: every MiB has data, or every other one.
pub fn make_sources(folder: &Path, is_full: bool) {
    let raw = source(folder, Format::Raw);
    let mut file = File::create(&raw).expect("the raw image");
    for number in 0..IMAGE_MIB {
        if is_full || number % 2 == 0 {
            file.write_all(&data(number as u64 + 1)).expect("writing");
        } else {
            file.seek(SeekFrom::Current(1 << 20)).expect("seeking");
        }
    }
    file.set_len((IMAGE_MIB as u64) << 20).expect("growing");
    file.sync_all().expect("flushing");
    let qcow2 = source(folder, Format::Qcow2);
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", name(&raw), name(&qcow2)]);
    let written = File::open(qcow2).and_then(|file| file.sync_all());
    written.expect("flushing");
}

/// A MiB of bytes that can be compressed, but not to nothing.
fn data(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut byte = || {
        // Xorshift.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8 % 23 + 1
    };
    (0..1 << 20).map(|_| byte()).collect()
}

pub fn source(folder: &Path, format: Format) -> PathBuf {
    folder.join(format!("source.{}", format.name()))
}

/// An empty image, as new.
pub fn make_empty(path: &Path, format: Format, mib: usize) {
    // A file that is there is emptied, not given up: that takes its time.
    let _ = std::fs::remove_file(path);
    let size = format!("{mib}M");
    qemu_img(&["create", "-q", "-f", format.name(), name(path), &size]);
}

pub fn node(node_name: &str, path: &Path, format: Format, place: Place) -> Value {
    let file = match place {
        Place::Memory => json!({"driver": "file", "filename": name(path)}),
        Place::Disk => json!({"driver": "file", "filename": name(path), "aio": "io_uring",
                              "cache": {"direct": true}}),
    };
    json!({"driver": format.name(), "node-name": node_name, "file": file, "discard": "unmap"})
}

/// Seconds of one run.
fn measure(peer: Peer, place: Place, row: Row, folder: &Path) -> f64 {
    let (work, from, to, _) = row;
    let (target, overlay) = (folder.join("target"), folder.join("overlay"));
    let mib = if work == Work::Compressed {
        COMPRESSED_MIB
    } else {
        IMAGE_MIB
    };
    make_empty(&target, to, mib);
    if work == Work::Commit {
        make_empty(&overlay, Format::Qcow2, mib);
    }
    if peer == Peer::Img {
        return measure_tool(place, row, folder, mib);
    }
    let mut machine = peer.start_bare(folder, &["qmp"]);
    let qmp = &mut machine.qmp;
    qmp.execute("blockdev-add", node("target", &target, to, place));
    let mut node_of_source = node("source", &source(folder, from), from, place);
    if matches!(work, Work::Commit | Work::ActiveCommit) {
        node_of_source["backing"] = json!("target");
    }
    if work == Work::Compressed {
        node_of_source["size"] = json!(mib << 20);
    }
    qmp.execute("blockdev-add", node_of_source);
    if work == Work::Commit {
        let mut over = node("overlay", &overlay, Format::Qcow2, place);
        over["backing"] = json!("source");
        qmp.execute("blockdev-add", over);
    }
    let (command, arguments, over) = match work {
        Work::Mirror => (
            "blockdev-mirror",
            json!({"device": "source", "target": "target", "sync": "full"}),
            "BLOCK_JOB_READY",
        ),
        Work::Backup | Work::Compressed => (
            "blockdev-backup",
            json!({"device": "source", "target": "target", "sync": "full", "compress": work == Work::Compressed}),
            "BLOCK_JOB_COMPLETED",
        ),
        Work::Commit => (
            "block-commit",
            json!({"device": "overlay", "top-node": "source", "base-node": "target"}),
            "BLOCK_JOB_COMPLETED",
        ),
        Work::ActiveCommit => ("block-commit", json!({"device": "source"}), "BLOCK_JOB_READY"),
    };
    let mut arguments = arguments;
    arguments["job-id"] = json!("job");
    let begun = Instant::now();
    qmp.execute(command, arguments);
    let event = loop {
        let event = qmp.event();
        match event["event"].as_str() {
            Some(word) if word == over => break event,
            Some("BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED") => panic!("{peer:?}, {row:?}: {event}"),
            _ => {}
        }
    };
    let taken = begun.elapsed();
    assert!(event["data"].get("error").is_none(), "{peer:?}, {row:?}: {event}");
    machine.end();
    taken.as_secs_f64()
}

/// Seconds that qemu-img takes for the same, from its start to its end.
fn measure_tool(place: Place, (work, from, to, _): Row, folder: &Path, mib: usize) -> f64 {
    let (source, target) = (source(folder, from), folder.join("target"));
    let cache = if place == Place::Disk { "none" } else { "unsafe" };
    let seconds = |arguments: &[&str]| {
        let begun = Instant::now();
        qemu_img(arguments);
        begun.elapsed().as_secs_f64()
    };
    if work == Work::Commit {
        // It commits to what an image names, which has no name again afterwards: others open the image too.
        let name_below = |below: &str| {
            qemu_img(&[
                "rebase",
                "-u",
                "-f",
                from.name(),
                "-F",
                to.name(),
                "-b",
                below,
                name(&source),
            ]);
        };
        name_below(name(&target));
        let taken = seconds(&["commit", "-q", "-d", "-t", cache, "-f", from.name(), name(&source)]);
        name_below("");
        return taken;
    }
    let mut node = json!({"driver": from.name(), "file": {"driver": "file", "filename": name(&source)}});
    let mut arguments = vec!["convert", "-n", "-T", cache, "-t", cache, "-O", to.name()];
    if work == Work::Compressed {
        node["size"] = json!(mib << 20);
        arguments.push("-c");
    }
    let from = format!("json:{node}");
    seconds(&[arguments, vec![&from, name(&target)]].concat())
}

/// Measures all rows that the peer has, too.
pub fn rows(report: &mut Report) {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        println!("\nqemu-img is not installed: no rows about jobs.");
        return;
    }
    for (place, where_) in Place::ALL {
        for (is_full, how_full) in [(true, "full"), (false, "half empty")] {
            let name = |row: Row| format!("{}, {how_full}, {where_} (ms)", row.3);
            let rows: Vec<_> = ROWS
                .into_iter()
                .filter(|row| report.peer() != Some(Peer::Img) || row.0.is_for_images())
                .filter(|row| report.wants(&name(*row)))
                .collect();
            if rows.is_empty() {
                continue;
            }
            let folder = place.folder();
            make_sources(folder.path(), is_full);
            for row in rows {
                let (ours, theirs) = report.pairs(PAIRS_OF_LOAD, |peer| {
                    let taken = measure(peer, place, row, folder.path());
                    taken * Duration::from_secs(1).as_millis() as f64
                });
                report.row(&name(row), &ours, &theirs);
            }
        }
    }
}
