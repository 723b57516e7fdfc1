//! `audit binary`: which system calls a helper's code can make at all, held against its policy.
//!
//! [`elf`] reads the executable; [`code`] disassembles it function by function and finds who calls whom; [`flow`] finds the
//! number in the register when a `syscall` instruction is reached, also through functions that take it as an argument.
//!
//! What is reached: from the program's entry, along calls and jumps, to every function whose address reached code takes or
//! that lies in the program's data. That is too much rather than too little: a function in a table counts as called. Jumps
//! through registers within a function are followed to everything in it. A number that cannot be told is listed, not guessed.

pub mod code;
pub mod elf;
pub mod flow;

use crate::policy::{Kind, Policy};
use code::Program;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Why an executable could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum BinaryError {
    /// It cannot be read.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// It is no executable of this kind.
    #[error("{path}: {problem}")]
    Format {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        problem: &'static str,
    },
}

/// What an executable can call.
#[derive(Debug, Default)]
pub struct Reach {
    /// Numbers, and the functions whose code makes the call.
    pub calls: BTreeMap<i64, BTreeSet<String>>,
    /// Functions with a call whose number is not known.
    pub unresolved: BTreeSet<String>,
    /// Functions with an instruction of another calling convention (`int 0x80`, `sysenter`).
    pub foreign: BTreeSet<String>,
    /// How many functions are reached, and how many there are.
    pub functions: [usize; 2],
}

/// Looks at an executable.
///
/// # Errors
/// [`BinaryError`].
pub fn reach(path: &Path) -> Result<Reach, BinaryError> {
    let bytes = std::fs::read(path).map_err(|error| BinaryError::File {
        path: path.into(),
        error,
    })?;
    let program = elf::Image::parse(&bytes)
        .and_then(|image| Program::read(&image))
        .ok_or_else(|| BinaryError::Format {
            path: path.into(),
            problem: "no static x86-64 executable with symbols",
        })?;
    Ok(program.reach())
}

/// An executable held against its policy.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Comparison {
    /// The process.
    pub process: String,
    /// Functions that are reached, and all.
    pub functions: [usize; 2],
    /// Reached, and allowed once sealed.
    pub sealed: Vec<String>,
    /// Reached, and allowed until the seal only.
    pub until_sealed: Vec<String>,
    /// Reached, and never allowed: who makes it, ends. With functions that make it.
    pub never: BTreeMap<String, Vec<String>>,
    /// Allowed once sealed, and not in the program's code.
    pub sealed_unreached: Vec<String>,
    /// Allowed until the seal, and not in the program's code.
    pub startup_unreached: Vec<String>,
    /// Functions with a call whose number is not known.
    pub unresolved: Vec<String>,
    /// Functions with instructions of another calling convention.
    pub foreign: Vec<String>,
}

/// Compares.
pub fn compare(policy: &Policy, reach: &Reach) -> Comparison {
    let allowed = |kind| -> BTreeSet<String> {
        let filter = policy.filters.get(&kind);
        filter.map_or_else(BTreeSet::new, |filter| {
            filter.calls().into_iter().map(str::to_owned).collect()
        })
    };
    let (sealed, startup) = (allowed(Kind::Sealed), allowed(Kind::Startup));
    let name = |number: i64| policies::syscalls::name(number).map_or_else(|| format!("call {number}"), str::to_owned);
    let reached: BTreeMap<String, &BTreeSet<String>> = reach
        .calls
        .iter()
        .map(|(number, functions)| (name(*number), functions))
        .collect();
    let within = |of: &BTreeSet<String>| reached.keys().filter(|call| of.contains(*call)).cloned().collect();
    let without = |of: &BTreeSet<String>| of.iter().filter(|call| !reached.contains_key(*call)).cloned().collect();
    let only_startup: BTreeSet<String> = startup.difference(&sealed).cloned().collect();
    let never = reached
        .iter()
        .filter(|(call, _)| !sealed.contains(*call) && !startup.contains(*call))
        .map(|(call, functions)| (call.clone(), functions.iter().cloned().collect()))
        .collect();
    Comparison {
        process: policy.name.clone(),
        functions: reach.functions,
        sealed: within(&sealed),
        until_sealed: within(&only_startup),
        never,
        sealed_unreached: without(&sealed),
        startup_unreached: without(&only_startup),
        unresolved: reach.unresolved.iter().cloned().collect(),
        foreign: reach.foreign.iter().cloned().collect(),
    }
}

impl std::fmt::Display for Comparison {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [reached, all] = self.functions;
        let total = self.sealed.len() + self.until_sealed.len() + self.never.len();
        writeln!(
            f,
            "{}: {total} system calls in {reached} reached functions of {all}",
            self.process
        )?;
        let mut list = |what: &str, calls: &[String]| {
            let text = if calls.is_empty() {
                "-".to_owned()
            } else {
                calls.join(" ")
            };
            writeln!(f, "  {what:<42} {:>3}  {text}", calls.len())
        };
        list("reachable, allowed once sealed", &self.sealed)?;
        list("reachable, allowed until sealed only", &self.until_sealed)?;
        let never: Vec<_> = self
            .never
            .iter()
            .map(|(call, functions)| {
                let mut text = call.clone();
                let _ = write!(text, " ({})", functions.first().map_or("?", String::as_str));
                text
            })
            .collect();
        list("reachable, never allowed", &never)?;
        list("allowed once sealed, not reachable", &self.sealed_unreached)?;
        list("allowed until sealed only, not reachable", &self.startup_unreached)?;
        list("not resolved, in", &self.unresolved)?;
        if !self.foreign.is_empty() {
            list("calls of another convention, in", &self.foreign)?;
        }
        Ok(())
    }
}
