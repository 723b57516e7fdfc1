//! Control groups: one directory for the machine, in it one for each role, made before anything is sealed.
//!
//! ```text
//! PARENT/NAME-PID/{supervisor,vcpu-proc,block-proc,dump-proc,qmp-proc}
//! ```
//!
//! The launcher and the opener are in the supervisor's. With version 1 the same directories are in the hierarchy of every
//! controller. The launcher puts a new helper into its group before the helper does anything, through descriptors that were
//! opened here: the kernel asks for the rights of who opened them.

use super::metrics::{Meter, Source};
use ipc::Role;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::Pid;
use std::io::{Error, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// A group of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// The supervisor, the launcher and the opener.
    Supervisor,
    /// All helpers of a role.
    Helper(Role),
}

impl Group {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Supervisor,
        Self::Helper(Role::Vcpu),
        Self::Helper(Role::Block),
        Self::Helper(Role::Dump),
        Self::Helper(Role::Qmp),
    ];

    /// Its directory's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Supervisor => "supervisor",
            Self::Helper(role) => role.name(),
        }
    }

    /// What the command line calls it.
    pub fn short_name(self) -> &'static str {
        self.name().strip_suffix("-proc").unwrap_or(self.name())
    }
}

/// What is limited, by the name of the file of version 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Knob {
    /// `cpu.max`: microseconds of time in a period.
    CpuMax,
    /// `cpu.weight`.
    CpuWeight,
    /// `memory.max`.
    MemoryMax,
    /// `memory.high`.
    MemoryHigh,
    /// `pids.max`.
    PidsMax,
    /// `io.max`.
    IoMax,
    /// `io.weight`.
    IoWeight,
}

impl Knob {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::CpuMax,
        Self::CpuWeight,
        Self::MemoryMax,
        Self::MemoryHigh,
        Self::PidsMax,
        Self::IoMax,
        Self::IoWeight,
    ];

    /// Its file with version 2, which is its name here.
    pub fn name(self) -> &'static str {
        match self {
            Self::CpuMax => "cpu.max",
            Self::CpuWeight => "cpu.weight",
            Self::MemoryMax => "memory.max",
            Self::MemoryHigh => "memory.high",
            Self::PidsMax => "pids.max",
            Self::IoMax => "io.max",
            Self::IoWeight => "io.weight",
        }
    }
}

/// One limit: the text is what is written, with `/` for a blank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// Of which group; of each without.
    pub group: Option<Group>,
    /// What.
    pub knob: Knob,
    /// How much.
    pub value: String,
}

/// Where machines' groups are by default.
pub const DEFAULT_PARENT: &str = "bulkhead";

/// `-cgroup`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupConfig {
    /// Below the root of the hierarchies; `None`: the group that the supervisor was started in.
    pub parent: Option<PathBuf>,
    /// What is limited.
    pub limits: Vec<Limit>,
}

/// Groups cannot be made as the command line says: one line that names the thing.
#[derive(Debug, thiserror::Error)]
#[error("-cgroup: {path}: {error}")]
pub struct CgroupError {
    path: PathBuf,
    error: Error,
}

fn at(path: &Path) -> impl Fn(Error) -> CgroupError {
    move |error| CgroupError {
        path: path.into(),
        error,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// A mounted hierarchy, and where a process is in it.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    version: Version,
    mount: PathBuf,
    own: PathBuf,
    controllers: Vec<String>,
}

/// Controllers that are used.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuacct", "memory", "pids", "io", "blkio"];

/// The hierarchies to be used: that of version 2 if it has a controller, otherwise those of version 1.
fn hierarchies(mounts: &str, own: &str, controllers_of: impl Fn(&Path) -> String) -> Vec<Hierarchy> {
    let own_path = |names: &[&str]| {
        let mut lines = own.lines().filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            Some((fields.next()?, fields.next()?))
        });
        let found = lines.find(|(controllers, _)| controllers.split(',').any(|one| names.contains(&one)));
        PathBuf::from(found.map_or("/", |(_, path)| path))
    };
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mounts.lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let (Some(mount), Some(kind)) = (before.split(' ').nth(4), after.split(' ').next()) else {
            continue;
        };
        let options = after.split(' ').nth(2).unwrap_or("");
        let (version, listed) = match kind {
            "cgroup" => (Version::One, options.replace(',', " ")),
            "cgroup2" => (Version::Two, controllers_of(Path::new(mount))),
            _ => continue,
        };
        let used = |name: &&str| CONTROLLERS.contains(name);
        let controllers: Vec<&str> = listed.split_whitespace().filter(used).collect();
        if controllers.is_empty() || found.iter().any(|other| other.mount == Path::new(mount)) {
            continue;
        }
        found.push(Hierarchy {
            version,
            mount: mount.into(),
            own: match version {
                Version::One => own_path(&controllers),
                Version::Two => own_path(&[""]),
            },
            controllers: controllers.into_iter().map(str::to_owned).collect(),
        });
    }
    match found.iter().position(|one| one.version == Version::Two) {
        Some(second) => vec![found.swap_remove(second)],
        None => found,
    }
}

/// A directory that the warden removes at the end.
#[derive(Debug)]
pub struct Made {
    /// In which directory.
    pub parent: OwnedFd,
    /// Its name there.
    pub name: String,
}

/// `cgroup.procs` of the groups of each role, open for writing.
pub type Entries = Vec<(Role, OwnedFd)>;

/// The groups of a machine.
#[derive(Debug, Default)]
pub struct Cgroups {
    /// What was made, in the order in which it can be removed.
    pub made: Vec<Made>,
    /// What the metrics read.
    pub meters: Vec<Meter>,
    /// Where the launcher enters helpers.
    pub entries: Entries,
    /// The supervisor's.
    own: Vec<PathBuf>,
    /// Where the warden stays: outside of what it removes. With version 2 a group with processes hands no controllers down, so that
    /// it is not the parent itself.
    homes: Vec<PathBuf>,
    /// Every machine's directory.
    machines: Vec<PathBuf>,
    /// Where controllers have to be handed down once nobody is in the parent any more.
    delegate: Vec<(PathBuf, Vec<String>)>,
    /// Limits that wait for that.
    limits: Vec<(PathBuf, String)>,
}

impl Cgroups {
    /// Makes the groups of a machine.
    ///
    /// # Errors
    /// The first file that cannot be made or written. What was made already is removed.
    pub fn make(config: &CgroupConfig, name: Option<&str>) -> Result<Self, CgroupError> {
        let mut groups = Self::default();
        match groups.fill(config, name) {
            Ok(()) => Ok(groups),
            Err(error) => {
                groups.remove();
                Err(error)
            }
        }
    }

    fn fill(&mut self, config: &CgroupConfig, name: Option<&str>) -> Result<(), CgroupError> {
        let read = |path: &Path| std::fs::read_to_string(path).map_err(at(path));
        let mounts = read(Path::new("/proc/self/mountinfo"))?;
        let own = read(Path::new("/proc/self/cgroup"))?;
        let controllers = |mount: &Path| std::fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
        let hierarchies = hierarchies(&mounts, &own, controllers);
        if hierarchies.is_empty() {
            let none = Error::new(ErrorKind::NotFound, "no hierarchy of control groups is mounted");
            return Err(at(Path::new("/sys/fs/cgroup"))(none));
        }
        let directory = directory_name(name, std::process::id());
        for hierarchy in &hierarchies {
            self.fill_hierarchy(hierarchy, config.parent.as_deref(), &directory)?;
        }
        for limit in &config.limits {
            let wanted = |group: &Group| limit.group.is_none_or(|only| only == *group);
            let mut is_set = false;
            for hierarchy in &hierarchies {
                let parent = parent_of(hierarchy, config.parent.as_deref());
                let Some(files) = files_of(limit.knob, &limit.value, hierarchy) else {
                    continue;
                };
                for group in Group::ALL.into_iter().filter(wanted) {
                    let path = parent.join(&directory).join(group.name());
                    let files = files.iter().map(|(file, text)| (path.join(file), text.clone()));
                    self.limits.extend(files);
                    is_set = true;
                }
            }
            if !is_set {
                let missing = Error::new(ErrorKind::Unsupported, "this host has nothing to set this limit with");
                return Err(at(Path::new(limit.knob.name()))(missing));
            }
        }
        Ok(())
    }

    fn fill_hierarchy(
        &mut self,
        hierarchy: &Hierarchy,
        parent: Option<&Path>,
        directory: &str,
    ) -> Result<(), CgroupError> {
        let parent = parent_of(hierarchy, parent);
        std::fs::create_dir_all(&parent).map_err(at(&parent))?;
        let machine = parent.join(directory);
        self.homes.push(match hierarchy.version {
            Version::One => parent.join("cgroup.procs"),
            Version::Two => {
                let home = parent.join("warden");
                std::fs::create_dir_all(&home).map_err(at(&home))?;
                home.join("cgroup.procs")
            }
        });
        // The groups in it are removed first.
        let place = self.made.len();
        self.make_directory(&parent, directory, place)?;
        for group in Group::ALL {
            self.make_directory(&machine, group.name(), place)?;
        }
        if hierarchy.version == Version::Two {
            let mut above = parent.as_path();
            let mut chain = vec![machine.clone()];
            // A parent that was there with its controllers (a delegated one) is left as it is.
            while above.starts_with(&hierarchy.mount) {
                chain.push(above.to_path_buf());
                let Some(next) = above.parent() else { break };
                above = next;
            }
            let chain = chain.into_iter().rev();
            self.delegate
                .extend(chain.map(|path| (path, hierarchy.controllers.clone())));
        }
        self.own.push(machine.join("supervisor/cgroup.procs"));
        self.machines.push(machine.clone());
        for role in Role::ALL {
            let path = machine.join(role.name()).join("cgroup.procs");
            let fd = open(&path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())
                .map_err(|errno| at(&path)(errno.into()))?;
            self.entries.push((role, fd));
        }
        Ok(())
    }

    fn make_directory(&mut self, parent: &Path, name: &str, place: usize) -> Result<(), CgroupError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = open(parent, flags, Mode::empty()).map_err(|errno| at(parent)(errno.into()))?;
        let path = parent.join(name);
        std::fs::create_dir(&path).map_err(at(&path))?;
        let made = Made {
            parent: fd,
            name: name.to_owned(),
        };
        self.made.insert(place, made);
        Ok(())
    }

    /// Moves the supervisor into its group, hands controllers down, sets the limits, and opens the counters. Nobody else is in
    /// the parent then.
    ///
    /// # Errors
    /// The file that cannot be written.
    pub fn enter(&mut self) -> Result<(), CgroupError> {
        let entered = self.try_enter();
        if entered.is_err() {
            self.leave();
        }
        entered
    }

    fn try_enter(&mut self) -> Result<(), CgroupError> {
        for path in &self.own {
            write(path, &std::process::id().to_string())?;
        }
        for (path, controllers) in &self.delegate {
            let file = path.join("cgroup.subtree_control");
            let has = std::fs::read_to_string(&file).unwrap_or_default();
            let is_lacking = |name: &&String| !has.split_whitespace().any(|known| known == name.as_str());
            let lacking: Vec<_> = controllers
                .iter()
                .filter(is_lacking)
                .map(|name| format!("+{name}"))
                .collect();
            if !lacking.is_empty() {
                write(&file, &lacking.join(" "))?;
            }
        }
        for (path, text) in &self.limits {
            write(path, text)?;
        }
        for machine in &self.machines {
            for group in Group::ALL {
                self.meters.extend(meters(group, &machine.join(group.name())));
            }
        }
        Ok(())
    }

    /// Moves the warden out of the supervisor's group.
    ///
    /// # Errors
    /// The file that cannot be written.
    pub fn expel(&self, warden: Pid) -> Result<(), CgroupError> {
        self.homes.iter().try_for_each(|path| write(path, &warden.to_string()))
    }

    /// Undoes all, when the machine does not come about.
    pub fn leave(&self) {
        let _ = self.expel(Pid::this());
        self.remove();
    }

    /// Removes what was made, as far as nobody is in it.
    fn remove(&self) {
        for made in &self.made {
            let flag = nix::unistd::UnlinkatFlags::RemoveDir;
            let _ = nix::unistd::unlinkat(&made.parent, made.name.as_str(), flag);
        }
    }
}

fn write(path: &Path, text: &str) -> Result<(), CgroupError> {
    let file = std::fs::OpenOptions::new().write(true).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(at(path))
}

fn parent_of(hierarchy: &Hierarchy, parent: Option<&Path>) -> PathBuf {
    let parent = parent.unwrap_or(&hierarchy.own);
    let below = parent.strip_prefix("/").unwrap_or(parent);
    // Nobody can remove anything from the root itself without capabilities.
    let is_root = below.as_os_str().is_empty();
    hierarchy
        .mount
        .join(if is_root { Path::new(DEFAULT_PARENT) } else { below })
}

/// A machine's name with the supervisor's pid, as a directory can be called.
fn directory_name(name: Option<&str>, pid: u32) -> String {
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || "_-".contains(c) {
            c
        } else {
            '_'
        }
    };
    let name: String = name.unwrap_or("machine").chars().take(64).map(plain).collect();
    format!("{name}-{pid}")
}

/// Which files a limit is written to in this hierarchy; `None` when it lacks the controller.
fn files_of(knob: Knob, value: &str, hierarchy: &Hierarchy) -> Option<Vec<(&'static str, String)>> {
    let has = |name: &str| hierarchy.controllers.iter().any(|controller| controller == name);
    let text = value.replace('/', " ");
    let word = |place: usize| text.split(' ').nth(place);
    if hierarchy.version == Version::Two {
        let controller = knob.name().split('.').next()?;
        return has(controller).then(|| vec![(knob.name(), text)]);
    }
    let unlimited = |text: &str| {
        if text == "max" {
            "-1".to_owned()
        } else {
            text.to_owned()
        }
    };
    match knob {
        Knob::CpuMax if has("cpu") => Some(vec![
            ("cpu.cfs_period_us", word(1).unwrap_or("100000").to_owned()),
            ("cpu.cfs_quota_us", unlimited(word(0)?)),
        ]),
        Knob::CpuWeight if has("cpu") => {
            // 100 there is 1024 here.
            let shares = text.parse::<u64>().map(|weight| (weight * 1024 / 100).to_string());
            Some(vec![("cpu.shares", shares.unwrap_or(text))])
        }
        Knob::MemoryMax if has("memory") => Some(vec![("memory.limit_in_bytes", unlimited(&text))]),
        Knob::MemoryHigh if has("memory") => Some(vec![("memory.soft_limit_in_bytes", unlimited(&text))]),
        Knob::PidsMax if has("pids") => Some(vec![("pids.max", text)]),
        Knob::IoWeight if has("blkio") => Some(vec![("blkio.bfq.weight", text)]),
        Knob::IoMax if has("blkio") => {
            let device = word(0)?;
            let files = text.split(' ').skip(1).map(|part| {
                let (what, limit) = part.split_once('=')?;
                let file = match what {
                    "rbps" => "blkio.throttle.read_bps_device",
                    "wbps" => "blkio.throttle.write_bps_device",
                    "riops" => "blkio.throttle.read_iops_device",
                    "wiops" => "blkio.throttle.write_iops_device",
                    _ => return None,
                };
                let limit = if limit == "max" { "0" } else { limit };
                Some((file, format!("{device} {limit}")))
            });
            // A part that nothing stands for is no limit at all.
            files.collect::<Option<Vec<_>>>().filter(|files| !files.is_empty())
        }
        _ => None,
    }
}

/// What this directory of a group has to be read.
fn meters(group: Group, directory: &Path) -> Vec<Meter> {
    let files = [
        ("cpu.stat", Source::CpuStat),
        ("cpuacct.usage", Source::CpuAccountNs),
        ("memory.current", Source::Memory),
        ("memory.usage_in_bytes", Source::Memory),
        ("memory.stat", Source::MemoryStat),
        ("io.stat", Source::IoStat),
        ("blkio.throttle.io_service_bytes_recursive", Source::BlkioBytes),
        ("pids.current", Source::Processes),
    ];
    let opened = files.into_iter().filter_map(|(name, source)| {
        let mut file = std::fs::File::open(directory.join(name)).ok()?;
        // Version 1 has a cpu.stat without what is asked for.
        if source == Source::CpuStat {
            let mut text = String::new();
            file.read_to_string(&mut text).ok()?;
            if !text.contains("usage_usec") {
                return None;
            }
        }
        let file = file.into();
        Some(Meter { group, source, file })
    });
    opened.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
30 25 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
34 30 0:30 / /sys/fs/cgroup/unified rw shared:1 - cgroup2 cgroup2 rw
";
    const OWN: &str = "3:memory:/tenants\n2:cpu,cpuacct:/\n0::/init.scope\n";

    #[test]
    fn version_2_is_used_where_it_has_controllers() {
        let found = hierarchies(MOUNTS, OWN, |_| "cpu memory hugetlb\n".into());
        let second = Hierarchy {
            version: Version::Two,
            mount: "/sys/fs/cgroup/unified".into(),
            own: "/init.scope".into(),
            controllers: vec!["cpu".into(), "memory".into()],
        };
        assert_eq!(found, [second]);
    }

    #[test]
    fn otherwise_every_hierarchy_of_version_1_that_limits_something() {
        let found = hierarchies(MOUNTS, OWN, |_| String::new());
        let of = |one: &Hierarchy| (one.mount.display().to_string(), one.own.display().to_string());
        assert_eq!(
            found.iter().map(of).collect::<Vec<_>>(),
            [
                ("/sys/fs/cgroup/cpu,cpuacct".to_owned(), "/".to_owned()),
                ("/sys/fs/cgroup/memory".to_owned(), "/tenants".to_owned())
            ]
        );
        assert_eq!(
            files_of(Knob::CpuMax, "50000/100000", &found[0]).unwrap(),
            [
                ("cpu.cfs_period_us", "100000".to_owned()),
                ("cpu.cfs_quota_us", "50000".to_owned())
            ]
        );
        assert_eq!(files_of(Knob::CpuMax, "max", &found[1]), None);
        assert_eq!(
            files_of(Knob::MemoryMax, "max", &found[1]).unwrap(),
            [("memory.limit_in_bytes", "-1".to_owned())]
        );
    }

    #[test]
    fn a_limit_of_which_a_part_means_nothing_is_refused() {
        let hierarchy = Hierarchy {
            version: Version::One,
            mount: "/sys/fs/cgroup/blkio".into(),
            own: "/".into(),
            controllers: vec!["blkio".into()],
        };
        let files = |value: &str| files_of(Knob::IoMax, value, &hierarchy);
        assert_eq!(
            files("8:0/rbps=1000/wiops=max").unwrap(),
            [
                ("blkio.throttle.read_bps_device", "8:0 1000".to_owned()),
                ("blkio.throttle.write_iops_device", "8:0 0".to_owned())
            ]
        );
        for value in ["8:0", "8:0/rpbs=1000", "8:0/rbps=1000/x", "8:0/rbps=1000/xiops=1"] {
            assert_eq!(files(value), None, "{value}");
        }
    }

    #[test]
    fn a_name_cannot_leave_its_directory() {
        assert_eq!(directory_name(Some("../a b"), 7), "___a_b-7");
        assert_eq!(directory_name(None, 7), "machine-7");
    }
}
