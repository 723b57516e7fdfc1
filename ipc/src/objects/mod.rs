//! Objects and their properties, as QMP's QOM commands speak of them.
//!
//! [`types`] declares which objects can be created and what properties they have; [`value`] is what a property holds.
//! qmp-proc checks a client's object-add against its own declaration of the same (a test keeps them in step); the
//! supervisor makes typed objects of what arrives and trusts nothing of it.

pub mod types;
pub mod value;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};
use std::fmt;
pub use value::{PropertyValue, Scalar};

/// object-add: the type, the id and the properties beside them.
#[derive(Clone, PartialEq)]
pub struct NewObject {
    /// `qom-type`.
    pub qom_type: String,
    /// `id`.
    pub id: String,
    /// All else, in the order given.
    pub properties: Vec<(String, PropertyValue)>,
}

/// Names the properties and never their values: one of them may be a secret.
impl fmt::Debug for NewObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.properties.iter().map(|(name, _)| name).collect();
        f.debug_struct("NewObject")
            .field("qom_type", &self.qom_type)
            .field("id", &self.id)
            .field("properties", &names)
            .finish()
    }
}

/// QMP's form is flat: a property is a member like `id`. Between the processes it is a struct.
impl Serialize for NewObject {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if !serializer.is_human_readable() {
            return (&self.qom_type, &self.id, &self.properties).serialize(serializer);
        }
        let mut map = serializer.serialize_map(Some(2 + self.properties.len()))?;
        map.serialize_entry("qom-type", &self.qom_type)?;
        map.serialize_entry("id", &self.id)?;
        for (name, value) in &self.properties {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for NewObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            let (qom_type, id, properties) = Deserialize::deserialize(deserializer)?;
            return Ok(Self {
                qom_type,
                id,
                properties,
            });
        }
        deserializer.deserialize_map(Flat)
    }
}

struct Flat;

impl<'de> Visitor<'de> for Flat {
    type Value = NewObject;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object's type, id and properties")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<NewObject, A::Error> {
        let (mut qom_type, mut id, mut properties) = (None, None, Vec::new());
        while let Some(name) = map.next_key::<String>()? {
            match &*name {
                "qom-type" => qom_type = Some(map.next_value()?),
                "id" => id = Some(map.next_value()?),
                _ => properties.push((name, map.next_value()?)),
            }
        }
        Ok(NewObject {
            qom_type: qom_type.ok_or_else(|| A::Error::missing_field("qom-type"))?,
            id: id.ok_or_else(|| A::Error::missing_field("id"))?,
            properties,
        })
    }
}

/// QMP's ObjectPropertyInfo.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ObjectPropertyInfo {
    /// Its name.
    pub name: String,
    /// What it holds: `string`, `int`, `child<TYPE>`, `link<TYPE>`.
    #[serde(rename = "type")]
    pub ty: String,
    /// For people.
    pub description: Option<String>,
    /// What it is without being set.
    pub default_value: Option<PropertyValue>,
}

/// QMP's ObjectTypeInfo.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ObjectTypeInfo {
    /// Its name.
    pub name: String,
    /// Whether it only has subtypes and no objects; absent means no.
    #[serde(rename = "abstract")]
    pub is_abstract: Option<bool>,
    /// The type that it is derived from.
    pub parent: Option<String>,
}
