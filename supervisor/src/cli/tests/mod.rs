//! Whole command lines: what they mean, why they are refused, and that none of them can do harm.

mod accepted;
mod arbitrary;
mod drives;
mod objects;
mod refused;

use super::{Invocation, parse};
use crate::config::VmConfig;
use std::ffi::OsString;

/// The arguments of a line. Single quotes keep words together, as in a shell.
fn arguments(line: &str) -> Vec<OsString> {
    let mut arguments = Vec::new();
    for (place, part) in line.split('\'').enumerate() {
        if place % 2 == 1 {
            arguments.push(part.into());
        } else {
            arguments.extend(part.split_whitespace().map(OsString::from));
        }
    }
    arguments
}

fn invocation(line: &str) -> Invocation {
    parse(arguments(line).into_iter()).unwrap_or_else(|error| panic!("{line}\n{error}"))
}

/// The machine of a line that is accepted.
fn machine(line: &str) -> VmConfig {
    match invocation(line) {
        Invocation::Run(machine) => *machine,
        other => panic!("{line}\n{other:?}"),
    }
}

/// The error of a line that is not.
fn refusal(line: &str) -> String {
    match parse(arguments(line).into_iter()) {
        Err(error) => error.to_string(),
        Ok(invocation) => panic!("{line}\n{invocation:?}"),
    }
}
