//! Inherited file descriptors: `-add-fd`.

use super::draft::Draft;
use super::error::UsageError;
use super::keyval::{Keys, Pairs, value};
use crate::config::{FdSetId, InheritedFd};

/// `-add-fd`.
pub(super) static ADD_FD_KEYS: Keys = Keys {
    implied: None,
    list: None,
    keys: &[value("fd"), value("set"), value("opaque")],
};

pub(super) fn add_fd(draft: &mut Draft, pairs: &Pairs) -> Result<(), UsageError> {
    let how = "-add-fd fd=N,set=M puts the inherited file descriptor N into the set M";
    let fd = pairs.require("fd", how)?;
    let number = fd.number("a file descriptor", 0..=i32::MAX)?;
    if number <= 2 {
        return Err(fd.refuse("0, 1 and 2 are the standard input, output and error"));
    }
    let set = pairs.require("set", how)?;
    let set_number = set.number("a set", 0..=i64::MAX)?;
    draft.fds.push(InheritedFd {
        fd: number,
        set: FdSetId::new(set_number).unwrap_or_default(),
        opaque: pairs
            .get("opaque")
            .map(|given| given.text().map(str::to_owned))
            .transpose()?,
    });
    Ok(())
}
