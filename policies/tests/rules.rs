//! What holds for every policy, read from the data itself: a reviewer who changes a file is told which promise it breaks.

use serde_json::Value;
use std::collections::BTreeSet;

const HELPERS: [&str; 4] = ["vcpu-proc", "block-proc", "dump-proc", "qmp-proc"];

/// Most distinct system calls after sealing. The design's ceilings: raising one is a decision, not an edit.
const CEILINGS: [(&str, usize); 6] = [
    ("qmp-proc", 8),
    ("dump-proc", 12),
    ("block-proc", 24),
    ("vcpu-proc", 18),
    ("supervisor", 32),
    ("opener", 18),
];

/// Calls that no sealed helper may have: new files, programs, processes, connections, namespaces, kernel code, and power
/// over other processes or over its own walls.
const NEVER_IN_A_HELPER: [&str; 56] = [
    "open",
    "openat",
    "openat2",
    "creat",
    "open_by_handle_at",
    "name_to_handle_at",
    "memfd_create",
    "truncate",
    "rename",
    "renameat2",
    "link",
    "linkat",
    "symlink",
    "unlink",
    "unlinkat",
    "mkdir",
    "mknod",
    "chmod",
    "fchmod",
    "fchmodat",
    "chown",
    "fchown",
    "execve",
    "execveat",
    "fork",
    "vfork",
    "clone3",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "pidfd_getfd",
    "kcmp",
    "socket",
    "socketpair",
    "connect",
    "bind",
    "listen",
    "accept",
    "accept4",
    "mount",
    "umount2",
    "pivot_root",
    "chroot",
    "setns",
    "unshare",
    "io_uring_setup",
    "userfaultfd",
    "bpf",
    "perf_event_open",
    "keyctl",
    "add_key",
    "init_module",
    "finit_module",
    "seccomp",
    "capset",
    "setresuid",
];

/// Calls whose arguments decide what they are.
const NEED_ARGUMENTS: [&str; 10] = [
    "ioctl",
    "fcntl",
    "madvise",
    "prctl",
    "clone",
    "mmap",
    "mprotect",
    "futex",
    "setsockopt",
    "getsockopt",
];

struct Filter {
    process: &'static str,
    name: String,
    rules: Vec<Value>,
}

impl Filter {
    fn calls(&self) -> BTreeSet<&str> {
        self.rules.iter().map(call).collect()
    }

    fn rules_for<'a>(&'a self, wanted: &'a str) -> impl Iterator<Item = &'a Value> {
        self.rules.iter().filter(move |rule| call(rule) == wanted)
    }
}

fn call(rule: &Value) -> &str {
    rule["syscall"].as_str().expect("a rule names its system call")
}

fn filters(process: &'static str) -> Vec<Filter> {
    let path = format!("{}/{process}.json", env!("CARGO_MANIFEST_DIR"));
    let data: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    data.as_object()
        .unwrap()
        .iter()
        .map(|(name, filter)| Filter {
            process,
            name: name.clone(),
            rules: filter["filter"].as_array().unwrap().clone(),
        })
        .collect()
}

fn filter(process: &'static str, name: &str) -> Filter {
    filters(process)
        .into_iter()
        .find(|filter| filter.name == name)
        .unwrap_or_else(|| panic!("{process} has no filter {name}"))
}

fn all_filters() -> impl Iterator<Item = Filter> {
    HELPERS
        .into_iter()
        .chain(["supervisor", "opener", "launcher"])
        .flat_map(filters)
}

/// Of the helpers, the supervisor and the opener. The launcher's also holds what helpers inherit through it, KVM's ioctls among them.
fn sealed_filters() -> impl Iterator<Item = Filter> {
    HELPERS
        .into_iter()
        .chain(["supervisor", "opener"])
        .map(|process| filter(process, "sealed"))
}

#[test]
fn every_rule_has_a_reason() {
    for filter in all_filters() {
        for rule in &filter.rules {
            let reason = rule["comment"].as_str().unwrap_or_default();
            assert!(reason.trim().len() > 3, "{} {}: {rule}", filter.process, filter.name);
        }
    }
}

#[test]
fn no_rule_is_written_twice() {
    for filter in all_filters() {
        let mut seen = BTreeSet::new();
        for rule in &filter.rules {
            let key = format!("{} {}", rule["syscall"], rule["args"]);
            assert!(seen.insert(key), "{} {}: {rule}", filter.process, filter.name);
        }
        // A rule without arguments makes those with arguments beside it meaningless.
        for name in filter.calls() {
            let (open, filtered): (Vec<_>, Vec<_>) = filter
                .rules_for(name)
                .partition(|rule| rule["args"].as_array().is_none_or(Vec::is_empty));
            assert!(
                open.is_empty() || filtered.is_empty(),
                "{} {}: {name} is allowed with and without conditions",
                filter.process,
                filter.name
            );
        }
    }
}

#[test]
fn sealed_processes_keep_to_their_number_of_calls() {
    for (process, ceiling) in CEILINGS {
        let filter = filter(process, "sealed");
        let calls = filter.calls();
        assert!(
            calls.len() <= ceiling,
            "{process}: {} of {ceiling}: {calls:?}",
            calls.len()
        );
    }
}

#[test]
fn sealed_helpers_get_nothing_new() {
    for process in HELPERS {
        for name in NEVER_IN_A_HELPER {
            assert!(!filter(process, "sealed").calls().contains(name), "{process}: {name}");
        }
    }
    for name in [
        "execve",
        "execveat",
        "ptrace",
        "process_vm_writev",
        "bpf",
        "mount",
        "setns",
        "unshare",
    ] {
        for process in ["supervisor", "opener"] {
            assert!(!filter(process, "sealed").calls().contains(name), "{process}: {name}");
        }
    }
}

#[test]
fn who_makes_sockets_opens_no_files_and_who_opens_files_makes_no_sockets() {
    let (supervisor, opener) = (filter("supervisor", "sealed"), filter("opener", "sealed"));
    for name in ["socket", "bind", "listen", "connect"] {
        assert!(opener.calls().contains(name), "{name}");
        assert!(!supervisor.calls().contains(name), "{name}");
    }
    for name in [
        "open",
        "openat",
        "openat2",
        "read",
        "write",
        "recvfrom",
        "accept4",
        "socketpair",
        "unlink",
    ] {
        assert!(!opener.calls().contains(name), "{name}");
    }
    // Streams and datagrams over Unix and IP, and neither raw nor netlink sockets.
    for rule in opener.rules_for("socket") {
        let argument = |index: usize| rule["args"][index]["val"].as_u64().unwrap();
        let flags = (libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u64;
        assert!([1, 2, 10].contains(&argument(0)), "{rule}");
        assert!([1, 2].contains(&(argument(1) ^ flags)), "{rule}");
    }
}

#[test]
fn calls_that_are_many_calls_are_filtered_by_argument() {
    for filter in sealed_filters() {
        for name in NEED_ARGUMENTS {
            for rule in filter.rules_for(name) {
                let arguments = rule["args"].as_array().map_or(0, Vec::len);
                assert!(arguments > 0, "{}: {rule}", filter.process);
            }
        }
    }
}

#[test]
fn no_helper_makes_memory_executable() {
    let prot_exec = libc::PROT_EXEC as u64;
    let helpers = HELPERS
        .into_iter()
        .flat_map(|process| ["startup", "sealed"].map(|name| filter(process, name)));
    for filter in helpers.chain(["supervisor", "opener"].map(|process| filter(process, "sealed"))) {
        for rule in filter.rules_for("mmap").chain(filter.rules_for("mprotect")) {
            let excludes = |argument: &Value| {
                let value = argument["val"].as_u64().unwrap();
                argument["index"] == 2
                    && match &argument["op"] {
                        Value::String(op) => op == "eq" && value & prot_exec == 0,
                        op => op["masked_eq"].as_u64().unwrap() & prot_exec != 0 && value & prot_exec == 0,
                    }
            };
            let arguments = rule["args"].as_array().map_or(&[][..], Vec::as_slice);
            assert!(
                arguments.iter().any(excludes),
                "{} {}: {rule}",
                filter.process,
                filter.name
            );
        }
        for name in ["pkey_mprotect", "remap_file_pages", "shmat", "personality"] {
            assert!(!filter.calls().contains(name), "{}: {name}", filter.process);
        }
    }
}

#[test]
fn interrupted_calls_go_on_everywhere() {
    for filter in all_filters().filter(|filter| filter.name != "forbidden") {
        let calls = filter.calls();
        assert!(calls.contains("restart_syscall"), "{} {}", filter.process, filter.name);
    }
}

#[test]
fn what_a_helper_needs_passes_the_filters_that_it_inherits() {
    let launcher = filter("launcher", "sealed");
    for process in HELPERS {
        let startup = filter(process, "startup");
        let sealed = filter(process, "sealed");
        let missing: Vec<_> = startup.calls().difference(&launcher.calls()).copied().collect();
        assert!(missing.is_empty(), "{process}: the launcher's filter lacks {missing:?}");
        let missing: Vec<_> = sealed.calls().difference(&startup.calls()).copied().collect();
        assert!(missing.is_empty(), "{process}: its startup filter lacks {missing:?}");
    }
}

#[test]
fn forbidden_calls_are_the_same_for_every_helper_and_never_sealed_ones() {
    let forbidden = filter(HELPERS[0], "forbidden");
    for process in HELPERS {
        assert_eq!(filter(process, "forbidden").calls(), forbidden.calls(), "{process}");
        let sealed = filter(process, "sealed");
        let both: Vec<_> = sealed.calls().intersection(&forbidden.calls()).copied().collect();
        assert!(both.is_empty(), "{process}: {both:?}");
    }
    assert!(forbidden.calls().contains("execve"));
}
