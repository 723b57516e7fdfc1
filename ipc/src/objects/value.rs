//! What a property holds. Of JSON's values these are the flat ones: no property has more than one level of structure, and
//! message types are not recursive.

use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{SerializeMap, SerializeSeq, Serializer};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A value without structure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self")]
pub enum Scalar {
    /// `null`.
    Null,
    /// A boolean.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// An integer above `i64::MAX`.
    Uint(u64),
    /// A number with a fraction.
    Double(f64),
    /// Text.
    Text(String),
}

/// A property's value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self")]
pub enum PropertyValue {
    /// A single value.
    Scalar(Scalar),
    /// A list.
    List(Vec<Scalar>),
    /// A struct: names and values.
    Struct(Vec<(String, Scalar)>),
}

macro_rules! from_scalars {
    ($($type:ty => |$value:ident| $scalar:expr;)*) => {$(
        impl From<$type> for Scalar {
            fn from($value: $type) -> Self {
                $scalar
            }
        }
        impl From<$type> for PropertyValue {
            fn from($value: $type) -> Self {
                Self::Scalar(Scalar::from($value))
            }
        }
    )*};
}
from_scalars! {
    bool => |value| Scalar::Bool(value);
    i64 => |value| Scalar::Int(value);
    u64 => |value| i64::try_from(value).map_or(Scalar::Uint(value), Scalar::Int);
    &str => |value| Scalar::Text(value.to_owned());
    String => |value| Scalar::Text(value);
}

/// JSON's own forms for people's formats, a tagged enum between the processes: bincode cannot tell types apart.
impl Serialize for Scalar {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if !serializer.is_human_readable() {
            return Self::serialize(self, serializer);
        }
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Int(value) => serializer.serialize_i64(*value),
            Self::Uint(value) => serializer.serialize_u64(*value),
            Self::Double(value) => serializer.serialize_f64(*value),
            Self::Text(value) => serializer.serialize_str(value),
        }
    }
}

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            return Self::deserialize(deserializer);
        }
        match deserializer.deserialize_any(Any)? {
            PropertyValue::Scalar(scalar) => Ok(scalar),
            _ => Err(de::Error::custom("no property has this many levels")),
        }
    }
}

impl Serialize for PropertyValue {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if !serializer.is_human_readable() {
            return Self::serialize(self, serializer);
        }
        match self {
            Self::Scalar(scalar) => Serialize::serialize(scalar, serializer),
            Self::List(items) => {
                let mut list = serializer.serialize_seq(Some(items.len()))?;
                items.iter().try_for_each(|item| list.serialize_element(item))?;
                list.end()
            }
            Self::Struct(members) => {
                let mut map = serializer.serialize_map(Some(members.len()))?;
                members
                    .iter()
                    .try_for_each(|(name, value)| map.serialize_entry(name, value))?;
                map.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for PropertyValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            deserializer.deserialize_any(Any)
        } else {
            Self::deserialize(deserializer)
        }
    }
}

struct Any;

impl<'de> Visitor<'de> for Any {
    type Value = PropertyValue;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a property's value")
    }

    fn visit_unit<E>(self) -> Result<PropertyValue, E> {
        Ok(PropertyValue::Scalar(Scalar::Null))
    }

    fn visit_bool<E>(self, value: bool) -> Result<PropertyValue, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<PropertyValue, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<PropertyValue, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<PropertyValue, E> {
        Ok(PropertyValue::Scalar(Scalar::Double(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<PropertyValue, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<PropertyValue, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(PropertyValue::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<PropertyValue, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(PropertyValue::Struct(members))
    }
}

#[cfg(test)]
mod tests {
    use super::super::NewObject;
    use super::*;

    fn there_and_back<T: Serialize + for<'de> Deserialize<'de> + PartialEq + fmt::Debug>(value: &T, json: &str) {
        assert_eq!(serde_json::to_string(value).unwrap(), json);
        assert_eq!(serde_json::from_str::<T>(json).unwrap(), *value);
        let bytes = bincode::serialize(value).unwrap();
        assert_eq!(bincode::deserialize::<T>(&bytes).unwrap(), *value);
    }

    #[test]
    fn values_are_plain_json_and_travel_between_processes() {
        there_and_back(&PropertyValue::from(true), "true");
        there_and_back(&PropertyValue::from(-5i64), "-5");
        there_and_back(&PropertyValue::from(u64::MAX), "18446744073709551615");
        there_and_back(&PropertyValue::from("a"), "\"a\"");
        there_and_back(&PropertyValue::Scalar(Scalar::Null), "null");
        there_and_back(&PropertyValue::List(vec![1i64.into(), "b".into()]), "[1,\"b\"]");
        there_and_back(
            &PropertyValue::Struct(vec![("iops-total".into(), 7i64.into())]),
            "{\"iops-total\":7}",
        );
        serde_json::from_str::<PropertyValue>("[[1]]").unwrap_err();
    }

    #[test]
    fn a_new_object_is_flat_and_does_not_show_its_values() {
        let object = NewObject {
            qom_type: "secret".into(),
            id: "s0".into(),
            properties: vec![("data".into(), "hush".into())],
        };
        there_and_back(&object, r#"{"qom-type":"secret","id":"s0","data":"hush"}"#);
        assert!(!format!("{object:?}").contains("hush"));
    }
}
