//! A whole machine: the real `bulkhead` with the real sandbox, its QMP monitor and its serial port.

use crate::procfs;
use crate::qmp::Qmp;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take before a test fails. Generous: the machines that run tests are shared.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The directory of the programs under test: where cargo put this test's own executable, one up.
///
/// # Panics
/// When `bulkhead` is not there: `cargo build --workspace` comes before the tests (`make test` does it).
pub fn programs() -> PathBuf {
    let test = std::env::current_exe().expect("own executable");
    let directory = test
        .ancestors()
        .find(|path| path.join("bulkhead").is_file() && path.join("vcpu-proc").is_file());
    directory
        .unwrap_or_else(|| {
            panic!(
                "no bulkhead above {}: run `cargo build --workspace` first",
                test.display()
            )
        })
        .into()
}

/// Why tests that run a guest cannot run here, if they cannot.
pub fn kvm_missing() -> Option<String> {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => None,
        Err(error) => Some(format!("/dev/kvm: {error}")),
    }
}

/// Returns from the test, and says why, when there is no KVM.
#[macro_export]
macro_rules! need_kvm {
    () => {
        if let Some(reason) = $crate::machine::kvm_missing() {
            println!("SKIPPED: {reason}");
            return;
        }
    };
}

/// Waits until a condition holds.
///
/// # Panics
/// When it does not within [`PATIENCE`].
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "still not: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A running `bulkhead`. Killed when dropped.
pub struct Machine {
    child: Child,
    /// Scratch directory, with the monitor's socket and the serial port's file in it.
    pub directory: tempfile::TempDir,
}

impl Machine {
    /// Starts `bulkhead` with a monitor at `qmp`, a serial port into the file `serial`, and these further arguments
    /// (split at blanks; `{dir}` is the scratch directory).
    pub fn start(arguments: &str) -> Self {
        Self::start_in(tempfile::tempdir().expect("scratch directory"), arguments)
    }

    /// As [`Self::start`], in a scratch directory that exists already.
    pub fn start_in(directory: tempfile::TempDir, arguments: &str) -> Self {
        Self::start_with(directory, arguments, &[])
    }

    /// As [`Self::start_in`], with further arguments that are not split.
    pub fn start_with(directory: tempfile::TempDir, arguments: &str, whole: &[&str]) -> Self {
        let serial = format!("-serial file:{}/serial {arguments}", directory.path().display());
        Self::start_without_serial(directory, &serial, whole)
    }

    /// As [`Self::start_with`], but what the serial port is connected to is among the arguments.
    pub fn start_without_serial(directory: tempfile::TempDir, arguments: &str, whole: &[&str]) -> Self {
        let command = Command::new(programs().join("bulkhead"));
        Self::start_command(directory, command, arguments, whole)
    }

    /// As [`Self::start_without_serial`], with a command that becomes `bulkhead` (`setpriv … bulkhead`): the arguments are
    /// added to it.
    pub fn start_command(directory: tempfile::TempDir, command: Command, arguments: &str, whole: &[&str]) -> Self {
        let log = std::fs::File::create(directory.path().join("log")).expect("log file");
        Self::start_command_logging(directory, command, arguments, whole, log.into())
    }

    /// As [`Self::start_command`], with the log elsewhere.
    pub fn start_command_logging(
        directory: tempfile::TempDir,
        mut command: Command,
        arguments: &str,
        whole: &[&str],
        log: OwnedFd,
    ) -> Self {
        let path = directory.path().display().to_string();
        command.args(["-nodefaults", "-display", "none", "-name", "test"]);
        command.args(["-qmp", &format!("unix:{path}/qmp,server=on,wait=off")]);
        command
            .args(
                arguments
                    .split_whitespace()
                    .map(|argument| argument.replace("{dir}", &path)),
            )
            .args(whole);
        let output = std::fs::File::create(directory.path().join("output")).expect("log file");
        let child = command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(log)
            .spawn()
            .expect("starting bulkhead");
        Self { child, directory }
    }

    /// The supervisor's process id.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// A path in the scratch directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// As [`Self::path`], as text.
    pub fn path_text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// What `bulkhead` has written to its standard output: the human monitor's `qemu-io` does.
    pub fn output(&self) -> String {
        std::fs::read_to_string(self.path("output")).unwrap_or_default()
    }

    /// What `bulkhead` has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// What the guest has written to its serial port.
    pub fn serial(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.path("serial")).unwrap_or_default()).into_owned()
    }

    /// Waits until the guest has written a text to its serial port.
    pub fn wait_for_serial(&mut self, text: &str) {
        let start = Instant::now();
        while !self.serial().contains(text) {
            let ended = self.child.try_wait().expect("wait");
            let state = format!("serial: {:?}\nlog: {}", self.serial(), self.log());
            assert!(
                ended.is_none() || self.serial().contains(text),
                "bulkhead ended ({ended:?}) before {text:?}\n{state}"
            );
            assert!(start.elapsed() < PATIENCE, "no {text:?}\n{state}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Connects to the monitor as soon as it takes clients, and negotiates.
    pub fn qmp(&mut self) -> Qmp {
        let path = self.path("qmp");
        let start = Instant::now();
        loop {
            if let Ok(qmp) = Qmp::connect(&path) {
                return qmp;
            }
            let ended = self.child.try_wait().expect("wait");
            assert!(ended.is_none(), "bulkhead ended: {ended:?}\n{}", self.log());
            assert!(start.elapsed() < PATIENCE, "no monitor\n{}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The launcher and all helpers: name and pid.
    pub fn helpers(&self) -> Vec<(String, i32)> {
        let launcher = procfs::children(self.pid());
        let helpers = launcher.iter().flat_map(|pid| procfs::children(*pid));
        helpers.filter_map(|pid| Some((procfs::name(pid)?, pid))).collect()
    }

    /// All its processes, the supervisor among them.
    pub fn processes(&self) -> Vec<i32> {
        let helpers = self.helpers().into_iter().map(|(_, pid)| pid);
        helpers
            .chain(procfs::children(self.pid()))
            .chain([self.pid()])
            .collect()
    }

    /// Kills the supervisor and waits until every process is gone.
    pub fn kill(&mut self) {
        let processes = self.processes();
        self.child.kill().expect("kill");
        self.wait();
        wait_until("no process is left", || {
            !processes.iter().any(|pid| procfs::is_alive(*pid))
        });
    }

    /// The launcher's pid.
    pub fn launcher(&self) -> i32 {
        let children = procfs::children(self.pid());
        let is_launcher = |pid: &i32| procfs::name(*pid).as_deref() == Some("bulkhead");
        children.into_iter().find(is_launcher).expect("a launcher")
    }

    /// The opener's pid, where there is one.
    pub fn opener(&self) -> Option<i32> {
        let children = procfs::children(self.pid());
        children
            .into_iter()
            .find(|pid| procfs::name(*pid).as_deref() == Some("opener"))
    }

    /// The first helper of this name.
    pub fn helper(&self, name: &str) -> i32 {
        let helpers = self.helpers();
        helpers
            .iter()
            .find(|(helper, _)| helper == name)
            .map(|(_, pid)| *pid)
            .unwrap_or_else(|| panic!("no {name} in {helpers:?}"))
    }

    /// Waits for the end and returns the exit status.
    pub fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                return status;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "bulkhead does not end\n{}\nserial: {:?}",
                self.log(),
                self.serial()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `bulkhead` with arguments that it must refuse; returns what it printed.
///
/// # Panics
/// Unless it exits with status 1, with one line, within [`PATIENCE`].
pub fn refused(directory: &Path, arguments: &[&str]) -> String {
    let mut child = Command::new(programs().join("bulkhead"))
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starting bulkhead");
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("wait") {
            break status;
        }
        if start.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("bulkhead {arguments:?} goes on");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let mut text = String::new();
    child
        .stderr
        .take()
        .expect("stderr")
        .read_to_string(&mut text)
        .expect("reading stderr");
    assert_eq!(status.code(), Some(1), "bulkhead {arguments:?}: {status}: {text}");
    assert_eq!(
        text.lines().count(),
        1,
        "bulkhead {arguments:?} says more or less than one line: {text:?}"
    );
    text
}
