//! Two versions of a policy: what one allows that the other does not.

use super::table::conditions_text;
use super::{Kind, Policy, Rule};
use serde::Serialize;

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Of which filter.
    pub filter: Kind,
    /// What happened.
    pub change: Change,
    /// The call; empty when a whole filter is concerned.
    pub syscall: String,
    /// The conditions, or the actions.
    pub what: String,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// It is new.
    Added,
    /// It is gone.
    Removed,
    /// The same rule for another reason.
    Reason,
    /// The filter's actions.
    Actions,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sign = match self.change {
            Change::Added => '+',
            Change::Removed => '-',
            Change::Reason => '~',
            Change::Actions => '!',
        };
        write!(f, "{sign} {:<9} {:<18} {}", self.filter.name(), self.syscall, self.what)
    }
}

/// From `old` to `new`.
pub fn between(old: &Policy, new: &Policy) -> Vec<Difference> {
    let mut found = Vec::new();
    for filter in [Kind::Startup, Kind::Forbidden, Kind::Sealed] {
        let (before, after) = (old.filters.get(&filter), new.filters.get(&filter));
        let rules = |of: Option<&super::Filter>| of.map(|filter| filter.rules.clone()).unwrap_or_default();
        let (old_rules, new_rules) = (rules(before), rules(after));
        let twin = |rule: &Rule, of: &[Rule]| {
            let same = |other: &&Rule| other.syscall == rule.syscall && same_conditions(rule, other);
            of.iter().find(same).cloned()
        };
        let mut note = |change, rule: &Rule, what| {
            found.push(Difference {
                filter,
                change,
                syscall: rule.syscall.clone(),
                what,
            });
        };
        for rule in &old_rules {
            match twin(rule, &new_rules) {
                None => note(
                    Change::Removed,
                    rule,
                    format!("{} — {}", conditions_text(rule), rule.reason),
                ),
                Some(new) if new.reason != rule.reason => {
                    note(Change::Reason, rule, format!("{} → {}", rule.reason, new.reason));
                }
                Some(_) => {}
            }
        }
        for rule in &new_rules {
            if twin(rule, &old_rules).is_none() {
                note(
                    Change::Added,
                    rule,
                    format!("{} — {}", conditions_text(rule), rule.reason),
                );
            }
        }
        let actions = |of: &super::Filter| (of.mismatch_action, of.match_action);
        if before.map(actions) != after.map(actions) {
            found.push(Difference {
                filter,
                change: Change::Actions,
                syscall: String::new(),
                what: format!("{:?} → {:?}", before.map(actions), after.map(actions)),
            });
        }
    }
    found
}

/// Whether two rules allow the same, whatever is said about it.
fn same_conditions(one: &Rule, other: &Rule) -> bool {
    let bare = |rule: &Rule| {
        let conditions = rule.conditions.iter();
        let parts = conditions.map(|of| (of.index, format!("{:?} {:?}", of.width, of.op), of.val));
        let mut parts: Vec<_> = parts.collect();
        parts.sort();
        parts
    };
    bare(one) == bare(other)
}
