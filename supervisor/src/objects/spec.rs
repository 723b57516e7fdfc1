//! What a new object is to be: its properties, checked and typed. Nothing is opened here.

use super::ObjectError;
use super::secret::{SecretFormat, SecretSource, SecretText};
use super::throttle::Limits;
use ipc::block::Polling;
use ipc::objects::types::{Kind, ObjectType, find};
use ipc::objects::{NewObject, PropertyValue, Scalar};
use std::path::PathBuf;

/// Where rng-random reads when it is not told.
const DEFAULT_SOURCE: &str = "/dev/urandom";
/// `poll-max-ns` of an iothread, as QEMU has it.
const DEFAULT_POLL_NS: u64 = 32_768;
/// Largest `size` of a memory backend: what fits below the end of guest physical addresses.
const MAX_MEMORY_BYTES: u64 = 4 << 40;
const PAGE_BYTES: u64 = 4096;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spec {
    /// iothread.
    IoThread(Polling),
    /// memory-backend-memfd.
    Memory(MemorySpec),
    /// rng-builtin.
    RngBuiltin,
    /// rng-random: `filename`.
    RngRandom(PathBuf),
    /// secret.
    Secret(SecretSource, SecretFormat),
    /// throttle-group.
    ThrottleGroup(Limits),
}

/// memory-backend-memfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySpec {
    /// `size`: a multiple of 4 KiB, not 0.
    pub bytes: u64,
    /// `share`.
    pub share: bool,
    /// `prealloc`: the host's memory is taken at once.
    pub prealloc: bool,
}

/// Whether text can be an object's id.
pub fn is_identifier(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text
            .chars()
            .all(|rest| rest.is_ascii_alphanumeric() || matches!(rest, '-' | '.' | '_'))
}

/// An iothread's property as [`Polling`] holds it.
///
/// # Errors
/// When it is negative.
pub fn polling_number(name: &str, value: i64) -> Result<u64, ObjectError> {
    u64::try_from(value).map_err(|_| ObjectError::Negative(name.to_owned()))
}

impl Spec {
    /// Checks the id, the type, and every property.
    ///
    /// # Errors
    /// QEMU's text for the first fault.
    pub fn new(object: &NewObject) -> Result<Self, ObjectError> {
        let ty = find(&object.qom_type).ok_or_else(|| ObjectError::Word("qom-type".into(), object.qom_type.clone()))?;
        if !is_identifier(&object.id) {
            return Err(ObjectError::Identifier);
        }
        let given = Given { object, ty };
        given.check()?;
        match ty.name {
            "iothread" => {
                let number = |name, default| match given.int(name) {
                    Some(value) => polling_number(name, value),
                    None => Ok(default),
                };
                Ok(Self::IoThread(Polling {
                    max_batch: number("aio-max-batch", 0)?,
                    max_ns: number("poll-max-ns", DEFAULT_POLL_NS)?,
                    grow: number("poll-grow", 0)?,
                    shrink: number("poll-shrink", 0)?,
                }))
            }
            "memory-backend-memfd" => {
                let bytes = given.size("size").unwrap_or(0);
                if bytes == 0 {
                    return Err(ObjectError::NoSize(ty.name));
                }
                if bytes > MAX_MEMORY_BYTES || !bytes.is_multiple_of(PAGE_BYTES) {
                    return Err(ObjectError::Size(bytes));
                }
                if given.bool("seal") == Some(false) {
                    return Err(ObjectError::Unsealed);
                }
                Ok(Self::Memory(MemorySpec {
                    bytes,
                    share: given.bool("share").unwrap_or(true),
                    prealloc: given.bool("prealloc").unwrap_or(false),
                }))
            }
            "rng-builtin" => Ok(Self::RngBuiltin),
            "rng-random" => {
                let filename = given.text("filename").unwrap_or(DEFAULT_SOURCE);
                Ok(Self::RngRandom(path(filename)?))
            }
            "secret" => {
                let source = match (given.text("data"), given.text("file")) {
                    (Some(data), None) => SecretSource::Data(SecretText::new(data)),
                    (None, Some(file)) => SecretSource::File(path(file)?),
                    (Some(_), Some(_)) => return Err(ObjectError::TwoSecrets),
                    (None, None) => return Err(ObjectError::NoSecret),
                };
                let format = match given.text("format") {
                    Some("base64") => SecretFormat::Base64,
                    _ => SecretFormat::Raw,
                };
                Ok(Self::Secret(source, format))
            }
            _ => {
                let mut limits = Limits::default();
                for (name, value) in &object.properties {
                    match (name.strip_prefix("x-"), value) {
                        (Some(name), PropertyValue::Scalar(Scalar::Int(value))) => limits.set(name, *value)?,
                        _ => limits.set_all(value)?,
                    }
                }
                limits.check()?;
                Ok(Self::ThrottleGroup(limits))
            }
        }
    }
}

fn path(text: &str) -> Result<PathBuf, ObjectError> {
    if text.contains('\0') {
        return Err(ObjectError::Nul);
    }
    Ok(text.into())
}

/// An object's properties, and what they should be.
struct Given<'a> {
    object: &'a NewObject,
    ty: &'static ObjectType,
}

impl Given<'_> {
    /// All that are given are declared and of their kind, and all that must be given are.
    fn check(&self) -> Result<(), ObjectError> {
        for (name, value) in &self.object.properties {
            let property = self
                .ty
                .property(name)
                .ok_or_else(|| ObjectError::Unexpected(name.clone()))?;
            check_kind(name, property.kind, value)?;
        }
        match self
            .ty
            .properties
            .iter()
            .find(|property| property.required && self.get(property.name).is_none())
        {
            Some(missing) => Err(ObjectError::Missing(missing.name)),
            None => Ok(()),
        }
    }

    /// The last of this name counts.
    fn get(&self, name: &str) -> Option<&PropertyValue> {
        let found = self.object.properties.iter().rev().find(|(known, _)| known == name);
        found.map(|(_, value)| value)
    }

    fn int(&self, name: &str) -> Option<i64> {
        match self.get(name)? {
            PropertyValue::Scalar(Scalar::Int(value)) => Some(*value),
            _ => None,
        }
    }

    fn size(&self, name: &str) -> Option<u64> {
        match self.get(name)? {
            // A negative number is taken modulo 2^64, as servers always have.
            PropertyValue::Scalar(Scalar::Int(value)) => Some(*value as u64),
            PropertyValue::Scalar(Scalar::Uint(value)) => Some(*value),
            _ => None,
        }
    }

    fn bool(&self, name: &str) -> Option<bool> {
        match self.get(name)? {
            PropertyValue::Scalar(Scalar::Bool(value)) => Some(*value),
            _ => None,
        }
    }

    fn text(&self, name: &str) -> Option<&str> {
        match self.get(name)? {
            PropertyValue::Scalar(Scalar::Text(value)) => Some(value),
            _ => None,
        }
    }
}

/// Whether a value is of a kind.
pub fn check_kind(name: &str, kind: Kind, value: &PropertyValue) -> Result<(), ObjectError> {
    let expected = match (kind, value) {
        (Kind::Bool, PropertyValue::Scalar(Scalar::Bool(_)))
        | (Kind::Int, PropertyValue::Scalar(Scalar::Int(_)))
        | (Kind::Size, PropertyValue::Scalar(Scalar::Int(_) | Scalar::Uint(_)))
        | (Kind::Text, PropertyValue::Scalar(Scalar::Text(_)))
        | (Kind::Ints(_), PropertyValue::Struct(_)) => return Ok(()),
        (Kind::Word(words), PropertyValue::Scalar(Scalar::Text(word))) => {
            return if words.contains(&word.as_str()) {
                Ok(())
            } else {
                Err(ObjectError::Word(name.to_owned(), word.clone()))
            };
        }
        (Kind::Bool, _) => "boolean",
        (Kind::Int, _) => "integer",
        (Kind::Size, _) => "uint64",
        (Kind::Text | Kind::Word(_), _) => "string",
        (Kind::Ints(_), _) => "object",
    };
    Err(ObjectError::Type(name.to_owned(), expected))
}
