//! Rows about how start and memory grow: with disks, with vCPUs, and with machines beside each other; and of a machine that works.

use super::{PAIRS, PAIRS_OF_LOAD, Peer, Run, Started, family, pairs, table};
use bulkhead_tests::guest;
use bulkhead_tests::procfs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Megabytes of guest RAM of machines that only stand there.
const RAM: &str = "64";

/// Prints all rows.
pub fn rows(with_qemu: bool) {
    first_byte(with_qemu);
    under_load(with_qemu);
    for disks in [1, 8, 24] {
        grown(with_qemu, &format!("{disks} disks"), &|folder| drives(folder, disks));
    }
    for vcpus in [1, 4, 8] {
        let arguments = ["-smp".to_owned(), vcpus.to_string()];
        grown(with_qemu, &format!("{vcpus} vCPUs"), &|_| arguments.to_vec());
    }
    side_by_side(with_qemu);
}

/// From exec to the first byte that the guest writes to its serial port, which it does before it looks for anything.
fn first_byte(with_qemu: bool) {
    let run = |mut command: Command| {
        let start = Instant::now();
        let mut child = command
            .args([
                "-nodefaults",
                "-display",
                "none",
                "-m",
                RAM,
                "-no-reboot",
                "-serial",
                "stdio",
            ])
            .arg("-kernel")
            .arg(guest::image())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("starting");
        let read = child.stdout.as_mut().expect("stdout").read_exact(&mut [0]);
        let took = start.elapsed().as_secs_f64() * 1e3;
        read.expect("the guest's first byte");
        let _ = child.kill();
        let _ = child.wait();
        took
    };
    for (machine, name) in [("q35", "QEMU's q35"), ("microvm", "QEMU's microvm")] {
        let (ours, theirs) = pairs(PAIRS, with_qemu, |peer| {
            let mut command = peer.program();
            if peer == Peer::Qemu {
                command.args(["-M", machine, "-accel", "kvm"]);
            }
            run(command)
        });
        table::row(
            &format!("exec to the guest's first byte, beside {name} (ms)"),
            &ours,
            &theirs,
        );
    }
}

fn drives(folder: &Path, count: usize) -> Vec<String> {
    let drive = |number: usize| {
        let path = folder.join(format!("disk-{number}"));
        std::fs::File::create(&path)
            .and_then(|file| file.set_len(64 << 20))
            .expect("disk");
        format!("file={},if=virtio,format=raw", path.display())
    };
    (0..count)
        .flat_map(|number| ["-drive".to_owned(), drive(number)])
        .collect()
}

/// A machine with these arguments that stands still.
fn standing(peer: Peer, arguments: impl FnOnce(&Path) -> Vec<String>) -> Started {
    let directory = tempfile::tempdir().expect("scratch directory");
    let mut command = peer.program();
    if peer == Peer::Qemu {
        command.args(["-M", "q35,memory-backend=ram", "-accel", "kvm"]);
        command.args(["-object", &format!("memory-backend-memfd,id=ram,size={RAM}M,share=on")]);
    }
    command.args([
        "-nodefaults",
        "-display",
        "none",
        "-m",
        RAM,
        "-S",
        "-serial",
        "null",
        "-kernel",
    ]);
    command.arg(guest::image()).args(arguments(directory.path()));
    Started::launch(command, directory, &["qmp"])
}

fn grown(with_qemu: bool, name: &str, arguments: &dyn Fn(&Path) -> Vec<String>) {
    let run = |peer: Peer| {
        let machine = standing(peer, arguments);
        let run = Run::of(&machine);
        machine.end();
        run
    };
    let (ours, theirs) = pairs(PAIRS_OF_LOAD, with_qemu, run);
    let ready = |runs: &[Run]| runs.iter().map(|run| run.ready.as_secs_f64() * 1e3).collect::<Vec<_>>();
    let memory = |runs: &[Run]| runs.iter().map(|run| run.pss_kib as f64 / 1024.0).collect::<Vec<_>>();
    table::row(
        &format!("{name}: exec to monitor ready (ms)"),
        &ready(&ours),
        &ready(&theirs),
    );
    table::row(
        &format!("{name}: memory beside guest RAM (MiB)"),
        &memory(&ours),
        &memory(&theirs),
    );
}

/// Memory beside guest RAM while the guest reads and writes its disk.
fn under_load(with_qemu: bool) {
    let run = |peer: Peer| {
        let machine = standing(peer, |folder| {
            let mut arguments = drives(folder, 1);
            arguments.push("-append".into());
            arguments.push("test=bench rw=randrw bs=65536 qd=64 ops=100000000".into());
            arguments
        });
        let Started {
            child,
            mut qmp,
            directory,
            ..
        } = machine;
        qmp.run("cont");
        std::thread::sleep(Duration::from_secs(1));
        let pids = family(child.id() as i32);
        let kib: u64 = pids.iter().map(|pid| procfs::pss_kib(*pid, "memfd:")).sum();
        Started {
            child,
            qmp,
            directory,
            ready: Duration::ZERO,
        }
        .kill();
        kib as f64 / 1024.0
    };
    let (ours, theirs) = pairs(PAIRS_OF_LOAD, with_qemu, run);
    table::row(
        "memory beside guest RAM, disk at depth 64 of 64 KiB (MiB)",
        &ours,
        &theirs,
    );
}

/// What each of many machines takes. All run the same programs: what they share is counted once.
fn side_by_side(with_qemu: bool) {
    for count in [1, 10, 50] {
        let run = |peer: Peer| {
            let machines: Vec<_> = (0..count).map(|_| standing(peer, |folder| drives(folder, 1))).collect();
            std::thread::sleep(Duration::from_millis(300));
            let pids = machines.iter().flat_map(|machine| family(machine.child.id() as i32));
            let kib: u64 = pids.map(|pid| procfs::pss_kib(pid, "memfd:")).sum();
            machines.into_iter().for_each(Started::end);
            kib as f64 / 1024.0 / count as f64
        };
        let ours = [run(Peer::Bulkhead)];
        let theirs: Vec<_> = with_qemu.then(|| run(Peer::Qemu)).into_iter().collect();
        table::row(
            &format!("{count} machines: memory beside guest RAM of each (MiB)"),
            &ours,
            &theirs,
        );
    }
}
