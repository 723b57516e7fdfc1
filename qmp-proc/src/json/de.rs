//! Values → typed messages: serde's deserializer. It reads values that the schema has checked, so its own error texts
//! reach a client only when schema and message type disagree.

use super::Value;
use super::ser::Mismatch;
use serde::Deserialize;
use serde::de::value::{MapAccessDeserializer, MapDeserializer, SeqDeserializer, StrDeserializer, StringDeserializer};
use serde::de::{Deserializer, IntoDeserializer, Visitor};

/// Converts a value.
///
/// # Errors
/// [`Mismatch`] when the type does not have this form.
pub fn from_value<'de, T: Deserialize<'de>>(value: Value) -> Result<T, Mismatch> {
    T::deserialize(Reading(value))
}

/// Converts to an enum's variant, by its name: with `content` to one with members, without to one that has none.
///
/// # Errors
/// [`Mismatch`] when there is no such variant or its content has another form.
pub fn from_variant<'de, T: Deserialize<'de>>(name: &'static str, content: Option<Value>) -> Result<T, Mismatch> {
    match content {
        None => T::deserialize(StrDeserializer::new(name)),
        Some(content) => {
            let tagged = MapDeserializer::new([(name, Reading(content))].into_iter());
            T::deserialize(Tagged(MapAccessDeserializer::new(tagged)))
        }
    }
}

struct Reading(Value);

impl<'de> IntoDeserializer<'de, Mismatch> for Reading {
    type Deserializer = Self;
    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Reading {
    type Error = Mismatch;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(boolean) => visitor.visit_bool(boolean),
            Value::Int(int) => visitor.visit_i64(int),
            Value::Uint(uint) => visitor.visit_u64(uint),
            Value::Double(double) => visitor.visit_f64(double),
            Value::String(text) => visitor.visit_string(text.into_string()),
            Value::Array(items) => SeqDeserializer::new(items.into_iter().map(Reading)).deserialize_any(visitor),
            Value::Object(object) => {
                let members = object.into_entries().into_iter();
                MapDeserializer::new(members.map(|(name, value)| (name.into_string(), Reading(value))))
                    .deserialize_any(visitor)
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        match self.0 {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Mismatch> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Mismatch> {
        match self.0 {
            Value::String(text) => visitor.visit_enum(StringDeserializer::<Mismatch>::new(text.into_string())),
            Value::Object(object) => {
                let members = object.into_entries().into_iter();
                visitor.visit_enum(MapAccessDeserializer::new(MapDeserializer::new(
                    members.map(|(name, value)| (name.into_string(), Reading(value))),
                )))
            }
            _ => Err(Mismatch("neither a name nor a tagged object".to_owned())),
        }
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct
        map struct identifier ignored_any
    }
}

/// An enum's variant with content.
struct Tagged<A>(A);

impl<'de, A> Deserializer<'de> for Tagged<A>
where
    A: serde::de::EnumAccess<'de, Error = Mismatch>,
{
    type Error = Mismatch;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        visitor.visit_enum(self.0)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct
        seq tuple tuple_struct map struct enum identifier ignored_any
    }
}
