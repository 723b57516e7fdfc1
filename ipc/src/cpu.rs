//! CPU models as QMP describes them: a name and properties.

use serde::de::{Deserializer, Error, Visitor};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// `type` of query-cpu-model-expansion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExpansionType {
    /// To a model that is the same everywhere, and what differs from it.
    Static,
    /// To all properties.
    Full,
}

/// QMP's CpuModelInfo.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuModelInfo {
    /// The model.
    pub name: String,
    /// Properties by QEMU's names.
    pub props: Option<BTreeMap<String, Property>>,
}

/// QMP's CpuModelExpansionInfo.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuModelExpansionInfo {
    /// The model with its properties.
    pub model: CpuModelInfo,
}

/// A property's value. In JSON it is a plain value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Property {
    /// A feature, on or off.
    Bool(bool),
    /// A number.
    Int(i64),
    /// Text.
    Text(String),
}

/// [`Property`] where the format has no types of its own.
#[derive(Serialize, Deserialize)]
enum Tagged {
    Bool(bool),
    Int(i64),
    Text(String),
}

impl Serialize for Property {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return match self {
                Self::Bool(value) => serializer.serialize_bool(*value),
                Self::Int(value) => serializer.serialize_i64(*value),
                Self::Text(value) => serializer.serialize_str(value),
            };
        }
        let tagged = match self.clone() {
            Self::Bool(value) => Tagged::Bool(value),
            Self::Int(value) => Tagged::Int(value),
            Self::Text(value) => Tagged::Text(value),
        };
        tagged.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Property {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            return deserializer.deserialize_any(Plain);
        }
        Ok(match Tagged::deserialize(deserializer)? {
            Tagged::Bool(value) => Self::Bool(value),
            Tagged::Int(value) => Self::Int(value),
            Tagged::Text(value) => Self::Text(value),
        })
    }
}

struct Plain;

impl Visitor<'_> for Plain {
    type Value = Property;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a boolean, a number or text")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Property, E> {
        Ok(Property::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Property, E> {
        Ok(Property::Int(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Property, E> {
        Ok(Property::Text(value.to_owned()))
    }
}

/// What a guest's CPUID says, with some features switched on or off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuProperties {
    /// Every feature that has a name, and whether the guest has it.
    pub features: BTreeMap<String, bool>,
    /// CPUID's twelve letters.
    pub vendor: String,
    /// Family, with the extended one added.
    pub family: u32,
    /// Model, with the extended one.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
    /// Highest basic leaf.
    pub level: u32,
    /// Highest extended leaf.
    pub xlevel: u32,
    /// The name that CPUID gives the processor.
    pub model_id: String,
}
