//! Who is measured: Bulkhead, and the programs beside it.

use super::report;
use bulkhead_tests::machine::programs;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, procfs};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The QEMU beside which Bulkhead is measured.
pub fn qemu() -> PathBuf {
    named("QEMU").unwrap_or_else(|| "qemu-system-x86_64".into())
}

/// A program that the environment names.
fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable)
        .filter(|path| !path.is_empty())
        .map(Into::into)
}

/// Bytes of guest RAM of the smallest machine here. No other mapping that is in use is so large.
const LEAST_RAM: u64 = 64 << 20;

/// A program that runs machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    Bulkhead,
    /// QEMU's q35.
    Qemu,
    /// QEMU's microvm, whose devices are memory-mapped.
    Microvm,
    /// The program that the environment's FIRECRACKER names.
    Firecracker,
    /// QEMU's block layer as a program of its own.
    StorageDaemon,
    /// QEMU's tool for images: what it does to one and ends.
    Img,
    /// Bulkhead, while the kernel passes over its filters of system calls.
    Unfiltered,
}

/// A machine that has been started. A client of the first monitor is connected.
pub struct Started {
    pub child: Child,
    pub directory: tempfile::TempDir,
    pub qmp: Qmp,
    pub ready: Duration,
}

impl Peer {
    pub fn name(self) -> &'static str {
        match self {
            Self::Bulkhead => "Bulkhead",
            Self::Qemu => "QEMU",
            Self::Microvm => "QEMU's microvm",
            Self::Firecracker => "Firecracker",
            Self::StorageDaemon => "qemu-storage-daemon",
            Self::Img => "qemu-img",
            Self::Unfiltered => "Bulkhead without filters",
        }
    }

    fn path(self) -> PathBuf {
        match self {
            Self::Bulkhead | Self::Unfiltered => programs().join("bulkhead"),
            Self::Qemu | Self::Microvm => qemu(),
            Self::Firecracker => named("FIRECRACKER").unwrap_or_default(),
            Self::StorageDaemon | Self::Img => self.name().into(),
        }
    }

    /// What its program says about its version.
    pub fn version(self) -> String {
        report::version_of(&self.path()).unwrap_or_default()
    }

    /// The variable of the environment that says which program it is, if there is one.
    pub fn named_by(self) -> Option<&'static str> {
        let variable = match self {
            Self::Qemu | Self::Microvm => "QEMU",
            Self::Firecracker => "FIRECRACKER",
            _ => return None,
        };
        named(variable).map(|_| variable)
    }

    /// Why it cannot be measured here.
    pub fn missing(self) -> Option<&'static str> {
        let runs = || report::version_of(&self.path()).is_some();
        match self {
            Self::Bulkhead => None,
            Self::Qemu | Self::Microvm => (!runs()).then_some("QEMU is not installed"),
            Self::Firecracker => (!runs()).then_some("FIRECRACKER is not the path of a Firecracker"),
            Self::StorageDaemon => (!runs()).then_some("qemu-storage-daemon is not installed"),
            Self::Img => (!runs()).then_some("qemu-img is not installed"),
            Self::Unfiltered => (!nix::unistd::geteuid().is_root()).then_some("passing over filters takes root"),
        }
    }

    /// Its command, with what makes QEMU be the machine that is meant.
    pub fn machine(self) -> Command {
        let mut command = self.program();
        match self {
            Self::Bulkhead | Self::Unfiltered | Self::Firecracker | Self::StorageDaemon | Self::Img => &mut command,
            Self::Qemu => command.args(["-M", "q35", "-accel", "kvm"]),
            Self::Microvm => command.args(["-M", "microvm", "-accel", "kvm"]),
        };
        command
    }

    pub fn program(self) -> Command {
        Command::new(self.path())
    }

    /// Starts it with these monitors and waits for the first one.
    pub fn start(self, monitors: &[&str]) -> Started {
        let directory = tempfile::tempdir().expect("scratch directory");
        std::fs::File::create(directory.path().join("disk"))
            .and_then(|file| file.set_len(64 << 20))
            .expect("disk");
        let command = self.command(directory.path());
        Started::launch(command, directory, monitors)
    }

    /// Starts it without a machine: nothing but the block graph and monitors. It may open what is in the folder.
    pub fn start_bare(self, folder: &Path, monitors: &[&str]) -> Started {
        let mut command = self.program();
        let directory = tempfile::tempdir().expect("scratch directory");
        if self == Self::StorageDaemon {
            for name in monitors {
                let path = directory.path().join(name);
                let socket = format!("socket,id={name},path={},server=on,wait=off", path.display());
                command.args(["--chardev", &socket, "--monitor", &format!("chardev={name}")]);
            }
            return Started::wait(command, directory, monitors[0]);
        }
        if self == Self::Bulkhead {
            command.arg("-allow-path").arg(folder);
        }
        command.args(["-machine", "none", "-nodefaults", "-display", "none"]);
        Started::launch(command, directory, monitors)
    }

    /// Two vCPUs, 256 MiB, one disk, a serial port.
    fn command(self, directory: &Path) -> Command {
        let mut command = self.program();
        if self == Self::Qemu {
            command.args(["-M", "q35,memory-backend=ram", "-accel", "kvm"]);
            command.args(["-object", "memory-backend-memfd,id=ram,size=256M,share=on"]);
        }
        command.args(["-nodefaults", "-display", "none", "-m", "256", "-smp", "2", "-S"]);
        command.args(["-serial", "null", "-kernel"]).arg(guest::image());
        command.arg("-drive");
        command.arg(format!("file={}/disk,if=virtio,format=raw", directory.display()));
        command
    }
}

impl Started {
    /// Starts a program with these monitors and waits for the first one.
    pub fn launch(mut command: Command, directory: tempfile::TempDir, monitors: &[&str]) -> Self {
        for name in monitors {
            let path = directory.path().join(name);
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", path.display())]);
        }
        Self::wait(command, directory, monitors[0])
    }

    /// Starts a program and waits for a monitor of it.
    fn wait(mut command: Command, directory: tempfile::TempDir, monitor: &str) -> Self {
        let start = Instant::now();
        let child = command.stdin(Stdio::null()).spawn().expect("starting");
        let qmp = loop {
            match Qmp::connect(&directory.path().join(monitor)) {
                Ok(qmp) => break qmp,
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "the monitor does not come up"
            );
        };
        Self {
            child,
            directory,
            qmp,
            ready: start.elapsed(),
        }
    }

    pub fn socket(&self, monitor: &str) -> PathBuf {
        self.directory.path().join(monitor)
    }

    /// The names of its commands.
    pub fn commands(&mut self) -> Vec<String> {
        let list = self.qmp.run("query-commands");
        let name = |entry: &serde_json::Value| Some(entry["name"].as_str()?.to_owned());
        list.as_array().into_iter().flatten().filter_map(name).collect()
    }

    /// Ends it in the middle of whatever it does.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn end(mut self) {
        self.qmp.run("quit");
        let start = Instant::now();
        while self.child.try_wait().expect("wait").is_none() {
            if start.elapsed() > Duration::from_secs(10) {
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A process and its children.
pub fn family(pid: i32) -> Vec<i32> {
    let children = procfs::children(pid);
    [pid].into_iter().chain(children.into_iter().flat_map(family)).collect()
}

/// What a machine's processes take beside guest RAM, MiB. That is a memory fd, or one mapping of all of it.
pub fn memory_mib(pid: i32) -> f64 {
    let pids = family(pid).into_iter();
    let kib: u64 = pids.map(|pid| procfs::pss_kib(pid, "memfd:", LEAST_RAM)).sum();
    kib as f64 / 1024.0
}
