//! Rows about how start and memory grow: with disks, with vCPUs, and with machines beside each other; and of a machine that works.

use super::peers::{Peer, Started, memory_mib};
use super::report::Report;
use super::{PAIRS_OF_LOAD, Run};
use bulkhead_tests::guest;
use std::path::Path;
use std::time::Duration;

/// Megabytes of guest RAM of machines that only stand there.
const RAM: &str = "64";

/// Measures all rows.
pub fn rows(report: &mut Report) {
    under_load(report);
    for disks in [1, 8, 24] {
        grown(report, &format!("{disks} disks"), &|folder| drives(folder, disks));
    }
    for vcpus in [1, 4, 8] {
        let arguments = ["-smp".to_owned(), vcpus.to_string()];
        grown(report, &format!("{vcpus} vCPUs"), &|_| arguments.to_vec());
    }
    side_by_side(report);
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
    command.args(["-nodefaults", "-display", "none", "-m", RAM, "-S"]);
    command.args(["-serial", "null", "-kernel"]).arg(guest::image());
    command.args(arguments(directory.path()));
    Started::launch(command, directory, &["qmp"])
}

fn grown(report: &mut Report, name: &str, arguments: &dyn Fn(&Path) -> Vec<String>) {
    let (ready, memory) = (
        format!("{name}: exec to monitor ready (ms)"),
        format!("{name}: memory beside guest RAM (MiB)"),
    );
    if !report.wants_any(&[&ready, &memory]) {
        return;
    }
    let (ours, theirs) = report.pairs(PAIRS_OF_LOAD, |peer| {
        let machine = standing(peer, arguments);
        let run = Run::of(&machine);
        machine.end();
        run
    });
    let values = |runs: &[Run], value: fn(&Run) -> f64| runs.iter().map(value).collect::<Vec<_>>();
    let took = |run: &Run| run.ready.as_secs_f64() * 1e3;
    report.row(&ready, &values(&ours, took), &values(&theirs, took));
    let takes = |run: &Run| run.memory_mib;
    report.row(&memory, &values(&ours, takes), &values(&theirs, takes));
}

/// Memory beside guest RAM while the guest reads and writes its disk.
fn under_load(report: &mut Report) {
    let name = "memory beside guest RAM, disk at depth 64 of 64 KiB (MiB)";
    if !report.wants(name) {
        return;
    }
    let (ours, theirs) = report.pairs(PAIRS_OF_LOAD, |peer| {
        let mut machine = standing(peer, |folder| {
            let mut arguments = drives(folder, 1);
            arguments.push("-append".into());
            arguments.push("test=bench rw=randrw bs=65536 qd=64 ops=100000000".into());
            arguments
        });
        machine.qmp.run("cont");
        std::thread::sleep(Duration::from_secs(1));
        let memory = memory_mib(machine.child.id() as i32);
        machine.kill();
        memory
    });
    report.row(name, &ours, &theirs);
}

/// What each of many machines takes. All run the same programs: what they share is counted once.
fn side_by_side(report: &mut Report) {
    for count in [1, 10, 50] {
        let name = format!("{count} machines: memory beside guest RAM of each (MiB)");
        if !report.wants(&name) {
            continue;
        }
        let (ours, theirs) = report.pairs(1, |peer| {
            let machines: Vec<_> = (0..count).map(|_| standing(peer, |folder| drives(folder, 1))).collect();
            std::thread::sleep(Duration::from_millis(300));
            let memory: f64 = machines
                .iter()
                .map(|machine| memory_mib(machine.child.id() as i32))
                .sum();
            machines.into_iter().for_each(Started::end);
            memory / f64::from(count)
        });
        report.row(&name, &ours, &theirs);
    }
}
