//! What `policies/processes.json` declares of each process: its walls, and every descriptor that it may hold.

use super::LiveError;
use crate::policy::{Process, Source};
use serde::Deserialize;
use std::collections::BTreeMap;

/// The embedded declaration.
const EMBEDDED: &str = include_str!("../../../policies/processes.json");

/// Of all processes, by name.
#[derive(Debug, Clone)]
pub struct Declarations(BTreeMap<String, Declaration>);

/// Of one process.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Declaration {
    /// Which programs it runs under, the oldest first: `process.filter`.
    pub filters: Vec<String>,
    /// Whether it can get no privileges.
    pub no_new_privs: bool,
    /// Its capabilities.
    pub capabilities: Capabilities,
    /// Its ids.
    pub ids: Ids,
    /// Its namespaces.
    pub namespaces: BTreeMap<String, Namespace>,
    /// Its root directory.
    pub root: Root,
    /// Whether processes of its own uid may not look into it.
    #[serde(default)]
    pub undumpable: bool,
    /// What Landlock leaves it: for people, since the kernel shows that to nobody.
    pub landlock: String,
    /// Limits, by their names in /proc/PID/limits without "Max".
    pub limits: BTreeMap<String, u64>,
    /// Whether it maps guest RAM.
    pub ram: RamUse,
    /// What it may hold.
    pub descriptors: Vec<Holding>,
}

/// Which capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Capabilities {
    /// None in any set.
    #[serde(rename = "none")]
    None,
    /// Any, in a user namespace that is not the host's.
    #[serde(rename = "of its own user namespace")]
    OfItsNamespace,
}

/// Which ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ids {
    /// The supervisor's.
    Caller,
    /// A host uid and gid that no other process of the machine has, and no groups.
    Own,
}

/// Which namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Namespace {
    /// The supervisor's.
    Host,
    /// The launcher's.
    Launcher,
    /// One that no other process of the machine is in; for the launcher: one that is not the supervisor's.
    Own,
}

/// Which root directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Root {
    /// The supervisor's.
    Host,
    /// One read-only mount without a file.
    Empty,
}

/// Whether guest RAM is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RamUse {
    /// It must not be.
    Unmapped,
    /// Readable and writable, never executable.
    Rw,
}

/// Descriptors that a process may hold.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holding {
    /// What they are.
    pub kind: String,
    /// With which rights.
    pub rights: Vec<String>,
    /// At which numbers only.
    #[serde(default)]
    pub at: Vec<i32>,
    /// At least so many.
    #[serde(default)]
    pub least: usize,
    /// At most so many.
    #[serde(default = "any_number")]
    pub most: usize,
    /// Who must hold the other end of a socket.
    #[serde(default)]
    pub peer: Option<String>,
    /// Who must hold the same object too.
    #[serde(default)]
    pub also: Option<String>,
    /// At one of which numbers that process must hold it.
    #[serde(default)]
    pub also_at: Vec<i32>,
    /// Who must not hold the same object.
    #[serde(default)]
    pub apart: Option<String>,
    /// What they are for.
    pub why: String,
}

fn any_number() -> usize {
    usize::MAX
}

impl Declarations {
    /// Reads them from where the policies are.
    ///
    /// # Errors
    /// [`LiveError::Declaration`].
    pub fn read(source: &Source) -> Result<Self, LiveError> {
        let text = match source {
            Source::Embedded => EMBEDDED.to_owned(),
            Source::Directory(directory) => {
                let path = directory.join("processes.json");
                std::fs::read_to_string(&path)
                    .map_err(|error| LiveError::Declaration(format!("{}: {error}", path.display())))?
            }
        };
        serde_json::from_str(&text)
            .map(Self)
            .map_err(|error| LiveError::Declaration(format!("processes.json: {error}")))
    }

    /// Of one process.
    pub fn of(&self, process: Process) -> Option<&Declaration> {
        self.0.get(process.name())
    }
}
