//! Patterns that weaken a filter. Where it can, this looks at what the compiled programs do, not at how the data is written.

use super::compile::Instruction;
use super::evaluate::{Call, I386, X32_BIT, evaluate};
use super::{Action, Filter, Kind, Op, Policy, PolicyError, Rule, Width};
use serde::Serialize;

/// One warning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// Which pattern.
    pub pattern: Pattern,
    /// In which filter.
    pub filter: Kind,
    /// What to look at.
    pub text: String,
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.filter.name(), self.text)
    }
}

/// The patterns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// Calls of another convention pass: numbers mean other calls there.
    MissingArchitectureCheck,
    /// x32 calls pass: the same calls by other numbers.
    X32,
    /// Memory can be made executable.
    Executable,
    /// A call that is many calls, with any of them.
    Unfiltered,
    /// A new ring has no restrictions, and its operations pass seccomp by.
    RingAfterSealing,
    /// Programs, processes, namespaces, kernel code, or power over other processes after sealing.
    PowerAfterSealing,
    /// A condition on half of an argument of 64 bits.
    HalfCompared,
    /// A rule without a reason.
    NoReason,
}

/// Calls that are many calls, and the arguments that say which.
const DECIDING: &[(&str, &[u8])] = &[
    ("arch_prctl", &[0]),
    ("bpf", &[0]),
    ("clone", &[0]),
    ("fcntl", &[1]),
    ("futex", &[1]),
    ("getsockopt", &[1, 2]),
    ("io_uring_register", &[1]),
    ("ioctl", &[1]),
    ("keyctl", &[0]),
    ("madvise", &[2]),
    ("mmap", &[2]),
    ("mprotect", &[2]),
    ("pkey_mprotect", &[2]),
    ("prctl", &[0]),
    ("prlimit64", &[2]),
    ("ptrace", &[0]),
    ("seccomp", &[0]),
    ("setsockopt", &[1, 2]),
    ("socket", &[0, 1]),
    ("socketpair", &[0]),
];

/// Arguments of 64 bits of which the lower half says nothing.
const WIDE: &[(&str, &[u8])] = &[
    ("copy_file_range", &[4]),
    ("fallocate", &[2, 3]),
    ("ftruncate", &[1]),
    ("lseek", &[1]),
    ("madvise", &[0, 1]),
    ("mmap", &[0, 1, 5]),
    ("mprotect", &[0, 1]),
    ("mremap", &[0, 1, 2]),
    ("munmap", &[0, 1]),
    ("pread64", &[1, 2, 3]),
    ("prlimit64", &[2, 3]),
    ("pwrite64", &[1, 2, 3]),
    ("read", &[1, 2]),
    ("recvfrom", &[1, 2]),
    ("sendto", &[1, 2]),
    ("write", &[1, 2]),
];

/// What no sealed process should have.
const POWER: &[&str] = &[
    "bpf",
    "capset",
    "chroot",
    "clone3",
    "execve",
    "execveat",
    "finit_module",
    "fork",
    "init_module",
    "kcmp",
    "kexec_load",
    "keyctl",
    "mount",
    "open_by_handle_at",
    "perf_event_open",
    "pidfd_getfd",
    "pivot_root",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "seccomp",
    "setns",
    "umount2",
    "unshare",
    "userfaultfd",
    "vfork",
];

/// Looks for all patterns.
///
/// # Errors
/// [`PolicyError`] when it does not compile.
pub fn find(policy: &Policy) -> Result<Vec<Warning>, PolicyError> {
    let mut found = Vec::new();
    for (kind, filter) in &policy.filters {
        if filter.match_action == Action::Allow {
            in_rules(*kind, filter, &mut found);
        }
        for rule in filter.rules.iter().filter(|rule| rule.reason.trim().is_empty()) {
            found.push(Warning {
                pattern: Pattern::NoReason,
                filter: *kind,
                text: format!("{} has no reason", rule.syscall),
            });
        }
    }
    let programs = policy.compile()?;
    let stacks: [(Kind, &[Kind]); 2] = [
        (Kind::Startup, &[Kind::Startup]),
        (Kind::Sealed, &[Kind::Startup, Kind::Forbidden, Kind::Sealed]),
    ];
    for (kind, stack) in stacks {
        let programs: Vec<&[Instruction]> = stack
            .iter()
            .filter_map(|of| programs.get(of).map(Vec::as_slice))
            .collect();
        if policy.filters.contains_key(&kind) {
            in_programs(kind, &programs, &mut found);
        }
    }
    Ok(found)
}

/// What a stack of filters does with a call: the kernel takes the strictest answer.
pub fn strictest(programs: &[&[Instruction]], call: &Call) -> Option<u32> {
    let answers: Option<Vec<u32>> = programs.iter().map(|program| evaluate(program, call)).collect();
    answers?
        .into_iter()
        .min_by_key(|answer| (answer & libc::SECCOMP_RET_ACTION_FULL).cast_signed())
}

fn in_programs(kind: Kind, programs: &[&[Instruction]], found: &mut Vec<Warning>) {
    const HIGHEST: u32 = 1023;
    let allows = |call: &Call| strictest(programs, call).is_none_or(|answer| answer == libc::SECCOMP_RET_ALLOW);
    let passing = |change: &dyn Fn(&mut Call)| {
        (0..=HIGHEST)
            .map(|number| {
                let mut call = Call::new(number.into(), [0; 6]);
                change(&mut call);
                call
            })
            .filter(allows)
            .count()
    };
    let mut warn = |pattern, count: usize, what: &str| {
        if count > 0 {
            found.push(Warning {
                pattern,
                filter: kind,
                text: format!("{count} {what}"),
            });
        }
    };
    let foreign = passing(&|call| call.architecture = I386);
    warn(
        Pattern::MissingArchitectureCheck,
        foreign,
        "calls of the 32-bit convention pass: the filter does not check the architecture",
    );
    let x32 = passing(&|call| call.number |= X32_BIT);
    warn(Pattern::X32, x32, "x32 calls pass");
}

fn in_rules(kind: Kind, filter: &Filter, found: &mut Vec<Warning>) {
    for rule in &filter.rules {
        let call = rule.syscall.as_str();
        let mut warn = |pattern, text: String| {
            found.push(Warning {
                pattern,
                filter: kind,
                text,
            });
        };
        if let Some((_, deciding)) = DECIDING.iter().find(|(name, _)| *name == call) {
            let open: Vec<String> = deciding
                .iter()
                .filter(|index| rule.conditions.iter().all(|condition| condition.index != **index))
                .map(|index| super::table::argument_name(call, *index))
                .collect();
            if !open.is_empty() {
                warn(
                    Pattern::Unfiltered,
                    format!("{call} with any {}", open.join(" and any ")),
                );
            }
        }
        if ["mmap", "mprotect", "pkey_mprotect"].contains(&call) && may_execute(rule) {
            warn(Pattern::Executable, format!("{call} may make memory executable"));
        }
        for condition in &rule.conditions {
            let wide = WIDE
                .iter()
                .any(|(name, indices)| *name == call && indices.contains(&condition.index));
            if wide && condition.width == Width::Dword {
                let name = super::table::argument_name(call, condition.index);
                warn(
                    Pattern::HalfCompared,
                    format!("{call}: {name} has 64 bits, and only 32 of them are compared"),
                );
            }
        }
        if kind == Kind::Sealed && call == "io_uring_setup" {
            warn(
                Pattern::RingAfterSealing,
                "io_uring_setup after sealing: a new ring has no restrictions, and its operations pass seccomp by"
                    .into(),
            );
        }
        if kind == Kind::Sealed && POWER.contains(&call) {
            warn(Pattern::PowerAfterSealing, format!("{call} after sealing"));
        }
    }
}

/// Whether the rule lets `prot` have PROT_EXEC.
fn may_execute(rule: &Rule) -> bool {
    let exec = libc::PROT_EXEC as u64;
    !rule
        .conditions
        .iter()
        .filter(|condition| condition.index == 2)
        .any(|condition| match condition.op {
            Op::Eq => condition.val & exec == 0,
            Op::MaskedEq(mask) => mask & exec != 0 && condition.val & exec == 0,
            Op::Lt => condition.val <= exec,
            Op::Le => condition.val < exec,
            Op::Ne | Op::Gt | Op::Ge => false,
        })
}
