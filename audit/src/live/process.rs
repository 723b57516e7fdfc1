//! What /proc says of one process.

use serde::Serialize;
use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

/// The namespaces that are looked at.
pub const NAMESPACES: [&str; 8] = ["user", "mnt", "pid", "ipc", "uts", "net", "cgroup", "time"];

/// One process. What this caller may not read is an error's text.
#[derive(Debug)]
pub struct Seen {
    /// Its id.
    pub pid: i32,
    /// The status file of every thread, by thread id.
    pub threads: BTreeMap<i32, String>,
    /// Its executable.
    pub program: Result<PathBuf, String>,
    /// The words that it was started with, its name first.
    pub words: Vec<String>,
    /// Its namespaces' identities.
    pub namespaces: BTreeMap<&'static str, Result<String, String>>,
    /// Its limits: soft and hard; `None` for unlimited.
    pub limits: Result<BTreeMap<String, [Option<u64>; 2]>, String>,
    /// Its mounts, and the names in its root directory.
    pub root: Result<(String, Vec<String>), String>,
    /// Who owns what is its own in /proc: root if it is not dumpable.
    pub owner: Result<u32, String>,
    /// Its mappings.
    pub mappings: Result<Vec<Mapping>, String>,
    /// Its descriptors.
    pub descriptors: Result<Vec<Descriptor>, String>,
    /// The id map of its user namespace.
    pub id_map: String,
    /// Names of the network devices that it sees.
    pub network_devices: Result<Vec<String>, String>,
}

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mapping {
    /// `rwxp`.
    pub rights: String,
    /// What is mapped.
    pub name: String,
}

/// One descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Descriptor {
    /// Its number.
    pub number: i32,
    /// What it is, except for sockets.
    pub kind: String,
    /// `ro`, `wo`, `rw` or `path`.
    pub rights: &'static str,
    /// What /proc calls it.
    pub link: String,
    /// What two descriptors of the same object have in common.
    pub object: String,
    /// Who may open it anew, where it has such bits.
    pub mode: Option<u32>,
}

fn text(path: &str) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))
}

/// A field of a status file.
pub fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

impl Seen {
    /// Looks at a process; `None` when there is none.
    pub fn read(pid: i32) -> Option<Self> {
        let path = |name: &str| format!("/proc/{pid}/{name}");
        let tasks = std::fs::read_dir(path("task")).ok()?;
        let threads: BTreeMap<i32, String> = tasks
            .filter_map(|task| {
                let task = task.ok()?;
                let id = task.file_name().to_str()?.parse().ok()?;
                Some((id, std::fs::read_to_string(task.path().join("status")).ok()?))
            })
            .collect();
        let main = threads.get(&pid)?;
        // What has ended and waits to be reaped is nobody any more.
        if field(main, "State").is_some_and(|state| state.starts_with(['Z', 'X'])) {
            return None;
        }
        let link = |name: &str| std::fs::read_link(path(name)).map_err(|error| format!("{}: {error}", path(name)));
        Some(Self {
            pid,
            program: link("exe"),
            words: words(pid),
            namespaces: NAMESPACES
                .into_iter()
                .map(|kind| {
                    (
                        kind,
                        link(&format!("ns/{kind}")).map(|found| found.display().to_string()),
                    )
                })
                .collect(),
            limits: text(&path("limits")).map(|text| limits(&text)),
            root: text(&path("mountinfo")).and_then(|mounts| Ok((mounts, names(&path("root/"))?))),
            owner: std::fs::metadata(path("environ"))
                .map(|of| of.uid())
                .map_err(|error| error.to_string()),
            mappings: text(&path("maps")).map(|text| mappings(&text)),
            descriptors: descriptors(pid),
            id_map: text(&path("uid_map")).unwrap_or_default(),
            network_devices: text(&path("net/dev")).map(|text| {
                let devices = text.lines().skip(2).filter_map(|line| line.split(':').next());
                devices.map(|name| name.trim().to_owned()).collect()
            }),
            threads,
        })
    }

    /// A field of the main thread's status.
    pub fn status(&self, name: &str) -> Option<&str> {
        field(self.threads.get(&self.pid)?, name)
    }
}

/// A process's command line; empty when it cannot be read.
pub(super) fn words(pid: i32) -> Vec<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = line.strip_suffix(&[0]).unwrap_or(&line);
    if line.is_empty() {
        return Vec::new();
    }
    let words = line.split(|byte| *byte == 0);
    words.map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

fn names(directory: &str) -> Result<Vec<String>, String> {
    let entries = std::fs::read_dir(directory).map_err(|error| format!("{directory}: {error}"))?;
    Ok(entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect())
}

/// Reads /proc/PID/limits, whose columns begin at fixed places.
fn limits(text: &str) -> BTreeMap<String, [Option<u64>; 2]> {
    text.lines()
        .skip(1)
        .filter_map(|line| {
            let name = line.get(..26)?.trim().strip_prefix("Max ")?.to_owned();
            let mut numbers = line.get(26..)?.split_whitespace().map(|number| number.parse().ok());
            Some((name, [numbers.next()?, numbers.next()?]))
        })
        .collect()
}

fn mappings(text: &str) -> Vec<Mapping> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let rights = fields.nth(1)?.to_owned();
            let name = fields.skip(3).collect::<Vec<_>>().join(" ");
            Some(Mapping { rights, name })
        })
        .collect()
}

/// More than any process may have; what is duplicated one by one ends there.
const MOST_DESCRIPTORS: i32 = 4096;

fn descriptors(pid: i32) -> Result<Vec<Descriptor>, String> {
    let directory = format!("/proc/{pid}/fd");
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) => {
            let found = super::duplicates::below(pid, MOST_DESCRIPTORS);
            return found.map_err(|_| format!("{directory}: {error}"));
        }
    };
    let mut list: Vec<Descriptor> = entries
        .flatten()
        .filter_map(|entry| read_descriptor(&pid.to_string(), entry.file_name().to_str()?.parse().ok()?))
        .collect();
    list.sort_by_key(|descriptor| descriptor.number);
    Ok(list)
}

/// One of this process.
pub(super) fn own_descriptor(number: i32) -> Option<Descriptor> {
    read_descriptor("self", number)
}

fn read_descriptor(process: &str, number: i32) -> Option<Descriptor> {
    let path = format!("/proc/{process}/fd/{number}");
    let link = std::fs::read_link(&path).ok()?.display().to_string();
    let info = std::fs::read_to_string(format!("/proc/{process}/fdinfo/{number}")).ok()?;
    let metadata = std::fs::metadata(&path).ok();
    let found = descriptor(number, link, &info, metadata.as_ref());
    let is_group = matches!(found.kind.as_str(), "file" | "directory") && in_control_groups(&path);
    Some(match is_group {
        true => Descriptor {
            kind: "cgroup".to_owned(),
            ..found
        },
        false => found,
    })
}

/// Whether this is a file or a directory of control groups, of either version.
fn in_control_groups(path: &str) -> bool {
    use nix::sys::statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, statfs};
    statfs(path).is_ok_and(|of| [CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC].contains(&of.filesystem_type()))
}

fn descriptor(number: i32, link: String, info: &str, metadata: Option<&std::fs::Metadata>) -> Descriptor {
    let flags = info
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    let rights = match flags {
        Some(flags) if flags & libc::O_PATH != 0 => "path",
        Some(flags) => match flags & libc::O_ACCMODE {
            libc::O_RDONLY => "ro",
            libc::O_WRONLY => "wo",
            _ => "rw",
        },
        None => "unknown",
    };
    let inode = metadata.map(|of| format!("{:x}:{}", of.dev(), of.ino()));
    let device = metadata.map(|of| format!("device {:x}", of.rdev()));
    let of_inode = |kind: &str| (kind.to_owned(), inode.clone().unwrap_or_else(|| link.clone()));
    let (kind, object) = if let Some(inner) = link.strip_prefix("anon_inode:") {
        let name = inner.trim_matches(['[', ']']);
        let id = info.lines().find_map(|line| line.strip_prefix("eventfd-id:"));
        match name {
            "eventfd" => ("eventfd".to_owned(), format!("eventfd {}", id.unwrap_or("?").trim())),
            "seccomp notify" => ("seccomp-listener".to_owned(), String::new()),
            name if name.starts_with("kvm-vcpu") => ("kvm-vcpu".to_owned(), name.to_owned()),
            name => (name.to_owned(), String::new()),
        }
    } else if link.starts_with("socket:") {
        ("socket".to_owned(), link.clone())
    } else if link.starts_with("pipe:") {
        ("pipe".to_owned(), link.clone())
    } else if link.starts_with("pidfd:") {
        ("pidfd".to_owned(), link.clone())
    } else if let Some(name) = link.strip_prefix("/memfd:") {
        of_inode(&format!("memfd:{}", name.trim_end_matches(" (deleted)")))
    } else {
        match metadata.map(std::fs::Metadata::file_type) {
            Some(of) if of.is_dir() => of_inode("directory"),
            Some(of) if of.is_fifo() => of_inode("pipe"),
            Some(of) if of.is_block_device() => ("block-device".to_owned(), device.unwrap_or_default()),
            Some(of) if of.is_char_device() => {
                let device = device.unwrap_or_default();
                let kind = match device.as_str() {
                    "device 103" => "null",
                    "device ae8" => "kvm",
                    _ => "character-device",
                };
                (kind.to_owned(), device)
            }
            Some(_) => of_inode("file"),
            None => ("unknown".to_owned(), link.clone()),
        }
    };
    Descriptor {
        number,
        kind,
        rights,
        link,
        object,
        mode: metadata.map(|of| of.mode() & 0o7777),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_by_column() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max file size             1073741824           unlimited            bytes     \n\
                    Max nice priority         0                    0                    \n";
        let limits = limits(text);
        assert_eq!(limits["file size"], [Some(1 << 30), None]);
        assert_eq!(limits["nice priority"], [Some(0), Some(0)]);
    }

    #[test]
    fn what_a_descriptor_is_comes_from_its_link_and_flags() {
        let of = |link: &str, flags: &str| {
            descriptor(
                3,
                link.into(),
                &format!("pos:\t0\nflags:\t{flags}\neventfd-id: 7\n"),
                None,
            )
        };
        assert_eq!(of("anon_inode:[eventfd]", "02004002").kind, "eventfd");
        assert_eq!(of("anon_inode:[eventfd]", "02004002").object, "eventfd 7");
        assert_eq!(of("anon_inode:kvm-vcpu:0", "02000002").kind, "kvm-vcpu");
        let ram = of("/memfd:bulkhead-ram (deleted)", "02100000");
        assert_eq!((ram.kind.as_str(), ram.rights), ("memfd:bulkhead-ram", "ro"));
        assert_eq!(of("/x", "012200000").rights, "path");
        assert_eq!(of("pipe:[5]", "01").rights, "wo");
    }
}
