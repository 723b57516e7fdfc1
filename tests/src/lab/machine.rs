//! One run of `bulkhead` with a Linux guest.

use super::console::{Console, last_lines};
use super::qmp::Qmp;
use super::site::{Job, Output, Site};
use super::wire::User;
use serde_json::json;
use std::fmt::Write as _;
use std::time::Duration;

/// Set to `qemu` the tests run QEMU in the place of `bulkhead`, with the same command line: when both fail, the test or
/// the lab is wrong.
pub const HYPERVISOR_VARIABLE: &str = "BULKHEAD_HYPERVISOR";

/// How long `bulkhead` may take until its monitor answers.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// A machine to start.
pub struct MachineBuilder<'site> {
    site: &'site Site,
    name: String,
    vcpus: u32,
    memory_mib: u32,
    append: String,
    disks: Vec<String>,
    options: String,
    user: User,
    echo: bool,
}

impl<'site> MachineBuilder<'site> {
    /// How many vCPUs; 1 unless told.
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// How much RAM; 512 MiB unless told.
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// A raw image, by its path there; the first is the guest's /dev/vda.
    pub fn disk(mut self, path: &str) -> Self {
        self.disks.push(path.to_owned());
        self
    }

    /// Scripts that the guest runs when it is up, by their names without `guest-`; a shell comes after them.
    pub fn run(mut self, scripts: &str) -> Self {
        let _ = write!(self.append, " bulkhead.run={scripts}");
        self
    }

    /// More for the kernel's command line.
    pub fn append(mut self, words: &str) -> Self {
        let _ = write!(self.append, " {words}");
        self
    }

    /// More options.
    pub fn option(mut self, option: &str) -> Self {
        let _ = write!(self.options, " {option}");
        self
    }

    /// Who runs it.
    pub fn user(mut self, user: User) -> Self {
        self.user = user;
        self
    }

    /// Shows the console and the monitor's conversation on standard output.
    pub fn echo(mut self) -> Self {
        self.echo = true;
        self
    }

    /// Starts it paused, connects to its console and its monitor, and lets it go.
    pub fn start(self) -> Result<Machine<'site>, String> {
        let mut machine = self.start_paused()?;
        machine.qmp.command("cont", json!({}))?;
        Ok(machine)
    }

    /// Starts it and connects; the guest has not executed anything.
    pub fn start_paused(self) -> Result<Machine<'site>, String> {
        let site = self.site;
        let serial = site.path(&format!("{}.serial", self.name));
        let monitor = site.path(&format!("{}.qmp", self.name));
        let pidfile = site.path(&format!("{}.pid", self.name));
        let command = self.command(&serial, &monitor, &pidfile);
        let log = site.path(&format!("{}.log", self.name));
        let job = site.spawn(&format!("exec {command} 2>{log}"), self.user)?;
        match connect(site, &monitor, &serial, self.echo) {
            Ok((qmp, console)) => Ok(Machine {
                site,
                name: self.name,
                command,
                job,
                console,
                qmp,
                pidfile,
                log,
            }),
            Err(error) => {
                let end = job.wait(Duration::from_millis(200));
                let log = site.run(&format!("cat {log}")).stdout;
                Err(format!("{error}\n{command}\n{end:?}\n{log}"))
            }
        }
    }

    fn command(&self, serial: &str, monitor: &str, pidfile: &str) -> String {
        let (kernel, initrd) = self.site.guest();
        let mut command = if qemu_instead() {
            format!(
                "qemu-system-x86_64 -accel kvm -nodefaults -device pvpanic -name {}",
                self.name
            )
        } else {
            format!("{} -name {}", self.site.program("bulkhead"), self.name)
        };
        let _ = write!(
            command,
            " -m {}M -smp {} -cpu host -kernel {kernel} -initrd {initrd} -append 'console=ttyS0 quiet{}'",
            self.memory_mib, self.vcpus, self.append
        );
        for (index, disk) in self.disks.iter().enumerate() {
            let _ = write!(command, " -drive file={disk},if=virtio,format=raw,id=disk{index}");
        }
        let _ = write!(
            command,
            " -serial unix:{serial},server=on,wait=off -qmp unix:{monitor},server=on,wait=off -display none \
             -pidfile {pidfile} -S{}",
            self.options
        );
        command
    }
}

fn connect(site: &Site, monitor: &str, serial: &str, echo: bool) -> Result<(Qmp, Console), String> {
    let qmp = Qmp::new(site.connect_soon(monitor, START_DEADLINE)?, echo)?;
    let console = Console::new(site.connect(serial)?, echo);
    Ok((qmp, console))
}

pub(super) fn qemu_instead() -> bool {
    std::env::var(HYPERVISOR_VARIABLE).as_deref() == Ok("qemu")
}

/// What the lab needs so that [`HYPERVISOR_VARIABLE`] works.
pub fn hypervisor(lab: super::outer::LabBuilder) -> super::outer::LabBuilder {
    if !qemu_instead() {
        return lab;
    }
    let lab = lab.program(&super::pieces::qemu().expect("checked before"));
    ["/usr/share/qemu", "/usr/share/seabios", "/usr/lib/ipxe/qemu"]
        .iter()
        .fold(lab, |lab, folder| lab.folder(std::path::Path::new(folder)))
}

/// A running machine. Killed when dropped.
pub struct Machine<'site> {
    site: &'site Site,
    /// `-name`.
    pub name: String,
    /// Its command line.
    pub command: String,
    /// The supervisor.
    pub job: Job,
    /// The serial port.
    pub console: Console,
    /// The monitor.
    pub qmp: Qmp,
    /// Holds the supervisor's process id.
    pub pidfile: String,
    /// Its standard error.
    pub log: String,
}

impl<'site> Machine<'site> {
    /// A machine on a site. Names must differ between machines that run at the same time.
    pub fn builder(site: &'site Site, name: &str) -> MachineBuilder<'site> {
        MachineBuilder {
            site,
            name: name.to_owned(),
            vcpus: 1,
            memory_mib: 512,
            append: String::new(),
            disks: Vec::new(),
            options: String::new(),
            user: User::Root,
            echo: false,
        }
    }

    /// Types a command into the guest's shell and gives what it printed.
    pub fn shell(&self, command: &str, deadline: Duration) -> Result<String, String> {
        // The quotes keep the echoed line from matching.
        const TYPED_END: &str = "end-\"of-command\"";
        self.console.send(&format!("{command}; echo {TYPED_END}\n"))?;
        self.expect(TYPED_END, deadline)?;
        let output = self.expect("end-of-command", deadline)?;
        // What was typed before the prompt was there is echoed by the terminal, and again by the shell.
        let output = output.rsplit(TYPED_END).next().unwrap_or_default();
        Ok(output
            .trim_end_matches("end-of-command")
            .replace('\r', "")
            .trim()
            .to_owned())
    }

    /// Waits for a text on the console; a failure says how `bulkhead` ended, if it did.
    pub fn expect(&self, wanted: &str, deadline: Duration) -> Result<String, String> {
        self.console.expect(wanted, deadline).map_err(|error| {
            let end = match self.job.wait(Duration::from_millis(500)) {
                Ok(end) => format!("bulkhead ended with status {}", end.status),
                Err(_) => "bulkhead still runs".into(),
            };
            format!("{}: {error}\n{end}\n{}", self.name, self.state())
        })
    }

    /// What `bulkhead` wrote, where its threads wait, and what the outer system logged.
    fn state(&self) -> String {
        let script = STATE.replace("LOG", &self.log);
        let state = self.site.spawn(&script, User::Root);
        let state = state.and_then(|job| job.wait(Duration::from_secs(20)));
        let state = state.map_or_else(|error| error, |output| output.stdout);
        format!("{state}\n{}", self.site.log())
    }

    /// Waits for the end of `bulkhead`.
    pub fn end(self, deadline: Duration) -> Result<Output, String> {
        let end = self.job.wait(deadline);
        end.map_err(|error| {
            let console = last_lines(&self.console.transcript());
            format!("{}: {error}\n{console}\n{}", self.name, self.state())
        })
    }
}

/// One line for each thread: its state, its system call, and where in the kernel it waits.
const STATE: &str = r#"
echo '--- log of bulkhead'
cat LOG
echo '--- its threads'
for process in /proc/[0-9]*; do
    case $(readlink "$process/exe") in */bulkhead | */*-proc) ;; *) continue ;; esac
    echo "$(readlink "$process/exe") $(sed -n 's/^\(PPid\|State\|Uid\):[[:space:]]*/\1 /p' "$process/status" | tr '\n\t' '  ')"
    for task in "$process"/task/*; do
        echo "  ${task##*/} $(cat "$task/comm") $(cat "$task/wchan") syscall $(cut -d' ' -f1-4 "$task/syscall")"
    done
done
"#;
