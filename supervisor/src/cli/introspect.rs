//! The table of options as data, for query-command-line-options. As in QEMU some options have another name there, those
//! whose keys depend on a value are listed without keys, and those that have a single word for a value are not listed.

use super::keyval::{Key, Keys, Kind, Takes};
use super::options::{Action, OPTIONS, OptionSpec};
use ipc::info::{CommandLineOptionInfo, CommandLineParameterInfo, CommandLineParameterType};

/// Options that are listed by another name.
const RENAMED: &[(&str, &str)] = &[("m", "memory"), ("smp", "smp-opts"), ("boot", "boot-opts")];
/// Options whose keys depend on a value among them.
const OPEN: &[&str] = &["accel", "device", "net", "nic", "object"];
/// Options that have keys for the parser alone: their value is a word.
const WORDS: &[&str] = &["display", "monitor", "parallel", "vga"];

/// The options that have keys; with a name, that option alone. An option without keys has nothing to tell.
pub fn command_line_options(name: Option<&str>) -> Vec<CommandLineOptionInfo> {
    OPTIONS
        .iter()
        .flat_map(describe)
        .filter(|option| name.is_none_or(|name| option.option == name))
        .collect()
}

fn describe(option: &OptionSpec) -> Vec<CommandLineOptionInfo> {
    let is = |names: &[&str]| option.names.iter().any(|name| names.contains(name));
    if is(WORDS) {
        return Vec::new();
    }
    let forms: &[&Keys] = match &option.action {
        _ if is(OPEN) => {
            // Each of the names is a group of its own.
            let group = |name: &&str| CommandLineOptionInfo {
                option: (*name).to_owned(),
                parameters: Vec::new(),
            };
            return option.names.iter().map(group).collect();
        }
        Action::Flag(_) | Action::Whole(_) | Action::Answer(_) => return Vec::new(),
        Action::Pairs(keys, _) | Action::Accept(keys) => &[keys],
        Action::Forms(forms, _) => forms,
    };
    let mut parameters: Vec<CommandLineParameterInfo> = Vec::new();
    for key in forms.iter().flat_map(|keys| keys.keys) {
        if !parameters.iter().any(|known| known.name == key.name) {
            parameters.push(CommandLineParameterInfo {
                name: key.name.to_owned(),
                ty: ty(key),
            });
        }
    }
    let name = option.names[0];
    let renamed = RENAMED.iter().find(|(own, _)| *own == name);
    vec![CommandLineOptionInfo {
        option: renamed.map_or(name, |(_, listed)| listed).to_owned(),
        parameters,
    }]
}

fn ty(key: &Key) -> CommandLineParameterType {
    match key.takes {
        Takes::Value(Kind::Text) => CommandLineParameterType::String,
        Takes::Value(Kind::Number) => CommandLineParameterType::Number,
        Takes::Value(Kind::Size) => CommandLineParameterType::Size,
        Takes::Switch => CommandLineParameterType::Boolean,
        Takes::Only(words, _) if words.iter().all(|word| matches!(*word, "on" | "off")) => {
            CommandLineParameterType::Boolean
        }
        Takes::Only(words, _) if words.iter().all(|word| word.parse::<u64>().is_ok()) => {
            CommandLineParameterType::Number
        }
        Takes::Only(..) => CommandLineParameterType::String,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameter(option: &str, name: &str) -> Option<CommandLineParameterType> {
        let options = command_line_options(Some(option));
        let found = options.first()?.parameters.iter().find(|known| known.name == name);
        found.map(|known| known.ty)
    }

    #[test]
    fn keys_are_those_that_the_parser_takes() {
        for (option, name, ty) in [
            ("smp-opts", "cpus", CommandLineParameterType::Number),
            ("smp-opts", "dies", CommandLineParameterType::Number),
            ("memory", "size", CommandLineParameterType::Size),
            ("boot-opts", "strict", CommandLineParameterType::Boolean),
            ("mon", "pretty", CommandLineParameterType::Boolean),
            ("mon", "allow", CommandLineParameterType::String),
            ("machine", "usb", CommandLineParameterType::Boolean),
            ("chardev", "path", CommandLineParameterType::String),
            ("chardev", "to", CommandLineParameterType::Number),
            ("chardev", "port", CommandLineParameterType::String),
            ("chardev", "localaddr", CommandLineParameterType::String),
            ("drive", "readonly", CommandLineParameterType::Boolean),
            ("action", "panic", CommandLineParameterType::String),
        ] {
            assert_eq!(parameter(option, name), Some(ty), "{option} {name}");
        }
        assert_eq!(parameter("mon", "nosuch"), None);
        assert_eq!(command_line_options(Some("machine"))[0].option, "machine");
        for open in ["object", "device", "accel", "nic", "net"] {
            let listed = command_line_options(Some(open));
            assert_eq!(listed.len(), 1, "{open}");
            assert_eq!((&*listed[0].option, listed[0].parameters.len()), (open, 0));
        }
        for without_keys in [
            "kernel", "S", "help", "nosuch", "", "-smp", "m", "smp", "boot", "M", "display", "serial",
        ] {
            assert_eq!(command_line_options(Some(without_keys)), [], "{without_keys}");
        }
    }

    #[test]
    fn every_option_with_keys_is_listed_once_and_every_key_once() {
        let all = command_line_options(None);
        let mut options: Vec<_> = all.iter().map(|option| &*option.option).collect();
        options.sort_unstable();
        assert!(options.windows(2).all(|pair| pair[0] != pair[1]), "{options:?}");
        assert!(options.len() > 15, "{options:?}");
        for option in &all {
            let mut names: Vec<_> = option.parameters.iter().map(|known| &known.name).collect();
            names.sort_unstable();
            assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
        }
    }
}
