//! What `audit policy` warns of, and that our own policies have no such thing but what is listed here with its reason.

use audit::policy::weakness::{Pattern, find};
use audit::policy::{Policy, Process, Source, difference};

/// A helper's policy with these rules in its sealed filter.
fn sealed_with(rules: &str) -> Policy {
    let text = format!(
        r#"{{"sealed": {{"mismatch_action": "trap", "match_action": "allow", "filter": [
            {{"syscall": "exit_group", "comment": "the end"}}, {rules}]}}}}"#
    );
    Policy::parse("made-up", &text).unwrap()
}

#[test]
fn every_pattern_that_weakens_a_filter_is_told() {
    for (rules, pattern) in [
        (r#"{"syscall": "ioctl", "comment": "why"}"#, Pattern::Unfiltered),
        (
            r#"{"syscall": "fcntl", "comment": "why", "args": [{"index": 0, "type": "dword", "op": "eq", "val": 3}]}"#,
            Pattern::Unfiltered,
        ),
        (r#"{"syscall": "prctl", "comment": "why"}"#, Pattern::Unfiltered),
        (r#"{"syscall": "clone", "comment": "why"}"#, Pattern::Unfiltered),
        (
            r#"{"syscall": "mmap", "comment": "why", "args": [{"index": 2, "type": "dword", "op": "eq", "val": 5}]}"#,
            Pattern::Executable,
        ),
        (
            r#"{"syscall": "mprotect", "comment": "why", "args": [{"index": 2, "type": "dword", "op": {"masked_eq": 2}, "val": 0}]}"#,
            Pattern::Executable,
        ),
        (
            r#"{"syscall": "mprotect", "comment": "why", "args": [{"index": 2, "type": "dword", "op": "le", "val": 4}]}"#,
            Pattern::Executable,
        ),
        (
            r#"{"syscall": "io_uring_setup", "comment": "why"}"#,
            Pattern::RingAfterSealing,
        ),
        (r#"{"syscall": "ptrace", "comment": "why"}"#, Pattern::PowerAfterSealing),
        (
            r#"{"syscall": "write", "comment": "why", "args": [{"index": 2, "type": "dword", "op": "le", "val": 8}]}"#,
            Pattern::HalfCompared,
        ),
        (r#"{"syscall": "getpid"}"#, Pattern::NoReason),
    ] {
        let found = find(&sealed_with(rules)).unwrap();
        assert!(
            found.iter().any(|warning| warning.pattern == pattern),
            "{rules}: {found:?}"
        );
    }
    let harmless = r#"{"syscall": "mprotect", "comment": "why", "args": [{"index": 2, "type": "dword", "op": {"masked_eq": 4}, "val": 0}]}"#;
    assert_eq!(find(&sealed_with(harmless)).unwrap(), []);
}

#[test]
fn a_list_of_forbidden_calls_alone_lets_x32_pass_and_is_told() {
    let text = r#"{"sealed": {"mismatch_action": "allow", "match_action": "kill_process",
        "filter": [{"syscall": "execve", "comment": "never"}]}}"#;
    let found = find(&Policy::parse("made-up", text).unwrap()).unwrap();
    let patterns: Vec<_> = found.iter().map(|warning| warning.pattern).collect();
    assert_eq!(patterns, [Pattern::X32]);
}

/// (process, how the warning begins, why it stays)
const KNOWN: &[(&str, &str, &str)] = &[
    (
        "block-proc",
        "startup: io_uring_register with any",
        "before the seal: probing, files, restrictions, enabling",
    ),
    (
        "launcher",
        "sealed: clone3 after",
        "it starts helpers; the flags are behind a pointer",
    ),
    ("launcher", "sealed: mount after", "a child's empty root"),
    ("launcher", "sealed: pivot_root after", "a child's empty root"),
    ("launcher", "sealed: umount2 after", "a child's empty root"),
    ("launcher", "sealed: prlimit64 with any", "a child's limits"),
    (
        "launcher",
        "sealed: prctl with any",
        "a child's attributes, a dozen of them",
    ),
    ("launcher", "sealed: capset after", "a child drops its capabilities"),
    ("launcher", "sealed: seccomp after", "a child's filters"),
    ("launcher", "sealed: execveat after", "a child's program"),
    (
        "launcher",
        "sealed: io_uring_register with any",
        "inherited by block-proc, before its seal",
    ),
    (
        "launcher",
        "sealed: io_uring_setup after",
        "inherited by block-proc, before its seal",
    ),
];

#[test]
fn our_own_policies_have_no_weakness_but_the_known_ones() {
    let mut known: Vec<_> = KNOWN.iter().collect();
    for process in Process::ALL {
        for warning in find(&Source::Embedded.read(process).unwrap()).unwrap() {
            let text = warning.to_string();
            let at = known
                .iter()
                .position(|(of, begin, _)| *of == process.name() && text.starts_with(begin));
            known.remove(at.unwrap_or_else(|| panic!("{}: {text}", process.name())));
        }
    }
    assert!(known.is_empty(), "no longer there: {known:?}");
}

#[test]
fn a_difference_between_two_versions_names_rules_reasons_and_actions() {
    let old = sealed_with(
        r#"{"syscall": "lseek", "comment": "holes", "args": [{"index": 2, "type": "dword", "op": "eq", "val": 3}]}"#,
    );
    let new = sealed_with(
        r#"{"syscall": "lseek", "comment": "data", "args": [{"index": 2, "type": "dword", "op": "eq", "val": 3}]},
           {"syscall": "getpid", "comment": "who"}"#,
    );
    assert_eq!(difference::between(&old, &old), []);
    let found: Vec<String> = difference::between(&old, &new)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(
        found[0].starts_with("~ sealed    lseek") && found[0].ends_with("holes → data"),
        "{found:?}"
    );
    assert!(found[1].starts_with("+ sealed    getpid"), "{found:?}");
    let back: Vec<String> = difference::between(&new, &old)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert!(
        back.iter().any(|line| line.starts_with("- sealed    getpid")),
        "{back:?}"
    );
}
