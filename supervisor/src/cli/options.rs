//! The table of options: parsing, `--help` and "did you mean" follow from it.

use super::draft::Draft;
use super::error::UsageError;
use super::given::Given;
use super::keyval::{Keys, Pairs};
use super::{Invocation, accepted, blockdev, boot, chardev, cpu, device, drive, fd, hosting, machine, object};
use ipc::action::{RebootAction, ShutdownAction};
use std::ffi::OsString;

/// One option.
pub(super) struct OptionSpec {
    /// Its names, without dashes; help shows the first.
    pub(super) names: &'static [&'static str],
    /// What help calls its value; empty when there is none.
    pub(super) value: &'static str,
    /// Where help lists it.
    pub(super) group: Group,
    /// What help says about it.
    pub(super) help: &'static str,
    /// What it does.
    pub(super) action: Action,
}

/// Help's headings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Group {
    /// What the machine is.
    Machine,
    /// What it boots.
    Boot,
    /// Its disks.
    Disks,
    /// Its console and its monitors.
    Consoles,
    /// How it runs.
    Running,
    /// About Bulkhead.
    Information,
    /// Accepted because QEMU's command lines have them; they change nothing.
    Compatibility,
}

impl Group {
    /// In help's order, with headings.
    pub(super) const ALL: [(Self, &'static str); 7] = [
        (Self::Machine, "Machine"),
        (Self::Boot, "Boot"),
        (Self::Disks, "Disks"),
        (Self::Consoles, "Console and monitors"),
        (Self::Running, "Running"),
        (Self::Information, "Information"),
        (
            Self::Compatibility,
            "Accepted for the sake of QEMU's command lines; they ask for what is so anyway",
        ),
    ];
}

/// What an option does.
pub(super) enum Action {
    /// Has no value.
    Flag(fn(&mut Draft, &str)),
    /// Reads its value by itself.
    Whole(fn(&mut Draft, &Given) -> Result<(), UsageError>),
    /// Reads its value by itself, as pairs with one of these sets of keys.
    Forms(
        &'static [&'static Keys],
        fn(&mut Draft, &Given) -> Result<(), UsageError>,
    ),
    /// Reads `key=value` pairs.
    Pairs(&'static Keys, fn(&mut Draft, &Pairs) -> Result<(), UsageError>),
    /// Takes what is so anyway: the keys check all there is to check.
    Accept(&'static Keys),
    /// Is answered at once.
    Answer(fn() -> Invocation),
}

impl OptionSpec {
    /// Whether the next argument belongs to it.
    pub(super) fn takes_value(&self) -> bool {
        !matches!(self.action, Action::Flag(_) | Action::Answer(_))
    }

    /// Does what the option says; `spelled` is how the user wrote it.
    pub(super) fn apply(&self, draft: &mut Draft, spelled: &str, value: OsString) -> Result<(), UsageError> {
        let given = Given::whole(spelled, value);
        let pairs = |draft: &mut Draft, keys: &'static Keys| match keys.list {
            Some(list) if given.value == "help" || given.value == "?" => {
                draft.answer = Some(list());
                Ok(None)
            }
            _ => Pairs::parse(&given, &given.value, keys).map(Some),
        };
        match &self.action {
            Action::Flag(set) => set(draft, spelled),
            Action::Answer(answer) => draft.answer = Some(answer()),
            Action::Whole(read) | Action::Forms(_, read) => read(draft, &given)?,
            Action::Accept(keys) => drop(pairs(draft, keys)?),
            Action::Pairs(keys, read) => {
                if let Some(pairs) = pairs(draft, keys)? {
                    read(draft, &pairs)?;
                }
            }
        }
        Ok(())
    }
}

/// The option of this name.
pub(super) fn find(name: &str) -> Option<&'static OptionSpec> {
    OPTIONS.iter().find(|option| option.names.contains(&name))
}

const fn option(
    names: &'static [&'static str],
    value: &'static str,
    group: Group,
    action: Action,
    help: &'static str,
) -> OptionSpec {
    OptionSpec {
        names,
        value,
        group,
        help,
        action,
    }
}

/// An option that changes nothing.
const fn accept(name: &'static [&'static str], value: &'static str, keys: &'static Keys) -> OptionSpec {
    option(name, value, Group::Compatibility, Action::Accept(keys), "")
}

fn nothing(_: &mut Draft, _: &str) {}

/// All options.
pub(super) static OPTIONS: &[OptionSpec] = &[
    option(
        &["name"],
        "NAME",
        Group::Machine,
        Action::Pairs(&machine::NAME_KEYS, machine::name),
        "the VM's name, in logs and for query-name",
    ),
    option(
        &["m"],
        "SIZE",
        Group::Machine,
        Action::Pairs(&machine::MEMORY_KEYS, machine::memory),
        "memory: 512 (MiB), 512M, 2G, 1.5G (default 128M)",
    ),
    option(
        &["smp"],
        "N[,sockets=N][,cores=N][,threads=N]",
        Group::Machine,
        Action::Pairs(&cpu::SMP_KEYS, cpu::smp),
        "how many vCPUs, 1 to 255 (default 1), and how they are arranged",
    ),
    option(
        &["cpu"],
        "host[,+FEATURE][,-FEATURE]",
        Group::Machine,
        Action::Whole(cpu::cpu),
        "the host's CPU, with features switched on or off",
    ),
    option(
        &["machine", "M"],
        "TYPE",
        Group::Machine,
        Action::Pairs(&machine::MACHINE_KEYS, machine::machine),
        "bulkhead (default) or q35, which is the same here; none has no guest: it serves images and QMP alone; 'help' \
         lists them",
    ),
    option(
        &["accel"],
        "kvm|qtest",
        Group::Machine,
        Action::Pairs(&machine::ACCEL_KEYS, machine::accel),
        "Bulkhead runs on KVM; there is no emulation. With qtest nothing runs: for tests of the block graph and QMP",
    ),
    option(
        &["enable-kvm"],
        "",
        Group::Machine,
        Action::Flag(|draft, _| draft.accelerator_chosen = true),
        "the same as -accel kvm",
    ),
    option(
        &["uuid"],
        "UUID",
        Group::Machine,
        Action::Whole(machine::uuid),
        "the VM's UUID",
    ),
    option(
        &["kernel"],
        "FILE",
        Group::Boot,
        Action::Whole(boot::kernel),
        "the kernel to boot: a Linux bzImage or an ELF vmlinux (required)",
    ),
    option(
        &["initrd"],
        "FILE",
        Group::Boot,
        Action::Whole(boot::initrd),
        "its initial RAM disk",
    ),
    option(
        &["append"],
        "TEXT",
        Group::Boot,
        Action::Whole(boot::append),
        "its command line, such as \"console=ttyS0 root=/dev/vda\"",
    ),
    option(
        &["drive"],
        "file=FILE,if=virtio,format=raw|qcow2[,...]",
        Group::Disks,
        Action::Forms(&[&drive::DRIVE_KEYS], drive::drive),
        "a virtio disk: an image or a block device. A comma in FILE is written twice. \
         readonly=on; id=NAME; serial=TEXT (20 bytes); \
         cache=writeback (default), none, writethrough, directsync or unsafe; \
         aio=io_uring, threads or native (default: io_uring where the host allows it); \
         discard=unmap lets the guest punch holes; num-queues=N (default: one per vCPU)",
    ),
    option(
        &["blockdev"],
        "DRIVER,node-name=NAME[,...]",
        Group::Disks,
        Action::Whole(blockdev::blockdev),
        "a node of the block graph, as QMP's blockdev-add describes it, or a JSON object that does: file and host_device \
         (filename=FILE), raw and qcow2 (file=NAME or file.driver=...), luks, null-co, throttle, copy-on-read; \
         -device virtio-blk-pci,drive=NAME uses it",
    ),
    option(
        &["device"],
        "DRIVER[,id=ID][,addr=SLOT][,...]",
        Group::Machine,
        Action::Whole(device::device),
        "a device: virtio-blk-pci,drive=ID for a -drive with if=none or a -blockdev (iothread=ID, num-queues=N, queue-size=N, \
         serial=TEXT); virtio-rng-pci gives random numbers (rng=ID, and at most max-bytes=N in period=MS); \
         vmcoreinfo lets a Linux guest say where its note for dumps is. The value may be a JSON object; 'help' lists the \
         devices",
    ),
    option(
        &["object"],
        "TYPE,id=ID[,...]",
        Group::Machine,
        Action::Whole(object::object),
        "an object that devices use, or a JSON object that describes it: rng-random (filename=FILE), rng-builtin, iothread, \
         throttle-group (limits.iops-total=N ...), secret (data=TEXT or file=FILE, format=base64), \
         memory-backend-memfd (size=SIZE; -machine memory-backend=ID makes it guest memory)",
    ),
    option(
        &["spare-iothreads"],
        "N",
        Group::Machine,
        Action::Whole(object::spare_io_threads),
        "how many iothreads QMP's object-add can add to the running machine (default 2)",
    ),
    option(
        &["allow-path"],
        "DIR",
        Group::Disks,
        Action::Whole(drive::allow_path),
        "images may name backing files below DIR, which are opened read-only; a name elsewhere is refused. Can be given \
         several times",
    ),
    option(
        &["add-fd"],
        "fd=N,set=M[,opaque=TEXT]",
        Group::Disks,
        Action::Pairs(&fd::ADD_FD_KEYS, fd::add_fd),
        "an open file from the parent process: what is called /dev/fdset/M opens the one of set M with the access mode \
         that is needed; TEXT is shown by query-fdsets",
    ),
    option(
        &["serial"],
        "WHERE",
        Group::Consoles,
        Action::Whole(chardev::serial),
        "the serial port (the guest's ttyS0): stdio, file:FILE, pipe:PATH, unix:PATH,server=on,wait=off, \
         tcp:HOST:PORT,server=on,wait=off, pty, null, none or chardev:ID",
    ),
    option(
        &["nographic"],
        "",
        Group::Consoles,
        Action::Flag(|draft, spelled| {
            draft.no_graphic = Some(Given {
                option: spelled.into(),
                shown: "(-serial none takes the serial port off)".into(),
                value: "".into(),
            });
        }),
        "the serial port is on the terminal, unless -serial or -nodefaults is given",
    ),
    option(
        &["qmp"],
        "WHERE",
        Group::Consoles,
        Action::Whole(chardev::qmp),
        "a QMP monitor: unix:PATH or tcp:HOST:PORT,server=on,wait=off[,allow=...], stdio or chardev:ID",
    ),
    option(
        &["qmp-pretty"],
        "WHERE",
        Group::Consoles,
        Action::Whole(chardev::qmp_pretty),
        "the same, with replies indented for reading",
    ),
    option(
        &["chardev"],
        "BACKEND,id=ID[,...]",
        Group::Consoles,
        Action::Forms(chardev::CHARDEV_FORMS, chardev::chardev),
        "a character device: socket,path=PATH,server=on,wait=off; socket,host=HOST,port=PORT; socket,fd=N; \
         stdio; file,path=FILE; pipe,path=PATH; ringbuf,size=BYTES; pty; null",
    ),
    option(
        &["mon"],
        "ID,mode=control[,pretty=on][,allow=...]",
        Group::Consoles,
        Action::Pairs(&chardev::MON_KEYS, chardev::mon),
        "a QMP monitor on a -chardev. allow=NAME:NAME:... gives its clients these commands only, allow=DIR/FILE those \
         in a file; read-only stands for all that only look",
    ),
    option(
        &["qtest"],
        "WHERE",
        Group::Consoles,
        Action::Whole(chardev::qtest),
        "a server for the clock commands of QEMU's qtest protocol (with -accel qtest): unix:PATH or chardev:ID",
    ),
    option(
        &["S"],
        "",
        Group::Running,
        Action::Flag(|draft, _| draft.start_paused = true),
        "do not start the vCPUs before QMP's cont",
    ),
    option(
        &["no-reboot"],
        "",
        Group::Running,
        Action::Flag(|draft, _| draft.actions.reboot = RebootAction::Shutdown),
        "exit when the guest reboots",
    ),
    option(
        &["no-shutdown"],
        "",
        Group::Running,
        Action::Flag(|draft, _| draft.actions.shutdown = ShutdownAction::Pause),
        "stay when the guest powers off, until QMP's quit",
    ),
    option(
        &["action"],
        "reboot=WHAT,shutdown=WHAT,panic=WHAT,watchdog=WHAT,helper-loss=WHAT",
        Group::Running,
        Action::Pairs(&boot::ACTION_KEYS, boot::action),
        "what follows when the guest reboots (reset, shutdown), powers off (poweroff, pause) or panics (shutdown, \
         pause, exit-failure, none), or vcpu-proc or block-proc is lost for good (pause: the machine stays to be looked into, \
         where it has a monitor; shutdown); there is no watchdog that could expire. The two before are short for \
         reboot=shutdown and shutdown=pause",
    ),
    option(
        &["dump-on-panic"],
        "file:FILE[,format=FORMAT]",
        Group::Running,
        Action::Pairs(&boot::DUMP_KEYS, boot::dump_on_panic),
        "when the guest panics, write its memory to FILE before what -action panic says is done; the formats are those of \
         dump-guest-memory (default kdump-raw-zlib)",
    ),
    option(
        &["dump-on-crash"],
        "file:FILE[,format=FORMAT]",
        Group::Running,
        Action::Pairs(&boot::DUMP_KEYS, boot::dump_on_crash),
        "the same when the machine stops with an internal error: vcpu-proc or block-proc is lost for good, or a vCPU cannot \
         go on",
    ),
    option(
        &["pidfile"],
        "FILE",
        Group::Running,
        Action::Whole(boot::pidfile),
        "write Bulkhead's process id to FILE",
    ),
    option(
        &["daemonize"],
        "",
        Group::Running,
        Action::Flag(|draft, _| draft.daemonize = true),
        "go to the background when the VM is up",
    ),
    option(
        &["nodefaults"],
        "",
        Group::Running,
        Action::Flag(|draft, _| draft.no_defaults = true),
        "no devices that are not asked for: no serial port without -serial",
    ),
    option(
        &["require-sandbox"],
        "",
        Group::Running,
        Action::Flag(|draft, _| draft.require_sandbox = true),
        "do not start when the host lacks a layer of the sandbox ('bulkhead doctor' names it)",
    ),
    option(
        &["restart-budget"],
        "N[/SECONDS]",
        Group::Running,
        Action::Whole(machine::restart_budget),
        "how often block-proc is started again when it ends by itself, within so many seconds (default 3/60); then the \
         machine stops",
    ),
    option(
        &["policy-mode"],
        "enforce|log",
        Group::Running,
        Action::Whole(machine::policy_mode),
        "what becomes of a system call that a helper's policy lacks: its process is killed (enforce), or, while policies are \
         developed, it is told and goes on (log): that confines nothing",
    ),
    option(
        &["sandbox"],
        "on[,uid-base=N]",
        Group::Running,
        Action::Pairs(&hosting::SANDBOX, hosting::sandbox),
        "the sandbox is always on. Started as root, the machine has 64 user and group ids of its own, from N on if given; two \
         machines never share one",
    ),
    option(
        &["cgroup"],
        "on[,parent=PATH|self][,GROUP.FILE=VALUE...]",
        Group::Running,
        Action::Whole(hosting::cgroup),
        "a control group for each role (supervisor, vcpu, block, dump, qmp; all for each) below PATH (default bulkhead; self: \
         the group that Bulkhead is started in, if that is not the root), with limits by the names of version 2: cpu.max, cpu.weight, memory.max, \
         memory.high, pids.max, io.max, io.weight; a blank in VALUE is written /, as in vcpu.cpu.max=150000/100000",
    ),
    option(
        &["metrics"],
        "unix:PATH",
        Group::Running,
        Action::Whole(hosting::metrics),
        "answer scrapes of Prometheus' text format over HTTP on this socket; what roles use is there with -cgroup",
    ),
    option(
        &["log-format"],
        "text|json|journal",
        Group::Running,
        Action::Whole(hosting::log_format),
        "log lines for people, as JSON objects, or as entries of systemd's journal with fields (journal:PATH: another socket)",
    ),
    option(
        &["help", "h", "?"],
        "",
        Group::Information,
        Action::Answer(|| Invocation::Help),
        "this text",
    ),
    option(
        &["version"],
        "",
        Group::Information,
        Action::Answer(|| Invocation::Version),
        "Bulkhead's version",
    ),
    option(
        &["no-user-config", "nodefconfig"],
        "",
        Group::Compatibility,
        Action::Flag(nothing),
        "",
    ),
    accept(&["display"], "none", &accepted::DISPLAY),
    accept(&["vga"], "none", &accepted::VGA),
    accept(&["monitor"], "none", &accepted::MONITOR),
    accept(&["parallel"], "none", &accepted::PARALLEL),
    accept(&["nic", "net"], "none", &accepted::NIC),
    accept(&["rtc"], "base=utc", &accepted::RTC),
    accept(&["boot"], "strict=on", &accepted::BOOT),
    accept(&["overcommit"], "mem-lock=off", &accepted::OVERCOMMIT),
    accept(&["msg"], "timestamp=on", &accepted::MSG),
];

/// QEMU's options that Bulkhead lacks, with what to do instead.
pub(super) static ELSEWHERE: &[(&[&str], &str)] = &[
    (
        &[
            "hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "sd", "pflash", "mtdblock", "blockdev",
        ],
        "disks are virtio disks: -drive file=FILE,if=virtio,format=raw",
    ),
    (&["netdev"], "there are no network devices"),
    (
        &["vnc", "spice", "sdl", "gtk", "curses", "full-screen"],
        "there is no display; the console is -serial stdio",
    ),
    (&["bios", "L"], "there is no firmware: -kernel FILE is booted directly"),
    (&["usb", "usbdevice"], "there is no USB"),
    (&["s", "gdb"], "there is no debugger stub"),
    (
        &["incoming", "loadvm", "snapshot"],
        "a machine always starts from its kernel and its disks",
    ),
    (
        &["runas", "chroot", "run-with"],
        "every process already has a user and an empty root of its own",
    ),
    (
        &["mem-path", "mem-prealloc"],
        "guest memory is a memfd that fills as the guest uses it",
    ),
    (&["no-kvm"], "Bulkhead needs KVM"),
    (&["readconfig"], "there are no configuration files"),
];
