//! What a node's options come to, with what it inherits from the node above.
//!
//! As in QEMU: a child that is made with its parent has the parent's cache mode unless it says otherwise, and is read-only
//! if the parent is; a backing image is always read-only. Lower nodes let discards pass: whether there are any is decided
//! above them.

use super::options::{CommonOptions, DetectZeroes, DriverOptions, NodeOptions};
use ipc::graph::ChildRole;

/// What holds for a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "they are independent switches of QMP's")]
pub struct Settings {
    /// Nothing is written to it.
    pub read_only: bool,
    /// It becomes read-only where it cannot be written.
    pub auto_read_only: bool,
    /// O_DIRECT.
    pub direct: bool,
    /// Flushes are ignored.
    pub no_flush: bool,
    /// Discards pass.
    pub discard: bool,
    /// No locks, and nobody is kept off.
    pub force_share: bool,
    /// What becomes of written zeroes.
    pub detect_zeroes: DetectZeroes,
    /// An encrypted image may be there without its password, which follows (block_passwd).
    pub may_be_locked: bool,
}

impl Settings {
    /// Of a node that stands alone, or is a root.
    pub fn of_root(options: &CommonOptions) -> Self {
        Self::with(options, Self::default())
    }

    /// Of the root of a drive.
    pub fn of_drive(options: &CommonOptions) -> Self {
        Self {
            may_be_locked: true,
            ..Self::of_root(options)
        }
    }

    /// Of a child that is made with its parent.
    pub fn of_child(self, role: ChildRole, options: &CommonOptions) -> Self {
        let is_backing = role == ChildRole::Backing;
        let inherited = Self {
            read_only: self.read_only || is_backing,
            auto_read_only: self.auto_read_only && !is_backing,
            discard: true,
            detect_zeroes: DetectZeroes::Off,
            ..self
        };
        Self::with(options, inherited)
    }

    fn with(options: &CommonOptions, inherited: Self) -> Self {
        Self {
            read_only: options.read_only.unwrap_or(inherited.read_only),
            auto_read_only: options.auto_read_only.unwrap_or(inherited.auto_read_only),
            direct: options.direct.unwrap_or(inherited.direct),
            no_flush: options.no_flush.unwrap_or(inherited.no_flush),
            discard: options.discard.unwrap_or(inherited.discard),
            force_share: options.force_share.unwrap_or(inherited.force_share),
            detect_zeroes: options.detect_zeroes,
            may_be_locked: inherited.may_be_locked,
        }
    }
}

/// The role of each child, in the order of [`NodeOptions::children`].
pub fn roles(options: &NodeOptions) -> Vec<ChildRole> {
    match &options.driver {
        DriverOptions::File(_)
        | DriverOptions::Nbd(_)
        | DriverOptions::Null { .. }
        | DriverOptions::JobFilter { .. } => Vec::new(),
        DriverOptions::Qcow2(qcow2) => {
            let mut roles = vec![ChildRole::File];
            if qcow2.data_file.is_some() {
                roles.push(ChildRole::DataFile);
            }
            if matches!(qcow2.backing, super::options::BackingOptions::Node(_)) {
                roles.push(ChildRole::Backing);
            }
            roles
        }
        _ => vec![ChildRole::File],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_inherit_the_cache_mode_and_backing_images_are_read_only() {
        let plain = CommonOptions::default();
        let top = Settings::of_root(&CommonOptions {
            direct: Some(true),
            ..plain.clone()
        });
        let file = top.of_child(ChildRole::File, &plain);
        assert!(file.direct && !file.read_only && file.discard);
        let backing = top.of_child(ChildRole::Backing, &plain);
        assert!(backing.direct && backing.read_only);
        let own = CommonOptions {
            direct: Some(false),
            discard: Some(false),
            ..plain
        };
        let file = backing.of_child(ChildRole::File, &own);
        assert!(!file.direct && file.read_only && !file.discard);
    }
}
