//! Rows about what the filters of system calls cost: Bulkhead beside itself, while the kernel passes over the filters of
//! block-proc and vcpu-proc (PTRACE_O_SUSPEND_SECCOMP, which takes root; nobody is stopped by it, no call is reported). What is
//! left of a filter then is the kernel's look at whether there is one. The other walls (namespaces, Landlock, limits) do not
//! stand in the way of a request: nothing is opened for one.

use super::disk::{self, Disk, Image, Load, Measured};
use super::peers::{Peer, Started, family};
use super::report::Report;
use bulkhead_tests::procfs;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::io::BufReader;
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc;
use std::thread::JoinHandle;

/// Measures all rows.
pub fn rows(report: &mut Report) {
    let Some(directory) = disk::scratch() else { return };
    let loads = [
        Load::small("randread", 1, 1),
        Load::small("randread", 32, 1),
        Load::small("randwrite", 32, 1),
        Load::large("read"),
    ];
    for (image, name) in [(Image::Raw, "raw"), (Image::Allocated, "qcow2")] {
        for (cache, what) in [("none", "on disk"), ("writeback", "in the page cache")] {
            for aio in ["io_uring", "threads"] {
                for load in &loads {
                    let name = format!("{name} {what}, aio={aio}, depth {}", load.depth);
                    let image = (image, aio, cache);
                    disk::compare_image(report, &name, false, image, load, directory.path(), measure);
                }
            }
        }
    }
}

fn measure(peer: Peer, disk: &Disk<'_>, load: &Load, directory: &Path) -> Measured {
    let mut command = disk.command(peer, load, directory);
    command.arg("-S").stdout(Stdio::piped()).stderr(Stdio::null());
    let scratch = tempfile::tempdir().expect("scratch directory");
    let mut machine = Started::launch(command, scratch, &["qmp"]);
    let passed_over = (peer == Peer::Unfiltered).then(|| pass_over(machine.child.id() as i32));
    machine.qmp.run("cont");
    let mut serial = BufReader::new(machine.child.stdout.take().expect("a pipe"));
    let said = disk::report_of(&mut serial);
    // It is switched off by its guest.
    machine.child.wait().expect("waiting");
    if let Some(tracer) = passed_over {
        tracer.join().expect("the tracer");
    }
    Measured::of(&said)
}

/// Has the kernel pass over the filters of the processes that work for the guest, until they end.
fn pass_over(supervisor: i32) -> JoinHandle<()> {
    let (ready, is_ready) = mpsc::channel();
    // Tracees belong to a thread.
    let tracer = std::thread::spawn(move || {
        let helpers = family(supervisor).into_iter().filter(|pid| {
            let name = procfs::name(*pid).unwrap_or_default();
            name == "block-proc" || name == "vcpu-proc"
        });
        let options =
            ptrace::Options::from_bits_retain(libc::PTRACE_O_SUSPEND_SECCOMP) | ptrace::Options::PTRACE_O_TRACECLONE;
        let threads: Vec<i32> = helpers.flat_map(procfs::threads).collect();
        assert!(threads.len() >= 2, "the helpers of {supervisor}");
        for thread in threads {
            ptrace::seize(Pid::from_raw(thread), options).expect("PTRACE_SEIZE");
        }
        ready.send(()).expect("waited for");
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        while let Ok(status) = waitpid(None, Some(flags)) {
            let (pid, signal) = match status {
                WaitStatus::Stopped(pid, signal) => (pid, Some(signal)),
                // A new thread, and the one that made it.
                WaitStatus::PtraceEvent(pid, _, _) => (pid, None),
                _ => continue,
            };
            // It may have been killed.
            let _ = ptrace::cont(pid, signal);
        }
    });
    is_ready.recv().expect("the tracer");
    tracer
}
