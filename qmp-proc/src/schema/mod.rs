//! The one declared table of commands and events, and what follows from it.
//!
//! - [`types`]: how a type is declared (structs, flat unions, enums, alternates, arrays).
//! - [`commands`] and [`events`]: the table. A new command is one entry there, one variant of `ipc::qmp::Command`, and its
//!   handler in the supervisor; a test keeps the first two in step. `info` has types that the table refers to.
//! - [`check`]: a client's arguments against the declaration, with the error texts of the protocol.
//! - [`introspect`] makes the answer to `query-qmp-schema`.

mod bitmaps;
mod blkdebug;
mod block;
mod block_info;
mod blockdev;
mod chardev;
pub mod check;
pub mod commands;
mod devices;
pub mod events;
mod helpers;
mod info;
pub mod introspect;
mod jobs;
mod looking;
mod nbd;
mod objects;
pub mod types;

use crate::json::{Object, Value, de};
use ipc::qmp::{Command, QmpError};
use types::CommandType;

/// The declaration of the command of this name.
pub fn find(name: &str) -> Option<&'static CommandType> {
    commands::COMMANDS.iter().find(|command| command.name == name)
}

/// Checks a supervisor command's arguments and converts it to its message.
///
/// # Errors
/// The error reply for arguments that do not match the declaration.
pub fn decode(command: &CommandType, arguments: Object) -> Result<Command, QmpError> {
    if let Some(old_form) = blockdev::wrapped(command, &arguments) {
        return old_form;
    }
    let arguments = check::arguments(command, objects::flatten(command, arguments)?)?;
    let content = (!command.arguments.members.is_empty()).then_some(Value::Object(arguments));
    de::from_variant(command.name, content)
        .map_err(|mismatch| QmpError::generic(format!("{}: {mismatch}", command.name)))
}

#[cfg(test)]
mod tests {
    use super::types::{Run, Type};
    use super::*;
    use crate::json::ser;

    /// A value of the type: the smallest, with all optional members when `full`.
    fn sample(ty: &Type, full: bool) -> Value {
        match ty {
            Type::Null => Value::Null,
            Type::Bool => Value::Bool(true),
            Type::Int(_) => Value::Int(1),
            Type::Number => Value::Double(1.5),
            Type::Str => Value::string("x"),
            // What is declared so is an object of some form.
            Type::Any => Value::Object(Object::new()),
            Type::Array(item) => Value::Array(vec![sample(item, full)]),
            Type::Enum(of) => Value::string(of.values[0]),
            // An object's form may contain the alternate itself.
            Type::Alternate(of) => {
                let plain = of.branches.iter().find(|(_, ty)| !matches!(ty, Type::Struct(_)));
                sample(&plain.unwrap_or(&of.branches[0]).1, full)
            }
            Type::Struct(of) => {
                let mut object = Object::new();
                for member in of.members.iter().filter(|member| full || !member.optional) {
                    object.push(member.name, sample(&member.ty, full));
                }
                if let Some(variants) = of.variants {
                    let tag = object.get(variants.tag).and_then(Value::as_str);
                    if let Some((_, variant)) = variants.of.iter().find(|(case, _)| Some(*case) == tag) {
                        for member in variant.members.iter().filter(|member| full || !member.optional) {
                            object.push(member.name, sample(&member.ty, full));
                        }
                    }
                }
                Value::Object(object)
            }
        }
    }

    #[test]
    fn every_declared_command_of_the_supervisor_is_its_message() {
        for command in commands::COMMANDS
            .iter()
            .filter(|command| matches!(command.run, Run::Supervisor))
        {
            for full in [false, true] {
                let Value::Object(arguments) = sample(&Type::Struct(command.arguments), full) else {
                    panic!("{}", command.name)
                };
                let message = decode(command, arguments.clone()).unwrap();
                let back = ser::to_value(&message).unwrap();
                let expected = if command.arguments.members.is_empty() {
                    Value::string(command.name)
                } else {
                    Value::Object(Object::new().with(command.name, Value::Object(arguments)))
                };
                assert_eq!(back, expected);
            }
        }
    }

    /// A monitor can be narrowed to exactly the commands that exist.
    #[test]
    fn the_declared_names_are_those_that_a_monitor_can_be_narrowed_to() {
        let mut declared: Vec<_> = commands::COMMANDS.iter().map(|command| command.name).collect();
        let mut known: Vec<_> = ipc::narrowing::command_names().collect();
        declared.sort_unstable();
        known.sort_unstable();
        assert_eq!(declared, known);
        for command in commands::COMMANDS {
            let is_local = ipc::narrowing::LOCAL_COMMANDS.contains(&command.name);
            assert_eq!(is_local, matches!(command.run, Run::Here(_)), "{}", command.name);
        }
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = commands::COMMANDS.iter().map(|command| command.name).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
