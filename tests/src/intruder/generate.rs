//! Messages that are well formed and mean nothing: values of any message type, made from random numbers.
//!
//! The type's own `Deserialize` says what it consists of; [`Source`] answers whatever it asks for. What it asks for are
//! numbers that matter at borders, short texts, short lists and any variant of an enum. A capability inside a message takes a
//! real descriptor, as if it had arrived: that works only while a channel decodes, so the message is made there
//! ([`Made`]).

use super::rng::Rng;
use ipc::caps::DiskFd;
use ipc::{Channel, Message};
use serde::de::value::U8Deserializer;
use serde::de::{
    self, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess, SeqAccess, VariantAccess, Visitor,
};
use serde::{Deserialize, Serialize, Serializer};
use std::os::fd::OwnedFd;

/// Most fds that a made message may hold.
const FDS: usize = 8;
/// Most elements of one list.
const MAX_LENGTH: usize = 40;
/// A value of more parts than this is finished with the simplest there is.
const MAX_PARTS: usize = 400;

/// A message of type `M`, decoded from nothing but the seed of a random number generator.
struct Made<M>(M);

/// What travels to make one.
#[derive(Serialize)]
struct Seed(u64, [DiskFd; FDS]);

impl<M: Message> Message for Made<M> {
    const KIND: u16 = u16::MAX;
}

impl<M> Serialize for Made<M> {
    fn serialize<S: Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        Err(serde::ser::Error::custom("this type is only received"))
    }
}

impl<'de, M: Message> Deserialize<'de> for Made<M> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // The indices of the fds are read and left alone.
        let (seed, _) = <(u64, [u8; FDS])>::deserialize(deserializer)?;
        let made = (0..100).find_map(|attempt| {
            let mut source = Source {
                rng: Rng::new(seed.wrapping_add(attempt)),
                parts: 0,
                next_fd: 0,
            };
            M::deserialize(&mut source).ok()
        });
        // What the message did not take is closed: every fd has to be used.
        for index in 0..FDS as u8 {
            let index: U8Deserializer<de::value::Error> = index.into_deserializer();
            drop(DiskFd::deserialize(index));
        }
        made.map(Self)
            .ok_or_else(|| de::Error::custom("a message that cannot be made"))
    }
}

impl Message for Seed {
    const KIND: u16 = u16::MAX;
}

impl<'de> Deserialize<'de> for Seed {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(de::Error::custom("this type is only sent"))
    }
}

/// Makes a message; `fd` gives what its capabilities hold. Nothing where no value of this type was found.
///
/// # Panics
/// When this process is out of descriptors.
pub fn message<M: Message>(rng: &mut Rng, mut fd: impl FnMut() -> OwnedFd) -> Option<M> {
    let (ours, theirs) = ipc::channel::pair().expect("socketpair");
    let seed = Seed(rng.any(), std::array::from_fn(|_| DiskFd::new(fd())));
    Channel::<Seed, Seed>::new(ours).send(seed).expect("sending a seed");
    Channel::<Seed, Made<M>>::new(theirs).recv().ok().map(|made| made.0)
}

/// A value that a message was made from does not fit.
#[derive(Debug)]
struct Unfit;

impl std::fmt::Display for Unfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("unfit")
    }
}

impl std::error::Error for Unfit {}

impl de::Error for Unfit {
    fn custom<T: std::fmt::Display>(_: T) -> Self {
        Self
    }
}

/// Answers what a type asks for.
struct Source {
    rng: Rng,
    parts: usize,
    next_fd: u8,
}

impl Source {
    fn is_long(&mut self) -> bool {
        self.parts += 1;
        self.parts > MAX_PARTS
    }

    fn length(&mut self) -> usize {
        if self.is_long() {
            return 0;
        }
        match self.rng.below(8) {
            0 | 1 => 0,
            2 | 3 => 1,
            4 => MAX_LENGTH,
            _ => self.rng.below(5),
        }
    }

    /// A number that matters somewhere.
    fn number(&mut self) -> u64 {
        let bit = 1u64 << self.rng.below(64);
        match self.rng.below(8) {
            0..3 => self.rng.below(4) as u64,
            3 => bit,
            4 => bit.wrapping_sub(1),
            5 => u64::MAX - self.rng.below(4) as u64,
            6 => self.rng.below(1 << 20) as u64 * 512,
            _ => self.rng.any(),
        }
    }

    fn text(&mut self) -> String {
        const TEXTS: &[&str] = &[
            "",
            "d",
            "n",
            "disk0",
            "x",
            "/nowhere/x",
            "a\nbulkhead: another: supervisor[1]: all is well",
            "\u{1b}[2J",
            "%s%n",
            "fd",
            "json:{}",
            "\u{0}",
            "ä",
            "#block123",
            "/objects/x",
        ];
        match self.rng.below(12) {
            0 => "x".repeat(self.rng.below(5000)),
            1 => (0..self.rng.below(30))
                .map(|_| char::from(self.rng.any() as u8))
                .collect(),
            _ => TEXTS[self.rng.below(TEXTS.len())].to_owned(),
        }
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident $ty:ty),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unfit> {
            let number = self.number();
            visitor.$visit(number as $ty)
        }
    )*};
}

impl<'de> Deserializer<'de> for &mut Source {
    type Error = Unfit;

    numbers! {
        deserialize_i8 visit_i8 i8, deserialize_i16 visit_i16 i16, deserialize_i32 visit_i32 i32, deserialize_i64 visit_i64 i64,
        deserialize_i128 visit_i128 i128, deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64, deserialize_u128 visit_u128 u128, deserialize_f32 visit_f32 f32,
        deserialize_f64 visit_f64 f64
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Unfit> {
        Err(Unfit)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unfit> {
        visitor.visit_bool(self.rng.below(2) == 0)
    }

    /// A small number, or the place of a descriptor: both are this.
    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unfit> {
        if self.rng.below(4) == 0 {
            let number = self.number();
            return visitor.visit_u8(number as u8);
        }
        let fd = self.next_fd;
        self.next_fd = (self.next_fd + 1) % FDS as u8;
        visitor.visit_u8(fd)
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unfit> {
        visitor.visit_char(char::from(self.rng.any() as u8))
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unfit> {
        self.deserialize_string(visitor)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unfit> {
        let text = self.text();
        visitor.visit_string(text)
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unfit> {
        self.deserialize_byte_buf(visitor)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unfit> {
        let length = self.length();
        visitor.visit_byte_buf((0..length).map(|_| self.rng.any() as u8).collect())
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unfit> {
        if self.is_long() || self.rng.below(2) == 0 {
            visitor.visit_none()
        } else {
            visitor.visit_some(self)
        }
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unfit> {
        visitor.visit_unit()
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Unfit> {
        visitor.visit_unit()
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Unfit> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unfit> {
        let left = self.length();
        visitor.visit_seq(Parts { source: self, left })
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, left: usize, visitor: V) -> Result<V::Value, Unfit> {
        visitor.visit_seq(Parts { source: self, left })
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        length: usize,
        visitor: V,
    ) -> Result<V::Value, Unfit> {
        self.deserialize_tuple(length, visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unfit> {
        let left = self.length();
        visitor.visit_map(Parts { source: self, left })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Unfit> {
        self.deserialize_tuple(fields.len(), visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Unfit> {
        let chosen = if self.is_long() {
            0
        } else {
            self.rng.below(variants.len().max(1))
        };
        visitor.visit_enum(Variant {
            source: self,
            chosen: chosen as u32,
        })
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Unfit> {
        Err(Unfit)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Unfit> {
        Err(Unfit)
    }

    fn is_human_readable(&self) -> bool {
        false
    }
}

struct Parts<'a> {
    source: &'a mut Source,
    left: usize,
}

impl<'de> SeqAccess<'de> for Parts<'_> {
    type Error = Unfit;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Unfit> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        seed.deserialize(&mut *self.source).map(Some)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left)
    }
}

impl<'de> MapAccess<'de> for Parts<'_> {
    type Error = Unfit;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Unfit> {
        self.next_element_seed(seed)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Unfit> {
        seed.deserialize(&mut *self.source)
    }
}

struct Variant<'a> {
    source: &'a mut Source,
    chosen: u32,
}

impl<'de, 'a> EnumAccess<'de> for Variant<'a> {
    type Error = Unfit;
    type Variant = &'a mut Source;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self::Variant), Unfit> {
        let chosen: de::value::U32Deserializer<Unfit> = self.chosen.into_deserializer();
        Ok((seed.deserialize(chosen)?, self.source))
    }
}

impl<'de> VariantAccess<'de> for &mut Source {
    type Error = Unfit;

    fn unit_variant(self) -> Result<(), Unfit> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Unfit> {
        seed.deserialize(self)
    }

    fn tuple_variant<V: Visitor<'de>>(self, length: usize, visitor: V) -> Result<V::Value, Unfit> {
        self.deserialize_tuple(length, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(self, fields: &'static [&'static str], visitor: V) -> Result<V::Value, Unfit> {
        self.deserialize_tuple(fields.len(), visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc::FromHelper;
    use ipc::block::{BlockEvent, FromBlock};
    use ipc::vcpu::{FromVcpu, ToVcpu};

    fn null() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn made_messages_differ_and_some_hold_descriptors() {
        let mut rng = Rng::new(1);
        let (mut events, mut replies) = (0, 0);
        for _ in 0..200 {
            match message::<FromBlock>(&mut rng, null).unwrap() {
                FromHelper::Event(BlockEvent::Job { .. } | _) => events += 1,
                FromHelper::Reply { .. } => replies += 1,
            }
        }
        assert!(events > 20 && replies > 20, "{events} {replies}");
        let texts: std::collections::BTreeSet<String> = (0..300)
            .filter_map(|_| message::<ToVcpu>(&mut rng, null))
            .map(|made| format!("{:?}", made.body))
            .collect();
        assert!(texts.len() > 60, "{}", texts.len());
        assert!(texts.iter().any(|text| text.contains("KernelFd")), "{texts:?}");
        assert!(message::<FromVcpu>(&mut rng, null).is_some());
    }
}
