//! A Python with drgn, for a place where the monitor's socket is: drgn passes a file descriptor, which no connection from
//! outside carries into a lab.

use super::outer::LabBuilder;
use super::pieces::libraries;
use super::site::Site;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Names the Python that has the libraries that tests use; `make test` sets it.
pub const VARIABLE: &str = "BULKHEAD_PYTHON";

/// Prints the interpreter, its prefix, where drgn is, and then every file that a debugger of kernels needs: what is loaded
/// when it has attached to something, which is when it looks for its plug-ins.
const PROBE: &str = r"
import os, sys
import drgn, drgn.helpers.linux.kallsyms, drgn.helpers.linux.pid, functools, json, socket, stat, struct, time
drgn.Program.set_qemu_qmp
drgn.Program().set_pid(os.getpid())
print(os.path.realpath(sys.executable), sys.base_prefix, os.path.dirname(os.path.dirname(drgn.__file__)), sep='\n')
files = {module.__file__ for module in sys.modules.values() if getattr(module, '__file__', None)}
files |= {line.split()[-1] for line in open('/proc/self/maps') if '.so' in line.split()[-1]}
print(*sorted(file for file in files if os.path.isfile(file)), sep='\n')
";

/// See the module.
pub struct Python {
    /// As it is called here.
    here: PathBuf,
    program: PathBuf,
    prefix: String,
    libraries: String,
    files: Vec<PathBuf>,
}

impl Python {
    /// The one that [`VARIABLE`] names, or the system's; otherwise what is missing.
    pub fn with_drgn() -> Result<Self, String> {
        let here = PathBuf::from(std::env::var_os(VARIABLE).unwrap_or_else(|| "python3".into()));
        let missing = || {
            let here = here.display();
            format!("{here} has no drgn that knows QMP (`make packages` gets it, {VARIABLE} names it)")
        };
        let output = Command::new(&here)
            .args(["-c", PROBE])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .map_err(|_| missing())?;
        let text = String::from_utf8(output.stdout).map_err(|_| missing())?;
        let mut lines = text.lines();
        match (lines.next(), lines.next(), lines.next()) {
            (Some(program), Some(prefix), Some(libraries)) if output.status.success() => Ok(Self {
                program: program.into(),
                prefix: prefix.to_owned(),
                libraries: libraries.to_owned(),
                files: lines.map(PathBuf::from).collect(),
                here,
            }),
            _ => Err(missing()),
        }
    }

    /// Puts it into a lab.
    pub fn add_to(&self, lab: LabBuilder) -> LabBuilder {
        let with_libraries = |file: &PathBuf| {
            let is_library = file.to_string_lossy().contains(".so");
            // By the names by which they are looked for, which are those of links.
            let needed = if is_library { libraries(file) } else { Vec::new() };
            std::iter::once(file.clone()).chain(needed)
        };
        let files: BTreeSet<PathBuf> = self.files.iter().flat_map(with_libraries).collect();
        let add = |lab: LabBuilder, file: &PathBuf| match fs::read(file) {
            Ok(content) => lab.file(&there(&file.to_string_lossy()), 0o755, content),
            Err(_) => lab,
        };
        files.iter().fold(lab.program(&self.program), add)
    }

    /// The command that starts it there with a script, which is brought along.
    pub fn command(&self, site: &Site, script: &Path) -> Result<String, String> {
        if matches!(site, Site::Here(_)) {
            return Ok(format!("{} {}", self.here.display(), script.display()));
        }
        let copy = site.path("script.py");
        site.put(script, &copy, 0o644)?;
        let (prefix, libraries, program) = (there(&self.prefix), there(&self.libraries), self.program.display());
        // It is not a whole installation: nothing beside what was loaded here is looked for.
        Ok(format!(
            "env PYTHONHOME={prefix} PYTHONPATH={libraries} PYTHONUTF8=1 {program} -S -B {copy}"
        ))
    }
}

/// Where a file of this machine is in the lab: at the same path, unless the lab mounts something over it.
fn there(path: &str) -> String {
    match path.strip_prefix("/tmp/") {
        Some(rest) => format!("/opt/tmp/{rest}"),
        None => path.to_owned(),
    }
}
