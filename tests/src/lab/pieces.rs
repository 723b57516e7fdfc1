//! What the lab is made of: Debian's kernel and modules, busybox, QEMU. `tests/lab/packages` fetches them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder `tests/` of the source tree.
pub fn tests_folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where `tests/lab/packages` unpacks Debian packages.
fn unpacked() -> PathBuf {
    tests_folder().join(".cache/debian")
}

/// A Debian cloud kernel: an ordinary distribution kernel, with every driver a module that can be one.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The bzImage.
    pub image: PathBuf,
    /// As in `uname -r`.
    pub version: String,
    modules: PathBuf,
}

impl Kernel {
    /// The newest of the unpacked ones, else of the installed ones.
    pub fn find() -> Result<Self, String> {
        let unpacked = unpacked();
        for root in [unpacked.as_path(), Path::new("/")] {
            let Ok(entries) = fs::read_dir(root.join("boot")) else {
                continue;
            };
            let mut versions: Vec<String> = entries
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .filter_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned))
                .filter(|version| version.ends_with("-cloud-amd64"))
                .collect();
            versions.sort_by_key(|version| sortable(version));
            for version in versions.into_iter().rev() {
                let image = root.join("boot").join(format!("vmlinuz-{version}"));
                for library in ["lib/modules", "usr/lib/modules"] {
                    let modules = root.join(library).join(&version);
                    if modules.join("kernel").is_dir() && fs::File::open(&image).is_ok() {
                        return Ok(Self {
                            image,
                            version,
                            modules,
                        });
                    }
                }
            }
        }
        Err("no Debian cloud kernel (make packages fetches one)".into())
    }

    /// The wanted modules with everything they depend on, in an order in which they can be loaded. A name that is built
    /// into this kernel gives nothing.
    pub fn modules(&self, wanted: &[&str]) -> Result<Vec<Module>, String> {
        let mut files = BTreeMap::new();
        index(&self.modules.join("kernel"), &mut files);
        let built_in: BTreeSet<String> = fs::read_to_string(self.modules.join("modules.builtin"))
            .unwrap_or_default()
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect();
        let mut loaded = Vec::new();
        let mut seen = BTreeSet::new();
        for name in wanted {
            self.add(&plain(name), &files, &built_in, &mut seen, &mut loaded)?;
        }
        Ok(loaded)
    }

    fn add(
        &self,
        name: &str,
        files: &BTreeMap<String, PathBuf>,
        built_in: &BTreeSet<String>,
        seen: &mut BTreeSet<String>,
        loaded: &mut Vec<Module>,
    ) -> Result<(), String> {
        if built_in.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let path = files
            .get(name)
            .ok_or_else(|| format!("kernel {} has no module {name}", self.version))?;
        let content = read_module(path)?;
        for dependency in dependencies(&content) {
            self.add(&dependency, files, built_in, seen, loaded)?;
        }
        loaded.push(Module {
            name: name.to_owned(),
            content,
        });
        Ok(())
    }
}

/// One kernel module, uncompressed.
pub struct Module {
    /// With underscores.
    pub name: String,
    /// The object file.
    pub content: Vec<u8>,
}

/// "6.1.0-56-cloud-amd64" as its numbers, so that 10 comes after 9.
fn sortable(version: &str) -> Vec<u32> {
    version
        .split(['.', '-', '+'])
        .filter_map(|part| part.parse().ok())
        .collect()
}

fn plain(name: &str) -> String {
    name.replace('-', "_")
}

fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (name, _) = name.split_once(".ko")?;
    Some(plain(name))
}

fn index(folder: &Path, files: &mut BTreeMap<String, PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            index(&path, files);
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
}

fn read_module(path: &Path) -> Result<Vec<u8>, String> {
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).map_err(|error| format!("{}: {error}", path.display())),
    };
    let output = Command::new(program)
        .arg("-dc")
        .arg(path)
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{program} cannot read {}", path.display()));
    }
    Ok(output.stdout)
}

/// What `modinfo` shows as `depends`: a NUL-terminated string in the section .modinfo. The packages of Debian carry no
/// modules.dep; it is made at installation.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[start + KEY.len()..]
        .split(|&byte| byte == 0)
        .next()
        .unwrap_or_default();
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(plain)
        .collect()
}

/// busybox without shared libraries: every command of the two small systems.
pub fn busybox() -> Result<Vec<u8>, String> {
    for path in [
        unpacked().join("bin/busybox"),
        unpacked().join("usr/bin/busybox"),
        "/bin/busybox".into(),
    ] {
        if path.is_file() && libraries(&path).is_empty() {
            return fs::read(&path).map_err(|error| format!("{}: {error}", path.display()));
        }
    }
    Err("no static busybox (make packages fetches one)".into())
}

/// `newuidmap` and `newgidmap`, if they are here.
pub fn id_mappers() -> Vec<PathBuf> {
    let names = ["newuidmap", "newgidmap"];
    for folder in [PathBuf::from("/usr/bin"), unpacked().join("usr/bin")] {
        let paths: Vec<PathBuf> = names.iter().map(|name| folder.join(name)).collect();
        if paths.iter().all(|path| path.is_file()) {
            return paths;
        }
    }
    Vec::new()
}

/// The shared libraries of a program with its loader, as absolute paths; none for a static one.
pub fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd")
        .env("LD_LIBRARY_PATH", unpacked().join("usr/lib/x86_64-linux-gnu"))
        .arg(program)
        .output();
    let Ok(output) = output else { return Vec::new() };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

/// The emulator that is the lab's machine.
pub fn qemu() -> Result<PathBuf, String> {
    find_program("qemu-system-x86_64").ok_or_else(|| "no qemu-system-x86_64 (make packages installs it)".into())
}

/// A program of the host, also where an ordinary user's PATH does not look.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
}

/// The folder with the executables that cargo built last for this profile: `bulkhead`, its helpers, the agent.
pub fn built() -> PathBuf {
    let here = std::env::current_exe().expect("/proc is mounted");
    let folder = here.parent().expect("an executable is in a folder");
    // Test programs are in target/TRIPLE/PROFILE/deps, examples in …/examples.
    if folder.ends_with("deps") || folder.ends_with("examples") {
        folder.parent().expect("a profile's folder").to_owned()
    } else {
        folder.to_owned()
    }
}

/// `bulkhead` and its helpers.
pub const EXECUTABLES: [&str; 5] = ["bulkhead", "vcpu-proc", "block-proc", "dump-proc", "qmp-proc"];

/// An executable of this workspace, without its symbols: they are most of its size. `None` when it was not built.
pub fn stripped(name: &str) -> Option<Vec<u8>> {
    let path = built().join(name);
    let folder = tempfile::tempdir().ok()?;
    let copy = folder.path().join(name);
    let strip = Command::new("strip").arg("-o").arg(&copy).arg(&path).output();
    match strip {
        Ok(output) if output.status.success() => fs::read(copy).ok(),
        _ => fs::read(path).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_sort_by_their_numbers() {
        assert!(sortable("6.1.0-9-cloud-amd64") < sortable("6.1.0-56-cloud-amd64"));
        assert!(sortable("6.1.0-56-cloud-amd64") < sortable("6.12.3-cloud-amd64"));
    }

    #[test]
    fn dependencies_are_read_from_the_module_itself() {
        assert_eq!(
            dependencies(b"\x7fELF..\0alias=x\0depends=virtio,virtio-ring\0retpoline=Y\0"),
            ["virtio", "virtio_ring"]
        );
        assert!(dependencies(b"\0depends=\0name=kvm\0").is_empty());
        assert!(dependencies(b"no module").is_empty());
    }
}
