//! File names that are descriptions of nodes (`json:{…}`).

use crate::json::{Reader, Value, de};
use ipc::blockdev::FlatOptions;

/// Reads what is behind `json:`. Which options there are is the supervisor's to know.
///
/// # Errors
/// What is wrong with it.
pub fn read(text: &str) -> Result<FlatOptions, String> {
    let mut rest = text.as_bytes();
    let mut reader = Reader::default();
    let value = match reader.next(&mut rest) {
        Some(Ok(value)) => value,
        Some(Err(error)) => return Err(format!("Could not parse the JSON options: {error}")),
        None => return Err("Could not parse the JSON options: the text ends too early".to_owned()),
    };
    if rest.iter().any(|byte| !byte.is_ascii_whitespace()) {
        return Err("Could not parse the JSON options: there is more behind them".to_owned());
    }
    match value {
        Value::Object(_) => de::from_value(value).map_err(|mismatch| mismatch.to_string()),
        _ => Err("Invalid JSON object given".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc::objects::Scalar;

    #[test]
    fn a_description_is_one_object() {
        let options = read(r#"{"driver": "raw", "file": {"driver": "file", "filename": "a"}} "#).unwrap();
        assert!(
            options
                .0
                .contains(&("file.filename".to_owned(), Scalar::Text("a".into())))
        );
        for wrong in ["", "{", "[]", "1", "{} {}", "{'a': }"] {
            read(wrong).unwrap_err();
        }
    }
}
