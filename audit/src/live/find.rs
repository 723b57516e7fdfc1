//! Which processes a machine is made of: the supervisor, its children, and the launcher's.

use super::LiveError;
use super::process::Seen;
use super::sockets::{self, Sockets};
use crate::policy::Process;
use std::path::Path;

/// A machine, at one moment.
#[derive(Debug)]
pub struct Machine {
    /// Its processes: the supervisor first, then its children, then the helpers.
    pub processes: Vec<Member>,
    /// The host's sockets.
    pub sockets: Sockets,
}

/// A process of it.
#[derive(Debug)]
pub struct Member {
    /// Which it is; `None` for one that nothing declares.
    pub role: Option<Process>,
    /// What /proc says.
    pub seen: Seen,
}

impl Member {
    /// Its role's name.
    pub fn name(&self) -> &'static str {
        self.role.map_or("undeclared", Process::name)
    }
}

impl Machine {
    /// Its processes of one role.
    pub fn of(&self, role: Process) -> impl Iterator<Item = &Member> {
        self.processes.iter().filter(move |member| member.role == Some(role))
    }
}

fn comm(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm"))
        .map_or_else(|_| String::new(), |name| name.trim_end().to_owned())
}

fn parent(pid: i32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok()
}

/// Whether a process runs the program `bulkhead`: by its executable where that can be read, by its name otherwise.
fn is_bulkhead(pid: i32) -> bool {
    match std::fs::read_link(format!("/proc/{pid}/exe")) {
        Ok(path) => program_name(&path) == "bulkhead",
        Err(_) => comm(pid) == "bulkhead",
    }
}

/// The name of a program, also of one that has been replaced on disk.
pub(super) fn program_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.strip_suffix(" (deleted)").unwrap_or(&name).to_owned()
}

/// The name that `-name` gives a machine.
fn machine_name(pid: i32) -> Option<String> {
    let words = super::process::words(pid);
    let at = words.iter().position(|word| word == "-name" || word == "--name")?;
    let value = words.get(at + 1)?;
    let first = value.split(',').next()?;
    Some(first.strip_prefix("guest=").unwrap_or(first).to_owned())
}

/// The supervisor of the machine with this name, or with a process of this id.
///
/// # Errors
/// When there is none, or more than one.
pub fn supervisor(name: &str) -> Result<i32, LiveError> {
    if let Ok(pid) = name.parse::<i32>() {
        let ancestors = std::iter::successors(Some(pid), |pid| parent(*pid).filter(|parent| *parent > 1));
        return ancestors
            .filter(|pid| is_bulkhead(*pid))
            .last()
            .ok_or_else(|| LiveError::NoMachine(format!("process {pid} is none of a Bulkhead machine")));
    }
    let all = std::fs::read_dir("/proc").map_err(|error| LiveError::NoMachine(format!("/proc: {error}")))?;
    let found: Vec<i32> = all
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| is_bulkhead(*pid) && machine_name(*pid).as_deref() == Some(name))
        // The launcher, the opener and the warden are forks of the supervisor.
        .filter(|pid| parent(*pid).is_none_or(|parent| !is_bulkhead(parent)))
        .collect();
    match found.as_slice() {
        [] => Err(LiveError::NoMachine(format!("no machine is called {name}"))),
        [pid] => Ok(*pid),
        several => Err(LiveError::NoMachine(format!(
            "{name}: several machines: {several:?}; say which process"
        ))),
    }
}

/// Child processes of all threads.
fn children(pid: i32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let texts = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let mut pids: Vec<i32> = texts
        .flat_map(|text| {
            text.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect();
    pids.sort_unstable();
    pids
}

/// Which helper a child of the launcher is.
fn helper_role(pid: i32) -> Option<Process> {
    let name = match std::fs::read_link(format!("/proc/{pid}/exe")) {
        Ok(path) => program_name(&path),
        Err(_) => comm(pid),
    };
    Process::of_name(&name).filter(|process| process.is_helper())
}

/// All processes of a supervisor's machine.
///
/// # Errors
/// When the supervisor is gone.
pub fn machine(supervisor: i32) -> Result<Machine, LiveError> {
    let gone = || LiveError::NoMachine(format!("process {supervisor} has ended"));
    let mut processes = vec![Member {
        role: Some(Process::Supervisor),
        seen: Seen::read(supervisor).ok_or_else(gone)?,
    }];
    let add = |role, pid, processes: &mut Vec<Member>| {
        if let Some(seen) = Seen::read(pid) {
            processes.push(Member { role, seen });
        }
    };
    let mut launcher = None;
    for child in children(supervisor) {
        let role = match comm(child).as_str() {
            "opener" => Some(Process::Opener),
            "warden" => Some(Process::Warden),
            "bulkhead" if launcher.is_none() => {
                launcher = Some(child);
                Some(Process::Launcher)
            }
            _ => None,
        };
        add(role, child, &mut processes);
        // Only the launcher has children; those of others are in the list because they are nobody's.
        for grandchild in children(child) {
            let role = helper_role(grandchild).filter(|_| Some(child) == launcher);
            add(role, grandchild, &mut processes);
            for stranger in children(grandchild) {
                add(None, stranger, &mut processes);
            }
        }
    }
    let sockets = sockets::all(supervisor);
    Ok(Machine { processes, sockets })
}
