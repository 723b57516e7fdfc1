//! Typed messages → values: serde's serializer. A member that is `None` is absent.

use super::{Object, Value};
use serde::ser::{self, Serialize};
use std::fmt::Display;

/// A type that has no JSON form, or another than its reader expects.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Mismatch(pub String);

impl ser::Error for Mismatch {
    fn custom<T: Display>(text: T) -> Self {
        Self(text.to_string())
    }
}
impl serde::de::Error for Mismatch {
    fn custom<T: Display>(text: T) -> Self {
        Self(text.to_string())
    }
}

/// Converts a typed message. Enums are tagged from outside: `{"Variant": content}`, or `"Variant"` without content.
///
/// # Errors
/// [`Mismatch`] for what JSON cannot say (map keys that are not text).
pub fn to_value<T: Serialize + ?Sized>(message: &T) -> Result<Value, Mismatch> {
    Ok(message.serialize(Serializer)?.unwrap_or(Value::Null))
}

struct Serializer;

/// `None` is "absent".
type Serialized = Result<Option<Value>, Mismatch>;

fn tagged(variant: &str, content: Value) -> Value {
    Value::Object(Object::new().with(variant, content))
}

macro_rules! scalars {
    ($($method:ident($type:ty) => $value:expr;)*) => {$(
        fn $method(self, scalar: $type) -> Serialized {
            let convert: fn($type) -> Value = $value;
            Ok(Some(convert(scalar)))
        }
    )*};
}

impl ser::Serializer for Serializer {
    type Ok = Option<Value>;
    type Error = Mismatch;
    type SerializeSeq = Items;
    type SerializeTuple = Items;
    type SerializeTupleStruct = Items;
    type SerializeTupleVariant = Items;
    type SerializeMap = Members;
    type SerializeStruct = Members;
    type SerializeStructVariant = Members;

    scalars! {
        serialize_bool(bool) => Value::Bool;
        serialize_i8(i8) => |n| Value::Int(n.into());
        serialize_i16(i16) => |n| Value::Int(n.into());
        serialize_i32(i32) => |n| Value::Int(n.into());
        serialize_i64(i64) => Value::Int;
        serialize_u8(u8) => |n| Value::Int(n.into());
        serialize_u16(u16) => |n| Value::Int(n.into());
        serialize_u32(u32) => |n| Value::Int(n.into());
        serialize_u64(u64) => |n| i64::try_from(n).map_or(Value::Uint(n), Value::Int);
        serialize_f32(f32) => |n| Value::Double(n.into());
        serialize_f64(f64) => Value::Double;
        serialize_char(char) => |c| Value::string(c.to_string());
        serialize_str(&str) => |text| Value::string(text);
    }

    fn serialize_bytes(self, bytes: &[u8]) -> Serialized {
        bytes.serialize(self)
    }
    fn serialize_none(self) -> Serialized {
        Ok(None)
    }
    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Serialized {
        value.serialize(self)
    }
    fn serialize_unit(self) -> Serialized {
        Ok(Some(Value::Null))
    }
    fn serialize_unit_struct(self, _: &'static str) -> Serialized {
        Ok(Some(Value::Object(Object::new())))
    }
    fn serialize_unit_variant(self, _: &'static str, _: u32, variant: &'static str) -> Serialized {
        Ok(Some(Value::string(variant)))
    }
    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Serialized {
        value.serialize(self)
    }
    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Serialized {
        Ok(Some(tagged(variant, to_value(value)?)))
    }
    fn serialize_seq(self, length: Option<usize>) -> Result<Items, Mismatch> {
        Ok(Items {
            variant: None,
            items: Vec::with_capacity(length.unwrap_or(0)),
        })
    }
    fn serialize_tuple(self, length: usize) -> Result<Items, Mismatch> {
        self.serialize_seq(Some(length))
    }
    fn serialize_tuple_struct(self, _: &'static str, length: usize) -> Result<Items, Mismatch> {
        self.serialize_seq(Some(length))
    }
    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Items, Mismatch> {
        Ok(Items {
            variant: Some(variant),
            items: Vec::new(),
        })
    }
    fn serialize_map(self, _: Option<usize>) -> Result<Members, Mismatch> {
        Ok(Members::default())
    }
    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Members, Mismatch> {
        Ok(Members::default())
    }
    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Members, Mismatch> {
        Ok(Members {
            variant: Some(variant),
            ..Members::default()
        })
    }
}

struct Items {
    variant: Option<&'static str>,
    items: Vec<Value>,
}

impl Items {
    fn add<T: Serialize + ?Sized>(&mut self, item: &T) -> Result<(), Mismatch> {
        self.items.push(to_value(item)?);
        Ok(())
    }
    fn done(self) -> Serialized {
        let array = Value::Array(self.items);
        Ok(Some(match self.variant {
            Some(variant) => tagged(variant, array),
            None => array,
        }))
    }
}

#[derive(Default)]
struct Members {
    variant: Option<&'static str>,
    object: Object,
    key: Option<Box<str>>,
}

impl Members {
    fn add<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) -> Result<(), Mismatch> {
        if let Some(value) = value.serialize(Serializer)? {
            self.object.push(name, value);
        }
        Ok(())
    }
    fn done(self) -> Serialized {
        let object = Value::Object(self.object);
        Ok(Some(match self.variant {
            Some(variant) => tagged(variant, object),
            None => object,
        }))
    }
}

macro_rules! sequences {
    ($($trait:ident::$method:ident)*) => {$(
        impl ser::$trait for Items {
            type Ok = Option<Value>;
            type Error = Mismatch;
            fn $method<T: Serialize + ?Sized>(&mut self, item: &T) -> Result<(), Mismatch> {
                self.add(item)
            }
            fn end(self) -> Serialized {
                self.done()
            }
        }
    )*};
}
sequences! {
    SerializeSeq::serialize_element
    SerializeTuple::serialize_element
    SerializeTupleStruct::serialize_field
    SerializeTupleVariant::serialize_field
}

macro_rules! structs {
    ($($trait:ident)*) => {$(
        impl ser::$trait for Members {
            type Ok = Option<Value>;
            type Error = Mismatch;
            fn serialize_field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<(), Mismatch> {
                self.add(name, value)
            }
            fn end(self) -> Serialized {
                self.done()
            }
        }
    )*};
}
structs! { SerializeStruct SerializeStructVariant }

impl ser::SerializeMap for Members {
    type Ok = Option<Value>;
    type Error = Mismatch;
    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), Mismatch> {
        let Value::String(key) = to_value(key)? else {
            return Err(Mismatch("a map key that is not text".to_owned()));
        };
        self.key = Some(key);
        Ok(())
    }
    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Mismatch> {
        let key = self.key.take().unwrap_or_default();
        self.add(&key, value)
    }
    fn end(self) -> Serialized {
        self.done()
    }
}
