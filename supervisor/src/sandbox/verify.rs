//! Verifying a seal: the kernel's word, from /proc, that every thread of a helper is as small as it says.
//!
//! Only after this come disks, clients, kernels and dump files. A helper that lied about its seal has never held any.

use std::path::Path;

/// What must be true of every thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Host uid: real, effective, saved and file system.
    pub uid: u32,
    /// Number of seccomp filters.
    pub filters: u32,
}

/// Checks all threads of a process; returns how many there are.
///
/// # Errors
/// One line that names the thread and what is wrong with it.
pub fn verify(pid: i32, expected: Expected) -> Result<usize, String> {
    let directory = format!("/proc/{pid}/task");
    let threads = std::fs::read_dir(&directory).map_err(|error| format!("{directory}: {error}"))?;
    let mut count = 0;
    for thread in threads {
        let path = thread
            .map_err(|error| format!("{directory}: {error}"))?
            .path()
            .join("status");
        check_file(&path, expected)?;
        count += 1;
    }
    if count == 0 {
        return Err(format!("{directory} is empty"));
    }
    Ok(count)
}

fn check_file(path: &Path, expected: Expected) -> Result<(), String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    check(&text, expected).map_err(|wrong| format!("{}: {wrong}", path.display()))
}

/// Checks the text of one /proc/PID/task/TID/status.
fn check(status: &str, expected: Expected) -> Result<(), String> {
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
            .ok_or_else(|| format!("no field {name}: the kernel is too old to verify the sandbox (Linux 5.10 can)"))
    };
    let must_be = |name: &str, wanted: &str| {
        let found = field(name)?;
        if found == wanted {
            Ok(())
        } else {
            Err(format!("{name} is {found}, must be {wanted}"))
        }
    };
    must_be("NoNewPrivs", "1")?;
    must_be("Seccomp", "2")?;
    must_be("Seccomp_filters", &expected.filters.to_string())?;
    for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        must_be(name, "0000000000000000")?;
    }
    let uids = field("Uid")?;
    if uids.split_whitespace().any(|uid| uid != expected.uid.to_string()) {
        return Err(format!("Uid is {uids}, must be {}", expected.uid));
    }
    Ok(())
}

/// The host's thread id of a thread that its own PID namespace numbers `inner`.
pub fn host_thread_id(pid: i32, inner: i32) -> Option<i32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    threads.filter_map(Result::ok).find_map(|thread| {
        let text = std::fs::read_to_string(thread.path().join("status")).ok()?;
        let ids = text.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        let innermost: i32 = ids.split_whitespace().last()?.parse().ok()?;
        if innermost == inner {
            thread.file_name().to_str()?.parse().ok()
        } else {
            None
        }
    })
}

/// The host's thread ids of the threads that a helper has given this name, which it cannot do any more once it is sealed.
pub fn threads_named(pid: i32, name: &str) -> Vec<i32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let is_named = |thread: &std::fs::DirEntry| {
        std::fs::read_to_string(thread.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name)
    };
    let mut ids: Vec<i32> = threads
        .filter_map(Result::ok)
        .filter(is_named)
        .filter_map(|thread| thread.file_name().to_str()?.parse().ok())
        .collect();
    ids.sort_unstable();
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPECTED: Expected = Expected {
        uid: 70_001,
        filters: 4,
    };
    const GOOD: &str = "Name:\tqmp-proc\nUid:\t70001\t70001\t70001\t70001\nCapInh:\t0000000000000000\n\
        CapPrm:\t0000000000000000\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nCapAmb:\t0000000000000000\n\
        NoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t4\n";

    #[test]
    fn a_sealed_thread_passes() {
        assert_eq!(check(GOOD, EXPECTED), Ok(()));
    }

    #[test]
    fn every_missing_wall_is_named() {
        for (good, bad, named) in [
            ("NoNewPrivs:\t1", "NoNewPrivs:\t0", "NoNewPrivs"),
            ("Seccomp:\t2", "Seccomp:\t0", "Seccomp"),
            ("filters:\t4", "filters:\t3", "Seccomp_filters"),
            ("CapEff:\t0000000000000000", "CapEff:\t0000000000000080", "CapEff"),
            ("CapBnd:\t0000000000000000", "CapBnd:\t000001ffffffffff", "CapBnd"),
            ("Uid:\t70001\t", "Uid:\t0\t", "Uid"),
            ("CapAmb:\t0000000000000000\n", "", "CapAmb"),
        ] {
            let error = check(&GOOD.replace(good, bad), EXPECTED).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
