//! What a node is called where a file name is wanted: its file's name where that says all, otherwise a name that describes
//! the node (`json:{…}`), as QEMU has it.

use super::Graph;
use super::node::Node;
use super::options::DriverOptions;
use ipc::blockdev::FlatOptions;
use ipc::graph::{ChildRole, NodeId};
use ipc::objects::Scalar;
use ipc::wire_order::bucket;
use serde_json::Value;

impl Graph {
    /// A node's file name.
    pub fn filename(&self, id: NodeId) -> String {
        let node = self.node_or_missing(id);
        match &node.options.driver {
            DriverOptions::File(file) => match &node.file {
                Some(open) => open.path.display().to_string(),
                None => file.path.display().to_string(),
            },
            DriverOptions::Nbd(nbd) => nbd.filename(),
            DriverOptions::Null { aio, .. } => if *aio { "null-aio://" } else { "null-co://" }.to_owned(),
            DriverOptions::Raw { offset, bytes, .. } if *offset != 0 || bytes.is_some() => {
                let mut json = serde_json::json!({"driver": "raw", "file": self.description(self.file(node))});
                if *offset != 0 {
                    json["offset"] = (*offset).into();
                }
                if let Some(bytes) = bytes {
                    json["size"] = (*bytes).into();
                }
                format!("json:{}", text(&json))
            }
            DriverOptions::Blkdebug(_) => format!("blkdebug::{}", self.below(node)),
            DriverOptions::Throttle { group, .. } => {
                let below = self.description(self.file(node));
                let json = serde_json::json!({"driver": "throttle", "throttle-group": group, "file": below});
                format!("json:{}", text(&json))
            }
            DriverOptions::Raw { .. }
            | DriverOptions::Qcow2(_)
            | DriverOptions::Luks { .. }
            | DriverOptions::CopyOnRead { .. }
            | DriverOptions::JobFilter { .. } => self.below(node),
        }
    }

    fn file(&self, node: &Node) -> Option<NodeId> {
        node.children.get(&ChildRole::File).copied()
    }

    fn below(&self, node: &Node) -> String {
        self.file(node).map_or_else(String::new, |file| self.filename(file))
    }

    /// A node inside another's description.
    fn description(&self, id: Option<NodeId>) -> Value {
        let Some(id) = id else {
            return Value::Null;
        };
        let node = self.node_or_missing(id);
        match (&node.options.driver, self.file(node)) {
            (DriverOptions::Null { .. }, _) => serde_json::json!({"driver": node.driver_name()}),
            (DriverOptions::Nbd(nbd), _) => nbd.description(),
            (DriverOptions::File(_), _) | (_, None) => {
                serde_json::json!({"driver": node.driver_name(), "filename": self.filename(id)})
            }
            (DriverOptions::Blkdebug(_), file) => {
                serde_json::json!({"driver": node.driver_name(), "image": self.description(file)})
            }
            (_, file) => serde_json::json!({"driver": node.driver_name(), "file": self.description(file)}),
        }
    }
}

/// JSON as QEMU writes it into a name.
pub(super) fn text(value: &Value) -> String {
    let Value::Object(members) = value else {
        return value.to_string();
    };
    let mut members: Vec<_> = members.iter().collect();
    members.sort_by_key(|(name, _)| bucket(name));
    let members: Vec<String> = members
        .into_iter()
        .map(|(name, value)| format!("{}: {}", Value::from(name.as_str()), text(value)))
        .collect();
    format!("{{{}}}", members.join(", "))
}

/// What a name with a protocol before its colon says of the node that it stands for (`blkdebug::disk.img`,
/// `null-co://`); nothing of a plain name. An image inside is named in the same way.
pub fn options_of(name: &str) -> Option<FlatOptions> {
    let mut options = Vec::new();
    describe(name, "", &mut options).then_some(FlatOptions(options))
}

/// Whether it is a name with a protocol.
fn describe(name: &str, prefix: &str, options: &mut Vec<(String, Scalar)>) -> bool {
    let mut add = |key: &str, value: &str| options.push((format!("{prefix}{key}"), value.into()));
    if let Some(driver) = name
        .strip_suffix("://")
        .filter(|driver| matches!(*driver, "null-co" | "null-aio"))
    {
        add("driver", driver);
        return true;
    }
    let Some((config, image)) = name.strip_prefix("blkdebug:").and_then(|rest| rest.split_once(':')) else {
        return false;
    };
    add("driver", "blkdebug");
    if !config.is_empty() {
        add("config", config);
    }
    let below = format!("{prefix}image.");
    if !describe(image, &below, options) {
        options.push((format!("{below}driver"), "file".into()));
        options.push((format!("{below}filename"), image.into()));
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_have_the_order_of_the_hash_table() {
        let value = serde_json::json!({"driver": "throttle", "file": {"driver": "null-co"}, "throttle-group": "g\"0"});
        assert_eq!(
            text(&value),
            r#"{"throttle-group": "g\"0", "driver": "throttle", "file": {"driver": "null-co"}}"#
        );
    }
}
