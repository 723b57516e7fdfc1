//! The outer system: an emulated machine with SVM that runs Debian's kernel and, in it, `bulkhead`.

use super::agent::Agent;
use super::console::last_lines;
use super::cpio::Archive;
use super::guest::{self, add_modules, read};
use super::pieces::{self, EXECUTABLES, Kernel, busybox, find_program, libraries, qemu, stripped, tests_folder};
use super::site::{Job, Output};
use super::wire::User;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// `bulkhead` and its helpers in the lab.
pub const PROGRAMS: &str = "/opt/bulkhead";
/// The guest's kernel in the lab.
pub const GUEST_KERNEL: &str = "/opt/guest/vmlinuz";
/// The guest's first file system in the lab.
pub const GUEST_INITRD: &str = "/opt/guest/initramfs";
/// A real file system (ext4 on a disk) in the lab, writable for everybody.
pub const SCRATCH: &str = "/scratch";

/// How long the outer system may take to come up. It takes 4 s on an idle machine.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);

const MODULES: [&str; 6] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "ext4",
    "kvm_amd",
];

/// /scratch is a sparse file on the host; what is never written costs nothing.
const SCRATCH_BYTES: u64 = 8 << 30;

/// A running lab. Switched off when dropped.
pub struct Lab {
    qemu: Child,
    agent: Agent,
    folder: tempfile::TempDir,
    /// How long it took from nothing to a working agent.
    pub boot_time: Duration,
}

/// What goes into a lab.
pub struct LabBuilder {
    memory_mib: u32,
    files: Vec<(String, u32, Vec<u8>)>,
    disks: Vec<PathBuf>,
}

impl LabBuilder {
    /// A file that is there from the start.
    pub fn file(mut self, path: &str, mode: u32, content: Vec<u8>) -> Self {
        self.files.push((path.to_owned(), mode, content));
        self
    }

    /// A program of the host with its shared libraries, at the same paths.
    pub fn program(mut self, path: &Path) -> Self {
        for part in std::iter::once(path.to_owned()).chain(libraries(path)) {
            if let Ok(content) = fs::read(&part) {
                self.files.push((part.to_string_lossy().into_owned(), 0o755, content));
            }
        }
        self
    }

    /// A folder of the host with everything in it, at the same path.
    pub fn folder(mut self, path: &Path) -> Self {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                self = self.folder(&path);
            } else if let Ok(content) = fs::read(&path) {
                self.files.push((path.to_string_lossy().into_owned(), 0o644, content));
            }
        }
        self
    }

    /// An image of the host as a block device: the first is /dev/vdb, the next /dev/vdc. What the lab has flushed, or
    /// written before it was dropped, is in the file.
    pub fn disk(mut self, image: &Path) -> Self {
        self.disks.push(image.to_owned());
        self
    }

    /// Boots it.
    pub fn start(self) -> Result<Lab, String> {
        let begun = Instant::now();
        let kernel = Kernel::find()?;
        let folder = tempfile::tempdir().map_err(|error| format!("temporary folder: {error}"))?;
        let initramfs = folder.path().join("initramfs");
        fs::write(&initramfs, self.initramfs(&kernel)?).map_err(|error| format!("{}: {error}", initramfs.display()))?;
        let scratch = folder.path().join("scratch.img");
        make_ext4(&scratch, SCRATCH_BYTES)?;
        let socket = folder.path().join("agent");
        let output = File::create(folder.path().join("qemu.log")).map_err(|error| format!("log: {error}"))?;
        let mut command = Command::new(qemu()?);
        command
            .args([
                "-accel",
                "tcg,thread=multi,tb-size=512",
                "-machine",
                "pc",
                "-cpu",
                "max,+svm",
            ])
            // QEMU's emulation of SVM changes a CPU's pending interrupts without a lock when a guest is entered or left
            // (seen in 7.2). An interrupt from another CPU at that moment is lost, or mixes the states of host and guest:
            // guests stall or reset, and the outer kernel itself panics, in one of three runs under load. With one CPU
            // no run did.
            .args(["-smp", "1", "-m", &format!("{}M", self.memory_mib)])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-kernel", path(&kernel.image), "-initrd", path(&initramfs)])
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 mitigations=off loglevel=5 softlockup_all_cpu_backtrace=1 tsc=reliable",
            ])
            .args(["-serial", &format!("file:{}", folder.path().join("console").display())])
            .args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"])
            .args([
                "-chardev",
                &format!("socket,id=agent,path={},server=on,wait=on", socket.display()),
            ])
            .args(["-device", "virtserialport,chardev=agent,name=bulkhead.agent"]);
        for image in std::iter::once(&scratch).chain(&self.disks) {
            let drive = format!(
                "file={},if=virtio,format=raw,cache=writeback,discard=unmap",
                image.display()
            );
            command.args(["-drive", &drive]);
        }
        let log = output.try_clone().map_err(|error| format!("log: {error}"))?;
        let qemu = command
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(output)
            .spawn()
            .map_err(|error| format!("starting QEMU: {error}"))?;
        // Kills QEMU when anything below fails.
        let mut starting = Starting(Some(qemu));
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(_) if starting.runs() && begun.elapsed() < BOOT_DEADLINE => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => return Err(format!("QEMU does not listen: {error}\n{}", tail(folder.path()))),
            }
        };
        let agent = Agent::new(stream).map_err(|error| format!("the lab's socket: {error}"))?;
        agent
            .start("true", User::Root)
            .and_then(|job| job.wait(BOOT_DEADLINE))
            .map_err(|error| format!("the lab does not come up: {error}\n{}", tail(folder.path())))?;
        Ok(Lab {
            qemu: starting.0.take().expect("taken once"),
            agent,
            folder,
            boot_time: begun.elapsed(),
        })
    }

    fn initramfs(&self, kernel: &Kernel) -> Result<Vec<u8>, String> {
        let mut archive = Archive::new();
        archive.file("init", 0o755, &read(&tests_folder().join("lab/outer/init"))?);
        archive.file("bin/busybox", 0o755, &busybox()?);
        add_modules(&mut archive, kernel, &MODULES)?;
        let agent = stripped("lab-agent").ok_or("lab-agent is not built (cargo build --workspace)")?;
        archive.file("bin/lab-agent", 0o755, &agent);
        for name in EXECUTABLES {
            if let Some(content) = stripped(name) {
                archive.file(&format!("{PROGRAMS}/{name}"), 0o755, &content);
            }
        }
        archive.file(GUEST_KERNEL, 0o644, &read(&kernel.image)?);
        archive.file(GUEST_INITRD, 0o644, &guest::initramfs(kernel)?);

        // An ordinary user with subordinate ids, as adduser makes one.
        archive.file(
            "etc/passwd",
            0o644,
            b"root:x:0:0:root:/root:/bin/sh\ntester:x:1000:1000::/home/tester:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
        );
        archive.file(
            "etc/group",
            0o644,
            b"root:x:0:\nkvm:x:104:tester\ntester:x:1000:\nnogroup:x:65534:\n",
        );
        archive.file("etc/subuid", 0o644, b"tester:100000:65536\n");
        archive.file("etc/subgid", 0o644, b"tester:100000:65536\n");
        archive.file(
            "etc/nsswitch.conf",
            0o644,
            b"passwd: files\ngroup: files\nsubid: files\n",
        );
        for program in pieces::id_mappers() {
            let name = program
                .file_name()
                .expect("a program has a name")
                .to_string_lossy()
                .into_owned();
            archive.file(&format!("usr/bin/{name}"), 0o4755, &read(&program)?);
            for library in libraries(&program) {
                // Libraries that were only unpacked go where the loader looks.
                let target = match library.to_str().and_then(|path| path.split_once("/.cache/debian/")) {
                    Some((_, inside)) => inside.to_owned(),
                    None => library.to_string_lossy().into_owned(),
                };
                archive.file(&target, 0o755, &read(&library)?);
            }
        }
        for (path, mode, content) in &self.files {
            archive.file(path, *mode, content);
        }
        Ok(archive.finish())
    }
}

impl Lab {
    /// Whether a lab can be booted here; otherwise what is missing.
    pub fn available() -> Result<(), String> {
        let kernel = Kernel::find()?;
        kernel.modules(&MODULES)?;
        qemu()?;
        busybox()?;
        for program in ["mke2fs", "e2fsck", "debugfs"] {
            find_program(program).ok_or_else(|| format!("no {program} (make packages installs e2fsprogs)"))?;
        }
        Ok(())
    }

    /// A lab with `bulkhead`, its helpers and a guest to boot, as far as they are built.
    pub fn builder() -> LabBuilder {
        LabBuilder {
            memory_mib: 6144,
            files: Vec::new(),
            disks: Vec::new(),
        }
    }

    /// Runs a shell script as root and waits for it.
    pub fn run(&self, script: &str) -> Output {
        let job = self.start(script, User::Root).expect("starting a script in the lab");
        job.wait(Duration::from_secs(300))
            .unwrap_or_else(|error| self.die(&error))
    }

    /// Starts a shell script.
    pub fn start(&self, script: &str, user: User) -> Result<Job, String> {
        Ok(Job::Lab(self.agent.start(script, user)?))
    }

    /// Connects to a Unix socket in the lab; the result behaves like a connection to it.
    pub fn connect(&self, path: &str) -> Result<UnixStream, String> {
        self.agent.connect(path)
    }

    /// Copies a file of the host into the lab, as sparse as it is.
    pub fn put(&self, from: &Path, to: &str, mode: u32) -> Result<(), String> {
        self.agent.put(from, to, mode)
    }

    /// Copies a file of the lab to the host; blocks of zeroes become holes.
    pub fn get(&self, from: &str, to: &Path) -> Result<(), String> {
        self.agent.get(from, to)
    }

    /// What the outer kernel and the agent wrote.
    pub fn log(&self) -> String {
        tail(self.folder.path())
    }

    fn die(&self, error: &str) -> ! {
        panic!("the lab: {error}\n{}", self.log())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // The outer system unmounts and switches off when the agent sees the end of its port.
        self.agent.hang_up();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(10) {
            if matches!(self.qemu.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

struct Starting(Option<Child>);

impl Starting {
    fn runs(&mut self) -> bool {
        self.0
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The end of what QEMU and the outer system wrote.
fn tail(folder: &Path) -> String {
    let mut text = String::new();
    for name in ["qemu.log", "console"] {
        let content = fs::read(folder.join(name)).unwrap_or_default();
        let content = String::from_utf8_lossy(&content);
        text.push_str(&format!("--- {name}\n{}\n", last_lines(&content)));
    }
    text
}

/// Makes a sparse image with an empty ext4 file system.
pub fn make_ext4(image: &Path, bytes: u64) -> Result<(), String> {
    let file = File::create(image).map_err(|error| format!("{}: {error}", image.display()))?;
    file.set_len(bytes)
        .map_err(|error| format!("{}: {error}", image.display()))?;
    let program = find_program("mke2fs").ok_or("no mke2fs")?;
    let output = Command::new(program)
        .args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-E",
            "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
        ])
        .arg(image)
        .output()
        .map_err(|error| format!("mke2fs: {error}"))?;
    if !output.status.success() {
        return Err(format!("mke2fs: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(())
}

fn path(path: &Path) -> &str {
    path.to_str()
        .expect("paths of the source tree and of temporary files are text")
}
