//! Rows beside programs that run microVMs: their start, what they take, and their disk, all through the page cache, which is the
//! only way that Firecracker has.

use super::PAIRS;
use super::disk::{self, Image, Load};
use super::peers::{Peer, memory_mib};
use super::report::Report;
use bulkhead_tests::guest;
use serde_json::json;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Megabytes of guest RAM of machines that do nothing.
const MEMORY_MIB: u64 = 64;
/// Where QEMU's microvm has its first device, as a kernel is told of one.
pub const FIRST_DEVICE: &str = " virtio_mmio.device=512@0xfeb02e00:12";

/// Configures Firecracker: what the guest is told, and a raw disk.
pub fn configure(command: &mut Command, directory: &Path, orders: &str, memory_mib: u64, disk: Option<&str>) {
    let disk = disk.map(|file| {
        json!({"drive_id": "d", "path_on_host": file, "is_root_device": false, "is_read_only": false,
               "cache_type": "Writeback", "io_engine": "Async"})
    });
    let config = json!({
        "boot-source": {"kernel_image_path": guest::image(), "boot_args": orders},
        "drives": disk.into_iter().collect::<Vec<_>>(),
        "machine-config": {"vcpu_count": 1, "mem_size_mib": memory_mib},
    });
    let path = directory.join("firecracker.json");
    std::fs::write(&path, config.to_string()).expect("the configuration");
    // Its log goes where the serial port goes.
    command
        .args(["--level", "Error", "--no-api", "--config-file"])
        .arg(path);
}

/// Measures all rows.
pub fn rows(report: &mut Report) {
    idle(report);
    let Some(directory) = disk::scratch() else { return };
    let loads = [
        Load::small("randread", 1, 1),
        Load::small("randread", 8, 1),
        Load::small("randread", 32, 1),
        Load::small("randwrite", 32, 1),
        Load::large("read"),
        Load::large("write"),
    ];
    for load in &loads {
        let name = format!("raw in the page cache, depth {}", load.depth);
        let image = (Image::Raw, "io_uring", "writeback");
        disk::compare_image(report, &name, true, image, load, directory.path(), disk::measure);
    }
}

/// A machine without a disk whose guest does nothing.
fn start(peer: Peer, directory: &Path) -> Child {
    let mut command: Command = peer.machine();
    if peer == Peer::Firecracker {
        configure(&mut command, directory, "test=spin", MEMORY_MIB, None);
    } else {
        command.args(["-nodefaults", "-display", "none", "-m", &MEMORY_MIB.to_string()]);
        command.args(["-no-reboot", "-serial", "stdio", "-append", "test=spin", "-kernel"]);
        command.arg(guest::image());
    }
    let quiet = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    quiet.spawn().expect("starting")
}

/// From exec to the first word that the guest writes to its serial port, which it does before it looks for anything; and what the
/// machine takes then.
fn idle(report: &mut Report) {
    let names = [
        "exec to the guest's first word (ms)",
        "memory beside guest RAM of 64 MiB (MiB)",
    ];
    if !report.wants_any(&names) {
        return;
    }
    let (ours, theirs) = report.pairs(PAIRS, |peer| {
        let directory = tempfile::tempdir().expect("scratch directory");
        let begun = Instant::now();
        let mut child = start(peer, directory.path());
        let mut said = Vec::new();
        let serial = child.stdout.as_mut().expect("a pipe");
        // Firecracker's own lines come first.
        while !said.ends_with(b"BHG") {
            let mut byte = [0];
            serial.read_exact(&mut byte).expect("the guest's first word");
            said.push(byte[0]);
        }
        let took = begun.elapsed().as_secs_f64() * 1e3;
        std::thread::sleep(Duration::from_millis(300));
        let memory = memory_mib(child.id() as i32);
        let _ = child.kill();
        let _ = child.wait();
        [took, memory]
    });
    for (place, name) in names.iter().enumerate() {
        let values = |runs: &[[f64; 2]]| runs.iter().map(|run| run[place]).collect::<Vec<_>>();
        report.row(name, &values(&ours), &values(&theirs));
    }
}
