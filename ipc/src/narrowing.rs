//! Which commands a monitor has. The supervisor's word counts; qmp-proc has the same list, so that its client sees no
//! more than it can use.
//!
//! The commands' names are those of the variants of [`Command`], as serde knows them, and [`LOCAL_COMMANDS`]: there is no
//! third list to keep in step.

use crate::qmp::{Command, ErrorClass, QmpError};
use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::ser::{self, Impossible, Serialize, Serializer};
use serde::{Deserialize as DeriveDeserialize, Serialize as DeriveSerialize, forward_to_deserialize_any};
use std::collections::BTreeSet;
use std::fmt;

/// The command that every monitor has: without it there is no session.
const NEGOTIATION: &str = "qmp_capabilities";

/// The commands that qmp-proc carries out by itself. They tell nothing that is not compiled into it.
pub const LOCAL_COMMANDS: &[&str] = &[NEGOTIATION, "query-version", "query-commands", "query-qmp-schema"];

/// The commands that a monitor has.
#[derive(Debug, Clone, Default, PartialEq, Eq, DeriveSerialize, DeriveDeserialize)]
pub enum Allow {
    /// All.
    #[default]
    All,
    /// Those of these names, and the negotiation.
    Only(BTreeSet<String>),
}

impl Allow {
    /// Whether the command of this name may be executed.
    pub fn permits(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(names) => name == NEGOTIATION || names.contains(name),
        }
    }

    /// The decision about a command that has arrived.
    ///
    /// # Errors
    /// The answer to its client: the one to a command that does not exist.
    pub fn check(&self, command: &Command) -> Result<(), QmpError> {
        let name = variant_name(command);
        if self.permits(name) {
            Ok(())
        } else {
            Err(not_found(name))
        }
    }
}

/// The answer to a command that does not exist.
pub fn not_found(name: &str) -> QmpError {
    QmpError {
        class: ErrorClass::CommandNotFound,
        desc: format!("The command {name} has not been found"),
    }
}

/// The names of all commands.
pub fn command_names() -> impl Iterator<Item = &'static str> {
    LOCAL_COMMANDS.iter().chain(variant_names::<Command>()).copied()
}

/// Commands that only look although they are not called `query-…`.
const LOOKING: &[&str] = &[
    "device-list-properties",
    "qom-get",
    "qom-list",
    "qom-list-properties",
    "qom-list-types",
];

/// The commands that only look at the machine: all that are called `query-…`, and those that look at its objects. Not
/// those that read guest memory, and none that changes anything: `ringbuf-read` takes what it reads away.
pub fn read_only_commands() -> impl Iterator<Item = &'static str> {
    command_names().filter(|name| name.starts_with("query-") || LOOKING.contains(name))
}

/// The names of an enum's variants.
fn variant_names<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    match T::deserialize(Names) {
        Err(Found::Names(names)) => names,
        Ok(_) | Err(Found::Name(_) | Found::Nothing) => &[],
    }
}

/// The name of a value's variant. What the variant holds is not looked at.
fn variant_name<T: Serialize>(value: &T) -> &'static str {
    match value.serialize(Name) {
        Err(Found::Name(name)) => name,
        Ok(()) | Err(Found::Names(_) | Found::Nothing) => "",
    }
}

/// What was found: an "error", because the search ends with it.
#[derive(Debug)]
enum Found {
    Names(&'static [&'static str]),
    Name(&'static str),
    /// The type is no enum.
    Nothing,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl std::error::Error for Found {}

impl de::Error for Found {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self::Nothing
    }
}

impl ser::Error for Found {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self::Nothing
    }
}

struct Names;

impl<'de> Deserializer<'de> for Names {
    type Error = Found;

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Found> {
        Err(Found::Names(variants))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Found> {
        Err(Found::Nothing)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

struct Name;

macro_rules! no_variant {
    ($($method:ident: $ty:ty),*) => {
        $(fn $method(self, _: $ty) -> Result<(), Found> { Err(Found::Nothing) })*
    };
}

impl Serializer for Name {
    type Ok = ();
    type Error = Found;
    type SerializeSeq = Impossible<(), Found>;
    type SerializeTuple = Impossible<(), Found>;
    type SerializeTupleStruct = Impossible<(), Found>;
    type SerializeTupleVariant = Impossible<(), Found>;
    type SerializeMap = Impossible<(), Found>;
    type SerializeStruct = Impossible<(), Found>;
    type SerializeStructVariant = Impossible<(), Found>;

    no_variant! {
        serialize_bool: bool, serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64,
        serialize_u8: u8, serialize_u16: u16, serialize_u32: u32, serialize_u64: u64, serialize_f32: f32,
        serialize_f64: f64, serialize_char: char, serialize_str: &str, serialize_bytes: &[u8],
        serialize_unit_struct: &'static str
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, variant: &'static str) -> Result<(), Found> {
        Err(Found::Name(variant))
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: &T,
    ) -> Result<(), Found> {
        Err(Found::Name(variant))
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Self::SerializeTupleVariant, Found> {
        Err(Found::Name(variant))
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Self::SerializeStructVariant, Found> {
        Err(Found::Name(variant))
    }

    fn serialize_none(self) -> Result<(), Found> {
        Err(Found::Nothing)
    }

    fn serialize_some<T: Serialize + ?Sized>(self, _: &T) -> Result<(), Found> {
        Err(Found::Nothing)
    }

    fn serialize_unit(self) -> Result<(), Found> {
        Err(Found::Nothing)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, _: &T) -> Result<(), Found> {
        Err(Found::Nothing)
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Self::SerializeSeq, Found> {
        Err(Found::Nothing)
    }

    fn serialize_tuple(self, _: usize) -> Result<Self::SerializeTuple, Found> {
        Err(Found::Nothing)
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Self::SerializeTupleStruct, Found> {
        Err(Found::Nothing)
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Self::SerializeMap, Found> {
        Err(Found::Nothing)
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Self::SerializeStruct, Found> {
        Err(Found::Nothing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump() -> Command {
        Command::DumpGuestMemory {
            paging: false,
            protocol: "file:/x".into(),
            detach: None,
            begin: None,
            length: None,
            format: None,
            compression: None,
            exclude: None,
            live: None,
        }
    }

    #[test]
    fn names_are_those_of_the_protocol() {
        assert_eq!(variant_name(&Command::QueryStatus), "query-status");
        assert_eq!(variant_name(&Command::SystemReset), "system_reset");
        assert_eq!(variant_name(&dump()), "dump-guest-memory");
        let names: Vec<_> = command_names().collect();
        for name in ["qmp_capabilities", "query-version", "query-status", "dump-guest-memory"] {
            assert_eq!(names.iter().filter(|known| **known == name).count(), 1, "{name}");
        }
        // The end of the enum is in the list as well as its beginning.
        assert_eq!(names.len(), LOCAL_COMMANDS.len() + variant_names::<Command>().len());
    }

    #[test]
    fn a_list_lets_through_what_it_names_and_the_negotiation() {
        let allow = Allow::Only(["query-status".to_owned(), "stop".to_owned()].into());
        assert_eq!(allow.check(&Command::QueryStatus), Ok(()));
        assert_eq!(allow.check(&Command::Stop), Ok(()));
        assert!(allow.permits("qmp_capabilities"));
        for (command, name) in [
            (Command::Cont, "cont"),
            (Command::Quit, "quit"),
            (Command::QueryName, "query-name"),
            (dump(), "dump-guest-memory"),
        ] {
            let error = allow.check(&command).unwrap_err();
            assert_eq!(error.class, ErrorClass::CommandNotFound);
            assert_eq!(error.desc, format!("The command {name} has not been found"));
            assert_eq!(Allow::All.check(&command), Ok(()));
        }
    }

    #[test]
    fn the_read_only_commands_only_look() {
        let names: Vec<_> = read_only_commands().collect();
        assert!(names.contains(&"query-status") && names.contains(&"query-commands"));
        for name in [
            "stop",
            "cont",
            "quit",
            "dump-guest-memory",
            "human-monitor-command",
            "memsave",
            "pmemsave",
            "qom-set",
            "ringbuf-read",
            "getfd",
            "qmp_capabilities",
        ] {
            assert!(!names.contains(&name), "{name}");
        }
        // Each of them exists, and there is nothing else.
        assert!(LOOKING.iter().all(|name| names.contains(name)));
        let others = names.iter().filter(|name| !name.starts_with("query-"));
        assert_eq!(others.count(), LOOKING.len());
    }
}
