//! Takes options by their names out of a flat description. What nobody has taken does not exist.

use crate::graph::error::GraphError;
use ipc::blockdev::FlatOptions;
use ipc::objects::Scalar;
use std::collections::BTreeMap;

/// What has not been taken yet.
pub struct Reader(BTreeMap<String, Scalar>);

impl Reader {
    /// A name that comes twice has the last value.
    pub fn new(options: FlatOptions) -> Self {
        Self(options.0.into_iter().collect())
    }

    /// Everything must have been taken.
    ///
    /// # Errors
    /// The first that has not.
    pub fn finish(self) -> Result<(), GraphError> {
        match self.0.into_keys().next() {
            Some(name) => Err(GraphError::Unexpected(name)),
            None => Ok(()),
        }
    }

    /// Whether there is anything whose name begins so.
    pub fn has_below(&self, prefix: &str) -> bool {
        self.0
            .range(prefix.to_owned()..)
            .next()
            .is_some_and(|(name, _)| name.starts_with(prefix))
    }

    /// Adds an option, as if it had been given.
    pub fn put(&mut self, name: String, value: Scalar) {
        self.0.insert(name, value);
    }

    /// Takes a null.
    pub fn take_null(&mut self, name: &str) -> bool {
        let is_null = self.0.get(name) == Some(&Scalar::Null);
        if is_null {
            self.0.remove(name);
        }
        is_null
    }

    /// Text.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, GraphError> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(Scalar::Text(text)) => Ok(Some(text)),
            Some(_) => Err(GraphError::Type(name.to_owned(), "string")),
        }
    }

    /// One of some words.
    pub fn word(&mut self, name: &str, words: &[&'static str]) -> Result<Option<&'static str>, GraphError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        let known = words.iter().copied().find(|word| *word == text);
        let last = name.rsplit('.').next().unwrap_or(name);
        known
            .map(Some)
            .ok_or_else(|| GraphError::Word(last.to_owned(), text.clone()))
    }

    /// A boolean; on or off as text.
    pub fn switch(&mut self, name: &str) -> Result<Option<bool>, GraphError> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(Scalar::Bool(value)) => Ok(Some(value)),
            Some(Scalar::Text(text)) => match text.as_str() {
                "on" | "yes" | "true" | "y" => Ok(Some(true)),
                "off" | "no" | "false" | "n" => Ok(Some(false)),
                _ => Err(GraphError::Type(name.to_owned(), "boolean")),
            },
            Some(_) => Err(GraphError::Type(name.to_owned(), "boolean")),
        }
    }

    /// A number that is not negative; as text it may have a suffix (K, M, G, T).
    pub fn size(&mut self, name: &str) -> Result<Option<u64>, GraphError> {
        let wrong = || GraphError::Type(name.to_owned(), "integer");
        match self.0.remove(name) {
            None => Ok(None),
            Some(Scalar::Int(number)) => u64::try_from(number).map(Some).map_err(|_| wrong()),
            Some(Scalar::Uint(number)) => Ok(Some(number)),
            Some(Scalar::Text(text)) => size(&text).map(Some).ok_or_else(wrong),
            Some(_) => Err(wrong()),
        }
    }

    /// A number.
    pub fn int(&mut self, name: &str) -> Result<Option<i64>, GraphError> {
        let wrong = || GraphError::Type(name.to_owned(), "integer");
        match self.0.remove(name) {
            None => Ok(None),
            Some(Scalar::Int(number)) => Ok(Some(number)),
            Some(Scalar::Text(text)) => text.parse().map(Some).map_err(|_| wrong()),
            Some(_) => Err(wrong()),
        }
    }
}

/// `512`, `64k`, `1G`: bytes.
fn size(text: &str) -> Option<u64> {
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).ok();
    }
    let digits = text.trim_end_matches(|last: char| last.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        _ => return None,
    };
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    let number: u64 = digits.parse().ok().filter(|_| plain)?;
    number.checked_mul(1 << shift)
}
