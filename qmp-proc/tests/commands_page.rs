//! docs/COMMANDS.md is written from the declared table. `BULKHEAD_UPDATE=1 cargo test -p qmp-proc --test commands_page`
//! writes it anew; without that the test compares.

use ipc::narrowing::read_only_commands;
use qmp_proc::schema::commands::COMMANDS;
use qmp_proc::schema::events::EVENTS;
use qmp_proc::schema::types::{CommandType, IntType, Member, Run, StructType, Type};
use std::collections::BTreeMap;
use std::fmt::Write;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/COMMANDS.md");

const HEAD: &str = "\
# Commands and events

Written from the table that the server checks arguments against (`qmp-proc/src/schema/`); a test keeps it so
(`qmp-proc/tests/commands_page.rs` says how to write it anew). What is not here does not exist: a client is told
`CommandNotFound`. `query-qmp-schema` tells a program the same.

- **read-only**: it only looks. A monitor with `allow=read-only` has these.
- **acts**: it changes the machine, its devices or what the server holds.
- **session**: it concerns this connection only.
- *at once* commands are answered by the connection's own process and wait for nothing; the others by the supervisor, each
  as a sequence of its own: a slow one delays no other connection.
";

/// What an argument that is absent means.
const DEFAULTS: &[(&str, &str, &str)] = &[
    ("qmp_capabilities", "enable", "none"),
    (
        "dump-guest-memory",
        "detach",
        "`false`: the reply comes when the dump is written",
    ),
    ("dump-guest-memory", "begin", "all memory"),
    ("dump-guest-memory", "length", "all memory"),
    ("dump-guest-memory", "live", "`false`: the guest stands meanwhile"),
    ("dump-guest-memory", "format", "`elf`"),
    (
        "dump-guest-memory",
        "compression",
        "`fast`; `small` takes about three times as long for a tenth less; of kdump-zlib and kdump-raw-zlib only",
    ),
    ("dump-guest-memory", "exclude", "nothing is left out"),
    ("query-command-line-options", "option", "all options"),
    ("set-action", "reboot", "stays as it is"),
    ("set-action", "shutdown", "stays as it is"),
    ("set-action", "panic", "stays as it is"),
    ("set-action", "watchdog", "stays as it is"),
    ("add-fd", "fdset-id", "the lowest free one"),
    ("add-fd", "opaque", "none"),
    ("remove-fd", "fd", "all of the set"),
    ("qom-list-types", "implements", "all types"),
    (
        "qom-list-types",
        "abstract",
        "`false`: only types of which there can be objects",
    ),
];

/// The types that have a section, by name.
type Named = BTreeMap<&'static str, Type>;

fn type_text(ty: &Type, named: &mut Named) -> String {
    let mut link = |name: &'static str| {
        named.insert(name, *ty);
        format!("[{name}](#{})", name.to_lowercase())
    };
    match ty {
        Type::Null => "null".into(),
        Type::Bool => "boolean".into(),
        Type::Int(IntType::Int) => "integer".into(),
        Type::Int(IntType::Size) => "integer, 64 bits without sign".into(),
        Type::Int(IntType::Narrow { min, max, .. }) => format!("integer, {min} to {max}"),
        Type::Number => "number".into(),
        Type::Str => "text".into(),
        Type::Any => "anything".into(),
        Type::Array(item) => format!("list of {}", type_text(item, named)),
        Type::Enum(of) => link(of.name),
        Type::Struct(of) if of.members.is_empty() && of.variants.is_none() => "`{}`".into(),
        Type::Struct(of) => link(of.name),
        Type::Alternate(of) => link(of.name),
    }
}

fn class(command: &CommandType) -> String {
    let class = match command.run {
        Run::Here(_) if command.name == "qmp_capabilities" => "Session",
        _ if read_only_commands().any(|name| name == command.name) => "Read-only",
        _ => "Acts",
    };
    let at_once = if matches!(command.run, Run::Here(_)) {
        ", at once"
    } else {
        ""
    };
    let oob = if command.allow_oob { ", also out of band" } else { "" };
    format!("{class}{at_once}{oob}")
}

fn members(out: &mut String, members: &[Member], named: &mut Named, absent: impl Fn(&str) -> Option<&'static str>) {
    for member in members {
        let ty = type_text(&member.ty, named);
        let optional = match (member.optional, absent(member.name)) {
            (false, _) => String::new(),
            (true, Some(meaning)) => format!("; absent: {meaning}"),
            (true, None) => "; may be absent".into(),
        };
        let _ = writeln!(out, "- `{}`: {ty}{optional}", member.name);
    }
}

fn of_type(out: &mut String, of: &StructType, named: &mut Named) {
    members(out, of.members, named, |_| None);
    variants(out, of, named);
}

fn variants(out: &mut String, of: &StructType, named: &mut Named) {
    if let Some(variants) = of.variants {
        for (case, variant) in variants.of {
            let _ = writeln!(out, "- and when `{}` is `{case}`:", variants.tag);
            let mut more = String::new();
            members(&mut more, variant.members, named, |_| None);
            more.lines().for_each(|line| {
                let _ = writeln!(out, "  {line}");
            });
        }
    }
}

fn page() -> String {
    let mut named = Named::new();
    let mut out = HEAD.to_owned();
    let mut commands: Vec<_> = COMMANDS.iter().collect();
    commands.sort_by_key(|command| command.name);
    let _ = write!(out, "\n## Commands\n\n{} of them.\n", commands.len());
    for command in commands {
        let returns = type_text(&command.returns, &mut named);
        let _ = write!(
            out,
            "\n### {}\n\n{}. Returns {returns}.\n",
            command.name,
            class(command)
        );
        if !command.arguments.members.is_empty() {
            let mut list = String::new();
            let default = |name: &str| {
                let found = DEFAULTS
                    .iter()
                    .find(|(of, member, _)| *of == command.name && *member == name);
                found.map(|(_, _, meaning)| *meaning)
            };
            members(&mut list, command.arguments.members, &mut named, default);
            variants(&mut list, command.arguments, &mut named);
            let _ = write!(out, "\n{list}");
        }
    }
    let mut events: Vec<_> = EVENTS.iter().collect();
    events.sort_by_key(|event| event.name);
    out.push_str("\n## Events\n");
    for event in events {
        let _ = write!(out, "\n### {}\n", event.name);
        let mut list = String::new();
        of_type(&mut list, event.data, &mut named);
        let _ = match &*list {
            "" => write!(out, "\nNo data.\n"),
            list => write!(out, "\n{list}"),
        };
    }
    out.push_str("\n## Types\n");
    // Writing one may name further ones.
    let mut written: BTreeMap<&str, String> = BTreeMap::new();
    while let Some((name, ty)) = named
        .iter()
        .map(|(name, ty)| (*name, *ty))
        .find(|(name, _)| !written.contains_key(name))
    {
        let mut text = String::new();
        match ty {
            Type::Enum(of) => {
                let words: Vec<_> = of.values.iter().map(|word| format!("`{word}`")).collect();
                let _ = writeln!(text, "One of {}.", words.join(", "));
            }
            Type::Struct(of) => of_type(&mut text, of, &mut named),
            Type::Alternate(of) => {
                for (_, branch) in of.branches {
                    let _ = writeln!(text, "- {}", type_text(branch, &mut named));
                }
            }
            _ => unreachable!("only these have names"),
        }
        written.insert(name, text);
    }
    for (name, text) in written {
        let _ = write!(out, "\n### {name}\n\n{text}");
    }
    out
}

#[test]
fn the_page_of_commands_is_that_of_the_table() {
    let page = page();
    if std::env::var_os("BULKHEAD_UPDATE").is_some() {
        std::fs::write(PAGE, &page).unwrap();
    }
    let written = std::fs::read_to_string(PAGE).unwrap_or_default();
    let differs = page.lines().zip(written.lines()).find(|(new, old)| new != old);
    assert!(
        page == written,
        "docs/COMMANDS.md is out of date (first difference: {differs:?}): BULKHEAD_UPDATE=1 cargo test -p qmp-proc --test commands_page"
    );
}

#[test]
fn every_default_is_that_of_an_argument_that_may_be_absent() {
    for (command, argument, _) in DEFAULTS {
        let declared = COMMANDS.iter().find(|declared| declared.name == *command);
        let members = declared.map_or(&[][..], |declared| declared.arguments.members);
        assert!(
            members.iter().any(|member| member.name == *argument && member.optional),
            "{command} {argument}"
        );
    }
}
