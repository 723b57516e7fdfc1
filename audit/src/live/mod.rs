//! `audit live`: a running machine held against its declaration.
//!
//! [`declared`] is what `policies/processes.json` says of each process; [`process`] and [`sockets`] read what is, from /proc
//! and sock_diag; [`filters`] reads the installed programs by ptrace; [`check`] compares; [`graph`] draws who holds what.
//!
//! What this caller cannot look at is a row of its own, *not checkable*: never one that says *equal*.

pub mod check;
pub mod declared;
pub mod descriptors;
pub mod duplicates;
pub mod filters;
pub mod find;
pub mod graph;
pub mod process;
pub mod sockets;

use crate::policy::{PolicyError, Process, Source};
use declared::Declarations;
use find::Machine;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Looks at a machine that changes while it is looked at: a difference counts when it is still there after this many looks.
const LOOKS: usize = 8;
/// Between them.
const BETWEEN_LOOKS: Duration = Duration::from_millis(150);

/// Why a machine could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    /// No machine of this name or process id.
    #[error("{0}")]
    NoMachine(String),
    /// The declaration.
    #[error("{0}")]
    Declaration(String),
    /// A policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}

/// What one comparison came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// As declared.
    Equal,
    /// A layer that this host or this caller's machine does not have.
    Missing,
    /// This caller cannot look.
    NotCheckable,
    /// Not as declared.
    Differs,
}

impl State {
    /// As it is printed.
    pub fn text(self) -> &'static str {
        match self {
            Self::Equal => "equal",
            Self::Missing => "missing layer",
            Self::NotCheckable => "not checkable",
            Self::Differs => "DIFFERS",
        }
    }
}

/// One comparison.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Row {
    /// Process id.
    pub pid: i32,
    /// The process's role, or `undeclared`.
    pub process: String,
    /// What was compared.
    pub what: &'static str,
    /// What it came to.
    pub state: State,
    /// What was found.
    pub found: String,
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            pid,
            process,
            what,
            state,
            found,
        } = self;
        write!(f, "{:<13} {process:<10} {pid:>8}  {what:<13} {found}", state.text())
    }
}

/// What to hold a machine against.
#[derive(Debug, Clone, Default)]
pub struct Expectation {
    /// Policies and the declaration of processes.
    pub source: Source,
    /// Where the programs are; the directory of the running supervisor's when absent.
    pub programs: Option<PathBuf>,
}

/// A look at a machine.
#[derive(Debug)]
pub struct Look {
    /// All comparisons.
    pub rows: Vec<Row>,
    /// What was seen.
    pub machine: Machine,
}

impl Look {
    /// How many rows came to this.
    pub fn count(&self, state: State) -> usize {
        self.rows.iter().filter(|row| row.state == state).count()
    }
}

/// Looks at a machine until all is as declared, or for as long as a change under way can take.
///
/// # Errors
/// [`LiveError`].
pub fn look(name: &str, expectation: &Expectation) -> Result<Look, LiveError> {
    let declarations = Declarations::read(&expectation.source)?;
    let programs = Process::ALL
        .into_iter()
        .map(|process| Ok((process, expectation.source.read(process)?.compile()?)))
        .collect::<Result<BTreeMap<_, _>, PolicyError>>()?;
    let supervisor = find::supervisor(name)?;
    let mut looks = 0;
    loop {
        let machine = find::machine(supervisor)?;
        let against = check::Against {
            declarations: &declarations,
            programs: &programs,
            directory: expectation.programs.as_deref(),
        };
        let look = Look {
            rows: check::all(&machine, &against),
            machine,
        };
        looks += 1;
        if look.count(State::Differs) == 0 || looks == LOOKS {
            return Ok(look);
        }
        std::thread::sleep(BETWEEN_LOOKS);
    }
}
