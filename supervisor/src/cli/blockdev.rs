//! Nodes of the block graph: `-blockdev`.

use super::draft::Draft;
use super::error::UsageError;
use super::given::Given;
use super::open_pairs::{self, Open};
use crate::graph::options::NodeOptions;
use crate::objects::spec::is_identifier;
use ipc::blockdev::FlatOptions;
use ipc::objects::PropertyValue;
use std::os::unix::ffi::OsStrExt;

/// `-blockdev`.
pub(super) fn blockdev(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    let bytes = given.value.as_bytes();
    let options = if bytes.starts_with(b"{") {
        serde_json::from_slice(bytes)
            .map_err(|error| given.refuse(format!("this is no JSON object of a node's options: {error}")))?
    } else {
        let pairs = open_pairs::parse(given, "driver")?;
        let scalar = |(name, value): (String, Open)| match value {
            Open::Text(text) => Some((name, text.into())),
            Open::Json(PropertyValue::Scalar(scalar)) => Some((name, scalar)),
            Open::Json(_) => None,
        };
        FlatOptions(pairs.into_iter().filter_map(scalar).collect())
    };
    let node = NodeOptions::parse(options).map_err(|error| given.refuse(error.to_string()))?;
    if node.name.is_none() {
        return Err(given.refuse("'node-name' must be specified for the root node"));
    }
    draft.blockdevs.push((given.clone(), node));
    Ok(())
}

/// After the last option: nodes and drives share their names.
pub(super) fn check_names(draft: &Draft) -> Result<(), UsageError> {
    let mut seen: Vec<&str> = Vec::new();
    let drives = draft.drives.iter().map(|drive| (None, &drive.node));
    let blockdevs = draft.blockdevs.iter().map(|(given, node)| (Some(given), node));
    for (given, tree) in blockdevs.chain(drives) {
        let refuse = |problem: String| match given {
            Some(given) => given.refuse(problem),
            None => UsageError::new("-drive", problem),
        };
        for name in tree.nodes().into_iter().filter_map(|node| node.name.as_deref()) {
            if !is_identifier(name) {
                return Err(refuse(format!("Invalid node-name: '{name}'")));
            }
            if seen.contains(&name) {
                return Err(refuse(format!("Duplicate nodes with node-name='{name}'")));
            }
            if draft.drives.iter().any(|drive| drive.backend.id == name) {
                return Err(refuse(format!("node-name={name} is conflicting with a device id")));
            }
            seen.push(name);
        }
    }
    Ok(())
}
