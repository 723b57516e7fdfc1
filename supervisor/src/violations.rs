//! What helpers tried against their policies: log lines, events, counts, and what is done about it.
//!
//! Two things end a helper. A call that its sealed filter lacks stops its thread, and the supervisor is notified of number,
//! arguments and place before it kills. A call that its start-up filter or the launcher's lacks as well, or that no helper
//! may ever try, is killed by the kernel at once: the strictest of all filters counts, and only one of them can notify. Of
//! such a call nothing is known here but that it was made (SIGSYS); root finds its number in the kernel's log.
//!
//! With `--policy-mode log` nothing is killed ([`policies::mode`]): every kind of violation is told once, all are counted,
//! and listed at the end.

use crate::counters::Counters;
use crate::logging;
use crate::sandbox::symbols::Program;
use crate::sandbox::violation::Violation;
use ipc::Role;
use ipc::qmp::{Event, PolicyViolation, ViolationAction};
use policies::Mode;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::rc::Rc;

/// Most kinds that are told apart with `--policy-mode log`; further ones are only counted.
const MAX_KINDS: usize = 1000;
/// How many ended helpers are remembered with what they did: more than can be ending at a time.
const ENDED_KEPT: usize = 64;

/// What becomes of a call.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The process is killed, for this.
    Kill(String),
    /// It goes on.
    Allow,
}

/// All violations of one machine.
pub struct Violations {
    mode: Mode,
    vm_name: Option<String>,
    /// Where the helpers' programs are; nothing when that is not known.
    programs: Option<PathBuf>,
    counters: Rc<Counters>,
    kinds: RefCell<BTreeMap<Kind, Seen>>,
    /// Of kinds that there was no more room for.
    others: Cell<u64>,
    events: RefCell<VecDeque<Event>>,
    ended: RefCell<VecDeque<(i32, String)>>,
}

/// Calls of one kind are made at the same place with the same arguments, as far as rules look at those.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    role: Role,
    number: i32,
    place: String,
    arguments: [Option<u64>; 6],
}

/// The first of a kind, and how many there were.
struct Seen {
    text: String,
    count: u64,
}

impl Violations {
    /// None yet. Call it before the supervisor is sealed.
    pub fn new(mode: Mode, vm_name: Option<String>, counters: Rc<Counters>) -> Self {
        let program = std::env::current_exe().ok();
        Self {
            mode,
            vm_name,
            programs: program.and_then(|program| Some(program.parent()?.to_owned())),
            counters,
            kinds: RefCell::default(),
            others: Cell::new(0),
            events: RefCell::default(),
            ended: RefCell::default(),
        }
    }

    /// Where they, and restarts, are counted.
    pub fn counters(&self) -> &Rc<Counters> {
        &self.counters
    }

    /// What a helper that has just been started runs.
    pub fn program(&self, role: Role) -> Program {
        let directory = self.programs.clone().unwrap_or_default();
        Program::started(directory.join(role.name()))
    }

    /// A helper was stopped in a call that its sealed filter lacks.
    pub fn found(&self, role: Role, pid: i32, program: &Program, violation: &Violation) -> Verdict {
        self.counters.violated(role);
        let symbol = program.symbol(violation.instruction_pointer);
        let text = match &symbol {
            Some(symbol) => format!("{violation} ({symbol})"),
            None => violation.to_string(),
        };
        let action = match self.mode {
            Mode::Enforce => ViolationAction::Killed,
            Mode::Log => ViolationAction::Allowed,
        };
        if self.mode == Mode::Log {
            if !self.is_new(role, violation, symbol.as_deref(), &text) {
                return Verdict::Allow;
            }
            logging::warning(role, pid, format_args!("policy violation, allowed: {text}"));
        } else {
            let name = violation.name().unwrap_or("a system call without a name");
            self.remember(pid, format!("broken its policy ({name})"));
        }
        self.tell(PolicyViolation {
            syscall: violation.name().map(str::to_owned),
            number: Some(violation.number.into()),
            arguments: Some(violation.arguments.to_vec()),
            instruction_pointer: Some(violation.instruction_pointer),
            symbol,
            ..self.event(role, pid, action)
        });
        match self.mode {
            Mode::Enforce => Verdict::Kill(text),
            Mode::Log => Verdict::Allow,
        }
    }

    /// A helper was killed by SIGSYS: by a filter that tells nobody.
    pub fn killed_unheard(&self, role: Role, pid: i32) {
        self.counters.violated(role);
        logging::warning(
            role,
            pid,
            "policy violation: a system call that its first filters lack; the kernel killed it before it could be asked which \
             (root finds it in the kernel's log: type=1326)",
        );
        self.remember(
            pid,
            "broken its policy (a system call that its first filters lack)".to_owned(),
        );
        self.tell(self.event(role, pid, ViolationAction::Killed));
    }

    /// How a process has ended, if its policy ended it: to be read after "has".
    pub fn how_ended(&self, pid: i32) -> Option<String> {
        let mut ended = self.ended.borrow_mut();
        let at = ended.iter().position(|(of, _)| *of == pid)?;
        ended.remove(at).map(|(_, how)| how)
    }

    /// The events that clients have not been told of yet.
    pub fn take_events(&self) -> VecDeque<Event> {
        self.events.take()
    }

    /// With `--policy-mode log`: what the policies lack, one line a kind, at the machine's end.
    pub fn summary(&self) -> Vec<String> {
        if self.mode == Mode::Enforce {
            return Vec::new();
        }
        let kinds = self.kinds.borrow();
        let mut lines = vec![format!(
            "--policy-mode log: {} kinds of violations, all allowed",
            kinds.len()
        )];
        let line = |(kind, seen): (&Kind, &Seen)| format!("  {} × {}: {}", seen.count, kind.role, seen.text);
        lines.extend(kinds.iter().map(line));
        if self.others.get() > 0 {
            lines.push(format!("  {} × other kinds", self.others.get()));
        }
        lines
    }

    /// Counts one, and says whether it is the first of its kind.
    fn is_new(&self, role: Role, violation: &Violation, symbol: Option<&str>, text: &str) -> bool {
        let looked_at = violation.name().map_or(0, policies::filtered_arguments);
        let mut arguments = [None; 6];
        for (index, argument) in arguments.iter_mut().enumerate() {
            *argument = (looked_at & 1 << index != 0).then(|| violation.arguments[index]);
        }
        let kind = Kind {
            role,
            number: violation.number,
            // Addresses differ from process to process, places in functions do not.
            place: symbol.map_or_else(|| format!("{:#x}", violation.instruction_pointer), str::to_owned),
            arguments,
        };
        let mut kinds = self.kinds.borrow_mut();
        let room = kinds.len() < MAX_KINDS;
        match kinds.get_mut(&kind) {
            Some(seen) => {
                seen.count += 1;
                false
            }
            None if room => {
                let text = text.to_owned();
                kinds.insert(kind, Seen { text, count: 1 });
                true
            }
            None => {
                self.others.set(self.others.get() + 1);
                false
            }
        }
    }

    fn event(&self, role: Role, pid: i32, action: ViolationAction) -> PolicyViolation {
        PolicyViolation {
            role: role.name().to_owned(),
            pid: pid.into(),
            vm: self.vm_name.clone(),
            action,
            syscall: None,
            number: None,
            arguments: None,
            instruction_pointer: None,
            symbol: None,
        }
    }

    fn tell(&self, violation: PolicyViolation) {
        self.events
            .borrow_mut()
            .push_back(Event::BulkheadPolicyViolation(violation));
    }

    fn remember(&self, pid: i32, how: String) {
        let mut ended = self.ended.borrow_mut();
        ended.push_back((pid, how));
        if ended.len() > ENDED_KEPT {
            ended.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violations(mode: Mode) -> Violations {
        Violations::new(mode, Some("vm1".into()), Rc::default())
    }

    fn call(number: i64, first: u64, second: u64) -> Violation {
        Violation {
            number: number as i32,
            arguments: [first, second, 0, 0, 0, 0],
            instruction_pointer: 0x1234,
        }
    }

    fn tried(violations: &Violations, what: &Violation) -> Verdict {
        violations.found(Role::Block, 7, &violations.program(Role::Block), what)
    }

    #[test]
    fn a_violation_kills_and_is_told_with_all_that_is_known() {
        let violations = violations(Mode::Enforce);
        let what = call(libc::SYS_openat, 1, 2);
        let Verdict::Kill(why) = tried(&violations, &what) else {
            panic!("it goes on");
        };
        assert_eq!(why, "openat(0x1, 0x2, 0x0, 0x0, 0x0, 0x0) at 0x1234");
        let events = violations.take_events();
        let Some(Event::BulkheadPolicyViolation(told)) = events.front() else {
            panic!("{events:?}");
        };
        assert_eq!(
            (told.role.as_str(), told.pid, told.vm.as_deref()),
            ("block-proc", 7, Some("vm1"))
        );
        assert_eq!(told.action, ViolationAction::Killed);
        assert_eq!((told.syscall.as_deref(), told.number), (Some("openat"), Some(257)));
        assert_eq!(told.arguments.as_deref(), Some(&[1, 2, 0, 0, 0, 0][..]));
        assert!(violations.take_events().is_empty());
        assert_eq!(violations.how_ended(7).as_deref(), Some("broken its policy (openat)"));
        assert_eq!(violations.how_ended(7), None);
        assert_eq!(violations.counters.of(Role::Block).violations, 1);
        assert!(violations.summary().is_empty());
    }

    #[test]
    fn what_the_kernel_killed_is_told_without_what_nobody_knows() {
        let violations = violations(Mode::Enforce);
        violations.killed_unheard(Role::Qmp, 9);
        let events = violations.take_events();
        let Some(Event::BulkheadPolicyViolation(told)) = events.front() else {
            panic!("{events:?}");
        };
        assert_eq!((told.number, told.instruction_pointer), (None, None));
        assert_eq!(violations.counters.of(Role::Qmp).violations, 1);
        assert!(violations.how_ended(9).is_some());
    }

    #[test]
    fn the_mode_for_development_tells_each_kind_once() {
        let violations = violations(Mode::Log);
        for what in [
            call(libc::SYS_openat, 1, 2),
            // Another name: the same kind.
            call(libc::SYS_openat, 1, 3),
            // ioctl's request is what rules look at.
            call(libc::SYS_ioctl, 1, 2),
            call(libc::SYS_ioctl, 9, 2),
            call(libc::SYS_ioctl, 1, 3),
        ] {
            assert_eq!(tried(&violations, &what), Verdict::Allow);
        }
        assert_eq!(violations.take_events().len(), 3);
        assert_eq!(violations.counters.of(Role::Block).violations, 5);
        let summary = violations.summary();
        assert!(summary[0].contains("3 kinds"), "{summary:#?}");
        let openat = summary.iter().find(|line| line.contains("openat"));
        assert!(
            openat.is_some_and(|line| line.starts_with("  2 × block-proc")),
            "{summary:#?}"
        );
        assert_eq!(violations.how_ended(7), None);
    }

    #[test]
    fn a_flood_of_kinds_takes_bounded_memory() {
        let violations = violations(Mode::Log);
        for request in 0..MAX_KINDS as u64 + 5 {
            tried(&violations, &call(libc::SYS_ioctl, 0, request));
        }
        assert_eq!(violations.kinds.borrow().len(), MAX_KINDS);
        assert_eq!(violations.take_events().len(), MAX_KINDS);
        assert!(violations.summary().last().unwrap().contains("5 × other kinds"));
    }
}
