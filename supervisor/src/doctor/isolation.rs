//! The walls: namespaces, ids, seccomp, Landlock, cgroups.

use super::probe::{in_child, read};
use super::{Check, Weight};
use crate::launcher::ids::{IDS_PER_VM, IdPlan, ROOT_BASE};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{AccessFlags, Gid, Uid, access};
use std::ffi::CStr;
use std::path::{Path, PathBuf};

/// The Landlock ABI whose access rights the policies name.
const LANDLOCK_ABI: i64 = 6;

pub(super) fn checks() -> Vec<Check> {
    vec![
        namespaces(),
        ids(),
        seccomp_actions(&read("/proc/sys/kernel/seccomp/actions_avail")),
        seccomp_listener(),
        landlock(landlock_abi()),
        cgroup(),
    ]
}

/// Does what the launcher does: a user and a network namespace, and in it, mapped, those of a helper.
fn namespaces() -> Check {
    const NAME: &str = "user namespaces";
    const STEPS: [&str; 4] = [
        "a user and a network namespace",
        "an id map",
        "the namespaces of a helper",
        "changing mounts",
    ];
    let uid_map = format!("0 {} 1", Uid::effective());
    let gid_map = format!("0 {} 1", Gid::effective());
    let result = in_child(&STEPS, || {
        let at = |step: usize| move |errno| (STEPS[step], errno);
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).map_err(at(0))?;
        write_file(c"/proc/self/setgroups", b"deny").map_err(at(1))?;
        write_file(c"/proc/self/uid_map", uid_map.as_bytes()).map_err(at(1))?;
        write_file(c"/proc/self/gid_map", gid_map.as_bytes()).map_err(at(1))?;
        let inner = CloneFlags::CLONE_NEWUSER
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS;
        unshare(inner).map_err(at(2))?;
        let none = None::<&CStr>;
        mount(none, c"/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(at(3))
    });
    match result {
        Ok(()) => Check::ok(NAME, "nested, with network, mount, pid, ipc and uts namespaces"),
        Err((step, errno)) => Check::missing(
            NAME,
            format!("{step}: {}", errno.desc()),
            Weight::Fatal,
            "no helper can be started; see sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone and \
             kernel.apparmor_restrict_unprivileged_userns, or start as root",
        ),
    }
}

/// Allocates nothing.
fn write_file(path: &CStr, content: &[u8]) -> nix::Result<()> {
    use nix::fcntl::{OFlag, open};
    let fd = open(path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())?;
    nix::unistd::write(&fd, content).map(drop)
}

fn ids() -> Check {
    const NAME: &str = "ids";
    match IdPlan::choose(std::process::id()) {
        IdPlan::Root { .. } if maps_whole_range(&read("/proc/self/uid_map"), ROOT_BASE, (1 << 22) * IDS_PER_VM) => {
            Check::ok(
                NAME,
                format!("root: {IDS_PER_VM} host ids for each VM, from {ROOT_BASE}"),
            )
        }
        IdPlan::Root { .. } => Check::missing(
            NAME,
            format!("root of a container in which the ids from {ROOT_BASE} do not exist"),
            Weight::Fatal,
            "helpers cannot get ids of their own; start as an ordinary user, or outside of the container's user namespace",
        ),
        IdPlan::Subordinate { uid_base, .. } => Check::ok(
            NAME,
            format!("subordinate ids by newuidmap, for this VM from {uid_base}"),
        ),
        IdPlan::Single { .. } => Check::limited(
            NAME,
            "no subordinate ids for this user",
            Weight::Wall,
            "all helpers run under your own uid, so that only the other walls keep them apart; install newuidmap (package \
             uidmap) and give this user a range in /etc/subuid and /etc/subgid",
        ),
    }
}

/// Whether a user namespace with this uid_map has all of `[first, first + count)`. Its second field does not matter.
fn maps_whole_range(uid_map: &str, first: u32, count: u32) -> bool {
    uid_map.lines().any(|line| {
        let mut fields = line.split_whitespace().filter_map(|field| field.parse::<u64>().ok());
        match (fields.next(), fields.next(), fields.next()) {
            (Some(inside), Some(_), Some(length)) => {
                inside <= first.into() && inside + length >= u64::from(first) + u64::from(count)
            }
            _ => false,
        }
    })
}

/// Judges the text of /proc/sys/kernel/seccomp/actions_avail.
fn seccomp_actions(available: &str) -> Check {
    const NAME: &str = "seccomp";
    let absent: Vec<&str> = ["user_notif", "kill_process", "allow"]
        .into_iter()
        .filter(|wanted| !available.split_whitespace().any(|action| action == *wanted))
        .collect();
    if absent.is_empty() {
        return Check::ok(NAME, "actions user_notif, kill_process, allow");
    }
    Check::missing(
        NAME,
        format!("no action {}", absent.join(", ")),
        Weight::Fatal,
        "helpers cannot be sealed; the kernel needs CONFIG_SECCOMP_FILTER and Linux 5.0 or newer",
    )
}

/// A process may have one listener among all its filters, also those that a container manager gave it.
fn seccomp_listener() -> Check {
    const NAME: &str = "seccomp listener";
    let result = in_child(&["no_new_privs", "loading a filter"], || {
        nix::sys::prctl::set_no_new_privs().map_err(|errno| ("no_new_privs", errno))?;
        let allow_all = [libc::sock_filter {
            code: (libc::BPF_RET | libc::BPF_K) as u16,
            jt: 0,
            jf: 0,
            k: libc::SECCOMP_RET_ALLOW,
        }];
        let program = libc::sock_fprog {
            len: 1,
            filter: allow_all.as_ptr().cast_mut(),
        };
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER
            | libc::SECCOMP_FILTER_FLAG_TSYNC
            | libc::SECCOMP_FILTER_FLAG_TSYNC_ESRCH;
        // SAFETY: the program is valid for the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                flags,
                &raw const program,
            )
        };
        Errno::result(result)
            .map(drop)
            .map_err(|errno| ("loading a filter", errno))
    });
    match result {
        Ok(()) => Check::ok(NAME, "a filter can report to the supervisor"),
        Err((step, errno)) => Check::missing(
            NAME,
            format!("{step}: {}", errno.desc()),
            Weight::Fatal,
            match errno {
                Errno::EBUSY => {
                    "helpers cannot be sealed: the container manager's own filter has the one listener there can be"
                }
                _ => "helpers cannot be sealed; Linux 5.7 or newer can",
            },
        ),
    }
}

/// The kernel's Landlock ABI version, or why there is none.
fn landlock_abi() -> Result<i64, Errno> {
    const VERSION: libc::c_ulong = 1;
    // SAFETY: with this flag and no ruleset the call only returns a number.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0,
            VERSION,
        )
    })
}

fn landlock(abi: Result<i64, Errno>) -> Check {
    const NAME: &str = "Landlock";
    match abi {
        Ok(abi) if abi >= LANDLOCK_ABI => Check::ok(NAME, format!("ABI {abi}")),
        Ok(abi) => {
            let gaps = [
                (3, "truncating files"),
                (4, "TCP"),
                (5, "device ioctls"),
                (6, "signals and abstract sockets"),
            ];
            let gaps: Vec<&str> = gaps.iter().filter(|(since, _)| abi < *since).map(|gap| gap.1).collect();
            Check::limited(
                NAME,
                format!("ABI {abi}, the policies are written for {LANDLOCK_ABI}"),
                Weight::Comfort,
                format!("it does not restrict {}; other walls do", gaps.join(", ")),
            )
        }
        Err(errno) => Check::missing(
            NAME,
            match errno {
                Errno::EOPNOTSUPP => "switched off (lsm= on the kernel's command line)",
                _ => "not in this kernel",
            },
            Weight::Wall,
            "one wall less: the supervisor's access to files is limited by its user's rights alone, the helpers' by \
             their empty root and seccomp",
        ),
    }
}

fn cgroup() -> Check {
    const NAME: &str = "cgroups";
    const COST: &str =
        "the memory and CPU time of a VM's processes cannot be limited together, only each one's by rlimits";
    let groups = own_groups(&read("/proc/self/cgroup"), &read("/proc/mounts"));
    let writable = |path: &PathBuf| access(path, AccessFlags::W_OK).is_ok();
    match (&groups.v2, groups.v1.as_slice()) {
        (Some(path), _) if has_controllers(path) && writable(path) => {
            Check::ok(NAME, format!("v2, may be written: {}", path.display()))
        }
        (Some(path), _) if has_controllers(path) => Check::limited(
            NAME,
            format!("v2, but {} may not be written", path.display()),
            Weight::Comfort,
            format!("{COST}; have one delegated (systemd: Delegate=yes, or systemd-run --user --scope)"),
        ),
        (_, [first, ..]) => Check::limited(
            NAME,
            format!(
                "v1 ({}{})",
                first.display(),
                if writable(first) {
                    ", may be written"
                } else {
                    ", may not be written"
                }
            ),
            Weight::Comfort,
            COST,
        ),
        _ => Check::missing(NAME, "none mounted", Weight::Comfort, COST),
    }
}

/// A v2 tree beside v1 (hybrid) has no memory controller.
fn has_controllers(path: &Path) -> bool {
    let controllers = read(&path.join("cgroup.controllers").to_string_lossy());
    controllers.split_whitespace().any(|name| name == "memory")
}

/// Directories of the cgroups that a process is in.
#[derive(Debug, Default, PartialEq, Eq)]
struct Groups {
    v2: Option<PathBuf>,
    /// Those with the memory controller.
    v1: Vec<PathBuf>,
}

/// Reads the texts of /proc/self/cgroup and /proc/mounts.
fn own_groups(cgroup: &str, mounts: &str) -> Groups {
    let mount_point = |kind: &str, controller: Option<&str>| {
        mounts.lines().find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (point, found_kind, options) = (fields.next()?, fields.next()?, fields.next()?);
            let fits =
                found_kind == kind && controller.is_none_or(|wanted| options.split(',').any(|option| option == wanted));
            fits.then_some(point)
        })
    };
    let join = |point: &str, path: &str| Path::new(point).join(path.trim_start_matches('/'));
    let mut groups = Groups::default();
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        if controllers.is_empty() {
            groups.v2 = mount_point("cgroup2", None).map(|point| join(point, path));
        } else if controllers.split(',').any(|name| name == "memory") {
            groups
                .v1
                .extend(mount_point("cgroup", Some("memory")).map(|point| join(point, path)));
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn the_own_cgroup_is_found_in_every_hierarchy() {
        let unified = own_groups(
            "0::/user.slice/x.scope\n",
            "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n",
        );
        assert_eq!(unified.v2, Some("/sys/fs/cgroup/user.slice/x.scope".into()));
        assert!(unified.v1.is_empty());
        let hybrid = own_groups(
            "8:pids:/\n4:memory:/a\n0::/\n",
            "cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n\
             cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n",
        );
        assert_eq!(hybrid.v2, Some("/sys/fs/cgroup/unified/".into()));
        assert_eq!(hybrid.v1, [PathBuf::from("/sys/fs/cgroup/memory/a")]);
        assert_eq!(own_groups("", ""), Groups::default());
    }

    #[test]
    fn a_missing_seccomp_action_is_named() {
        let all = "kill_process kill_thread trap errno user_notif trace log allow\n";
        assert_eq!(seccomp_actions(all).state, State::Ok);
        let check = seccomp_actions("kill_process allow");
        assert_eq!(check.found, "no action user_notif");
        assert!(check.has_weight(Weight::Fatal));
    }

    #[test]
    fn landlock_gaps_depend_on_its_abi() {
        assert_eq!(landlock(Ok(6)).state, State::Ok);
        let old = landlock(Ok(4)).to_string();
        assert!(old.contains("device ioctls") && !old.contains("TCP"), "{old}");
        assert!(landlock(Err(Errno::EOPNOTSUPP)).has_weight(Weight::Wall));
    }

    #[test]
    fn a_containers_id_map_may_lack_our_range() {
        let (first, count) = (ROOT_BASE, (1 << 22) * IDS_PER_VM);
        assert!(maps_whole_range("         0          0 4294967295\n", first, count));
        assert!(!maps_whole_range("0 100000 65536\n", first, count));
        assert!(!maps_whole_range("", first, count));
    }
}
