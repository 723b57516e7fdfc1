//! `-object` and `-device`: options whose keys depend on a value among them. They are written as `key=value,key=value` or
//! as a JSON object.

use super::error::UsageError;
use super::given::Given;
use super::keyval::unescape;
use ipc::objects::PropertyValue;
use std::os::unix::ffi::OsStrExt;

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Open {
    /// From `key=value`: what it is depends on the key.
    Text(String),
    /// From JSON: of a type already.
    Json(PropertyValue),
}

impl Open {
    /// As text; numbers and booleans as they are written.
    pub(super) fn text(&self) -> Option<String> {
        use ipc::objects::Scalar::{Bool, Int, Text, Uint};
        match self {
            Self::Text(text) => Some(text.clone()),
            Self::Json(PropertyValue::Scalar(scalar)) => match scalar {
                Text(text) => Some(text.clone()),
                Int(number) => Some(number.to_string()),
                Uint(number) => Some(number.to_string()),
                Bool(switch) => Some(if *switch { "on" } else { "off" }.to_owned()),
                _ => None,
            },
            Self::Json(_) => None,
        }
    }
}

/// The keys and values in their order; a first value without a key belongs to `implied`. The error does not show the
/// values: one may be a secret.
pub(super) fn parse(given: &Given, implied: &str) -> Result<Vec<(String, Open)>, UsageError> {
    let refuse = |problem: String| UsageError::new(given.option.clone(), problem);
    let bytes = given.value.as_bytes();
    if bytes.starts_with(b"{") {
        let members: Members = serde_json::from_slice(bytes)
            .map_err(|error| refuse(format!("this is no JSON object of properties: {}", place(&error))))?;
        return Ok(members.0);
    }
    let text = given.text().map_err(|_| refuse("this is not text".to_owned()))?;
    if text.is_empty() {
        return Err(given.refuse("a value is missing"));
    }
    let mut pairs = Vec::new();
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        let end = rest
            .iter()
            .position(|byte| matches!(byte, b'=' | b','))
            .unwrap_or(rest.len());
        let has_value = rest.get(end) == Some(&b'=');
        let (value, length) = if has_value {
            let (value, length) = unescape(&rest[end + 1..]);
            (value, end + 1 + length)
        } else {
            unescape(rest)
        };
        let value = value.to_string_lossy().into_owned();
        pairs.push(match (has_value, pairs.is_empty()) {
            (true, _) => (String::from_utf8_lossy(&rest[..end]).into_owned(), Open::Text(value)),
            (false, true) => (implied.to_owned(), Open::Text(value)),
            // A switch that stands alone.
            (false, false) => (value, Open::Text("on".to_owned())),
        });
        rest = &rest[length..];
        rest = rest.strip_prefix(b",").unwrap_or(rest);
    }
    Ok(pairs)
}

/// Where JSON is wrong, without quoting it.
fn place(error: &serde_json::Error) -> String {
    format!("look at column {}", error.column())
}

/// The members of an object, structs among them.
struct Members(Vec<(String, Open)>);

impl<'de> serde::Deserialize<'de> for Members {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MembersVisitor)
    }
}

struct MembersVisitor;

impl<'de> serde::de::Visitor<'de> for MembersVisitor {
    type Value = Members;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
        let mut members = Vec::new();
        while let Some((name, value)) = map.next_entry::<String, PropertyValue>()? {
            members.push((name, Open::Json(value)));
        }
        Ok(Members(members))
    }
}

/// The last value of a key.
pub(super) fn last<'a>(pairs: &'a [(String, Open)], key: &str) -> Option<&'a Open> {
    pairs.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    fn pairs(text: &str) -> Result<Vec<(String, Open)>, String> {
        parse(&Given::whole("-x", OsString::from(text)), "type").map_err(|error| error.to_string())
    }

    #[test]
    fn both_forms_say_the_same() {
        let text = |text: &str| Open::Text(text.to_owned());
        assert_eq!(
            pairs("a,id=b,c=d,,e,f").unwrap(),
            [
                ("type".to_owned(), text("a")),
                ("id".to_owned(), text("b")),
                ("c".to_owned(), text("d,e")),
                ("f".to_owned(), text("on")),
            ]
        );
        let json = pairs(r#"{"type": "a", "n": 5, "s": {"x": 1}}"#).unwrap();
        assert_eq!(json[0], ("type".to_owned(), Open::Json("a".into())));
        assert_eq!(json[1].1.text().as_deref(), Some("5"));
        assert!(matches!(&json[2].1, Open::Json(PropertyValue::Struct(members)) if members.len() == 1));
    }

    #[test]
    fn json_that_is_wrong_is_not_quoted() {
        for wrong in [
            r#"{"qom-type":"secret","data":"hush""#,
            r#"{"data":"hush","more":{"deep":{"deeper":1}}}"#,
            r#"{"data":"hush"} more"#,
        ] {
            let error = pairs(wrong).unwrap_err();
            assert!(error.starts_with("-x: ") && !error.contains("hush"), "{error}");
        }
    }
}
