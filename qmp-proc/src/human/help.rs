//! What the human monitor knows, for `help` and `info`.

use super::END;
use std::fmt::Write;

/// A command: its name (for info the item's), its parameters, and what it does.
type Entry = (&'static str, &'static str, &'static str);

/// The commands.
pub const COMMANDS: &[Entry] = &[
    ("gpa2hva", "addr", "refused: no host address is told"),
    (
        "gva2gpa",
        "addr",
        "translate a virtual address of the vCPU to a physical one",
    ),
    ("help|?", "[cmd]", "this list, or one command of it"),
    ("info", "[subcommand]", "what the machine is and does"),
    (
        "qemu-io",
        "[-d] device \"[command]\"",
        "read and write a disk or node; what it prints is on standard output",
    ),
    ("x", "/fmt addr", "show memory at a virtual address of the vCPU"),
    ("xp", "/fmt addr", "show memory at a physical address"),
];

/// The items of `info`.
pub const ITEMS: &[Entry] = &[
    ("block", "[device]", "the disks, or one of them"),
    ("cpus", "", "the vCPUs and their threads"),
    ("kvm", "", "whether KVM runs the guest"),
    ("mtree", "-f", "which memory or device is at which address"),
    ("name", "", "the machine's name"),
    (
        "registers",
        "[-a|vcpu]",
        "registers of the vCPU, of another, or of all (-a)",
    ),
    ("status", "", "whether the guest runs"),
    ("uuid", "", "the machine's UUID"),
    ("version", "", "the server's version"),
];

fn line(prefix: &str, (name, parameters, text): &Entry) -> String {
    format!("{prefix}{name} {parameters} -- {text}{END}")
}

/// All items of `info`.
pub fn items() -> String {
    ITEMS.iter().map(|entry| line("info ", entry)).collect()
}

/// `help`, with what it was asked for.
pub fn help(words: &[&str]) -> String {
    match words {
        [] => COMMANDS.iter().map(|entry| line("", entry)).collect(),
        ["info"] => items(),
        ["info", item] => match ITEMS.iter().find(|(name, ..)| name == item) {
            Some(entry) => line("info ", entry),
            None => unknown(&format!("info {item}")),
        },
        [name, ..] => match COMMANDS
            .iter()
            .find(|(names, ..)| names.split('|').any(|known| known == *name))
        {
            Some(entry) => line("", entry),
            None => unknown(name),
        },
    }
}

/// The answer to a command that does not exist.
pub fn unknown(name: &str) -> String {
    format!("unknown command: '{name}'{END}")
}

/// The answer to a command that is not used like this.
pub fn misused(command: &str, problem: &str) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write!(text, "{problem}{END}Try \"help {command}\" for more information{END}");
    text
}
