//! docs/POLICIES.md, and the README's table of numbers, written from the data.

use super::table::{conditions_text, filter_text};
use super::{Filter, Kind, Policy, PolicyError, Process, Source};
use std::collections::BTreeMap;
use std::fmt::Write;

const HEAD: &str = "\
# Policies: what each process may ask of the kernel

Written from `policies/*.json`; a test keeps it so (`BULKHEAD_UPDATE=1 cargo test -p audit --test policies_page`). `bulkhead
audit policy` prints the same with what weakens a filter, `bulkhead audit live` holds a running machine against it.

A helper runs under four filters: the launcher's, which it inherits; *startup*, loaded before its program; and at its seal,
on all its threads and before it reads a byte that a guest, a tenant or a client controls, *forbidden* and *sealed*. A call
is made only if all four allow it. The launcher, the opener and the supervisor have one. Every filter first ends a process
that calls in another convention (32-bit calls); an x32 call is none that a filter allows.

Arguments are compared in their lower 32 bits unless a line says otherwise. A call with several lines is allowed if one of them fits.
";

/// What other monitors allow, as they publish it.
const PEERS: &[(&str, &str)] = &[
    ("Firecracker", "vmm 50, api 31, vcpu 27"),
    ("Cloud Hypervisor", "vmm 109, virtio-blk 51, vcpu 49"),
];

/// The README's table.
///
/// # Errors
/// [`PolicyError`].
pub fn numbers(source: &Source) -> Result<String, PolicyError> {
    let mut out = String::from("| system calls allowed once sealed | |\n|---|---|\n");
    for process in Process::ALL {
        if process == Process::Launcher {
            continue;
        }
        let _ = writeln!(out, "| {} | {} |", process.name(), source.read(process)?.sealed_calls());
    }
    for (name, figures) in PEERS {
        let _ = writeln!(out, "| *for comparison, as published:* {name} | {figures} |");
    }
    Ok(out)
}

/// The page.
///
/// # Errors
/// [`PolicyError`].
pub fn page(source: &Source) -> Result<String, PolicyError> {
    let mut out = HEAD.to_owned();
    out += "\n| process | calls once sealed | rules |\n|---|---|---|\n";
    let mut policies = BTreeMap::new();
    for process in Process::ALL {
        let policy = source.read(process)?;
        let name = process.name();
        let rules = policy.sealed().map_or(0, |filter| filter.rules.len());
        let _ = writeln!(out, "| [{name}](#{name}) | {} | {rules} |", policy.sealed_calls());
        policies.insert(process, policy);
    }
    for process in Process::ALL {
        let policy = &policies[&process];
        let _ = writeln!(out, "\n## {}", process.name());
        for kind in [Kind::Sealed, Kind::Startup] {
            section(&mut out, policy, kind);
        }
    }
    // One list for all helpers; should one ever differ, it has its own.
    let mut lists: Vec<(&Filter, Vec<Process>)> = Vec::new();
    for (process, policy) in &policies {
        if let Some(filter) = policy.filters.get(&Kind::Forbidden) {
            match lists.iter_mut().find(|(of, _)| *of == filter) {
                Some((_, processes)) => processes.push(*process),
                None => lists.push((filter, vec![*process])),
            }
        }
    }
    out += "\n## Forbidden\n";
    for (filter, processes) in lists {
        let names: Vec<_> = processes.iter().map(|process| process.name()).collect();
        let _ = write!(
            out,
            "\n{}: under the sealed filter, so that these end the process at once, even without a supervisor.\n\n",
            names.join(", ")
        );
        table(&mut out, filter);
    }
    Ok(out)
}

fn section(out: &mut String, policy: &Policy, kind: Kind) {
    if let Some(filter) = policy.filters.get(&kind) {
        let _ = write!(
            out,
            "\n### {}, {}\n\n{} calls, {}.\n\n",
            policy.name,
            kind.name(),
            filter.calls().len(),
            filter_text(policy, kind)
        );
        table(out, filter);
    }
}

fn table(out: &mut String, filter: &Filter) {
    out.push_str("| call | arguments | why |\n|---|---|---|\n");
    for rule in &filter.rules {
        let escape = |text: &str| text.replace('|', "\\|");
        let _ = writeln!(
            out,
            "| `{}` | {} | {} |",
            rule.syscall,
            escape(&conditions_text(rule)),
            escape(&rule.reason)
        );
    }
}
