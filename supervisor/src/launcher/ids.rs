//! Which host uids and gids the launcher and the helpers of one VM run under.
//!
//! The launcher's user namespace maps [`IDS_PER_VM`] ids: 0 is the launcher, every live helper has one of the others. As
//! root they come from a range that no account and no container manager uses, at an offset by the supervisor's pid, or where
//! `-sandbox uid-base=` says; [`Reserved`] keeps two machines from having the same. An ordinary user needs a range in /etc/subuid and /etc/subgid and the setuid
//! program newuidmap; without, all processes run under the user's own id, and the start-up log says so.

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};
use nix::unistd::{Gid, Pid, Uid};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

/// Ids of one VM.
pub const IDS_PER_VM: u32 = 64;
/// First id used when started as root. Linux allows pids up to 2^22, so the ranges end below 2^31.
pub const ROOT_BASE: u32 = 0x7000_0000;

/// The launcher's id map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdPlan {
    /// `[base, base + IDS_PER_VM)`, written by the supervisor as root.
    Root {
        /// First host uid and gid.
        base: u32,
    },
    /// Subordinate ids, written by newuidmap and newgidmap.
    Subordinate {
        /// First host uid.
        uid_base: u32,
        /// First host gid.
        gid_base: u32,
    },
    /// Only the caller's own id.
    Single {
        /// That uid.
        uid: u32,
    },
}

/// Ids that no other machine in this network namespace uses: an abstract Unix socket is bound under their number as long as the
/// machine lives. It leaves no file, and who is killed lets go of it.
pub struct Reserved(IdPlan, Option<OwnedFd>);

/// How many ranges are tried: those of as many machines could be in the way.
const RANGES_TRIED: u32 = 4096;

impl Reserved {
    /// The range that was asked for, or the first that is free from one that this process's id gives.
    ///
    /// # Errors
    /// One line: the range cannot be had.
    pub fn choose(asked: Option<u32>) -> Result<Self, String> {
        if let Some(base) = asked {
            let refuse = |why: &str| format!("-sandbox uid-base={base}: {why}");
            if !Uid::effective().is_root() {
                return Err(refuse("only root can give a machine ids"));
            }
            let plan = IdPlan::Root { base };
            if !plan.is_mapped() {
                return Err(refuse("these ids do not exist in this container"));
            }
            let lock = plan.reserve().map_err(|errno| match errno {
                Errno::EADDRINUSE => refuse("another machine has ids of this range"),
                errno => refuse(errno.desc()),
            })?;
            return Ok(Self(plan, lock));
        }
        let pid = nix::unistd::getpid().as_raw().unsigned_abs();
        for step in 0..RANGES_TRIED {
            let plan = IdPlan::choose(pid.wrapping_add(step));
            match plan.reserve() {
                Ok(lock) => return Ok(Self(plan, lock)),
                Err(Errno::EADDRINUSE) => {}
                Err(errno) => return Err(format!("reserving user ids: {errno}")),
            }
        }
        Err("reserving user ids: all ranges are taken".into())
    }

    /// The plan, and what has to be kept open.
    pub fn into_parts(self) -> (IdPlan, Option<OwnedFd>) {
        (self.0, self.1)
    }
}

impl IdPlan {
    /// Whether this user namespace has all of them.
    fn is_mapped(self) -> bool {
        let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
        let base = self.host_uid(0);
        maps_range(&read("/proc/self/uid_map"), base) && maps_range(&read("/proc/self/gid_map"), base)
    }

    /// Takes the range for this machine. Every range begins at a multiple of
    /// [`IDS_PER_VM`] from where the ranges of its kind begin, so that two are the same or apart.
    fn reserve(self) -> Result<Option<OwnedFd>, Errno> {
        if !self.is_distinct() {
            return Ok(None);
        }
        reserve(self.host_uid(0)).map(Some)
    }

    /// Whether every helper has a host uid of its own.
    pub fn is_distinct(self) -> bool {
        !matches!(self, Self::Single { .. })
    }

    /// The host uid of the helper in this slot (slot 0: the launcher).
    pub fn host_uid(self, slot: u32) -> u32 {
        match self {
            Self::Root { base } => base + slot,
            Self::Subordinate { uid_base, .. } => uid_base + slot,
            Self::Single { uid } => uid,
        }
    }

    /// The best plan that this caller can have; `spread` tells machines of one user apart.
    pub fn choose(spread: u32) -> Self {
        let uid = Uid::current().as_raw();
        let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
        if Uid::effective().is_root() {
            let plan = Self::Root {
                base: ROOT_BASE + (spread % (1 << 22)) * IDS_PER_VM,
            };
            // Root of a container may not have these ids.
            return if plan.is_mapped() { plan } else { Self::Single { uid } };
        }
        // Not by getpwuid: in a static program that loads the host's name services into this process.
        let passwd = read("/etc/passwd");
        let user = user_name(&passwd, uid);
        let have_tools = ["newuidmap", "newgidmap"].iter().all(|tool| tool_path(tool).is_some());
        let range = |file: &str| subordinate_range(&read(file), user, uid, spread);
        match (have_tools, range("/etc/subuid"), range("/etc/subgid")) {
            (true, Some(uid_base), Some(gid_base)) => Self::Subordinate { uid_base, gid_base },
            _ => Self::Single { uid },
        }
    }

    /// Writes the maps of the launcher, which has just entered its user namespace.
    pub fn write_maps(self, launcher: Pid) -> Result<(), String> {
        let write = |file: &str, text: &str| {
            let path = format!("/proc/{launcher}/{file}");
            std::fs::write(&path, text).map_err(|error| format!("{path}: {error}"))
        };
        match self {
            Self::Root { base } => {
                write("uid_map", &format!("0 {base} {IDS_PER_VM}\n"))?;
                write("gid_map", &format!("0 {base} {IDS_PER_VM}\n"))
            }
            Self::Single { uid } => {
                write("setgroups", "deny")?;
                write("uid_map", &format!("0 {uid} 1\n"))?;
                write("gid_map", &format!("0 {} 1\n", Gid::current()))
            }
            Self::Subordinate { uid_base, gid_base } => {
                run_tool("newuidmap", launcher, uid_base)?;
                run_tool("newgidmap", launcher, gid_base)
            }
        }
    }
}

/// Binds the name of the range of this first id.
fn reserve(base: u32) -> Result<OwnedFd, Errno> {
    let name = format!("bulkhead-ids-{base}");
    let fd = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    bind(fd.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
    Ok(fd)
}

fn tool_path(tool: &str) -> Option<String> {
    ["/usr/bin", "/bin", "/usr/local/bin"]
        .iter()
        .map(|dir| format!("{dir}/{tool}"))
        .find(|path| Path::new(path).exists())
}

fn run_tool(tool: &str, launcher: Pid, base: u32) -> Result<(), String> {
    let path = tool_path(tool).ok_or_else(|| format!("{tool} is not installed"))?;
    let arguments = [
        launcher.to_string(),
        "0".into(),
        base.to_string(),
        IDS_PER_VM.to_string(),
    ];
    let output = Command::new(&path)
        .args(&arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{path}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "{path} {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}

/// Whether an id map (/proc/PID/uid_map: first inside, first outside, count) has all ids of one VM from `base`.
fn maps_range(map: &str, base: u32) -> bool {
    map.lines().any(|line| {
        let mut fields = line.split_whitespace().map(|field| field.parse::<u64>().ok());
        let (Some(Some(first)), Some(Some(_)), Some(Some(count))) = (fields.next(), fields.next(), fields.next())
        else {
            return false;
        };
        first <= u64::from(base) && u64::from(base) + u64::from(IDS_PER_VM) <= first + count
    })
}

/// The name of the account with this uid.
fn user_name(passwd: &str, uid: u32) -> Option<&str> {
    let uid = uid.to_string();
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then_some(name)
    })
}

/// The first id of a block of [`IDS_PER_VM`] in the caller's subordinate range: spread by pid, so that two VMs of one
/// user rarely share ids.
fn subordinate_range(text: &str, user: Option<&str>, uid: u32, pid: u32) -> Option<u32> {
    let uid = uid.to_string();
    text.lines().find_map(|line| {
        let mut fields = line.trim().split(':');
        let owner = fields.next()?;
        if Some(owner) != user && owner != uid {
            return None;
        }
        let first: u32 = fields.next()?.parse().ok()?;
        let count: u32 = fields.next()?.parse().ok()?;
        let blocks = count / IDS_PER_VM;
        (blocks > 0).then(|| first + (pid % blocks) * IDS_PER_VM)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_users_range_is_found_by_name_or_number() {
        let text = "other:1000:65536\n\nann:100000:65536\n1001:300000:128\n";
        assert_eq!(subordinate_range(text, Some("ann"), 1000, 0), Some(100_000));
        assert_eq!(
            subordinate_range(text, Some("ann"), 1000, 3),
            Some(100_000 + 3 * IDS_PER_VM)
        );
        assert_eq!(subordinate_range(text, None, 1001, 3), Some(300_064));
        assert_eq!(subordinate_range(text, Some("bob"), 1002, 3), None);
    }

    #[test]
    fn a_range_too_small_or_malformed_is_not_used() {
        assert_eq!(subordinate_range("ann:5:10", Some("ann"), 1, 1), None);
        assert_eq!(subordinate_range("ann:x:y\nann:5", Some("ann"), 1, 1), None);
    }

    #[test]
    fn a_containers_root_without_the_ids_is_noticed() {
        assert!(maps_range("         0          0 4294967295\n", ROOT_BASE));
        assert!(!maps_range("0 100000 65536\n", ROOT_BASE));
        assert!(!maps_range("", ROOT_BASE));
    }

    #[test]
    fn an_account_is_found_by_its_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n";
        assert_eq!(user_name(passwd, 1000), Some("ann"));
        assert_eq!(user_name(passwd, 5), None);
    }

    #[test]
    fn root_ranges_stay_below_the_sign_bit() {
        let last = ROOT_BASE + ((1 << 22) - 1) * IDS_PER_VM + IDS_PER_VM - 1;
        assert!(last < 1 << 31);
    }
}
