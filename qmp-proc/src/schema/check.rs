//! Values against declared types, with the protocol's error texts.
//!
//! Members are checked in the order of their declaration, members that are not declared come last; the first fault is
//! reported. Texts name a member by its path (`actions[0].data.snapshot-file`), except those of enums and ranges, which
//! have always named the last component only (`null` for a list's item).

use super::types::{AlternateType, CommandType, EnumType, IntType, Member, StructType, Type};
use crate::json::{Object, Value};
use ipc::qmp::QmpError;
use std::fmt;

/// Checks a command's arguments. The result has only declared members, and numbers in the form that their types say.
///
/// # Errors
/// The error reply.
pub fn arguments(command: &CommandType, arguments: Object) -> Result<Object, QmpError> {
    object(command.arguments, arguments, &Path::Root).map_err(QmpError::generic)
}

/// Checks any value; used for what the server itself says, in tests.
///
/// # Errors
/// What is wrong.
pub fn value(ty: &Type, value: Value) -> Result<Value, String> {
    any(ty, value, &Path::Root)
}

/// Where in the arguments a value is.
enum Path<'a> {
    Root,
    Member(&'a Path<'a>, &'a str),
    Item(&'a Path<'a>, usize),
}

impl Path<'_> {
    /// The last component.
    fn name(&self) -> &str {
        match self {
            Path::Member(_, name) => name,
            Path::Root | Path::Item(..) => "null",
        }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Path::Root => Ok(()),
            Path::Member(Path::Root, name) => f.write_str(name),
            Path::Member(parent, name) => write!(f, "{parent}.{name}"),
            Path::Item(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

fn wrong_type(path: &Path<'_>, expected: &str) -> String {
    format!("Invalid parameter type for '{path}', expected: {expected}")
}

fn any(ty: &Type, value: Value, path: &Path<'_>) -> Result<Value, String> {
    match (ty, value) {
        (Type::Any, value)
        | (Type::Null, value @ Value::Null)
        | (Type::Bool, value @ Value::Bool(_))
        | (Type::Number, value @ Value::Double(_))
        | (Type::Str, value @ Value::String(_)) => Ok(value),
        (Type::Number, Value::Int(int)) => Ok(Value::Double(int as f64)),
        (Type::Number, Value::Uint(uint)) => Ok(Value::Double(uint as f64)),
        (Type::Int(range), value) => integer(*range, value, path),
        (Type::Enum(of), Value::String(word)) => word_of(of, word, path),
        (Type::Array(item), Value::Array(items)) => items
            .into_iter()
            .enumerate()
            .map(|(index, value)| any(item, value, &Path::Item(path, index)))
            .collect::<Result<_, _>>()
            .map(Value::Array),
        (Type::Struct(of), Value::Object(members)) => object(of, members, path).map(Value::Object),
        (Type::Alternate(of), value) => alternate(of, value, path),
        (expected, _) => Err(wrong_type(path, expected.json_name())),
    }
}

fn integer(range: IntType, value: Value, path: &Path<'_>) -> Result<Value, String> {
    match (range, value) {
        (IntType::Int, value @ Value::Int(_)) | (IntType::Size, value @ Value::Uint(_)) => Ok(value),
        (IntType::Size, Value::Int(int)) => Ok(i64::try_from(int as u64).map_or(Value::Uint(int as u64), Value::Int)),
        (IntType::Narrow { name, min, max }, Value::Int(int)) => {
            if (min..=max).contains(&int) {
                Ok(Value::Int(int))
            } else {
                Err(format!("Parameter '{}' expects {name}", path.name()))
            }
        }
        (IntType::Size, _) => Err(wrong_type(path, "uint64")),
        _ => Err(wrong_type(path, "integer")),
    }
}

fn word_of(of: &EnumType, word: Box<str>, path: &Path<'_>) -> Result<Value, String> {
    if of.values.contains(&&*word) {
        Ok(Value::String(word))
    } else {
        Err(format!("Parameter '{}' does not accept value '{word}'", path.name()))
    }
}

fn alternate(of: &AlternateType, value: Value, path: &Path<'_>) -> Result<Value, String> {
    let same_form = |ty: &Type| {
        matches!(
            (ty, &value),
            (Type::Null, Value::Null)
                | (Type::Bool, Value::Bool(_))
                | (Type::Int(_), Value::Int(_) | Value::Uint(_))
                | (Type::Number, Value::Int(_) | Value::Uint(_) | Value::Double(_))
                | (Type::Str | Type::Enum(_), Value::String(_))
                | (Type::Array(_), Value::Array(_))
                | (Type::Struct(_), Value::Object(_))
        )
    };
    match of.branches.iter().find(|(_, ty)| same_form(ty)) {
        Some((_, ty)) => any(ty, value, path),
        None => Err(format!(
            "Invalid parameter type for '{}', expected: {}",
            path.name(),
            of.name
        )),
    }
}

fn object(of: &StructType, mut input: Object, path: &Path<'_>) -> Result<Object, String> {
    let mut output = Object::new();
    members(of.members, &mut input, &mut output, path)?;
    if let Some(variants) = of.variants {
        let tag = output.get(variants.tag).and_then(Value::as_str);
        if let Some((_, variant)) = variants.of.iter().find(|(case, _)| Some(*case) == tag) {
            members(variant.members, &mut input, &mut output, path)?;
        }
    }
    match input.iter().next() {
        Some((name, _)) => Err(format!("Parameter '{}' is unexpected", Path::Member(path, name))),
        None => Ok(output),
    }
}

fn members(declared: &[Member], input: &mut Object, output: &mut Object, path: &Path<'_>) -> Result<(), String> {
    for member in declared {
        let path = Path::Member(path, member.name);
        match input.remove(member.name) {
            Some(value) => output.push(member.name, any(&member.ty, value, &path)?),
            None if member.optional => {}
            None => return Err(format!("Parameter '{path}' is missing")),
        }
    }
    Ok(())
}

impl Type {
    /// What errors call the JSON form.
    fn json_name(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool => "boolean",
            Self::Int(_) => "integer",
            Self::Number => "number",
            Self::Str | Self::Enum(_) => "string",
            Self::Array(_) => "array",
            Self::Struct(_) | Self::Alternate(_) | Self::Any => "object",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::types::{Variants, enumeration, optional, required, structure};
    use super::*;
    use crate::json::Reader;

    static KIND: EnumType = enumeration("Kind", &["abort", "snapshot"]);
    static NO_DATA: StructType = structure("Abort", &[required("data", Type::Struct(&super::super::types::EMPTY))]);
    static SNAPSHOT: StructType = structure("SnapshotWrapper", &[required("data", Type::Struct(&SNAPSHOT_DATA))]);
    static SNAPSHOT_DATA: StructType = structure(
        "Snapshot",
        &[optional("device", Type::Str), required("snapshot-file", Type::Str)],
    );
    static ACTION: StructType = StructType {
        name: "Action",
        members: &[required("type", Type::Enum(&KIND))],
        variants: Some(&Variants {
            tag: "type",
            of: &[("abort", &NO_DATA), ("snapshot", &SNAPSHOT)],
        }),
    };
    static NODE: StructType = structure(
        "Node",
        &[
            optional("file", Type::Alternate(&REFERENCE)),
            optional("size", Type::Int(IntType::Size)),
            optional(
                "small",
                Type::Int(IntType::Narrow {
                    name: "uint8_t",
                    min: 0,
                    max: 255,
                }),
            ),
            optional("number", Type::Number),
        ],
    );
    static REFERENCE: AlternateType = AlternateType {
        name: "Reference",
        branches: &[("definition", Type::Struct(&NODE)), ("reference", Type::Str)],
    };
    static ARGUMENTS: StructType = structure(
        "Arguments",
        &[
            required("actions", Type::Array(&Type::Struct(&ACTION))),
            optional("node", Type::Struct(&NODE)),
        ],
    );

    fn check(text: &str) -> Result<Value, String> {
        let parsed = Reader::default().next(&mut text.as_bytes()).unwrap().unwrap();
        value(&Type::Struct(&ARGUMENTS), parsed)
    }

    /// The texts are those of a live server for commands of the same shapes.
    #[test]
    fn texts_name_the_path_in_nested_structs_unions_and_alternates() {
        for (text, expected) in [
            ("{}", "Parameter 'actions' is missing"),
            ("{'x': 1}", "Parameter 'actions' is missing"),
            (
                "{'actions': {}}",
                "Invalid parameter type for 'actions', expected: array",
            ),
            (
                "{'actions': [1]}",
                "Invalid parameter type for 'actions[0]', expected: object",
            ),
            ("{'actions': [{}]}", "Parameter 'actions[0].type' is missing"),
            (
                "{'actions': [{'type': 'bogus', 'data': {}}]}",
                "Parameter 'type' does not accept value 'bogus'",
            ),
            (
                "{'actions': [{'type': 'abort'}]}",
                "Parameter 'actions[0].data' is missing",
            ),
            (
                "{'actions': [{'type': 'abort', 'data': {}}, {'type': 'snapshot', 'data': {'device': 'd'}}]}",
                "Parameter 'actions[1].data.snapshot-file' is missing",
            ),
            (
                "{'actions': [{'type': 'abort', 'data': {'x': 1}}]}",
                "Parameter 'actions[0].data.x' is unexpected",
            ),
            (
                "{'actions': [], 'node': {'file': 1}}",
                "Invalid parameter type for 'file', expected: Reference",
            ),
            (
                "{'actions': [], 'node': {'file': {'file': {'y': 1}}}}",
                "Parameter 'node.file.file.y' is unexpected",
            ),
            (
                "{'actions': [], 'node': {'size': 1.0}}",
                "Invalid parameter type for 'node.size', expected: uint64",
            ),
            (
                "{'actions': [], 'node': {'small': 256}}",
                "Parameter 'small' expects uint8_t",
            ),
        ] {
            assert_eq!(check(text), Err(expected.to_owned()), "{text}");
        }
    }

    #[test]
    fn numbers_take_the_declared_form() {
        let good = check("{'node': {'size': -1, 'number': 2, 'file': {'file': 'n'}}, 'actions': []}").unwrap();
        let node = good.as_object().unwrap().get("node").unwrap().as_object().unwrap();
        assert_eq!(node.get("size"), Some(&Value::Uint(u64::MAX)));
        assert_eq!(node.get("number"), Some(&Value::Double(2.0)));
    }
}
