//! `query-qmp-schema`: the table as data for clients.
//!
//! Commands and events have their names, built-in types theirs; all other types are numbered in the order in which they
//! are met, because clients must not depend on type names. An array's name is its item's in brackets.

use super::commands::COMMANDS;
use super::events::EVENTS;
use super::types::{EnumType, IntType, StructType, Type};
use crate::json::{Object, Value};
use ipc::narrowing::Allow;

/// The result of `query-qmp-schema` on a monitor that has these commands.
pub fn schema(allow: &Allow) -> Value {
    let mut builder = Builder::default();
    for command in COMMANDS.iter().filter(|command| allow.permits(command.name)) {
        let arguments = builder.name(Type::Struct(command.arguments));
        let returns = builder.name(command.returns);
        let mut info = info(command.name, "command")
            .with("arg-type", Value::string(arguments))
            .with("ret-type", Value::string(returns));
        if command.allow_oob {
            info.push("allow-oob", Value::Bool(true));
        }
        builder.entries.push(info);
    }
    for event in EVENTS {
        let data = builder.name(Type::Struct(event.data));
        builder
            .entries
            .push(info(event.name, "event").with("arg-type", Value::string(data)));
    }
    // Describing a type may name further ones, which are appended.
    let mut next = 0;
    while let Some(named) = builder.named.get(next).copied() {
        let described = builder.describe(named, &next.to_string());
        builder.entries.push(described);
        next += 1;
    }
    let mut next = 0;
    while let Some((name, item)) = builder.arrays.get(next).cloned() {
        builder
            .entries
            .push(info(&name, "array").with("element-type", Value::string(item)));
        next += 1;
    }
    for (name, json) in &builder.builtins {
        builder
            .entries
            .push(info(name, "builtin").with("json-type", Value::string(*json)));
    }
    Value::Array(builder.entries.into_iter().map(Value::Object).collect())
}

fn info(name: &str, meta: &str) -> Object {
    Object::new()
        .with("name", Value::string(name))
        .with("meta-type", Value::string(meta))
}

#[derive(Default)]
struct Builder {
    entries: Vec<Object>,
    /// Types that have a number: the position here.
    named: Vec<Type>,
    arrays: Vec<(String, String)>,
    builtins: Vec<(&'static str, &'static str)>,
}

impl Builder {
    /// The name by which the schema refers to the type.
    fn name(&mut self, ty: Type) -> String {
        let builtin = match ty {
            Type::Null => ("null", "null"),
            Type::Bool => ("bool", "boolean"),
            // All integer types look alike to a client.
            Type::Int(IntType::Int | IntType::Size | IntType::Narrow { .. }) => ("int", "int"),
            Type::Number => ("number", "number"),
            Type::Str => ("str", "string"),
            Type::Any => ("any", "value"),
            Type::Array(item) => {
                let item = self.name(*item);
                let name = format!("[{item}]");
                if !self.arrays.iter().any(|(known, _)| *known == name) {
                    self.arrays.push((name.clone(), item));
                }
                return name;
            }
            Type::Enum(_) | Type::Struct(_) | Type::Alternate(_) => {
                let known = self.named.iter().position(|known| same(known, &ty));
                return known
                    .unwrap_or_else(|| {
                        self.named.push(ty);
                        self.named.len() - 1
                    })
                    .to_string();
            }
        };
        if !self.builtins.contains(&builtin) {
            self.builtins.push(builtin);
        }
        builtin.0.to_owned()
    }

    fn describe(&mut self, ty: Type, name: &str) -> Object {
        match ty {
            Type::Enum(of) => enumeration(of, name),
            Type::Struct(of) => self.structure(of, name),
            Type::Alternate(of) => {
                let members = of
                    .branches
                    .iter()
                    .map(|(_, branch)| Object::new().with("type", Value::string(self.name(*branch))));
                info(name, "alternate").with("members", list(members.collect()))
            }
            _ => info(name, "builtin"),
        }
    }

    fn structure(&mut self, of: &StructType, name: &str) -> Object {
        let members = of.members.iter().map(|member| {
            let mut object = Object::new()
                .with("name", Value::string(member.name))
                .with("type", Value::string(self.name(member.ty)));
            if member.optional {
                object.push("default", Value::Null);
            }
            object
        });
        let mut object = info(name, "object").with("members", list(members.collect()));
        if let Some(variants) = of.variants {
            object.push("tag", Value::string(variants.tag));
            let cases = variants.of.iter().map(|(case, variant)| {
                Object::new()
                    .with("case", Value::string(*case))
                    .with("type", Value::string(self.name(Type::Struct(variant))))
            });
            object.push("variants", list(cases.collect()));
        }
        object
    }
}

fn enumeration(of: &EnumType, name: &str) -> Object {
    let words = || of.values.iter().map(|word| Value::string(*word));
    let members = words().map(|word| Object::new().with("name", word));
    info(name, "enum")
        .with("members", list(members.collect()))
        .with("values", Value::Array(words().collect()))
}

fn list(objects: Vec<Object>) -> Value {
    Value::Array(objects.into_iter().map(Value::Object).collect())
}

/// Whether two named types are one declaration.
fn same(a: &Type, b: &Type) -> bool {
    match (a, b) {
        (Type::Enum(a), Type::Enum(b)) => std::ptr::eq(*a, *b),
        (Type::Struct(a), Type::Struct(b)) => std::ptr::eq(*a, *b),
        (Type::Alternate(a), Type::Alternate(b)) => std::ptr::eq(*a, *b),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::check;
    use super::*;
    use std::collections::HashSet;

    fn text<'a>(object: &'a Object, name: &str) -> &'a str {
        object.get(name).and_then(Value::as_str).unwrap()
    }

    #[test]
    fn the_schema_matches_its_own_declaration() {
        let returns = super::super::find("query-qmp-schema").unwrap().returns;
        check::value(&returns, schema(&Allow::All)).unwrap();
    }

    #[test]
    fn every_reference_leads_to_an_entry_and_every_entry_is_unique() {
        let Value::Array(entries) = schema(&Allow::All) else {
            panic!()
        };
        let entries: Vec<_> = entries.iter().map(|entry| entry.as_object().unwrap()).collect();
        let names: HashSet<_> = entries.iter().map(|entry| text(entry, "name")).collect();
        assert_eq!(names.len(), entries.len());
        for entry in &entries {
            for reference in ["arg-type", "ret-type", "element-type"] {
                if entry.get(reference).is_some() {
                    assert!(names.contains(text(entry, reference)), "{entry:?}");
                }
            }
            for lists in ["members", "variants"] {
                let Some(Value::Array(items)) = entry.get(lists) else {
                    continue;
                };
                for item in items {
                    if let Some(ty) = item.as_object().unwrap().get("type") {
                        assert!(names.contains(ty.as_str().unwrap()), "{entry:?}");
                    }
                }
            }
        }
    }
    #[test]
    fn a_narrow_monitor_has_a_narrow_schema() {
        let allow = Allow::Only(["query-status".to_owned(), "query-qmp-schema".to_owned()].into());
        let Value::Array(entries) = schema(&allow) else {
            panic!()
        };
        let entries = entries.iter().map(|entry| entry.as_object().unwrap());
        let commands = entries.filter(|entry| text(entry, "meta-type") == "command");
        let names: Vec<_> = commands.map(|entry| text(entry, "name")).collect();
        assert_eq!(names, ["qmp_capabilities", "query-qmp-schema", "query-status"]);
    }
}
