//! The command line, in QEMU's syntax: arguments become one validated [`VmConfig`] or one line of error.
//!
//! Everything is parsed here, once; the rest of the supervisor sees no text that still means something.

mod error;

pub use error::UsageError;

use crate::config::VmConfig;
use std::ffi::OsString;

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    /// Run this machine.
    Run(Box<VmConfig>),
    /// `bulkhead doctor`: check the host.
    Doctor,
    /// `--help`.
    Help,
    /// `-version`.
    Version,
    /// `-machine help`.
    ListMachines,
    /// `-accel help`.
    ListAccelerators,
    /// `-cpu help`.
    ListCpus,
    /// `-device help`.
    ListDevices,
    /// `-drive format=help`.
    ListImageFormats,
    /// `-chardev help`.
    ListChardevs,
}

impl Invocation {
    /// What to print to standard output before exiting with 0; `None` for those that do something.
    pub fn text(&self) -> Option<String> {
        None
    }
}

/// Parses the arguments after the program's name.
///
/// # Errors
/// The first thing that is wrong, as the one line to print after `bulkhead: `.
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Invocation, UsageError> {
    match args.last() {
        Some(last) => Err(UsageError::new(error::quote(&last), "unknown option")),
        None => Ok(Invocation::Help),
    }
}

/// `--help`, for people.
pub fn help() -> String {
    String::new()
}
