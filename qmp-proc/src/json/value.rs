//! The value tree.
//!
//! Depth never exceeds [`super::MAX_NESTING`] for values that were read, so dropping one recurses at most that deep
//! (about 100 bytes of stack a level).

use ipc::wire_order::bucket;

/// A JSON value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// An integer in the range of `i64`.
    Int(i64),
    /// An integer above `i64::MAX`, up to `u64::MAX`.
    Uint(u64),
    /// A number with a fraction or an exponent, or an integer beyond the other two.
    Double(f64),
    /// Text.
    String(Box<str>),
    /// A list.
    Array(Vec<Value>),
    /// An object.
    Object(Object),
}

impl Value {
    /// Text.
    pub fn string(text: impl Into<Box<str>>) -> Self {
        Self::String(text.into())
    }

    /// The text, if it is text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }

    /// The object, if it is one.
    pub fn as_object(&self) -> Option<&Object> {
        match self {
            Self::Object(object) => Some(object),
            _ => None,
        }
    }
}

/// An object: members in the order in which they were added, names unique.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Object {
    entries: Vec<(Box<str>, Value)>,
}

impl Object {
    /// `{}`.
    pub const fn new() -> Self {
        Self { entries: Vec::new() }
    }

    /// Members whose names the caller knows to be unique.
    pub fn from_unique(entries: Vec<(Box<str>, Value)>) -> Self {
        Self { entries }
    }

    /// Adds a member. The caller knows that the name is new.
    pub fn push(&mut self, name: impl Into<Box<str>>, value: Value) {
        self.entries.push((name.into(), value));
    }

    /// As [`Self::push`], for building in one expression.
    #[must_use]
    pub fn with(mut self, name: &str, value: Value) -> Self {
        self.push(name, value);
        self
    }

    /// The member of this name.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.entries
            .iter()
            .find(|(key, _)| **key == *name)
            .map(|(_, value)| value)
    }

    /// Takes the member of this name out.
    pub fn remove(&mut self, name: &str) -> Option<Value> {
        let at = self.entries.iter().position(|(key, _)| **key == *name)?;
        Some(self.entries.remove(at).1)
    }

    /// How many members there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The members in the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (&**key, value))
    }

    /// The members themselves.
    pub fn into_entries(self) -> Vec<(Box<str>, Value)> {
        self.entries
    }

    /// The members in the order in which a QEMU server visits and prints them ([`ipc::wire_order`]).
    pub fn into_wire_order(self) -> Vec<(Box<str>, Value)> {
        let mut entries = self.entries;
        entries.reverse();
        entries.sort_by_cached_key(|(key, _)| bucket(key));
        entries
    }

    /// As [`Self::into_wire_order`], borrowing.
    pub fn wire_order(&self) -> Vec<(&str, &Value)> {
        let mut entries: Vec<_> = self.iter().collect();
        entries.reverse();
        entries.sort_by_cached_key(|(key, _)| bucket(key));
        entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Orders seen from a live server.
    #[test]
    fn members_come_in_the_order_of_a_live_server() {
        for order in [
            &["id", "error"][..],
            &["return", "id"],
            &["class", "desc"],
            &["timestamp", "event", "data"],
            &["seconds", "microseconds"],
            &["micro", "minor", "major"],
            &["qemu", "package"],
            &["version", "capabilities"],
            &["total", "status", "completed"],
            &[
                "vm-clock-nsec",
                "name",
                "date-sec",
                "date-nsec",
                "vm-clock-sec",
                "id",
                "vm-state-size",
            ],
            &["io-status", "device", "locked", "removable", "inserted"],
        ] {
            let mut backwards = Object::new();
            for name in order.iter().rev() {
                backwards.push(*name, Value::Null);
            }
            let names: Vec<_> = backwards
                .wire_order()
                .into_iter()
                .map(|(name, _)| name.to_owned())
                .collect();
            assert_eq!(names, order);
        }
    }

    #[test]
    fn a_collision_puts_the_newest_member_first() {
        assert_eq!(bucket("aa"), bucket("aq"));
        let names = |object: Object| {
            object
                .wire_order()
                .iter()
                .map(|(name, _)| (*name).to_owned())
                .collect::<String>()
        };
        assert_eq!(
            names(Object::new().with("aa", Value::Null).with("aq", Value::Null)),
            "aqaa"
        );
        assert_eq!(
            names(Object::new().with("aq", Value::Null).with("aa", Value::Null)),
            "aaaq"
        );
    }

    #[test]
    fn a_value_is_small() {
        assert!(size_of::<Value>() <= 32);
    }
}
