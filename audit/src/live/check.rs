//! Compares what a process is with what is declared of it. One function for each wall; each says what it found.

use super::declared::{Capabilities, Declaration, Declarations, Ids, Namespace, RamUse, Root};
use super::find::{Machine, Member, program_name};
use super::process::{Descriptor, field};
use super::{Row, State, descriptors, filters};
use crate::policy::compile::Instruction;
use crate::policy::{Kind, Process};
use nix::errno::Errno;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What a machine is held against.
pub struct Against<'a> {
    /// Walls and descriptors.
    pub declarations: &'a Declarations,
    /// The programs of every policy.
    pub programs: &'a BTreeMap<Process, BTreeMap<Kind, Vec<Instruction>>>,
    /// Where the executables are, when it is not where the supervisor's is.
    pub directory: Option<&'a Path>,
}

/// What a comparison came to, and what was found.
pub(super) type Found = (State, String);

pub(super) fn equal(found: impl Into<String>) -> Found {
    (State::Equal, found.into())
}

pub(super) fn differs(found: impl Into<String>) -> Found {
    (State::Differs, found.into())
}

pub(super) fn unknown(why: impl Into<String>) -> Found {
    (State::NotCheckable, why.into())
}

/// One process of the machine, with all that its comparison needs.
pub(super) struct Subject<'a> {
    pub machine: &'a Machine,
    pub member: &'a Member,
    pub role: Process,
    pub declared: &'a Declaration,
    pub against: &'a Against<'a>,
}

/// All rows of a machine.
pub fn all(machine: &Machine, against: &Against<'_>) -> Vec<Row> {
    let mut rows = Vec::new();
    for member in &machine.processes {
        let mut row = |what, (state, found): Found| {
            rows.push(Row {
                pid: member.seen.pid,
                process: member.name().to_owned(),
                what,
                state,
                found,
            });
        };
        let declared = member
            .role
            .and_then(|role| Some((role, against.declarations.of(role)?)));
        let Some((role, declared)) = declared else {
            let name = member.seen.status("Name").unwrap_or("?");
            row("process", differs(format!("{name} is no process that is declared")));
            continue;
        };
        let subject = Subject {
            machine,
            member,
            role,
            declared,
            against,
        };
        row("program", program(&subject));
        row("policy mode", policy_mode(&subject));
        row("filters", installed(&subject));
        row("privileges", privileges(&subject));
        row("capabilities", capabilities(&subject));
        row("ids", ids(&subject));
        row("namespaces", namespaces(&subject));
        row("limits", limits(&subject));
        if declared.root == Root::Empty {
            row("root", empty_root(&subject));
        }
        if declared.undumpable {
            row("dumpable", undumpable(&subject));
        }
        row("memory", memory(&subject));
        for found in descriptors::check(&subject) {
            row("descriptors", found);
        }
        row(
            "landlock",
            unknown(format!(
                "the kernel shows it to nobody; declared: {}",
                declared.landlock
            )),
        );
    }
    for (role, least, most) in [
        (Process::Launcher, 1, 1),
        (Process::Opener, 0, 1),
        (Process::Warden, 0, 1),
        (Process::VcpuProc, 0, 1),
        (Process::BlockProc, 0, 1),
    ] {
        let count = machine.of(role).count();
        if count < least || count > most {
            rows.push(Row {
                pid: machine.processes[0].seen.pid,
                process: Process::Supervisor.name().to_owned(),
                what: "process",
                state: State::Differs,
                found: format!("{count} of {}", role.name()),
            });
        }
    }
    rows
}

/// The executable is the one that is installed.
fn program(of: &Subject<'_>) -> Found {
    let path = match &of.member.seen.program {
        Ok(path) => path,
        Err(error) => return unknown(error.clone()),
    };
    let name = if of.role.is_helper() {
        of.role.name()
    } else {
        "bulkhead"
    };
    if program_name(path) != name {
        return differs(format!("it runs {}, must be {name}", path.display()));
    }
    let supervisor = of.machine.processes[0].seen.program.as_ref().ok();
    let Some(directory) = of.against.directory.or_else(|| supervisor?.parent()) else {
        return unknown("where the programs are is not known: --programs DIRECTORY");
    };
    let installed = directory.join(name);
    let running = format!("/proc/{}/exe", of.member.seen.pid);
    let identity = |path: &Path| std::fs::metadata(path).map(|of| (of.dev(), of.ino()));
    let same = match (identity(&installed), identity(Path::new(&running))) {
        (Ok(one), Ok(other)) if one == other => true,
        // Another file: a copy is as good.
        _ => match (std::fs::read(&installed), std::fs::read(&running)) {
            (Ok(one), Ok(other)) => one == other,
            (Err(error), _) => return unknown(format!("{}: {error}", installed.display())),
            (_, Err(error)) => return unknown(format!("{running}: {error}")),
        },
    };
    if same {
        equal(format!("{} as installed", installed.display()))
    } else {
        differs(format!("it is not the program that is at {}", installed.display()))
    }
}

/// Policies are enforced. This is what the processes were started with; that the filters are those of this mode is the next
/// comparison, which not everybody can make.
fn policy_mode(of: &Subject<'_>) -> Found {
    let words = &of.member.seen.words;
    let Some((_, arguments)) = words.split_first() else {
        return unknown("its command line cannot be read");
    };
    let is_log = match of.role.is_helper() {
        // A helper has no other argument.
        true => !arguments.is_empty(),
        // The launcher and the opener are forks of the supervisor.
        false => {
            let option = |word: &String| word == "--policy-mode" || word == "-policy-mode";
            let last = arguments.iter().rposition(option).and_then(|at| arguments.get(at + 1));
            last.is_some_and(|mode| mode != "enforce")
        }
    };
    if is_log {
        return differs("log, for development: what a policy lacks is told and goes on");
    }
    equal("enforced")
}

/// The installed filters are the compiled policies, on every thread.
fn installed(of: &Subject<'_>) -> Found {
    let wanted: Result<Vec<(&str, &[Instruction])>, &str> = of
        .declared
        .filters
        .iter()
        .map(|name| {
            let (process, kind) = name.split_once('.').unwrap_or((name, ""));
            let programs = Process::of_name(process).and_then(|process| of.against.programs.get(&process));
            let program = programs.and_then(|of| of.iter().find(|(found, _)| found.name() == kind));
            program
                .map(|(_, program)| (name.as_str(), program.as_slice()))
                .ok_or(name.as_str())
        })
        .collect();
    let wanted = match wanted {
        Ok(wanted) => wanted,
        Err(name) => return differs(format!("there is no policy {name}")),
    };
    for (thread, status) in &of.member.seen.threads {
        let count = field(status, "Seccomp_filters").unwrap_or("?");
        if field(status, "Seccomp") != Some("2") || count != wanted.len().to_string() {
            return differs(format!(
                "thread {thread} runs under {count} filters, must be {}",
                wanted.len()
            ));
        }
    }
    let threads = of.member.seen.threads.len();
    if let Some(why) = filters::not_readable() {
        return unknown(format!(
            "their bytes: {why}; there are {} on all {threads} threads",
            wanted.len()
        ));
    }
    let mut read = 0;
    for thread in of.member.seen.threads.keys() {
        let found = match filters::of_thread(*thread) {
            Ok(found) => found,
            // It has ended meanwhile.
            Err(Errno::ESRCH) => continue,
            Err(errno) => return unknown(format!("thread {thread}: {}", errno.desc())),
        };
        if let Some(difference) = program_difference(&wanted, &found) {
            return differs(format!("thread {thread}: {difference}"));
        }
        read += 1;
    }
    if read == 0 {
        return unknown("no thread could be read");
    }
    let names: Vec<_> = wanted.iter().map(|(name, _)| *name).collect();
    equal(format!("{}: byte for byte on {read} threads", names.join(", ")))
}

fn program_difference(wanted: &[(&str, &[Instruction])], found: &[Vec<Instruction>]) -> Option<String> {
    if wanted.len() != found.len() {
        return Some(format!("{} filters, must be {}", found.len(), wanted.len()));
    }
    for ((name, wanted), found) in wanted.iter().zip(found) {
        if *wanted != found.as_slice() {
            let at = wanted.iter().zip(found).position(|(one, other)| one != other);
            let at = at.unwrap_or(wanted.len().min(found.len()));
            return Some(format!(
                "the installed filter is not {name}: {} instructions, must be {}, the first different one is {at}",
                found.len(),
                wanted.len()
            ));
        }
    }
    None
}

/// Something that must be true of every thread's status; the first that is not so.
fn every_thread<'a>(of: &Subject<'a>, name: &str, wanted: impl Fn(&str) -> bool) -> Option<(i32, &'a str)> {
    of.member.seen.threads.iter().find_map(|(thread, status)| {
        let value = field(status, name).unwrap_or("absent");
        (!wanted(value)).then_some((*thread, value))
    })
}

fn privileges(of: &Subject<'_>) -> Found {
    if of.declared.no_new_privs
        && let Some((thread, found)) = every_thread(of, "NoNewPrivs", |value| value == "1")
    {
        return differs(format!("thread {thread} may get new privileges (NoNewPrivs {found})"));
    }
    if let Some((thread, tracer)) = every_thread(of, "TracerPid", |value| value == "0") {
        return differs(format!("thread {thread} is traced by process {tracer}"));
    }
    equal("no new ones, nobody traces it")
}

fn capabilities(of: &Subject<'_>) -> Found {
    match of.declared.capabilities {
        Capabilities::None => {
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                let none = |value: &str| value.bytes().all(|digit| digit == b'0');
                let Some((thread, found)) = every_thread(of, set, none) else {
                    continue;
                };
                // Without privileges the bounding set cannot be emptied; it gives nothing where there are no new privileges.
                let is_helper = of.role.is_helper();
                if set == "CapBnd"
                    && !is_helper
                    && of.member.seen.status("Uid").is_some_and(|uid| !uid.starts_with('0'))
                {
                    continue;
                }
                return differs(format!("thread {thread}: {set} is {found}"));
            }
            equal("none in any set")
        }
        Capabilities::OfItsNamespace => {
            let user = |member: &Member| member.seen.namespaces["user"].clone().ok();
            match (user(of.member), user(&of.machine.processes[0])) {
                (Some(own), Some(host)) if own != host => equal(format!("those of {own}, which is not the host's")),
                (Some(own), Some(_)) => differs(format!("those of the supervisor's {own}")),
                _ => unknown("its user namespace cannot be read"),
            }
        }
    }
}

fn ids(of: &Subject<'_>) -> Found {
    let mut texts = Vec::new();
    for name in ["Uid", "Gid"] {
        let Some(found) = of.member.seen.status(name) else {
            return unknown(format!("no field {name}"));
        };
        let mut each = found.split_whitespace();
        let first = each.next().unwrap_or("?").to_owned();
        if each.any(|id| id != first) {
            return differs(format!("{name}s differ: {found}"));
        }
        let others = || {
            let others = of
                .machine
                .processes
                .iter()
                .filter(|other| other.seen.pid != of.member.seen.pid);
            others.filter_map(|other| {
                let id = other.seen.status(name)?.split_whitespace().next()?;
                Some((other, id.to_owned()))
            })
        };
        match of.declared.ids {
            Ids::Caller => {
                let supervisor = others().find(|(other, _)| other.role == Some(Process::Supervisor));
                if let Some((_, id)) = supervisor.filter(|(_, id)| *id != first) {
                    return differs(format!("{name} {first}, the supervisor has {id}"));
                }
            }
            Ids::Own => {
                if let Some((other, _)) = others().find(|(_, id)| *id == first) {
                    let shared = format!("{name} {first} is also that of {} {}", other.name(), other.seen.pid);
                    let launcher = of.machine.of(Process::Launcher).next();
                    let one_id =
                        launcher.is_some_and(|launcher| launcher.seen.id_map.split_whitespace().nth(2) == Some("1"));
                    if one_id {
                        return (State::Missing, format!("{shared}: this caller has no subordinate ids"));
                    }
                    return differs(shared);
                }
                if let Some(groups) = of.member.seen.status("Groups").filter(|groups| !groups.is_empty()) {
                    return differs(format!("it is in groups {groups}"));
                }
            }
        }
        texts.push(format!("{} {first}", name.to_lowercase()));
    }
    equal(texts.join(", "))
}

fn namespaces(of: &Subject<'_>) -> Found {
    let read = |member: &Member, kind: &str| member.seen.namespaces.get(kind)?.as_ref().ok().cloned();
    for (kind, wanted) in &of.declared.namespaces {
        let Some(own) = read(of.member, kind) else {
            return unknown(format!("its {kind} namespace cannot be read"));
        };
        let like = |role: Process| {
            let other = of.machine.of(role).next().and_then(|other| read(other, kind));
            match other {
                Some(other) if other == own => None,
                Some(other) => Some(differs(format!("{own}, must be the {}'s {other}", role.name()))),
                None => Some(unknown(format!(
                    "the {}'s {kind} namespace cannot be read",
                    role.name()
                ))),
            }
        };
        let problem = match wanted {
            Namespace::Host => like(Process::Supervisor),
            Namespace::Launcher => like(Process::Launcher),
            Namespace::Own => {
                let shares = |other: &&Member| {
                    let theirs = other.role.and_then(|role| of.against.declarations.of(role));
                    let wants_ours =
                        theirs.and_then(|theirs| theirs.namespaces.get(kind)) == Some(&Namespace::Launcher);
                    let may = wants_ours && of.role == Process::Launcher;
                    other.seen.pid != of.member.seen.pid && !may && read(other, kind).as_ref() == Some(&own)
                };
                let other = of.machine.processes.iter().find(shares);
                other.map(|other| differs(format!("it shares {own} with {} {}", other.name(), other.seen.pid)))
            }
        };
        if let Some(problem) = problem {
            return problem;
        }
    }
    if of.role.is_helper() {
        match &of.member.seen.network_devices {
            Ok(devices) => {
                if let Some(device) = devices.iter().find(|name| !is_no_network(name)) {
                    return differs(format!("its network namespace has the device {device}"));
                }
            }
            Err(error) => return unknown(error.clone()),
        }
    }
    let own: Vec<_> = of
        .declared
        .namespaces
        .iter()
        .filter(|(_, wanted)| **wanted == Namespace::Own)
        .map(|(kind, _)| kind.as_str())
        .collect();
    equal(if own.is_empty() {
        "the host's".to_owned()
    } else {
        format!("its own {}", own.join(", "))
    })
}

/// Loopback, and what some kernels put into every new network namespace: unconnected ends of tunnels.
fn is_no_network(name: &str) -> bool {
    let tunnels = [
        "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0",
    ];
    name == "lo" || tunnels.contains(&name)
}

fn limits(of: &Subject<'_>) -> Found {
    let found = match &of.member.seen.limits {
        Ok(found) => found,
        Err(error) => return unknown(error.clone()),
    };
    for (name, wanted) in &of.declared.limits {
        if found.get(name) != Some(&[Some(*wanted); 2]) {
            return differs(format!("{name}: {:?}, must be {wanted}", found.get(name)));
        }
    }
    let texts: Vec<_> = of
        .declared
        .limits
        .iter()
        .map(|(name, limit)| format!("{name} {limit}"))
        .collect();
    equal(if texts.is_empty() {
        "none declared".to_owned()
    } else {
        texts.join(", ")
    })
}

fn empty_root(of: &Subject<'_>) -> Found {
    let (mounts, names) = match &of.member.seen.root {
        Ok(root) => root,
        Err(error) => return unknown(error.clone()),
    };
    if let Some(name) = names.first() {
        return differs(format!("its root directory has {name}"));
    }
    let [mount] = mounts.lines().collect::<Vec<_>>()[..] else {
        return differs(format!("{} mounts, must be one", mounts.lines().count()));
    };
    let options = mount.split_whitespace().nth(5).unwrap_or_default();
    for wanted in ["ro", "nosuid", "nodev", "noexec"] {
        if !options.split(',').any(|option| option == wanted) {
            return differs(format!("its root is not {wanted}: {options}"));
        }
    }
    equal("one read-only mount without a file")
}

fn undumpable(of: &Subject<'_>) -> Found {
    let uid: Option<u32> = of
        .member
        .seen
        .status("Uid")
        .and_then(|uids| uids.split_whitespace().next()?.parse().ok());
    match (&of.member.seen.owner, uid) {
        (Ok(0), Some(0)) => unknown("root owns its files in /proc either way"),
        (Ok(0), Some(_)) => equal("it is not"),
        (Ok(owner), Some(_)) => differs(format!("processes of uid {owner} may look into it")),
        (Err(error), _) => unknown(error.clone()),
        (_, None) => unknown("no uid"),
    }
}

fn memory(of: &Subject<'_>) -> Found {
    let mappings = match &of.member.seen.mappings {
        Ok(mappings) => mappings,
        Err(error) => return unknown(error.clone()),
    };
    let program = of.member.seen.program.as_ref().map(|path| path.display().to_string());
    let mut ram = Vec::new();
    for mapping in mappings {
        let (rights, name) = (mapping.rights.as_str(), mapping.name.as_str());
        if name.starts_with("/memfd:bulkhead-ram") {
            ram.push(rights);
        }
        let is_code = Ok(name) == program.as_deref().map_err(|_| ()) || ["[vdso]", "[vsyscall]"].contains(&name);
        if rights.contains('x') && (rights.contains('w') || !is_code) {
            return differs(format!("executable memory: {rights} {name}"));
        }
    }
    match of.declared.ram {
        RamUse::Unmapped if ram.is_empty() => equal("guest RAM is not mapped, only the program is executable"),
        RamUse::Unmapped => differs(format!("it maps guest RAM ({})", ram.join(", "))),
        RamUse::Rw if ram.is_empty() => differs("it does not map guest RAM"),
        RamUse::Rw => match ram.iter().find(|rights| **rights != "rw-s") {
            Some(rights) => differs(format!("it maps guest RAM {rights}, must be rw-s")),
            None => equal("guest RAM is mapped rw-s, only the program is executable"),
        },
    }
}

/// The descriptors of all processes of one role.
pub(super) fn held_by(machine: &Machine, role: Process) -> impl Iterator<Item = &Descriptor> {
    machine
        .of(role)
        .filter_map(|member| member.seen.descriptors.as_ref().ok())
        .flatten()
}
