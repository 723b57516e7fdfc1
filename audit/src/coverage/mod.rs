//! Which rules of the policies were ever needed: what a tracing run saw, held against the data.
//!
//! [`record`] runs a command under ptrace and follows all that it starts. Of the processes of machines it writes down every call under
//! each filter that it passed. Filters are inherited and stacked, so that one call of a sealed helper exercises three: the launcher's,
//! the helper's `startup` and its `sealed`.

pub mod record;

use crate::policy::{Kind, PolicyError, Process, Source};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// A call that was made under a filter. Arguments that no rule looks at are 0.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Seen {
    /// Whose filter, by the policy's name.
    pub process: String,
    /// Which.
    pub filter: Kind,
    /// The call.
    pub number: i64,
    /// Its arguments.
    pub arguments: [u64; 6],
}

/// A recording: calls, and how often.
pub type Recording = BTreeMap<Seen, u64>;

/// As lines of JSON.
pub fn write(recording: &Recording) -> String {
    let lines = recording.iter().map(|(seen, count)| serde_json::json!([seen, count]));
    lines.fold(String::new(), |text, line| format!("{text}{line}\n"))
}

/// Adds a recording's text to another.
///
/// # Errors
/// A line that is none of a recording's.
pub fn read(text: &str, into: &mut Recording) -> Result<(), serde_json::Error> {
    for line in text.lines() {
        let (seen, count): (Seen, u64) = serde_json::from_str(line)?;
        *into.entry(seen).or_default() += count;
    }
    Ok(())
}

/// A rule, and how often it allowed a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The policy.
    pub process: Process,
    /// The filter.
    pub filter: Kind,
    /// The call.
    pub syscall: String,
    /// Its conditions, for people.
    pub conditions: String,
    /// Why the rule is there.
    pub reason: String,
    /// How often it was exercised.
    pub count: u64,
}

/// All rules of these processes that allow something, and how many calls none of them allows.
///
/// # Errors
/// A policy that cannot be read.
pub fn rows(source: &Source, processes: &[Process], recording: &Recording) -> Result<(Vec<Row>, u64), PolicyError> {
    let mut rows = Vec::new();
    let mut refused = 0;
    for process in processes {
        let policy = source.read(*process)?;
        for (kind, filter) in policy.filters.iter().filter(|(kind, _)| **kind != Kind::Forbidden) {
            let seen = recording
                .iter()
                .filter(|(seen, _)| seen.process == process.name() && seen.filter == *kind);
            let seen: Vec<_> = seen.collect();
            let allowed = |seen: &Seen| {
                let mut rules = filter.rules.iter().filter(|rule| rule.number() == seen.number);
                rules.any(|rule| rule.holds(&seen.arguments))
            };
            let others = seen.iter().filter(|(seen, _)| !allowed(seen));
            refused += others.map(|(_, count)| **count).sum::<u64>();
            for rule in &filter.rules {
                let mine = seen
                    .iter()
                    .filter(|(seen, _)| seen.number == rule.number() && rule.holds(&seen.arguments));
                let conditions = rule.conditions.iter().map(|condition| {
                    let meaning = condition.meaning.clone();
                    meaning
                        .unwrap_or_else(|| format!("argument {} {:?} {}", condition.index, condition.op, condition.val))
                });
                rows.push(Row {
                    process: *process,
                    filter: *kind,
                    syscall: rule.syscall.clone(),
                    conditions: conditions.collect::<Vec<_>>().join(", "),
                    reason: rule.reason.clone(),
                    count: mine.map(|(_, count)| **count).sum(),
                });
            }
        }
    }
    Ok((rows, refused))
}

/// For people: one line for each filter, then the rules that were never needed.
pub fn text(rows: &[Row], refused: u64) -> String {
    let mut filters: BTreeMap<(Process, Kind), (usize, usize)> = BTreeMap::new();
    for row in rows {
        let (all, used) = filters.entry((row.process, row.filter)).or_default();
        *all += 1;
        *used += usize::from(row.count > 0);
    }
    let mut text = format!(
        "{:<12} {:<8} {:>5} {:>9} {:>6}\n",
        "process", "filter", "rules", "exercised", "never"
    );
    for ((process, kind), (all, used)) in &filters {
        let never = all - used;
        let _ = writeln!(
            text,
            "{:<12} {:<8} {all:>5} {used:>9} {never:>6}",
            process.name(),
            kind.name()
        );
    }
    let _ = writeln!(text, "\ncalls that no rule allows: {refused}\n");
    for row in rows.iter().filter(|row| row.count == 0) {
        let conditions = match row.conditions.as_str() {
            "" => String::new(),
            conditions => format!(" ({conditions})"),
        };
        let (process, kind) = (row.process.name(), row.filter.name());
        let _ = writeln!(
            text,
            "never: {process} {kind}: {}{conditions}: {}",
            row.syscall, row.reason
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_exercised_by_a_call_that_it_allows_and_by_no_other() {
        let fcntl = |command| Seen {
            process: "opener".into(),
            filter: Kind::Sealed,
            number: libc::SYS_socket,
            arguments: [command, 526_337, 0, 0, 0, 0],
        };
        let mut recording = Recording::from([(fcntl(1), 3), (fcntl(17), 2)]);
        let text_of = write(&recording);
        read(&text_of, &mut recording).unwrap();
        let (rows, refused) = rows(&Source::Embedded, &[Process::Opener], &recording).unwrap();
        // AF_PACKET is nobody's.
        assert_eq!(refused, 4);
        let used: Vec<_> = rows.iter().filter(|row| row.count > 0).collect();
        assert_eq!(used.len(), 1);
        assert_eq!((used[0].syscall.as_str(), used[0].count), ("socket", 6));
        let text = text(&rows, refused);
        assert!(text.contains("never: opener sealed: connect: "), "{text}");
        assert!(text.contains("calls that no rule allows: 4\n"), "{text}");
    }
}
