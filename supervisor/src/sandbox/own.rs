//! The supervisor's own walls. It keeps its root directory, because it opens paths and binds sockets for the others; it
//! has no capabilities, no new privileges, a Landlock domain and a seccomp filter.
//!
//! It keeps power over its helpers without capabilities: the owner of a user namespace has all capabilities in it.

use landlock::{
    Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use std::os::fd::OwnedFd;

/// A wall of the supervisor could not be put up.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// Capabilities.
    #[error("dropping the supervisor's capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    /// Landlock.
    #[error("confining the supervisor by Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// The root directory could not be opened.
    #[error("confining the supervisor by Landlock: {0}")]
    Path(#[from] landlock::PathFdError),
    /// Seccomp.
    #[error(transparent)]
    Policy(#[from] policies::PolicyError),
}

/// Seals the supervisor. Call it when every helper process that the start needs is running and all paths that the
/// command line names are open.
///
/// # Errors
/// [`SealError`]. Where the kernel has no Landlock that layer is left out (the start-up log says so).
pub fn seal(mode: policies::Mode) -> Result<(), SealError> {
    drop_capabilities()?;
    restrict_paths()?;
    policies::seal_self(policies::Process::Supervisor, mode)?;
    Ok(())
}

/// Seals the opener, which the supervisor has forked.
///
/// # Errors
/// As [`seal`].
pub fn seal_opener(mode: policies::Mode) -> Result<(), SealError> {
    drop_capabilities()?;
    restrict_to_sockets()?;
    policies::seal_self(policies::Process::Opener, mode)?;
    Ok(())
}

/// Seals the warden, which the supervisor has forked: it may remove things from these directories.
///
/// # Errors
/// As [`seal`].
pub fn seal_warden(mode: policies::Mode, directories: &[&OwnedFd]) -> Result<(), SealError> {
    drop_capabilities()?;
    let abi = landlock::ABI::V6;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?;
    for directory in directories {
        rules = rules.add_rule(PathBeneath::new(directory, AccessFs::RemoveDir | AccessFs::RemoveFile))?;
    }
    rules.restrict_self()?;
    policies::seal_self(policies::Process::Warden, mode)?;
    Ok(())
}

fn drop_capabilities() -> Result<(), SealError> {
    for set in [
        caps::CapSet::Ambient,
        caps::CapSet::Bounding,
        caps::CapSet::Inheritable,
        caps::CapSet::Effective,
        caps::CapSet::Permitted,
    ] {
        match caps::clear(None, set) {
            // Without privileges the bounding set cannot be touched; no_new_privs makes it meaningless.
            Err(_) if matches!(set, caps::CapSet::Bounding) && !nix::unistd::Uid::effective().is_root() => {}
            other => other?,
        }
    }
    Ok(())
}

/// What the path policy can ever need: reading and writing regular files that an operator names, creating dump files,
/// removing its own sockets and pid file. Never: executing, devices, directories, links, renames, TCP.
fn restrict_paths() -> Result<bool, SealError> {
    let abi = landlock::ABI::V6;
    let allowed = AccessFs::ReadFile
        | AccessFs::ReadDir
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeSock
        | AccessFs::RemoveFile
        | AccessFs::IoctlDev;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .create()?
        .add_rule(PathBeneath::new(PathFd::new("/")?, allowed))?
        .restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// What the opener can ever need: making socket files, and the network. Never: a file's contents, and removing anything.
fn restrict_to_sockets() -> Result<(), SealError> {
    let abi = landlock::ABI::V6;
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .add_rule(PathBeneath::new(PathFd::new("/")?, AccessFs::MakeSock))?
        .restrict_self()?;
    Ok(())
}
