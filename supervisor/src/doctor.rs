//! `bulkhead doctor`: what this host has of what Bulkhead needs, and what each missing piece costs.
//!
//! Every check tries the thing itself rather than guessing from a version number, the way the processes will use it later;
//! what changes the process (namespaces, filters) is tried in a child that ends. Nothing needs root and nothing stays
//! behind.
//!
//! [`kvm`] the accelerator; [`isolation`] namespaces, ids, seccomp, Landlock, cgroups; [`memory`] guest RAM and what acts
//! on it; [`io`] the block engine; [`probe`] children and files.

mod io;
mod isolation;
mod kvm;
mod memory;
mod probe;

use std::io::Write;
use std::process::ExitCode;

/// How much of a thing is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ok,
    Limited,
    Missing,
}

/// What a gap weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Weight {
    /// No VM can run.
    Fatal,
    /// A VM runs behind fewer walls.
    Wall,
    /// A VM runs slower, or without some feature.
    Comfort,
}

/// The result of one check: one line.
#[derive(Debug, PartialEq, Eq)]
struct Check {
    name: &'static str,
    state: State,
    /// What was found.
    found: String,
    /// What the gap costs and what to do about it; not with [`State::Ok`].
    cost: Option<(Weight, String)>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Ok,
            found: found.into(),
            cost: None,
        }
    }

    fn limited(name: &'static str, found: impl Into<String>, weight: Weight, cost: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Limited,
            found: found.into(),
            cost: Some((weight, cost.into())),
        }
    }

    fn missing(name: &'static str, found: impl Into<String>, weight: Weight, cost: impl Into<String>) -> Self {
        Self {
            state: State::Missing,
            ..Self::limited(name, found, weight, cost)
        }
    }

    fn has_weight(&self, wanted: Weight) -> bool {
        self.cost.as_ref().is_some_and(|(weight, _)| *weight == wanted)
    }
}

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = match self.state {
            State::Ok => "ok",
            State::Limited => "limited",
            State::Missing => "missing",
        };
        write!(f, "{state:<8} {:<18} {}", self.name, self.found)?;
        match &self.cost {
            Some((_, cost)) => write!(f, "; cost: {cost}"),
            None => Ok(()),
        }
    }
}

/// Checks the host and prints a line per check and a verdict. The exit status is 1 when no VM can run here.
pub fn run(out: &mut dyn Write) -> ExitCode {
    let checks: Vec<Check> = [probe::kernel(), probe::helpers()]
        .into_iter()
        .chain(kvm::checks())
        .chain(isolation::checks())
        .chain(memory::checks())
        .chain(io::checks())
        .collect();
    // Whoever closed the output does not need the rest; the status stands.
    let _ = report(out, &checks);
    if checks.iter().any(|check| check.has_weight(Weight::Fatal)) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn report(out: &mut dyn Write, checks: &[Check]) -> std::io::Result<()> {
    for check in checks {
        writeln!(out, "{check}")?;
    }
    writeln!(out, "\n{}", verdict(checks))?;
    writeln!(
        out,
        "Exit status: 0 a VM can run (perhaps with the limits above), 1 none can."
    )?;
    out.flush()
}

fn verdict(checks: &[Check]) -> String {
    let names = |weight| {
        let names: Vec<&str> = checks
            .iter()
            .filter(|check| check.has_weight(weight))
            .map(|check| check.name)
            .collect();
        names.join(", ")
    };
    let fatal = names(Weight::Fatal);
    if !fatal.is_empty() {
        return format!("No VM can run here: {fatal}.");
    }
    let walls = names(Weight::Wall);
    let mut text = if walls.is_empty() {
        "A VM can run here with the full sandbox".to_owned()
    } else {
        format!("A VM can run here, but with a weaker sandbox: {walls}")
    };
    let comforts = names(Weight::Comfort);
    if !comforts.is_empty() {
        text += &format!(". Warnings: {comforts}");
    }
    text + "."
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gap(name: &'static str, weight: Weight) -> Check {
        Check::missing(name, "not there", weight, "something")
    }

    #[test]
    fn a_check_is_one_line_with_its_cost() {
        assert_eq!(
            Check::ok("memfd", "all of it").to_string(),
            "ok       memfd              all of it"
        );
        let limited = Check::limited("Landlock", "ABI 1", Weight::Wall, "no network rules");
        assert_eq!(
            limited.to_string(),
            "limited  Landlock           ABI 1; cost: no network rules"
        );
        assert_eq!(
            gap("io_uring", Weight::Comfort).to_string(),
            "missing  io_uring           not there; cost: something"
        );
    }

    #[test]
    fn the_verdict_names_what_matters_most() {
        let ok = || Check::ok("memfd", "");
        let cases = [
            (vec![ok()], "A VM can run here with the full sandbox."),
            (
                vec![ok(), gap("io_uring", Weight::Comfort)],
                "A VM can run here with the full sandbox. Warnings: io_uring.",
            ),
            (
                vec![gap("Landlock", Weight::Wall), gap("THP", Weight::Comfort)],
                "A VM can run here, but with a weaker sandbox: Landlock. Warnings: THP.",
            ),
            (
                vec![
                    gap("/dev/kvm", Weight::Fatal),
                    gap("Landlock", Weight::Wall),
                    gap("seccomp", Weight::Fatal),
                ],
                "No VM can run here: /dev/kvm, seccomp.",
            ),
        ];
        for (checks, wanted) in cases {
            assert_eq!(verdict(&checks), wanted);
        }
    }

    #[test]
    fn this_host_gets_one_line_per_check_and_a_verdict() {
        let mut out = Vec::new();
        run(&mut out);
        let text = String::from_utf8(out).unwrap();
        let (checks, end) = text.split_once("\n\n").unwrap();
        assert!(checks.lines().count() > 15, "{text}");
        for line in checks.lines() {
            let state = line.split_whitespace().next().unwrap();
            assert!(["ok", "limited", "missing"].contains(&state), "{line}");
            assert_eq!(state != "ok", line.contains("; cost: "), "{line}");
        }
        assert_eq!(end.lines().count(), 2, "{end}");
    }
}
