//! The description of block nodes, as clients and command lines give it.
//!
//! A description is a tree: a node has options, some of which are nodes themselves. Between the processes it is flat
//! ([`FlatOptions`]): `{"driver": "qcow2", "file": {"driver": "file", "filename": "a"}}` is `driver=qcow2`,
//! `file.driver=file`, `file.filename=a`, as one may also write it on the command line; an item of a list has its number as
//! its name. The supervisor makes types of it and trusts nothing of it.

use crate::graph::OnError;
use crate::objects::Scalar;
use crate::objects::value::PropertyValue;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::ser::{SerializeMap, SerializeSeq, Serializer};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Names with dots, and values.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FlatOptions(pub Vec<(String, Scalar)>);

/// blockdev-add.
#[derive(Debug, Clone, PartialEq)]
pub struct NewBlockdev {
    /// The node.
    pub options: FlatOptions,
    /// What QMP 2.0's form says beyond the node: the device that it gets.
    pub backend: Option<BackendOptions>,
}

/// What a drive is beyond its node (`-drive`, and blockdev-add in QMP 2.0's form).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendOptions {
    /// `id`.
    pub id: String,
    /// `cache.writeback`: the guest sees a volatile write cache.
    pub write_cache: bool,
    /// `rerror`.
    pub read_error: OnError,
    /// `werror`: `enospc` unless something else is said.
    pub write_error: OnError,
}

/// In JSON it is its node; the old form, which has more, is never written.
impl Serialize for NewBlockdev {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            self.options.serialize(serializer)
        } else {
            (&self.options, &self.backend).serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for NewBlockdev {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let options = FlatOptions::deserialize(deserializer)?;
            return Ok(Self { options, backend: None });
        }
        let (options, backend) = Deserialize::deserialize(deserializer)?;
        Ok(Self { options, backend })
    }
}

/// An option on the way back to a tree.
enum Tree<'a> {
    Leaf(&'a Scalar),
    Branch(Vec<(&'a str, Tree<'a>)>),
}

impl<'a> Tree<'a> {
    fn new(options: &'a [(String, Scalar)]) -> Self {
        let mut root = Vec::new();
        for (name, value) in options {
            Self::insert(&mut root, name, value);
        }
        Self::Branch(root)
    }

    fn insert(branch: &mut Vec<(&'a str, Self)>, name: &'a str, value: &'a Scalar) {
        let Some((first, rest)) = name.split_once('.') else {
            return branch.push((name, Self::Leaf(value)));
        };
        let known = branch
            .iter()
            .position(|(known, tree)| *known == first && matches!(tree, Self::Branch(_)));
        let place = known.unwrap_or_else(|| {
            branch.push((first, Self::Branch(Vec::new())));
            branch.len() - 1
        });
        if let (_, Self::Branch(inner)) = &mut branch[place] {
            Self::insert(inner, rest, value);
        }
    }
}

impl Serialize for Tree<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let branch = match self {
            Self::Leaf(scalar) => return Serialize::serialize(*scalar, serializer),
            Self::Branch(branch) => branch,
        };
        let is_list = !branch.is_empty()
            && branch
                .iter()
                .enumerate()
                .all(|(index, (name, _))| *name == index.to_string());
        if is_list {
            let mut list = serializer.serialize_seq(Some(branch.len()))?;
            branch.iter().try_for_each(|(_, item)| list.serialize_element(item))?;
            return list.end();
        }
        let mut map = serializer.serialize_map(Some(branch.len()))?;
        branch
            .iter()
            .try_for_each(|(name, value)| map.serialize_entry(name, value))?;
        map.end()
    }
}

impl Serialize for FlatOptions {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            Tree::new(&self.0).serialize(serializer)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for FlatOptions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            return Deserialize::deserialize(deserializer).map(Self);
        }
        let mut options = Self::default();
        let collector = Collector {
            name: String::new(),
            into: &mut options.0,
        };
        collector.deserialize(deserializer)?;
        Ok(options)
    }
}

/// Collects what is below a name.
struct Collector<'a> {
    name: String,
    into: &'a mut Vec<(String, Scalar)>,
}

impl Collector<'_> {
    fn below(&mut self, name: &str) -> Collector<'_> {
        let name = if self.name.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.name)
        };
        Collector { name, into: self.into }
    }

    fn leaf<E: serde::de::Error>(self, value: PropertyValue) -> Result<(), E> {
        let PropertyValue::Scalar(value) = value else {
            return Err(E::custom("an option has one value"));
        };
        if self.name.is_empty() {
            return Err(E::custom("a node's options are an object"));
        }
        self.into.push((self.name, value));
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Collector<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Collector<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a node's options")
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.leaf(PropertyValue::Scalar(Scalar::Null))
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<(), E> {
        self.leaf(value.into())
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<(), E> {
        self.leaf(value.into())
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<(), E> {
        self.leaf(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<(), E> {
        self.leaf(PropertyValue::Scalar(Scalar::Double(value)))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<(), E> {
        self.leaf(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut items: A) -> Result<(), A::Error> {
        let mut index = 0u32;
        while items.next_element_seed(self.below(&index.to_string()))?.is_some() {
            index += 1;
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            // With a dot it is an option of an option, as on the command line.
            if name.is_empty() {
                return Err(A::Error::custom(format!("there is no option {name:?}")));
            }
            map.next_value_seed(self.below(&name))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: &str = r#"{"driver":"blkdebug","node-name":"n","cache":{"direct":true},"image":{"driver":"file","filename":"a.b"},"inject-error":[{"event":"l2_load","errno":5},{"event":"read_aio"}],"backing":null}"#;

    #[test]
    fn trees_are_flat_and_come_back() {
        let options: FlatOptions = serde_json::from_str(NODE).unwrap();
        let names: Vec<_> = options.0.iter().map(|(name, _)| name.as_str()).collect();
        let expected = [
            "driver",
            "node-name",
            "cache.direct",
            "image.driver",
            "image.filename",
            "inject-error.0.event",
            "inject-error.0.errno",
            "inject-error.1.event",
            "backing",
        ];
        assert_eq!(names, expected);
        assert_eq!(options.0[4].1, Scalar::Text("a.b".into()));
        assert_eq!(serde_json::to_string(&options).unwrap(), NODE);
        let bytes = bincode::serialize(&options).unwrap();
        assert_eq!(bincode::deserialize::<FlatOptions>(&bytes).unwrap(), options);
    }

    #[test]
    fn what_has_no_name_is_refused() {
        for wrong in ["1", "null", "\"a\"", r#"{"":1}"#] {
            serde_json::from_str::<FlatOptions>(wrong).unwrap_err();
        }
    }

    #[test]
    fn a_new_node_travels_with_its_device() {
        let node = NewBlockdev {
            options: serde_json::from_str(NODE).unwrap(),
            backend: Some(BackendOptions {
                id: "d".into(),
                write_cache: false,
                read_error: OnError::Stop,
                write_error: OnError::Enospc,
            }),
        };
        let bytes = bincode::serialize(&node).unwrap();
        assert_eq!(bincode::deserialize::<NewBlockdev>(&bytes).unwrap(), node);
        assert_eq!(serde_json::to_string(&node).unwrap(), NODE);
    }
}
