//! What has become of each role's helpers, counted: for query-status and for metrics.

use ipc::Role;
use std::cell::Cell;

/// The counts of one role, since the machine's start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoleCounters {
    /// How often another one has taken the place of one that ended.
    pub restarts: u64,
    /// Calls that its policy does not allow: each ended a process, or with `--policy-mode log` went on.
    pub violations: u64,
}

/// All roles' counts.
#[derive(Debug, Default)]
pub struct Counters([Cell<RoleCounters>; Role::ALL.len()]);

impl Counters {
    /// Of one role.
    pub fn of(&self, role: Role) -> RoleCounters {
        self.cell(role).get()
    }

    /// Of all roles together.
    pub fn total(&self) -> RoleCounters {
        self.0.iter().fold(RoleCounters::default(), |sum, of| RoleCounters {
            restarts: sum.restarts + of.get().restarts,
            violations: sum.violations + of.get().violations,
        })
    }

    /// One more restart.
    pub fn restarted(&self, role: Role) {
        let mut counts = self.of(role);
        counts.restarts += 1;
        self.cell(role).set(counts);
    }

    /// One more violation.
    pub fn violated(&self, role: Role) {
        let mut counts = self.of(role);
        counts.violations += 1;
        self.cell(role).set(counts);
    }

    fn cell(&self, role: Role) -> &Cell<RoleCounters> {
        // Roles are numbered from 1.
        &self.0[role as usize - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_is_counted_for_itself() {
        let counters = Counters::default();
        counters.restarted(Role::Block);
        counters.violated(Role::Block);
        counters.violated(Role::Qmp);
        for (role, restarts, violations) in [
            (Role::Vcpu, 0, 0),
            (Role::Block, 1, 1),
            (Role::Dump, 0, 0),
            (Role::Qmp, 0, 1),
        ] {
            assert_eq!(counters.of(role), RoleCounters { restarts, violations }, "{role}");
        }
        assert_eq!(
            counters.total(),
            RoleCounters {
                restarts: 1,
                violations: 2
            }
        );
    }
}
