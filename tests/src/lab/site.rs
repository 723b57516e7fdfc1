//! Where `bulkhead` runs in a test: directly on this machine, or in the lab. Tests do the same in both.

use super::agent::LabJob;
use super::guest;
use super::machine;
use super::outer::{GUEST_INITRD, GUEST_KERNEL, Lab, LabBuilder, PROGRAMS, SCRATCH};
use super::pieces::{EXECUTABLES, Kernel, built};
use super::wire::User;
use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Set to `here` or `lab` it overrides the choice.
pub const SITE_VARIABLE: &str = "BULKHEAD_SITE";

/// A place to run `bulkhead`.
pub enum Site {
    /// This machine, whose processor runs stock kernels under KVM.
    Here(Here),
    /// An emulated machine.
    Lab(Box<Lab>),
}

/// This machine, with a folder for one test.
pub struct Here {
    folder: tempfile::TempDir,
}

/// How a script ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit status, or 128 and the signal, as shells count.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// The standard output of a script that must have worked.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.status, 0, "the script failed\n{}\n{}", self.stdout, self.stderr);
        self.stdout
    }
}

impl Site {
    /// Whether tests with a real guest can run; otherwise what is missing.
    pub fn available() -> Result<(), String> {
        let needed: &[&str] = if machine::qemu_instead() { &[] } else { &EXECUTABLES };
        for name in needed {
            let path = built().join(name);
            if !path.is_file() {
                return Err(format!("{name} is not built (cargo build --workspace)"));
            }
        }
        if hardware() {
            Kernel::find().map(|_| ())
        } else {
            Lab::available()
        }
    }

    /// Whether tests can choose who runs `bulkhead`; otherwise why not.
    pub fn has_users() -> Result<(), String> {
        if hardware() {
            return Err("guests run on this machine, as whoever runs the tests".into());
        }
        Ok(())
    }

    /// This machine if its processor can, else a lab.
    pub fn start() -> Result<Self, String> {
        Self::start_with(|lab| lab)
    }

    /// As [`Self::start`]; the closure adds what a lab should contain.
    pub fn start_with(prepare: impl FnOnce(LabBuilder) -> LabBuilder) -> Result<Self, String> {
        if hardware() {
            let folder = tempfile::tempdir().map_err(|error| format!("temporary folder: {error}"))?;
            let initramfs = guest::initramfs(&Kernel::find()?)?;
            fs::write(folder.path().join("initramfs"), initramfs).map_err(|error| format!("initramfs: {error}"))?;
            Ok(Self::Here(Here { folder }))
        } else {
            Ok(Self::Lab(Box::new(prepare(Lab::builder()).start()?)))
        }
    }

    /// One line for people: where guests run, and why there.
    pub fn describe() -> String {
        if hardware() {
            "this machine's processor has VMX or SVM: guests run on it directly".into()
        } else {
            "no VMX or SVM here: guests run in the lab, a machine with SVM emulated by QEMU".into()
        }
    }

    /// Runs a shell script as root (in the lab) or as whoever runs the test (here), and waits for it.
    pub fn run(&self, script: &str) -> Output {
        match self {
            Self::Lab(lab) => lab.run(script),
            Self::Here(_) => {
                let job = self.spawn(script, User::Root).expect("starting a script");
                job.wait(Duration::from_secs(300)).expect("the script ends")
            }
        }
    }

    /// Starts a shell script. Here an ordinary user cannot be chosen: that is an error.
    pub fn spawn(&self, script: &str, user: User) -> Result<Job, String> {
        match self {
            Self::Lab(lab) => lab.start(script, user),
            Self::Here(here) => here.spawn(script, user),
        }
    }

    /// Connects to a Unix socket there.
    pub fn connect(&self, path: &str) -> Result<UnixStream, String> {
        match self {
            Self::Lab(lab) => lab.connect(path),
            Self::Here(_) => UnixStream::connect(path).map_err(|error| format!("{path}: {error}")),
        }
    }

    /// Connects to a Unix socket that may not be there yet.
    pub fn connect_soon(&self, path: &str, deadline: Duration) -> Result<UnixStream, String> {
        let begun = Instant::now();
        loop {
            match self.connect(path) {
                Ok(stream) => return Ok(stream),
                Err(error) if begun.elapsed() > deadline => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Where tests put files there: a real file system, an absolute path.
    pub fn path(&self, name: &str) -> String {
        match self {
            Self::Lab(_) => format!("{SCRATCH}/{name}"),
            Self::Here(here) => here.folder.path().join(name).to_string_lossy().into_owned(),
        }
    }

    /// Copies a file there, as sparse as it is.
    pub fn put(&self, from: &Path, to: &str, mode: u32) -> Result<(), String> {
        match self {
            Self::Lab(lab) => lab.put(from, to, mode),
            Self::Here(_) => copy(from, Path::new(to)),
        }
    }

    /// Copies a file from there.
    pub fn get(&self, from: &str, to: &Path) -> Result<(), String> {
        match self {
            Self::Lab(lab) => lab.get(from, to),
            Self::Here(_) => copy(Path::new(from), to),
        }
    }

    /// `bulkhead` or one of its helpers, there.
    pub fn program(&self, name: &str) -> String {
        match self {
            Self::Lab(_) => format!("{PROGRAMS}/{name}"),
            Self::Here(_) => built().join(name).to_string_lossy().into_owned(),
        }
    }

    /// The guest's kernel and first file system, there.
    pub fn guest(&self) -> (String, String) {
        match self {
            Self::Lab(_) => (GUEST_KERNEL.into(), GUEST_INITRD.into()),
            Self::Here(_) => {
                let kernel = Kernel::find().expect("found before");
                (kernel.image.to_string_lossy().into_owned(), self.path("initramfs"))
            }
        }
    }

    /// What the outer system logged, for the report of a failed test.
    pub fn log(&self) -> String {
        match self {
            Self::Lab(lab) => lab.log(),
            Self::Here(_) => String::new(),
        }
    }
}

/// Whether this machine's KVM can run a stock kernel.
fn hardware() -> bool {
    match std::env::var(SITE_VARIABLE).as_deref() {
        Ok("here") => return true,
        Ok("lab") => return false,
        _ => {}
    }
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let capable = flags
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"));
    capable && File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    // cp keeps holes.
    let status = Command::new("cp").arg("--sparse=always").arg(from).arg(to).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        other => Err(format!("cp {} {}: {other:?}", from.display(), to.display())),
    }
}

/// A script that runs. Killed with everything in its process group when dropped.
pub enum Job {
    /// In the lab.
    Lab(LabJob),
    /// On this machine.
    Here(HereJob),
}

impl Job {
    /// Waits for its end.
    pub fn wait(&self, deadline: Duration) -> Result<Output, String> {
        match self {
            Self::Lab(job) => job.wait(deadline),
            Self::Here(job) => job.wait(deadline),
        }
    }

    /// Signals its process group.
    pub fn signal(&self, signal: i32) {
        match self {
            Self::Lab(job) => job.signal(signal),
            Self::Here(job) => job.signal(signal),
        }
    }
}

impl Here {
    fn spawn(&self, script: &str, user: User) -> Result<Job, String> {
        if user != User::Root {
            return Err("another user can be chosen in the lab only".into());
        }
        let output = tempfile::tempfile().map_err(|error| format!("temporary file: {error}"))?;
        let errors = tempfile::tempfile().map_err(|error| format!("temporary file: {error}"))?;
        let duplicate = |file: &File| file.try_clone().map_err(|error| format!("dup: {error}"));
        let child = Command::new("/bin/sh")
            .args(["-c", script])
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(duplicate(&output)?)
            .stderr(duplicate(&errors)?)
            .process_group(0)
            .spawn()
            .map_err(|error| format!("/bin/sh: {error}"))?;
        Ok(Job::Here(HereJob {
            running: RefCell::new(Running { child, output, errors }),
        }))
    }
}

/// A script on this machine.
pub struct HereJob {
    running: RefCell<Running>,
}

struct Running {
    child: Child,
    output: File,
    errors: File,
}

impl HereJob {
    fn wait(&self, deadline: Duration) -> Result<Output, String> {
        let begun = Instant::now();
        let mut running = self.running.borrow_mut();
        loop {
            match running.child.try_wait() {
                Ok(Some(status)) => {
                    return Ok(Output {
                        status: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
                        stdout: text(&mut running.output),
                        stderr: text(&mut running.errors),
                    });
                }
                Ok(None) if begun.elapsed() < deadline => std::thread::sleep(Duration::from_millis(10)),
                Ok(None) => return Err(format!("no end within {deadline:?}")),
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    fn signal(&self, signal: i32) {
        let group = self.running.borrow().child.id() as i32;
        // SAFETY: kill touches no memory; the child is not reaped yet or the group is gone, which is harmless.
        unsafe { libc::kill(-group, signal) };
    }
}

impl Drop for HereJob {
    fn drop(&mut self) {
        if matches!(self.running.borrow_mut().child.try_wait(), Ok(None)) {
            self.signal(libc::SIGKILL);
            let _ = self.running.borrow_mut().child.wait();
        }
    }
}

fn text(file: &mut File) -> String {
    let mut bytes = Vec::new();
    let _ = file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A path on this machine for a test's own files.
pub fn local_folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().to_owned();
    (folder, path)
}
