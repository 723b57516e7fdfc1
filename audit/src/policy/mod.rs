//! Policies as types: `policies/<process>.json`, read once.
//!
//! [`compile`] makes the programs that the kernel must have, [`evaluate`] runs them, [`table`] and [`page`] show them to
//! people, [`difference`] compares two versions, [`weakness`] looks for what weakens a filter.

pub mod compile;
pub mod difference;
pub mod evaluate;
pub mod page;
pub mod table;
pub mod weakness;

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A process that has a policy, by the name of its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Process {
    /// One client's connection.
    QmpProc,
    /// Dumps.
    DumpProc,
    /// vCPUs.
    VcpuProc,
    /// Disks.
    BlockProc,
    /// `bulkhead` itself.
    Supervisor,
    /// Makes sockets.
    Opener,
    /// Answers for metrics, clears up.
    Warden,
    /// Starts helpers.
    Launcher,
}

impl Process {
    /// All of them, the smallest helper first.
    pub const ALL: [Self; 8] = [
        Self::QmpProc,
        Self::DumpProc,
        Self::VcpuProc,
        Self::BlockProc,
        Self::Supervisor,
        Self::Opener,
        Self::Warden,
        Self::Launcher,
    ];

    /// Its name, which is its file's.
    pub fn name(self) -> &'static str {
        match self {
            Self::QmpProc => "qmp-proc",
            Self::DumpProc => "dump-proc",
            Self::VcpuProc => "vcpu-proc",
            Self::BlockProc => "block-proc",
            Self::Supervisor => "supervisor",
            Self::Opener => "opener",
            Self::Warden => "warden",
            Self::Launcher => "launcher",
        }
    }

    /// The process of this name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|process| process.name() == name)
    }

    /// Whether it is one of the launcher's children, with filters for start-up and for what is forbidden.
    pub fn is_helper(self) -> bool {
        matches!(self, Self::QmpProc | Self::DumpProc | Self::VcpuProc | Self::BlockProc)
    }

    fn embedded(self) -> &'static str {
        match self {
            Self::QmpProc => include_str!("../../../policies/qmp-proc.json"),
            Self::DumpProc => include_str!("../../../policies/dump-proc.json"),
            Self::VcpuProc => include_str!("../../../policies/vcpu-proc.json"),
            Self::BlockProc => include_str!("../../../policies/block-proc.json"),
            Self::Supervisor => include_str!("../../../policies/supervisor.json"),
            Self::Opener => include_str!("../../../policies/opener.json"),
            Self::Warden => include_str!("../../../policies/warden.json"),
            Self::Launcher => include_str!("../../../policies/launcher.json"),
        }
    }
}

/// A policy that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The file cannot be read.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// It is no policy.
    #[error("{name}: {error}")]
    Data {
        /// The policy.
        name: String,
        /// What is wrong.
        error: serde_json::Error,
    },
    /// It names a call that does not exist.
    #[error("{name}: no system call is called {syscall}")]
    Syscall {
        /// The policy.
        name: String,
        /// The unknown name.
        syscall: String,
    },
    /// It does not compile.
    #[error("{name}: {error}")]
    Compile {
        /// The policy.
        name: String,
        /// The compiler's words.
        error: String,
    },
}

/// Where policies come from.
#[derive(Debug, Clone, Default)]
pub enum Source {
    /// Those that this program was built with.
    #[default]
    Embedded,
    /// Files of a directory.
    Directory(PathBuf),
}

impl Source {
    /// Reads one.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn read(&self, process: Process) -> Result<Policy, PolicyError> {
        match self {
            Self::Embedded => Policy::parse(process.name(), process.embedded()),
            Self::Directory(directory) => Policy::of_file(&directory.join(format!("{}.json", process.name()))),
        }
    }
}

/// What a filter is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Stage 1: from the launcher's child on.
    Startup,
    /// What no helper may ever try.
    Forbidden,
    /// From the seal on.
    Sealed,
}

impl Kind {
    /// Its name in the data.
    pub fn name(self) -> &'static str {
        match self {
            Self::Startup => "startup",
            Self::Forbidden => "forbidden",
            Self::Sealed => "sealed",
        }
    }
}

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// It is made.
    Allow,
    /// The process ends.
    KillProcess,
    /// Written so in the data; in the compiled filters of helpers: told to the supervisor, which ends the process.
    Trap,
}

/// One process's policy.
#[derive(Debug, Clone)]
pub struct Policy {
    /// The process, or the file.
    pub name: String,
    /// Its filters.
    pub filters: BTreeMap<Kind, Filter>,
    /// The data as it was read; what is compiled.
    text: String,
}

/// One filter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// For calls that no rule matches.
    pub mismatch_action: Action,
    /// For the others.
    pub match_action: Action,
    /// The rules, in the order of the file.
    #[serde(rename = "filter")]
    pub rules: Vec<Rule>,
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The call's name.
    pub syscall: String,
    /// All of these must hold.
    #[serde(default, rename = "args")]
    pub conditions: Vec<Condition>,
    /// Why the rule is there.
    #[serde(default, rename = "comment")]
    pub reason: String,
}

/// A condition on one argument.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Condition {
    /// Which argument, from 0.
    pub index: u8,
    /// How much of it is compared.
    #[serde(rename = "type")]
    pub width: Width,
    /// How.
    pub op: Op,
    /// With what.
    pub val: u64,
    /// What the value means.
    #[serde(default, rename = "comment", skip_serializing_if = "Option::is_none")]
    pub meaning: Option<String>,
}

/// How much of an argument is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Width {
    /// Its lower 32 bits.
    Dword,
    /// All 64.
    Qword,
}

/// A comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// Less.
    Lt,
    /// Less or equal.
    Le,
    /// Greater.
    Gt,
    /// Greater or equal.
    Ge,
    /// Equal in the bits of the mask.
    MaskedEq(u64),
}

impl Condition {
    /// Whether an argument meets it.
    pub fn holds(&self, argument: u64) -> bool {
        let (argument, value) = match self.width {
            Width::Dword => (argument & 0xffff_ffff, self.val & 0xffff_ffff),
            Width::Qword => (argument, self.val),
        };
        match self.op {
            Op::Eq => argument == value,
            Op::Ne => argument != value,
            Op::Lt => argument < value,
            Op::Le => argument <= value,
            Op::Gt => argument > value,
            Op::Ge => argument >= value,
            Op::MaskedEq(mask) => argument & mask == value & mask,
        }
    }

    /// An argument that meets it.
    pub fn example(&self) -> u64 {
        match self.op {
            Op::Eq | Op::Le | Op::Ge | Op::MaskedEq(_) => self.val,
            Op::Ne | Op::Gt => self.val.wrapping_add(1),
            Op::Lt => self.val.wrapping_sub(1),
        }
    }

    /// Arguments that do not.
    pub fn counterexamples(&self) -> Vec<u64> {
        let top = match self.width {
            Width::Dword => u64::from(u32::MAX),
            Width::Qword => u64::MAX,
        };
        let mut tries = vec![
            self.val.wrapping_add(1),
            self.val.wrapping_sub(1),
            0,
            top,
            self.val ^ 0x4000_0000,
        ];
        if let Op::MaskedEq(mask) = self.op {
            tries.extend(
                (0..64)
                    .map(|bit| 1 << bit)
                    .filter(|bit| mask & bit != 0)
                    .map(|bit| self.val ^ bit),
            );
        }
        tries.retain(|argument| *argument <= top && !self.holds(*argument));
        tries.dedup();
        tries
    }
}

impl Rule {
    /// Whether these arguments meet all conditions.
    pub fn holds(&self, arguments: &[u64; 6]) -> bool {
        self.conditions
            .iter()
            .all(|condition| condition.holds(arguments[usize::from(condition.index)]))
    }

    /// The call's number.
    pub fn number(&self) -> i64 {
        // Checked when the policy was read.
        policies::syscalls::number(&self.syscall).unwrap_or(-1)
    }
}

impl Filter {
    /// The calls that rules name.
    pub fn calls(&self) -> BTreeSet<&str> {
        self.rules.iter().map(|rule| rule.syscall.as_str()).collect()
    }

    /// The rules of one call.
    pub fn rules_of<'a>(&'a self, call: &'a str) -> impl Iterator<Item = &'a Rule> {
        self.rules.iter().filter(move |rule| rule.syscall == call)
    }
}

impl Policy {
    /// Reads a policy's text.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn parse(name: &str, text: &str) -> Result<Self, PolicyError> {
        let filters: BTreeMap<Kind, Filter> = serde_json::from_str(text).map_err(|error| PolicyError::Data {
            name: name.to_owned(),
            error,
        })?;
        let mut rules = filters.values().flat_map(|filter| &filter.rules);
        match rules.find(|rule| policies::syscalls::number(&rule.syscall).is_none()) {
            Some(rule) => Err(PolicyError::Syscall {
                name: name.to_owned(),
                syscall: rule.syscall.clone(),
            }),
            None => Ok(Self {
                name: name.to_owned(),
                filters,
                text: text.to_owned(),
            }),
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn of_file(path: &Path) -> Result<Self, PolicyError> {
        let text = std::fs::read_to_string(path).map_err(|error| PolicyError::File {
            path: path.to_owned(),
            error,
        })?;
        Self::parse(&path.display().to_string(), &text)
    }

    /// The filter that counts: what is allowed once the process is sealed.
    pub fn sealed(&self) -> Option<&Filter> {
        self.filters.get(&Kind::Sealed)
    }

    /// How many calls are allowed once it is sealed.
    pub fn sealed_calls(&self) -> usize {
        self.sealed().map_or(0, |filter| filter.calls().len())
    }

    /// Whether its violations are told to the supervisor: a helper's are.
    pub fn tells(&self) -> bool {
        self.sealed()
            .is_some_and(|filter| filter.mismatch_action == Action::Trap)
    }
}
