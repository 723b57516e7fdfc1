//! What /proc says about a process: the tests' independent look at what the supervisor claims.

use std::path::PathBuf;

/// Child processes of all threads.
pub fn children(pid: i32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .filter_map(Result::ok);
    let text = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    text.flat_map(|text| {
        text.split_whitespace()
            .filter_map(|pid| pid.parse().ok())
            .collect::<Vec<i32>>()
    })
    .collect()
}

/// The process's name.
pub fn name(pid: i32) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{pid}/comm"))
        .ok()
        .map(|name| name.trim_end().to_owned())
}

/// Whether the process exists (a zombie does not).
pub fn is_alive(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.contains(") Z ") && !stat.contains(") X "))
}

/// Its threads.
pub fn threads(pid: i32) -> Vec<i32> {
    std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

/// The status files of all threads.
pub fn statuses(pid: i32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .filter_map(Result::ok);
    tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok())
        .collect()
}

/// A field of a status file.
pub fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no field {name}")).trim()
}

/// Open descriptors: number and what the link says.
pub fn descriptors(pid: i32) -> Vec<(i32, String)> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .filter_map(Result::ok);
    let mut list: Vec<_> = entries
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            Some((number, std::fs::read_link(entry.path()).ok()?.display().to_string()))
        })
        .collect();
    list.sort();
    list
}

/// Names in the process's root directory.
pub fn root_entries(pid: i32) -> std::io::Result<Vec<PathBuf>> {
    std::fs::read_dir(format!("/proc/{pid}/root/"))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect()
}

/// The identity of a namespace (`user`, `mnt`, `pid`, `net`, `ipc`, `uts`).
pub fn namespace(pid: i32, kind: &str) -> String {
    std::fs::read_link(format!("/proc/{pid}/ns/{kind}"))
        .map(|link| link.display().to_string())
        .unwrap_or_default()
}

/// Proportional set size of all mappings but those of a name that contains `except`, and but those of at least so many bytes
/// (both are guest RAM), KiB.
pub fn pss_kib(pid: i32, except: &str, bytes: u64) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let mut counts = true;
    let mut sum = 0;
    for line in text.lines() {
        if let Some(size) = line.strip_prefix("Pss:") {
            let size: u64 = size
                .trim()
                .strip_suffix(" kB")
                .and_then(|size| size.parse().ok())
                .unwrap_or(0);
            sum += if counts { size } else { 0 };
        } else if let Some(mapped) = line.split_whitespace().next().and_then(range_bytes) {
            counts = !line.contains(except) && mapped < bytes;
        }
    }
    sum
}

/// The length of a mapping, from the word that begins its head: `START-END`.
fn range_bytes(word: &str) -> Option<u64> {
    let (start, end) = word.split_once('-')?;
    let number = |digits| u64::from_str_radix(digits, 16).ok();
    Some(number(end)? - number(start)?)
}
