//! A policy as people read it: conditions in words, tables for a terminal, JSON for machines.

use super::weakness::{self, Warning};
use super::{Condition, Filter, Kind, Op, Policy, PolicyError, Process, Rule, Source, Width};
use serde_json::{Value, json};
use std::fmt::Write;

/// What the arguments of calls are called, for those that policies look at.
const ARGUMENTS: &[(&str, &[&str])] = &[
    ("arch_prctl", &["code", "address"]),
    ("clock_gettime", &["clock"]),
    ("clone", &["flags"]),
    ("close", &["fd"]),
    ("fallocate", &["fd", "mode", "offset", "length"]),
    ("fcntl", &["fd", "command", "argument"]),
    ("futex", &["address", "operation", "value"]),
    ("getsockopt", &["fd", "level", "option"]),
    ("io_uring_enter", &["ring", "to_submit", "min_complete", "flags"]),
    ("io_uring_register", &["ring", "operation", "argument", "count"]),
    ("ioctl", &["fd", "request", "argument"]),
    ("lseek", &["fd", "offset", "whence"]),
    ("madvise", &["address", "length", "advice"]),
    ("mmap", &["address", "length", "prot", "flags", "fd", "offset"]),
    ("mprotect", &["address", "length", "prot"]),
    ("mremap", &["old", "old_size", "new_size", "flags"]),
    ("openat", &["directory", "path", "flags", "mode"]),
    ("pidfd_send_signal", &["pidfd", "signal"]),
    ("poll", &["fds", "count", "timeout"]),
    ("prctl", &["option", "argument"]),
    ("preadv2", &["fd", "parts", "count", "offset", "offset_high", "flags"]),
    ("prlimit64", &["pid", "resource", "new_limit", "old_limit"]),
    ("pwritev2", &["fd", "parts", "count", "offset", "offset_high", "flags"]),
    ("read", &["fd", "buffer", "count"]),
    ("recvmsg", &["fd", "message", "flags"]),
    ("seccomp", &["operation", "flags", "argument"]),
    ("sendmsg", &["fd", "message", "flags"]),
    ("setsockopt", &["fd", "level", "option"]),
    ("socket", &["domain", "type", "protocol"]),
    ("socketpair", &["domain", "type", "protocol"]),
    ("tgkill", &["process", "thread", "signal"]),
    ("write", &["fd", "buffer", "count"]),
];

/// What an argument is called.
pub fn argument_name(call: &str, index: u8) -> String {
    ARGUMENTS
        .iter()
        .find(|(name, _)| *name == call)
        .and_then(|(_, names)| names.get(usize::from(index)))
        .map_or_else(|| format!("argument {index}"), |name| (*name).to_owned())
}

fn number(value: u64) -> String {
    if value < 1024 {
        value.to_string()
    } else {
        format!("{value:#x}")
    }
}

/// A condition in words: `prot & 4 = 0 (no PROT_EXEC)`.
pub fn condition_text(call: &str, condition: &Condition) -> String {
    let name = argument_name(call, condition.index);
    let value = number(condition.val);
    let mut text = match condition.op {
        Op::Eq => format!("{name} = {value}"),
        Op::Ne => format!("{name} ≠ {value}"),
        Op::Lt => format!("{name} < {value}"),
        Op::Le => format!("{name} ≤ {value}"),
        Op::Gt => format!("{name} > {value}"),
        Op::Ge => format!("{name} ≥ {value}"),
        Op::MaskedEq(mask) => format!("{name} & {} = {value}", number(mask)),
    };
    if condition.width == Width::Qword {
        text += " in 64 bits";
    }
    if let Some(meaning) = &condition.meaning {
        let _ = write!(text, " ({meaning})");
    }
    text
}

/// All conditions of a rule; `any` when there is none.
pub fn conditions_text(rule: &Rule) -> String {
    if rule.conditions.is_empty() {
        return "any".into();
    }
    let texts: Vec<_> = rule
        .conditions
        .iter()
        .map(|condition| condition_text(&rule.syscall, condition))
        .collect();
    texts.join("; ")
}

/// What a filter does with what it does not name, and with what it does.
pub fn filter_text(policy: &Policy, kind: Kind) -> String {
    match kind {
        Kind::Startup => "from the launcher's child on; everything else kills the process".into(),
        Kind::Forbidden => "under the sealed filter; these kill the process at once".into(),
        Kind::Sealed if policy.tells() => {
            "from the seal on; everything else is told to the supervisor, which kills the process".into()
        }
        Kind::Sealed => "from the seal on; everything else kills the process".into(),
    }
}

/// One line for each process: how much each may, and how many warnings there are.
///
/// # Errors
/// [`PolicyError`] of the first policy that cannot be read.
pub fn summary(source: &Source) -> Result<String, PolicyError> {
    let mut out = String::from("process      sealed: calls  rules   startup: calls  rules   forbidden   warnings\n");
    for process in Process::ALL {
        let policy = source.read(process)?;
        let count = |kind| {
            policy
                .filters
                .get(&kind)
                .map_or((String::from("-"), String::from("-")), |filter: &Filter| {
                    (filter.calls().len().to_string(), filter.rules.len().to_string())
                })
        };
        let (sealed, sealed_rules) = count(Kind::Sealed);
        let (startup, startup_rules) = count(Kind::Startup);
        let (forbidden, _) = count(Kind::Forbidden);
        let warnings = weakness::find(&policy)?.len();
        let _ = writeln!(
            out,
            "{:<12} {sealed:>13} {sealed_rules:>6} {startup:>16} {startup_rules:>6} {forbidden:>11} {warnings:>10}",
            process.name()
        );
    }
    Ok(out)
}

/// All rules of a policy, and its warnings.
///
/// # Errors
/// [`PolicyError`].
pub fn rules(policy: &Policy) -> Result<String, PolicyError> {
    let mut out = String::new();
    for kind in [Kind::Sealed, Kind::Startup, Kind::Forbidden] {
        let Some(filter) = policy.filters.get(&kind) else {
            continue;
        };
        let _ = writeln!(
            out,
            "{}, {}: {} calls, {}",
            policy.name,
            kind.name(),
            filter.calls().len(),
            filter_text(policy, kind)
        );
        for rule in &filter.rules {
            let _ = writeln!(
                out,
                "  {:<18} {:<60} {}",
                rule.syscall,
                conditions_text(rule),
                rule.reason
            );
        }
        out.push('\n');
    }
    out += &warnings_text(&policy.name, &weakness::find(policy)?);
    Ok(out)
}

/// One line for each warning.
pub fn warnings_text(name: &str, warnings: &[Warning]) -> String {
    let mut out = String::new();
    for warning in warnings {
        let _ = writeln!(out, "warning: {name}: {warning}");
    }
    out
}

/// A policy for machines: the data, the counts, the warnings.
///
/// # Errors
/// [`PolicyError`].
pub fn json(policy: &Policy) -> Result<Value, PolicyError> {
    let filters: Vec<Value> = policy
        .filters
        .iter()
        .map(|(kind, filter)| {
            json!({
                "filter": kind.name(),
                "mismatch-action": filter.mismatch_action,
                "match-action": filter.match_action,
                "calls": filter.calls().len(),
                "rules": filter.rules.iter().map(|rule| json!({
                    "syscall": rule.syscall,
                    "number": rule.number(),
                    "conditions": rule.conditions,
                    "reason": rule.reason,
                })).collect::<Vec<_>>(),
            })
        })
        .collect();
    Ok(json!({
        "process": policy.name,
        "sealed-calls": policy.sealed_calls(),
        "filters": filters,
        "warnings": weakness::find(policy)?,
    }))
}
